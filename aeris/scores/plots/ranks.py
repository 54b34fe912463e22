"""Rank histograms: where the truth falls among the sorted members. Flat is right, U too little spread."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from aeris.scores.display import headline_channels, lead_text, spread_out
from aeris.scores.plots.figure import MEAN, SPREAD, picture
from aeris.scores.scorecard import Scorecard


def plot_ranks(card: Scorecard, path: Path, most: int = 5, most_leads: int = 3) -> None:
    """Draw rank histograms of up to `most` channels (columns) at up to `most_leads` lead times (rows).

    Heights are relative to a flat histogram: 2 means twice as often as in a calibrated ensemble.
    """
    places = headline_channels(card.names, most)
    leads = spread_out(len(card.lead_h), most_leads)
    ranks_JCS = card.ranks_JCS * card.ranks_JCS.shape[-1]
    subtitle = "rank of the truth among the members; flat: calibrated, U: too little spread, dome: too much"
    foot = card.conditions()[0] + "; heights relative to a flat histogram, ties shared"
    size_in = (max(2.3 * len(places), 7.0), 1.75 * len(leads) + 0.3)
    with picture(path, size_in, card.title, subtitle, foot) as figure:
        grid = figure.subplots(len(leads), len(places), squeeze=False, sharex=True, sharey=True)
        for row, lead in enumerate(leads):
            for col, place in enumerate(places):
                axes, heights = grid[row, col], ranks_JCS[lead, place]
                axes.bar(range(len(heights)), heights, width=0.86, color=MEAN)
                axes.axhline(1, color=SPREAD, linewidth=1.3)
                axes.grid(axis="x", visible=False)
                axes.set_xticks(np.unique(np.linspace(0, card.members, 5).round().astype(int)))
                if row == 0:
                    axes.set_title(card.names[place])
            beside = {"weight": "bold", "rotation": 0, "ha": "right", "va": "center"}
            grid[row, 0].set_ylabel(lead_text(card.lead_h[lead]), **beside)
        for axes in grid[-1]:
            axes.set_xlabel("members below the truth")
