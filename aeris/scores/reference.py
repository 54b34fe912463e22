"""The published WeatherBench 2 scores of 2022, and when a forecast may stand beside them.

The table has IFS HRES, IFS ENS, GenCast, FGN, GraphCast, Pangu-Weather, Aurora, persistence and climatology:
RMSE, bias and ACC on the 1.5-degree grid, CRPS and spread/skill on the 0.25-degree grid, leads of 6 h to 14
days, in SI units. Each score is against one truth, the ERA5 reanalysis or the operational analysis at the
start of IFS HRES ("analysis"); the two differ by more than good models do at short leads and are never mixed.

Legend: C channels, J lead times, R reference models.
"""

from __future__ import annotations

import csv
import gzip
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from aeris.data.variables import Channel
from aeris.scores.comparison import Comparison

Array = NDArray[np.float64]
TruthKind = Literal["analysis", "era5"]

YEAR = 2022
SOURCE = "WeatherBench 2 headline scores of 2022 (Rasp et al. 2024)"
TRUTHS: dict[str, str] = {"analysis": "operational analysis (HRES-T0)", "era5": "ERA5"}
_TABLE = Path(__file__).parent / "wb2_headline_scores_2022.csv.gz"
_SIZES = {"1.5deg": (121, 240), "0.25deg": (721, 1440)}
# Our score -> (theirs, resolution, whether of a single member of an ensemble).
METRICS: dict[str, tuple[str, str, bool]] = {
    "rmse": ("rmse", "1.5deg", False),
    "rmse_member": ("rmse", "1.5deg", True),
    "bias": ("bias", "1.5deg", False),
    "acc": ("acc", "1.5deg", False),
    "crps": ("crps", "0.25deg", False),
    "ssr": ("unbiased_spreadskill", "0.25deg", False),
    "rmse_unbiased": ("unbiased_mean_rmse", "0.25deg", False),
}
_VARIABLES = {
    "sea_level_pressure": "mean_sea_level_pressure",
    "24h_precipitation": "total_precipitation_24hr",
}


@dataclass(frozen=True)
class Row:
    """One published score."""

    model: str
    """Such as "GenCast"; "(oper.)" is left out where the model has only one kind of start."""
    truth: str
    variable: str
    level_hpa: float | None
    metric: str
    """Name of the score here, a key of `METRICS`."""
    resolution: str
    lead_h: int
    value: float
    """SI units."""


def _named(text: str) -> tuple[str, str, bool]:
    """Split "GenCast (oper.) (mean) vs ERA5" into model, truth and whether it is a single member."""
    model, _, truth = text.rpartition(" vs ")
    single = "(1st member)" in model
    words = model.replace(" (1st member)", "").replace(" (mean)", "")
    # GraphCast and Pangu-Weather have scores of both starts; of the others all are operational
    keep = words.startswith(("GraphCast", "Pangu"))
    return words if keep else words.replace(" (oper.)", ""), truth.lower(), single


@cache
def table() -> tuple[Row, ...]:
    """Return every published score."""
    ours = {(theirs, single): name for name, (theirs, _, single) in METRICS.items()}
    rows = []
    with gzip.open(_TABLE, "rt", encoding="utf-8", newline="") as file:
        for line in csv.DictReader(file):
            model, truth, single = _named(line["model"])
            level_hpa = float(line["level"]) or None
            variable = _VARIABLES.get(line["variable"], line["variable"])
            metric = ours.get((line["metric"], single))
            if metric is not None:
                where = (variable, level_hpa, metric, line["resolution"], int(line["lead_h"]))
                rows.append(Row(model, truth, *where, float(line["value"])))
    return tuple(rows)


def reference_rows(
    channel: Channel,
    metric: str,
    lead_h: int | None = None,
    truth: TruthKind = "analysis",
    resolution: str = "",
) -> list[Row]:
    """Return the published scores of a channel against one truth.

    Args:
        channel: matched by its variable and level.
        metric: a key of `METRICS`.
        lead_h: one lead time; None means all.
        truth: what the forecasts were compared with.
        resolution: `1.5deg` or `0.25deg`; empty means the one the metric is published at.

    Raises:
        ValueError: the metric or the truth is not among the published ones.
    """
    if metric not in METRICS or truth not in TRUTHS:
        known = f"scores are {', '.join(METRICS)}, truths {', '.join(TRUTHS)}"
        raise ValueError(f"no published {metric!r} against {truth!r}: {known}")
    wanted = (channel.variable, channel.level_hpa, metric, resolution or METRICS[metric][1], truth)
    return [
        row
        for row in table()
        if (row.variable, row.level_hpa, row.metric, row.resolution, row.truth) == wanted
        and (lead_h is None or row.lead_h == lead_h)
    ]


