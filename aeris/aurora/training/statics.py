"""Static fields of Aurora (land-sea mask, orography, soil type) from a file of their own.

Stores of weather often lack the soil type. The official package brings its static fields as a pickle beside
its weights; ERA5's come as NetCDF. A pickle is read by an unpickler that knows arrays and nothing else, so a
foreign file cannot run code.

Shapes: H rows, W columns.
"""

from __future__ import annotations

import io
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from aeris.data.axes import LATITUDE, LEVEL, LONGITUDE, Axes, find_axes
from aeris.data.sources import SAME_DEG

Field = NDArray[np.float32]

# Aurora's name -> names of it in files, beside its own.
OTHER_NAMES: dict[str, tuple[str, ...]] = {
    "lsm": ("land_sea_mask",),
    "z": ("geopotential_at_surface", "surface_geopotential", "zs", "geopotential"),
    "slt": ("soil_type",),
}
_ARRAY_PARTS = {
    *(("numpy", "ndarray"), ("numpy", "dtype")),
    *((f"numpy.{core}.multiarray", "_reconstruct") for core in ("core", "_core")),
    *((f"numpy.{core}.multiarray", "scalar") for core in ("core", "_core")),
    *((f"numpy.{core}.numeric", "_frombuffer") for core in ("core", "_core")),
}


def read_statics(path: str | Path, lat: NDArray[np.float64], lon: NDArray[np.float64]) -> dict[str, Field]:
    """Read the static fields of a file, north first: float32 [H, W] each, under Aurora's names.

    Variables of NetCDF and Zarr are turned as their coordinates say. A pickle has none: its fields must be on
    the global grid of `lat` and `lon`, north first, as the official package's are.

    Args:
        path: NetCDF, a Zarr directory, or a pickle of arrays by name.
        lat: latitude of the weather, falling, degrees.
        lon: longitude of the weather, rising, degrees.

    Raises:
        ValueError: the file is missing, damaged, or on another grid.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"{path} does not exist")
    if path.suffix in (".pickle", ".pkl"):
        return _from_pickle(path, (len(lat), len(lon)))
    try:
        raw = _open(path)
        axes = find_axes(raw, None)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    for what, ours, theirs in (("latitude", lat, axes.latitude_deg), ("longitude", lon, axes.longitude_deg)):
        if ours.shape != theirs.shape or np.abs(ours - theirs).max() > SAME_DEG:
            raise ValueError(
                f"{path} is on another grid than the weather: "
                f"its {what} is {_ends(theirs)}, not {_ends(ours)}"
            )
    return _from_dataset(raw, axes)


def _ends(values: NDArray[np.float64]) -> str:
    return f"{len(values)} from {values[0]:g} to {values[-1]:g}"


def _open(path: Path) -> Any:
    if path.is_dir():
        new, old = path / "zarr.json", path / ".zmetadata"
        found = json.loads(new.read_text()).get("consolidated_metadata") if new.exists() else old.exists()
        return xr.open_zarr(path, chunks=None, consolidated=bool(found), decode_timedelta=False)
    with path.open("rb") as file:
        engine = "scipy" if file.read(3) == b"CDF" else "h5netcdf"
    return xr.open_dataset(path, engine=engine, decode_timedelta=False)


def _from_dataset(raw: Any, axes: Axes) -> dict[str, Field]:
    """Take every variable on the grid that has no levels and does not change along any other dimension."""
    lat, lon = axes.dims[LATITUDE], axes.dims[LONGITUDE]
    spelled = {other: name for name, others in OTHER_NAMES.items() for other in others}
    found: dict[str, Field] = {}
    for key in map(str, raw.data_vars):
        array = raw[key]
        if lat not in array.dims or lon not in array.dims or axes.dims.get(LEVEL) in array.dims:
            continue
        x = _unchanging(array.transpose(..., lat, lon))
        if x is None:
            continue
        x = x[:: -1 if axes.flipped else 1]
        found[spelled.get(key, key)] = np.ascontiguousarray(x[:, axes.longitude_order])
    return found


def _unchanging(array: Any) -> Field | None:
    """Return the field of [..., H, W] if all along the other dimensions are equal, reading up to a change."""
    places = np.ndindex(array.shape[:-2])
    fields = (np.asarray(array[place].values, dtype=np.float32) for place in places)
    first = next(fields, None)
    if first is None or not all(np.array_equal(first, one, equal_nan=True) for one in fields):
        return None
    return first


class _Arrays(pickle.Unpickler):
    """Unpickles plain containers, numbers and numpy arrays; refuses all else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ARRAY_PARTS:
            return super().find_class(module, name)
        if (module, name) == ("_codecs", "encode"):  # bytes, as old pickles write them
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it holds {module}.{name}, which is no array")


def _is_numbers(x: Any) -> bool:
    return isinstance(x, np.ndarray) and x.dtype.kind in "biuf"


def _from_pickle(path: Path, shape: tuple[int, int]) -> dict[str, Field]:
    try:
        values = _Arrays(io.BytesIO(path.read_bytes())).load()
    except Exception as error:  # a damaged pickle makes numpy raise nearly anything
        said = str(error).partition("\n")[0] or type(error).__name__
        raise ValueError(f"{path} is no pickle of arrays, or a damaged one: {said}") from None
    if not isinstance(values, dict) or not all(_is_numbers(x) for x in values.values()):
        raise ValueError(f"{path} is no pickle of arrays by name")
    for name, x in values.items():
        if x.shape != shape:
            raise ValueError(
                f"{path} has {name} on {' x '.join(map(str, x.shape))} points, "
                f"the weather {' x '.join(map(str, shape))}"
            )
    return {str(name): np.ascontiguousarray(x, dtype=np.float32) for name, x in values.items()}
