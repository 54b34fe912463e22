"""Maps of one forecast case: truth, ensemble mean, one member, spread and error, a row per channel.

Truth, mean and member share one colour scale; the error (mean minus truth) has its own, symmetric about zero.

Legend: C channels, Y rows, X cols, P panels.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from aeris.scores.display import display_unit, headline_channels, lead_text, time_text
from aeris.scores.plots.atlas import (
    ERROR_COLOURS,
    SIGNED_COLOURS,
    Atlas,
    colours_of,
    limits,
    shown_scale,
    title_of,
    wants_contours,
)
from aeris.scores.plots.figure import picture
from aeris.scores.scorecard import Case

_PANEL_WIDTH_IN = 2.9
_BAR_IN = 0.62


def _draw_row(figure: Any, row_P: Any, atlas: Atlas, case: Case, place: int) -> None:
    """Draw the panels of one channel with a colour bar under each group that shares a scale."""
    channel = case.channels[place]
    factor, offset, unit = shown_scale(channel)
    truth, mean, member = (
        field[place] * factor + offset for field in (case.truth_CYX, case.mean_CYX, case.member_CYX)
    )
    colours = colours_of(channel)
    ends = limits(truth, symmetric=colours == SIGNED_COLOURS)
    fields = [truth, mean, member]
    contours = wants_contours(channel)
    meshes = [atlas.draw(axes, field, ends, colours, contours) for axes, field in zip(row_P, fields)]
    bar = {"orientation": "horizontal", "pad": 0.02, "aspect": 30, "shrink": 0.92}
    wide = bar | {"aspect": 75, "shrink": 0.7}
    label = f"{title_of(channel)}  ({unit})"
    figure.colorbar(meshes[0], ax=list(row_P[:3]), extend="both", label=label, **wide)
    row_P[0].set_ylabel(channel.name, weight="bold")
    apart = display_unit(channel.units)[1]
    error = mean - truth
    panels = [(error, limits(error, symmetric=True), ERROR_COLOURS, "both", "error")]
    if case.spread_CYX is not None:
        spread = case.spread_CYX[place] * factor
        top = float(np.nanpercentile(spread, 99.5))
        panels.insert(0, (spread, (0.0, top or 1e-9), "BuPu", "max", "spread"))
    for axes, (field, ends, map_, extend, word) in zip(row_P[3:], panels):
        mesh = atlas.draw(axes, field, ends, map_)
        figure.colorbar(mesh, ax=axes, extend=extend, label=f"{word}  ({apart})", **bar)


def plot_maps(case: Case, title: str, path: Path, most: int = 4) -> None:
    """Draw the maps of up to `most` channels of a case."""
    places = headline_channels([channel.name for channel in case.channels], most)
    titles = ["truth", "ensemble mean", "one member", "spread", "mean − truth"]
    if case.spread_CYX is None:
        titles = ["truth", "forecast", "forecast, member 1", "forecast − truth"]
    subtitle = f"init {time_text(case.init)}, valid {time_text(case.valid)}, {lead_text(case.lead_h)} ahead"
    atlas = Atlas(case.latitude_deg, case.longitude_deg, case.land_YX)
    height_in = _PANEL_WIDTH_IN * atlas.height_over_width + _BAR_IN
    size_in = (_PANEL_WIDTH_IN * len(titles) + 1.0, height_in * len(places) + 0.3)
    with picture(path, size_in, title, subtitle, dpi=120) as figure:
        figure.get_layout_engine().set(w_pad=0.08, wspace=0.0)
        grid = figure.subplots(len(places), len(titles), squeeze=False)
        for row, place in enumerate(places):
            _draw_row(figure, grid[row], atlas, case, place)
            for axes in grid[row, 1:]:
                axes.set_yticklabels([])
            for axes in grid[row] if row < len(places) - 1 else ():
                axes.set_xticklabels([])
        for axes, text in zip(grid[0], titles):
            axes.set_title(text)
