"""Run the microbatches of one optimizer step through the stages of a model, by a schedule table.

One process holds one stage, the whole model: the table is then F0 B0 F1 B1 ..., and training calls the same
`step` as with many stages.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from swipe.schedule import one_f_one_b


class Microbatch(NamedTuple):
    """What enters the first stage and what the last one is judged by."""

    inputs: tuple[Tensor, ...]
    target: Tensor


class Pipeline:
    """A model in one stage.

    Args:
        model: called as `model(*microbatch.inputs)`.
        loss: maps (output, target) to the mean loss of the microbatch, a scalar.
    """

    def __init__(self, model: nn.Module, loss: Callable[[Tensor, Tensor], Tensor]) -> None:
        """Keep the model and its loss."""
        self.model = model
        self.loss = loss

    def step(self, microbatches: Iterable[Microbatch], count: int) -> Tensor:
        """Accumulate in `.grad` the gradient of the mean loss over `count` microbatches of equal size.

        Microbatches are taken from the iterable one by one, each just before its forward pass.

        Returns:
            The detached losses, [count].

        Raises:
            ValueError: the iterable ends early.
        """
        source = iter(microbatches)
        in_flight: dict[int, Tensor] = {}
        losses: list[Tensor] = []
        for action in one_f_one_b(0, 1, count):
            if action.kind == "F":
                microbatch = next(source, None)
                if microbatch is None:
                    raise ValueError(f"a step of {count} microbatches got only {action.microbatch}")
                in_flight[action.microbatch] = self.loss(self.model(*microbatch.inputs), microbatch.target)
            else:
                loss = in_flight.pop(action.microbatch)
                (loss / count).backward()
                losses.append(loss.detach())
        return torch.stack(losses)
