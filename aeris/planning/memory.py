"""Bytes on a device in a training step, by part: a stage's row of the schedule walked through, pass by pass.

What a pass allocates is counted by running a unit of the network on meta tensors (activations.py). What FSDP2
gathers and reduces, and what messages hold, is added where the run does it (swipe/sharding.py,
swipe/pipeline.py). A device must hold the fullest moment of the walk.
"""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, replace
from functools import cache
from typing import NamedTuple

import torch

from aeris.config import ModelConfig, RunConfig
from aeris.data.forcing import FORCINGS
from aeris.model.swin import DTYPES, Swin, edge
from aeris.parallelize import cut, window_grid
from aeris.planning.activations import (
    EMBEDDING,
    HEAD,
    LAYER,
    SHIFTED_LAYER,
    Layout,
    Passes,
    Tokens,
    making,
    narrow_parameters,
    one_block,
    passes,
)
from aeris.planning.traffic import microbatches
from aeris.restore import channel_counts
from swipe.mesh import ParallelDims
from swipe.schedule import SCHEDULES, Action, Step, Transfer, lower
from swipe.shift import shift_plan

PARTS = ("weights", "gradients", "optimizer", "ema", "gathered", "casts", "activations", "working")
"""What memory is divided into.

weights      fp32: this rank's part of its stage's
gradients    fp32: of that part
optimizer    fp32: two moments of that part; none with offload
ema          fp32: the average of that part; none with offload
gathered     while a step runs: the stage's whole weights, in bf16 where they are used so, and its whole fp32
             gradients beyond that part
casts        bf16 copies of matrices for a step, where weights are not divided
activations  what autograd keeps of the microbatches in flight
working      messages, samples, and what lives inside the pass that runs
"""
HOST_COPIES = 5
"""With offload the host holds of each parameter: master weight, two moments, average, gradient."""


class Group(NamedTuple):
    """Bytes of parameters that FSDP2 gathers and reduces together."""

    whole: int = 0
    """In the type they are kept in."""
    own: int = 0
    """One rank's part, of the first and largest: the rows of each parameter are divided."""
    gathered: int = 0
    """As they are gathered: rows filled up to a multiple of the ranks; in bf16 if they are used so only."""
    reduced: int = 0
    """As their gradients are reduced: filled up likewise."""

    @property
    def narrow(self) -> bool:
        """Whether they are gathered in a narrower type."""
        return self.gathered < self.reduced

    def plus(self, other: Group) -> Group:
        """Add two groups that travel together."""
        return Group(*(a + b for a, b in zip(self, other)))


class Unit(NamedTuple):
    """One part of a stage: embedding, block or head."""

    group: Group
    """The weights that travel for it alone."""
    rest: Group
    """Those that travel with the rest of other units."""
    casts: int
    """Copies of its weights in the type of the products."""
    passes: Passes


