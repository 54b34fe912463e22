"""Settle what a conversion will do: from the user's options and the sources to plain data, before any work.

Shapes: Y rows, X cols.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aeris.data import given_statistics
from aeris.data.axes import find_gaps
from aeris.data.grid import check_coarsening, coarsen_axis, rows_gone, rows_to_drop
from aeris.data.options import Options
from aeris.data.sources import Sources, open_source
from aeris.data.statistics import HOUR_S
from aeris.data.variables import LEVELLED, STATIC, SURFACE, Channel, channel, channel_of, in_order
from aeris.data.yearfile import FIELD_BYTES
from swipe.windows import WindowGrid

TRAIN_SHARE = 0.75  # of the times, when no train period is given
BLOCK_TIMES = 64


@dataclass(frozen=True)
class Block:
    """Consecutive times of one year: the piece in which the work is shared out and kept."""

    year: int
    start: int
    """Number of the first time in its year."""
    first: int
    """Number of that time in the store."""
    length: int

    @property
    def name(self) -> str:
        """What its results are called by."""
        return f"{self.year}-{self.start:05d}"


@dataclass(frozen=True)
class Conversion:
    """Everything that determines a store; plain data, made by `plan`."""

    options: Options
    sources: Sources
    destination: Path
    channels: tuple[Channel, ...]
    time_s: NDArray[np.int64]
    latitude_deg: NDArray[np.float64]
    """Of the store, after dropping and averaging."""
    longitude_deg: NDArray[np.float64]
    dropped: int
    """Rows of the sources dropped at the north pole."""
    row_offset: int
    """Rows of the original grid north of the store's first: dropped here, or by whoever made the sources."""
    coarsen: int
    window: int
    train_s: tuple[int, int]
    intervals_h: tuple[int, ...]
    masked: tuple[str, ...]
    missing_static: tuple[str, ...]
    rounding: float
    compress: bool
    statistics_from: str
    processes: int
    made: dict[str, Any]
    """Settings and origin, kept in the store; a conversion is continued only by one with the same."""

    @property
    def names(self) -> list[str]:
        """Channel names."""
        return [channel.name for channel in self.channels]

    @property
    def size(self) -> tuple[int, int]:
        """Rows and cols of the store."""
        return len(self.latitude_deg), len(self.longitude_deg)

    @property
    def field_bytes(self) -> int:
        """Bytes of all channels at one time."""
        return len(self.channels) * self.size[0] * self.size[1] * FIELD_BYTES

    @property
    def years(self) -> dict[int, NDArray[np.int64]]:
        """Year -> the numbers of its times."""
        year = self.time_s.astype("datetime64[s]").astype("datetime64[Y]").astype(int) + 1970
        return {int(one): np.flatnonzero(year == one) for one in np.unique(year)}

    @property
    def blocks(self) -> tuple[Block, ...]:
        """All times, cut into blocks; they do not depend on how many processes work."""
        return tuple(
            Block(year, start, int(indices[start]), min(BLOCK_TIMES, len(indices) - start))
            for year, indices in self.years.items()
            for start in range(0, len(indices), BLOCK_TIMES)
        )

    @property
    def partial(self) -> Path:
        """Directory of the unfinished store."""
        return self.destination.with_name(self.destination.name + ".partial")


