"""Reading a rank's windows against reading the same bytes in order: `python -m benchmarks.io`.

Makes a store shaped as ERA5 (720 x 1440 points, 69 channels) of random numbers, drops it from memory before
every measurement (posix_fadvise DONTNEED after fsync), and reads, in turn with plain sequential reading of as
many bytes: windows of ranks of a 6 x 6 layout, whole samples, and (from memory) samples through data workers.
Then trains `tiny` with and without workers, for the share of a step that waits for data.

A virtual disk may be cached outside of this machine, and be faster in its first second than later. What
is read beyond a rank's bytes is counted of one rank alone: its neighbours would use it.
"""

from __future__ import annotations

import json
import mmap
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import torch
import tyro

from aeris.data.header import HEADER, Header, write_header
from aeris.data.loader import SampleDataset, read_packed
from aeris.data.statistics import Statistics
from aeris.data.variables import aeris_channels, channel
from aeris.data.yearwriter import YearWriter
from aeris.log import run_program
from benchmarks import starting
from benchmarks.records import Better, Output, Row, deliver, hardware
from swipe.backend import keep_freed_memory
from swipe.windows import WindowGrid, WindowShard

ROWS, COLS, WP = 720, 1440, (6, 6)
INTERVAL_H = 6
FILE = "1970.h5"
BETTER: dict[str, Better] = {
    "of_sequential": "more",
    "from_memory_mb_per_s": "more",
    "read_over_needed": "less",
}
SEQUENTIAL_BYTES = 8 * 2**20  # of one read


@dataclass(frozen=True)
class Options:
    """Read windows and samples of a large store, in turn with sequential reading of as many bytes."""

    gb: float = 1.2
    """Size of the store that is made; at least 0.6."""
    windows: tuple[int, ...] = (30, 60)
    """Window sides, a store for each."""
    ranks: int = 36
    """Ranks of the 36 whose windows are read, evenly spread; all of them read the whole store."""
    rounds: int = 2
    """Measurements of each row, in turn with sequential reading; medians are shown."""
    workers: tuple[int, ...] = (2,)
    """Data workers of the rows that read samples through them."""
    steps: int = 15
    """Steps of `tiny` that are trained to find out how long they wait for data; 0 leaves that out."""
    directory: Path = Path(tempfile.gettempdir())
    """Where the store is made, in a directory that is deleted afterwards: the file system to be measured."""
    output: Annotated[Output, tyro.conf.arg(name="")] = field(default_factory=Output)
    """Where the rows go."""


class Spent(NamedTuple):
    """What reading took: wall-clock s, bytes asked of the system, and bytes that came from the disk."""

    wall_s: float
    asked_bytes: int
    disk_bytes: int


def make_store(directory: Path, times: int, side: int) -> Path:
    """Make a store of random numbers with chunks of `side`; return its path."""
    path = directory / f"windows{side}"
    path.mkdir()
    names = aeris_channels(sst=False)
    time_s = np.arange(times, dtype=np.int64) * INTERVAL_H * 3600
    latitude_deg, longitude_deg = np.linspace(89.75, -90.0, ROWS), np.arange(COLS) * (360.0 / COLS)
    writer = YearWriter(path / FILE, names, time_s, latitude_deg, longitude_deg, side)
    x_CYX = np.random.default_rng(0).standard_normal((len(names), ROWS, COLS), dtype=np.float32)
    for index in range(times):
        writer.write(index, x_CYX)
        writer.mark()
        x_CYX += 1
    writer.finish()
    zero, one = np.zeros(len(names)), np.ones(len(names))
    period = (np.datetime64(0, "s"), np.datetime64(int(time_s[-1]), "s"))
    header = Header(
        channels=tuple(map(channel, names)),
        latitude_deg=latitude_deg,
        longitude_deg=longitude_deg,
        time_s=time_s,
        files=[(FILE, times, (path / FILE).stat().st_size)],
        static={"geopotential_at_surface": x_CYX[0], "land_sea_mask": x_CYX[1]},
        masks={},
        statistics=Statistics(zero, one, {INTERVAL_H: zero}, {INTERVAL_H: one}, period),
        window=side,
        row_offset=1,
        made={},
    )
    write_header(path / HEADER, header)
    return path


