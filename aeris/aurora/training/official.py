"""Microsoft's own implementation, as installed, behind the interface of our models: for checks of parity.

Nothing here is needed to use Aurora; the package is imported when one is asked for. It needs timm, and timm
imports torchvision for things of no use here: where that is missing, as beside torch builds that have none,
empty modules stand in for it. Times are handed over with their zone, because that package reads naive ones in
the zone of the host.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import inspect
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from datetime import timedelta, timezone
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from aeris.aurora.batch import Batch, Metadata
from aeris.aurora.config import AuroraConfig
from aeris.aurora.training.errors import ChannelFields, fields_of
from aeris.aurora.training.missing import fill
from aeris.aurora.variants import VARIANTS


class _Name(type):
    """A class that has any attribute: its name."""

    def __getattr__(cls, name: str) -> str:
        if name.startswith("__"):
            raise AttributeError(name)
        return name


class _Empty(ModuleType):
    """A module that has any attribute: a class of that name."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Name(name, (), {})


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds torchvision and every module inside it."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        """Claim torchvision."""
        ours = name.partition(".")[0] == "torchvision"
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if ours else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        """Make an empty module."""
        return _Empty(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Do nothing: there is no code."""


def load_official() -> Any:
    """Return the module of the official package; None if it is not installed.

    Raises:
        ImportError: it is, but something it needs is not.
    """
    if sys.modules.get("aurora") is None and not _installed("aurora"):
        return None
    if not _installed("torchvision") and not any(isinstance(one, _Finder) for one in sys.meta_path):
        sys.meta_path.append(_Finder())
    return importlib.import_module("aurora")


def _installed(name: str) -> bool:
    """Tell whether a module can be imported; one that is hidden by None in `sys.modules` cannot."""
    return importlib.util.find_spec(name) is not None


def require_official() -> Any:
    """Return the module of the official package.

    Raises:
        ValueError: it, or something it needs, is not installed; says how to get it.
    """
    try:
        found = load_official()
    except ImportError as error:
        lacking = f"{error.name} is not: pip install {error.name}" if error.name else f"not whole: {error}"
        raise ValueError(f"official: Microsoft's package is installed, but {lacking}") from None
    if found is None:
        raise ValueError("official: needs Microsoft's package: pip install microsoft-aurora")
    return found


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
        self._stats = config.stats
        self._reads_missing = VARIANTS[model].reads_missing
        network.load_checkpoint_local(str(path))
        self._network = network.eval().to(device=device, dtype=dtype)

    def forecast(self, batch: Batch, lead_h: Sequence[int]) -> Iterator[ChannelFields]:
        """Roll the model out and give the fields at the lead times."""
        steps = {round(hours / self.timestep_h) for hours in lead_h}
        with torch.inference_mode():
            start = theirs(fill(batch, self._stats, self._reads_missing))
            made = require_official().rollout(self._network, start, max(steps))
            for number, prediction in enumerate(made, 1):
                if number in steps:
                    yield fields_of(ours(prediction.to("cpu")))
