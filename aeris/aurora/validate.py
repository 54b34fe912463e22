"""Check one forecaster against another point by point: same input, difference per variable and level.

    python -m aeris.aurora.validate small.ckpt official:small.ckpt --data hres.zarr --time 2022-01-01T06
    python -m aeris.aurora.validate hub:small runs/one --data hres.zarr --time 2022-01-01T06 --lead-h 6 12

Prints the largest, mean and relative difference and where it is, and the RMSE of both if the truth is in
the data; writes a CSV file and maps of truth, A, B and A - B. Without --data the input is made up. A and B
are checkpoint files, runs, hub:NAME, official:FILE or files of predictions; A is measured against B.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro

from aeris.aurora.batch import Batch
from aeris.aurora.config import AuroraConfig
from aeris.aurora.training import predictors
from aeris.aurora.training.comparison_report import write_whole
from aeris.aurora.training.conditions import Predictor, read_time, require_same_input, steps_of
from aeris.aurora.training.errors import ChannelFields, fields_of
from aeris.aurora.training.made_up import made_up_batch
from aeris.aurora.training.maps import plot_maps
from aeris.aurora.training.pointwise import Check, as_csv, check, difference_table
from aeris.aurora.training.sequences import first_batch, read_batch
from aeris.aurora.training.sources import open_weather
from aeris.log import console, run_program, speaker
from aeris.scores.display import lead_text, time_text
from aeris.scores.plots.figure import require_matplotlib
from launch.rank import discover
from swipe.backend import choose_device

MEANING = (
    "relative: mean difference / mean size of B; / scale: largest / what the model divides by, or the "
    "standard deviation of B if it has no such number; missing: points that only A or only B has"
)
"""What the columns of the table are."""


@dataclass(frozen=True)
class CheckConfig:
    """What to check against what."""

    a: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="A")]
    """Checkpoint file, run, hub:NAME, official:FILE or file of predictions; LABEL=... names it."""
    b: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="B")]
    """What A is measured against; the same kinds."""
    data: tuple[str, ...] = ()
    """Files, Zarr stores, or one of our stores with the input; none means made-up fields."""
    static: str = ""
    """File with static variables the data lack."""
    time: str = "2022-01-01T06"
    """Time of the newer of the two input states, UTC."""
    lead_h: tuple[int, ...] = (6,)
    """Lead times in hours, multiples of the model's step."""
    grid: tuple[int, int] = (33, 64)
    """Rows and columns of made-up fields."""
    seed: int = 0
    """Seed of made-up fields."""
    out: str = "validation"
    """Directory for differences.csv and maps."""
    model: str = ""
    """Model that checkpoint files are for; empty reads it off their keys."""
    precision: Literal["auto", "fp32", "bf16", "fp64"] = "auto"
    """bf16 casts what is safe to cast, fp32 and fp64 nothing; auto leaves a model as published."""
    weights: Literal["cos", "cell", "wb2"] = "cos"
    """Area weights of the RMSE."""
    tolerance: float = 0.0
    """Exit with status 1 if a difference over the model's scale is larger than this, or one of the two lacks
    points that the other has; 0 only reports."""
    channels: tuple[str, ...] = ()
    """Channels of the maps, such as 2t z500; none means the usual ones."""
    device: str = "auto"
    """Where to compute: auto, cpu, cuda or xpu."""
    plots: bool = True
    """Make maps (needs matplotlib)."""


