"""What a conversion takes: hours, memory, and how its files should lie on a parallel file system.

Shapes: n times, C channels, Y rows, X cols, W side of a window.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass

import numpy as np

from aeris.data.conversion import READ_BYTES, read_fields
from aeris.data.plan import Conversion, size_text
from aeris.data.statistics import HOUR_S, Moments
from aeris.data.yearfile import FIELD_BYTES

LARGE_BYTES, HUGE_BYTES = 10e9, 100e9  # of a file: from here over 8 disks of a Lustre system, over all
INTERPRETER_BYTES = 250e6  # Python with xarray, h5py and zarr


@dataclass(frozen=True)
class Estimate:
    """What a conversion takes."""

    processes: int
    """On all ranks together."""
    mb_per_s: float
    """Of the store, that one process gets done, statistics included."""
    measured: bool
    """Whether that was measured just now, on the first times and without writing."""
    hours: float
    write_bytes: float
    read_back_bytes: float
    """By the statistics."""
    memory_bytes: float
    """Of one process."""
    file_bytes: float
    """The largest file."""
    stripes: str
    """The command that spreads the files over the disks of Lustre; empty for small files."""

    def as_dict(self) -> dict[str, object]:
        """Return all of it, for a machine to read."""
        return asdict(self)

    def rows(self) -> list[tuple[str, str]]:
        """Describe it: (what, text)."""
        how = "measured on the first times, without writing" if self.measured else "--rate-mb-s"
        days = f" ({self.hours / 24:.1f} days)" if self.hours > 48 else ""
        each = f"{self.processes} processes of {self.mb_per_s:.3g} MB/s ({how})"
        moved = f"{size_text(self.write_bytes)} written, {size_text(self.read_back_bytes)} read back"
        needed = f"{size_text((self.write_bytes + self.read_back_bytes) / self.hours / HOUR_S)}/s"
        rows = [
            ("time", f"{self.hours:.3g} h{days} with {each}"),
            ("file system", f"{moved}: {needed} besides the source, or it takes longer"),
            ("memory", f"about {size_text(self.memory_bytes)} a process"),
        ]
        return rows + ([("Lustre", f"before the start: {self.stripes}")] if self.stripes else [])


def estimate(conversion: Conversion, rate_mb_s: float = 0.0, ranks: int = 1) -> Estimate:
    """Say what a conversion takes.

    Args:
        rate_mb_s: MB of the store that one process gets done in a second; 0 measures it on the first times.
        ranks: programs that are started together, each with `processes`.

    Raises:
        ValueError: the first times cannot be read.
    """
    processes = conversion.options.processes * ranks
    total = len(conversion.time_s) * conversion.field_bytes
    start, end = np.searchsorted(conversion.time_s, conversion.train_s)
    passes = 0 if conversion.statistics_from else 1 + bool(conversion.rounding)
    back = (int(end) + 1 - int(start)) * conversion.field_bytes * passes
    rate = rate_mb_s * 1e6 or measure(conversion, back / total)
    largest = max(len(indices) for indices in conversion.years.values()) * conversion.field_bytes
    return Estimate(
        processes=processes,
        mb_per_s=rate / 1e6,
        measured=not rate_mb_s,
        hours=total / rate / processes / HOUR_S,
        write_bytes=total * (1 + bool(conversion.rounding or conversion.compress)),
        read_back_bytes=back,
        memory_bytes=memory_bytes(conversion),
        file_bytes=largest,
        stripes=stripes(conversion, largest),
    )


def measure(conversion: Conversion, counted: float) -> float:
    """Read and put in order the first times; return bytes of the store per second.

    Args:
        counted: how often every byte is counted for the statistics, on average.
    """
    began = time.perf_counter()
    x_nCYX = read_fields(conversion, 0, min(at_once(conversion), len(conversion.time_s)))
    side = conversion.window
    for x_CYX in x_nCYX:
        blocks = x_CYX.reshape(len(x_CYX), x_CYX.shape[1] // side, side, x_CYX.shape[2] // side, side)
        np.ascontiguousarray(blocks.transpose(1, 3, 0, 2, 4))
    read_s = (time.perf_counter() - began) / len(x_nCYX)
    began = time.perf_counter()
    moments = Moments(1 + len(conversion.intervals_h), len(conversion.names))
    for channel, x_YX in enumerate(x_nCYX[0]):
        for series in range(len(moments.count_SC)):
            x_P = x_YX.ravel().astype(np.float64)
            moments.add(series, channel, x_P[np.isfinite(x_P)])
    count_s = time.perf_counter() - began
    return conversion.field_bytes / (read_s + counted * count_s)


def at_once(conversion: Conversion) -> int:
    """Return how many times are read at once."""
    return max(1, min(64, READ_BYTES // conversion.field_bytes))


def memory_bytes(conversion: Conversion) -> float:
    """Return about how much memory a process needs: while writing, or while counting."""
    rows, cols = len(conversion.sources.latitude_deg), len(conversion.sources.longitude_deg)
    levels = max(sum(one.variable == c.variable for c in conversion.channels) for one in conversion.channels)
    times = at_once(conversion)
    # The fields, one more in the order of windows, and a variable as it is read, turned, and in float64.
    writing = conversion.field_bytes * (times + 1) + times * levels * rows * cols * FIELD_BYTES * 4
    band = conversion.field_bytes * conversion.window // conversion.size[0]
    step_s = int(np.diff(conversion.time_s).min()) if len(conversion.time_s) > 1 else HOUR_S
    counting = band * (2 + max(conversion.intervals_h, default=0) * HOUR_S // step_s)
    return INTERPRETER_BYTES + max(writing, counting)


def stripes(conversion: Conversion, largest: float) -> str:
    """Return the command that spreads the files over the disks of a Lustre system; empty for small files."""
    if largest < LARGE_BYTES:
        return ""
    count = 8 if largest < HUGE_BYTES else -1
    return f"mkdir {conversion.partial} && lfs setstripe -c {count} -S 16M {conversion.partial}"
