"""The best layouts of a run on a number of devices, and why others are not among them.

Every mesh that suits model and batch is listed with a time no step of it can beat: its matrix products alone,
through its pipeline. They are looked at from the fastest on, memory first, until no other can be among the
best. Of window grids wp_y x wp_x of one size only the squarest is looked at: they cost about the same.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

from aeris.config import ModelConfig, RunConfig
from aeris.flops import unit_flops
from aeris.parallelize import cut, limits
from aeris.planning.estimate import HEADROOM, Plan, estimate, fullest_stage, in_words, shortage
from aeris.planning.hardware import Hardware
from aeris.planning.timing import stage_time
from aeris.planning.traffic import microbatches, tokens_of_rank
from aeris.restore import channel_counts
from swipe.mesh import AXES, ParallelDims

MARGIN = 1.1
"""A layout that needs more than this times the memory by proportion is not looked at more closely."""

TIE = 0.002
"""Layouts within this share of the fastest count as equally fast: the model is not that good."""


@dataclass(frozen=True)
class Candidate:
    """A layout before it is looked at.

    Attributes:
        config: the run, with the batch and microbatch of this layout.
        bound_s: seconds per image that it cannot beat.
    """

    config: RunConfig
    dims: ParallelDims
    bound_s: float


@dataclass(frozen=True)
class Rejected:
    """A layout that does not fit, and why."""

    config: RunConfig
    dims: ParallelDims
    problem: str
    need: float
    """Memory it needs, as a share of what there is."""
    part: str
    """Of what it needs most."""


@dataclass(frozen=True)
class Search:
    """What a search found.

    Attributes:
        plans: the best, fastest first; of those as fast as the first the one that needs least memory.
        rejected: what would have come before the last of them, but does not fit.
        layouts: number of all layouts that suit model, batch and devices.
    """

    plans: tuple[Plan, ...]
    rejected: tuple[Rejected, ...]
    layouts: int


class Planner:
    """Looks at layouts of one run on one machine, each once."""

    def __init__(
        self, config: RunConfig, channels: int, hardware: Hardware, devices: int, headroom: float = HEADROOM
    ) -> None:
        """Take what stays the same.

        Args:
            config: the run; degrees it gives are kept, those at 0 are searched.
            channels: of the data.
            hardware: the machine.
            devices: ranks of the run.
            headroom: share of a device's memory that tensors must leave free.
        """
        self.config, self.channels, self.hardware = config, channels, hardware
        self.devices, self.headroom = devices, headroom
        self.room = hardware.memory_bytes * (1 - headroom)
        self._seen: dict[Candidate, Plan | Rejected] = {}
        self._smallest: dict[tuple[int, bool], Candidate] = {}
        self._held: dict[tuple[int, bool], dict[str, int]] = {}

    def candidates(self, microbatches: Sequence[int] = (), batch_per_replica: int = 0) -> list[Candidate]:
        """List every layout that suits model, batch and devices, the smallest bound first.

        Args:
            microbatches: images of a microbatch to try; empty: every number that divides a replica's batch.
            batch_per_replica: images of a step on each replica, so that the batch grows with dp; 0: the batch
                is the run's.

        Raises:
            ValueError: there is none; names the nearest that do.
        """
        fixed = {axis: getattr(self.config.parallel, axis) for axis in AXES}
        found = []
        for config, dims in _meshes(self.config, self.devices, microbatches, batch_per_replica):
            if all(degree in (0, getattr(dims, axis)) for axis, degree in fixed.items()):
                found.append(Candidate(config, dims, bound_s(config, self.channels, dims, self.hardware)))
        if not found:
            size = self.config.train.microbatch if microbatches else 1  # with which most dp suit
            batch = batch_per_replica * self.devices or self.config.train.batch
            run = with_batch(self.config, batch, size)
            limits(run).choose(self.devices, fixed=fixed)  # says why, and what would work
            sizes = " or ".join(map(str, microbatches)) or "any size"
            shard = self.config.parallel.shard
            divided = f" and weights divided over {shard} ranks" if shard else ""
            raise ValueError(f"no layout of {self.devices:,} devices suits microbatches of {sizes}{divided}")
        same = bool(fixed["wp_y"] or fixed["wp_x"])
        found = sorted(found if same else _squarest(found), key=lambda one: (one.bound_s, str(one.dims)))
        for one in found:
            key = _kind(one)
            if key not in self._smallest or _held(one) < _held(self._smallest[key]):
                self._smallest[key] = one
        return found

    def look(self, candidate: Candidate, limit_s: float = math.inf) -> Plan | Rejected | None:
        """Plan a layout, or say why it does not fit; None if an image takes it longer than `limit_s`."""
        if candidate in self._seen:
            return self._seen[candidate]
        config, dims = candidate.config, candidate.dims
        found: Plan | Rejected | None = self._rough(candidate)
        if found is None:
            if stages_bound_s(config, self.channels, dims, self.hardware) >= limit_s:
                return None
            problem, need = shortage(config, self.channels, dims, self.hardware, self.headroom)
            found = estimate(config, self.channels, dims, self.hardware, self.headroom)
            if problem:
                part = (
                    "host memory"
                    if "host" in problem
                    else _largest(fullest_stage(config, self.channels, dims)[1])
                )
                found = Rejected(config, dims, problem, need, part)
        self._seen[candidate] = found
        return found

    def _rough(self, candidate: Candidate) -> Rejected | None:
        """Reject what is far from fitting, by proportion to the layout of as many stages that holds least.

        Whole weights are the same there, and their parts go by the ranks that divide them: all of a stage
        (devices / pp), or `parallel.shard`.
        """
        key = _kind(candidate)
        small = self._smallest[key]
        if key not in self._held:
            self._held[key] = fullest_stage(small.config, self.channels, small.dims)[1]
        shares = [max(1, one.config.parallel.shard) for one in (small, candidate)]
        ratios = dict.fromkeys(("weights", "gradients", "optimizer", "ema"), shares[0] / shares[1])
        ratios["activations"] = _held(candidate) / _held(small)
        kept = {part: size * ratios.get(part, 1) for part, size in self._held[key].items()}
        if sum(kept.values()) <= MARGIN * self.room:
            return None
        problem = f"needs about {in_words(kept, self.room)}"
        return Rejected(
            candidate.config, candidate.dims, problem, sum(kept.values()) / self.room, _largest(kept)
        )

    def best(self, candidates: Sequence[Candidate], top: int) -> Search:
        """Look at candidates in their order until no other can be among the `top` fastest."""
        plans: list[Plan] = []
        rejected: list[Rejected] = []
        for candidate in candidates:
            limit_s = 1 / plans[top - 1].images_per_s if len(plans) >= top else math.inf
            if candidate.bound_s >= limit_s:
                break
            found = self.look(candidate, limit_s)
            if isinstance(found, Rejected):
                rejected.append(found)
            elif found:
                plans = sorted([*plans, found], key=_rank)
        plans = plans[:top]
        same = [plan for plan in plans if plan.images_per_s >= (1 - TIE) * plans[0].images_per_s]
        same.sort(key=lambda plan: plan.memory_bytes)
        return Search((*same, *plans[len(same) :]), tuple(rejected), len(candidates))

    def neighbours(
        self, best: Plan, candidates: Sequence[Candidate], other: Plan | None = None
    ) -> list[tuple[str, int, Search]]:
        """Find the best layout with another value of an axis: the next on both sides, and that of `other`.

        Returns:
            (axis, value, what was found), also for "wp" (wp_y x wp_x together) and "microbatch".
        """
        found = []
        for name, value_of in VALUES.items():
            here = value_of(best.config, best.dims)
            values = {value_of(one.config, one.dims) for one in candidates}
            near = {max((v for v in values if v < here), default=here)}
            near |= {min((v for v in values if v > here), default=here)}
            near |= {value_of(other.config, other.dims)} & values if other else set()
            for value in sorted(near - {here}):
                some = [one for one in candidates if value_of(one.config, one.dims) == value]
                found.append((name, value, self.best(some, 1)))
        return found


VALUES: dict[str, Callable[[RunConfig, ParallelDims], int]] = {
    "dp": lambda config, dims: dims.dp,
    "wp": lambda config, dims: dims.wp,
    "pp": lambda config, dims: dims.pp,
    "sp": lambda config, dims: dims.sp,
    "microbatch": lambda config, dims: config.train.microbatch,
}
"""What a search varies."""


def bound_s(config: RunConfig, channels: int, dims: ParallelDims, hardware: Hardware) -> float:
    """Return seconds per image that no step can beat: matrix products through the pipeline, nothing else.

    Before a stage can start, a microbatch passes those before it, and goes back through them at the end.
    """
    shares = stage_flops(config.model, channels, dims.pp)
    rate = dims.places * hardware.gemm_flops_per_s * hardware.gemm_efficiency
    count, before, longest = microbatches(config, dims), 0.0, 0.0
    for flops in shares:
        longest = max(longest, before + count * flops)
        before += flops
    return longest * config.train.microbatch / rate / config.train.batch


def stages_bound_s(config: RunConfig, channels: int, dims: ParallelDims, hardware: Hardware) -> float:
    """Return seconds per image that no step can beat, from all that its stages do; takes longer to find."""
    count, before, longest = microbatches(config, dims), 0.0, 0.0
    for stage in range(dims.pp):
        time = stage_time(config, channels, dims, hardware, stage)
        longest = max(longest, before + count * (time.forward_s + time.backward_s))
        before += time.forward_s + time.backward_s
    return longest / config.train.batch


@cache
def stage_flops(model: ModelConfig, channels: int, stages: int) -> tuple[float, ...]:
    """Return FLOPs of a sample on every stage."""
    counts = channel_counts(channels)
    units = unit_flops(model, *counts)
    return tuple(sum(units[unit] for unit in stage) for stage in cut(model, *counts, stages))


def _meshes(
    config: RunConfig, devices: int, microbatches: Sequence[int], batch_per_replica: int
) -> Iterator[tuple[RunConfig, ParallelDims]]:
    """List the meshes of `devices` ranks for every batch and microbatch."""
    if not batch_per_replica:
        for size in microbatches or divisors(config.train.batch):
            if config.train.batch % size == 0:
                yield from _of(with_batch(config, config.train.batch, size), devices)
        return
    for dp in divisors(devices):
        for size in microbatches or divisors(batch_per_replica):
            if batch_per_replica % size == 0:
                for run, dims in _of(with_batch(config, dp * batch_per_replica, size), devices):
                    if dims.dp == dp:
                        yield run, dims


def _of(config: RunConfig, devices: int) -> Iterator[tuple[RunConfig, ParallelDims]]:
    """List the meshes of a batch; weights divided over all ranks of a stage, or over those of a replica."""
    for dims in limits(config).layouts(devices):
        shard = config.parallel.shard
        if shard:
            if dims.dp * dims.places % shard == 0:
                yield config, dims
            continue
        yield config, dims
        if dims.dp > 1 and dims.places > 1:
            parallel = dataclasses.replace(config.parallel, shard=dims.places)
            yield dataclasses.replace(config, parallel=parallel), dims


def _squarest(candidates: Iterable[Candidate]) -> list[Candidate]:
    """Keep one of the layouts that differ in the shape of the window grid only."""
    found: dict[tuple[int, ...], Candidate] = {}
    for one in candidates:
        dims, train = one.dims, one.config.train
        shard = one.config.parallel.shard
        key = (train.batch, train.microbatch, dims.dp, dims.wp, dims.pp, dims.sp, shard)
        if key not in found or _long_side(dims) < _long_side(found[key].dims):
            found[key] = one
    return list(found.values())


def _long_side(dims: ParallelDims) -> tuple[int, int]:
    return max(dims.wp_y, dims.wp_x), -dims.wp_x


def _kind(candidate: Candidate) -> tuple[int, bool]:
    """Name what layouts have in common whose stages hold the same weights."""
    return candidate.dims.pp, candidate.config.parallel.shard > 0


def _held(candidate: Candidate) -> int:
    """Return tokens in flight on the first stage: what activations grow with."""
    config, dims = candidate.config, candidate.dims
    count = microbatches(config, dims)
    flying = count if config.parallel.schedule == "gpipe" else min(count, dims.pp)
    return flying * tokens_of_rank(config, dims)


def _largest(kept: Mapping[str, float]) -> str:
    return max(kept, key=lambda part: kept[part])


def _rank(plan: Plan) -> tuple[float, float]:
    return -plan.images_per_s, plan.memory_bytes


def with_batch(config: RunConfig, batch: int, microbatch: int) -> RunConfig:
    """Return the run with another batch and microbatch."""
    train = dataclasses.replace(config.train, batch=batch, microbatch=microbatch)
    return dataclasses.replace(config, train=train)


def divisors(number: int) -> list[int]:
    """List the divisors of a number, the smallest first."""
    return [n for n in range(1, number + 1) if number % n == 0]
