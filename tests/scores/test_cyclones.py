"""Cyclones: made-up vortices over the date line, found and followed; brute force beside the detector."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from aeris.scores.cyclones import (
    LATITUDE,
    LONGITUDE,
    PRESSURE,
    WIND,
    Detector,
    Recipe,
    Track,
    distance_deg,
    stitch,
)
from aeris.scores.ibtracs import read_ibtracs
from aeris.scores.plots.tracks import plot_track_errors, plot_tracks
from aeris.scores.tracks import TRUTH, TrackCollector, compare, strike_probability

NAMES = ("u10", "v10", "msl", "z300", "z500")
LATITUDES, LONGITUDES = np.linspace(70, -70, 71), np.arange(180) * 2.0
RECIPE = Recipe().on(LATITUDES, LONGITUDES, 6)
INIT = np.datetime64("2020-09-01T00", "s")


def vortex(
    x_CYX: np.ndarray, latitude: float, longitude: float, depth_pa: float = 3000.0, warm: float = 400.0
) -> None:
    """Add a vortex of 3 degrees radius: low pressure, 25 m/s, a core that is `warm` m2 s-2 thicker."""
    grid = np.stack(np.meshgrid(LATITUDES, LONGITUDES, indexing="ij"), axis=-1)
    shape = np.exp(-0.5 * (distance_deg(grid, np.array([latitude, longitude])) / 3.0) ** 2)
    x_CYX[2] -= depth_pa * shape
    x_CYX[0] += 25.0 * depth_pa / 3000.0 * shape
    x_CYX[3] += warm * shape


def calm() -> np.ndarray:
    """Fields without cyclones: pressure and heights that slope towards the poles."""
    x_CYX = np.zeros((5, 71, 180), dtype=np.float32)
    x_CYX[2] = 101300.0 - 10.0 * np.abs(LATITUDES)[:, None]
    x_CYX[3] = 90000.0 - 20.0 * np.abs(LATITUDES)[:, None]
    x_CYX[4] = 55000.0 - 10.0 * np.abs(LATITUDES)[:, None]
    return x_CYX


def detect(x_CYX: np.ndarray, names: tuple[str, ...] = NAMES) -> np.ndarray:
    """The cyclones of one time."""
    return Detector(names, LATITUDES, LONGITUDES, RECIPE).detect(x_CYX)


def test_vortices_are_found_where_they_are() -> None:
    """One on the date line, one at Greenwich on the other side of the equator; the deepest first."""
    x_CYX = calm()
    vortex(x_CYX, 16.0, 180.0, 4000.0)
    vortex(x_CYX, -20.0, 0.0)
    points = detect(x_CYX)
    np.testing.assert_allclose(points[:, :2], [[16.0, 180.0], [-20.0, 0.0]])
    assert points[0, PRESSURE] == pytest.approx(101300 - 160 - 4000, abs=1)
    assert points[1, WIND] == pytest.approx(25.0, abs=0.1)


@pytest.mark.parametrize("longitudes", [LONGITUDES, LONGITUDES - 180.0], ids=["from 0", "from -180"])
def test_neither_first_column_nor_order_of_rows_matters(longitudes: np.ndarray) -> None:
    """A grid upside down or cut elsewhere has the same cyclones."""
    x_CYX = calm()
    vortex(x_CYX, 16.0, 0.0)
    turned = x_CYX if longitudes[0] == 0 else np.roll(x_CYX, 90, axis=2)
    points = Detector(NAMES, LATITUDES[::-1], longitudes, RECIPE).detect(turned[:, ::-1])
    np.testing.assert_allclose(points, detect(x_CYX))


def test_cold_shallow_and_open_lows_are_none() -> None:
    """A cold core, a low of 1.5 hPa, and a trough without a closed contour."""
    for settings in ({"warm": -400.0}, {"depth_pa": 150.0}):
        x_CYX = calm()
        vortex(x_CYX, 16.0, 100.0, **settings)
        assert not len(detect(x_CYX))
    cold = calm()
    vortex(cold, 16.0, 100.0, warm=-400.0)
    without = np.delete(cold, 3, axis=0)
    assert len(detect(without, ("u10", "v10", "msl", "z500"))) == 1  # nothing to tell its core by
    trough = calm()
    trough[2] -= 2000.0 * np.exp(-0.5 * ((LATITUDES - 20.0) / 3.0) ** 2)[:, None].astype(np.float32)
    trough[2, :, 90] -= 50.0
    assert not len(detect(trough))


def test_of_two_near_minima_the_deeper_one_counts() -> None:
    """Four degrees apart they are one, twelve degrees apart two."""
    for apart, count in ((4.0, 1), (12.0, 2)):
        x_CYX = calm()
        vortex(x_CYX, 16.0, 100.0)
        x_CYX[2, 27, 50 + int(apart / 2)] -= 2500.0
        x_CYX[3, 27, 50 + int(apart / 2)] += 400.0
        assert len(detect(x_CYX)) == count


def brute_force_closed(x_YX: np.ndarray, row: int, col: int, rise: float, within_deg: float) -> bool:
    """Walk over every point one can reach without rising by `rise`; the whole globe is there to walk on."""
    todo, seen = [(row, col)], {(row, col)}
    centre = np.array([LATITUDES[row], LONGITUDES[col]])
    while todo:
        y, x = todo.pop()
        if distance_deg(np.array([LATITUDES[y], LONGITUDES[x]]), centre) > within_deg:
            return False
        for down in (-1, 0, 1):
            for right in (-1, 0, 1):
                place = (y + down, (x + right) % 180)
                if 0 <= place[0] < 71 and place not in seen and x_YX[place] < x_YX[row, col] + rise:
                    seen.add(place)
                    todo.append(place)
    return True


def test_closed_contours_against_brute_force() -> None:
    """In smoothed noise, every minimum that is no neighbour of a deeper one."""
    rng = np.random.default_rng(3)
    noise = rng.normal(size=(71, 180))
    for _ in range(6):
        noise = sum(np.roll(noise, (i, j), (0, 1)) for i in (-1, 0, 1) for j in (-1, 0, 1)) / 9
    x_CYX = (101000.0 + 300.0 * noise / noise.std())[None].astype(np.float32)
    detector = Detector(("msl",), LATITUDES, LONGITUDES, RECIPE)
    points = detector.detect(x_CYX)
    expected = []
    for row, col in detector._minima(x_CYX[0]):
        near = [(y % 71, (col + x) % 180) for y in range(row - 1, row + 2) for x in (-1, 0, 1) if 0 <= y < 71]
        assert x_CYX[0, row, col] == min(x_CYX[0][place] for place in near)
        if brute_force_closed(x_CYX[0], row, col, RECIPE.closed_pa, RECIPE.closed_deg):
            expected.append((LATITUDES[row], LONGITUDES[col]))
    assert 5 < len(expected) < len(detector._minima(x_CYX[0]))
    np.testing.assert_allclose(points[:, :2], expected)
    assert np.isnan(points[:, WIND]).all()


def moving(hours: int, north: float = 0.2, west: float = 0.6) -> tuple[float, float]:
    """The place of a cyclone: over the date line to the west, and poleward."""
    return 14.0 + north * hours, (190.0 - west * hours) % 360.0


def test_a_cyclone_over_the_date_line_is_one_track() -> None:
    """Moved 0.6 degrees west and 0.2 north an hour; lost for a day; noise elsewhere joins nothing."""
    times = list(range(0, 97, 6))
    points = []
    for hours in times:
        x_CYX = calm()
        if not 24 < hours < 48:
            vortex(x_CYX, *moving(hours))
        if hours % 18 == 0:
            vortex(x_CYX, -15.0, 40.0 + hours)  # another one every time
        points.append(detect(x_CYX))
    (track,) = stitch(points, times, Recipe(stitch_deg=20.0))
    assert track.time_h.tolist() == [hours for hours in times if not 24 < hours < 48]
    expected = np.array([moving(hours) for hours in track.time_h.tolist()])
    assert distance_deg(track.points[:, :2], expected).max() < 1.5  # half a diagonal of the grid
    assert not stitch(points, times, Recipe(stitch_deg=20.0, gap_h=12))  # 24 h and 48 h of life


def test_what_lasts() -> None:
    """Too short, too weak, too far north: each alone is enough to be none."""
    times = list(range(0, 60, 6))
    good = [np.array([[20.0, 100.0 + h / 6, 99000.0, 12.0]]) for h in times]
    assert len(stitch(good, times, Recipe())) == 1
    assert not stitch(good[:-1], times[:-1], Recipe())
    for column, value in ((WIND, 9.0), (LATITUDE, 51.0)):
        bad = [point.copy() for point in good]
        bad[4][0, column] = value
        assert not stitch(bad, times, Recipe())
    assert len(stitch([np.where([0, 0, 0, 1], np.nan, p) for p in good], times, Recipe())) == 1


def test_recipe_suits_grid_and_step() -> None:
    """On 0.25 degrees every 6 h it is the published one; else only what must be larger is."""
    fine = Recipe().on(np.linspace(90, -90, 721), np.arange(1440) * 0.25, 6)
    assert fine == Recipe()
    coarse = Recipe().on(np.linspace(86.25, -86.25, 24), np.arange(48) * 7.5, 24)
    assert coarse.closed_deg == pytest.approx(15.0) and coarse.wind_deg == pytest.approx(7.5)
    assert coarse.stitch_deg == pytest.approx(16.0) and coarse.strong_points == 4


def straight(first: int, last: int, latitude: float, shift: float = 0.0, pressure: float = 98000.0) -> Track:
    """A track to the west along a parallel."""
    time_h = np.arange(first, last + 1, 6)
    points = [(latitude + shift, (5.0 - 0.5 * hours) % 360.0, pressure, 20.0) for hours in time_h]
    return Track(time_h, np.array(points))


def test_tracks_are_matched_once_and_by_distance() -> None:
    """Two true ones and three members' tracks: a hit, another one too far away, one too many."""
    truth = [straight(0, 72, 15.0), straight(0, 72, -15.0)]
    forecast = [straight(6, 60, 15.0, 2.0), straight(12, 60, 15.0, 1.0, 97000.0), straight(0, 72, -15.0, 6.0)]
    result = compare(forecast, truth)
    (match,) = result.matches
    assert (match.truth, match.forecast) == (0, 1)
    assert (result.misses, result.false_alarms) == (1, 2)
    np.testing.assert_allclose(match.errors, np.tile([111.195, -1000.0, 0.0], (9, 1)), rtol=1e-3)


