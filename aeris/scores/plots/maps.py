"""Maps of one forecast case: truth, ensemble mean, one member, spread and error, a row per channel.

Truth, mean and member share one colour scale; the error (mean minus truth) has its own, symmetric about zero.

Legend: C channels, Y rows, X cols, P panels.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aeris.data.variables import Channel
from aeris.scores.display import display_unit, headline_channels, lead_text, time_text
from aeris.scores.plots.figure import picture
from aeris.scores.scorecard import Case
from aeris.scores.spectra import spans_circle

Fields = NDArray[np.float32]

_PANEL_WIDTH_IN = 2.9
_BAR_IN = 0.62
_COLOURS = {"temperature": "Spectral_r", "humidity": "YlGnBu", "wind": "PuOr_r", "velocity": "PuOr_r"}


def _colours(channel: Channel) -> str:
    return next((map_ for word, map_ in _COLOURS.items() if word in channel.variable), "viridis")


def _shown_scale(channel: Channel) -> tuple[float, float, str]:
    """Return (factor, offset, unit) of the fields of a channel; temperatures are shown in degrees Celsius."""
    if channel.units == "K":
        return 1.0, -273.15, "°C"
    factor, unit = display_unit(channel.units)
    return factor, 0.0, unit


def _limits(field: Fields, symmetric: bool) -> tuple[float, float]:
    """Return colour limits without the outermost 0.5 % at either end, so that one point cannot set them."""
    low, high = (float(value) for value in np.nanpercentile(field, (0.5, 99.5)))
    if symmetric:
        high = max(abs(low), abs(high))
        low = -high
    return (low, high) if high > low else (low - 1e-9, low + 1e-9)


def _degrees(value: float, positive: str, negative: str) -> str:
    return f"{abs(value):g}°{positive if value > 0 else negative if value < 0 else ''}"


class _Atlas:
    """The grid of a case turned so that Greenwich is in the middle, and one panel at a time drawn on it."""

    def __init__(self, case: Case) -> None:
        longitude = (case.longitude_deg + 180.0) % 360.0 - 180.0
        self._order = np.argsort(longitude)
        self._longitude = longitude[self._order]
        self._latitude = case.latitude_deg
        self._closed = spans_circle(self._longitude)
        if self._closed:
            # the first column once more at the other end, so that neither fields nor coasts have a gap there
            self._order = np.append(self._order, self._order[0])
            self._longitude = np.append(self._longitude, self._longitude[0] + 360.0)
        self._land = None if case.land_YX is None else case.land_YX[:, self._order]

    @property
    def height_over_width(self) -> float:
        """Shape of a map, in degrees over degrees."""
        return float(np.ptp(self._latitude) / max(np.ptp(self._longitude), 1e-6))

    def draw(
        self, axes: Any, field: Fields, limits: tuple[float, float], colours: str, contours: bool = False
    ) -> Any:
        """Draw one field with coastline and degrees, maybe contours; return what a colour bar needs."""
        shown = field[:, self._order]
        # coarse fields are easier to read with colours interpolated between grid points
        smooth = len(shown) < 90 and bool(np.isfinite(shown).all())
        look = {"cmap": colours, "vmin": limits[0], "vmax": limits[1], "rasterized": True}
        look["shading"] = "gouraud" if smooth else "nearest"
        mesh = axes.pcolormesh(self._longitude, self._latitude, np.ma.masked_invalid(shown), **look)
        if contours:
            levels = np.linspace(*limits, 9)[1:-1]
            lines = {"levels": levels, "colors": "white", "linewidths": 0.5, "alpha": 0.75}
            axes.contour(self._longitude, self._latitude, np.ma.masked_invalid(shown), **lines)
        if self._land is not None and self._land.min() < 0.5 < self._land.max():
            coast = {"levels": [0.5], "colors": "#20262d", "linewidths": 0.7}
            axes.contour(self._longitude, self._latitude, self._land, **coast)
        axes.set_facecolor("#eceff1")
        axes.grid(False)
        axes.set_aspect("equal")
        self._mark_degrees(axes)
        return mesh

    def _mark_degrees(self, axes: Any) -> None:
        for setter, steps, coordinate, names in (
            (axes.set_xticks, (10, 30, 60), self._longitude, "EW"),
            (axes.set_yticks, (10, 15, 30), self._latitude, "NS"),
        ):
            low, high = float(coordinate.min()), float(coordinate.max())
            step = next((step for step in steps if (high - low) / step <= 6), steps[-1])
            marks = np.arange(np.ceil(low / step) * step, high + 1e-6, step)
            setter(marks, [_degrees(float(mark), *names) for mark in marks], size=7)
        axes.tick_params(length=2, pad=1.5)


def _draw_row(figure: Any, row_P: Any, atlas: _Atlas, case: Case, place: int) -> None:
    """Draw the panels of one channel with a colour bar under each group that shares a scale."""
    channel = case.channels[place]
    factor, offset, unit = _shown_scale(channel)
    truth, mean, member = (
        field[place] * factor + offset for field in (case.truth_CYX, case.mean_CYX, case.member_CYX)
    )
    colours = _colours(channel)
    limits = _limits(truth, symmetric=colours == "PuOr_r")
    fields = [truth, mean, member]
    contours = colours == "viridis"  # heights and pressures, which are read by their shape
    meshes = [atlas.draw(axes, field, limits, colours, contours) for axes, field in zip(row_P, fields)]
    bar = {"orientation": "horizontal", "pad": 0.02, "aspect": 30, "shrink": 0.92}
    wide = bar | {"aspect": 75, "shrink": 0.7}
    level = f" at {channel.level_hpa:g} hPa" if channel.level_hpa else ""
    name = channel.variable.replace("_", " ") + level
    figure.colorbar(meshes[0], ax=list(row_P[:3]), extend="both", label=f"{name}  ({unit})", **wide)
    row_P[0].set_ylabel(channel.name, weight="bold")
    apart = display_unit(channel.units)[1]
    error = mean - truth
    panels = [(error, _limits(error, symmetric=True), "RdBu_r", "both", "error")]
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
    atlas = _Atlas(case)
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
