"""Show the statistics of a store, compute them anew, or take over others."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.markup import escape
from rich.table import Table

from aeris.data.header import Header
from aeris.data.restatistics import changed, read_for, recompute, write
from aeris.data.statistics_hints import as_dict, hints
from aeris.data.store import Store
from aeris.log import console, progress_bar


@dataclass(frozen=True)
class Stats:
    """Print mean and standard deviation of every channel and of its changes; hints if something looks wrong.

    With --recompute or --from the store gets other statistics, and so another fingerprint: runs that were
    trained on it will refuse it.
    """

    store: Annotated[Path, tyro.conf.Positional]
    """A store."""
    recompute: tuple[str, str] | None = None
    """First and last date of a train period to compute them from, such as 1979 2018."""
    intervals_h: tuple[int, ...] = ()
    """With --recompute or --from: intervals (hours) of the changes. Empty: those there are."""
    from_path: Annotated[str, tyro.conf.arg(aliases=["--from"])] = ""
    """Another store, or statistics of another project (makani, Swift, anemoi), to take over."""
    processes: int = 1
    """With --recompute: processes that share the work."""
    dry_run: bool = False
    """Show what the statistics would be, and write nothing."""
    json: bool = False
    """Print one JSON object and nothing else."""


def stats(options: Stats) -> None:
    """Print the statistics, and write others if asked to.

    Raises:
        ValueError: the options contradict each other, or the statistics do not fit the store.
    """
    if options.recompute and options.from_path:
        raise ValueError("--recompute and --from are two ways: give one of them")
    if not (options.recompute or options.from_path) and (options.intervals_h or options.dry_run):
        raise ValueError("--intervals-h and --dry-run go with --recompute or --from")
    if options.processes != 1 and not options.recompute:
        raise ValueError("--processes goes with --recompute")
    store = Store(options.store)
    header = _new_header(store, options)
    numbers = header.statistics if header else store.statistics
    if not options.json:
        _show(store, header)
        for hint in hints(store, numbers):
            console.print(f"[yellow]look:[/] {escape(hint)}")
    if header and not options.dry_run:
        write(store, header)
    new, before = Store(options.store).fingerprint_id, store.fingerprint_id
    if options.json:
        found = as_dict(store.channels, numbers)
        print(json.dumps({**found, "hints": hints(store, numbers), "fingerprint": new}))
    elif header and not options.dry_run:
        console.print(f"{options.store} now has the fingerprint {new}, before {before}:")
        console.print("runs trained on it before will refuse it" if new != before else "nothing has changed")


def _new_header(store: Store, options: Stats) -> Header | None:
    if options.from_path:
        return changed(store, read_for(store, options.from_path, options.intervals_h), options.from_path)
    if not options.recompute:
        return None
    with progress_bar() as progress:
        task = progress.add_task("statistics", total=len(store), visible=not options.json)

        def show(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)

        numbers = recompute(store, options.recompute, options.intervals_h, options.processes, show)
    return changed(store, numbers)


def _show(store: Store, header: Header | None) -> None:
    """Print the statistics, new ones beside the old."""
    numbers = header.statistics if header else store.statistics
    start, end = numbers.train_period
    hours = sorted(numbers.residual_std)
    before = store.statistics
    title = f"{store.path}, {start} to {end}; standard deviation of the change over"
    columns = ["mean", "std", *(["mean before", "std before"] if header else []), *(f"{h} h" for h in hours)]
    table = Table("", "units", *columns, title=title, title_justify="left")
    for c, one in enumerate(store.channels):
        row = [numbers.mean_C[c], numbers.std_C[c]]
        row += [before.mean_C[c], before.std_C[c]] if header else []
        row += [numbers.residual_std[h][c] for h in hours]
        table.add_row(one.name, one.units, *(f"{number:.4g}" for number in row))
    console.print(table)
