"""Forecast tracks of cyclones against true ones: errors of place and strength, hits, false alarms, strikes.

A forecast track is a true cyclone's if it is within 500 km where both begin to be there; the nearest first,
each once. True tracks are found in the truth by the same recipe, over the same lead times, or are observed
ones (aeris/scores/ibtracs.py).

Shapes: M members, P points, J lead times, Y rows, X columns, Q points of all members.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aeris.scores.collecting import Part
from aeris.scores.cyclones import (
    LATITUDE,
    LONGITUDE,
    PRESSURE,
    WIND,
    Detector,
    Fields,
    Recipe,
    Track,
    Values,
    distance_deg,
    lasts,
    stitch,
)

KM_PER_DEG = 111.195
MATCH_KM = 500.0
STRIKE_KM = 120.0
TRUTH = -1
"""Stands for the truth where a number of a member is expected."""


@dataclass(frozen=True)
class Match:
    """A true cyclone and one member's forecast of it, at the hours both have."""

    truth: int
    """Number of the true track."""
    forecast: int
    """Number of the member's track."""
    time_h: NDArray[np.int64]
    errors: Values
    """Distance in km, pressure and wind as forecast minus truth: [P, 3]."""


@dataclass(frozen=True)
class Comparison:
    """What one member made of the true cyclones."""

    matches: list[Match]
    misses: int
    false_alarms: int


def compare(forecast: Sequence[Track], truth: Sequence[Track], match_km: float = MATCH_KM) -> Comparison:
    """Match the tracks of one member with the true ones."""
    near: list[tuple[float, Match]] = []
    for i, true in enumerate(truth):
        for j, track in enumerate(forecast):
            time_h, at_true, at_track = np.intersect1d(true.time_h, track.time_h, return_indices=True)
            if not len(time_h):
                continue
            a, b = track.points[at_track], true.points[at_true]
            errors = np.stack(
                [distance_deg(a, b) * KM_PER_DEG, a[:, PRESSURE] - b[:, PRESSURE], a[:, WIND] - b[:, WIND]],
                axis=-1,
            )
            if errors[0, 0] <= match_km:
                near.append((float(errors[0, 0]), Match(i, j, time_h, errors)))
    matches: list[Match] = []
    for _, match in sorted(near, key=lambda pair: pair[0]):
        if all(match.truth != other.truth and match.forecast != other.forecast for other in matches):
            matches.append(match)
    return Comparison(matches, len(truth) - len(matches), len(forecast) - len(matches))


def strike_probability(
    members: Sequence[Sequence[Track]],
    latitude_deg: Values,
    longitude_deg: Values,
    within_km: float = STRIKE_KM,
) -> Values:
    """Return the share of members with a cyclone that passes each grid point: [Y, X].

    Between its points a cyclone moves along the great circle. On a coarse grid the distance is at least 0.71
    spacings, so that no cyclone passes between the points.
    """
    spacing_deg = max(abs(float(np.diff(x).mean())) for x in (latitude_deg, longitude_deg))
    within_deg = max(within_km / KM_PER_DEG, 0.71 * spacing_deg)
    grid = np.stack(np.meshgrid(latitude_deg, longitude_deg, indexing="ij"), axis=-1)
    hits_YX = np.zeros(grid.shape[:2])
    for tracks in members:
        struck_YX = np.zeros(grid.shape[:2], dtype=bool)
        for track in tracks:
            for point in _path(track.points, within_deg / 2):
                rows = np.abs(latitude_deg - point[LATITUDE]) <= within_deg
                struck_YX[rows] |= distance_deg(grid[rows], point) <= within_deg
        hits_YX += struck_YX
    return hits_YX / max(1, len(members))


def _path(points: Values, step_deg: float) -> Values:
    """Return the way of a cyclone in steps of `step_deg` at most: latitude and longitude [P, 2]."""
    phi, lam = np.deg2rad(points[:, LATITUDE]), np.deg2rad(points[:, LONGITUDE])
    xyz = np.stack([np.cos(phi) * np.cos(lam), np.cos(phi) * np.sin(lam), np.sin(phi)], axis=-1)
    parts = [xyz[:1]]
    for a, b, apart_deg in zip(xyz, xyz[1:], distance_deg(points[:-1], points[1:])):
        share = np.linspace(0, 1, math.ceil(apart_deg / step_deg) + 1)[1:, None]
        between = a + share * (b - a)
        parts.append(between / np.linalg.norm(between, axis=-1, keepdims=True))
    path = np.concatenate(parts)
    longitude_deg = np.rad2deg(np.arctan2(path[:, 1], path[:, 0])) % 360.0
    return np.stack([np.rad2deg(np.arcsin(np.clip(path[:, 2], -1, 1))), longitude_deg], axis=-1)


