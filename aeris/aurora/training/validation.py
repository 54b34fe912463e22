"""The point-wise check of two forecasts of one start: how far they differ, and each from the truth.

    difference    largest, mean, relative (mean / mean size of B), and largest over the model's scale
    RMSE          of A and of B against the truth, weighted by area

The differences are over points as they are, not weighted: a bug at the pole counts as much as elsewhere.
"""

from __future__ import annotations

import csv
import io
import math
from dataclasses import dataclass, fields

import numpy as np
from rich.table import Table

from aeris.aurora.config import AuroraConfig
from aeris.aurora.training.comparison_report import table
from aeris.aurora.training.errors import (
    Array,
    Difference,
    Fields,
    area_weights,
    difference,
    errors,
    matched,
    scales,
    variable_name,
)
from aeris.scores.display import display_unit, lead_text, time_text
from aeris.scores.report import decimals, number


@dataclass(frozen=True)
class Check:
    """Two forecasts at one lead time, the truth where it is known, and what was found."""

    lead_h: int
    a: Fields
    b: Fields
    truth: Fields | None
    difference: Difference
    rmse_a: Array
    """[C], NaN without a truth."""
    rmse_b: Array

    @property
    def worst(self) -> float:
        """The largest difference of any channel in units of the model's scale; NaN where none is known."""
        known = self.difference.normalised[np.isfinite(self.difference.normalised)]
        return float(known.max()) if len(known) else float("nan")


def check(
    lead_h: int, a: Fields, b: Fields, truth: Fields | None, config: AuroraConfig | None, weights: str = "cos"
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
    a, b = matched(a, b)
    stats = {name: (location, scale) for name, location, scale in config.surf_stats} if config else {}
    found = difference(a, b, scales(a.channels, stats))
    rmse = np.full((2, len(a.channels)), np.nan)
    if truth is not None:
        there, known = matched(truth, a)
        places = [a.names.index(name) for name in there.names]
        weight = area_weights(a.latitude_deg, weights)
        for row, one in enumerate((known, b.select(there.names))):
            rmse[row, places] = np.sqrt(errors(one.values_CYX, there.values_CYX, weight).mse)
    return Check(lead_h, a, b, truth, found, rmse[0], rmse[1])


def difference_table(found: Check) -> Table:
    """Return the table of one row per channel."""
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
        cells.append(_where(float(apart.latitude_deg[place]), float(apart.longitude_deg[place])))
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
