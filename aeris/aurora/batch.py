"""What Aurora reads and writes: a state of the atmosphere with its recent past, and where and when it is.

Fields are in physical units (SI); the model normalises. Names and methods are those of the official package,
version 2.0.1. Coordinates stay on the CPU in float64, whatever the fields are cast or moved to: the model's
encodings of place and time need them so.

Shapes: B batch, T history, C levels, H rows, W columns.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

import torch
from torch import Tensor

from aeris.aurora import batch_netcdf
from aeris.aurora.normalisation import (
    Stats,
    normalise_atmos,
    normalise_surf,
    unnormalise_atmos,
    unnormalise_surf,
)
from aeris.aurora.regridding import regrid, regular_grid
from aeris.aurora.times import utc


@dataclass
class Metadata:
    """Where and when the fields of a batch are.

    Attributes:
        lat: latitude in degrees within [-90, 90], falling: [H], or [H, W] falling along every column.
        lon: longitude in degrees within [0, 360), rising: [W], or [H, W] rising along every row.
        time: for every sample the time of its last history entry, in UTC; a time with a zone is turned
            into UTC, one without is taken as UTC.
        atmos_levels: levels in hPa, in the order of the fields.
        rollout_step: how many model steps made this state; 0 for data.

    Raises:
        ValueError: one of these is not so.
    """

    lat: Tensor
    lon: Tensor
    time: tuple[datetime, ...]
    atmos_levels: tuple[float, ...]
    rollout_step: int = 0

    def __post_init__(self) -> None:
        self.lat, self.lon = _coordinates("lat", self.lat), _coordinates("lon", self.lon)
        _check_grid(self.lat, self.lon)
        self.time = _times(self.time)
        self.atmos_levels = _levels(self.atmos_levels)

    @property
    def grid_key(self) -> str:
        """A digest of the coordinates: equal grids have equal keys, for whoever keeps things by grid."""
        digest = hashlib.blake2b(digest_size=16)
        for values in (self.lat, self.lon):
            digest.update(str(tuple(values.shape)).encode())
            digest.update(values.contiguous().numpy().data)
        return digest.hexdigest()


def _coordinates(name: str, values: Tensor) -> Tensor:
    values = torch.as_tensor(values).detach()
    if values.dtype in (torch.float16, torch.bfloat16):
        raise ValueError(f"{name} is {values.dtype}, too coarse for coordinates: give float32 or float64")
    return values.to("cpu", torch.float64)


def _check_grid(lat: Tensor, lon: Tensor) -> None:
    if (lat.dim(), lon.dim()) not in ((1, 1), (2, 2)) or (lat.dim() == 2 and lat.shape != lon.shape):
        shapes = f"{tuple(lat.shape)} and {tuple(lon.shape)}"
        raise ValueError(f"lat and lon have shapes {shapes}: they must be (H,) and (W,), or both (H, W)")
    # Written so that NaN fails.
    if not bool(((lat >= -90) & (lat <= 90)).all()):
        raise ValueError(f"latitudes must lie in [-90, 90], found {float(lat.min())} to {float(lat.max())}")
    if not bool(((lon >= 0) & (lon < 360)).all()):
        raise ValueError(f"longitudes must lie in [0, 360), found {float(lon.min())} to {float(lon.max())}")
    if not bool((lat.diff(dim=0) < 0).all()):
        raise ValueError("latitudes must fall from one row to the next: flip them and the fields")
    if not bool((lon.diff(dim=-1) > 0).all()):
        raise ValueError("longitudes must rise from one column to the next: roll them and the fields")


def _times(times: tuple[datetime, ...]) -> tuple[datetime, ...]:
    if isinstance(times, datetime) or not all(isinstance(time, datetime) for time in times):
        raise ValueError(f"time must be a tuple of datetime, one for each sample, found {times!r}")
    return tuple(map(utc, times))


def _levels(levels: tuple[float, ...]) -> tuple[float, ...]:
    plain = tuple(level.item() if hasattr(level, "item") else level for level in levels)
    if not all(level > 0 for level in plain) or len(set(plain)) != len(plain):
        raise ValueError(f"levels in hPa must be above zero and different from each other, found {plain}")
    return plain


@dataclass
class Batch:
    """States of the atmosphere with their recent past.

    Attributes:
        surf_vars: surface variables, [B, T, H, W] each.
        static_vars: fields that do not change, [H, W] each; inside a model also [B, T, H, W].
        atmos_vars: variables on levels, [B, T, C, H, W] each.
        metadata: where and when.

    Raises:
        ValueError: shapes do not agree with each other or with the metadata.
    """

    surf_vars: dict[str, Tensor]
    static_vars: dict[str, Tensor]
    atmos_vars: dict[str, Tensor]
    metadata: Metadata

    def __post_init__(self) -> None:
        moving = {**self.surf_vars, **self.atmos_vars}
        if not moving:
            raise ValueError("a batch needs a surface variable or a variable on levels")
        where, (rows, cols) = self.metadata, self.spatial_shape
        history = next(iter(moving.values())).shape[1:2]
        lead = (len(where.time), *history)
        for name, x in self.surf_vars.items():
            _check_shape(name, x, "(B, T, H, W)", (*lead, rows, cols))
        for name, x in self.atmos_vars.items():
            _check_shape(name, x, "(B, T, C, H, W)", (*lead, len(where.atmos_levels), rows, cols))
        for name, x in self.static_vars.items():
            if x.dim() == 4:
                _check_shape(name, x, "(B, T, H, W)", (lead[0], x.shape[1], rows, cols))
            else:
                _check_shape(name, x, "(H, W)", (rows, cols))

    @property
    def spatial_shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.metadata.lat.shape[0], self.metadata.lon.shape[-1]

    def normalise(self, surf_stats: Stats | None = None) -> Batch:
        """Return the batch normalised, static variables too.

        Args:
            surf_stats: location and scale of surface and static variables that replace the usual ones.

        Raises:
            ValueError: a variable has no location and scale.
        """
        levels = self.metadata.atmos_levels
        return replace(
            self,
            surf_vars={k: normalise_surf(k, x, surf_stats) for k, x in self.surf_vars.items()},
            static_vars={k: normalise_surf(k, x, surf_stats) for k, x in self.static_vars.items()},
            atmos_vars={k: normalise_atmos(k, x, levels) for k, x in self.atmos_vars.items()},
        )

    def unnormalise(self, surf_stats: Stats | None = None) -> Batch:
        """Undo `normalise`."""
        levels = self.metadata.atmos_levels
        return replace(
            self,
            surf_vars={k: unnormalise_surf(k, x, surf_stats) for k, x in self.surf_vars.items()},
            static_vars={k: unnormalise_surf(k, x, surf_stats) for k, x in self.static_vars.items()},
            atmos_vars={k: unnormalise_atmos(k, x, levels) for k, x in self.atmos_vars.items()},
        )

    def crop(self, patch_size: int) -> Batch:
        """Drop the southernmost row where it is one too many for patches of `patch_size` rows and columns.

        Raises:
            ValueError: the columns do not divide into patches, or more than one row is left over.
        """
        rows, cols = self.spatial_shape
        if cols % patch_size:
            raise ValueError(
                f"{cols} columns do not divide into patches of {patch_size}: "
                f"{_nearest_multiples(cols, patch_size)} would"
            )
        if rows % patch_size > 1:
            raise ValueError(
                f"{rows} rows leave {rows % patch_size} over patches of {patch_size}, one could be dropped: "
                f"{_nearest_multiples(rows, patch_size)} would do"
            )
        if rows % patch_size == 0:
            return self
        return self._map(
            lambda x: x[..., :-1, :],
            replace(
                self.metadata,
                lat=self.metadata.lat[:-1],
                lon=self.metadata.lon if self.metadata.lon.dim() == 1 else self.metadata.lon[:-1],
            ),
        )

    def to(self, device: str | torch.device) -> Batch:
        """Move the fields to a device; from pinned memory, without waiting. Coordinates stay on the CPU."""
        # Towards the CPU the values would not be there yet when they are read.
        wait = torch.device(device).type == "cpu"
        return self._map(lambda x: x.to(device, non_blocking=not wait), self.metadata)

    def type(self, dtype: torch.dtype) -> Batch:
        """Cast the fields; coordinates stay float64."""
        return self._map(lambda x: x.to(dtype), self.metadata)

    def pin_memory(self) -> Batch:
        """Copy the fields to memory that a GPU reads from without waiting."""
        return self._map(lambda x: x.pin_memory(), self.metadata)

    def regrid(self, res: float) -> Batch:
        """Interpolate bilinearly to a global grid of `res` degrees with both poles; float32 on the CPU.

        Raises:
            ValueError: latitude and longitude are [H, W].
        """
        where = self.metadata
        lat, lon = regular_grid(res)
        return self._map(
            lambda x: regrid(x, where.lat, where.lon, lat, lon), replace(where, lat=lat, lon=lon)
        )

    def to_netcdf(self, path: str | Path) -> None:
        """Write the batch in the file layout of the official package; replaces a file once whole."""
        where = self.metadata
        batch_netcdf.write(
            Path(path),
            batch_netcdf.Stored(self.surf_vars, self.static_vars, self.atmos_vars),
            batch_netcdf.Place(where.lat, where.lon, where.time, where.atmos_levels, where.rollout_step),
        )

    @classmethod
    def from_netcdf(cls, path: str | Path) -> Batch:
        """Read what `to_netcdf` or the official package wrote.

        Raises:
            ValueError: the file is none of these.
        """
        fields, place = batch_netcdf.read(Path(path))
        metadata = Metadata(place.lat, place.lon, place.time, place.levels, place.rollout_step)
        return cls(dict(fields.surf), dict(fields.static), dict(fields.atmos), metadata)

    def _map(self, change: Callable[[Tensor], Tensor], metadata: Metadata) -> Batch:
        """Apply a function to every field."""
        return Batch(
            surf_vars={name: change(x) for name, x in self.surf_vars.items()},
            static_vars={name: change(x) for name, x in self.static_vars.items()},
            atmos_vars={name: change(x) for name, x in self.atmos_vars.items()},
            metadata=metadata,
        )


def _check_shape(name: str, x: Tensor, letters: str, expected: tuple[int, ...]) -> None:
    if tuple(x.shape) != expected:
        raise ValueError(
            f"{name} has shape {tuple(x.shape)}, the rest of the batch wants {letters} = {expected}: B is "
            f"the number of times, T that of the first variable, C, H and W those of the metadata"
        )


def _nearest_multiples(count: int, patch_size: int) -> str:
    below = count // patch_size * patch_size
    return f"{below} or {below + patch_size}"
