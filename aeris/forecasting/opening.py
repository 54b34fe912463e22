"""Open a trained run for forecasting: checkpoint, data, ranks, network, sampler, perturbations, boundary.

    opened = open_forecaster(Path("runs/mine"), sampler=SamplerConfig(), members=8)
    for lead_h, x_BNTC in rollout(opened.forecaster, np.datetime64("2000-06-01T00"), range(8), 72):
        ...

`members` says how much there is to share out: the replicas (dp) of the network work on different ones.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from aeris import config as configs
from aeris.config import ParallelConfig
from aeris.data.store import Store
from aeris.diffusion.sampler import SamplerConfig, for_training
from aeris.forecasting.boundary import Boundary, BoundaryConfig
from aeris.forecasting.perturbation import Perturbation, PerturbationConfig
from aeris.forecasting.rollout import Forecaster
from aeris.parallelize import Seat, choose_degrees, make_network, take_seat
from aeris.restore import Trained, check_fingerprint, find_trained, load_network, open_store
from swipe import checkpoint
from swipe.backend import choose_device, start
from swipe.collectives import Group, all_reduce


@dataclass(frozen=True)
class Opened:
    """A run that is ready to forecast. Every rank has one."""

    forecaster: Forecaster
    trained: Trained
    """The checkpoint; its configuration has the layout and the store of this forecast."""
    store: Store
    seat: Seat
    """Where this rank sits: its mesh, groups and layout."""
    sampler: SamplerConfig
    """As asked for, with the range of noise levels filled in."""
    weights_sha256: str
    """16 hexadecimal digits that depend on every weight, and not on how the network is cut."""

    @property
    def rank(self) -> int:
        """This rank."""
        return self.seat.groups.rank

    @property
    def replica(self) -> int:
        """The replica of the network (dp) this rank is part of."""
        return self.seat.at.dp

    @property
    def replicas(self) -> int:
        """How many there are."""
        return self.seat.dims.dp


def open_forecaster(
    run: Path,
    *,
    checkpoint: str = "",
    weights: str = "ema",
    sampler: SamplerConfig | None = None,
    perturbation: PerturbationConfig | None = None,
    boundary: BoundaryConfig | None = None,
    seed: int = 0,
    members: int = 1,
    device: str = "auto",
    parallel: ParallelConfig | None = None,
    store: str = "",
    join: Callable[[torch.device, float], None] | None = None,
) -> Opened:
    """Load a run and join the other ranks; a collective call. What can be refused is, before they meet.

    Args:
        run: directory of the run.
        checkpoint: its name, or its images; empty takes the newest.
        weights: "ema" for averaged weights, "raw" for those of the last step.
        sampler: how a sample is drawn, by default as `SamplerConfig` says; open ends of its range become
            those of training.
        perturbation: what the members start from; by default the analysis.
        boundary: which fields are prescribed; by default none.
        seed: first part of every noise key.
        members: forecasts, of all init times, to share out among replicas: the most that dp can be.
        device: auto, cpu, cuda or xpu.
        parallel: degrees of the mesh; those left at 0 are chosen.
        store: directory of a store with the init times; empty takes the run's.
        join: joins the other ranks; by default `swipe.backend.start`.

    Raises:
        ValueError: a wrong run, checkpoint, store, sampler or layout.
        OSError: the other ranks are not there.
    """
    found = find_run(run, checkpoint, weights, parallel or ParallelConfig(), store)
    return take_seats(
        *found,
        sampler=sampler or SamplerConfig(),
        perturbation=perturbation or PerturbationConfig(),
        boundary=boundary or BoundaryConfig(),
        seed=seed,
        members=members,
        device=device,
        join=join or start,
    )


def take_seats(
    trained: Trained,
    store: Store,
    *,
    sampler: SamplerConfig,
    perturbation: PerturbationConfig,
    boundary: BoundaryConfig,
    seed: int,
    members: int,
    device: str,
    join: Callable[[torch.device, float], None],
) -> Opened:
    """Do what `open_forecaster` does with a run that was found: see there."""
    config, rank, world = trained.config, *_place()
    closed = for_training(sampler, config.diffusion)
    dims = choose_degrees(config, world, members)
    chosen = choose_device(device)
    join(chosen, config.parallel.timeout_s)
    seat = take_seat(config, trained.counts, dims, rank, chosen)
    model = load_network(trained, seat.layout, chosen, seat.units, near=seat.at.pp / dims.pp)
    forecaster = Forecaster(
        make_network(model, seat, len(store.names)), seat.layout, store, config.data.interval_h, closed,
        sigma_data=config.diffusion.sigma_data, seed=seed, device=chosen, groups=seat.groups,
        perturbation=make_perturbation(perturbation, store, seat, config.data.interval_h, seed),
        boundary=make_boundary(boundary, store, seat),
    )  # fmt: skip
    return Opened(forecaster, trained, store, seat, closed, digest(model, seat.groups.chain))


def _place() -> tuple[int, int]:
    """Return this rank, and how many there are."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def make_perturbation(
    config: PerturbationConfig, store: Store, seat: Seat, interval_h: int, seed: int
) -> Perturbation | None:
    """Make what perturbs initial states, None if they all are the analysis.

    Raises:
        ValueError: it does not suit the store.
    """
    if config.kind == "none":
        return None
    return Perturbation(
        config, store, seat.layout, interval_h=interval_h, seed=seed, device=seat.device, groups=seat.groups
    )


