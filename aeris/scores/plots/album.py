"""Every picture of a scorecard, into one directory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from aeris.scores.plots.bands import plot_bands
from aeris.scores.plots.curves import plot_curves
from aeris.scores.plots.extremes import plot_extremes
from aeris.scores.plots.heatmap import plot_scorecard
from aeris.scores.plots.maps import plot_maps
from aeris.scores.plots.ranks import plot_ranks
from aeris.scores.plots.spectrum import plot_spectra
from aeris.scores.scorecard import Scorecard


def draw_all(
    card: Scorecard, directory: Path, lead: int, advance: Callable[[str], None] = lambda words: None
) -> list[Path]:
    """Draw every picture a scorecard has the numbers for and return their paths.

    Args:
        card: what was found.
        directory: where the PNG files go; it is made.
        lead: number of the lead time of the spectra.
        advance: called with the name of the file after every picture.
    """
    pictures: dict[str, Callable[[Path], None]] = {
        "scorecard": lambda path: plot_scorecard(card, path),
        "curves": lambda path: plot_curves(card, path),
    }
    if card.case is not None:
        case = card.case
        pictures["maps"] = lambda path: plot_maps(case, card.title, path)
    if card.spectra is not None and np.isfinite(card.spectra.truth_JCK[lead]).all(axis=-1).any():
        pictures["spectra"] = lambda path: plot_spectra(card, path, lead)
        pictures["bands"] = lambda path: plot_bands(card, path, lead)
    if card.events is not None and np.isfinite(card.events.table_JCQ2K[lead]).any():
        pictures["extremes"] = lambda path: plot_extremes(card, path, lead)
    if card.members > 1:
        pictures["ranks"] = lambda path: plot_ranks(card, path)
    paths = []
    for name, draw in pictures.items():
        paths.append(directory / f"{name}.png")
        draw(paths[-1])
        advance(f"{name}.png")
    return paths
