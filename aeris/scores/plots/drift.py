"""Pictures of a long forecast: global means and variances against lead time, and spectra beside the truth."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aeris.scores.display import display_unit, headline_channels
from aeris.scores.drift import Drift
from aeris.scores.plots import figure as look
from aeris.scores.plots.figure import lead_axis, picture
from aeris.scores.stability import SCALES

Array = NDArray[np.float64]

_LINES: dict[str, dict[str, Any]] = {
    "truth": {"color": look.TRUTH, "linewidth": 1.6},
    "forecast": {"color": look.MEAN, "linewidth": 1.8},
    "climatology": {"color": look.CLIMATOLOGY, "linestyle": "--", "linewidth": 1.4},
}
_MEMBER = {"color": look.MEMBER, "linewidth": 0.7, "alpha": 0.7}
# Colours always span a factor of 4 up and down.
_OCTAVES = 2.0


def _subtitle(drift: Drift, words: str) -> str:
    many = f"{drift.inits} init times" if drift.inits > 1 else "one init time"
    return f"{words}; {drift.members} members, {many}"


def _courses(axes: Any, drift: Drift, curves: dict[str, Array], factor: float) -> None:
    """Draw truth, forecast and climatology of one quantity [J] against lead time."""
    for name, values_J in curves.items():
        known_J = np.isfinite(values_J)
        if known_J.any():
            lead_h = np.array(drift.lead_h)[known_J]
            axes.plot(lead_h, values_J[known_J] * factor, **_LINES[name])
    lead_axis(axes, drift.lead_h)


def _draw_means(axes: Any, drift: Drift, place: int, factor: float) -> None:
    for member_J in drift.member_mean_JMC[:, :, place].T:
        axes.plot(drift.lead_h, np.where(np.isfinite(member_J), member_J * factor, np.nan), **_MEMBER)
    parts = {"truth": drift.truth, "forecast": drift.forecast, "climatology": drift.usual}
    _courses(axes, drift, {name: part.mean[:, place] for name, part in parts.items()}, factor)


def _draw_roots(name: str) -> Callable[[Any, Drift, int, float], None]:
    """Return a function that draws the root of a mean square of `Course`."""

    def draw(axes: Any, drift: Drift, place: int, factor: float) -> None:
        parts = {"truth": drift.truth, "forecast": drift.forecast, "climatology": drift.usual}
        roots = {key: np.sqrt(getattr(part, name)[:, place]) for key, part in parts.items()}
        _courses(axes, drift, roots, factor)
        axes.set_ylim(bottom=0)

    return draw


def _draw_ends(axes: Any, drift: Drift, place: int, factor: float) -> None:
    """Draw the largest and the smallest value."""
    for end in ("low", "high"):
        parts = {"truth": drift.truth, "forecast": drift.forecast}
        _courses(axes, drift, {key: getattr(part, end)[:, place] for key, part in parts.items()}, factor)


def plot_drift(drift: Drift, path: Path, title: str, most: int = 5) -> None:
    """Draw global mean, anomaly, area standard deviation and extremes of up to `most` channels."""
    places = headline_channels([one.name for one in drift.channels], most)
    rows: tuple[tuple[str, Callable[[Any, Drift, int, float], None]], ...] = (
        ("global mean", _draw_means),
        ("RMS anomaly", _draw_roots("anomaly")),
        ("area std", _draw_roots("variance")),
        ("lowest, highest", _draw_ends),
    )
    legend = {**_LINES, "single members": _MEMBER}
    size_in = (max(2.75 * len(places), 7.5), 1.95 * len(rows))
    subtitle = _subtitle(drift, "stability of a long forecast")
    foot = f"climatology: {drift.climatology}"
    with picture(path, size_in, title, subtitle, foot, legend) as figure:
        grid = figure.subplots(len(rows), len(places), squeeze=False)
        for col, place in enumerate(places):
            factor, unit = display_unit(drift.channels[place].units)
            grid[0, col].set_title(f"{drift.channels[place].name}  ({unit})")
            for row, (_, draw) in enumerate(rows):
                draw(grid[row, col], drift, place, factor)
                grid[row, col].ticklabel_format(axis="y", useOffset=False)
                if row < len(rows) - 1:
                    grid[row, col].set_xlabel("")
                    grid[row, col].set_xticklabels([])
        for row, (label, _) in enumerate(rows):
            grid[row, 0].set_ylabel(label)


def plot_spectrum_drift(drift: Drift, path: Path, title: str, most: int = 6) -> None:
    """Draw zonal power over that of the truth, colours by wavenumber and lead time.

    Raises:
        ValueError: there are no spectra of both.
    """
    ratio_QCK = drift.spectrum_ratio_QCK()
    known = [place for place in range(len(drift.channels)) if np.isfinite(ratio_QCK[:, place]).any()]
    if not known:
        raise ValueError("no spectra to draw: there is no truth, or no row between 30 and 60 degrees")
    chosen = headline_channels([drift.channels[place].name for place in known], most)
    places = [known[number] for number in chosen]
    lead_h = np.array([np.mean([drift.lead_h[lead] for lead in group]) for group in drift.spectrum_leads])
    cols = min(3, len(places))
    rows = -(-len(places) // cols)
    subtitle = _subtitle(drift, "zonal power at 30-60 degrees / that of the truth")
    size_in = (max(3.4 * cols, 7.5), 2.4 * rows + 0.5)
    with picture(path, size_in, title, subtitle) as figure:
        grid = figure.subplots(rows, cols, squeeze=False)
        for axes in grid.ravel()[len(places) :]:
            axes.set_axis_off()
        for axes, place in zip(grid.ravel(), places):
            mesh = _draw_ratio(axes, drift, lead_h, ratio_QCK[:, place])
            axes.set_title(drift.channels[place].name)
        for row in grid:
            row[0].set_ylabel("wavenumber")
        bar = figure.colorbar(mesh, ax=grid.ravel().tolist(), extend="both", aspect=40, pad=0.02)
        bar.set_ticks((-2, -1, 0, 1, 2), labels=["1/4", "1/2", "1", "2", "4"])
        bar.outline.set_visible(False)
        bar.ax.grid(False)


def _draw_ratio(axes: Any, drift: Drift, lead_h: Array, ratio_QK: Array) -> Any:
    positive = ratio_QK > 0
    octaves_QK = np.log2(np.where(positive, ratio_QK, 1.0))
    shown = np.ma.masked_where(~positive, octaves_QK).T
    # the groups touch on a logarithmic axis
    inner = np.sqrt(drift.wave_K[:-1] * drift.wave_K[1:])
    edge_K = np.concatenate([[drift.wave_K[0] * 0.75], inner, [drift.wave_K[-1] * 1.05]])
    half = np.diff(lead_h, append=lead_h[-1] + (lead_h[-1] - lead_h[0]) / max(1, len(lead_h) - 1)) / 2
    edge_Q = np.concatenate([[max(0.0, lead_h[0] - half[0])], lead_h[:-1] + half[:-1], [lead_h[-1]]])
    if edge_Q[-1] <= edge_Q[-2]:
        edge_Q[-1] = edge_Q[-2] + 1.0
    mesh = axes.pcolormesh(edge_Q, edge_K, shown, cmap="RdBu_r", vmin=-_OCTAVES, vmax=_OCTAVES)
    for first, _ in list(SCALES.values())[1:]:
        axes.axhline(first - 0.5, color=look.QUIET, linewidth=0.7, linestyle=":")
    axes.set_yscale("log")
    marks = [mark for mark in (1, 2, 5, 10, 20, 50, 100, 200, 500) if mark < edge_K[-1]]
    axes.set_yticks(marks, [str(mark) for mark in marks])
    axes.minorticks_off()
    lead_axis(axes, drift.lead_h)
    axes.set_xlim(edge_Q[0], edge_Q[-1])
    axes.grid(False)
    return mesh
