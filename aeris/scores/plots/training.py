"""The training curve: loss, smoothed, and learning rate against images seen, from a run's log.jsonl."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aeris.scores.plots.figure import MEAN, MEMBER, SPREAD, picture, require_matplotlib

Array = NDArray[np.float64]


def read_log(log_path: Path) -> tuple[Array, Array, Array]:
    """Return images_seen, loss and learning rate of every record with a loss (NaN without a rate).

    A last line cut off by a kill is skipped. Where a resumed run went back to a checkpoint, the records it
    repeated replace the earlier ones.

    Raises:
        ValueError: the file has no such record, or a line other than the last is not JSON.
    """
    lines = log_path.read_text(encoding="utf-8").splitlines()
    kept: list[tuple[float, float, float]] = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            if number == len(lines):
                break
            raise ValueError(f"{log_path}, line {number}: not a JSON record") from None
        if "images_seen" not in record or record.get("loss") is None:
            continue
        images = float(record["images_seen"])
        while kept and kept[-1][0] >= images:
            kept.pop()
        rate = record.get("lr")
        kept.append((images, float(record["loss"]), float("nan") if rate is None else float(rate)))
    if not kept:
        raise ValueError(f"{log_path} has no record with images_seen and loss yet")
    images_seen, loss, rate = np.array(kept, dtype=np.float64).T
    return images_seen, loss, rate


def smoothed(loss: Array, window: int) -> Array:
    """Return the mean of the finite losses of `window` records around each one; NaN if none."""
    known = np.isfinite(loss)
    total = np.cumsum(np.insert(np.where(known, loss, 0.0), 0, 0.0))
    count = np.cumsum(np.insert(known, 0, False))
    here = np.arange(len(loss))
    first, last = np.maximum(here - window // 2, 0), np.minimum(here + window // 2 + 1, len(loss))
    used = count[last] - count[first]
    return np.divide(total[last] - total[first], used, out=np.full(len(loss), np.nan), where=used > 0)


def plot_training(log_path: Path, out: Path) -> None:
    """Draw loss (every record, and smoothed) and learning rate from `log_path` to the PNG `out`.

    Raises:
        ValueError: the log has no losses yet.
        NoMatplotlib: matplotlib is not installed.
    """
    require_matplotlib()
    from matplotlib.ticker import MaxNLocator

    log_path = Path(log_path)
    images, loss, rate = read_log(log_path)
    smooth = smoothed(loss, max(3, len(loss) // 20))
    title = f"Training of {log_path.resolve().parent.name}"
    subtitle = f"{images[-1]:,.0f} images seen, loss {smooth[-1]:.4g} in the mean of the last records"
    legend: dict[str, dict[str, Any]] = {
        "loss of each record": {"color": MEMBER, "linewidth": 1.0, "alpha": 0.7},
        "smoothed": {"color": MEAN, "linewidth": 2.2},
        "learning rate": {"color": SPREAD},
    }
    with picture(Path(out), (8.0, 4.4), title, subtitle, legend=legend) as figure:
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
        above.plot(images, loss, color=MEMBER, linewidth=0.8, alpha=0.6)
        above.plot(images, smooth, color=MEAN, linewidth=2.2)
        _loss_axis(above, loss, smooth)
        below.plot(images, rate, color=SPREAD)
        below.set_ylim(bottom=0)
        below.yaxis.set_major_locator(MaxNLocator(3, min_n_ticks=3))
        below.set_ylabel("learning rate")
        below.set_xlabel("images seen")
        below.set_xlim(0, images[-1] * 1.01)
        below.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        below.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")


def _loss_axis(axes: Any, loss: Array, smooth: Array) -> None:
    """Fit the axis to the losses without spikes; logarithmic where the smoothed loss halved or more."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axes.set_ylabel("loss")
    loss, smooth = loss[np.isfinite(loss)], smooth[np.isfinite(smooth)]
    if not len(loss) or not len(smooth):
        return
    low = min(np.percentile(loss, 0.5), smooth.min())
    high = max(np.percentile(loss, 99.5), smooth.max())
    if low > 0 and smooth.max() > 2 * smooth.min():
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_ylim(low / 1.08, high * 1.08)
    elif high > low:
        axes.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))