class Job:
    """A check whose files are open; what a user can get wrong is found when it is made."""

    def __init__(self, config: CheckConfig) -> None:
        if config.plots:
            require_matplotlib()
        words = (config.a, config.b)
        predictors.check(words)
        self.config = config
        self.leads = sorted(set(config.lead_h))
        self.start = read_time("--time", config.time)
        found = {predictors.label_of(word)[0]: predictors.settings_of(word, config.model) for word in words}
        require_same_input(found)
        models = [one for one in found.values() if one is not None]
        self.settings = models[0] if models else None
        if models:
            steps_of(self.leads, models[0].timestep_h)
        if len(models) == 1 and not config.data:
            raise ValueError("a file of predictions against a model needs the data they start from: --data")
        self.truth: dict[int, ChannelFields] = {}
        self.land: Any = None
        self.input = self._input()
        device = str(choose_device(config.device))
        self.a, self.b = (self._open(word, device) for word in words)

    def _open(self, word: str, device: str) -> Predictor:
        return predictors.open_predictor(word, self.config.model, device, self.config.precision)

    def _input(self) -> Batch:
        """Read the input, and the truth where it is known; or make an input up."""
        settings = self.settings or AuroraConfig()
        if not self.config.data:
            return made_up_batch(settings, *self.config.grid, self.start.astype(datetime), self.config.seed)
        weather = open_weather(self.config.data, settings, self.config.static or None)
        for hours in self.leads:
            index = weather.index(self.start + np.timedelta64(hours, "h"))
            if index is not None:
                self.truth[hours] = fields_of(read_batch(weather, [index]))
        batch = first_batch(weather, self.start, settings.max_history_size, settings.timestep_h)
        self.land = batch.static_vars["lsm"].numpy() if "lsm" in batch.static_vars else None
        return batch

    def run(self) -> list[Check]:
        """Make both forecasts and compare them."""
        made = [list(one.forecast(self.input, self.leads)) for one in (self.a, self.b)]
        return [
            check(hours, a, b, self.truth.get(hours), self.settings, self.config.weights)
            for hours, a, b in zip(self.leads, *made, strict=True)
        ]

    def draw(self, found: Check) -> Path:
        """Draw the maps of one lead time and return their path."""
        fields = {} if found.truth is None else {"truth": found.truth}
        fields |= {"A": found.a, "B": found.b}
        path = Path(self.config.out) / f"maps_{found.lead_h}h.png"
        when = f"init {time_text(self.start)}, {lead_text(found.lead_h)} ahead"
        when += "" if self.config.data else ", made-up input"
        title = f"A: {self.a.name}, B: {self.b.name}"
        foot = "RMS: root of the mean square, area weights cos(latitude)"
        names: Sequence[str] = self.config.channels
        plot_maps(fields, {"A − B": ("A", "B")}, path, title, when, foot, land_YX=self.land, names=names)
        return path


def run(config: CheckConfig) -> list[Check]:
    """Run the program: check, forecast, compare, write, draw, print."""
    job = Job(config)
    checks = job.run()
    for found in checks:
        console.print(difference_table(found))
        if lost := found.not_compared():
            console.print(f"[bold red]{lost}[/]", highlight=False, soft_wrap=True)
    paths = [write_whole(Path(config.out) / "differences.csv", as_csv(checks).encode())]
    if config.plots:
        paths += [job.draw(found) for found in checks]
    worst = max(found.worst for found in checks)
    words = f"A: {job.a.name} ({job.a.made_from}), B: {job.b.name} ({job.b.made_from})"
    words += f"; precision {config.precision}"
    words += "" if config.data else "; the input is made up"
    console.print(words, style="dim", highlight=False, markup=False)
    console.print(MEANING, style="dim", highlight=False, markup=False)
    console.print(f"largest difference: {worst:.2e} of the model's scale", highlight=False)
    for path in paths:
        console.print(str(path), highlight=False, markup=False, soft_wrap=True)
    return checks


def main() -> None:
    """Read the command line and check."""
    ranks = discover(os.environ)
    speaker.work_alone("a check", ranks.rank, ranks.world)
    config = tyro.cli(CheckConfig, description=__doc__, prog="python -m aeris.aurora.validate")
    worst = max(found.worst for found in run(config))
    if config.tolerance and not worst <= config.tolerance:
        console.print(f"[bold red]above the tolerance {config.tolerance:g}[/]")
        sys.exit(1)


if __name__ == "__main__":
    run_program(main)
