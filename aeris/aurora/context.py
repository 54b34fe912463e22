"""What the U-Net is told beside its tokens: the lead time, and noise in the ensemble variant."""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor, nn


def embedding_mlp(width: int) -> nn.Sequential:
    """Linear, SiLU, Linear, all of one width."""
    return nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))


class NoiseMemory:
    """Standard normal noise.

    With a length n it is the sum of the last n draws over sqrt(n), so that calls resemble each other.
    """

    def __init__(self) -> None:
        """Remember nothing."""
        self.length = 0
        self.draws: deque[Tensor] = deque()

    def set_length(self, n: int) -> None:
        """Mix the last `n` draws; 0: a new draw each time. Forgets what was drawn.

        Raises:
            ValueError: `n` is negative.
        """
        if n < 0:
            raise ValueError(f"noise cannot be accumulated over {n} calls; give 0 to draw anew each time")
        self.length = n
        self.clear()

    def clear(self) -> None:
        """Forget what was drawn."""
        self.draws.clear()

    def draw(self, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
        """Noise for one call. A change of shape, device or type starts anew."""
        if not self.length:
            return torch.randn(shape, device=device, dtype=dtype)
        if self.draws and (self.draws[0].shape, self.draws[0].device, self.draws[0].dtype) != (
            torch.Size(shape),
            device,
            dtype,
        ):
            self.clear()
        if len(self.draws) >= self.length:
            self.draws.popleft()
        self.draws.append(torch.randn(shape, device=device, dtype=dtype))
        while len(self.draws) < self.length:
            self.draws.append(torch.randn(shape, device=device, dtype=dtype))
        return torch.stack(tuple(self.draws)).sum(0) / self.length**0.5
