"""The scorecard: RMSE of the ensemble mean over that of persistence, a cell per channel and lead time."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aeris.scores.display import lead_text
from aeris.scores.plots.figure import INK, picture
from aeris.scores.scorecard import Scorecard, mean_over_channels

_CELL_HEIGHT_IN = 0.235
_BAR_HEIGHT_IN = 0.13
# Colours always span 1/3 .. 3, so that pictures of two forecasts can be compared.
_LIMIT = 3.0
_MARKS = (0.33, 0.5, 0.67, 0.8, 1, 1.25, 1.5, 2, 3)


def _row_edges(card: Scorecard) -> NDArray[np.float64]:
    """Return top and bottom of every row [rows, 2], with a gap after the mean and between two variables."""
    groups = ["mean"] + [channel.variable if channel.level_hpa else "surface" for channel in card.channels]
    gaps = [0.0] + [0.28 if now != before else 0.0 for before, now in pairwise(groups)]
    top = np.arange(len(groups)) + np.cumsum(gaps)
    return np.stack([top, top + 1], axis=1)


def _draw_cells(axes: Any, ratios_CJ: NDArray[np.float64], edges: NDArray[np.float64], size: float) -> Any:
    """Draw the rows as coloured cells with their numbers; return what a colour bar needs."""
    import matplotlib
    import matplotlib.colors

    norm = matplotlib.colors.LogNorm(1 / _LIMIT, _LIMIT)
    colours = matplotlib.colormaps["RdBu_r"]
    cols = np.arange(ratios_CJ.shape[1] + 1)
    mesh = None
    for values, (top, bottom) in zip(ratios_CJ, edges):
        shown = np.ma.masked_invalid(np.clip(values, 1 / _LIMIT, _LIMIT))[None]
        look = {"norm": norm, "cmap": colours, "edgecolors": "white", "linewidth": 1.2}
        mesh = axes.pcolormesh(cols, [top, bottom], shown, **look)
        for col, value in enumerate(values):
            known = bool(np.isfinite(value))
            text = "–" if not known else f"{value:.2f}" if value < 9.995 else f"{value:.0f}"
            light = np.dot(colours(norm(shown[0, col]))[:3], (0.3, 0.59, 0.11)) > 0.5 if known else True
            place = {"ha": "center", "va": "center_baseline", "size": size}
            axes.text(col + 0.5, (top + bottom) / 2, text, color=INK if light else "white", **place)
    axes.set_ylim(edges.max(), 0)
    return mesh


def plot_scorecard(card: Scorecard, path: Path) -> None:
    """Draw the RMSE ratio to persistence of every channel (rows) at every lead time (columns)."""
    ratios_JC = card.values["rmse_ratio"]
    ratios_CJ = np.vstack([mean_over_channels(ratios_JC[:, card.own]), ratios_JC.T])
    leads = ratios_CJ.shape[1]
    edges = _row_edges(card)
    cell_in = float(np.clip(9.0 / leads, 0.34, 0.95))
    cells_in = float(edges.max()) * _CELL_HEIGHT_IN
    size_in = (max(leads * cell_in + 1.3, 6.2), cells_in + 1.15)
    subtitle = f"RMSE of the {'ensemble mean' if card.members > 1 else 'forecast'} / RMSE of persistence"
    with picture(path, size_in, card.title, subtitle, card.conditions()[0]) as figure:
        axes, bar_axes = figure.subplots(2, 1, height_ratios=[cells_in, _BAR_HEIGHT_IN])
        mesh = _draw_cells(axes, ratios_CJ, edges, 8.0 if cell_in > 0.45 else 6.5)
        axes.grid(False)
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
        axes.xaxis.tick_top()
        axes.set_xticks(np.arange(leads) + 0.5, [lead_text(lead_h) for lead_h in card.lead_h])
        if leads > 16:
            axes.tick_params(axis="x", labelrotation=90, labelsize=7.5)
        axes.set_yticks(edges.mean(axis=1), ["mean", *card.names])
        axes.get_yticklabels()[0].set_weight("bold")
        bar = figure.colorbar(mesh, cax=bar_axes, orientation="horizontal", extend="both")
        bar.set_ticks(np.clip(_MARKS, 1 / _LIMIT, _LIMIT), labels=[f"{mark:g}" for mark in _MARKS])
        bar.ax.minorticks_off()
        bar.ax.grid(False)
        bar.outline.set_visible(False)
        bar.set_label("blue: better than persistence      red: worse", size=8.5)
