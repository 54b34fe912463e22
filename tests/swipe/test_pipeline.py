"""The pipeline on many ranks against one process and against torch's own schedules, and its memory.

Stages are one layer each, on tokens of an image that every rank can make. Runs with one rank come first.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from itertools import product
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from torch.nn.functional import mse_loss

from swipe.collectives import Message, Pending, byte_log, exchange
from swipe.groups import make_groups
from swipe.layout import WindowLayout
from swipe.mesh import ParallelDims
from swipe.pipeline import Microbatch, Pipeline
from swipe.schedule import POLICIES
from tests.harness import run_distributed
from tests.swipe.meshes import GRID, WIDTH, Stage, draw, linked, rolled

# One stage


def test_microbatches_accumulate_the_mean_gradient() -> None:
    """Four microbatches of two give the gradient of the mean over eight, and the losses."""
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    x, y = torch.randn(8, 3).double(), torch.randn(8, 2).double()
    mse_loss(model(x), y).backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    pipeline = Pipeline(model, mse_loss)
    losses = pipeline.step((Microbatch(x[i : i + 2], (), y[i : i + 2]) for i in range(0, 8, 2)), 4)
    for p, grad in zip(model.parameters(), expected):
        torch.testing.assert_close(p.grad, grad, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(losses.mean(), mse_loss(model(x), y).detach())
    assert not losses.requires_grad and losses.shape == (4,)
    outputs = pipeline.evaluate((Microbatch(x[i : i + 2]) for i in range(0, 8, 2)), 4)
    torch.testing.assert_close(torch.cat(outputs), model(x).detach())
    assert not outputs[0].requires_grad and pipeline.peak_buffers == 0


def test_microbatches_are_taken_when_they_are_needed() -> None:
    """With one stage each is read after the backward pass of the one before it, and not one too many."""
    model, seen = nn.Linear(2, 2), []

    def microbatches() -> Iterator[Microbatch]:
        while True:
            seen.append(None if model.weight.grad is None else model.weight.grad.clone())
            yield Microbatch(torch.ones(1, 2), (), torch.zeros(1, 2))

    Pipeline(model, mse_loss).step(microbatches(), 3)
    assert seen[0] is None and len(seen) == 3
    torch.testing.assert_close(seen[2], 2 * seen[1])
    torch.testing.assert_close(model.weight.grad, 3 * seen[1])


def test_too_few_microbatches_are_refused() -> None:
    """A loader that ends early does not silently change the mean."""
    with pytest.raises(ValueError, match="3 microbatches got only 1"):
        Pipeline(nn.Linear(2, 2), mse_loss).step([Microbatch(torch.ones(1, 2), (), torch.ones(1, 2))], 3)


@pytest.mark.parametrize("schedule", ["zero-bubble", "2f2b"])
def test_schedules_that_cannot_be_run_are_refused(schedule: str) -> None:
    """Unknown ones, and one that needs a backward pass in two parts."""
    with pytest.raises(ValueError, match=f"schedule '{schedule}' cannot be run: choose one of gpipe, 1f1b"):
        Pipeline(nn.Linear(2, 2), mse_loss, schedule=schedule)


# Many ranks against one process and against torch


class Case(NamedTuple):
    """A mesh, the shift on each edge between stages, and the steps: (microbatches, samples of each)."""

    dims: ParallelDims
    shifts: tuple[int, ...]
    steps: tuple[tuple[int, int], ...]

    def __str__(self) -> str:
        return f"{self.dims}, shifts {self.shifts}"

    @property
    def bare(self) -> bool:
        """Whether torch can run it: one rank per stage and no shift."""
        return self.dims.places == 1 and not any(self.shifts)

    @property
    def runs(self) -> list[tuple[str, str]]:
        """Schedules and policies: all on bare pipelines, most on others."""
        runs = product(("1f1b", "gpipe"), POLICIES)
        return [run for run in runs if self.bare or run[0] == "1f1b" or run[1] == "batched"]


FEW, MANY = ((5, 2), (1, 1)), ((1, 1), (4, 2), (7, 1), (2, 2))
CASES = [
    Case(ParallelDims(pp=2), (0,), MANY),
    Case(ParallelDims(pp=2), (1,), FEW),
    Case(ParallelDims(pp=3), (0, 0), MANY),
    Case(ParallelDims(pp=4), (0, 0, 0), MANY),
    Case(ParallelDims(pp=4), (0, 1, -1), FEW),
    Case(ParallelDims(pp=2, wp_x=2), (-1,), FEW),
    Case(ParallelDims(pp=2, wp_y=2, wp_x=2), (1,), FEW),
    Case(ParallelDims(pp=2, wp_y=2, sp=2), (-1,), FEW),
    Case(ParallelDims(pp=4, sp=2), (0, 1, -1), FEW),
    Case(ParallelDims(pp=3, wp_y=2, wp_x=2), (1, -1), FEW),
    Case(ParallelDims(pp=3, sp=4), (0, 1), FEW),
    Case(ParallelDims(pp=4, wp_y=2, sp=2), (0, 1, -1), FEW),
]


def recorded(posted: list[tuple[str, int, int]]) -> Any:
    """Make an `exchange` that also says what was posted: "send" or "receive", peer, bytes."""

    def post(sends: Sequence[Message], receives: Sequence[Message], *args: Any, **options: Any) -> Pending:
        posted.extend(("send", message.rank, message.tensor.nbytes) for message in sends)
        posted.extend(("receive", message.rank, message.tensor.nbytes) for message in receives)
        return exchange(sends, receives, *args, **options)

    return post


def with_swipe(case: Case) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """Run the steps of a case with every schedule and policy."""
    groups = make_groups(case.dims, dist.get_rank(), torch.device("cpu"))
    layout, stage = WindowLayout.of(GRID, groups), case.dims.coordinate(groups.rank).pp
    out = {}

    def read(count: int, samples: int) -> Iterator[Microbatch]:
        for x, target, condition in (draw(m, samples) for m in range(count)):
            tokens = layout.to_windows(x) if stage == 0 else None
            yield Microbatch(tokens, (condition,), layout.to_windows(rolled(target, GRID, sum(case.shifts))))

    for schedule, policy in case.runs:
        model = Stage(stage, case.dims.pp)
        pipeline = linked(model, GRID, replace(groups, policy=policy), case.shifts, schedule=schedule)
        out[schedule, policy] = steps = []
        posted: list[tuple[str, int, int]] = []
        for count, samples in case.steps:
            model.zero_grad()
            model.peak_alive = 0
            with byte_log() as log, mock.patch("swipe.pipeline.exchange", recorded(posted)):
                losses = pipeline.step(read(count, samples), count)
            grads = [p.grad.clone() for p in model.parameters()]
            flying = pipeline.peak_in_flight, model.peak_alive, model.alive
            outputs = pipeline.evaluate(read(count, samples), count)
            sent = sum(entry.bytes for entry in log), sum(entry.peers for entry in log)
            steps.append({"losses": losses, "grads": grads, "flying": flying, "sent": sent, "posted": posted})
            steps[-1]["outputs"] = [mse_loss(y, b.target) for y, b in zip(outputs, read(count, samples))]
    return out


def with_torch(case: Case) -> dict[str, list[dict[str, Any]]]:
    """Run with torch.distributed.pipelining the steps that have no fewer microbatches than stages."""
    rank, stages = dist.get_rank(), case.dims.pp
    out: dict[str, list[dict[str, Any]]] = {"gpipe": [], "1f1b": []}
    for name, schedule in {"gpipe": ScheduleGPipe, "1f1b": Schedule1F1B}.items():
        for count, samples in case.steps:
            if count < stages:
                continue
            model = Stage(rank, stages)
            batch = [torch.cat(parts) for parts in zip(*(draw(m, samples) for m in range(count)))]
            x, target, condition = batch
            stage = PipelineStage(model, rank, stages, torch.device("cpu"))
            losses: list[Tensor] = []
            run = schedule(stage, count, loss_fn=mse_loss)
            tokens = [y.permute(0, 2, 3, 1) for y in (x, target)]
            run.step(*tokens[: rank == 0], target=tokens[1], losses=losses, condition=condition)
            out[name].append({"losses": losses, "grads": [p.grad for p in model.parameters()]})
    return out


def on_one_process(case: Case, count: int, samples: int) -> tuple[Tensor, list[list[Tensor]]]:
    """Run the whole model on whole images: losses, and gradients by stage."""
    models = [Stage(stage, case.dims.pp) for stage in range(case.dims.pp)]
    losses = []
    for m in range(count):
        x, target, condition = draw(m, samples)
        for model, shift in zip(models, (*case.shifts, 0)):
            x = rolled(model(x.movedim(1, -1), condition).movedim(-1, 1), GRID, shift)
        losses.append(mse_loss(x, rolled(target, GRID, sum(case.shifts))))
    total = torch.stack(losses)
    total.mean().backward()
    return total.detach(), [[p.grad for p in model.parameters()] for model in models]


def run_case(cases: Sequence[Case]) -> list[tuple[Any, Any]]:
    """Run cases; torch's schedules only on bare pipelines."""
    return [(with_swipe(case), with_torch(case) if case.bare else None) for case in cases]


