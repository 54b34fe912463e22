"""Extremes: how often an event happened when it was forecast with a probability, and the ROC curve."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from aeris.scores.display import lead_text
from aeris.scores.events import Events, event_name
from aeris.scores.plots.figure import MEAN, PERSISTENCE, QUIET, SPREAD, picture
from aeris.scores.scorecard import Scorecard

_WANTED = (0.1, 0.95)
_COLOURS = (MEAN, SPREAD, PERSISTENCE, "#8e5bb5")


def shown_quantiles(quantiles: tuple[float, ...]) -> list[int]:
    """Return the numbers of the quantiles to draw: a low and a high one where there are both."""
    found = [number for number, quantile in enumerate(quantiles) if quantile in _WANTED]
    return found or list(range(min(2, len(quantiles))))


def _reliability(axes: Any, events: Events, lead: int, row: int, col: int, colour: str) -> None:
    """Draw the observed frequency by share of members; the area of a mark says how many forecasts."""
    observed, share = (one[lead, row, col] for one in events.reliability())
    axes.plot(events.probability_K, observed, color=colour)
    axes.scatter(events.probability_K, observed, 4 + 120 * share, color=colour, edgecolors="white", zorder=3)


def _roc(axes: Any, events: Events, lead: int, row: int, col: int, colour: str) -> None:
    """Draw hit rate against false-alarm rate."""
    false, hits = (one[lead, row, col] for one in events.roc())
    axes.plot(false, hits, color=colour, marker="o", markersize=3)


def plot_extremes(card: Scorecard, path: Path, lead: int, most: int = 5) -> None:
    """Draw reliability and ROC of a low and a high extreme of up to `most` channels at lead number `lead`.

    Raises:
        ValueError: the scorecard has no events.
    """
    events = card.events
    if events is None:
        raise ValueError("there are no events to draw")
    rows = range(min(most, len(events.channels)))
    cols = shown_quantiles(events.quantiles)
    colours = dict(zip(cols, _COLOURS))
    legend = {event_name(events.quantiles[col]): {"color": colours[col]} for col in cols}
    subtitle = (
        f"extremes beyond quantiles of the local climatology, {lead_text(card.lead_h[lead])} ahead; "
        "larger marks: more forecasts"
    )
    size_in = (max(2.5 * len(rows), 7.0), 5.2)
    with picture(path, size_in, card.title, subtitle, card.conditions()[0], legend) as figure:
        grid = figure.subplots(2, len(rows), squeeze=False, sharex=True, sharey=True)
        for row in rows:
            for axes, draw in zip(grid[:, row], (_reliability, _roc)):
                axes.plot([0, 1], [0, 1], color=QUIET, linewidth=0.8)
                for col in cols:
                    draw(axes, events, lead, row, col, colours[col])
                axes.set_xlim(-0.03, 1.03)
                axes.set_ylim(-0.03, 1.03)
                axes.set_xticks(np.linspace(0, 1, 3))
                axes.set_yticks(np.linspace(0, 1, 3))
            grid[0, row].set_title(card.names[events.channels[row]])
            grid[0, row].tick_params(labelbottom=True)
            grid[0, row].set_xlabel("share of members")
            grid[1, row].set_xlabel("false-alarm rate")
        grid[0, 0].set_ylabel("observed frequency")
        grid[1, 0].set_ylabel("hit rate")
