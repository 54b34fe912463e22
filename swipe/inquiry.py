"""Who is to blame when nothing goes on: one rank asks, all that can answer, one rank concludes.

They talk through the store in which they met, over connections of their own: torch's may be what is stuck.
An inquiry has a number. Whoever is first to claim it collects the answers and publishes a verdict, "go on" or
"end". A rank that has not answered in time is stopped, or its machine is gone.
"""

from __future__ import annotations

import json
import os
import re
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NamedTuple

import torch.distributed as dist

SHOWN, KEPT, DUMPED_WAITING = 4, 64, 4  # in the line, in the file; ranks that wait and write stacks
PATIENCE_S = 5.0
UNKNOWN = "machine unknown"
VANISHED = "the rank that asked who is late has vanished"


class Unreachable(ConnectionError):
    """The others cannot be asked.

    Attributes:
        first_rank: whether rank 0 is what does not answer: it holds the store, unless torchrun does.
    """

    def __init__(self, text: str, first_rank: bool = False) -> None:
        """Keep the words."""
        super().__init__(text)
        self.first_rank = first_rank


class State(NamedTuple):
    """What one rank is in."""

    rank: int
    host: str
    phase: str
    limit_s: float
    age_s: float
    """How long it is in its phase; in a step, without reading."""
    doing: str
    for_s: float
    """How long it has been doing that."""
    waits: bool
    """Whether it only waits for other ranks."""

    def late(self) -> bool:
        """Whether it is itself what takes too long."""
        return not self.waits and min(self.for_s, self.age_s) > self.limit_s


@dataclass
class Report:
    """What an inquiry has found, with which all ranks end.

    Attributes:
        line: all in one line.
        late: ranks that take too long.
        silent: ranks that do not answer, and their machines.
        waiting: the others, those in the same operation together, as (operation, states).
        dump: ranks that write their stacks.
        mine: whether this rank is the one that says it.
        asked: the number of the inquiry.
    """

    line: str
    late: list[State]
    silent: list[tuple[int, str]]
    waiting: list[tuple[str, list[State]]]
    dump: list[int]
    mine: bool = True
    asked: int = 0

    @classmethod
    def of(
        cls,
        late: Sequence[State],
        silent: Sequence[tuple[int, str]],
        others: Iterable[State],
        reason: str = "",
    ) -> Report:
        """Put what is known in words.

        Args:
            late: ranks that take too long.
            silent: rank and machine of those that do not answer.
            others: all that answered and are not late.
            reason: said first; by default whose fault it is.
        """
        alike: dict[str, list[State]] = {}
        for state in others:  # together, whatever their peers are
            alike.setdefault(re.sub(r" \(ranks? [^()]*\)", "", state.doing), []).append(state)
        waiting = {ones[0].doing if len(ones) == 1 else doing: ones for doing, ones in alike.items()}
        # Where nobody is late, the few that have left the others are what one wants to know.
        groups = sorted(waiting.items(), key=lambda item: len(item[1]), reverse=bool(late or silent))
        parts = [reason] if reason else []
        parts += [
            f"rank {one.rank} ({one.host}) is late: {one.doing}, for {one.for_s:.3g} s "
            f"({one.phase} may take {one.limit_s:g})"
            for one in late[:SHOWN]
        ]
        parts += [f"{len(late) - SHOWN} more ranks are late"] if len(late) > SHOWN else []
        parts += [f"rank {rank} ({host}) does not answer" for rank, host in silent[:SHOWN]]
        parts += [f"{len(silent) - SHOWN} more do not answer"] if len(silent) > SHOWN else []
        if silent:
            parts[-1] += ": stopped, or the machine is gone"
        if not late and not silent and not reason:
            parts += ["no rank is late, but they wait for each other"]
        parts += [_waiting(doing, states) for doing, states in groups[:SHOWN]]
        if left := sum(len(states) for _, states in groups[SHOWN:]):
            parts.append(f"{left} in other operations")
        dump = [one.rank for one in late[:KEPT]]
        dump += [states[0].rank for _, states in groups[:DUMPED_WAITING]]
        return cls("no progress: " + "; ".join(parts), list(late), list(silent), groups, dump)

    def data(self) -> dict[str, Any]:
        """Return the report as plain data of bounded size."""
        late = [
            {"rank": one.rank, "host": one.host, "phase": one.phase, "doing": one.doing, "for_s": one.for_s}
            for one in self.late[:KEPT]
        ]
        waiting = [
            {
                "ranks": ranges([one.rank for one in states], KEPT),
                "count": len(states),
                "doing": doing,
                "for_s": max(one.for_s for one in states),
            }
            for doing, states in self.waiting[:KEPT]
        ]
        return {
            "line": self.line,
            "late": late,
            "late_count": len(self.late),
            "silent": [{"rank": rank, "host": host} for rank, host in self.silent[:KEPT]],
            "silent_count": len(self.silent),
            "waiting": waiting,
        }


