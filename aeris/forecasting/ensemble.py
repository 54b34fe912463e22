"""Make an ensemble forecast: members and init times over replicas of the network, written as they come.

A portion of work (portions.py) belongs to one replica (dp), whose ranks share its windows, tokens and
stages. The lead of a replica puts its images together and writes them, in a thread, beside the other leads;
what is on disk says what is left, on any number of ranks. All replicas take their steps at the same time and
agree after each whether to go on: on an error, or asked to stop, all end with everything written.

Shapes: M members, N windows, T tokens per window, C channels, Y rows, X columns.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from aeris.data.forecasts import ForecastError, ForecastPlan, ForecastWriter, MemberWriter
from aeris.data.init_times import read_init_times
from aeris.data.store import Store
from aeris.diffusion.sampler import nfe
from aeris.forecasting.portions import Portion, Timeline, Work, look
from aeris.forecasting.rollout import Forecaster, ahead, not_finite
from aeris.forecasting.throughput import Throughput
from aeris.forecasting.writer_thread import WriterThread
from aeris.interruption import Requests
from swipe.collectives import least, tell, together
from swipe.images import Images

ROOM = 2
"""Lead times of a portion that wait to be written while the next is computed."""


def init_times(words: tuple[str, ...], store: Store) -> tuple[str, ...]:
    """Read init times: single ones, or START:END:STEPh with both ends included; sorted, each once.

    Raises:
        ValueError: not a time, an empty range, or a time the store does not have (names the nearest).
    """
    times = read_init_times(words)
    for moment in times:
        store.index_of(moment)
    return tuple(map(str, times))


@dataclass
class Underway:
    """The portion this rank's replica is at."""

    portion: Portion
    init: np.datetime64
    lead_h: int
    """Hours the states have come."""
    x_BNTC: Tensor
    start_BNTC: Tensor | None
    """The states at the init time, where boundary fields depend on them."""


