"""Aurora v1.5: 25 surface variables and sunlight, any lead time, and an ensemble of it.

- Seven variables are predicted only: as input they are 0 after normalisation.
- Amounts named `scaled_*` go in and out in metres and are ln(x + 10⁻³) − ln 10⁻³ for the network.
- `insolation` is an input that is known ahead: predictions carry its value at their own time.
- Predictions are clipped to physical bounds before they are fed back, by `rollout`.
- The ensemble adds noise to the context of the U-Net: every call and every sample is another member.

Source: microsoft/aurora 2.0.1, `AuroraV1p5` and `AuroraV1p5Ensemble`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from datetime import timedelta
from typing import Any

from aeris.aurora.batch import Batch
from aeris.aurora.config import AuroraConfig, Published
from aeris.aurora.insolation import insolation
from aeris.aurora.model import Aurora
from aeris.aurora.normalisation import log_transform, log_untransform

OUTPUT_ONLY = ("i10fg", "blh", "uvb_1h", "ssrd_1h", "ttr_1h", "scaled_tp_1h", "scaled_sf_1h")
SURF_VARS = (
    *("2t", "10u", "10v", "msl", "2d", "tcwv", "tcc", "100u", "100v", "sp", "lcc", "mcc", "hcc"),
    *("skt", "stl1", "swvl1", "ci", "scaled_sd", *OUTPUT_ONLY, "insolation"),
)
STATIC_VARS = (
    *("lsm", "z", "anor", "isor", "cvh", "cl", "dl", "cvl", "slor"),
    *(f"slt_{kind}" for kind in range(8)),
    *("sdfor", "sdor"),
    *(f"tvh_{kind}" for kind in (0, 18, 19, 3, 4, 5, 6)),
    *(f"tvl_{kind}" for kind in (0, 1, 10, 11, 13, 16, 17, 2, 7, 9)),
)
CLIPPING: tuple[tuple[str, float | None, float | None], ...] = (
    ("tcwv", 0.0, None),
    *((cover, 0.0, 1.0) for cover in ("tcc", "lcc", "mcc", "hcc")),
    ("swvl1", 0.0, 70.0),
    ("ci", 0.0, 1.0),
    ("scaled_sd", 0.0, 10.0),
)
"""(variable, least, greatest) of what is fed back."""


def with_insolation(batch: Batch, history_step: timedelta = timedelta(hours=6)) -> Batch:
    """Add the input `insolation` to a batch, or replace it.

    Args:
        batch: Its times are those of the last entry of the history.
        history_step: Time between entries.
    """
    where, like = batch.metadata, next(iter(batch.surf_vars.values()))
    samples, history = like.shape[:2]
    times = [time - history_step * back for time in where.time for back in reversed(range(history))]
    sun = insolation(times, where.lat, where.lon).unflatten(0, (samples, history))
    return replace(batch, surf_vars={**batch.surf_vars, "insolation": sun.to(like)})


def with_bounds(
    bounds: Mapping[str, Mapping[str, float | None]],
    known: tuple[tuple[str, float | None, float | None], ...],
) -> tuple[tuple[str, float | None, float | None], ...]:
    """Put bounds as the official package writes them, {name: {"min": x, "max": y}}, over those `known`."""
    table = {name: (least, greatest) for name, least, greatest in known}
    table.update({name: (limits.get("min"), limits.get("max")) for name, limits in bounds.items()})
    return tuple((name, *limits) for name, limits in table.items())


class AuroraV1p5(Aurora):
    """Aurora v1.5, 721 x 1440, 13 levels; `forward(batch, lead_times)` wants hours for each sample.

    Computes in float16 unless `autocast=False`. Batches hold `insolation` too (`with_insolation`).
    """

    default = AuroraConfig(
        surf_vars=SURF_VARS,
        static_vars=STATIC_VARS,
        autocast=True,
        autocast_dtype="float16",
        use_fp16_safe_attention=True,
        use_updated_lead_time_embedding=True,
        variable_lead_time=True,
        rollout_input_clipping=CLIPPING,
        output_only_surf_vars=OUTPUT_ONLY,
    )
    published = Published("aurora-0.25-v1.5.ckpt", "a96afd7ee6d65e3bd2d476f3be798a25a56f2296")

    def __init__(self, config: AuroraConfig | None = None, **changes: Any) -> None:
        bounds = changes.get("rollout_input_clipping")
        if isinstance(bounds, Mapping):
            known = (config or self.default).rollout_input_clipping
            changes["rollout_input_clipping"] = with_bounds(bounds, known)
        super().__init__(config, **changes)

    def _pre_norm_hook(self, batch: Batch) -> Batch:
        """Take the logarithm of amounts."""
        fields = {k: log_transform(x) if _is_amount(k) else x for k, x in batch.surf_vars.items()}
        return replace(batch, surf_vars=fields)

    def _post_unnorm_hook(self, batch: Batch, pred: Batch) -> Batch:
        """Undo the logarithm; set the sunlight of the predicted time."""
        fields = {k: log_untransform(x) if _is_amount(k) else x for k, x in pred.surf_vars.items()}
        pred = replace(pred, surf_vars=fields)
        return with_insolation(pred) if "insolation" in fields else pred


class AuroraV1p5Ensemble(AuroraV1p5):
    """Aurora v1.5 with noise: another member at every call; `torch.manual_seed` decides which.

    Several members at once: repeat the sample in the batch.
    """

    default = replace(AuroraV1p5.default, stochastic=True)
    published = Published("aurora-0.25-v1.5-ensemble.ckpt", "a96afd7ee6d65e3bd2d476f3be798a25a56f2296")


def _is_amount(name: str) -> bool:
    return name.startswith("scaled_")
