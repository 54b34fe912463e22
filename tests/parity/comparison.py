"""What both sides of a comparison start from, and how far two steps of training are apart."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from aeris.config import ModelConfig
from aeris.data.forcing import FORCINGS
from tests.parity.oracle import Images, Step

NAMES = ("t2m", "u10", "z500", "t850", "sst")


def random_weights(shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """Draw float64 weights of about 0.3 (norms: about 1), so that no gate is shut and no gradient is 0."""
    generator = torch.Generator().manual_seed(1)
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64) * 0.3 + ("norm" in name)
        for name, shape in shapes.items()
    }


def random_images(model: ModelConfig, count: int, masked: bool) -> Images:
    """Draw float64 images for a network's grid; with `masked`, a part of the last channel has no value."""
    rng = np.random.default_rng(2)
    sizes = (len(NAMES), len(NAMES), len(FORCINGS))
    fields = [rng.standard_normal((count, channels, model.rows, model.cols)) for channels in sizes]
    valid_CYX = None
    if masked:
        valid_CYX = np.ones((len(NAMES), model.rows, model.cols), dtype=bool)
        valid_CYX[-1] = rng.random((model.rows, model.cols)) < 0.6
        fields[:2] = (x * valid_CYX for x in fields[:2])
    latitude_deg = (0.5 - (np.arange(model.rows) + 0.5) / model.rows) * 180.0
    return Images(*map(torch.from_numpy, fields), NAMES, latitude_deg, valid_CYX)


def part_of(whole: Tensor, like: Tensor) -> Tensor:
    """Cut the part this rank has of `like` out of the whole tensor; no communication."""
    if isinstance(like, DTensor):
        return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None).to_local()
    return whole


def deviations(found: Step, expected: Step) -> dict[str, float]:
    """Measure how far `found` is from `expected`, relative to the largest value of each tensor.

    Only the tensors in `found` count, and of them the part this rank has.
    """
    apart = {
        "loss": abs(found.loss - expected.loss) / abs(expected.loss),
        "norm": abs(found.norm - expected.norm) / abs(expected.norm),
    }
    for kind in ("gradients", "weights", "ema"):
        there: dict[str, Tensor] = getattr(expected, kind)
        for name, value in getattr(found, kind).items():
            whole = there[name]
            here = value.to_local() if isinstance(value, DTensor) else value
            assert value.shape == whole.shape, f"{kind} of {name}: {value.shape} in place of {whole.shape}"
            worst = (here - part_of(whole, value)).abs().max() if here.numel() else torch.zeros(())
            apart[f"{kind} of {name}"] = float(worst / whole.abs().max())
    return apart
