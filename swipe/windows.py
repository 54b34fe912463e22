"""The geometry of windows: which pixels form which window, and which windows a rank owns. Pure integers.

An image of rows x cols tokens is cut into square windows. A layer attends inside its windows; every other
layer uses the *shifted* tiling, whose windows start half a window further down and to the right. Columns
always wrap around. Rows wrap with `row_edge="cyclic"`; with "separate" the two halves of a window that
straddles the row edge do not see each other.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

ROW_EDGES = ("cyclic", "separate")


def windows_that_fit(rows: int, cols: int) -> list[int]:
    """List the even window sides that divide both `rows` and `cols`, smallest first."""
    return [side for side in range(2, min(rows, cols) + 1, 2) if rows % side == 0 and cols % side == 0]


def _nearest(sizes: list[int], wanted: int, count: int = 3) -> str:
    """Name the `count` sizes nearest to `wanted`, in ascending order, or say that there is none."""
    nearest = sorted(sorted(sizes, key=lambda size: abs(size - wanted))[:count])
    return " or ".join(str(size) for size in nearest) if nearest else "none"


@dataclass(frozen=True)
class WindowGrid:
    """An image of `rows` x `cols` tokens cut into windows of `window` x `window` tokens.

    Raises:
        ValueError: the window is odd or does not divide the image; names the nearest sizes that would do.
    """

    rows: int
    cols: int
    window: int
    row_edge: str = "cyclic"

    def __post_init__(self) -> None:
        """Check that the windows tile the image and can be shifted by half."""
        if self.row_edge not in ROW_EDGES:
            raise ValueError(f"row_edge is {self.row_edge!r}: choose one of {', '.join(ROW_EDGES)}")
        if min(self.rows, self.cols, self.window) < 1:
            raise ValueError(f"rows {self.rows}, cols {self.cols} and window {self.window} must be positive")
        if self.window % 2 or self.rows % self.window or self.cols % self.window:
            fits = windows_that_fit(self.rows, self.cols)
            side = self.window + self.window % 2
            near = [(max(1, round(n / side)) * side) for n in (self.rows, self.cols)]
            raise ValueError(
                f"a window of {self.window} x {self.window} does not tile an image of {self.rows} x "
                f"{self.cols}: the side must be even and divide both. Windows that fit this image: "
                f"{_nearest(fits, self.window)}; the nearest image for windows of {side}: "
                f"{near[0]} x {near[1]}"
            )

    @property
    def windows_y(self) -> int:
        """Number of windows along the rows."""
        return self.rows // self.window

    @property
    def windows_x(self) -> int:
        """Number of windows along the columns."""
        return self.cols // self.window

    @property
    def windows(self) -> int:
        """Number of windows N."""
        return self.windows_y * self.windows_x

    @property
    def tokens(self) -> int:
        """Number of tokens T in one window."""
        return self.window * self.window


@dataclass(frozen=True)
class WindowShard:
    """The windows one rank owns, as (wy, wx) in local order, each whole and with its tokens row-major."""

    grid: WindowGrid
    windows: tuple[tuple[int, int], ...]

    @classmethod
    def full(cls, grid: WindowGrid) -> WindowShard:
        """Own every window, in row-major order: the shard of a run on one rank."""
        return cls(grid, tuple((wy, wx) for wy in range(grid.windows_y) for wx in range(grid.windows_x)))

    def slab(self, window: int) -> tuple[int, int, int, int]:
        """Return (row0, row1, col0, col1), half open, of local window `window` in the unshifted tiling."""
        wy, wx = self.windows[window]
        side = self.grid.window
        return wy * side, (wy + 1) * side, wx * side, (wx + 1) * side

    def token_index(self) -> NDArray[np.int64]:
        """Number every local token by its place in the image, row * cols + col: int64 [N, T]."""
        side = self.grid.window
        corners = np.array(self.windows, dtype=np.int64).reshape(-1, 2) * side
        row_T, col_T = (axis.reshape(-1) for axis in np.indices((side, side)))
        index = (corners[:, :1] + row_T) * self.grid.cols + corners[:, 1:] + col_T
        return np.asarray(index, dtype=np.int64)


def shift_permutation(grid: WindowGrid) -> NDArray[np.int64]:
    """Say where every token of the shifted tiling comes from: int64 [N * T], window-major positions.

    The image moves up and left by half a window on the torus. With windows cut into four quadrants this is a
    swap of quadrants between neighbouring windows, which is why a shift costs one exchange and no halo
    (SWiPe, arXiv 2509.13523).
    """
    half = grid.window // 2
    order = WindowShard.full(grid).token_index()
    place = np.empty(grid.rows * grid.cols, dtype=np.int64)
    place[order.reshape(-1)] = np.arange(order.size)
    row, col = np.divmod(order, grid.cols)
    source = (row + half) % grid.rows * grid.cols + (col + half) % grid.cols
    return np.asarray(place[source].reshape(-1))
