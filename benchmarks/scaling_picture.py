"""The picture of weak and strong scaling: images per second, and what becomes of a rank's time."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.records import Row

COLORS = {
    "left": "tab:blue",
    "lost to communication and waiting": "tab:orange",
    "lost to shared cores": "lightgray",
    "lost": "tab:orange",
    "lost to the pipeline": "tab:orange",
    "lost to gradients and weights": "tab:red",
    "lost to other": "tab:gray",
}


def shares(row: Row) -> dict[str, float]:
    """Share out a rank's time: what is left of it and what is lost; what is gained (below 0) is left out."""
    left = row["efficiency"]
    if row.get("shared_cores", "") != "":
        shared = row["shared_cores"]
        lost = {"lost to communication and waiting": shared - left}
        lost |= {"lost to shared cores": 1 - max(shared, left)}
    elif "lost_pipeline" in row:
        lost = {"lost to the pipeline": row["lost_pipeline"]}
        lost |= {"lost to gradients and weights": row["lost_weights"], "lost to other": row["lost_other"]}
    else:
        lost = {"lost": 1 - left}
    return {"left": left} | {what: max(0.0, share) for what, share in lost.items()}


def family(layout: str) -> str:
    """Return the axes of a layout, "wp x pp", with dp only where it is alone; "" of one rank."""
    axes = re.findall(r"\b(dp|wp|pp|sp) ", layout)
    return " x ".join([axis for axis in axes if axis != "dp"] or axes)


def draw(rows: Sequence[Row], path: Path, title: str, what: str) -> None:
    """Draw images per second by ranks, the ideal beside them, and the shares of a rank's time.

    Needs matplotlib.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    speed, share = figure.subplots(1, 2)
    families = [one for one in dict.fromkeys(family(row["layout"]) for row in rows) if one] or [""]
    _draw_speed(speed, rows, families)
    _draw_shares(share, rows, by_layout=len(families) > 1)
    for axes in (speed, share):
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{what}: {title}", fontsize=9)
    figure.savefig(path, dpi=110)


def _draw_speed(axes: Any, rows: Sequence[Row], families: Sequence[str]) -> None:
    from matplotlib.ticker import LogLocator

    ranks = sorted({row["ranks"] for row in rows})
    for one in families:
        line = [row for row in rows if family(row["layout"]) in (one, "")]
        numbers, middle = [row["ranks"] for row in line], [row["images_per_s"] for row in line]
        label = one if len(families) > 1 else "planned" if "lost_pipeline" in line[0] else "measured"
        spread = None
        if "slowest" in line[0]:
            spread = [[abs(row[end] - row["images_per_s"]) for row in line] for end in ("slowest", "fastest")]
        axes.errorbar(numbers, middle, yerr=spread, marker="o", markersize=4, capsize=2, label=label)
    per_rank = rows[0]["images_per_s"] / rows[0]["ranks"] / rows[0]["efficiency"]
    if rows[0].get("shared_cores", "") != "":
        alike = {row["ranks"]: row["shared_cores"] for row in rows}
        apart = [per_rank * number * alike[number] for number in ranks]
        axes.plot(ranks, apart, "k:", label="runs of 1 rank at the same time")
    axes.plot(ranks, [per_rank * number for number in ranks], "k--", linewidth=1, label="nothing lost")
    wide = ranks[-1] / ranks[0] > 10
    axes.set(xscale="log", yscale="log" if wide else "linear", xlabel="ranks", ylabel="images/s")
    if wide:
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
    else:
        axes.set_ylim(0, None)
    axes.set_xticks(ranks, [f"{number:,}" for number in ranks], rotation=30 if ranks[-1] > 999 else 0)
    axes.minorticks_off()
    axes.legend(fontsize=8, frameon=False)


def _draw_shares(axes: Any, rows: Sequence[Row], by_layout: bool) -> None:
    names = [row["layout"] if by_layout else f"{row['ranks']:,}" for row in rows]
    bottom, parts = [0.0] * len(rows), [shares(row) for row in rows]
    for label in parts[0]:
        values = [100 * one[label] for one in parts]
        axes.bar(range(len(rows)), values, bottom=bottom, label=label, color=COLORS[label])
        bottom = [below + value for below, value in zip(bottom, values)]
    for place, row in enumerate(rows):
        left = row["efficiency"]
        axes.text(place, 100 * left / 2, f"{left:.0%}", ha="center", fontsize=8, color="white")
    published = [
        (place, row["published"]) for place, row in enumerate(rows) if row.get("published", "") != ""
    ]
    if published:
        heights = [100 * value for _, value in published]
        axes.plot([place for place, _ in published], heights, "kD", markersize=5, label="left, as published")
    axes.axhline(100, color="black", linestyle="--", linewidth=1)
    tilt = 30 if max(map(len, names)) > 4 else 0
    axes.set_xticks(range(len(rows)), names, rotation=tilt, ha="right" if tilt else "center")
    axes.set(ylim=(0, 1.25 * max(100, *bottom)), ylabel="% of the time of a rank")
    axes.set_xlabel("layout" if by_layout else "ranks")
    axes.legend(fontsize=8, frameon=False, ncols=2, loc="upper center")
