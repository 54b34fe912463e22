"""Sunshine against facts of astronomy and a naive scalar calculation."""

from __future__ import annotations

import math

import numpy as np
import pytest

from aeris.data.forcing import (
    FORCINGS,
    SOLAR_CONSTANT_W_M2,
    SOLAR_MEAN_W_M2,
    SOLAR_STD_W_M2,
    Forcing,
    sun_position,
    toa_solar_w_m2,
)
from aeris.data.store import Store, packaged_sample
from aeris.data.variables import latitude_weights
from swipe.windows import WindowGrid, WindowShard

LATITUDE_DEG = np.arange(88.75, -90, -2.5)
LONGITUDE_DEG = np.arange(0, 360, 5.0)


def time(text: str) -> np.datetime64:
    return np.datetime64(text, "s")


def naive(when: np.datetime64, latitude_deg: float, longitude_deg: float, parts: int = 720) -> float:
    """Average the sine of the sun's height over small parts of the hour, the sun in its middle place."""
    declination, equation, nearness = sun_position(when - np.timedelta64(30, "m"))
    midnight = when.astype("datetime64[D]")
    total = 0.0
    for part in range(parts):
        hours = (when - midnight) / np.timedelta64(3600, "s") - 1 + (part + 0.5) / parts
        hour_angle = math.radians(15 * (hours - 12) + longitude_deg) + equation
        phi = math.radians(latitude_deg)
        height = math.sin(phi) * math.sin(declination) + math.cos(phi) * math.cos(declination) * math.cos(
            hour_angle
        )
        total += max(0.0, height)
    return SOLAR_CONSTANT_W_M2 * nearness * total / parts


@pytest.mark.parametrize(
    "when", ["2000-06-21T00", "2011-12-22T13", "2020-03-20T04:30", "1979-02-11T23", "2024-09-01T12"]
)
def test_equals_a_sum_over_the_hour(when: str) -> None:
    rows, cols = (
        np.array([90.0, 78, 66.6, 41, 0, -23.4, -66.6, -89]),
        np.array([0.0, 37, 90, 179, 181, 300, 359.75]),
    )
    ours = toa_solar_w_m2(time(when), rows, cols)
    expected = [[naive(time(when), row, col) for col in cols] for row in rows]
    np.testing.assert_allclose(ours, expected, atol=2e-3)  # the sum's own error at sunrise


def test_position_agrees_with_spencer() -> None:
    """Spencer 1971 (Search 2, 172): Fourier series in the day of the year, a fit to the years about 1950."""
    for day in range(0, 365, 9):
        g = 2 * math.pi * day / 365
        declination = 0.006918 - 0.399912 * math.cos(g) + 0.070257 * math.sin(g) - 0.006758 * math.cos(2 * g)
        declination += 0.000907 * math.sin(2 * g) - 0.002697 * math.cos(3 * g) + 0.00148 * math.sin(3 * g)
        equation = 0.0000075 + 0.001868 * math.cos(g) - 0.032077 * math.sin(g)
        equation -= 0.014615 * math.cos(2 * g) + 0.040849 * math.sin(2 * g)
        nearness = 1.00011 + 0.034221 * math.cos(g) + 0.00128 * math.sin(g)
        nearness += 0.000719 * math.cos(2 * g) + 0.000077 * math.sin(2 * g)
        ours = sun_position(time("1950-01-01T12") + np.timedelta64(day, "D"))
        np.testing.assert_allclose(ours, (declination, equation, nearness), atol=0.004)  # Spencer: 35 s


@pytest.mark.parametrize(
    ("when", "declination_deg", "equation_min", "distance_au"),
    [  # almanac: solstices, equinox, extremes of the equation of time, perihelion, aphelion
        ("2020-06-20T21:44", 23.436, -1.7, 1.0162),
        ("2020-12-21T10:02", -23.436, 1.9, 0.9838),
        ("2021-03-20T09:37", 0.0, -7.4, 0.9959),
        ("2021-02-11T12:00", -14.0, -14.2, 0.9870),
        ("2021-11-03T12:00", -15.1, 16.5, 0.9922),
        ("2021-01-02T14:00", -22.9, -4.0, 0.98326),
        ("2021-07-05T22:00", 22.8, -4.5, 1.01673),
    ],
)
def test_position_agrees_with_the_almanac(
    when: str, declination_deg: float, equation_min: float, distance_au: float
) -> None:
    declination, equation, nearness = sun_position(time(when))
    assert math.degrees(declination) == pytest.approx(declination_deg, abs=0.15)
    assert math.degrees(equation) * 4 == pytest.approx(equation_min, abs=0.3)
    assert nearness**-0.5 == pytest.approx(distance_au, abs=3e-4)


