"""From what the collectors found to a scorecard: ratios, regions, wind vectors, intervals, notes.

Legend: C channels, I init times, J lead times, S sums.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from aeris.scores.collecting import Part
from aeris.scores.confidence import FEWEST, block_length, draw_counts, ratio_interval
from aeris.scores.events import Events
from aeris.scores.flatness import rank_deviation, rank_outliers
from aeris.scores.matching import Match
from aeris.scores.metrics import EnsembleScores
from aeris.scores.regions import GLOBAL
from aeris.scores.scorecard import Case, Scorecard, ratio
from aeris.scores.spectra import MID_LATITUDES, Spectra
from aeris.scores.winds import vectors

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Labels:
    """The words of a scorecard that the fields do not tell."""

    title: str
    forecast: str
    truth: str
    weights: str
    """Scheme of the area weights, a name of aeris.data.variables.LATITUDE_SCHEMES."""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Results:
    """What the collectors of a scorecard found."""

    ensemble: EnsembleScores
    persistence: EnsembleScores
    energy: tuple[Array, Array]
    ensemble_parts: Sequence[Part]
    persistence_parts: Sequence[Part]
    climatology: EnsembleScores | None = None
    drawn: EnsembleScores | None = None
    """Of the probabilistic climatology."""
    anomalies: Mapping[str, Array] = field(default_factory=dict)
    events: Events | None = None
    spectra: Mapping[str, Spectra] = field(default_factory=dict)

    def values(self, region: str = GLOBAL) -> dict[str, Array]:
        """Return the scores of the ensemble and of the baselines, and their ratios, [J, C]."""
        values = self.ensemble.result(region)
        baselines = {"persistence": self.persistence, "climatology": self.climatology}
        for name, baseline in baselines.items():
            if baseline is not None:
                scores = baseline.result(region)
                values |= {f"rmse_{name}": scores["rmse"], f"mae_{name}": scores["crps"]}
        values["rmse_ratio"] = ratio(values["rmse"], values["rmse_persistence"])
        values["crps_ratio"] = ratio(values["crps"], values["mae_persistence"])
        if "rmse_climatology" in values:
            values["rmse_ratio_climatology"] = ratio(values["rmse"], values["rmse_climatology"])
        if self.drawn is not None:
            scores = self.drawn.result(region)
            values |= {"crps_climatology": scores["crps"], "ssr_climatology": scores["ssr"]}
            values["crps_ratio_climatology"] = ratio(values["crps"], scores["crps"])
        return values


def fill(
    pair: Match, labels: Labels, found: Results, climatology: str, case: Case | None, thinned: bool
) -> Scorecard:
    """Return the scorecard.

    Args:
        pair: forecast and truth.
        labels: words the fields do not tell.
        found: what the collectors found.
        climatology: what the climatology is the mean of; empty without one.
        case: fields to draw.
        thinned: not every channel and lead time has spectra.
    """
    values = found.values() | dict(found.anomalies)
    values["energy"], energy_J = found.energy
    ranks_JCS = found.ensemble.ranks()
    if pair.forecast.members > 1:
        values |= {"rank_outliers": rank_outliers(ranks_JCS), "rank_deviation": rank_deviation(ranks_JCS)}
    spectra = found.spectra.get(MID_LATITUDES)
    notes = [*labels.notes, *pair.notes()]
    if spectra is not None:
        values |= spectra.distances()
    else:
        notes.append(
            "no spectra: they need a grid around the whole circle with rows between 30 and 60 degrees"
        )
    if thinned:
        notes.append("spectra of the headline channels at some lead times only, for their size")
    intervals, block = _intervals(pair, found)
    return Scorecard(
        title=labels.title,
        forecast=labels.forecast,
        truth=labels.truth,
        members=pair.forecast.members,
        inits=pair.inits,
        lead_h=pair.lead_h,
        channels=pair.channels,
        weights=labels.weights,
        climatology=climatology,
        values=values,
        ranks_JCS=ranks_JCS,
        spectra=spectra,
        notes=tuple(notes),
        case=case,
        bands=found.spectra,
        regions={name: found.values(name) for name in found.ensemble.regions if name != GLOBAL},
        wind_vectors=_wind_vectors(pair, values),
        energy_J=energy_J if np.isfinite(energy_J).any() else None,
        events=found.events,
        intervals=intervals,
        block=block,
    )


def _wind_vectors(pair: Match, values: Mapping[str, Array]) -> dict[str, dict[str, Array]]:
    """Return the RMSE of wind vectors: the squared errors of the components add up."""
    names = [name for name in values if name.startswith("rmse") and "ratio" not in name]
    return {
        vector: {name: np.hypot(values[name][:, u], values[name][:, v]) for name in names}
        for vector, (u, v) in vectors(pair.names).items()
    }


def _intervals(pair: Match, found: Results) -> tuple[dict[str, Array], int]:
    """Return the 95 % intervals of the ratios to persistence, where there are enough init times."""
    block = block_length(pair.inits, pair.lead_h)
    if len(pair.inits) < FEWEST or (pair.start_I < 0).any():
        return {}, block
    ours, other = (per_init(parts) for parts in (found.ensemble_parts, found.persistence_parts))
    counts_BI = draw_counts(len(pair.inits), block)
    return {
        "rmse_ratio": ratio_interval(counts_BI, ours[..., 0], other[..., 0], root=True),
        "crps_ratio": ratio_interval(counts_BI, ours[..., 3], other[..., 3]),
    }, block


def per_init(parts: Sequence[Part]) -> Array:
    """Return the global sums of `EnsembleScores` of each init time: [I, J, C, S], NaN without a truth."""
    return np.stack(
        [np.where(part["count"][:, None, None] > 0, part["sums"][:, :, 0], np.nan) for part in parts]
    )
