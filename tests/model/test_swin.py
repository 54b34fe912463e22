"""The network against a naive one that shares no code with it: roll on the grid, one window at a time."""

from __future__ import annotations

import shutil

import pytest
import torch

from aeris.config import ModelConfig
from aeris.model.initialise import initialise
from aeris.model.swin import Swin
from aeris.parallelize import build_model, make_layout
from tests.parity.oracle import naive_forward

SMALL = {
    "rows": 8,
    "cols": 12,
    "window": 4,
    "layers": 4,
    "width": 16,
    "heads": 2,
    "hidden": 24,
    "precision": "fp64",
}


def make(channels: int = 5, out: int = 3, **settings: object) -> Swin:
    """Build a small float64 network with every parameter random, so that nothing is multiplied by zero."""
    config = ModelConfig(**{**SMALL, "residual": "fp64", **settings})  # type: ignore[arg-type]
    model = build_model(config, channels, out, make_layout(config), "cpu")
    initialise(model, 0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype) * 0.3 + ("norm" in name))
    return model


@pytest.mark.parametrize("rope", [True, False])
@pytest.mark.parametrize("poles", ["cyclic", "separate"])
@pytest.mark.parametrize("layers", [1, 2, 4])
def test_output_and_gradients_equal_the_naive_network(rope: bool, poles: str, layers: int) -> None:
    """Shifted and unshifted layers, RoPE on and off, both poles: to 1e-10 in output and every gradient."""
    _compare(make(rope=rope, poles=poles, layers=layers))


@pytest.mark.parametrize(
    "settings",
    [
        {"norm_order": "modulate-norm"},
        {"modulation_layers": 1},
        {"blocks": 2, "layers": 3},
        {"window": 4, "rows": 4, "cols": 8, "poles": "separate"},
        {"row_offset": 1, "checkpointing": "block"},
    ],
    ids=str,
)
def test_variants_equal_the_naive_network(settings: dict) -> None:
    """The switches of the network, one at a time."""
    _compare(make(**settings))


def _compare(model: Swin) -> None:
    """Compare output and gradients of one batch with the naive network's."""
    c = model.config
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(2, 5, c.rows, c.cols, dtype=torch.float64, generator=generator)
    target = torch.randn(2, 3, c.rows, c.cols, dtype=torch.float64, generator=generator)
    t = torch.rand(2, dtype=torch.float64, generator=generator) * 1.5
    layout = model.layout
    y = layout.from_windows(model(layout.to_windows(x), t))  # type: ignore[attr-defined]
    ((y - target) ** 2).mean().backward()
    weights = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    expected = naive_forward(weights, c, x, t)
    ((expected - target) ** 2).mean().backward()
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
    for name, p in model.named_parameters():
        assert p.grad is not None and weights[name].grad.abs().max() > 1e-12, name
        torch.testing.assert_close(
            p.grad, weights[name].grad, rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_separate_poles_keep_the_two_poles_apart() -> None:
    """Nothing in the first rows depends on the last rows with `separate`; with `cyclic` it does."""
    for poles, apart in (("separate", True), ("cyclic", False)):
        model = make(poles=poles, layers=2)
        x = torch.randn(1, 5, 8, 12, dtype=torch.float64, requires_grad=True)
        y = model.layout.from_windows(model(model.layout.to_windows(x), torch.tensor([0.7]).double()))  # type: ignore[attr-defined]
        y[:, :, :2].sum().backward()
        assert (x.grad[:, :, 6:].abs().max() == 0) == apart


def test_bf16_follows_fp32() -> None:
    """bf16 products change the output by about a bf16 rounding, and tokens leave the head in fp32."""
    outputs = {}
    for precision, residual in (("fp32", "fp32"), ("bf16", "fp32"), ("bf16", "bf16")):
        model = make(precision=precision, residual=residual).float()
        x = torch.randn(1, 6, 16, 5, generator=torch.Generator().manual_seed(0))
        outputs[precision, residual] = model(x, torch.tensor([0.7]))
        assert outputs[precision, residual].dtype == torch.float32
    exact = outputs["fp32", "fp32"]
    for key in (("bf16", "fp32"), ("bf16", "bf16")):
        assert 0 < (outputs[key] - exact).norm() / exact.norm() < 0.03


@pytest.mark.filterwarnings("ignore")  # tracing and its imports warn on their own account
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile on CPU needs a C++ compiler")
def test_compiled_blocks_equal_eager() -> None:
    """torch.compile changes nothing but rounding, and takes a block in one piece."""
    eager, compiled = (
        make(precision="fp32", residual="fp32", compile=flag, layers=2).float() for flag in (False, True)
    )
    x, t = torch.randn(1, 6, 16, 5), torch.tensor([0.7])
    torch._dynamo.utils.counters.clear()
    for model in (eager, compiled):
        model(x, t).square().mean().backward()
    assert not torch._dynamo.utils.counters["graph_break"]
    torch.testing.assert_close(compiled(x, t), eager(x, t), rtol=1e-4, atol=1e-4)
    for (name, a), b in zip(eager.named_parameters(), compiled.parameters()):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_heads_must_divide_the_width() -> None:
    """A width that the heads do not divide is refused."""
    with pytest.raises(ValueError, match="multiple of the 3 heads"):
        make(heads=3)
