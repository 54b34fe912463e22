"""Encoder: maps of many variables and levels become latents per patch.

Works band by band (a few rows of patches), so the levels of all patches never exist at once.
Shapes: B batch, T history, C levels, V variables, H rows, W columns, h = H/P, w = W/P, r rows of patches of a
band, L = h w patches, D width, S = config.latent_levels latents (the first is the surface's).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from aeris.aurora import checkpointing
from aeris.aurora.config import CALENDAR_VARS, AuroraConfig
from aeris.aurora.embeddings import Encodings
from aeris.aurora.patch_embedding import LevelPatchEmbedding, PatchEmbedding, affine, patches, uncast
from aeris.aurora.perceiver import MLP, Perceiver

Maps = dict[str, Tensor]
"""Fields by name."""


def bands(rows: int, columns: int, batch: int, chunk: int) -> list[slice]:
    """Cut rows of patches into bands of at most `chunk` patches over the batch, at least one row each.

    Args:
        rows: h.
        columns: w.
        batch: B.
        chunk: Most patches of a band; 0: one band.
    """
    height = max(1, chunk // (batch * columns)) if chunk else rows
    return [slice(start, min(start + height, rows)) for start in range(0, rows, height)]


class Encoder(nn.Module):
    """Patch embeddings, the level aggregation, and what tells a token where and when it is."""

    region = "encoder"
    """What `aeris.aurora.checkpointing` calls this part; it is computed again band by band."""

    def __init__(self, config: AuroraConfig) -> None:
        super().__init__()
        width, history, patch = config.embed_dim, config.max_history_size, config.patch_size
        self.config = config
        self.checkpointing = False
        fixed = config.static_vars + (CALENDAR_VARS if config.dynamic_vars else ())
        on_levels = tuple(f"static_{name}" for name in fixed) if config.atmos_static_vars else ()
        self.atmos_latents = nn.Parameter(torch.empty(config.latent_levels - 1, width))
        self.surf_level_encoding = nn.Parameter(torch.empty(width))
        self.surf_mlp = MLP(width, int(width * config.mlp_ratio), config.drop_rate)
        self.surf_norm = nn.LayerNorm(width)
        self.pos_embed = nn.Linear(width, width)
        self.scale_embed = nn.Linear(width, width)
        self.lead_time_embed = nn.Linear(width, width)
        self.absolute_time_embed = nn.Linear(width, width)
        self.atmos_levels_embed = nn.Linear(width, width)
        self.surf_token_embeds = PatchEmbedding(config.surf_vars + fixed, patch, width, history)
        self.atmos_token_embeds: PatchEmbedding | LevelPatchEmbedding
        names = config.atmos_vars + on_levels
        if config.level_condition:
            self.atmos_token_embeds = LevelPatchEmbedding(
                names, config.level_condition, patch, width, history
            )
        else:
            self.atmos_token_embeds = PatchEmbedding(names, patch, width, history)
        self.level_agg = Perceiver(
            width,
            config.num_heads,
            config.enc_depth,
            config.mlp_ratio,
            eps=config.perceiver_ln_eps,
            dropout=config.drop_rate,
            stabilised=config.stabilise_level_agg,
            fp16_safe=config.use_fp16_safe_attention,
        )
        self.pos_drop = nn.Dropout(config.drop_rate)

    def forward(
        self,
        surf_vars: Mapping[str, Tensor],
        static_vars: Mapping[str, Tensor],
        atmos_vars: Mapping[str, Tensor],
        levels: Sequence[float],
        encodings: Encodings,
    ) -> Tensor:
        """Encode normalised fields.

        Args:
            surf_vars: Maps (B, T, H, W).
            static_vars: Maps (B, T, H, W).
            atmos_vars: Maps (B, T, C, H, W).
            levels: Levels in hPa, C of them.
            encodings: Of width D, see `aeris.aurora.embeddings`.

        Returns:
            Tokens (B, S L, D), latent by latent.
        """
        surf, atmos = self._with_fixed(surf_vars, static_vars, atmos_vars, encodings.calendar_B6)
        batch, history, _, height, width = next(iter(atmos_vars.values())).shape
        patch = self.config.patch_size
        surf_kernel = self.surf_token_embeds.kernel(tuple(surf), history)
        if isinstance(self.atmos_token_embeds, LevelPatchEmbedding):
            atmos_kernel = self.atmos_token_embeds.kernel(tuple(atmos), history, levels)
        else:
            atmos_kernel = self.atmos_token_embeds.kernel(tuple(atmos), history)
        level_CD = self.atmos_levels_embed(encodings.level_CD)
        parts = []
        for band in bands(height // patch, width // patch, batch, self.config.level_chunk):
            rows = slice(band.start * patch, band.stop * patch)
            arguments = (
                [x[..., rows, :] for x in surf.values()],
                [x[..., rows, :] for x in atmos.values()],
                surf_kernel,
                atmos_kernel,
                level_CD,
            )
            parts.append(checkpointing.run(self, self._encode_band, *arguments))
        x_BSLD = parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)
        with uncast(x_BSLD.device):
            place_LD = self.pos_embed(encodings.position_LD) + self.scale_embed(encodings.scale_LD)
            time_BD = self.lead_time_embed(encodings.lead_time_BD)
            time_BD = time_BD + self.absolute_time_embed(encodings.absolute_time_BD)
        x_BSLD = x_BSLD + (place_LD + time_BD[:, None])[:, None]
        tokens: Tensor = self.pos_drop(x_BSLD.flatten(1, 2))
        return tokens

    def _with_fixed(
        self,
        surf_vars: Mapping[str, Tensor],
        static_vars: Mapping[str, Tensor],
        atmos_vars: Mapping[str, Tensor],
        calendar_B6: Tensor,
    ) -> tuple[Maps, Maps]:
        """Add static maps and the calendar to the surface and, where wanted, to every level."""
        fixed = dict(static_vars)
        like = next(iter(surf_vars.values()))
        if self.config.dynamic_vars:
            for index, name in enumerate(CALENDAR_VARS):
                fixed[name] = calendar_B6[:, index, None, None, None].to(like.dtype).expand_as(like)
        surf = {**surf_vars, **fixed}
        atmos = dict(atmos_vars)
        if self.config.atmos_static_vars:
            on_level = next(iter(atmos_vars.values()))
            atmos |= {f"static_{name}": x[:, :, None].expand_as(on_level) for name, x in fixed.items()}
            if self.config.simulate_indexing_bug and "z" in atmos and "static_z" in atmos:
                atmos["static_z"] = atmos["z"]
        return surf, atmos

    def _encode_band(
        self,
        surf: list[Tensor],
        atmos: list[Tensor],
        surf_kernel: tuple[Tensor, Tensor],
        atmos_kernel: tuple[Tensor, Tensor],
        level_CD: Tensor,
    ) -> Tensor:
        """Encode a band of r rows of patches: (B, S, r w, D)."""
        patch = self.config.patch_size
        surf_BLD = affine(patches(surf, patch).flatten(1, 2), *surf_kernel)
        surf_BLD = surf_BLD + self.surf_level_encoding.to(surf_BLD.dtype)
        surf_BLD = surf_BLD + self.surf_norm(self.surf_mlp(surf_BLD))
        atmos_BLCF = patches(atmos, patch).flatten(1, 2)
        atmos_BLCD = affine(atmos_BLCF, *atmos_kernel)
        atmos_BLCD = atmos_BLCD + level_CD.to(atmos_BLCD.dtype)
        latents_QD = self.atmos_latents.to(atmos_BLCD.dtype)
        latents_NQD = self.level_agg(latents_QD, atmos_BLCD.flatten(0, 1))
        latents_BQLD = latents_NQD.unflatten(0, surf_BLD.shape[:2]).transpose(1, 2)
        return torch.cat((surf_BLD[:, None], latents_BQLD), dim=1)