@cache
def ran(world: int) -> list[list[tuple[Any, Any]]]:
    """Run all cases of a number of ranks at once; results by rank, then by case."""
    return run_distributed(run_case, world, [case for case in CASES if case.dims.world == world])


def results(case: Case) -> list[tuple[Any, Any]]:
    """The results of a case, by rank."""
    number = [other for other in CASES if other.dims.world == case.dims.world].index(case)
    return [by_case[number] for by_case in ran(case.dims.world)]


def by_stage(case: Case) -> list[list[int]]:
    """The ranks of every stage."""
    dims = case.dims
    return [[dims.rank_at(0, stage, place) for place in range(dims.places)] for stage in range(dims.pp)]


def same(ours: Any, theirs: Any) -> None:
    """Compare in fp64, where only sums in another order differ."""
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_schedule_and_policy_equals_one_process(case: Case) -> None:
    """Losses, every weight's gradient and the outputs of evaluation, step after step.

    Batches change between steps, and some have fewer microbatches than there are stages.
    """
    ranks, stages = results(case), by_stage(case)
    for number, (count, samples) in enumerate(case.steps):
        losses, grads = on_one_process(case, count, samples)
        for run in case.runs:
            step = [ours[run][number] for ours, _ in ranks]
            mean = {
                name: torch.stack([torch.as_tensor(step[rank][name]) for rank in stages[-1]]).mean(0)
                for name in ("losses", "outputs")
            }
            same(mean["losses"], losses)
            same(mean["outputs"], losses)
            assert all(not len(step[rank]["losses"]) for stage in stages[:-1] for rank in stage)
            for stage, expected in zip(stages, grads):
                for ours, right in zip(zip(*(step[rank]["grads"] for rank in stage)), expected):
                    same(torch.stack(ours).mean(0), right)


