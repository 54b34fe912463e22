"""Microsoft's own implementation, as installed, behind the interface of our models: for checks of parity.

Nothing here is needed to use Aurora; the package is imported when one is asked for. Times are handed over
with their zone, because that package reads naive ones in the zone of the host.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from datetime import timedelta, timezone
from pathlib import Path
from typing import Any

import torch

from aeris.aurora.batch import Batch, Metadata
from aeris.aurora.config import AuroraConfig
from aeris.aurora.training.errors import Fields, fields_of
from aeris.aurora.training.missing import fill
from aeris.aurora.variants import VARIANTS


def require_official() -> Any:
    """Return the module of the official package.

    Raises:
        ValueError: it is not installed; says how to get it.
    """
    try:
        import aurora  # type: ignore[import-not-found,unused-ignore]
    except ImportError:
        raise ValueError("official: needs Microsoft's package: pip install microsoft-aurora") from None
    return aurora


def theirs(batch: Batch) -> Any:
    """Return a batch as the official package has it; coordinates in the type of the fields."""
    official, where = require_official(), batch.metadata
    dtype = next(iter({**batch.surf_vars, **batch.atmos_vars}.values())).dtype
    metadata = official.Metadata(
        lat=where.lat.to(dtype),
        lon=where.lon.to(dtype),
        time=tuple(time.replace(tzinfo=timezone.utc) for time in where.time),
        atmos_levels=tuple(where.atmos_levels),
        rollout_step=where.rollout_step,
    )
    return official.Batch(
        surf_vars=dict(batch.surf_vars),
        static_vars=dict(batch.static_vars),
        atmos_vars=dict(batch.atmos_vars),
        metadata=metadata,
    )


def ours(batch: Any) -> Batch:
    """Return a batch of the official package as ours."""
    where = batch.metadata
    metadata = Metadata(
        where.lat, where.lon, tuple(where.time), tuple(where.atmos_levels), where.rollout_step
    )
    return Batch(dict(batch.surf_vars), dict(batch.static_vars), dict(batch.atmos_vars), metadata)


def make_model(name: str) -> tuple[Any, AuroraConfig]:
    """Make the official model of one of our names, and our settings of it.

    Raises:
        ValueError: no such model, or the package is not installed.
    """
    official = require_official()
    if name not in VARIANTS:
        raise ValueError(f"no model is called {name!r}: choose one of {', '.join(VARIANTS)}")
    variant = VARIANTS[name]
    if hasattr(official, variant.__name__):
        return getattr(official, variant.__name__)(), variant.default
    taken = inspect.signature(official.Aurora).parameters  # a model that only we have a name for
    values = {key: value for key, value in asdict(variant.default).items() if key in taken}
    values.pop("surf_stats", None)
    return official.Aurora(timestep=timedelta(hours=variant.default.timestep_h), **values), variant.default


class OfficialPredictor:
    """A model of the official package with weights of a file."""

    def __init__(
        self, name: str, made_from: str, path: Path, model: str, device: str, dtype: torch.dtype
    ) -> None:
        self.name, self.made_from = name, made_from
        network, config = make_model(model)
        self.config: AuroraConfig | None = config
        self.timestep_h = config.timestep_h
        network.load_checkpoint_local(str(path))
        self._network = network.eval().to(device=device, dtype=dtype)

    def forecast(self, batch: Batch, lead_h: Sequence[int]) -> Iterator[Fields]:
        """Roll the model out and give the fields at the lead times."""
        steps = {round(hours / self.timestep_h) for hours in lead_h}
        with torch.inference_mode():
            made = require_official().rollout(self._network, theirs(fill(batch)), max(steps))
            for number, prediction in enumerate(made, 1):
                if number in steps:
                    yield fields_of(ours(prediction.to("cpu")))
