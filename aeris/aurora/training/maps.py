"""Maps side by side: the truth and what several models make of it, and how far they are from it.

A row per channel. All fields of a row share one colour scale, all differences another, symmetric about zero,
so that what looks larger is larger. The coastline is that of the land-sea mask, where there is one.

Legend: Y rows, X cols.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from aeris.aurora.training.errors import ChannelFields, Values, area_weights, errors, matched
from aeris.data.variables import Channel
from aeris.scores.display import display_unit
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

HEADLINE = ("2t", "z500", "t850", "q700", "msl", "u850", "10u")
"""Drawn first, in this order, where they exist."""
_PANEL_WIDTH_IN = 2.9
_BAR_IN = 0.62


def headline(names: Sequence[str], most: int) -> list[str]:
    """Return at most `most` channels to draw, those of `HEADLINE` first."""
    known = [name for name in HEADLINE if name in names]
    return (known + [name for name in names if name not in known])[:most]


def _draw_group(
    figure: Any, row: Sequence[Any], atlas: Atlas, fields: Sequence[Values], look: Mapping[str, Any]
) -> None:
    """Draw fields on one colour scale, with one bar under all of them."""
    contours = bool(look.get("contours"))
    mesh = None
    for axes, field in zip(row, fields, strict=True):
        mesh = atlas.draw(axes, field, look["ends"], look["colours"], contours)
    many = len(fields)
    size = {"aspect": 30 * many if many < 4 else 90, "shrink": 0.92 if many == 1 else max(0.4, 1.4 / many)}
    figure.colorbar(
        mesh, ax=list(row), orientation="horizontal", pad=0.02, extend="both", label=look["label"], **size
    )


def _draw_fields(figure: Any, row: Sequence[Any], atlas: Atlas, one: Channel, fields: list[Values]) -> None:
    factor, offset, unit = shown_scale(one)
    shown = [field * factor + offset for field in fields]
    colours = colours_of(one)
    ends = limits(shown[0], symmetric=colours == SIGNED_COLOURS)
    label = f"{title_of(one)}  ({unit})" if unit else title_of(one)
    look = {"ends": ends, "colours": colours, "label": label, "contours": wants_contours(one)}
    _draw_group(figure, row, atlas, shown, look)


def _draw_differences(
    figure: Any, row: Sequence[Any], atlas: Atlas, one: Channel, fields: list[Values], latitude: Any
) -> None:
    factor, unit = display_unit(one.units)
    shown = [field * factor for field in fields]
    ends = limits(np.stack(shown), symmetric=True)
    label = f"difference  ({unit})" if unit else "difference"
    _draw_group(figure, row, atlas, shown, {"ends": ends, "colours": ERROR_COLOURS, "label": label})
    nothing, weights = np.zeros((1, *shown[0].shape), np.float32), area_weights(latitude)
    for axes, field in zip(row, shown, strict=True):
        rms = float(np.sqrt(errors(field[None], nothing, weights).mse[0]))
        axes.set_title(f"RMS {rms:.3g} {unit}".rstrip(), loc="right", size=7.5, weight="normal")


def plot_maps(
    fields: Mapping[str, ChannelFields],
    differences: Mapping[str, tuple[str, str]],
    path: Path,
    title: str,
    subtitle: str = "",
    foot: str = "",
    land_YX: Values | None = None,
    names: Sequence[str] = (),
    shown: Sequence[str] = (),
    most: int = 4,
) -> None:
    """Draw maps of fields and of differences between them, a row per channel.

    Args:
        fields: what to draw or subtract, by heading; the first sets the colour scale of all.
        differences: heading -> (one, other): one minus other, of `fields`.
        path: PNG to write.
        title: heading of the picture.
        subtitle: line under it, such as the times.
        foot: small line at the bottom.
        land_YX: share of land for the coastline, on the rows and columns of `fields`.
        names: channels to draw; empty takes those of `HEADLINE`.
        shown: headings of `fields` to draw; empty draws all.
        most: at most so many channels.

    Raises:
        ValueError: the fields do not fit together, or a channel in `names` is missing.
    """
    same = dict(zip(fields, matched(*fields.values())))
    first = next(iter(same.values()))
    absent = [name for name in names if name not in first.names]
    if absent:
        raise ValueError(f"no maps of {' '.join(absent)}: there are {' '.join(first.names)}")
    channels = list(names) or headline(first.names, most)
    drawn = list(shown) or list(same)
    land_YX = None if land_YX is None else land_YX[: first.values_CYX.shape[1]]
    atlas = Atlas(first.latitude_deg, first.longitude_deg, land_YX)
    headings = [*drawn, *differences]
    bars = bool(drawn) + bool(differences)
    height_in = _PANEL_WIDTH_IN * atlas.height_over_width + _BAR_IN
    size_in = (max(_PANEL_WIDTH_IN * len(headings) + 0.4 * bars, 6.5), height_in * len(channels) + 0.3)
    with picture(path, size_in, title, subtitle, foot, dpi=120) as figure:
        figure.get_layout_engine().set(w_pad=0.08, wspace=0.0)
        grid = figure.subplots(len(channels), len(headings), squeeze=False)
        for row, name in zip(grid, channels):
            place = first.names.index(name)
            one = first.channels[place]
            values = {heading: cut.values_CYX[place] for heading, cut in same.items()}
            if drawn:
                _draw_fields(figure, row[: len(drawn)], atlas, one, [values[heading] for heading in drawn])
            if differences:
                apart = [values[a] - values[b] for a, b in differences.values()]
                _draw_differences(figure, row[len(drawn) :], atlas, one, apart, first.latitude_deg)
            row[0].set_ylabel(name, weight="bold")
        for axes in grid[:, 1:].flat:
            axes.set_yticklabels([])
        for axes in grid[:-1].flat:
            axes.set_xticklabels([])
        for axes, text in zip(grid[0], headings):
            axes.set_title(text)
