"""The geometry of windows: which pixels form which window, and which windows a rank owns. Pure integers.

An image of rows x cols tokens is cut into square windows. A layer attends inside its windows; every other
layer uses the *shifted* tiling, whose windows start half a window further down and to the right. Columns
always wrap around. Rows wrap with `row_edge="cyclic"`; with "separate" the two halves of a window that
straddles the row edge do not see each other.
"""

from __future__ import annotations

import math
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
    """The part of an image one rank holds: some windows, and a part of the tokens of each.

    A window is cut into four quadrants (top-left, top-right, bottom-left, bottom-right), the quadrants into
    gcd(sp, 4) equal sets, and every quadrant of a set into strips. Rank `sp_rank` of the `sp` that share a
    window holds one strip of each quadrant of one set: one quadrant strip if 4 divides sp, two half windows
    if sp is 2, everything if it is 1. Its local tokens are those strips one after the other, row-major inside
    each: a *piece* is one such strip in one window.

    Attributes:
        windows: (wy, wx) of the windows, in local order.
        sp: ranks that share each window.
        sp_rank: which of them this one is.

    Raises:
        ValueError: a quadrant cannot be cut into that many strips.
    """

    grid: WindowGrid
    windows: tuple[tuple[int, int], ...]
    sp: int = 1
    sp_rank: int = 0

    def __post_init__(self) -> None:
        """Check that the strips are equal."""
        if not 0 <= self.sp_rank < self.sp:
            raise ValueError(f"rank {self.sp_rank} is not one of {self.sp}")
        if (self.grid.window // 2) ** 2 % self.strips:
            raise ValueError(
                f"a quadrant of {self.grid.window // 2} x {self.grid.window // 2} tokens cannot be cut into "
                f"{self.strips} equal strips, which {self.sp} ranks to a window need"
            )

    @classmethod
    def full(cls, grid: WindowGrid) -> WindowShard:
        """Hold every window whole, in row-major order: the shard of a run on one rank."""
        return cls.dealt(grid, (1, 1), (0, 0))

    @classmethod
    def dealt(
        cls, grid: WindowGrid, ranks: tuple[int, int], place: tuple[int, int], sp: int = 1, sp_rank: int = 0
    ) -> WindowShard:
        """Deal the windows to `ranks` = (wp_y, wp_x) like cards, and take the hand of `place` = (py, px).

        Window (wy, wx) goes to (wy mod wp_y, wx mod wp_x), so neighbours lie on neighbouring ranks.

        Raises:
            ValueError: the hands would not be equal.
        """
        if grid.windows_y % ranks[0] or grid.windows_x % ranks[1]:
            raise ValueError(
                f"{grid.windows_y} x {grid.windows_x} windows cannot be dealt evenly to "
                f"{ranks[0]} x {ranks[1]} ranks"
            )
        rows, cols = range(place[0], grid.windows_y, ranks[0]), range(place[1], grid.windows_x, ranks[1])
        return cls(grid, tuple((wy, wx) for wy in rows for wx in cols), sp, sp_rank)

    @classmethod
    def at_place(cls, grid: WindowGrid, ranks: tuple[int, int], sp: int, place: int) -> WindowShard:
        """Return what the rank at `place` = (py * wp_x + px) * sp + sp_rank holds; see `dealt`."""
        wp_rank, sp_rank = divmod(place, sp)
        return cls.dealt(grid, ranks, divmod(wp_rank, ranks[1]), sp, sp_rank)

    @property
    def whole(self) -> WindowShard:
        """The same windows, each with all its tokens."""
        return WindowShard(self.grid, self.windows)

    @property
    def sets(self) -> int:
        """Number of sets the quadrants of a window are divided into."""
        return math.gcd(self.sp, 4)

    @property
    def strips(self) -> int:
        """Number of strips a quadrant is cut into."""
        return self.sp // self.sets

    @property
    def quadrants(self) -> tuple[int, ...]:
        """The quadrants of which this rank holds a strip: 2 qy + qx."""
        count = 4 // self.sets
        first = self.sp_rank // self.strips * count
        return tuple(range(first, first + count))

    def positions(self) -> NDArray[np.int64]:
        """Return (row, column) inside the window of every local token, int64 [T, 2]."""
        half = self.grid.window // 2
        strip = self.sp_rank % self.strips
        within = np.moveaxis(np.indices((half, half)), 0, -1).reshape(self.strips, -1, 2)[strip]
        corners = np.array([divmod(quadrant, 2) for quadrant in self.quadrants], dtype=np.int64) * half
        return np.asarray((corners[:, None] + within).reshape(-1, 2), dtype=np.int64)

    def token_index(self) -> NDArray[np.int64]:
        """Number every local token by its place in the unshifted image, row * cols + col: int64 [N, T]."""
        corners = np.array(self.windows, dtype=np.int64).reshape(-1, 2) * self.grid.window
        row_NT, col_NT = np.moveaxis(corners[:, None] + self.positions(), -1, 0)
        return np.asarray(row_NT * self.grid.cols + col_NT, dtype=np.int64)

    def split(self, tokens: int) -> tuple[int, ...]:
        """Return dims (sets, quadrants of a set, strips, rest) of `tokens` of a whole window in its order.

        Rank (set, strip) holds [set, :, strip]: how one rank hands a window's tokens to the others.
        """
        return self.sets, 4 // self.sets, self.strips, tokens // (4 * self.strips)
