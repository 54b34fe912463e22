"""How ours compares with the official package, said and drawn from the rows of benchmarks/aurora.py."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
"""A contender: grid, work, package, policy, and what was measured."""


def ratios(rows: Sequence[Row]) -> list[str]:
    """Say how ours compares: with what the package does by itself, and the best of each with each other."""
    said = []
    for grid, work in dict.fromkeys((row["grid"], row["work"]) for row in rows):
        here = [row for row in rows if (row["grid"], row["work"]) == (grid, work)]
        ours = [row for row in here if row["package"] == "ours"]
        theirs = [row for row in here if row["package"] == "official"]
        forward = [
            row["gflop"]
            for row in rows
            if (row["grid"], row["work"], row["package"]) == (grid, "forward", "ours")
        ]
        best = min(ours, key=lambda row: row["seconds"])
        pairs = [(best, theirs[0])] if theirs else []
        if len(theirs) > 1:
            pairs.append((best, min(theirs, key=lambda row: row["seconds"])))
        for own, other in pairs:
            names = f", {own['policy']} against {other['policy']}" if work == "checkpointed" else ""
            said.append(
                f"{grid} {work}{names}: "
                f"{other['seconds'] / own['seconds']:.2f} times as fast, "
                f"{own['peak_mb'] / other['peak_mb']:.2f} of the peak memory "
                f"({own['working_mb'] / other['working_mb']:.2f} without model and input), "
                f"{own['gflop'] / other['gflop']:.2f} of the FLOPs"
            )
        if forward and work != "forward":
            parts = (f"{row['policy']} {row['gflop'] / forward[0]:.2f}" for row in ours)
            said.append(
                f"{grid} {work}: FLOPs over those of our forward pass: {', '.join(parts)}".replace(" - ", " ")
            )
    return said


def draw(rows: Sequence[Row], path: Path, title: str) -> None:
    """Draw time, memory and FLOPs of every contender, a row of panels for each grid; needs matplotlib."""
    from matplotlib.figure import Figure

    grids = [*dict.fromkeys(row["grid"] for row in rows)]
    height = 1.2 + 0.32 * len(rows)
    figure = Figure(figsize=(12, height), layout="constrained")
    panels = figure.subplots(len(grids), 3, squeeze=False)
    columns = {"seconds": "s, fastest to slowest", "peak_mb": "greatest memory, MB", "gflop": "GFLOP"}
    for line, grid in zip(panels, grids):
        here = [row for row in rows if row["grid"] == grid]
        names = [f"{row['work']}, {row['package']} {row['policy']}".rstrip(" -") for row in here]
        colors = ["tab:blue" if row["package"] == "ours" else "tab:gray" for row in here]
        for axes, (column, label) in zip(line, columns.items()):
            spread = None
            if column == "seconds":
                spread = [[abs(row[end] - row[column]) for row in here] for end in ("fastest", "slowest")]
            bars = axes.barh(names, [row[column] for row in here], color=colors, xerr=spread, capsize=2)
            axes.bar_label(bars, fmt="{:.3g}", padding=3, fontsize=7)
            axes.set_xlabel(f"{grid}: {label}")
            axes.spines[["top", "right"]].set_visible(False)
            axes.margins(x=0.15)
            axes.invert_yaxis()
        for axes in line[1:]:
            axes.set_yticklabels([])
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, dpi=110)
