"""A very small Aurora with weights that show every path, and random weather for it."""

from __future__ import annotations

from datetime import datetime, timedelta

import torch
from torch import Tensor, nn

from aeris.aurora.batch import Batch, Metadata
from aeris.aurora.config import AuroraConfig
from aeris.aurora.embeddings import (
    Encodings,
    absolute_time_encoding,
    calendar,
    grid_encoding,
    lead_time_encoding,
    level_encoding,
)

CONFIG = AuroraConfig(
    encoder_depths=(2, 2, 2),
    encoder_num_heads=(2, 4, 8),
    decoder_depths=(2, 2, 2),
    decoder_num_heads=(8, 4, 2),
    embed_dim=32,
    num_heads=4,
)
LEAST = {
    "embed_dim": 16,
    "num_heads": 2,
    "encoder_depths": (1, 1, 1),
    "decoder_depths": (1, 1, 1),
    "encoder_num_heads": (1, 2, 4),
    "decoder_num_heads": (4, 2, 1),
}
"""The smallest network the variants are tried with."""
LEVELS = (100, 500, 850)
START = datetime(2021, 3, 4, 6)


def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """Draw every weight, those that start as zero too, in float64."""
    generator = torch.Generator().manual_seed(seed)
    module.to(torch.float64)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            x = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            norm = parameter.dim() == 1 and name.endswith("weight")
            parameter.copy_(x * (0.05 if parameter.dim() > 1 else 0.1) + norm)
    return module


def grid(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Return falling latitudes and rising longitudes."""
    lon = torch.linspace(0, 360, columns + 1, dtype=torch.float64)[:-1]
    return torch.linspace(88, -80, rows, dtype=torch.float64), lon


def fields(
    config: AuroraConfig, samples: int, history: int, rows: int, columns: int
) -> list[dict[str, Tensor]]:
    """Return normalised surface, static and atmospheric fields; static ones (B, T, H, W)."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    static = {name: draw(1, 1, rows, columns).expand(samples, history, -1, -1) for name in config.static_vars}
    surf = {name: draw(samples, history, rows, columns) for name in config.surf_vars}
    atmos = {name: draw(samples, history, len(LEVELS), rows, columns) for name in config.atmos_vars}
    return [surf, static, atmos]


def batch(
    config: AuroraConfig = CONFIG, samples: int = 2, history: int = 2, rows: int = 16, columns: int = 24
) -> Batch:
    """Return weather in physical units."""
    surf, static, atmos = fields(config, samples, history, rows, columns)
    times = tuple(START + timedelta(days=i) for i in range(samples))
    where = Metadata(*grid(rows, columns), times, LEVELS)
    return Batch(surf, {name: x[0, 0] for name, x in static.items()}, atmos, where).unnormalise()


def encodings(
    config: AuroraConfig, samples: int, rows: int, columns: int, width: int | None = None
) -> Encodings:
    """Return what the encoder adds."""
    d = config.embed_dim
    times = [START + timedelta(days=i) for i in range(samples)]
    position, scale = grid_encoding(*grid(rows, columns), config.patch_size, d)
    parts = (
        position,
        scale,
        level_encoding(LEVELS, d),
        lead_time_encoding(torch.full((samples,), 6.0), d),
        absolute_time_encoding(times, d),
        calendar(times),
    )
    return Encodings(*(x.double() for x in parts))
