"""Fourier encodings of where, when and how far ahead a state is.

Everything here is made on the CPU: angles in float64, results in float32, as the published weights know them.
Coordinates pass through float32 on the way: the finest wavelengths hang on that rounding (`grid_encoding`).

Shapes: B batch, C levels, H rows, W columns, P patch, L = (H/P) (W/P) patches, D width.
Source: the official package microsoft-aurora 2.0.1; Aurora, Bodnar et al. 2025, section "Encoder".
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from aeris.aurora.times import hours_since_1970

EARTH_RADIUS_KM = 6371.0


@dataclass(frozen=True)
class Wavelengths:
    """Log-spaced wavelengths, all in the unit of what they encode."""

    name: str
    """What is encoded, with its unit; used in errors."""
    lower: float
    """The shortest."""
    upper: float
    """The longest."""
    least: float | None = None
    """Values nearer to zero are refused (zero itself is not); None: `lower`."""
    most: float | None = None
    """Greater values are refused; None: `upper`."""

    def encode(self, x: Tensor, d: int) -> Tensor:
        """Encode values of any shape (...) as sines and cosines, float32 of shape (..., d).

        Args:
            x: Values; moved to the CPU and to float64.
            d: Width, even: d/2 sines, then d/2 cosines.

        Raises:
            ValueError: If `d` is odd or values are out of range.
        """
        if d % 2:
            raise ValueError(f"the width of an encoding must be even, not {d}")
        x = x.detach().to(device="cpu", dtype=torch.float64)
        least = self.lower if self.least is None else self.least
        most = self.upper if self.most is None else self.most
        size = x.abs()
        if bool(((size > most) | ((size < least) & (x != 0))).any()):
            raise ValueError(
                f"{self.name}: found values from {x.min():g} to {x.max():g}; "
                f"zero, or sizes from {least:g} to {most:g}, can be encoded"
            )
        ends = math.log10(self.lower), math.log10(self.upper)
        lambda_K = torch.logspace(*ends, d // 2, base=10, device="cpu", dtype=torch.float64)
        angle = x[..., None] * (2 * math.pi / lambda_K)
        return torch.cat((angle.sin(), angle.cos()), dim=-1).float()


# The official package refuses 0 < |latitude| < 0.01, and with it some grids whose rows mirror each other at
# the equator: their means there are rounding errors beside zero, which do no harm.
POSITION = Wavelengths("position in degrees", 0.01, 720, least=0)
# Bounds in km² for a value in km, as published: the smallest patch at a pole, and the surface of the Earth
# (both with a radius of 6378.137 km).
SCALE = Wavelengths("root of the patch area in km", 1.0814085263058073e-4, 5.1120789339581096e8)
LEAD_TIME = Wavelengths("lead time in hours", 1 / 60, 504)
LEAD_TIME_V1P5 = Wavelengths("lead time in hours", 6, 504, least=0, most=math.inf)
LEVEL = Wavelengths("level in hPa", 0.01, 1e5)
ABSOLUTE_TIME = Wavelengths("hours since 1970", 1, 8766, least=0, most=math.inf)


def lead_time_encoding(lead_times_B: Tensor, d: int, updated: bool = False) -> Tensor:
    """Encode lead times in hours as float32 (B, d) on the CPU.

    Args:
        lead_times_B: Lead times in hours.
        d: Width.
        updated: The encoding of v1.5, in which a linear term takes the place of the longest sine.

    Raises:
        ValueError: If a lead time is longer than 504 hours or shorter than a minute (not with `updated`).
    """
    if not updated:
        return LEAD_TIME.encode(lead_times_B, d)
    encoding_BD = LEAD_TIME_V1P5.encode(lead_times_B, d)
    linear_B = lead_times_B.detach().to(device="cpu", dtype=torch.float64) / LEAD_TIME_V1P5.upper
    encoding_BD[:, d // 2 - 1] = linear_B.float()
    return encoding_BD


def level_encoding(levels: Sequence[float], d: int) -> Tensor:
    """Encode levels in hPa as float32 (C, d) on the CPU.

    Raises:
        ValueError: If a level is outside 0.01 to 1e5 hPa.
    """
    return LEVEL.encode(torch.tensor(levels, dtype=torch.float64, device="cpu"), d)


def absolute_time_encoding(times: Sequence[datetime], d: int) -> Tensor:
    """Encode times as float32 (B, d) on the CPU; hours are rounded to float32 first, as published."""
    hours_B = torch.tensor([hours_since_1970(time) for time in times], dtype=torch.float64, device="cpu")
    return ABSOLUTE_TIME.encode(hours_B.float(), d)


def calendar(times: Sequence[datetime]) -> Tensor:
    """Cosine and sine of hour, weekday and day as float64 (B, 6) on the CPU, ordered as CALENDAR_VARS.

    The last pair takes the day of the **month** over 365.25: so do the published air-pollution weights.
    """
    rows = []
    for time in times:
        turns = (time.hour / 24, time.weekday() / 7, time.day / 365.25)
        rows.append([f(2 * math.pi * turn) for turn in turns for f in (math.cos, math.sin)])
    return torch.tensor(rows, dtype=torch.float64, device="cpu")


def grid_encoding(lat: Tensor, lon: Tensor, patch: int, d: int) -> tuple[Tensor, Tensor]:
    """Encode position and extent of every patch, each as float32 (L, d) on the CPU.

    Position: mean latitude in the first d/2 channels, mean longitude in the last. Extent: the root of
    6371² π (sin φ_max - sin φ_min) (λ_max - λ_min) km², corners being grid points; the π too many is in the
    published weights. Coordinates, their means and the area are rounded to float32 as published: at the
    shortest wavelengths the area's rounding decides the phase, so float64 would give other numbers.

    Args:
        lat: Latitudes in degrees, (H,) or (H, W), H and W multiples of the patch size.
        lon: Longitudes in degrees, (W,) or (H, W).
        patch: Rows and columns of a patch, at least 2.
        d: Width, a multiple of 4.

    Raises:
        ValueError: If the patch or the width does not fit, or a patch has no area.
    """
    if patch < 2 or d % 4:
        raise ValueError(
            f"patch size {patch} and width {d}: the patch must be 2 or more, the width divide by 4"
        )
    lat, lon = (x.detach().to(device="cpu", dtype=torch.float32) for x in (lat, lon))
    if lat.dim() == 1:
        lat, lon = torch.meshgrid(lat, lon, indexing="ij")
    grid_2HW = torch.stack((lat, lon))
    mean_2L = F.avg_pool2d(grid_2HW, patch).flatten(1)
    highest_2L = F.max_pool2d(grid_2HW, patch).flatten(1)
    lowest_2L = -F.max_pool2d(-grid_2HW, patch).flatten(1)
    if not bool((highest_2L > lowest_2L).all()):
        raise ValueError(f"a patch of {patch} x {patch} grid points has no extent in latitude or longitude")
    sine_L = torch.sin(torch.deg2rad(highest_2L[0])) - torch.sin(torch.deg2rad(lowest_2L[0]))
    width_L = torch.deg2rad(highest_2L[1]) - torch.deg2rad(lowest_2L[1])
    root_area_L = torch.sqrt(EARTH_RADIUS_KM**2 * math.pi * sine_L * width_L)
    position_LD = torch.cat([POSITION.encode(mean_L, d // 2) for mean_L in mean_2L], dim=-1)
    return position_LD, SCALE.encode(root_area_L, d)


class Grid(Protocol):
    """Coordinates and a key that is equal for equal ones; `aeris.aurora.batch.Metadata` has them."""

    lat: Tensor
    lon: Tensor

    @property
    def grid_key(self) -> str:
        """A digest of the coordinates."""
        ...


class Encodings(NamedTuple):
    """What the encoder adds to the tokens, before its linear maps; all in one dtype on one device."""

    position_LD: Tensor
    scale_LD: Tensor
    level_CD: Tensor
    lead_time_BD: Tensor
    absolute_time_BD: Tensor
    calendar_B6: Tensor
    """Empty unless the model takes the calendar."""


class EncodingCache:
    """Encodings of the grids, levels and lead times seen last, per device and dtype."""

    def __init__(self, size: int = 2, small: int = 64) -> None:
        """Keep `size` grids, and `small` sets of levels and of lead times together."""
        self._sizes = size, small
        self._grids: OrderedDict[tuple[object, ...], tuple[Tensor, ...]] = OrderedDict()
        self._small: OrderedDict[tuple[object, ...], tuple[Tensor, ...]] = OrderedDict()

    def grid(
        self, where: Grid, patch: int, d: int, device: torch.device, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """Return `grid_encoding` on a device, from memory where the grid is known.

        Raises:
            ValueError: As `grid_encoding`.
        """

        def make() -> tuple[Tensor, ...]:
            pair = grid_encoding(where.lat.clone(), where.lon.clone(), patch, d)
            return tuple(x.to(device, dtype) for x in pair)

        key = (where.grid_key, patch, d, device, dtype)
        position_LD, scale_LD = _kept(self._grids, self._sizes[0], key, make)
        return position_LD, scale_LD

    def levels(self, levels: Sequence[float], d: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Return `level_encoding` on a device, from memory where the levels are known.

        Raises:
            ValueError: As `level_encoding`.
        """
        key = ("levels", tuple(levels), d, device, dtype)

        def make() -> tuple[Tensor, ...]:
            return (level_encoding(levels, d).to(device, dtype),)

        return _kept(self._small, self._sizes[1], key, make)[0]

    def lead_times(
        self, lead_times_B: Tensor, d: int, updated: bool, device: torch.device, dtype: torch.dtype
    ) -> Tensor:
        """Return `lead_time_encoding` on a device, from memory where the lead times are known.

        Args:
            lead_times_B: Lead times in hours, on the CPU: they are looked at.
            d: Width.
            updated: The encoding of v1.5.
            device: Where the encoding is to be.
            dtype: Of the encoding.

        Raises:
            ValueError: As `lead_time_encoding`.
        """
        key = ("lead times", tuple(lead_times_B.tolist()), d, updated, device, dtype)

        def make() -> tuple[Tensor, ...]:
            return (lead_time_encoding(lead_times_B.clone(), d, updated).to(device, dtype),)

        return _kept(self._small, self._sizes[1], key, make)[0]

    def __deepcopy__(self, memo: dict[int, object]) -> EncodingCache:
        return EncodingCache(*self._sizes)

    def __getstate__(self) -> dict[str, object]:
        return vars(EncodingCache(*self._sizes))


def _kept(
    kept: OrderedDict[tuple[object, ...], tuple[Tensor, ...]],
    size: int,
    key: tuple[object, ...],
    make: Callable[[], tuple[Tensor, ...]],
) -> tuple[Tensor, ...]:
    """Return what was made for a key, or make it and forget what was not asked for longest."""
    if key not in kept:
        # Tensors made in inference mode could not be trained with later.
        with torch.inference_mode(False), torch.no_grad():
            kept[key] = make()
        if len(kept) > size:
            kept.popitem(last=False)
    kept.move_to_end(key)
    return kept[key]
