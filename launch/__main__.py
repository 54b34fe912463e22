"""Start runs on clusters: `python -m launch <command>`; each command is a module with the words it takes."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from launch import exits

COMMANDS = {
    "submit": ("launch.submit", "submit the job of a preset, or print what would be submitted"),
    "job": (
        "launch.job",
        "run a program on the nodes of this job until it is done: checks, restarts, resubmits",
    ),
    "stop": ("launch.stop", "ask a run to save and stop"),
    "preflight": ("launch.preflight", "measure every node and name the bad ones"),
    "ranks": ("launch.ranks", "print the ranks that programs see when they are started like this"),
    "pack": ("launch.pack", "pack a Python environment into an archive"),
    "stage": ("launch.stage", "unpack an archive on every node"),
}
"""Commands, the module of each (`add_arguments(parser)`, `run(arguments) -> status`), and what it does.

A module that takes the words after `--` says in AFTER under which name it wants the list.
"""


def main(words: Sequence[str]) -> int:
    """Run a command; only its own module is imported. Returns the exit status (launch/exits.py)."""
    width = max(map(len, COMMANDS))
    parser = argparse.ArgumentParser(
        prog="python -m launch",
        description="Start runs on clusters.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="commands:\n" + "\n".join(f"  {name:{width}}  {what}" for name, (_, what) in COMMANDS.items()),
    )
    parser.add_argument("command", choices=COMMANDS, metavar="command", help="one of those below")
    chosen = parser.parse_args(words[:1]).command
    module, what = COMMANDS[chosen]
    implementation = importlib.import_module(module)
    own = argparse.ArgumentParser(prog=f"python -m launch {chosen}", description=f"{what.capitalize()}.")
    implementation.add_arguments(own)
    own_words, after = list(words[1:]), getattr(implementation, "AFTER", "")
    cut = own_words.index("--") if after and "--" in own_words else len(own_words)
    arguments = own.parse_args(own_words[:cut])
    if after:
        setattr(arguments, after, own_words[cut + 1 :])
    status: int = implementation.run(arguments)
    return status


def run_main(words: Sequence[str]) -> int:
    """Run `main`; an error becomes one line on stderr and its exit status."""
    try:
        return main(words)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return exits.INTERRUPTED
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        kinds = ((ValueError, exits.MISTAKE), (ConnectionError, exits.LOST), (OSError, exits.IO))
        return next(status for kind, status in kinds if isinstance(error, kind))


if __name__ == "__main__":
    sys.exit(run_main(sys.argv[1:]))
