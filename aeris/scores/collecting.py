"""What every family of scores offers, so that init times can be dealt over processes in any way.

A collector is told of one init time, gets its lead times one after the other, and hands back what that init
contributes: a few small arrays. The contributions of all init times, in the order of the init times, give the
result. They are small enough to be kept beside the output, so a stopped evaluation goes on, and the result
does not depend on which process made which.

Legend: M members, C channels, Y rows, X cols, J lead times.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

Fields = NDArray[np.float32]
Part = Mapping[str, NDArray[Any]]
"""What one init time contributes: small arrays by name."""

Result = TypeVar("Result", covariant=True)


class Collector(Protocol[Result]):
    """Gathers one family of scores.

    A collector that can do without a truth says so: `needs_truth = False`. It then also gets lead times whose
    valid time the truth does not have, with `y_CYX` None; the others do not see these.

    `begin`, `add` for every lead time that has a truth, `end`: once for each init time, on one process. Then
    `combine` with the contributions of all init times, on the process that writes the scorecard; that one may
    have gathered none of them itself, so nothing `combine` needs may be kept in the collector by `add`.
    """

    @property
    def needs_truth(self) -> bool:
        """Whether lead times without a truth are to be left out."""
        ...

    def begin(self, init: int) -> None:
        """Start init time number `init` of the forecast; what an earlier one left is forgotten."""

    def add(self, lead: int, x_MCYX: Fields, y_CYX: Fields | None, valid: np.datetime64) -> None:
        """Add the members x and the truth y at lead number `lead`.

        Args:
            lead: number of the lead time; rising, but some may be left out (no truth, or not asked for).
            x_MCYX: members, float32, finite wherever a channel has a value. Not to be changed or kept.
            y_CYX: truth at the valid time, float32. Not to be changed or kept. None: there is none.
            valid: the valid time.
        """

    def end(self) -> dict[str, NDArray[Any]]:
        """Return what this init time contributes, all lead times together."""
        ...

    def combine(self, parts: Sequence[Part]) -> Result:
        """Return the result of all init times from their contributions, in the order of the init times."""
        ...


class LeadSums:
    """What collectors of plain sums share: sums [J, ...] of one init time, and their mean over init times.

    A subclass adds to `_sums` in its `add` and then calls `_counted`.

    Args:
        shape: of the sums, J first.
    """

    needs_truth = True

    def __init__(self, shape: tuple[int, ...]) -> None:
        self._shape = shape
        self.begin(0)

    def begin(self, init: int) -> None:
        """Start an init time."""
        self._sums = np.zeros(self._shape)
        self._count_J = np.zeros(self._shape[0], dtype=np.int64)

    def _counted(self, lead: int) -> None:
        """Count a lead time that was added."""
        self._count_J[lead] += 1

    def end(self) -> dict[str, NDArray[Any]]:
        """Return the sums of this init time."""
        return {"sums": self._sums, "count": self._count_J}

    def _mean(self, parts: Sequence[Part]) -> NDArray[np.float64]:
        """Return the mean over init times, NaN at lead times none of them has."""
        sums, count_J = np.zeros(self._shape), np.zeros(self._shape[0], dtype=np.int64)
        for part in parts:
            sums += part["sums"]
            count_J += part["count"]
        count = np.where(count_J > 0, count_J, np.nan).reshape(-1, *[1] * (sums.ndim - 1))
        return np.asarray(sums / count)
