"""Shifted windows without masks: which tokens attend to which, as orders of tokens and sizes of blocks.

Under the usual roll - pad - mask, a shifted window falls apart into regions that do not see each other. Here
each region is a block of its own, and the tokens of a plan are ordered block by block, equal sizes side by
side: attention is then a few dense calls without a mask. A plan is plain integers, made once for a grid.

Words: res is a grid (latents, rows, columns), natural order is row-major over it. Tokens of zero padding are
seen by the windows of unshifted plans (as the published weights expect) and by nobody in shifted ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Res = tuple[int, int, int]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Group:
    """Blocks of equal size that follow each other in a plan's order."""

    blocks: int
    """How many."""
    tokens: int
    """Tokens of a block; all of them attend to each other."""
    padding: int
    """Tokens of padding that a block attends to as well."""


@dataclass(frozen=True, eq=False)
class WindowPlan:
    """An order of the tokens of a grid, and the blocks it consists of."""

    res: Res
    """Latents, rows and columns of the grid."""
    order: Ints
    """Natural index of the token at each place of the order."""
    groups: tuple[Group, ...]
    """The blocks, from the first token to the last."""


@lru_cache(maxsize=256)
def natural(res: Res) -> WindowPlan:
    """The natural order of a grid, as one block."""
    return WindowPlan(res, _frozen(np.arange(np.prod(res))), (Group(1, int(np.prod(res)), 0),))


@lru_cache(maxsize=256)
def plan(res: Res, window: Res, shift: Res, wrap: bool = True) -> WindowPlan:
    """The blocks of a grid under windows shifted by `shift` tokens.

    Args:
        res: Latents, rows, columns.
        window: Size of a window in tokens. A dimension no longer than it gets one window and no shift.
        shift: Tokens the windows are moved by, 0 <= shift < window.
        wrap: Whether the first column is beside the last; only shifted windows reach around.

    Raises:
        ValueError: A size is not positive, or a shift is not below its window.
    """
    if min(res) < 1 or min(window) < 1 or not all(0 <= s < w for s, w in zip(shift, window)):
        raise ValueError(
            f"grid {res}, windows of {window}, shift {shift}: sizes must be positive and shifts from 0 to "
            "below the window, for example windows (2, 6, 12) with shift (1, 3, 6)"
        )
    window, shift = fitted(res, window, shift)
    window_ids, region_ids, cells = _labels(res, window, shift, wrap)
    labels = window_ids * (int(region_ids.max(initial=0)) + 1) + region_ids
    _, block, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    volume = int(np.prod(window))
    padding = np.zeros_like(sizes) if any(shift) else volume - sizes
    key = sizes * (volume + 1) + padding  # larger blocks first, the same order on every machine
    by_size = np.lexsort((cells, block.reshape(-1), -key[block.reshape(-1)]))
    groups = tuple(
        Group(int((key == one).sum()), int(one) // (volume + 1), int(one) % (volume + 1))
        for one in np.unique(key)[::-1]
    )
    return WindowPlan(res, _frozen(cells[by_size]), groups)


def plan_of_block(res: Res, window: Res, block: int, wrap: bool = True) -> WindowPlan:
    """The plan of the block with this number in a U-Net layer: every second one shifts by half a window."""
    half = (window[0] // 2, window[1] // 2, window[2] // 2)
    return plan(res, window, half if block % 2 else (0, 0, 0), wrap)


def fitted(res: Res, window: Res, shift: Res) -> tuple[Res, Res]:
    """Window and shift on this grid: a dimension no longer than its window is one window, unshifted."""
    small = [r <= w for r, w in zip(res, window)]
    sizes = tuple(r if one else w for r, w, one in zip(res, window, small))
    shifts = tuple(0 if one else s for s, one in zip(shift, small))
    return (sizes[0], sizes[1], sizes[2]), (shifts[0], shifts[1], shifts[2])


def _labels(res: Res, window: Res, shift: Res, wrap: bool) -> tuple[Ints, Ints, Ints]:
    """Window, region inside the window and natural index of every token, in the order after rolling."""
    window_ids, regions, cells = (np.zeros((1, 1, 1), np.int64) for _ in range(3))
    for dim, (r, w, s) in enumerate(zip(res, window, shift)):
        shape = [-1 if axis == dim else 1 for axis in range(3)]
        place = np.arange(r)
        front = (-r % w) // 2
        window_ids = window_ids * -(-r // w) + ((place + front) // w).reshape(shape)
        # After rolling: up to the last window, the last window, and in it what came around.
        region = (place >= r - w).astype(np.int64) + (place >= r - s) if s else np.zeros(r, np.int64)
        if dim == 2 and wrap:
            region = np.minimum(region, 1)
        regions = regions * 3 + region.reshape(shape)
        cells = cells * r + ((place + s) % r).reshape(shape)
    return window_ids.reshape(-1), regions.reshape(-1), cells.reshape(-1)


def places(of: WindowPlan) -> Ints:
    """Where each natural index stands in the order of a plan."""
    result = np.empty_like(of.order)
    result[of.order] = np.arange(len(of.order))
    return result


def reordering(source: WindowPlan, target: WindowPlan) -> Ints:
    """For each token of the target order, its place in the source order."""
    return places(source)[target.order]


def halved(res: Res) -> Res:
    """The grid after 2 x 2 merging; an odd last row or column merges with padding."""
    return res[0], -(-res[1] // 2), -(-res[2] // 2)


def merging(source: WindowPlan, target: WindowPlan) -> Ints:
    """For each of the four tokens (row, then column) below each target token, its place in the source.

    -1 stands for padding, below the last row and beside the last column of an odd grid.
    """
    (_, rows, cols), (_, coarse_rows, coarse_cols) = source.res, target.res
    latent, row, col = np.unravel_index(target.order, target.res)
    child_row = 2 * row[:, None] + np.array([0, 0, 1, 1])
    child_col = 2 * col[:, None] + np.array([0, 1, 0, 1])
    inside = (child_row < rows) & (child_col < cols)
    cell = (latent[:, None] * rows + child_row) * cols + child_col
    assert coarse_rows == -(-rows // 2) and coarse_cols == -(-cols // 2)
    return np.where(inside, places(source)[np.where(inside, cell, 0)], -1).reshape(-1)


def inverse(index: Ints, length: int) -> Ints:
    """The place of 0 ... length-1 in an index that holds each at most once; -1 where it does not occur."""
    result = np.full(length, -1, np.int64)
    held = index >= 0
    result[index[held]] = np.flatnonzero(held)
    return result


def _frozen(values: NDArray[np.int64]) -> Ints:
    result = np.ascontiguousarray(values, dtype=np.int64)
    result.setflags(write=False)
    return result
