"""The point-wise check of two forecasts of one start: how far they differ, and each from the truth.

    difference    largest, mean, relative (mean / mean size of B), and largest over the model's scale
    missing       points that only one of the two has: no difference could be larger
    RMSE          of A and of B against the truth, weighted by area

The differences are over points as they are, not weighted: a bug at the pole counts as much as elsewhere.
Legend: C channels, Y rows, X cols, n points that both have.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from aeris.aurora import normalisation
from aeris.aurora.config import AuroraConfig
from aeris.aurora.training.comparison_report import table
from aeris.aurora.training.errors import (
    Array,
    ChannelFields,
    area_weights,
    errors,
    matched,
    variable_name,
)
from aeris.data.variables import Channel
from aeris.scores.display import display_unit, lead_text, time_text
from aeris.scores.report import decimals, number


@dataclass(frozen=True)
class Difference:
    """How two fields differ point by point, one number per channel [C]; not weighted by area."""

    largest: Array
    """Greatest absolute difference."""
    mean: Array
    """Mean absolute difference."""
    relative: Array
    """Mean absolute difference over the mean absolute value of the second."""
    normalised: Array
    """Greatest absolute difference over the scale the model normalises the variable with; where it has none,
    over the standard deviation of the second."""
    latitude_deg: Array
    """Where the difference is greatest."""
    longitude_deg: Array
    missing: NDArray[np.int64]
    """Points that only one of the two has."""


def scales(channels: Sequence[Channel], surf_stats: dict[str, tuple[float, float]]) -> Array:
    """Return what a variable is divided by in a model [C]; NaN where there are no statistics."""
    found = []
    for one in channels:
        name = variable_name(one)
        if one.level_hpa is None and name in surf_stats:
            found.append(surf_stats[name][1])
            continue
        try:
            found.append(normalisation.scale(name, one.level_hpa))
        except ValueError:
            found.append(np.nan)
    return np.array(found, dtype=np.float64)


def difference(one: ChannelFields, other: ChannelFields, scale_C: Array) -> Difference:
    """Compare matched fields point by point; `scale_C` is of `scales`."""
    count = len(one.channels)
    numbers = np.full((6, count), np.nan)
    missing = np.zeros(count, dtype=np.int64)
    shape = one.values_CYX.shape[1:]
    latitude, longitude = one.latitude_deg, one.longitude_deg
    if latitude.ndim == 1:
        latitude, longitude = np.broadcast_to(latitude[:, None], shape), np.broadcast_to(longitude, shape)
    for place in range(count):
        a_YX, b_YX = (x.values_CYX[place].astype(np.float64) for x in (one, other))
        known_YX = np.isfinite(a_YX) & np.isfinite(b_YX)
        alike_YX = known_YX | (a_YX == b_YX) | (np.isnan(a_YX) & np.isnan(b_YX))
        missing[place] = int((~alike_YX).sum())
        if not known_YX.any():
            continue
        a_n, b_n = a_YX[known_YX], b_YX[known_YX]
        apart_n = np.abs(a_n - b_n)
        worst = int(apart_n.argmax())
        most, mean = float(apart_n[worst]), float(apart_n.mean())
        scale = float(scale_C[place]) if np.isfinite(scale_C[place]) else float(b_n.std())
        over = (_over(mean, float(np.abs(b_n).mean())), _over(most, scale))
        where = (latitude[known_YX][worst], longitude[known_YX][worst])
        numbers[:, place] = (most, mean, *over, *where)
    return Difference(numbers[0], numbers[1], numbers[2], numbers[3], numbers[4], numbers[5], missing)


def _over(apart: float, size: float) -> float:
    """Return a difference over a size, which may be zero."""
    return apart / size if size else (np.inf if apart else 0.0)


@dataclass(frozen=True)
class Check:
    """Two forecasts at one lead time, the truth where it is known, and what was found."""

    lead_h: int
    a: ChannelFields
    b: ChannelFields
    truth: ChannelFields | None
    difference: Difference
    rmse_a: Array
    """[C], NaN without a truth."""
    rmse_b: Array
    only_a: tuple[str, ...] = ()
    """Channels that B lacks, so that they were not compared."""
    only_b: tuple[str, ...] = ()

    @property
    def worst(self) -> float:
        """The largest difference of any channel in units of the model's scale.

        Infinite where only one of the two has a point, or both have none of a channel.
        """
        numbers = self.difference.normalised
        whole = not self.difference.missing.any() and np.isfinite(numbers).all()
        return float(numbers.max()) if whole else math.inf

    def not_compared(self) -> str:
        """Name the channels that only one of the two has, in a line; empty if there are none."""
        sides = (("A", self.only_a), ("B", self.only_b))
        return "; ".join(f"only {side} has {' '.join(names)}: not compared" for side, names in sides if names)


def check(
    lead_h: int,
    a: ChannelFields,
    b: ChannelFields,
    truth: ChannelFields | None,
    config: AuroraConfig | None,
    weights: str = "cos",
) -> Check:
    """Compare two forecasts at one lead time on the channels and rows both (and the truth) have.

    Args:
        lead_h: lead time in hours.
        a: the forecast in question.
        b: the one it is measured against.
        truth: what happened, if known.
        config: settings of the model, for its scales.
        weights: scheme of the area weights of the RMSE.

    Raises:
        ValueError: they are of different times or grids, or have nothing in common.
    """
    only_a, only_b = _lacking(a, b), _lacking(b, a)
    a, b = matched(a, b)
    stats = config.stats if config else {}
    found = difference(a, b, scales(a.channels, stats))
    rmse = np.full((2, len(a.channels)), np.nan)
    if truth is not None:
        there, known = matched(truth, a)
        places = [a.names.index(name) for name in there.names]
        weight = area_weights(a.latitude_deg, weights)
        for row, one in enumerate((known, b.select(there.names))):
            rmse[row, places] = np.sqrt(errors(one.values_CYX, there.values_CYX, weight).mse)
    return Check(lead_h, a, b, truth, found, rmse[0], rmse[1], only_a, only_b)


def _lacking(one: ChannelFields, other: ChannelFields) -> tuple[str, ...]:
    """Return the channels of one that the other lacks."""
    return tuple(name for name in one.names if name not in other.names)


def difference_table(found: Check) -> Table:
    """Return the table of one row per channel; points missing on one side stand where the place would."""
    # 80 columns hold it
    shown = table(f"A − B, {lead_text(found.lead_h)} ahead, valid {time_text(found.a.time)}", gap=0)
    columns = ["channel", "unit", "largest", "mean", "relative", "/ scale", "at"]
    if found.truth is not None:
        columns += ["RMSE A", "RMSE B"]
    for place, name in enumerate(columns):
        shown.add_column(name, justify="left" if place < 2 else "right", no_wrap=True)
    apart = found.difference
    for place, one in enumerate(found.a.channels):
        factor, unit = display_unit(one.units)
        cells = [f"{float(values[place]) * factor:.1e}" for values in (apart.largest, apart.mean)]
        cells += [f"{float(values[place]):.1e}" for values in (apart.relative, apart.normalised)]
        cells = ["-" if "nan" in cell else cell for cell in cells]
        missing = int(apart.missing[place])
        where = _where(float(apart.latitude_deg[place]), float(apart.longitude_deg[place]))
        cells.append(f"[bold red]{missing} missing[/]" if missing else where)
        if found.truth is not None:
            values = [float(rmse[place]) * factor for rmse in (found.rmse_a, found.rmse_b)]
            cells += [number(value, decimals(values[1]) + 1) for value in values]
        shown.add_row(one.name, unit, *cells)
    return shown


def _where(latitude: float, longitude: float) -> str:
    if not math.isfinite(latitude):
        return "-"
    return f"{abs(latitude):.1f}{'N' if latitude >= 0 else 'S'} {longitude:.1f}E"


def as_csv(checks: list[Check]) -> str:
    """Return lines "variable,level_hpa,lead_h,metric,value" in SI units; NaN is left out."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["variable", "level_hpa", "lead_h", "metric", "value"])
    for found in checks:
        metrics = {f.name: getattr(found.difference, f.name) for f in fields(found.difference)}
        metrics |= {"rmse_a": found.rmse_a, "rmse_b": found.rmse_b}
        for place, one in enumerate(found.a.channels):
            level = "" if one.level_hpa is None else f"{one.level_hpa:g}"
            for metric, values in metrics.items():
                value = float(values[place])
                if math.isfinite(value):
                    row = [variable_name(one), level, found.lead_h, metric, f"{value:.8g}"]
                    writer.writerow(row)
    return text.getvalue()
