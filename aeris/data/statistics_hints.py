"""Hints that statistics are not what they should be.

Sources of the numbers: ERA5 at 1.5 degrees, as published with WeatherBench 2 scores.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from aeris.data.plausible import complaint
from aeris.data.statistics import HOUR_S, Statistics
from aeris.data.store import Store
from aeris.data.variables import Channel

YEAR = np.timedelta64(360, "D")
# Channel -> mean, standard deviation, standard deviation of the change over 24 h, at 1.5 degrees.
ERA5: dict[str, tuple[float | None, float | None, float | None]] = {
    "z500": (54133.0, 3357.0, 591.0),
    "t850": (None, 15.6, None),
}
FAR = 0.15  # relative difference to ERA5 worth a hint; another resolution or period makes a few per cent


def as_dict(channels: Sequence[Channel], numbers: Statistics) -> dict[str, object]:
    """Return the statistics by channel and interval, for a machine to read."""
    table = {
        one.name: {
            "units": one.units,
            "mean": float(numbers.mean_C[c]),
            "std": float(numbers.std_C[c]),
            "change_mean": {str(h): float(x[c]) for h, x in numbers.residual_mean.items()},
            "change_std": {str(h): float(x[c]) for h, x in numbers.residual_std.items()},
        }
        for c, one in enumerate(channels)
    }
    return {"train_period": [str(time) for time in numbers.train_period], "channels": table}


def hints(store: Store, numbers: Statistics) -> list[str]:
    """Say what looks wrong, one sentence each."""
    found = []
    start, end = numbers.train_period
    if end - start < YEAR:
        days = int((end - start).astype(int)) / 24 / HOUR_S
        found.append(f"the train period has {days:.0f} days: its statistics know one season, not a year")
    kinds: dict[str, list[str]] = {}
    for c, one in enumerate(store.channels):
        for kind, number in _of_channel(one, c, numbers):
            kinds.setdefault(kind, []).append(f"{one.name} {number}")
    found += [f"{kind}: {', '.join(names)}" for kind, names in kinds.items()]
    if _is_era5(store):
        found += _against_era5(store, numbers)
    return found


def _of_channel(one: Channel, c: int, numbers: Statistics) -> list[tuple[str, str]]:
    """Return (what looks wrong, number) of a channel."""
    found = []
    mean, std = float(numbers.mean_C[c]), float(numbers.std_C[c])
    if not np.isfinite(mean) or not std > 0:
        found.append(("std is not positive, and states would be divided by it", f"{std:g}"))
    if np.isfinite(mean) and complaint(one.variable, one.level_hpa, np.array([mean])):
        found.append(("the mean is not plausible; another unit?", f"{mean:.4g} {one.units}"))
    before = 0.0
    for hours, std_C in sorted(numbers.residual_std.items()):
        change, drift = float(std_C[c]), float(numbers.residual_mean[hours][c])
        if not change > 0:
            found.append((f"no change over {hours} h, and residuals would be divided by it", f"{change:g}"))
            continue
        # Two states that know nothing of each other differ by sqrt(2) std.
        if change > std > 0:
            found.append((f"changes by more than its std over {hours} h; noise?", f"{change / std:.2f} x"))
        if change < 0.9 * before:
            found.append((f"changes less over {hours} h than over a shorter interval", f"{change:.4g}"))
        if abs(drift) > 0.1 * change:
            found.append((f"drifts: mean change over {hours} h in units of its std", f"{drift / change:.2f}"))
        before = change
    return found


def _is_era5(store: Store) -> bool:
    """Whether the store says that it was made from ERA5."""
    words = [*store.made.get("sources", []), *map(str, store.made.get("about", []))]
    return any("era5" in word.lower() for word in words)


def _against_era5(store: Store, numbers: Statistics) -> list[str]:
    found = []
    for name, anchors in ERA5.items():
        if name not in store.names:
            continue
        c = store.names.index(name)
        change_C = numbers.residual_std.get(24)
        ours = (numbers.mean_C[c], numbers.std_C[c], None if change_C is None else change_C[c])
        for what, one, known in zip(("mean", "std", "std of the change over 24 h"), ours, anchors):
            if one is not None and known is not None and abs(one - known) > FAR * known:
                found.append(f"{name}: {what} {one:.5g}, where ERA5 at 1.5 degrees has {known:g}")
    return found
