"""NetCDF-3 and NetCDF-4."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import xarray as xr

from aeris.data.layouts.gridded import gridded
from aeris.data.layouts.source import Source

# First bytes -> xarray's engine, name.
KINDS: dict[bytes, tuple[Any, str]] = {
    b"\x89HDF": ("h5netcdf", "NetCDF-4"),
    b"CDF\x01": ("scipy", "NetCDF-3"),
    b"CDF\x02": ("scipy", "NetCDF-3"),
}


def open_netcdf(
    path: Path, start: bytes, member: int | None, as_is: Sequence[str], told: Mapping[str, str]
) -> Source:
    """Open a file that begins with the bytes `start`.

    Raises:
        ValueError: it is truncated, in another format, or not understood.
    """
    if start not in KINDS:
        raise ValueError(
            f"{path} cannot be read: it is neither NetCDF, HDF5, GRIB nor Zarr (NetCDF-3 of 64 bits neither)"
        )
    engine, name = KINDS[start]
    try:
        raw = xr.open_dataset(path, engine=engine, decode_timedelta=False)
    except OSError as error:
        raise ValueError(f"{path} is truncated or damaged: {error}") from None
    except ValueError as error:  # times in a calendar that is not ours, an engine that is not installed
        raise ValueError(f"{path} cannot be read: {error}") from None
    return gridded(str(path), name, raw, member, as_is, told)
