"""The work of an ensemble forecast: which init times and members, in what order, and what is left.

Members are computed in batches that are the same after a stop, so that a forecast that went on is bit for bit
the one that was never stopped; on other ranks, to rounding. Every lead time is written when it is computed.

Replicas of the network (the dp axis) share out the members of a batch, and the ranks of a replica its tokens.
Rank 0 alone reads and writes the forecast, one replica's images at a time.

Shapes: M members, N windows, T tokens per window, C channels, Y rows, X columns.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from aeris.data.forecasts import ForecastPlan, ForecastWriter
from aeris.data.store import Store
from aeris.diffusion.sampler import nfe
from aeris.rollout import Forecaster, rollout
from swipe.collectives import tell, together
from swipe.images import Images

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


@dataclass(frozen=True)
class Work:
    """What there is to do, as rank 0 sees it on disk."""

    pieces: tuple[Piece, ...]
    steps_done: int
    """Steps of one member that are on disk."""
    complete: bool
    """The whole forecast is there already."""


def look(writer: ForecastWriter, batch: int) -> Work:
    """List in order what is left to do, in batches of members that are the same after a stop."""
    plan, pieces = writer.plan, []
    for init in range(0 if writer.complete else len(plan.inits)):
        for first in range(0, plan.members, batch):
            members = range(first, min(first + batch, plan.members))
            left = [m for m in members if writer.leads_done(init, range(m, m + 1)) < len(plan.lead_h)]
            if left:  # other batches may have left whole members at either end
                members = range(left[0], left[-1] + 1)
                pieces.append(Piece(init, members, writer.leads_done(init, members)))
    return Work(tuple(pieces), writer.steps_done, writer.complete)


def share_out(members: range, replicas: int) -> list[range]:
    """Give each replica some of the members; the first ones get one more where it does not come out even."""
    each, more = divmod(len(members), replicas)
    ends = [each * replica + min(replica, more) for replica in range(replicas + 1)]
    return [members[first:last] for first, last in pairwise(ends)]


class Ensemble:
    """A forecaster and where its forecast goes. All ranks have one and call the same.

    Args:
        forecaster: what computes.
        plan: what the forecast will be.
        writer: on rank 0, what writes, and knows what is on disk; None on the others.
        batch: members every replica computes at the same time.

    Attributes:
        work: what there was to do at the start.
    """

    def __init__(
        self, forecaster: Forecaster, plan: ForecastPlan, writer: ForecastWriter | None, batch: int
    ) -> None:
        self.forecaster, self.plan, self.writer, self.batch = forecaster, plan, writer, batch
        self.groups = forecaster.groups
        self.images = Images(forecaster.layout.shard.grid, self.groups)
        found = None if writer is None else look(writer, batch * self.groups.dims.dp)
        self.work: Work = tell(self.groups.world, found)

    @property
    def steps(self) -> int:
        """Steps of one member from one init time, over all of them."""
        return len(self.plan.inits) * self.plan.members * len(self.plan.lead_h)

    @property
    def steps_left(self) -> int:
        """Those that are still to be computed."""
        return sum(len(piece.members) * (len(self.plan.lead_h) - piece.done) for piece in self.work.pieces)

    @property
    def evaluations_per_step(self) -> int:
        """Network evaluations of one step of one member."""
        return nfe(self.forecaster.sampler)

    def run(self, advance: Callable[[int], None] = lambda evaluations: None) -> None:
        """Compute and write everything that is left, and finish the output. A collective call over all ranks.

        Args:
            advance: called after every call of the network with the number of evaluations that all replicas
                made in the meantime.

        Raises:
            ValueError: a forecast stopped being finite; what was written before stays.
            OSError: the disk is full or cannot be written; among several ranks a ValueError.
        """
        network = self.forecaster.network
        members = 0

        def counted(x_BNTC: Tensor, t_B: Tensor) -> Tensor:
            y_BNTC = network(x_BNTC, t_B)
            advance(members)
            return y_BNTC

        self.forecaster.network = counted
        try:
            for piece in self.work.pieces:
                members = len(piece.members)
                self._compute(piece)
        finally:
            self.forecaster.network = network
        with together(self.groups.world):
            if self.writer is not None:
                self.writer.finish()

    def _compute(self, piece: Piece) -> None:
        """Compute and write the lead times that one piece lacks."""
        lead_h, dims = self.plan.lead_h, self.groups.dims
        shares = share_out(piece.members, dims.dp)
        init = np.datetime64(self.plan.inits[piece.init], "s")
        start = (lead_h[piece.done - 1], self._read(piece, shares)) if piece.done else None
        mine = shares[dims.coordinate(self.groups.rank).dp]
        fields = rollout(self.forecaster, init, mine, lead_h[-1], start)
        for lead, (_, x_BNTC) in enumerate(fields, start=piece.done):
            self._write(piece.init, shares, lead, x_BNTC)

    def _read(self, piece: Piece, shares: list[range]) -> Tensor:
        """Read the last lead time of a piece on rank 0, and deal it out: this rank's [M, N, T, C]."""
        store = self.forecaster.store

        def read(replica: int) -> Tensor:
            assert self.writer is not None, "rank 0 has the writer"
            x_MCYX = self.writer.read(piece.init, shares[replica], piece.done - 1)
            return torch.from_numpy(np.where(store.mask_CYX, x_MCYX, store.fill_C[:, None, None]))

        return self.images.deal(read, [len(share) for share in shares], len(self.plan.names))

    def _write(self, init: int, shares: list[range], lead: int, x_BNTC: Tensor) -> None:
        """Put the images of one lead time together on rank 0 and write them; masked points become NaN."""
        with together(self.groups.world):
            for replica, x_MCYX in self.images.collect(x_BNTC, [len(share) for share in shares]):
                values = np.where(self.forecaster.store.mask_CYX, x_MCYX.numpy(), np.float32("nan"))
                assert self.writer is not None, "images come together on rank 0"
                self.writer.write(init, shares[replica], lead, values)