def test_strikes_lie_along_the_way() -> None:
    """A cyclone that jumps over Greenwich strikes what lies between; a member without one halves it."""
    points = np.array([[10.0, 356.0, 98000.0, 20.0], [10.0, 4.0, 98000.0, 20.0]])
    strike = strike_probability([[Track(np.array([0, 6]), points)], []], LATITUDES, LONGITUDES)
    row = int(np.flatnonzero(LATITUDES == 10.0)[0])
    assert strike[row, [178, 179, 0, 1, 2]].tolist() == [0.5] * 5
    assert strike[row, 90] == 0 and strike.max() == 0.5 and 5 <= np.count_nonzero(strike) <= 11


@pytest.fixture(scope="module")
def collected() -> TrackCollector:
    """A collector of two members at one init time; member 1 is a degree further north and 5 hPa deeper."""
    return TrackCollector(NAMES, LATITUDES, LONGITUDES, [INIT], range(6, 91, 6), 2)


@pytest.fixture(scope="module")
def part(collected: TrackCollector) -> dict[str, np.ndarray]:
    """What that init time contributes."""
    collected.begin(0)
    for lead, hours in enumerate(collected.lead_h):
        truth, second = calm(), calm()
        vortex(truth, *moving(hours))
        vortex(second, moving(hours)[0] + 2.0, moving(hours)[1], 3500.0)
        collected.add(lead, np.stack([truth, second]), truth, INIT + np.timedelta64(hours, "h"))
    return collected.end()


