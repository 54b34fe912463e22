"""One pass over a forecast and its truth that fills a scorecard.

`Scoring.collect` reads the ensembles of one init time and returns what it contributes, a few small arrays;
`Scoring.combine` makes the scorecard of the contributions of all init times, in their order. Which process
collects which init time does not matter. Memory is that of one ensemble at one time.

Legend: M members, C channels, Y rows, X cols, I init times, J lead times.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from aeris.data.variables import latitude_weights
from aeris.scores.anomalies import AnomalyScores
from aeris.scores.areas import AreaMean
from aeris.scores.collecting import Collector, Fields, Part
from aeris.scores.display import headline_channels
from aeris.scores.energy import EnergyScores
from aeris.scores.events import EventCounts
from aeris.scores.matching import Match
from aeris.scores.metrics import CollectedScores, EnsembleScores
from aeris.scores.regions import region_weights
from aeris.scores.scorecard import Case, Scorecard
from aeris.scores.spectra import SpectrumSums, spans_circle
from aeris.scores.summing import Labels, Results, fill

__all__ = ["Labels", "Options", "Scoring", "score"]

EVENT_CHANNELS = 10


class Usual(Protocol):
    """What is needed of a climatology (aeris/scores/climatology.py), for the channels scored."""

    def at(self, time: np.datetime64) -> Fields:
        """Return the mean field [C, Y, X] at a valid time."""

    def quantile_at(self, time: np.datetime64, quantile: float) -> Fields:
        """Return a quantile [C, Y, X], NaN for channels that have none."""

    def describe(self) -> str:
        """Say what it is the mean of."""


@dataclass(frozen=True)
class Options:
    """What is collected beside the scores every scorecard has."""

    std_C: NDArray[np.float64] | None = None
    """Standard deviation of each channel, for the energy score over all of them; None leaves that out."""
    quantiles: tuple[float, ...] = ()
    """Quantiles of the climatology whose exceedance is an event."""
    drawn_members: int = 0
    """Members of the probabilistic climatology; 0 leaves it out."""
    drawn: Callable[[np.datetime64], Fields] | None = None
    """Returns its members [M, C, Y, X] at a valid time."""
    more: Mapping[str, Collector[Any]] = field(default_factory=dict)
    """Other collectors by name."""
    threads: int = 0
    """Channels scored side by side; 0 means one per core. The result does not depend on it."""
    finite: bool = True
    """Refuse values that are not finite; if not, they leave their lead time without scores."""


class _Baseline:
    """Collects the scores of a forecast [M, C, Y, X] that is not on disk."""

    needs_truth = True

    def __init__(self, scores: CollectedScores, forecast: Callable[[int, np.datetime64], Fields]) -> None:
        self._scores, self._forecast = scores, forecast
        self._init = 0

    def begin(self, init: int) -> None:
        self._init = init
        self._scores.begin(init)

    def add(self, lead: int, x_MCYX: Fields, y_CYX: Fields | None, valid: np.datetime64) -> None:
        self._scores.add(lead, self._forecast(self._init, valid), y_CYX, valid)

    def end(self) -> dict[str, NDArray[Any]]:
        return self._scores.end()

    def combine(self, parts: Sequence[Part]) -> EnsembleScores:
        return self._scores.combine(parts)


def spectrum_sums(pair: Match, executor: ThreadPoolExecutor | None = None) -> SpectrumSums | None:
    """Return sums for spectra, or None on a grid that is no full circle."""
    if not spans_circle(pair.truth.longitude_deg):
        return None
    first = headline_channels(pair.names, EVENT_CHANNELS)
    try:
        return SpectrumSums(len(pair.lead_h), pair.truth.latitude_deg, pair.mask_CYX, first, executor)
    except ValueError:
        return None


class Scoring:
    """Everything that is collected of a forecast.

    Args:
        pair: forecast and truth.
        labels: words for the scorecard.
        usual: climatology to compare with, or None.
        options: what else is wanted.
    """

    def __init__(
        self, pair: Match, labels: Labels, usual: Usual | None, options: Options = Options()
    ) -> None:
        self.pair, self.labels, self.usual, self.options = pair, labels, usual, options
        self._executor = ThreadPoolExecutor(options.threads or os.cpu_count())
        weight_Y = latitude_weights(pair.truth.latitude_deg, labels.weights)
        self._regions = region_weights(pair.truth.latitude_deg, weight_Y)
        self._weight_Y = weight_Y
        self.collectors: dict[str, Collector[Any]] = self._standard() | dict(options.more)

    def _scores(self, members: int) -> CollectedScores:
        pair = self.pair
        leads = len(pair.lead_h)
        empty = EnsembleScores(leads, members, self._weight_Y, pair.mask_CYX, self._regions)
        return CollectedScores(empty, self._executor)

    def _standard(self) -> dict[str, Collector[Any]]:
        """Return the collectors every scorecard has."""
        pair, usual, leads = self.pair, self.usual, len(self.pair.lead_h)
        area = AreaMean(self._weight_Y, pair.mask_CYX)
        found: dict[str, Collector[Any]] = {"ensemble": self._scores(pair.forecast.members)}
        found["persistence"] = _Baseline(self._scores(1), self._start)
        std_C = self.options.std_C
        none_C = np.full(len(pair.channels), np.nan)
        found["energy"] = EnergyScores(leads, area, none_C if std_C is None else std_C, self._executor)
        if usual is not None:
            at = lru_cache(maxsize=1)(usual.at)
            found["climatology"] = _Baseline(self._scores(1), lambda init, valid: at(valid)[None])
            found["anomalies"] = AnomalyScores(leads, area, at, self._executor)
            if self.options.quantiles:
                places = headline_channels(pair.names, EVENT_CHANNELS)
                found["events"] = EventCounts(
                    *(leads, pair.forecast.members, area, places, self.options.quantiles),
                    *(usual.quantile_at, self._executor),
                )
        drawn = self.options.drawn
        if drawn is not None:
            found["drawn"] = _Baseline(
                self._scores(self.options.drawn_members), lambda init, valid: drawn(valid)
            )
        spectra = spectrum_sums(pair, self._executor)
        return found if spectra is None else found | {"spectra": spectra}

    def _start(self, init: int, valid: np.datetime64) -> Fields:
        """Return the truth [1, C, Y, X] at an init time, read once; NaN where there is none."""
        if self._kept is None or self._kept[0] != init:
            start = self.pair.start_I[init]
            none = np.full(self.pair.mask_CYX.shape, np.nan, dtype=np.float32)
            self._kept = (init, self.pair.read_truth(start) if start >= 0 else none)
        return self._kept[1][None]

    _kept: tuple[int, Fields] | None = None

    def collect(
        self, init: int, advance: Callable[[str], None] = lambda words: None
    ) -> dict[str, dict[str, NDArray[Any]]]:
        """Read the ensembles of one init time and return what each collector makes of them.

        Args:
            init: number of the init time.
            advance: called with a few words after every ensemble.
        """
        pair = self.pair
        for collector in self.collectors.values():
            collector.begin(init)
        anyway = [one for one in self.collectors.values() if not getattr(one, "needs_truth", True)]
        for lead, number in enumerate(pair.valid_IJ[init]):
            valid = pair.valid_times[init, lead]
            wanted = list(self.collectors.values()) if number >= 0 else anyway
            if wanted:
                x_MCYX = pair.read_forecast(init, lead, self.options.finite)
                if not self.options.finite:  # infinite values would warn at every step of the way
                    x_MCYX = np.where(np.isfinite(x_MCYX), x_MCYX, np.float32(np.nan))
                y_CYX = pair.read_truth(number) if number >= 0 else None
                for collector in wanted:
                    collector.add(lead, x_MCYX, y_CYX, valid)
            advance(f"init {pair.inits[init]}, {pair.lead_h[lead]} h")
        return {name: collector.end() for name, collector in self.collectors.items()}

    def combine(
        self, parts: Callable[[str], Sequence[Part]], case: tuple[int, int] | None = None
    ) -> tuple[Scorecard, dict[str, Any]]:
        """Return the scorecard of all init times, and the results of the other collectors by name.

        Args:
            parts: returns what a collector contributed, by its name, in the order of init times.
            case: numbers of the init and the lead time whose fields to read again and keep for maps.
        """
        results: dict[str, Any] = {}
        for name, collector in self.collectors.items():
            results[name] = collector.combine(parts(name))
        kept = None
        if case is not None and self.pair.valid_IJ[case] >= 0:
            y_CYX = self.pair.read_truth(self.pair.valid_IJ[case])
            x_MCYX = self.pair.read_forecast(*case, self.options.finite)
            kept = keep_case(self.pair, *case, x_MCYX, y_CYX)
        more = {name: results.pop(name) for name in self.options.more}
        sums = Results(**results, ensemble_parts=parts("ensemble"), persistence_parts=parts("persistence"))
        spectra = self.collectors.get("spectra")
        thinned = isinstance(spectra, SpectrumSums) and not spectra.complete
        said = self.usual.describe() if self.usual else ""
        if self.options.drawn_members:
            said += f"; its CRPS is of {self.options.drawn_members} members drawn from these"
        return fill(self.pair, self.labels, sums, said, kept, thinned), more


def score(
    pair: Match,
    labels: Labels,
    usual: Usual | None,
    case: tuple[int, int],
    threads: int = 0,
    advance: Callable[[str], None] = lambda words: None,
) -> Scorecard:
    """Read every field once, in this process, and return the scores.

    Args:
        pair: forecast and truth.
        labels: words for the scorecard.
        usual: climatology to compare with, or None.
        case: numbers of the init and the lead time whose fields to keep for maps.
        threads: channels scored side by side; 0 means one per core.
        advance: called with a few words after every ensemble.
    """
    scoring = Scoring(pair, labels, usual, Options(threads=threads))
    parts = [scoring.collect(init, advance) for init in range(len(pair.inits))]
    return scoring.combine(lambda name: [part[name] for part in parts], case)[0]


def keep_case(pair: Match, init: int, lead: int, x_MCYX: Fields, y_CYX: Fields) -> Case:
    """Return the fields of a case to draw, with NaN where a channel has no value."""

    def shown(fields: NDArray[Any]) -> Fields:
        return np.where(pair.mask_CYX, fields, np.nan).astype(np.float32)

    spread_CYX = None
    if len(x_MCYX) > 1:  # channel by channel, for the memory
        spread_CYX = np.stack(
            [x_MYX.std(axis=0, ddof=1, dtype=np.float64) for x_MYX in x_MCYX.swapaxes(0, 1)]
        )
    return Case(
        init=pair.inits[init],
        valid=pair.valid_times[init, lead],
        lead_h=pair.lead_h[lead],
        latitude_deg=pair.truth.latitude_deg,
        longitude_deg=pair.truth.longitude_deg,
        land_YX=pair.truth.static.get("land_sea_mask"),
        channels=pair.channels,
        truth_CYX=shown(y_CYX),
        mean_CYX=shown(x_MCYX.mean(axis=0, dtype=np.float64)),
        member_CYX=shown(x_MCYX[0]),
        spread_CYX=None if spread_CYX is None else shown(spread_CYX),
    )
