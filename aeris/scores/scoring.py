"""One pass over a forecast and its truth that fills a scorecard.

Memory is that of one ensemble at one time: what is kept between init times is a few numbers per channel.

Legend: M members, C channels, Y rows, X cols, J lead times.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aeris.data.variables import latitude_weights
from aeris.scores.baselines import Climatology
from aeris.scores.matching import Match
from aeris.scores.metrics import EnsembleScores
from aeris.scores.scorecard import Case, Scorecard, ratio
from aeris.scores.spectra import SpectrumSums, band_rows, spans_circle

Fields = NDArray[np.float32]


@dataclass(frozen=True)
class Labels:
    """The words of a scorecard that the fields do not tell."""

    title: str
    forecast: str
    truth: str
    weights: str
    """Scheme of the area weights, a name of aeris.data.variables.LATITUDE_SCHEMES."""
    notes: tuple[str, ...] = ()


class _Sums:
    """Every running sum of an evaluation."""

    def __init__(self, pair: Match, weights: str, usual: Climatology | None) -> None:
        weight_Y = latitude_weights(pair.truth.latitude_deg, weights)
        leads = len(pair.lead_h)
        self.usual = usual
        self.ensemble = EnsembleScores(leads, pair.forecast.members, weight_Y, pair.mask_CYX)
        self.baselines = {"persistence": EnsembleScores(leads, 1, weight_Y, pair.mask_CYX)}
        if usual is not None:
            self.baselines["climatology"] = EnsembleScores(leads, 1, weight_Y, pair.mask_CYX)
        self.spectra = spectrum_sums(pair)

    def add(
        self, lead: int, x_MCYX: Fields, y_CYX: Fields, others: dict[str, Fields], threads: Executor
    ) -> None:
        """Add the members x, the truth y and the fields of the baselines at one init and lead time."""
        self.ensemble.add(lead, x_MCYX, y_CYX, threads)
        for name, field_CYX in others.items():
            self.baselines[name].add(lead, field_CYX[None], y_CYX, threads)
        if self.spectra is not None:
            self.spectra.add(lead, x_MCYX, y_CYX)


def spectrum_sums(pair: Match) -> SpectrumSums | None:
    """Return sums for spectra, or None on a grid that is no full circle or has no row in the band."""
    try:
        band_rows(pair.truth.latitude_deg)
    except ValueError:
        return None
    if not spans_circle(pair.truth.longitude_deg):
        return None
    return SpectrumSums(len(pair.lead_h), pair.truth.latitude_deg, pair.mask_CYX)


def score(
    pair: Match,
    labels: Labels,
    usual: Climatology | None,
    case: tuple[int, int],
    threads: int = 0,
    advance: Callable[[str], None] = lambda words: None,
) -> Scorecard:
    """Read every field once and return the scores.

    Args:
        pair: forecast and truth.
        labels: words for the scorecard.
        usual: climatology to compare with, or None.
        case: numbers of the init and the lead time whose fields to keep for maps.
        threads: channels scored side by side; 0 means one per core. The result does not depend on it.
        advance: called with a few words after every ensemble.
    """
    sums = _Sums(pair, labels.weights, usual)
    kept: Case | None = None
    with ThreadPoolExecutor(threads or os.cpu_count()) as executor:
        for init, start in enumerate(pair.start_I):
            start_CYX = pair.read_truth(start)
            for lead, number in enumerate(pair.valid_IJ[init]):
                x_MCYX, y_CYX = pair.read_forecast(init, lead), pair.read_truth(number)
                others = {"persistence": start_CYX}
                if usual is not None:
                    others["climatology"] = usual.at(pair.truth.times[number])
                sums.add(lead, x_MCYX, y_CYX, others, executor)
                if (init, lead) == case:
                    kept = keep_case(pair, init, lead, x_MCYX, y_CYX)
                advance(f"init {pair.inits[init]}, {pair.lead_h[lead]} h")
    return _scorecard(pair, labels, sums, kept)


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
        valid=pair.truth.times[pair.valid_IJ[init, lead]],
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


def _scorecard(pair: Match, labels: Labels, sums: _Sums, case: Case | None) -> Scorecard:
    values = sums.ensemble.result()
    for name, baseline in sums.baselines.items():
        scores = baseline.result()
        values |= {f"rmse_{name}": scores["rmse"], f"mae_{name}": scores["crps"]}
    values["rmse_ratio"] = ratio(values["rmse"], values["rmse_persistence"])
    values["crps_ratio"] = ratio(values["crps"], values["mae_persistence"])
    if "rmse_climatology" in values:
        values["rmse_ratio_climatology"] = ratio(values["rmse"], values["rmse_climatology"])
    spectra = sums.spectra.result() if sums.spectra else None
    notes = labels.notes
    if spectra is None:
        notes += ("no spectra: they need a grid around the whole circle with rows between 30 and 60 degrees",)
    else:
        values |= spectra.distances()
    return Scorecard(
        title=labels.title,
        forecast=labels.forecast,
        truth=labels.truth,
        members=pair.forecast.members,
        inits=pair.inits,
        lead_h=pair.lead_h,
        channels=pair.channels,
        weights=labels.weights,
        climatology=sums.usual.describe() if sums.usual else "",
        values=values,
        ranks_JCS=sums.ensemble.ranks(),
        spectra=spectra,
        notes=notes,
        case=case,
    )
