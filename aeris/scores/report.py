"""A scorecard as tables on a terminal and as files.

scores.json   how it was made, scores by metric and channel, rank histograms, regions, winds, events
scores.csv    the scores once more, tidy: channel,lead_h,metric,value; wind vectors among the channels
regions.csv   region,channel,lead_h,metric,value
events.csv    event,channel,lead_h,metric,value
spectra.npz   zonal power spectra by band of latitude, which are many numbers
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from aeris.scores import events
from aeris.scores.display import display_unit, lead_text
from aeris.scores.regions import REGIONS
from aeris.scores.scorecard import MEANING, WITHOUT_UNIT, Scorecard, mean_over_channels
from aeris.scores.spectra import BANDS

_COLUMNS = {
    "rmse": "RMSE",
    "rmse_persistence": "persist.",
    "rmse_ratio": "ratio",
    "rmse_climatology": "climat.",
    "bias": "bias",
    "acc": "ACC",
    "crps": "CRPS",
    "ssr": "SSR",
}
"""What the table of channels shows; persist. and climat. are RMSEs too, ratio is RMSE / persist."""
_EVENT_COLUMNS = {
    "base_rate": "truth",
    "frequency_bias": "bias",
    "brier_skill": "Brier\nskill",
    "roc_area": "ROC\narea",
    "pod": "POD",
    "far": "FAR",
    "pofd": "POFD",
    "ets": "ETS",
    "sedi": "SEDI",
}


_ROWS = 30
"""Lead times in a table on a terminal, at most."""


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


def _table(title: str, caption: str) -> Table:
    look: dict[str, Any] = {"title_justify": "left", "title_style": "bold", "box": box.SIMPLE_HEAD}
    look |= {"caption": caption, "caption_justify": "left", "caption_style": "dim"}
    return Table(title=title, pad_edge=False, padding=(0, 1, 0, 0), **look)


def _weighted(card: Scorecard) -> str:
    """Say the area weights, as every table does."""
    return f"area weights '{card.weights}'"


def headline_table(card: Scorecard) -> Table:
    """Return a table of a row per lead time, means over channels; of many every n-th, the last included."""
    many = f"mean over {len(card.own)} channels" if len(card.own) > 1 else card.names[card.own[0]]
    rows = card.headline()
    every = math.ceil(len(rows) / _ROWS)
    if every > 1:
        many += f"; 1 lead time in {every}, all are in the files"
    table = _table(f"{card.title}: {many}", _weighted(card))
    table.add_column("lead", justify="right")
    table.add_column("RMSE /\npersistence", justify="right")
    table.add_column("worst\nchannel")
    if card.climatology:
        table.add_column("RMSE /\nclimatology", justify="right")
    table.add_column("CRPS /\npersistence MAE", justify="right")
    drawn = "crps_ratio_climatology" in card.values
    if drawn:
        table.add_column("CRPS /\nclimatology", justify="right")
    table.add_column("SSR", justify="right")
    for row in rows[(len(rows) - 1) % every :: every]:
        cells = [lead_text(int(row["lead_h"])), _shaded(float(row["rmse_ratio"]))]
        cells.append(f"{row['worst_channel']} {_shaded(float(row['worst_ratio']))}")
        if card.climatology:
            cells.append(_shaded(float(row["rmse_ratio_climatology"])))
        cells += [_shaded(float(row[name])) for name in ("crps_ratio", "crps_ratio_climatology")[: 1 + drawn]]
        cells.append(number(float(row["ssr"]), 2))
        table.add_row(*cells)
    return table


def channel_table(card: Scorecard, lead: int) -> Table:
    """Return the table of one row per channel at lead number `lead`."""
    names = [name for name in _COLUMNS if name in card.values]
    caption = f"{_weighted(card)}; ratio = RMSE / that of persistence; SSR = spread/skill ratio, unbiased"
    table = _table(f"{card.title}: {lead_text(card.lead_h[lead])} ahead", caption)
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
                cells.append(number(value, 2) if name in WITHOUT_UNIT else number(value * factor, places))
        table.add_row(channel.name, unit, *cells)
    return table


def region_table(card: Scorecard, lead: int) -> Table:
    """Return the table of one row per region at lead number `lead`, means over channels."""
    caption = f"{_weighted(card)} inside the region; ratios to persistence there"
    table = _table(f"{card.title}: regions, {lead_text(card.lead_h[lead])} ahead", caption)
    table.add_column("region", no_wrap=True)
    table.add_column("latitude", no_wrap=True)
    columns = {"rmse_ratio": "RMSE /\npersistence", "crps_ratio": "CRPS /\npersistence MAE", "ssr": "SSR"}
    for column in columns.values():
        table.add_column(column, justify="right")
    for name, values in {"global": card.values, **card.regions}.items():
        means = {key: float(mean_over_channels(values[key][[lead]][:, card.own])[0]) for key in columns}
        low, high = REGIONS[name]
        cells = [_shaded(means["rmse_ratio"]), _shaded(means["crps_ratio"]), number(means["ssr"], 2)]
        table.add_row(name, f"{low:g} .. {high:g}", *cells)
    return table


def event_table(card: Scorecard, lead: int, most: int = 3) -> Table:
    """Return the table of the extremes of up to `most` channels at lead number `lead`."""
    found = card.events
    assert found is not None
    caption = (
        f"{_weighted(card)}; events: beyond a quantile of the local climatology\n"
        "Brier (debiased) and ROC of the share of members; of single members: POD hit rate, FAR false-alarm\n"
        "ratio F/(H+F), POFD false-alarm rate F/(F+C)"
    )
    table = _table(f"{card.title}: extremes, {lead_text(card.lead_h[lead])} ahead", caption)
    table.add_column("channel", no_wrap=True)
    table.add_column("event", no_wrap=True)
    scores = found.scores()
    for column in _EVENT_COLUMNS.values():
        table.add_column(column, justify="right")
    for row, place in enumerate(found.channels[:most]):
        for col, quantile in enumerate(found.quantiles):
            values = {name: float(scores[name][lead, row, col]) for name in _EVENT_COLUMNS}
            cells = [number(value, 3 if name == "base_rate" else 2) for name, value in values.items()]
            table.add_row(card.names[place] if not col else "", events.event_name(quantile), *cells)
    return table


def print_tables(card: Scorecard, console: Console, leads: Sequence[int]) -> None:
    """Print the headline, tables at lead numbers `leads`, and how the numbers were made."""
    console.print(headline_table(card))
    for lead in leads:
        console.print(channel_table(card, lead))
        if card.wind_vectors:
            factor_text = "   ".join(
                f"{name} {number(float(values['rmse'][lead]), 2)}"
                for name, values in list(card.wind_vectors.items())[:8]
            )
            console.print(f"RMSE of wind vectors (m s⁻¹): {factor_text}", highlight=False)
        if len(card.regions) > 1:
            console.print(region_table(card, lead))
        if card.events is not None:
            console.print(event_table(card, lead))
    for line in card.conditions():
        console.print(line, style="dim", highlight=False, markup=False, soft_wrap=True)
    for note in card.notes:
        console.print(f"note: {note}", style="yellow", highlight=False, markup=False, soft_wrap=True)


def plain(value: Any) -> Any:
    """Return arrays as lists and NaN as None, which JSON has a word for."""
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
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
        "interval_95": {
            name: {channel: ends[:, :, place].T for place, channel in enumerate(card.names)}
            for name, ends in card.intervals.items()
        },
        "energy_all_channels": card.energy_J,
        "wind_vectors": card.wind_vectors,
        "regions": {
            region: {
                name: {channel: values[name][:, place] for place, channel in enumerate(card.names)}
                for name in _REGIONAL
                if name in values
            }
            for region, values in card.regions.items()
        },
        "region_latitudes_deg": {name: REGIONS[name] for name in card.regions},
        "events": _events_json(card),
    }
    found: dict[str, Any] = plain(record)
    return found


_REGIONAL = (
    *("rmse", "bias", "crps", "spread", "ssr", "rmse_persistence", "mae_persistence", "rmse_climatology"),
    *("rmse_ratio", "crps_ratio", "crps_climatology", "ssr_climatology"),
)


def _events_json(card: Scorecard) -> dict[str, Any] | None:
    """Return scores, reliability and ROC curves by event and channel, over lead times."""
    found = card.events
    if found is None:
        return None
    scores = found.scores()
    (false, hits), (frequency, share) = found.roc(), found.reliability()
    curves = {"roc_false_alarm_rate": false, "roc_hit_rate": hits}
    curves |= {"reliability_observed": frequency, "reliability_share": share}
    return {
        "meaning": events.MEANING,
        "probability": found.probability_K,
        "by_event": {
            events.event_name(quantile): {
                card.names[place]: {name: x[:, row, col] for name, x in (scores | curves).items()}
                for row, place in enumerate(found.channels)
            }
            for col, quantile in enumerate(found.quantiles)
        },
    }


def _lines(columns: Sequence[str], rows: Iterable[tuple[Any, ...]]) -> str:
    """Return a table as CSV; rows whose last cell, the value, does not exist are left out."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    for row in rows:
        if math.isfinite(row[-1]):
            writer.writerow([*row[:-1], f"{float(row[-1]):.8g}"])
    return text.getvalue()


