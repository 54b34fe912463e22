"""One layout of a run on a machine: does it fit, what does it send, how long does a step take.

A `Plan` asks memory.py, traffic.py, timing.py and aeris/flops.py, and derives from their answers what people
compare: images/s, FLOP/s, MFU, the volume of checkpoints. No process and no device is needed.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property

from aeris.config import ModelConfig, RunConfig
from aeris.flops import flops_per_sample, recompute_flops
from aeris.planning.hardware import Hardware
from aeris.planning.memory import host_memory, memory
from aeris.planning.timing import StepTime, step_read_bytes, step_time
from aeris.planning.traffic import (
    Traffic,
    kinds_of,
    microbatches,
    tokens_of_rank,
    traffic,
    unit_shapes,
    units_of_stage,
)
from aeris.restore import channel_counts
from swipe.groups import check_shard
from swipe.mesh import ParallelDims

HEADROOM = 0.05
"""Share of a device's memory that is left to drivers, libraries and gaps between tensors. [assumed]"""
CHECKPOINT_BYTES = 16
"""Of a parameter in a checkpoint: weight 4, moments 8, average 4."""


@dataclass(frozen=True)
class Plan:
    """A run on a machine under one layout; what is asked of it is computed once, when it is asked.

    Attributes:
        config: the run; its batch and microbatch are those of this layout, its degrees are not looked at.
        channels: of the data.
        dims: the layout, which suits the model and the batch (`swipe.mesh.Limits`).
        hardware: the machine.
        headroom: share of a device's memory that tensors must leave free.
    """

    config: RunConfig
    channels: int
    dims: ParallelDims
    hardware: Hardware
    headroom: float = HEADROOM

    @cached_property
    def memory_by_stage(self) -> tuple[dict[str, int], ...]:
        """Bytes on a device by part, for every stage."""
        return tuple(memory(self.config, self.channels, self.dims, stage) for stage in range(self.dims.pp))

    @cached_property
    def host_bytes(self) -> int:
        """Host memory of a node for what is offloaded; 0 without."""
        return _host_bytes(self.config, self.channels, self.dims, self.hardware, range(self.dims.pp))

    @cached_property
    def traffic(self) -> Traffic:
        """What the rank sends in a step that sends most, among those of every stage that hand on samples."""
        ranks = [self.dims.rank_at(0, stage, 0) for stage in range(self.dims.pp)]
        each = self.hardware.devices_per_node
        found = [traffic(self.config, self.channels, self.dims, rank, each) for rank in ranks]
        return max(found, key=lambda sent: sum(sent.total.values()))

    @cached_property
    def time(self) -> StepTime:
        """Seconds of a step."""
        return step_time(self.config, self.channels, self.dims, self.hardware)

    @cached_property
    def flops(self) -> dict[str, int]:
        """FLOPs of a sample, forward and backward, by part."""
        return flops_per_sample(self.config.model, *channel_counts(self.channels))

    @cached_property
    def problem(self) -> str:
        """Why it cannot run, naming the numbers; "" if it can."""
        return shortage(self.config, self.channels, self.dims, self.hardware, self.headroom)[0]

    @property
    def stage(self) -> int:
        """The stage whose devices hold most."""
        sizes = [sum(parts.values()) for parts in self.memory_by_stage]
        return sizes.index(max(sizes))

    @property
    def memory(self) -> dict[str, int]:
        """Bytes on a device of the fullest stage, by part."""
        return self.memory_by_stage[self.stage]

    @property
    def memory_bytes(self) -> int:
        """Bytes on a device of the fullest stage."""
        return sum(self.memory.values())

    @property
    def microbatches(self) -> int:
        """Microbatches of a step on each replica."""
        return microbatches(self.config, self.dims)

    @property
    def tokens(self) -> int:
        """Tokens of a microbatch on one rank: the rows of its matrix products."""
        return tokens_of_rank(self.config, self.dims)

    @property
    def step_s(self) -> float:
        """Seconds of a step."""
        return self.time.step_s

    @property
    def images_per_s(self) -> float:
        """Images trained on per second by the whole run."""
        return self.config.train.batch / self.step_s

    @property
    def flops_per_sample(self) -> int:
        """Useful FLOPs of a sample: nothing that is computed a second time."""
        return sum(self.flops.values())

    @property
    def flops_per_s(self) -> float:
        """Useful FLOP/s of the whole run."""
        return self.flops_per_sample * self.images_per_s

    @property
    def mfu(self) -> float:
        """Useful FLOP/s as a share of what the devices could do in theory."""
        return self.flops_per_s / (self.dims.world * self.hardware.peak_flops_per_s)

    @property
    def gemm_share(self) -> float:
        """Useful FLOP/s as a share of the measured rate of a matrix product: what a run prints as MFU."""
        return self.flops_per_s / (self.dims.world * self.hardware.gemm_flops_per_s)

    @property
    def hfu(self) -> float:
        """As `mfu`, with what checkpointing of activations computes again."""
        again = recompute_flops(self.config.model, *channel_counts(self.channels))
        return self.mfu * (1 + again / self.flops_per_sample)

    @property
    def parameters(self) -> int:
        """Parameters of the network."""
        return parameter_count(self.config.model, self.channels)

    @property
    def checkpoint_bytes(self) -> int:
        """Bytes of a checkpoint, all ranks together."""
        return CHECKPOINT_BYTES * self.parameters

    @property
    def checkpoint_s(self) -> float:
        """Seconds to write a checkpoint, at the rate of the file system; training goes on meanwhile."""
        return self.checkpoint_bytes / self.hardware.write_bytes_per_s

    @property
    def read_bytes_per_s(self) -> float:
        """Bytes per second that all ranks together read from the file system."""
        return step_read_bytes(self.config, self.channels, self.dims) / self.step_s

    @property
    def flags(self) -> str:
        """What to add to the command of `aeris.train` to lay it out so; other settings are not looked at."""
        degrees = dataclasses.asdict(self.dims).items()
        asked = [f"--parallel.{axis.replace('_', '-')} {degree}" for axis, degree in degrees]
        train, shard = self.config.train, self.config.parallel.shard
        asked += [f"--parallel.shard {shard}"] if shard else []
        return " ".join([*asked, f"--train.microbatch {train.microbatch} --train.batch {train.batch}"])


