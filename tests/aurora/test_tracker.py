"""The tracker of tropical cyclones against numbers of the official one and of scipy.

`python -m tests.aurora.test_tracker`, where microsoft-aurora (here 2.0.1) and scipy are installed, prints
them again. The cyclones are made up from sines and exponentials, so that they are the same everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

import pytest
import torch
from torch import Tensor

from aeris.aurora.batch import Batch, Metadata
from aeris.aurora.tracker import NoEyeError, Tracker, distance_km, extrapolate, lowest_nearby, smooth

TIME = datetime(2022, 9, 1)
LEVELS = (500, 700, 850)
AROUND_DEG = 14
Land = Callable[[Tensor, Tensor], Tensor]
# Name -> (grid spacing, start, move per step, steps, depth in Pa at a step, where land is).
CASES: dict[
    str, tuple[float, tuple[float, float], tuple[float, float], int, Callable[[int], float], Land]
] = {
    "pacific": (0.25, (15.0, 200.0), (0.5, -0.9), 8, lambda i: 3000.0, lambda lat, lon: lat > 90),
    "south": (0.25, (-18.0, 60.0), (-0.4, -0.8), 8, lambda i: 2000.0 + 100 * i, lambda lat, lon: lat > 90),
    "landfall": (
        0.25,
        (20.0, 130.0),
        (0.7, -0.5),
        8,
        lambda i: 3000.0,
        lambda lat, lon: (lon < 128) & (lat > 10),
    ),
    "weak": (0.25, (20.0, 300.0), (0.3, -0.7), 8, lambda i: 3000.0 * (i < 5), lambda lat, lon: lon > 302),
    "coarse": (1.0, (15.0, 200.0), (0.5, -0.9), 6, lambda i: 3000.0, lambda lat, lon: lat > 90),
}
# Positions of the official tracker after every step, and its lowest pressure and strongest wind at the last.
OFFICIAL: dict[str, tuple[list[tuple[float, float]], float, float]] = {
    "pacific": (
        [
            (15.75, 199.0),
            (16.25, 198.0),
            (16.5, 197.5),
            (16.75, 196.25),
            (17.25, 195.25),
            (18.0, 194.75),
            (18.75, 193.75),
            (19.25, 192.5),
        ],
        98471.8359375,
        34.760589599609375,
    ),
    "south": (
        [
            (-18.25, 59.25),
            (-18.5, 58.25),
            (-19.25, 57.75),
            (-19.75, 56.75),
            (-20.25, 55.75),
            (-20.5, 55.5),
            (-20.5, 54.5),
            (-21.0, 53.5),
        ],
        98375.890625,
        32.46933364868164,
    ),
    "landfall": (
        [
            (21.0, 129.5),
            (21.75, 129.0),
            (22.25, 128.75),
            (22.5, 128.0),
            (23.25, 127.25),
            (24.0, 127.25),
            (25.0, 126.5),
            (25.75, 125.75),
        ],
        98351.8203125,
        34.80556869506836,
    ),
    "weak": (
        [
            (20.5, 299.25),
            (21.0, 298.5),
            (21.0, 298.0),
            (21.0, 297.25),
            (22.0, 294.0),
            (21.75, 294.0),
            (22.25, 293.5),
            (22.0, 291.75),
        ],
        101378.8671875,
        1.7789581761462614e-05,
    ),
    "coarse": (
        [(16.0, 199.0), (16.0, 198.0), (17.0, 197.0), (17.0, 196.0), (17.0, 195.0), (18.0, 195.0)],
        98515.8125,
        33.66712951660156,
    ),
}
SMOOTH = [
    -5.59289623086782,
    20.252331886331636,
    42.63860903114218,
    47.109522110682576,
    44.60554727264445,
    -28.643941634284637,
    -12.679528204278432,
    13.004950978457646,
    20.586204965336517,
    15.567224088791155,
    -29.627529293396957,
    -34.98325323042772,
    -22.68781873713603,
    -13.370120516130235,
    -7.615022380834783,
]
LOWEST = [-99.81366159327033] * 15


def states(name: str, whole: bool = False) -> Iterator[tuple[Batch, datetime]]:
    """Give the predictions of a case: a cyclone on wavy pressure, another one near it.

    Args:
        name: of the case.
        whole: from 44 S to 44 N, as the official tracker got them; else what lies around the track.
    """
    spacing, start, move, steps, depth, land = CASES[name]
    lat = torch.arange(44, -44, -spacing, dtype=torch.float64)
    lon = torch.arange(round(360 / spacing), dtype=torch.float64) * spacing
    if not whole:  # what a box may reach
        lat = lat[(lat - start[0] - move[0] * steps / 2).abs() <= AROUND_DEG]
        lon = lon[((lon - start[1] - move[1] * steps / 2 + 180) % 360 - 180).abs() <= AROUND_DEG]
    lats, lons = torch.meshgrid(lat, lon, indexing="ij")
    for i in range(1, steps + 1):
        eye = (start[0] + move[0] * i + 0.3 * math.sin(i), start[1] + move[1] * i + 0.2 * math.cos(2 * i))
        waves = 20 * ((5 * lats + i).sin() * (7 * lons).cos() + (13 * lats).cos() * (11 * lons + i).sin())
        msl, z700 = 101300 + 200 * (lats / 9).sin() + waves, 29000 + 50 * (lats / 7).cos() + waves / 3
        u, v = torch.zeros_like(lats), torch.zeros_like(lats)
        for y, x, deep in ((*eye, depth(i)), (eye[0] + 9, eye[1] + 7, 1500.0)):
            away = distance_km(lats, lons, y, x)
            msl -= deep * (-((away / 250) ** 2)).exp()
            z700 -= deep / 2 * (-((away / 400) ** 2)).exp()
            swirl = deep / 100 * (-((away / 300) ** 2)).exp()
            u -= (lats - y) * swirl
            v += ((lons - x + 180) % 360 - 180) * lats.deg2rad().cos() * swirl
        yield (
            Batch(
                surf_vars={
                    "msl": msl.float()[None, None],
                    "10u": u.float()[None, None],
                    "10v": v.float()[None, None],
                },
                static_vars={"lsm": land(lats, lons).float()},
                atmos_vars={"z": torch.stack((msl, z700, msl)).float()[None, None]},
                metadata=Metadata(lat, lon, (TIME + timedelta(hours=6 * i),), LEVELS),
            ),
            TIME + timedelta(hours=6 * i),
        )


@pytest.mark.parametrize("name", CASES)
def test_tracks_equal_the_official_ones(name: str) -> None:
    positions, msl, wind = OFFICIAL[name]
    tracker = Tracker(*CASES[name][1], TIME)
    for state, _ in states(name):
        tracker.step(state)
    got = list(zip(tracker.tracked_lats, tracker.tracked_lons))[1:]
    assert got == [pytest.approx(position, abs=1e-5) for position in positions]
    assert tracker.tracked_msls[-1] == pytest.approx(msl, rel=1e-6)
    assert tracker.tracked_winds[-1] == pytest.approx(wind, rel=1e-5)
    assert tracker.tracked_times[-1] == TIME + timedelta(hours=6 * len(positions))
    assert math.isnan(tracker.tracked_msls[0])
    assert list(tracker.results().columns) == ["time", "lat", "lon", "msl", "wind"]
    assert len(tracker.results()) == len(positions) + 1


@pytest.mark.parametrize("step_deg", [-0.8, 0.8])
def test_a_cyclone_is_followed_across_0_degrees(step_deg: float) -> None:
    """The official tracker fits a line through longitudes as they are and loses it there."""
    CASES["seam"] = (
        0.25,
        (20.0, -2.5 * step_deg % 360),
        (0.3, step_deg),
        7,
        lambda i: 3000.0,
        CASES["pacific"][5],
    )
    try:
        _, start, move, steps, *_ = CASES["seam"]
        tracker = Tracker(*start, TIME)
        for state, _ in states("seam"):
            tracker.step(state)
    finally:
        del CASES["seam"]
    lats, lons = torch.tensor(tracker.tracked_lats), torch.tensor(tracker.tracked_lons)
    assert ((lons >= 0) & (lons < 360)).all()
    wanted = start[1] + move[1] * steps + 0.2 * math.cos(2 * steps)
    assert abs((float(lons[-1]) - wanted + 180) % 360 - 180) < 0.6
    assert abs(float(lats[-1]) - (start[0] + move[0] * steps + 0.3 * math.sin(steps))) < 0.6


def test_a_step_without_an_eye_is_a_guess_and_counted() -> None:
    tracker = Tracker(*CASES["pacific"][1], TIME)
    for count, (state, _) in enumerate(states("pacific")):
        if count == 3:
            slope = state.metadata.lon.expand(1, 1, *state.spatial_shape).float()
            state = replace(
                state,
                surf_vars={**state.surf_vars, "msl": slope},
                atmos_vars={"z": slope[:, :, None].expand(1, 1, 3, *state.spatial_shape)},
            )
        guess = extrapolate(tracker.tracked_lats, tracker.tracked_lons)
        tracker.step(state)
        if count == 3:
            assert (tracker.tracked_lats[-1], tracker.tracked_lons[-1]) == guess
    assert tracker.fails == 1
    # It is found again afterwards.
    assert tracker.tracked_lats[-1] == pytest.approx(OFFICIAL["pacific"][0][-1][0], abs=0.3)


def test_nothing_at_the_first_step_is_an_error() -> None:
    state, _ = next(states("pacific"))
    with pytest.raises(NoEyeError, match="-40 N, 100 E"):
        Tracker(-40, 100, TIME).step(
            replace(
                state,
                surf_vars={name: torch.ones_like(x).cumsum(-1) for name, x in state.surf_vars.items()},
                atmos_vars={"z": torch.ones_like(state.atmos_vars["z"]).cumsum(-1)},
            )
        )
    west = replace(state.metadata, lon=state.metadata.lon / 4)  # a grid from 0 to 90 degrees
    with pytest.raises(NoEyeError):
        Tracker(15, 200, TIME).step(replace(state, metadata=west))


def test_batches_that_cannot_be_tracked_are_refused() -> None:
    state, _ = next(states("coarse"))
    two = Batch(
        {name: x.expand(2, -1, -1, -1) for name, x in state.surf_vars.items()},
        state.static_vars,
        {},
        replace(state.metadata, time=(TIME, TIME)),
    )
    poor = Batch({"10u": state.surf_vars["10u"]}, {}, {}, state.metadata)
    high = replace(state, metadata=replace(state.metadata, atmos_levels=(1, 2, 3)))
    lat, lon = (x.expand(state.spatial_shape) for x in (state.metadata.lat[:, None], state.metadata.lon))
    for batch, says in (
        (two, "has 2"),
        (poor, "lacks msl, 10v, lsm, z at 700 hPa"),
        (high, "lacks z at 700 hPa"),
        (replace(state, metadata=replace(state.metadata, lat=lat, lon=lon)), "regrid"),
    ):
        with pytest.raises(ValueError, match=says):
            Tracker(15, 200, TIME).step(batch)


@pytest.mark.parametrize(
    ("lats", "lons", "wanted"),
    [
        ([10.0], [-3.0], (10, 357)),
        ([10.0, 11.0], [200.0, 198.0], (12, 196)),
        ([88.0, 89.5], [10.0, 10.0], (90, 10)),
        ([0.0] * 3, [358.0, 359.0, 0.0], (0, 1)),
        ([0.0] * 3, [2.0, 1.0, 0.0], (0, 359)),
        # numpy.polyval(numpy.polyfit(numpy.arange(8), [1, 4, 1, 5, 9, 2, 6, 5], 1), 8)
        ([3.0, 1, 4, 1, 5, 9, 2, 6, 5], [50.0] * 9, (6.535714285714286, 50)),
    ],
)
def test_guesses(lats: list[float], lons: list[float], wanted: tuple[float, float]) -> None:
    assert extrapolate(lats, lons) == pytest.approx(wanted)


def noise() -> Tensor:
    """Return a small field that looks random."""
    return (100 * (torch.arange(15, dtype=torch.float64) ** 2 * 1.7).sin()).reshape(3, 5)


def test_filters_equal_those_of_scipy() -> None:
    # scipy 1.17.1: gaussian_filter(noise(), sigma=1), minimum_filter(noise(), size=(8, 8))
    assert smooth(noise()).flatten().tolist() == pytest.approx(SMOOTH, rel=1e-9)
    assert lowest_nearby(noise()).flatten().tolist() == pytest.approx(LOWEST, rel=1e-12)
    wide = torch.arange(20.0)[None] ** 2
    assert lowest_nearby(wide)[0].tolist() == [max(i - 4, 0) ** 2 for i in range(20)]


def print_official() -> None:
    """Print the numbers of this file anew."""
    from aurora import Batch as TheirBatch  # type: ignore[import-not-found]
    from aurora import Metadata as TheirMetadata
    from aurora import Tracker as TheirTracker
    from scipy.ndimage import gaussian_filter, minimum_filter

    for name, case in CASES.items():
        tracker: Any = TheirTracker(*case[1], TIME)
        for state, time in states(name, whole=True):
            where = TheirMetadata(state.metadata.lat.float(), state.metadata.lon.float(), (time,), LEVELS)
            tracker.step(TheirBatch(state.surf_vars, state.static_vars, state.atmos_vars, where))
        track = [
            (round(float(y), 6), round(float(x), 6))
            for y, x in zip(tracker.tracked_lats, tracker.tracked_lons)
        ]
        print(f"    {name!r}: ({track[1:]}, {tracker.tracked_msls[-1]}, {tracker.tracked_winds[-1]}),")
        assert tracker.fails == 0
    print("SMOOTH =", gaussian_filter(noise().numpy(), sigma=1).flatten().tolist())
    print("LOWEST =", minimum_filter(noise().numpy(), size=(8, 8)).flatten().tolist())


if __name__ == "__main__":
    print_official()
