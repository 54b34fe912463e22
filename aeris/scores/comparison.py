"""A score of one forecast beside the same score of others: numbers, and a table.

The others may be published models (aeris/scores/reference.py), baselines, or forecasts of our own. All were
compared with the same truth; who makes a `Comparison` sees to that.

Legend: C channels, J lead times.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich import box
from rich.table import Table

from aeris.data.variables import Channel
from aeris.scores.display import display_unit, lead_text, spread_out

Array = NDArray[np.float64]

LABELS = {
    "rmse": "RMSE",
    "rmse_member": "RMSE of a single member",
    "rmse_unbiased": "unbiased RMSE of the mean",
    "bias": "bias",
    "acc": "ACC",
    "crps": "fair CRPS",
    "ssr": "unbiased spread/skill ratio",
}
"""Names of scores as readers know them."""
_WITHOUT_UNIT = ("acc", "ssr")
_LEADS_IN_TABLE = 8
# Lead times papers report, shown alone where there are too many.
_DAYS_H = (24, 72, 120, 168, 240, 336)


@dataclass(frozen=True)
class Comparison:
    """One score of a forecast beside that of others, at the lead times of the forecast."""

    metric: str
    title: str
    truth: str
    """What all of them were compared with."""
    lead_h: tuple[int, ...]
    channels: tuple[Channel, ...]
    ours_JC: Array
    others: Mapping[str, Array]
    """Name -> [J, C], NaN where there is no number."""
    notes: tuple[str, ...] = ()
    source: str = ""
    """Where the numbers of the others come from."""

    def difference_JC(self, other: str) -> Array:
        """Return ours / theirs - 1, of ACC (1 - ours) / (1 - theirs) - 1: below 0 ours is better."""
        ours, theirs = self.ours_JC, self.others[other]
        if self.metric == "acc":
            ours, theirs = 1 - ours, 1 - theirs
        positive = np.isfinite(theirs) & (theirs > 0)
        return np.divide(ours, theirs, out=np.full_like(ours, np.nan), where=positive) - 1.0

    def unit(self, place: int) -> tuple[float, str]:
        """Return (factor, text) to show the score of channel number `place`."""
        return (1.0, "") if self.metric in _WITHOUT_UNIT else display_unit(self.channels[place].units)

    @property
    def has_difference(self) -> bool:
        """Whether smaller is better, or has been made so; not of a bias or a spread/skill ratio."""
        return self.metric not in ("bias", "ssr")

    def records(self) -> list[dict[str, Any]]:
        """Return one record per system, channel and lead time, SI units; what does not exist is left out."""
        return [
            {
                "system": name,
                "channel": one.name,
                "lead_h": lead_h,
                "metric": self.metric,
                "value": float(value),
            }
            for name, values_JC in {"this forecast": self.ours_JC, **self.others}.items()
            for place, one in enumerate(self.channels)
            for lead_h, value in zip(self.lead_h, values_JC[:, place])
            if np.isfinite(value)
        ]


def comparison_table(comparison: Comparison) -> Table:
    """Return a table: rows are channels and systems, columns lead times.

    A cell of another system is its score and how far ours is from it, green where ours is better.
    """
    words = f"{LABELS.get(comparison.metric, comparison.metric)} against {comparison.truth}"
    look: dict[str, Any] = {"title_justify": "left", "title_style": "bold", "box": box.SIMPLE_HEAD}
    table = Table(title=f"{comparison.title}: {words}", pad_edge=False, padding=(0, 1, 0, 0), **look)
    used = [lead for lead in range(len(comparison.lead_h)) if np.isfinite(_theirs(comparison, lead)).any()]
    days = [lead for lead in used if comparison.lead_h[lead] in _DAYS_H]
    leads = days if len(used) > _LEADS_IN_TABLE and len(days) > 2 else used
    leads = [leads[number] for number in spread_out(len(leads), _LEADS_IN_TABLE)]
    table.add_column("channel", no_wrap=True)
    table.add_column("system", no_wrap=True)
    for lead in leads:
        table.add_column(lead_text(comparison.lead_h[lead]), justify="right", no_wrap=True)
    differences = {name: comparison.difference_JC(name) for name in comparison.others}
    for place, one in enumerate(comparison.channels):
        factor, unit = comparison.unit(place)
        ours = [_number(comparison.ours_JC[lead, place] * factor) for lead in leads]
        table.add_row(f"{one.name} {unit}".strip(), "this forecast", *ours, style="bold")
        for name, theirs_JC in comparison.others.items():
            if np.isfinite(theirs_JC[leads, place]).any():
                values = [_number(theirs_JC[lead, place] * factor) for lead in leads]
                if comparison.has_difference:
                    shown = [_percent(differences[name][lead, place]) for lead in leads]
                    values = [f"{value} {percent}".rstrip() for value, percent in zip(values, shown)]
                table.add_row("", name, *values)
    return table


def _theirs(comparison: Comparison, lead: int) -> Array:
    return np.stack([values_JC[lead] for values_JC in comparison.others.values()])


def _number(value: float) -> str:
    """Return three significant digits, "-" for NaN."""
    if not np.isfinite(value):
        return "-"
    size = math.floor(math.log10(abs(value))) if value else 0
    return f"{value:.{min(6, max(0, 2 - size))}f}"


def _percent(difference: float) -> str:
    """Return how far ours is from theirs, "[green]-12%[/]"."""
    if not np.isfinite(difference):
        return ""
    colour = "green" if difference < -0.005 else "red" if difference > 0.005 else "yellow"
    text = f"{100 * difference:+.0f}%" if abs(difference) >= 0.005 else "0%"
    return f"[{colour}]{text}[/]"