@dataclass(frozen=True)
class TrackScores:
    """The score of all init times and members.

    Attributes:
        lead_h: lead times in hours [J].
        count: matched pairs of a member and a true cyclone at each [J].
        distance_km: mean track error [J], NaN where there is no pair.
        mean_distance_km: track error of the mean place of the members that have the cyclone [J].
        pressure_bias_pa, pressure_mae_pa, wind_bias_m_s, wind_mae_m_s: of the points' pressure and wind [J].
        hits, misses, false_alarms: tracks, summed over init times and members.
        cyclones: true tracks, summed over init times.
        recipe: what counted as a cyclone, on this grid.
        truth: where the true tracks are from.
        tracks: tracks of each init time by member, the truth's under -1.
    """

    lead_h: tuple[int, ...]
    count: NDArray[np.int64]
    distance_km: Values
    mean_distance_km: Values
    pressure_bias_pa: Values
    pressure_mae_pa: Values
    wind_bias_m_s: Values
    wind_mae_m_s: Values
    hits: int
    misses: int
    false_alarms: int
    cyclones: int
    recipe: Recipe
    truth: str
    tracks: list[dict[int, list[Track]]] = field(repr=False)

    @property
    def hit_rate(self) -> float:
        """Share of true cyclones that members have; NaN without any."""
        return self.hits / (self.hits + self.misses) if self.cyclones else math.nan

    @property
    def false_alarm_ratio(self) -> float:
        """Share of members' cyclones that are no true ones; NaN without any."""
        forecast = self.hits + self.false_alarms
        return self.false_alarms / forecast if forecast else math.nan

    def as_json(self) -> dict[str, Any]:
        """Return everything but the tracks as JSON values, NaN as None."""
        errors = ("distance_km", "mean_distance_km")
        strengths = ("pressure_bias_pa", "pressure_mae_pa", "wind_bias_m_s", "wind_mae_m_s")
        return {
            "truth": self.truth,
            "recipe": vars(self.recipe),
            "cyclones": self.cyclones,
            "hits": self.hits,
            "misses": self.misses,
            "false_alarms": self.false_alarms,
            "hit_rate": _json(self.hit_rate),
            "false_alarm_ratio": _json(self.false_alarm_ratio),
            "lead_h": list(self.lead_h),
            "count": self.count.tolist(),
            **{name: [_json(value) for value in getattr(self, name)] for name in (*errors, *strengths)},
        }


def _json(value: float) -> float | None:
    return None if math.isnan(value) else float(value)


