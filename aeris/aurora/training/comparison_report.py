"""A comparison of forecasters as tables on a terminal and as files.

scores.csv    configuration,variable,level_hpa,lead_h,metric,value in SI units
scores.json   the same with how it was made, means over channels, and the share of starts won
errors.npz    mse, mae, bias [forecaster, start, lead, channel], for tests of significance
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from aeris.aurora.training.comparison import Comparison
from aeris.aurora.training.errors import variable_name
from aeris.aurora.training.maps import headline
from aeris.scores.display import display_unit, lead_text
from aeris.scores.report import decimals, number


def table(title: str, gap: int = 1) -> Table:
    """Return an empty table in the look of the house, 1 + `gap` spaces between columns."""
    look: dict[str, Any] = {"title_justify": "left", "title_style": "bold", "box": box.SIMPLE_HEAD}
    return Table(title=title, pad_edge=False, padding=(0, gap, 0, 0), **look)


def headline_table(result: Comparison) -> Table:
    """Return the table of one row per forecaster: mean RMSE ratio and starts won at every lead time."""
    shown = table(f"RMSE / RMSE of {result.names[0]}, mean over {len(result.channels)} channels")
    shown.add_column("configuration", no_wrap=True)
    for lead_h in result.lead_h:
        shown.add_column(f"{lead_text(lead_h)}\nratio", justify="right")
        shown.add_column("\nbetter", justify="right")
    ratio, wins = result.mean_ratio(), result.wins()
    best = [int(np.nanargmin(column)) if np.isfinite(column).any() else -1 for column in ratio.T]
    for row, name in enumerate(result.names):
        cells = []
        for lead in range(len(result.lead_h)):
            text = number(float(ratio[row, lead]), 3)
            cells.append(f"[bold]{text}[/]" if best[lead] == row else text)
            share = float(wins[row, lead])
            cells.append("" if row == 0 or not math.isfinite(share) else f"{100 * share:.0f} %")
        shown.add_row(name, *cells)
    return shown


def channel_table(result: Comparison, lead: int, most: int = 10) -> Table:
    """Return the RMSE of up to `most` channels (rows) of every forecaster (columns) at lead number `lead`."""
    shown = table(f"RMSE {lead_text(result.lead_h[lead])} ahead")
    shown.add_column("channel", no_wrap=True)
    shown.add_column("unit", no_wrap=True)
    for name in result.names:
        shown.add_column(name, justify="right")
    rmse = result.rmse()[:, lead]
    for name in headline(result.channel_names, most):
        place = result.channel_names.index(name)
        factor, unit = display_unit(result.channels[place].units)
        values = rmse[:, place] * factor
        places = decimals(float(values[0]))
        best = int(np.nanargmin(values)) if np.isfinite(values).any() else -1
        cells = [number(float(value), places) for value in values]
        cells = [f"[bold]{cell}[/]" if row == best else cell for row, cell in enumerate(cells)]
        shown.add_row(name, unit, *cells)
    return shown


def print_tables(result: Comparison, console: Console) -> None:
    """Print the headline, the channels at every lead time, and how the numbers were made."""
    console.print(headline_table(result))
    for lead in range(len(result.lead_h)):
        console.print(channel_table(result, lead))
    words = f"{result.conditions()}; better: share of starts and channels with a smaller error"
    console.print(words, style="dim", highlight=False, markup=False, soft_wrap=True)


def as_csv(result: Comparison) -> str:
    """Return lines "configuration,variable,level_hpa,lead_h,metric,value" in SI units; NaN is left out."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["configuration", "variable", "level_hpa", "lead_h", "metric", "value"])
    metrics = {
        "rmse": result.rmse(),
        "mae": result.mae(),
        "bias": result.bias(),
        "rmse_ratio": result.ratio(),
    }
    for row, name in enumerate(result.names):
        for place, one in enumerate(result.channels):
            level = "" if one.level_hpa is None else f"{one.level_hpa:g}"
            for lead, lead_h in enumerate(result.lead_h):
                for metric, values in metrics.items():
                    value = float(values[row, lead, place])
                    if math.isfinite(value):
                        writer.writerow([name, variable_name(one), level, lead_h, metric, f"{value:.8g}"])
    return text.getvalue()


def as_json(result: Comparison) -> dict[str, Any]:
    """Return a comparison as plain data in SI units, scores over lead times; NaN is None."""

    def plain(values: Iterable[Any]) -> list[Any]:
        return [float(value) if math.isfinite(value) else None for value in values]

    metrics = {"rmse": result.rmse(), "mae": result.mae(), "bias": result.bias()}
    return {
        "reference": result.names[0],
        "made_from": dict(zip(result.names, result.made_from)),
        "init_times": [str(time) for time in result.inits],
        "lead_h": list(result.lead_h),
        "area_weights": result.weights,
        "units": {one.name: one.units for one in result.channels},
        "mean_rmse_ratio": {n: plain(v) for n, v in zip(result.names, result.mean_ratio())},
        "share_better": {n: plain(v) for n, v in list(zip(result.names, result.wins()))[1:]},
        "scores": {
            metric: {
                name: {one.name: plain(values[row, :, place]) for place, one in enumerate(result.channels)}
                for row, name in enumerate(result.names)
            }
            for metric, values in metrics.items()
        },
    }


def write_whole(path: Path, content: bytes) -> Path:
    """Write a file whole or not at all; its directory is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_bytes(content)
    os.replace(part, path)
    return path


def write_files(result: Comparison, directory: Path) -> list[Path]:
    """Write scores.csv, scores.json and errors.npz and return their paths."""
    buffer = io.BytesIO()
    np.savez_compressed(
        buffer,
        mse=result.mse_NIJC,
        mae=result.mae_NIJC,
        bias=result.bias_NIJC,
        configuration=np.array(result.names),
        init=np.array([str(time) for time in result.inits]),
        lead_h=np.array(result.lead_h),
        channel=np.array(result.channel_names),
    )
    contents = {
        "scores.csv": as_csv(result).encode(),
        "scores.json": (json.dumps(as_json(result), indent=1, allow_nan=False) + "\n").encode(),
        "errors.npz": buffer.getvalue(),
    }
    return [write_whole(directory / name, content) for name, content in contents.items()]
