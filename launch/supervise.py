"""Run a launcher to its end: pass its output on, ask its run to stop, end it if nothing happens any more."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from launch.asked import Asked
from launch.output import Output
from launch.verdict import pulse

POLL_S = 0.5
END_S = 60.0
"""From SIGTERM to SIGKILL: srun and PALS end the ranks of all machines meanwhile."""
AT_ONCE_S = 5.0
"""The same after a second request."""
LAST_S = 5.0
"""For the output that is still on its way when the launcher has ended."""
NOISE = 4
"""Times the limit of silence that a run may print without writing a record or a part of a checkpoint."""


class Silence:
    """The clock of what nobody hears of: restarted by output, and by what the run writes."""

    def __init__(self, output: Output, run_dir: Path | None, limit_s: float) -> None:
        """Start the clock; `run_dir` is None where only output counts."""
        self._output, self._run_dir, self._limit_s = output, run_dir, limit_s
        self._changed = self._looked = time.monotonic()
        self._seen = None if run_dir is None else pulse(run_dir)

    def too_long(self) -> str:
        """Return what has not been heard of for how long, if that is too long, else ""."""
        now = time.monotonic()
        if self._run_dir is not None and now - self._looked > self._limit_s / 8:
            self._looked, seen = now, pulse(self._run_dir)
            if seen != self._seen:
                self._seen, self._changed = seen, now
        quiet = now - max(self._output.last, self._changed)
        if quiet > self._limit_s:
            return f"neither output nor a record nor a part of a checkpoint for {quiet:.0f} s"
        if self._run_dir is not None and now - self._changed > NOISE * self._limit_s:
            return f"output, but neither a record nor a part of a checkpoint for {now - self._changed:.0f} s"
        return ""


def supervise(
    command: Sequence[str],
    output: Output,
    asked: Asked,
    run_dir: Path | None,
    silence_s: float,
    environ: Mapping[str, str],
    keep: Sequence[int] = (),
) -> tuple[int | None, str]:
    """Run `command` until it ends, by itself or from here.

    Args:
        command: of a launcher.
        output: takes what it prints.
        asked: who may ask for the end.
        run_dir: where the program looks for requests and shows that it lives; None if it does neither, and
            then a request ends it at once.
        silence_s: how long nothing may be heard of it.
        environ: for the program.
        keep: file descriptors it inherits.

    Returns:
        Its exit status, below 0 for a signal, None if it does not end at all; and why it was ended from
        here, "" if it was not.

    Raises:
        ValueError: there is no such program.
        OSError: it cannot be started.
    """
    # A group of its own: a signal to this job's group must not end the ranks before they have saved.
    group: dict[str, Any] = (
        {"process_group": 0} if sys.version_info >= (3, 11) else {"preexec_fn": os.setpgrp}
    )
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environ,
            pass_fds=keep,
            **group,
        )
    except (FileNotFoundError, PermissionError) as error:
        raise ValueError(f"cannot start {command[0]} ({error.strerror}): load its module") from None
    output.last = time.monotonic()
    reader = threading.Thread(target=output.follow, args=(process.stdout,), daemon=True)
    reader.start()
    why = _watch(process, output, asked, run_dir, Silence(output, run_dir, silence_s))
    if why or process.returncode:
        _end(process, asked)
    reader.join(LAST_S)  # not for ever: what outlives its launcher may hold the other end
    return process.returncode, why


def _watch(
    process: subprocess.Popen[bytes], output: Output, asked: Asked, run_dir: Path | None, silence: Silence
) -> str:
    """Wait for the end of `process`; return why it must be ended, "" if it did by itself."""
    told = False
    while True:
        with suppress(subprocess.TimeoutExpired):
            process.wait(POLL_S)
            return ""
        if asked.look():
            if run_dir is None or asked.overdue:
                return f"{asked.why}" + ("" if run_dir is None else ", and the run did not save in time")
            if not told:
                output.say(f"{asked.why}: the run is asked to save and stop")
            told = True
            try:
                asked.press()
            except OSError as error:
                return f"{asked.why}, and the run cannot be asked to stop: {error}"
        if why := silence.too_long():
            return why


def _end(process: subprocess.Popen[bytes], asked: Asked) -> None:
    """End a launcher and what it left on this machine, first in a friendly way."""
    for number, patience_s in ((signal.SIGTERM, END_S), (signal.SIGKILL, END_S)):
        with suppress(OSError):
            os.killpg(process.pid, number)
        until = time.monotonic() + patience_s
        while process.poll() is None and time.monotonic() < until:
            if number == signal.SIGTERM and asked.now:
                until = min(until, time.monotonic() + AT_ONCE_S)
            time.sleep(0.05)
    with suppress(OSError):
        os.killpg(process.pid, signal.SIGKILL)
