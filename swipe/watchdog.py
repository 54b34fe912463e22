"""A thread that notices when this rank makes no progress, and finds out with the others who is to blame.

A rank whose clock passes the limit of its phase asks all others what they are in (swipe/inquiry.py). If some
rank is late, or does not answer, one line says which, in which operation and on which machine; stacks are
written; and all ranks end. If whoever is waited for is still within its own limit, all go on.

While steps are short nothing is sent: a rank listens only once it has been in one phase for a while. Ranks do
so one after the other, since one process answers them all.
"""

from __future__ import annotations

import faulthandler
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from swipe.collectives import expect_the_end
from swipe.inquiry import UNKNOWN, Inquiry, Report, State, Unreachable, conclude
from swipe.whereabouts import whereabouts

T = TypeVar("T")
QUIET_S = 15.0  # the longest that a rank is in one phase before it listens
RANKS_PER_S = 4000  # how many may ask the store, which is one process
DUMP_S, SAY_S = 10.0, 10.0  # a file system may be what all wait for


class Watchdog:
    """Watches the thread that made it, from the phase "start" on.

    Attributes:
        hosts: the machine of each rank, if it is known: to name the machine of a rank that does not answer.
    """

    def __init__(
        self,
        limits: Mapping[str, float],
        rank: int,
        world: int,
        dump_dir: Path,
        say: Callable[[str], None],
        status: int,
        hosts: Sequence[str] = (),
    ) -> None:
        """Start to watch.

        Args:
            limits: of the phases "start", "read", "step" and "save", in seconds.
            rank: this rank.
            world: how many there are; they meet at MASTER_ADDR and MASTER_PORT.
            dump_dir: where stacks, torch's flight recorder and the whole report are put.
            say: told the line on one rank only, by a thread, right before the process ends.
            status: the exit status of all ranks.
            hosts: the machine of each rank.
        """
        self.hosts = hosts
        self._limits, self._rank, self._world = dict(limits), rank, world
        self._dump_dir, self._say, self._status = dump_dir, say, status
        smallest = min(limits.values())
        self._quiet = min(QUIET_S, smallest / 10)
        self._pause = min(1.0, max(0.02, smallest / 40))
        self._period = max(self._pause, world / RANKS_PER_S)
        self._host = socket.gethostname().split(".")[0]
        self._main = threading.get_ident()
        self._beat, self._stopped_s = time.monotonic(), 0.0  # see _stood_still
        self._phase, self._since, self._reading_since, self._read_s = "start", time.monotonic(), 0.0, 0.0
        self._began = self._since  # the phase; its clock may have been started again since
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()
        self._pulsing = threading.Thread(target=self._pulse, name="watchdog's pulse", daemon=True)
        self._pulsing.start()

    def phase(self, name: str) -> None:
        """Begin a phase, or begin it anew: its clock starts."""
        self._phase, self._began = name, time.monotonic()
        self.tick()

    def tick(self) -> None:
        """Start the clock of the phase again."""
        self._since, self._read_s, self._stopped_s = time.monotonic(), 0.0, 0.0

    def reading(self, samples: Iterable[T]) -> Iterator[T]:
        """Hand on samples; the clock of a step stands while one is waited for, and that of "read" runs."""
        source = iter(samples)
        while True:
            start = self._reading_since = time.monotonic()
            try:
                sample = next(source)
            except StopIteration:
                return
            finally:
                self._reading_since = 0.0
                self._read_s += time.monotonic() - start
            yield sample

    def close(self) -> None:
        """Stop watching."""
        self._end.set()
        if threading.get_ident() == self._main:
            # A thread that still runs while the interpreter ends would end the process with an abort.
            self._thread.join(timeout=DUMP_S)
            self._pulsing.join(timeout=DUMP_S)

    def __enter__(self) -> Watchdog:
        """Use as a context, so that it ends with it."""
        return self

    def __exit__(self, *error: object) -> None:
        """Stop watching."""
        self.close()

    def state(self) -> State:
        """Say what the watched thread is in."""
        still, now = self._stood_still(), time.monotonic()
        reading = self._reading_since if self._phase != "start" else 0.0
        phase = "read" if reading else self._phase
        age = now - reading if reading else now - self._since - self._read_s * (phase == "step")
        doing, since, waits = whereabouts(self._main, self._since, bool(self._reading_since))
        return State(
            rank=self._rank,
            host=self._host,
            phase=phase,
            limit_s=self._limits[phase],
            age_s=max(0.0, age - still),
            doing=doing,
            for_s=max(0.0, now - max(since, reading) - still),
            waits=waits,
        )

    def _pulse(self) -> None:
        """Notice that this process stood still: stopped by a signal, it is nobody's fault when it goes on."""
        while not self._end.wait(self._pause):
            self._stopped_s = self._stood_still()
            self._beat = time.monotonic()

    def _stood_still(self) -> float:
        """Return for how long, since the clock was started."""
        gap = time.monotonic() - self._beat - self._pause
        return self._stopped_s + (gap if gap > 1.0 else 0.0)

    def _watch(self) -> None:
        """Be the thread."""
        inquiry: Inquiry | None = None  # kept over phases: it knows what this rank has answered
        turn = self._period * self._rank / self._world
        due = 0.0  # when to look again
        while not self._end.wait(self._pause):
            now, listens = time.monotonic(), self._began + self._quiet
            if now < listens:
                continue
            state = self.state()
            expired = state.age_s > state.limit_s
            if self._world == 1:
                if expired:
                    self._finish(conclude([state], 1, self._quiet, self.hosts) or Report.of([state], [], []))
                continue
            if now < max(listens + turn, due):
                continue
            due = now + self._period
            try:
                inquiry = inquiry or Inquiry(self._rank, self._world, self._period, self._quiet)
                if report := inquiry.take_part(self.state, expired, self.hosts):
                    self._finish(report, inquiry)
            except Unreachable as error:
                due = time.monotonic() + state.limit_s / 20
                if expired:
                    self._alone(state, error)

    def _alone(self, state: State, error: Unreachable) -> None:
        """End without the others' answers. A launcher ends all when one ends: the first speaks for many."""
        time.sleep(min(max(0.0, self._rank - 1), 20 + self._rank / RANKS_PER_S))
        host = self.hosts[0] if self.hosts else UNKNOWN
        self._finish(Report.of([], [(0, host)] * error.first_rank, [state], str(error)))

    def _finish(self, report: Report, inquiry: Inquiry | None = None) -> None:
        """Write, say and end; unless the main thread has got to its end by now."""
        if self._end.is_set():
            return
        expect_the_end()
        if self._rank in report.dump:
            _at_most(DUMP_S, self._dump)
        if report.mine:
            where = f"; stacks in {self._dump_dir}"
            _at_most(SAY_S, lambda: self._say(report.line + where))
            _at_most(SAY_S, lambda: self._write(report))
        if inquiry is not None:
            inquiry.leave(report)
        _at_most(1.0, sys.stdout.flush)
        os._exit(self._status)

    def _write(self, report: Report) -> None:
        self._dump_dir.mkdir(parents=True, exist_ok=True)
        partial = self._dump_dir / "late.json.partial"
        partial.write_text(json.dumps(report.data() | {"time": time.time()}, indent=1) + "\n")
        partial.replace(self._dump_dir / "late.json")

    def _dump(self) -> None:
        """Write the stacks of all threads, and what the flight recorder of torch holds."""
        self._dump_dir.mkdir(parents=True, exist_ok=True)
        state = self.state()
        with (self._dump_dir / f"late_{self._rank}.txt").open("w") as file:
            file.write(f"{state}\n\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
        for name, data in flight_recorders().items():
            (self._dump_dir / f"late_{self._rank}.{name}.json").write_bytes(data)


def flight_recorders() -> dict[str, bytes]:
    """Return what torch has recorded of collectives, as JSON by kind; empty where it has no recorder.

    It records if TORCH_FR_BUFFER_SIZE was set before the groups were made. NCCL has one of its own.
    """
    found = {}
    for name, function in (("flight", "_dump_fr_trace_json"), ("nccl", "_dump_nccl_trace_json")):
        dump: Any = getattr(getattr(torch._C, "_distributed_c10d", None), function, None)
        try:
            data = dump() if dump else b""
        except RuntimeError:
            continue
        data = data if isinstance(data, bytes) else str(data).encode()
        if data and json.loads(data).get("entries"):
            found[name] = data
    return found


def _at_most(seconds: float, function: Callable[[], None]) -> None:
    """Call a function, but do not wait longer for it; it may fail."""

    def call() -> None:
        try:
            function()
        except Exception as error:
            print(f"watchdog: {error}", file=sys.stderr, flush=True)

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(seconds)
