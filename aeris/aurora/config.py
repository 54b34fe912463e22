"""What an Aurora model is made of, as plain data, and the published variants of it.

Names are those of the official package, version 2.0.1, so that its users find their arguments again. The
facts of the variants (variables, depths, checkpoints) are read off that package and its model hub.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from datetime import timedelta
from typing import Any, Literal

LoRAMode = Literal["single", "from_second", "all"]
Part = Literal["encoder", "backbone", "decoder"]
LEVELS_HPA = (50, 100, 150, 200, 250, 300, 400, 500, 600, 700, 850, 925, 1000)

# Variables of the first models, in the order in which files hold them in one tensor.
SURF, STATIC, ATMOS = ("2t", "10u", "10v", "msl"), ("lsm", "z", "slt"), ("z", "u", "v", "t", "q")
SURF_POLLUTANTS = ("pm1", "pm2p5", "pm10", "tcco", "tc_no", "tcno2", "gtco3", "tcso2")
ATMOS_POLLUTANTS = ("co", "no", "no2", "go3", "so2")
EMISSIONS = tuple(f"static_{gas}{form}" for gas in ("ammonia", "co", "nox", "so2") for form in ("", "_log"))
CALENDAR_VARS = ("tod_cos", "tod_sin", "dow_cos", "dow_sin", "doy_cos", "doy_sin")


@dataclass(frozen=True)
class Published:
    """Where a published checkpoint lies on the Hugging Face hub."""

    name: str
    revision: str
    repo: str = "microsoft/aurora"


@dataclass(frozen=True)
class AuroraConfig:
    """Every setting that defines an Aurora model."""

    surf_vars: tuple[str, ...] = SURF
    """Surface variables the model has weights for."""
    static_vars: tuple[str, ...] = STATIC
    """Fields that do not change with time."""
    atmos_vars: tuple[str, ...] = ATMOS
    """Variables on pressure levels."""
    window_size: tuple[int, int, int] = (2, 6, 12)
    """Attention window over (latent, row, col)."""
    encoder_depths: tuple[int, ...] = (6, 10, 8)
    """Blocks of the U-Net's encoder layers; the width doubles from one to the next."""
    encoder_num_heads: tuple[int, ...] = (8, 16, 32)
    """Attention heads of the U-Net's encoder layers."""
    decoder_depths: tuple[int, ...] = (8, 10, 6)
    """Blocks of the U-Net's decoder layers."""
    decoder_num_heads: tuple[int, ...] = (32, 16, 8)
    """Attention heads of the U-Net's decoder layers."""
    latent_levels: int = 4
    """Latents per patch: one for the surface, the others for the atmosphere."""
    patch_size: int = 4
    """Rows and columns of a patch."""
    embed_dim: int = 512
    """Width of a token at the finest resolution of the U-Net."""
    num_heads: int = 16
    """Attention heads of the Perceivers."""
    mlp_ratio: float = 4.0
    """Hidden width of an MLP over its width."""
    drop_path: float = 0.0
    """Largest probability of dropping a branch of a block, reached at the last block (stochastic depth)."""
    drop_rate: float = 0.0
    """Dropout."""
    enc_depth: int = 1
    """Blocks of the encoder's Perceiver."""
    dec_depth: int = 1
    """Blocks of the decoder's Perceiver."""
    dec_mlp_ratio: float = 2.0
    """Hidden width over width in the decoder's Perceiver."""
    perceiver_ln_eps: float = 1e-5
    """Epsilon of the layer norms of the Perceivers."""
    max_history_size: int = 2
    """Most times the patch embedding has weights for."""
    timestep_h: float = 6.0
    """Hours a forecast step moves on."""
    stabilise_level_agg: bool = False
    """Normalise keys and queries of the level aggregation."""
    use_lora: bool = False
    """Add low-rank adapters to the attention of the U-Net."""
    lora_steps: int = 40
    """Forecast steps after which the adapters are off."""
    lora_mode: LoRAMode = "single"
    """One adapter for all steps, the same from the second step on, or one per step."""
    lora_rank: int = 8
    """Rank of an adapter."""
    lora_alpha: float = 8.0
    """An adapter's output is scaled by alpha / rank."""
    lora_targets: tuple[str, ...] = ("qkv", "proj")
    """Linear maps of the attention that get an adapter."""
    surf_stats: tuple[tuple[str, float, float], ...] = ()
    """(variable, location, scale) that replace the normalisation of surface and static variables."""
    autocast: bool = False
    """Compute in `autocast_dtype` where that is safe."""
    autocast_dtype: Literal["bfloat16", "float16"] = "bfloat16"
    """Type of autocast; float16 needs `use_fp16_safe_attention`."""
    autocast_parts: tuple[Part, ...] = ("encoder", "backbone", "decoder")
    """What autocast covers; the official package before v1.5 casts the backbone alone."""
    use_fp16_safe_attention: bool = False
    """Keep attention scores within the range of float16."""
    level_condition: tuple[float, ...] = ()
    """Levels in hPa with patch embeddings and heads of their own; empty: all levels share them."""
    dynamic_vars: bool = False
    """Feed the calendar (hour, weekday, day) as six channels."""
    atmos_static_vars: bool = False
    """Feed static fields and calendar on every level too."""
    separate_perceiver: tuple[str, ...] = ()
    """Variables on levels that a second level decoder predicts."""
    modulation_heads: tuple[str, ...] = ()
    """Variables with a second head `<name>_mod`."""
    positive_surf_vars: tuple[str, ...] = ()
    """Surface variables kept at or above zero."""
    positive_atmos_vars: tuple[str, ...] = ()
    """Variables on levels kept at or above zero."""
    clamp_at_first_step: bool = False
    """Keep predictions positive from the first step on; otherwise from the second."""
    simulate_indexing_bug: bool = False
    """Feed static orography as the published air-pollution weights expect it (see weights.py)."""
    stochastic: bool = False
    """Add noise to the context of the U-Net: every call gives another member."""
    use_updated_lead_time_embedding: bool = False
    """The lead-time encoding of v1.5."""
    variable_lead_time: bool = False
    """The lead time is an argument of the call."""
    rollout_input_clipping: tuple[tuple[str, float | None, float | None], ...] = ()
    """(variable, least, greatest): bounds on predictions before they are fed back."""
    output_only_surf_vars: tuple[str, ...] = ()
    """Surface variables that are predicted and not fed in."""
    output_only_atmos_vars: tuple[str, ...] = ()
    """Variables on levels that are predicted and not fed in."""
    wrap_longitude: bool = True
    """The last column is beside the first; false for regional grids."""
    level_chunk: int = 8_192
    """Patches that go through a Perceiver at once; bounds its memory. 0: all."""

    def __post_init__(self) -> None:
        depths = {len(self.encoder_depths), len(self.decoder_depths)}
        heads = {len(self.encoder_num_heads), len(self.decoder_num_heads)}
        if depths | heads != {len(self.encoder_depths)} or not self.encoder_depths:
            raise ValueError(
                "encoder_depths, encoder_num_heads, decoder_depths and decoder_num_heads must be equally "
                f"long, found {self.encoder_depths}, {self.encoder_num_heads}, {self.decoder_depths} and "
                f"{self.decoder_num_heads}"
            )
        if self.embed_dim % 4 or self.embed_dim % self.num_heads:
            raise ValueError(f"embed_dim {self.embed_dim} must divide by 4 and by num_heads {self.num_heads}")
        least = {"latent_levels": 2, "patch_size": 2, "max_history_size": 1, "enc_depth": 1, "dec_depth": 1}
        for name, value in least.items():
            if getattr(self, name) < value:
                raise ValueError(f"{name} must be at least {value}, found {getattr(self, name)}")
        if not self.surf_vars or not self.atmos_vars:
            raise ValueError("a model needs a surface variable and a variable on levels")
        if self.autocast and self.autocast_dtype == "float16" and not self.use_fp16_safe_attention:
            raise ValueError("autocast to float16 needs use_fp16_safe_attention: scores may exceed 65504")

    @property
    def stats(self) -> dict[str, tuple[float, float]]:
        """Location and scale by name of the surface and static variables in `surf_stats`."""
        return {name: (location, scale) for name, location, scale in self.surf_stats}

    def changed(self, **changes: Any) -> AuroraConfig:
        """Return this configuration with some fields replaced.

        Takes the official package's arguments too: `timestep` (a timedelta), dicts as `surf_stats` and
        `rollout_input_clipping`, None as `level_condition`, a torch dtype, `bf16_mode` (autocast of the
        backbone); and lists for tuples, as they come from JSON.

        Raises:
            ValueError: If a field is unknown or values do not go together.
        """
        if (timestep := changes.pop("timestep", None)) is not None:
            changes["timestep_h"] = timestep / timedelta(hours=1)
        if changes.pop("bf16_mode", False):
            changes |= {"autocast": True, "autocast_parts": ("backbone",)}
        known = [field.name for field in fields(self)]
        if unknown := sorted(set(changes) - set(known)):
            raise ValueError(f"unknown settings {unknown}; there are {', '.join(known)}")
        return replace(self, **{name: _plain(name, value) for name, value in changes.items()})


def _plain(name: str, value: Any) -> Any:
    """Turn an argument as the official package or a JSON file writes it into what a configuration holds."""
    if name == "surf_stats" and isinstance(value, Mapping):
        return tuple((key, float(location), float(scale)) for key, (location, scale) in value.items())
    if name == "rollout_input_clipping" and isinstance(value, Mapping):
        return tuple((key, bounds.get("min"), bounds.get("max")) for key, bounds in value.items())
    if name == "autocast_dtype":
        return str(value).removeprefix("torch.")
    if name in ("surf_stats", "rollout_input_clipping", "level_condition") and value is None:
        return ()
    if isinstance(value, (list, tuple)):
        return tuple(tuple(item) if isinstance(item, list) else item for item in value)
    return value
