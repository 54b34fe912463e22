"""What all pictures share: the look, a heading, and a file that is whole or not there.

matplotlib is imported when the first picture is made, and without pyplot, so that importing aeris stays fast
and no window system is touched.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

INK = "#1d2733"
QUIET = "#6b7683"
TRUTH = "#1d2733"
MEAN = "#0b5fa5"
MEMBER = "#5aa9e6"
SPREAD = "#e07b39"
PERSISTENCE = "#8d99a6"
CLIMATOLOGY = "#b08d3c"

_STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 9.0,
    "text.color": INK,
    "axes.edgecolor": "#9aa5b1",
    "axes.labelcolor": INK,
    "axes.labelsize": 9.0,
    "axes.titlesize": 10.0,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6eaee",
    "grid.linewidth": 0.8,
    "xtick.color": QUIET,
    "ytick.color": QUIET,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "xtick.minor.visible": False,
    "lines.linewidth": 1.8,
    "lines.markersize": 4.5,
    "legend.frameon": False,
    "legend.fontsize": 9.0,
    "savefig.facecolor": "white",
}

_HEAD_IN = 0.62
_LEGEND_IN = 0.27
_FOOT_IN = 0.28
_LEFT_IN = 0.14


class NoMatplotlib(ImportError, ValueError):
    """matplotlib is not installed: an ImportError to a program that can do without, else a user's error."""


def require_matplotlib() -> Any:
    """Return the matplotlib module.

    Raises:
        NoMatplotlib: it is not installed; the message says how to get it.
    """
    try:
        import matplotlib
    except ImportError:
        raise NoMatplotlib("pictures need matplotlib: pip install 'aeris-swipe[plot]'") from None
    return matplotlib


@contextmanager
def picture(
    path: Path,
    size_in: tuple[float, float],
    title: str,
    subtitle: str = "",
    foot: str = "",
    legend: Mapping[str, Mapping[str, Any]] | None = None,
    dpi: int = 160,
) -> Iterator[Any]:
    """Give a matplotlib Figure to draw on, then write it to `path` as PNG, whole or not at all.

    Args:
        path: PNG to write; its directory is made.
        size_in: width of the picture, and height of the part to draw on; heading and foot are added to it.
        title: bold line at the top left.
        subtitle: line under it.
        foot: small line at the bottom.
        legend: a line of keys under the heading: how each of these labels is drawn, as arguments of Line2D.
        dpi: pixels per inch.
    """
    matplotlib = require_matplotlib()
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    foot_in = _FOOT_IN if foot else 0.05
    head_in = _HEAD_IN + (_LEGEND_IN if legend else 0.0)
    width_in, total_in = size_in[0], size_in[1] + head_in + foot_in
    with matplotlib.rc_context(_STYLE):
        figure: Any = Figure(figsize=(width_in, total_in), layout="constrained")
        inside = (0.0, foot_in / total_in, 1.0, size_in[1] / total_in)
        figure.get_layout_engine().set(rect=inside, w_pad=0.1, h_pad=0.05)
        left = _LEFT_IN / width_in
        figure.text(left, 1 - 0.12 / total_in, title, size=12.5, weight="bold", va="top")
        figure.text(left, 1 - 0.37 / total_in, subtitle, size=9.0, color=QUIET, va="top")
        figure.text(left, 0.09 / total_in, foot, size=7.5, color=QUIET, va="bottom")
        if legend:
            lines = [Line2D([], [], label=label, **dict(look)) for label, look in legend.items()]
            place = (left, 1 - (_HEAD_IN - 0.04) / total_in)
            tight = {"borderpad": 0, "borderaxespad": 0}
            keys = figure.legend(
                handles=lines, loc="upper left", bbox_to_anchor=place, ncols=len(lines), **tight
            )
            keys.set_in_layout(False)
        yield figure
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{path.name}.part")
        # without the version of matplotlib the same numbers give the same bytes
        figure.savefig(part, format="png", dpi=dpi, metadata={"Software": None})
        os.replace(part, path)


def lead_axis(axes: Any, lead_h: tuple[int, ...]) -> None:
    """Label an x axis that is in hours with round lead times: hours up to four days, days beyond."""
    last = max(lead_h)
    if last <= 96:
        fits = [step for step in (1, 2, 3, 6, 12, 24) if last / step <= 8 and step >= min(min(lead_h), 24)]
        step = fits[0] if fits else 24
        axes.set_xticks(range(0, last + 1, step))
        axes.set_xlabel("lead time (h)")
    else:
        days = last / 24
        step = next((step for step in (1, 2, 5, 10, 20, 50) if days / step <= 8), 100)
        axes.set_xticks(range(0, last + 1, 24 * step), [str(day) for day in range(0, last // 24 + 1, step)])
        axes.set_xlabel("lead time (days)")
    axes.set_xlim(0, last * 1.03)
