"""Say what a conversion will do, and do it."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable

import numpy as np
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from aeris.data.conversion import is_done
from aeris.data.conversion_estimate import Estimate, estimate
from aeris.data.crew import run_in_processes
from aeris.data.layouts.source import Source
from aeris.data.options import Options
from aeris.data.plan import TRAIN_SHARE, Conversion, plan, size_text
from aeris.data.store import Store
from aeris.log import console, progress_bar, speaker
from launch.rank import Ranks, discover, leave

SAY_S = 60.0  # between two lines where there is no terminal


def convert(options: Options) -> None:
    """Make a store, or say what would be done.

    Raises:
        ValueError: the options do not fit the sources, or the data cannot be used.
    """
    ranks = discover(os.environ)
    speaker.take_turn(ranks.rank, ranks.world)
    if options.json and not options.dry_run:
        raise ValueError("--json goes with --dry-run")
    if options.processes < 1:
        raise ValueError(f"--processes {options.processes}: at least one works")
    conversion = plan(options)
    if options.dry_run:
        if ranks.rank == 0:
            _say(conversion, options, estimate(conversion, options.rate_mb_s, ranks.world))
    else:
        _do(conversion, options, ranks)
    leave()


def _say(conversion: Conversion, options: Options, expected: Estimate) -> None:
    if options.json:
        print(json.dumps(summary(conversion, expected)))
    else:
        show(conversion, options, expected)


def _do(conversion: Conversion, options: Options, ranks: Ranks) -> None:
    show(conversion, options)
    if is_done(conversion):
        console.print(f"{options.store} is there already and whole; nothing to do")
        return
    with progress_bar("rate") as progress:
        run_in_processes(conversion, _tracker(progress, conversion.field_bytes), ranks.rank, ranks.world)
        for task in progress.tasks:
            progress.update(task.id, completed=task.total)
    store = Store(options.store)
    size = size_text(sum(file.stat().st_size for file in store.path.iterdir()))
    ready = f"{options.store} is ready: {len(store)} times, {size}, fingerprint {store.fingerprint_id}"
    console.print(ready)


def _tracker(progress: Progress, field_bytes: int) -> Callable[[str, int], Callable[[int], None]]:
    """Show how far all processes are: a live line, or without a terminal a line a minute."""

    def track(name: str, length: int) -> Callable[[int], None]:
        task = progress.add_task(name, total=length, rate="")
        began: list[tuple[float, int]] = []
        said = [time.monotonic()]

        def show(done: int) -> None:
            now = time.monotonic()
            began.append((now, done)) if not began else None
            since, before = began[0]
            rate = (done - before) / max(now - since, 1e-9)
            text = f"{size_text(rate * field_bytes)}/s" if done > before else ""
            progress.update(task, completed=done, rate=text)
            if not console.is_terminal and now - said[0] > SAY_S and done > before:
                said[0] = now
                left_h = (length - done) / rate / 3600
                console.print(f"{name}: {done:,} of {length:,} times, {text}, {left_h:.2f} h left")

        return show

    return track


def summary(conversion: Conversion, expected: Estimate) -> dict[str, object]:
    """Return what would be done, for a machine to read."""
    return {
        **conversion.made,
        "store": str(conversion.destination),
        "files": [*(f"{year}.h5" for year in conversion.years), "store.h5"],
        "bytes": len(conversion.time_s) * conversion.field_bytes,
        "layouts": [part.layout for part in conversion.sources.parts],
        "expected": expected.as_dict(),
    }


def show(conversion: Conversion, options: Options, expected: Estimate | None = None) -> None:
    """Print how every source is read and what the store will be, and with `expected` what it takes."""
    for part in conversion.sources.parts:
        console.print(_mapping_table(part))
    table = Table(title=str(conversion.destination), show_header=False, title_justify="left")
    table.add_column()
    table.add_column(overflow="fold")  # commands in it are to be copied whole
    for row in [*_rows(conversion, options), *(expected.rows() if expected else [])]:
        table.add_row(*row)
    console.print(table)


def _mapping_table(part: Source) -> Table:
    title = escape(f"{part.path} ({part.layout})")
    table = Table("", "in the source", "in the store", title=title, title_justify="left")
    for row in part.mapping:
        table.add_row(*map(escape, row))
    return table


def _rows(conversion: Conversion, options: Options) -> list[tuple[str, str]]:
    times = conversion.time_s.astype("datetime64[s]")
    (rows, cols), side = conversion.size, conversion.window
    dropped = ", the row at the north pole dropped" if conversion.dropped else ""
    dropped = dropped or ", without the row at the north pole" * bool(conversion.row_offset)
    averaged = f", means of {options.coarsen} x {options.coarsen}" if options.coarsen > 1 else ""
    start, end = (np.datetime64(second, "s") for second in conversion.train_s)
    default = "" if any(options.train_period) else f" (the first {TRAIN_SHARE:.0%}; else --train-period)"
    size = size_text(len(times) * conversion.field_bytes)
    lines = [
        ("channels", f"{len(conversion.names)}: {' '.join(conversion.names)}"),
        ("times", f"{len(times)}: {times[0]} to {times[-1]}"),
        ("grid", f"{rows} x {cols}{dropped}{averaged}"),
        ("windows", f"{rows // side} x {cols // side} of {side} x {side} points"),
    ]
    if conversion.statistics_from:
        lines.append(("statistics", f"those of {conversion.statistics_from}"))
    else:
        lines.append(("train period", f"{start} to {end}{default}"))
        lines.append(("residuals", ", ".join(f"{hours} h" for hours in conversion.intervals_h)))
    if conversion.masked:
        lines.append(("may be missing", " ".join(conversion.masked)))
    variables = dict.fromkeys(one.variable for one in conversion.channels)
    for name, value in conversion.sources.placeholders(variables).items():
        lines.append(("placeholder", f"{name} of {value:g} is read as missing"))
    if conversion.missing_static:
        lines.append(("zeros for", " ".join(conversion.missing_static)))
    years = [*conversion.years]
    names = f"{years[0]}.h5 to {years[-1]}.h5" if len(years) > 4 else " ".join(f"{y}.h5" for y in years)
    lines.append(("files", f"{names} store.h5"))
    lines.append(("size", f"{size} before compression" if options.compress else size))
    return lines
