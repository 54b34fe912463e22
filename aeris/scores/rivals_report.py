"""Forecasts side by side as tables, as comparison.json and .csv, and as pictures plots/against*.png."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import os
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from aeris.scores.comparison import comparison_table
from aeris.scores.display import headline_channels
from aeris.scores.plots.reference import plot_beside, plot_differences
from aeris.scores.report import plain
from aeris.scores.rivals import Contest


def write_contest(contest: Contest, directory: Path) -> list[Path]:
    """Write comparison.json and comparison.csv, each whole or not at all, and return their paths."""
    text = io.StringIO()
    writer = csv.DictWriter(text, ["system", "channel", "lead_h", "metric", "value"], lineterminator="\n")
    writer.writeheader()
    for comparison in contest.comparisons.values():
        writer.writerows(record | {"value": f"{record['value']:.8g}"} for record in comparison.records())
    contents = {
        "comparison.json": json.dumps(plain(contest.as_json()), indent=1, allow_nan=False) + "\n",
        "comparison.csv": text.getvalue(),
    }
    for name, content in contents.items():
        part = directory / f"{name}.partial"
        part.write_text(content)
        os.replace(part, directory / name)
    return [directory / name for name in contents]


def print_contest(contest: Contest, console: Console, most: int = 8) -> None:
    """Print a table for each score, of up to `most` channels."""
    for comparison in contest.comparisons.values():
        places = headline_channels([one.name for one in comparison.channels], most)
        shown = dataclasses.replace(
            comparison,
            channels=tuple(comparison.channels[place] for place in places),
            ours_JC=comparison.ours_JC[:, places],
            others={name: values_JC[:, places] for name, values_JC in comparison.others.items()},
        )
        console.print(comparison_table(shown))
    for note in next(iter(contest.comparisons.values())).notes:
        console.print(note, style="dim", highlight=False, markup=False, soft_wrap=True)


def draw_contest(
    contest: Contest, directory: Path, advance: Callable[[str], None] = lambda words: None
) -> list[Path]:
    """Draw curves of all scores, and the relative differences of RMSE and CRPS, and return the paths."""
    paths = [directory / "against.png"]
    plot_beside(list(contest.comparisons.values()), paths[0])
    for metric, comparison in contest.comparisons.items():
        if comparison.has_difference:
            paths.append(directory / f"against_{metric}.png")
            plot_differences(comparison, paths[-1], list(comparison.others))
    for path in paths:
        advance(path.name)
    return paths
