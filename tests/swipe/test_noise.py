"""The keyed generator: published test vectors, statistics, and independence of batch, shard and order."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from swipe.noise import key, normal, philox, uniform

ONES = 0xFFFFFFFF
# Known answers of Philox4x32-10 from the Random123 distribution (kat_vectors).
VECTORS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES,) * 4, (ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "words", "expected"), VECTORS)
def test_philox_gives_the_published_numbers(counter: tuple, words: tuple, expected: tuple) -> None:
    """With Python integers and with int64 tensors alike."""
    assert philox(counter, words) == expected
    tensors = philox([torch.tensor([c]) for c in counter], [torch.tensor([k]) for k in words])
    assert tuple(int(t) for t in tensors) == expected


def test_noise_does_not_depend_on_the_batch_or_the_shard() -> None:
    """Bit for bit: alone or in a batch, all windows or a few or strips of them, all channels or the first."""
    tokens = torch.arange(6 * 16).view(6, 16)
    keys = [key(7, image) for image in (3, 1000000007, 5)]
    z = normal(keys, tokens, 10)
    assert z.shape == (3, 6, 16, 10) and z.dtype == torch.float32
    for n, k in enumerate(keys):
        assert torch.equal(normal([k], tokens, 10)[0], z[n])
    assert torch.equal(normal(list(reversed(keys)), tokens, 10).flip(0), z)
    assert torch.equal(normal(keys, tokens[[4, 1]], 10), z[:, [4, 1]])
    assert torch.equal(normal(keys, tokens[2:3, 5:9], 10), z[:, 2:3, 5:9])
    assert torch.equal(normal(keys, tokens, 5), z[..., :5])
    u = uniform(keys)
    assert torch.equal(uniform(keys[1:2])[0], u[1])


def test_values_are_standard_normal_and_uncorrelated() -> None:
    """Moments, tails and correlations within five standard errors."""
    z = normal([key(0, 0), key(0, 1)], torch.arange(20_000).view(20, 1000), 8).double()
    n = z.numel()
    assert abs(z.mean()) < 5 / math.sqrt(n)
    assert abs(z.var() - 1) < 5 * math.sqrt(2 / n)
    assert abs((z**3).mean()) < 5 * math.sqrt(15 / n)
    assert abs((z**4).mean() - 3) < 5 * math.sqrt(96 / n)
    tail = (z.abs() > 3).double().mean()
    assert abs(tail - math.erfc(3 / math.sqrt(2))) < 5 * math.sqrt(0.0027 / n)
    flat = z.flatten(1, 2)
    c = torch.corrcoef(torch.cat((flat[0].T, flat[1].T)))
    assert (c - torch.eye(16)).abs().max() < 5 / math.sqrt(20_000)
    along = flat[0, :, 0]
    assert abs((along[1:] * along[:-1]).mean()) < 5 / math.sqrt(20_000)


def test_uniform_fills_the_unit_interval() -> None:
    """Inside (0, 1), evenly (Kolmogorov-Smirnov distance below its 1e-6 quantile)."""
    u = np.sort(uniform([key(3, i) for i in range(20_000)]).double().numpy())
    assert 0 < u[0] and u[-1] < 1
    assert np.abs(u - (np.arange(20_000) + 0.5) / 20_000).max() < 2.7 / math.sqrt(20_000)


def test_the_largest_and_smallest_words_stay_inside() -> None:
    """Not 0, whose logarithm is infinite, and not 1, whose inverse normal is."""
    from swipe.noise import _unit

    ends = _unit(torch.tensor([0, ONES]))
    assert 0 < ends[0] and ends[1] < 1 and float(ends.double().sum()) == 1.0


def test_keys_name_their_parts_in_order() -> None:
    """Other seed, other part, other order or other depth: another key; big and negative parts are fine."""
    keys = [
        key(0),
        key(1),
        key(0, 1),
        key(0, 1, 2),
        key(0, 2, 1),
        key(0, 1, 2, 0),
        key(0, -1),
        key(0, 2**63),
        key(0, 0),
    ]
    assert len(set(keys)) == len(keys) and all(0 <= k < 2**64 for k in keys)
    assert key(5, 1, 2) == key(5, 1, 2)
