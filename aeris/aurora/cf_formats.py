"""The file formats a forecast is written in: NetCDF-4 and Zarr, growing along the lead time.

Their libraries are imported when a file is begun.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

LEAD = "prediction_timedelta"
RESERVE_BYTES = 2**20  # for what HDF5 writes beside the fields
ATTRS = {"Conventions": "CF-1.11", "source": "Aurora (aeris.aurora)"}


class Sink(Protocol):
    """A file format."""

    def create(self, name: str, dims: Sequence[str], values: NDArray[Any], attrs: dict[str, str]) -> None:
        """Add a variable; along the lead time, if it has that dim, it is empty and grows."""

    def append(self, name: str, values: NDArray[Any], count: int) -> None:
        """Write a variable at the lead time with number `count`."""

    def close(self) -> None:
        """Finish the file."""

    def abandon(self) -> None:
        """Let go of an unfinished file."""


class Netcdf:
    """One NetCDF-4 file."""

    def __init__(self, path: Path) -> None:
        import h5netcdf

        self._path = path
        self._file = h5netcdf.File(path, "w")
        self._file.attrs.update(ATTRS)
        self._leads = 0

    def create(self, name: str, dims: Sequence[str], values: NDArray[Any], attrs: dict[str, str]) -> None:
        """Add a variable."""
        for dim, size in zip(dims, values.shape):
            if dim not in self._file.dimensions:
                self._file.dimensions[dim] = None if dim == LEAD else size
        kind = values.dtype
        if LEAD in dims:
            chunks = (1,) if len(dims) == 1 else (1, 1, *values.shape[2:])
            fill = np.float32("nan") if kind == np.float32 else None
            variable = self._file.create_variable(name, dims, kind, chunks=chunks, fillvalue=fill)
        else:
            variable = self._file.create_variable(name, dims, data=values)
        variable.attrs.update(attrs)

    def append(self, name: str, values: NDArray[Any], count: int) -> None:
        """Write one lead time.

        Raises:
            OSError: the disk has no room for it. HDF5 would crash the interpreter when its last write fails.
        """
        if shutil.disk_usage(self._path.parent).free < values.nbytes + RESERVE_BYTES:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._path))
        if count >= self._leads:
            self._leads = count + 1
            self._file.resize_dimension(LEAD, self._leads)
        variable = self._file[name]
        variable[count if len(variable.dimensions) == 1 else (slice(None), count)] = values
        self._file.flush()

    def close(self) -> None:
        """Finish the file."""
        self._file.close()

    abandon = close


class Zarr:
    """A directory in Zarr format 2."""

    def __init__(self, path: Path) -> None:
        import zarr

        self._path = path
        self._arrays: dict[str, Any] = {}
        # zarr 3 writes format 3 unless told otherwise; zarr 2.18 knows no such argument.
        self._format: dict[str, Any] = {"zarr_format": 2} if int(zarr.__version__.split(".")[0]) >= 3 else {}
        zarr.open_group(str(path), mode="w", **self._format).attrs.update(ATTRS)

    def create(self, name: str, dims: Sequence[str], values: NDArray[Any], attrs: dict[str, str]) -> None:
        """Add a variable."""
        import numcodecs
        import zarr

        grows = LEAD in dims
        shape, chunks = values.shape, values.shape
        if grows:
            shape = tuple(0 if dim == LEAD else size for dim, size in zip(dims, shape))
            chunks = (1,) if len(dims) == 1 else (1, 1, *shape[2:])
        array: Any = zarr.create(
            shape=shape,
            chunks=chunks,
            dtype=values.dtype,
            fill_value=float("nan") if values.dtype == np.float32 else None,
            compressor=numcodecs.Blosc(cname="zstd", clevel=1, shuffle=numcodecs.Blosc.SHUFFLE),
            store=str(self._path),
            path=name,
            **self._format,
        )
        array.attrs.update({"_ARRAY_DIMENSIONS": list(dims), **attrs})
        if not grows:
            array[...] = values
        self._arrays[name] = array

    def append(self, name: str, values: NDArray[Any], count: int) -> None:
        """Write one lead time."""
        array = self._arrays[name]
        if array.ndim == 1:
            array.resize((count + 1,))
            array[count] = values
        else:
            array.resize((array.shape[0], count + 1, *array.shape[2:]))
            array[:, count] = values

    def close(self) -> None:
        """Gather the metadata in one file, for readers from far away."""
        import zarr

        zarr.consolidate_metadata(str(self._path), **self._format)

    def abandon(self) -> None:
        """Nothing is held open."""
