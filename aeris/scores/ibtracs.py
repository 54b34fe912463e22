"""Observed tracks of tropical cyclones, from the CSV files of IBTrACS v04.

Source: Knapp et al. 2010, Bull. Amer. Meteor. Soc. 91, 363; files at
ncei.noaa.gov/products/international-best-track-archive. A point is as in aeris/scores/cyclones.py.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from aeris.scores.cyclones import Track

KNOT_M_S = 0.514444


def read_ibtracs(path: Path, start: np.datetime64, end: np.datetime64) -> list[Track]:
    """Read observed tracks from a CSV file of IBTrACS v04, hours since 1970; both ends included.

    Places, and pressure and wind of the responsible agency or else of the US ones. Observed winds are
    sustained over 1 or 10 minutes at a point, stronger than those of a model's grid.

    Raises:
        ValueError: columns are missing, or a number is none.
    """
    storms: dict[str, list[tuple[int, float, float, float, float]]] = {}
    names: dict[str, str] = {}
    first_h, last_h = (int(time.astype("datetime64[h]").astype(np.int64)) for time in (start, end))
    with path.open(newline="", encoding="utf-8", errors="replace") as file:
        reader = csv.DictReader(file)
        missing = {"SID", "ISO_TIME", "LAT", "LON"} - set(reader.fieldnames or ())
        if missing:
            raise ValueError(f"{path} is no CSV file of IBTrACS: it lacks {', '.join(sorted(missing))}")
        for row in reader:
            try:
                hour = int(np.datetime64(row["ISO_TIME"].strip()).astype("datetime64[h]").astype(np.int64))
            except ValueError:
                continue  # the line with units
            if first_h <= hour <= last_h:
                pressure = _number(row, path, "WMO_PRES", "USA_PRES") * 100.0
                wind = _number(row, path, "WMO_WIND", "USA_WIND") * KNOT_M_S
                latitude, longitude = _number(row, path, "LAT"), _number(row, path, "LON") % 360.0
                storms.setdefault(row["SID"], []).append((hour, latitude, longitude, pressure, wind))
                names[row["SID"]] = (row.get("NAME") or "").strip()
    found = []
    for storm, rows in storms.items():
        hours, place = np.unique(np.array([row[0] for row in rows], dtype=np.int64), return_index=True)
        found.append(Track(hours, np.array([rows[k][1:] for k in place], dtype=np.float64), names[storm]))
    return found


def _number(row: Mapping[str, str], path: Path, *columns: str) -> float:
    """Return the first of the columns that has a number; NaN if all are empty."""
    for column in columns:
        text = (row.get(column) or "").strip()
        if text:
            try:
                return float(text)
            except ValueError:
                raise ValueError(f"{path}: {column} of {row['SID']} is {text!r}, no number") from None
    return math.nan
