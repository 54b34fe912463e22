"""Writers of every layout a source may have, with h5py, zarr and numpy alone: nothing of ours writes here."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import xarray as xr
import zarr

SHORT = {
    "2m_temperature": "t2m",
    "10m_u_component_of_wind": "u10m",
    "10m_v_component_of_wind": "v10m",
    "mean_sea_level_pressure": "msl",
    "sea_surface_temperature": "sst",
    "geopotential": "z",
    "u_component_of_wind": "u",
    "v_component_of_wind": "v",
    "temperature": "t",
    "specific_humidity": "q",
}
STATIC = ("geopotential_at_surface", "land_sea_mask")
VERSION_2: dict[str, Any] = {"zarr_format": 2} if version("zarr") >= "3" else {}  # zarr 3 writes both


def atmosphere(
    times: int = 10, start: str = "2000-02-28T00", rows: int = 13, step_h: int = 6, poles: bool = True
) -> xr.Dataset:
    """Make plausible air in our own order over a leap day. Values are short binary fractions."""
    rng = np.random.default_rng(3)
    dates = np.datetime64(start, "s") + np.arange(times) * np.timedelta64(step_h, "h")
    cols, north = 24, 90.0 if poles else 90.0 - 90.0 / rows
    coords = {
        "time": dates.astype("datetime64[ns]"),
        "level": np.array([300, 500, 850]),
        "latitude": np.linspace(north, -north, rows),
        "longitude": np.arange(cols) * 15.0,
    }
    four, three = ("time", "level", "latitude", "longitude"), ("time", "latitude", "longitude")
    heights = np.array([89000.0, 55000.0, 14000.0]).reshape(3, 1, 1)
    table = {
        "2m_temperature": (three, 260.0, 0.25, "K"),
        "10m_u_component_of_wind": (three, -12.0, 0.25, "m s-1"),
        "10m_v_component_of_wind": (three, -12.0, 0.25, "m s-1"),
        "mean_sea_level_pressure": (three, 99000.0, 16.0, "Pa"),
        "sea_surface_temperature": (three, 274.0, 0.125, "K"),
        "geopotential": (four, heights, 4.0, "m2 s-2"),
        "u_component_of_wind": (four, -12.0, 0.25, "m s-1"),
        "v_component_of_wind": (four, -12.0, 0.25, "m s-1"),
        "temperature": (four, 230.0, 0.25, "K"),
        "specific_humidity": (four, 0.0, 2.0**-13, "kg kg-1"),
        "geopotential_at_surface": (three[1:], 0.0, 256.0, "m2 s-2"),
        "land_sea_mask": (three[1:], 0.0, 2.0**-7, "1"),
    }
    data = {}
    for name, (dims, offset, step, units) in table.items():
        shape = tuple(len(coords[dim]) for dim in dims)
        values = (offset + step * rng.integers(0, 128, shape)).astype(np.float32)
        data[name] = (dims, values, {"units": units})
    land = np.zeros((rows, cols), bool)
    land[:, cols // 2 :] = True
    data["land_sea_mask"][1][:] = land
    data["sea_surface_temperature"][1][:, land] = np.nan
    return xr.Dataset(data, coords=coords)


def columns(data: xr.Dataset, joint: str = "", names: dict[str, str] = SHORT) -> dict[str, np.ndarray]:
    """Take a dataset apart into fields by name: {short name[joint + level]: [time, lat, lon]}."""
    fields = {}
    for name, short in names.items():
        if name in data and "level" in data[name].dims:
            for number, level in enumerate(data.level.values):
                fields[f"{short}{joint}{level}"] = data[name].values[:, number]
        elif name in data:
            fields[short] = data[name].values
    return fields


def wb2(path: Path, data: xr.Dataset) -> Path:
    """Write a Zarr in WeatherBench 2 layout."""
    data.to_zarr(path, consolidated=True, **VERSION_2)
    return path


def seconds(data: xr.Dataset) -> np.ndarray:
    """Return the times in seconds since 1970."""
    return data.time.values.astype("datetime64[s]").astype(np.float64)


def makani_metadata(root: Path, data: xr.Dataset, key: str = "coords", **extra: object) -> None:
    (root / "metadata").mkdir(parents=True, exist_ok=True)
    coordinates = {
        "lat": data.latitude.values.tolist(),
        "lon": data.longitude.values.tolist(),
        "channel": list(columns(data)),
    }
    metadata = {"dataset_name": "test", "h5_path": "fields", "dhours": 6, key: coordinates, **extra}
    (root / "metadata" / "data.json").write_text(json.dumps(metadata))


def makani_year(path: Path, data: xr.Dataset, scales: bool = True, valid: np.ndarray | None = None) -> Path:
    """Write one file; with `scales` it says its times, channels and coordinates."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fields = columns(data)
    with h5py.File(path, "w") as file:
        file["fields"] = np.stack(list(fields.values()), axis=1).astype(np.float32)
        if valid is not None:
            file["valid_data"] = valid
        if scales:
            file["timestamp"] = seconds(data)
            file["channel"] = np.array([name.encode() for name in fields])
            file["lat"], file["lon"] = data.latitude.values, data.longitude.values
            for axis, name in enumerate(("timestamp", "channel", "lat", "lon")):
                file[name].make_scale(name)
                file["fields"].dims[axis].attach_scale(file[name])
    return path


