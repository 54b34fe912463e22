"""Choosing the checkpoint a run goes on from: the newest one whose every byte is as it was saved.

All ranks verify a share of its files and agree. A damaged one is set aside as `images_<count>.damaged`, and
the one before is tried. What a rank finds damaged is looked at again by the first rank: a checkpoint is not
given up because one machine reads wrongly or does not see a new file yet.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import time
from pathlib import Path

import torch

from swipe.checkpoint_errors import Damaged, reason
from swipe.checkpoint_reading import DAMAGED, PREFIX, complete, put_back
from swipe.checksums import verify, verify_file
from swipe.collectives import AgreedError, CommunicationError, Group, agree, all_reduce, tell, together

PAUSES_S = (0.0, 2.0, 10.0, 30.0)
"""Waits before looking again at what the first rank finds good: network file systems show a new file late."""


def newest(root: Path, world: Group) -> tuple[Path | None, list[str]]:
    """Find the newest good checkpoint under `root`; a collective call over `world`.

    Every file of it is read once, by one of the ranks; so much must come from the disk anyway.

    Returns:
        The checkpoint, the same on all ranks, or None if none was ever saved; and a line for each newer one
        that is damaged and now is called `images_<count>.damaged`.

    Raises:
        AgreedError: there are checkpoints, but all are damaged (nothing is renamed then), or one cannot be
            read by this user; a run must not start from scratch unasked.
        CommunicationError: a rank cannot read what the first rank reads well.
    """
    lead = world.rank == 0
    names, aside = list[str](), list[str]()
    with together(world):
        if lead:  # one rank chooses: on a network file system another may not see the newest yet
            put_back(root)
            names = [path.name for path in reversed(complete(root))]
            aside = sorted(path.name for path in root.glob(f"{PREFIX}*{DAMAGED}"))
    names, aside = tell(world, (names, aside))
    damaged: list[tuple[str, str]] = []
    for name in names:
        what = _damage(root / name, world)
        if what is None:
            with together(world):
                for other, _ in damaged if lead else ():
                    _set_aside(root / other)
            return root / name, [
                f"the checkpoint {other} is damaged ({why}): it is called {other}{DAMAGED} now, "
                f"and {name} is used"
                for other, why in damaged
            ]
        damaged.append((name, what))
    if damaged or aside:
        said = [f"{name} ({why})" for name, why in damaged] + aside
        more = f" and {len(said) - 3} more" if len(said) > 3 else ""
        raise AgreedError(
            f"every checkpoint in {root} is damaged: {', '.join(said[:3])}{more}; put a good copy there, or "
            "remove all of them to start from scratch"
        )
    return None, []


def _damage(path: Path, world: Group) -> str | None:
    """Verify a checkpoint together; return which file is damaged and how, or None."""
    mine, told = _look(path, world), ""
    for pause in PAUSES_S:
        if pause and mine is not None:
            time.sleep(pause)
            mine = _look(path, world)
        bad = all_reduce(torch.tensor(int(mine is not None)), world, "damaged checkpoints")
        if not int(bad):
            return None
        told = agree(world, None if mine is None else json.dumps(mine)) or ""
        file = json.loads(told)[0]
        again = tell(world, _again(path, file) if world.rank == 0 else None)
        if again is not None:
            if again[0]:
                return str(again[1])
            raise AgreedError(f"the checkpoint {path} cannot be read: {again[1]}", of_a_file=True)
    _, what, who = json.loads(told)
    raise CommunicationError(
        f"{who} does not read the checkpoint {path} as rank 0 does ({what}): its machine or its file system "
        "is at fault"
    )


def _look(path: Path, world: Group) -> tuple[str, str, str] | None:
    """Verify this rank's share; return the damaged file, what is wrong, and who says so."""
    who = f"rank {world.ranks[world.rank]} ({socket.gethostname()})"
    try:
        verify(path, world.rank, world.size)
    except Damaged as error:
        return error.file, str(error), who
    except OSError as error:
        name = Path(error.filename or path)
        file = name.relative_to(path).as_posix() if name.is_relative_to(path) else ""
        return file, f"{file}: {reason(error)}", who
    return None


def _again(path: Path, file: str) -> tuple[bool, str] | None:
    """Look again at a file that a rank blames; return whether it is damaged for good, and what is wrong."""
    try:
        verify_file(path, file)
    except Damaged as error:
        return True, str(error)
    except OSError as error:
        return False, f"{file}: {reason(error)}"
    return None


def _set_aside(path: Path) -> None:
    """Give a damaged checkpoint a name by which it is none; it takes the place of an earlier such one."""
    aside = path.with_name(path.name + DAMAGED)
    if aside.exists():
        shutil.rmtree(aside)
    os.replace(path, aside)
