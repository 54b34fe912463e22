"""Pictures of a forecast and of a training run, as PNG files. They need matplotlib (the [plot] extra)."""

from aeris.scores.plots.album import draw_all
from aeris.scores.plots.curves import plot_curves
from aeris.scores.plots.figure import NoMatplotlib, require_matplotlib
from aeris.scores.plots.heatmap import plot_scorecard
from aeris.scores.plots.maps import plot_maps
from aeris.scores.plots.ranks import plot_ranks
from aeris.scores.plots.spectrum import plot_spectra
from aeris.scores.plots.training import plot_training

__all__ = [
    "NoMatplotlib",
    "draw_all",
    "plot_curves",
    "plot_maps",
    "plot_ranks",
    "plot_scorecard",
    "plot_spectra",
    "plot_training",
    "require_matplotlib",
]
