"""Everything about data on disk: `python -m aeris.data inspect|stats|convert|bench`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tyro

from aeris.data.commands.bench import Bench, bench
from aeris.data.commands.convert import convert
from aeris.data.commands.inspect import Inspect, inspect
from aeris.data.commands.stats import Stats, stats
from aeris.data.options import Options
from aeris.log import run_program


def main() -> None:
    """Run the program."""
    commands: dict[str, Callable[..., Any]] = {
        "inspect": Inspect,
        "stats": Stats,
        "convert": Options,
        "bench": Bench,
    }
    options = tyro.extras.subcommand_cli_from_dict(
        commands, prog="python -m aeris.data", description=__doc__, config=(tyro.conf.FlagCreatePairsOff,)
    )
    match options:
        case Inspect():
            inspect(options)
        case Stats():
            stats(options)
        case Bench():
            bench(options)
        case Options():
            convert(options)


if __name__ == "__main__":
    run_program(main)
