"""What the pretended programs of a cluster share: each writes down its words, then does the same here.

SHIM_LOG is the file they write to, one JSON object a line. SHIM_RANKS is how many ranks a started program
gets at most; without it a training is tried with `--dry-run`, and its mesh must have the command's ranks.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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
    few = int(os.environ.get("SHIM_RANKS") or 0)
    if few:
        path = os.pathsep.join(p for p in os.environ["PATH"].split(os.pathsep) if Path(p).resolve() != HERE)
        hidden = ("PBS_", "SLURM_", "PALS_")  # the real launcher here knows no such job
        environ = {name: value for name, value in os.environ.items() if not name.startswith(hidden)}
        command = ["mpiexec", "-n", str(min(few, ranks)), *program]
        return subprocess.run(command, env=environ | {"PATH": path}, check=False).returncode
    tried = subprocess.run([*program, "--dry-run", "--json"], stdout=subprocess.PIPE, text=True, check=False)
    if tried.returncode == 0 and "aeris.train" in program:
        leave(Path(program[program.index("--run-dir") + 1]), json.loads(tried.stdout), ranks)
    return tried.returncode


def leave(run_dir: Path, tried: dict[str, Any], ranks: int) -> None:
    """Leave what a run leaves to `launch job` and benchmarks.weak_scaling, if its mesh has `ranks` ranks."""
    world = tried["parallel"]["world"]
    if world not in (1, ranks):
        refuse(f"{ranks} ranks are started, but the mesh of the program has {world}")
    print(f"shim: the dry run has {world} ranks")
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "config.json").write_text(json.dumps(tried["config"]))
    (run_dir / "startup.json").write_text(json.dumps({"ranks": ranks}))
    (run_dir / "log.jsonl").write_text(10 * '{"images_per_s": 1.0, "data_wait": 0.0}\n')
    last_words = {"status": 0, "why": "done", "images_seen": 0, "time": time.time()}
    (run_dir / "ended.json").write_text(json.dumps(last_words))


def probe(program: Sequence[str], hosts: Sequence[str], per_node: int) -> int:
    """Measure this machine as one rank, and let every rank of every host say the same.

    Not for more than 100 hosts, which costs the tests too much: then the launcher fails.
    """
    if len(hosts) > 100:
        refuse("no preflight on so many hosts")
    environ = {name: value for name, value in os.environ.items() if name != "WORLD_SIZE"}
    measured = subprocess.run(program, env=environ, stdout=subprocess.PIPE, text=True, check=True)
    values = json.loads(measured.stdout.partition("PROBE ")[2])
    links = {"sum_gbs": 1.0, "next_gbs": 1.0, "previous_gbs": 1.0}
    for rank in range(len(hosts) * per_node):
        place = {"rank": rank, "local_rank": rank % per_node, "host": hosts[rank // per_node]}
        print("PROBE " + json.dumps(values | place))
        print("PROBE " + json.dumps({"phase": "together", **place, **links}))
    return 0
