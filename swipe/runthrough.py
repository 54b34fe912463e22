"""Messages of all ranks at once: each send paired with its receive, and a schedule run to its end.

`pair` looks at who would send what to whom; `run_through` lets every rank go through its row of a table as
`swipe/pipeline.py` does, with a count of its own for each link, and says who waits for whom if not all come
to the end. Nothing is sent and no process is needed: ranks are rows of arrays.

Shapes: n messages, R ranks of a stage (dp x places), K messages of a rank to or from one stage.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from swipe.schedule import Action, Step, Transfer, neighbour

Numbers = NDArray[np.int64]
Row = Sequence[Step]
"""What a stage does in a step, of `swipe.schedule.lower`."""
WORDS = {"F": "output", "B": "gradient"}
"""What the messages after an action are, by its kind."""
TAGS = 16  # more than there are streams


class Ends(NamedTuple):
    """One side of messages: int64 arrays [n]."""

    rank: Numbers
    """Who sends them, or receives them."""
    peer: Numbers
    tag: Numbers
    size: Numbers
    """Bytes."""


class Exchange(NamedTuple):
    """Messages that ranks exchange in one go, as seen by those that send and by those that receive."""

    what: str
    sends: Ends
    receives: Ends


class Links(NamedTuple):
    """The messages of an exchange, numbered: what the senders' end i and the receivers' end j belong to."""

    of_sends: Numbers
    of_receives: Numbers
    sender: Numbers
    receiver: Numbers


def pair(exchange: Exchange, world: int) -> Links:
    """Find for every send the receive of the same peer, tag and number of bytes.

    Raises:
        ValueError: there is one without the other, or they differ; names a pair of ranks.
    """
    what, sends, receives = exchange
    for ends, verb in ((sends, "sends to"), (receives, "receives from")):
        strange = np.flatnonzero((ends.peer < 0) | (ends.peer >= world) | (ends.peer == ends.rank))
        if len(strange):
            rank, peer = ends.rank[strange[0]], ends.peer[strange[0]]
            raise ValueError(f"{what}: rank {rank} {verb} rank {peer}, itself or none of {world:,}")
    out, into = (_keys(*side, world) for side in (sends[:3], (receives.peer, receives.rank, receives.tag)))
    by_sender, by_receiver = np.argsort(out, kind="stable"), np.argsort(into, kind="stable")
    out, into = out[by_sender], into[by_receiver]
    for keys, verb in ((out, "sends"), (into, "expects")):
        if len(twice := np.flatnonzero(keys[1:] == keys[:-1])):
            raise ValueError(f"{what}: one rank {verb} twice: {_named(int(keys[twice[0]]), world)}")
    if not np.array_equal(out, into):
        raise ValueError(f"{what}: {_unpaired(out, into, world)}")
    wrong = np.flatnonzero(sends.size[by_sender] != receives.size[by_receiver])
    if len(wrong):
        sent, expected = by_sender[wrong[0]], by_receiver[wrong[0]]
        raise ValueError(
            f"{what}: rank {sends.rank[sent]} sends {sends.size[sent]:,} bytes to rank {sends.peer[sent]}, "
            f"which expects {receives.size[expected]:,}"
        )
    numbers = np.arange(len(out))
    of_sends, of_receives = np.empty_like(numbers), np.empty_like(numbers)
    of_sends[by_sender], of_receives[by_receiver] = numbers, numbers
    return Links(of_sends, of_receives, sends.rank[by_sender], sends.peer[by_sender])


def _keys(sender: Numbers, receiver: Numbers, tag: Numbers, world: int) -> Numbers:
    return (sender * world + receiver) * TAGS + tag


def _named(key: int, world: int) -> str:
    ranks, tag = divmod(key, TAGS)
    sender, receiver = divmod(ranks, world)
    return f"from rank {sender} to rank {receiver} (tag {tag})"


def _unpaired(out: Numbers, into: Numbers, world: int) -> str:
    """Say what one side of a message without the other is, and how many there are."""
    lost, awaited = np.setdiff1d(out, into), np.setdiff1d(into, out)
    both = np.intersect1d(lost // TAGS, awaited // TAGS)
    said = []
    if len(both):
        other = int(awaited[awaited // TAGS == both[0]][0]) % TAGS
        said = [f"{_named(int(lost[lost // TAGS == both[0]][0]), world)} is expected with tag {other}"]
    else:
        if len(lost):
            said += [f"{_named(int(lost[0]), world)} is sent and not expected"]
        if len(awaited):
            said += [f"{_named(int(awaited[0]), world)} is expected and not sent"]
    more = (max(len(lost), len(awaited)) if len(both) else len(lost) + len(awaited)) - len(said)
    return "; ".join(said) + (f"; and {more:,} more" if more else "")


class Stage(NamedTuple):
    """The ranks of one stage and their links, by what their messages are: "F" outputs, "B" gradients.

    A rank's row lists the links of its messages, filled up with -1: int64 [R, K].
    """

    ranks: Numbers
    """Global, [dp, places]."""
    sends: dict[str, Numbers]
    receives: dict[str, Numbers]


class Counts(NamedTuple):
    """What all ranks did in a step."""

    actions: int
    messages: int


class _Move(NamedTuple):
    """What a stage's ranks do next: "post" or "wait" for messages of a kind, or "compute"."""

    what: str
    verb: str
    kind: str
    microbatch: int
    ordinal: int = 0
    """How many messages of this verb and kind went before on each link."""
    column: int | None = None
    """Which of the messages to or from a stage; None: all of them."""


