"""RMSE, CRPS, ACC and spread/skill ratio against lead time, beside persistence and climatology."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from aeris.scores.display import display_unit, headline_channels
from aeris.scores.plots import figure as look
from aeris.scores.plots.figure import lead_axis, picture
from aeris.scores.scorecard import Scorecard

_RMSE_LINES = (
    ("rmse_persistence", "persistence", look.PERSISTENCE, "-"),
    ("rmse_climatology", "climatology", look.CLIMATOLOGY, "--"),
    ("rmse_member", "single member", look.MEMBER, "-"),
    ("rmse", "ensemble mean", look.MEAN, "-"),
    ("spread", "ensemble spread", look.SPREAD, ":"),
)
_ONE_MEMBER_LINES = (*_RMSE_LINES[:2], ("rmse", "forecast", look.MEAN, "-"))
_CRPS_LINES = (
    ("mae_persistence", "persistence", look.PERSISTENCE, "-"),
    ("mae_climatology", "climatology", look.CLIMATOLOGY, "--"),
    ("crps_climatology", "members of climatology", look.CLIMATOLOGY, "--"),
    ("crps", "ensemble", look.MEAN, "-"),
)


def _draw(axes: Any, card: Scorecard, place: int, lines: Sequence[tuple[str, str, str, str]]) -> None:
    factor, _ = display_unit(card.channels[place].units)
    for name, _, colour, dash in lines:
        if name in card.values and np.isfinite(card.values[name][:, place]).any():
            values = card.values[name][:, place] * factor
            mark = "o" if len(card.lead_h) <= 12 else ""
            axes.plot(card.lead_h, values, dash, color=colour, marker=mark, markeredgecolor="white")
    axes.set_ylim(bottom=0)
    lead_axis(axes, card.lead_h)


def _draw_ratio(axes: Any, card: Scorecard, place: int, limits: tuple[float, float]) -> None:
    ssr = card.values["ssr"][:, place]
    axes.axhline(1, color=look.QUIET, linewidth=1)
    mark = "o" if len(card.lead_h) <= 12 else ""
    axes.plot(card.lead_h, ssr, color=look.SPREAD, marker=mark, markeredgecolor="white")
    axes.set_ylim(limits)
    lead_axis(axes, card.lead_h)


def _draw_correlation(axes: Any, card: Scorecard, place: int) -> None:
    """Draw the anomaly correlation, with the line below which a forecast is of little use."""
    axes.axhline(0.6, color=look.QUIET, linewidth=0.8, linestyle=":")
    mark = "o" if len(card.lead_h) <= 12 else ""
    axes.plot(
        card.lead_h, card.values["acc"][:, place], color=look.MEAN, marker=mark, markeredgecolor="white"
    )
    axes.set_ylim(min(0.0, float(np.nanmin(card.values["acc"], initial=0.0))), 1.02)
    lead_axis(axes, card.lead_h)


def plot_curves(card: Scorecard, path: Path, most: int = 5) -> None:
    """Draw RMSE, CRPS, ACC and the spread/skill ratio of up to `most` channels against lead time."""
    places = headline_channels(card.names, most)
    labels = ["RMSE", "CRPS" if card.members > 1 else "MAE"]
    labels += ["ACC"] * ("acc" in card.values) + ["spread / skill"] * (card.members > 1)
    rows = len(labels)
    shown = {name for name, values in card.values.items() if np.isfinite(values).any()}
    ssr = card.values["ssr"][:, places]
    low = max(0.0, float(np.nanmin(ssr, initial=0.8)) - 0.1)
    high = min(3.0, float(np.nanmax(ssr, initial=1.2)) + 0.1)
    subtitle = "RMSE and mean absolute error"
    if card.members > 1:
        subtitle = (
            "RMSE with ensemble spread, fair CRPS, unbiased spread/skill ratio (1: spread fits the error)"
        )
    foot = card.conditions()[0] + (f"; climatology: {card.climatology}" if card.climatology else "")
    lines = [line for line in (_RMSE_LINES if card.members > 1 else _ONE_MEMBER_LINES) if line[0] in shown]
    legend = {label: {"color": colour, "linestyle": dash} for _, label, colour, dash in lines}
    # of the two, members drawn from the climatology are what an ensemble has to beat
    hidden = "mae_climatology" if "crps_climatology" in shown else "crps_climatology"
    crps_lines = [line for line in _CRPS_LINES if line[0] != hidden]
    heights_in = [2.35, 2.35, 1.75, 1.75][:rows]
    size_in = (max(2.75 * len(places), 7.5), sum(heights_in))
    with picture(path, size_in, card.title, subtitle, foot, legend) as figure:
        grid = figure.subplots(rows, len(places), squeeze=False, height_ratios=heights_in)
        for col, place in enumerate(places):
            unit = display_unit(card.channels[place].units)[1]
            _draw(grid[0, col], card, place, lines)
            grid[0, col].set_title(f"{card.names[place]}  ({unit})")
            _draw(grid[1, col], card, place, crps_lines)
            if "ACC" in labels:
                _draw_correlation(grid[2, col], card, place)
            if card.members > 1:
                _draw_ratio(grid[-1, col], card, place, (low, high))
            for axes in grid[:-1, col]:
                axes.set_xlabel("")
                axes.set_xticklabels([])
        for row, label in enumerate(labels):
            grid[row, 0].set_ylabel(label)