@dataclass(frozen=True)
class Conditions:
    """What of an evaluation decides whether its numbers may stand beside the published ones."""

    title: str
    """What the data are."""
    inits: NDArray[np.datetime64]
    latitude_deg: Array
    longitude_deg: Array
    weights: str
    """Scheme of the area weights."""
    truth: str
    """What the truth is, by the user's word: analysis, era5, or empty for neither."""

    @property
    def resolution(self) -> str:
        """The published resolution that the grid is, or empty."""
        rows, cols = len(self.latitude_deg), len(self.longitude_deg)
        for name, (their_rows, their_cols) in _SIZES.items():
            # one pole row may have been cut off
            if cols == their_cols and rows in (their_rows, their_rows - 1):
                spacing_deg = np.abs(np.diff(self.latitude_deg))
                if np.allclose(spacing_deg, 180.0 / (their_rows - 1), atol=1e-3):
                    return name
        return ""


def comparable(conditions: Conditions, metric: str) -> list[str]:
    """Return every reason why scores must not be laid beside the published ones; none means they may."""
    reasons = []
    if "SPEEDY" in conditions.title or "perfect-model" in conditions.title:
        reasons.append("the truth is simulated (SPEEDY perfect-model experiment), theirs the real atmosphere")
    years = sorted({int(str(time)[:4]) for time in conditions.inits.astype("datetime64[Y]")})
    if years != [YEAR]:
        reasons.append(f"init times of {', '.join(map(str, years))}, theirs of {YEAR}")
    if conditions.truth not in TRUTHS:
        reasons.append("nobody said what the truth is: ERA5 or the operational analysis")
    if metric not in METRICS:
        reasons.append(f"{metric} is not published; {', '.join(METRICS)} are")
    elif conditions.resolution != METRICS[metric][1]:
        rows, cols = len(conditions.latitude_deg), len(conditions.longitude_deg)
        theirs = " x ".join(map(str, _SIZES[METRICS[metric][1]]))
        reasons.append(f"a grid of {rows} x {cols}, their {metric} is of {theirs}")
    if conditions.weights not in ("cell", "wb2"):
        reasons.append(f"area weights '{conditions.weights}', theirs 'wb2' ('cell' is equal on the globe)")
    return reasons


def caveats(conditions: Conditions, metric: str) -> list[str]:
    """Return what a reader should know although the scores may stand beside the published ones."""
    notes = []
    hours = sorted({int(h) for h in conditions.inits.astype("datetime64[h]").astype(np.int64) % 24})
    if hours != [0, 12] or len(conditions.inits) < 2 * 365:
        clock = ", ".join(f"{hour:02d}" for hour in hours)
        notes.append(f"{len(conditions.inits)} init times at {clock} UTC; theirs are 730 at 00 and 12 UTC")
    if len(conditions.latitude_deg) % 2 == 0 and conditions.resolution:
        notes.append("one pole row is missing, 1e-5 of the area")
    if metric == "acc":
        notes.append("ACC: climatology 1990-2019; the published mean over times may be of the moments")
    return notes


def compare_with_published(
    conditions: Conditions,
    metric: str,
    values_JC: Array,
    lead_h: Sequence[int],
    channels: Sequence[Channel],
) -> Comparison:
    """Lay a score beside the published ones of the same truth.

    Args:
        conditions: how the score was made.
        metric: its name, a key of `METRICS`.
        values_JC: the score, SI units.
        lead_h: lead times [J].
        channels: channels [C]; those without published numbers are left out.

    Raises:
        ValueError: they must not be compared, with every reason; or no channel or lead time is shared.
    """
    reasons = comparable(conditions, metric)
    if reasons:
        raise ValueError(f"{metric} cannot stand beside the published scores: {'; '.join(reasons)}")
    truth: TruthKind = "era5" if conditions.truth == "era5" else "analysis"
    rows = {place: reference_rows(one, metric, truth=truth) for place, one in enumerate(channels)}
    places = [place for place, found in rows.items() if any(row.lead_h in lead_h for row in found)]
    if not places:
        names = " ".join(one.name for one in channels)
        leads = sorted({row.lead_h for row in table()})
        raise ValueError(f"no published {metric} of {names} at these leads; published leads (h): {leads}")
    models = sorted({row.model for place in places for row in rows[place]}, key=_order)
    others = {model: np.full((len(lead_h), len(places)), np.nan) for model in models}
    for col, place in enumerate(places):
        for row in rows[place]:
            if row.lead_h in lead_h:
                others[row.model][list(lead_h).index(row.lead_h), col] = row.value
    return Comparison(
        metric=metric,
        title=conditions.title,
        truth=TRUTHS[truth],
        lead_h=tuple(lead_h),
        channels=tuple(channels[place] for place in places),
        ours_JC=values_JC[:, places],
        others={model: values for model, values in others.items() if np.isfinite(values).any()},
        notes=tuple(caveats(conditions, metric)),
        source=SOURCE,
    )


_FIRST = ("IFS ENS", "GenCast", "IFS HRES", "FGN", "Aurora", "GraphCast", "GraphCast (oper.)")


def _order(model: str) -> tuple[int, str]:
    """Order models as readers look for them."""
    return (_FIRST.index(model) if model in _FIRST else len(_FIRST), model)