def plan(options: Options) -> Conversion:
    """Open the sources and settle everything about the store to be made; writes nothing.

    Raises:
        ValueError: the options do not fit the sources; says which would.
    """
    if not options.sources:
        raise ValueError("give at least one source and, last, the directory of the new store")
    told = options.units_told
    sources = Sources([open_source(path, options.member, units=told) for path in options.sources])
    channels = choose_channels(sources, options.channels, options.levels_hpa)
    variables = list(dict.fromkeys(one.variable for one in channels))
    times = choose_times(sources.times(variables), options.period, options.step_h)
    if not options.allow_gaps:
        refuse_gaps(times, sources.imputed(variables))
    for variable in variables:
        sources.check_times(variable, times)
    dropped = rows_to_drop(sources.latitude_deg)
    latitude_deg = sources.latitude_deg[dropped:]
    check_coarsening(len(latitude_deg), len(sources.longitude_deg), options.coarsen)
    latitude_deg = coarsen_axis(latitude_deg, options.coarsen)
    longitude_deg = coarsen_axis(sources.longitude_deg, options.coarsen)
    WindowGrid(len(latitude_deg), len(longitude_deg), options.window)  # refuses windows that do not fit
    train = _train_period(times, options)
    conversion = Conversion(
        options=options,
        sources=sources,
        destination=Path(options.store),
        channels=channels,
        time_s=times.astype(np.int64),
        latitude_deg=latitude_deg,
        longitude_deg=longitude_deg,
        dropped=dropped,
        row_offset=dropped + rows_gone(sources.latitude_deg),
        coarsen=options.coarsen,
        window=options.window,
        train_s=(int(train[0].astype(np.int64)), int(train[1].astype(np.int64))),
        intervals_h=tuple(sorted(set(options.intervals_h))),
        masked=tuple(name for name in options.masked if name in {one.name for one in channels}),
        missing_static=_missing_static(sources, options.allow_missing_static),
        rounding=options.round,
        compress=options.compress,
        statistics_from=options.statistics_from,
        processes=options.processes,
        made={},
    )
    _check_statistics(conversion)
    conversion.made.update(_made(conversion, options))
    return conversion


def choose_channels(
    sources: Sources, wanted: Sequence[str], levels_hpa: Sequence[float]
) -> tuple[Channel, ...]:
    """Settle the channels: those named, or all there are, in the order of a store.

    Raises:
        ValueError: a channel is not in the sources.
    """
    found: set[Channel] = set()
    for name in wanted or [
        short for short, (full, _) in {**SURFACE, **LEVELLED}.items() if sources.having(full)
    ]:
        if name in LEVELLED:
            variable = LEVELLED[name][0]
            found |= {channel_of(variable, level) for level in levels_hpa or sources.levels_hpa(variable)}
            if not sources.having(variable):
                raise ValueError(f"the sources have no {variable} ({name})")
        else:
            found.add(channel(name))
    for one in in_order(found):
        if not sources.having(one.variable):
            raise ValueError(f"the sources have no {one.variable} ({one.name})")
        levels = sources.levels_hpa(one.variable)
        if one.level_hpa is not None and one.level_hpa not in levels:
            there = ", ".join(f"{level:g}" for level in levels)
            raise ValueError(
                f"{one.variable} has no level {one.level_hpa:g} hPa ({one.name}): the levels are {there}"
            )
    if not found:
        raise ValueError("the sources have none of the known variables")
    return in_order(found)


def choose_times(
    times: NDArray[np.datetime64], period: tuple[str, str], step_h: int
) -> NDArray[np.datetime64]:
    """Settle the times: those inside `period` that are a multiple of `step_h` after midnight.

    Raises:
        ValueError: none is left.
    """
    if not times.size:
        raise ValueError("the sources have no times, only static fields")
    start, end = read_period(period, times)
    keep = (times >= start) & (times <= end)
    if step_h:
        keep &= times.astype(np.int64) % (step_h * HOUR_S) == 0
    if not keep.any():
        raise ValueError(f"no time is left: the sources cover {times[0]} to {times[-1]}")
    return np.asarray(times[keep])


def refuse_gaps(times: NDArray[np.datetime64], imputed: NDArray[np.datetime64]) -> None:
    """Refuse times further apart than most are: as a rule a file was forgotten.

    Args:
        imputed: times left out because a source says that their values were made up.

    Raises:
        ValueError: names the first gap.
    """
    gaps = find_gaps(times)
    if not gaps:
        return
    last, after = gaps[0]
    more = f", the first of {len(gaps)} gaps" if len(gaps) > 1 else ""
    known = ((imputed > last) & (imputed < after)).any()
    why = ", whose values a source calls made up" if known else ""
    raise ValueError(
        f"times are missing between {last} and {after}{why}{more}: add the files that have them, choose a "
        "--period or --step-h without gaps, or take the times as they are with --allow-gaps"
    )


