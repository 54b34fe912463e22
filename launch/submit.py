"""Command: submit the job of a preset of aeris.train, checked first, or print what would be submitted.

The job script (`LAYOUTS`) has the same defaults; what is said here travels to it as environment variables.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from itertools import takewhile
from pathlib import Path

from launch import exits, scheduler
from launch.asked import MARGIN_S
from launch.hosts import counted
from launch.layouts import LAYOUTS, Degrees, Layout, Limits, batch_problem, check, degrees, number
from launch.machines import MACHINES, SETTINGS, Machine, Queue

AFTER = "flags"
"""Name of what follows `--`."""
LEAST_S = 300.0
"""What a job needs before it saves: start, preflight, steps."""
EVERY_MINUTES = 15
"""Minutes between checkpoints in job scripts: at full scale something breaks about once an hour."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the preset, where it runs, and further flags of aeris.train."""
    presets = sorted({preset for known in LAYOUTS.values() for preset in known})
    parser.usage = "python -m launch submit PRESET --nodes N [OPTIONS] [-- FLAGS OF AERIS.TRAIN]"
    parser.add_argument("preset", metavar="PRESET", help=f"one of {', '.join(presets)}")
    parser.add_argument("--nodes", type=int, required=True, help="nodes that train; spares come on top")
    parser.add_argument("--machine", choices=[*LAYOUTS], default="alcf-aurora", help="(default: %(default)s)")
    parser.add_argument("--account", default="", help="whom it is charged to; empty: the scheduler's default")
    parser.add_argument("--queue", help="queue or partition; the first that fits if absent")
    parser.add_argument("--walltime", help="hours:minutes:seconds; the queue's longest if absent")
    parser.add_argument("--spares", type=int, help="further nodes for those that fail; 1 %% from 20 nodes on")
    parser.add_argument("--run-dir", help="run directory (default: runs/PRESET)")
    parser.add_argument("--data", help="store of aeris.data.convert (default: era5; sample for tiny)")
    parser.add_argument("--archive", default="", help="environment made by `launch pack`, put on every node")
    parser.add_argument("--no-chain", action="store_true", help="the job does not submit its successor")
    parser.add_argument("--jobs", type=int, default=1, help="so many, each after the end of the one before")
    parser.add_argument("--no-check", action="store_true", help="submit without a dry run of aeris.train")
    parser.add_argument("--dry-run", action="store_true", help="print what would be submitted, and stop")


