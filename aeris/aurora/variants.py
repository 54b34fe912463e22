"""All variants of Aurora by name; the file of a special one is read when it is asked for."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping

from aeris.aurora.config import AuroraConfig
from aeris.aurora.model import (
    Aurora,
    Aurora12hPretrained,
    AuroraHighRes,
    AuroraPretrained,
    AuroraSmallPretrained,
)


class AuroraTiny(Aurora):
    """Aurora with 5 million weights, never published: for tests and experiments on a small machine.

    Proportions as the others; a third static variable is left out because simple models lack soil types.
    """

    default = AuroraConfig(
        static_vars=("lsm", "z"),
        encoder_depths=(2, 2, 2),
        encoder_num_heads=(2, 4, 8),
        decoder_depths=(2, 2, 2),
        decoder_num_heads=(8, 4, 2),
        embed_dim=64,
        num_heads=4,
    )
    published = None


class Variants(Mapping[str, type[Aurora]]):
    """Classes of variants by name."""

    def __init__(self, known: Mapping[str, type[Aurora] | str]) -> None:
        """Take classes, or "module:class" of such to import later."""
        self._known = dict(known)

    def __getitem__(self, name: str) -> type[Aurora]:
        if name not in self._known:
            raise KeyError(f"no variant {name!r}; there are {', '.join(self._known)}")
        found = self._known[name]
        if isinstance(found, str):
            module, _, cls = found.partition(":")
            found = getattr(importlib.import_module(f"aeris.aurora.{module}"), cls)
            self._known[name] = found
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self._known)

    def __len__(self) -> int:
        return len(self._known)


VARIANTS = Variants(
    {
        "aurora": Aurora,
        "pretrained": AuroraPretrained,
        "small": AuroraSmallPretrained,
        "12h": Aurora12hPretrained,
        "high-res": AuroraHighRes,
        "air-pollution": "air_pollution:AuroraAirPollution",
        "wave": "wave:AuroraWave",
        "v1.5": "v1p5:AuroraV1p5",
        "v1.5-ensemble": "v1p5:AuroraV1p5Ensemble",
        "tiny": AuroraTiny,
    }
)
