"""What tests of training share: weather (waves that move, on a coarse grid), a very small model, settings."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr

from aeris.aurora import finetune, normalisation
from aeris.aurora.config import AuroraConfig
from aeris.aurora.training.config import FineTuneConfig
from aeris.aurora.training.presets import PRESETS
from aeris.aurora.training.run import FineTuning
from aeris.aurora.training.starting_weights import build

ROWS, COLS, LEVELS = 13, 16, (500, 850)  # a row more than patches of 4 tile
SURFACE = {
    "2t": "2m_temperature",
    "10u": "10m_u_component_of_wind",
    "10v": "10m_v_component_of_wind",
    "msl": "mean_sea_level_pressure",
}
LEVELLED = {
    "z": "geopotential",
    "u": "u_component_of_wind",
    "v": "v_component_of_wind",
    "t": "temperature",
    "q": "specific_humidity",
}
SMALL = AuroraConfig(
    static_vars=("lsm", "z"),
    encoder_depths=(1, 2),
    encoder_num_heads=(2, 4),
    decoder_depths=(2, 1),
    decoder_num_heads=(4, 2),
    embed_dim=16,
    num_heads=2,
)
"""A model of a few ten thousand weights, with every kind of them."""


REPLAY = {
    "size": 3, "fresh_every": 2, "at_first": 2, "lead_h": 12, "later_lead_h": 18, "later_from_images": 4
}  # fmt: skip
"""A buffer that is full after two updates."""


def write(path: Path, start: str = "2020-01-01", count: int = 24, missing: bool = False) -> Path:
    """Write `count` states 6 h apart; with `missing`, half of 2t and two points of z have no value."""
    times = np.datetime64(start, "ns") + np.arange(count) * np.timedelta64(6, "h")
    lat, lon = np.linspace(90, -90, ROWS), np.arange(COLS) * (360 / COLS)
    rng = np.random.default_rng(1)

    def waves(shape: tuple[int, ...]) -> np.ndarray:
        """Unit waves [count, *shape, rows, cols] that travel east, each at its own speed."""
        speed, phase = rng.uniform(0.5, 2.0, (1, *shape, 1, 1)), rng.uniform(0, 6, (1, *shape, 1, 1))
        moment = np.arange(count).reshape(-1, *[1] * len(shape), 1, 1)
        across = np.cos(np.deg2rad(lat))[:, None] * np.sin(3 * np.deg2rad(lon) - 0.4 * speed * moment + phase)
        return across + 0.1 * rng.standard_normal((count, *shape, ROWS, COLS))

    fields, dims = {}, ("time", "latitude", "longitude")
    for name, long in SURFACE.items():
        x = normalisation.location(name) + normalisation.scale(name) * waves(())
        if missing and name == "2t":
            x[..., ::2] = np.nan
        fields[long] = (dims, x.astype(np.float32))
    for name, long in LEVELLED.items():
        stats = [(normalisation.location(name, p), normalisation.scale(name, p)) for p in LEVELS]
        location, scale = (np.array(one)[:, None, None] for one in zip(*stats))
        x = location + scale * waves((len(LEVELS),))
        if missing and name == "z":
            x[:, 0, 3, 5:7] = np.nan
        fields[long] = (("time", "level", "latitude", "longitude"), x.astype(np.float32))
    fields["land_sea_mask"] = (dims[1:], (rng.random((ROWS, COLS)) > 0.7).astype(np.float32))
    fields["geopotential_at_surface"] = (dims[1:], (1e4 * rng.random((ROWS, COLS))).astype(np.float32))
    coords = {"time": times, "level": list(LEVELS), "latitude": lat, "longitude": lon}
    xr.Dataset(fields, coords).to_netcdf(path, engine="h5netcdf")
    return path


def write_pair(directory: Path) -> tuple[str, str]:
    """Write six days to train on, in 2020, and two to validate on, in 2022."""
    return (
        str(write(directory / "train.nc")),
        str(write(directory / "validate.nc", "2022-01-01", 9)),
    )


def write_weights(path: Path) -> Path:
    """Write weights of the model without adapters, none of them zero."""
    model = build("tiny", SMALL, "cpu", seed=3)
    draw = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.02 * torch.randn(p.shape, generator=draw))
    torch.save(model.state_dict(), path)
    return path


def small(preset: str, weather: tuple[str, ...], images: int = 4, **changes: Any) -> FineTuneConfig:
    """Return a preset for the small model, with a batch of 2; sections and plain settings are changed."""
    config = PRESETS[preset]().of("tiny", SMALL)
    sections: dict[str, dict[str, Any]] = {
        "data": {"paths": tuple(weather), "workers": 0},
        "train": {"images": images, "batch": 2},
        "optimizer": {"lr": 1e-3, "warmup_images": 2},
        "validate": {"every_images": 4, "samples": 1},
        "checkpoint": {"every_images": 4},
        "replay": REPLAY if preset == "lora-replay" else {},
    }
    for name, values in changes.items():
        if isinstance(values, dict):
            sections[name] = sections.get(name, {}) | values
        else:
            config = dataclasses.replace(config, **{name: values})
    for name, values in sections.items():
        config = dataclasses.replace(config, **{name: dataclasses.replace(getattr(config, name), **values)})
    return config


TIMED = ("images_per_s", "step_s", "data_wait", "mfu")


def go(config: FineTuneConfig, run_dir: Path) -> FineTuning:
    """Train in `run_dir` as the program does."""
    run = finetune.prepare(config, run_dir, "cpu")
    finetune.train(run)
    return run


def records(run_dir: Path) -> list[dict]:
    """Read the log, without what depends on the clock."""
    found = [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in one.items() if k not in TIMED and "tflops" not in k} for one in found]
