"""Learning rate, decay groups and the moving average as functions of images seen."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import nn

from aeris.config import EMAConfig, OptimizerConfig
from aeris.ema import EMA
from aeris.optim import learning_rate, make_optimizer, optimizer_tensors


def test_learning_rate_warms_up_follows_the_cosine_and_ramps_down() -> None:
    """The published shape: linear from 1 %, cosine to 1 %, linear drop over the last images."""
    config = OptimizerConfig(
        lr=2e-4, warmup_images=100, cosine_images=1000, rampdown_images=50, lr_floor=0.01
    )
    at = lambda images: learning_rate(images, config, 800) / 2e-4  # noqa: E731
    assert at(0) == pytest.approx(0.01 + 0.99 / 101)
    assert at(50) == pytest.approx(0.01 + 0.99 * 51 / 101)
    assert at(500) == pytest.approx(0.01 + 0.99 * 0.5)
    assert at(749) == pytest.approx(0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * 0.749)))
    assert at(775) == pytest.approx(0.01 + (0.99 * 0.5 * (1 + math.cos(math.pi * 0.775))) * 25 / 50)
    assert at(800) == pytest.approx(0.01)
    values = [at(images) for images in range(0, 800, 2)]
    assert max(abs(a - b) for a, b in itertools.pairwise(values)) < 0.025  # no jumps


def test_a_constant_learning_rate_and_a_cosine_to_the_end() -> None:
    """`constant` stays at the peak; cosine_images 0 ends the cosine with the run."""
    constant = OptimizerConfig(lr=1.0, warmup_images=0, shape="constant", rampdown_images=0)
    assert learning_rate(123_456, constant, 10**6) == 1.0
    cosine = OptimizerConfig(lr=1.0, warmup_images=0, cosine_images=0, rampdown_images=0, lr_floor=0.0)
    assert learning_rate(999_999, cosine, 10**6) == pytest.approx(0.0, abs=1e-9)
    assert learning_rate(500_000, cosine, 10**6) == pytest.approx(0.5)


def test_only_matrices_are_decayed() -> None:
    """With zero gradients a step shrinks matrices by lr x decay and leaves vectors alone."""
    model = nn.Sequential(nn.Linear(3, 4), nn.RMSNorm(4))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = make_optimizer(model, OptimizerConfig(lr=0.1, weight_decay=0.5))
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), before[name] * (0.95 if p.dim() == 2 else 1.0))


def test_adamw_equals_the_written_out_update() -> None:
    """Three steps against the formulas of Loshchilov and Hutter in float64; the state starts at 0, named."""
    model = nn.Linear(2, 2, bias=False).double()
    config = OptimizerConfig(lr=0.1, betas=(0.8, 0.9), eps=1e-8, weight_decay=0.3)
    optimizer = make_optimizer(model, config)
    assert {n: float(t.abs().sum()) for n, t in optimizer_tensors(model, optimizer).items()} == {
        "weight.step": 0.0, "weight.exp_avg": 0.0, "weight.exp_avg_sq": 0.0
    }  # fmt: skip
    w, m, v = model.weight.detach().clone(), 0.0, 0.0
    for step in range(1, 4):
        g = torch.tensor([[1.0, -2.0], [0.5, step]], dtype=torch.float64)
        model.weight.grad = g.clone()
        optimizer.step()
        m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g * g
        w = w * (1 - 0.1 * 0.3) - 0.1 * (m / (1 - 0.8**step)) / ((v / (1 - 0.9**step)).sqrt() + 1e-8)
        torch.testing.assert_close(model.weight.detach(), w, rtol=1e-12, atol=1e-12)


def test_ema_has_the_half_life_it_says() -> None:
    """After `halflife` images the average is half way; the ramp-up keeps it near the weights at the start."""
    model = nn.Linear(1, 1, bias=False)
    ema = EMA(model, EMAConfig(halflife_images=100, rampup_ratio=1e9))
    nn.init.constant_(model.weight, 0.0)
    ema.weights["weight"].fill_(1.0)
    for step in range(10):
        ema.update(model, 10_000 + step, 10)
    assert float(ema.weights["weight"]) == pytest.approx(0.5, rel=1e-5)
    early = EMA(model, EMAConfig(halflife_images=100_000, rampup_ratio=0.05))
    early.weights["weight"].fill_(1.0)
    early.update(model, 20, 20)
    assert float(early.weights["weight"]) == pytest.approx(0.5**20, abs=1e-6)
