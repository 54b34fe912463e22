"""Tropical cyclones in fields: points at one time, stitched into tracks.

The recipe is that of TempestExtremes (Ullrich et al. 2021, Geosci. Model Dev. 14, 5023; thresholds of
Zarzycki and Ullrich 2017, Geophys. Res. Lett. 44, 1100): a minimum of mean sea level pressure inside a closed
contour, under a warm core where z300 and z500 are there, followed from time to time, and kept if it lives, is
strong and is not far from the tropics for long enough.

Shapes: C channels, Y rows, X columns, P points; a point is (latitude, longitude, pressure, wind).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]
Fields = NDArray[np.float32]

LATITUDE, LONGITUDE, PRESSURE, WIND = range(4)
"""Columns of a point: degrees north, degrees east in [0, 360), Pa, m/s (NaN without winds)."""
STEP_H = 6
"""Hours between the times the recipe was made for."""


@dataclass(frozen=True)
class Recipe:
    """What counts as a cyclone. Angles are great-circle degrees."""

    closed_pa: float = 200.0
    """Pressure rises by so much ..."""
    closed_deg: float = 5.5
    """... on every way that leaves this distance."""
    core_m2_s2: float = 58.8
    """z300 - z500 falls by so much (6 m of thickness; 0: any core will do) ..."""
    core_deg: float = 6.5
    """... likewise, from its maximum ..."""
    core_near_deg: float = 1.0
    """... this near to the pressure minimum."""
    merge_deg: float = 6.0
    """Of two minima nearer than this the deeper one counts."""
    wind_deg: float = 2.0
    """The wind of a point is the strongest 10 m wind this near."""
    search_deg: float = 65.0
    """Nothing is looked for nearer to the poles."""
    stitch_deg: float = 8.0
    """How far a cyclone moves at most between two times 6 h apart."""
    gap_h: int = 24
    """How long it may be lost."""
    life_h: int = 54
    """How long it lasts at least, from first to last point."""
    latitude_deg: float = 50.0
    """It is nearer to the equator than this at `strong_points` points."""
    wind_m_s: float = 10.0
    """It has this wind at as many."""
    strong_points: int = 10

    def on(self, latitude_deg: Values, longitude_deg: Values, step_h: int) -> Recipe:
        """Return the recipe for a grid and for times `step_h` apart.

        Distances are two grid spacings at least (nearness of core and wind: one), so that there are points to
        look at. Over longer steps a cyclone goes further, with the square root of the step since paths bend,
        and the number of points is that of its shortest life.
        """
        spacing_deg = max(abs(float(np.diff(x).mean())) for x in (latitude_deg, longitude_deg))
        two, one = 2.0 * spacing_deg + 1e-6, spacing_deg + 1e-6
        longer = max(1.0, math.sqrt(step_h / STEP_H))
        return replace(
            self,
            closed_deg=max(self.closed_deg, two),
            core_deg=max(self.core_deg, two),
            merge_deg=max(self.merge_deg, two),
            core_near_deg=max(self.core_near_deg, one),
            wind_deg=max(self.wind_deg, one),
            stitch_deg=max(self.stitch_deg * longer, two),
            gap_h=max(self.gap_h, step_h),
            strong_points=min(self.strong_points, math.ceil(self.life_h / step_h) + 1),
        )


@dataclass(frozen=True)
class Track:
    """A cyclone from time to time.

    Attributes:
        time_h: hours, since whatever the caller counts from, rising: int64 [P].
        points: float64 [P, 4].
        name: if it has one.
    """

    time_h: NDArray[np.int64]
    points: Values
    name: str = ""


def distance_deg(a: Values, b: Values) -> Values:
    """Return great-circle distances of points, broadcast over all dims but the last."""
    phi_a, phi_b = np.deg2rad(a[..., LATITUDE]), np.deg2rad(b[..., LATITUDE])
    half_phi = 0.5 * (phi_a - phi_b)
    half_lambda = 0.5 * np.deg2rad(a[..., LONGITUDE] - b[..., LONGITUDE])
    square = np.sin(half_phi) ** 2 + np.cos(phi_a) * np.cos(phi_b) * np.sin(half_lambda) ** 2
    return np.asarray(np.rad2deg(2.0 * np.arcsin(np.sqrt(np.clip(square, 0.0, 1.0)))))


class Detector:
    """Finds cyclones at one time.

    Args:
        names: channels; msl is needed, z300 and z500 give the warm core, u10 and v10 the wind.
        latitude_deg: latitude of every row, rising or falling [Y].
        longitude_deg: longitude of every column, once round the globe [X].
        recipe: what counts, for this grid (`Recipe.on`).

    Raises:
        ValueError: there is no msl.
    """

    def __init__(
        self, names: Sequence[str], latitude_deg: Values, longitude_deg: Values, recipe: Recipe
    ) -> None:
        if "msl" not in names:
            raise ValueError(f"cyclones need the channel msl; there are {' '.join(names)}")
        self.names, self.recipe = list(names), recipe
        self.latitude_deg, self.longitude_deg = latitude_deg, longitude_deg
        self.distances: dict[int, Values] = {}  # of the surroundings of a row, the same for all columns
        self.has_core = {"z300", "z500"} <= set(names) and recipe.core_m2_s2 > 0
        self.has_wind = {"u10", "v10"} <= set(names)

    def detect(self, x_CYX: Fields) -> Values:
        """Return the cyclones of one time: float64 [P, 4], the deepest first."""
        msl_YX = x_CYX[self.names.index("msl")]
        core_YX = speed_YX = None
        if self.has_core:
            core_YX = x_CYX[self.names.index("z500")] - x_CYX[self.names.index("z300")]  # least where warm
        if self.has_wind:
            speed_YX = np.hypot(x_CYX[self.names.index("u10")], x_CYX[self.names.index("v10")])
        found = []
        for row, col in self._minima(msl_YX):
            around = _Surroundings(self, row, col)
            if not around.closed(msl_YX, self.recipe.closed_pa, self.recipe.closed_deg):
                continue
            if core_YX is not None and not self._warm(core_YX, around):
                continue
            wind = math.nan if speed_YX is None else around.most(speed_YX, self.recipe.wind_deg)
            place = self.latitude_deg[row], self.longitude_deg[col] % 360.0
            found.append((*place, float(msl_YX[row, col]), wind))
        return np.array(found, dtype=np.float64).reshape(-1, 4)

    def _minima(self, msl_YX: Fields) -> list[tuple[int, int]]:
        """Return minima among their eight neighbours, the deepest first, without those near a deeper one."""
        above = np.pad(msl_YX, ((1, 1), (0, 0)), constant_values=np.inf)
        least_YX = np.ones(msl_YX.shape, dtype=bool)
        rows = msl_YX.shape[0]
        least_YX[np.abs(self.latitude_deg) > self.recipe.search_deg] = False
        for down in (-1, 0, 1):
            for right in (-1, 0, 1):
                if (down, right) != (0, 0):
                    other_YX = np.roll(above[1 + down : 1 + down + rows], -right, axis=1)
                    # A plateau counts once.
                    before = (down, right) < (0, 0)
                    least_YX &= msl_YX < other_YX if before else msl_YX <= other_YX
        row_P, col_P = np.nonzero(least_YX)
        order = np.argsort(msl_YX[row_P, col_P], kind="stable")
        points = np.stack([self.latitude_deg[row_P], self.longitude_deg[col_P]], axis=-1)[order]
        left = np.ones(len(order), dtype=bool)
        kept = []
        for number in range(len(order)):
            if left[number]:
                kept.append((int(row_P[order[number]]), int(col_P[order[number]])))
                left &= distance_deg(points, points[number]) >= self.recipe.merge_deg
        return kept

    def _warm(self, core_YX: Fields, around: _Surroundings) -> bool:
        """Tell whether z500 - z300 has a closed minimum near a point."""
        centre = around.where_least(core_YX, self.recipe.core_near_deg)
        return _Surroundings(self, *centre).closed(core_YX, self.recipe.core_m2_s2, self.recipe.core_deg)


class _Surroundings:
    """The part of the grid around a point, in which distances are known."""

    def __init__(self, detector: Detector, row: int, col: int) -> None:
        recipe, latitude_deg = detector.recipe, detector.latitude_deg
        rows, cols = len(latitude_deg), len(detector.longitude_deg)
        reach_deg = max(recipe.closed_deg, recipe.core_deg, recipe.wind_deg, recipe.core_near_deg)
        tall = math.ceil(reach_deg / abs(float(np.diff(latitude_deg).mean()))) + 1
        top, bottom = max(0, row - tall), min(rows, row + tall + 1)
        # Columns are nearest to each other on the row that is nearest to a pole.
        narrow = math.cos(math.radians(min(89.0, float(np.abs(latitude_deg[top:bottom]).max()))))
        wide = min((cols - 1) // 2, math.ceil(reach_deg * cols / 360.0 / narrow) + 1)
        self.rows, self.cols = slice(top, bottom), np.arange(col - wide, col + wide + 1) % cols
        self.centre = row - top, wide
        if row not in detector.distances:
            east_deg = np.arange(-wide, wide + 1) * (360.0 / cols)
            grid = np.stack(np.meshgrid(latitude_deg[top:bottom], east_deg, indexing="ij"), axis=-1)
            detector.distances[row] = distance_deg(grid, grid[self.centre])
        self.distance_deg = detector.distances[row]

    def of(self, x_YX: Fields) -> Fields:
        """Cut this part out of a field."""
        return x_YX[self.rows][:, self.cols]

    def most(self, x_YX: Fields, within_deg: float) -> float:
        """Return the largest value near the point."""
        return float(self.of(x_YX)[self.distance_deg <= within_deg].max())

    def where_least(self, x_YX: Fields, within_deg: float) -> tuple[int, int]:
        """Return row and column of the smallest value near the point."""
        near = np.where(self.distance_deg <= within_deg, self.of(x_YX), np.inf)
        row, col = np.unravel_index(int(near.argmin()), near.shape)
        return self.rows.start + int(row), int(self.cols[col])

    def closed(self, x_YX: Fields, rise: float, within_deg: float) -> bool:
        """Tell whether the field rises by `rise` on every way from the point to further than `within_deg`."""
        x = self.of(x_YX)
        low = x < x[self.centre] + rise
        far = self.distance_deg > within_deg
        reached = np.zeros_like(low)
        reached[self.centre] = True
        count = 1
        while True:
            tall = reached.copy()
            tall[1:] |= reached[:-1]
            tall[:-1] |= reached[1:]
            reached = tall.copy()
            reached[:, 1:] |= tall[:, :-1]
            reached[:, :-1] |= tall[:, 1:]
            reached &= low
            if (reached & far).any():
                return False
            before, count = count, int(np.count_nonzero(reached))
            if before == count:
                return True


def stitch(points: Sequence[Values], time_h: Sequence[int], recipe: Recipe) -> list[Track]:
    """Join the points of rising times into tracks, and keep those that are cyclones long enough.

    At every time, the nearest pairs of a track's last point and a new point are joined first.

    Args:
        points: [P, 4] at each time.
        time_h: the times, in hours.
        recipe: what counts, for these times (`Recipe.on`). Without winds no wind is asked for.
    """
    tracks: list[list[tuple[int, Values]]] = []
    for now_h, new in zip(time_h, points):
        alive = [track for track in tracks if now_h - track[-1][0] <= recipe.gap_h]
        free = set(range(len(new)))
        if alive and free:
            last = np.stack([track[-1][1] for track in alive])
            apart_deg = distance_deg(last[:, None], new[None])
            for place in np.argsort(apart_deg, axis=None, kind="stable"):
                track, point = divmod(int(place), len(new))
                if apart_deg[track, point] > recipe.stitch_deg:
                    break
                if point in free and alive[track][-1][0] < now_h:
                    alive[track].append((now_h, new[point]))
                    free.remove(point)
        tracks += [[(now_h, new[point])] for point in sorted(free)]
    found = (Track(np.array([h for h, _ in t], dtype=np.int64), np.stack([p for _, p in t])) for t in tracks)
    return [track for track in found if lasts(track, recipe)]


def lasts(track: Track, recipe: Recipe) -> bool:
    """Tell whether a track is long, strong and tropical enough."""
    low = np.abs(track.points[:, LATITUDE]) < recipe.latitude_deg
    wind = track.points[:, WIND]
    strong = np.isnan(wind) | (wind >= recipe.wind_m_s)
    enough = min(int(low.sum()), int(strong.sum())) >= recipe.strong_points
    return enough and int(track.time_h[-1] - track.time_h[0]) >= recipe.life_h
