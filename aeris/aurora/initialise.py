"""Initial weights, keyed by seed and parameter name, whatever the device and the order of construction."""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor, nn

from aeris.aurora.patch_embedding import PatchEmbedding


@torch.no_grad()
def initialise(model: nn.Module, seed: int | None = None) -> None:
    """Fill every parameter of an Aurora (none on the meta device).

    | parameter                                    | distribution                       |
    | -------------------------------------------- | ---------------------------------- |
    | Linear, latents, surface level encoding      | normal, 0.02; biases 0             |
    | patch embeddings and their bias, F inputs    | uniform between ±1 / √F            |
    | AdaLN: the map of the context to scale, shift | 0: every block starts as identity |
    | LoRA A, of in inputs; LoRA B                 | uniform between ±1 / √in; 0        |
    | layer norms                                  | weight 1, bias 0                   |
    | feature combiners of air pollution           | weight 0.5, bias 0                 |

    F is the numbers of one variable's kernel. The published code cuts the normal distribution at ±2, which is
    a hundred standard deviations away.

    Args:
        model: The model, or a part of it with the same names.
        seed: Numbers are drawn from it and the parameter's name; None: from torch's own generator.

    Raises:
        ValueError: If a parameter is on the meta device.
    """
    if seed is None:
        seed = int(torch.randint(2**62, (), device="cpu"))
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise ValueError(f"{name} is on the meta device: call model.to_empty(device=...) first")
    embeddings = [(name, part) for name, part in model.named_modules() if isinstance(part, PatchEmbedding)]
    bounds = {name: 1 / math.sqrt(next(iter(part.weights.values()))[0].numel()) for name, part in embeddings}
    for name, parameter in model.named_parameters():
        owner = name.rpartition(".weights." if ".weights." in name else ".bias")[0]
        if owner in bounds:
            _uniform(parameter, bounds[owner], name, seed)
        else:
            _fill(parameter, name, seed)


def _fill(parameter: Tensor, name: str, seed: int) -> None:
    last = name.rpartition(".")[2]
    if "ln_modulation" in name or last == "lora_B":
        parameter.zero_()
    elif "feature_combiner" in name:
        parameter.fill_(0.5 if last == "weight" else 0.0)
    elif last == "lora_A":
        _uniform(parameter, 1 / math.sqrt(parameter.shape[1]), name, seed)
    elif last in ("atmos_latents", "surf_level_encoding") or parameter.dim() == 2:
        parameter.copy_(torch.empty(parameter.shape).normal_(std=0.02, generator=_generator(name, seed)))
    else:
        parameter.fill_(1.0 if last == "weight" else 0.0)


def _uniform(parameter: Tensor, bound: float, name: str, seed: int) -> None:
    values = torch.empty(parameter.shape).uniform_(-bound, bound, generator=_generator(name, seed))
    parameter.copy_(values)


def _generator(name: str, seed: int) -> torch.Generator:
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