def regions_csv(card: Scorecard) -> str:
    """Return lines "region,channel,lead_h,metric,value" in SI units."""
    rows = (
        (region, channel, lead_h, name, values[name][lead, place])
        for region, values in card.regions.items()
        for place, channel in enumerate(card.names)
        for lead, lead_h in enumerate(card.lead_h)
        for name in _REGIONAL
        if name in values
    )
    return _lines(["region", "channel", "lead_h", "metric", "value"], rows)


def events_csv(card: Scorecard) -> str:
    """Return lines "event,channel,lead_h,metric,value"."""
    found = card.events
    scores = found.scores() if found else {}
    rows = (
        (events.event_name(quantile), card.names[place], lead_h, name, values[lead, row, col])
        for col, quantile in enumerate(found.quantiles if found else ())
        for row, place in enumerate(found.channels if found else ())
        for lead, lead_h in enumerate(card.lead_h)
        for name, values in scores.items()
    )
    return _lines(["event", "channel", "lead_h", "metric", "value"], rows)


def as_csv(card: Scorecard) -> str:
    """Return lines "channel,lead_h,metric,value" in SI units; scores that do not exist are left out."""
    rows = [
        (channel, lead_h, name, values[lead, place])
        for place, channel in enumerate(card.names)
        for lead, lead_h in enumerate(card.lead_h)
        for name, values in card.values.items()
    ]
    rows += [
        (vector, lead_h, name, values_J[lead])
        for vector, values in card.wind_vectors.items()
        for lead, lead_h in enumerate(card.lead_h)
        for name, values_J in values.items()
    ]
    return _lines(["channel", "lead_h", "metric", "value"], rows)


