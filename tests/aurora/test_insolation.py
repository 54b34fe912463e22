"""Sunlight: numbers of the official package, and what anybody knows of the sun."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone

import pytest
import torch

from aeris.aurora.insolation import day_of_year, insolation, orbit

TIMES = [datetime(1979, 1, 1), datetime(2020, 2, 29, 6), datetime(2021, 6, 21, 13, 37, 12)]
LAT = torch.tensor([73.125, 22.5, -28.125])
LON = torch.tensor([0.0, 129.375, 258.75])
# microsoft-aurora 2.0.1: insolation(TIMES, LAT, LON, enforce_2d=True), which computes in float32.
OFFICIAL = [
    [-0.6653228402137756, -0.21421673893928528, -0.33546799421310425],
    [-1.0341306924819946, 0.40158993005752563, 0.015687594190239906],
    [-0.6467682719230652, 0.7237487435340881, 0.35537219047546387],
    [-0.14076781272888184, 0.08555961400270462, -0.42794686555862427],
    [-0.056278735399246216, 0.6640462279319763, -0.9702741503715515],
    [0.069362111389637, 0.7569732666015625, -0.803123950958252],
    [0.6036208868026733, 0.13736683130264282, 0.4268049895763397],
    [0.8955186009407043, -0.5884129405021667, 0.33277249336242676],
    [0.5326011776924133, -0.8839372396469116, -0.004587736912071705],
]


def test_equals_official() -> None:
    expected = torch.tensor(OFFICIAL, dtype=torch.float64).view(3, 3, 3)
    torch.testing.assert_close(insolation(TIMES, LAT, LON), expected, rtol=0, atol=5e-7)


def test_rounding_of_hour_angle_is_small_and_can_be_left_out() -> None:
    rounded, exact = (insolation(TIMES, LAT, LON, precise=precise) for precise in (False, True))
    assert 1e-6 < float((rounded - exact).abs().max()) < 1.5e-4


def test_grid_of_coordinates() -> None:
    lat, lon = torch.meshgrid(LAT, LON, indexing="ij")
    assert torch.equal(insolation(TIMES, lat, lon), insolation(TIMES, LAT, LON))
    assert insolation([], LAT, LON).shape == (0, 3, 3)
    with pytest.raises(ValueError, match=r"lat \(3,\) and lon \(3, 3\)"):
        insolation(TIMES, LAT, lon)
    with pytest.raises(ValueError, match="make no grid"):
        insolation(TIMES, lat, lon[:2])


def test_sun_is_highest_at_noon_and_overhead_at_the_tropic() -> None:
    day = [datetime(2021, 6, 21) + timedelta(hours=h) for h in range(24)]
    lat = torch.arange(90.0, -90.1, -0.5)
    field = insolation(day, lat, torch.tensor([0.0, 90.0]), precise=True)
    hour, row = divmod(int(field[:, :, 0].argmax()), len(lat))
    assert hour == 12
    assert float(lat[row]) == pytest.approx(23.5, abs=0.6)
    torch.testing.assert_close(field[6, :, 1], field[12, :, 0], rtol=0, atol=2e-3)
    assert bool((field[:, 0] > 0).all()) and bool((field[:, -1] < 0).all())
    highest = insolation(day[12:13], lat, torch.zeros(1), daily=True)
    torch.testing.assert_close(highest[0, :, 0], field[12, :, 0], rtol=0, atol=2e-3)


def test_night_and_solar_constant() -> None:
    plain, clipped = insolation(TIMES, LAT, LON), insolation(TIMES, LAT, LON, clip_zero=True, s0=1361.0)
    torch.testing.assert_close(clipped, 1361.0 * plain.clamp(min=0))


def test_orbit() -> None:
    declination, distance = orbit(day_of_year(datetime(1995, 3, 21, 12)))
    assert abs(declination) < 0.01
    assert distance == pytest.approx(0.996, abs=1e-3)
    assert orbit(2)[1] < orbit(100)[1] < orbit(185)[1]


def test_times_are_utc() -> None:
    east = timezone(timedelta(hours=9))
    assert day_of_year(datetime(2021, 1, 1, 9, tzinfo=east)) == 0
    assert day_of_year(datetime(2021, 1, 1, 6, tzinfo=east)) == pytest.approx(365.875)
    assert day_of_year(datetime(2020, 12, 31, 18)) == 365.75