def conclude(states: Sequence[State], world: int, still_s: float, hosts: Sequence[str]) -> Report | None:
    """Decide whether anything is wrong.

    Something is if a rank did not answer; if one that waits for nobody takes longer than its limit; if all
    only wait, each for longer than `still_s`; or if all are over their limits. Otherwise whoever is waited
    for is within its own limit, as a slow file system is while a checkpoint is written.

    Returns:
        What to report, or None: go on.
    """
    answered = {state.rank for state in states}
    silent = [(rank, hosts[rank] if hosts else UNKNOWN) for rank in range(world) if rank not in answered]
    late = [state for state in states if state.late()]
    stuck = all(state.waits and state.for_s > still_s for state in states)
    over = all(state.age_s > state.limit_s for state in states)
    if over and not late:
        late = [state for state in states if not state.waits]
    if not (silent or late or stuck or over):
        return None
    named = {state.rank for state in late}
    return Report.of(late, silent, [state for state in states if state.rank not in named])


class Inquiry:
    """This rank's part in inquiries, over a connection of its own."""

    def __init__(self, rank: int, world: int, period_s: float, quiet_s: float) -> None:
        """Connect to the store of the ranks.

        Args:
            rank: this rank.
            world: how many there are.
            period_s: how often a rank looks whether it is asked.
            quiet_s: after which time in one phase it begins to look.

        Raises:
            Unreachable: nothing answers at MASTER_ADDR and MASTER_PORT.
        """
        self._rank, self._world, self._period = rank, world, period_s
        self._window = quiet_s + 2 * period_s + PATIENCE_S
        self._still = quiet_s
        self._answered = self._open = 0  # the newest inquiry answered; the one whose verdict is awaited
        self._since = self._again = self._outrun = self._rest = 0.0
        # torchrun's store outlives a restart.
        self._prefix = f"watchdog/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
        address, port = os.environ.get("MASTER_ADDR", ""), int(os.environ.get("MASTER_PORT") or 0)
        address = "127.0.0.1" if address == "localhost" else address
        self._address, self._port = address, port
        self._patience = PATIENCE_S + period_s
        self._store: Any = self._connect()

    def _connect(self) -> Any:
        store, patience = dist.TCPStore, timedelta(seconds=self._patience)  # type: ignore[attr-defined]
        return self._try(
            lambda: store(self._address, self._port, None, False, patience, wait_for_workers=False)
        )

    def take_part(self, state: Callable[[], State], expired: bool, hosts: Sequence[str]) -> Report | None:
        """Look once whether somebody asks, and answer; ask, if this rank has `expired` and nobody does.

        Returns:
            What to end with; None: go on.

        Raises:
            Unreachable: the store does not answer, or who asked has vanished.
        """
        newest = self._newest()
        if newest > self._answered:
            self._answer(newest, state())
        if self._open:
            return self._verdict()
        now = time.monotonic()
        if not expired or now < self._again:
            return None
        number = newest + 1
        if self._try(lambda: self._store.add(f"{self._prefix}/{number}/claims", 1)) > 1:
            self._outrun = self._outrun or now  # another rank was quicker and asks now
            if now > self._outrun + 2 * self._window:
                raise Unreachable(VANISHED)
            return None
        self._try(lambda: self._store.add(f"{self._prefix}/newest", 1))
        self._answer(number, state())
        self._open = 0
        report = conclude(self._collect(number), self._world, self._still, hosts)
        self._again = time.monotonic() + self._rest
        text = "go on" if report is None else json.dumps(report.dump)
        self._try(lambda: self._store.set(f"{self._prefix}/{number}/verdict", text))
        self._try(lambda: self._store.delete_key(f"{self._prefix}/{number}/answers"))
        if report is not None:
            report.asked = number
        return report

    def _newest(self) -> int:
        """Return the number of the newest inquiry, over a new connection if the old one has broken."""
        try:
            return int(self._try(lambda: self._store.add(f"{self._prefix}/newest", 0)))
        except Unreachable:
            self._store = self._connect()
            return int(self._try(lambda: self._store.add(f"{self._prefix}/newest", 0)))

    def leave(self, report: Report) -> None:
        """End no earlier than the ranks that have something to write or to say: a launcher then ends all."""
        key = f"{self._prefix}/{report.asked}"
        end = time.monotonic() + 2 * self._window
        try:
            if self._rank in report.dump:
                self._try(lambda: self._store.add(f"{key}/dumped", 1))
            if report.mine:
                time.sleep(2 * self._period)  # until then all have seen the verdict
                while self._try(lambda: self._store.add(f"{key}/dumped", 0)) < len(report.dump):
                    if time.monotonic() > end:
                        break
                    time.sleep(self._period)
                self._try(lambda: self._store.set(f"{key}/said", "1"))
                time.sleep(min(1.0, 2 * self._period))
            while not report.mine and time.monotonic() < end:
                if self._try(lambda: self._store.check([f"{key}/said"])):
                    break
                time.sleep(self._period)
        except Unreachable:
            pass  # the rank that holds the store has ended already

    def _answer(self, number: int, state: State) -> None:
        line = json.dumps(state) + "\n"
        self._try(lambda: self._store.append(f"{self._prefix}/{number}/answers", line))
        self._try(lambda: self._store.add(f"{self._prefix}/{number}/count", 1))
        self._answered = self._open = number
        self._since, self._outrun = time.monotonic(), 0.0
        self._rest = max(state.limit_s / 20, 4 * self._period)  # until this rank asks, if all are to go on

    def _collect(self, number: int) -> list[State]:
        """Wait until all ranks have answered, or as long as every one that runs needs for that."""
        key, end = f"{self._prefix}/{number}", time.monotonic() + self._window
        enough = self._world  # so many answers may be of all ranks; the list itself is long
        while True:
            over = time.monotonic() > end
            count = self._try(lambda: self._store.add(f"{key}/count", 0))
            if over or count >= enough:
                lines = self._try(lambda: self._store.get(f"{key}/answers")).decode().splitlines()
                states = {state.rank: state for state in (State(*json.loads(line)) for line in lines)}
                if over or len(states) == self._world:
                    return [states[rank] for rank in sorted(states)]
                enough = count + 1
            time.sleep(min(0.2, self._period))

    def _verdict(self) -> Report | None:
        """Look for the verdict of the inquiry that this rank has answered."""
        key = f"{self._prefix}/{self._open}/verdict"
        if not self._try(lambda: self._store.check([key])):
            if time.monotonic() > self._since + 2 * self._window:
                self._open = 0
                raise Unreachable(VANISHED)
            return None
        text = self._try(lambda: self._store.get(key)).decode()
        number, self._open = self._open, 0
        if text == "go on":
            self._again = time.monotonic() + self._rest
            return None
        return Report("", [], [], [], json.loads(text), mine=False, asked=number)

    def _try(self, call: Callable[[], Any]) -> Any:
        """Ask the store, in a thread: torch waits for ever for a store whose process is stopped."""
        results: list[Any] = []

        def ask() -> None:
            with suppress(RuntimeError):  # DistError and its kinds
                results.append(call())

        thread = threading.Thread(target=ask, daemon=True)
        thread.start()
        thread.join(self._patience)
        if not results:
            by_torchrun = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
            where = f"nothing answers at {self._address}:{self._port}, where the ranks meet"
            raise Unreachable(where + " (torchrun's first process)" * by_torchrun, not by_torchrun)
        return results[0]


def _waiting(doing: str, states: Sequence[State]) -> str:
    """Say who is in an operation."""
    count, longest = len(states), max(state.for_s for state in states)
    whose = f"rank{'s' * (count > 1)} {ranges([state.rank for state in states])}"
    verb = ("wait" if states[0].waits else "are") if count > 1 else "waits" if states[0].waits else "is"
    return f"{whose} {verb} in {doing}, for {longest:.3g} s"


def ranges(ranks: Sequence[int], most: int = 4) -> str:
    """Write ascending numbers shortly: "0-2, 5", and how many more after `most` parts."""
    parts: list[list[int]] = []
    for rank in ranks:
        if parts and rank == parts[-1][1] + 1:
            parts[-1][1] = rank
        else:
            parts.append([rank, rank])
    shown = ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in parts[:most])
    left = sum(b - a + 1 for a, b in parts[most:])
    return f"{shown} and {left} more" if left else shown
