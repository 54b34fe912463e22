"""Who asked a job to stop, and whether it shall go on in another one: signals, the clock, and files.

SIGUSR1 and the clock mean that the time is up: the run saves, and a successor may be submitted. SIGTERM,
SIGHUP, Ctrl-C and `python -m launch stop` are somebody's will: the run saves, and that is the end. PBS ends
a job of which a node died by SIGTERM too, which nobody can tell from qdel. The request of `launch stop` stays
until a job obeys it, one that waits in the queue as it starts: it then runs nothing.
"""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

STOP = "stop"
"""In a run directory the run looks for it; in its job/, the job that watches the run does."""
MARGIN_S = 900.0
"""How long before the end of its time a job asks its run to save, if nothing else is said."""
AGAIN_S = 1.0
"""A signal so long after the first is meant as another: senders repeat themselves, and so do groups."""
_TIME_IS_UP = "SIGUSR1"
_SIGNALS = (_TIME_IS_UP, "SIGTERM", "SIGINT", "SIGHUP")


class Asked:
    """What the job was asked to do. A context, in the main thread.

    Attributes:
        why: who asked; "" while nobody did.
        again: whether the job may be submitted again.
        now: whether the second request came: no time is left to save.
        interrupted: whether it was Ctrl-C.
    """

    def __init__(self, run_dir: Path, left_s: float | None, margin_s: float) -> None:
        """Nothing is asked yet.

        Args:
            run_dir: of the run.
            left_s: how long the job may still run; None if nobody knows.
            margin_s: how long before that the run is asked to save; 0 for one that cannot be asked.
        """
        self.run_dir, self.margin_s = run_dir, margin_s
        self.why, self.again, self.now, self.interrupted = "", False, False, False
        self._end = None if left_s is None else time.monotonic() + left_s
        self._at = 0.0
        self._before: dict[str, Any] = {}

    def __enter__(self) -> Asked:
        """Take the signals; forget a request to the run before, but not one to the job."""
        (self.run_dir / STOP).unlink(missing_ok=True)
        self._before = {name: signal.signal(getattr(signal, name), self._signal) for name in _SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give the signals back, and leave no request behind for the next run."""
        for name, handler in self._before.items():
            signal.signal(getattr(signal, name), handler)
        for directory in (self.run_dir, self.run_dir / "job"):
            with suppress(OSError):
                (directory / STOP).unlink(missing_ok=True)

    def look(self) -> str:
        """Look at the clock and for the file; return `why`."""
        if not self.why:
            if os.path.exists(self.run_dir / "job" / STOP):
                self._take("python -m launch stop", again=False)
            elif self._end is not None and time.monotonic() > self._end - self.margin_s:
                self._take(f"{self._end - time.monotonic():.0f} s are left of the job's time", again=True)
        return self.why

    def press(self) -> None:
        """Ask the run to save and stop, again if need be: it forgets what it was asked before it began.

        Raises:
            OSError: the file cannot be made.
        """
        (self.run_dir / STOP).touch()

    @property
    def overdue(self) -> bool:
        """Whether the run had its time to save: most of the margin, the rest is for what follows."""
        return self.now or (bool(self.why) and time.monotonic() > self._at + 0.8 * self.margin_s)

    def _signal(self, number: int, frame: FrameType | None) -> None:
        name, now = signal.Signals(number).name, time.monotonic()
        if not self.why:
            self.interrupted = name == "SIGINT"
            self._take(name, again=name == _TIME_IS_UP)
        elif name != _TIME_IS_UP and now - self._at >= AGAIN_S:
            self.now = True
            # At the end of its time a job gets SIGTERM too; before, somebody has had enough of it.
            self.again = self.again and self._end is not None and now > self._end - self.margin_s

    def _take(self, why: str, again: bool) -> None:
        self.why, self.again, self._at = why, again, time.monotonic()
