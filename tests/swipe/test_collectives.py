"""Communication calls on exact integers: who gets what, how many bytes leave, who is named in an error."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from swipe.collectives import (
    ALONE,
    CommunicationError,
    Group,
    Message,
    agree,
    all_reduce,
    all_to_all,
    barrier,
    broadcast,
    byte_log,
    exchange,
    tell,
    together,
    waiting,
)
from swipe.groups import make_groups, make_pairs
from swipe.layout import WindowLayout
from swipe.mesh import ParallelDims
from swipe.ulysses import to_heads, to_tokens
from swipe.windows import WindowGrid
from tests.harness import run_distributed

WORLD = 4
DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.int64)


def everyone() -> Group:
    """Name all ranks."""
    return Group("all ranks", tuple(range(dist.get_world_size())), dist.get_rank(), dist.group.WORLD)


def number(sender: int, receiver: int, shape: tuple[int, ...] = (3, 5)) -> Tensor:
    """Make integers no other pair of ranks has, small enough for bf16."""
    return (torch.arange(15).view(shape) + 15 * (WORLD * sender + receiver)) % 251


# All-to-all and sums


def gather_and_sum() -> dict[str, Any]:
    """Run the collectives over all ranks and over halves of them; log what is sent."""
    rank, world = dist.get_rank(), everyone()
    halves = ((0, 2), (1, 3))
    half = Group("half", halves[rank % 2], rank // 2, [dist.new_group(ranks) for ranks in halves][rank % 2])
    out: dict[str, Any] = {}
    for group in (world, half):
        numbers = torch.stack([number(rank, peer) for peer in group.ranks])
        for dtype in DTYPES:
            straight = numbers.to(dtype)
            crossed = straight.transpose(1, 2).contiguous().transpose(1, 2)  # the same, in another order
            assert not crossed.is_contiguous()
            with byte_log() as log:
                out[group.name, dtype] = [all_to_all(x, group, "integers") for x in (straight, crossed)], log
    with byte_log() as log:
        total = all_reduce(torch.arange(1000.0).sqrt() * (rank + 1), world, "roots")
        out["sum"] = total, log
    out["errors"] = [
        agree(world, text) for text in (None, f"rank {rank} cannot", None if rank < 2 else f"no {rank}")
    ]
    with byte_log() as log:
        out["broadcast"] = broadcast(number(rank, rank), half, 1, "numbers"), log
    out["told"] = tell(world, {"from": rank}), tell(half, (rank, None))
    out["together"] = [said(world, error) for error in ERRORS]
    barrier(world, "the test")
    return out


ERRORS: list[dict[int, Exception]] = [
    {},
    {0: ValueError("rank 0 has no such file")},
    {2: PermissionError("rank 2 may not"), 3: ValueError("rank 3 neither")},
    {0: OSError()},
]


def said(group: Group, errors: dict[int, Exception]) -> tuple[str, str]:
    """Raise together what some ranks raise; return the error of this one, as type and text."""
    try:
        with together(group):
            if group.rank in errors:
                raise errors[group.rank]
    except Exception as error:
        return type(error).__name__, str(error)
    return "", ""


@cache
def collected() -> list[dict[str, Any]]:
    return run_distributed(gather_and_sum, WORLD)


@pytest.mark.parametrize("dtype", DTYPES)
def test_all_to_all_is_exact_and_sends_what_the_formula_says(dtype: torch.dtype) -> None:
    """Row i goes to rank i, whatever the strides; (n - 1) / n of the bytes leave."""
    for rank, out in enumerate(collected()):
        for name, ranks in (("all ranks", range(WORLD)), ("half", (rank % 2, rank % 2 + 2))):
            received, log = out[name, dtype]
            expected = torch.stack([number(sender, rank) for sender in ranks]).to(dtype)
            assert all(torch.equal(x, expected) and x.is_contiguous() for x in received)
            n = len(ranks)
            assert [(*entry,) for entry in log] == [
                ("all-to-all", name, n - 1, expected.nbytes * (n - 1) // n)
            ] * 2


def test_a_sum_has_the_same_bits_everywhere() -> None:
    """Every rank takes the same decisions by it."""
    sums = [out["sum"][0] for out in collected()]
    assert all(torch.equal(x, sums[0]) for x in sums)
    torch.testing.assert_close(sums[0], torch.arange(1000.0).sqrt() * 10)
    ((operation, _, peers, count),) = collected()[0]["sum"][1]
    assert (operation, peers, count) == ("all-reduce", 3, 2 * 4000 * 3 // 4)


def test_all_ranks_learn_the_first_error() -> None:
    """Whoever has one, all get the words of the lowest rank that has."""
    assert [out["errors"] for out in collected()] == [[None, "rank 0 cannot", "no 2"]] * WORLD


def test_one_rank_gives_all_others_its_tensor() -> None:
    """By its number in the group, and only its bytes are counted."""
    for rank, out in enumerate(collected()):
        x, log = out["broadcast"]
        root = 2 + rank % 2
        assert torch.equal(x, number(root, root))
        assert [entry.bytes for entry in log] == [x.nbytes] * (rank == root)


def test_all_ranks_learn_what_the_first_one_says() -> None:
    """Small objects, over all ranks and over halves."""
    assert [out["told"] for out in collected()] == [({"from": 0}, (rank % 2, None)) for rank in range(WORLD)]


def test_all_ranks_stop_together() -> None:
    """An error of any rank is raised by all of them in its words, and without one all go on."""
    for out in collected():
        assert out["together"] == [
            ("", ""),
            ("AgreedError", "rank 0 has no such file"),
            ("AgreedError", "rank 2 may not"),
            ("AgreedError", "OSError()"),
        ]


def test_errors_of_one_rank_stay_what_they_are() -> None:
    """Alone there is nobody to agree with; a failure of communication cannot be agreed on either."""
    assert said(ALONE, {0: PermissionError("may not")}) == ("PermissionError", "may not")
    assert said(ALONE, {0: CommunicationError("died")}) == ("CommunicationError", "died")
    assert said(ALONE, {0: KeyError("bug")})[0] == "KeyError"


def test_one_rank_sends_nothing() -> None:
    """A group of one returns what it got, without a process group."""
    x = torch.randn(1, 3)
    with byte_log() as log:
        assert all_to_all(x, ALONE, "x") is x and all_reduce(x, ALONE, "x") is x
        assert agree(ALONE, "no") == "no" and agree(ALONE, None) is None and tell(ALONE, 5) == 5
        barrier(ALONE, "x")
        exchange([], [], "nothing").wait()
    assert log == []


# Messages


def letters(rank: int) -> tuple[list[Message], list[Message]]:
    """Make what a rank sends to and gets from every other: two streams, the first with two messages."""
    peers = [peer for peer in range(WORLD) if peer != rank]

    def content(sender: int, receiver: int, tag: int, turn: int) -> Tensor:
        size = 1 + sender + 3 * receiver + 100_000 * (tag == 2)  # 400 kB: more than a socket takes at once
        return torch.arange(size) * 64 + 16 * sender + 4 * receiver + 2 * (tag - 1) + turn

    streams = ((1, 0), (1, 1), (2, 0))
    sends = [Message(peer, content(rank, peer, tag, turn), tag) for peer in peers for tag, turn in streams]
    receives = [Message(peer, content(peer, rank, tag, turn), tag) for peer in peers for tag, turn in streams]
    return sends, receives


WAYS: dict[str, tuple[dict[str, Any], bool]] = {
    "async": ({"policy": "async"}, False),
    "batched": ({"policy": "batched"}, False),
    "parity, pair by pair": ({"policy": "parity"}, False),
    "parity, over groups of two": ({"policy": "parity"}, True),
}


def write_letters() -> dict[str, Any]:
    """Exchange the same messages in every way; say what was wrong and what was logged."""
    rank, out = dist.get_rank(), {}
    pairs = make_pairs(rank, [rank ^ 1, rank ^ 2, rank ^ 3])
    for way, (options, paired) in WAYS.items():
        sends, expected = letters(rank)
        empty = [message._replace(tensor=torch.full_like(message.tensor, -1)) for message in expected]
        with byte_log() as log:
            exchange(sends, empty, "letters", pairs=pairs if paired else None, **options).wait()
        out[way] = [torch.equal(a.tensor, b.tensor) for a, b in zip(empty, expected)], log
    for side in (True, False):  # even ranks talk to odd ones only; either may be the side that sends first
        for paired in (True, False):
            sends, expected = (
                [message for message in messages if (message.rank + rank) % 2] for messages in letters(rank)
            )
            empty = [message._replace(tensor=torch.full_like(message.tensor, -1)) for message in expected]
            exchange(
                sends,
                empty,
                "letters",
                policy="parity",
                sends_first=(rank % 2 == 0) == side,
                pairs=pairs if paired else None,
            ).wait()
            out[f"sides {side} {paired}"] = (
                [torch.equal(a.tensor, b.tensor) for a, b in zip(empty, expected)],
                [],
            )
    return out


def test_every_policy_delivers_the_same() -> None:
    """Small and large messages in two streams between all pairs of ranks; the bytes of all are logged."""
    for rank, out in enumerate(run_distributed(write_letters, WORLD)):
        assert len(out) == len(WAYS) + 4
        total = sum(message.tensor.nbytes for message in letters(rank)[0])
        for way, (right, log) in out.items():
            assert all(right), f"rank {rank}, {way}: {right}"
            if way in WAYS:
                assert [(*entry,) for entry in log] == [("send", "letters", 9, total)]


def test_logs_can_be_nested() -> None:
    """An inner log takes part of what the outer one takes; closed ones take nothing."""
    letter = [Message(0, torch.zeros(2), 1)]
    with byte_log() as outer:
        with byte_log() as inner, pytest.raises(ValueError, match="process group"):
            exchange(letter, [], "first")
        with pytest.raises(ValueError, match="process group"):
            exchange(letter, [], "second")
    with pytest.raises(ValueError, match="process group"):
        exchange(letter, [], "third")
    assert [entry.group for entry in inner] == ["first"]
    assert [entry.group for entry in outer] == ["first", "second"]


# Adjoints


def adjoint_pairs() -> dict[str, tuple[float, float]]:
    """Return this rank's parts of <A x, y> and <x, A' y> for every linear move, in exact integers."""
    out = {}
    draw = torch.Generator().manual_seed(dist.get_rank())

    def integers(*shape: int) -> Tensor:
        return torch.randint(-9, 10, shape, generator=draw).double()

    grid = WindowGrid(8, 16, 4)
    for dims in (ParallelDims(wp_y=2, wp_x=2), ParallelDims(wp_x=2, sp=2), ParallelDims(sp=4)):
        groups = make_groups(dims, dist.get_rank(), torch.device("cpu"))
        layout = WindowLayout.of(grid, groups)
        for sign in (1, -1):
            x = integers(2, *layout.tokens_NT.shape, 3).requires_grad_()
            moved = layout.shift(x, sign)
            y = integers(*moved.shape)
            (back,) = torch.autograd.grad(moved, x, y)
            out[f"shift {sign} on {dims}"] = float((moved * y).sum()), float((x * back).sum())
        sp, (windows, tokens) = groups.sequence, layout.tokens_NT.shape
        qkv = [integers(2, windows, 4, tokens, 3).requires_grad_() for _ in range(3)]
        heads = to_heads(*qkv, sp)
        ys = [integers(*part.shape) for part in heads]
        back_qkv = torch.autograd.grad(heads, qkv, ys)
        out[f"to heads on {dims}"] = (
            float(sum((a * b).sum() for a, b in zip(heads, ys))),
            float(sum((a * b).sum() for a, b in zip(qkv, back_qkv))),
        )
        o = integers(*heads[0].shape).requires_grad_()
        local = to_tokens(o, sp)
        y = integers(*local.shape)
        (back,) = torch.autograd.grad(local, o, y)
        out[f"to tokens on {dims}"] = float((local * y).sum()), float((o * back).sum())
    return out


def test_backward_is_the_adjoint_of_forward() -> None:
    """<A x, y> = <x, A' y> summed over ranks, exactly, for the shift both ways and for attention's moves."""
    parts = run_distributed(adjoint_pairs, WORLD)
    assert len(parts[0]) == 12
    for name in parts[0]:
        there, back = (sum(part[name][side] for part in parts) for side in (0, 1))
        assert there == back, name


# Failures


def leave(operation: str) -> str:
    """Go away on rank 1 while the others wait; return what they are told."""
    rank, world = dist.get_rank(), everyone()
    dist.barrier()
    if rank == 1:
        dist.destroy_process_group()
        return ""
    calls = {
        "all-to-all": lambda: all_to_all(torch.zeros(3, 2), world, "tokens"),
        "sum": lambda: all_reduce(torch.zeros(3), world, "norm"),
        "barrier": lambda: barrier(world, "the start"),
        "agree": lambda: agree(world, None),
        "tell": lambda: tell(Group("the others", (1, 0, 2), 0, dist.group.WORLD), 3),
        "receive": lambda: exchange([], [Message(1, torch.zeros(3), 1)], "tokens of stage 0").wait(),
        "parity": lambda: exchange([], [Message(1, torch.zeros(3), 1)], "tokens", policy="parity").wait(),
    }
    try:
        calls[operation]()
    except CommunicationError as error:
        dist.destroy_process_group()
        return str(error)
    raise AssertionError("nobody noticed")


@pytest.mark.parametrize(
    ("operation", "says"),
    [
        ("all-to-all", "all-to-all of tokens over all ranks with ranks 1, 2, and that failed"),
        ("sum", "sum of norm over all ranks with ranks 1, 2, "),
        ("barrier", "barrier of the start over all ranks with ranks 1, 2, "),
        ("agree", "exchange of errors over all ranks with ranks 1, 2, "),
        ("tell", "news from the first rank over the others with ranks 1, 2, "),
        ("receive", r"tokens of stage 0 \(rank 1\), and that failed: a rank died or is stuck"),
        ("parity", r"tokens \(rank 1\), and that failed"),
    ],
)
def test_who_waited_for_a_dead_rank_is_said(operation: str, says: str) -> None:
    """The error names the rank that waited, the operation and the others, at once."""
    messages = run_distributed(leave, 3, operation, timeout_s=20)
    with pytest.raises(AssertionError, match="rank 0 waited in the " + says):
        raise AssertionError(messages[0])
    assert "rank 2 waited in the" in messages[2]


def test_only_failures_of_communication_are_renamed() -> None:
    """A mistake of the computation stays what it is, and an error already explained keeps its words."""
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), waiting("product"):
        torch.ones(2, 3) @ torch.ones(2, 3)
    with pytest.raises(CommunicationError, match=r"^rank 7 waited$"), waiting("outer"):
        raise CommunicationError("rank 7 waited")
    with pytest.raises(
        CommunicationError, match="rank 0 waited in the send with ranks 1, 2, 3, 4, 5, 6 .. 8"
    ):
        with waiting("send", Group("all", tuple(range(9)), 0)):
            raise RuntimeError("Connection reset by peer\nsecond line")
