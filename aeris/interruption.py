"""Requests to a run while it works: stop by a signal or a file, save by the clock; all ranks act as one.

A launcher or a job script sends SIGTERM or SIGUSR1, to one rank or to all; a person touches `stop` in the run
directory. Every rank says what it was asked in the sum of gradients and losses that each step makes anyway,
so all of them save and stop after the same step, without a message more.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, NoReturn

from launch import exits

STOP_FILE = "stop"
"""In the run directory: asks for a checkpoint and the end."""
ENDED = "ended.json"
"""In the run directory: how its program ended: {"status", "why", "images_seen", "time"}."""
SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name))

_SAME_S = 2.0  # several senders may pass one request on: the machine, the launcher, the group of processes
_LOOK_S = 1.0  # between two looks for the file


class Stopped(Exception):
    """The run was asked to stop, and has saved: the same command goes on.

    Attributes:
        said: whether the user has been told.
    """

    said = False


class Settled(NamedTuple):
    """What all ranks agreed to do after a step."""

    stop: bool = False
    save: bool = False


class Requests:
    """What a rank was asked to do. Use as a context in the main thread, from the start of a program on.

    A signal is noted by a thread, also while the main thread waits for another rank. The first asks to stop;
    SIGTERM again, 2 s later or more, ends the process at once. Before `begin` the first does, with the status
    of a stopped run: there is nothing to save, and perhaps nobody to agree with.
    """

    def __init__(self, run_dir: Path, every_minutes: float = 0.0, lead: bool = True) -> None:
        """Nothing is asked yet.

        Args:
            run_dir: where the lead looks for the file `stop`.
            every_minutes: the lead asks for a checkpoint so long after the last; 0: never.
            lead: whether this rank looks at file and clock; true on one rank.
        """
        self._run_dir, self._every_s, self._lead = run_dir, 60.0 * every_minutes, lead
        self._file = run_dir / STOP_FILE
        self._saved = time.monotonic()
        self._looked = -_LOOK_S
        self._why = ""
        self._begun = False
        self._signalled: float | None = None
        self._before: list[tuple[int, Any]] = []
        self._pipe: tuple[int, int] | None = None
        self._thread: threading.Thread | None = None
        self._wakeup = -1

    def __enter__(self) -> Requests:
        """Take the signals, and remove the request that ended the run before."""
        if self._lead:
            self._remove_file()
        if threading.current_thread() is threading.main_thread():
            reading, writing = self._pipe = os.pipe()
            os.set_blocking(writing, False)
            self._wakeup = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
            self._before = [(number, signal.signal(number, lambda *_: None)) for number in SIGNALS]
            self._thread = threading.Thread(target=self._listen, args=(reading,), daemon=True, name="signals")
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give the signals back."""
        for number, handler in self._before:
            signal.signal(number, handler)
        if self._pipe is not None and self._thread is not None:
            signal.set_wakeup_fd(self._wakeup)
            os.close(self._pipe[1])  # the thread reads the end, and closes the other one
            # Python ends a thread that wakes while it finalises itself in a way that torch aborts at.
            self._thread.join()
        self._before, self._pipe, self._thread = [], None, None

    def _listen(self, descriptor: int) -> None:
        """Note signals as they come."""
        while numbers := os.read(descriptor, 64):
            for number in numbers:
                if number in SIGNALS:
                    self._take(signal.Signals(number))
        os.close(descriptor)

    def _take(self, number: signal.Signals) -> None:
        now = time.monotonic()
        if self._signalled is None:
            self._why, self._signalled = number.name, now
        elif number == signal.SIGTERM and now - self._signalled >= _SAME_S:
            self._end(f"ended at once by a second {number.name}, nothing saved", 128 + number)
        if not self._begun:
            early = f"stopped by {number.name} before the first step; the same command goes on"
            self._end(early, exits.STOPPED)

    def _end(self, why: str, status: int) -> NoReturn:
        """End the process from this thread: the main thread may be waiting for a rank that never comes."""
        if self._lead:
            print(why, file=sys.stderr, flush=True)
            write_ended(self._run_dir, status, why, None)
        os._exit(status)

    def begin(self) -> None:
        """Obey from now on after the next step: the ranks have met."""
        self._begun = True
        self._saved = time.monotonic()

    def wishes(self) -> tuple[float, float]:
        """Return what this rank asks for after this step: (stop, save), 0 or 1."""
        if not self._lead:
            return float(bool(self._why)), 0.0
        now = time.monotonic()
        if not self._why and now - self._looked >= _LOOK_S:
            self._looked = now
            if self._file.exists():
                self._why = f"the file {self._file}"
        save = self._every_s > 0 and now - self._saved >= self._every_s
        return float(bool(self._why)), float(save)

    def settle(self, stop: float, save: float) -> Settled:
        """Return what all do, from the sums of all ranks' wishes; the same on every rank."""
        if stop and not self._why:
            kind = "signal" if self._lead else "request"  # only the lead looks for the file
            self._why = f"a {kind} to {'another rank' if stop == 1 else f'{stop:.0f} other ranks'}"
        return Settled(stop > 0, save > 0)

    def saved(self) -> None:
        """Start the clock of checkpoints again: one has just been begun."""
        self._saved = time.monotonic()

    def obeyed(self, images_seen: int) -> Stopped:
        """Make the error that ends a run which was asked to stop, and has saved."""
        return self.stopped(f"at image {images_seen:,}, checkpoint saved")

    def stopped(self, where: str) -> Stopped:
        """Make the error that ends a program which was asked to stop; `where` says how far it came."""
        if self._lead:
            self._remove_file()
        return Stopped(f"stopped by {self._why} {where}; the same command goes on")

    def _remove_file(self) -> None:
        try:
            self._file.unlink(missing_ok=True)
        except OSError:  # the run directory is a file or cannot be written: said by who makes it
            pass


def write_ended(run_dir: Path, status: int, why: str, images_seen: int | None) -> None:
    """Write `ended.json`, atomically, where there is a run directory; a full disk does not hinder the end."""
    path = run_dir / ENDED
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    text = {"status": status, "why": why, "images_seen": images_seen, "time": time.time()}
    with suppress(OSError):
        if run_dir.is_dir():
            partial.write_text(json.dumps(text, indent=1) + "\n")
            partial.replace(path)
