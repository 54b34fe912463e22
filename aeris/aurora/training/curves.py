"""The curves of a run: RMSE and MAE of the main variables at every step of a roll-out, from its log."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from aeris.aurora.training.errors import split_name
from aeris.scores.plots.figure import MEAN, SPREAD, picture, require_matplotlib

SHOWN_LEVELS_HPA = (850, 500, 250)
_COLOURS = (MEAN, SPREAD, "#3b8f6f", "#8a5fb0", "#b5485d", "#6b7683")


def read_scores(log_path: Path) -> list[dict[str, Any]]:
    """Return the records of a run's log that have scores, oldest first.

    Raises:
        ValueError: there are none.
    """
    records = []
    for line in log_path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break  # the line a killed run was writing
    found = [record for record in records if "scores" in record]
    if not found:
        raise ValueError(f"{log_path} has no scores yet")
    return found


def plot_curves(log_path: Path, out: Path) -> None:
    """Draw RMSE and MAE of the main variables, in training and validation, against images seen.

    Raises:
        ValueError: the log has no scores yet.
        NoMatplotlib: matplotlib is not installed.
    """
    require_matplotlib()
    records = read_scores(log_path)
    newest = [part["rmse"] for part in records[-1]["scores"].values()]
    names = shown_channels(list(newest[0]))
    steps = max(len(values) for part in newest for values in part.values())
    legend: dict[str, dict[str, Any]] = {
        "validation": {"color": "black"},
        "training, mean since the last": {"color": "black", "linestyle": ":"},
        **{f"step {step + 1}": {"color": _COLOURS[step % len(_COLOURS)]} for step in range(steps)},
    }
    title = f"Errors of {log_path.resolve().parent.name} while it learns"
    subtitle = "RMSE and MAE of each model step, weighted by the cosine of latitude, in SI units"
    size = (max(7.5, 2.4 * len(names)), 4.6)
    with picture(
        out, size, title, subtitle, legend=legend if steps > 1 else dict(list(legend.items())[:2])
    ) as figure:
        grid = figure.subplots(2, len(names), squeeze=False, sharex=True)
        for row, kind in enumerate(("rmse", "mae")):
            for col, name in enumerate(names):
                axes = grid[row, col]
                for part, look in (("training", ":"), ("validation", "-")):
                    for step, images, values in _lines(records, part, kind, name):
                        mark = "o" if len(images) < 12 else ""
                        face = {"markerfacecolor": "white"} if part == "training" else {}
                        colour = _COLOURS[step % len(_COLOURS)]
                        axes.plot(images, values, look, marker=mark, color=colour, **face)
                if row == 0:
                    axes.set_title(name)
                else:
                    axes.set_xlabel("images seen")
            grid[row, 0].set_ylabel(kind.upper())


def shown_channels(names: Sequence[str], most: int = 8) -> list[str]:
    """Choose the channels of a picture: surface variables, and the others at the levels nearest the usual."""
    surface = [name for name in names if split_name(name)[1] is None]
    levelled: dict[str, dict[float, str]] = {}
    for name in names:
        variable, level = split_name(name)
        if level is not None:
            levelled.setdefault(variable, {})[level] = name
    chosen = [
        levels[min(levels, key=lambda p: abs(p - wanted))]
        for wanted, variables in zip(SHOWN_LEVELS_HPA, (("t", "q", "u"), ("z", "t"), ("u", "v")))
        for variable, levels in levelled.items()
        if variable in variables
    ]
    chosen = chosen or [next(iter(levels.values())) for levels in levelled.values()]
    return list(dict.fromkeys([*surface[:4], *chosen]))[:most]


def _lines(
    records: Sequence[dict[str, Any]], part: str, kind: str, name: str
) -> Iterator[tuple[int, list[int], list[float]]]:
    """Give the curve of every step: its number, images seen and values."""
    curves: dict[int, tuple[list[int], list[float]]] = {}
    for record in records:
        for step, value in enumerate(record["scores"].get(part, {}).get(kind, {}).get(name, ())):
            if value is not None:
                images, values = curves.setdefault(step, ([], []))
                images.append(record["images_seen"])
                values.append(value)
    for step, (images, values) in sorted(curves.items()):
        yield step, images, values
