"""Work shared out among processes through files, whatever started them and however many there are.

A stage is a list of pieces. Who does a piece claims it, a file made by its name, and leaves its result beside
it; everybody waits for the last result. The claim of a process that is gone, or has not been heard of for
`LEASE_S`, is overtaken: nothing waits for the dead. A piece gives the same bytes whoever does it, so one that
is done twice does no harm. No messages are sent: processes may come late, or from several machines.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aeris.data.yearwriter import publish, tagged

LEASE_S = 600.0
"""A process says at least that often that it lives; a piece of work is a few seconds to a minute."""
POLL_S = 0.2
SHOW_S = 0.5

Part = dict[str, NDArray[Any]]
Track = Callable[[str, int], Callable[[int], None]]
"""Start a progress bar (name, length) and return what says how much of it is done."""


def silent(name: str, length: int) -> Callable[[int], None]:
    """Show no progress."""
    return lambda done: None


class Claims:
    """Which pieces are being worked on, and by whom: one small file each."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._host = f"{socket.gethostname()}{_link('/proc/self/ns/pid')}"
        self._me = f"{self._host} {os.getpid()} {_began(os.getpid())}"

    def take(self, name: str) -> bool:
        """Claim a piece; False if somebody works on it."""
        path = self._path(name)
        try:
            with path.open("x") as file:
                file.write(self._me)
        except FileExistsError:
            if not self._abandoned(path):
                return False
            temporary = tagged(path)
            temporary.write_text(self._me)
            temporary.replace(path)
        return True

    def renew(self, name: str) -> None:
        """Say that the piece is still being worked on."""
        with suppress(FileNotFoundError):  # overtaken, and done
            os.utime(self._path(name))

    def release(self, name: str) -> None:
        """Give a piece back, done or not."""
        self._path(name).unlink(missing_ok=True)

    def _path(self, name: str) -> Path:
        return self._directory / f"{name}.claim"

    def _abandoned(self, path: Path) -> bool:
        """Whether the owner of a claim is gone, or silent for longer than its lease."""
        try:
            owner, claimed = path.read_text(), path.stat().st_mtime
        except FileNotFoundError:
            return False  # just given back
        host, _, process = owner.partition(" ")
        if owner == self._me:
            return True
        if host == self._host and process.count(" ") == 1:
            number, began = process.split(" ")
            if _began(int(number)) != began:
                return True
        clock = tagged(self._directory / "clock")  # the file system's clock, which may not be ours
        clock.touch()
        age = clock.stat().st_mtime - claimed
        clock.unlink()
        return age > LEASE_S


def _link(path: str) -> str:
    """Tell apart containers of one machine, which number their processes each for itself."""
    try:
        return "/" + os.readlink(path)
    except OSError:
        return ""


def _began(process: int) -> str:
    """Return when a process of this machine began, or "-" if it is gone: numbers are used again."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        pass
    if Path("/proc/self/stat").exists():
        return "-"
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return "-"
    except OSError:
        pass
    return "there"


class Shared:
    """One process among those that share the work in a directory.

    Args:
        directory: where pieces leave their results; made if it is not there.
        place: number of this process among `places`, to begin at different pieces; -1 only watches.
        track: shows the progress of all processes together.
        check: called while this process waits or has done a bit, to raise what stops it.
    """

    def __init__(
        self,
        directory: Path,
        place: int = 0,
        places: int = 1,
        track: Track = silent,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        directory.mkdir(exist_ok=True)
        self.directory, self.place, self.places = directory, place, places
        self._track, self._check = track, check
        self._claims = Claims(directory)
        self._claimed = ""
        self._show: Callable[[], None] = lambda: None
        self._shown = 0.0

    def each(
        self,
        stage: str,
        pieces: Mapping[str, int],
        work: Callable[[str], Part],
        count: Callable[[], int] | None = None,
    ) -> None:
        """Do the pieces of a stage that nobody else does; return when all are done.

        Args:
            pieces: name -> how much it is, for the progress.
            work: does a piece and returns its result; see `part`. It calls `beat` now and then.
            count: how much is done, where that is known more exactly than by whole pieces.
        """
        show = self._track(stage, sum(pieces.values()))
        self._show = lambda: show(count() if count else sum(pieces[n] for n in self._done(stage) & {*pieces}))
        first = max(0, self.place) * len(pieces) // self.places
        order = [*pieces][first:] + [*pieces][:first]
        done = self._done(stage)
        while left := [name for name in order if name not in done]:
            worked = [self._attempt(f"{stage}-{name}", partial(work, name)) for name in left]
            if not any(worked):
                self._wait()
            done = self._done(stage)
        self._show = lambda: None
        show(sum(pieces.values()))  # not counted: another process may have moved on, and files with it

    def once(self, name: str, work: Callable[[], Part]) -> Part:
        """Have something done by one process; all return its result."""
        while not self._path(name).exists():
            if not self._attempt(name, work):
                self._wait()
        return self._load(name)

    def last(self, done: Callable[[], bool], work: Callable[[], None]) -> None:
        """Have one process do what comes last, after which there is no such directory any more.

        Args:
            done: whether it is done; every process returns then.
        """
        while not done():
            if self.place >= 0 and self._claims.take("last"):
                try:
                    work()
                finally:
                    self._claims.release("last")
            else:
                self._wait()

    def part(self, stage: str, name: str) -> Part:
        """Return the result of a piece that is done."""
        return self._load(f"{stage}-{name}")

    def beat(self) -> None:
        """Say that this process lives, show the progress, and stop if there is a reason to."""
        if self._claimed:
            self._claims.renew(self._claimed)
        parent = multiprocessing.parent_process()
        if parent is not None and not parent.is_alive():
            raise SystemExit(1)
        self._check()
        if time.monotonic() - self._shown > SHOW_S:
            self._shown = time.monotonic()
            self._show()

    def _attempt(self, name: str, work: Callable[[], Part]) -> bool:
        """Do a piece unless it is done or somebody is at it; True if it was done here."""
        path = self._path(name)
        if self.place < 0 or path.exists() or not self._claims.take(name):
            return False
        self._claimed = name
        try:
            if path.exists():  # done between the look and the claim
                return False
            part, temporary = work(), tagged(path)
            with temporary.open("wb") as file:
                np.savez_compressed(file, allow_pickle=False, **part)
            publish(temporary, path)
        finally:
            self._claimed = ""
            self._claims.release(name)
        self.beat()
        return True

    def _wait(self) -> None:
        self.beat()
        time.sleep(POLL_S)

    def _path(self, name: str) -> Path:
        return self.directory / f"{name}.npz"

    def _done(self, stage: str) -> set[str]:
        names = (name for name in os.listdir(self.directory) if name.endswith(".npz"))
        return {n.removesuffix(".npz").removeprefix(f"{stage}-") for n in names if n.startswith(f"{stage}-")}

    def _load(self, name: str) -> Part:
        with np.load(self._path(name)) as kept:
            return {key: kept[key] for key in kept.files}
