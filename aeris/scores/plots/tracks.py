"""Cyclone tracks: a map with the probability of a strike, and errors of place and strength by lead time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from aeris.scores.cyclones import LATITUDE, LONGITUDE, Track
from aeris.scores.plots.atlas import Array, Atlas, Fields
from aeris.scores.plots.figure import MEAN, MEMBER, SPREAD, TRUTH, lead_axis, picture
from aeris.scores.tracks import TRUTH as TRUE_TRACKS
from aeris.scores.tracks import TrackScores, strike_probability

_MAP_WIDTH_IN = 9.0


def plot_tracks(
    tracks: Mapping[int, Sequence[Track]],
    latitude_deg: Array,
    longitude_deg: Array,
    title: str,
    subtitle: str,
    path: Path,
    land_YX: Fields | None = None,
) -> None:
    """Draw the tracks of one init time over the share of members that pass each place.

    Args:
        tracks: by member; the true ones under -1 (`TrackScores.tracks`).
        land_YX: share of land, for the coastline; None draws none.
    """
    atlas = Atlas(latitude_deg, longitude_deg, land_YX)
    members = [own for member, own in tracks.items() if member != TRUE_TRACKS]
    strike_YX = strike_probability(members, latitude_deg, longitude_deg).astype(np.float32)
    legend = {
        "truth": {"color": TRUTH, "lw": 1.8, "marker": "o", "ms": 3.5},
        "members": {"color": MEMBER, "lw": 0.9},
    }
    size_in = (_MAP_WIDTH_IN, _MAP_WIDTH_IN * atlas.height_over_width + 0.75)
    foot = "shading: share of members with a cyclone passing near; dots: where a true cyclone begins"
    with picture(path, size_in, title, subtitle, foot, legend) as figure:
        axes = figure.subplots()
        shown = np.where(strike_YX > 0, strike_YX, np.nan).astype(np.float32)
        mesh = atlas.draw(axes, shown, (0.0, 1.0), "OrRd")
        axes.set_facecolor("white")
        bar = {"location": "bottom", "shrink": 0.5, "aspect": 45, "pad": 0.02}
        figure.colorbar(mesh, ax=axes, label="probability of a strike", **bar)
        for own in members:
            for track in own:
                _draw(axes, track, color=MEMBER, lw=0.7, alpha=0.8)
        for track in tracks.get(TRUE_TRACKS, ()):
            longitude = _draw(axes, track, color=TRUTH, lw=1.8)
            axes.plot(longitude[0], track.points[0, LATITUDE], "o", color=TRUTH, ms=3.5)
            if track.name:
                axes.annotate(track.name, (longitude[0], track.points[0, LATITUDE]), size=7, color=TRUTH)


def _draw(axes: Any, track: Track, **look: Any) -> Array:
    """Draw a track, cut where it leaves the map at 180 degrees; return its longitudes on the map."""
    longitude = (track.points[:, LONGITUDE] + 180.0) % 360.0 - 180.0
    cuts = np.flatnonzero(np.abs(np.diff(longitude)) > 180.0) + 1
    for x, y in zip(np.split(longitude, cuts), np.split(track.points[:, LATITUDE], cuts)):
        axes.plot(x, y, **look)
    return longitude


def plot_track_errors(scores: TrackScores, title: str, path: Path) -> None:
    """Draw errors of place, pressure and wind against lead time; where no cyclone was matched, nothing."""
    wind = bool(np.isfinite(scores.wind_mae_m_s).any())
    panels: list[tuple[str, list[tuple[str, Array, str]]]] = [
        (
            "track error (km)",
            [("members", scores.distance_km, MEMBER), ("their mean place", scores.mean_distance_km, MEAN)],
        ),
        (
            "pressure (hPa)",
            [
                ("mean absolute error", scores.pressure_mae_pa / 100.0, MEAN),
                ("bias", scores.pressure_bias_pa / 100.0, SPREAD),
            ],
        ),
        (
            "wind (m/s)",
            [
                ("mean absolute error", scores.wind_mae_m_s, MEAN),
                ("bias", scores.wind_bias_m_s, SPREAD),
            ],
        ),
    ][: 3 if wind else 2]
    rate = f"{scores.hit_rate:.0%}" if scores.cyclones else "none to hit"
    subtitle = f"true cyclones: {scores.cyclones} (from {scores.truth}); members hit {rate}"
    with picture(path, (3.4 * len(panels), 2.6), title, subtitle) as figure:
        for axes, (heading, lines) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
            for label, values, colour in lines:
                axes.plot(scores.lead_h, values, "o-", label=label, color=colour, ms=3)
            axes.axhline(0.0, color="#9aa5b1", lw=0.8)
            axes.set_title(heading)
            axes.legend(fontsize=7.5)
            lead_axis(axes, scores.lead_h)
