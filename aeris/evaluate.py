"""Score an ensemble forecast against a store: tables, files and pictures.

    python -m aeris.evaluate FORECAST --truth STORE
    mpiexec -n 8 python -m aeris.evaluate FORECAST --truth STORE

RMSE, bias, ACC, fair CRPS, energy score, spread/skill, rank histograms, extremes and zonal spectra, beside
persistence and climatology. Init times are dealt over ranks; what each contributes is kept beside the output,
so the same command goes on after a stop. Fields are read one init and lead time after the other, so one
ensemble at one time must fit into the memory of a rank.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from aeris import reports
from aeris.evaluation import EvaluateConfig, Evaluation
from aeris.log import console, progress_bar, run_program, speaker
from aeris.scores import plots
from aeris.scores.comparison import Comparison
from aeris.scores.parts import Parts
from aeris.scores.report import as_json, plain, print_tables, write_files
from aeris.scores.rivals import Contest, compete
from aeris.scores.rivals_report import draw_contest, print_contest, write_contest
from aeris.scores.scorecard import Scorecard
from aeris.scores.scoring import Scoring
from aeris.scores.summing import per_init
from launch.rank import Ranks, discover, export, leave

if TYPE_CHECKING:
    from swipe.collectives import Group

__all__ = ["EvaluateConfig", "Evaluation", "evaluate"]

PICTURES = 7


class Crew:
    """The ranks that share an evaluation; alone, nothing is started and torch is not imported."""

    def __init__(self, ranks: Ranks, timeout_s: float) -> None:
        self.rank, self.world = ranks.rank, ranks.world
        self._group: Group | None = None
        if ranks.world > 1:
            import torch

            from swipe.backend import start
            from swipe.collectives import Group

            export(ranks)
            start(torch.device("cpu"), timeout_s)
            self._group = Group("all ranks", tuple(range(ranks.world)), ranks.rank)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Do something on some ranks; if it fails on one, all stop with its error."""
        if self._group is None:
            yield
        else:
            from swipe.collectives import together

            with together(self._group):
                yield

    def tell(self, value: Any) -> Any:
        """Return rank 0's value on every rank."""
        if self._group is None:
            return value
        from swipe.collectives import tell

        return tell(self._group, value)

    def finish(self) -> None:
        """Leave, once all are here."""
        if self._group is not None:
            from swipe.backend import finish
            from swipe.collectives import barrier

            barrier(self._group, "the end")
            finish()
            leave()


def evaluate(config: EvaluateConfig, crew: Crew | None = None) -> Scorecard | None:
    """Run the program: check, score, write, draw, print. Returns nothing after a dry run, and off rank 0."""
    crew = crew or Crew(Ranks(), config.timeout_s)
    with crew.together():
        job = Evaluation(config)
    if config.dry_run:
        if crew.rank == 0:
            _print_plan(job)
        return None
    progress = progress_bar("now")
    progress.disable = config.json or crew.rank > 0
    parts, usual = job.parts, job.out / "parts" / "climatology.h5"
    with progress:
        steps = job.climatology_reads + job.pair.valid_IJ.size + PICTURES * config.plots
        task = progress.add_task("scoring", total=steps, now="")

        def advance(words: str, by: int = 1) -> None:
            progress.update(task, advance=by, now=words)

        with crew.together():
            if crew.rank == 0:
                if parts.prepare():
                    console.print("what was scored before with other settings is scored again")
                if usual.exists():
                    advance("", by=job.climatology_reads)
                job.make_climatology(usual, lambda: advance("climatology"))
        with crew.together():
            scoring = job.scoring(usual)
        _collect(job, scoring, parts, crew, advance)
        outcome: _Outcome | None = None
        with crew.together():
            if crew.rank == 0:
                outcome = _conclude(job, scoring, parts, advance)
    if outcome is None:
        return None
    _say(job, outcome)
    return outcome.card


def _collect(
    job: Evaluation, scoring: Scoring, parts: Parts, crew: Crew, advance: Callable[..., None]
) -> None:
    """Collect every init time that has no part yet, a round of one init time per rank after the other."""
    todo = crew.tell(parts.missing())
    leads = len(job.pair.lead_h)
    done = len(parts) - len(todo)
    if done and crew.rank == 0:
        console.print(f"going on: {done} of {len(parts)} init times were scored before")
        advance("", by=done * leads)
    for first in range(0, len(todo), crew.world):
        busy = min(crew.world, len(todo) - first)
        with crew.together():
            if crew.rank < busy:
                init = todo[first + crew.rank]
                parts.write(init, scoring.collect(init, partial(advance, by=busy)))


@dataclass(frozen=True)
class _Outcome:
    """What an evaluation found and wrote."""

    card: Scorecard
    contest: Contest | None
    more: Mapping[str, Any]
    beside: list[Comparison]
    paths: list[Path]


def _conclude(job: Evaluation, scoring: Scoring, parts: Parts, advance: Callable[[str], None]) -> _Outcome:
    """Combine what the init times contributed, write and draw."""
    card, more = scoring.combine(parts.of, job.case)
    beside: list[Comparison] = []
    if job.config.reference != "none":
        beside, reasons = reports.published(card, job.pair, job.config.reference)
        if reasons:
            note = f"not all scores may stand beside the published ones: {'; '.join(reasons)}"
            card = dataclasses.replace(card, notes=(*card.notes, note))
    paths = write_files(card, job.out) + reports.write(more, job.out)
    ours = job.judged(per_init(parts.of("ensemble")))
    paths.append(ours.write(job.out))
    contest = compete(ours, job.rivals) if job.rivals else None
    if contest is not None:
        paths += write_contest(contest, job.out)
    if job.config.plots:
        paths += plots.draw_all(card, job.out / "plots", job.case_lead, advance)
        if contest is not None:
            paths += draw_contest(contest, job.out / "plots", advance)
        paths += reports.draw(more, beside, job.pair, card.title, job.out / "plots", advance)
    parts.remove()
    return _Outcome(card, contest, more, beside, paths)


def _say(job: Evaluation, outcome: _Outcome) -> None:
    """Print the scores and the files."""
    if job.config.json:
        record = as_json(outcome.card) | {"files": [str(path) for path in outcome.paths]}
        if outcome.contest is not None:
            record["comparison"] = plain(outcome.contest.as_json())
        print(json.dumps(record, allow_nan=False))
        return
    print_tables(outcome.card, console, job.table_leads)
    if outcome.contest is not None:
        print_contest(outcome.contest, console)
    reports.say(outcome.more, outcome.beside, console)
    for path in outcome.paths:
        console.print(str(path), highlight=False, markup=False, soft_wrap=True)


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
    speaker.take_turn(ranks.rank, ranks.world)
    with speaker.hush():
        config = tyro.cli(
            EvaluateConfig, args=sys.argv[1:], description=__doc__, prog="python -m aeris.evaluate"
        )
    crew = Crew(ranks, config.timeout_s)
    evaluate(config, crew)
    crew.finish()


if __name__ == "__main__":
    run_program(main)