def make_boundary(config: BoundaryConfig, store: Store, seat: Seat) -> Boundary | None:
    """Make what sets boundary fields, None if they all are the model's.

    Raises:
        ValueError: the store lacks a field.
    """
    if config == BoundaryConfig():
        return None
    return Boundary(config, store, seat.layout, device=seat.device)


def find_run(
    run: Path, checkpoint: str, weights: str, parallel: ParallelConfig, store: str
) -> tuple[Trained, Store]:
    """Find a run's checkpoint and the data; its configuration gets this layout and store.

    Each rank checks a share of the checkpoint's files.

    Raises:
        ValueError: they do not exist, are damaged, or do not belong together.
    """
    trained = find_trained(run, weights, find_checkpoint(run, checkpoint), *_place())
    data = dataclasses.replace(trained.config.data, store=store or trained.config.data.store)
    config = dataclasses.replace(trained.config, data=data, parallel=parallel)
    configs.check(config)
    found = open_store(config)
    check_fingerprint(trained.meta["fingerprint"], found)
    return dataclasses.replace(trained, config=config), found


def find_checkpoint(run: Path, name: str) -> Path | None:
    """Return the checkpoint called `name`, or of so many images; None, the newest, if empty.

    Raises:
        ValueError: there is no such complete checkpoint; names those there are.
    """
    if not name:
        return None
    found = checkpoint.complete(run / "checkpoints")
    for path in found:
        if name == path.name or (name.isdigit() and path.name.endswith(f"_{int(name):012d}")):
            return path
    there = ", ".join(path.name for path in found) or "none"
    raise ValueError(f"{run} has no complete checkpoint {name}; there are: {there}")


def digest(model: nn.Module, chain: Group) -> str:
    """Return 16 hexadecimal digits that depend on every weight, and not on how the network is cut.

    They are the sum of a hash of every tensor; crosses pp with 32 bytes.
    """
    total = 0
    for name, parameter in model.named_parameters():
        values = parameter.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        total += int.from_bytes(hashlib.sha256(name.encode() + values.tobytes()).digest()[:8], "big")
    words = torch.tensor([total >> shift & 0xFFFF for shift in range(0, 64, 16)])
    sums = all_reduce(words, chain, "digests of the weights").tolist()
    return f"{sum(word << shift for word, shift in zip(sums, range(0, 64, 16))) % 2**64:016x}"
