"""Every communication call of the training: few, named, logged in bytes, with errors that say who waited.

Traps these functions keep shut (docs/beware.md): both sides of a collective are contiguous and freshly
allocated; handles of sends are kept until they are waited for; a send is listed before a receive. Parameter
gathering and gradient reduction (torch's FSDP2) and checkpoints (torch's DCP) make their own calls.
"""

from __future__ import annotations

import re
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from swipe.whereabouts import within

Policy = Literal["async", "batched", "parity"]
"""How point-to-point messages are posted: each by itself; in one batch, sends first; or blocking, in an order
that cannot deadlock, over groups of two ranks."""

Said = TypeVar("Said")

SHIFT_TAG, FORWARD_TAG, BACKWARD_TAG, HEADER_TAG, DATA_TAG = range(1, 6)  # streams that gloo keeps apart


class CommunicationError(ConnectionError):
    """Another rank died, is stuck, or sent what was not expected; says who waited for what."""


class AgreedError(ValueError):
    """An error every rank raises in the same words, so that one of them can say it for all.

    Attributes:
        of_a_file: whether it was an OSError where it happened.
    """

    def __init__(self, text: str, of_a_file: bool = False) -> None:
        """Keep the words."""
        super().__init__(text)
        self.of_a_file = of_a_file


@dataclass(frozen=True)
class Group:
    """Ranks that communicate, along one or more axes of the mesh.

    Attributes:
        name: the axes it crosses, for messages and the log.
        ranks: global ranks, ascending.
        rank: this rank's number among them.
        handle: torch's process group; None for a group of one.
        levels: groups that one after the other reach all these ranks, where they are too many for one.
    """

    name: str
    ranks: tuple[int, ...]
    rank: int
    handle: Any = field(default=None, repr=False)
    levels: tuple[Group, ...] = field(default=(), repr=False)

    @property
    def size(self) -> int:
        """Number of ranks."""
        return len(self.ranks)


ALONE = Group("one rank", (0,), 0)


class Sent(NamedTuple):
    """One entry of the byte log: what this rank sent."""

    operation: str
    group: str
    peers: int
    """Ranks it went to."""
    bytes: int
    """Bytes that left this rank; what a collective keeps local is not counted."""


_logs: list[list[Sent]] = []


@contextmanager
def byte_log() -> Iterator[list[Sent]]:
    """Collect what this rank sends while the context is open."""
    log: list[Sent] = []
    _logs.append(log)
    try:
        yield log
    finally:
        del _logs[next(i for i, other in enumerate(_logs) if other is log)]  # not by equality


def _note(operation: str, group: str, peers: int, count: int) -> None:
    for log in _logs:
        log.append(Sent(operation, group, peers, count))


FAILURES = ("onnection", "timed out", "imeout", "peer", "roken pipe", "gloo", "NCCL", "ccl", "ocket")
"""Words by which an error of a communication library is told from one of the computation."""


_ending = threading.Event()
ENDING_S = 60.0


def expect_the_end() -> None:
    """Say that this process is about to end: what fails as others end before it is no news."""
    _ending.set()


@contextmanager
def waiting(operation: str, group: Group | None = None, *, computes: bool = False) -> Iterator[None]:
    """Turn a failure of communication inside the context into one that names rank and operation.

    Meanwhile `swipe.whereabouts` knows the operation.

    Args:
        operation: what this rank waits in.
        group: with whom.
        computes: the context also computes, so that being in it does not mean to wait for somebody.

    Raises:
        CommunicationError: a peer died, or did not answer within the timeout of the process group.
    """
    try:
        with within(operation, computes):
            yield
    except CommunicationError:
        raise
    except RuntimeError as error:
        text = str(error).strip()
        if type(error).__name__ == "AcceleratorError" or not any(word in text for word in FAILURES):
            raise  # a device of this rank, or a mistake
        if _ending.is_set():
            time.sleep(ENDING_S)
        rank = dist.get_rank() if dist.is_initialized() else 0
        others = "" if group is None else f" with {_named(r for r in group.ranks if r != rank)}"
        raise CommunicationError(
            f"rank {rank} waited in the {operation}{others}, and that failed: a rank died or is stuck "
            f"({_essence(text)})"
        ) from error


def _essence(text: str) -> str:
    """Take the first sentence of a library's error, without the place in its source."""
    first = re.sub(r"^(\[\S+\.(cc|cpp|h|hpp):\d+\]\s*)+", "", text.splitlines()[0])
    return first.split(". ")[0].rstrip(".")


