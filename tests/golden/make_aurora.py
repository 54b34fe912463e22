"""Write the golden files: what the official Aurora package predicts in every case of cases.py.

    python -m tests.golden.make_aurora [NAME ...] [--check]      # in the root of the project

Install it in an environment of its own, as it pins old libraries (torch 2.13, one thread, gave the files):

    pip install torch==2.13.0 numpy einops scipy huggingface_hub safetensors pyyaml xarray netcdf4 pydantic
    pip install --no-deps microsoft-aurora==2.0.1 timm

timm imports torchvision, which is not needed: where it is missing, aeris/aurora/training/official.py has a
stand-in.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from aeris.aurora.training.official import load_official
from tests.golden.cases import CASES, Case, digest, grid, inputs, loss, noise, summarise, weight

aurora: Any = load_official()
HERE = Path(__file__).parent


@contextlib.contextmanager
def double_predictions() -> Iterator[None]:
    """Keep predictions of a float64 model in float64: the package rounds them before it adds the units."""
    convert = aurora.Batch.type

    def keep(batch: Any, dtype: torch.dtype) -> Any:
        first = next(iter(batch.surf_vars.values()))
        return batch if dtype == torch.float32 and first.dtype == torch.float64 else convert(batch, dtype)

    with mock.patch.object(aurora.Batch, "type", keep):
        yield


@contextlib.contextmanager
def named_noise() -> Iterator[None]:
    """Draw noise by number of the call."""
    draw = noise()

    def randn(shape: Any, **kwargs: Any) -> torch.Tensor:
        return torch.from_numpy(draw(shape)).to(kwargs["dtype"])

    with mock.patch.object(torch, "randn", randn):
        yield


def build(case: Case) -> torch.nn.Module:
    """Make the package's model with our weights."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns of surf_stats
        model = getattr(aurora, case.model)(**case.arguments)
    model = model.to(getattr(torch, case.dtype)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(weight(name, tuple(parameter.shape))))
    return model


def statistics(case: Case) -> tuple[dict[str, float], dict[str, float]]:
    """Return location and scale of every variable the case reads or may predict."""
    names = {*case.static, *case.surf, "10u_wave", "10v_wave"}
    if case.model.startswith("AuroraV1p5"):
        names |= {*build(case).surf_vars}
    names |= {f"{name}_{level}" for name in case.atmos for level in case.levels}
    stored = aurora.normalisation
    return {k: stored.locations[k] for k in sorted(names)}, {k: stored.scales[k] for k in sorted(names)}


def root_area(case: Case) -> np.ndarray:
    """Return the roots of patch areas in km that the encoder works with, float32 [patches].

    They go into sines of up to 1e7 periods, so the last bit of a float32 matters to every prediction.
    """
    lat, lon = (torch.from_numpy(x).float() for x in grid(case))
    patch, rows, cols = build(case).patch_size, case.rows, case.cols
    if not case.regional:
        lat, lon = lat[:, None].expand(rows, cols), lon.expand(rows, cols)
    both = torch.stack([lat, lon])[:, : rows - rows % patch]
    high = torch.nn.functional.max_pool2d(both, patch)
    low = -torch.nn.functional.max_pool2d(-both, patch)
    return aurora.model.posencoding.patch_root_area(*low, *high).flatten().numpy()


def predict(case: Case) -> dict[str, Any]:
    """Return what a golden file holds."""
    location, scale = statistics(case)
    dtype = getattr(torch, case.dtype)
    surf, static, atmos = (
        {k: torch.from_numpy(v).to(dtype) for k, v in fields.items()}
        for fields in inputs(case, location, scale)
    )
    lat, lon = map(torch.from_numpy, grid(case))
    metadata = aurora.Metadata(lat, lon, case.times, case.levels)
    batch, model = aurora.Batch(surf, static, atmos, metadata), build(case)
    lead_times = torch.tensor(case.first_lead_times) if case.first_lead_times else None
    with torch.inference_mode(), double_predictions(), named_noise():
        if case.lead_times:
            found = [model(batch, lead_times)]
        else:
            found = list(aurora.rollout(model, batch, case.steps, case.fine_lead_times or None))
    with double_predictions(), named_noise():
        loss(model(batch, lead_times), location, scale).backward()
    zero = torch.zeros(())
    gradients = {
        name: digest(name, (zero.expand_as(p) if p.grad is None else p.grad).numpy())
        for name, p in sorted(model.named_parameters())
    }
    steps = [summarise(prediction, location, scale) for prediction in found]
    return {
        "about": f"microsoft-aurora 2.0.1, torch {torch.__version__}, numpy {np.__version__}, "
        f"{platform.machine()}; python -m tests.golden.make_aurora",
        "variables": [*steps[0]],
        "values": np.stack([[*step.values()] for step in steps]).astype(case.dtype),
        "parameters": [*gradients],
        "gradients": np.array([*gradients.values()]),
        "root_area": root_area(case),
        "times": [[time.isoformat() for time in prediction.metadata.time] for prediction in found],
        "statistics": [*location],
        "location": [*location.values()],
        "scale": [*scale.values()],
    }


def main() -> None:
    """Write the files, or compare with those that are there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("names", nargs="*", help="cases; all without")
    parser.add_argument("--check", action="store_true", help="write nothing, say how far the files are")
    options = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["TZ"] = "UTC"  # the package takes naive times for local ones
    time.tzset()
    for name in options.names or CASES:
        found, path = predict(CASES[name]), HERE / f"aurora_{name}.npz"
        size = float(np.sqrt(np.nanmean(found["values"].astype(float) ** 2)))
        if options.check:
            with np.load(path) as stored:
                far = np.nanmax(abs(found["values"].astype(float) - stored["values"]))
            print(f"{name}: differs by {far:.1e}, size {size:.2f}")
        else:
            np.savez_compressed(path, **found)
            print(f"{name}: {path.stat().st_size} bytes, size {size:.2f}, {found['values'].shape}")


if __name__ == "__main__":
    main()
