"""One year of fields in one HDF5 file: how it is laid out, and reading it.

    fields float32 [time, channel, latitude, longitude], chunk = one window of every channel at one time
    time int64 (s since 1970), channel (names), latitude, longitude: so that a file describes itself

A window chunk lets every rank read whole chunks and nothing else, for any window-parallel grid. Uncompressed
chunks lie one after the other: they are read past HDF5, with hints to the kernel about which come next.

Shapes: C channels, Y rows, X cols, W side of a window.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

Field = NDArray[np.float32]
FIELD_BYTES = np.dtype(np.float32).itemsize
# The kernel is told of so much that will be read, so that a disk works while chunks are put in order.
AHEAD_BYTES = 8 * 2**20


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
        self._straight: _Straight | None = None
        self._process = -1

    def __getstate__(self) -> dict[str, Any]:
        """Leave open handles behind: HDF5 handles do not survive in another process."""
        return {**self.__dict__, "_dataset": None, "_straight": None, "_process": -1}

    @property
    def dataset(self) -> Any:
        """The open dataset `fields`.

        Raises:
            StoreError: the file is missing, truncated or not one of ours.
        """
        if self._process != os.getpid():
            self._dataset = self._open()["fields"]
            self._straight = _Straight.of(self._dataset)
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

        All use one buffer: a chunk is gone when the next one is asked for.

        Raises:
            StoreError: the file is damaged.
        """
        dataset, side = self.dataset, self.window
        shape = (dataset.shape[1] if channel is None else 1, side, side)
        chunk_CWW = np.empty(shape, dtype=np.float32)
        if self._straight is None:
            reads = self._read_chunks(index, corners, channel or 0, chunk_CWW)
        else:
            reads = self._straight.read(index, corners, channel or 0, chunk_CWW)
        try:
            for _ in reads:
                yield chunk_CWW
        except OSError as error:
            raise damaged(self.path, error) from None

    def expect(self, index: int, corners: Iterable[tuple[int, int]]) -> None:
        """Tell the kernel that the chunks at `corners` will be read soon, where it can be told."""
        if self.dataset is not None and self._straight is not None:
            self._straight.expect(index, corners)

    def _read_chunks(
        self, index: int, corners: Iterable[tuple[int, int]], channel: int, chunk_CWW: Field
    ) -> Iterator[None]:
        """Read chunk after chunk through HDF5, which decompresses.

        One selection over many chunks would copy row by row: 127 ms in place of 6 ms for 32 windows of
        30 x 30 of a 0.25-degree field.
        """
        file, shape = self.dataset.id, chunk_CWW.shape
        memory, space = h5py.h5s.create_simple(shape), file.get_space()
        for row, col in corners:
            space.select_hyperslab((index, channel, row, col), (1, *shape))
            file.read(memory, space, chunk_CWW)
            yield

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
        self._dataset, self._straight, self._process = None, None, -1


class _Straight:
    """Uncompressed chunks that lie one after the other, read from the file descriptor that HDF5 has open.

    Against HDF5, which is asked about every chunk, it halves the time of reading from memory, and it can say
    ahead what it will read.
    """

    def __init__(self, descriptor: int, first_byte: int, shape: Sequence[int], side: int) -> None:
        self._descriptor, self._first_byte, self._side = descriptor, first_byte, side
        _, channels, rows, cols = shape
        self._grid = rows // side, cols // side
        self._chunk_bytes = channels * side**2 * FIELD_BYTES
        # Chunks of a rank are far apart: no guesses about what comes next.
        _advise(descriptor, 0, 0, "POSIX_FADV_RANDOM")

    @classmethod
    def of(cls, dataset: Any) -> _Straight | None:
        """Find out whether the chunks of a dataset lie so; None if they do not, or are not plain floats."""
        side, plan = dataset.chunks[-1], dataset.id.get_create_plist()
        edges = dataset.chunks[:2] != (1, dataset.shape[1]) or any(n % side for n in dataset.shape[2:])
        if edges or plan.get_nfilters() or dataset.dtype != np.dtype("<f4") or not hasattr(os, "preadv"):
            return None
        last = tuple(n - c for n, c in zip(dataset.shape, dataset.chunks))
        ends = [dataset.id.get_chunk_info_by_coord(corner).byte_offset for corner in ((0, 0, 0, 0), last)]
        chunk_bytes = int(np.prod(dataset.chunks)) * FIELD_BYTES
        # Chunks that were not all made with the file lie in the order in which they were written.
        if plan.get_alloc_time() != h5py.h5d.ALLOC_TIME_EARLY:
            return None
        if None in ends or ends[1] - ends[0] != dataset.size * FIELD_BYTES - chunk_bytes:
            return None
        return cls(dataset.file.id.get_vfd_handle(), ends[0], dataset.shape, side)

    def _offsets(self, index: int, corners: Iterable[tuple[int, int]]) -> list[int]:
        (rows, cols), side = self._grid, self._side
        return [
            self._first_byte + ((index * rows + row // side) * cols + col // side) * self._chunk_bytes
            for row, col in corners
        ]

    def expect(self, index: int, corners: Iterable[tuple[int, int]]) -> None:
        """Tell the kernel of the chunks at `corners`, up to `AHEAD_BYTES`."""
        self._announce(self._offsets(index, corners)[: self._ahead], 0, self._chunk_bytes)

    def _announce(self, offsets: Sequence[int], skip: int, size: int) -> None:
        for offset in offsets:
            _advise(self._descriptor, offset + skip, size, "POSIX_FADV_WILLNEED")

    @property
    def _ahead(self) -> int:
        return max(1, AHEAD_BYTES // self._chunk_bytes)

    def read(
        self, index: int, corners: Iterable[tuple[int, int]], channel: int, chunk_CWW: Field
    ) -> Iterator[None]:
        """Read chunk after chunk, or one channel of each, into `chunk_CWW`.

        Raises:
            OSError: the file ends before.
        """
        offsets, ahead = self._offsets(index, corners), self._ahead
        memory = chunk_CWW.reshape(-1).view(np.uint8).data
        skip = channel * self._side**2 * FIELD_BYTES
        self._announce(offsets[:ahead], skip, len(memory))
        for number, offset in enumerate(offsets):
            self._announce(offsets[number + ahead : number + ahead + 1], skip, len(memory))
            _fill(self._descriptor, memory, offset + skip)
            yield


def _advise(descriptor: int, offset: int, size: int, advice: str) -> None:
    """Tell the kernel what will be read, where it and the file system take advice."""
    if hasattr(os, "posix_fadvise"):
        with suppress(OSError):
            os.posix_fadvise(descriptor, offset, size, getattr(os, advice))


def _fill(descriptor: int, memory: memoryview, offset: int) -> None:
    """Fill `memory` from a file; a read may give less than it is asked for."""
    while len(memory):
        count = os.preadv(descriptor, [memory], offset)
        if not count:
            raise OSError(f"the file ends at byte {offset}")
        memory, offset = memory[count:], offset + count


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
