"""Run the microbatches of one optimizer step through the stages of a model, by a schedule table.

One process that holds the whole model is a pipeline of one stage: its table is F0 B0 F1 B1 ..., and training
calls the same `step`. The executor knows nothing of 1F1B: it takes a stage's row of the table and does what
stands there. At most as many microbatches are alive as the table has in flight, and so many receive buffers.

Shapes: B batch, N windows, T tokens per window, D width.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from swipe.collectives import Message, Pending, Policy, exchange, waiting
from swipe.edge import Arriving, Edge
from swipe.groups import Groups, make_pairs
from swipe.layout import WindowLayout
from swipe.schedule import SCHEDULES, Action, Step, Transfer, lower
from swipe.sharding import drop_gathered, gather_ahead, last_backward
from swipe.stopwatch import Stopwatch


class Microbatch(NamedTuple):
    """What one forward and backward pass works on. A stage looks only at the parts it needs."""

    x: Tensor | None
    """Input of the first stage [B, N, T, C]; other stages get theirs from the stage before."""
    conditions: tuple[Tensor, ...] = ()
    """Further inputs of the model on every stage, [B, ...]: made on each, never sent."""
    target: Any = None
    """What the last stage's output is judged by."""


class Pipeline:
    """One stage of a model, and its links to the stages before and after.

    Args:
        model: this stage, called as `model(x, *conditions)`.
        loss: on the last stage: maps (output, target) to the mean loss of the microbatch, a scalar.
        stage: number of this stage.
        stages: number of stages.
        before: link to the stage before; None on the first.
        after: link to the stage after; None on the last.
        schedule: a name in `SCHEDULES`.
        policy: how messages between stages are posted.
        pairs: for the policy "parity": a process group of two ranks for every peer.
        finish: called when all passes of a step are done or one has failed, before the weights change.

    Attributes:
        stopwatch: if it is set, measures the passes of training, without waiting for neighbours. Whoever sets
            it takes its time after every step.
        has_run: whether a step or an evaluation has come to its end.
        peak_in_flight: most microbatches whose activations were alive at once, in the last step.
        peak_buffers: most tensors being received at once, in the last step.

    Raises:
        ValueError: unknown schedule, or one that needs a split backward pass.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[Tensor, Any], Tensor],
        *,
        stage: int = 0,
        stages: int = 1,
        before: Edge | None = None,
        after: Edge | None = None,
        schedule: str = "1f1b",
        policy: Policy = "async",
        pairs: dict[int, Any] | None = None,
        finish: Callable[[], None] = lambda: None,
    ) -> None:
        runs = [
            name for name, table in SCHEDULES.items() if not {a.kind for a in table(1, 1)[0]} & {"I", "W"}
        ]
        if schedule not in runs:
            raise ValueError(f"schedule {schedule!r} cannot be run: choose one of {', '.join(runs)}")
        self.model, self.loss, self.schedule = model, loss, schedule
        self.stage, self.stages = stage, stages
        self.before, self.after, self.policy, self.pairs = before, after, policy, pairs
        self.finish = finish
        self.stopwatch: Stopwatch | None = None
        self.has_run = False
        self.peak_in_flight = self.peak_buffers = 0
        # Shape and type of what is sent or received, by the shapes of the conditions (all stages have those).
        self.sent: dict[Any, tuple[tuple[int, ...], torch.dtype]] = {}
        self.received: dict[Any, tuple[tuple[int, ...], torch.dtype]] = {}

    @classmethod
    def linked(
        cls,
        model: nn.Module,
        loss: Callable[[Tensor, Any], Tensor],
        layout: WindowLayout,
        groups: Groups,
        shifts: tuple[int, int] = (0, 0),
        schedule: str = "1f1b",
        finish: Callable[[], None] = lambda: None,
    ) -> Pipeline:
        """Make this rank's stage and link it to its neighbours; a collective call over all ranks.

        Args:
            shifts: of the tiling (+1, 0, -1) on the edges from the stage before and to the stage after.
            finish: see `Pipeline`.
        """
        stage, stages = groups.dims.coordinate(groups.rank).pp, groups.dims.pp
        before, after = None, None
        if stage > 0:
            before = Edge(layout, shifts[0], groups.ranks_of_stage(stage - 1), after=False)
        if stage < stages - 1:
            after = Edge(layout, shifts[1], groups.ranks_of_stage(stage + 1), after=True)
        pairs = None
        if groups.policy == "parity":  # first across the edges after even stages, then after odd ones
            nobody = [None] * len(layout.shard.quadrants)
            rounds = (after, before) if stage % 2 == 0 else (before, after)
            slots = [peer for edge in rounds for peer in (edge.slots() if edge else nobody)]
            pairs = make_pairs(groups.rank, slots, groups.timeout_s)
        return cls(
            model,
            loss,
            stage=stage,
            stages=stages,
            before=before,
            after=after,
            schedule=schedule,
            policy=groups.policy,
            pairs=pairs,
            finish=finish,
        )

    def step(self, microbatches: Iterable[Microbatch], count: int) -> Tensor:
        """Accumulate in `.grad` the gradient of the mean loss over `count` microbatches of equal size.

        Microbatches are taken from the iterable one by one, each before its input is waited for.

        Returns:
            The detached losses [count] on the last stage, an empty tensor on the others.

        Raises:
            ValueError: the iterable ends early.
            CommunicationError: another rank died, is stuck, or was built differently.
        """
        run = _Run(self, iter(microbatches), count)
        run.through(_row(self.schedule, self.stages, count, self.policy, self.stage))
        return torch.stack(run.losses) if run.losses else torch.empty(0, device=run.device)

    @torch.no_grad()
    def evaluate(self, microbatches: Iterable[Microbatch], count: int) -> list[Tensor]:
        """Run forward passes only; return the outputs on the last stage, nothing on the others."""
        steps: list[Step] = []
        for action in (Action("F", m) for m in range(count)):
            steps += [Transfer((), (action,))] if self.before else []
            steps += [action]
            steps += [Transfer((action,), ())] if self.after else []
        run = _Run(self, iter(microbatches), count, training=False)
        run.through(steps)
        drop_gathered(self.model)
        return run.outputs


@cache
def _row(schedule: str, stages: int, count: int, policy: str, stage: int) -> tuple[Step, ...]:
    """Make a stage's row of a table with its messages, once for all steps."""
    return tuple(lower(SCHEDULES[schedule](stages, count), policy)[stage])


