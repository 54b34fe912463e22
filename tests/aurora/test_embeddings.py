"""Fourier encodings: formulas, bounds, time zones, and the memory of grids."""

from __future__ import annotations

import copy
import math
import os
import pickle
import time
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone

import pytest
import torch

from aeris.aurora.batch import Metadata
from aeris.aurora.embeddings import (
    LEAD_TIME,
    LEVEL,
    POSITION,
    SCALE,
    EncodingCache,
    absolute_time_encoding,
    calendar,
    grid_encoding,
    lead_time_encoding,
    level_encoding,
)
from aeris.aurora.times import hours_since_1970, utc
from tests.aurora.tiny_aurora import grid


def test_sines_then_cosines_of_log_spaced_wavelengths() -> None:
    encoding = LEVEL.encode(torch.tensor([850.0]), 8)[0]
    wavelengths = [10 ** (-2 + 7 * i / 3) for i in range(4)]
    for i, wavelength in enumerate(wavelengths):
        assert encoding[i].item() == pytest.approx(math.sin(2 * math.pi * 850 / wavelength), abs=1e-6)
        assert encoding[4 + i].item() == pytest.approx(math.cos(2 * math.pi * 850 / wavelength), abs=1e-6)
    assert encoding.dtype == torch.float32


def test_scale_bounds_are_the_smallest_patch_and_the_earth() -> None:
    radius = 6378.137
    assert SCALE.upper == pytest.approx(4 * math.pi * radius**2, rel=1e-12)
    # 0.01° x 0.01° at the pole.
    side = math.radians(0.01)
    smallest = side * (1 - math.sin(math.radians(89.99))) * radius**2
    assert SCALE.lower == pytest.approx(smallest, rel=1e-6)


