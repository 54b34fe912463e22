"""What became of a run: its own last words, the launcher's status, its checkpoints, and who is to blame.

Only files and text are read here. Times of files are compared with each other, never with a clock: the
machines of a cluster do not agree about it.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from launch import exits
from launch.pool import by_name

ENDED = "ended.json"
SETTLE_S = 3.0
"""How long a file written on another machine may take to be seen on this one."""

_KNOWN = (exits.DONE, exits.MISTAKE, exits.IO, exits.STOPPED, exits.LOST, exits.INTERRUPTED)
# Lines that name the machine a failure began on: of PALS (docs.alcf.anl.gov, job logs its users published),
# of Slurm, and our own: the watchdog's, and an error that one rank has alone. Both launchers end the other
# ranks by signals too, and say so in the same words; from a line of _TEARDOWN on, _KILLED means nothing.
_SIGNS = re.compile(r"ping failed on|RPC timeout|shepherd died from signal 9|Node failure on")
# Many machines that crash at once are not to blame: the program is, or a rank that they waited for.
_KILLED = re.compile(
    r"rank \d+ died from signal (?:4|6|7|8|9|11)\b"
    r"|srun: error: .*(?:Killed|Bus error|Segmentation fault|Aborted|Out Of Memory|Illegal instruction)"
)
_TEARDOWN = re.compile(r"died from signal 15|srun: (?:Terminating|Force Terminated)")
_OWN = re.compile(
    r"\brank (?P<late>\d+)(?: \((?P<host>[^)\s]+)\))? (?:is late|does not answer)"
    r"|error: rank (?P<failed>\d+): |error: (?P<name>\S+) could not be staged"
)
_SHARED = re.compile(r"No space left|[Qq]uota exceeded|Stale (?:NFS )?file handle")  # of all, to a rank
_NAMES = 20  # a line, or crashes, that name more hosts than this blame nobody


class Ended(NamedTuple):
    """How a program ended: one of launch.exits, and why in words."""

    status: int
    why: str


def forget(run_dir: Path) -> None:
    """Remove the last words of an earlier attempt, so that what is found afterwards is of the next one."""
    (run_dir / ENDED).unlink(missing_ok=True)


def read_ended(run_dir: Path) -> Ended | None:
    """Read what a run says of its own end as the file is now; None if there is none."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        os.listdir(run_dir)  # a network file system then looks again
        said = json.loads((run_dir / ENDED).read_text(encoding="utf-8"))
        return Ended(int(said["status"]), str(said["why"]))
    return None


def last_words(run_dir: Path) -> Ended | None:
    """Read the same, and give it time to arrive; None if it says nothing, which is so if it was killed."""
    until = time.monotonic() + SETTLE_S
    while (ended := read_ended(run_dir)) is None and time.monotonic() < until:
        time.sleep(0.1)
    return ended


def judge(run_dir: Path | None, launcher: int | None, why: str = "") -> Ended:
    """Say how an attempt ended.

    Args:
        run_dir: where the program leaves its last words; None if it is none of those that do.
        launcher: exit status of what started it, below 0 for a signal; None if it would not end.
        why: why the launcher was ended from here, if it was.

    Returns:
        The run's own words if there are any: launchers merge statuses of ranks, and hide them. Else the
        launcher's status, but not its 0 for a run that should have said that it is done. Else LOST.
    """
    if run_dir is not None and (ended := last_words(run_dir)) is not None:
        return ended
    if why:
        return Ended(exits.LOST, why)
    if launcher in _KNOWN and not (launcher == exits.DONE and run_dir is not None):
        return Ended(launcher, "done" if launcher == exits.DONE else f"status {launcher}")
    silent = "" if run_dir is None else ", and the run said nothing of its end"
    by = f"signal {-launcher}" if launcher is not None and launcher < 0 else f"status {launcher}"
    return Ended(exits.LOST, f"the launcher ended with {by}{silent}")


def telling(line: str, before: Sequence[str]) -> bool:
    """Tell whether `suspects` may want a line after those `before`: of a teardown one is enough."""
    if _SIGNS.search(line) or _OWN.search(line):
        return True
    if not (_KILLED.search(line) or _TEARDOWN.search(line)):
        return False
    return not any(map(_TEARDOWN.search, before))


def suspects(lines: Iterable[str], hosts: Sequence[str], ranks_per_node: int) -> dict[str, str]:
    """Find the hosts that a failure began on.

    Args:
        lines: of the output, in order.
        hosts: of the attempt; rank r ran on hosts[r // ranks_per_node].
        ranks_per_node: ranks on each.

    Returns:
        The line that names it by host, the first named first.
    """
    short = by_name(hosts)
    found: dict[str, str] = {}
    crashed: set[str] = set()
    torn = False

    def of_rank(number: str | None) -> str | None:
        place = int(number) // ranks_per_node if number else len(hosts)
        return hosts[place] if place < len(hosts) else None

    for line in lines:
        names: list[str | None] = []
        for own in _OWN.finditer(line):
            if own["failed"] and _SHARED.search(line):
                continue
            name = (own["host"] or own["name"] or "").split(".")[0]
            names.append(short.get(name) or of_rank(own["late"] or own["failed"]))
        sign, crash = _SIGNS.search(line), _KILLED.search(line) and not torn
        if sign or crash:
            named = [short[word] for word in re.findall(r"[\w-]+", line) if word in short]
            names += named or [of_rank(number) for number in re.findall(r"\brank (\d+)", line)]
        if len(set(names)) <= _NAMES:
            for host in names:
                if host is not None:
                    if crash and host not in found:
                        crashed.add(host)
                    elif not crash:
                        crashed.discard(host)
                    found.setdefault(host, line.strip())
        torn = torn or bool(_TEARDOWN.search(line))
    return {host: line for host, line in found.items() if len(crashed) <= _NAMES or host not in crashed}


def newest(run_dir: Path) -> int:
    """Return the images of the newest complete checkpoint; -1 if there is none."""
    markers = (run_dir / "checkpoints").glob("images_*/.complete")
    with suppress(OSError):
        counts = [marker.parent.name.removeprefix("images_") for marker in markers]
        return max((int(count) for count in counts if count.isdigit()), default=-1)
    return -1


def furthest(run_dir: Path) -> int:
    """Return the images of the last record in log.jsonl; -1 if there is none."""
    with suppress(OSError), (run_dir / "log.jsonl").open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - (1 << 16)))
        for line in reversed(file.read().splitlines()):
            with suppress(ValueError, KeyError, TypeError):
                return int(json.loads(line)["images_seen"])
    return -1


def pulse(run_dir: Path) -> object:
    """Return something that changes when a run writes a record or a part of a checkpoint."""
    sizes: list[tuple[str, int]] = []
    with suppress(OSError):
        sizes.append(("log", (run_dir / "log.jsonl").stat().st_size))
    with suppress(OSError):
        for checkpoint in (run_dir / "checkpoints").iterdir():
            files = checkpoint.rglob("*") if checkpoint.suffix == ".partial" else ()
            sizes.append((checkpoint.name, sum(file.stat().st_size for file in files)))
    return sorted(sizes)