def run(arguments: argparse.Namespace) -> int:
    """Check, print the exact command lines and submit; returns the scheduler's own status, or 0.

    Settings of job scripts that are in the environment (VENV, ARCHIVE) travel too: PBS takes no others along.

    Raises:
        ValueError: the preset, the queue, the nodes or the batch do not go together.
        OSError: the scheduler's command cannot be run.
    """
    machine, preset = MACHINES[arguments.machine], arguments.preset
    layout = LAYOUTS[machine.name].get(preset)
    if layout is None:
        known = ", ".join(LAYOUTS[machine.name])
        raise ValueError(f"there is no layout of {preset!r} for {machine.name}; known are {known}")
    check_words(arguments)
    nodes = arguments.nodes
    asked = degrees([*layout.degrees.flags, *arguments.flags])
    found = check(nodes, machine.ranks_per_node, asked, Limits(machine.name, machine.nodes))
    microbatches = share(layout, arguments.flags, found)
    spares = spare_nodes(machine, nodes) if arguments.spares is None else arguments.spares
    hosts = f"{counted(nodes, 'node')} and {counted(spares, 'spare')}"
    if spares < 0 or 0 < machine.nodes < nodes + spares:
        raise ValueError(
            f"{hosts}: {machine.name} has {machine.nodes:,}, so "
            f"there can be at most {max(0, machine.nodes - nodes):,} --spares"
        )
    wanted_s = walltime(arguments.walltime) if arguments.walltime else None
    queue = choose_queue(machine, nodes + spares, arguments.queue, wanted_s)
    if arguments.jobs < 1 or (arguments.jobs > 1 and not queue.chains):
        limit = "it must be 1 or more" if queue.chains else f"queue {queue.name} takes one job of a user"
        raise ValueError(f"--jobs {arguments.jobs}: {limit}")
    run_dir = arguments.run_dir or f"runs/{preset}"
    data = arguments.data or ("sample" if preset == "tiny" else "era5")
    chains = queue.chains and arguments.jobs == 1 and not arguments.no_chain
    settings = travelling(
        {
            "PRESET": preset,
            "NODES": str(nodes),
            "DP": str(found.dp) if layout.degrees.known > 1 else "",
            "RUN_DIR": run_dir,
            "DATA": data,
            "ARCHIVE": arguments.archive or os.environ.get("ARCHIVE", ""),
            "FLAGS": _joined(arguments.flags),
            "CHAIN": layout.script if chains else "",
        }
    )
    limit_s = wanted_s or 3600 * queue.hours
    submission = partial(
        machine.submission, layout.script, nodes + spares, limit_s, queue.name, arguments.account, settings
    )
    words = program(preset, run_dir, data, layout.degrees._replace(dp=found.dp), arguments.flags)
    start = machine.command(words, ["host"] * nodes, machine.ranks_per_node, Path(run_dir, "job", "hosts.1"))
    print(f"{hosts}, {queue.name} for {scheduler.clock(limit_s)}")
    ranks = counted(nodes * machine.ranks_per_node, "rank")
    print(
        f"{ranks} as {found}{microbatches}" if any(found) else f"{ranks}, the layout is chosen at the start"
    )
    for before in range(arguments.jobs):
        print(f"submits: {shlex.join(submission(after=f'ID{before}' if before else ''))}")
    print(f"runs:    {shlex.join(start)}")
    print(f"check:   {shlex.join([*words, '--dry-run'])}", flush=True)
    if not Path(layout.script).is_file():
        raise ValueError(f"{layout.script} is not here: submit from the top directory of the project")
    if arguments.dry_run:
        return exits.DONE
    if not arguments.no_check:
        try_words([*words, "--dry-run"])
    return give(submission, arguments.jobs, machine)


def walltime(text: str) -> float:
    """Read --walltime in seconds; ValueError if a job of that length would be over before it began."""
    asked_s = scheduler.seconds(text)
    if asked_s < MARGIN_S + LEAST_S:
        raise ValueError(
            f"--walltime {scheduler.clock(asked_s)}: a job saves {scheduler.clock(MARGIN_S)} before its end, "
            f"so give it {scheduler.clock(MARGIN_S + LEAST_S)} or more"
        )
    return asked_s


def try_words(check: Sequence[str]) -> None:
    """Run the program's own dry run, in the Python that this is.

    Raises:
        ValueError: it refuses, in its own words, or cannot be run here.
    """
    done = subprocess.run([sys.executable, *check[1:]], capture_output=True, text=True, check=False)
    if not done.returncode:
        return
    lines = (done.stdout + done.stderr).strip().splitlines() or [f"status {done.returncode}"]
    if re.match("(ModuleNotFound|Import)Error", lines[-1]):
        raise ValueError(
            f"not submitted: {sys.executable} cannot check the flags ({lines[-1]}): load the Python that has "
            "torch, or give --no-check"
        )
    # An error is one line; what the reader of flags says stands in a frame.
    framed = [line.strip("│ ") for line in lines if line.startswith("│")]
    said = " ".join(takewhile(lambda text: not text.startswith("─"), framed))
    said = lines[-1] if lines[-1].startswith("error: ") or not said else said
    raise ValueError(f"not submitted: aeris.train says: {said.removeprefix('error: ')}")