def _named(ranks: Iterator[int] | Sequence[int]) -> str:
    """Name a few ranks."""
    numbers = list(ranks)
    shown = ", ".join(map(str, numbers[:6])) + (f" .. {numbers[-1]}" if len(numbers) > 6 else "")
    return f"rank{'s' if len(numbers) != 1 else ''} {shown}"


def all_to_all(x: Tensor, group: Group, what: str) -> Tensor:
    """Send x[i] to rank i of the group and return what came from each, [size, ...] like `x`.

    Moves (size - 1) / size of the tensor's bytes.
    """
    if group.size == 1:
        return x
    x = x.contiguous()
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)  # a non-contiguous output would be garbage
    _note("all-to-all", group.name, group.size - 1, x.nbytes // group.size * (group.size - 1))
    with waiting(f"all-to-all of {what} over {group.name}", group):
        dist.all_to_all_single(out, x, group=group.handle)
    return out


def all_reduce(x: Tensor, group: Group, what: str) -> Tensor:
    """Sum `x` over the group, in place; every rank gets the same bits."""
    if group.size > 1:
        _note("all-reduce", group.name, group.size - 1, 2 * x.nbytes * (group.size - 1) // group.size)
        with waiting(f"sum of {what} over {group.name}", group):
            dist.all_reduce(x, group=group.handle)
    return x


def all_gather(x: Tensor, group: Group, what: str) -> Tensor:
    """Return every rank's `x`, of the same shape on all: [size, ...]; between many CPUs level by level."""
    out = x[None]
    levels = group.levels if x.device.type == "cpu" else ()
    # Its newer name, where this torch has it; the older one warns there.
    call = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    for level in (levels or (group,)) if group.size > 1 else ():
        own = out.contiguous()
        out = torch.empty((level.size * len(own), *x.shape), dtype=x.dtype, device=x.device)
        _note("all-gather", level.name, level.size - 1, own.nbytes * (level.size - 1))
        with waiting(f"gathering of {what} over {level.name}", level):
            call(out, own, group=level.handle)
    return out


HOST_BYTES = 64  # the longest name a Linux host can have


def host_names(group: Group) -> list[str]:
    """Return the name of every rank's machine, without its domain; a collective call.

    Moves 64 bytes per rank. Equal names are one object, as there may be many ranks.
    """
    name = socket.gethostname().split(".")[0].encode()[:HOST_BYTES].ljust(HOST_BYTES, b"\0")
    names = all_gather(torch.tensor(list(name), dtype=torch.uint8), group, "host names")
    rows = names.numpy()
    known: dict[bytes, str] = {}
    return [
        known.setdefault(row.tobytes(), row.tobytes().rstrip(b"\0").decode(errors="replace")) for row in rows
    ]


def broadcast(x: Tensor, group: Group, root: int, what: str) -> Tensor:
    """Give every rank the tensor of rank number `root` of the group, in place: its bytes go to all others."""
    if group.size > 1:
        if group.rank == root:
            _note("broadcast", group.name, group.size - 1, x.nbytes * (group.size - 1))
        with waiting(f"broadcast of {what} over {group.name}", group):
            dist.broadcast(x, group.ranks[root], group=group.handle)
    return x


def barrier(group: Group, what: str) -> None:
    """Wait until every rank of the group is here."""
    least(group, 0, f"barrier of {what}")


def least(group: Group, number: int, what: str) -> int:
    """Return the smallest of the ranks' numbers on every rank, level by level; moves 8 bytes in each."""
    smallest = torch.tensor(number)
    for level in (group.levels or (group,)) if group.size > 1 else ():
        with waiting(f"{what} over {level.name}", level):
            dist.all_reduce(smallest, dist.ReduceOp.MIN, group=level.handle)
    return int(smallest)


def agree(group: Group, error: Said | None) -> Said | None:
    """Let all ranks know the first error any of them has (None: none has), so that all stop together.

    Args:
        error: what to say of it, a small plain object.
    """
    if group.size == 1:
        return error
    first = least(group, group.size if error is None else group.rank, "exchange of errors")
    if first == group.size:
        return None
    told = [error]
    with waiting(f"exchange of errors over {group.name}", group):
        dist.broadcast_object_list(told, group.ranks[first], group=group.handle)
    return told[0]


def tell(group: Group, value: Any) -> Any:
    """Return the first rank's `value`, a small plain object, on every rank of the group."""
    if group.size == 1:
        return value
    told = [value]
    with waiting(f"news from the first rank over {group.name}", group):
        dist.broadcast_object_list(told, group.ranks[0], group=group.handle)
    return told[0]


@contextmanager
def together(group: Group) -> Iterator[None]:
    """Do on the first rank what may fail there; if it does, no rank of the group goes on.

    Raises:
        AgreedError: a ValueError or OSError was raised, in its words; alone, a rank raises that one.
    """
    failure: ValueError | OSError | None = None
    try:
        yield
    except CommunicationError:
        raise
    except (ValueError, OSError) as error:
        failure = error
    if failure is not None and group.size == 1:
        raise failure
    of_a_file = isinstance(failure, OSError) or getattr(failure, "of_a_file", False)
    found = agree(group, None if failure is None else (str(failure) or repr(failure), of_a_file))
    if found is not None:
        raise AgreedError(*found) from failure


class Pending:
    """Messages on their way. Keep it, or they are cancelled; `wait` before a buffer is read or changed."""

    def __init__(self, works: list[Any], tensors: list[Tensor], what: str, ranks: tuple[int, ...]) -> None:
        """Hold on to the handles and to the tensors."""
        self._works, self._tensors, self.what, self.ranks = works, tensors, what, ranks

    def wait(self) -> None:
        """Wait until all have arrived or left.

        Raises:
            CommunicationError: a peer died or did not answer in time.
        """
        with waiting(f"{self.what} ({_named(self.ranks)})"):
            for work in self._works:
                work.wait()
        self._works, self._tensors = [], []


class Message(NamedTuple):
    """A contiguous tensor to send to a global rank, or to fill from it."""

    rank: int
    tensor: Tensor
    tag: int
    """The stream it belongs to: messages of one stream between two ranks keep their order."""


def exchange(
    sends: Sequence[Message],
    receives: Sequence[Message],
    what: str,
    *,
    policy: Policy = "async",
    sends_first: bool | None = None,
    pairs: dict[int, Any] | None = None,
    group: Group | None = None,
) -> Pending:
    """Post point-to-point messages; bytes moved are those of `sends`.

    Args:
        what: said in errors and in the byte log.
        policy: "parity" has sent and received everything when it returns.
        sends_first: order of "parity": one side of every pair says True, the other False. None: pair by pair
            in ascending order, the lower rank sends first; for exchanges that all ranks enter together.
        pairs: for "parity", a process group of two for every peer.
        group: whose process group carries the messages; the world's by default.
    """
    messages = (*sends, *receives)
    ranks = tuple(sorted({message.rank for message in messages}))
    if sends:
        _note("send", what, len(sends), sum(message.tensor.nbytes for message in sends))
    handle = None if group is None else group.handle
    works: list[Any] = []
    with waiting(f"{what} ({_named(ranks)})"):
        if policy == "parity":
            for call, (rank, tensor, tag) in _in_turn(sends, receives, sends_first):
                call(tensor, rank, group=(pairs or {}).get(rank, handle), tag=tag)
            return Pending([], [], what, ranks)
        if policy == "batched" and messages:
            ops = [dist.P2POp(dist.isend, tensor, rank, handle, tag) for rank, tensor, tag in sends]
            ops += [dist.P2POp(dist.irecv, tensor, rank, handle, tag) for rank, tensor, tag in receives]
            works += dist.batch_isend_irecv(ops)
        else:
            works += [dist.isend(tensor, rank, handle, tag) for rank, tensor, tag in sends]
            works += [dist.irecv(tensor, rank, handle, tag) for rank, tensor, tag in receives]
    return Pending(works, [message.tensor for message in messages], what, ranks)


def _in_turn(
    sends: Sequence[Message], receives: Sequence[Message], sends_first: bool | None
) -> list[tuple[Any, Message]]:
    """Order blocking calls so that no two ranks wait for each other; see `exchange`."""
    calls = [(dist.send, message) for message in sends] + [(dist.recv, message) for message in receives]
    if sends_first is not None:
        return sorted(calls, key=lambda call: ((call[0] is dist.send) != sends_first, call[1].rank))
    own = dist.get_rank()

    def turn(call: tuple[Any, Message]) -> tuple[int, int, bool]:
        peer = call[1].rank
        return min(own, peer), max(own, peer), (call[0] is dist.send) != (own < peer)

    return sorted(calls, key=turn)
