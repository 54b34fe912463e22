"""Time a rank's share of a store through the real loader, and the same bytes of the same files in order.

Every way is timed twice: with the files dropped from this machine's memory (cold), then again (warm). A disk
or server may have its own memory, which nobody can empty from here.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from aeris.data.loader import SampleDataset, read_packed
from aeris.data.store import Store
from aeris.data.yearfile import FIELD_BYTES
from swipe.windows import WindowGrid, WindowShard

BLOCK_BYTES = 8 * 2**20


@dataclass(frozen=True)
class Speed:
    """What was measured."""

    rates: dict[str, float]
    """Way of reading -> bytes of the rank's fields per second."""
    sample_bytes: int
    """Of a rank's part of the two times of a sample."""
    samples: int
    """How many were read in each way."""
    cold: bool
    """Whether the files could be dropped from memory."""

    def as_dict(self) -> dict[str, object]:
        """Return all of it, for a machine to read."""
        return asdict(self)


def measure(
    store: Store, window: int, layout: tuple[int, int], interval_h: int, workers: int, most_bytes: int
) -> Speed:
    """Time the ways of reading.

    Args:
        window: side of the model's windows, points.
        layout: ranks along rows and cols; the share of the first is read.
        workers: data workers.
        most_bytes: read in each way.

    Raises:
        ValueError: windows that do not fit, or an interval without statistics.
    """
    grid = WindowGrid(store.rows, store.cols, window)
    dataset = SampleDataset(store.path, interval_h, WindowShard.dealt(grid, layout, (0, 0)), seed=0)
    points = store.rows * store.cols // (layout[0] * layout[1])
    sample_bytes = 2 * points * len(store.names) * FIELD_BYTES
    count = max(1, min(len(dataset), most_bytes // sample_bytes))
    order = range(count)
    files = sorted(path for path in store.path.glob("[0-9]*.h5"))
    ways: dict[str, Callable[[], float]] = {
        "in order": lambda: _in_order(files, count * sample_bytes),
        f"loader, {workers} workers": lambda: _through_loader(dataset, order, workers),
    }
    rates, cold = {}, True
    for name, way in ways.items():
        dropped = [_forget(path) for path in files]
        cold = cold and all(dropped)
        for state in ("cold", "warm"):
            rates[f"{name}, {state}"] = count * sample_bytes / way()
    store.close()
    return Speed(rates, sample_bytes, count, cold)


def _forget(path: Path) -> bool:
    """Drop a file from this machine's memory, if that can be."""
    if not hasattr(os, "posix_fadvise"):
        return False
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True


def _in_order(files: Sequence[Path], size: int) -> float:
    """Read so many bytes from the beginning of the files; return s."""
    memory, left = bytearray(BLOCK_BYTES), size
    began = time.perf_counter()
    while (
        left > 0
    ):  # a rank reads every time of the store twice, as the end of one sample, the start of another
        for path in files:
            with path.open("rb", buffering=0) as file:
                while left > 0 and (got := file.readinto(memory)):
                    left -= got
    return time.perf_counter() - began


def _through_loader(dataset: SampleDataset, order: Sequence[int], workers: int) -> float:
    """Read samples; return s, without the start of the workers."""
    warm = [order[0]] * (8 * workers)  # twice what workers have ready; read from memory
    loader = iter(read_packed(dataset, [*warm, *order], 1, 1, workers))
    for _ in warm:
        next(loader)
    began = time.perf_counter()
    for _ in loader:
        pass
    return time.perf_counter() - began
