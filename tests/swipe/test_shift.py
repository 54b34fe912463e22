"""The plan of the half-window shift against torch.roll, over every rank, without a process."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from swipe.shift import Mover, shift_plan
from swipe.windows import WindowGrid, WindowShard

Case = tuple[WindowGrid, tuple[int, int], int]


@st.composite
def layouts(draw: st.DrawFn) -> Case:
    """Draw a grid with ranks that fit it: any wp, any sp whose strips divide a quadrant."""
    wp = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    half = draw(st.sampled_from([1, 2, 3, 6]))
    sp = draw(st.sampled_from([n for n in range(1, 37) if half**2 % (n // math.gcd(n, 4)) == 0]))
    slots = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    return WindowGrid(wp[0] * slots[0] * 2 * half, wp[1] * slots[1] * 2 * half, 2 * half), wp, sp


def movers(case: Case, sign: int) -> list[Mover]:
    """Make every rank's mover."""
    grid, wp, sp = case
    return [Mover(shard, shift_plan(grid, wp, sp, place, sign)) for place, shard in enumerate(shards(case))]


def shards(case: Case) -> list[WindowShard]:
    """List every rank's shard, by place."""
    grid, wp, sp = case
    return [
        WindowShard.dealt(grid, wp, divmod(place // sp, wp[1]), sp, place % sp)
        for place in range(wp[0] * wp[1] * sp)
    ]


def deliver(movers: list[Mover], xs: list[torch.Tensor]) -> list[torch.Tensor]:
    """Carry every message by hand."""
    mail = {
        (place, to): tensor
        for place, (mover, x) in enumerate(zip(movers, xs))
        for to, tensor in mover.outgoing(x)
    }
    out = []
    for place, (mover, x) in enumerate(zip(movers, xs)):
        expected = mover.buffers(x.shape, x.dtype, x.device)
        assert [tensor.shape for _, tensor in expected] == [
            mail[sender, place].shape for sender, _ in expected
        ]
        out.append(mover.assemble([mail.pop((sender, place)) for sender, _ in expected], x.shape))
    assert not mail, "every message is expected by somebody"
    return out


@settings(deadline=None, max_examples=60)
@given(layouts(), st.sampled_from([1, -1]))
def test_every_layout_shifts_like_roll(case: Case, sign: int) -> None:
    """After the exchange each rank holds its tokens of the rolled image, and the way back is the inverse."""
    grid, _, sp = case
    image = torch.arange(grid.rows * grid.cols).view(grid.rows, grid.cols)
    half = sign * grid.window // 2
    rolled = torch.roll(image, (-half, -half), (0, 1)).flatten()
    xs = [torch.from_numpy(shard.token_index())[None, ..., None] for shard in shards(case)]
    there = deliver(movers(case, sign), xs)
    for x, y in zip(xs, there):
        assert torch.equal(y, rolled[x])
    assert all(torch.equal(x, y) for x, y in zip(xs, deliver(movers(case, -sign), there)))
    peers = [len(mover.plan.sends) for mover in movers(case, sign)]
    assert max(peers) <= 4 // math.gcd(sp, 4), "one peer if 4 divides sp, two if 2 does, else four"
    stays = any(p.place == n for n, m in enumerate(movers(case, sign)) for p in m.plan.sends)
    assert not stays or sp % 2 or case[1][0] == 1 or case[1][1] == 1


def test_the_published_map() -> None:
    """At sp 12 the quadrant decides the peer: +9, +3, -3, -9 on the sequence axis, as published."""
    grid = WindowGrid(720, 1440, 30)
    for place in range(6 * 6 * 12):
        wp_rank, sp_rank = divmod(place, 12)
        (py, px), quadrant = divmod(wp_rank, 6), sp_rank // 3
        for sign, step in ((1, [(-1, -1), (-1, 0), (0, -1), (0, 0)]), (-1, [(0, 0), (0, 1), (1, 0), (1, 1)])):
            (part,) = shift_plan(grid, (6, 6), 12, place, sign).sends
            dy, dx = step[quadrant]
            there = ((py + dy) % 6 * 6 + (px + dx) % 6) * 12 + sp_rank + (9, 3, -3, -9)[quadrant]
            assert part.place == there and part.pieces == tuple(range(32))


def test_one_rank_keeps_everything() -> None:
    """Without peers the shift is one local move."""
    plan = shift_plan(WindowGrid(8, 12, 4), (1, 1), 1, 0, 1)
    assert [part.place for part in plan.sends] == [part.place for part in plan.receives] == [0]
    with pytest.raises(ValueError, match="cannot be dealt"):
        shift_plan(WindowGrid(8, 12, 4), (1, 2), 1, 0, 1)
