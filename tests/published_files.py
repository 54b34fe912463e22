"""Files with the keys of the published weights, and their network written naively from its description.

Nothing of the project is used here. Shapes: C channels, Y rows, X columns, D width.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

LEVELS = (50, 100, 150, 200, 250, 300, 400, 500, 600, 700, 850, 925, 1000)
LEVELLED = ("geopotential", "u_component_of_wind", "v_component_of_wind", "temperature", "specific_humidity")
SURFACE = (
    "2m_temperature",
    "10m_u_component_of_wind",
    "10m_v_component_of_wind",
    "mean_sea_level_pressure",
)
FORCINGS = ("toa_incident_solar_radiation", "geopotential_at_surface", "land_sea_mask")
EPS = 2.0**-23


def variables(interval_h: int) -> list[str]:
    """Name the variables of the 6-hourly or the 24-hourly model as their configuration does."""
    levelled = [f"{name}_{level}" for name in LEVELLED for level in LEVELS]
    return [*SURFACE, *levelled, *(["sea_surface_temperature"] if interval_h == 24 else [])]


def stage_shapes(
    interval_h: int, width: int = 16, hidden: int = 24, layers: int = 8, blocks: int = 3
) -> list[dict[str, tuple[int, ...]]]:
    """List the keys and shapes of every file."""
    c, d, m = len(variables(interval_h)), width, hidden
    first: dict[str, tuple[int, ...]] = {"proj.weight": (d, 2 * c + 4), "proj.bias": (d,)}
    first["ape.inv_freq"] = (math.ceil((2 * c + 4) / 4),)
    for one in ("w1", "w2"):
        first |= {f"latent_embed.{one}.weight": (d, d), f"latent_embed.{one}.bias": (d,)}
    layer: dict[str, tuple[int, ...]] = {}
    for j in range(blocks):
        layer |= {
            f"modulelist.{j}.0.weight": (d,),
            f"modulelist.{j}.1.norm.weight": (d,),
            f"modulelist.{j}.1.to_qkv.weight": (3 * d, d),
            f"modulelist.{j}.1.wo.weight": (d, d),
            f"modulelist.{j}.2.weight": (d,),
            f"modulelist.{j}.3.w1.weight": (2 * m, d),
            f"modulelist.{j}.3.w2.weight": (d, m),
            f"modulelist.{j}.4.modulation.0.weight": (d, d),
            f"modulelist.{j}.4.modulation.0.bias": (d,),
            f"modulelist.{j}.4.modulation.2.weight": (6 * d, d),
            f"modulelist.{j}.4.modulation.2.bias": (6 * d,),
        }
    last = {"norm.weight": (d,), "modulation.0.weight": (d, d), "modulation.0.bias": (d,)}
    last |= {"modulation.2.weight": (2 * d, d), "modulation.2.bias": (2 * d,), "head.weight": (c, d)}
    return [first, *(layer for _ in range(layers)), last]


def write_weights(directory: Path, interval_h: int, **sizes: int) -> list[dict[str, Tensor]]:
    """Write files of random weights; every other entry of a file differs from the averages."""
    directory.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(interval_h)
    stages = []
    for number, shapes in enumerate(stage_shapes(interval_h, **sizes)):
        stage = {}
        for name, shape in shapes.items():
            x = torch.randn(shape, generator=generator)
            norm = len(shape) == 1 and not name.endswith("bias")
            stage[name] = 1 + 0.1 * x if norm else 0.1 * x if len(shape) == 1 else x / math.sqrt(shape[-1])
        other = {name: x.bfloat16() + 1 for name, x in stage.items()}
        optimizer = {"state": {0: {"step": torch.tensor(7.0)}}, "param_groups": [{"lr": 2e-4, "params": [0]}]}
        content = {"cur_nimg": 1_100_000, "model_state_dict": other, "main_model_state_dict": other}
        content |= {"optimizer_state_dict": optimizer, "ema_state_dict": stage}
        torch.save(content, directory / f"checkpoint_PP{number}.pth")
        stages.append(stage)
    return stages


def write_config(path: Path, interval_h: int, window: int, **changes: Any) -> Path:
    """Write a configuration with their names; `changes` are of its section `model`, None leaves one out."""
    model = {"window_size": [window, window], "dim": 16, "heads": 2, "head_dim": 8, "mlp_dim": 24}
    model |= {"PP_stages": 10, "sublayers": 3, "sigma_data": 1.0, "sigma_max": 500, "norm": "pre"}
    model |= {"sigma_min": 0.1 if interval_h == 6 else 0.2, "interval": interval_h, "diffusion": True}
    model |= {"layerwise_t_emb": True, "layerwise_t_emb_after_mod_norm": True, "shift_size": [16, 8]}
    model = {key: value for key, value in (model | changes).items() if value is not None}
    data = {"dataset": {"split": "train", "variables": variables(interval_h)}, "gas": 20}
    path.write_text(json.dumps({"seed": 1234, "data": data, "model": model}))
    return path


def write_statistics(directory: Path, interval_h: int) -> dict[str, tuple[float, float, float, float]]:
    """Write means and deviations; return, by variable, mean, std and mean and std of the change."""
    directory.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(interval_h)
    table = {}
    for name in [*variables(interval_h), *FORCINGS]:
        mean, std, change = rng.uniform(100, 300), rng.uniform(5, 20), rng.uniform(1, 3)
        table[name] = (mean, std, 0.01 * change, change)
    table["toa_incident_solar_radiation"] = (1.07e6, 1.44e6, 0.0, 1e6)  # J m-2 in an hour
    table["geopotential_at_surface"] = (3700.0, 8400.0, 0.0, 0.0)
    table["land_sea_mask"] = (0.34, 0.46, 0.0, 0.0)
    files = ("normalize_mean", "normalize_std")
    files += tuple(f"normalize_diff_{what}_{interval_h}" for what in ("mean", "std"))
    for place, file in enumerate(files):
        np.savez(directory / f"{file}.npz", **{key: np.float32(row[place]) for key, row in table.items()})
    return {name: tuple(float(np.float32(value)) for value in row) for name, row in table.items()}


def naive(stages: list[dict[str, Tensor]], x_CYX: Tensor, t: float, window: int, heads: int) -> Tensor:
    """Apply the published network to one image in fp32: inputs [C_in, Y, X] and noise time -> [C, Y, X]."""
    width = stages[0]["proj.weight"].shape[0]
    frequency = 10_000.0 ** (-torch.arange(width // 2, dtype=torch.float32) / (width // 2))
    angle = torch.tensor(t, dtype=torch.float32) * frequency
    time_D = torch.cat((angle.sin(), angle.cos())).bfloat16().float()
    x_YXD = (x_CYX + place_encoding(*x_CYX.shape)).permute(1, 2, 0)
    x_YXD = x_YXD @ stages[0]["proj.weight"].T + stages[0]["proj.bias"]
    for number, stage in enumerate(stages[1:-1], 1):
        roll = window // 2 if number % 2 == 0 else 0
        x_YXD = torch.roll(x_YXD, (-roll, -roll), (0, 1))
        for j in range(sum(name.endswith("to_qkv.weight") for name in stage)):
            part = {n.removeprefix(f"modulelist.{j}."): x for n, x in stage.items() if f"list.{j}." in n}
            shift1, scale1, gate1, shift2, scale2, gate2 = modulate(part, "4.modulation", time_D).chunk(6)
            y = norm(x_YXD * (1 + scale1) + shift1, part["0.weight"])
            x_YXD = x_YXD + gate1 * attend(y, part, window, heads)
            y = norm(x_YXD * (1 + scale2) + shift2, part["2.weight"])
            gate, up = (y @ part["3.w1.weight"].T).chunk(2, dim=-1)
            x_YXD = x_YXD + gate2 * ((gate * torch.sigmoid(gate) * up) @ part["3.w2.weight"].T)
        x_YXD = torch.roll(x_YXD, (roll, roll), (0, 1))
    shift, scale = modulate(stages[-1], "modulation", time_D).chunk(2)
    y = norm(x_YXD, stages[-1]["norm.weight"]) * (1 + scale) + shift
    return (y @ stages[-1]["head.weight"].T).permute(2, 0, 1)


def norm(x: Tensor, weight: Tensor) -> Tensor:
    """RMSNorm."""
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight


def modulate(part: dict[str, Tensor], name: str, time_D: Tensor) -> Tensor:
    """Linear, SiLU, Linear of the noise time."""
    h = part[f"{name}.0.weight"] @ time_D + part[f"{name}.0.bias"]
    return part[f"{name}.2.weight"] @ (h * torch.sigmoid(h)) + part[f"{name}.2.bias"]


def attend(x_YXD: Tensor, part: dict[str, Tensor], window: int, heads: int) -> Tensor:
    """Attend in every window, head by head; no mask, so the first and last row may meet."""
    out = torch.empty_like(x_YXD)
    for row in range(0, x_YXD.shape[0], window):
        for col in range(0, x_YXD.shape[1], window):
            tokens = x_YXD[row : row + window, col : col + window].reshape(window**2, -1)
            q, k, v = (tokens @ part["1.to_qkv.weight"].T).chunk(3, dim=-1)
            done = []
            for qh, kh, vh in zip(q.chunk(heads, -1), k.chunk(heads, -1), v.chunk(heads, -1)):
                done.append(torch.softmax(qh @ kh.T / math.sqrt(qh.shape[-1]), dim=-1) @ vh)
            o = torch.cat(done, dim=-1) @ part["1.wo.weight"].T
            out[row : row + window, col : col + window] = o.view(window, window, -1)
    return out


def place_encoding(channels: int, rows: int, cols: int) -> Tensor:
    """The fixed encoding that is added to the inputs, rows numbered from 1: [C, Y, X]."""
    count = 2 * math.ceil(channels / 4)
    out = torch.empty(2 * count, rows, cols, dtype=torch.float64)
    for k in range(count // 2):
        frequency = 10_000.0 ** (-2 * k / count)
        row = (torch.arange(rows, dtype=torch.float64) + 1) * frequency
        col = torch.arange(cols, dtype=torch.float64) * frequency
        out[2 * k], out[2 * k + 1] = row.sin()[:, None], row.cos()[:, None]
        out[count + 2 * k], out[count + 2 * k + 1] = col.sin(), col.cos()
    return out[:channels].float()