@pytest.mark.parametrize(("x", "words"), [(2e5, "100000"), (1e-3, "0.01")])
def test_out_of_range_is_refused_with_the_bounds(x: float, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        level_encoding([500, x], 8)


def test_zero_is_in_range_and_a_rounding_error_beside_it_for_positions() -> None:
    assert LEAD_TIME.encode(torch.zeros(1), 4).tolist() == [[0, 0, 1, 1]]
    assert POSITION.encode(torch.tensor([1e-7, -360.0]), 4).shape == (2, 4)
    with pytest.raises(ValueError, match="720"):
        POSITION.encode(torch.tensor([721.0]), 4)
    with pytest.raises(ValueError, match="even"):
        POSITION.encode(torch.tensor([1.0]), 5)


def test_lead_time_of_v1p5_has_a_linear_channel_and_no_bounds() -> None:
    encoding = lead_time_encoding(torch.tensor([6.0, 1008.0]), 8, updated=True)
    assert encoding[:, 3].tolist() == pytest.approx([6 / 504, 2.0])
    assert encoding[0, 0].item() == pytest.approx(0, abs=1e-6)
    with pytest.raises(ValueError, match="504"):
        lead_time_encoding(torch.tensor([1008.0]), 8)


@pytest.fixture
def tokyo() -> Iterator[None]:
    old = os.environ.get("TZ")
    os.environ["TZ"] = "Asia/Tokyo"
    time.tzset()
    yield
    os.environ.pop("TZ") if old is None else os.environ.update(TZ=old)
    time.tzset()


@pytest.mark.usefixtures("tokyo")
def test_times_are_utc_whatever_the_host_thinks() -> None:
    assert hours_since_1970(datetime(1970, 1, 2)) == 24
    assert hours_since_1970(datetime(1950, 1, 1, 6)) == -631130400 / 3600
    assert utc(datetime(2022, 1, 1, 9)) == datetime(2022, 1, 1, 9)
    east = datetime(2020, 5, 1, 9, tzinfo=timezone(timedelta(hours=9)))
    assert torch.equal(absolute_time_encoding([east], 8), absolute_time_encoding([datetime(2020, 5, 1)], 8))


def test_calendar_uses_the_day_of_the_month() -> None:
    row = calendar([datetime(2022, 7, 13, 6)])[0]  # a Wednesday
    turns = (6 / 24, 2 / 7, 13 / 365.25)
    expected = [f(2 * math.pi * turn) for turn in turns for f in (math.cos, math.sin)]
    assert row.tolist() == pytest.approx(expected, abs=1e-15)


def test_position_is_the_mean_and_scale_the_root_of_pi_times_the_area() -> None:
    lat, lon = grid(8, 12)
    position, scale = grid_encoding(lat, lon, 4, 16)
    assert position.shape == scale.shape == (6, 16)
    middle = lat[4:].mean().float(), lon[8:].mean().float()
    expected = torch.cat([POSITION.encode(x, 8) for x in middle])
    assert torch.allclose(position[5], expected, atol=2e-2)  # the last bit of the mean, at 0.01°
    north, south = torch.deg2rad(lat[[4, 7]])
    area = 6371**2 * math.pi * (north.sin() - south.sin()) * torch.deg2rad(lon[11] - lon[8])
    # Wavelengths below a few kilometres hang on float32 rounding.
    coarse = [i + k for k in (0, 8) for i in range(4, 8)]
    assert torch.allclose(scale[5, coarse], SCALE.encode(area.sqrt(), 16)[coarse], atol=1e-2)


def test_grid_as_matrices_equals_grid_as_vectors() -> None:
    lat, lon = grid(9 - 1, 12)
    wide = torch.meshgrid(lat, lon, indexing="ij")
    for one, two in zip(grid_encoding(lat, lon, 2, 8), grid_encoding(*wide, 2, 8)):
        assert torch.equal(one, two)


def test_patches_without_extent_are_refused() -> None:
    lat, lon = grid(8, 12)
    with pytest.raises(ValueError, match="patch size 1"):
        grid_encoding(lat, lon, 1, 8)
    with pytest.raises(ValueError, match="divide by 4"):
        grid_encoding(lat, lon, 2, 6)
    with pytest.raises(ValueError, match="no extent"):
        grid_encoding(torch.zeros(8), lon, 2, 8)


def test_cache_knows_equal_grids_and_forgets_old_ones() -> None:
    cache, cpu = EncodingCache(size=2), torch.device("cpu")

    def ask(rows: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        where = Metadata(*grid(rows, 12), (datetime(2020, 1, 1),), (500,))
        return cache.grid(where, 2, 8, cpu, dtype)[0]

    first = ask(8)
    assert ask(8) is first
    assert ask(8, torch.float64).dtype == torch.float64
    assert ask(8) is first
    ask(10)
    assert ask(8) is first
    ask(12)
    ask(14)
    assert ask(8) is not first
    assert not copy.deepcopy(cache)._grids
    assert not pickle.loads(pickle.dumps(cache))._grids


def test_cache_knows_levels_and_lead_times() -> None:
    cache, cpu, single = EncodingCache(small=3), torch.device("cpu"), torch.float32
    levels = cache.levels((500, 850), 8, cpu, single)
    assert torch.equal(levels, level_encoding((500, 850), 8))
    assert cache.levels((500, 850), 8, cpu, single) is levels
    assert cache.levels((500, 850), 16, cpu, single).shape == (2, 16)
    hours = torch.tensor([6.0], dtype=torch.float64)
    with torch.inference_mode():
        lead = cache.lead_times(hours, 8, False, cpu, single)
    assert torch.equal(lead, lead_time_encoding(hours, 8)) and not lead.is_inference()
    assert cache.lead_times(hours.clone(), 8, False, cpu, single) is lead
    assert not torch.equal(cache.lead_times(hours, 8, True, cpu, single), lead)
    assert cache.levels((500, 850), 8, cpu, single) is not levels  # the fourth


def test_what_was_cached_in_inference_mode_can_be_trained_with() -> None:
    cache = EncodingCache()
    with torch.inference_mode():
        where = Metadata(*grid(8, 12), (datetime(2020, 1, 1),), (500,))
        cache.grid(where, 2, 8, torch.device("cpu"), torch.float32)
    weight = torch.ones(8, requires_grad=True)
    position, scale = cache.grid(where, 2, 8, torch.device("cpu"), torch.float32)
    (weight * position + weight * scale).sum().backward()
    assert weight.grad is not None
