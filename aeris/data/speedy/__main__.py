"""Make a simulated atmosphere: `python -m aeris.data.speedy --years 4 --out DIR`.

Runs SPEEDY, a general circulation model (jcm 3.0.0; `pip install aeris-swipe[speedy]`), and writes its
states every 6 h on pressure levels in the WeatherBench 2 layout, one NetCDF file per month. Results on these
data are called "SPEEDY perfect-model experiment", never ERA5 skill. The same command writes the same values.

`python -m aeris.data.speedy ensemble DIR ...` makes true ensemble forecasts from a simulation in DIR.
"""

from __future__ import annotations

import sys

import tyro

from aeris.data.forecasts import ForecastWriter
from aeris.data.speedy.control import Options, generate, is_done
from aeris.data.speedy.ensemble import EnsembleOptions, make, plan, summary
from aeris.data.speedy.model import Speedy
from aeris.log import console, progress_bar, run_program

PROGRAM = "python -m aeris.data.speedy"


def main() -> None:
    """Run the program."""
    if sys.argv[1:2] == ["ensemble"]:
        make_ensemble(tyro.cli(EnsembleOptions, args=sys.argv[2:], prog=f"{PROGRAM} ensemble"))
    else:
        make_control(tyro.cli(Options, prog=PROGRAM))


def make_control(options: Options) -> None:
    """Make a simulation, or what is left of it."""
    if is_done(options):
        console.print(f"{options.out} is there already and whole; nothing to do")
        return
    with progress_bar() as progress:
        task = progress.add_task("spin-up", total=options.length_days)
        for path, count, days in generate(options, Speedy(options.began)):
            progress.update(task, description="days", completed=days)
            if path is not None:
                console.print(f"{path}: {count} times")


def make_ensemble(options: EnsembleOptions) -> None:
    """Make true ensemble forecasts, or what is left of them."""
    work, forecast = plan(options)
    for name, value in summary(work, forecast).items():
        shown = f"{len(value)}: {value[0]} .. {value[-1]}" if isinstance(value, list) else f"{value}"
        console.print(f"{name.replace('_', ' ')}: {shown}")
    if options.dry_run:
        return
    writer = ForecastWriter(options.out, forecast, options.overwrite)
    if writer.complete:
        console.print(f"{options.out} is there already; --overwrite makes it again")
        return
    done = writer.steps_done // len(forecast.lead_h)
    with progress_bar() as progress:
        task = progress.add_task("members", total=len(forecast.inits) * forecast.members, completed=done)
        for _ in make(work, writer):
            progress.advance(task)
    writer.finish()
    console.print(f"{options.out}: score it with python -m aeris.evaluate {options.out} --truth STORE")


if __name__ == "__main__":
    run_program(main)
