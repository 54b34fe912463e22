"""Zonal power of members and ensemble mean over that of the truth, a panel per band of latitude."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from aeris.scores.display import headline_channels, lead_text
from aeris.scores.plots.figure import MEAN, MEMBER, QUIET, picture
from aeris.scores.scorecard import Scorecard
from aeris.scores.spectra import MID_LATITUDES

_TITLES = {"tropics": "20S-20N", "30-60N": "30-60N", "30-60S": "30-60S", "polar": "60-90 N and S"}


def plot_bands(card: Scorecard, path: Path, lead: int, most: int = 4) -> None:
    """Draw the power ratio of up to `most` channels (rows) in each band (columns) at lead number `lead`.

    Raises:
        ValueError: no channel has spectra at that lead time.
    """
    bands = {name: spectra for name, spectra in card.bands.items() if name != MID_LATITUDES}
    whole = [
        place
        for place in range(len(card.names))
        if any(np.isfinite(spectra.truth_JCK[lead, place]).all() for spectra in bands.values())
    ]
    if not whole:
        raise ValueError("there are no spectra to draw")
    places = [whole[number] for number in headline_channels([card.names[place] for place in whole], most)]
    legend: dict[str, dict[str, Any]] = {
        "members": {"color": MEMBER},
        "ensemble mean": {"color": MEAN, "linestyle": (0, (4, 1.5))},
    }
    subtitle = f"zonal power over that of the truth, {lead_text(card.lead_h[lead])} ahead"
    size_in = (2.4 * len(bands) + 0.6, 1.75 * len(places) + 0.3)
    with picture(path, size_in, card.title, subtitle, card.conditions()[0], legend) as figure:
        grid = figure.subplots(len(places), len(bands), squeeze=False, sharex=True, sharey=True)
        for col, (name, spectra) in enumerate(bands.items()):
            for row, place in enumerate(places):
                axes, truth = grid[row, col], spectra.truth_JCK[lead, place, 1:-1]
                axes.axhline(1, color=QUIET, linewidth=1)
                for power, look in zip((spectra.member_JCK, spectra.mean_JCK), legend.values()):
                    shown = power[lead, place, 1:-1]
                    used = (truth > 0) & (shown > 0)
                    ratio = np.divide(shown, truth, out=np.full_like(truth, np.nan), where=used)
                    axes.loglog(np.arange(1, len(truth) + 1), ratio, **look)
                axes.set_ylim(0.1, 10)
                axes.set_yticks([0.1, 0.5, 1, 2, 10], ["0.1", "0.5", "1", "2", "10"])
                marks = [mark for mark in (1, 2, 5, 10, 20, 50, 100, 200, 500) if mark <= len(truth)]
                axes.set_xticks(marks, [str(mark) for mark in marks])
                axes.minorticks_off()
                if col == 0:
                    beside = {"weight": "bold", "rotation": 0, "ha": "right", "va": "center"}
                    axes.set_ylabel(card.names[place], **beside)
            grid[0, col].set_title(_TITLES.get(name, name))
            grid[-1, col].set_xlabel("zonal wavenumber")
