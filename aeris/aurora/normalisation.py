"""Locations and scales of Aurora's variables: normalised = (x - location) / scale.

The numbers are those of the official package, version 2.0.1 (statistics.json says more). `locations` and
`scales` are plain dicts: add entries for variables of your own, under "<name>" at the surface and
"<name>_<level>" on levels.

Shapes: B batch, T history, C levels, H rows, W columns.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

Stats = Mapping[str, tuple[float, float]]
"""Location and scale by variable, where they replace those of this module."""

_published = json.loads(Path(__file__).with_name("statistics.json").read_text(encoding="utf-8"))
locations: dict[str, float] = _published["locations"]
scales: dict[str, float] = _published["scales"]

LOG_OFFSET = 1e-3

# Tensors by their values, type and place: made once, however many batches pass.
_tensors: dict[tuple[tuple[float, ...], torch.dtype, torch.device], Tensor] = {}


def level_name(level: float) -> str:
    """Write a level in hPa as names, also of weights, contain it: 850 and 850.0 are "850", 0.5 is "0_5"."""
    rounded = round(float(level), 3)
    return str(int(rounded) if rounded % 1 == 0 else rounded).replace(".", "_")


def location(name: str, level: float | None = None) -> float:
    """Return the location of a variable at the surface, or at `level` in hPa.

    Raises:
        ValueError: the variable has none.
    """
    return _entry(locations, name, level)


def scale(name: str, level: float | None = None) -> float:
    """Return the scale of a variable at the surface, or at `level` in hPa.

    Raises:
        ValueError: the variable has none.
    """
    return _entry(scales, name, level)


def _entry(table: Mapping[str, float], name: str, level: float | None) -> float:
    key = name if level is None else f"{name}_{level_name(level)}"
    if key in table:
        return table[key]
    place = "at the surface" if level is None else f"at {level_name(level)} hPa"
    found = [one.removeprefix(f"{name}_") for one in table if one.startswith(f"{name}_")]
    there = f"; it has levels {', '.join(found)}" if level is not None and found else ""
    raise ValueError(
        f"no normalisation of {name!r} {place}{there}: set locations[{key!r}] and scales[{key!r}] of "
        f"aeris.aurora.normalisation" + (", or give surf_stats" if level is None else "")
    )


def normalise_surf(name: str, x: Tensor, stats: Stats | None = None) -> Tensor:
    """Normalise a surface or static variable of any shape.

    Args:
        name: the variable.
        x: its values in SI units.
        stats: location and scale of some variables, in place of those of this module.

    Raises:
        ValueError: the variable has no location and scale.
    """
    location_, scale_ = _surf_stats(name, stats)
    return (x - location_) / scale_


def unnormalise_surf(name: str, x: Tensor, stats: Stats | None = None) -> Tensor:
    """Undo `normalise_surf`."""
    location_, scale_ = _surf_stats(name, stats)
    return x * scale_ + location_


def _surf_stats(name: str, stats: Stats | None) -> tuple[float, float]:
    if stats and name in stats:
        return stats[name]
    return location(name), scale(name)


def normalise_atmos(name: str, x_BTCHW: Tensor, levels: Iterable[float]) -> Tensor:
    """Normalise a variable on levels.

    Args:
        name: the variable.
        x_BTCHW: its values in SI units; only the last three dims matter.
        levels: the level of every entry of C, hPa.

    Raises:
        ValueError: the variable has no location and scale at a level.
    """
    location_C11, scale_C11 = _atmos_stats(name, x_BTCHW, levels)
    return (x_BTCHW - location_C11) / scale_C11


def unnormalise_atmos(name: str, x_BTCHW: Tensor, levels: Iterable[float]) -> Tensor:
    """Undo `normalise_atmos`."""
    location_C11, scale_C11 = _atmos_stats(name, x_BTCHW, levels)
    return x_BTCHW * scale_C11 + location_C11


def _atmos_stats(name: str, x: Tensor, levels: Iterable[float]) -> tuple[Tensor, Tensor]:
    levels = tuple(levels)
    return (
        column(tuple(location(name, level) for level in levels), x),
        column(tuple(scale(name, level) for level in levels), x),
    )


def column(values: tuple[float, ...], like: Tensor) -> Tensor:
    """Return one value per level as a tensor [C, 1, 1] of the type and place of `like`; made once.

    Args:
        values: C numbers.
        like: a tensor; those of a tracer get a tensor of their own.
    """

    def make() -> Tensor:
        return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None, None]

    if type(like) is not Tensor:  # fake tensors of a tracer must not be kept
        return make()
    key = (values, like.dtype, like.device)
    if key not in _tensors:
        with torch.inference_mode(False):  # a tensor made in inference mode could not be trained with later
            _tensors[key] = make()
    return _tensors[key]


def log_transform(x: Tensor) -> Tensor:
    """Map an amount to the logarithm that variables called `scaled_*` hold; 0 stays 0."""
    return torch.log(x + LOG_OFFSET) - math.log(LOG_OFFSET)


def log_untransform(x: Tensor) -> Tensor:
    """Undo `log_transform`; wants float32 or float64."""
    return LOG_OFFSET * (torch.exp(x) - 1)
