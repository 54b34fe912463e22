"""One year of fields in one HDF5 file: how it is laid out, and reading it.

    fields float32 [time, channel, latitude, longitude], chunk = one window of every channel at one time
    time int64 (s since 1970), channel (names), latitude, longitude: so that a file describes itself

A window chunk lets every rank read whole chunks and nothing else, for any window-parallel grid.

Shapes: C channels, Y rows, X cols, W side of a window.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

Field = NDArray[np.float32]
FIELD_BYTES = np.dtype(np.float32).itemsize


class StoreError(ValueError):
    """A store cannot be used; says in one sentence what is wrong and what to do.

    Attributes:
        of_a_file: whether the file system is to blame, not the user: the program ends with another status.
    """

    def __init__(self, text: str, of_a_file: bool = False) -> None:
        super().__init__(text)
        self.of_a_file = of_a_file


class YearFile:
    """A year of fields for reading: opened at the first read of each process, without HDF5's file locks."""

    def __init__(self, path: Path, cache_bytes: int = 0) -> None:
        self.path = path
        self._cache_bytes = cache_bytes
        self._dataset: Any = None
        self._process = -1

    def __getstate__(self) -> dict[str, Any]:
        """Leave open handles behind: HDF5 handles do not survive in another process."""
        return {**self.__dict__, "_dataset": None, "_process": -1}

    @property
    def dataset(self) -> Any:
        """The open dataset `fields`.

        Raises:
            StoreError: the file is missing, truncated or not one of ours.
        """
        if self._process != os.getpid():
            self._dataset = self._open()["fields"]
            self._process = os.getpid()
        return self._dataset

    def _open(self) -> Any:
        if not self.path.exists():
            raise StoreError(f"{self.path} is missing: copy it again from where the store was made")
        try:
            file = h5py.File(self.path, "r", locking=False, rdcc_nbytes=self._cache_bytes)
            if file["fields"].ndim == 4:
                return file
        except (OSError, KeyError) as error:
            raise damaged(self.path, error) from None
        raise damaged(self.path, "no four-dimensional dataset 'fields'")

    def time_s(self) -> NDArray[np.int64]:
        """Return the times written in the file, int64 seconds since 1970."""
        return np.asarray(self.dataset.file["time"][:], dtype=np.int64)

    @property
    def window(self) -> int:
        """Side of a chunk, in points."""
        return int(self.dataset.chunks[-1])

    def chunks(
        self, index: int, corners: Iterable[tuple[int, int]], channel: int | None = None
    ) -> Iterator[Field]:
        """Read the chunks at `corners` (row, col) one by one: float32 [C, W, W], C is 1 for a `channel`.

        All use one buffer: a chunk is gone when the next one is asked for. One HDF5 selection over many
        chunks copies row by row: 127 ms in place of 6 ms for 32 windows of 30 x 30 of a 0.25-degree field.

        Raises:
            StoreError: the file is damaged.
        """
        file, side = self.dataset.id, self.window
        shape = (self.dataset.shape[1] if channel is None else 1, side, side)
        chunk_CWW = np.empty(shape, dtype=np.float32)
        memory, space = h5py.h5s.create_simple(shape), file.get_space()
        for row, col in corners:
            try:
                space.select_hyperslab((index, channel or 0, row, col), (1, *shape))
                file.read(memory, space, chunk_CWW)
            except OSError as error:
                raise damaged(self.path, error) from None
            yield chunk_CWW

    def read(
        self, index: int, corner: tuple[int, int], size: tuple[int, int], channel: int | None = None
    ) -> Field:
        """Read `size` (rows, cols) at `corner`, from the chunks it touches: float32 [C or 1, rows, cols]."""
        side, (top, left), (bottom, right) = self.window, corner, np.add(corner, size).tolist()
        x_CYX = np.empty((self.dataset.shape[1] if channel is None else 1, *size), dtype=np.float32)
        corners = list(
            itertools.product(
                range(top // side * side, bottom, side),
                range(left // side * side, right, side),
            )
        )
        for (row, col), chunk_CWW in zip(corners, self.chunks(index, corners, channel)):
            rows = slice(max(row, top), min(row + side, bottom))
            cols = slice(max(col, left), min(col + side, right))
            part = chunk_CWW[:, rows.start - row : rows.stop - row, cols.start - col : cols.stop - col]
            x_CYX[:, rows.start - top : rows.stop - top, cols.start - left : cols.stop - left] = part
        return x_CYX

    def close(self) -> None:
        """Close the file if this process has it open."""
        if self._process == os.getpid():
            self._dataset.file.close()
        self._dataset, self._process = None, -1


class Years:
    """The year files of a store in order, read as one series of times."""

    def __init__(self, files: Sequence[YearFile], counts: Sequence[int]) -> None:
        self.files = tuple(files)
        self._first = np.concatenate([[0], np.cumsum(counts)]).astype(int)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Times, channels, rows, cols."""
        _, channels, rows, cols = self.files[0].dataset.shape
        return int(self._first[-1]), channels, rows, cols

    @property
    def window(self) -> int:
        """Side of a chunk."""
        return self.files[0].window

    def locate(self, index: int) -> tuple[YearFile, int]:
        """Return the file that holds time number `index`, and its number in that file.

        Raises:
            IndexError: there is no such time.
        """
        if not 0 <= index < self._first[-1]:
            raise IndexError(f"time {index} is outside 0 to {self._first[-1] - 1}")
        year = int(np.searchsorted(self._first, index, side="right")) - 1
        return self.files[year], index - int(self._first[year])

    def read(
        self, index: int, corner: tuple[int, int], size: tuple[int, int], channel: int | None = None
    ) -> Field:
        """Read the rows and cols of `size` at `corner`: float32 [C, rows, cols], C is 1 for a `channel`."""
        file, local = self.locate(index)
        return file.read(local, corner, size, channel=channel)

    def close(self) -> None:
        """Close every file."""
        for file in self.files:
            file.close()


def damaged(path: Path, reason: object) -> StoreError:
    """Describe a file that HDF5 cannot read."""
    reason = " ".join(str(reason).split())
    return StoreError(
        f"{path} is truncated or damaged ({reason}): copy it again, or delete the store and convert again"
    )
