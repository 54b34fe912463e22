"""RMSE and MAE of every variable and level at every step of a roll-out, and their curves over a run.

Both weigh points by the cosine of latitude. RMSE is the root of the mean square over samples and points, MAE
the mean; points where the truth is missing are left out, samples without any known point too.

Shapes: B batch, K steps, C channels (a variable, at a level if it has levels), H rows, W columns.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aeris.aurora.batch import Batch, Metadata
from aeris.aurora.normalisation import level_name
from aeris.scores.plots.figure import MEAN, SPREAD, picture, require_matplotlib
from swipe.collectives import Group, all_reduce

SHOWN_LEVELS_HPA = (850, 500, 250)
_COLOURS = (MEAN, SPREAD, "#3b8f6f", "#8a5fb0", "#b5485d", "#6b7683")


class Scores:
    """Sums of squared and absolute errors, added up sample by sample on each rank.

    Attributes:
        names: of the channels, 2t or z500.
        total: [K, C, 3] float64, equal on all ranks: squares, absolutes, samples. Up to the last `fold`.
    """

    def __init__(
        self,
        surf_vars: Sequence[str],
        atmos_vars: Sequence[str],
        levels: Sequence[float],
        steps: int,
        device: torch.device | str = "cpu",
    ) -> None:
        """Start at zero."""
        self.names = [*surf_vars, *(_channel(name, p) for name in atmos_vars for p in levels)]
        self.surf_vars, self.atmos_vars = tuple(surf_vars), tuple(atmos_vars)
        self.total = torch.zeros(steps, len(self.names), 3, dtype=torch.float64, device=device)
        self._own = torch.zeros_like(self.total)  # of this rank since the last fold
        self._weights: dict[str, Tensor] = {}

    @torch.no_grad()
    def add(self, step: int, prediction: Batch, target: Batch) -> None:
        """Add the errors of a prediction of the step number `step`; nothing waits for the device."""
        weight = self._area(prediction.metadata)
        rows = [
            _errors(getattr(prediction, kind)[name], getattr(target, kind)[name], weight)
            for kind in ("surf_vars", "atmos_vars")
            for name in getattr(self, kind)
        ]
        self._own[step] += torch.cat(rows)

    def fold(self, group: Group) -> None:
        """Add what all ranks have added since the last time to `total`; a collective call."""
        self.total += all_reduce(self._own, group, "scores")
        self._own = torch.zeros_like(self.total)

    def clear(self) -> None:
        """Start again."""
        self.total.zero_()
        self._own.zero_()

    def result(self) -> dict[str, dict[str, list[float | None]]]:
        """Return {"rmse" | "mae": {channel: a number per step}} of `total`; None where nothing is known."""
        squares, absolutes, count = self.total.cpu().unbind(-1)
        numbers = {"rmse": (squares / count).sqrt(), "mae": absolutes / count}
        return {
            kind: {
                name: [x if x == x else None for x in values_KC[:, place].tolist()]
                for place, name in enumerate(self.names)
            }
            for kind, values_KC in numbers.items()
        }

    def _area(self, where: Metadata) -> Tensor:
        """Return the weights of points, [H, 1] or [H, W]: made once for a grid."""
        key = where.grid_key
        if key not in self._weights:
            weight = torch.cos(torch.deg2rad(where.lat)).clamp(min=0)
            weight = weight[:, None] if weight.dim() == 1 else weight
            self._weights = {key: weight.to(self.total.device, torch.float32)}
        return self._weights[key]


def _channel(name: str, level: float) -> str:
    """Name a variable at a level: z500, so2_850."""
    return f"{name}{'_' if name[-1].isdigit() else ''}{level_name(level)}"


def _errors(x: Tensor, truth: Tensor, weight: Tensor) -> Tensor:
    """Return the sums of a variable [C, 3] of x, truth [B, 1, H, W] or [B, 1, C, H, W]."""
    known = torch.isfinite(truth)
    apart = torch.where(known, x - torch.where(known, truth.to(x.dtype), 0.0), 0.0)
    weight = (weight * known).to(x.dtype)
    area = weight.sum((-2, -1))
    found = area > 0
    area = torch.where(found, area, 1.0)
    means = [(weight * error).sum((-2, -1)) / area for error in (apart.square(), apart.abs())]
    sums = torch.stack([*means, found.to(x.dtype)], dim=-1)  # [B, 1, 3] or [B, 1, C, 3]
    return sums.double().sum(0).reshape(-1, 3)


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
    newest = next(iter(records[-1]["scores"].values()))["rmse"]
    names = shown_channels(list(newest))
    steps = max(len(values) for values in newest.values())
    legend: dict[str, dict[str, Any]] = {
        "validation": {"color": MEAN},
        "training, mean since the last": {"color": MEAN, "linestyle": ":"},
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
    surface = [name for name in names if not _level(name)]
    levelled: dict[str, list[int]] = {}
    for name in names:
        if level := _level(name):
            levelled.setdefault(name.removesuffix(str(level)), []).append(level)
    chosen = [
        f"{variable}{min(levels, key=lambda p: abs(p - wanted))}"
        for wanted, variables in zip(SHOWN_LEVELS_HPA, (("t", "q", "u"), ("z", "t"), ("u", "v")))
        for variable, levels in levelled.items()
        if variable in variables
    ]
    chosen = chosen or [f"{variable}{levels[0]}" for variable, levels in levelled.items()]
    return list(dict.fromkeys([*surface[:4], *chosen]))[:most]


def _level(name: str) -> int | None:
    """Return the level in a channel's name; a single digit at the end is of a molecule."""
    digits = len(name) - len(name.rstrip("0123456789"))
    return int(name[-digits:]) if digits > 1 else None


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
