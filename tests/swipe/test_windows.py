"""Geometry of windows: every token once, in quadrant order, bad sizes are refused with advice."""

from __future__ import annotations

import numpy as np
import pytest

from swipe.windows import WindowGrid, WindowShard, windows_that_fit


@pytest.mark.parametrize(
    ("rows", "cols", "window"), [(24, 48, 12), (8, 12, 4), (18, 36, 6), (4, 4, 2), (720, 1440, 30)]
)
def test_every_token_is_owned_once(rows: int, cols: int, window: int) -> None:
    """A full shard numbers the image once; a window's numbers are its four quadrants in turn."""
    grid = WindowGrid(rows, cols, window)
    shard = WindowShard.full(grid)
    index = shard.token_index()
    assert index.shape == (grid.windows, grid.tokens) == (rows * cols // window**2, window**2)
    assert np.array_equal(np.sort(index.reshape(-1)), np.arange(rows * cols))
    image = np.arange(rows * cols).reshape(rows, cols)
    for n in (0, grid.windows // 2, grid.windows - 1):
        row, col = (number * window for number in shard.windows[n])
        top, bottom = np.split(image[row : row + window, col : col + window], 2)
        quadrants = [part for half in (top, bottom) for part in np.split(half, 2, axis=1)]
        assert np.array_equal(np.concatenate([q.reshape(-1) for q in quadrants]), index[n])


@pytest.mark.parametrize("wp", [(1, 1), (2, 1), (1, 3), (2, 3)])
@pytest.mark.parametrize("sp", [1, 2, 3, 4, 6, 9, 12, 36])
def test_shards_share_out_the_image(wp: tuple[int, int], sp: int) -> None:
    """Over all ranks every token is held once, and positions are those of the tokens inside their windows."""
    grid = WindowGrid(24, 36, 12)
    found = []
    for py, px in np.ndindex(*wp):
        whole = WindowShard.dealt(grid, wp, (py, px))
        assert all(wy % wp[0] == py and wx % wp[1] == px for wy, wx in whole.windows)
        for sp_rank in range(sp):
            shard = WindowShard.dealt(grid, wp, (py, px), sp, sp_rank)
            index, positions = shard.token_index(), shard.positions()
            assert shard.whole == whole and index.shape == (len(whole.windows), 144 // sp)
            row, col = np.divmod(index, grid.cols)
            assert np.array_equal(
                np.stack((row % 12, col % 12), -1), np.broadcast_to(positions, (*row.shape, 2))
            )
            # How a reader finds this rank's tokens among those of the whole windows.
            sets, quadrants, strips, rest = shard.split(grid.tokens)
            cut = whole.token_index().reshape(-1, sets, quadrants, strips, rest)
            assert np.array_equal(cut[:, sp_rank // strips, :, sp_rank % strips].reshape(index.shape), index)
            found.append(index.reshape(-1))
    assert np.array_equal(np.sort(np.concatenate(found)), np.arange(24 * 36))


def test_unequal_shards_are_refused() -> None:
    """A quadrant that does not divide into strips, windows that do not divide over ranks."""
    grid = WindowGrid(24, 36, 12)
    with pytest.raises(ValueError, match="6 x 6 tokens cannot be cut into 5 equal strips, which 20 ranks"):
        WindowShard.full(grid).dealt(grid, (1, 1), (0, 0), 20, 0)
    with pytest.raises(ValueError, match="2 x 3 windows cannot be dealt evenly to 1 x 2 ranks"):
        WindowShard.dealt(grid, (1, 2), (0, 0))
    with pytest.raises(ValueError, match="rank 2 is not one of 2"):
        WindowShard(grid, ((0, 0),), 2, 2)


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
