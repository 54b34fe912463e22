"""Decoder: latents per patch become maps of every variable and level.

Works band by band as the encoder does; the heads of all variables are one matrix product.
Shapes: B batch, C levels, V variables, H rows, W columns, P patch, h = H/P, w = W/P, r rows of patches of a
band, L = h w patches, S latents, E = 2 embed_dim width.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from aeris.aurora import checkpointing
from aeris.aurora.config import AuroraConfig
from aeris.aurora.encoder import Maps, bands
from aeris.aurora.normalisation import level_name
from aeris.aurora.patch_embedding import affine
from aeris.aurora.perceiver import Perceiver


def unpatch(x: Tensor, columns: int, patch: int) -> Tensor:
    """Put patches together: (B, r w, C, V P²) becomes (B, V, C, r P, w P)."""
    batch, _, levels, numbers = x.shape
    x = x.view(batch, -1, columns, levels, numbers // patch**2, patch, patch)
    return x.permute(0, 4, 3, 1, 5, 2, 6).flatten(5).flatten(3, 4)


class LevelHeads(nn.Module):
    """A head per level."""

    def __init__(self, width: int, numbers: int, levels: Iterable[float]) -> None:
        super().__init__()
        self.layers = nn.ModuleDict(
            {key: nn.Linear(width, numbers) for key in sorted(map(level_name, levels))}
        )


def joined(heads: nn.ModuleDict, names: Sequence[str], levels: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Join the heads of some variables: weight (V P², E) and bias (V P²,), or (C, V P², E) and (C, V P²)."""
    modules = [heads[name] for name in names]
    if not isinstance(modules[0], LevelHeads):
        return _joined(modules)
    keys = [level_name(level) for level in levels]
    pairs = [_joined([cast(LevelHeads, module).layers[key] for module in modules]) for key in keys]
    weights, biases = zip(*pairs)
    return torch.stack(weights), torch.stack(biases)


def _joined(heads: Iterable[nn.Module]) -> tuple[Tensor, Tensor]:
    linear = [cast(nn.Linear, head) for head in heads]
    return torch.cat([head.weight for head in linear]), torch.cat([head.bias for head in linear])


class Decoder(nn.Module):
    """The level decoders and a head per variable."""

    region = "decoder"
    """What `aeris.aurora.checkpointing` calls this part; it is computed again band by band."""

    def __init__(self, config: AuroraConfig) -> None:
        super().__init__()
        width, numbers = 2 * config.embed_dim, config.patch_size**2
        self.config = config
        self.checkpointing = False
        self.level_decoder = self._perceiver(config)
        if config.separate_perceiver:
            self.level_decoder_alternate = self._perceiver(config)
        self.surf_heads = nn.ModuleDict(
            {name: nn.Linear(width, numbers) for name in sorted(self.with_modulation(config.surf_vars))}
        )
        self.atmos_heads = nn.ModuleDict(
            {
                name: LevelHeads(width, numbers, config.level_condition)
                if config.level_condition
                else nn.Linear(width, numbers)
                for name in sorted(self.with_modulation(config.atmos_vars))
            }
        )
        self.atmos_levels_embed = nn.Linear(width, width)

    @staticmethod
    def _perceiver(config: AuroraConfig) -> Perceiver:
        return Perceiver(
            2 * config.embed_dim,
            config.num_heads,
            config.dec_depth,
            config.dec_mlp_ratio,
            eps=config.perceiver_ln_eps,
            fp16_safe=config.use_fp16_safe_attention,
        )

    def with_modulation(self, names: Iterable[str]) -> tuple[str, ...]:
        """Add "<name>_mod" after the variables, for those that have a modulation head."""
        names = tuple(names)
        return names + tuple(f"{name}_mod" for name in names if name in self.config.modulation_heads)

    def forward(
        self,
        x_BNE: Tensor,
        surf_vars: Sequence[str],
        atmos_vars: Sequence[str],
        levels: Sequence[float],
        level_CE: Tensor,
        patch_res: tuple[int, int, int],
    ) -> tuple[Maps, Maps]:
        """Predict normalised fields.

        Args:
            x_BNE: Tokens of the backbone, N = S L, latent by latent.
            surf_vars: Surface variables to predict.
            atmos_vars: Variables on levels to predict.
            levels: Levels in hPa.
            level_CE: Their encoding of width E.
            patch_res: (S, h, w).

        Returns:
            Maps (B, H, W) and (B, C, H, W) by name; also "<name>_mod" of variables with modulation heads.
        """
        latents, rows, columns = patch_res
        surf_names, atmos_names = self.with_modulation(surf_vars), self.with_modulation(atmos_vars)
        groups = self._groups(atmos_names)
        surf_head = joined(self.surf_heads, surf_names, ())
        atmos_heads = [joined(self.atmos_heads, names, levels) for names in groups.values()]
        level_CE = self.atmos_levels_embed(level_CE)
        x_BSLE = x_BNE.unflatten(1, (latents, rows * columns))
        parts = []
        for band in bands(rows, columns, x_BNE.shape[0], self.config.level_chunk):
            some = x_BSLE[:, :, band.start * columns : band.stop * columns]
            arguments = (some, surf_head, atmos_heads, tuple(groups), level_CE, columns)
            parts.append(checkpointing.run(self, self._decode_band, *arguments))
        surf_BVHW, *atmos = (
            x[0] if len(x) == 1 else torch.cat(x, dim=-2) for x in ([*maps] for maps in zip(*parts))
        )
        surf = {name: surf_BVHW[:, index, 0] for index, name in enumerate(surf_names)}
        found = {
            name: x_BVCHW[:, index]
            for names, x_BVCHW in zip(groups.values(), atmos)
            for index, name in enumerate(names)
        }
        return surf, {name: found[name] for name in atmos_names}

    def _groups(self, names: Sequence[str]) -> dict[str, list[str]]:
        """Split the variables by the level decoder that they come from."""
        apart = self.config.separate_perceiver
        groups: dict[str, list[str]] = {}
        for name in names:
            alternate = name in apart or name.removesuffix("_mod") in apart
            decoder = "level_decoder_alternate" if alternate else "level_decoder"
            groups.setdefault(decoder, []).append(name)
        return groups

    def _decode_band(
        self,
        x_BSLE: Tensor,
        surf_head: tuple[Tensor, Tensor],
        atmos_heads: list[tuple[Tensor, Tensor]],
        decoders: tuple[str, ...],
        level_CE: Tensor,
        columns: int,
    ) -> list[Tensor]:
        """Decode a band of r rows of patches: (B, V, 1, r P, W), then (B, V, C, r P, W) per level decoder."""
        patch = self.config.patch_size
        surf_BLO = affine(x_BSLE[:, 0], *surf_head)
        maps = [unpatch(surf_BLO[:, :, None], columns, patch)]
        context_BLSE = x_BSLE[:, 1:].transpose(1, 2)
        context_NSE = context_BLSE.flatten(0, 1)
        queries_CE = level_CE.to(context_NSE.dtype)
        for decoder, head in zip(decoders, atmos_heads):
            levels_NCE = getattr(self, decoder)(queries_CE, context_NSE)
            levels_BLCE = levels_NCE.unflatten(0, context_BLSE.shape[:2])
            maps.append(unpatch(affine(levels_BLCE, *head), columns, patch))
        return maps
