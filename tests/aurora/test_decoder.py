"""Decoder: heads, levels and bands against plain ways of saying the same."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from aeris.aurora import checkpointing
from aeris.aurora.config import AuroraConfig
from aeris.aurora.decoder import Decoder, unpatch
from aeris.aurora.embeddings import level_encoding
from aeris.aurora.normalisation import level_name
from aeris.aurora.patch_embedding import patches
from tests.aurora.tiny_aurora import CONFIG, LEVELS, randomise

RES = (4, 4, 6)
EVERYTHING = replace(
    CONFIG,
    level_condition=(*LEVELS, 0.5),
    separate_perceiver=("q", "t"),
    modulation_heads=("2t", "t"),
    dec_depth=2,
)


def decode(decoder: Decoder, latents: Tensor) -> dict[str, Tensor]:
    """Decode every variable."""
    config = decoder.config
    levels = level_encoding(LEVELS, 2 * config.embed_dim).double()
    surf, atmos = decoder(latents, config.surf_vars, config.atmos_vars, LEVELS, levels, RES)
    return {**surf, **{f"{name} on levels": x for name, x in atmos.items()}}


def latents() -> Tensor:
    """Return random output of a backbone."""
    generator = torch.Generator().manual_seed(2)
    return torch.randn(2, 4 * 24, 64, generator=generator, dtype=torch.float64)


def plain(decoder: Decoder, x: Tensor) -> dict[str, Tensor]:
    """Decode variable by variable and level by level."""
    config, patch = decoder.config, decoder.config.patch_size
    x = x.unflatten(1, (4, 24))

    def tile(tokens: Tensor) -> Tensor:
        return tokens.view(2, 4, 6, patch, patch).permute(0, 1, 3, 2, 4).reshape(2, 4 * patch, 6 * patch)

    out = {
        name: tile(decoder.surf_heads[name](x[:, 0])) for name in decoder.with_modulation(config.surf_vars)
    }
    queries = decoder.atmos_levels_embed(level_encoding(LEVELS, 64).double()).expand(48, -1, -1)
    context = x[:, 1:].transpose(1, 2).reshape(48, 3, 64)
    for name in decoder.with_modulation(config.atmos_vars):
        apart = name.removesuffix("_mod") in config.separate_perceiver
        perceiver = decoder.level_decoder_alternate if apart else decoder.level_decoder
        tokens, head = perceiver(queries, context), decoder.atmos_heads[name]
        maps = []
        for c, level in enumerate(LEVELS):
            linear = head.layers[level_name(level)] if config.level_condition else head
            maps.append(tile(linear(tokens[:, c])))
        out[f"{name} on levels"] = torch.stack(maps, dim=1)
    return out


@pytest.mark.parametrize("config", [CONFIG, EVERYTHING], ids=["plain", "everything"])
def test_heads_levels_and_decoders(config: AuroraConfig) -> None:
    decoder = randomise(Decoder(config))
    assert isinstance(decoder, Decoder)
    x = latents()
    ours, expected = decode(decoder, x), plain(decoder, x)
    assert list(ours) == list(expected)
    for name, field in ours.items():
        assert torch.allclose(field, expected[name], atol=1e-12), name


def test_modulation_heads_have_names_of_their_own() -> None:
    decoder = Decoder(EVERYTHING)
    assert decoder.with_modulation(("2t", "msl")) == ("2t", "msl", "2t_mod")
    assert set(decoder.atmos_heads) == {"z", "u", "v", "t", "q", "t_mod"}


def test_patches_put_together_are_the_map() -> None:
    field = torch.randn(2, 1, 3, 8, 12)
    assert torch.equal(unpatch(patches([field], 4).flatten(1, 2), 3, 4)[:, 0], field[:, 0])


@pytest.mark.parametrize("config", [CONFIG, EVERYTHING], ids=["plain", "everything"])
def test_bands_and_recomputation_change_nothing(config: AuroraConfig) -> None:
    results = []
    for chunk, policy in ((0, "none"), (13, "encoder-decoder+blocks")):
        decoder = randomise(Decoder(replace(config, level_chunk=chunk)))
        checkpointing.apply(decoder, policy)
        x = latents().requires_grad_()
        out = decode(decoder, x)
        torch.stack([field.square().sum() for field in out.values()]).sum().backward()
        results.append([*out.values(), x.grad, *(p.grad for p in decoder.parameters())])
    for one, two in zip(*results):
        assert (one is None) == (two is None)
        assert one is None or torch.allclose(one, two, rtol=1e-11, atol=1e-10)


def test_no_graph_breaks() -> None:
    config = replace(
        EVERYTHING, atmos_vars=("t", "u"), separate_perceiver=("t",), dec_depth=1, level_chunk=10
    )
    decoder = randomise(Decoder(config))
    x = latents()
    expected = decode(decoder, x)
    decoder.compile(fullgraph=True, backend="eager")
    for name, field in decode(decoder, x).items():
        assert torch.allclose(field, expected[name], atol=1e-13)
