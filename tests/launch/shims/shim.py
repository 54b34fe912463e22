"""What the pretended programs of a cluster share: each writes down its words, then does the same here.

SHIM_LOG is the file they write to, one JSON object a line. SHIM_RANKS says what becomes of a started program:
a number of ranks it gets at most; "dry run", whose mesh must have the command's ranks; "fail N" is a program
that fails on N ranks; else its words are for the test to try, and it leaves what a run leaves.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent


def write_down(program: str, words: Sequence[str]) -> None:
    """Append a line to the log."""
    with open(os.environ["SHIM_LOG"], "a", encoding="utf-8") as log:
        log.write(json.dumps({"program": program, "words": list(words)}) + "\n")


def refuse(reason: str) -> None:
    """End as a launcher that cannot start what was asked for."""
    sys.exit(f"shim: {reason}")


def options(words: Sequence[str], with_value: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Cut a command line into its options and what follows them."""
    found: dict[str, str] = {}
    rest = list(words)
    while rest and rest[0].startswith("-"):
        head, equals, value = rest.pop(0).partition("=")
        if not equals and head in with_value:
            value = rest.pop(0)
        found[head] = value if head not in found else f"{found[head]} {value}"
    return found, rest


def execute(program: Sequence[str], ranks: int, hosts: Sequence[str], per_node: int) -> int:
    """Run the words of a program that was to run as `ranks` ranks on `hosts`; return its exit status."""
    if ranks != len(hosts) * per_node:
        refuse(f"{ranks} ranks are not {per_node} on each of {len(hosts)} hosts")
    if "aeris.probe" in program:
        return probe(program, hosts, per_node)
    how = os.environ.get("SHIM_RANKS", "")
    if how.isdigit():
        path = os.pathsep.join(p for p in os.environ["PATH"].split(os.pathsep) if Path(p).resolve() != HERE)
        hidden = ("PBS_", "SLURM_", "PALS_")  # the real launcher here knows no such job
        environ = {name: value for name, value in os.environ.items() if not name.startswith(hidden)}
        command = ["mpiexec", "-n", str(min(int(how), ranks)), *program]
        return subprocess.run(command, env=environ | {"PATH": path}, check=False).returncode
    if how == "dry run":
        command = [*program, "--dry-run", "--json"]
        tried = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        world = json.loads(tried.stdout)["parallel"]["world"]
        if world != ranks:
            refuse(f"{ranks} ranks are started, but the mesh of the program has {world}")
        print(f"shim: the dry run has {world} ranks")
    if "aeris.train" in program:
        return leave(program, ranks, 2 if how == f"fail {ranks}" else 0)
    return 0


def leave(program: Sequence[str], ranks: int, status: int) -> int:
    """Leave what a run leaves to `launch job` and benchmarks/scaling.py; return its status.

    One record a step, with the images per second of a machine that loses nothing: one of each rank.
    """
    given = dict(itertools.pairwise(program))
    run_dir = Path(given["--run-dir"])
    run_dir.mkdir(parents=True, exist_ok=True)
    steps = 0 if status else int(given.get("--train.images", 1)) // int(given.get("--train.batch", 1))
    record = json.dumps({"images_per_s": float(ranks), "data_wait": 0.0})
    (run_dir / "startup.json").write_text(json.dumps({"ranks": ranks}))
    (run_dir / "log.jsonl").write_text(f"{record}\n" * steps)
    last_words = {"status": status, "why": "pretended", "images_seen": 0, "time": time.time()}
    (run_dir / "ended.json").write_text(json.dumps(last_words))
    return status


def probe(program: Sequence[str], hosts: Sequence[str], per_node: int) -> int:
    """Let every rank of every host say the same, of a machine; real probes are started in test_preflight.py.

    Not for more than two hosts, which costs the tests too much: then the launcher fails.
    """
    if len(hosts) > 2:
        refuse("no preflight on so many hosts")
    values = {"phase": "alone", "gemm_tflops": 1.0, "memory_gbs": 1.0, "free_gib": 1.0}
    links = {"sum_gbs": 1.0, "next_gbs": 1.0, "previous_gbs": 1.0}
    for rank in range(len(hosts) * per_node):
        place = {"rank": rank, "local_rank": rank % per_node, "host": hosts[rank // per_node]}
        print("PROBE " + json.dumps(values | place))
        print("PROBE " + json.dumps({"phase": "together", **place, **links}))
    return 0


if __name__ == "__main__":
    write_down("python", sys.argv[1:])
