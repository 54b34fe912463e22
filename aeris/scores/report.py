"""A scorecard as tables on a terminal and as files.

scores.json   how it was made, scores by metric and channel, rank histograms
scores.csv    the scores once more, tidy: channel,lead_h,metric,value
spectra.npz   zonal power spectra, which are many numbers
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from aeris.scores.display import display_unit, lead_text
from aeris.scores.scorecard import MEANING, Scorecard

_COLUMNS = {
    "rmse": "RMSE",
    "rmse_persistence": "persist.",
    "rmse_ratio": "ratio",
    "rmse_climatology": "climat.",
    "bias": "bias",
    "crps": "CRPS",
    "ssr": "SSR",
}
"""What the table of channels shows; persist. and climat. are RMSEs too, ratio is RMSE / persist."""
_WITHOUT_UNIT = {"ssr", "rmse_ratio", "crps_ratio", "rmse_ratio_climatology", "lsd_member", "lsd_mean"}


def decimals(value: float) -> int:
    """Return the decimals that show a value at three significant digits, at most 6."""
    if not math.isfinite(value) or value == 0:
        return 2
    return min(6, max(0, 2 - math.floor(math.log10(abs(value)))))


def number(value: float, places: int) -> str:
    """Return a value with `places` decimals, "-" for NaN."""
    return f"{value:.{places}f}" if math.isfinite(value) else "-"


def _shaded(value: float) -> str:
    """Return a ratio with two decimals, green where clearly below 1 and red from 1 on."""
    if not math.isfinite(value):
        return "-"
    colour = "green" if value < 0.8 else "yellow" if value < 1 else "red"
    return f"[{colour}]{value:.2f}[/]"


def _table(title: str) -> Table:
    look: dict[str, Any] = {"title_justify": "left", "title_style": "bold", "box": box.SIMPLE_HEAD}
    return Table(title=title, pad_edge=False, padding=(0, 1, 0, 0), **look)


def headline_table(card: Scorecard) -> Table:
    """Return the table of one row per lead time, means over channels."""
    table = _table(f"{card.title}: mean over {len(card.channels)} channels")
    table.add_column("lead", justify="right")
    table.add_column("RMSE /\npersistence", justify="right")
    table.add_column("worst\nchannel")
    if card.climatology:
        table.add_column("RMSE /\nclimatology", justify="right")
    table.add_column("CRPS /\npersistence MAE", justify="right")
    table.add_column("SSR", justify="right")
    for row in card.headline():
        cells = [lead_text(int(row["lead_h"])), _shaded(float(row["rmse_ratio"]))]
        cells.append(f"{row['worst_channel']} {_shaded(float(row['worst_ratio']))}")
        if card.climatology:
            cells.append(_shaded(float(row["rmse_ratio_climatology"])))
        cells += [_shaded(float(row["crps_ratio"])), number(float(row["ssr"]), 2)]
        table.add_row(*cells)
    return table


def channel_table(card: Scorecard, lead: int) -> Table:
    """Return the table of one row per channel at lead number `lead`."""
    names = [name for name in _COLUMNS if name in card.values]
    table = _table(f"{card.title}: {lead_text(card.lead_h[lead])} ahead")
    table.add_column("channel", no_wrap=True)
    table.add_column("unit", no_wrap=True)
    for name in names:
        table.add_column(_COLUMNS[name], justify="right", no_wrap=True)
    for place, channel in enumerate(card.channels):
        factor, unit = display_unit(channel.units)
        places = decimals(float(card.values["rmse"][lead, place]) * factor)
        cells = []
        for name in names:
            value = float(card.values[name][lead, place])
            if name == "rmse_ratio":
                cells.append(_shaded(value))
            else:
                cells.append(number(value, 2) if name in _WITHOUT_UNIT else number(value * factor, places))
        table.add_row(channel.name, unit, *cells)
    return table


def print_tables(card: Scorecard, console: Console, leads: Sequence[int]) -> None:
    """Print the headline, the channels at lead numbers `leads`, and how the numbers were made."""
    console.print(headline_table(card))
    for lead in leads:
        console.print(channel_table(card, lead))
    for line in card.conditions():
        console.print(line, style="dim", highlight=False, markup=False, soft_wrap=True)
    for note in card.notes:
        console.print(f"note: {note}", style="yellow", highlight=False, markup=False, soft_wrap=True)


def _plain(value: Any) -> Any:
    """Return arrays as lists and NaN as None, which JSON has a word for."""
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def as_json(card: Scorecard) -> dict[str, Any]:
    """Return a scorecard as plain data in SI units: scores by metric and channel, over lead times."""
    record: dict[str, Any] = {
        "title": card.title,
        "forecast": card.forecast,
        "truth": card.truth,
        "members": card.members,
        "init_times": [str(time) for time in card.inits],
        "lead_h": list(card.lead_h),
        "area_weights": card.weights,
        "climatology": card.climatology or None,
        "notes": list(card.notes),
        "units": {channel.name: channel.units for channel in card.channels},
        "meaning": {name: MEANING[name] for name in card.values},
        "headline": card.headline(),
        "scores": {
            name: {channel: values[:, place] for place, channel in enumerate(card.names)}
            for name, values in card.values.items()
        },
        "rank_histogram": {name: card.ranks_JCS[:, place] for place, name in enumerate(card.names)},
    }
    plain: dict[str, Any] = _plain(record)
    return plain


def as_csv(card: Scorecard) -> str:
    """Return lines "channel,lead_h,metric,value" in SI units; scores that do not exist are left out."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["channel", "lead_h", "metric", "value"])
    for place, channel in enumerate(card.names):
        for lead, lead_h in enumerate(card.lead_h):
            for name, values in card.values.items():
                value = float(values[lead, place])
                if math.isfinite(value):
                    writer.writerow([channel, lead_h, name, f"{value:.8g}"])
    return text.getvalue()


def spectra_arrays(card: Scorecard) -> dict[str, Any]:
    """Return the spectra as named arrays; truth, member, mean are [lead, channel, wavenumber] in unit^2 m."""
    spectra = card.spectra
    if spectra is None:
        return {}
    return {
        "truth": spectra.truth_JCK,
        "member": spectra.member_JCK,
        "mean": spectra.mean_JCK,
        "lead_h": np.array(card.lead_h),
        "channel": np.array(card.names),
        "wavelength_km": spectra.wavelength_km(),
        "band_deg": np.array(spectra.band_deg),
    }


def write_files(card: Scorecard, directory: Path) -> list[Path]:
    """Write scores.json, scores.csv and spectra.npz, each whole or not at all, and return their paths."""
    directory.mkdir(parents=True, exist_ok=True)
    contents = {
        "scores.json": (json.dumps(as_json(card), indent=1, allow_nan=False) + "\n").encode(),
        "scores.csv": as_csv(card).encode(),
    }
    arrays = spectra_arrays(card)
    if arrays:
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **arrays)
        contents["spectra.npz"] = buffer.getvalue()
    for name, content in contents.items():
        part = directory / f"{name}.part"
        part.write_bytes(content)
        os.replace(part, directory / name)
    return [directory / name for name in contents]
