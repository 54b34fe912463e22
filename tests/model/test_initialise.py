"""Initial weights: the documented spreads, the same under any cut, and the first output of each recipe."""

from __future__ import annotations

import math

import pytest
import torch

from aeris.config import ModelConfig
from aeris.model.initialise import initialise
from aeris.model.layers import absolute_encoding, time_embedding
from aeris.model.swin import Swin
from aeris.parallelize import build_model, make_layout


def make(init: str, layers: int = 2, seed: int = 0) -> Swin:
    """Build and initialise a network of width 128."""
    config = ModelConfig(
        rows=4, cols=8, window=4, layers=layers, init=init, precision="fp32", residual="fp32"
    )  # type: ignore[arg-type]
    model = build_model(config, 10, 4, make_layout(config), "cpu")
    initialise(model, seed)
    return model


@pytest.mark.parametrize("init", ["zero", "spike-no-more"])
def test_spreads_are_those_of_the_table(init: str) -> None:
    """Standard deviations within 5 %, nothing beyond two of them; a normal cut there has 0.88 of its std."""
    model, small = make(init), math.sqrt(2 / (5 * 128))
    zero = init == "zero"
    expected = {
        "layers.0.0.attention.qkv.weight": small,
        "layers.1.0.mlp.gate_up.weight": small,
        "layers.0.0.attention.out.weight": small if zero else small / math.sqrt(4),
        "layers.0.0.mlp.down.weight": small if zero else small / math.sqrt(4),
        "layers.0.0.modulation.hidden.weight": small if zero else 0.03,
        "layers.0.0.modulation.out.weight": 0 if zero else 1e-6,
        "head.out.weight": 0 if zero else 1e-6,
        "embed.proj.weight": 1 / math.sqrt(30) if zero else 0.3,
    }
    parameters = dict(model.named_parameters())
    for name, std in expected.items():
        p = parameters[name].detach()
        assert p.abs().max() <= 2 * std
        assert float(p.std()) == pytest.approx(0.8796 * std, rel=0.08), name
    for name, p in parameters.items():
        if "norm" in name:
            assert (p == 1).all(), name
        if name.endswith("bias"):
            assert (p == 0).all(), name


def test_weights_depend_on_seed_and_name_only() -> None:
    """A deeper model starts with the same first layers; another seed does not."""
    shallow, deep, other = (
        dict(m.named_parameters()) for m in (make("zero"), make("zero", 4), make("zero", seed=1))
    )
    assert all(torch.equal(p, deep[name]) for name, p in shallow.items())
    assert not torch.equal(shallow["embed.proj.weight"], other["embed.proj.weight"])


def test_a_zero_network_answers_zero() -> None:
    """With "zero" the first output is exactly 0: the loss starts at the variance of the target."""
    model = make("zero")
    assert (model(torch.randn(1, 2, 16, 10), torch.tensor([0.5])) == 0).all()


@pytest.mark.parametrize("init", ["zero", "spike-no-more"])
def test_every_parameter_learns(init: str) -> None:
    """After three optimizer steps every tensor has moved: no gate and branch that keep each other at zero."""
    model = make(init)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(2, 2, 16, 10), torch.tensor([0.5, 1.2])).sub(1.0).square().mean().backward()
        optimizer.step()
    assert [name for name, p in model.named_parameters() if torch.equal(p, before[name])] == []


def test_encodings_follow_the_published_formulas() -> None:
    """e(t) = [sin t f | cos t f]; row channels before column channels, rows counted from the offset."""
    t = torch.tensor([0.3], dtype=torch.float64)
    e = time_embedding(t, 6)[0]
    f = [1.0, 10_000 ** (-1 / 3), 10_000 ** (-2 / 3)]
    torch.testing.assert_close(
        e, torch.tensor([math.sin(0.3 * k) for k in f] + [math.cos(0.3 * k) for k in f]).double()
    )
    a = absolute_encoding(torch.tensor([[0, 2 * 7 + 3]]), cols=7, row_offset=1, channels=142)
    assert a.shape == (1, 2, 142)
    k = 5
    frequency = 10_000 ** (-2 * k / 72)
    assert float(a[0, 1, 2 * k]) == pytest.approx(math.sin(3 * frequency))
    assert float(a[0, 1, 72 + 2 * k + 1]) == pytest.approx(math.cos(3 * frequency))
    assert float(a[0, 0, 0]) == pytest.approx(math.sin(1.0))
