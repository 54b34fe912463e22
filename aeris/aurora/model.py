"""Aurora: a batch of weather in, the batch one time step later out.

Encoder, backbone and decoder see plain tensors; this file is what lies around them: units, grids, times, and
hooks of variants that feed or predict something else (named as in the official package, version 2.0.1).
Shapes: B batch, T history, C levels, H rows, W columns.
Source: Aurora, Bodnar et al. 2025 (Nature 641, 1180); microsoft-aurora 2.0.1.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from aeris.aurora import checkpointing, lora, weights
from aeris.aurora.batch import Batch, Metadata
from aeris.aurora.config import AuroraConfig, Part, Published
from aeris.aurora.decoder import Decoder
from aeris.aurora.embeddings import (
    EncodingCache,
    Encodings,
    absolute_time_encoding,
    calendar,
)
from aeris.aurora.encoder import Encoder
from aeris.aurora.initialise import initialise
from aeris.aurora.normalisation import level_name
from aeris.aurora.swin3d import Swin3DBackbone


class Aurora(nn.Module):
    """Aurora with 1.3 billion weights, 0.25°, fine-tuned with adapters.

    Args:
        config: What the model is made of; `default` if left out.
        **changes: Fields of the configuration to replace, also as the official package names them
            (see `AuroraConfig.changed`).

    Raises:
        ValueError: If settings do not go together.
    """

    default = AuroraConfig(use_lora=True)
    published: Published | None = Published(
        "aurora-0.25-finetuned.ckpt", "0be7e57c685dac86b78c4a19a3ab149d13c6a3dd"
    )
    reads_missing: tuple[str, ...] = ()
    """Variables whose missing values (NaN) the model reads as such: nobody is to fill them before."""

    def __init__(self, config: AuroraConfig | None = None, **changes: Any) -> None:
        super().__init__()
        self.config = (config or self.default).changed(**changes)
        self.network_config = self._network_config()
        device = torch.empty(0).device
        with torch.device("meta"):
            self.encoder = Encoder(self.network_config)
            self.backbone = Swin3DBackbone(self.network_config)
            self.decoder = Decoder(self.network_config)
        self._cache = EncodingCache()
        if device.type != "meta":
            self.to_empty(device=device)
            initialise(self)

    def _network_config(self) -> AuroraConfig:
        """Return the configuration to build the network from, where its variables are not the user's."""
        return self.config

    @property
    def patch_size(self) -> int:
        """Rows and columns of a patch."""
        return self.config.patch_size

    @property
    def timestep(self) -> timedelta:
        """How far one application goes."""
        return timedelta(hours=self.config.timestep_h)

    @property
    def variable_lead_time(self) -> bool:
        """Whether `forward` wants lead times."""
        return self.config.variable_lead_time

    @property
    def max_history_size(self) -> int:
        """Most times of a batch."""
        return self.config.max_history_size

    @property
    def surf_stats(self) -> dict[str, tuple[float, float]]:
        """Location and scale of surface and static variables that replace the usual ones."""
        return self.config.stats

    def forward(self, batch: Batch, lead_times: Tensor | None = None) -> Batch:
        """Predict.

        Args:
            batch: States in physical units; rows may exceed a multiple of the patch size by one.
            lead_times: Hours ahead, one per sample (B,); only for models with `variable_lead_time`.

        Returns:
            The prediction in physical units, T = 1, on the model's device, cropped; float32, or float64 where
            the weights are.

        Raises:
            ValueError: If the batch does not fit the model or lead times are missing.
        """
        weight = next(self.parameters())
        # Physical units need more digits than half precision has.
        wide = torch.promote_types(weight.dtype, torch.float32)
        batch = self.batch_transform_hook(batch)
        hours_B = self._lead_times(batch, lead_times)
        batch = batch.type(wide).crop(self.patch_size).to(weight.device)
        batch = self._pre_norm_hook(batch)
        static_vars = batch.static_vars
        batch = batch.normalise(self.surf_stats)
        fed = self._pre_encoder_hook(self._positive(batch))
        self._check(fed)
        surf_vars, atmos_vars = self._predict(fed, hours_B)
        pred = Batch(
            {name: x[:, None].to(wide) for name, x in surf_vars.items()},
            batch.static_vars,
            {name: x[:, None].to(wide) for name, x in atmos_vars.items()},
            self._metadata(batch.metadata, hours_B),
        )
        pred = self._post_decoder_hook(batch, pred)
        if pred.metadata.rollout_step > 1 or self.config.clamp_at_first_step:
            pred = self._positive(pred)
        pred = replace(pred.unnormalise(self.surf_stats), static_vars=static_vars)
        return self._post_unnorm_hook(batch, pred)

    def _lead_times(self, batch: Batch, lead_times: Tensor | None) -> Tensor:
        """Lead times in hours, float64 on the CPU."""
        count = len(batch.metadata.time)
        if not self.variable_lead_time:
            return torch.full((count,), self.config.timestep_h, dtype=torch.float64, device="cpu")
        if lead_times is None or lead_times.shape != (count,):
            found = "none" if lead_times is None else f"shape {tuple(lead_times.shape)}"
            raise ValueError(
                f"this model wants lead_times in hours, one for each of {count} samples; found {found}"
            )
        return lead_times.detach().to(device="cpu", dtype=torch.float64)

    def _metadata(self, now: Metadata, hours_B: Tensor) -> Metadata:
        """When and where the prediction is."""
        time = tuple(t + timedelta(hours=h) for t, h in zip(now.time, hours_B.tolist()))
        return replace(now, time=time, rollout_step=now.rollout_step + 1)

    def _predict(self, fed: Batch, hours_B: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Run the network: normalised fields in, (B, H, W) and (B, C, H, W) out."""
        weight = next(self.parameters())
        device, dtype = weight.device, weight.dtype
        levels, step = fed.metadata.atmos_levels, fed.metadata.rollout_step
        # All of what is made on the CPU comes first: from here on a GPU does not wait.
        encodings = self._encodings(fed.metadata, hours_B, device, dtype)
        level_CE = self._cache.levels(levels, 2 * self.config.embed_dim, device, dtype)
        fed = fed.type(dtype)
        example = next(iter(fed.surf_vars.values()))
        static_vars = {
            name: x if x.dim() == 4 else x.expand(*example.shape[:2], -1, -1)
            for name, x in fed.static_vars.items()
        }
        rows, columns = fed.spatial_shape
        patch_res = self.config.latent_levels, rows // self.patch_size, columns // self.patch_size
        with self._autocast("encoder", device):
            x_BND = self.encoder(fed.surf_vars, static_vars, fed.atmos_vars, levels, encodings)
        with self._autocast("backbone", device) as cast:
            x_BND = x_BND if cast else x_BND.to(dtype)
            x_BNE = self.backbone(x_BND, encodings.lead_time_BD, patch_res, step)
        with self._autocast("decoder", device) as cast:
            x_BNE = x_BNE if cast else x_BNE.to(dtype)
            names = tuple(fed.surf_vars), tuple(fed.atmos_vars)
            surf_vars, atmos_vars = self.decoder(x_BNE, *names, levels, level_CE, patch_res)
        return surf_vars, atmos_vars

    def _encodings(
        self, where: Metadata, hours_B: Tensor, device: torch.device, dtype: torch.dtype
    ) -> Encodings:
        """Encode place, levels, lead times and times; all but the times are kept from call to call."""
        width, config = self.config.embed_dim, self.config
        updated = config.use_updated_lead_time_embedding
        dated = (
            absolute_time_encoding(where.time, width),
            calendar(where.time) if config.dynamic_vars else torch.empty(0, device="cpu"),
        )
        return Encodings(
            *self._cache.grid(where, self.patch_size, width, device, dtype),
            self._cache.levels(where.atmos_levels, width, device, dtype),
            self._cache.lead_times(hours_B, width, updated, device, dtype),
            *(_sent(x.to(dtype), device) for x in dated),
        )

    def _autocast(self, part: Part, device: torch.device) -> contextlib.AbstractContextManager[Any]:
        """Autocast where the configuration wants it, else a context that yields None."""
        wanted = self.config.autocast and part in self.config.autocast_parts
        if not wanted or device.type == "meta":
            return contextlib.nullcontext()
        return torch.autocast(device.type, getattr(torch, self.config.autocast_dtype))

    def _positive(self, batch: Batch) -> Batch:
        """Clamp variables that cannot be negative, in a copy."""

        def clamp(fields: dict[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
            return {name: x.clamp(min=0) if name in names else x for name, x in fields.items()}

        return replace(
            batch,
            surf_vars=clamp(batch.surf_vars, self.config.positive_surf_vars),
            atmos_vars=clamp(batch.atmos_vars, self.config.positive_atmos_vars),
        )

    def _check(self, fed: Batch) -> None:
        """Refuse what the network has no weights for."""
        config = self.network_config
        kinds = (
            ("surface", fed.surf_vars, config.surf_vars),
            ("static", fed.static_vars, config.static_vars),
            ("atmospheric", fed.atmos_vars, config.atmos_vars),
        )
        for kind, fields, known in kinds:
            if unknown := sorted(set(fields) - set(known)):
                raise ValueError(f"no weights for the {kind} variables {unknown}; the model knows {known}")
            if not fields and kind != "static":
                raise ValueError(f"the batch has no {kind} variable; the model knows {known}")
        history = next(iter(fed.surf_vars.values())).shape[1]
        if history > config.max_history_size:
            raise ValueError(
                f"{history} times in the batch; the model takes {config.max_history_size} at most"
            )
        trained = {level_name(level) for level in config.level_condition}
        strange = [level for level in fed.metadata.atmos_levels if level_name(level) not in trained]
        if trained and strange:
            raise ValueError(f"no weights for levels {strange} hPa; the model knows {config.level_condition}")

    def batch_transform_hook(self, batch: Batch) -> Batch:
        """Turn what users have into what the model reads, in physical units; must be idempotent."""
        return batch

    def _pre_norm_hook(self, batch: Batch) -> Batch:
        """Change a batch before it is normalised; roll-outs do not call it on their own."""
        return batch

    def _pre_encoder_hook(self, batch: Batch) -> Batch:
        """Change normalised fields before the encoder; what has a name here is predicted.

        Here: zeros for variables that are only predicted, whatever the batch holds.
        """
        surf_vars, atmos_vars = dict(batch.surf_vars), dict(batch.atmos_vars)
        for name in self.config.output_only_surf_vars:
            surf_vars[name] = torch.zeros_like(next(iter(batch.surf_vars.values())))
        for name in self.config.output_only_atmos_vars:
            atmos_vars[name] = torch.zeros_like(next(iter(batch.atmos_vars.values())))
        return replace(batch, surf_vars=surf_vars, atmos_vars=atmos_vars)

    def _post_decoder_hook(self, batch: Batch, pred: Batch) -> Batch:
        """Change a normalised prediction; `batch` is the normalised input before `_pre_encoder_hook`."""
        return pred

    def _post_unnorm_hook(self, batch: Batch, pred: Batch) -> Batch:
        """Change a prediction in physical units."""
        return pred

    def apply_rollout_input_clipping(self, pred: Batch) -> Batch:
        """Bound a prediction, in physical units, before it is fed back."""

        def clip(fields: dict[str, Tensor]) -> dict[str, Tensor]:
            return {name: x.clamp(*bounds[name]) if name in bounds else x for name, x in fields.items()}

        bounds = {
            name: limits for name, *limits in self.config.rollout_input_clipping if limits != [None, None]
        }
        return replace(pred, surf_vars=clip(pred.surf_vars), atmos_vars=clip(pred.atmos_vars))

    def reset_noise(self) -> None:
        """Forget noise of earlier calls (stochastic models)."""
        self.backbone.reset_noise()

    def set_noise_accumulation(self, n: int = 0) -> None:
        """Average the noise over n calls (stochastic models); 0: new noise with every call."""
        self.backbone.set_noise_accumulation(n)

    def load_checkpoint(
        self,
        repo: str | None = None,
        name: str | None = None,
        revision: str | None = None,
        strict: bool = True,
    ) -> None:
        """Download weights from the Hugging Face hub, unless they are there, and load them.

        Raises:
            ValueError: If no checkpoint of this variant is published and none is named, or it does not fit.
        """
        path = weights.download(self.published, repo, name, revision)
        self.load_checkpoint_local(path, strict=strict)

    def load_checkpoint_local(self, path: str | Path, strict: bool = True) -> None:
        """Load weights from a file.

        Args:
            path: A published checkpoint or a plain state dict.
            strict: Refuse every difference; otherwise adapters, variables and stabilisation may differ.

        Raises:
            ValueError: If the file does not fit.
        """
        weights.load(self, path, strict=strict)

    def configure_activation_checkpointing(self, policy: str = "blocks") -> None:
        """Trade time for memory in training; see `aeris.aurora.checkpointing`."""
        checkpointing.apply(self, policy)

    def freeze_base(self) -> None:
        """Train the adapters alone."""
        lora.freeze_base(self)

    def parts(self) -> list[nn.Module]:
        """Return encoder, U-Net layers and decoder in the order of the forward pass: units to shard."""
        return [self.encoder, *self.backbone.layers(), self.decoder]


def _sent(x: Tensor, device: torch.device) -> Tensor:
    """Send a tensor of the CPU to a device; to one of CUDA without waiting for what is queued there."""
    if device.type != "cuda":
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)


class AuroraPretrained(Aurora):
    """Aurora with 1.3 billion weights, 0.25°, pretrained on many data sets."""

    default = AuroraConfig()
    published = Published("aurora-0.25-pretrained.ckpt", "0be7e57c685dac86b78c4a19a3ab149d13c6a3dd")


class AuroraSmallPretrained(Aurora):
    """Aurora with 113 million weights, 0.25°, pretrained."""

    default = AuroraConfig(
        encoder_depths=(2, 6, 2),
        encoder_num_heads=(4, 8, 16),
        decoder_depths=(2, 6, 2),
        decoder_num_heads=(16, 8, 4),
        embed_dim=256,
        num_heads=8,
    )
    published = Published("aurora-0.25-small-pretrained.ckpt", "0be7e57c685dac86b78c4a19a3ab149d13c6a3dd")


AuroraSmall = AuroraSmallPretrained


class Aurora12hPretrained(Aurora):
    """Aurora with 1.3 billion weights, 0.25°, pretrained, with steps of 12 hours."""

    default = AuroraConfig(timestep_h=12.0)
    published = Published("aurora-0.25-12h-pretrained.ckpt", "15e76e47b65bf4b28fd2246b7b5b951d6e2443b9")


class AuroraHighRes(Aurora):
    """Aurora with 1.2 billion weights, 0.1° (1801 x 3600), fine-tuned with adapters."""

    default = AuroraConfig(encoder_depths=(6, 8, 8), decoder_depths=(8, 8, 6), patch_size=10, use_lora=True)
    published = Published("aurora-0.1-finetuned.ckpt", "0be7e57c685dac86b78c4a19a3ab149d13c6a3dd")
