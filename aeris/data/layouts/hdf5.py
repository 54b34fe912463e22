"""HDF5 files opened when first read in a process, a few at a time; nothing open goes to another process."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import h5py

OPEN_FILES = 64  # kept open: layouts with a file per time are read variable by variable


def open_hdf5(path: Path) -> Any:
    """Open a file for reading, without a lock unless this process has it open with one.

    Raises:
        ValueError: it is truncated or damaged.
    """
    try:
        return h5py.File(path, "r", locking=False)
    except OSError:
        try:
            return h5py.File(path, "r")
        except OSError as error:
            raise ValueError(f"{path} is truncated or damaged: {error}") from None


class Files:
    """Open files by path."""

    def __init__(self) -> None:
        self._open: OrderedDict[Path, Any] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        """Leave open files behind."""
        return {"_open": OrderedDict()}

    def get(self, path: Path) -> Any:
        """Return an open file.

        Raises:
            ValueError: it is truncated or damaged.
        """
        if path in self._open:
            self._open.move_to_end(path)
            return self._open[path]
        if len(self._open) >= OPEN_FILES:
            self._open.popitem(last=False)[1].close()
        self._open[path] = open_hdf5(path)
        return self._open[path]


def check_virtual(dataset: Any, path: Path) -> None:
    """Refuse a virtual dataset whose sources are gone: HDF5 would read zeros without a word.

    Raises:
        ValueError: names the first missing file.
    """
    if not dataset.is_virtual:
        return
    named = list(dict.fromkeys(source.file_name for source in dataset.virtual_sources()))
    gone = [name for name in named if name != "." and not (path.parent / name).exists()]
    if gone:
        raise ValueError(
            f"{path} is virtual and {len(gone)} of the {len(named)} files it points to are not there, "
            f"the first is {gone[0]}: copy the files to those places, or give them instead of {path.name}"
        )
