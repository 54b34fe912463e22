"""Geometry of windows: every token once, slabs and numbers agree, bad sizes are refused with advice."""

from __future__ import annotations

import numpy as np
import pytest

from swipe.windows import WindowGrid, WindowShard, shift_permutation, windows_that_fit


@pytest.mark.parametrize(
    ("rows", "cols", "window"), [(24, 48, 12), (8, 12, 4), (18, 36, 6), (4, 4, 2), (720, 1440, 30)]
)
def test_every_token_is_owned_once(rows: int, cols: int, window: int) -> None:
    """The numbers of a full shard are a permutation of the image, and lie in their slabs."""
    grid = WindowGrid(rows, cols, window)
    shard = WindowShard.full(grid)
    index = shard.token_index()
    assert index.shape == (grid.windows, grid.tokens) == (rows * cols // window**2, window**2)
    assert np.array_equal(np.sort(index.reshape(-1)), np.arange(rows * cols))
    image = np.arange(rows * cols).reshape(rows, cols)
    for n in (0, grid.windows // 2, grid.windows - 1):
        row0, row1, col0, col1 = shard.slab(n)
        assert np.array_equal(image[row0:row1, col0:col1].reshape(-1), index[n])


@pytest.mark.parametrize(("rows", "cols", "window"), [(24, 48, 12), (8, 12, 4), (4, 8, 4)])
def test_shift_is_a_permutation_equal_to_roll(rows: int, cols: int, window: int) -> None:
    """The shift, read through the windows, is numpy's roll of the image by half a window."""
    grid = WindowGrid(rows, cols, window)
    order = WindowShard.full(grid).token_index().reshape(-1)
    permutation = shift_permutation(grid)
    assert np.array_equal(np.sort(permutation), np.arange(rows * cols))
    image = np.random.default_rng(0).standard_normal((rows, cols))
    rolled = np.roll(image, (-window // 2, -window // 2), (0, 1))
    assert np.array_equal(image.reshape(-1)[order][permutation], rolled.reshape(-1)[order])


@pytest.mark.parametrize(
    ("rows", "cols", "window", "says"),
    [
        (24, 48, 10, "6 or 8 or 12"),
        (721, 1440, 30, "the nearest image for windows of 30: 720 x 1440"),
        (24, 48, 7, "6 or 8"),
        (19, 37, 4, "Windows that fit this image: none; the nearest image for windows of 4: 20 x 36"),
        (24, 48, 0, "must be positive"),
    ],
)
def test_impossible_windows_are_refused_with_the_nearest_sizes(
    rows: int, cols: int, window: int, says: str
) -> None:
    """The error names sizes that would do."""
    with pytest.raises(ValueError, match=says):
        WindowGrid(rows, cols, window)


def test_unknown_row_edge_is_refused() -> None:
    """The choices are named."""
    with pytest.raises(ValueError, match="cyclic, separate"):
        WindowGrid(8, 8, 4, "mirror")


def test_windows_that_fit() -> None:
    """Even common divisors, nothing else."""
    assert windows_that_fit(24, 48) == [2, 4, 6, 8, 12, 24]
    assert windows_that_fit(720, 1440)[:6] == [2, 4, 6, 8, 10, 12]
