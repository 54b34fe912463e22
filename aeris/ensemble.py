"""The work of an ensemble forecast: which init times and members, in what order, and what is left.

Members are computed in batches that are the same after a stop, so that a forecast that went on is bit for bit
the one that was never stopped. Every lead time is written when it is computed.

Shapes: M members, C channels, Y rows, X columns.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from aeris.data.forecasts import ForecastWriter
from aeris.data.store import Store
from aeris.diffusion.sampler import nfe
from aeris.rollout import Forecaster, rollout

RANGE = re.compile(r"(\d{4}-[^:]*(?::\d\d){0,2}):(\d{4}-.*):(\d+)h")
"""START:END:STEPh, where the times may have minutes and seconds."""


def init_times(words: tuple[str, ...], store: Store) -> tuple[str, ...]:
    """Read init times: single ones, or START:END:STEPh with both ends included; sorted, each once.

    Raises:
        ValueError: not a time, an empty range, or a time the store does not have (names the nearest).
    """
    times: set[np.datetime64] = set()
    for word in words:
        match = RANGE.fullmatch(word)
        try:
            start, end = (
                np.datetime64(text, "s") for text in (match.groups()[:2] if match else (word, word))
            )
        except ValueError:
            raise ValueError(
                f"init time {word!r} is not a time: write 2000-05-31T00, or START:END:STEPh such as "
                f"2000-05-31T00:2000-06-02T00:24h"
            ) from None
        step = np.timedelta64(int(match[3]) if match else 1, "h")
        if np.isnat(start) or np.isnat(end) or end < start or step <= np.timedelta64(0, "h"):
            raise ValueError(
                f"init times {word!r} are none: the end comes before the start, or the step is 0"
            )
        times.update(np.arange(start, end + np.timedelta64(1, "s"), step))
    for moment in sorted(times):
        store.index_of(moment)
    return tuple(str(moment) for moment in sorted(times))


@dataclass(frozen=True)
class Piece:
    """What is left to do for a few members at one init time."""

    init: int
    """Number of the init time."""
    members: range
    done: int
    """Lead times all of them have on disk."""


class Ensemble:
    """A forecaster and where its forecast goes.

    Args:
        forecaster: what computes.
        writer: what writes, and knows what is on disk.
        batch: members computed at the same time.
    """

    def __init__(self, forecaster: Forecaster, writer: ForecastWriter, batch: int) -> None:
        self.forecaster, self.writer, self.batch = forecaster, writer, batch
        self.plan = writer.plan

    @property
    def steps(self) -> int:
        """Steps of one member from one init time, over all of them."""
        return len(self.plan.inits) * self.plan.members * len(self.plan.lead_h)

    @property
    def steps_left(self) -> int:
        """Those that are still to be computed."""
        return sum(len(piece.members) * (len(self.plan.lead_h) - piece.done) for piece in self.pieces())

    @property
    def evaluations_per_step(self) -> int:
        """Network evaluations of one step of one member."""
        return nfe(self.forecaster.sampler)

    def pieces(self) -> Iterator[Piece]:
        """List what is left to do, in order."""
        if self.writer.complete:
            return
        for init in range(len(self.plan.inits)):
            for first in range(0, self.plan.members, self.batch):
                members = range(first, min(first + self.batch, self.plan.members))
                done = self.writer.leads_done(init, members)
                if done < len(self.plan.lead_h):
                    yield Piece(init, members, done)

    def run(self, advance: Callable[[int], None] = lambda evaluations: None) -> None:
        """Compute and write everything that is left, and finish the output.

        Args:
            advance: called after every call of the network with the number of evaluations it made.

        Raises:
            ValueError: a forecast stopped being finite; what was written before stays.
            OSError: the disk is full or cannot be written.
        """
        network = self.forecaster.network

        def counted(x_BNTC: Tensor, t_B: Tensor) -> Tensor:
            y_BNTC = network(x_BNTC, t_B)
            advance(len(t_B))
            return y_BNTC

        self.forecaster.network = counted
        try:
            for piece in list(self.pieces()):
                self._compute(piece)
        finally:
            self.forecaster.network = network
        self.writer.finish()

    def _compute(self, piece: Piece) -> None:
        """Compute and write the lead times that one piece lacks; masked points become NaN on disk."""
        store, lead_h = self.forecaster.store, self.plan.lead_h
        init, mask_CYX = np.datetime64(self.plan.inits[piece.init], "s"), store.mask_CYX
        start = None
        if piece.done:
            x_MCYX = self.writer.read(piece.init, piece.members, piece.done - 1)
            filled = np.where(mask_CYX, x_MCYX, store.fill_C[:, None, None])
            start = (lead_h[piece.done - 1], torch.from_numpy(filled))
        fields = rollout(self.forecaster, init, piece.members, lead_h[-1], start)
        for lead, (_, ahead_MCYX) in enumerate(fields, start=piece.done):
            values = np.where(mask_CYX, ahead_MCYX.cpu().numpy(), np.float32("nan"))
            self.writer.write(piece.init, piece.members, lead, values)
