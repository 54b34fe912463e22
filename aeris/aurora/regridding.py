"""Bilinear interpolation between latitude-longitude grids.

Shapes: H rows, W columns of the old grid; Y rows, X columns of the new one.
"""

from __future__ import annotations

import torch
from torch import Tensor


def regular_grid(res_deg: float) -> tuple[Tensor, Tensor]:
    """Return latitudes from 90 to -90 and longitudes from 0 on, `res_deg` degrees apart, float64.

    Raises:
        ValueError: the distance is not within (0, 90].
    """
    if not 0 < res_deg <= 90:
        raise ValueError(f"a resolution of {res_deg} degrees: it must be above 0 and at most 90")
    rows, cols = round(180 / res_deg) + 1, round(360 / res_deg)
    lat = torch.linspace(90, -90, rows, dtype=torch.float64)
    return lat, torch.arange(cols, dtype=torch.float64) * (360 / cols)


def regrid(x_HW: Tensor, lat_H: Tensor, lon_W: Tensor, lat_Y: Tensor, lon_X: Tensor) -> Tensor:
    """Interpolate fields [..., H, W] bilinearly to [..., Y, X], computed in float64, float32 on the CPU.

    Longitude goes round the globe; beyond the first and last row the slope beside them goes on.

    Args:
        x_HW: fields.
        lat_H: latitude of their rows, falling, degrees.
        lon_W: longitude of their columns, rising within [0, 360), degrees.
        lat_Y: latitude of the new rows, degrees.
        lon_X: longitude of the new columns within [0, 360), degrees.

    Raises:
        ValueError: the old grid has a latitude and longitude for every point, or one row only.
    """
    if lat_H.dim() != 1 or lon_W.dim() != 1 or len(lat_H) < 2:
        raise ValueError(
            f"a grid with lat {tuple(lat_H.shape)} and lon {tuple(lon_W.shape)} cannot be interpolated: "
            f"it takes (H,) and (W,) with at least two rows"
        )
    x = x_HW.detach().to("cpu", torch.float64)
    x = torch.cat((x[..., -1:], x, x[..., :1]), dim=-1)
    lon = torch.cat((lon_W[-1:] - 360, lon_W, lon_W[:1] + 360))
    row, down = _between(-lat_H, -lat_Y)
    col, right = _between(lon, lon_X)
    x = x[..., row, :] * (1 - down)[:, None] + x[..., row + 1, :] * down[:, None]
    return (x[..., col] * (1 - right) + x[..., col + 1] * right).float()


def _between(rising: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Return for each wanted place the point before it and how far it is to the next, 0 to 1."""
    before = (torch.searchsorted(rising, wanted, right=True) - 1).clamp(0, len(rising) - 2)
    return before, (wanted - rising[before]) / (rising[before + 1] - rising[before])
