"""The link between two stages: what it delivers, what it costs, and stages that do not fit each other.

Most of it needs no process: both sides are made here and messages are carried by hand.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from swipe.collectives import CommunicationError, Pending, byte_log, exchange
from swipe.edge import DTYPES, Edge
from swipe.groups import make_groups
from swipe.layout import WindowLayout
from swipe.mesh import ParallelDims
from swipe.windows import WindowGrid
from tests.harness import run_distributed
from tests.swipe.meshes import gather_tokens, layout_at, linked, rolled

CPU = torch.device("cpu")


@st.composite
def meshes(draw: st.DrawFn) -> tuple[WindowGrid, ParallelDims]:
    """Draw a grid and the ranks of one stage that fit it."""
    wp = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    half = draw(st.sampled_from([1, 2, 3]))
    sp = draw(st.sampled_from([n for n in range(1, 13) if half**2 % (n // math.gcd(n, 4)) == 0]))
    slots = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    grid = WindowGrid(wp[0] * slots[0] * 2 * half, wp[1] * slots[1] * 2 * half, 2 * half)
    return grid, ParallelDims(wp_y=wp[0], wp_x=wp[1], sp=sp)


class Stages:
    """Both sides of an edge on all places: stage 0 is ranks 0 .. n-1, stage 1 ranks 100 .. 100+n-1."""

    def __init__(self, grid: WindowGrid, dims: ParallelDims, shift: int) -> None:
        self.layouts = [layout_at(grid, dims, place) for place in range(dims.places)]
        early, late = range(dims.places), range(100, 100 + dims.places)
        self.after = [Edge(layout, shift, late, after=True) for layout in self.layouts]
        self.before = [Edge(layout, shift, early, after=False) for layout in self.layouts]


def carry(senders: list[Edge], receivers: list[Edge], first: int, xs: list[Tensor]) -> list[Tensor]:
    """Send from ranks `first` and following; return what the other stage puts together."""
    mail = {
        (first + place, message.rank, message.tag): message.tensor
        for place, (edge, x) in enumerate(zip(senders, xs))
        for message in edge.outgoing(x)
    }
    out = []
    for place, (edge, x) in enumerate(zip(receivers, xs)):
        arriving = edge.expect(x.shape, x.dtype, CPU)
        for message in arriving.messages:
            message.tensor.copy_(mail.pop((message.rank, 100 - first + place, message.tag)))
        arriving.pending = Pending([], [], "by hand", ())
        out.append(arriving.take())
    assert not mail, "every message is expected by somebody"
    return out


@settings(deadline=None, max_examples=40)
@given(meshes(), st.sampled_from([1, -1, 0]))
def test_an_edge_is_a_roll_forward_and_its_inverse_back(
    mesh: tuple[WindowGrid, ParallelDims], shift: int
) -> None:
    """Activations arrive as torch.roll of the image, gradients as the roll back: bitwise."""
    grid, dims = mesh
    stages = Stages(grid, dims, shift)
    image = torch.randn(2, 3, grid.rows, grid.cols)
    tokens = [layout.tokens_NT for layout in stages.layouts]
    xs = [layout.to_windows(image) for layout in stages.layouts]
    there = carry(stages.after, stages.before, 0, xs)
    back = carry(stages.before, stages.after, 100, xs)
    assert torch.equal(gather_tokens(list(zip(tokens, there)), grid), rolled(image, grid, shift))
    assert torch.equal(gather_tokens(list(zip(tokens, back)), grid), rolled(image, grid, -shift))


@settings(deadline=None, max_examples=40)
@given(meshes(), st.sampled_from([1, -1, 0]))
def test_slots_pair_all_ranks(mesh: tuple[WindowGrid, ParallelDims], shift: int) -> None:
    """Slot i of a rank holds a peer whose slot i holds the rank, and slots hold all peers."""
    stages = Stages(*mesh, shift)
    early, late = ([edge.slots() for edge in side] for side in (stages.after, stages.before))
    x = torch.zeros(1, *stages.layouts[0].tokens_NT.shape, 1)
    for place, (mine, theirs) in enumerate(zip(early, late)):
        assert len(mine) == len(theirs) == 4 // math.gcd(mesh[1].sp, 4)
        assert all(late[peer - 100][slot] == place for slot, peer in enumerate(mine))
        assert all(early[peer][slot] == 100 + place for slot, peer in enumerate(theirs))
        assert set(mine) == {message.rank for message in stages.after[place].outgoing(x)}
        assert set(theirs) == {message.rank for message in stages.before[place].outgoing(x)}


@settings(deadline=None, max_examples=40)
@given(meshes(), st.sampled_from([1, -1]))
def test_a_shifted_edge_costs_what_a_straight_one_does(
    mesh: tuple[WindowGrid, ParallelDims], shift: int
) -> None:
    """Every rank sends all its tokens once, M / (SP WP) bytes, to at most 4 / gcd(sp, 4) peers."""
    grid, dims = mesh
    width = 3
    for place, edge in enumerate(Stages(grid, dims, shift).after):
        x = torch.zeros(2, *layout_at(grid, dims, place).tokens_NT.shape, width)
        messages = edge.outgoing(x)
        whole = 2 * grid.rows * grid.cols * width * 4
        assert sum(message.tensor.nbytes for message in messages) == whole // (dims.sp * dims.wp)
        assert len(messages) <= 4 // math.gcd(dims.sp, 4)


# Announcements


def announced(sender: Edge, receiver: Edge, x: Tensor) -> Any:
    """Carry the announcement of `x` from one side to the other."""
    headers = receiver.headers(CPU)
    for header, message in zip(headers, sender.announcement(x), strict=True):
        header.tensor.copy_(message.tensor)
    return receiver.announced(headers)


@pytest.mark.parametrize("dtype", DTYPES)
def test_type_and_shape_are_announced(dtype: torch.dtype) -> None:
    """Every type of a tensor, and its shape; 48 bytes to each peer."""
    stages = Stages(WindowGrid(8, 8, 4), ParallelDims(wp_y=2, wp_x=2), 1)
    x = torch.zeros(3, 1, 16, 5, dtype=dtype)
    assert announced(stages.after[1], stages.before[2], x) == ((3, 1, 16, 5), dtype)
    assert [message.tensor.nbytes for message in stages.after[0].announcement(x)] == [48] * 4


def test_stages_with_other_tokens_are_refused() -> None:
    """Other windows, other tokens in a window, peers that do not agree: named, with what was announced."""
    few, many = (Stages(WindowGrid(8, cols, 4), ParallelDims(wp_x=2), 0) for cols in (8, 16))
    small = Stages(WindowGrid(4, 8, 2), ParallelDims(wp_x=2), 0)
    for other in (many, small):
        x = torch.zeros(1, *other.layouts[0].tokens_NT.shape, 5)
        with pytest.raises(CommunicationError, match=r"\[0\] announce .*holds \(2, 16\) windows x tokens"):
            announced(other.after[0], few.before[0], x)
    stages = Stages(WindowGrid(8, 8, 4), ParallelDims(wp_x=2), 1)
    headers = stages.before[0].headers(CPU)
    for header, width in zip(headers, (5, 6), strict=True):
        header.tensor.copy_(torch.tensor([0, 4, 1, 2, 16, width]))
    with pytest.raises(
        CommunicationError, match=r"\[0, 1\] announce .*16, 5\), .*16, 6\).*built differently"
    ):
        stages.before[0].announced(headers)


# Bytes on ranks. Cases: mesh, shift of the edge.

BYTES = [
    (ParallelDims(pp=2, wp_y=2, wp_x=2), 1),
    (ParallelDims(pp=2, wp_y=2, wp_x=2), -1),
    (ParallelDims(pp=2, wp_y=2, wp_x=2), 0),
    (ParallelDims(pp=2, wp_x=2, sp=2), 1),
    (ParallelDims(pp=2, wp_x=2, sp=2), 0),
    (ParallelDims(pp=2, sp=4), 1),
    (ParallelDims(pp=2, sp=4), -1),
    (ParallelDims(pp=2, sp=4), 0),
]
GRID, BATCH, WIDTH = WindowGrid(8, 16, 4), 2, 3


def measure() -> list[tuple[int, int, bool]]:
    """Send an image over every edge and a gradient back; return bytes each way, and whether all arrived."""
    found = []
    for dims, shift in BYTES:
        groups = make_groups(dims, dist.get_rank(), CPU)
        pipeline, layout = linked(nn.Identity(), GRID, groups, [shift]), WindowLayout.of(GRID, groups)
        edge = pipeline.after or pipeline.before
        assert edge is not None
        image = torch.arange(float(BATCH * WIDTH * 128)).view(BATCH, WIDTH, 8, 16)
        mine, theirs = (rolled(image, GRID, sign) for sign in ((0, -shift) if edge.after else (0, shift)))
        with byte_log() as log:
            sends = edge.outgoing(layout.to_windows(mine))
            arriving = edge.expect((BATCH, *layout.tokens_NT.shape, WIDTH), image.dtype, CPU)
            arriving.pending = exchange(sends, arriving.messages, "edge")
            right = torch.equal(arriving.take(), layout.to_windows(theirs))
        found.append((sum(entry.bytes for entry in log), len(sends), right))
    return found


@cache
def measured() -> list[list[tuple[int, int, bool]]]:
    return run_distributed(measure, 8)


@pytest.mark.parametrize("case", BYTES, ids=lambda case: f"{case[0]}, shift {case[1]}")
def test_bytes_on_ranks(case: tuple[ParallelDims, int]) -> None:
    """M / (SP WP) bytes leave every rank in each direction, shifted or not, and arrive where they belong."""
    dims, shift = case
    whole = BATCH * GRID.rows * GRID.cols * WIDTH * 4
    peers = 1 if shift == 0 else 4 // math.gcd(dims.sp, 4)
    for rank in measured():
        assert rank[BYTES.index(case)] == (whole // (dims.sp * dims.wp), peers, True)


def test_a_layout_of_another_place_is_refused() -> None:
    """An edge cannot be built on windows that are not this rank's."""
    here = layout_at(WindowGrid(8, 8, 4), ParallelDims(wp_x=2), 1)
    with pytest.raises(ValueError, match="place 0 of 1 x 2 x 1"):
        WindowLayout(here.shard, (1, 2), (0, 1), 0)