def test_scores_of_an_ensemble(
    collected: TrackCollector, part: dict[str, np.ndarray], tmp_path: Path
) -> None:
    """One member is right, the other 2 degrees off: 1 degree on average, and 1 for the mean place."""
    scores = collected.combine([part])
    assert (scores.cyclones, scores.hits, scores.misses, scores.false_alarms) == (1, 2, 0, 0)
    assert scores.count.tolist() == [2] * 15
    assert scores.distance_km.mean() == pytest.approx(111.2, abs=15)
    assert scores.mean_distance_km.mean() == pytest.approx(111.2, abs=15)
    assert scores.pressure_bias_pa.mean() == pytest.approx(-260.0, abs=80)
    values = scores.as_json()
    assert values["hit_rate"] == 1.0 and values["recipe"]["life_h"] == 54
    plot_tracks(scores.tracks[0], LATITUDES, LONGITUDES, "tracks", "one init time", tmp_path / "tracks.png")
    plot_track_errors(scores, "cyclones", tmp_path / "errors.png")
    assert {path.name for path in tmp_path.iterdir()} == {"tracks.png", "errors.png"}


def test_no_cyclone_is_no_error(collected: TrackCollector) -> None:
    """Without any, there are counts of 0 and nothing to average."""
    scores = collected.combine([{"points": np.empty((0, 6))}])
    assert scores.cyclones == 0 and math.isnan(scores.hit_rate) and math.isnan(scores.false_alarm_ratio)
    assert scores.as_json()["distance_km"] == [None] * 15


