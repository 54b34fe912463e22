"""Skipped steps kept for `aeris.replay`: the weights of that moment, and all that made the step.

RUN_DIR/faults/images_<first image> is a checkpoint of the weights alone, a quarter of a whole one. Of
skipped steps in a row only the first is kept, since nothing changes the weights between them; of such rows
the newest `faults.dumps` stay, as those led to where the run is now.
"""

from __future__ import annotations

import dataclasses
import math
import shutil
from pathlib import Path
from typing import Any

import torch

from aeris.log import console
from aeris.step import Training
from swipe.checkpoint import Checkpoints, complete
from swipe.collectives import all_reduce, tell
from swipe.sharding import local, replicas

PARTS = 4
"""A whole checkpoint in units of the weights: with them two moments and the average."""


def directory(run_dir: Path) -> Path:
    """Return where a run keeps its skipped steps."""
    return run_dir / "faults"


def dump_step(run: Training, record: dict[str, Any]) -> bool:
    """Keep the step just skipped, unless it is not the first in a row; a collective call over all ranks.

    A disk without room for it, or that fails, does not end the run: it is said, and the run goes on.

    Args:
        run: right after the step, whose weights are those the step began with.
        record: of the step, with "skip".

    Returns:
        Whether it is on disk now.

    Raises:
        OSError: a checkpoint that was still being written failed.
    """
    faults, last = run.config.faults, run.images_seen
    if not faults.dumps or run.spikes.in_a_row != 1:
        return False
    run.checkpoints.wait()  # its groups carry this one too
    first, root = last - run.config.train.batch, directory(run.run_dir)
    if (lack := _lack_of_room(run)) is not None:
        console.print(f"the step of images {first:,} to {last - 1:,} is not kept for replay: {lack}")
        return False
    dumps = Checkpoints(root, faults.dumps, run.seat.groups, asynchronous=False)
    tensors = {name: value for name, value in run.tensors().items() if name.startswith("model.")}
    if run.seat.lead:
        for path in complete(root):  # of steps after this one, which a resumed run takes again
            if path.name > f"images_{first:012d}":
                shutil.rmtree(path, ignore_errors=True)
    try:
        dumps.save(first, tensors, about(run, record, first))
    except OSError as error:  # in the same words on every rank
        console.print(f"the step of images {first:,} to {last - 1:,} is not kept for replay: {error}")
        return False
    console.print(f"kept: python -m aeris.replay {run.run_dir} --fault images_{first:012d}")
    return True


def about(run: Training, record: dict[str, Any], first: int) -> dict[str, Any]:
    """Describe a step for its dump: record, images, layout, data and the whole configuration."""
    return {
        "images": [first, run.images_seen],
        "record": in_words(record),
        "layout": str(run.seat.dims),
        "device": run.device.type,
        "torch": str(torch.__version__),
        "channels": list(run.store.names),
        "fingerprint": run.store.fingerprint,
        "config": dataclasses.asdict(run.config),
    }


def in_words(value: Any) -> Any:
    """Put "nan", "inf" or "-inf", which `float` reads again, for numbers that JSON has no word for."""
    if isinstance(value, dict):
        return {key: in_words(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [in_words(one) for one in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _lack_of_room(run: Training) -> str | None:
    """Say what the disk lacks to hold this and the run's next checkpoint; a collective call (8 bytes)."""
    own = sum(local(p.detach()).nbytes for p in run.model.parameters())
    share = torch.tensor(own / replicas(run.seat.groups.weights), dtype=torch.float64, device=run.device)
    weights = float(all_reduce(share, run.seat.groups.world, "bytes of the weights"))
    # The next checkpoint matters more: a dump must not take its room.
    needed = (1 + PARTS) * weights
    free = shutil.disk_usage(run.run_dir).free if run.seat.lead else 0
    free = tell(run.seat.groups.world, free)
    if free >= needed:
        return None
    return f"{free / 1e9:,.1f} GB are free, and it and the next checkpoint need {needed / 1e9:,.1f} GB"
