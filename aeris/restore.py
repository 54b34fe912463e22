"""Bring a run back from its directory: configuration, network, weights, and a check of its data."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from aeris import config as configs
from aeris.config import RunConfig
from aeris.data.forcing import FORCINGS
from aeris.data.standards import RunStore, read_standards
from aeris.data.store import Store, packaged_sample
from aeris.model import published
from aeris.model.swin import Swin
from aeris.parallelize import build_model
from aeris.run_directory import Free, check_unchanged
from swipe import checkpoint
from swipe.checkpoint_errors import Damaged
from swipe.checksums import verify
from swipe.layout import WindowLayout

POINTER = "published.json"
"""In a run that reads published weights where they are: where, and what a checkpoint of them would say."""


def open_store(config: RunConfig) -> Store:
    """Open the run's store and check that it has the grid and channels the run expects.

    Raises:
        ValueError: they differ; names the setting to change.
    """
    path = packaged_sample() if config.data.store == "sample" else Path(config.data.store)
    standards = config.data.standards
    store = RunStore(path, read_standards(Path(standards))) if standards else Store(path)
    rows, cols = len(store.latitude_deg), len(store.longitude_deg)
    model = config.model
    if (rows, cols) != (model.rows, model.cols):
        raise ValueError(
            f"the store {path} has a grid of {rows} x {cols}, the run expects {model.rows} x {model.cols}: "
            f"pass --model.rows {rows} --model.cols {cols} and a --model.window that divides both"
        )
    if store.row_offset != model.row_offset:
        raise ValueError(
            f"the store {path} begins at row {store.row_offset} of its original grid, the run expects row "
            f"{model.row_offset}: pass --model.row-offset {store.row_offset}"
        )
    if config.data.roll and store.masks:
        raise ValueError(
            f"{path} has masked channels ({', '.join(store.masks)}), which cannot be rolled: "
            "pass --data.no-roll"
        )
    wanted = config.data.channels
    if wanted and tuple(store.names) != tuple(wanted):
        missing = [name for name in wanted if name not in store.names]
        detail = f"it lacks {', '.join(missing[:5])}" if missing else "their order or number differs"
        raise ValueError(
            f"the store {path} does not have the run's {len(wanted)} channels: {detail}; "
            f"convert again with --channels, or pass --data.channels {' '.join(store.names)}"
        )
    if config.data.interval_h not in store.statistics.residual_std:
        known = ", ".join(map(str, sorted(store.statistics.residual_std)))
        raise ValueError(
            f"the store {path} has residual statistics for {known} h, not {config.data.interval_h} h"
        )
    return store


def channel_counts(channels: int) -> tuple[int, int]:
    """Count the network's input channels (noisy residual, state, forcings) and output channels (residual)."""
    return 2 * channels + len(FORCINGS), channels


def check_fingerprint(saved: dict[str, Any], store: Store) -> None:
    """Compare the data a checkpoint was trained on with a store.

    Raises:
        ValueError: names, units, levels, grid or statistics differ; says which.
    """
    here = store.fingerprint
    different = sorted(key for key in saved.keys() | here.keys() if saved.get(key) != here.get(key))
    if different:
        raise ValueError(
            f"the store {store.path} is not the data this run was trained on: {', '.join(different)} differ "
            f"(run: {_short(saved.get(different[0]))}; store: {_short(here.get(different[0]))})"
        )


FREE: Free = {
    "model": {"precision", "residual", "checkpointing", "compile"},
    "data": {"store", "workers"},
    "diffusion": {"state_error"},
    "train": {"images", "batch", "microbatch", "clip", "nonfinite_limit", "log_every"},
    "optimizer": None,
    "ema": None,
    "checkpoint": None,
    "parallel": None,
    "faults": None,
}  # settings a run may change when it goes on; None: every one of the section


def check_same_run(config: RunConfig, run_dir: Path) -> None:
    """Refuse to go on in a directory with another run's checkpoints.

    Raises:
        ValueError: a setting that defines the run differs from `run_dir`/config.json, or it is of published
            weights; names the settings.
    """
    if config.data.standards:
        raise ValueError(
            f"--data.standards {config.data.standards}: published weights forecast, they are not trained on"
        )
    if not checkpoint.complete(run_dir / "checkpoints"):
        return
    check_unchanged(configs.load(run_dir / "config.json"), config, FREE, run_dir)


