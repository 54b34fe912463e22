"""The gradient's norm over stages, shards and replicas against torch's norm of the whole model."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from swipe.collectives import ALONE, byte_log
from swipe.gradients import clip, global_norm
from swipe.groups import make_groups
from swipe.mesh import ParallelDims
from swipe.sharding import full, local, replicas, shard
from tests.harness import run_distributed

PP, PLACES = 2, 4
MESHES = {  # shard: how the four ranks of a stage differ; replicas are 4 / shard
    1: ParallelDims(dp=4, pp=PP),
    2: ParallelDims(dp=2, wp_x=2, pp=PP),
    4: ParallelDims(dp=2, pp=PP, sp=2),
}


def build(stage: int) -> nn.Sequential:
    """Build a stage; one of its biases has fewer elements than there are shards."""
    torch.manual_seed(stage)
    return nn.Sequential(nn.Linear(5, 7 + stage), nn.Linear(7 + stage, 3)).double()


def loss(model: nn.Module, stage: int, number: int) -> Tensor:
    """Return what rank `number` of a stage has to say about its weights."""
    draw = torch.Generator().manual_seed(100 * stage + number)
    return model(torch.randn(3, 5, generator=draw, dtype=torch.float64)).square().mean()


@cache
def whole() -> tuple[list[list[Tensor]], Tensor]:
    """Return the mean gradients by stage, and their norm by torch."""
    models = [build(stage) for stage in range(PP)]
    for stage, model in enumerate(models):
        torch.stack([loss(model, stage, number) for number in range(PLACES)]).mean().backward()
    grads = [[p.grad for p in model.parameters()] for model in models]
    return grads, get_total_norm([grad for part in grads for grad in part])


def measure() -> dict[int, dict[str, Any]]:
    """Measure and clip with the weights divided in every way."""
    found = {}
    for parts, dims in MESHES.items():
        rank = dist.get_rank()
        groups = make_groups(dims, rank, torch.device("cpu"), parts)
        stage, model = dims.coordinate(rank).pp, build(dims.coordinate(rank).pp)
        shard(model, [model[0]], groups.weights)
        number = groups.saving[0].ranks.index(rank)
        loss(model, stage, number).backward()
        count = replicas(groups.weights)
        weights = list(model.parameters())
        with byte_log() as log:
            norm, sums = global_norm(
                weights, groups.world, count, [torch.tensor(float(rank)), torch.tensor(3, dtype=torch.int64)]
            )
        out: dict[str, Any] = {"norm": norm, "sums": sums, "bytes": [entry.bytes for entry in log]}
        for factor in (2.0, 0.25):
            clip(weights, norm, factor * float(norm))
            out[f"clipped to {factor}"] = [full(p.grad).clone() for p in weights], stage
        out["clipped norm"] = global_norm(weights, groups.world, count)[0]
        if stage == 1:
            for p in weights:
                p.grad = None  # a stage that learns nothing
        out["first stage"] = global_norm(weights, groups.world, count)[0]
        if rank == dims.world - 1:
            weights[0].grad = torch.full_like(weights[0], float("nan"))
        out["broken"] = global_norm(weights, groups.world, count)[0]
        found[parts] = out
    return found


@cache
def measured() -> list[dict[int, dict[str, Any]]]:
    return run_distributed(measure, PP * PLACES)


def close(ours: Tensor, right: Tensor) -> None:
    """Compare in fp64, where only sums in another order differ."""
    torch.testing.assert_close(ours, right, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("parts", MESHES)
def test_the_norm_is_that_of_the_whole_model(parts: int) -> None:
    """Two stages, each weight counted once however often it is held; every rank has the same bits."""
    grads, norm = whole()
    for found in measured():
        out = found[parts]
        assert torch.equal(out["norm"], measured()[0][parts]["norm"])
        close(out["norm"], norm)
        torch.testing.assert_close(out["first stage"], 0.25 * get_total_norm(grads[0]), rtol=1e-5, atol=0)
        assert out["broken"].isnan(), "one bad number is seen by all"
        assert out["sums"].tolist() == [28.0, 24.0] and out["bytes"] == [2 * 3 * 8 * 7 // 8]


@pytest.mark.parametrize("parts", MESHES)
def test_clipping_is_that_of_the_whole_model(parts: int) -> None:
    """By torch's formula with the same norm: unchanged below the limit, scaled above it."""
    grads, norm = whole()
    models = [build(stage) for stage in range(PP)]
    for model, part in zip(models, grads):
        for p, grad in zip(model.parameters(), part):
            p.grad = grad.clone()
    clip_grads_with_norm_([p for model in models for p in model.parameters()], 0.25 * float(norm), norm)
    for found in measured():
        unchanged, stage = found[parts]["clipped to 2.0"]
        clipped, _ = found[parts]["clipped to 0.25"]
        for ours, right in zip(unchanged, grads[stage], strict=True):
            close(ours, right)
        for ours, p in zip(clipped, models[stage].parameters(), strict=True):
            close(ours, p.grad)
        torch.testing.assert_close(found[parts]["clipped norm"], 0.25 * norm, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_process(dtype: torch.dtype) -> None:
    """Without a group it is torch's norm; without gradients it is zero, and there is nothing to clip."""
    model = build(0).to(dtype)
    assert global_norm(model.parameters(), ALONE, 1)[0] == 0
    clip(model.parameters(), torch.tensor(1.0), 0.1)
    model(torch.ones(2, 5, dtype=dtype)).square().mean().backward()
    norm, sums = global_norm(model.parameters(), ALONE, 1, [torch.tensor(2.5)])
    assert norm.dtype == torch.float64 and sums.tolist() == [2.5]
    expected = get_total_norm([p.grad for p in model.parameters()])
    torch.testing.assert_close(norm.to(dtype), expected)
    assert all(p.grad is not None and local(p.grad) is p.grad for p in model.parameters())
