"""Turn sources into a store, in a way that a kill does not hurt and that any number of processes can share.

All work is in STORE.partial until it is whole: (1) every time is written uncompressed into its year file and
marked as done; (2) masks: the points missing at any time; (3) with rounding or compression the years are
written anew; (4) statistics; (5) `store.h5` is written and the directory gets its name. The work is cut into
blocks of times, the same ones whoever does them (aeris/data/sharing.py). Starting again skips what is done.

Shapes: n times, C channels, L levels, Y rows, X cols.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from aeris.data import given_statistics
from aeris.data.grid import coarsen
from aeris.data.header import HEADER, PLAN, Header, read_header, write_header
from aeris.data.packing import pack_year, rounding_step
from aeris.data.plan import Block, Conversion, size_text
from aeris.data.sharing import Part, Shared, Track, silent
from aeris.data.statistics import Moments, Statistics, Train
from aeris.data.store import Store
from aeris.data.variables import STATIC
from aeris.data.yearfile import Field, StoreError, YearFile, Years
from aeris.data.yearwriter import YearWriter, marks_of, publish, tagged

READ_BYTES = 128 * 2**20  # of fields read at once: many sources keep several times in one chunk
PARTS = "parts"  # where the results of blocks are kept
FINISH_S = 10.0  # until a directory that got its new name is seen under it, on any file system


def run(
    conversion: Conversion,
    track: Track = silent,
    place: int = 0,
    places: int = 1,
    check: Callable[[], None] = lambda: None,
) -> None:
    """Do it, or finish it, together with whoever does the same; nothing if it is done.

    Args:
        place: number of this process among `places`; -1 watches the others.
        check: called now and then, to raise what stops this process.

    Raises:
        StoreError: the data cannot be used, or the destination cannot be written; what is finished stays.
    """
    if is_done(conversion):
        return
    try:
        begin(conversion, room=place <= 0)
        _work(conversion, Shared(conversion.partial / PARTS, place, places, track, check))
    except OSError as error:
        if _just_finished(conversion, error):
            return
        raise StoreError(
            f"cannot write {conversion.partial}: {error.strerror or error}; "
            "what is written so far stays, and the same command goes on from there",
            of_a_file=True,
        ) from None


def _just_finished(conversion: Conversion, error: OSError) -> bool:
    """Whether a file is missing because another process has just finished, and the directory got its name."""
    until = time.monotonic() + FINISH_S
    while isinstance(error, FileNotFoundError) and time.monotonic() < until:
        if is_done(conversion):
            return True
        time.sleep(0.1)
    return False


def _work(conversion: Conversion, shared: Shared) -> None:
    write_fields(conversion, shared)
    masks = shared.once("masks", lambda: find_masks(conversion, shared))
    if conversion.rounding or conversion.compress:
        step_C = None
        if conversion.rounding:
            count_fields("unrounded", conversion, shared, masks)
            step_C = shared.once(
                "rounding",
                lambda: rounding_step(conversion, find_statistics("unrounded", conversion, shared, masks)),
            )["step"]
        years = {str(year): len(indices) for year, indices in conversion.years.items()}
        shared.each("packing", years, lambda year: pack_year(conversion, int(year), step_C, shared.beat))
    if not conversion.statistics_from:
        count_fields("statistics", conversion, shared, masks)
    shared.last(lambda: is_done(conversion), lambda: finish(conversion, shared, masks))


def is_done(conversion: Conversion) -> bool:
    """Say whether the destination is already what this conversion would make.

    Raises:
        StoreError: the destination holds something else.
    """
    destination = conversion.destination
    if not destination.exists():
        return False
    if (destination / HEADER).exists() and read_header(destination / HEADER).made == conversion.made:
        _tidy(destination)
        Store(destination)  # refuses files that are missing or cut off
        return True
    raise StoreError(f"{destination} exists and is not this store: remove it or choose another name")


def begin(conversion: Conversion, room: bool = True) -> None:
    """Make the directory, or check that the one found is this conversion's, and that the disk has room.

    Args:
        room: check for room; not where other processes are writing already.

    Raises:
        StoreError: another conversion's, or too little room.
    """
    directory = conversion.partial
    path = directory / PLAN
    if not path.exists():
        directory.mkdir(parents=True, exist_ok=True)
        temporary = tagged(path)
        temporary.write_text(json.dumps(conversion.made))
        publish(temporary, path, replace=False)
    before = json.loads(path.read_text())
    for key in {**conversion.made, **before}:
        if conversion.made.get(key) != before.get(key):
            raise StoreError(
                f"{directory} was begun with {key} {before.get(key)}, not {conversion.made.get(key)}: "
                "repeat the first command, or remove that directory"
            )
    if is_done(conversion):  # it was finished, and got its name, just before the directory was made again
        shutil.rmtree(directory)
        return
    if not room:
        return
    free = shutil.disk_usage(directory).free  # before the look at what is there, which others may add to
    need = len(conversion.time_s) * conversion.field_bytes - _held_bytes(directory)
    if need > free:
        raise StoreError(f"{directory} needs {size_text(need)} more, the disk has {size_text(free)} free")


def _held_bytes(directory: Path) -> int:
    """Return the bytes on disk that files of a directory take; sparse files count what they hold."""
    held = 0
    for file in directory.iterdir():
        with suppress(FileNotFoundError):  # another process has just given it its name
            held += file.stat().st_blocks * 512
    return held


def write_fields(conversion: Conversion, shared: Shared) -> None:
    """Write every time that is not there yet.

    Raises:
        StoreError: a value is missing in a channel that is not declared to have missing points.
    """
    blocks = {block.name: block for block in conversion.blocks}
    shared.each(
        "fields",
        {name: block.length for name, block in blocks.items()},
        lambda name: write_block(conversion, blocks[name], shared.beat),
        lambda: count_marks(conversion),
    )


def count_marks(conversion: Conversion) -> int:
    """Return how many times are written so far, by all processes."""
    done = 0
    for year, indices in conversion.years.items():
        path = conversion.partial / f"{year}.h5"
        if path.exists():
            done += len(indices)
        elif marks_of(path).exists():
            done += marks_of(path).read_bytes().count(1)
    return done


def write_block(conversion: Conversion, block: Block, beat: Callable[[], None]) -> Part:
    """Write a block's times that are not there yet; return the points with a value, for `find_masks`."""
    grid = (conversion.latitude_deg, conversion.longitude_deg, conversion.window)
    path = conversion.partial / f"{block.year}.h5"
    writer = YearWriter(path, conversion.names, conversion.time_s[conversion.years[block.year]], *grid)
    at_once = max(1, min(block.length, READ_BYTES // conversion.field_bytes))
    masked = {conversion.names.index(name): name for name in conversion.masked}
    valid = {name: np.ones(conversion.size, dtype=bool) for name in masked.values()}
    written = YearFile(writer.partial)
    try:
        for begin in range(block.start, block.start + block.length, at_once):
            end = min(begin + at_once, block.start + block.length)
            todo = [n for n in range(begin, end) if not writer.done[n]]
            if todo:
                first, last = (block.first + n - block.start for n in (todo[0], todo[-1]))
                x_nCYX = read_fields(conversion, first, last + 1)
            for n in todo:
                writer.write(n, x_nCYX[n - todo[0]])
                beat()
            writer.mark()
            for n in range(begin, end):
                for channel, name in masked.items():
                    new = x_nCYX[n - todo[0], channel] if n in todo else _one(written, n, channel, conversion)
                    valid[name] &= ~np.isnan(new)
    finally:
        written.close()
        writer.close()
    return valid


def _one(file: YearFile, index: int, channel: int, conversion: Conversion) -> Field:
    return file.read(index, (0, 0), conversion.size, channel=channel)[0]


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
    latitude_deg = conversion.sources.latitude_deg[conversion.dropped :]
    return coarsen(x_YX[..., conversion.dropped :, :], latitude_deg, conversion.coarsen)


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


def find_masks(conversion: Conversion, shared: Shared) -> Part:
    """Finish the years, and join the points with a value at every time: bool [Y, X] by channel.

    Only channels that were declared to have missing points, and have, are in it.

    Raises:
        StoreError: no point has.
    """
    grid = (conversion.latitude_deg, conversion.longitude_deg, conversion.window)
    for year, indices in conversion.years.items():
        path = conversion.partial / f"{year}.h5"
        if not path.exists():
            writer = YearWriter(path, conversion.names, conversion.time_s[indices], *grid)
            writer.close()
            writer.finish()
    masks = {}
    for name in conversion.masked:
        valid_YX = np.ones(conversion.size, dtype=bool)
        if given_statistics.is_store(conversion.statistics_from):
            valid_YX &= Store(conversion.statistics_from).masks.get(name, True)
        for block in conversion.blocks:
            valid_YX &= shared.part("fields", block.name)[name]
        if not valid_YX.any():
            raise StoreError(f"{name} has no point with a value at every time: leave it out with --channels")
        if not valid_YX.all():
            masks[name] = valid_YX
    return masks


def _train(conversion: Conversion, masks: Part) -> Train:
    years = conversion.years
    files = [YearFile(conversion.partial / f"{year}.h5") for year in years]
    return Train(
        Years(files, [len(indices) for indices in years.values()]),
        conversion.time_s,
        conversion.train_s,
        conversion.intervals_h,
        {conversion.names.index(name): valid_YX for name, valid_YX in masks.items()},
    )


def counted(conversion: Conversion) -> Iterable[Block]:
    """Return the blocks with a time of the train period."""
    start, end = np.searchsorted(conversion.time_s, conversion.train_s)
    return [one for one in conversion.blocks if one.first <= end and one.first + one.length > start]


def count_fields(stage: str, conversion: Conversion, shared: Shared, masks: Part) -> None:
    """Count the fields of the train period, block by block."""
    train = _train(conversion, masks)
    blocks = {block.name: block for block in counted(conversion)}

    def count(name: str) -> Part:
        first = blocks[name].first
        return train.moments(first, first + blocks[name].length, shared.beat).arrays

    shared.each(stage, {name: block.length for name, block in blocks.items()}, count)
    train.years.close()


def find_statistics(stage: str, conversion: Conversion, shared: Shared, masks: Part) -> Statistics:
    """Join what `count_fields` has counted, or take the statistics of `statistics_from`."""
    if conversion.statistics_from:
        return given_statistics.read(
            conversion.statistics_from, conversion.names, conversion.intervals_h, conversion.train_s
        )
    train = _train(conversion, masks)
    parts = (Moments.restored(shared.part(stage, block.name)) for block in counted(conversion))
    numbers = train.statistics(parts, conversion.names)
    train.years.close()
    return numbers


def finish(conversion: Conversion, shared: Shared, masks: dict[str, NDArray[np.bool_]]) -> None:
    """Write `store.h5`, remove what only a conversion needs, and give the store its name."""
    numbers = find_statistics("statistics", conversion, shared, masks)
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
    kept = {directory / name for name in [HEADER, PLAN, PARTS, *dict(names)]}
    for leftover in set(directory.iterdir()) - kept:
        leftover.unlink()
    # Only now, when no other process finds its way to them: one that waits looks into the parts.
    directory.rename(conversion.destination)
    _tidy(conversion.destination)


def _tidy(store: Path) -> None:
    """Remove what only a conversion needs; the plan last, with which a store is not whole."""
    shutil.rmtree(store / PARTS, ignore_errors=True)
    (store / PLAN).unlink(missing_ok=True)
