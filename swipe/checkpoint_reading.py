"""Finding and reading checkpoints: which are complete, what they say, and their tensors.

Any layout of ranks loads what any other saved, and loading executes no code (swipe/checkpoint_files.py).
"""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint.state_dict_loader as dcp_load
from torch import Tensor

from swipe.checkpoint_errors import damage_is_named
from swipe.checkpoint_files import StageReader
from swipe.checksums import COMPLETE, META, stage_name

PREFIX, PARTIAL, REPLACED, DAMAGED = "images_", ".partial", ".replaced", ".damaged"
"""A checkpoint is `images_<count>`; with a suffix it is unfinished, making room for another, or set aside."""


def complete(root: Path) -> list[Path]:
    """List the complete checkpoints under `root`, oldest first."""
    return sorted(path.parent for path in root.glob(f"{PREFIX}*/{COMPLETE}") if not path.parent.suffix)


def put_back(root: Path) -> None:
    """Give a checkpoint its name again that a killed save had moved out of the way of a new one."""
    for moved in root.glob(f"{PREFIX}*{REPLACED}{PARTIAL}"):
        final = moved.with_name(moved.name.removesuffix(REPLACED + PARTIAL))
        if not final.exists():
            os.replace(moved, final)


def read_meta(path: Path) -> dict[str, Any]:
    """Read the JSON part of a complete checkpoint.

    Raises:
        ValueError: there is no complete checkpoint at `path`, or its JSON is damaged.
    """
    if not (path / COMPLETE).exists():
        raise ValueError(f"{path} is not a complete checkpoint")
    try:
        meta: dict[str, Any] = json.loads((path / META).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(
            f"the checkpoint {path} is damaged ({META}: {error}); remove it to use the one before"
        ) from None
    return meta


def load(path: Path, tensors: dict[str, Tensor], near: float = 0.0) -> None:
    """Fill `tensors` in place from a complete checkpoint, without communication.

    Each is read from the stage that holds it, however many stages and ranks saved it; of a DTensor only this
    rank's shard is read.

    Args:
        path: the checkpoint.
        tensors: plain tensors or DTensors of the saved global shapes, by name; all or some of the saved ones.
        near: where to look first, as this rank's stage / stages: there, one or two indices suffice.

    Raises:
        ValueError: the checkpoint is damaged, its index names an unknown class, or it lacks one of `tensors`
            or its shape; then nothing was changed, unless data are damaged.
    """
    stages = read_meta(path).get("stages")
    missing, saved, parts = dict(tensors), dict[str, tuple[int, ...]](), []
    with damage_is_named(path):
        for directory in _directories(path, stages, near):
            if missing:
                reader = StageReader(directory)
                part = {name: missing.pop(name) for name in reader.sizes if name in missing}
                saved |= {name: reader.sizes[name] for name in part}
                parts.append((reader, part))
    different = [name for name, tensor in tensors.items() if saved.get(name) != tuple(tensor.shape)]
    if different:
        name = different[0]
        there, here = saved.get(name, "missing"), tuple(tensors[name].shape)
        raise ValueError(
            f"the checkpoint {path} belongs to another model: {name} is {there} there and {here} here "
            f"({len(different)} of {len(tensors)} tensors differ)"
        )
    silence_remarks()
    with damage_is_named(path):
        for reader, part in parts:
            if part:
                dcp_load.load(part, storage_reader=reader, no_dist=True)


def silence_remarks() -> None:
    """Silence DCP on itself: that it works without a process group, and (to torch 2.10) on its storages.

    For good, and by the caller's thread: `catch_warnings` would undo what other threads do to the filters.
    """
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")
    warnings.filterwarnings("ignore", message="TypedStorage is deprecated")


def _directories(path: Path, stages: int | None, near: float) -> list[Path]:
    """List the directories with an index, those about `near` of the way through the stages first."""
    if stages is None:
        return [path]  # written when there was one stage only
    first = int(near * stages + 1e-9)
    order = sorted(range(stages), key=lambda stage: abs(stage - first - 0.25))
    return [path / stage_name(stage) for stage in order]
