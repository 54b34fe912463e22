"""What each init time contributes, kept on disk, so that a stopped evaluation goes on and ranks can share it.

    DIRECTORY/key.json          what the parts depend on: forecast, truth, options
    DIRECTORY/2004-01-10T00.npz arrays by name, one file per init time, whole or not there

Parts of another key are dropped: they are of other options.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

KEY = "key.json"
_JOINT = "/"


class Parts:
    """The parts of all init times of an evaluation.

    Args:
        directory: where they are.
        key: what they depend on, as plain data.
        inits: all init times, in order.
    """

    def __init__(self, directory: Path, key: Mapping[str, Any], inits: Sequence[np.datetime64]) -> None:
        self.directory = directory
        self._key = json.dumps(key, sort_keys=True, indent=1) + "\n"
        self._names = [f"{str(init).replace(':', '')}.npz" for init in inits]

    def prepare(self) -> bool:
        """Make the directory ready, on one process; tell whether parts of another evaluation were dropped."""
        path = self.directory / KEY
        there = path.read_text() if path.exists() else ""
        dropped = self.directory.exists() and there != self._key
        if dropped:
            shutil.rmtree(self.directory)
        self.directory.mkdir(parents=True, exist_ok=True)
        for left in self.directory.glob("*.partial"):
            left.unlink()
        part = path.with_name(KEY + ".partial")
        part.write_text(self._key)
        os.replace(part, path)
        return dropped

    def missing(self) -> list[int]:
        """Return the numbers of the init times that have no part yet."""
        return [number for number, name in enumerate(self._names) if not (self.directory / name).exists()]

    def write(self, init: int, part: Mapping[str, Mapping[str, NDArray[Any]]]) -> None:
        """Write the part of an init time: arrays by collector and name."""
        path = self.directory / self._names[init]
        partial = path.with_name(path.name + ".partial")
        arrays: dict[str, Any] = {
            f"{family}{_JOINT}{name}": x for family, one in part.items() for name, x in one.items()
        }
        with partial.open("wb") as file:
            np.savez(file, allow_pickle=False, **arrays)
        os.replace(partial, path)

    def of(self, family: str) -> Family:
        """Return the parts of one collector, read when they are asked for."""
        return Family(self, family)

    def read(self, init: int, family: str) -> dict[str, NDArray[Any]]:
        """Read what a collector contributed for an init time.

        Raises:
            ValueError: the file is damaged; names it.
        """
        path = self.directory / self._names[init]
        prefix = family + _JOINT
        try:
            with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
                return {name.removeprefix(prefix): file[name] for name in file if name.startswith(prefix)}
        except (BadZipFile, ValueError, EOFError, KeyError, OSError) as error:
            raise ValueError(f"{path} cannot be read ({error}): remove it and start again") from None

    def __len__(self) -> int:
        """Return the number of init times."""
        return len(self._names)

    def remove(self) -> None:
        """Remove all, once the result is written."""
        shutil.rmtree(self.directory, ignore_errors=True)


class Family(Sequence[Mapping[str, NDArray[Any]]]):
    """The parts of one collector in the order of init times; one is in memory at a time."""

    def __init__(self, parts: Parts, name: str) -> None:
        self._parts, self._name = parts, name

    def __len__(self) -> int:
        """Return the number of init times."""
        return len(self._parts)

    def __getitem__(self, index: Any) -> Any:
        """Read the part of an init time."""
        if isinstance(index, slice):
            return [self[number] for number in range(len(self))[index]]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        return self._parts.read(index % len(self), self._name)

    def __iter__(self) -> Iterator[Mapping[str, NDArray[Any]]]:
        """Read one part after the other."""
        return (self[number] for number in range(len(self)))
