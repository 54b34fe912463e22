"""Seconds of a training step on a machine, by part: work over rate, bytes over bandwidth.

Products: FLOPs / (measured GEMM rate x GEMM efficiency), or the time to read their weights if that is longer.
Element by element: bytes (aeris/planning/elementwise.py) / memory bandwidth. Messages: bytes
(aeris/planning/traffic.py) / (link bandwidth x link efficiency), both links of a rank at once, and a latency.
All-to-alls and shifts hold a stage up; messages between stages take part in the simulated schedule.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

from aeris.config import RunConfig
from aeris.flops import work
from aeris.model.swin import DTYPES, edge
from aeris.parallelize import window_grid
from aeris.planning.elementwise import product_weights, stage_bytes, step_bytes
from aeris.planning.hardware import Hardware
from aeris.planning.traffic import (
    Traffic,
    destinations,
    kinds_of,
    microbatch_traffic,
    microbatches,
    passes,
    tokens_of_rank,
    traffic,
    units_of_stage,
    weight_bytes,
)
from aeris.reading import read_bytes
from aeris.restore import channel_counts
from swipe.mesh import ParallelDims
from swipe.schedule import SCHEDULES, Timeline, simulate

PARTS = ("gemm", "attention", "elementwise", "all_to_all", "shift")
"""Parts of a pass through a stage."""
IN_BACKWARD = 2.5
"""Fused attention, backward over forward: five products for two, as the scores are made again."""
SHORT = 3
"""A long schedule is simulated over so many times its stages: from then on every microbatch takes as long."""
OPTIMIZER_BYTES = 4 + 16 + 12 + 12
"""Per parameter: norm reads its gradient; AdamW reads it, the weight and two moments, and writes three; the
average of the weights is read and written, and the weight read."""


@dataclass(frozen=True)
class Practice:
    """What a program does that costs time and is no part of its layout.

    Attributes:
        weight_bytes: of a weight when gathered and of its gradient when reduced; 0: as FSDP2 sends them.
        gathers_on_use: a stage gathers its weights when its first microbatch arrives, so one stage after the
            other; else all do so before the first.
        overlaps: gradients of a block are reduced while the last backward pass goes on.
        exchanges: all-to-alls around attention.
        policy: how stages post messages (`swipe.schedule.lower`); "" as in the run's `parallel.p2p`.
        gradient_bytes: of an accumulated gradient.
        through_host: messages between stages are copied to the host and from it, in the queue of the passes.
    """

    weight_bytes: int = 0
    gathers_on_use: bool = False
    overlaps: bool = True
    exchanges: int = 2
    policy: str = ""
    gradient_bytes: int = 4
    through_host: bool = False


OURS = Practice()
PUBLISHED = Practice(2, False, False, 4, "async", 2, True)
"""The authors' benchmark: bf16 weights and gradients in one flat buffer a stage, reduced after the last
backward pass and gathered after the optimizer; q, k and v apart; receives posted early, on the host."""


@dataclass(frozen=True)
class StageTime:
    """Seconds of one microbatch on a stage, by `PARTS`."""

    forward: dict[str, float]
    backward: dict[str, float]

    @property
    def forward_s(self) -> float:
        """Seconds of a forward pass."""
        return sum(self.forward.values())

    @property
    def backward_s(self) -> float:
        """Seconds of a backward pass, with what is computed again."""
        return sum(self.backward.values())


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step, of the slowest ranks.

    Attributes:
        stages: of one microbatch, for every stage.
        message_s: of a message between stages.
        microbatches: of a step on one replica.
        schedule: name of the order of passes.
        policy: how stages post messages.
        pipeline_s: from the first forward pass to the end of the last backward pass.
        period_s: by how much one microbatch more lengthens it, if there are many; 0 if there is one.
        bubble: idle share of the stages in that time, short stages included.
        weights_s: gathering weights, and casting them.
        gradients_s: reducing gradients, after the last backward pass.
        optimizer_s: norm, AdamW, average of the weights.
        read_s: reading samples for longer than all this takes.
    """

    stages: tuple[StageTime, ...]
    message_s: float
    microbatches: int
    schedule: str
    policy: str
    pipeline_s: float
    period_s: float
    bubble: float
    weights_s: float
    gradients_s: float
    optimizer_s: float
    read_s: float

    @property
    def step_s(self) -> float:
        """Seconds of the whole step."""
        return self.pipeline_s + self.weights_s + self.gradients_s + self.optimizer_s + self.read_s

    @cached_property
    def timeline(self) -> Timeline:
        """The whole pipeline on a clock; takes about a second for 50,000 passes."""
        return _simulate(self.stages, self.message_s, self.microbatches, self.schedule, self.policy)


