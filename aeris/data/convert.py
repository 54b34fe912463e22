"""Make a store from weather data: `python -m aeris.data.convert SOURCE... STORE --window 30`.

Reads NetCDF and Zarr in the WeatherBench 2 layout or near it, says what it will do, and does it. A killed
conversion goes on when the same command is given again.
"""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
import tyro
from rich.table import Table

from aeris.data.conversion import is_done, run
from aeris.data.options import Options
from aeris.data.plan import TRAIN_SHARE, Conversion, plan, size_text
from aeris.data.sources import Source
from aeris.data.store import Store
from aeris.log import console, progress_bar, run_program


def main() -> None:
    """Run the program."""
    options = tyro.cli(Options, config=(tyro.conf.FlagCreatePairsOff,), prog="python -m aeris.data.convert")
    if options.json and not options.dry_run:
        raise ValueError("--json goes with --dry-run")
    conversion = plan(options)
    if options.dry_run and options.json:
        print(json.dumps(summary(conversion)))
        return
    show(conversion, options)
    if options.dry_run:
        return
    if is_done(conversion):
        console.print(f"{options.store} is there already and whole; nothing to do")
        return
    with progress_bar() as progress:

        def track(name: str, length: int) -> Callable[[], None]:
            task = progress.add_task(name, total=length)
            return lambda: progress.advance(task)

        run(conversion, track)
    store = Store(options.store)
    size = size_text(sum(file.stat().st_size for file in store.path.iterdir()))
    ready = f"{options.store} is ready: {len(store)} times, {size}, fingerprint {store.fingerprint_id}"
    console.print(ready)


def summary(conversion: Conversion) -> dict[str, object]:
    """Return what would be done, for a machine to read."""
    return {
        **conversion.made,
        "store": str(conversion.destination),
        "files": [*(f"{year}.h5" for year in conversion.years), "store.h5"],
        "bytes": len(conversion.time_s) * conversion.field_bytes,
    }


def show(conversion: Conversion, options: Options) -> None:
    """Print how every source is read and what the store will be."""
    for part in conversion.sources.parts:
        console.print(_mapping_table(part))
    table = Table(title=str(conversion.destination), show_header=False, title_justify="left")
    for row in _rows(conversion, options):
        table.add_row(*row)
    console.print(table)


def _mapping_table(part: Source) -> Table:
    table = Table("", "in the source", "in the store", title=part.path, title_justify="left")
    for row in part.mapping:
        table.add_row(*row)
    return table


def _rows(conversion: Conversion, options: Options) -> list[tuple[str, str]]:
    times = conversion.time_s.astype("datetime64[s]")
    (rows, cols), side = conversion.size, conversion.window
    dropped = f", {conversion.row_offset} row at the north pole dropped" if conversion.row_offset else ""
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
    if conversion.missing_static:
        lines.append(("zeros for", " ".join(conversion.missing_static)))
    lines.append(("files", f"{' '.join(f'{year}.h5' for year in conversion.years)} store.h5"))
    lines.append(("size", f"{size} before compression" if options.compress else size))
    return lines


if __name__ == "__main__":
    run_program(main)
