"""Zonal power spectra of truth, members and ensemble mean, and their ratio to the truth.

The mean (k = 0) and the last wavenumber, of which the grid holds only half (k = X/2), are not drawn.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from aeris.scores.display import display_unit, headline_channels, lead_text
from aeris.scores.plots.figure import MEAN, MEMBER, QUIET, TRUTH, picture
from aeris.scores.scorecard import Scorecard
from aeris.scores.spectra import Spectra

_LINES: dict[str, dict[str, Any]] = {
    "truth": {"color": TRUTH, "linewidth": 2.4},
    "members": {"color": MEMBER},
    "ensemble mean": {"color": MEAN, "linestyle": (0, (4, 1.5))},
}


def _wavelength_axis(axes: Any, spectra: Spectra) -> None:
    """Put the wavelength on top of an axis of wavenumbers."""
    last = spectra.truth_JCK.shape[-1] - 1
    around_km = float(spectra.wavelength_km()[1])
    # matplotlib tries values of 0 on either side
    top = axes.secondary_xaxis("top", functions=(lambda k: around_km / np.maximum(k, 1e-9),) * 2)
    marks = [km for km in (20000, 10000, 5000, 2000, 1000, 500, 200, 100, 50) if km > around_km / last]
    top.set_xticks(marks, [f"{km:,}" for km in marks], size=7.5, color=QUIET)
    top.minorticks_off()
    top.tick_params(length=2, pad=1)
    top.spines[:].set_visible(False)
    top.set_xlabel("wavelength (km)", size=8, color=QUIET)


def _draw_power(axes: Any, spectra: Spectra, lead: int, place: int, factor: float) -> None:
    """Draw power against wavenumber from 1 on, both axes logarithmic."""
    powers = (spectra.truth_JCK, spectra.member_JCK, spectra.mean_JCK)
    for power_JCK, look in zip(powers, _LINES.values()):
        power = power_JCK[lead, place, 1:-1] * factor**2
        axes.loglog(np.arange(1, len(power) + 1), np.where(power > 0, power, np.nan), **look)
    axes.set_xlim(0.93, spectra.truth_JCK.shape[-1] * 1.05)
    _wavelength_axis(axes, spectra)


def _draw_ratio(axes: Any, spectra: Spectra, lead: int, place: int) -> None:
    """Draw power over that of the truth, at most a factor of 10 up and down."""
    truth = spectra.truth_JCK[lead, place, 1:-1]
    wavenumber = np.arange(1, len(truth) + 1)
    axes.axhline(1, **_LINES["truth"])
    for power, name in ((spectra.member_JCK, "members"), (spectra.mean_JCK, "ensemble mean")):
        shown = power[lead, place, 1:-1]
        used = (truth > 0) & (shown > 0)
        ratio = np.divide(shown, truth, out=np.full_like(truth, np.nan), where=used)
        axes.loglog(wavenumber, ratio, **_LINES[name])
    axes.set_ylim(0.1, 10)
    axes.set_yticks([0.1, 0.5, 1, 2, 10], ["0.1", "0.5", "1", "2", "10"])
    axes.set_xlabel("zonal wavenumber")
    marks = [mark for mark in (1, 2, 5, 10, 20, 50, 100, 200, 500) if mark <= len(truth)]
    axes.set_xticks(marks, [str(mark) for mark in marks])
    axes.minorticks_off()


def plot_spectra(card: Scorecard, path: Path, lead: int, most: int = 4) -> None:
    """Draw the spectra of up to `most` channels at lead number `lead`.

    Raises:
        ValueError: the scorecard has no spectra (a grid that is no full circle), or none without gaps.
    """
    spectra = card.spectra
    if spectra is None or not np.isfinite(spectra.truth_JCK[lead]).all(axis=-1).any():
        raise ValueError("there are no spectra to draw")
    whole = np.flatnonzero(np.isfinite(spectra.truth_JCK[lead]).all(axis=-1)).tolist()
    places = [whole[number] for number in headline_channels([card.names[place] for place in whole], most)]
    subtitle = f"zonal power spectra, 30-60° north and south, {lead_text(card.lead_h[lead])} ahead"
    size_in = (max(3.0 * len(places), 6.0), 4.9)
    with picture(path, size_in, card.title, subtitle, card.conditions()[0], _LINES) as figure:
        grid = figure.subplots(2, len(places), squeeze=False, sharex="col", height_ratios=[2.3, 1.2])
        for col, place in enumerate(places):
            factor, unit = display_unit(card.channels[place].units)
            _draw_power(grid[0, col], spectra, lead, place, factor)
            _draw_ratio(grid[1, col], spectra, lead, place)
            grid[0, col].set_title(f"{card.names[place]}  ({unit})")
            distance = card.values["lsd_member"][lead, place]
            text = f"members {distance:.1f} dB from truth"
            grid[0, col].text(0.05, 0.05, text, transform=grid[0, col].transAxes, size=8, color=QUIET)
        grid[0, 0].set_ylabel("power (unit² m)")
        grid[1, 0].set_ylabel("ratio to truth")
