"""What every training program asks of its run directory and of the command it was started with."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from swipe.collectives import Group, tell

Free = Mapping[str, Collection[str] | None]
"""Settings a run may change when it goes on, by section; None: every one of the section."""

Flags = Mapping[str, str]
"""Settings whose flag on the command line is not `--section.name`, and what it is."""
NO_FLAGS: Flags = {}


def make_directories(run_dir: Path) -> None:
    """Make the run directory.

    Raises:
        OSError: it cannot be written.
    """
    try:
        for directory in (run_dir, run_dir / "checkpoints", run_dir / "plots"):
            directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(
            f"cannot write the run directory {run_dir} ({error}): choose another --run-dir"
        ) from None


def differences(one: Any, other: Any, prefix: str = "") -> list[tuple[str, Any, Any]]:
    """List the settings in which two configurations differ: `section.name`, and both values."""
    found: list[tuple[str, Any, Any]] = []
    for entry in dataclasses.fields(one):
        here, there = getattr(one, entry.name), getattr(other, entry.name)
        if dataclasses.is_dataclass(here):
            found += differences(here, there, f"{prefix}{entry.name}.")
        elif here != there:
            found.append((f"{prefix}{entry.name}", here, there))
    return found


def check_unchanged(before: Any, now: Any, free: Free, run_dir: Path, flags: Flags = NO_FLAGS) -> None:
    """Refuse to go on with other settings than a run was begun with.

    Raises:
        ValueError: a setting that defines the run differs; names all that do.
    """
    different = []
    for name, was, is_now in differences(before, now):
        section, _, setting = name.rpartition(".")
        allowed = free.get(section, ())
        if allowed is not None and setting not in allowed:
            different.append(f"{flag(name, flags)} {_short(was)} -> {_short(is_now)}")
    if different:
        raise ValueError(f"{run_dir} holds another run ({'; '.join(different)}): choose another --run-dir")


def check_same_command(
    config: Any, world: Group, rank: int, paths: Collection[str], flags: Flags = NO_FLAGS
) -> None:
    """Check that all ranks were started with the same settings; a collective call.

    Args:
        paths: settings that may differ: where a rank finds things.
        flags: see `flag`.

    Raises:
        ValueError: they were not; names a setting.
    """
    for name, theirs, ours in differences(tell(world, config), config):
        if name not in paths:
            ours, theirs = _short(ours), _short(theirs)
            raise ValueError(f"rank {rank} was started with {flag(name, flags)} {ours}, rank 0 with {theirs}")


def flag(name: str, flags: Flags = NO_FLAGS) -> str:
    """Return the flag of the command line for `section.name`, or the one that `flags` has for it."""
    return flags.get(name, f"--{name.replace('_', '-')}")


def _short(value: Any, limit: int = 80) -> str:
    text = str(value) or "(none)"
    return text if len(text) <= limit else text[: limit - 3] + "..."