@cache
def groups(model: ModelConfig, channels: tuple[int, int], kind: int, shards: int) -> tuple[Group, Group, int]:
    """Count the parameters of a unit: what travels for it alone, what with the rest, and casts.

    Args:
        channels: input and output channels of the network.
        kind: of unit, as for `passes`.
        shards: ranks they are divided over; 0: they are not.
    """
    with torch.device("meta"):
        unit = Swin(one_block(model), *channels, Layout(Tokens(1, 4)), range(kind, kind + 1))
    size, block = (8 if model.precision == "fp64" else 4), kind in (LAYER, SHIFTED_LAYER)
    narrow, group, rest = set(narrow_parameters(unit)), Group(), Group()
    for p in unit.parameters():
        rows = -(-len(p) // (shards or 1))
        own = rows * p[0].numel() * size
        gathered = own * shards // (size // 2 if p in narrow else 1) if shards else 0
        found = Group(p.numel() * size, own, gathered, own * shards)
        if p in narrow or not (block and narrow):
            group = group.plus(found)
        else:
            rest = rest.plus(found)
    casts = 0 if shards or model.compile else sum(2 * p.numel() for p in narrow)
    return group, rest, casts


@cache
def units(
    model: ModelConfig,
    channels: tuple[int, int],
    microbatch: int,
    dims: ParallelDims,
    stage: int,
    shards: int,
) -> tuple[Unit, ...]:
    """List the parts of a stage in the order of the forward pass."""
    own, found = Tokens.of(model, dims), []
    for number in _cut(model, channels, dims.pp)[stage]:
        if number in (0, model.layers + 1):
            kind, count = (HEAD if number else EMBEDDING), 1
        else:
            separate = number % 2 == 0 and model.poles == "separate"
            kind, count = (SHIFTED_LAYER if separate else LAYER), model.blocks
        tokens = own if kind == SHIFTED_LAYER else own.together
        counted = passes(model, channels, kind, microbatch, tokens, shards > 0)
        found += [Unit(*groups(model, channels, kind, shards), counted)] * count
    return tuple(found)


@cache
def _cut(model: ModelConfig, channels: tuple[int, int], stages: int) -> list[range]:
    return cut(model, *channels, stages)


@cache
def _rows(schedule: str, stages: int, count: int, policy: str) -> list[list[Step]]:
    return lower(SCHEDULES[schedule](stages, count), policy)


@cache
def _parts(config: ModelConfig, dims: ParallelDims, sign: int) -> int:
    """Count the messages in which a tensor arrives over an edge that shifts by `sign`."""
    if sign == 0 or dims.sp % 4 == 0:
        return 1
    return len(shift_plan(window_grid(config), (dims.wp_y, dims.wp_x), dims.sp, 0, sign).receives)


@dataclass
class _Held:
    """Bytes held at one moment of a step, beside what is always there."""

    gradients: int = 0
    gathered: int = 0
    casts: int = 0
    activations: int = 0
    buffers: int = 0

    def total(self) -> int:
        """Add them up."""
        return self.gradients + self.gathered + self.casts + self.activations + self.buffers


class _Walk:
    """One step of a rank of one stage.

    Attributes:
        fullest: the fullest moment so far.
    """

    def __init__(self, config: RunConfig, channels: int, dims: ParallelDims, stage: int) -> None:
        model, self.microbatch, self.dims = config.model, config.train.microbatch, dims
        counts, ranks = channel_counts(channels), dims.dp * dims.places
        self.shards = (config.parallel.shard or ranks) if ranks > 1 else 0
        self.units = units(model, counts, self.microbatch, dims, stage, self.shards)
        self.rest = Group()
        for unit in self.units:
            self.rest = self.rest.plus(unit.rest)
        self.first, self.last, self.stages = stage == 0, stage == dims.pp - 1, dims.pp
        self.now, self.fullest, self.most = _Held(), _Held(), 0
        # On devices, whose memory this is about, messages are posted in batches.
        self.policy = "batched" if config.parallel.p2p == "auto" else config.parallel.p2p
        self.count = microbatches(config, dims)
        self.row = _rows(config.parallel.schedule, dims.pp, self.count, self.policy)[stage]
        tokens = Tokens.of(model, dims)
        self.message = self.microbatch * tokens.total * model.width * DTYPES[model.residual].itemsize
        numbers = _cut(model, counts, dims.pp)[stage]
        self.whole = {  # whether a tensor arrives in one message: forward and back
            "F": _parts(model, dims, edge(numbers.start, model.layers)) == 1,
            "B": _parts(model, dims, -edge(numbers.stop, model.layers)) == 1,
        }
        self.making = [
            making(channels, self.microbatch, tokens.together, first)
            for first, here in ((True, self.first), (False, self.last))
            if here
        ]
        self.sample = 4 * self.microbatch * tokens.total * (2 * channels + len(FORCINGS))
        # Weights of the loss, numbers of the tokens, encoding of the places.
        self.now.buffers = tokens.total * (4 * channels + 8 + 4 * counts[0] * self.first)
        self.targets = 0
        self.holders: Counter[tuple[str, Action]] = Counter()
        self.sending: deque[list[tuple[str, Action]]] = deque()
        self.flying: set[int] = set()
        self.kept = 0  # messages that are counted among the activations
        self.done = 0  # backward passes
        kept = [unit.passes.kept for unit in self.units]
        self.one = sum(kept) + self.units[0].passes.beside  # microbatch in flight
        below = [sum(kept[:number]) for number in range(len(kept))]  # kept by the units before
        # The fullest moments of passes that neither make nor divide anything else.
        self.top_forward = max(b + unit.passes.forward for b, unit in zip(below, self.units))
        self.top_backward = max(b + unit.passes.backward - sum(kept) for b, unit in zip(below, self.units))

    def moment(self, more: int = 0) -> None:
        """Look at a moment at which the pass or the exchange that runs holds `more`."""
        now, messages = self.now, self.message * (len(self.holders) - self.kept)
        if now.total() + more + messages > self.most:
            self.most = now.total() + more + messages
            self.fullest = replace(now, buffers=now.buffers + more + messages)

    def hold(self, key: tuple[str, Action], by: int) -> None:
        """Count one holder of a message more or less."""
        self.holders[key] += by
        if not self.holders[key]:
            del self.holders[key]
            self.kept -= self.is_kept(key)

    def is_kept(self, key: tuple[str, Action]) -> bool:
        """Tell whether a message is counted among the activations, as the input of a microbatch in flight."""
        kind, action = key
        return self.whole["F"] and kind == "got" and action.kind == "F" and action.microbatch in self.flying

    def transfer(self, step: Transfer) -> None:
        """Post messages: what leaves is held until it is known to be gone, on devices what comes as well."""
        sends = [("sent", action) for action in step.sends]
        receives = [("got", action) for action in step.receives]
        for key in receives:
            self.hold(key, 1)
        if self.last:
            for action in step.receives:
                if action.kind == "F":
                    self.make()
        held = {"async": sends, "batched": sends + receives}.get(self.policy, [])
        for key in held:
            self.hold(key, 1)
        for key in sends:  # the result of the pass
            self.hold(key, -1)
        if held or self.policy != "async":
            self.sending.append(held)
        self.moment()
        while len(self.sending) > 2 * self.stages:
            for key in self.sending.popleft():
                self.hold(key, -1)

    def make(self) -> None:
        """Make input or target of a microbatch."""
        self.moment(self.sample + max(made.peak for made in self.making))
        self.targets += sum(made.left for made in self.making)

    def forward(self, action: Action) -> None:
        """Pass forward; the first pass gathers and casts."""
        if self.first:
            self.make()
        else:
            self.moment(0 if self.whole["F"] else self.message)
            self.hold(("got", action), -1)
        if self.flying or self.done:
            self.moment(self.top_forward + self.targets)
        else:
            self.first_forward()
        self.now.activations += self.one
        self.targets = 0
        self.flying.add(action.microbatch)
        self.kept += ("got", action) in self.holders and self.is_kept(("got", action))
        if not self.last:
            self.hold(("sent", action), 1)

    def first_forward(self) -> None:
        """Gather all weights, cast them, and copy each unit's out of the message when it is its turn."""
        now, before = self.now, 0
        narrow = sum(unit.group.own // 2 for unit in self.units if unit.group.narrow)
        now.gathered += self.rest.gathered + sum(unit.group.gathered for unit in self.units)
        self.moment(max(narrow, self.rest.gathered) + self.units[0].passes.entered + self.targets)
        for unit in self.units:
            now.casts += unit.casts
            self.moment(before + unit.passes.entered + unit.group.gathered + self.targets)
            self.moment(before + unit.passes.forward + self.targets)
            before += unit.passes.kept

    def backward(self, action: Action) -> None:
        """Pass backward; the first pass makes gradients, the last one divides them."""
        first, self.done = not self.done, self.done + 1
        last = self.done == self.count and self.shards > 0
        if not self.last:
            self.moment(0 if self.whole["B"] else self.message)
            self.hold(("got", action), -1)
        if first or last:
            self.backward_of_units(first, last)
        else:
            self.moment(self.top_backward)
            self.now.activations -= self.one
        key = "got", Action("F", action.microbatch)
        self.kept -= key in self.holders and self.is_kept(key)
        self.flying.discard(action.microbatch)
        if not self.first:
            self.hold(("sent", action), 1)

    def backward_of_units(self, first: bool, last: bool) -> None:
        """Make or divide gradients of one unit after the other; what is reduced stays till the next."""
        now, message = self.now, 0
        for unit in reversed(self.units):
            # In a narrow type they go straight into the message if there are no others to add them to.
            straight = first and last and unit.group.narrow
            self.moment(message + unit.passes.backward - unit.passes.kept)
            now.activations -= unit.passes.kept
            now.gradients += first * (unit.rest.whole + (0 if straight else unit.group.whole))
            if last:
                message = self.reduce(unit.group, 0 if straight else unit.group.whole)
        if last:
            self.reduce(self.rest, self.rest.whole)
        now.activations -= self.units[0].passes.beside

    def reduce(self, group: Group, whole: int) -> int:
        """Divide gradients, of which there are `whole` bytes; return the size of the message."""
        self.now.gathered -= group.gathered
        self.now.gradients += group.own
        self.moment(group.reduced + (0 if whole else group.gathered))
        self.now.gradients -= whole
        return group.reduced

    def run(self) -> _Held:
        """Take all steps; return the fullest moment."""
        for step in self.row:
            if isinstance(step, Transfer):
                self.transfer(step)
            elif step.kind == "F":
                self.forward(step)
            else:
                self.backward(step)
        return self.fullest


def memory(config: RunConfig, channels: int, dims: ParallelDims, stage: int) -> dict[str, int]:
    """Say what a device of a stage holds at the fullest moment of a training step: bytes by `PARTS`.

    Args:
        config: settings of the run; messages are posted as devices need it unless `parallel.p2p` says.
        channels: of the data.
        dims: the layout.
        stage: number of the pipeline stage.
    """
    walk = _Walk(config, channels, dims, stage)
    held, own = walk.run(), sum(unit.group.own + unit.rest.own for unit in walk.units)
    on_device = config.optimizer.offload == "none"
    gradients = min(own, held.gradients)
    parts = {
        "weights": own,
        "gradients": gradients,
        "optimizer": 2 * own * on_device,
        "ema": own * on_device,
        "gathered": held.gathered + held.gradients - gradients,
        "casts": held.casts,
        "activations": held.activations,
        "working": held.buffers,
    }
    assert tuple(parts) == PARTS
    return parts


def host_memory(config: RunConfig, channels: int, dims: ParallelDims, stage: int) -> int:
    """Say what a rank of a stage holds in host memory with offload, in bytes; 0 without."""
    if config.optimizer.offload == "none":
        return 0
    walk = _Walk(config, channels, dims, stage)
    return HOST_COPIES * sum(unit.group.own + unit.rest.own for unit in walk.units)
