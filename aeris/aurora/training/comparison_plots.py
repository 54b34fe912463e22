"""Pictures of a comparison: errors by lead time, and a card of every channel against the first forecaster.

Colours are those of Okabe and Ito, which people with any colour vision tell apart; markers differ too.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from aeris.aurora.training.comparison import Case, Comparison
from aeris.aurora.training.maps import headline, plot_maps
from aeris.scores.display import display_unit, lead_text, time_text
from aeris.scores.plots.figure import INK, PERSISTENCE, QUIET, lead_axis, picture

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E6")
_MARKS = "osD^vP"
_PERSISTENCE = "persistence"
# The card's colours span this factor either way, so that two cards can be compared.
_LIMIT = 1.25


def looks(names: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """Return how the line of every forecaster is drawn; the first and persistence are set apart."""
    found: dict[str, dict[str, Any]] = {}
    others = 0
    for place, name in enumerate(names):
        if name == _PERSISTENCE:
            found[name] = {"color": PERSISTENCE, "linestyle": ":", "marker": "x"}
        elif place == 0:
            found[name] = {"color": INK, "linestyle": "--", "marker": "."}
        else:
            found[name] = {"color": _COLOURS[others % 6], "marker": _MARKS[others % 6]}
            others += 1
    return found


def plot_scores(result: Comparison, path: Path, title: str, most: int = 5) -> None:
    """Draw RMSE against lead time, and below it the change against the first forecaster in percent."""
    names = headline(result.channel_names, most)
    styles = looks(result.names)
    rmse = result.rmse()
    percent = 100 * (result.ratio() - 1)
    subtitle = f"RMSE, and its change against {result.names[0]}: below zero is better"
    logarithmic = _far_apart(rmse[:, :, [result.channel_names.index(name) for name in names]])
    size_in = (max(2.75 * len(names), 7.5), 4.6)
    with picture(path, size_in, title, subtitle, result.conditions(), styles) as figure:
        grid = figure.subplots(2, len(names), squeeze=False, sharex=True)
        for col, name in enumerate(names):
            place = result.channel_names.index(name)
            factor, unit = display_unit(result.channels[place].units)
            above, below = grid[:, col]
            for row, one in enumerate(result.names):
                above.plot(result.lead_h, rmse[row, :, place] * factor, **styles[one])
                if one != _PERSISTENCE:  # it would hide what the others differ by
                    below.plot(result.lead_h, percent[row, :, place], **styles[one])
            _rmse_axis(above, rmse[:, :, place] * factor, logarithmic)
            above.set_title(f"{name}  ({unit})" if unit else name)
            lead_axis(below, result.lead_h)
        grid[0, 0].set_ylabel("RMSE, logarithmic" if logarithmic else "RMSE")
        grid[1, 0].set_ylabel(f"change against\n{result.names[0]} (%)")


def _far_apart(rmse_NJC: Any) -> bool:
    """Tell whether errors of one channel are so far apart that a linear axis would hide what differs."""
    for values in np.moveaxis(rmse_NJC, 2, 0):
        known = values[np.isfinite(values) & (values > 0)]
        if len(known) and known.max() > 4 * known.min():
            return True
    return False


def _rmse_axis(axes: Any, rmse: Any, logarithmic: bool) -> None:
    """Start an axis of errors at zero, or make it logarithmic."""
    from matplotlib.ticker import LogLocator, NullFormatter

    known = rmse[np.isfinite(rmse) & (rmse > 0)]
    if not logarithmic or not len(known):
        axes.set_ylim(bottom=0)
        return
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_ylim(known.min() / 1.15, known.max() * 1.15)


def _edges(result: Comparison) -> Any:
    """Return top and bottom of every row of the card [rows, 2], with a gap between two variables."""
    groups = ["mean"] + [one.variable if one.level_hpa else "surface" for one in result.channels]
    gaps = [0.0] + [0.28 if now != before else 0.0 for before, now in pairwise(groups)]
    top = np.arange(len(groups)) + np.cumsum(gaps)
    return np.stack([top, top + 1], axis=1)


def _percent(ratio: float, places: int = 1) -> str:
    """Return how far a ratio is from 1 in percent: −3.1, 0.0, +2.4."""
    value = round(100 * (float(ratio) - 1), places) + 0.0
    return f"{value:.{places}f}" if value == 0 else f"{value:+.{places}f}".replace("-", "−")


def _draw_card(axes: Any, ratios_RJ: Any, edges: Any) -> Any:
    """Draw the cells of one forecaster with the change in percent; return what a colour bar needs."""
    import matplotlib
    import matplotlib.colors

    norm = matplotlib.colors.LogNorm(1 / _LIMIT, _LIMIT)
    colours = matplotlib.colormaps["RdBu_r"]
    mesh = None
    for values, (top, bottom) in zip(ratios_RJ, edges):
        shown = np.ma.masked_invalid(np.clip(values, 1 / _LIMIT, _LIMIT))[None]
        cells = {"norm": norm, "cmap": colours, "edgecolors": "white", "linewidth": 1.2}
        mesh = axes.pcolormesh(np.arange(len(values) + 1), [top, bottom], shown, **cells)
        for col, value in enumerate(values):
            known = bool(np.isfinite(value))
            light = np.dot(colours(norm(shown[0, col]))[:3], (0.3, 0.59, 0.11)) > 0.5 if known else True
            text = _percent(value) if known else "–"
            place = {"ha": "center", "va": "center_baseline", "size": 7.5}
            axes.text(col + 0.5, (top + bottom) / 2, text, color=INK if light else "white", **place)
    axes.set_ylim(edges.max(), 0)
    axes.grid(False)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    axes.xaxis.tick_top()
    return mesh


def plot_card(result: Comparison, path: Path, title: str) -> None:
    """Draw the change of the RMSE against the first forecaster: a cell per channel and lead time.

    Raises:
        ValueError: there is no other forecaster but persistence.
    """
    rows = [row for row, name in enumerate(result.names) if row and name != _PERSISTENCE]
    if not rows:
        raise ValueError(f"there is nothing to measure against {result.names[0]}")
    ratio, mean = result.ratio(), result.mean_ratio()
    edges = _edges(result)
    leads = len(result.lead_h)
    cells_in = float(edges.max()) * 0.235
    size_in = (max(len(rows) * (leads * 0.55 + 0.2) + 0.9, 6.2), cells_in + 1.25)
    subtitle = f"change of the RMSE against {result.names[0]} in percent"
    with picture(path, size_in, title, subtitle, result.conditions()) as figure:
        grid = figure.subplots(1, len(rows), squeeze=False, sharey=True)[0]
        for axes, row in zip(grid, rows):
            mesh = _draw_card(axes, np.vstack([mean[row], ratio[row].T]), edges)
            axes.set_xticks(np.arange(leads) + 0.5, [lead_text(lead_h) for lead_h in result.lead_h])
            axes.set_title(result.names[row])
        grid[0].set_yticks(edges.mean(axis=1), ["mean", *result.channel_names])
        grid[0].get_yticklabels()[0].set_weight("bold")
        bar = figure.colorbar(
            mesh, ax=list(grid), orientation="horizontal", extend="both", aspect=45, shrink=0.9, pad=0.02
        )
        marks = (1 / _LIMIT, 0.9, 0.95, 1, 1.05, 1.1, _LIMIT)
        bar.set_ticks(marks, labels=[f"{_percent(mark, 0)} %" for mark in marks])
        bar.ax.minorticks_off()
        bar.ax.grid(False)
        bar.outline.set_visible(False)
        bar.set_label("blue: better      red: worse", size=8.5, color=QUIET)


def plot_case(
    case: Case, lead_h: int, directory: Path, title: str, names: tuple[str, ...] = (), most: int = 4
) -> list[Path]:
    """Draw forecasts_<lead>h.png and errors_<lead>h.png of one start and return their paths.

    Persistence is left out: its errors are so large that they would hide the others'.
    """
    truth = case.truth[lead_h]
    made = {name: one[lead_h] for name, one in case.forecasts.items() if name != _PERSISTENCE}
    fields = {"truth": truth, **made}
    apart = {f"{name} − truth": (name, "truth") for name in made}
    when = f"init {time_text(case.init)}, valid {time_text(truth.time)}, {lead_text(lead_h)} ahead"
    paths = [directory / f"forecasts_{lead_h}h.png", directory / f"errors_{lead_h}h.png"]
    look: dict[str, Any] = {"land_YX": case.land_YX, "names": names, "most": most}
    plot_maps(fields, {}, paths[0], title, when, **look)
    foot = "RMS: root of the mean square, area weights cos(latitude)"
    plot_maps(fields, apart, paths[1], title, when, foot, shown=("truth",), **look)
    return paths
