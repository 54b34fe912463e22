"""What aeris.evaluate reports beside the scorecard: stability, Hovmoller, cyclones, published scores.

The first three are collectors that run along with the scores; the last lays the finished scorecard beside the
WeatherBench 2 numbers of 2022, where the two may be compared.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.console import Console

from aeris.data.variables import latitude_weights
from aeris.scores.climatology import Climatology
from aeris.scores.collecting import Collector
from aeris.scores.comparison import Comparison, comparison_table
from aeris.scores.drift import Drift, DriftSums
from aeris.scores.hovmoller import Hovmoller, HovmollerSums
from aeris.scores.ibtracs import read_ibtracs
from aeris.scores.matching import Match
from aeris.scores.plots.drift import plot_drift, plot_spectrum_drift
from aeris.scores.plots.hovmoller import plot_hovmoller, plot_nino34
from aeris.scores.plots.reference import plot_beside, plot_differences
from aeris.scores.plots.tracks import plot_track_errors, plot_tracks
from aeris.scores.reference import METRICS, Conditions, comparable, compare_with_published
from aeris.scores.report import plain
from aeris.scores.scorecard import Scorecard
from aeris.scores.stability import Bounds, as_record, conditions, stability_table
from aeris.scores.tracks import TrackCollector, TrackScores

LONG_H = 360
"""Lead time (h) from which a forecast is long, and gets a stability report without being asked for one."""
Truth = Literal["none", "analysis", "era5"]


def collectors(
    pair: Match, weights: str, case: int, climatology: Climatology | None, tracks: str
) -> dict[str, Collector[Any]]:
    """Return the collectors that are wanted.

    Args:
        pair: forecast and truth.
        weights: scheme of the area weights.
        case: number of the init time with Hovmoller sections.
        climatology: for stability and sections, with slots for all valid times; None leaves them out.
        tracks: `truth` to find cyclones in the truth too, a CSV file of IBTrACS for observed ones, or empty.

    Raises:
        ValueError: cyclones without the channel msl, or a file that is none.
    """
    found: dict[str, Collector[Any]] = {}
    grid = (pair.truth.latitude_deg, pair.truth.longitude_deg)
    members = pair.forecast.members
    if climatology is not None:
        weight_Y = latitude_weights(pair.truth.latitude_deg, weights)
        rest = (*grid, pair.mask_CYX, weight_Y, climatology)
        found["drift"] = DriftSums(pair.lead_h, pair.channels, members, *rest)
        found["hovmoller"] = HovmollerSums(pair.inits, case, pair.lead_h, pair.channels, members, *rest)
    if tracks:
        observed = None
        if tracks != "truth":
            if not Path(tracks).is_file():
                raise ValueError(
                    f"--tracks {tracks}: there is no such file; `truth` finds cyclones in the truth"
                )
            observed = read_ibtracs(Path(tracks), pair.valid_times.min(), pair.valid_times.max())
        found["tracks"] = TrackCollector(
            pair.names, *grid, list(pair.inits), pair.lead_h, members, observed=observed
        )
    return found


def published(card: Scorecard, pair: Match, truth: Truth) -> tuple[list[Comparison], list[str]]:
    """Return our scores beside the published ones of the same truth, and reasons where that is not allowed.

    Args:
        card: our scores.
        pair: forecast and truth.
        truth: what the user says the truth is.
    """
    grid = (pair.truth.latitude_deg, pair.truth.longitude_deg)
    told = Conditions(card.title, card.inits, *grid, card.weights, "" if truth == "none" else truth)
    found: list[Comparison] = []
    reasons: dict[str, None] = {}
    for metric in METRICS:
        if metric not in card.values:
            continue
        why = comparable(told, metric)
        if not why:
            try:
                found.append(
                    compare_with_published(told, metric, card.values[metric], card.lead_h, card.channels)
                )
            except ValueError as error:
                why = [str(error)]
        reasons |= dict.fromkeys(why)
    return found, list(reasons)


def write(results: Mapping[str, Any], directory: Path) -> list[Path]:
    """Write stability.json and tracks.json, each whole or not at all, and return their paths."""
    contents = {}
    if "drift" in results:
        contents["stability.json"] = as_record(results["drift"], Bounds())
    if "tracks" in results:
        contents["tracks.json"] = results["tracks"].as_json()
    for name, content in contents.items():
        part = directory / f"{name}.partial"
        part.write_text(json.dumps(plain(content), indent=1, allow_nan=False) + "\n")
        os.replace(part, directory / name)
    return [directory / name for name in contents]


def draw(
    results: Mapping[str, Any],
    beside: list[Comparison],
    pair: Match,
    title: str,
    directory: Path,
    advance: Callable[[str], None],
) -> list[Path]:
    """Draw the pictures of the results there are, and return their paths."""
    pictures: dict[str, Callable[[Path], None]] = {}
    drift: Drift | None = results.get("drift")
    if drift is not None:
        pictures["drift"] = lambda path: plot_drift(drift, path, title)
        if np.isfinite(drift.spectrum_ratio_QCK()).any():
            pictures["drift_spectra"] = lambda path: plot_spectrum_drift(drift, path, title)
    sections: Hovmoller | None = results.get("hovmoller")
    if sections is not None:
        pictures["hovmoller"] = lambda path: plot_hovmoller(sections, path, title)
        if np.isfinite(sections.nino34_IMJ).any():
            pictures["nino34"] = lambda path: plot_nino34(sections, path, title)
    tracks: TrackScores | None = results.get("tracks")
    if tracks is not None:
        grid = (pair.truth.latitude_deg, pair.truth.longitude_deg)
        words = f"cyclones of the forecast of {pair.inits[0]}, truth: {tracks.truth}"
        pictures["tracks"] = lambda path: plot_tracks(tracks.tracks[0], *grid, title, words, path)
        if tracks.count.any():
            pictures["track_errors"] = lambda path: plot_track_errors(tracks, title, path)
    if beside:
        pictures["published"] = lambda path: plot_beside(beside, path)
    for one in beside:
        if one.has_difference:
            pictures[f"published_{one.metric}"] = partial(plot_differences, one)
    paths = []
    for name, picture in pictures.items():
        paths.append(directory / f"{name}.png")
        picture(paths[-1])
        advance(paths[-1].name)
    return paths


def say(results: Mapping[str, Any], beside: list[Comparison], console: Console) -> None:
    """Print what was found."""

    def quietly(line: str) -> None:
        console.print(line, style="dim", highlight=False, markup=False, soft_wrap=True)

    if "drift" in results:
        console.print(stability_table(results["drift"], Bounds()))
        for line in conditions(results["drift"], Bounds()):
            quietly(line)
    tracks: TrackScores | None = results.get("tracks")
    if tracks is not None:
        known = np.flatnonzero(tracks.count)
        far = "; ".join(
            f"{tracks.lead_h[lead]} h {tracks.distance_km[lead]:.0f} km"
            for lead in known[:: max(1, len(known) // 6)]
        )
        console.print(
            f"cyclones ({tracks.truth}): {tracks.cyclones} true tracks; of all members {tracks.hits} hits, "
            f"{tracks.misses} misses, {tracks.false_alarms} false alarms; track error {far or 'unknown'}",
            highlight=False,
        )
    for comparison in beside:
        console.print(comparison_table(comparison))
        for line in (comparison.source, *comparison.notes):
            quietly(line)
