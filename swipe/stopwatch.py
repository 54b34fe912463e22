"""How long this rank computes in a step, apart from the time in which it waits for others.

On a CPU it is how long the calling thread ran, or was ready to run but had no core: while it waits for a
message it is neither. Where the ranks fill the machine themselves, only how long it ran: there they take the
cores from each other. On a device it is the time between events around passes; a collective inside of a pass
(all-to-alls of attention) counts, so ranks that share windows look alike there.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch


class Stopwatch:
    """Adds up the time spent in `computing`, until it is taken."""

    def __init__(self, device: torch.device, on: bool = True) -> None:
        """Make one at zero.

        Args:
            device: where the computation runs. Events are recorded on its current stream, and nothing is ever
                waited for.
            on: False: it measures nothing.
        """
        self._on = on
        self._device = None if device.type == "cpu" else getattr(torch, device.type)
        self._seconds, self._crowded = 0.0, crowded()
        self._events: list[tuple[Any, Any]] = []

    @contextmanager
    def computing(self, waits: bool = False) -> Iterator[None]:
        """Count what happens inside.

        Args:
            waits: it begins or ends with waiting for others on the device's own queue (for gathered weights,
                or for reduced gradients), so on a device it is left out. A CPU can tell the two apart.
        """
        if not self._on:
            yield
        elif self._device is None:
            before = runnable_s(self._crowded)
            yield
            self._seconds += runnable_s(self._crowded) - before
        elif waits:
            yield
        else:
            first, last = (self._device.Event(enable_timing=True) for _ in range(2))
            first.record()
            yield
            last.record()
            self._events.append((first, last))

    def take(self) -> float:
        """Return the seconds counted since the last time; what a device has not finished counts next time."""
        events, self._events = self._events, []
        for first, last in events:
            if last.query():
                self._seconds += first.elapsed_time(last) / 1000
            else:
                self._events.append((first, last))
        seconds, self._seconds = self._seconds, 0.0
        return seconds


def crowded() -> bool:
    """Whether the ranks of this machine together have as many threads as there are cores, or more."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return int(os.environ.get("LOCAL_WORLD_SIZE") or 1) * torch.get_num_threads() >= cores


def runnable_s(only_ran: bool) -> float:
    """Return for how many seconds the calling thread has run, and unless `only_ran` waited for a core."""
    delay_ns = 0
    if not only_ran:
        with suppress(OSError, IndexError, ValueError):  # Linux has it: see sched-stats in its documentation
            delay_ns = int(Path("/proc/thread-self/schedstat").read_text().split()[1])
    return time.thread_time() + delay_ns / 1e9
