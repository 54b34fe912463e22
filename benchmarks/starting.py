"""Start `aeris.train` on some ranks of this machine, for benchmarks that compare numbers of ranks."""

from __future__ import annotations

import os
import re
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Launcher = Literal["auto", "mpiexec", "torchrun"]


@dataclass(frozen=True)
class Spent:
    """What a program took from its start to its end: wall-clock s, and CPU s of all its processes."""

    wall_s: float
    cpu_s: float


def counts(text: str, flag: str = "--ranks") -> list[int]:
    """Read what a flag gives, numbers of ranks or nodes, "1,8,32"; ValueError if they are not rising."""
    found = [int(part) for part in text.split(",")] if re.fullmatch(r"[0-9]+(,[0-9]+)*", text) else []
    if not found or found[0] < 1 or sorted(set(found)) != found:
        raise ValueError(f"{flag} {text}: give rising numbers with commas between, such as 1,8,32")
    return found


def started(ranks: int, launcher: Launcher) -> list[str]:
    """Return the words that start a Python module on so many ranks here; the module's own come behind.

    One rank is started without a launcher. "auto" takes mpiexec if there is one, else torchrun.

    Raises:
        ValueError: mpiexec is asked for and not there.
    """
    if ranks == 1:
        return [sys.executable, "-m"]
    search = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))
    mpiexec = shutil.which("mpiexec", path=search)
    if launcher == "mpiexec" and mpiexec is None:
        raise ValueError("--launcher mpiexec: there is none here; pip install 'aeris-swipe[mpi]' brings one")
    if launcher != "torchrun" and mpiexec is not None:
        return [mpiexec, "-n", str(ranks), sys.executable, "-m"]
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*run, "--nproc-per-node", str(ranks), "-m"]


def run(command: Sequence[str], threads: int) -> Spent:
    """Run a command to its end; its output is shown only if it fails.

    Raises:
        ValueError: it failed; the last lines of what it said.
    """
    environment = {"OMP_NUM_THREADS": str(threads), **os.environ}
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        ours = done.stdout.partition("\n====")[0]  # mpiexec's own words follow
        said = " | ".join(ours.strip().splitlines()[-5:])
        raise ValueError(f"{' '.join(command)} ended with status {done.returncode}: {said}")
    return Spent(wall, after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)


def split(argv: list[str]) -> tuple[list[str], list[str]]:
    """Split a command line at the first `--`: words for the benchmark, and further flags of `aeris.train`."""
    at = argv.index("--") if "--" in argv else len(argv)
    return argv[:at], argv[at + 1 :]
