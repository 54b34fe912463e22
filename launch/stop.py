"""`python -m launch stop RUN_DIR`: ask a run, and the job that watches it, to save and stop.

The request is a file, which the job takes away when it has obeyed. A job that waits in the queue obeys as it
starts, so each call stops one job.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from launch import exits
from launch.asked import STOP
from launch.journal import held
from launch.verdict import read_ended


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="directory of the run")


def run(arguments: argparse.Namespace) -> int:
    """Ask for it, unless there is nothing to stop.

    Raises:
        ValueError: it is no directory of a run.
        OSError: the request cannot be written.
    """
    run_dir: Path = arguments.run_dir
    job = run_dir / "job"
    if not (job.is_dir() or (run_dir / "config.json").is_file()):
        raise ValueError(f"{run_dir} is no run directory: it has neither config.json nor job/")
    ended = None if held(job) else read_ended(run_dir)
    if ended and ended.status == exits.DONE:
        print(f"{run_dir} is done; nothing to stop")
        return exits.DONE
    if ended and not job.is_dir():  # a program that is started anew would forget the request
        print(f"no program runs in {run_dir} ({ended.why}); nothing to stop")
        return exits.DONE
    # The job's first: it then knows that the end of the run was asked for.
    for directory in (job, run_dir) if job.is_dir() else (run_dir,):
        (directory / STOP).touch()
    back = f"rm {job / STOP} takes it back"
    if ended:
        print(f"no program runs in {run_dir} ({ended.why}); the next job there ends as it starts ({back})")
    else:
        print(f"{run_dir / STOP}: the run saves after its step and stops, and its job submits no other")
        if job.is_dir():
            print(f"one job obeys: the one that runs or, if none does, the next as it starts ({back})")
    if job.is_dir():
        print(
            "others that wait in the queue (submit --jobs) start the run again: qdel or scancel removes them"
        )
    return exits.DONE
