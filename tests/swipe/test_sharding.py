"""Weights divided over ranks give the gradient of one process with the whole batch, reduced once per step."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.utils._python_dispatch import TorchDispatchMode

from swipe.groups import make_groups
from swipe.mesh import ParallelDims
from swipe.pipeline import Microbatch, Pipeline
from swipe.sharding import full, local, replicas, shard
from tests.harness import run_distributed

WORLD, COUNT, SAMPLES = 4, 3, 2
SHARDS = (1, 2, 4)


def build(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """Build a model whose rows do not divide by the ranks."""
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 3)).to(dtype)


def batch(rank: int) -> tuple[Tensor, Tensor]:
    """Make what a rank reads in one step: [microbatch, sample, features]."""
    draw = torch.Generator().manual_seed(10 + rank)
    made = (torch.randn(COUNT, SAMPLES, size, generator=draw, dtype=torch.float64) for size in (5, 3))
    x, y = made
    return x, y


class Calls(TorchDispatchMode):
    """Counts collectives by name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            self.names.append(func._schema.name.split("::")[1])
        return func(*args, **(kwargs or {}))


def train() -> dict[int, dict[str, Any]]:
    """Take two steps with the weights divided in every way."""
    rank, found = dist.get_rank(), {}
    for parts in SHARDS:
        mesh = make_groups(ParallelDims(dp=WORLD), rank, torch.device("cpu"), parts).weights
        model = build()
        shard(model, [model[0], model[2]], mesh)
        weights = list(model.parameters())  # while a step runs, others take their place in the model
        pipeline, calls = Pipeline(model, mse_loss), Calls()
        out: dict[str, Any] = {"replicas": replicas(mesh), "sizes": [local(p).numel() for p in weights]}
        x, y = batch(rank)
        seen: list[tuple[bool, list[str]]] = []

        def read(
            x: Tensor = x, y: Tensor = y, weights: Any = weights, seen: Any = seen
        ) -> Iterator[Microbatch]:
            for m in range(COUNT):
                seen.append((all(p.grad is None for p in weights), [*calls.names]))  # noqa: B023
                yield Microbatch(x[m], (), y[m])

        with calls:
            out["losses"] = pipeline.step(read(), COUNT)
            seen.append((all(p.grad is None for p in weights), [*calls.names]))
        out["seen"] = seen
        out["grads"] = [full(p.grad) for p in weights]
        with torch.no_grad():
            for p in weights:
                local(p).sub_(local(p.grad))
                p.grad = None
        pipeline.step([Microbatch(x[m], (), y[m]) for m in range(COUNT)], COUNT)
        out["second"] = [full(p.grad) for p in weights]
        found[parts] = out
    return found


@cache
def trained() -> list[dict[int, dict[str, Any]]]:
    return run_distributed(train, WORLD)


@cache
def alone() -> tuple[Tensor, list[list[Tensor]], list[int]]:
    """Take both steps on one process with everything at once: losses by rank, gradients, sizes of weights."""
    model, grads, losses = build(), [], torch.zeros(0)
    for step in range(2):
        model.zero_grad()
        table = [[mse_loss(model(a), b) for a, b in zip(*batch(rank))] for rank in range(WORLD)]
        whole = torch.stack([torch.stack(row) for row in table])
        whole.mean().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
        losses = whole.detach() if step == 0 else losses
        with torch.no_grad():
            for p in model.parameters():
                p.sub_(p.grad)
    return losses, grads, [p.numel() for p in model.parameters()]


