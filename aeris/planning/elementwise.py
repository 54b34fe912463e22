"""Bytes that memory moves for operations other than matrix products, counted from what the blocks do.

An operation reads its inputs and writes its result, in the type they have: `torch.addcmul(x, gate, y)` on
tokens [n, D] moves 3 n D numbers. Vectors of a sample are free beside tokens. Sources of the counts:
aeris/model/fused.py, swin.py, swipe/ulysses.py, and for compiled blocks what a kernel per chain must move.
"""

from __future__ import annotations

from typing import NamedTuple

from aeris.config import ModelConfig, RunConfig
from aeris.model.swin import DTYPES
from aeris.planning.traffic import kinds_of, tokens_of_rank, unit_weights
from aeris.restore import channel_counts
from swipe.mesh import ParallelDims


class Passes(NamedTuple):
    """How many numbers are moved per token and feature of its tensor; (forward, backward)."""

    norm: tuple[int, int]
    """Modulated norm, twice a block."""
    modulate_first: tuple[int, int]
    """More of it with norm_order "modulate-norm"."""
    cast: tuple[int, int]
    """Where tokens and products have different types: two norms, two branches."""
    gate: tuple[int, int]
    """Gated add, twice a block; backward with the sum of the gradients that meet at the tokens."""
    split: tuple[int, int]
    """q, k, v apart, heads first."""
    rotate: tuple[int, int]
    """Rotary positions on q and k."""
    exchange: tuple[int, int]
    """Copies into and out of the all-to-alls of q, k, v and of the result."""
    alone: tuple[int, int]
    """Heads and tokens exchanged in memory where sp is 1."""
    swiglu: tuple[int, int]
    """Per hidden feature; the backward pass makes the gated features again."""


EAGER = Passes(
    norm=(5, 15), modulate_first=(2, 9), cast=(3, 3), gate=(3, 9), split=(6, 12), rotate=(14, 8),
    exchange=(16, 16), alone=(2, 2), swiglu=(5, 16),
)  # fmt: skip
COMPILED = Passes(
    norm=(3, 5), modulate_first=(0, 1), cast=(0, 0), gate=(3, 6), split=(6, 6), rotate=(0, 0),
    exchange=(16, 16), alone=(2, 2), swiglu=(3, 6),
)  # fmt: skip


def stage_bytes(
    config: RunConfig, channels: int, dims: ParallelDims, units: range, gradient_bytes: int = 4
) -> tuple[float, float]:
    """Bytes moved for one microbatch on the ranks of a stage, forward and backward.

    Args:
        channels: of the data.
        units: of the network, on this stage.
        gradient_bytes: of an accumulated gradient of a weight.
    """
    model, tokens = config.model, tokens_of_rank(config, dims)
    forward = backward = 0.0
    for kind in kinds_of(model, units):
        if kind == "layer":
            f, b = _block_bytes(model, tokens, dims.sp > 1)
            wf, wb = _weight_bytes(model, channels, gradient_bytes)
            f, b = model.blocks * f + wf, model.blocks * b + wb
            if model.checkpointing == "block":
                b += f
        else:
            f, b = _end_bytes(model, channels, tokens, kind)
        forward, backward = forward + f, backward + b
    return forward, backward


def step_bytes(config: RunConfig, channels: int, dims: ParallelDims, units: range) -> float:
    """Bytes moved once per step to cast weights to the type of the products.

    Where they are divided, each rank casts its share, and compiled blocks cast on the way.
    """
    model = config.model
    if model.precision != "bf16" or model.compile:
        return 0.0
    numbers = sum(product_weights(model, channels) for kind in kinds_of(model, units) if kind == "layer")
    return numbers * (4 + DTYPES[model.precision].itemsize) / (config.parallel.shard or dims.dp * dims.places)


def product_weights(model: ModelConfig, channels: int) -> int:
    """Weights of a layer's products with tokens: qkv, out, gate and up, down."""
    return sum(weight.numbers for weight in unit_weights(model, channels, "layer") if weight.product)


def other_weights(model: ModelConfig, channels: int, kind: str) -> int:
    """Parameters of a unit that meet one vector per sample: modulation, norms; all of a head's."""
    return sum(weight.numbers for weight in unit_weights(model, channels, kind) if not weight.product)


def _block_bytes(model: ModelConfig, tokens: int, divided: bool) -> tuple[float, float]:
    """Bytes of the tokens in one block, forward and backward."""
    passes = COMPILED if model.compile else EAGER
    residual, product = DTYPES[model.residual].itemsize, DTYPES[model.precision].itemsize
    found = []
    for way in (0, 1):
        norm = passes.norm[way] + passes.modulate_first[way] * (model.norm_order == "modulate-norm")
        between = passes.cast[way] * (residual != product)
        attention = passes.split[way] + (passes.exchange if divided else passes.alone)[way]
        attention += passes.rotate[way] * model.rope
        features = 2 * (norm + passes.gate[way] + between) * residual + attention * product
        found.append(tokens * (features * model.width + passes.swiglu[way] * model.hidden * product))
    return found[0], found[1]


def _weight_bytes(model: ModelConfig, channels: int, gradient_bytes: int) -> tuple[float, float]:
    """Bytes of a layer's weights: forward, and backward, where gradients are added to those kept.

    Products read their weights themselves. Modulation works on vectors, so all it does is read weights.
    """
    product = DTYPES[model.precision].itemsize
    weights, vectors = product_weights(model, channels), other_weights(model, channels, "layer")
    exact = 8 if model.precision == "fp64" else 4
    forward = vectors * exact
    # Written by the product, then read with the sum, which is written: 3 more.
    backward = weights * (product + 2 * gradient_bytes) + vectors * (2 * exact + 2 * gradient_bytes)
    if model.modulation_layers == 2:
        backward += vectors * exact
    return forward, backward


def _end_bytes(model: ModelConfig, channels: int, tokens: int, kind: str) -> tuple[float, float]:
    """Bytes of the embedding or the head, which work in fp32 (fp64)."""
    residual, exact = DTYPES[model.residual].itemsize, 8 if model.precision == "fp64" else 4
    counts = channel_counts(channels)
    if kind == "embedding":  # input + encoding; tokens cast to the type of the residual
        forward = tokens * (3 * counts[0] * exact + model.width * (exact + residual))
        return forward, tokens * model.width * (residual + 2 * exact)
    weights = other_weights(model, channels, "head")
    cast = residual + exact
    loss = 10 * counts[1] * exact
    forward = tokens * (model.width * (cast + EAGER.norm[0] * exact) + loss) + weights * exact
    return forward, tokens * (model.width * (cast + EAGER.norm[1] * exact) + loss) + 4 * weights * exact
