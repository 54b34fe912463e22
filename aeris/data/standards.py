"""The numbers by which a run standardises what its network sees, where they are not those of the store.

Weights that others trained come with means and deviations of their own, for channels, changes and forcings. A
run keeps them in a file beside its weights, and reads any store of its grid and channels through them
(`RunStore`); the store's own statistics then play no part.

Shapes: C channels.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aeris.data.statistics import Statistics
from aeris.data.store import Store
from aeris.data.variables import Channel, channel

SCALED_FORCINGS = ("solar", "orography", "land_sea_mask")


@dataclass(frozen=True)
class Standards:
    """Means and deviations of a run."""

    channels: tuple[str, ...]
    """Names of the channels, in order."""
    statistics: Statistics
    forcing: dict[str, tuple[float, float]]
    """Mean and standard deviation of each of `SCALED_FORCINGS`: W m-2, m2 s-2, 1."""
    fill: dict[str, float]
    """Value of a channel where a mask hides it, in its units; its mean for a channel that is not named."""

    @cached_property
    def sha256(self) -> str:
        """A digest of all numbers, each to nine digits."""
        numbers = self.statistics
        values = [*numbers.mean_C, *numbers.std_C]
        for hours in sorted(numbers.residual_std):
            values += [hours, *numbers.residual_mean[hours], *numbers.residual_std[hours]]
        values += [value for name in SCALED_FORCINGS for value in self.forcing[name]]
        text = _digits(values) + "".join(f" {name} {self.fill[name]:.8e}" for name in sorted(self.fill))
        return hashlib.sha256(text.encode()).hexdigest()


def _digits(values: Sequence[Any] | NDArray[Any]) -> str:
    return " ".join(f"{float(value) + 0.0:.8e}" for value in values)


def fingerprint(
    channels: Sequence[Channel],
    latitude_deg: NDArray[np.float64],
    longitude_deg: NDArray[np.float64],
    row_offset: int,
    standards: Standards,
) -> dict[str, Any]:
    """Say what a model depends on that standardises by numbers of its own; as `Store.fingerprint`."""
    places = " | ".join(_digits(values) for values in (latitude_deg, longitude_deg))
    return {
        "channels": [one.name for one in channels],
        "units": [one.units for one in channels],
        "levels_hpa": [one.level_hpa for one in channels],
        "grid": {
            "rows": len(latitude_deg),
            "cols": len(longitude_deg),
            "row_offset": row_offset,
            "sha256": hashlib.sha256(places.encode()).hexdigest(),
        },
        "statistics_sha256": standards.sha256,
        "train_period": [str(time) for time in standards.statistics.train_period],
    }


class RunStore(Store):
    """A store that is read with the numbers of a run in place of its own.

    Raises:
        StoreError: see `Store`.
        ValueError: it has other channels than the run.
    """

    noise_where_hidden = True  # hidden points were filled in those files, and trained on like any other

    def __init__(self, path: str | Path, standards: Standards) -> None:
        super().__init__(path)
        if self.names != standards.channels:
            missing = [name for name in standards.channels if name not in self.names]
            detail = f"lacks {', '.join(missing[:5])}" if missing else "has others, or another order"
            raise ValueError(
                f"the store {path} {detail}: the run's {len(standards.channels)} channels are needed, "
                f"convert again with --channels {' '.join(standards.channels[:3])} ..."
            )
        self.standards = standards
        self.statistics = standards.statistics
        fill = [standards.fill.get(name, mean) for name, mean in zip(self.names, self.statistics.mean_C)]
        self.fill_C = np.array(fill, dtype=np.float32)

    @cached_property
    def fingerprint(self) -> dict[str, Any]:
        """What the run depends on; compared with its checkpoint before a forecast."""
        return fingerprint(
            self.channels, self.latitude_deg, self.longitude_deg, self.row_offset, self.standards
        )


def write_standards(path: Path, standards: Standards) -> None:
    """Write the numbers as JSON, atomically."""
    numbers = standards.statistics
    values = {
        "channels": list(standards.channels),
        "units": [channel(name).units for name in standards.channels],
        "mean": numbers.mean_C.tolist(),
        "std": numbers.std_C.tolist(),
        "residual_mean": {str(hours): x.tolist() for hours, x in numbers.residual_mean.items()},
        "residual_std": {str(hours): x.tolist() for hours, x in numbers.residual_std.items()},
        "train_period": [str(time) for time in numbers.train_period],
        "forcing": {name: list(pair) for name, pair in standards.forcing.items()},
        "fill": standards.fill,
    }
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(values, indent=1) + "\n")
    partial.replace(path)


def read_standards(path: Path) -> Standards:
    """Read what `write_standards` wrote.

    Raises:
        ValueError: the file is missing, damaged, or its numbers cannot be.
    """
    try:
        values = json.loads(path.read_text())
        residual_mean, residual_std = (
            {int(hours): np.array(x, dtype=np.float64) for hours, x in values[key].items()}
            for key in ("residual_mean", "residual_std")
        )
        start, end = (np.datetime64(time, "s") for time in values["train_period"])
        standards = Standards(
            tuple(values["channels"]),
            Statistics(
                np.array(values["mean"], dtype=np.float64),
                np.array(values["std"], dtype=np.float64),
                residual_mean,
                residual_std,
                (start, end),
            ),
            {name: (float(pair[0]), float(pair[1])) for name, pair in values["forcing"].items()},
            {str(name): float(value) for name, value in values["fill"].items()},
        )
        check_standards(standards)
    except FileNotFoundError:
        raise ValueError(f"{path} is missing: make the run again with aeris.published") from None
    except (OSError, ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        words = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(f"{path} is damaged ({words}): make the run again with aeris.published") from None
    return standards


def check_standards(standards: Standards) -> None:
    """Refuse numbers that nothing can be standardised by.

    Raises:
        ValueError: names the channel or forcing and the number.
    """
    numbers = standards.statistics
    tables = {"mean": (numbers.mean_C, False), "standard deviation": (numbers.std_C, True)}
    if numbers.residual_mean.keys() != numbers.residual_std.keys():
        raise ValueError("means and standard deviations of changes are of different intervals")
    for hours in numbers.residual_std:
        tables[f"mean of the {hours}-h change"] = numbers.residual_mean[hours], False
        tables[f"standard deviation of the {hours}-h change"] = numbers.residual_std[hours], True
    for what, (values_C, positive) in tables.items():
        if values_C.shape != (len(standards.channels),):
            raise ValueError(f"{values_C.size} numbers for the {what} of {len(standards.channels)} channels")
        for name, value in zip(standards.channels, values_C):
            if not np.isfinite(value) or (positive and value <= 0):
                raise ValueError(f"the {what} of {name} is {value:g}")
    for name in SCALED_FORCINGS:
        mean, std = standards.forcing[name]
        if not (np.isfinite(mean) and np.isfinite(std) and std > 0):
            raise ValueError(f"mean and standard deviation of {name} are {mean:g} and {std:g}")
