"""States of a simulation on disk: `OUT/restarts/2001-01-10T18.npz`, arrays only, 4 MB each.

They are read without executing anything, and have their name only when they are whole.
"""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np

from aeris.data.speedy.model import State, time_of

RESTARTS = "restarts"


def save(out: Path, state: State) -> Path:
    """Write a state under its time; return the path."""
    path = out / RESTARTS / f"{time_of(state).astype('datetime64[h]')}.npz"
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        np.savez(file, **state)  # type: ignore[arg-type]
    partial.replace(path)
    return path


def load(path: Path, names: tuple[str, ...] = ()) -> State:
    """Read a state, or only the arrays called `names`.

    Raises:
        ValueError: the file is damaged or holds no state.
    """
    try:
        # Opened here: numpy leaves a damaged file open.
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            return {name: file[name] for name in names or file.files}
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is damaged ({error}): remove it, and an older one is used") from None


def find(out: Path) -> dict[np.datetime64, Path]:
    """List the states of a simulation by time, the oldest first."""
    found = {}
    for path in (out / RESTARTS).glob("*.npz"):
        try:
            found[np.datetime64(path.stem, "s")] = path
        except ValueError:
            continue  # some other file
    return dict(sorted(found.items()))


def newest(out: Path, at: np.datetime64) -> Path | None:
    """Return the newest state that is not after `at`."""
    before = [path for time, path in find(out).items() if time <= at]
    return before[-1] if before else None