@pytest.mark.parametrize("parts", SHARDS)
def test_gradients_are_the_mean_over_all_ranks(parts: int) -> None:
    """Two steps, the second with updated weights; every rank gathers the same (fp64: 1e-12)."""
    losses, (first, second), _ = alone()
    for rank, found in enumerate(trained()):
        out = found[parts]
        torch.testing.assert_close(out["losses"], losses[rank], rtol=1e-12, atol=1e-12)
        for ours, right in zip(out["grads"] + out["second"], first + second, strict=True):
            torch.testing.assert_close(ours, right, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("parts", SHARDS)
def test_each_rank_holds_its_part(parts: int) -> None:
    """The ranks of a shard group hold every weight once."""
    _, _, sizes = alone()
    for first in range(0, WORLD, parts):
        held = [trained()[rank][parts]["sizes"] for rank in range(first, first + parts)]
        assert [sum(column) for column in zip(*held)] == sizes
    assert {found[parts]["replicas"] for found in trained()} == {WORLD // parts}


@pytest.mark.parametrize("parts", SHARDS)
def test_gathered_and_reduced_once_per_step(parts: int) -> None:
    """Three gathers in the first pass, three reductions in the last backward pass; no gradient before it."""
    for found in trained():
        nothing, calls = zip(*found[parts]["seen"])
        assert nothing == (True, True, True, False)
        first, between, last = calls[1], calls[2][len(calls[1]) :], calls[3][len(calls[2]) :]
        assert calls[0] == between == []
        assert all("gather" in name for name in first) and all("reduce" in name for name in last)
        if parts > 1:  # torch 2.8 gathers and scatters among one rank, later ones do not
            assert len(first) == sum("reduce_scatter" in name for name in last) == 3
        assert sum("allreduce" in name for name in last) == 3 * (parts < WORLD)


def reduce_in_bf16() -> Tensor:
    """Train one bf16 weight whose gradient needs more digits than bf16 has."""
    rank = dist.get_rank()
    mesh = make_groups(ParallelDims(dp=WORLD), rank, torch.device("cpu")).weights
    model = nn.Linear(1, 1, bias=False).bfloat16()
    shard(model, [], mesh)
    weight = next(model.parameters())
    values = [256.0 if rank == m == 0 else 1.0 for m in range(4)]
    one = torch.ones(1, 1, dtype=torch.bfloat16)
    Pipeline(model, lambda y, value: (y * value).sum()).step([Microbatch(one, (), v) for v in values], 4)
    assert weight.grad is not None
    return full(weight.grad)


def test_bf16_gradients_are_accumulated_and_reduced_in_fp32() -> None:
    """(256 + 15) / 16 = 16.94 is rounded once; adding ones to 64 in bf16 would lose them: 16.75."""
    for grad in run_distributed(reduce_in_bf16, WORLD):
        assert grad.dtype == torch.bfloat16 and abs(float(grad) - 271 / 16) <= 2**-4


def reduce_in_fp32() -> list[list[Tensor]]:
    """Return the gradients of one pass with fp32 weights, divided in every way."""
    found = []
    for parts in SHARDS:
        mesh = make_groups(ParallelDims(dp=WORLD), dist.get_rank(), torch.device("cpu"), parts).weights
        model, (x, y) = build(torch.float32), batch(dist.get_rank())
        shard(model, [model[0], model[2]], mesh)
        weights = list(model.parameters())
        Pipeline(model, mse_loss).step(
            [Microbatch(x[m].float(), (), y[m].float()) for m in range(COUNT)], COUNT
        )
        found.append([full(p.grad) for p in weights])
    return found


def test_fp32_gradients_are_means_too() -> None:
    """Backends may be asked for the mean of fp32 only, and gloo gives the sum for it in torch 2.8."""
    _, (first, _), _ = alone()
    for found in run_distributed(reduce_in_fp32, WORLD):
        for grads in found:
            for ours, right in zip(grads, first, strict=True):
                torch.testing.assert_close(ours, right.float(), rtol=1e-5, atol=1e-6)


class Cast(nn.Linear):
    """A linear map in bf16, whatever the type of its weight."""

    def forward(self, x: Tensor) -> Tensor:
        """Cast and apply."""
        return nn.functional.linear(x.bfloat16(), self.weight.bfloat16()).float()


class Gathered(TorchDispatchMode):
    """Adds up the bytes of weights that are gathered and of gradients that are reduced."""

    gathered = reduced = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.gathered += args[1].nbytes if "allgather_base" in str(func) else 0
        self.reduced += args[0].nbytes if "reduce_scatter_base" in str(func) else 0
        return func(*args, **(kwargs or {}))


def gather_in_bf16() -> list[tuple[list[Tensor], int, int]]:
    """Take a step of a model whose middle is used in bf16, gathered in fp32 and in bf16."""
    found = []
    for narrow in (False, True):
        mesh = make_groups(ParallelDims(dp=WORLD), dist.get_rank(), torch.device("cpu")).weights
        torch.manual_seed(3)
        model = nn.Sequential(
            nn.Linear(5, 8), Cast(8, 8, bias=False), Cast(8, 8, bias=False), nn.Linear(8, 3)
        )
        x, y = (numbers.float() for numbers in batch(dist.get_rank()))
        if narrow:
            shard(model, [model[0]], mesh, [[model[1], model[2]]])
        else:
            shard(model, [model[0], model[1], model[2]], mesh)
        weights, pipeline = list(model.parameters()), Pipeline(model, mse_loss)
        with Gathered() as bytes_:
            pipeline.step([Microbatch(x[m], (), y[m]) for m in range(COUNT)], COUNT)
        found.append(([full(p.grad) for p in weights], bytes_.gathered, bytes_.reduced))
    return found


def test_weights_used_in_bf16_are_gathered_in_it() -> None:
    """The gradients are the same to the bit, still fp32, and of 128 weights only half the bytes travel."""
    for (wide, before, there), (narrow, after, here) in run_distributed(gather_in_bf16, WORLD):
        assert all(torch.equal(a, b) and a.dtype == torch.float32 for a, b in zip(wide, narrow, strict=True))
        assert before - after == 128 * 2 // WORLD and there == here


def evaluate_and_change() -> list[tuple[Tensor, Tensor]]:
    """Evaluate, change the weights, evaluate again; return results and what they should be."""
    rank, found = dist.get_rank(), []
    for parts in SHARDS:
        mesh = make_groups(ParallelDims(dp=WORLD), rank, torch.device("cpu"), parts).weights
        model, whole = build(), build()
        shard(model, [model[0], model[2]], mesh)
        weights, pipeline = list(model.parameters()), Pipeline(model, mse_loss)
        x, _ = batch(rank)
        for factor in (1.0, 0.5):
            with torch.no_grad():
                for p, q in zip(weights, whole.parameters()):
                    local(p).mul_(factor)
                    q.mul_(factor)
                found.append((pipeline.evaluate([Microbatch(x[0])], 1)[0], whole(x[0])))
    return found


def test_evaluation_sees_changed_weights() -> None:
    """What is gathered for evaluation is not kept: weights changed between two evaluations count."""
    for found in run_distributed(evaluate_and_change, WORLD):
        for ours, right in found:
            torch.testing.assert_close(ours, right, rtol=1e-12, atol=1e-12)


def test_one_rank_divides_nothing() -> None:
    """Without a mesh the model stays as it is."""
    model = build()
    shard(model, [model[0]], None)
    assert type(model) is nn.Sequential and replicas(None) == 1
    weight = next(model.parameters())
    assert local(weight) is weight and full(weight) is weight
