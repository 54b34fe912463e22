"""A small made-up truth and forecast in memory, to score and draw."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aeris.data.variables import Channel, channel, latitude_weights
from aeris.scores.climatology import build, needed_slots
from aeris.scores.matching import match
from aeris.scores.scorecard import Scorecard
from aeris.scores.scoring import Labels, score

START = np.datetime64("2020-01-01T00", "s")
NAMES = ("t2m", "msl", "z500", "q700", "u850", "sst")
SCALES = (15.0, 900.0, 2500.0, 2e-3, 8.0, 10.0)


def smooth(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Return noise that changes slowly along the last three dims (time, rows, cols)."""
    noise = rng.standard_normal(shape)
    for axis in (-1, -2, -3):
        noise = noise + np.roll(noise, 1, axis) + np.roll(noise, 2, axis)
    return noise / noise.std()


@dataclass
class Truth:
    """Truth in memory, with what a store offers: 24 times 6 h apart; no sea surface temperature on land."""

    rows: int = 8
    cols: int = 16
    path: Path = Path("made-up")
    names: tuple[str, ...] = NAMES
    static: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        edge_deg = 90 - 90 / self.rows
        self.channels: tuple[Channel, ...] = tuple(map(channel, self.names))
        self.latitude_deg = np.linspace(edge_deg, -edge_deg, self.rows)
        self.longitude_deg = np.arange(self.cols) * 360 / self.cols
        self.times = START + np.arange(24) * np.timedelta64(6, "h")
        rng = np.random.default_rng(0)
        fields = smooth(rng, (len(self.names), 24, self.rows, self.cols))
        self.fields = np.moveaxis(fields, 0, 1) * np.array(SCALES)[:, None, None]
        self.static["land_sea_mask"] = (smooth(rng, (1, self.rows, self.cols))[0] > 0.3).astype(np.float32)
        self.mask_CYX = np.ones(self.fields.shape[1:], dtype=bool)
        self.mask_CYX[self.names.index("sst")] = self.static["land_sea_mask"] < 0.5

    def index_of(self, time: np.datetime64) -> int:
        """Return the number of a time, or say that there is none."""
        found = np.flatnonzero(self.times == time)
        if not len(found):
            raise ValueError(f"no time {time}")
        return int(found[0])

    def read(self, index: int) -> np.ndarray:
        """Return the fields of a time."""
        return self.fields[index].astype(np.float32)


@dataclass
class Ensemble:
    """A forecast in memory: the truth plus an error all members share plus one of their own."""

    truth: Truth
    members: int = 4
    inits: np.ndarray = field(default_factory=lambda: START + np.array([60, 84], dtype="timedelta64[h]"))
    lead_h: np.ndarray = field(default_factory=lambda: np.array([6, 12, 24]))
    attrs: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.names = self.truth.names
        self.latitude_deg = self.truth.latitude_deg.copy()
        self.longitude_deg = self.truth.longitude_deg.copy()
        shape = (len(self.inits), len(self.lead_h), self.members, *self.truth.mask_CYX.shape)
        rng = np.random.default_rng(1)
        errors = rng.standard_normal(shape) + rng.standard_normal(shape[:2] + (1, *shape[3:]))
        scale = 0.1 * np.array(SCALES)[:, None, None] * np.sqrt(self.lead_h / 6)[:, None, None, None, None]
        truth = [[self.truth.read(self._index(i, h)) for h in self.lead_h] for i in self.inits]
        self.fields = (np.array(truth)[:, :, None] + errors * scale).astype(np.float32)

    def _index(self, init: np.datetime64, lead_h: int) -> int:
        return self.truth.index_of(init + np.timedelta64(int(lead_h), "h"))

    def read(self, init_index: int, lead_index: int) -> np.ndarray:
        """Return the members at one init and lead time."""
        return self.fields[init_index, lead_index].copy()


def make_card(members: int = 4) -> Scorecard:
    """Score the made-up forecast."""
    truth = Truth()
    pair = match(Ensemble(truth, members), truth)
    period = (truth.times[0], truth.times[9])
    usual = build(truth, period, needed_slots(pair.truth_times), range(len(NAMES)))
    labels = Labels("made-up weather", "forecast", "truth", "cell")
    return score(pair, labels, usual, (1, 2), threads=1)


@pytest.fixture(scope="session")
def card() -> Scorecard:
    return make_card()


@pytest.fixture(scope="session")
def one_member_card() -> Scorecard:
    return make_card(members=1)


@pytest.fixture
def truth() -> Truth:
    return Truth()


@pytest.fixture
def ensemble(truth: Truth) -> Ensemble:
    return Ensemble(truth)


@pytest.fixture
def weight_Y(truth: Truth) -> np.ndarray:
    return latitude_weights(truth.latitude_deg, "cell")
