"""Score several configurations of Aurora on the same starts, beside persistence: tables, files, pictures.

    python -m aeris.aurora.compare original=hub:small one-step=runs/one two-step=runs/two --data hres.zarr

RMSE and MAE of every variable, level and lead time, weighted by cos(latitude); maps of one start. Models are
run one after the other, so only one is in memory. A forecaster is a checkpoint file, a run, hub:NAME,
official:FILE or a file of predictions; LABEL= before it names it. All are measured against the first.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from aeris.aurora.config import AuroraConfig
from aeris.aurora.training import predictors
from aeris.aurora.training.comparison import Case, Comparison, Sample, compare
from aeris.aurora.training.comparison_plots import plot_card, plot_case, plot_scores
from aeris.aurora.training.comparison_report import as_json, print_tables, write_files
from aeris.aurora.training.conditions import Predictor, read_time, require_same_input, steps_of
from aeris.aurora.training.sequences import Sequences
from aeris.aurora.training.sources import open_weather
from aeris.log import console, progress_bar, run_program, speaker
from aeris.scores.display import spread_out
from aeris.scores.plots.figure import require_matplotlib
from launch.rank import discover
from swipe.backend import choose_device


@dataclass(frozen=True)
class CompareConfig:
    """What to compare, on which data."""

    original: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="ORIGINAL")]
    """What the others are measured against, such as original=hub:small."""
    others: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Other configurations, such as one-step=runs/one."""
    data: tuple[str, ...]
    """Files, Zarr stores, or one of our stores with starts and truth."""
    static: str = ""
    """File with static variables the data lack."""
    period: tuple[str, str] = ("", "")
    """First and last time used, such as 2022 2022, or 2022-01-01 2022-06-30T18; empty means all."""
    leads: tuple[int, ...] = (6, 12, 18)
    """Lead times in hours, multiples of the model's step."""
    starts: int = 0
    """Use so many starts, spread over the period; 0 uses all."""
    out: str = "comparison"
    """Directory for scores.csv, scores.json, errors.npz and pictures."""
    model: str = ""
    """Model that checkpoint files are for; empty reads it off their keys."""
    weights: Literal["cos", "cell", "wb2"] = "cos"
    """Area weights: cos(latitude), exact cells, or WeatherBench 2's."""
    persistence: bool = True
    """Score persistence too."""
    case_init: str = ""
    """Start of the maps, such as 2022-01-05T00; empty means the first."""
    case_channels: tuple[str, ...] = ()
    """Channels of the maps, such as 2t z500; none means the usual ones."""
    precision: Literal["auto", "fp32", "bf16", "fp64"] = "auto"
    """bf16 casts what is safe to cast, fp32 and fp64 nothing; auto leaves a model as published."""
    device: str = "auto"
    """Where to compute: auto, cpu, cuda or xpu."""
    plots: bool = True
    """Make pictures (needs matplotlib)."""
    json: bool = False
    """Print one JSON object in place of tables."""


class Job:
    """A comparison whose files are open; what a user can get wrong is found when it is made."""

    def __init__(self, config: CompareConfig) -> None:
        if config.plots:
            require_matplotlib()
        self.config = config
        self.words = [config.original, *config.others]
        if config.persistence and "persistence" not in self.words:
            self.words.append("persistence")
        predictors.check(self.words)
        self.leads = sorted(set(config.leads))
        self.case_init = read_time("--case-init", config.case_init) if config.case_init else None
        self.device = str(choose_device(config.device))
        found = {predictors.label_of(one)[0]: predictors.settings_of(one, config.model) for one in self.words}
        require_same_input(found)
        settings = next((one for one in found.values() if one is not None), AuroraConfig())
        self.step_h = settings.timestep_h
        steps = steps_of(self.leads, self.step_h)
        self.weather = open_weather(config.data, settings, config.static or None)
        history = settings.max_history_size
        self.sequences = Sequences(self.weather, config.period, history, max(steps), self.step_h)
        self.places = spread_out(len(self.sequences), config.starts or len(self.sequences))
        self._check_case()
        self._first = [self._open(self.words[0])]

    def _check_case(self) -> None:
        """Refuse a start of the maps that is none of the starts."""
        inits = self.weather.times[self.sequences.starts[self.places]]
        if self.case_init is not None and self.case_init not in inits:
            starts = f"{len(inits)} starts used, {inits[0]} to {inits[-1]}"
            raise ValueError(f"--case-init {self.config.case_init} is none of the {starts}")

    def _open(self, word: str) -> Predictor:
        return predictors.open_predictor(word, self.config.model, self.device, self.config.precision)

    def predictors(self) -> Iterator[Predictor]:
        """Open one forecaster after the other; the first is open already and let go of."""
        yield self._first.pop()
        for word in self.words[1:]:
            yield self._open(word)

    def samples(self) -> Iterator[Sample]:
        """Read the samples, one at a time."""
        for place in self.places:
            yield self.sequences[place]

    def run(self) -> tuple[Comparison, Case]:
        """Make all forecasts and score them."""
        progress = progress_bar("now")
        progress.disable = progress.disable or self.config.json
        with progress:
            task = progress.add_task("comparing", total=len(self.places) * len(self.words), now="")

            def advance(words: str) -> None:
                progress.update(task, advance=1, now=words)

            made, samples = self.predictors(), self.samples
            how = (self.leads, self.step_h, self.config.weights, self.case_init)
            return compare(made, samples, *how, advance)

    def draw(self, result: Comparison, case: Case) -> list[Path]:
        """Make the pictures and return their paths."""
        directory = Path(self.config.out) / "plots"
        title = f"Aurora: {' · '.join(name for name in result.names if name != 'persistence')}"
        paths = [directory / "scores.png"]
        plot_scores(result, paths[0], title)
        if any(name != "persistence" for name in result.names[1:]):
            paths.append(directory / "card.png")
            plot_card(result, paths[-1], title)
        for lead_h in self.leads:
            paths += plot_case(case, lead_h, directory, title, self.config.case_channels)
        return paths


def run(config: CompareConfig) -> Comparison:
    """Run the program: check, forecast, score, write, draw, print."""
    job = Job(config)
    result, case = job.run()
    paths = write_files(result, Path(config.out))
    if config.plots:
        paths += job.draw(result, case)
    if config.json:
        record: dict[str, Any] = as_json(result) | {"files": [str(path) for path in paths]}
        print(json.dumps(record, allow_nan=False))
        return result
    print_tables(result, console)
    for path in paths:
        console.print(str(path), highlight=False, markup=False, soft_wrap=True)
    return result


def main() -> None:
    """Read the command line and compare."""
    ranks = discover(os.environ)
    speaker.work_alone("a comparison", ranks.rank, ranks.world)
    run(tyro.cli(CompareConfig, description=__doc__, prog="python -m aeris.aurora.compare"))


if __name__ == "__main__":
    run_program(main)
