"""`python -m launch stop RUN_DIR`: ask a run, and the job that watches it, to save and stop."""

from __future__ import annotations

import argparse
from pathlib import Path

from launch import exits
from launch.asked import STOP


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="directory of the run")


def run(arguments: argparse.Namespace) -> int:
    """Ask for it.

    Raises:
        ValueError: it is no directory of a run.
        OSError: the request cannot be written.
    """
    run_dir: Path = arguments.run_dir
    job = run_dir / "job"
    if not (job.is_dir() or (run_dir / "config.json").is_file()):
        raise ValueError(f"{run_dir} is no run directory: it has neither config.json nor job/")
    # The job's first: it then knows that the end of the run was asked for.
    for directory in (job, run_dir) if job.is_dir() else (run_dir,):
        (directory / STOP).touch()
    print(f"{run_dir / STOP}: the run saves after its step and stops, and no job goes on with it")
    return exits.DONE
