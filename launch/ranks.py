"""Command: print the ranks that programs see when they are started like this, and where they would meet."""

from __future__ import annotations

import argparse
import os
import socket
import sys

from launch import exits, rank


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Take nothing: everything is in the environment."""


def run(arguments: argparse.Namespace) -> int:
    """Print one line per rank; ValueError says what contradicts or is missing, as a program would."""
    found = rank.discover(os.environ)
    rank.export(found)
    place = "alone"
    if found.world > 1:
        place = f"meets at {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    line = f"rank {found.rank} of {found.world}, {found.local_rank} of {found.local_world} on "
    # In one write, so that lines of several ranks do not mix.
    sys.stdout.write(f"{line}{socket.gethostname()}, by {found.launcher}, {place}\n")
    sys.stdout.flush()
    rank.leave()
    return exits.DONE
