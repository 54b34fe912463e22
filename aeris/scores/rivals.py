"""Several forecasts of the same weather side by side, at the init times, lead times and channels they share.

An evaluation leaves `inits.npz` beside its scores: the sums of each init time. From two such files the scores
of both follow for any subset of init times, and a paired bootstrap says how sure their ratio is.

Legend: C channels, I init times, J lead times, S sums.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from aeris.scores.comparison import Comparison
from aeris.scores.confidence import FEWEST, block_length, draw_counts, ratio_interval
from aeris.scores.metrics import scores_of
from aeris.scores.winds import find_channel

Array = NDArray[np.float64]

INITS = "inits.npz"
METRICS = ("rmse", "crps", "ssr")
_VERSION = 1


@dataclass(frozen=True)
class Judged:
    """The sums of a forecast by init time."""

    name: str
    title: str
    truth: str
    """Name and fingerprint of the store with the truth."""
    weights: str
    members: int
    inits: NDArray[np.datetime64]
    lead_h: tuple[int, ...]
    channels: tuple[str, ...]
    sums_IJCS: Array
    """Global sums of `EnsembleScores`, NaN where there was no truth."""

    def write(self, directory: Path) -> Path:
        """Write the file, whole or not at all, and return its path."""
        about = {"version": _VERSION, "title": self.title, "truth": self.truth, "weights": self.weights}
        about |= {"members": self.members, "name": self.name}
        buffer = io.BytesIO()
        np.savez_compressed(
            buffer,
            about=np.array(json.dumps(about)),
            inits=np.array([str(init) for init in self.inits]),
            lead_h=np.array(self.lead_h),
            channel=np.array(self.channels),
            sums=self.sums_IJCS,
        )
        path = directory / INITS
        part = path.with_name(path.name + ".partial")
        part.write_bytes(buffer.getvalue())
        os.replace(part, path)
        return path

    def at(self, inits: NDArray[np.datetime64], lead_h: Sequence[int], channels: Sequence[str]) -> Array:
        """Return the sums at some init times, lead times and channels, all of which it has."""
        where = (
            [int(np.flatnonzero(self.inits == init)[0]) for init in inits],
            [self.lead_h.index(hours) for hours in lead_h],
            [self.channels.index(name) for name in channels],
        )
        return self.sums_IJCS[np.ix_(*where)]


def judged_at(path: str) -> Path:
    """Return where the sums of a forecast, or of a directory of scores, are.

    Raises:
        ValueError: it has not been scored yet.
    """
    for directory in (Path(path), Path(path.rstrip("/") + ".scores")):
        if (directory / INITS).exists():
            return directory / INITS
    raise ValueError(f"{path} has no scores yet: python -m aeris.evaluate {path} with the same --truth first")


def read_judged(path: str, name: str = "") -> Judged:
    """Read the sums of a forecast that was evaluated.

    Args:
        path: the forecast, or the directory of its scores.
        name: what to call it; empty means its own name.

    Raises:
        ValueError: it has not been scored, or the file is damaged.
    """
    file = judged_at(path)
    try:
        with file.open("rb") as opened, np.load(opened, allow_pickle=False) as arrays:
            about = json.loads(str(arrays["about"]))
            return Judged(
                name=name or about["name"],
                title=about["title"],
                truth=about["truth"],
                weights=about["weights"],
                members=about["members"],
                inits=arrays["inits"].astype("datetime64[s]"),
                lead_h=tuple(int(hours) for hours in arrays["lead_h"]),
                channels=tuple(str(one) for one in arrays["channel"]),
                sums_IJCS=arrays["sums"],
            )
    except (BadZipFile, KeyError, ValueError, EOFError, OSError) as error:
        raise ValueError(f"{file} cannot be read ({error}): evaluate that forecast again") from None


def read_rival(text: str) -> Judged:
    """Read the sums of NAME=FORECAST or FORECAST; see `read_judged`."""
    name, found, path = text.partition("=")
    return read_judged(path, name) if found else read_judged(text)


@dataclass(frozen=True)
class Contest:
    """Forecasts side by side.

    Attributes:
        inits: init times all of them have.
        comparisons: by score, a name of `METRICS`.
        intervals: ends of the 95 % interval of ours / theirs, [2, J, C], by score and rival.
    """

    inits: NDArray[np.datetime64]
    comparisons: Mapping[str, Comparison]
    intervals: Mapping[str, Mapping[str, Array]]

    def as_json(self) -> dict[str, Any]:
        """Return it as plain data, SI units."""
        one = next(iter(self.comparisons.values()))
        names = [channel.name for channel in one.channels]
        return {
            "init_times": [str(init) for init in self.inits],
            "lead_h": list(one.lead_h),
            "notes": list(one.notes),
            "scores": {
                metric: {
                    system: {name: values_JC[:, place] for place, name in enumerate(names)}
                    for system, values_JC in {"this forecast": found.ours_JC, **found.others}.items()
                }
                for metric, found in self.comparisons.items()
            },
            "ratio_interval_95": {
                metric: {
                    system: {name: ends[:, :, place].T for place, name in enumerate(names)}
                    for system, ends in by_system.items()
                }
                for metric, by_system in self.intervals.items()
            },
        }


def compete(ours: Judged, rivals: Sequence[Judged]) -> Contest:
    """Lay forecasts side by side at what all of them have.

    Raises:
        ValueError: other truths or weights, names that are equal, or nothing in common.
    """
    _same(ours, rivals)
    inits, lead_h, channels = _shared(ours, rivals)
    sums = {one.name: one.at(inits, lead_h, channels) for one in rivals}
    ours_IJCS = ours.at(inits, lead_h, channels)
    # an init and lead time counts where all forecasts have a truth
    used = np.asarray(np.isfinite(ours_IJCS[..., 0]).any(axis=2))
    for one_IJCS in sums.values():
        used = used & np.isfinite(one_IJCS[..., 0]).any(axis=2)
    count_J = np.where(used.any(axis=0), used.sum(axis=0), np.nan)

    def scores(sums_IJCS: Array, members: int) -> dict[str, Array]:
        total_JCS = np.where(used[:, :, None, None], sums_IJCS, 0.0).sum(axis=0)
        return scores_of(total_JCS / count_J[:, None, None], members)

    found = {one.name: scores(sums[one.name], one.members) for one in rivals}
    own = scores(ours_IJCS, ours.members)
    notes = _notes(ours, rivals, inits)
    comparisons = {
        metric: Comparison(
            metric=metric,
            title=ours.title,
            truth=ours.truth.partition(" ")[0],
            lead_h=lead_h,
            channels=tuple(find_channel(name) for name in channels),
            ours_JC=own[metric],
            others={name: values[metric] for name, values in found.items()},
            notes=notes,
        )
        for metric in METRICS
    }
    block = block_length(inits, lead_h)
    counts_BI = draw_counts(len(inits), block)
    hidden = np.where(used[:, :, None], 0.0, np.nan)
    intervals = {
        metric: {
            name: ratio_interval(counts_BI, ours_IJCS[..., place] + hidden, x[..., place] + hidden, root)
            for name, x in sums.items()
        }
        for metric, place, root in (("rmse", 0, True), ("crps", 3, False))
        if len(inits) >= FEWEST
    }
    return Contest(inits, comparisons, intervals)


def _same(ours: Judged, rivals: Sequence[Judged]) -> None:
    names = [one.name for one in rivals]
    if len(set(names)) < len(names):
        raise ValueError(f"two forecasts are called {max(names, key=names.count)}: give names, NAME=PATH")
    for one in rivals:
        if one.truth != ours.truth:
            raise ValueError(f"{one.name} was scored with the truth {one.truth}, this one with {ours.truth}")
        if one.weights != ours.weights:
            raise ValueError(f"{one.name} has area weights {one.weights!r}, this one {ours.weights!r}")


def _shared(
    ours: Judged, rivals: Sequence[Judged]
) -> tuple[NDArray[np.datetime64], tuple[int, ...], tuple[str, ...]]:
    """Return the init times, lead times and channels all of them have."""
    inits = ours.inits[np.all([np.isin(ours.inits, one.inits) for one in rivals], axis=0)]
    lead_h = tuple(hours for hours in ours.lead_h if all(hours in one.lead_h for one in rivals))
    channels = tuple(name for name in ours.channels if all(name in one.channels for one in rivals))
    for what, shared in (("init time", inits), ("lead time", lead_h), ("channel", channels)):
        if not len(shared):
            raise ValueError(f"no {what} in common with {', '.join(one.name for one in rivals)}")
    return inits, lead_h, channels


def _notes(ours: Judged, rivals: Sequence[Judged], inits: NDArray[np.datetime64]) -> tuple[str, ...]:
    members = ", ".join(f"{one.name} {one.members}" for one in rivals)
    return (
        f"{len(inits)} init times all have; members: this forecast {ours.members}, {members}",
        f"area weights {ours.weights!r}; fair CRPS and the unbiased ratio do not depend on the number of "
        "members, the RMSE of the mean does",
    )
