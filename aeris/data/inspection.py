"""What is in a source or a store, as plain data: times with their gaps, grid, values, sizes of files.

A report has `path`, `layout`, `facts` (for printing), `problems` (one sentence each), and by kind `mapping`,
`times`, `values`, `files`.

Shapes: L levels, Y rows, X cols.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from aeris.data.header import HEADER, PLAN, Header, read_header
from aeris.data.layouts.source import Source
from aeris.data.plan import size_text
from aeris.data.plausible import complaint
from aeris.data.statistics import HOUR_S
from aeris.data.store import Store
from aeris.data.variables import UNITS

Report = dict[str, Any]
GAPS = 5  # so many are named


def inspect_source(source: Source, values: bool = True) -> Report:
    """Look at an opened source.

    Args:
        values: read the first, middle and last time of every variable.
    """
    times = _all_times(source)
    problems = list(times_of(times)["problems"])
    for name, one in source.variables.items():
        if one.times.size and one.times.size != times.size:
            missing = times[~np.isin(times, one.times)]
            problems.append(f"{name} is missing at {missing.size} times, the first {missing[0]}")
    found = _source_values(source) if values else []
    problems += _odd(found)
    axes = source.axes
    facts = {
        "variables": len(source.variables),
        "times": times_of(times)["text"],
        "grid": grid_text(axes.latitude_deg, axes.longitude_deg),
        **({"units assumed": " ".join(source.units_assumed)} if source.units_assumed else {}),
        **source.about,
        "fingerprint": source.fingerprint,
    }
    return {
        "path": source.path,
        "layout": source.layout,
        "fingerprint": source.fingerprint,
        "facts": facts,
        "mapping": [list(row) for row in source.mapping],
        "times": times_of(times),
        "units_assumed": list(source.units_assumed),
        "values": found,
        "problems": problems,
    }


def _odd(rows: Sequence[Report]) -> list[str]:
    """Say which fields are not plausible, each once."""
    first: dict[str, Report] = {}
    for row in rows:
        if row["odd"]:
            first.setdefault(row["name"], row)
    return [f"{name}{' at ' * bool(one['time'])}{one['time']}: {one['odd']}" for name, one in first.items()]


def _all_times(source: Source) -> NDArray[np.datetime64]:
    each = [one.times for one in source.variables.values() if one.times.size]
    return np.unique(np.concatenate(each)) if each else np.zeros(0, "datetime64[s]")


def times_of(times: NDArray[np.datetime64]) -> Report:
    """Describe rising times: count, ends, step, gaps."""
    if not times.size:
        return {"count": 0, "text": "none: static fields", "problems": []}
    ends = [str(times[0]), str(times[-1])]
    report: Report = {"count": int(times.size), "first": ends[0], "last": ends[1], "gaps": [], "problems": []}
    report["text"] = f"{times.size}: {ends[0]} to {ends[1]}"
    if times.size < 2:
        return report
    steps_s = np.diff(times.astype("datetime64[s]")).astype(np.int64)
    lengths, counts = np.unique(steps_s, return_counts=True)
    usual_s = int(lengths[np.argmax(counts)])
    report["step_h"] = usual_s / HOUR_S
    report["text"] += f", every {usual_s / HOUR_S:g} h"
    for index in np.flatnonzero(steps_s != usual_s):
        report["gaps"].append([str(times[index]), str(times[index + 1])])
    gaps = report["gaps"]
    if gaps:
        named = ", ".join(f"{after} to {before}" for after, before in gaps[:GAPS])
        more = f" and {len(gaps) - GAPS} more" if len(gaps) > GAPS else ""
        uneven = f"{len(gaps)} gaps or shorter steps, {named}{more}"
        report["problems"].append(f"the times are not all {usual_s / HOUR_S:g} h apart: {uneven}")
    return report


def grid_text(latitude_deg: NDArray[np.float64], longitude_deg: NDArray[np.float64]) -> str:
    """Describe a grid."""
    steps = [abs(np.diff(degrees)) for degrees in (latitude_deg, longitude_deg)]
    even = all(step.size and np.ptp(step) < 1e-3 for step in steps)
    spacing = f", {steps[0].mean():.4g} x {steps[1].mean():.4g} degrees" if even else ", not evenly spaced"
    ends = f"{latitude_deg[0]:g} to {latitude_deg[-1]:g}, {longitude_deg[0]:g} to {longitude_deg[-1]:g}"
    return f"{len(latitude_deg)} x {len(longitude_deg)} ({ends}){spacing}"


def _places(count: int) -> list[int]:
    """Return the first, middle and last of so many."""
    return sorted({0, count // 2, max(count - 1, 0)})


def _row(name: str, time: str, x: NDArray[np.floating], units: str, odd: str | None) -> Report:
    """Return the line of one field; missing values do not count."""
    there = x[np.isfinite(x)]
    numbers: dict[str, float | None] = {"low": None, "mean": None, "high": None}
    if there.size:
        mean = float(there.mean(dtype=np.float64))
        numbers = {"low": float(there.min()), "mean": mean, "high": float(there.max())}
    missing = 1.0 - there.size / x.size
    return {"name": name, "time": time, "missing": missing, **numbers, "units": units, "odd": odd}


def _source_values(source: Source) -> list[Report]:
    rows = []
    for name, one in source.variables.items():
        levels: Sequence[float | None] = one.levels_hpa or [None]
        for place in _places(len(one.times)):
            time = str(one.times[place]) if one.times.size else ""
            x_LYX = source.read(name, place, place + 1, one.levels_hpa)[0]
            for x_YX, level in zip(x_LYX, levels):
                label = name if level is None else f"{name} {level:g} hPa"
                odd = complaint(name, level, x_YX, source.axes.is_global)
                rows.append(_row(label, time, x_YX, UNITS.get(name, ""), odd))
    return rows


def inspect_store(path: Path, values: bool = True) -> Report:
    """Look at a whole store: its header, the sizes of its files, and some values.

    Raises:
        StoreError: the header cannot be read.
    """
    header = read_header(path / HEADER)
    files, problems = [], []
    for name, count, size in header.files:
        there = (path / name).stat().st_size if (path / name).exists() else -1
        state = "" if there == size else "missing" if there < 0 else f"{there} bytes in place of {size}"
        files.append({"name": name, "times": count, "bytes": size, "state": state})
        if state:
            problems.append(f"{name}: {state}; copy it again from where the store was made")
    times = times_of(header.time_s.astype("datetime64[s]"))
    problems += times["problems"]
    whole = not any(one["state"] for one in files)
    store = Store(path) if whole else None
    found = _store_values(store) if values and store else []
    problems += _odd(found)
    return {
        "path": str(path),
        "layout": "store of aeris.data",
        "fingerprint": store.fingerprint_id if store else "",
        "facts": _store_facts(header, times["text"], store.fingerprint_id if store else "files are missing"),
        "times": times,
        "made": header.made,
        "files": files,
        "values": found,
        "problems": problems,
    }


def _store_facts(header: Header, times: str, fingerprint: str) -> dict[str, object]:
    numbers, side = header.statistics, header.window
    rows, cols = len(header.latitude_deg), len(header.longitude_deg)
    masks = {name: f"{1 - valid.mean():.1%}" for name, valid in header.masks.items()}
    zeros = header.made.get("zeros for") or []
    return {
        "channels": f"{len(header.channels)}: {' '.join(one.name for one in header.channels)}",
        "times": times,
        "grid": grid_text(header.latitude_deg, header.longitude_deg)
        + (f", {header.row_offset} row at the north pole dropped" if header.row_offset else ""),
        "windows": f"{rows // side} x {cols // side} of {side} x {side} points",
        "statistics": f"{numbers.train_period[0]} to {numbers.train_period[1]}, changes over "
        + ", ".join(f"{hours} h" for hours in sorted(numbers.residual_std)),
        **({"masked": ", ".join(f"{name} {share}" for name, share in masks.items())} if masks else {}),
        **({"zeros for": " ".join(zeros)} if zeros else {}),
        "made from": " ".join(header.made.get("sources", [])),
        "size": size_text(sum(size for _, _, size in header.files)),
        "fingerprint": fingerprint,
    }


def _store_values(store: Store) -> list[Report]:
    rows = []
    is_global = bool(abs(store.latitude_deg).max() > 80)
    for place in _places(len(store)):
        x_CYX = store.read(place)
        for one, x_YX, valid_YX in zip(store.channels, x_CYX, store.mask_CYX):
            x = np.where(valid_YX, x_YX, np.nan)
            odd = complaint(one.variable, one.level_hpa, x, is_global)
            rows.append(_row(one.name, str(store.times[place]), x, one.units, odd))
    store.close()
    return sorted(rows, key=lambda row: store.names.index(row["name"]))


def inspect_unfinished(directory: Path) -> Report:
    """Say how far a conversion is."""
    made = json.loads((directory / PLAN).read_text())
    written = 0
    for path in directory.glob("*.done"):
        written += path.read_bytes().count(1)
    for path in directory.glob("[0-9]*.h5"):
        with h5py.File(path, "r", locking=False) as file:
            written += len(file["time"])
    total = made["times"][0]
    parts = directory / "parts"
    counted = len(list(parts.glob("statistics-*.npz"))) if parts.exists() else 0
    claims = [path.name.removesuffix(".claim") for path in parts.glob("*.claim")] if parts.exists() else []
    facts = {
        "channels": f"{len(made['channels'])}: {' '.join(made['channels'])}",
        "times written": f"{written} of {total}",
        "blocks counted": counted,
        "claimed": " ".join(sorted(claims)) or "nothing",
        "made from": " ".join(made["sources"]),
    }
    problem = f"{directory} is not whole: run the same convert command again to finish it"
    return {"path": str(directory), "layout": "unfinished store", "facts": facts, "problems": [problem]}
