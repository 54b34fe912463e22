"""A picture of a calibration: spread/skill ratio and CRPS by lead time before and after, and all trials."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from aeris.calibration.sweep import Trial
from aeris.scores.plots import figure as look
from aeris.scores.plots.figure import lead_axis, picture

BEFORE, AFTER = look.PERSISTENCE, look.MEAN
LABELLED = 6  # trials, besides the baseline and the chosen one


def plot_calibration(
    path: Path,
    best: Trial,
    trials: Sequence[Trial],
    lead_h: tuple[int, ...],
    channels: Sequence[str],
    title: str,
) -> None:
    """Draw the ratio (lines: channels, thick: their mean), the change of CRPS, and every trial as a point."""
    base, target = trials[0], best.target
    legend = {"baseline": {"color": BEFORE}, f"chosen: {best.name}": {"color": AFTER}}
    subtitle = "unbiased spread/skill ratio and fair CRPS on validation dates; thin lines: channels"
    foot = f"{len(base.sums_IJCS)} init times, {base.members} members, channels {' '.join(channels)}"
    with picture(path, (10.5, 3.6), f"Calibration of {title}", subtitle, foot, legend) as figure:
        ratio, crps, cloud = figure.subplots(1, 3)
        for trial, colour in ((base, BEFORE), (best, AFTER)):
            ratio.plot(lead_h, trial.ssr_JC, color=colour, linewidth=0.8, alpha=0.5)
            ratio.plot(lead_h, np.nanmean(trial.ssr_JC, axis=1), color=colour, marker="o")
        ratio.axhline(target, color=look.QUIET, linewidth=1)
        ratio.set_title("spread / skill")
        lead_axis(ratio, lead_h)
        change = 100 * (best.crps_JC / base.crps_JC - 1)
        crps.plot(lead_h, change, color=AFTER, linewidth=0.8, alpha=0.5)
        crps.plot(lead_h, change.mean(axis=1), color=AFTER, marker="o")
        crps.axhline(0, color=BEFORE, linewidth=1)
        crps.set_title("change of CRPS (%)")
        lead_axis(crps, lead_h)
        _draw_trials(cloud, best, [trial for trial in trials if not trial.failed])


def _draw_trials(axes: Any, best: Trial, trials: Sequence[Trial]) -> None:
    for trial in trials:
        colour = AFTER if trial is best else BEFORE if trial is trials[0] else look.MEMBER
        x, y = 100 * trial.worse, trial.distance
        axes.errorbar(
            x, y, xerr=100 * trial.error, fmt="o" if trial.allowed else "x", color=colour, elinewidth=0.7
        )
    near = sorted(trials, key=lambda trial: trial.distance)[:LABELLED]
    for trial in {id(one): one for one in (trials[0], best, *near)}.values():
        place = (100 * trial.worse, trial.distance)
        axes.annotate(trial.name, place, (4, 3), textcoords="offset points", size=6.5, color=look.QUIET)
    axes.axvline(0, color=look.QUIET, linewidth=1)
    axes.set_xlabel("change of CRPS (%); crosses: worse than allowed")
    axes.set_title("mean |SSR - target|")
