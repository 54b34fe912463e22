"""GRIB, through cfgrib where it is installed: every hypercube of the file is a part of the source."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from aeris.data.layouts.collection import join
from aeris.data.layouts.gridded import gridded
from aeris.data.layouts.source import Source

LAYOUT = "GRIB"


def open_cubes(path: Path) -> list[Any]:
    """Open all hypercubes of a file as xarray datasets; no index is written beside it.

    Raises:
        ValueError: cfgrib is not installed, or cannot read the file.
    """
    try:
        import cfgrib  # type: ignore[import-not-found, unused-ignore]
    except ImportError as error:
        raise ValueError(f"{path} is GRIB, which needs cfgrib: pip install cfgrib ({error})") from None
    try:
        return list(cfgrib.open_datasets(str(path), backend_kwargs={"indexpath": "", "errors": "raise"}))
    except Exception as error:  # ecCodes has its own
        raise ValueError(f"{path} cannot be read by cfgrib: {error}") from None


def open_grib(path: Path, member: int | None, told: Mapping[str, str]) -> Source:
    """Open a file; hypercubes without a known variable are left out.

    Raises:
        ValueError: cfgrib is missing or fails, or nothing in the file is known.
    """
    parts, refused = [], []
    for cube in open_cubes(path):
        own = member if "number" in cube.sizes else None
        try:
            parts.append(gridded(str(path), LAYOUT, cube, own, (), told))
        except ValueError as error:
            if "none of its variables is known" not in str(error):
                raise
            refused += list(map(str, cube.data_vars))
    if not parts:
        raise ValueError(f"none of its variables is known: {', '.join(refused)}")
    source = parts[0] if len(parts) == 1 else join(str(path), parts, LAYOUT)
    if refused:
        source.mapping.append(("left out", ", ".join(refused), ""))
    return source
