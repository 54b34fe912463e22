"""One batch as a NetCDF file in the official package's layout.

    surf_2t     [batch, history, latitude, longitude]
    atmos_z     [batch, history, level, latitude, longitude]
    static_lsm  [latitude, longitude]

Beside them rollout_step, time, level, latitude and longitude. Where every point has its own latitude and
longitude, the dims are row and column; the official package has no files of such grids. The libraries for
files are imported when one is written or read: the model does without.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class Stored(NamedTuple):
    """The fields of a batch."""

    surf: Mapping[str, Tensor]
    static: Mapping[str, Tensor]
    atmos: Mapping[str, Tensor]


class Place(NamedTuple):
    """Where and when they are."""

    lat: Tensor
    lon: Tensor
    time: tuple[datetime, ...]
    levels: tuple[float, ...]
    rollout_step: int


def write(path: Path, fields: Stored, place: Place) -> None:
    """Write a batch; a file of this name is replaced once the new one is whole.

    Raises:
        OSError: the disk is full or cannot be written.
    """
    import xarray

    grid = ("latitude", "longitude") if place.lat.dim() == 1 else ("row", "column")
    history = ("batch", "history")
    variables = {
        **{f"surf_{name}": ((*history, *grid), _numpy(x)) for name, x in fields.surf.items()},
        **{
            f"static_{name}": (grid, _numpy(x if x.dim() == 2 else x[0, -1]))
            for name, x in fields.static.items()
        },
        **{f"atmos_{name}": ((*history, "level", *grid), _numpy(x)) for name, x in fields.atmos.items()},
    }
    own = grid[0] == "latitude"
    coordinates: dict[str, Any] = {
        "latitude": _numpy(place.lat) if own else (grid, _numpy(place.lat)),
        "longitude": _numpy(place.lon) if own else (grid, _numpy(place.lon)),
        "time": np.array(place.time, dtype="datetime64[ns]"),
        "level": list(place.levels),
        "rollout_step": place.rollout_step,
    }
    dataset = xarray.Dataset(variables, coords=coordinates)
    # One time and level to a chunk, so that a reader of one field reads no other.
    encoding: dict[Hashable, dict[str, Any]] = {}
    for name, variable in dataset.data_vars.items():
        sizes = [1 if dim in ("history", "level") else size for dim, size in variable.sizes.items()]
        encoding[name] = {"zlib": True, "complevel": 4, "chunksizes": tuple(sizes)}
    partial = path.with_name(path.name + ".partial")
    dataset.to_netcdf(partial, engine="h5netcdf", encoding=encoding)
    partial.replace(path)


def read(path: Path) -> tuple[Stored, Place]:
    """Read what `write` or the official package wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no batch.
    """
    import xarray

    try:
        with xarray.open_dataset(path, engine="h5netcdf") as dataset:
            dataset.load()
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is no NetCDF file, or damaged ({error})") from None
    missing = {"latitude", "longitude", "time", "level", "rollout_step"} - set(map(str, dataset.variables))
    if missing:
        raise ValueError(f"{path} is no batch of Aurora: it lacks {', '.join(sorted(missing))}")
    kinds: dict[str, dict[str, Tensor]] = {"surf": {}, "static": {}, "atmos": {}}
    for name, variable in dataset.data_vars.items():
        kind, _, short = str(name).partition("_")
        if kind in kinds:
            kinds[kind][short] = _tensor(variable.values)
    place = Place(
        lat=_tensor(dataset["latitude"].values),
        lon=_tensor(dataset["longitude"].values),
        time=tuple(dataset["time"].values.astype("datetime64[s]").tolist()),
        levels=tuple(dataset["level"].values.tolist()),
        rollout_step=int(dataset["rollout_step"].values),
    )
    return Stored(kinds["surf"], kinds["static"], kinds["atmos"]), place


def _numpy(x: Tensor) -> NDArray[Any]:
    """Return the values for a file; types that numpy lacks become float32."""
    x = x.detach().cpu()
    values: NDArray[Any] = (x.float() if x.dtype == torch.bfloat16 else x).numpy()
    return values


def _tensor(values: NDArray[Any]) -> Tensor:
    return torch.from_numpy(np.require(values, requirements=["C", "W"]))