@pytest.mark.parametrize("case", [case for case in CASES if case.bare], ids=str)
def test_torch_gives_the_same(case: Case) -> None:
    """Schedule1F1B and ScheduleGPipe of torch.distributed.pipelining: losses and every gradient."""
    compared = 0
    for rank, (ours, theirs) in enumerate(results(case)):
        for name, steps in theirs.items():
            fits = [number for number, (count, _) in enumerate(case.steps) if count >= case.dims.pp]
            for number, step in zip(fits, steps, strict=True):
                for policy in POLICIES:
                    mine = ours[name, policy][number]
                    for a, b in zip(mine["grads"], step["grads"], strict=True):
                        same(a, b)
                    if rank == case.dims.pp - 1:
                        same(mine["losses"], torch.stack([loss.detach() for loss in step["losses"]]))
                    compared += 1
    assert compared >= case.dims.pp * len(case.runs)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_microbatches_in_flight_and_bytes(case: Case) -> None:
    """1F1B keeps stages - stage microbatches alive, GPipe all; M / (SP WP) bytes per edge and way are sent.

    Counted in the layers themselves; and headers of 48 bytes go with every new shape.
    """
    stages = case.dims.pp
    local = GRID.rows * GRID.cols * WIDTH * 8 // case.dims.places
    for stage, ranks in enumerate(by_stage(case)):
        for rank in ranks:
            for (schedule, _), steps in results(case)[rank][0].items():
                shapes: set[int] = set()
                for (count, samples), step in zip(case.steps, steps):
                    most = count if schedule == "gpipe" else min(count, stages - stage)
                    assert step["flying"] == (most, most, 0)
                    links = (stage > 0) + (stage < stages - 1)
                    body, header = count * samples * local * links, step["sent"][0]
                    new = stage < stages - 1 and samples not in shapes
                    shapes.add(samples)
                    assert (header - body > 0) == new and (header - body) % 48 == 0


