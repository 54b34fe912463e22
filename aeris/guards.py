"""What watches over a training run: requests from outside, the watchdog, and how long every rank computes."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch

from aeris.config import FaultConfig
from aeris.interruption import Requests, write_ended
from aeris.log import console
from launch import exits
from swipe.collectives import host_names
from swipe.groups import Groups
from swipe.stopwatch import Stopwatch
from swipe.stragglers import Stragglers, named
from swipe.watchdog import Watchdog

Item = TypeVar("Item")


class Guards:
    """The guards of one rank. Only inside of `on_duty` are signals taken and limits of time watched.

    Attributes:
        requests: what the run is asked to do.
        stopwatch: how long this rank computes in a step; there after `join`.
    """

    stopwatch: Stopwatch

    def __init__(self, run_dir: Path, every_minutes: float = 0.0, lead: bool = True) -> None:
        """Make them; see `Requests`."""
        self.requests = Requests(run_dir, every_minutes, lead)
        self._run_dir = run_dir
        self._watchdog: Watchdog | None = None
        self._stragglers: Stragglers | None = None
        self._images_seen: int | None = None

    @contextmanager
    def on_duty(self, faults: FaultConfig, rank: int, world: int) -> Iterator[Guards]:
        """Take signals and watch the limits of `faults` while the context is open; for the main thread."""
        limits = {
            "start": faults.start_s,
            "read": faults.read_s,
            "step": faults.step_s,
            "save": faults.save_s,
        }
        watchdog = Watchdog(limits, rank, world, self._run_dir / "faults", self._say_late, exits.LOST)
        with self.requests, watchdog:
            self._watchdog = watchdog
            try:
                yield self
            finally:
                self._watchdog = None

    def join(self, groups: Groups, device: torch.device, faults: FaultConfig) -> None:
        """Learn the machines of all ranks, to compare and to name them; a collective call."""
        hosts = host_names(groups.world)
        self.stopwatch = Stopwatch(device, on=faults.slow_pct > 0 and groups.dims.world > 1)
        self._stragglers = Stragglers(groups, hosts, faults.slow_pct, faults.slow_every)
        if self._watchdog is not None:
            self._watchdog.hosts = hosts

    def phase(self, name: str) -> None:
        """Begin a phase, "step" or "save", or begin it anew: the clock of its limit starts."""
        if self._watchdog is not None:
            self._watchdog.phase(name)

    def tick(self) -> None:
        """Start the clock of the phase again: there is progress."""
        if self._watchdog is not None:
            self._watchdog.tick()

    def reading(self, samples: Iterable[Item]) -> Iterator[Item]:
        """Hand on samples; the limit for reading counts while one is waited for."""
        return iter(samples) if self._watchdog is None else self._watchdog.reading(samples)

    def compare(self, record: dict[str, Any]) -> None:
        """After a step, look from time to time which ranks compute slowly; a collective call.

        Args:
            record: of the step; gets "slow" if there are such ranks.
        """
        assert self._stragglers is not None, "joined"
        self._images_seen = record["images_seen"]
        slow = self._stragglers.step_done(self.stopwatch.take())
        if slow:
            record["slow"] = [one._asdict() for one in slow]
            console.print(named(slow), markup=False)

    def _say_late(self, line: str) -> None:
        """Say which ranks are late, from the watchdog's thread, on whichever rank finds out."""
        print(f"error: {line}", file=sys.stderr, flush=True)
        write_ended(self._run_dir, exits.LOST, line, self._images_seen)
