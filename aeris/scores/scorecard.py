"""What an evaluation found, as plain arrays: the tables, the files and the pictures are made of this.

Legend: C channels, Y rows, X cols, J lead times, M members.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from aeris.data.variables import Channel
from aeris.scores.display import time_text
from aeris.scores.events import Events
from aeris.scores.spectra import Spectra
from aeris.scores.winds import components

Array = NDArray[np.float64]
Fields = NDArray[np.float32]

MEANING = {
    "rmse": "RMSE of the ensemble mean",
    "rmse_member": "RMSE of a single member",
    "bias": "mean error of the ensemble mean",
    "crps": "fair CRPS",
    "spread": "root of the mean ensemble variance",
    "crps_biased": "CRPS with the divisor M^2 for pairs, (1 + 1/M) times the fair one when calibrated",
    "mae_member": "mean absolute error of a single member",
    "ssr": "unbiased spread/skill ratio sqrt(var / (mse - var/M))",
    "ssr_raw": "raw spread/skill ratio sqrt(var / mse)",
    "ssr_fortin": "spread/skill ratio sqrt((M + 1) / M) sqrt(var / mse) (Fortin et al. 2014)",
    "energy": "fair energy score, norm: root of the area mean of the square",
    "acc": "anomaly correlation of the ensemble mean, mean over init times of the ratio",
    "activity": "standard deviation over the area of the anomaly of the ensemble mean",
    "activity_member": "the same of a single member",
    "activity_truth": "the same of the truth",
    "rank_outliers": "share of truths outside the ensemble over 2 / (M + 1); 1: calibrated",
    "rank_deviation": "sum over ranks of |share - 1 / (M + 1)|; 0: flat",
    "rmse_persistence": "RMSE of persistence",
    "mae_persistence": "mean absolute error of persistence, which is its CRPS",
    "rmse_climatology": "RMSE of climatology",
    "mae_climatology": "mean absolute error of the mean climatology",
    "crps_climatology": "fair CRPS of members drawn from the climatology",
    "ssr_climatology": "unbiased spread/skill ratio of these; near 1 where the climate is the same",
    "rmse_ratio": "rmse / rmse_persistence",
    "crps_ratio": "crps / mae_persistence",
    "rmse_ratio_climatology": "rmse / rmse_climatology",
    "crps_ratio_climatology": "crps / crps_climatology",
    "lsd_member": "log-spectral distance of members to truth, dB",
    "lsd_mean": "log-spectral distance of the ensemble mean to truth, dB",
}
"""Every metric of scores.csv; those not in `WITHOUT_UNIT` have the unit of the channel."""

WITHOUT_UNIT = frozenset(
    name
    for name in MEANING
    if "ratio" in name or "ssr" in name or name[:4] in ("rank", "lsd_") or name == "acc"
)


def ratio(above: Array, below: Array) -> Array:
    """Return above / below, NaN where below is not positive (persistence at lead 0)."""
    return np.divide(above, below, out=np.full_like(above, np.nan), where=below > 0)


def mean_over_channels(values_JC: Array) -> Array:
    """Return the mean of the finite values at each lead time [J], NaN where there is none."""
    known_JC = np.isfinite(values_JC)
    count_J = known_JC.sum(axis=1)
    total_J = np.where(known_JC, values_JC, 0.0).sum(axis=1)
    return np.divide(total_J, count_J, out=np.full(len(total_J), np.nan), where=count_J > 0)


@dataclass(frozen=True)
class Case:
    """One forecast to look at: the fields of one init and lead time."""

    init: np.datetime64
    valid: np.datetime64
    lead_h: int
    latitude_deg: Array
    longitude_deg: Array
    land_YX: Fields | None
    """Share of land, 0 to 1, for the coastline."""
    channels: tuple[Channel, ...]
    truth_CYX: Fields
    """NaN where a channel has no value, here and below."""
    mean_CYX: Fields
    member_CYX: Fields
    spread_CYX: Fields | None
    """Standard deviation over members (divisor M - 1); None with one member."""


@dataclass(frozen=True)
class Scorecard:
    """Scores of one forecast."""

    title: str
    """What the data are, such as "SPEEDY perfect-model experiment"."""
    forecast: str
    truth: str
    members: int
    inits: NDArray[np.datetime64]
    lead_h: tuple[int, ...]
    channels: tuple[Channel, ...]
    weights: str
    """Scheme of the area weights."""
    climatology: str
    """What the climatology is the mean of; empty without one."""
    values: Mapping[str, Array]
    """[J, C] by the names of `MEANING`, in SI units."""
    ranks_JCS: Array
    """Share of points at which the truth has rank 0..M."""
    spectra: Spectra | None
    """Between 30 and 60 degrees north and south."""
    notes: tuple[str, ...] = ()
    """What a reader must know before believing the numbers."""
    case: Case | None = None
    bands: Mapping[str, Spectra] = field(default_factory=dict)
    """Spectra by band of latitude, the one above among them."""
    regions: Mapping[str, Mapping[str, Array]] = field(default_factory=dict)
    """[J, C] by region other than the globe, and metric."""
    wind_vectors: Mapping[str, Mapping[str, Array]] = field(default_factory=dict)
    """[J] by wind vector (wv850) and metric: the RMSE of vectors, sqrt(<du^2 + dv^2>)."""
    energy_J: Array | None = None
    """Energy score of all channels together, each divided by its standard deviation; NaN for none."""
    events: Events | None = None
    intervals: Mapping[str, Array] = field(default_factory=dict)
    """Ends of the 95 % interval [2, J, C] by metric."""
    block: int = 1
    """Neighbouring init times that are drawn together for the intervals."""

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the channels."""
        return tuple(channel.name for channel in self.channels)

    @property
    def own(self) -> list[int]:
        """Numbers of the channels that are no wind speeds, which means over channels are taken of."""
        return [place for place, name in enumerate(self.names) if not components(name)] or list(
            range(len(self.names))
        )

    def conditions(self) -> list[str]:
        """Say how the numbers were made, a line each."""
        first, last = time_text(self.inits.min()), time_text(self.inits.max())
        many = len(self.inits) > 1
        times = f"{len(self.inits)} init times, {first} to {last}" if many else f"init time {first}"
        lines = [
            f"{self.members} member{'s' * (self.members > 1)}, {times}, area weights '{self.weights}'",
            "RMSE of the ensemble mean (root after time mean), fair CRPS, unbiased spread/skill ratio (SSR)",
        ]
        if self.members == 1:
            lines[1] = "one member: CRPS is the mean absolute error; there is no spread"
        if self.climatology:
            lines.append(f"climatology: {self.climatology}")
        if self.intervals:
            lines.append(
                f"95 % intervals: paired bootstrap of {len(self.inits)} init times, {self.block} at a time"
            )
        return lines

    def headline(self) -> list[dict[str, float | int | str]]:
        """Return one record per lead time: means over channels, and the worst channel.

        A channel without a score (NaN) is left out of a mean.
        """
        against = ("rmse_ratio", "rmse_ratio_climatology", "crps_ratio", "crps_ratio_climatology")
        names = (*against, "ssr", "lsd_member")
        means = {
            name: mean_over_channels(self.values[name][:, self.own]) for name in names if name in self.values
        }
        rows = []
        for number, lead_h in enumerate(self.lead_h):
            row: dict[str, float | int | str] = {"lead_h": lead_h}
            row |= {name: float(mean[number]) for name, mean in means.items()}
            ratios = self.values["rmse_ratio"][number, self.own]
            known = np.isfinite(ratios)
            worst = int(np.argmax(np.where(known, ratios, -np.inf)))
            row["worst_channel"] = self.names[self.own[worst]] if known.any() else ""
            row["worst_ratio"] = float(ratios[worst]) if known.any() else float("nan")
            rows.append(row)
        return rows
