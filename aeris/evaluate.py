"""Score an ensemble forecast against a store: tables, files and pictures.

    python -m aeris.evaluate FORECAST --truth STORE

RMSE, bias, fair CRPS, spread/skill ratio, rank histograms and zonal spectra, beside persistence and
climatology. Fields are read one init and lead time after the other, so one ensemble at one time must fit.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro
from numpy.typing import NDArray

from aeris.data.forecasts import open_forecast
from aeris.data.store import Store, packaged_sample
from aeris.log import console, progress_bar, run_program, speaker
from aeris.scores import plots
from aeris.scores.baselines import climatology, climatology_times, second_of_day
from aeris.scores.matching import match
from aeris.scores.report import as_json, print_tables, write_files
from aeris.scores.scorecard import Scorecard
from aeris.scores.scoring import Labels, score
from launch.rank import discover

SAMPLE_TITLE = "SPEEDY perfect-model experiment"


@dataclass(frozen=True)
class EvaluateConfig:
    """What to score, and how."""

    forecast: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="FORECAST")]
    """Forecast written by aeris.forecast: a .zarr or a directory of NetCDF files."""
    truth: str = ""
    """Store with the truth; empty means the packaged sample."""
    out: str = ""
    """Directory for scores.json, scores.csv, spectra.npz and plots/; empty means FORECAST.scores."""
    channels: tuple[str, ...] = ()
    """Channels to score, such as z500 t2m; none means all."""
    weights: Literal["cell", "wb2", "cos"] = "cell"
    """Area weights: cell = exact cells of the grid, wb2 = WeatherBench 2 (end rows reach the poles), cos."""
    climatology_stride: int = 1
    """Use every n-th training time of each hour of day for the climatology; 0 leaves climatology out."""
    table_lead_h: tuple[int, ...] = ()
    """Lead times (h) to print a table of channels for; none means the last."""
    case_init: str = ""
    """Init time of the maps, such as 2000-06-01T06; empty means the first."""
    case_lead_h: int = 0
    """Lead time (h) of the maps and spectra; 0 means the last."""
    plots: bool = True
    """Make pictures (needs matplotlib)."""
    threads: int = 0
    """Threads that score channels side by side; 0 means one per core."""
    dry_run: bool = False
    """Check everything, print what would be scored, and exit."""
    json: bool = False
    """Print one JSON object (the plan, or the scores) in place of tables."""


def _position(values: list[Any], wanted: Any, what: str) -> int:
    """Return the place of `wanted`, or raise a ValueError that lists what there is."""
    if wanted not in values:
        raise ValueError(f"the forecast has no {what} {wanted}; it has {', '.join(map(str, values))}")
    return values.index(wanted)


def _check_plots() -> None:
    try:
        plots.require_matplotlib()
    except plots.NoMatplotlib as error:
        raise ValueError(f"{error}, or leave pictures out: --no-plots") from None


class Evaluation:
    """A forecast opened beside its truth; everything a user can get wrong is found when it is made."""

    def __init__(self, config: EvaluateConfig) -> None:
        if config.plots and not config.dry_run:
            _check_plots()
        if config.climatology_stride < 0 or config.threads < 0:
            raise ValueError("climatology_stride and threads are 0 or more")
        self.config = config
        self.forecast = open_forecast(config.forecast)
        self.truth = Store(config.truth or packaged_sample())
        self.pair = match(self.forecast, self.truth, config.channels)
        self.out = Path(config.out or config.forecast.rstrip("/") + ".scores")
        inits, lead_h = list(self.pair.inits), list(self.pair.lead_h)
        init = np.datetime64(config.case_init, "s") if config.case_init else inits[0]
        self.case_lead = _position(lead_h, config.case_lead_h or lead_h[-1], "lead time (h)")
        self.case = (_position(inits, init, "init time"), self.case_lead)
        shown_h = config.table_lead_h or lead_h[-1:]
        self.table_leads = [_position(lead_h, hours, "lead time (h)") for hours in shown_h]
        self.period = self.truth.statistics.train_period
        self.climatology_times: dict[int, NDArray[np.intp]] = {}
        if config.climatology_stride:
            seconds = second_of_day(self.truth.times[self.pair.valid_IJ.ravel()]).tolist()
            self.climatology_times = climatology_times(
                self.truth.times, self.period, seconds, config.climatology_stride
            )
        self.labels = Labels(
            self._title(), config.forecast, str(self.truth.path), config.weights, self._notes()
        )

    def _title(self) -> str:
        """Return what the data are: the packaged atmosphere has a name, others say it themselves."""
        if self.truth.path.resolve() == packaged_sample().resolve():
            return SAMPLE_TITLE
        sources = [source["title"] for source in self.truth.made.get("about", ()) if "title" in source]
        return str(self.forecast.attrs.get("title") or "; ".join(sources) or self.truth.path.name)

    def _notes(self) -> tuple[str, ...]:
        inside = self.pair.inside(self.period)
        if not inside:
            return ()
        start, end = self.period
        return (f"{inside} of {len(self.pair.inits)} forecasts lie in the training period {start} .. {end}",)

    @property
    def climatology_reads(self) -> int:
        """Number of fields to read for the climatology."""
        return sum(map(len, self.climatology_times.values()))

    def plan(self) -> dict[str, Any]:
        """Return what would be scored, as plain data."""
        pair = self.pair
        steps = pair.valid_IJ.size
        field_bytes = 4 * len(self.truth.names) * self.truth.rows * self.truth.cols
        init, lead = self.case
        return {
            "title": self.labels.title,
            "forecast": self.labels.forecast,
            "truth": self.labels.truth,
            "init_times": [str(time) for time in pair.inits],
            "lead_h": list(pair.lead_h),
            "members": self.forecast.members,
            "channels": [channel.name for channel in pair.channels],
            "area_weights": self.labels.weights,
            "climatology_times": self.climatology_reads,
            "forecast_bytes": steps * self.forecast.members * field_bytes,
            "truth_bytes": (steps + len(pair.inits) + self.climatology_reads) * field_bytes,
            "maps_of": f"init {pair.inits[init]}, lead {pair.lead_h[lead]} h",
            "out": str(self.out),
            "notes": list(self.labels.notes),
        }

    def score(self, advance: Callable[[str], None]) -> Scorecard:
        """Read everything and return the scores; `advance` is called after every field and ensemble."""
        usual = None
        if self.climatology_times:
            read = (self.truth, self.period, self.climatology_times, self.pair.truth_channels)
            usual = climatology(*read, lambda: advance("climatology"))
        return score(self.pair, self.labels, usual, self.case, self.config.threads, advance)


def evaluate(config: EvaluateConfig) -> Scorecard | None:
    """Run the program: check, score, write, draw, print. Returns nothing after a dry run."""
    job = Evaluation(config)
    if config.dry_run:
        _print_plan(job)
        return None
    steps = job.climatology_reads + job.pair.valid_IJ.size + 5 * config.plots
    progress = progress_bar("now")
    progress.disable = config.json
    with progress:
        task = progress.add_task("scoring", total=steps, now="")

        def advance(words: str) -> None:
            progress.update(task, advance=1, now=words)

        card = job.score(advance)
        paths = write_files(card, job.out)
        if config.plots:
            paths += plots.draw_all(card, job.out / "plots", job.case_lead, advance)
    if config.json:
        print(json.dumps(as_json(card) | {"files": [str(path) for path in paths]}, allow_nan=False))
    else:
        print_tables(card, console, job.table_leads)
        for path in paths:
            console.print(str(path), highlight=False, markup=False, soft_wrap=True)
    return card


def _print_plan(job: Evaluation) -> None:
    plan = job.plan()
    if job.config.json:
        print(json.dumps(plan))
        return
    times = plan["init_times"]
    plan["init_times"] = f"{len(times)}: {times[0]} .. {times[-1]}"
    for name, value in plan.items():
        if value == []:
            continue
        text = f"{value:,}" if name.endswith("_bytes") else value
        text = " ".join(map(str, value)) if isinstance(value, list) else text
        console.print(f"{name.replace('_', ' '):>18}  {text}", highlight=False, markup=False, soft_wrap=True)


def main() -> None:
    """Read the command line and evaluate."""
    ranks = discover(os.environ)
    speaker.work_alone("evaluation", ranks.rank, ranks.world)
    evaluate(tyro.cli(EvaluateConfig, description=__doc__, prog="python -m aeris.evaluate"))


if __name__ == "__main__":
    run_program(main)
