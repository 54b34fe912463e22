"""What aeris.forecast says of its work: before, what it would be; meanwhile, how far and how fast it is."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import rich.progress
from rich.table import Table

from aeris.forecasting.ensemble import Ensemble
from aeris.forecasting.throughput import in_words
from aeris.log import RunLog, console


def settings(prefix: str, config: Any) -> dict[str, Any]:
    """Return settings as they may stand in a file: infinity is no JSON number, and a list no attribute."""
    values = dataclasses.asdict(config).items()
    return {
        f"{prefix}_{name}": " ".join(value) if isinstance(value, tuple) else plain(value)
        for name, value in values
    }


def plain(value: Any) -> Any:
    """Return a setting as it may stand in a file: infinity is no JSON number."""
    return str(value) if value == float("inf") else value


class Progress:
    """The progress line in evaluations of the network, and the record in log.jsonl."""

    LOG_S, SAY_S = 10.0, 60.0

    def __init__(self, ensemble: Ensemble, bar: rich.progress.Progress, log: RunLog) -> None:
        """Begin where the forecast goes on."""
        self.ensemble, self.bar, self.log = ensemble, bar, log
        left, per_step = ensemble.evaluations_left, ensemble.evaluations_per_step
        total = max(left, per_step * ensemble.steps)
        self._task = bar.add_task("evaluations", total=total, completed=total - left, rate="")
        self._left = left
        self._logged = self._said = self._begun = time.monotonic()

    def advance(self, evaluations: int) -> None:
        """Note what all replicas have done."""
        account = self.ensemble.throughput
        self._left -= evaluations
        rate = f"{account.member_days_per_h:.3g} member-days/h" if account.steps else ""
        self.bar.update(self._task, advance=evaluations, rate=rate)
        now = time.monotonic()
        if now - self._logged > self.LOG_S:
            self._logged = now
            self.log.write(record(self.ensemble))
        if not console.is_terminal and now - self._said > self.SAY_S and account.steps:
            self._said = now
            done = 1 - self._left / max(1, self.ensemble.evaluations_left)
            left_s = (now - self._begun) * (1 - done) / max(done, 1e-9)
            shares = in_words(account.shares())
            console.print(f"{done:.1%}: {rate}; {shares}; {left_s / 60:.0f} min left", markup=False)


def record(ensemble: Ensemble) -> dict[str, Any]:
    """Return how far and how fast the forecast is, of this rank, as a record of its log."""
    account = ensemble.throughput
    return {
        "images_seen": ensemble.images_seen,
        "images": ensemble.steps,
        "member_days_per_h": account.member_days_per_h,
        "elapsed_s": account.elapsed_s,
        **{f"share_{kind}": share for kind, share in account.shares().items()},
    }


def summary(ensemble: Ensemble) -> dict[str, Any]:
    """Return what would be computed, as plain data."""
    plan, forecaster = ensemble.plan, ensemble.forecaster
    per_step = ensemble.evaluations_per_step
    return {
        "images_seen": plan.about["images_seen"],
        "store": str(forecaster.store.path),
        "device": str(forecaster.device),
        "ranks": ensemble.groups.dims.world,
        "layout": str(ensemble.groups.dims),
        "init_times": list(plan.inits),
        "members": plan.members,
        "batch": ensemble.batch,
        "portions": len(ensemble.work.portions),
        "steps_in_turn": ensemble.timeline.ticks,
        "lead_h": list(plan.lead_h),
        "channels": len(plan.names),
        "seed": forecaster.seed,
        "sampler": {name: plain(value) for name, value in dataclasses.asdict(forecaster.sampler).items()},
        "evaluations_per_step": per_step,
        "evaluations": per_step * ensemble.steps,
        "evaluations_left": ensemble.evaluations_left,
        "output_bytes": plan.member_bytes * len(plan.inits) * plan.members * len(plan.lead_h),
        "bytes_waiting_to_be_written": ensemble.waiting_bytes,
    }


def print_summary(values: dict[str, Any]) -> None:
    """Print what would be computed."""
    table = Table(show_header=False, box=None)
    for name, value in values.items():
        if name == "sampler":
            levels = f"{value['levels']} levels from {value['sigma_max']:g} to {value['sigma_min']:g}"
            text = f"{value['solver']}, {levels}, {value['spacing']}"
        elif isinstance(value, list) and len(value) > 4:
            text = f"{len(value)}: {value[0]}, {value[1]} .. {value[-1]}"
        elif isinstance(value, list):
            text = ", ".join(map(str, value))
        else:
            text = f"{value:,}" if isinstance(value, int) else str(value)
        table.add_row(name.replace("_", " "), text)
    console.print(table)