def read_period(
    period: tuple[str | np.datetime64, str | np.datetime64], times: NDArray[np.datetime64]
) -> tuple[np.datetime64, np.datetime64]:
    """Read a pair of dates; the end of `2018` is its last second, an empty one is the end of `times`.

    Raises:
        ValueError: they are no dates, or the first comes after the second.
    """
    try:
        start, end = (np.datetime64(one) if isinstance(one, np.datetime64) or one else None for one in period)
    except ValueError:
        raise ValueError(f"{period[0]} {period[1]} are not two dates such as 2018 or 2018-12-31T18") from None
    first = times[0] if start is None else start.astype("datetime64[s]")
    last = times[-1] if end is None else end
    if np.datetime_data(last)[0] in ("Y", "M", "W", "D", "h", "m"):
        last = (last + 1).astype("datetime64[s]") - 1
    last = last.astype("datetime64[s]")
    if first > last:
        raise ValueError(f"the period {period[0]} to {period[1]} ends before it begins")
    return first, last


def _train_period(times: NDArray[np.datetime64], options: Options) -> tuple[np.datetime64, np.datetime64]:
    """Settle which times the statistics come from."""
    if any(options.train_period):
        start, end = read_period(options.train_period, times)
    else:
        start, end = times[0], times[max(1, int(TRAIN_SHARE * len(times))) - 1]
    inside = times[(times >= start) & (times <= end)]
    if not inside.size:
        raise ValueError(
            f"the train period {start} to {end} has no time: the data cover {times[0]} to {times[-1]}"
        )
    return inside[0], inside[-1]


def _missing_static(sources: Sources, allowed: bool) -> tuple[str, ...]:
    missing = tuple(name for name, _ in STATIC.values() if not sources.having(name))
    if missing and not allowed:
        raise ValueError(
            f"the sources have no {' and no '.join(missing)}: add a file that has, or take zeros with "
            "--allow-missing-static"
        )
    return missing


def _check_statistics(conversion: Conversion) -> None:
    """Refuse intervals without pairs, and statistics of another set of channels, before hours of work."""
    if conversion.statistics_from:
        given_statistics.check(
            conversion.statistics_from, conversion.names, conversion.intervals_h, conversion.size
        )
        return
    start, end = conversion.train_s
    time_s = conversion.time_s[(conversion.time_s >= start) & (conversion.time_s <= end)]
    if len(time_s) < 2:
        raise ValueError(
            "the train period has a single time, so there is no change to compute statistics from: "
            "convert more times, or take the statistics of another store with --statistics-from"
        )
    for interval in conversion.intervals_h:
        if interval < 1 or not np.isin(time_s + interval * HOUR_S, time_s).any():
            steps = np.unique(time_s - time_s[0])[1:4] / HOUR_S
            raise ValueError(
                f"no two times of the train period are {interval} h apart: --intervals-h can be "
                f"{', '.join(f'{step:g}' for step in steps)}"
            )


def _made(conversion: Conversion, options: Options) -> dict[str, Any]:
    """Describe origin and settings, without the paths of this machine."""
    train = [str(np.datetime64(second, "s")) for second in conversion.train_s]
    about = ("title", "source", "institution", "license", "comment")
    return {
        "sources": [path if "://" in path else Path(path).name for path in options.sources],
        "about": [
            {key: part.about[key] for key in about if key in part.about} for part in conversion.sources.parts
        ],
        "channels": conversion.names,
        "times": [len(conversion.time_s), hashlib.sha256(conversion.time_s.tobytes()).hexdigest()[:16]],
        "grid": list(conversion.size),
        "north rows dropped": conversion.dropped,
        "member": options.member,
        **({"units": list(options.units)} if options.units else {}),
        "coarsen": options.coarsen,
        "round": options.round,
        "compress": options.compress,
        "window": options.window,
        "masked": list(conversion.masked),
        "zeros for": list(conversion.missing_static),
        "train period": train,
        "intervals_h": list(conversion.intervals_h),
        "statistics from": options.statistics_from
        and given_statistics.fingerprint_id(
            options.statistics_from, conversion.names, conversion.intervals_h
        ),
    }


def size_text(count: float) -> str:
    """Write a number of bytes with three digits and a unit."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
