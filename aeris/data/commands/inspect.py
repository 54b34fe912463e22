"""Look at sources before they are converted, or at a store."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.markup import escape
from rich.table import Table

from aeris.data.header import HEADER, PLAN
from aeris.data.inspection import inspect_source, inspect_store, inspect_unfinished
from aeris.data.options import read_units
from aeris.data.plan import size_text
from aeris.data.sources import open_source
from aeris.log import console


@dataclass(frozen=True)
class Inspect:
    """Say what sources hold and how they would be read, or what is in a store; find gaps and odd values."""

    paths: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE...|STORE...")]
    """What to look at: anything `convert` reads, stores, or stores that are being made."""
    member: int | None = None
    """Which ensemble member to take, if there are several."""
    units: tuple[str, ...] = ()
    """Units that the sources do not say or say wrongly, such as 2m_temperature=degC."""
    values: bool = True
    """Read the first, middle and last time of every variable; not, where that takes long."""
    json: bool = False
    """Print one JSON object and nothing else."""


def inspect(options: Inspect) -> None:
    """Print what is found.

    Raises:
        ValueError: a path is not understood; the others were shown.
    """
    if not options.paths:
        raise ValueError("name at least one source or store")
    reports, refused = [], []
    for path in options.paths:
        try:
            reports.append(_report(path, options))
        except ValueError as error:
            refused.append(str(error))
            continue
        if not options.json:
            _show(reports[-1])
    if options.json:
        print(json.dumps({"reports": reports, "refused": refused}))
    if refused:
        raise ValueError("; ".join(refused))


def _report(path: str, options: Inspect) -> dict[str, Any]:
    where = Path(path)
    for directory in (where, where.with_name(where.name + ".partial")):
        if (directory / PLAN).exists():
            return inspect_unfinished(directory)
    if (where / HEADER).exists():
        return inspect_store(where, options.values)
    source = open_source(path, options.member, units=read_units(options.units))
    return inspect_source(source, options.values)


def _show(report: dict[str, Any]) -> None:
    """Print a report as tables."""
    title = escape(f"{report['path']} ({report['layout']})")
    table = Table(title=title, show_header=False, title_justify="left")
    table.add_column()
    table.add_column(overflow="fold")
    for key, value in report["facts"].items():
        table.add_row(key, escape(str(value)))
    console.print(table)
    if report.get("mapping"):
        read = Table("", "in the source", "in the store", title="How it is read", title_justify="left")
        for row in report["mapping"]:
            read.add_row(*map(escape, row))
        console.print(read)
    if report.get("files"):
        files = Table("file", "times", "size", "", title_justify="left")
        for one in report["files"]:
            files.add_row(one["name"], str(one["times"]), size_text(one["bytes"]), one["state"])
        console.print(files)
    if report.get("values"):
        console.print(_values(report["values"]))
    for problem in report["problems"]:
        console.print(f"[bold red]problem:[/] {escape(problem)}")
    if not report["problems"]:
        console.print("no problem found")


def _values(rows: list[dict[str, Any]]) -> Table:
    """Put the times that were looked at into one line a field."""
    names = ("", "missing", "lowest", "mean", "highest", "units")
    table = Table(*names, title="At the first, middle and last time", title_justify="left")
    for name in dict.fromkeys(row["name"] for row in rows):
        mine = [row for row in rows if row["name"] == name]
        missing = sum(row["missing"] for row in mine) / len(mine)
        there = [row for row in mine if row["mean"] is not None]
        numbers = ["", "", ""]
        if there:
            mean = sum(row["mean"] for row in there) / len(there)
            ends = min(row["low"] for row in there), mean, max(row["high"] for row in there)
            numbers = [f"{number:.5g}" for number in ends]
        table.add_row(name, f"{missing:.1%}", *numbers, mine[0]["units"])
    return table