def give(submission: Callable[..., list[str]], jobs: int, machine: Machine) -> int:
    """Submit jobs, each to begin when the one before has ended; return the status of the scheduler.

    Args:
        submission: returns the command line of a job that follows another, `after`.
        jobs: how many.
        machine: whose they are.

    Raises:
        ValueError: the scheduler's command is not here, or does not name the job that another is to follow.
    """
    after = ""
    for left in reversed(range(jobs)):
        line = submission(after=after)
        try:
            done = subprocess.run(line, stdout=subprocess.PIPE, text=True, check=False)
        except FileNotFoundError:
            raise ValueError(f"{line[0]} is not here: submit from a login node of {machine.name}") from None
        print(done.stdout, end="", flush=True)
        if done.returncode or not left:
            return done.returncode
        named = re.search(r"(\d+(\.[\w.-]+)?)\s*$", done.stdout)  # 1234.host; Submitted batch job 1234
        if not named:
            raise ValueError(f"{line[0]} names no job in {done.stdout!r}: {left} more are not submitted")
        after = named[1]
    return exits.DONE


def check_words(arguments: argparse.Namespace) -> None:
    """Refuse options of this command behind `--`, where aeris.train would get them."""
    own = {"--" + name.replace("_", "-") for name in vars(arguments)} - {"--preset", f"--{AFTER}"}
    for word in arguments.flags:
        if (name := word.partition("=")[0].replace("_", "-")) in own:
            raise ValueError(f"{name} stands after --, where flags of aeris.train are: write it before --")


def travelling(own: dict[str, str]) -> dict[str, str]:
    """Return the settings a job gets: its own, and others of job scripts that are in the environment.

    An empty one goes along only against one in the environment, which Slurm hands on as it is.
    """
    given = {name: os.environ[name] for name in SETTINGS if name in os.environ}
    every = own | given | own
    return {name: value for name, value in every.items() if value or name in given or name == "CHAIN"}


def program(preset: str, run_dir: str, data: str, asked: Degrees, more: Sequence[str]) -> list[str]:
    """Return the words that train a preset, the same as in its job script."""
    words = ["python", "-m", "aeris.train", preset, "--run-dir", run_dir, "--data.store", data]
    words += ["--checkpoint.every-minutes", str(EVERY_MINUTES)]
    return [*words, *(asked.flags if asked.known > 1 and asked.pp else []), *more]


def spare_nodes(machine: Machine, nodes: int) -> int:
    """Return 1 % of the nodes, rounded up, within what the machine has; none below 20 nodes."""
    spares = math.ceil(nodes / 100) if nodes >= 20 else 0
    return min(spares, max(0, machine.nodes - nodes)) if machine.nodes else spares


def choose_queue(machine: Machine, nodes: int, name: str | None, limit_s: float | None) -> Queue:
    """Return the queue of this name, or the first, that takes so many nodes for so long.

    Raises:
        ValueError: none does; lists what the queues take.
    """
    for queue in machine.queues:
        fits = queue.smallest <= nodes <= queue.largest and (limit_s or 0) <= 3600 * queue.hours
        if fits and name in (None, queue.name):
            return queue
    limits = "; ".join(f"{q.name} {q.smallest:,} to {q.largest:,}, {q.hours:g} h" for q in machine.queues)
    time = f" for {scheduler.clock(limit_s)}" if limit_s else ""
    who = f"queue {name} does not take" if name else "no queue takes"
    raise ValueError(f"{who} {counted(nodes, 'node')}{time}; they take: {limits}")


def share(layout: Layout, more: Sequence[str], found: Degrees) -> str:
    """Say how many microbatches a replica gets in a step; ValueError if they cannot be shared evenly."""
    if not found.dp:
        return ""
    batch = number(more, "train.batch", layout.batch)
    microbatch = number(more, "train.microbatch", 1)
    if problem := batch_problem(batch, microbatch, found.dp):
        raise ValueError(f"{problem}; --train.batch after -- gives another batch")
    return f", {batch // (microbatch * found.dp):,} microbatches a replica and step"


def _joined(flags: Sequence[str]) -> str:
    """Write flags as one setting; the job script cuts it at blanks, so no flag may have one.

    Raises:
        ValueError: one has.
    """
    for word in flags:
        if not word or any(sign.isspace() for sign in word):
            raise ValueError(f"{word!r} after --: words with blanks cannot travel to a job")
    return " ".join(flags)
