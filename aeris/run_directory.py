"""What every training program asks of its run directory and its command, and how it ends."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aeris.interruption import ENDED, Stopped, write_ended
from aeris.log import speaker, status_of, words
from aeris.startup import process_age
from launch import exits
from launch.rank import leave
from swipe.backend import finish
from swipe.collectives import Group, barrier, tell

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


@dataclass
class Ending:
    """How far a program came, and what it leaves behind."""

    run_dir: Path
    run: Any = None
    """What counts the images, once there is one: its `images_seen`."""

    def write(self, error: BaseException | None) -> None:
        """Write `ended.json`: of an error, or of a run that is done."""
        status, why = (exits.DONE, "done") if error is None else (status_of(error), words(error))
        write_ended(self.run_dir, status, why, None if self.run is None else self.run.images_seen)


@contextmanager
def ending(run_dir: Path, lead: bool) -> Iterator[Ending]:
    """Write `ended.json` into the run directory, however the program ends by itself.

    Its exit status may not reach who started it: launchers merge and hide them. While the program runs, or
    after it was killed, there is no such file. A rank that fails by itself writes it if the lead has not
    within a second; what the lead notices of that does not replace it. A file that is older than this process
    is of an earlier run; a newer one may be of a rank that failed while the lead still imported.
    """
    path, end = run_dir / ENDED, Ending(run_dir)
    started = time.time() - process_age()
    if lead and not _written_since(path, started):
        with suppress(OSError):
            path.unlink(missing_ok=True)
    try:
        yield end
    except BaseException as error:
        cause = not isinstance(error, (ConnectionError, Stopped, KeyboardInterrupt))
        if not lead and cause and type(error).__name__ != "AgreedError":
            time.sleep(1.0)
        elif not lead:
            raise
        if (lead and cause) or not _written_since(path, started):
            end.write(error)
        raise
    if lead:
        end.write(None)


def _written_since(path: Path, moment: float) -> bool:
    """Whether a file is there and no older than a moment."""
    try:
        return path.stat().st_mtime >= moment
    except OSError:
        return False


@contextmanager
def parting(world: Group, end: Ending) -> Iterator[None]:
    """Leave the other ranks in order when the run is done, and when it was stopped; a collective call.

    That it was stopped is said and written before any rank is gone: launchers end the others then.
    """
    stopped = None
    try:
        yield
    except Stopped as error:
        stopped = error
        if world.rank == 0:
            speaker.say_end(words(error))
            end.write(error)
    barrier(world, "the end")
    finish()
    leave()
    if stopped is not None:
        stopped.said = True
        raise stopped
