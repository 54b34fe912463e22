"""The network against a naive one that shares no code with it: roll on the grid, one window at a time."""

from __future__ import annotations

import math
import shutil

import pytest
import torch

from aeris.config import ModelConfig
from aeris.model.initialise import initialise
from aeris.model.swin import Swin
from aeris.parallelize import build_model, make_layout

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


def naive_forward(
    w: dict[str, torch.Tensor], c: ModelConfig, x_BCYX: torch.Tensor, t_B: torch.Tensor
) -> torch.Tensor:
    """Compute the paper's network on images [B, C, Y, X] with loops over samples, windows and heads."""
    outputs = []
    for x_CYX, t in zip(x_BCYX, t_B):
        f = 10000.0 ** (-torch.arange(c.width // 2).double() / (c.width // 2))
        e = torch.cat((torch.sin(t * f), torch.cos(t * f)))
        h = (x_CYX + naive_encoding(x_CYX.shape[0], c)).permute(1, 2, 0) @ w["embed.proj.weight"].T + w[
            "embed.proj.bias"
        ]
        for layer in range(c.layers):
            for block in range(c.blocks):
                p = f"layers.{layer}.{block}."
                h = naive_block(w, p, c, h, e, shifted=layer % 2 == 1)
        shift, scale = naive_modulation(w, "head.modulation.", c, e, 2)
        h = h / (h.pow(2).mean(-1, keepdim=True) + c.norm_eps).sqrt() * w["head.norm.weight"]
        outputs.append(((h * (1 + scale) + shift) @ w["head.out.weight"].T).permute(2, 0, 1))
    return torch.stack(outputs)


def naive_encoding(channels: int, c: ModelConfig) -> torch.Tensor:
    """The absolute encoding, number by number."""
    count = 2 * math.ceil(channels / 4)
    out = torch.zeros(2 * count, c.rows, c.cols, dtype=torch.float64)
    for y in range(c.rows):
        for x in range(c.cols):
            for k in range(count // 2):
                f = 10000.0 ** (-2 * k / count)
                for axis, place in enumerate((y + c.row_offset, x)):
                    out[axis * count + 2 * k, y, x] = math.sin(place * f)
                    out[axis * count + 2 * k + 1, y, x] = math.cos(place * f)
    return out[:channels]


def naive_modulation(w: dict, p: str, c: ModelConfig, e: torch.Tensor, vectors: int) -> list[torch.Tensor]:
    """The modulation vectors of one block."""
    if c.modulation_layers == 2:
        e = w[p + "hidden.weight"] @ e + w[p + "hidden.bias"]
    e = e * torch.sigmoid(e)
    return list((w[p + "out.weight"] @ e + w[p + "out.bias"]).reshape(vectors, -1))


def naive_block(
    w: dict, p: str, c: ModelConfig, h: torch.Tensor, e: torch.Tensor, shifted: bool
) -> torch.Tensor:
    """One block on an image [Y, X, D]."""
    shift1, scale1, gate1, shift2, scale2, gate2 = naive_modulation(w, p + "modulation.", c, e, 6)

    def norm(x: torch.Tensor, name: str, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        def rms(y: torch.Tensor) -> torch.Tensor:
            return y / (y.pow(2).mean(-1, keepdim=True) + c.norm_eps).sqrt() * w[p + name + ".weight"]

        return (
            rms(x) * (1 + scale) + shift if c.norm_order == "norm-modulate" else rms(x * (1 + scale) + shift)
        )

    a = norm(h, "norm1", shift1, scale1)
    half = c.window // 2 if shifted else 0
    a = torch.roll(a, (-half, -half), (0, 1))
    out = torch.zeros_like(a)
    s = c.window
    for y0 in range(0, c.rows, s):
        for x0 in range(0, c.cols, s):
            strips = [(y0, y0 + s)]
            if shifted and c.poles == "separate" and y0 + s == c.rows:
                strips = [(y0, y0 + s // 2), (y0 + s // 2, y0 + s)]
            for top, bottom in strips:
                tokens = a[top:bottom, x0 : x0 + s].reshape(-1, c.width)
                where = [(y - y0, x) for y in range(top, bottom) for x in range(s)]
                out[top:bottom, x0 : x0 + s] = naive_attention(w, p, c, tokens, where).reshape(
                    bottom - top, s, -1
                )
    h = h + gate1 * torch.roll(out, (half, half), (0, 1))
    b = norm(h, "norm2", shift2, scale2) @ w[p + "mlp.gate_up.weight"].T
    gate, up = b[..., : c.hidden], b[..., c.hidden :]
    return h + gate2 * ((gate * torch.sigmoid(gate) * up) @ w[p + "mlp.down.weight"].T)


def naive_attention(
    w: dict, p: str, c: ModelConfig, x: torch.Tensor, where: list[tuple[int, int]]
) -> torch.Tensor:
    """Attention among the tokens of one window, head by head, rotations as complex numbers."""
    size = c.width // c.heads
    heads = []
    for head in range(c.heads):
        q, k, v = (x @ w[p + "attention.qkv.weight"][n * c.width + head * size :][:size].T for n in range(3))
        if c.rope:
            f = c.rope_base ** (-2 * torch.arange(size // 4).double() / (size // 2))
            angle = torch.stack([torch.cat((col * f, row * f)) for row, col in where])
            turn = torch.polar(torch.ones_like(angle), angle)
            q, k = (torch.complex(y[:, : size // 2], y[:, size // 2 :]) * turn for y in (q, k))
            scores = (q @ k.conj().T).real
        else:
            scores = q @ k.T
        heads.append(torch.softmax(scores / math.sqrt(size), -1) @ v)
    return torch.cat(heads, -1) @ w[p + "attention.out.weight"].T


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
    """torch.compile changes nothing but rounding."""
    eager, compiled = (
        make(precision="fp32", residual="fp32", compile=flag, layers=2).float() for flag in (False, True)
    )
    x, t = torch.randn(1, 6, 16, 5), torch.tensor([0.7])
    for model in (eager, compiled):
        model(x, t).square().mean().backward()
    torch.testing.assert_close(compiled(x, t), eager(x, t), rtol=1e-4, atol=1e-4)
    for (name, a), b in zip(eager.named_parameters(), compiled.parameters()):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_heads_must_divide_the_width() -> None:
    """A width that the heads do not divide is refused."""
    with pytest.raises(ValueError, match="multiple of the 3 heads"):
        make(heads=3)