def forget(path: Path) -> None:
    """Drop a file from this machine's memory."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def accounts() -> tuple[int, int]:
    """Return bytes this process has asked of the system and had read from disks; 0 where nobody counts."""
    try:
        lines = Path("/proc/self/io").read_text().splitlines()
    except OSError:
        return 0, 0
    found = {name: int(value) for name, value in (line.split(": ") for line in lines)}
    return found["rchar"], found["read_bytes"]


def timed(read: Callable[[], object], path: Path | None) -> Spent:
    """Time a way of reading; the file at `path` is dropped from memory before."""
    if path is not None:
        forget(path)
    before, start = accounts(), time.perf_counter()
    read()
    wall, after = time.perf_counter() - start, accounts()
    return Spent(wall, after[0] - before[0], after[1] - before[1])


def in_order(path: Path, size: int, direct: bool = False) -> None:
    """Read the first bytes of a file; `direct`: past the system's memory.

    Raises:
        OSError: the file system cannot do the latter.
    """
    memory = mmap.mmap(-1, SEQUENTIAL_BYTES)  # lies as O_DIRECT wants it
    descriptor = os.open(path, os.O_RDONLY | (os.O_DIRECT if direct else 0))
    try:
        for offset in range(0, size, SEQUENTIAL_BYTES):
            os.preadv(descriptor, [memory], offset)
    finally:
        os.close(descriptor)


def places(ranks: int) -> list[tuple[int, int]]:
    """Choose ranks of the layout, evenly spread."""
    count = WP[0] * WP[1]
    return [divmod(rank * count // ranks, WP[1]) for rank in range(ranks)]


class Reading:
    """The ways of reading a store that are compared, and how many bytes each needs."""

    def __init__(self, path: Path, side: int, ranks: int) -> None:
        self.side, self.file = side, path / FILE
        grid = WindowGrid(ROWS, COLS, side)
        shards = [WindowShard.dealt(grid, WP, place) for place in places(ranks)]
        # Opened once, as a run does: the header with its static fields is not what is measured.
        self.ranks = [SampleDataset(path, INTERVAL_H, shard, 0) for shard in shards]
        store = self.ranks[0].store
        self.times = len(store)
        self.field_bytes = shards[0].token_index().size * len(store.names) * 4  # of one rank and time

    def windows(self, ranks: int) -> int:
        """Read the windows of the first ranks at every time; return how many bytes they are."""
        for rank in self.ranks[:ranks]:
            for index in range(self.times):
                rank.store.read_windows(index, rank.shard)
            rank.store.close()
        return ranks * self.times * self.field_bytes

    def samples(self, ranks: int) -> int:
        """Read samples of the first ranks, of two neighbouring times each; no time twice."""
        for rank in self.ranks[:ranks]:
            for image in self.apart():
                rank.packed(image)
            rank.store.close()
        return ranks * (self.times // 2) * 2 * self.field_bytes

    def through(self, workers: int) -> tuple[int, float]:
        """Read the samples of one rank through data workers; return bytes and s, without their start."""
        images = self.apart()
        order = [images[0]] * (8 * workers) + 16 * images
        loader = iter(read_packed(self.ranks[0], order, 1, 1, workers, begin=keep_freed_memory))
        for _ in islice(loader, 8 * workers):
            pass
        start = time.perf_counter()
        count = sum(1 for _ in loader)
        return count * 2 * self.field_bytes, time.perf_counter() - start

    def apart(self) -> list[int]:
        """Return images whose pairs share no time."""
        dataset = self.ranks[0]
        return [k for k in range(len(dataset)) if dataset.pair(k)[0] % 2 == 0]


def row(what: str, **numbers: float | str | int) -> Row:
    """Return a row; what was not measured is empty."""
    columns = ("window", "workers", "mb_per_s", "sequential_mb_per_s", "direct_mb_per_s", "of_sequential",
               "read_over_needed", "from_memory_mb_per_s", "data_wait")  # fmt: skip
    return {"what": what} | {name: numbers.get(name, "") for name in columns}


def measure(what: str, way: Callable[[int], int], reading: Reading, rounds: int) -> Row:
    """Read in one way, in turn with sequential reading; return the row."""
    file, ranks, found = reading.file, len(reading.ranks), []
    own_bytes = way(1)  # warms up
    alone = timed(lambda: way(1), file)
    needed, counted = ranks * own_bytes, max(alone.asked_bytes, alone.disk_bytes)
    for _ in range(rounds):
        plain = timed(lambda: in_order(file, needed), file)
        cold, again = timed(lambda: way(ranks), file), timed(lambda: way(ranks), None)
        found.append((cold, plain, direct(file, needed), again))
    cold_s, plain_s, direct_s, memory_s = (
        statistics.median(spent.wall_s for spent in column) for column in zip(*found)
    )
    return row(
        what,
        window=reading.side,
        mb_per_s=needed / cold_s / 1e6,
        sequential_mb_per_s=needed / plain_s / 1e6,
        direct_mb_per_s=needed / direct_s / 1e6,
        of_sequential=statistics.median(plain.wall_s / own.wall_s for own, plain, *_ in found),
        read_over_needed=counted / own_bytes if counted else "",
        from_memory_mb_per_s=needed / memory_s / 1e6,
    )


def direct(path: Path, size: int) -> Spent:
    """Time sequential reading past the system's memory; not a number where that cannot be."""
    try:
        return timed(lambda: in_order(path, size, direct=True), path)
    except (OSError, AttributeError):
        return Spent(float("nan"), 0, 0)


