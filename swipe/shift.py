"""The half-window shift as a plan of messages: who gets which pieces of a rank's tokens, and whose it gets.

Windows are dealt round-robin to ranks and cut into quadrants, so moving the tiling by half a window takes
every quadrant strip of window (wy, wx) to the opposite quadrant, (qy, qx) -> (1-qy, 1-qx), of

    window (wy - [qy=0], wx - [qx=0])    to the shifted tiling (+1)
    window (wy + [qy=1], wx + [qx=1])    back (-1)

No halo, no redundant byte; with 4 | sp a rank's whole tensor goes to one peer (SWiPe, arXiv 2509.13523).

Shapes: B batch, N windows, T tokens per window, D width, P pieces (N x quadrants held), S tokens of a strip.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from swipe.windows import WindowGrid, WindowShard


class Part(NamedTuple):
    """Pieces that travel together, numbered in the local order of the rank that reads this plan."""

    place: int
    """The other side: (py * wp_x + px) * sp + sp_rank."""
    pieces: tuple[int, ...]


class ShiftPlan(NamedTuple):
    """What one rank sends and receives, each ordered by the piece number at the sender."""

    sends: tuple[Part, ...]
    receives: tuple[Part, ...]


def shift_plan(grid: WindowGrid, wp: tuple[int, int], sp: int, place: int, sign: int) -> ShiftPlan:
    """Plan the shift of the rank at `place` among `wp` = (wp_y, wp_x) x `sp` ranks; pure integers.

    Args:
        sign: +1 to the shifted tiling, -1 back, 0 stay.
    """
    shard = WindowShard.at_place(grid, wp, sp, place)
    sends: dict[int, list[int]] = {}
    receives: dict[int, list[tuple[int, int]]] = {}
    held = [(window, quadrant) for window in shard.windows for quadrant in shard.quadrants]
    for piece, (window, quadrant) in enumerate(held):
        there, _ = _locate(shard, wp, *_move(window, quadrant, sign))
        sends.setdefault(there, []).append(piece)
        source, at_source = _locate(shard, wp, *_move(window, quadrant, -sign))
        receives.setdefault(source, []).append((at_source, piece))
    return ShiftPlan(
        tuple(Part(there, tuple(pieces)) for there, pieces in sorted(sends.items())),
        tuple(
            Part(there, tuple(piece for _, piece in sorted(pairs)))
            for there, pairs in sorted(receives.items())
        ),
    )


def _move(window: tuple[int, int], quadrant: int, sign: int) -> tuple[tuple[int, int], int]:
    """Say where a quadrant of a window goes; window numbers are not yet taken modulo the grid."""
    if sign == 0:
        return window, quadrant
    (wy, wx), (qy, qx) = window, divmod(quadrant, 2)
    if sign > 0:
        return (wy - (qy == 0), wx - (qx == 0)), 3 - quadrant
    return (wy + (qy == 1), wx + (qx == 1)), 3 - quadrant


def _locate(
    shard: WindowShard, wp: tuple[int, int], window: tuple[int, int], quadrant: int
) -> tuple[int, int]:
    """Find the place that holds this shard's strip of a quadrant, and the piece's number there."""
    grid, in_set = shard.grid, 4 // shard.sets
    wy, wx = window[0] % grid.windows_y, window[1] % grid.windows_x
    slot = wy // wp[0] * (grid.windows_x // wp[1]) + wx // wp[1]
    sp_rank = quadrant // in_set * shard.strips + shard.sp_rank % shard.strips
    place = (wy % wp[0] * wp[1] + wx % wp[1]) * shard.sp + sp_rank
    return place, slot * in_set + quadrant % in_set


class Mover:
    """Cuts this rank's tensor into the messages of a plan and puts what arrives in its place."""

    def __init__(self, shard: WindowShard, plan: ShiftPlan) -> None:
        """Take the plan of the rank that holds `shard`."""
        self.plan = plan
        self._pieces = len(shard.windows) * len(shard.quadrants)
        self._index: dict[tuple[tuple[int, ...], torch.device], Tensor] = {}

    def outgoing(self, x_BNTD: Tensor) -> list[tuple[int, Tensor]]:
        """Return (place, pieces [B, p, S, D]) for every message; a whole tensor is sent as it is."""
        x_BPSD = self._in_pieces(x_BNTD)
        return [
            (part.place, x_BPSD if self._is_all(part) else x_BPSD.index_select(1, self._at(part, x_BNTD)))
            for part in self.plan.sends
        ]

    def buffers(
        self, shape: Sequence[int], dtype: torch.dtype, device: torch.device
    ) -> list[tuple[int, Tensor]]:
        """Return (place, empty [B, p, S, D]) for every message to come, of a tensor [B, N, T, D]."""
        batch, windows, tokens, width = shape
        strip = windows * tokens // self._pieces
        return [
            (part.place, torch.empty(batch, len(part.pieces), strip, width, dtype=dtype, device=device))
            for part in self.plan.receives
        ]

    def assemble(self, buffers: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
        """Put the pieces that have arrived, in the order of `buffers`, together: [B, N, T, D]."""
        if len(buffers) == 1 and self._is_all(self.plan.receives[0]):
            return buffers[0].view(*shape)
        first = buffers[0]
        out_BPSD = first.new_empty(first.shape[0], self._pieces, *first.shape[2:])
        for part, buffer in zip(self.plan.receives, buffers, strict=True):
            out_BPSD.index_copy_(1, self._at(part, first), buffer)
        return out_BPSD.view(*shape)

    def _in_pieces(self, x_BNTD: Tensor) -> Tensor:
        batch, windows, tokens, width = x_BNTD.shape
        strip = windows * tokens // self._pieces
        return x_BNTD.contiguous().view(batch, self._pieces, strip, width)

    def _is_all(self, part: Part) -> bool:
        return part.pieces == tuple(range(self._pieces))

    def _at(self, part: Part, like: Tensor) -> Tensor:
        """Return the piece numbers of a part as a tensor, made once per device."""
        key = (part.pieces, like.device)
        if key not in self._index:
            self._index[key] = torch.tensor(part.pieces, dtype=torch.int64, device=like.device)
        return self._index[key]