def test_mean_over_globe_and_year() -> None:
    weights = latitude_weights(LATITUDE_DEG)[:, None]
    times = time("2001-01-01") + np.arange(0, 365 * 24, 97) * np.timedelta64(1, "h")
    means = [(toa_solar_w_m2(when, LATITUDE_DEG, LONGITUDE_DEG) * weights).mean() for when in times]
    assert np.mean(means) == pytest.approx(340.3, abs=0.7)
    # Perihelion is in January: the globe gets 7 % more than in July.
    assert max(means) / min(means) == pytest.approx(((1 + 0.0167) / (1 - 0.0167)) ** 2, abs=0.003)


def test_mean_and_std_of_the_ideal_sphere() -> None:
    weights = latitude_weights(LATITUDE_DEG)[:, None]
    x = toa_solar_w_m2(time("2001-04-04T12"), LATITUDE_DEG, LONGITUDE_DEG)  # the distance is 1.000 au
    mean = (x * weights).mean()
    assert mean == pytest.approx(SOLAR_MEAN_W_M2, rel=2e-3)
    # The hour's mean is a little smoother than the sphere lit at one moment.
    assert ((x - mean) ** 2 * weights).mean() ** 0.5 == pytest.approx(SOLAR_STD_W_M2, rel=5e-3)


def test_polar_night_and_polar_day() -> None:
    for hour in range(24):
        x = toa_solar_w_m2(time("2010-12-21") + np.timedelta64(hour, "h"), LATITUDE_DEG, LONGITUDE_DEG)
        assert np.all(x[LATITUDE_DEG > 68] == 0)
        assert np.all(x[LATITUDE_DEG < -68] > 0)
        assert np.all((x >= 0) & (x < SOLAR_CONSTANT_W_M2 * 1.035))


@pytest.mark.parametrize("hour", [0, 6, 12, 18, 21])
def test_noon_is_on_the_right_side(hour: int) -> None:
    """In the hour before 12:30 UTC the sun stands over Greenwich, six hours earlier over 90 degrees east."""
    when = time("2021-04-15T00:30") + np.timedelta64(hour, "h")  # the equation of time is zero
    row, col = np.unravel_index(np.argmax(toa_solar_w_m2(when, LATITUDE_DEG, LONGITUDE_DEG)), (72, 72))
    assert LONGITUDE_DEG[col] == (180 - 15 * hour) % 360
    assert LATITUDE_DEG[row] == pytest.approx(9.96, abs=1.3)


def test_hemispheres_are_alike_at_the_equinox() -> None:
    x = toa_solar_w_m2(time("2021-03-20T10:07"), LATITUDE_DEG, LONGITUDE_DEG)
    np.testing.assert_allclose(x, x[::-1], atol=0.3)


def test_a_day_turns_once_around() -> None:
    """The mean over 24 hours depends on latitude only, but for the sun's slow way."""
    hours = [time("2005-08-08") + np.timedelta64(h, "h") for h in range(24)]
    day = np.mean([toa_solar_w_m2(hour, LATITUDE_DEG, LONGITUDE_DEG) for hour in hours], axis=0)
    np.testing.assert_allclose(day, day.mean(axis=1, keepdims=True) * np.ones(72), atol=1.0)


def test_forcing_of_a_store() -> None:
    store = Store(packaged_sample())
    forcing = Forcing(store, 12)
    when = store.times[40]
    fields = forcing.fields(when)
    assert fields.shape == (len(FORCINGS), 24, 48)
    assert fields.dtype == np.float32
    for name, later in (("solar_now", 0), ("solar_next", 12)):
        solar = toa_solar_w_m2(when + np.timedelta64(later, "h"), store.latitude_deg, store.longitude_deg)
        standard = (solar - SOLAR_MEAN_W_M2) / SOLAR_STD_W_M2
        np.testing.assert_allclose(fields[FORCINGS.index(name)], standard, atol=1e-6)
    orography = store.static["geopotential_at_surface"]
    np.testing.assert_allclose(fields[FORCINGS.index("orography")] * 1e4, orography, rtol=1e-6)
    assert set(np.sign(fields[FORCINGS.index("land_sea_mask")]).ravel()) >= {-1.0, 1.0}


@pytest.mark.parametrize("window", [2, 6, 12, 24])
def test_windows_are_pieces_of_the_fields(window: int) -> None:
    store = Store(packaged_sample())
    forcing = Forcing(store, 6)
    full = WindowShard.full(WindowGrid(24, 48, window))
    shard = WindowShard(full.grid, full.windows[::-3])
    fields = forcing.fields(store.times[3])
    expected = fields.reshape(4, -1).T[shard.token_index()]
    np.testing.assert_array_equal(forcing.windows(store.times[3], shard), expected)
