"""How fast a rank's share of a store is read, beside plain reading of the same files."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.table import Table

from aeris.data.store import Store
from aeris.log import console


@dataclass(frozen=True)
class Bench:
    """Read a rank's share of a store as training does, and as many bytes of the same files in order."""

    store: Annotated[Path, tyro.conf.Positional]
    """A store."""
    window: int = 0
    """Side of the model's windows (points). 0: that of the store."""
    layout: tuple[int, int] = (1, 1)
    """Ranks over which the windows are dealt, along rows and cols (--parallel.wp-y and wp-x)."""
    interval_h: int = 0
    """Interval (hours) of the samples. 0: the shortest that has statistics."""
    workers: int = 2
    """Data workers; 0 reads in the program itself."""
    gb: float = 1.0
    """How much is read, at most, in each way."""
    images_per_s: float = 1.0
    """Training speed of the whole run, for the bytes it needs per second."""
    json: bool = False
    """Print one JSON object and nothing else."""


def bench(options: Bench) -> None:
    """Measure, and print.

    Raises:
        ValueError: windows that do not fit the store, or an interval without statistics.
    """
    from aeris.data.reading_speed import measure  # here, because it loads torch

    store = Store(options.store)
    hours = options.interval_h or min(store.statistics.residual_std)
    side = options.window or store.window
    found = measure(store, side, options.layout, hours, options.workers, int(options.gb * 1e9))
    need = options.images_per_s * found.sample_bytes
    if options.json:
        print(json.dumps({**found.as_dict(), "needed_bytes_per_s": need}))
        return
    title = f"{store.path}: a rank of {options.layout[0]} x {options.layout[1]}, windows of {side}, {hours} h"
    table = Table("", "MB/s", "samples/s", title=title, title_justify="left")
    for name, rate in found.rates.items():
        table.add_row(name, f"{rate / 1e6:,.0f}", f"{rate / found.sample_bytes:,.2f}")
    console.print(table)
    console.print(
        f"{found.samples} samples of {found.sample_bytes / 1e6:.3g} MB a rank; "
        f"{options.images_per_s:g} images/s need {need / 1e6:.3g} MB/s on every reading rank"
    )
    if not found.cold:
        console.print("the files could not be dropped from memory: nothing here was read cold")
