"""Our weather store: a directory of one HDF5 file per year and one file about them all.

    STORE/store.h5   channels, grid, times, files, static fields, masks, statistics, origin
    STORE/2000.h5    the fields of that year (aeris/data/yearfile.py)

`store.h5` is written last, so a directory with it is whole. Values are in physical units; points that a mask
hides are filled on reading with one number per channel, the same whatever part of the field is read.

Shapes: C channels, Y rows, X cols, N windows of side W, T tokens per window.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aeris.data.header import HEADER, PLAN, read_header
from aeris.data.statistics import HOUR_S, Statistics
from aeris.data.yearfile import Field, StoreError, YearFile, Years, damaged
from swipe.windows import WindowShard

# A small store is decompressed once and then stays in memory; for a large one a cache only costs copies.
SMALL_BYTES = 64 * 2**20

__all__ = ["Statistics", "Store", "StoreError", "packaged_sample"]

Period = tuple[np.datetime64, np.datetime64]


def packaged_sample() -> Path:
    """Return the directory of the packaged store: 40 days of a SPEEDY perfect-model simulation, 24 x 48."""
    return Path(__file__).parent / "sample"


class Store:
    """A whole store, opened for reading. Files open at the first read of each process; it can be pickled.

    Raises:
        StoreError: missing, unfinished, truncated or not a store; says what to do.
    """

    noise_where_hidden = False
    """Whether noise and residuals are not 0 where a mask hides a point, as networks of other code know it."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        header = self.path / HEADER
        if not header.exists() or (self.path / PLAN).exists():
            raise StoreError(_why_no_store(self.path))
        about = read_header(header)
        self.channels = about.channels
        self.names = tuple(channel.name for channel in self.channels)
        self.latitude_deg, self.longitude_deg = about.latitude_deg, about.longitude_deg
        self.row_offset, self.window = about.row_offset, about.window
        self.static, self.masks = about.static, about.masks
        self.statistics = about.statistics
        self.fill_C: Field = self.statistics.mean_C.astype(np.float32)
        self.made = about.made
        self._time_s = about.time_s
        self.times: NDArray[np.datetime64] = self._time_s.astype("datetime64[s]")
        self.interval_h = int(np.diff(self._time_s).min()) // HOUR_S if len(self._time_s) > 1 else 0
        self.years = self._open_years(about.files)
        self._hidden: dict[WindowShard, list[tuple[int, NDArray[np.bool_]]]] = {}

    def _open_years(self, files: list[tuple[str, int, int]]) -> Years:
        years = []
        small = sum(size for _, _, size in files) < SMALL_BYTES
        for name, _, size in files:
            path = self.path / name
            if not path.exists():
                raise StoreError(f"{path} is missing: copy it again from where the store was made")
            if path.stat().st_size != size:
                raise damaged(path, f"{path.stat().st_size} bytes in place of {size}")
            years.append(YearFile(path, SMALL_BYTES if small else 0))
        return Years(years, [count for _, count, _ in files])

    def __len__(self) -> int:
        """Return the number of times."""
        return len(self._time_s)

    @property
    def rows(self) -> int:
        """Number of rows Y."""
        return len(self.latitude_deg)

    @property
    def cols(self) -> int:
        """Number of cols X."""
        return len(self.longitude_deg)

    @cached_property
    def mask_CYX(self) -> NDArray[np.bool_]:
        """True where a point of a channel is valid."""
        mask = np.ones((len(self.names), self.rows, self.cols), dtype=bool)
        for name, valid_YX in self.masks.items():
            mask[self.names.index(name)] = valid_YX
        return mask

    def read(self, index: int) -> Field:
        """Read the whole field of one time: float32 [C, Y, X], masked points filled.

        Raises:
            StoreError: a value is missing where none may be.
        """
        file, local = self.years.locate(index)
        x_CYX = file.read(local, (0, 0), (self.rows, self.cols))
        for name, valid_YX in self.masks.items():
            number = self.names.index(name)
            x_CYX[number][~valid_YX] = self.fill_C[number]
        if not np.isfinite(x_CYX.sum()):
            self._refuse(index)
        return x_CYX

    def read_windows(self, index: int, shard: WindowShard, roll: int = 0) -> Field:
        """Read a rank's tokens, from its windows only: float32 [N, T, C], masked points filled.

        Args:
            roll: read as if the globe had been turned by so many columns, as `np.roll` along longitude.

        Raises:
            ValueError: the shard is of another grid, or a store with masks is to be rolled.
            StoreError: a value is missing where none may be.
        """
        grid, side = shard.grid, shard.grid.window
        if (grid.rows, grid.cols) != (self.rows, self.cols):
            raise ValueError(
                f"the windows are of {grid.rows} x {grid.cols} points, but {self.path} has "
                f"{self.rows} x {self.cols}"
            )
        if roll and self.masks:
            raise ValueError(
                f"{self.path} has masked channels ({', '.join(self.masks)}), which cannot be rolled"
            )
        file, local = self.years.locate(index)
        corners = self._corners(shard, roll)
        half, channels = side // 2, len(self.names)
        x_NTC = np.empty((len(corners), grid.tokens // shard.sp, channels), dtype=np.float32)
        sets, quadrants, strips, tokens = shard.split(grid.tokens)
        held = divmod(shard.sp_rank, strips)
        if side == self.window:
            blocks = self._from_chunks(file, local, corners)
        else:
            blocks = (self._read_across(file, local, corner, side) for corner in corners)
        for window, x_CWW in enumerate(blocks):
            x_QTC = x_CWW.reshape(channels, 2, half, 2, half).transpose(1, 3, 2, 4, 0)
            if shard.sp == 1:
                x_NTC[window].reshape(2, 2, half, half, channels)[:] = x_QTC
            else:
                x = x_QTC.reshape(sets, quadrants, strips, tokens, channels)
                x_NTC[window] = x[held[0], :, held[1]].reshape(-1, channels)
        for number, hidden_NT in self._hidden_of(shard):
            x_NTC[..., number][hidden_NT] = self.fill_C[number]
        if not np.isfinite(x_NTC.sum()):
            self._refuse(index)
        return x_NTC

    def expect(self, index: int, shard: WindowShard, roll: int = 0) -> None:
        """Say that a rank's windows of a time are read next, so that the disk begins; see `read_windows`."""
        if shard.grid.window == self.window:
            file, local = self.years.locate(index)
            chunks = self._chunks_of(self._corners(shard, roll))
            file.expect(local, dict.fromkeys(corner for pair in chunks for corner in pair))

    def _corners(self, shard: WindowShard, roll: int) -> list[tuple[int, int]]:
        """Return the first (row, col) of a rank's windows on the turned globe."""
        side = shard.grid.window
        return [(wy * side, (wx * side - roll) % self.cols) for wy, wx in shard.windows]

    def _chunks_of(self, corners: list[tuple[int, int]]) -> list[tuple[tuple[int, int], tuple[int, int]]]:
        """Return, for windows as large as a chunk, the chunk a window begins in and the one it ends in."""
        side = self.window
        shift = corners[0][1] % side  # the same for all windows of a roll
        ends = (side - 1) if shift else 0
        return [((row, col - shift), (row, (col + ends) % self.cols // side * side)) for row, col in corners]

    def _from_chunks(self, file: YearFile, local: int, corners: list[tuple[int, int]]) -> Iterator[Field]:
        """Read windows as large as a chunk; off the chunks, from the two they lie in, each read once."""
        shift = corners[0][1] % self.window
        if shift == 0:
            yield from file.chunks(local, corners)
            return
        pairs = self._chunks_of(corners)
        needed = list(dict.fromkeys(corner for pair in pairs for corner in pair))
        chunks = {corner: chunk.copy() for corner, chunk in zip(needed, file.chunks(local, needed))}
        for left, right in pairs:
            yield np.concatenate((chunks[left][:, :, shift:], chunks[right][:, :, :shift]), axis=2)

    def _read_across(self, file: YearFile, local: int, corner: tuple[int, int], side: int) -> Field:
        """Read a window at any corner, in two parts where it crosses the first column: [C, side, side]."""
        row, col = corner
        before = min(side, self.cols - col)
        x_CWW = file.read(local, corner, (side, before))
        if before == side:
            return x_CWW
        return np.concatenate((x_CWW, file.read(local, (row, 0), (side, side - before))), axis=2)

    def valid_windows(self, shard: WindowShard) -> NDArray[np.bool_]:
        """Return the mask of a rank's windows: bool [N, T, C], True where a point is valid."""
        valid_NTC = np.ones((*shard.token_index().shape, len(self.names)), dtype=bool)
        for number, hidden_NT in self._hidden_of(shard):
            valid_NTC[..., number] = ~hidden_NT
        return valid_NTC

    def _hidden_of(self, shard: WindowShard) -> list[tuple[int, NDArray[np.bool_]]]:
        """Return (channel, tokens that are masked) for every masked channel of a rank's windows."""
        if not self.masks:
            return []
        if shard not in self._hidden:
            tokens_NT = shard.token_index()
            self._hidden[shard] = [
                (self.names.index(name), ~valid_YX.reshape(-1)[tokens_NT])
                for name, valid_YX in self.masks.items()
            ]
        return self._hidden[shard]

    def _refuse(self, index: int) -> None:
        """Say which value of a time is missing."""
        file, local = self.years.locate(index)
        x_CYX = file.read(local, (0, 0), (self.rows, self.cols))
        bad = ~np.isfinite(x_CYX) & self.mask_CYX
        if bad.any():
            channel, row, col = (int(n) for n in np.argwhere(bad)[0])
            raise StoreError(
                f"{self.names[channel]} is {x_CYX[channel, row, col]} at {self.times[index]}, row {row}, "
                f"col {col} of {file.path}, where no value may be missing: convert the data again"
            )

    def index_of(self, time: np.datetime64 | str) -> int:
        """Return the number of a time.

        Raises:
            StoreError: the store does not have it; names the nearest.
        """
        moment = np.datetime64(time).astype("datetime64[s]")
        wanted = int(moment.astype(np.int64))
        place = int(np.searchsorted(self._time_s, wanted))
        if place < len(self) and self._time_s[place] == wanted:
            return place
        nearest = self.times[int(np.argmin(np.abs(self._time_s - wanted)))]
        raise StoreError(
            f"{self.path} has no time {moment}: the nearest is {nearest} "
            f"(it covers {self.times[0]} to {self.times[-1]}, every {self.interval_h} h)"
        )

    def pairs(self, interval_h: int, period: Period | None = None) -> NDArray[np.int64]:
        """Find all times i, j `interval_h` hours apart, both inside `period` (ends included): int64 [n, 2].

        Raises:
            StoreError: there is none.
        """
        start, end = (self.times[0], self.times[-1]) if period is None else period
        before = np.flatnonzero((self.times >= start) & (self.times <= end - np.timedelta64(interval_h, "h")))
        wanted = self._time_s[before] + interval_h * HOUR_S
        after = np.minimum(np.searchsorted(self._time_s, wanted), len(self) - 1)
        found = self._time_s[after] == wanted
        if not found.any():
            raise StoreError(
                f"{self.path} has no two times {interval_h} h apart between {start} and {end} (its times are "
                f"{self.interval_h} h apart and cover {self.times[0]} to {self.times[-1]})"
            )
        return np.stack([before[found], after[found]], axis=1).astype(np.int64)

    @cached_property
    def fingerprint(self) -> dict[str, Any]:
        """What a model trained on this store depends on; compared at resume and before a forecast."""
        numbers = self.statistics
        stats = [numbers.mean_C, numbers.std_C]
        for interval in sorted(numbers.residual_mean):
            stats += [np.array([interval]), numbers.residual_mean[interval], numbers.residual_std[interval]]
        return {
            "channels": list(self.names),
            "units": [channel.units for channel in self.channels],
            "levels_hpa": [channel.level_hpa for channel in self.channels],
            "grid": {
                "rows": self.rows,
                "cols": self.cols,
                "row_offset": self.row_offset,
                "sha256": _digest([self.latitude_deg, self.longitude_deg]),
            },
            "statistics_sha256": _digest(stats),
            "train_period": [str(time) for time in numbers.train_period],
        }

    @property
    def fingerprint_id(self) -> str:
        """Return the fingerprint as 16 hexadecimal digits."""
        return hashlib.sha256(json.dumps(self.fingerprint, sort_keys=True).encode()).hexdigest()[:16]

    def close(self) -> None:
        """Close the files of this process."""
        self.years.close()


def _digest(arrays: list[NDArray[Any]]) -> str:
    """Hash numbers to nine digits: the last bits of statistics depend on the machine that computed them."""
    text = " ".join(f"{value + 0.0:.8e}" for array in arrays for value in array)
    return hashlib.sha256(text.encode()).hexdigest()


def _why_no_store(path: Path) -> str:
    partial = path.with_name(path.name + ".partial")
    for directory in (path, partial):
        if (directory / PLAN).exists():
            return f"{directory} is an unfinished conversion: run the same convert command again to finish it"
    if not path.exists():
        return f"{path} does not exist: make a store with python -m aeris.data.convert"
    return f"{path} is not a store, it has no {HEADER}: make one with python -m aeris.data.convert"
