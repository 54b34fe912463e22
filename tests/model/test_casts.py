"""The copies of weights in the type of the products: made once a step, never stale, the same numbers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from aeris.config import ModelConfig, ParallelConfig, RunConfig, TrainConfig
from aeris.model import layers
from aeris.model.swin import Swin
from aeris.parallelize import (
    build_model,
    choose_degrees,
    make_layout,
    make_network,
    make_pipeline,
    share_weights,
    take_seat,
)
from swipe.pipeline import Microbatch, Pipeline
from swipe.sharding import full
from tests.harness import run_distributed

MODEL = ModelConfig(rows=8, cols=16, window=4, layers=2, width=32, heads=2, hidden=48)
CHANNELS = (7, 3)
COUNT = 4  # microbatches


def config(**parallel: int) -> RunConfig:
    """A bf16 network of two layers, four microbatches of one image."""
    return RunConfig(
        model=MODEL,
        train=TrainConfig(batch=COUNT * parallel.get("dp", 1), microbatch=1),
        parallel=ParallelConfig(**parallel),
    )


def built(run: RunConfig, keeps: bool) -> tuple[Swin, Pipeline]:
    """This rank's stage and pipeline; `keeps` False casts in every pass."""
    world, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    seat = take_seat(run, CHANNELS, choose_degrees(run, world), rank, torch.device("cpu"))
    model = build_model(run.model, *CHANNELS, seat.layout, seat.device, seat.units)
    scatter_weights(model)
    share_weights(model, seat)
    pipeline = make_pipeline(model, seat, lambda y, target: (y - target).square().mean())
    for module in model.modules():
        if hasattr(module, "keeps_cast"):
            module.keeps_cast = keeps
    return model, pipeline


def scatter_weights(model: Swin) -> None:
    """Give every weight a gradient: as a network starts, gates are shut and most have none."""
    torch.manual_seed(1)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)


def microbatches(model: Swin) -> list[Microbatch]:
    """The same numbers on every rank."""
    generator = torch.Generator().manual_seed(3)
    shape = (1, *model.layout.tokens_NT.shape)
    return [
        Microbatch(
            torch.randn(*shape, CHANNELS[0], generator=generator),
            (torch.rand(1, generator=generator),),
            torch.randn(*shape, CHANNELS[1], generator=generator),
        )
        for _ in range(COUNT)
    ]


def two_steps(run: RunConfig, keeps: bool) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Losses and gradients of two steps, between which the weights move."""
    model, pipeline = built(run, keeps)
    losses, gradients = [], []
    for _ in range(2):
        model.zero_grad(set_to_none=True)
        losses.append(pipeline.step(microbatches(model), COUNT))
        gradients.append({name: full(p.grad) for name, p in model.named_parameters() if p.grad is not None})
        with torch.no_grad():
            for p in model.parameters():
                p.sub_(p.grad, alpha=0.5)
        assert not model.casts()
    return losses, gradients


def differences(parallel: dict[str, int]) -> list[str]:
    """Name what differs in any bit between casts kept and made in every pass."""
    (losses, kept), (others, cast) = (two_steps(config(**parallel), keeps) for keeps in (True, False))
    found = [] if all(map(torch.equal, losses, others)) else ["losses"]
    return found + [name for a, b in zip(kept, cast) for name in a if not torch.equal(a[name], b[name])]


def wide_gradients(parallel: dict[str, int]) -> dict[str, Tensor]:
    """The gradients of a step whose products are fp32."""
    run = config(**parallel)
    model, pipeline = built(replace(run, model=replace(MODEL, precision="fp32", residual="fp32")), keeps=True)
    pipeline.step(microbatches(model), COUNT)
    return {name: full(p.grad) for name, p in model.named_parameters() if p.grad is not None}


def far_from_fp32(parallel: dict[str, int]) -> dict[str, float]:
    """How far the gradients of a bf16 step are from those of an fp32 one, relative, weight by weight."""
    exact = wide_gradients(parallel)
    model, pipeline = built(config(**parallel), keeps=True)
    pipeline.step(microbatches(model), COUNT)
    found = {name: full(p.grad) for name, p in model.named_parameters() if p.grad is not None}
    return {name: float((found[name] - g).norm() / g.norm()) for name, g in exact.items()}


def test_numbers_are_the_same_to_the_bit() -> None:
    assert differences({}) == []


@pytest.mark.parametrize("parallel", [{"dp": 2}, {"pp": 2}], ids=str)
def test_numbers_are_the_same_on_two_ranks(parallel: dict[str, int]) -> None:
    assert run_distributed(differences, 2, parallel) == [[], []]


@pytest.fixture
def casts(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The weights that are cast, as often as they are."""
    made: list[Tensor] = []
    weight_in = layers.Linear.weight_in

    def counting(linear: layers.Linear, dtype: torch.dtype) -> Tensor:
        kept = linear.cast
        cast = weight_in(linear, dtype)
        if cast is not kept and cast is not linear.weight:
            made.append(linear.weight)
        return cast

    monkeypatch.setattr(layers.Linear, "weight_in", counting)
    return made


@pytest.mark.parametrize("parallel", [{}, {"dp": 2}, {"sp": 2}], ids=str)
def test_every_microbatch_is_in_the_gradient(parallel: dict[str, int]) -> None:
    """As bf16 says it: a gradient that came too late to be reduced would be off by half."""
    for far in run_distributed(far_from_fp32, 2, parallel) if parallel else [far_from_fp32(parallel)]:
        assert max(far.values()) < 0.05, far


def test_a_weight_is_cast_once_a_step(casts: list[Tensor]) -> None:
    """Four matrices a block, whatever the number of microbatches."""
    model, pipeline = built(config(), keeps=True)
    pipeline.step(microbatches(model), COUNT)
    assert len(casts) == len(set(casts)) == 2 * 4


def test_recomputed_blocks_use_what_is_kept(casts: list[Tensor]) -> None:
    model, pipeline = built(config(), keeps=True)
    plain = pipeline.step(microbatches(model), COUNT)
    expected = [p.grad for p in model.parameters()]
    model.zero_grad(set_to_none=True)
    casts.clear()
    model.config = replace(model.config, checkpointing="block")
    assert torch.equal(pipeline.step(microbatches(model), COUNT), plain)
    assert all(torch.equal(p.grad, grad) for p, grad in zip(model.parameters(), expected))
    assert len(casts) == 2 * 4


def test_a_failed_step_leaves_no_stale_cast() -> None:
    model, pipeline = built(config(), keeps=True)
    with pytest.raises(ValueError, match="a step of 4 microbatches got only 1"):
        pipeline.step(microbatches(model)[:1], COUNT)
    assert not model.casts()


def test_a_forecast_sees_weights_as_they_are() -> None:
    run = config()
    seat = take_seat(run, CHANNELS, choose_degrees(run, 1), 0, torch.device("cpu"))
    model = build_model(MODEL, *CHANNELS, make_layout(MODEL), "cpu")
    scatter_weights(model)
    network = make_network(model, seat, CHANNELS[1])
    one = microbatches(model)[0]
    before = network(one.x, one.conditions[0])
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1)
    assert not torch.equal(network(one.x, one.conditions[0]), before) and not model.casts()