class Ensemble:
    """A forecaster and where its forecast goes. All ranks have one and call the same.

    Args:
        forecaster: what computes.
        plan: what the forecast will be; of the forecaster's steps and channels some may be left out.
        writer: on rank 0, what begins and finishes the forecast and knows what is on disk; None on others.
        batch: members a replica computes at the same time.
        requests: who may ask to stop; nobody by default.

    Attributes:
        work: what there was to do at the start.
        throughput: how fast it goes.
    """

    def __init__(
        self,
        forecaster: Forecaster,
        plan: ForecastPlan,
        writer: ForecastWriter | None,
        batch: int,
        requests: Requests | None = None,
    ) -> None:
        self.forecaster, self.plan, self.writer, self.batch = forecaster, plan, writer, batch
        self.groups, self.requests = forecaster.groups, requests
        self.images = Images(forecaster.layout.shard.grid, self.groups)
        self.work: Work = tell(self.groups.world, None if writer is None else look(writer, batch))
        self.throughput = Throughput(forecaster.device, forecaster.interval_h)
        self.timeline = Timeline(
            [self._steps_of(portion) for portion in self.work.portions], self.groups.dims.dp
        )
        self._replica = self.groups.dims.coordinate(self.groups.rank).dp
        names = list(forecaster.store.names)
        self._channels = None if list(plan.names) == names else [names.index(name) for name in plan.names]
        self._lead_of = {lead_h: lead for lead, lead_h in enumerate(plan.lead_h)}
        self._advance: Callable[[int], None] = lambda evaluations: None
        self._scale = 1.0

    def _steps_of(self, portion: Portion) -> int:
        """Steps a portion still takes."""
        from_h = self.plan.lead_h[portion.done - 1] if portion.done else 0
        return (self.plan.lead_h[-1] - from_h) // self.forecaster.interval_h

    @property
    def steps(self) -> int:
        """Steps of one member from one init time, over all of them."""
        each = self.plan.lead_h[-1] // self.forecaster.interval_h
        return len(self.plan.inits) * self.plan.members * each

    @property
    def steps_left(self) -> int:
        """Those that were still to be computed at the start."""
        return sum(len(portion.members) * self._steps_of(portion) for portion in self.work.portions)

    @property
    def images_seen(self) -> int:
        """Those that are computed, in this start of the program and before."""
        return self.steps - self.steps_left + self.throughput.steps

    @property
    def evaluations_per_step(self) -> int:
        """Network evaluations of one step of one member."""
        return nfe(self.forecaster.sampler)

    @property
    def evaluations_left(self) -> int:
        """Network evaluations still to be made at the start, those that make initial states included."""
        extra = sum(map(self._extra_steps, self.work.portions))
        return self.evaluations_per_step * (self.steps_left + extra)

    def _extra_steps(self, portion: Portion) -> int:
        """Steps of one member it takes to make the initial states of a portion: bred vectors do."""
        perturbation, boundary = self.forecaster.perturbation, self.forecaster.boundary
        again = boundary is not None and boundary.needs_start
        if perturbation is None or (portion.done and not again):
            return 0
        return perturbation.steps(len(portion.members))

    @property
    def waiting_bytes(self) -> int:
        """Most memory that images take which wait to be written, on the lead of a replica."""
        store = self.forecaster.store
        points = len(store.names) * len(store.latitude_deg) * len(store.longitude_deg)
        return 4 * (ROOM + 2) * self.batch * points

    def run(self, advance: Callable[[int], None] = lambda evaluations: None) -> None:
        """Compute and write everything that is left, and finish the output. A collective call over all ranks.

        Args:
            advance: called after every call of the network with the number of evaluations that all replicas
                made in the meantime.

        Raises:
            Stopped: somebody asked for it; what was computed is written.
            ValueError: a forecast stopped being finite; what was written before stays.
            OSError: the disk is full or cannot be written; among several ranks a ValueError.
        """
        try:
            self._run(advance)
        finally:
            if self.writer is not None:
                self.writer.release()

    def _run(self, advance: Callable[[int], None]) -> None:
        world = self.groups.world
        with together(world):
            if self.writer is not None and self.work.portions:
                self.writer.begin()
        stopped = self._work(advance) if self.work.portions else False
        if stopped and self.requests is not None:
            made = f"{self.images_seen:,} of {self.steps:,} steps of a member are made"
            raise self.requests.stopped(f"after a step, everything written ({made})")
        with together(world):
            if self.writer is not None:
                self.writer.finish()

    def _work(self, advance: Callable[[int], None]) -> bool:
        """Compute and write all portions; return whether somebody asked to stop."""
        network, output = self.forecaster.network, None
        with together(self.groups.world):
            if self.images.lead:
                output = MemberWriter(Path(self.work.path), self.plan, self._replica)
        writer_thread = WriterThread(ROOM)

        def counted(x_BNTC: Tensor, t_B: Tensor) -> Tensor:
            with self.throughput.spending("network"):
                y_BNTC = network(x_BNTC, t_B)
            advance(round(len(t_B) * self._scale))
            return y_BNTC

        self.forecaster.network, self._advance = counted, advance
        self.throughput.begin()
        try:
            stopped = self._take_steps(output, writer_thread)
            with together(self.groups.world), self.throughput.spending("writing"):
                writer_thread.close()
            self.images.wait()
        finally:
            self.forecaster.network = network
            writer_thread.stop()
            if output is not None:
                output.close()
            self.throughput.end()
        return stopped

    def _take_steps(self, output: MemberWriter | None, writer_thread: WriterThread) -> bool:
        """Take one step of every replica at a time; return whether somebody asked to stop."""
        mine: Underway | None = None
        for tick in range(self.timeline.ticks):
            beginning = self._portions(self.timeline.beginning(tick))
            if beginning:
                extra = {replica: self._extra_steps(portion) for replica, portion in beginning.items()}
                with self._phase(extra):
                    if self._replica in beginning:
                        mine = self._begin(beginning[self._replica], output)
                if mine is not None and mine.lead_h == 0:
                    self._keep(mine, output, writer_thread)
            portions = self._portions(self.timeline.at(tick))
            active = {replica: len(portion.members) for replica, portion in portions.items()}
            mine = mine if self._replica in active else None
            with self._phase(active):
                writer_thread.check()
                if mine is not None:
                    self._step(mine)
            self.throughput.steps += sum(active.values())
            self.throughput.settle()
            if mine is not None:
                self._keep(mine, output, writer_thread)
            if self._asked_to_stop():
                return True
        return False

    def _portions(self, numbers: dict[int, int]) -> dict[int, Portion]:
        return {replica: self.work.portions[number] for replica, number in numbers.items()}

    @contextmanager
    def _phase(self, made: dict[int, int]) -> Iterator[None]:
        """Do together what may fail on some ranks.

        Args:
            made: steps of one member that each replica makes in it, for the progress line.
        """
        own, everybody = made.get(self._replica, 0), sum(made.values())
        self._scale = everybody / own if own else 0.0
        with together(self.groups.world):
            yield
            computed = time.perf_counter()
        self.throughput.spent("waiting", time.perf_counter() - computed)
        if not own and everybody:
            self._advance(everybody * self.evaluations_per_step)

    def _begin(self, portion: Portion, output: MemberWriter | None) -> Underway:
        """Make the states a portion starts from, or read those it goes on from."""
        init = np.datetime64(self.plan.inits[portion.init], "s")
        with self.throughput.spending("reading"):
            if not portion.done:
                x_BNTC = self.forecaster.state(init, portion.members)
                return Underway(portion, init, 0, x_BNTC, x_BNTC)
            x_BNTC = self._read(portion, output).to(self.forecaster.device)
            start_BNTC = self.forecaster.start_of(init, portion.members)
            return Underway(portion, init, self.plan.lead_h[portion.done - 1], x_BNTC, start_BNTC)

    def _read(self, portion: Portion, output: MemberWriter | None) -> Tensor:
        """Read the last lead time of a portion on the lead, and deal it out: this rank's [M, N, T, C]."""
        store, failure, x_MCYX = self.forecaster.store, None, None
        if output is not None:
            shape = (len(portion.members), *store.mask_CYX.shape)
            try:
                read = output.read if self._channels is None else output.read_states
                values = read(portion.init, portion.members, portion.done - 1)
                if values.shape != shape:
                    raise ForecastError(f"a state to go on from has the shape {values.shape}, not {shape}")
                x_MCYX = torch.from_numpy(np.where(store.mask_CYX, values, store.fill_C[:, None, None]))
            except (ValueError, OSError) as error:  # said once the others have what they wait for
                failure, x_MCYX = error, torch.zeros(shape)
        x_BNTC = self.images.deal(x_MCYX, len(portion.members), len(store.names))
        if failure is not None:
            raise failure
        return x_BNTC

    def _step(self, mine: Underway) -> None:
        """Take one step of this rank's portion.

        Raises:
            ValueError: it is no longer finite.
        """
        forecaster, members = self.forecaster, mine.portion.members
        mine.lead_h += forecaster.interval_h
        mine.x_BNTC = ahead(forecaster, mine.x_BNTC, mine.init, mine.lead_h, members, mine.start_BNTC)
        if error := not_finite(mine.x_BNTC, forecaster, mine.init, members, mine.lead_h):
            raise ValueError(error)

    def _keep(self, mine: Underway, output: MemberWriter | None, writer_thread: WriterThread) -> None:
        """Put the images of one lead time together, if it is kept, and hand them over to be written."""
        if (lead := self._lead_of.get(mine.lead_h)) is None:
            return
        with self.throughput.spending("writing"):
            x_MCYX = self.images.collect(mine.x_BNTC)
            if output is not None and x_MCYX is not None:
                writer_thread.do(partial(self._write, output, mine.portion, lead, x_MCYX.numpy()))

    def _write(self, output: MemberWriter, portion: Portion, lead: int, x_MCYX: NDArray[np.float32]) -> None:
        """Write one lead time, in the background; masked points become NaN."""
        mask_CYX, states, kept = self.forecaster.store.mask_CYX, None, x_MCYX
        if self._channels is not None:
            states = x_MCYX if output.restartable else None
            kept, mask_CYX = x_MCYX[:, self._channels], mask_CYX[self._channels]
        output.write(portion.init, portion.members, lead, np.where(mask_CYX, kept, np.float32("nan")), states)

    def _asked_to_stop(self) -> bool:
        """Whether any rank was asked to stop, the same on all."""
        if self.requests is None:
            return False
        asked, _ = self.requests.wishes()
        stop = least(self.groups.world, 0 if asked else 1, "exchange of requests to stop") == 0
        return self.requests.settle(float(stop), 0.0).stop