def _short(value: Any, limit: int = 160) -> str:
    """Show a value in at most `limit` characters."""
    text = str(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def latest_checkpoint(run_dir: Path) -> Path:
    """Return the newest complete checkpoint of a run.

    Raises:
        ValueError: there is none.
    """
    found = checkpoint.complete(run_dir / "checkpoints")
    if not found:
        raise ValueError(
            f"{run_dir} has no complete checkpoint: train it first with aeris.train --run-dir {run_dir}"
        )
    return found[-1]


@dataclass(frozen=True)
class Trained:
    """A checkpoint of a run, found and not yet loaded."""

    config: RunConfig
    path: Path
    meta: dict[str, Any]
    """What the checkpoint says, with `images_seen`, `channels` and the `fingerprint` of the data."""
    weights: str
    """What to load: "ema" or "model", as the checkpoint calls them."""
    as_published: bool = False
    """Whether `path` is a directory of published files (aeris/model/published.py), no checkpoint."""

    @property
    def counts(self) -> tuple[int, int]:
        """Input and output channels of the network."""
        return channel_counts(len(self.meta["channels"]))


def check_whole(path: Path, share: int = 0, of: int = 1) -> None:
    """Check that all files of a checkpoint, or a share of them, are there and have the sizes they should.

    Their content is not read, which would take as long as reading weights, averages and optimizer.

    Raises:
        ValueError: one is missing or has another size; says which, and what else could be taken.
    """
    try:
        verify(path, share, of, contents=False)
    except Damaged as error:
        others = [other.name for other in checkpoint.complete(path.parent) if other != path]
        instead = "there is no other: put a good copy in its place"
        if others:
            instead = f"--checkpoint {others[-1]} takes another; training goes on from the newest good one"
        raise ValueError(f"the checkpoint {path} is damaged ({error}); {instead}") from None


def find_trained(
    run_dir: Path, weights: str = "ema", path: Path | None = None, share: int = 0, of: int = 1
) -> Trained:
    """Find what to load of a run, and check that it is whole.

    Args:
        weights: "ema" for the averaged weights, "raw" for those of the last step.
        path: which checkpoint; the newest by default.
        share: which share of its files to check, of `of`: the rank, if all ranks look.
        of: how many shares there are.

    Raises:
        ValueError: the run, checkpoint or weights do not exist, or a file is missing or has another size.
    """
    config = configs.load(run_dir / "config.json")
    prefix = {"ema": "ema", "raw": "model"}.get(weights)
    if prefix is None:
        raise ValueError(f"weights {weights!r} do not exist: choose ema or raw")
    if config.data.standards:
        own = dataclasses.replace(config.data, standards=str(run_dir / config.data.standards))
        config = dataclasses.replace(config, data=own)
        if prefix == "model":
            raise ValueError(f"{run_dir} has published weights, which are averages: take --weights ema")
    if path is None and (run_dir / POINTER).exists():
        directory, meta = read_pointer(run_dir / POINTER)
        return Trained(config, directory, meta, prefix, as_published=True)
    path = path or latest_checkpoint(run_dir)
    check_whole(path, share, of)
    return Trained(config, path, checkpoint.read_meta(path), prefix)


def read_pointer(path: Path) -> tuple[Path, dict[str, Any]]:
    """Read where the published files of a run are, and what a checkpoint of them would say.

    Raises:
        ValueError: it is damaged, or a file is gone or has another size.
    """
    try:
        values = json.loads(path.read_text())
        directory, sizes = Path(values["directory"]), dict(values["bytes"])
        meta: dict[str, Any] = dict(values["meta"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is damaged ({_short(error)}): make the run again with aeris.published"
        ) from None
    for name, size in sizes.items():
        file = directory / name
        found = file.stat().st_size if file.exists() else None
        if found != size:
            there = "is missing" if found is None else f"has {found:,} bytes, {size:,} when the run was made"
            raise ValueError(
                f"the published weights {file}: it {there}; copy it again, or make the run again"
            )
    return directory, meta


def load_network(
    trained: Trained,
    layout: WindowLayout,
    device: torch.device | str = "cpu",
    units: range | None = None,
    near: float = 0.0,
) -> Swin:
    """Build a network, or the `units` of a stage, with trained weights, in evaluation mode.

    Each rank reads what it needs, without communication.

    Args:
        near: where in the checkpoint to look first, as stage / stages.

    Raises:
        ValueError: the checkpoint is damaged or does not fit.
    """
    model = build_model(trained.config.model, *trained.counts, layout, device, units)
    weights = {name: p.detach() for name, p in model.named_parameters()}
    if trained.as_published:
        sizes = published.Sizes.of(trained.config.model, trained.counts[1])
        published.load(trained.path, sizes, weights)
    else:
        checkpoint.load(trained.path, {f"{trained.weights}.{name}": p for name, p in weights.items()}, near)
    return model.eval().requires_grad_(False)
