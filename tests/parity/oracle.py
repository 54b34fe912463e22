"""Training written a second time, naively: what every layout of ranks must reproduce.

Plain images, one sample at a time: windows by torch.roll and slicing, attention head by head over a whole
window, noise, loss, clipping, AdamW and average from their formulas. It shares with the program only what
defines a run: the configuration, the random numbers of `swipe.noise`, the learning rate and channel weights.

Shapes: I images, B samples, C channels, F forcings, Y rows, X columns, D width.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from aeris.config import DiffusionConfig, ModelConfig, RunConfig
from aeris.data.variables import channel_weights
from aeris.optim import learning_rate
from swipe import noise

Weights = dict[str, Tensor]


class Images(NamedTuple):
    """The data of a run: image k is entry k modulo I. Hidden points are 0 in state and residual."""

    state_ICYX: Tensor
    residual_ICYX: Tensor
    forcing_IFYX: Tensor
    names: tuple[str, ...]
    latitude_deg: np.ndarray
    valid_CYX: np.ndarray | None = None
    """Where a channel has a value; None where all have."""


class Step(NamedTuple):
    """One optimizer step: the global mean loss, the norm and gradient before clipping, the state after."""

    loss: float
    norm: float
    gradients: Weights
    weights: Weights
    ema: Weights


def train(initial: Weights, images: Images, config: RunConfig, steps: int) -> list[Step]:
    """Take `steps` steps from the weights `initial` (by name), in the type of weights and images."""
    weights, ema = dict(initial), dict(initial)
    moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in initial.items()}
    found = []
    for step in range(steps):
        first, batch = step * config.train.batch, config.train.batch
        leaves = {name: p.detach().requires_grad_() for name, p in weights.items()}
        loss = sum(image_loss(leaves, images, config, first + b) for b in range(batch)) / batch
        loss.backward()
        gradients = {name: p.grad for name, p in leaves.items()}
        norm = math.sqrt(sum(float(g.square().sum()) for g in gradients.values()))
        adamw(weights, gradients, moments, config, step, norm)
        halflife = min(config.ema.halflife_images, config.ema.rampup_ratio * (first + batch))
        beta = 0.5 ** (batch / halflife)
        ema = {name: beta * value + (1 - beta) * weights[name] for name, value in ema.items()}
        found.append(Step(loss.item(), norm, gradients, dict(weights), ema))
    return found


def adamw(
    weights: Weights,
    gradients: Weights,
    moments: dict[str, tuple[Tensor, Tensor]],
    config: RunConfig,
    step: int,
    norm: float,
) -> None:
    """Clip by the norm, then AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101), decaying matrices only."""
    settings, (beta1, beta2) = config.optimizer, config.optimizer.betas
    lr = learning_rate(step * config.train.batch, settings, config.train.images)
    clip = min(1.0, config.train.clip / (norm + 1e-6))
    for name, p in weights.items():
        g = gradients[name] * clip
        m, v = (
            beta * moment + (1 - beta) * power
            for beta, moment, power in zip((beta1, beta2), moments[name], (g, g * g))
        )
        moments[name] = (m, v)
        decay = settings.weight_decay if p.dim() >= 2 else 0.0
        m_hat, v_hat = m / (1 - beta1 ** (step + 1)), v / (1 - beta2 ** (step + 1))
        weights[name] = p - lr * decay * p - lr * m_hat / (v_hat.sqrt() + settings.eps)


def image_loss(w: Weights, images: Images, config: RunConfig, image: int) -> Tensor:
    """Return the loss of one image: noise it, let the network say the velocity, weigh the squared error."""
    index = image % len(images.state_ICYX)
    state, residual = images.state_ICYX[index], images.residual_ICYX[index]
    t, z = noise_of(image, residual.shape, config)
    if images.valid_CYX is not None:
        z = z * torch.from_numpy(images.valid_CYX)
    sigma, cos, sin = config.diffusion.sigma_data, math.cos(t), math.sin(t)
    x_t = cos * residual + sin * sigma * z
    velocity = cos * sigma * z - sin * residual
    inputs = torch.cat((x_t / sigma, state, images.forcing_IFYX[index]))
    answer = naive_forward(w, config.model, inputs[None], torch.tensor([t], dtype=torch.float64))[0]
    return (loss_weight(images, config.diffusion) * (sigma * answer - velocity).square()).mean()


def noise_of(image: int, shape: torch.Size, config: RunConfig) -> tuple[float, Tensor]:
    """Return the noise time (rad) and the standard normal field, float64 [C, Y, X], of an image.

    Stream 0 of an image is its time, stream 1 its field. The time is computed in fp32, like the random number
    it comes from: half a unit in the last place would show in the tenth digit of everything.
    """
    assert config.diffusion.noise_times == "log-uniform"
    channels, rows, cols = shape
    u = noise.uniform([noise.key(config.train.seed, 0, image)])
    low, high = config.diffusion.sigma_min, config.diffusion.sigma_max
    t = torch.atan(torch.exp(math.log(low) + u * math.log(high / low)) / config.diffusion.sigma_data)
    tokens = torch.arange(rows * cols).reshape(rows, cols)
    z = noise.normal([noise.key(config.train.seed, 1, image)], tokens, channels)[0]
    return float(t), z.permute(2, 0, 1).double()


def loss_weight(images: Images, diffusion: DiffusionConfig) -> Tensor:
    """Weigh points by latitude and channel, 0 where hidden, mean 1 over all: [C, Y, X], rounded to fp32."""
    weight = np.ones(images.state_ICYX.shape[1:])
    weight *= channel_weights(images.names, diffusion.channel_weights)[:, None, None]
    if diffusion.latitude_weights:
        weight *= (np.cos(np.deg2rad(images.latitude_deg)) + 0.01)[:, None]
    if images.valid_CYX is not None:
        weight *= images.valid_CYX
    return torch.from_numpy(weight / weight.mean()).float()


def naive_forward(w: Weights, c: ModelConfig, x_BCYX: Tensor, t_B: Tensor) -> Tensor:
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


@lru_cache
def naive_encoding(channels: int, c: ModelConfig) -> Tensor:
    """The absolute encoding, number by number."""
    count = 2 * math.ceil(channels / 4)
    out = np.zeros((2 * count, c.rows, c.cols))
    for y in range(c.rows):
        for x in range(c.cols):
            for k in range(count // 2):
                f = 10000.0 ** (-2 * k / count)
                for axis, place in enumerate((y + c.row_offset, x)):
                    out[axis * count + 2 * k, y, x] = math.sin(place * f)
                    out[axis * count + 2 * k + 1, y, x] = math.cos(place * f)
    return torch.from_numpy(out[:channels])


def naive_modulation(w: Weights, p: str, c: ModelConfig, e: Tensor, vectors: int) -> list[Tensor]:
    """The modulation vectors of one block."""
    if c.modulation_layers == 2:
        e = w[p + "hidden.weight"] @ e + w[p + "hidden.bias"]
    e = e * torch.sigmoid(e)
    return list((w[p + "out.weight"] @ e + w[p + "out.bias"]).reshape(vectors, -1))


def naive_block(w: Weights, p: str, c: ModelConfig, h: Tensor, e: Tensor, shifted: bool) -> Tensor:
    """One block on an image [Y, X, D]."""
    shift1, scale1, gate1, shift2, scale2, gate2 = naive_modulation(w, p + "modulation.", c, e, 6)

    def norm(x: Tensor, name: str, shift: Tensor, scale: Tensor) -> Tensor:
        def rms(y: Tensor) -> Tensor:
            return y / (y.pow(2).mean(-1, keepdim=True) + c.norm_eps).sqrt() * w[p + name + ".weight"]

        return (
            rms(x) * (1 + scale) + shift if c.norm_order == "norm-modulate" else rms(x * (1 + scale) + shift)
        )

    a = norm(h, "norm1", shift1, scale1)
    half = c.window // 2 if shifted else 0
    a = torch.roll(a, (-half, -half), (0, 1))
    rows = []
    s = c.window
    for y0 in range(0, c.rows, s):
        strips = [(0, s)]
        if shifted and c.poles == "separate" and y0 + s == c.rows:
            strips = [(0, s // 2), (s // 2, s)]
        for top, bottom in strips:
            windows = [a[y0 + top : y0 + bottom, x0 : x0 + s] for x0 in range(0, c.cols, s)]
            rows.append(torch.cat([naive_attention(w, p, c, x_YXD, top) for x_YXD in windows], dim=1))
    h = h + gate1 * torch.roll(torch.cat(rows), (half, half), (0, 1))
    b = norm(h, "norm2", shift2, scale2) @ w[p + "mlp.gate_up.weight"].T
    gate, up = b[..., : c.hidden], b[..., c.hidden :]
    return h + gate2 * ((gate * torch.sigmoid(gate) * up) @ w[p + "mlp.down.weight"].T)


def naive_attention(w: Weights, p: str, c: ModelConfig, x_YXD: Tensor, top: int) -> Tensor:
    """Attention among the tokens of one window, or of its part that begins at row `top`, head by head."""
    size = c.width // c.heads
    q, k, v = (x_YXD.flatten(0, 1) @ w[p + "attention.qkv.weight"].T).split(c.width, dim=1)
    turn = naive_turns(top, *x_YXD.shape[:2], size, c.rope_base if c.rope else None)
    heads = []
    for head in range(c.heads):
        q1, k1, v1 = (y[:, head * size :][:, :size] for y in (q, k, v))
        q1, k1 = (torch.complex(y[:, : size // 2], y[:, size // 2 :]) * turn for y in (q1, k1))
        heads.append(torch.softmax((q1 @ k1.conj().T).real / math.sqrt(size), -1) @ v1)
    return (torch.cat(heads, -1) @ w[p + "attention.out.weight"].T).reshape(x_YXD.shape)


@lru_cache
def naive_turns(top: int, rows: int, cols: int, size: int, base: float | None) -> Tensor:
    """Rotary positions as complex numbers [tokens, size / 2]; all 1 without a base."""
    if base is None:
        return torch.ones(1, 1, dtype=torch.complex128)
    f = base ** (-2 * torch.arange(size // 4).double() / (size // 2))
    angles = [torch.cat((x * f, y * f)) for y in range(top, top + rows) for x in range(cols)]
    return torch.polar(torch.ones(1, dtype=torch.float64), torch.stack(angles))
