"""The published scaling beside what the planner predicts, drawn; needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from aeris.planning.published import Row

AIM = 0.10
"""Residuals within this share are drawn on a grey band."""
OUTLIER = 0.30
"""Of runs with all residuals above it, those with recomputed blocks are drawn too."""


def draw(rows: Sequence[Row], path: Path, title: str = "Published scaling of AERIS, and the planner") -> None:
    """Draw EFLOP/s by nodes, published as dots and predicted as lines, and the residuals under them."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 7), layout="constrained")
    rates, residuals = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    residuals.axhspan(-100 * AIM, 100 * AIM, color="0.92", zorder=0)
    residuals.axhline(0, color="0.5", linewidth=0.8)
    names = list(dict.fromkeys(row.model for row in rows))
    for number, name in enumerate(names):
        some = [row for row in rows if row.model == name]
        nodes, color = [row.nodes for row in some], f"C{number}"
        rates.plot(nodes, [row.predicted for row in some], "-", color=color, linewidth=1)
        rates.plot(nodes, [row.published for row in some], "o", color=color, markersize=5, label=name)
        residuals.plot(nodes, [100 * row.residual for row in some], "o-", color=color, linewidth=1)
        if min(row.residual for row in some) > OUTLIER:
            recomputed = [100 * (row.recomputed / row.published - 1) for row in some]
            residuals.plot(nodes, recomputed, "x", color=color, markersize=5)
    first = rows[0]
    rates.plot(first.nodes, first.published, "ko", markersize=11, fillstyle="none", label="calibrated here")
    rates.set(xscale="log", yscale="log", ylabel="EFLOP/s: dots published, lines predicted")
    residuals.set(xlabel="nodes", ylabel="predicted over published, %\n(x: if blocks were recomputed)")
    ticks = sorted({row.nodes for row in rows if row.model == names[0]} | {min(row.nodes for row in rows)})
    residuals.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    residuals.minorticks_off()
    for axes in (rates, residuals):
        axes.spines[["top", "right"]].set_visible(False)
    rates.legend(frameon=False, fontsize=9)
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=110)