def estimate(
    config: RunConfig, channels: int, dims: ParallelDims, hardware: Hardware, headroom: float = HEADROOM
) -> Plan:
    """Plan a run under a layout on a machine; see `Plan`.

    Raises:
        ValueError: the weights of a stage cannot be divided as the run asks.
    """
    check_shard(dims, config.parallel.shard)
    return Plan(config, channels, dims, hardware, headroom)


def fullest_stage(config: RunConfig, channels: int, dims: ParallelDims) -> tuple[int, dict[str, int]]:
    """Return the stage whose devices hold most and what they hold, from as few stages as will do.

    Of stages with equally many layers the first has most microbatches in flight, so it stands for all.
    """
    kept = {stage: memory(config, channels, dims, stage) for stage in _kinds(config, channels, dims)}
    stage = max(kept, key=lambda stage: sum(kept[stage].values()))
    return stage, kept[stage]


def shortage(
    config: RunConfig, channels: int, dims: ParallelDims, hardware: Hardware, headroom: float = HEADROOM
) -> tuple[str, float]:
    """Say why a layout does not fit, "" if it does, and what it needs over what there is."""
    stage, kept = fullest_stage(config, channels, dims)
    need, room = sum(kept.values()), hardware.memory_bytes * (1 - headroom)
    host = _host_bytes(config, channels, dims, hardware, _kinds(config, channels, dims))
    problem = ""
    if need > room:
        problem = f"needs {in_words(kept, room)} on stage {stage}"
    elif host > hardware.host_bytes:
        problem = (
            f"needs {host / 1e9:.0f} of {hardware.host_bytes / 1e9:.0f} GB of a node's host memory for what "
            "is offloaded"
        )
    return problem, max(need / room, host / hardware.host_bytes)


def in_words(kept: Mapping[str, float], room: float) -> str:
    """Say how much memory is needed of how much, and what most of it is."""
    part = max(kept, key=lambda name: kept[name])
    return f"{sum(kept.values()) / 1e9:.1f} of {room / 1e9:.1f} GB ({kept[part] / 1e9:.1f} {part})"


def _kinds(config: RunConfig, channels: int, dims: ParallelDims) -> list[int]:
    """List the first stage of every kind."""
    first: dict[tuple[int, bool], int] = {}
    for stage in range(dims.pp):
        units = units_of_stage(config, channels, dims, stage)
        first.setdefault((len(units), stage in (0, dims.pp - 1)), stage)
    return sorted({*first.values(), dims.pp - 1})


def _host_bytes(
    config: RunConfig, channels: int, dims: ParallelDims, hardware: Hardware, stages: Iterable[int]
) -> int:
    """Return the host memory of a node whose ranks all are of the stage that needs most."""
    if config.optimizer.offload == "none":
        return 0
    most = max(host_memory(config, channels, dims, stage) for stage in stages)
    return most * min(hardware.devices_per_node, dims.world)


@cache
def parameter_count(model: ModelConfig, channels: int) -> int:
    """Count the parameters of the network."""
    kinds = kinds_of(model, range(model.layers + 2))
    return sum(math.prod(shape) for kind in kinds for shape in unit_shapes(model, channels, kind))


def breakdown(plan: Plan) -> dict[str, float]:
    """Share the seconds of a step out, as the stage sees them that computes most; they add up to the step.

    "waiting" is the pipeline's filling and draining and what messages add to it. Weights, gradients,
    optimizer and reading are what nothing hides.
    """
    time, count = plan.time, plan.microbatches
    busy = max(time.stages, key=lambda stage: sum(stage.forward.values()) + sum(stage.backward.values()))
    parts = {name: count * (busy.forward[name] + busy.backward[name]) for name in busy.forward}
    rest = {
        "gradients": time.gradients_s,
        "weights": time.weights_s,
        "optimizer": time.optimizer_s,
        "reading": time.read_s,
    }
    waiting = plan.step_s - sum(parts.values()) - sum(rest.values())
    return {**parts, "waiting": max(0.0, waiting), **rest}
