"""Time-longitude sections of truth and members, and the Nino 3.4 index against lead time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from aeris.scores.display import display_unit, time_text
from aeris.scores.hovmoller import Hovmoller
from aeris.scores.plots import figure as look
from aeris.scores.plots.figure import lead_axis, picture

_PANEL_IN = (2.6, 3.3)


def _latitude(degrees: float) -> str:
    return f"{abs(degrees):.3g}{'N' if degrees > 0 else 'S' if degrees < 0 else ''}"


def _longitude(degrees: float) -> str:
    around = (degrees + 180.0) % 360.0 - 180.0
    return f"{abs(around):g}{'E' if 0 < around < 180 else 'W' if -180 < around < 0 else ''}"


def _days(axes: Any, lead_h: tuple[int, ...]) -> None:
    """Label a y axis of hours that runs downward."""
    last = max(lead_h)
    days = last / 24
    step = next((step for step in (1, 2, 5, 10, 20, 30) if days / step <= 10), 60)
    axes.set_yticks(range(0, last + 1, 24 * step), [str(day) for day in range(0, last // 24 + 1, step)])
    axes.set_ylim(last, min(lead_h))


def plot_hovmoller(found: Hovmoller, path: Path, title: str) -> None:
    """Draw a row per channel: truth where there is one, then members; lead time runs downward."""
    members, channels = found.member_MHJX.shape[:2]
    sections = {"truth": found.truth_HJX} | {
        f"member {number}": found.member_MHJX[number] for number in range(members)
    }
    if not np.isfinite(found.truth_HJX).any():
        del sections["truth"]
    rows = _latitude(found.band_deg[0]) + "-" + _latitude(found.band_deg[1])
    subtitle = f"difference from climatology, mean over {rows}, init {time_text(found.init)}"
    size_in = (max(_PANEL_IN[0] * len(sections) + 1.0, 6.5), _PANEL_IN[1] * channels + 0.2)
    with picture(path, size_in, title, subtitle, f"climatology: {found.climatology}") as figure:
        grid = figure.subplots(channels, len(sections), squeeze=False, sharex=True, sharey=True)
        for row, channel in enumerate(found.channels):
            factor, unit = display_unit(channel.units)
            fields = [field[row] * factor for field in sections.values()]
            known = np.concatenate([np.abs(field[np.isfinite(field)]) for field in fields])
            top = float(np.percentile(known, 99)) if known.size else 1.0
            for axes, field in zip(grid[row], fields):
                shown = np.ma.masked_invalid(field)
                scale = {"cmap": "RdBu_r", "vmin": -(top or 1e-9), "vmax": top or 1e-9, "shading": "nearest"}
                mesh = axes.pcolormesh(found.longitude_deg, found.lead_h, shown, **scale)
                axes.set_xticks((0, 90, 180, 270), [_longitude(mark) for mark in (0, 90, 180, 270)])
                axes.grid(False)
            grid[row, 0].set_ylabel("lead time (days)")
            bar = figure.colorbar(mesh, ax=grid[row].tolist(), extend="both", aspect=30, pad=0.02)
            bar.set_label(f"{channel.name}  ({unit})")
            bar.outline.set_visible(False)
            bar.ax.grid(False)
        _days(grid[0, 0], found.lead_h)
        for axes, name in zip(grid[0], sections):
            axes.set_title(name)


def plot_nino34(found: Hovmoller, path: Path, title: str, most: int = 6) -> None:
    """Draw the Nino 3.4 index of every member and of the truth, a panel for each of some init times.

    Raises:
        ValueError: the forecast has no sea surface temperature in the Nino 3.4 box.
    """
    if not np.isfinite(found.nino34_IMJ).any():
        raise ValueError("no Nino 3.4 index: the forecast has no sea surface temperature there")
    inits = list(range(min(most, len(found.nino34_IMJ))))
    cols = min(3, len(inits))
    rows = -(-len(inits) // cols)
    lines: dict[str, dict[str, Any]] = {
        "truth": {"color": look.TRUTH, "linewidth": 2.0},
        "ensemble mean": {"color": look.MEAN},
        "members": {"color": look.MEMBER, "linewidth": 0.7, "alpha": 0.8},
    }
    subtitle = "Niño 3.4: sea surface temperature, 5S-5N 170W-120W, difference from climatology (K)"
    foot = f"climatology: {found.climatology}"
    with picture(path, (max(3.2 * cols, 6.5), 2.3 * rows), title, subtitle, foot, lines) as figure:
        grid = figure.subplots(rows, cols, squeeze=False, sharey=True)
        for axes in grid.ravel()[len(inits) :]:
            axes.set_axis_off()
        for axes, init in zip(grid.ravel(), inits):
            for member_J in found.nino34_IMJ[init]:
                axes.plot(found.lead_h, member_J, **lines["members"])
            axes.plot(found.lead_h, found.nino34_IMJ[init].mean(axis=0), **lines["ensemble mean"])
            axes.plot(found.lead_h, found.nino34_truth_IJ[init], **lines["truth"])
            axes.axhline(0, color=look.QUIET, linewidth=0.8)
            axes.set_title(f"init number {init}")
            lead_axis(axes, found.lead_h)
