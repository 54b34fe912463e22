"""Turn sources into a store, in a way that a kill does not hurt.

All work is in STORE.partial until it is whole: (1) every time is written uncompressed into its year file and
marked as done; (2) masks: the points missing at any time; (3) with rounding or compression the years are
written anew; (4) statistics; (5) `store.h5` is written and the directory gets its name. Starting again skips
what is done.

Shapes: n times, C channels, L levels, Y rows, X cols.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from aeris.data import statistics
from aeris.data.grid import coarsen
from aeris.data.header import HEADER, PLAN, Header, write_header
from aeris.data.packing import pack, rounding_steps
from aeris.data.plan import Conversion, size_text
from aeris.data.statistics import Statistics
from aeris.data.store import Store
from aeris.data.variables import STATIC
from aeris.data.yearfile import Field, StoreError, YearFile, Years
from aeris.data.yearwriter import YearWriter, publish

READ_BYTES = 128 * 2**20  # of fields read at once: many sources keep several times in one chunk

Track = Callable[[str, int], Callable[[], None]]
"""Start a progress bar (name, length) and return what advances it by one."""


def silent(name: str, length: int) -> Callable[[], None]:
    """Show no progress."""
    return lambda: None


def run(conversion: Conversion, track: Track = silent) -> None:
    """Do it, or finish it; nothing if it is done.

    Raises:
        StoreError: the data cannot be used, or the destination cannot be written; what is finished stays.
    """
    if is_done(conversion):
        return
    try:
        begin(conversion)
        write_fields(conversion, track)
        years = _open(conversion)
        masks = find_masks(conversion, years, track)
        if conversion.rounding or conversion.compress:
            step_C = None
            if conversion.rounding:
                step_C = rounding_steps(conversion, lambda: find_statistics(conversion, years, masks, track))
            pack(conversion, years, step_C, track("packing", len(conversion.time_s)))
        numbers = find_statistics(conversion, years, masks, track, keep=conversion.partial)
        years.close()
        finish(conversion, numbers, masks)
    except OSError as error:
        raise StoreError(
            f"cannot write {conversion.partial}: {error.strerror or error}; "
            "what is written so far stays, and the same command goes on from there",
            of_a_file=True,
        ) from None


def is_done(conversion: Conversion) -> bool:
    """Say whether the destination is already what this conversion would make.

    Raises:
        StoreError: the destination holds something else.
    """
    destination = conversion.destination
    if not destination.exists():
        return False
    if (destination / HEADER).exists() and Store(destination).made == conversion.made:
        return True
    raise StoreError(f"{destination} exists and is not this store: remove it or choose another name")


def begin(conversion: Conversion) -> None:
    """Make the directory, or check that the one found is this conversion's, and that the disk has room.

    Raises:
        StoreError: another conversion's, or too little room.
    """
    directory = conversion.partial
    path = directory / PLAN
    if path.exists():
        before = json.loads(path.read_text())
        for key in {**conversion.made, **before}:
            if conversion.made.get(key) != before.get(key):
                raise StoreError(
                    f"{directory} was begun with {key} {before.get(key)}, not {conversion.made.get(key)}: "
                    "repeat the first command, or remove that directory"
                )
    else:
        directory.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(path.name + ".partial")
        temporary.write_text(json.dumps(conversion.made))
        publish(temporary, path)
    there = sum(
        file.stat().st_blocks * 512 for file in directory.iterdir()
    )  # sparse files count what they hold
    need = len(conversion.time_s) * conversion.field_bytes - there
    free = shutil.disk_usage(directory).free
    if need > free:
        raise StoreError(f"{directory} needs {size_text(need)} more, the disk has {size_text(free)} free")


def write_fields(conversion: Conversion, track: Track = silent) -> None:
    """Write every time that is not there yet.

    Raises:
        StoreError: a value is missing in a channel that is not declared to have missing points.
    """
    advance = track("fields", len(conversion.time_s))
    for year, indices in conversion.years.items():
        path = conversion.partial / f"{year}.h5"
        if not path.exists():
            _write_year(conversion, path, indices, advance)
        else:
            for _ in indices:
                advance()


def _write_year(
    conversion: Conversion, path: Path, indices: NDArray[np.int64], advance: Callable[[], None]
) -> None:
    grid = (conversion.latitude_deg, conversion.longitude_deg, conversion.window)
    writer = YearWriter(path, conversion.names, conversion.time_s[indices], *grid)
    at_once = max(1, min(64, READ_BYTES // conversion.field_bytes))
    try:
        for start in range(0, len(indices), at_once):
            stop = min(start + at_once, len(indices))
            todo = [n for n in range(start, stop) if not writer.done[n]]
            if todo:
                x_nCYX = read_fields(conversion, int(indices[todo[0]]), int(indices[todo[-1]]) + 1)
            for n in range(start, stop):
                if n in todo:
                    writer.write(n, x_nCYX[n - todo[0]])
                advance()
            writer.mark()
        writer.finish()
    finally:
        writer.close()


def read_fields(conversion: Conversion, start: int, stop: int) -> Field:
    """Read times `start` to `stop` of all channels, on the grid of the store: float32 [n, C, Y, X].

    Raises:
        StoreError: names the channel, time, row and col of the first missing value where none may be.
    """
    x_nCYX = np.empty((stop - start, len(conversion.channels), *conversion.size), np.float32)
    times = conversion.time_s[start:stop].astype("datetime64[s]")
    for variable in dict.fromkeys(channel.variable for channel in conversion.channels):
        mine = [(n, one.level_hpa) for n, one in enumerate(conversion.channels) if one.variable == variable]
        levels_hpa = [level for _, level in mine if level is not None]
        x_nLYX = conversion.sources.read(variable, times, levels_hpa)
        x_nCYX[:, [n for n, _ in mine]] = regrid(conversion, x_nLYX)
    for n, name in enumerate(conversion.names):
        _check_values(x_nCYX[:, n], name, name in conversion.masked, times)
    return x_nCYX


def regrid(conversion: Conversion, x_YX: Field) -> Field:
    """Bring fields from the grid of the sources to that of the store."""
    latitude_deg = conversion.sources.latitude_deg[conversion.row_offset :]
    return coarsen(x_YX[..., conversion.row_offset :, :], latitude_deg, conversion.coarsen)


def _check_values(x_nYX: Field, name: str, may_miss: bool, times: NDArray[np.datetime64]) -> None:
    bad = np.isinf(x_nYX) if may_miss else ~np.isfinite(x_nYX)
    if bad.any():
        n, row, col = (int(i) for i in np.argwhere(bad)[0])
        hint = "" if may_miss else f"; if {name} may be missing on some points, add --masked {name}"
        raise StoreError(f"{name} is {x_nYX[n, row, col]} at {times[n]}, row {row}, col {col}{hint}")
    empty = np.isnan(x_nYX).all(axis=(1, 2))
    if empty.any():
        time = times[int(np.argmax(empty))]
        raise StoreError(f"{name} has no value at all at {time}: leave out the channel or that time")


def _open(conversion: Conversion) -> Years:
    years = conversion.years
    files = [YearFile(conversion.partial / f"{year}.h5") for year in years]
    return Years(files, [len(indices) for indices in years.values()])


def find_masks(conversion: Conversion, years: Years, track: Track = silent) -> dict[str, NDArray[np.bool_]]:
    """Find the points with a value at every time, for channels declared to have missing points: bool [Y, X].

    Raises:
        StoreError: no point has.
    """
    masks = {}
    for number, name in enumerate(conversion.names):
        if name not in conversion.masked:
            continue
        valid_YX = np.ones(conversion.size, dtype=bool)
        if conversion.statistics_from:
            valid_YX = valid_YX & Store(conversion.statistics_from).masks.get(name, valid_YX)
        advance = track(f"mask of {name}", len(conversion.time_s))
        for index in range(len(conversion.time_s)):
            valid_YX &= ~np.isnan(years.read(index, (0, 0), conversion.size, channel=number)[0])
            advance()
        if not valid_YX.any():
            raise StoreError(f"{name} has no point with a value at every time: leave it out with --channels")
        if not valid_YX.all():
            masks[name] = valid_YX
    return masks


def find_statistics(
    conversion: Conversion,
    years: Years,
    masks: dict[str, NDArray[np.bool_]],
    track: Track = silent,
    keep: Path | None = None,
) -> Statistics:
    """Compute the statistics of the train period, or take those of `statistics_from`.

    Args:
        keep: where parts that are finished are kept, for a killed conversion to go on.
    """
    if conversion.statistics_from:
        return Store(conversion.statistics_from).statistics
    start, end = conversion.train_s
    counted = int(((conversion.time_s >= start) & (conversion.time_s <= end)).sum())
    return statistics.compute(
        years,
        conversion.time_s,
        conversion.names,
        conversion.train_s,
        conversion.intervals_h,
        masks,
        track("statistics", counted * (conversion.size[0] // conversion.window)),
        conversion.processes,
        keep,
    )


def finish(conversion: Conversion, numbers: Statistics, masks: dict[str, NDArray[np.bool_]]) -> None:
    """Write `store.h5`, remove what only a conversion needs, and give the store its name."""
    directory = conversion.partial
    static = {}
    for name, _ in STATIC.values():
        if name in conversion.missing_static:
            static[name] = np.zeros(conversion.size, np.float32)
        else:
            static[name] = regrid(conversion, conversion.sources.read_static(name))
            _check_values(static[name][None], name, False, np.array(["NaT"], dtype="datetime64[s]"))
    names = [(f"{year}.h5", len(indices)) for year, indices in conversion.years.items()]
    header = Header(
        channels=conversion.channels,
        latitude_deg=conversion.latitude_deg,
        longitude_deg=conversion.longitude_deg,
        time_s=conversion.time_s,
        files=[(name, count, (directory / name).stat().st_size) for name, count in names],
        static=static,
        masks=masks,
        statistics=numbers,
        window=conversion.window,
        row_offset=conversion.row_offset,
        made=conversion.made,
    )
    write_header(directory / HEADER, header)
    for leftover in set(directory.iterdir()) - {directory / name for name in [HEADER, PLAN, *dict(names)]}:
        leftover.unlink()
    (directory / PLAN).unlink()
    directory.rename(conversion.destination)