@pytest.mark.parametrize("case", CASES, ids=str)
def test_messages_match_without_tags(case: Case) -> None:
    """What a rank sends to another is what that one expects, in one order for headers, tokens and gradients.

    Backends that have no tags need it; not with "async", which is for those that have.
    """
    found = results(case)
    for run in case.runs:
        posted = [ours[run][-1]["posted"] for ours, _ in found]
        if run[1] != "async":
            for a, b in product(range(case.dims.world), repeat=2):
                sent = [size for verb, peer, size in posted[a] if (verb, peer) == ("send", b)]
                assert sent == [size for verb, peer, size in posted[b] if (verb, peer) == ("receive", a)]
        assert sum(map(len, posted)) > 0


# Memory


def weigh(schedule: str) -> list[tuple[int, int, int]]:
    """Run 4, 16, 64 microbatches; return the peaks: buffers, tensors between stages alive, bytes of those."""
    rank, width, found = dist.get_rank(), 37, []
    groups = make_groups(ParallelDims(pp=3), rank, torch.device("cpu"))
    layout, model = WindowLayout.of(GRID, groups), Stage(rank, 3, width)
    size = GRID.rows * GRID.cols * width * 8
    peak = 0

    def look(*_: Any) -> None:
        nonlocal peak
        tensors = [
            thing for thing in gc.get_objects() if type(thing) is Tensor and thing.shape[-1:] == (width,)
        ]
        alive = {t.untyped_storage().data_ptr() for t in tensors if t.untyped_storage().nbytes() == size}
        peak = max(peak, len(alive))

    model.register_forward_pre_hook(look)
    model.register_full_backward_hook(look)
    pipeline = linked(model, GRID, groups, (1, -1), schedule=schedule)
    for count in (4, 16, 64):
        peak = 0
        source = (draw(m, 1) for m in range(count))
        pipeline.step(
            (Microbatch(layout.to_windows(x), (c,), layout.to_windows(y)) for x, y, c in source), count
        )
        found.append((count, pipeline.peak_buffers, peak))
    return found


def test_memory_does_not_grow_with_the_microbatches() -> None:
    """From 4 to 64 microbatches the tensors alive between stages stay as many; with GPipe they do not."""
    for stage, found in enumerate(run_distributed(weigh, 3, "1f1b")):
        counts, buffers, alive = zip(*found)
        assert counts == (4, 16, 64) and max(buffers) <= 2
        assert alive[2] == alive[1] <= (3 - stage) + 2 + 2 * 3 + 2, "in flight, coming, leaving, at work"
    last = run_distributed(weigh, 3, "gpipe")[2]
    assert last[2][2] - last[1][2] == 64 - 16, "what is counted is what it is meant to be"
