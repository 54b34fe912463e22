"""A map as a panel: a grid turned so that Greenwich is in the middle, colours, limits, coastline, degrees.

Colours are those that people with any colour vision can order: one hue or two, dark or light at the ends.

Legend: Y rows, X cols.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from aeris.data.variables import Channel
from aeris.scores.display import display_unit
from aeris.scores.spectra import spans_circle

Fields = NDArray[np.float32]
Array = NDArray[np.float64]

ERROR_COLOURS = "RdBu_r"
SIGNED_COLOURS = "PuOr_r"
_COLOURS = {
    "temperature": "RdYlBu_r",
    "humidity": "YlGnBu",
    "wind": SIGNED_COLOURS,
    "velocity": SIGNED_COLOURS,
}
_SHAPE_COLOURS = "viridis"


def colours_of(channel: Channel) -> str:
    """Return the colour map of a channel's fields."""
    return next((map_ for word, map_ in _COLOURS.items() if word in channel.variable), _SHAPE_COLOURS)


def wants_contours(channel: Channel) -> bool:
    """Tell whether a channel is read by its shape (heights, pressures) and gets contours."""
    return colours_of(channel) == _SHAPE_COLOURS


def shown_scale(channel: Channel) -> tuple[float, float, str]:
    """Return (factor, offset, unit) of the fields of a channel; temperatures are shown in degrees Celsius."""
    if channel.units == "K":
        return 1.0, -273.15, "°C"
    factor, unit = display_unit(channel.units)
    return factor, 0.0, unit


def title_of(channel: Channel) -> str:
    """Return a channel in words: "temperature at 850 hPa"."""
    level = f" at {channel.level_hpa:g} hPa" if channel.level_hpa else ""
    return channel.variable.replace("_", " ") + level


def limits(field: NDArray[np.floating], symmetric: bool = False) -> tuple[float, float]:
    """Return colour limits without the outermost 0.5 % at either end, so that one point cannot set them."""
    if not np.isfinite(field).any():
        return -1.0, 1.0
    low, high = (float(value) for value in np.nanpercentile(field, (0.5, 99.5)))
    if symmetric:
        high = max(abs(low), abs(high))
        low = -high
    # a field of one value, and one of float32 noise about a large value, still get a scale
    least = max(1e-12, 1e-7 * max(abs(low), abs(high)))
    return (low, high) if high - low > least else (low - least, low + least)


def _degrees(value: float, positive: str, negative: str) -> str:
    return f"{abs(value):g}°{positive if value > 0 else negative if value < 0 else ''}"


class Atlas:
    """Draws fields of one grid, a panel at a time.

    Args:
        latitude_deg: [Y], rising or falling.
        longitude_deg: [X].
        land_YX: share of land, 0 to 1, for the coastline; None draws none.

    Raises:
        ValueError: the grid is not made of rows and columns.
    """

    def __init__(self, latitude_deg: Array, longitude_deg: Array, land_YX: Fields | None = None) -> None:
        if latitude_deg.ndim != 1 or longitude_deg.ndim != 1:
            raise ValueError(
                f"maps need rows of equal latitude and columns of equal longitude; the latitudes have "
                f"{latitude_deg.ndim} dims, the longitudes {longitude_deg.ndim}"
            )
        longitude = (longitude_deg + 180.0) % 360.0 - 180.0
        self._order = np.argsort(longitude)
        self._longitude = longitude[self._order]
        self._latitude = latitude_deg
        if spans_circle(self._longitude):
            # the first column once more at the other end, so that neither fields nor coasts have a gap there
            self._order = np.append(self._order, self._order[0])
            self._longitude = np.append(self._longitude, self._longitude[0] + 360.0)
        self._land = None if land_YX is None else land_YX[:, self._order]

    @property
    def height_over_width(self) -> float:
        """Shape of a map, in degrees over degrees."""
        return float(np.ptp(self._latitude) / max(np.ptp(self._longitude), 1e-6))

    def draw(
        self, axes: Any, field: Fields, ends: tuple[float, float], colours: str, contours: bool = False
    ) -> Any:
        """Draw a field [Y, X] with coastline and degrees, maybe contours; return what a colour bar needs."""
        shown = field[:, self._order]
        # coarse fields are easier to read with colours interpolated between grid points
        smooth = len(shown) < 90 and bool(np.isfinite(shown).all())
        look = {"cmap": colours, "vmin": ends[0], "vmax": ends[1], "rasterized": True}
        look["shading"] = "gouraud" if smooth else "nearest"
        mesh = axes.pcolormesh(self._longitude, self._latitude, np.ma.masked_invalid(shown), **look)
        if contours and np.isfinite(shown).any():
            lines = {
                "levels": np.linspace(*ends, 9)[1:-1],
                "colors": "white",
                "linewidths": 0.5,
                "alpha": 0.75,
            }
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
            marks = marks[marks < marks[0] + 360] if len(marks) else marks  # one name for one meridian
            setter(marks, [_degrees(float(mark), *names) for mark in marks], size=7)
        axes.tick_params(length=2, pad=1.5)