IBTRACS = """SID,SEASON,NAME,ISO_TIME,LAT,LON,WMO_WIND,WMO_PRES,USA_WIND,USA_PRES
 ,Year, , ,degrees_north,degrees_east,kts,mb,kts,mb
"""


def test_observed_tracks_are_read_and_cut_to_the_forecast(
    part: dict[str, np.ndarray], tmp_path: Path
) -> None:
    """IBTrACS: units, missing values, other agencies; only what lasts inside the forecast is looked for."""
    lines = [IBTRACS]
    for hours in range(-12, 97, 3):
        time = str(INIT + np.timedelta64(hours, "h")).replace("T", " ")
        latitude, longitude = moving(hours)
        wind = "50" if hours < 48 else " "
        lines.append(
            f"A1,2020,ALMA,{time},{latitude:.1f},{(longitude + 180) % 360 - 180:.1f},{wind}, ,60,980\n"
        )
    lines.append("B2,2020,SHORT,2020-09-01 12:00:00,10,20,30,1000,30,1000\n")
    path = tmp_path / "ibtracs.csv"
    path.write_text("".join(lines))
    alma, _ = tracks = read_ibtracs(path, INIT, INIT + np.timedelta64(10, "D"))
    assert alma.name == "ALMA" and len(alma.points) == 33
    assert alma.points[0].tolist() == pytest.approx([14.0, 190.0, 98000.0, 25.7222], abs=1e-3)
    assert alma.points[-1, WIND] == pytest.approx(60 * 0.514444)
    collector = TrackCollector(NAMES, LATITUDES, LONGITUDES, [INIT], range(6, 91, 6), 2, observed=tracks)
    collector.begin(0)
    collector.add(14, np.stack([calm()] * 2), None, INIT + np.timedelta64(90, "h"))
    assert not collector.needs_truth and collector.end()["points"].shape == (0, 6)
    scores = collector.combine([part])
    assert (scores.cyclones, scores.hits, scores.truth) == (1, 2, "observed")
    assert scores.tracks[0][TRUTH][0].time_h.tolist() == list(range(6, 91, 6))
    assert scores.tracks[0][TRUTH][0].points[0, LONGITUDE] == pytest.approx(moving(6)[1], abs=0.06)
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="it lacks ISO_TIME, LAT, LON, SID"):
        read_ibtracs(path, INIT, INIT)
    path.write_text(IBTRACS + "A1,2020,X,2020-09-01 00:00:00,10,20,much, , , \n")
    with pytest.raises(ValueError, match="WMO_WIND of A1 is 'much', no number"):
        read_ibtracs(path, INIT, INIT)


def test_pressure_is_needed() -> None:
    """Named with what there is."""
    with pytest.raises(ValueError, match="need the channel msl; there are t2m z500"):
        Detector(("t2m", "z500"), LATITUDES, LONGITUDES, RECIPE)