class TrackCollector:
    """Gathers cyclones of members and truth; a `Collector` of aeris/scores/collecting.py.

    Args:
        names: channels of the fields (see `Detector`).
        latitude_deg: latitude of every row [Y].
        longitude_deg: longitude of every column [X].
        inits: init times.
        lead_h: lead times in hours; `add` is told their numbers.
        members: how many.
        recipe: what counts, the published numbers by default; made to suit the grid and the times.
        observed: true tracks, hours since 1970 (`read_ibtracs`); found in the truth without.

    Raises:
        ValueError: no channel msl.
    """

    def __init__(
        self,
        names: Sequence[str],
        latitude_deg: Values,
        longitude_deg: Values,
        inits: Sequence[np.datetime64],
        lead_h: Sequence[int],
        members: int,
        recipe: Recipe | None = None,
        observed: Sequence[Track] | None = None,
    ) -> None:
        self.inits, self.lead_h, self.members = list(inits), tuple(int(h) for h in lead_h), members
        step_h = int(np.diff(self.lead_h).max()) if len(self.lead_h) > 1 else 24
        self.recipe = (recipe or Recipe()).on(latitude_deg, longitude_deg, step_h)
        self.detector = Detector(names, latitude_deg, longitude_deg, self.recipe)
        self.observed = observed
        self._rows: list[Values] = []

    def begin(self, init: int) -> None:
        """Start an init time."""
        self._rows = []

    @property
    def needs_truth(self) -> bool:
        """Whether the true cyclones have to be found."""
        return self.observed is None

    def add(self, lead: int, x_MCYX: Fields, y_CYX: Fields | None, valid: np.datetime64) -> None:
        """Find the cyclones of all members, and of the truth unless it is observed."""
        fields = dict(enumerate(x_MCYX))
        if self.observed is None:
            assert y_CYX is not None
            fields[TRUTH] = y_CYX
        for member, x_CYX in fields.items():
            points = self.detector.detect(x_CYX)
            label = np.broadcast_to([float(member), float(self.lead_h[lead])], (len(points), 2))
            self._rows.append(np.concatenate([label, points], axis=1))

    def end(self) -> dict[str, NDArray[Any]]:
        """Return member, lead time in hours and point of every cyclone: [Q, 6]."""
        return {"points": np.concatenate([np.empty((0, 6)), *self._rows])}

    def combine(self, parts: Sequence[Part]) -> TrackScores:
        """Stitch, match and average."""
        tracks = [self._tracks(init, part) for init, part in enumerate(parts)]
        total: dict[str, Any] = {"hits": 0, "misses": 0, "false_alarms": 0, "cyclones": 0}
        errors: dict[int, list[Values]] = {hours: [] for hours in self.lead_h}
        means: dict[int, list[float]] = {hours: [] for hours in self.lead_h}
        for by_member in tracks:
            truth = by_member[TRUTH]
            total["cyclones"] += len(truth)
            places: dict[tuple[int, int], list[Values]] = {}
            for member in range(self.members):
                result = compare(by_member[member], truth)
                total["hits"] += len(result.matches)
                total["misses"] += result.misses
                total["false_alarms"] += result.false_alarms
                for match in result.matches:
                    track = by_member[member][match.forecast]
                    for hours, error in zip(match.time_h.tolist(), match.errors):
                        errors[hours].append(error)
                        place = track.points[np.searchsorted(track.time_h, hours)]
                        places.setdefault((match.truth, hours), []).append(place)
            for (number, hours), points in places.items():
                true = truth[number]
                at = true.points[np.searchsorted(true.time_h, hours)]
                means[hours].append(float(distance_deg(_middle(np.stack(points)), at)) * KM_PER_DEG)
        where = "the truth, by the same recipe" if self.observed is None else "observed"
        return TrackScores(
            self.lead_h, **_averages(errors, means), **total, recipe=self.recipe, truth=where, tracks=tracks
        )

    def _tracks(self, init: int, part: Part) -> dict[int, list[Track]]:
        """Stitch what one init time contributed, by member."""
        rows = part["points"]
        found = {}
        for member in (TRUTH, *range(self.members)):
            own = rows[rows[:, 0] == member]
            points = [own[own[:, 1] == hours, 2:] for hours in self.lead_h]
            found[member] = stitch(points, self.lead_h, self.recipe)
        if self.observed is not None:
            found[TRUTH] = self._observed(self.inits[init])
        return found

    def _observed(self, init: np.datetime64) -> list[Track]:
        """Return the observed tracks during the forecast, in hours since its init time."""
        start_h = int(init.astype("datetime64[h]").astype(np.int64))
        found = []
        for track in self.observed or ():
            lead_h = track.time_h - start_h
            inside = np.isin(lead_h, self.lead_h)
            part = Track(lead_h[inside], track.points[inside], track.name)
            if inside.any() and lasts(part, self.recipe):  # as members' cyclones must, to be looked for
                found.append(part)
        return found


def _middle(points: Values) -> Values:
    """Return the mean place on the sphere: [2]."""
    phi, lam = np.deg2rad(points[:, LATITUDE]), np.deg2rad(points[:, LONGITUDE])
    x, y, z = (np.cos(phi) * np.cos(lam)).mean(), (np.cos(phi) * np.sin(lam)).mean(), np.sin(phi).mean()
    return np.rad2deg(np.array([np.arctan2(z, np.hypot(x, y)), np.arctan2(y, x)]))


def _averages(errors: Mapping[int, list[Values]], means: Mapping[int, list[float]]) -> dict[str, Any]:
    """Average the errors of every lead time."""
    rows = [np.stack(found) if found else np.empty((0, 3)) for found in errors.values()]
    bias = np.array([[_mean(column) for column in row.T] for row in rows])
    size = np.array([[_mean(np.abs(column)) for column in row.T] for row in rows])
    return {
        "count": np.array([len(found) for found in errors.values()]),
        "distance_km": size[:, 0],
        "mean_distance_km": np.array([_mean(np.array(found)) for found in means.values()]),
        "pressure_bias_pa": bias[:, 1],
        "pressure_mae_pa": size[:, 1],
        "wind_bias_m_s": bias[:, 2],
        "wind_mae_m_s": size[:, 2],
    }


def _mean(values: Values) -> float:
    """Average what is known; observations may lack a pressure or a wind."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else math.nan