def step_time(
    config: RunConfig, channels: int, dims: ParallelDims, hardware: Hardware, practice: Practice = OURS
) -> StepTime:
    """Say how long a training step takes.

    All stages gather their weights before the first pass. Gradients are reduced after the last one, those of
    all blocks but one, as far as there is time, while it goes on. Reading goes on all the time.

    Args:
        channels: of the data.
        dims: degrees of parallelism, which suit the model and the batch (`aeris.parallelize.limits`).
        hardware: the machine.
        practice: of the program; by default ours.
    """
    count, parallel, numbers = microbatches(config, dims), config.parallel, range(dims.pp)
    policy = practice.policy or ("batched" if parallel.p2p == "auto" else parallel.p2p)
    stages = tuple(stage_time(config, channels, dims, hardware, n, practice) for n in numbers)
    message = message_time(config, channels, dims, hardware)
    enough = min(count, SHORT * dims.pp)
    short = _simulate(stages, message, enough, parallel.schedule, policy)
    fewer = max(1, enough - dims.pp)
    less = _simulate(stages, message, fewer, parallel.schedule, policy)
    period = (short.ticks - less.ticks) / max(1, enough - fewer)
    pipeline = short.ticks + (count - enough) * period
    busy = count * sum(stage.forward_s + stage.backward_s for stage in stages)
    gathers, reductions = zip(
        *(_weight_times(config, channels, dims, hardware, n, practice) for n in numbers)
    )
    units = [units_of_stage(config, channels, dims, n) for n in numbers]
    casts = max(step_bytes(config, channels, dims, of) for of in units) / hardware.memory_bytes_per_s
    weights = (sum(gathers) if practice.gathers_on_use else max(gathers)) + casts
    late = max(_late(short, n, stages[n], reductions[n], len(units[n]), practice) for n in numbers)
    optimizer = max(_optimizer_time(config, channels, dims, hardware, of) for of in units)
    reading = step_read_bytes(config, channels, dims) / hardware.read_bytes_per_s
    return StepTime(
        stages=stages,
        message_s=message,
        microbatches=count,
        schedule=parallel.schedule,
        policy=policy,
        pipeline_s=pipeline,
        period_s=period,
        bubble=max(0.0, 1 - busy / (dims.pp * pipeline)),
        weights_s=weights,
        gradients_s=late,
        optimizer_s=optimizer,
        read_s=max(0.0, reading - pipeline - weights - late - optimizer),
    )


def stage_time(
    config: RunConfig,
    channels: int,
    dims: ParallelDims,
    hardware: Hardware,
    stage: int,
    practice: Practice = OURS,
) -> StageTime:
    """Say how long one microbatch takes on a stage; arguments as of `step_time`."""
    model = config.model
    units = units_of_stage(config, channels, dims, stage)
    products = _products(config, channels, dims, hardware, units)
    attention = _attention(config, channels, dims, hardware, units)
    moved = stage_bytes(config, channels, dims, units, practice.gradient_bytes)
    sent = _slowest(config, channels, dims, hardware, stage)
    blocks = sum(kind == "layer" for kind in kinds_of(model, units)) * model.blocks
    exchanges = blocks * passes(config) * practice.exchanges
    exchange = transfer_time(sent, "all-to-all", hardware, exchanges) / passes(config)
    shifts = 2 * sum(edge(unit, model.layers) != 0 for unit in units[1:])
    shift = transfer_time(sent, "shift", hardware, shifts) / 2
    copies = 0.0
    if practice.through_host:  # as many leave as arrive
        copies = sent.total["pipeline"] / hardware.host_bytes_per_s
    found = []
    for way in (0, 1):
        elementwise = moved[way] / hardware.memory_bytes_per_s + copies
        again = passes(config) - 1 if way else 1
        found.append(dict(zip(PARTS, (products[way], attention[way], elementwise, again * exchange, shift))))
    return StageTime(*found)


def _products(
    config: RunConfig, channels: int, dims: ParallelDims, hardware: Hardware, units: range
) -> tuple[float, float]:
    """Return seconds of matrix products with tokens, forward and backward."""
    model, share = config.model, config.train.microbatch / dims.places
    flops = work(model, *channel_counts(channels), units)
    exact = hardware.fp32_flops_per_s * hardware.gemm_efficiency
    layers = sum(kind == "layer" for kind in kinds_of(model, units))
    size = layers * product_weights(model, channels) * DTYPES[model.precision].itemsize
    reading = size / hardware.memory_bytes_per_s
    found = []
    for way in (0, 1):
        names = ("attention_projections", "mlp")
        inside = max(sum(flops[n][way] for n in names) * share / rate(config, hardware), (1 + way) * reading)
        ends = sum(flops[name][way] for name in ("embedding", "head")) * share / exact
        found.append(inside + ends)
    again = found[0] if flops["mlp"].recomputed else 0.0
    return found[0], found[1] + again


def _attention(
    config: RunConfig, channels: int, dims: ParallelDims, hardware: Hardware, units: range
) -> tuple[float, float]:
    """Return seconds of attention inside windows, forward and backward."""
    flops = work(config.model, *channel_counts(channels), units)["attention_windows"]
    share = config.train.microbatch / dims.places / rate(config, hardware)
    return flops.forward * share, (IN_BACKWARD * flops.forward + flops.recomputed) * share


def rate(config: RunConfig, hardware: Hardware) -> float:
    """Return the FLOP/s of the products in blocks."""
    half = config.model.precision == "bf16"
    return (hardware.gemm_flops_per_s if half else hardware.fp32_flops_per_s) * hardware.gemm_efficiency


