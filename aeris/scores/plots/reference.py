"""A forecast beside others: coloured relative differences, and curves against lead time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from aeris.scores.comparison import LABELS, Comparison
from aeris.scores.display import headline_channels, lead_text
from aeris.scores.plots import figure as look
from aeris.scores.plots.figure import INK, QUIET, lead_axis, picture

_CELL_IN = (0.62, 0.27)
# Colours always span -50 % .. +50 %, so that pictures of two forecasts can be compared.
_LIMIT = 0.5
_COLOURS = {
    "IFS ENS": "#e07b39",
    "IFS HRES": "#8d99a6",
    "GenCast": "#2e8b57",
    "FGN": "#8e5bb5",
    "Aurora": "#c2496b",
    "GraphCast": "#b08d3c",
    "GraphCast (oper.)": "#b08d3c",
    "Pangu-Weather": "#5aa9e6",
    "Pangu-Weather (oper.)": "#5aa9e6",
    "Persistence": look.PERSISTENCE,
    "persistence": look.PERSISTENCE,
    "Climatology": look.CLIMATOLOGY,
    "climatology": look.CLIMATOLOGY,
    "Probabilistic Climatology": look.CLIMATOLOGY,
}
_SPARE = ("#2e8b57", "#8e5bb5", "#c2496b", "#e07b39", "#4f6d7a")


def _cells(axes: Any, comparison: Comparison, other: str, leads: Sequence[int]) -> Any:
    """Draw the cells of one other system; return what a colour bar needs."""
    import matplotlib

    difference_CJ = comparison.difference_JC(other)[list(leads)].T
    shown = np.ma.masked_invalid(difference_CJ)
    edges = {"edgecolors": "white", "linewidth": 1.2}
    mesh = axes.pcolormesh(shown, cmap="RdBu_r", vmin=-_LIMIT, vmax=_LIMIT, **edges)
    colours = matplotlib.colormaps["RdBu_r"]
    for (row, col), value in np.ndenumerate(difference_CJ):
        known = bool(np.isfinite(value))
        light = np.dot(colours(value / (2 * _LIMIT) + 0.5)[:3], (0.3, 0.59, 0.11)) > 0.5 if known else True
        text = (f"{100 * value:+.0f}" if abs(value) >= 0.005 else "0") if known else "–"
        place = {"ha": "center", "va": "center_baseline", "size": 7.5}
        axes.text(col + 0.5, row + 0.5, text, color=INK if light else "white", **place)
    axes.invert_yaxis()
    axes.set_title(f"beside {other}")
    axes.set_xticks(np.arange(len(leads)) + 0.5, [lead_text(comparison.lead_h[lead]) for lead in leads])
    axes.set_yticks(np.arange(len(difference_CJ)) + 0.5, [one.name for one in comparison.channels])
    axes.grid(False)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    if len(leads) > 12:
        axes.tick_params(axis="x", labelrotation=90, labelsize=7.5)
    return mesh


def _foot(comparison: Comparison) -> str:
    return "; ".join(text for text in (comparison.source, *comparison.notes) if text)


def plot_differences(comparison: Comparison, path: Path, others: Sequence[str] = ()) -> None:
    """Draw the relative difference of a score from each of `others`: rows are channels, columns lead times.

    Args:
        comparison: a score for which `has_difference` is true.
        path: PNG to write.
        others: systems to draw, by default the first two.

    Raises:
        ValueError: the score has no better and worse, or there is no such system.
    """
    if not comparison.has_difference:
        raise ValueError(f"{comparison.metric} has no better and worse to colour: draw its curves")
    shown = list(others) or list(comparison.others)[:2]
    missing = [name for name in shown if name not in comparison.others]
    if missing or not shown:
        raise ValueError(f"nothing to compare with called {missing}; there is {', '.join(comparison.others)}")
    known_J = np.array([np.isfinite(comparison.others[name]).any(axis=1) for name in shown]).any(axis=0)
    leads = np.flatnonzero(known_J).tolist()
    width_in = len(shown) * (len(leads) * _CELL_IN[0] + 0.9)
    size_in = (max(width_in, 6.2), len(comparison.channels) * _CELL_IN[1] + 1.25)
    words = f"{LABELS.get(comparison.metric, comparison.metric)} against {comparison.truth}"
    if comparison.metric == "acc":
        words = f"1 - ACC against {comparison.truth}"
    subtitle = f"{words}: difference of this forecast from another, percent"
    with picture(path, size_in, comparison.title, subtitle, _foot(comparison)) as figure:
        grid = figure.subplots(1, len(shown), squeeze=False, sharey=True)
        for axes, name in zip(grid[0], shown):
            mesh = _cells(axes, comparison, name, leads)
        grid[0, 0].set_ylim(len(comparison.channels), 0)
        bar = figure.colorbar(mesh, ax=grid[0].tolist(), orientation="horizontal", extend="both", aspect=60)
        marks = (-0.5, -0.25, 0, 0.25, 0.5)
        bar.set_ticks(marks, labels=[f"{100 * mark:+.0f} %" if mark else "0" for mark in marks])
        bar.outline.set_visible(False)
        bar.ax.grid(False)
        bar.set_label("blue: this forecast is better      red: worse", size=8.5)


def plot_beside(comparisons: Sequence[Comparison], path: Path, most: int = 5) -> None:
    """Draw scores against lead time, one row per comparison, ours beside the others as lines.

    Args:
        comparisons: scores of the same forecast, such as RMSE and CRPS.
        path: PNG to write.
        most: at most so many channels.

    Raises:
        ValueError: there is nothing to draw.
    """
    if not comparisons:
        raise ValueError("no score to draw beside others")
    first = comparisons[0]
    names = list(dict.fromkeys(one.name for each in comparisons for one in each.channels))
    shown = [names[number] for number in headline_channels(names, most)]
    systems = list(dict.fromkeys(name for each in comparisons for name in each.others))
    spare = iter(_SPARE * len(systems))
    colours = {name: _COLOURS[name] if name in _COLOURS else next(spare) for name in systems}
    legend = {"this forecast": {"color": look.MEAN, "linewidth": 2.4}}
    legend |= {name: {"color": colour, "linestyle": _dash(name)} for name, colour in colours.items()}
    size_in = (max(2.75 * len(shown), 2.0 + 1.25 * len(legend)), 2.35 * len(comparisons))
    subtitle = (
        f"{', '.join(LABELS.get(each.metric, each.metric) for each in comparisons)} against {first.truth}"
    )
    with picture(path, size_in, first.title, subtitle, _foot(first), legend) as figure:
        grid = figure.subplots(len(comparisons), len(shown), squeeze=False)
        for row, comparison in enumerate(comparisons):
            there = [one.name for one in comparison.channels]
            for col, name in enumerate(shown):
                if name not in there:
                    grid[row, col].set_axis_off()
                    continue
                place = there.index(name)
                _lines(grid[row, col], comparison, place, colours)
                unit = comparison.unit(place)[1]
                grid[row, col].set_title(f"{name}  ({unit})" if unit else name)
            grid[row, 0].set_ylabel(LABELS.get(comparison.metric, comparison.metric))
            grid[row, 0].yaxis.label.set_color(QUIET)


def _dash(name: str) -> str:
    """Return the line of a system: GraphCast and Pangu-Weather come twice, operational starts are dashed."""
    return "--" if "oper." in name or "limatology" in name else "-"


def _lines(axes: Any, comparison: Comparison, place: int, colours: dict[str, str]) -> None:
    factor, _ = comparison.unit(place)
    lead_h = np.array(comparison.lead_h)
    for name, values_JC in comparison.others.items():
        known = np.isfinite(values_JC[:, place])
        if known.any():
            values = values_JC[known, place] * factor
            line = {"color": colours[name], "linewidth": 1.3, "markersize": 3}
            axes.plot(lead_h[known], values, _dash(name), marker="o", **line)
    ours = comparison.ours_JC[:, place] * factor
    mark = "o" if len(lead_h) <= 12 else ""
    axes.plot(lead_h, ours, color=look.MEAN, linewidth=2.4, marker=mark, markeredgecolor="white")
    if comparison.metric == "ssr":
        axes.axhline(1, color=QUIET, linewidth=1)
    elif comparison.metric == "bias":
        axes.axhline(0, color=QUIET, linewidth=1)
    else:
        axes.set_ylim(bottom=0)
    lead_axis(axes, comparison.lead_h)