def spectra_arrays(card: Scorecard) -> dict[str, Any]:
    """Return named arrays: truth, member, mean [band, lead, channel, wavenumber] in unit^2 m, and axes."""
    bands = card.bands
    if not bands:
        return {}
    return {
        "truth": np.stack([spectra.truth_JCK for spectra in bands.values()]),
        "member": np.stack([spectra.member_JCK for spectra in bands.values()]),
        "mean": np.stack([spectra.mean_JCK for spectra in bands.values()]),
        "band": np.array(list(bands)),
        "band_deg": np.array([str(BANDS[band]) for band in bands]),
        "wavelength_km": np.stack([spectra.wavelength_km() for spectra in bands.values()]),
        "lead_h": np.array(card.lead_h),
        "channel": np.array(card.names),
    }


def write_files(card: Scorecard, directory: Path) -> list[Path]:
    """Write scores.json, the CSV files and spectra.npz, each whole or not at all, and return their paths."""
    directory.mkdir(parents=True, exist_ok=True)
    contents = {
        "scores.json": (json.dumps(as_json(card), indent=1, allow_nan=False) + "\n").encode(),
        "scores.csv": as_csv(card).encode(),
    }
    if card.regions:
        contents["regions.csv"] = regions_csv(card).encode()
    if card.events is not None:
        contents["events.csv"] = events_csv(card).encode()
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
