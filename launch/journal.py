"""What a job keeps in RUN_DIR/job: its decisions, and a lock against other jobs."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from launch.output import Output

LOCK_WAIT_S = 60.0
"""How long a job waits for the one before to leave the run directory."""


class Journal:
    """Says what a job decides, and writes it down.

    Attributes:
        directory: RUN_DIR/job.
        attempt: number of the attempt; they go on from those of earlier jobs.
    """

    def __init__(self, directory: Path, output: Output) -> None:
        """Go on with what earlier jobs left in `directory`."""
        self.directory, self.output = directory, output
        logs = (path.stem.removeprefix("attempt_") for path in directory.glob("attempt_*.log"))
        self.attempt = max((int(number) for number in logs if number.isdigit()), default=0)

    def say(self, text: str, event: str, **facts: object) -> None:
        """Print a decision, and add it to history.jsonl; a full disk does not hinder it."""
        self.output.say(text)
        job = os.environ.get("PBS_JOBID") or os.environ.get("SLURM_JOB_ID") or "local"
        when = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        line = {"time": when, "job": job, "attempt": self.attempt, "event": event, **facts, "said": text}
        with suppress(OSError), (self.directory / "history.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def held(directory: Path) -> bool:
    """Tell whether a job works here, as far as the lock says; yes where there are no locks to ask."""
    try:
        with (directory / "lock").open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False


@contextmanager
def alone(directory: Path, output: Output) -> Iterator[tuple[int, ...]]:
    """Keep other jobs out while this one works.

    Yields:
        What the launcher must inherit: it holds the lock too, and so does what it starts by itself on this
        machine, even if this process is killed. Ranks that a daemon starts for it (PALS, Slurm) do not.

    Raises:
        ValueError: another job works here.
    """
    until, waited = time.monotonic() + LOCK_WAIT_S, False
    with (directory / "lock").open("a+", encoding="utf-8") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                file.seek(0)
                other = f"another job works in {directory.parent} ({file.read().strip()})"
                if time.monotonic() > until:
                    raise ValueError(f"{other}: end it first") from None
                if not waited:
                    output.say(f"{other}: waits {LOCK_WAIT_S:.0f} s for its end")
                waited = True
                time.sleep(min(1.0, LOCK_WAIT_S))
            except OSError as error:
                output.say(
                    f"no locks on this file system ({error.strerror}): see that no other job works here"
                )
                break
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield (file.fileno(),)
