"""Random fields keyed by identity: the same numbers on any device, for any batch and any sharding.

The generator is Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"). It has no
state: the number at (key, counter) is a hash of both. Here the key names *what* the noise is for (seed,
image, member, step ...) and the counter *where* it sits (global token, channel), so no rank needs another's
stream.

Shapes: B batch, N windows, T tokens per window, C channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_LOW = 0xFFFFFFFF
_MULTIPLY = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


def philox(counter: Sequence[Any], key: Sequence[Any]) -> tuple[Any, Any, Any, Any]:
    """Hash four 32-bit counter words under two 32-bit key words into four 32-bit words.

    Words are Python integers or broadcastable int64 tensors that hold values in [0, 2**32). A product of two
    words overflows int64, but its 64 bits are those of the unsigned product, and only the bits are used.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        p0, p1 = c0 * _MULTIPLY[0], c2 * _MULTIPLY[1]
        c0, c1, c2, c3 = ((p1 >> 32) & _LOW) ^ c1 ^ k0, p1 & _LOW, ((p0 >> 32) & _LOW) ^ c3 ^ k1, p0 & _LOW
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return c0, c1, c2, c3


def key(seed: int, *identity: int) -> int:
    """Derive a 64-bit key from a seed and the integers that name one random field.

    Each integer (any sign, up to 64 bits) is folded in by one hash, so `key(s, a, b)` and `key(s, b, a)`
    differ.
    """
    value = seed & 0xFFFFFFFFFFFFFFFF
    for depth, part in enumerate(identity):
        word = part & 0xFFFFFFFFFFFFFFFF
        w0, w1, _, _ = philox((word & _LOW, word >> 32, depth, 0), (value & _LOW, value >> 32))
        value = int(w0) | int(w1) << 32
    return value


def _key_words(keys: Sequence[int], device: torch.device | str, dims: int) -> tuple[Tensor, Tensor]:
    """Split 64-bit keys into two int64 tensors of 32-bit words, shape [B, 1 x dims]."""
    words = torch.tensor([[k & _LOW, (k >> 32) & _LOW] for k in keys], dtype=torch.int64)
    words = words.to(device, non_blocking=True)  # else the host would wait for the device in every microbatch
    shape = (len(keys), *([1] * dims))
    return words[:, 0].reshape(shape), words[:, 1].reshape(shape)


def _unit(word: Tensor) -> Tensor:
    """Map 32-bit words to float32 strictly inside (0, 1), symmetric about one half."""
    return ((word >> 9).float() + 0.5) * 2.0**-23  # 23 bits and a half fit a float32 exactly


def uniform(keys: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
    """Draw one uniform number in (0, 1) per key: float32 [B]."""
    zero = torch.zeros(len(keys), dtype=torch.int64, device=device)
    word, _, _, _ = philox((zero, zero, zero, zero), _key_words(keys, device, 0))
    return _unit(word)


def normal(keys: Sequence[int], tokens_NT: Tensor, channels: int) -> Tensor:
    """Draw a standard normal field per key: float32 [B, N, T, C] on the device of `tokens_NT`.

    Args:
        keys: one key per sample, from `key`.
        tokens_NT: int64 global number of each local token (below 2**32); it alone says where a number
            belongs.
        channels: C.

    Four channels come from one hash (two Box-Muller pairs), so values reach 5.8 standard deviations at most.
    """
    blocks = -(-channels // 4)
    token = tokens_NT.to(torch.int64).unsqueeze(0).unsqueeze(-1)
    block = torch.arange(blocks, dtype=torch.int64, device=tokens_NT.device)
    zero = torch.zeros_like(block)
    words = philox((token, block, zero, zero), _key_words(keys, tokens_NT.device, 3))
    u0, u1, u2, u3 = (_unit(word) for word in words)
    r0, r1 = torch.sqrt(-2.0 * torch.log(u0)), torch.sqrt(-2.0 * torch.log(u2))
    a0, a1 = 2.0 * math.pi * u1, 2.0 * math.pi * u3
    z = torch.stack((r0 * torch.cos(a0), r0 * torch.sin(a0), r1 * torch.cos(a1), r1 * torch.sin(a1)), dim=-1)
    return z.flatten(-2)[..., :channels].contiguous()