def run_through(
    rows: Sequence[Row], stages: Sequence[Stage], sender: Numbers, receiver: Numbers, policy: str
) -> Counts:
    """Let every rank do what its stage's row says until all are done.

    Stricter than a run in three ways: a send is done only when its receive is posted; "batched" and "parity"
    messages hold up their rank until then; a computation begins when all ranks of a stage and image are
    there, as its exchanges inside the stage ask for.

    Args:
        rows: of the table, with what neighbours exchange (`swipe.schedule.lower`).
        stages: the ranks of each.
        sender: of every link, and `receiver`: global ranks [links].
        policy: how messages are posted.

    Raises:
        ValueError: ranks wait for each other, a link delivers another microbatch than is expected, or a
            message is used that was not asked for; names ranks and microbatch.
    """
    return _RunThrough(rows, stages, sender, receiver, policy).to_the_end()


class _RunThrough:
    def __init__(
        self,
        rows: Sequence[Row],
        stages: Sequence[Stage],
        sender: Numbers,
        receiver: Numbers,
        policy: str,
    ) -> None:
        self.stages, self.policy, self.sender, self.receiver = stages, policy, sender, receiver
        self.programs = [list(self.moves(stage, row)) for stage, row in enumerate(rows)]
        self.at = [np.zeros(stage.ranks.size, np.int64) for stage in stages]
        # The last entry is that of -1, a message that is not there: it never holds anybody up.
        never = np.iinfo(np.int32).max
        self.posted = {verb: np.zeros(len(sender) + 1, np.int32) for verb in ("send", "receive")}
        for counts in self.posted.values():
            counts[-1] = never // 2
        self.check_orders()

    def links(self, stage: int, move: _Move) -> Numbers:
        """Return the links of a move, a row per rank."""
        table = (self.stages[stage].sends if move.verb == "send" else self.stages[stage].receives)[move.kind]
        return table if move.column is None else table[:, move.column : move.column + 1]

    def moves(self, stage: int, row: Row) -> Iterator[_Move]:
        """Write a stage's row as what `Pipeline` does: post, wait, compute."""
        posted = {"sendF": 0, "sendB": 0, "receiveF": 0, "receiveB": 0}
        expected: dict[Action, _Move] = {}
        sending: deque[_Move] = deque()

        def post(verb: str, action: Action) -> _Move:
            name = verb + action.kind
            posted[name] += 1
            return _Move("post", verb, action.kind, action.microbatch, posted[name] - 1)

        for step in row:
            if isinstance(step, Transfer):
                out = [post("send", action) for action in step.sends]
                into = [post("receive", action) for action in step.receives]
                expected.update(zip(step.receives, into))
                yield from self.transfer(stage, out, into)
                sending.extend(out if self.policy == "async" else ())
                while len(sending) > 2 * len(self.stages):
                    yield sending.popleft()._replace(what="wait")
                continue
            if neighbour("receive", step, stage, len(self.stages)) is not None:
                if step not in expected:
                    raise ValueError(
                        f"rank {self.stages[stage].ranks.flat[0]} is to compute {step} on stage {stage}, but "
                        "has not posted the receive of what it needs"
                    )
                if self.policy == "async":
                    yield expected[step]._replace(what="wait")
            yield _Move("compute", "", step.kind, step.microbatch)
        yield from (move._replace(what="wait") for move in sending)

    def transfer(self, stage: int, out: list[_Move], into: list[_Move]) -> Iterator[_Move]:
        """Post the messages of a transfer in the way of the policy."""
        if self.policy == "parity":
            for move in out + into if stage % 2 == 0 else into + out:
                for column in range(self.links(stage, move).shape[1]):
                    yield move._replace(column=column)
                    yield move._replace(what="wait", column=column)
            return
        yield from (*out, *into)
        if self.policy == "batched":
            yield from (move._replace(what="wait") for move in (*out, *into))

    def check_orders(self) -> None:
        """Compare the order in which a stage sends microbatches with that in which its neighbour expects."""
        for stage, program in enumerate(self.programs):
            for kind, step in (("F", 1), ("B", -1)):
                if not 0 <= (peer := stage + step) < len(self.stages):
                    continue
                pairs = zip(_order(program, "send", kind), _order(self.programs[peer], "receive", kind))
                for number, (sent, expected) in enumerate(pairs):
                    if sent != expected:
                        link = self.stages[stage].sends[kind].flat[0]
                        raise ValueError(
                            f"rank {self.sender[link]} sends the {WORDS[kind]} of microbatch {sent} as "
                            f"number {number}, rank {self.receiver[link]} expects microbatch {expected}"
                        )

    def to_the_end(self) -> Counts:
        """Move all ranks on until they are done, or none can."""
        moved = True
        while moved:
            moved = False
            for stage in range(len(self.stages)):
                while self.advance(stage):
                    moved = True
        for stage, program in enumerate(self.programs):
            if (self.at[stage] < len(program)).any():
                raise ValueError(f"deadlock with {self.policy} messages: {self.circle()}")
        computed = sum(
            self.stages[stage].ranks.size * sum(move.what == "compute" for move in program)
            for stage, program in enumerate(self.programs)
        )
        return Counts(computed, int(self.posted["send"][:-1].sum()))

    def advance(self, stage: int) -> bool:
        """Take the ranks of a stage past the moves at which they stand; tell whether any could be."""
        at, program = self.at[stage], self.programs[stage]
        if (at == at[0]).all():
            number = self.together(stage, int(at[0]))
            if number > at[0]:
                at[:] = number
                return True
        moved = False
        for number in np.unique(at).tolist():
            if number < len(program):
                here = np.flatnonzero(at == number)
                free = self.free(stage, program[number], here)
                at[here[free]] += 1
                moved = moved or bool(free.any())
        return moved

    def together(self, stage: int, number: int) -> int:
        """Take all ranks of a stage from one move as far as all of them can go; return the move there."""
        program = self.programs[stage]
        while number < len(program):
            move = program[number]
            if move.what == "post":
                self.posted[move.verb][self.links(stage, move)] += 1  # no link is there twice
            elif move.what == "wait":
                other = self.posted["receive" if move.verb == "send" else "send"]
                if other[self.links(stage, move)].min() <= move.ordinal:
                    break
            number += 1
        return number

    def free(self, stage: int, move: _Move, here: Numbers) -> NDArray[np.bool_]:
        """Tell which of these ranks get past a move; post what it posts."""
        if move.what == "compute":
            at, shape = self.at[stage], self.stages[stage].ranks.shape
            all_there = at.reshape(shape).min(axis=1) >= at[here][0]
            return np.repeat(all_there, shape[1])[here]
        links = self.links(stage, move)[here]
        if move.what == "post":
            self.posted[move.verb][links] += 1
            return np.ones(len(links), bool)
        other = self.posted["receive" if move.verb == "send" else "send"]
        return np.asarray((other[links] > move.ordinal).all(axis=1))

    def circle(self) -> str:
        """Follow who waits for whom from the first rank that waits for a message."""
        place = {
            int(rank): (s, i) for s, st in enumerate(self.stages) for i, rank in enumerate(st.ranks.flat)
        }
        stuck = (
            (int(self.stages[s].ranks.flat[i]), self.programs[s][self.at[s][i]])
            for s in range(len(self.stages))
            for i in np.flatnonzero(self.at[s] < len(self.programs[s]))
        )
        rank = next(rank for rank, move in stuck if move.what == "wait")
        seen: list[int] = []
        said: list[str] = []
        while rank not in seen and len(said) < 8:
            seen.append(rank)
            stage, index = place[rank]
            if (number := int(self.at[stage][index])) == len(self.programs[stage]):
                said.append(f"rank {rank} is done")
                break
            rank, words = self.wait_of(rank, stage, index, self.programs[stage][number])
            said.append(words)
        return "; ".join(said)

    def wait_of(self, rank: int, stage: int, index: int, move: _Move) -> tuple[int, str]:
        """Say for whom a rank waits at a move, and why."""
        if move.what == "compute":
            shape = self.stages[stage].ranks.shape
            image = index // shape[1]
            behind = image * shape[1] + int(self.at[stage].reshape(shape)[image].argmin())
            peer = int(self.stages[stage].ranks.flat[behind])
            return peer, f"rank {rank} waits for rank {peer} in {move.kind}{move.microbatch}"
        links = self.links(stage, move)[index]
        verb = "receive" if move.verb == "send" else "send"
        link = int(links[self.posted[verb][links] <= move.ordinal][0])
        peer = int((self.receiver if move.verb == "send" else self.sender)[link])
        what = f"the {WORDS[move.kind]} of microbatch {move.microbatch}"
        return peer, f"rank {rank} waits for rank {peer} to {verb} {what}"


def _order(program: Sequence[_Move], verb: str, kind: str) -> list[int]:
    """List the microbatches of the messages that a stage posts, in order."""
    posts = (move for move in program if (move.what, move.verb, move.kind) == ("post", verb, kind))
    return [move.microbatch for move in posts if not move.column]
