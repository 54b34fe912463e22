"""Make a store from weather data: `python -m aeris.data.convert SOURCE... STORE --window 30`.

The same as `python -m aeris.data convert`; started on several ranks (mpiexec, torchrun, srun) they share the
work. A killed conversion goes on when the same command is given again.
"""

from __future__ import annotations

import tyro

from aeris.data.commands.convert import convert
from aeris.data.options import Options
from aeris.log import run_program


def main() -> None:
    """Run the program."""
    convert(tyro.cli(Options, config=(tyro.conf.FlagCreatePairsOff,), prog="python -m aeris.data.convert"))


if __name__ == "__main__":
    run_program(main)
