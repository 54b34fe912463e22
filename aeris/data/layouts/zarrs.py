"""Zarr of version 2 and 3 in WeatherBench 2 or ARCO layout, on this machine or at an address."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import xarray as xr

from aeris.data.layouts.gridded import gridded
from aeris.data.layouts.source import Source

MARKS = ("zarr.json", ".zgroup", ".zmetadata")
PACKAGES = {"gs": "gcsfs", "gcs": "gcsfs", "s3": "s3fs", "http": "aiohttp", "https": "aiohttp", "az": "adlfs"}


def is_zarr(path: Path) -> bool:
    """Say whether a directory is a Zarr group."""
    return any((path / mark).exists() for mark in MARKS)


def storage_options(path: str) -> dict[str, Any] | None:
    """Return what the file system of an address needs: public buckets are read without an account."""
    return {"token": "anon"} if path.startswith(("gs://", "gcs://")) else None


def out_of_reach(path: str, error: Exception) -> ValueError:
    """Say why an address cannot be read."""
    kind = path.partition("://")[0]
    if isinstance(error, ImportError):
        package = PACKAGES.get(kind, f"an fsspec package for {kind}://")
        return ValueError(f"{path} needs a package that is not installed: pip install {package}")
    said = str(error).partition("\n")[0] or type(error).__name__
    return ValueError(f"{path} cannot be reached: {said}")


def open_zarr(path: str, member: int | None, as_is: Sequence[str], told: Mapping[str, str]) -> Source:
    """Open Zarr.

    Raises:
        ValueError: it cannot be reached or read, or is not understood.
    """
    options: dict[str, Any] = {"chunks": None, "decode_timedelta": False}
    if "://" in path:
        try:
            raw = xr.open_zarr(path, storage_options=storage_options(path), **options)
        except Exception as error:  # every file system has its own
            raise out_of_reach(path, error) from None
        return gridded(path, "Zarr at an address", raw, member, as_is, told)
    where = Path(path)
    try:
        raw = xr.open_zarr(where, consolidated=_consolidated(where), **options)
    except (KeyError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    version = 3 if (where / "zarr.json").exists() else 2
    return gridded(path, f"Zarr version {version}", raw, member, as_is, told)


def _consolidated(path: Path) -> bool:
    """Say whether a Zarr directory keeps its metadata in one place; xarray warns if it has to find out."""
    new = path / "zarr.json"
    if new.exists():
        return bool(json.loads(new.read_text()).get("consolidated_metadata"))
    return (path / ".zmetadata").exists()