def transfer_time(sent: Traffic, kind: str, hardware: Hardware, messages: int) -> float:
    """Return seconds of what is sent of a kind: both links at once, and a latency for each message."""
    inside, between = sent.inside[kind], sent.between[kind]
    if not inside + between:
        return 0.0
    links = inside / hardware.inside_bytes_per_s, between / hardware.between_bytes_per_s
    latency = hardware.between_latency_s if between else hardware.inside_latency_s
    return max(links) / hardware.link_efficiency + messages * latency


def _slowest(config: RunConfig, channels: int, dims: ParallelDims, hardware: Hardware, stage: int) -> Traffic:
    """Return what the rank of a stage sends for a microbatch whose all-to-alls take longest.

    Where nodes are no multiple of sp, some groups of sp lie across nodes; their pattern repeats.
    """
    devices = hardware.devices_per_node
    some = range(0, min(dims.places, devices * dims.sp), dims.sp) if devices % dims.sp else [0]
    ranks = [dims.rank_at(0, stage, place) for place in some]
    found = [microbatch_traffic(config, channels, dims, rank, devices) for rank in ranks]
    return max(found, key=lambda sent: transfer_time(sent, "all-to-all", hardware, 0))


def message_time(config: RunConfig, channels: int, dims: ParallelDims, hardware: Hardware) -> float:
    """Return seconds of a message between stages, where it takes longest; 0 with one stage."""
    model, devices = config.model, hardware.devices_per_node
    size = tokens_of_rank(config, dims) * model.width * DTYPES[model.residual].itemsize
    slowest = 0.0
    for stage in range(1, dims.pp):
        sign = edge(units_of_stage(config, channels, dims, stage).start, model.layers)
        rank = dims.rank_at(0, stage - 1, 0)
        parts = [
            (size * share, dims.rank_at(0, stage, place) // devices == rank // devices)
            for place, share in destinations(window_grid(model), dims, 0, sign)
        ]
        inside, between = (sum(part for part, near in parts if near is here) for here in (True, False))
        sent = Traffic({"pipeline": int(inside)}, {"pipeline": int(between)})
        slowest = max(slowest, transfer_time(sent, "pipeline", hardware, 1))
    return slowest


def _simulate(
    stages: Sequence[StageTime], message_s: float, count: int, schedule: str, policy: str
) -> Timeline:
    times = tuple(stage.forward_s for stage in stages), tuple(stage.backward_s for stage in stages)
    return _cached(times, message_s, count, schedule, policy)


@lru_cache(64)
def _cached(
    times: tuple[tuple[float, ...], tuple[float, ...]],
    message_s: float,
    count: int,
    schedule: str,
    policy: str,
) -> Timeline:
    """Layouts that differ in dp alone share it."""
    return simulate(SCHEDULES[schedule](len(times[0]), count), policy, *times, message_s)


def _late(
    short: Timeline, stage: int, time: StageTime, reduction: float, parts: int, practice: Practice
) -> float:
    """Return for how long a stage reduces gradients after the pipeline has ended."""
    end = max(span.end for span in short.spans if span.stage == stage)
    exposed = reduction
    if practice.overlaps:
        exposed = max(reduction / parts, reduction - time.backward_s * (parts - 1) / parts)
    return max(0.0, end + exposed - short.ticks)


def _weight_times(
    config: RunConfig, channels: int, dims: ParallelDims, hardware: Hardware, stage: int, practice: Practice
) -> tuple[float, float]:
    """Return seconds to gather the weights of a stage and to reduce its gradients, without overlap."""
    ranks = dims.dp * dims.places
    if ranks == 1:
        return 0.0, 0.0
    units = units_of_stage(config, channels, dims, stage)
    sent = traffic(config, channels, dims, dims.rank_at(0, stage, 0), hardware.devices_per_node)
    shares = config.parallel.shard or ranks
    rounds = len(units) * config.model.blocks * math.ceil(math.log2(ranks))
    found = []
    for kind in ("weights", "gradients"):
        ratio = 1.0
        if practice.weight_bytes:
            ratio = practice.weight_bytes * weight_bytes(config, channels, units) / 4
            ratio /= weight_bytes(config, channels, units, shares, kind == "weights")
        seconds = transfer_time(sent, kind, hardware, 0)
        found.append(ratio * seconds + rounds * hardware.between_latency_s)
    return found[0], found[1]


def _optimizer_time(
    config: RunConfig, channels: int, dims: ParallelDims, hardware: Hardware, units: range
) -> float:
    """Return seconds of norm, update and average of this rank's share of the weights."""
    shares = config.parallel.shard or dims.dp * dims.places
    numbers = weight_bytes(config, channels, units, shares) / shares / 4
    if config.optimizer.offload != "none":
        return 8 * numbers / hardware.host_bytes_per_s
    return numbers * OPTIMIZER_BYTES / hardware.memory_bytes_per_s


def step_read_bytes(config: RunConfig, channels: int, dims: ParallelDims) -> int:
    """Bytes that all readers together read for a step."""
    return read_bytes(config, channels, dims).total