def makani(root: Path, data: xr.Dataset, scales: bool = True, key: str = "coords", split: int = 5) -> Path:
    """Write `train/2000.h5`, `test/2001.h5` (cut after `split` times), metadata and invariants."""
    makani_metadata(root, data, key)
    makani_year(root / "train" / "2000.h5", data.isel(time=slice(0, split)), scales)
    makani_year(root / "test" / "2001.h5", data.isel(time=slice(split, None)), scales)
    (root / "invariants").mkdir()
    for name, variable, file in (
        ("geopotential_at_surface", "Z", "orography"),
        ("land_sea_mask", "LSM", "land_sea_mask"),
    ):
        with h5py.File(root / "invariants" / f"{file}.nc", "w") as out:
            out[variable] = data[name].values[None]
    return root


def samples(root: Path, data: xr.Dataset) -> Path:
    """Write a file per time as Swift has them, under WeatherBench 2 names."""
    full = {name: name for name in SHORT}
    fields = {**columns(data, "_", full), **{name: data[name].values for name in STATIC}}
    (root / "train").mkdir(parents=True)
    for number, time in enumerate(data.time.values.astype("datetime64[s]")):
        with h5py.File(root / "train" / f"2000_{number}.h5", "w") as file:  # 2000_10 sorts before 2000_2
            for name, x in fields.items():
                file[f"input/{name}"] = x[number] if x.ndim == 3 else x
            file["input/time"] = str(time).encode()
    np.save(root / "lat.npy", data.latitude.values)
    np.save(root / "lon.npy", data.longitude.values)
    return root


def shards(root: Path, data: xr.Dataset, ways: tuple[int, int] = (2, 3), beside: bool = True) -> Path:
    """Cut all rows but the first into shards, as AERIS does."""
    fields = {**columns(data), "zs": None, "lsm": None}
    for name, full in (("zs", STATIC[0]), ("lsm", STATIC[1])):
        fields[name] = np.broadcast_to(data[full].values, fields["t2m"].shape)
    x = np.stack(list(fields.values()), axis=1)[:, :, 1:]
    folder = root / f"y_{ways[0]}_x_{ways[1]}"
    folder.mkdir(parents=True)
    for i, rows in enumerate(np.split(x, ways[0], axis=2)):
        for j, tile in enumerate(np.split(rows, ways[1], axis=3)):
            with h5py.File(folder / f"y_{i}_x_{j}.hdf5", "w") as file:
                file["input"] = tile
    if beside:
        (root / "channels.txt").write_text("\n".join(fields))
        np.save(root / "times.npy", data.time.values)
    return root


def anemoi(path: Path, data: xr.Dataset, missing: tuple[int, ...] = (), **attributes: object) -> Path:
    """Write a flattened data set; times numbered in `missing` hold missing values and are listed."""
    names = {
        **SHORT,
        "2m_temperature": "2t",
        "10m_u_component_of_wind": "10u",
        "10m_v_component_of_wind": "10v",
    }
    fields = columns(data, "_", names)
    fields["z"] = np.broadcast_to(data[STATIC[0]].values, fields["2t"].shape)
    fields["lsm"] = np.broadcast_to(data[STATIC[1]].values, fields["2t"].shape)
    fields["cos_latitude"] = np.zeros_like(fields["2t"])
    x = np.stack(list(fields.values()), axis=1)
    x = x.reshape(*x.shape[:2], 1, -1).astype(np.float32)
    x[list(missing)] = np.nan
    times = data.time.values.astype("datetime64[s]")
    lat, lon = np.meshgrid(data.latitude.values, data.longitude.values, indexing="ij")
    group = zarr.open_group(str(path), mode="w", **VERSION_2)
    for name, array in (
        ("data", x),
        ("dates", times),
        ("latitudes", lat.ravel()),
        ("longitudes", lon.ravel()),
        ("mean", np.nanmean(x.astype(np.float64), axis=(0, 2, 3))),
        ("stdev", np.nanstd(x.astype(np.float64), axis=(0, 2, 3))),
        ("statistics_tendencies_6h_mean", np.full(len(fields), 0.5)),
        ("statistics_tendencies_6h_stdev", np.full(len(fields), 2.0)),
    ):
        out = group.create_array if hasattr(group, "create_array") else group.create_dataset
        out(name, shape=array.shape, chunks=(1, *array.shape[1:]), dtype=array.dtype)[...] = array
    group.attrs.update(
        {
            "variables": list(fields),
            "field_shape": [data.sizes["latitude"], data.sizes["longitude"]],
            "frequency": "6h",
            "missing_dates": [str(times[n]) for n in missing],
            "resolution": "15p0",
            **attributes,
        }
    )
    return path