def train(workers: int, steps: int, directory: Path) -> Row:
    """Train `tiny` for some steps; return the share of time it waited for data, after the first three."""
    run_dir = directory / f"workers{workers}"
    flags = ["--train.images", str(2 * steps), "--data.workers", str(workers), "--device", "cpu"]
    command = [sys.executable, "-m", "aeris.train", "tiny", "--run-dir", str(run_dir), *flags]
    starting.run(command, torch.get_num_threads())
    records = [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]
    seconds = [1 / record["images_per_s"] for record in records if "images_per_s" in record][3:]
    waits = [record["data_wait"] for record in records if "data_wait" in record][3:]
    wait = sum(s * w for s, w in zip(seconds, waits)) / sum(seconds)
    return row("training tiny", window=12, workers=workers, data_wait=wait)


def draw(rows: Sequence[Row], path: Path, title: str) -> None:
    """Draw rates, and waits of training; needs matplotlib."""
    from matplotlib.figure import Figure

    reads = [one for one in rows if one["from_memory_mb_per_s"] != ""]
    runs = [one for one in rows if one["data_wait"] != ""]
    figure = Figure(figsize=(11, 1.8 + 0.6 * max(len(reads), 3)), layout="constrained")
    rates, waits = figure.subplots(1, 2, width_ratios=(4, 1))
    at = np.arange(len(reads))
    for column, label, color, shift in (
        ("mb_per_s", "from disk", "tab:blue", -0.18),
        ("from_memory_mb_per_s", "from memory", "lightsteelblue", 0.18),
    ):
        rates.barh(at + shift, [one[column] or 0 for one in reads], height=0.34, label=label, color=color)
    for column, label, marker in (
        ("sequential_mb_per_s", "as many bytes in order", "|"),
        ("direct_mb_per_s", "as many in order, O_DIRECT", "x"),
    ):
        values = [float("nan") if one[column] == "" else one[column] for one in reads]
        rates.plot(values, at - 0.18, marker, color="black", markersize=10, label=label)
    rates.set_yticks(at, [_name(one) for one in reads], fontsize=8)
    rates.set_ylim(len(reads) - 0.5, -0.6)
    rates.set_xlabel("MB/s of the bytes that are needed")
    rates.legend(fontsize=7, frameon=False, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    bars = waits.bar([str(one["workers"]) for one in runs], [100 * one["data_wait"] for one in runs])
    waits.bar_label(bars, [f"{one['data_wait']:.2%}" for one in runs], fontsize=8)
    waits.axhline(2, color="gray", linestyle=":", linewidth=1)
    waits.set(xlabel="data workers", ylabel="waiting for data, % of a step", title="training tiny")
    for axes in (rates, waits):
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, dpi=110)


def _name(one: Row) -> str:
    name = f"{one['what']}, {one['window']} x {one['window']}"
    if one["of_sequential"] == "":
        return f"{name},\n{one['workers']} data workers"
    over = f", {one['read_over_needed']:.3f} x its bytes" if one["read_over_needed"] != "" else ""
    return f"{name}\n{one['of_sequential']:.0%} of that in order{over}"


def run(options: Options) -> list[Row]:
    """Measure everything.

    Raises:
        ValueError: a store too small for two times, or more ranks than the layout has.
        OSError: the store cannot be written.
    """
    field_bytes = len(aeris_channels(sst=False)) * ROWS * COLS * 4
    times = int(options.gb * 1e9 / field_bytes)
    if times < 2:
        raise ValueError(
            f"--gb {options.gb}: two times are {2 * field_bytes / 1e9:.2f} GB, give at least that"
        )
    if not 1 <= options.ranks <= WP[0] * WP[1]:
        raise ValueError(f"--ranks {options.ranks}: the layout has {WP[0] * WP[1]}, give 1 to that")
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="aeris-io-", dir=options.directory) as name:
        directory = Path(name)
        for side in options.windows:
            path = make_store(directory, times, side)
            reading = Reading(path, side, options.ranks)
            rows.append(measure("windows", reading.windows, reading, options.rounds))
            rows.append(measure("samples", reading.samples, reading, options.rounds))
            for workers in options.workers:
                size, wall_s = reading.through(workers)
                rows.append(
                    row("samples", window=side, workers=workers, from_memory_mb_per_s=size / wall_s / 1e6)
                )
            (path / FILE).unlink()
        for workers in (0, *options.workers) if options.steps else ():
            rows.append(train(workers, options.steps, directory))
    return rows


def main() -> None:
    """Run the benchmark."""
    options = tyro.cli(Options, description=Options.__doc__)
    keep_freed_memory()
    rows = run(options)
    key = ("what", "window", "workers")
    worse = deliver(rows, options.output, key=key, numbers=BETTER, draw=draw, about=hardware())
    sys.exit(1 if worse else 0)


if __name__ == "__main__":
    run_program(main)
