"""Write a year file (aeris/data/yearfile.py): make it, and fill it so that a kill does not hurt.

Without compression the chunks of a time lie one after the other (HDF5's implicit index), so a year is written
past HDF5 with plain writes: no HDF5 metadata changes, a killed conversion leaves a file that can be
continued, and several processes may fill one file.

Shapes: C channels, Y rows, X cols, I x J windows of side W.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from pathlib import Path

import h5py
import numpy as np
from numpy.typing import NDArray

from aeris.data.yearfile import FIELD_BYTES, Field

METADATA_BYTES = 2**20  # more than the names and coordinates of a file take


def create(
    path: Path,
    names: Sequence[str],
    time_s: NDArray[np.int64],
    latitude_deg: NDArray[np.float64],
    longitude_deg: NDArray[np.float64],
    window: int,
    compress: bool = False,
) -> None:
    """Create a year file with room for every time; unwritten values are undefined.

    Without compression the file has its full size at once, as a sparse file.
    """
    shape = (len(time_s), len(names), len(latitude_deg), len(longitude_deg))
    size_bytes = int(np.prod(shape)) * FIELD_BYTES
    check_room(path, METADATA_BYTES + size_bytes, size_bytes if compress else METADATA_BYTES)
    with h5py.File(path, "w", libver=("v110", "v110"), locking=False) as file:
        layout = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        layout.set_chunk((1, len(names), window, window))
        if compress:
            layout.set_shuffle()
            layout.set_deflate(9)
        else:
            layout.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
        layout.set_obj_track_times(False)  # the same data make the same bytes
        layout.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
        file["time"] = np.asarray(time_s, dtype=np.int64)
        file["time"].attrs["units"] = "seconds since 1970-01-01"
        file["channel"] = list(names)
        file["latitude"] = np.asarray(latitude_deg, dtype=np.float64)
        file["longitude"] = np.asarray(longitude_deg, dtype=np.float64)
        h5py.h5d.create(file.id, b"fields", h5py.h5t.IEEE_F32LE, h5py.h5s.create_simple(shape), layout)


def check_room(path: Path, length: int, reserve: int) -> None:
    """Find out whether a file of `length` bytes can be made here and `reserve` bytes of it be written.

    HDF5 may crash the interpreter when its last write fails, so a full disk or quota has to show before.

    Raises:
        OSError: it cannot.
    """
    try:
        with path.open("wb") as file:
            os.ftruncate(file.fileno(), length)
            os.posix_fallocate(file.fileno(), 0, reserve)
    finally:
        path.unlink(missing_ok=True)


class YearWriter:
    """Fills an uncompressed year file time by time and remembers, beside it, which times are finished.

    A first start creates the file; a later one continues it. Several processes may each write some times.
    `finish` gives it its final name.
    """

    def __init__(
        self,
        path: Path,
        names: Sequence[str],
        time_s: NDArray[np.int64],
        latitude_deg: NDArray[np.float64],
        longitude_deg: NDArray[np.float64],
        window: int,
    ) -> None:
        self.path = path
        self.partial = path.with_name(path.name + ".partial")
        self._done_path = marks_of(path)
        self._window = window
        if not self.partial.exists():
            whole = tagged(self.partial)
            create(whole, names, time_s, latitude_deg, longitude_deg, window)
            publish(whole, self.partial, replace=False)
        if not self._done_path.exists():
            marks = tagged(self._done_path)
            marks.write_bytes(bytes(len(time_s)))
            publish(marks, self._done_path, replace=False)
        self._offset = self._first_byte()
        self._field_bytes = len(names) * len(latitude_deg) * len(longitude_deg) * FIELD_BYTES
        self._data = os.open(self.partial, os.O_WRONLY)
        self._marks = os.open(self._done_path, os.O_RDWR)
        self._open = True
        self.done = np.frombuffer(os.pread(self._marks, len(time_s), 0), dtype=np.uint8).astype(bool)
        self._unmarked: list[int] = []

    def _first_byte(self) -> int:
        with h5py.File(self.partial, "r", locking=False) as file:
            fields = file["fields"]
            first = fields.id.get_chunk_info_by_coord((0, 0, 0, 0))
            corner = tuple(n - c for n, c in zip(fields.shape, fields.chunks))
            last = fields.id.get_chunk_info_by_coord(corner)
            together = fields.size * FIELD_BYTES - first.size
        assert last.byte_offset - first.byte_offset == together, "the chunks do not lie one after the other"
        return int(first.byte_offset)

    def write(self, index: int, x_CYX: Field) -> None:
        """Write the fields of one time; `mark` makes it count."""
        channels, rows, cols = x_CYX.shape
        side = self._window
        x_CIWJW = x_CYX.reshape(channels, rows // side, side, cols // side, side)
        data = np.ascontiguousarray(x_CIWJW.transpose(1, 3, 0, 2, 4), dtype="<f4")
        _write_all(self._data, data.reshape(-1).view(np.uint8).data, self._offset + index * self._field_bytes)
        self._unmarked.append(index)

    def mark(self) -> None:
        """Mark what was written as done, once it is on disk: a mark must not outlive its data in a crash."""
        os.fsync(self._data)
        for index in self._unmarked:
            _write_all(self._marks, memoryview(b"\x01"), index)
            self.done[index] = True
        self._unmarked = []

    def close(self) -> None:
        """Close the file, finished or not; closing twice does nothing."""
        if self._open:
            os.close(self._data)
            os.close(self._marks)
        self._open = False

    def finish(self) -> None:
        """Give the year its final name."""
        assert self.done.all(), "a year is finished when every time is"
        self.close()
        publish(self.partial, self.path)
        self._done_path.unlink()


def marks_of(path: Path) -> Path:
    """Return the file beside a year that is being written: a byte for every time, 1 when it is done."""
    return path.with_name(path.name + ".done")


def tagged(path: Path) -> Path:
    """Return a name beside `path` that no other process uses."""
    return path.with_name(f"{path.name}.{socket.gethostname()}-{os.getpid()}")


def publish(temporary: Path, path: Path, replace: bool = True) -> None:
    """Give a file its name once its content is on disk, so that a crash leaves all of it or nothing.

    Args:
        replace: put it in place of a file of that name; if not, the file that was there first stays.
    """
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    if replace:
        temporary.rename(path)
        return
    try:
        os.link(temporary, path)
    except FileExistsError:
        pass
    except OSError:  # a file system without links: somebody else may be first by a hair, with the same bytes
        if not path.exists():
            temporary.rename(path)
            return
    temporary.unlink()


def _write_all(descriptor: int, data: memoryview, offset: int) -> None:
    """Write every byte: `pwrite` may write fewer (at most 2 GiB a call, or up to the end of a full disk)."""
    while len(data):
        written = os.pwrite(descriptor, data, offset)
        data, offset = data[written:], offset + written
