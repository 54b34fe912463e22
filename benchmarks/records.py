"""The rows of a benchmark: printed, written, drawn, and set beside those of an earlier run.

A benchmark is told apart by its file name, a row by the columns of its `key`, a number by whether more of it
is better. `python -m benchmarks.run` runs all of them and compares them with one command.
"""

from __future__ import annotations

import csv
import platform
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.table import Table

from aeris.log import console

Row = dict[str, Any]
"""What was measured of one thing: columns by name, the same in every row."""
Better = Literal["more", "less"]
"""Which way a number improves."""
WIDTH = 200
"""Columns of the screen where there is none: a table in a file need not fit 80."""
TOLERANCE = 0.10
"""A number is worse than before if it is so by more than this share."""


@dataclass(frozen=True)
class Output:
    """Where the rows go besides the screen."""

    csv: Path | None = None
    """Also write the rows to this file."""
    compare: Path | None = None
    """An earlier file of this benchmark: every number is printed over its own there."""
    plot: Path | None = None
    """Also draw the rows (PNG; needs matplotlib)."""


def hardware(device: torch.device | str = "cpu") -> str:
    """Name the hardware and software of a measurement."""
    device = torch.device(device)
    if device.type != "cpu":
        return f"{getattr(torch, device.type).get_device_name(device)}, torch {torch.__version__}"
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = [line.split(":")[1].strip() for line in info.splitlines() if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    threads = torch.get_num_threads()
    return f"{name}, {threads} thread{'s' * (threads != 1)}, torch {torch.__version__}"


def command() -> str:
    """Return the command line of this program, as it would be typed."""
    module = Path(sys.argv[0]).stem
    return shlex.join(["python", "-m", f"benchmarks.{module}", *sys.argv[1:]])


def deliver(
    rows: Sequence[Row],
    output: Output,
    *,
    key: Sequence[str],
    numbers: Mapping[str, Better],
    draw: Callable[[Sequence[Row], Path, str], None],
    about: str,
    tables: Callable[[Sequence[Row]], Sequence[Table]] = lambda rows: [table(rows)],
) -> int:
    """Print the rows; write, draw and compare them where asked.

    Args:
        rows: at least one.
        output: what is asked for.
        key: columns by which a row finds its own in an earlier file.
        numbers: columns that are compared, and which way they improve.
        draw: makes the picture from the rows, its path and its title.
        about: hardware and software, as of `hardware`.
        tables: lays the rows out for the screen; by default all their columns.

    Returns:
        How many numbers are worse than before by more than `TOLERANCE`.

    Raises:
        ValueError: the earlier file is not of this benchmark.
        OSError: a file cannot be read or written.
    """
    for each in tables(rows):
        show(each)
    console.print(f"{about}; {command()}", markup=False, soft_wrap=True)
    if output.csv:
        output.csv.parent.mkdir(parents=True, exist_ok=True)
        with output.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, [*rows[0], "about", "date", "command"])
            writer.writeheader()
            writer.writerows(
                {**row, "about": about, "date": date.today().isoformat(), "command": command()}
                for row in rows
            )
    if output.plot:
        output.plot.parent.mkdir(parents=True, exist_ok=True)
        draw(rows, output.plot, about)
    return compare(rows, output.compare, key, numbers) if output.compare else 0


def show(found: Table) -> None:
    """Print a table; where there is no screen, in `WIDTH` columns."""
    # A width that is given to `print` can only narrow it.
    there = console if console.is_terminal else Console(file=console.file, width=max(console.width, WIDTH))
    there.print(found)


def table(rows: Sequence[Row]) -> Table:
    """Lay rows out for the screen, a column for each of theirs."""
    found = Table(box=None)
    for column in rows[0]:
        found.add_column(column.replace("_", " "), justify="right", overflow="fold")
    for row in rows:
        found.add_row(*(_shown(value) for value in row.values()))
    return found


def compare(rows: Sequence[Row], path: Path, key: Sequence[str], numbers: Mapping[str, Better]) -> int:
    """Print every number over its own in an earlier file; return how many are worse (see `deliver`)."""
    with path.open(newline="") as file:
        earlier = list(csv.DictReader(file))
    missing = [column for column in (*key, *numbers) if not earlier or column not in earlier[0]]
    if missing:
        raise ValueError(f"{path} is no file of this benchmark: it has no column {missing[0]}")
    then = "; ".join(filter(None, (earlier[0].get(column) for column in ("about", "date", "command"))))
    console.print(f"then: {then}", markup=False, soft_wrap=True)  # other settings compare nothing
    before = {tuple(row[column] for column in key): row for row in earlier}
    found = Table(*key, *numbers, title=f"now over {path}", title_justify="left", box=None)
    worse = 0
    for row in rows:
        name = tuple(str(row[column]) for column in key)
        cells = []
        for column, better in numbers.items():
            old = float(before[name][column]) if name in before and before[name][column] else 0.0
            ratio = row[column] / old if old and row[column] != "" else float("nan")
            bad = ratio < 1 - TOLERANCE if better == "more" else ratio > 1 + TOLERANCE
            worse += bad
            cells.append(("[red]" if bad else "") + ("new" if ratio != ratio else f"{ratio:.2f}"))
        found.add_row(*name, *cells)
    show(found)
    return worse


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
