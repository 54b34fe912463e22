"""Encoder, its patch embeddings and its Perceiver, against plain ways of saying the same."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from aeris.aurora import checkpointing
from aeris.aurora.config import CALENDAR_VARS, AuroraConfig
from aeris.aurora.encoder import Encoder, bands
from aeris.aurora.initialise import initialise
from aeris.aurora.normalisation import level_name
from aeris.aurora.patch_embedding import LevelPatchEmbedding, PatchEmbedding, affine, patches
from aeris.aurora.perceiver import CrossAttention, Perceiver
from tests.aurora.tiny_aurora import CONFIG, LEVELS, encodings, fields, randomise


def encode(config: AuroraConfig, change: str = "", history: int = 2, policy: str = "none") -> Tensor:
    """Encode random fields with random weights; `change` reverses the order of variables."""
    encoder = randomise(Encoder(config))
    checkpointing.apply(encoder, policy)
    some = fields(config, 2, history, 16, 24)
    if change == "reversed":
        some = [dict(reversed(kind.items())) for kind in some]
    result: Tensor = encoder(*some, LEVELS, encodings(config, 2, 16, 24))
    return result


def test_patches_and_kernel_are_a_convolution() -> None:
    names = ("2t", "msl", "z")
    embedding = randomise(PatchEmbedding(names, 4, 8, 3))
    maps = [torch.randn(2, 2, 8, 12, dtype=torch.float64) for _ in names]
    ours = affine(patches(maps, 4), *embedding.kernel(names, 2))
    weight = torch.cat([embedding.weights[name] for name in names], dim=1)[:, :, :2]
    theirs = F.conv3d(torch.stack(maps, dim=1), weight, embedding.bias, stride=(2, 4, 4))
    assert torch.allclose(ours, theirs[:, :, 0].permute(0, 2, 3, 1), atol=1e-13)


def test_kernels_per_level() -> None:
    embedding = randomise(LevelPatchEmbedding(("t", "q"), (1000, 850, 0.5), 2, 8, 1))
    assert list(embedding.layers) == ["0_5", "1000", "850"]
    levels = (0.5, 850.0)
    maps = [torch.randn(2, 1, 2, 4, 6, dtype=torch.float64) for _ in range(2)]
    x = patches(maps, 2)
    ours = affine(x, *embedding.kernel(("t", "q"), 1, levels))
    for c, level in enumerate(levels):
        single = affine(x[..., c, :], *embedding.layers[level_name(level)].kernel(("t", "q"), 1))
        assert torch.allclose(ours[..., c, :], single, atol=1e-13)


def test_bands_cover_all_rows_once() -> None:
    assert bands(7, 10, 1, 20) == [slice(0, 2), slice(2, 4), slice(4, 6), slice(6, 7)]
    assert bands(3, 10, 2, 5) == [slice(0, 1), slice(1, 2), slice(2, 3)]
    assert bands(3, 10, 2, 0) == [slice(0, 3)]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"level_condition": LEVELS},
        {"dynamic_vars": True, "atmos_static_vars": True},
        {"stabilise_level_agg": True, "enc_depth": 2},
    ],
    ids=str,
)
def test_bands_and_recomputation_change_nothing(changes: dict[str, object]) -> None:
    config = replace(CONFIG, level_chunk=0, **changes)  # type: ignore[arg-type]
    whole = encode(config)
    assert torch.allclose(encode(replace(config, level_chunk=13)), whole, atol=1e-13)
    gradients = []
    for chunk, policy in ((0, "none"), (13, "encoder-decoder+blocks")):
        encoder = randomise(Encoder(replace(config, level_chunk=chunk)))
        checkpointing.apply(encoder, policy)
        x = encoder(*fields(config, 2, 2, 16, 24), LEVELS, encodings(config, 2, 16, 24))
        x.square().sum().backward()
        gradients.append([p.grad for p in encoder.parameters()])
    for one, two in zip(*gradients):
        assert one is not None and two is not None
        assert torch.allclose(one, two, rtol=1e-11, atol=1e-10)


def test_order_of_variables_does_not_matter_and_some_may_lack() -> None:
    assert torch.allclose(encode(CONFIG, "reversed"), encode(CONFIG), atol=1e-13)
    encoder = randomise(Encoder(CONFIG))
    surf, _, atmos = fields(CONFIG, 1, 2, 8, 12)
    surf.pop("msl")
    assert encoder(surf, {}, atmos, LEVELS, encodings(CONFIG, 1, 8, 12)).shape == (1, 4 * 6, 32)


def test_shorter_history_uses_the_first_slots() -> None:
    embedding = randomise(PatchEmbedding(("t",), 2, 4, 3))
    weight, _ = embedding.kernel(("t",), 1)
    assert torch.equal(weight, embedding.weights["t"][:, 0, 0].flatten(1))


def test_calendar_and_static_fields_reach_the_levels() -> None:
    config = replace(CONFIG, dynamic_vars=True, atmos_static_vars=True)
    encoder = randomise(Encoder(config))
    surf, static, atmos = fields(config, 2, 2, 8, 12)
    on_surface, on_levels = encoder._with_fixed(surf, static, atmos, encodings(config, 2, 8, 12).calendar_B6)
    names = (*config.static_vars, *CALENDAR_VARS)
    assert tuple(on_surface) == (*config.surf_vars, *names)
    assert tuple(on_levels) == (*config.atmos_vars, *(f"static_{name}" for name in names))
    assert torch.equal(on_levels["static_z"][:, :, 1], static["z"])
    assert on_levels["static_tod_sin"].unique().tolist() == pytest.approx([1.0])  # 06 UTC
    bugged = Encoder(replace(config, simulate_indexing_bug=True))
    _, on_levels = bugged._with_fixed(surf, static, atmos, encodings(config, 2, 8, 12).calendar_B6)
    assert torch.equal(on_levels["static_z"], atmos["z"])


def test_latents_come_one_after_the_other_with_the_surface_first() -> None:
    encoder = randomise(Encoder(CONFIG))
    some = fields(CONFIG, 1, 2, 8, 12)
    before = encoder(*some, LEVELS, encodings(CONFIG, 1, 8, 12))
    some[0]["2t"] = some[0]["2t"] + 1
    changed = (encoder(*some, LEVELS, encodings(CONFIG, 1, 8, 12)) != before).any(dim=-1)[0]
    assert changed.tolist() == [True] * 6 + [False] * 18


def test_no_graph_breaks() -> None:
    config = replace(CONFIG, level_condition=LEVELS, level_chunk=10)
    encoder = randomise(Encoder(config))
    arguments = (*fields(config, 1, 2, 8, 12), LEVELS, encodings(config, 1, 8, 12))
    compiled = torch.compile(encoder, fullgraph=True, backend="eager")
    assert torch.allclose(compiled(*arguments), encoder(*arguments), atol=1e-13)


def naive(attention: CrossAttention, queries: Tensor, context: Tensor) -> Tensor:
    """Cross-attention patch by patch and head by head."""
    out = []
    for patch in range(context.shape[0]):
        q = queries if queries.dim() == 2 else queries[patch]
        q = q @ attention.to_q.weight.T
        k, v = (context[patch] @ attention.to_kv.weight.T).chunk(2, dim=-1)
        if attention.ln_k is not None and attention.ln_q is not None:
            q, k = attention.ln_q(q), attention.ln_k(k)
        heads = []
        for part in range(attention.heads):
            some = slice(part * q.shape[1] // attention.heads, (part + 1) * q.shape[1] // attention.heads)
            scores = q[:, some] @ k[:, some].T / (q.shape[1] / attention.heads) ** 0.5
            heads.append(torch.softmax(scores, dim=-1) @ v[:, some])
        out.append(torch.cat(heads, dim=-1) @ attention.to_out.weight.T)
    return torch.stack(out)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("normalised", [True, False])
def test_cross_attention(shared: bool, normalised: bool) -> None:
    attention = randomise(CrossAttention(16, 4, normalised, fp16_safe=False))
    for parameter in attention.parameters():
        parameter.data *= 10
    queries = torch.randn((3, 16) if shared else (5, 3, 16), dtype=torch.float64)
    context = torch.randn(5, 7, 16, dtype=torch.float64)
    assert torch.allclose(attention(queries, context), naive(attention, queries, context), atol=1e-12)


@pytest.mark.parametrize("shared", [True, False])
def test_scores_beyond_float16_stay_finite(shared: bool) -> None:
    perceiver = Perceiver(16, 4, 1, 2.0, fp16_safe=True)
    initialise(perceiver, 0)
    for parameter in perceiver.parameters():
        parameter.data *= 200
    queries = 30 * torch.randn((3, 16) if shared else (5, 3, 16))
    with torch.autocast("cpu", torch.float16):
        out = perceiver.layers[0][0](queries, 100 * torch.randn(5, 7, 16))  # type: ignore[index]
    assert out.isfinite().all()
