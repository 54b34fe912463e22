"""How fast a forecast goes, and what its time goes to.

A member-day is a day of forecast of one member. Shares are of the time since the first step began, means
over the ranks: network (its evaluations, with the messages between the ranks of a replica), reading
(analyses, states to go on from), writing (putting images together, and waiting for room to write them),
waiting (for other replicas). The rest is the solver, noise, forcings. On a device the network is timed by
events, on a CPU by the clock.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch

from swipe.collectives import Group, all_reduce

Kind = Literal["network", "reading", "writing", "waiting"]
KINDS: tuple[Kind, ...] = get_args(Kind)


class Throughput:
    """The account of one rank.

    Args:
        device: where the network is evaluated.
        step_h: hours of a step.

    Attributes:
        steps: steps of one member that all ranks have made.
    """

    def __init__(self, device: torch.device, step_h: int) -> None:
        self.steps = 0
        self._step_h = step_h
        self._device = None if device.type == "cpu" else getattr(torch, device.type)
        self._spent_s = dict.fromkeys(KINDS, 0.0)
        self._events: list[tuple[Any, Any]] = []
        self._begun_s = self._inside_s = 0.0
        self._ended_s: float | None = None

    def begin(self) -> None:
        """Start the clock."""
        self._begun_s = time.perf_counter()

    def end(self) -> None:
        """Stop the clock."""
        self._ended_s = time.perf_counter()

    @contextmanager
    def spending(self, kind: Kind) -> Iterator[None]:
        """Count the time inside as `kind`, but for what is spent otherwise within."""
        if kind == "network" and self._device is not None:
            first, last = (self._device.Event(enable_timing=True) for _ in range(2))
            first.record()
            yield
            last.record()
            self._events.append((first, last))
            return
        before, outside_s, self._inside_s = time.perf_counter(), self._inside_s, 0.0
        yield
        passed_s = time.perf_counter() - before
        self._spent_s[kind] += passed_s - self._inside_s
        self._inside_s = outside_s + passed_s

    def spent(self, kind: Kind, seconds: float) -> None:
        """Count some time as `kind`."""
        self._spent_s[kind] += seconds

    def settle(self) -> None:
        """Read the clocks of what the device has finished; called after a step, when it has."""
        left = []
        for first, last in self._events:
            if last.query():
                self._spent_s["network"] += first.elapsed_time(last) / 1000
            else:
                left.append((first, last))
        self._events = left

    @property
    def elapsed_s(self) -> float:
        """Seconds since the first step began, until the last was written."""
        return (self._ended_s or time.perf_counter()) - self._begun_s

    @property
    def member_days_per_h(self) -> float:
        """Days of forecast of one member, made by all ranks in an hour."""
        return self.steps * self._step_h / 24 / self.elapsed_s * 3600

    def shares(self, world: Group | None = None) -> dict[str, float]:
        """Return the share of time of every kind and of the rest, of this rank or the mean over `world`.

        A collective call over `world`.
        """
        self.settle()
        elapsed_s = max(self.elapsed_s, 1e-9)
        values = torch.tensor([self._spent_s[kind] / elapsed_s for kind in KINDS], dtype=torch.float64)
        if world is not None:
            values = all_reduce(values, world, "shares of time") / world.size
        found: dict[str, float] = dict(zip(KINDS, values.tolist()))
        return {**found, "rest": max(0.0, 1.0 - sum(found.values()))}


def in_words(shares: dict[str, float]) -> str:
    """Put shares of time into words, "network 93%, writing 2%"; those below half a percent are left out."""
    shown = [f"{kind} {share:.0%}" for kind, share in shares.items() if share >= 0.005 or kind == "network"]
    return ", ".join(shown)