class _Flying(NamedTuple):
    """What the backward pass of a microbatch needs."""

    x: Tensor
    edge: Any
    weight: Tensor | None


class _Run:
    """The state of one pass through a row of a table."""

    def __init__(
        self, pipeline: Pipeline, source: Iterator[Microbatch], count: int, training: bool = True
    ) -> None:
        self.pipeline, self.source, self.count, self.training = pipeline, source, count, training
        self.microbatches: dict[int, Microbatch] = {}
        self.taken = 0
        self.backwards_left = count
        self.arriving: dict[Action, Arriving] = {}
        self.results: dict[Action, Tensor] = {}
        self.flying: dict[int, _Flying] = {}
        self.sending: deque[Pending] = deque()
        self.losses: list[Tensor] = []
        self.outputs: list[Tensor] = []
        self.last_sent: Any = None
        self.device = next(pipeline.model.parameters()).device
        pipeline.peak_in_flight = pipeline.peak_buffers = 0

    def through(self, steps: Sequence[Step]) -> None:
        """Do the steps, and whatever happens finish the pipeline's."""
        if self.pipeline.has_run:  # torch's FSDP2 sets itself up in the first pass
            gather_ahead(self.pipeline.model)
        try:
            self.do(steps)
        finally:
            self.pipeline.finish()
        self.pipeline.has_run = True

    def do(self, steps: Sequence[Step]) -> None:
        """Do the steps."""
        kinds = {"F": self.forward, "B": self.backward}
        words = {"F": "forward", "B": "backward"}
        for step in steps:
            if isinstance(step, Transfer):
                self.transfer(step)
            else:
                what = f"{words[step.kind]} pass of microbatch {step.microbatch}, stage {self.pipeline.stage}"
                with waiting(f"{what} (weights or gradients)", computes=True):
                    kinds[step.kind](step)
        while self.sending:
            self.sending.popleft().wait()

    def timed(self, waits: bool) -> AbstractContextManager[None]:
        """Measure a pass. A single microbatch is measured with its waiting for weights: there is no other."""
        stopwatch = self.pipeline.stopwatch
        if stopwatch is None or not self.training:
            return nullcontext()
        return stopwatch.computing(waits and self.count > 1)

    def microbatch(self, number: int) -> Microbatch:
        """Take microbatches from the source up to this one, in order."""
        while self.taken <= number:
            microbatch = next(self.source, None)
            if microbatch is None:
                raise ValueError(f"a step of {self.count} microbatches got only {self.taken}")
            self.microbatches[self.taken] = microbatch
            self.taken += 1
        return self.microbatches[number]

    def forward(self, action: Action) -> None:
        """Run a forward pass; keep what its backward pass needs."""
        pipeline, number = self.pipeline, action.microbatch
        microbatch = self.microbatch(number)
        x = self.arriving.pop(action).take() if pipeline.before else microbatch.x
        assert x is not None, "the first stage's microbatch has an input"
        if self.training and pipeline.before:
            x.requires_grad_()
        with self.timed(number == 0):  # gathers the weights
            y = pipeline.model(x, *microbatch.conditions)
        if pipeline.after:
            self.results[action] = y.detach()
        else:
            del self.microbatches[number]
            if not self.training:
                self.outputs.append(y)
                return
            loss = pipeline.loss(y, microbatch.target)
            self.losses.append(loss.detach())
            y = loss / self.count
        if self.training:
            # The edge of the graph is enough to go back: the memory of the output is free once it is sent.
            # (Of a view, because torch 2.8 cannot start from a function written in Python.)
            weight = None if pipeline.after else torch.ones_like(y)
            self.flying[number] = _Flying(x, torch.autograd.graph.get_gradient_edge(y.view_as(y)), weight)
            pipeline.peak_in_flight = max(pipeline.peak_in_flight, len(self.flying))

    def backward(self, action: Action) -> None:
        """Run a backward pass; the last one of the step also reduces the gradients."""
        x, edge, weight = self.flying.pop(action.microbatch)
        grad = self.arriving.pop(action).take() if weight is None else weight
        self.backwards_left -= 1
        last = self.backwards_left == 0
        last_backward(self.pipeline.model, last)
        with self.timed(last):  # reduces the gradients
            torch.autograd.backward((edge,), (grad,))
        if self.pipeline.before:
            assert x.grad is not None, "a stage depends on its input"
            self.results[action] = x.grad

    def transfer(self, transfer: Transfer) -> None:
        """Post what leaves and what is to come; arrivals are waited for where they are needed."""
        pipeline = self.pipeline
        sends: list[Message] = []
        for action in transfer.sends:
            edge = self.edge(action.kind == "F")
            tensor = self.results.pop(action)
            if action.kind == "F":
                self.announce(edge, self.microbatches.pop(action.microbatch), tensor)
            sends += edge.outgoing(tensor)
        arriving = [self.expect(action) for action in transfer.receives]
        pipeline.peak_buffers = max(pipeline.peak_buffers, len(self.arriving))
        receives = [message for one in arriving for message in one.messages]
        if pipeline.policy == "async":
            if sends:
                self.sending.append(self.post(sends, []))
            for one in arriving:
                one.pending = self.post([], one.messages)
        else:
            pending = self.post(sends, receives)
            self.sending.append(pending)
            for one in arriving:
                one.pending = pending
        while len(self.sending) > 2 * pipeline.stages:  # those have long been received: this keeps memory low
            self.sending.popleft().wait()

    def edge(self, after: bool) -> Edge:
        """Return the link to the stage after or before."""
        edge = self.pipeline.after if after else self.pipeline.before
        assert edge is not None, "a table has transfers only where there is a stage"
        return edge

    def expect(self, action: Action) -> Arriving:
        """Make the buffers of what an action needs: of the announced shape, or of what was sent before."""
        pipeline = self.pipeline
        key = signature(self.microbatch(action.microbatch)) if action.kind == "F" else self.last_sent
        known = pipeline.received if action.kind == "F" else pipeline.sent
        edge = self.edge(action.kind != "F")
        if key not in known:
            headers = edge.headers(self.device)
            self.post([], headers).wait()
            known[key] = edge.announced(headers)
        self.arriving[action] = edge.expect(*known[key], self.device)
        return self.arriving[action]

    def announce(self, edge: Edge, microbatch: Microbatch, y: Tensor) -> None:
        """Say once for every kind of batch what is sent, and hold every later one to it."""
        self.last_sent = key = signature(microbatch)
        here = (tuple(y.shape), y.dtype)
        if key not in self.pipeline.sent:
            self.pipeline.sent[key] = here
            self.post(edge.announcement(y), []).wait()
        elif self.pipeline.sent[key] != here:
            raise ValueError(
                f"stage {self.pipeline.stage} made {here}, after {self.pipeline.sent[key]} before"
            )

    def post(self, sends: list[Message], receives: list[Message]) -> Pending:
        """Post messages between stages as the backend wants them."""
        pipeline = self.pipeline
        what = f"pipeline messages of stage {pipeline.stage}"
        first = pipeline.stage % 2 == 0
        return exchange(
            sends, receives, what, policy=pipeline.policy, sends_first=first, pairs=pipeline.pairs
        )


def signature(microbatch: Microbatch) -> Any:
    """Tell kinds of batches apart, alike on all stages: by the shapes of the conditions."""
    return tuple(tuple(condition.shape) for condition in microbatch.conditions)
