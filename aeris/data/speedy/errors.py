"""Errors of an analysis: differences of states of the simulation a day apart, or bred from them.

An error is scaled so that its temperature coefficients, over the whole atmosphere, have `amplitude` times the
climatological standard deviation of the season. Which days it comes from depends on (seed, init time,
number), not on how many there are.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from aeris.data.speedy import restarts
from aeris.data.speedy.levels import Floats
from aeris.data.speedy.model import DYNAMICS, TEMPERATURE, Simulation, State, time_of

Error = dict[str, Floats]
"""Coefficients of the dynamics by name."""

DAY = np.timedelta64(1, "D")
AWAY_DAYS = 15  # from the init time, so that an error knows nothing of the weather it is added to
YEAR_DAYS = 365.25


class Errors:
    """Draws errors.

    Args:
        out: directory of the control run, with its restarts.
        model: what to run.
        amplitude: of an error, as a share of the climatological standard deviation of temperature.
        season_days: an error comes from days of the year so near to the init time's.
        breed_days: days an error is bred; 0 takes the difference as it is.
        seed: of the draws.
    """

    def __init__(
        self, out: Path, model: Simulation, amplitude: float, season_days: int, breed_days: int, seed: int
    ) -> None:
        self.out, self.model, self.amplitude = out, model, amplitude
        self.season_days, self.breed_days, self.seed = season_days, breed_days, seed
        self._differences: dict[Path, Error] = {}

    def draw(self, init: np.datetime64, truth: State, count: int) -> tuple[State, list[Error]]:
        """Draw errors for one init time.

        Args:
            truth: state of the control run, `breed_days` before the errors are wanted.

        Returns:
            The state of the control run when the errors are wanted, and the errors.
        """
        paths = seasonal(self.out, init, self.season_days)
        size = self.amplitude * season_std(paths)
        random = np.random.default_rng([self.seed, int(init.astype("datetime64[s]").astype(np.int64))])
        order, signs = random.permutation(len(paths)), random.choice((-1.0, 1.0), len(paths))
        errors = [
            scaled(self._difference(paths[order[number]]), signs[number] * size) for number in range(count)
        ]
        for _ in range(self.breed_days):
            after = run(self.model, truth)
            errors = [scaled(difference(run(self.model, add(truth, error)), after), size) for error in errors]
            truth = after
        return truth, errors

    def _difference(self, path: Path) -> Error:
        """Return the change over 24 h from a restart; the daily cycle cancels."""
        if path not in self._differences:
            before = restarts.load(path)
            self._differences[path] = difference(run(self.model, before), before)
        return self._differences[path]


def seasonal(out: Path, init: np.datetime64, season_days: int) -> list[Path]:
    """List the restarts of a season, but those near the init time."""
    found = []
    for time, path in restarts.find(out).items():
        away = abs(float((time - init) / DAY))
        if away > AWAY_DAYS and abs((away + YEAR_DAYS / 2) % YEAR_DAYS - YEAR_DAYS / 2) <= season_days:
            found.append(path)
    return found


def check_season(out: Path, init: np.datetime64, season_days: int, members: int) -> None:
    """Check that there are days enough to draw errors from.

    Raises:
        ValueError: too few restarts in the season; says what would do.
    """
    there = len(seasonal(out, init, season_days))
    if there < members + 1:
        raise ValueError(
            f"{members} members from {init} need {members + 1} restarts of the season more than {AWAY_DAYS} "
            f"days away, and {out} has {there}: take fewer members, more --season-days than {season_days}, "
            "or a longer control run"
        )


def season_std(paths: list[Path]) -> float:
    """Return the standard deviation of the temperature coefficients over some states, as one norm."""
    states = np.stack([restarts.load(path, (TEMPERATURE,))[TEMPERATURE] for path in paths]).astype(np.float64)
    return float(np.sqrt(np.square(states - states.mean(axis=0)).sum() / max(1, len(paths) - 1)))


def run(model: Simulation, state: State, days: float = 1.0) -> State:
    """Run on from a state; return the one at the end."""
    model.restore(state)
    model.advance(days, days)
    return model.state()


def run_to(model: Simulation, state: State, time: np.datetime64, step_h: int) -> State:
    """Run on from a state to a later time, in days and steps; return the state there."""
    left_h = int((time - time_of(state)) / np.timedelta64(1, "h"))
    for hours in [24] * (left_h // 24) + [step_h] * (left_h % 24 // step_h):
        state = run(model, state, hours / 24)
    return state


def difference(state: State, other: State) -> Error:
    """Return the dynamics of one state less those of another, in float64."""
    return {
        name: x.astype(np.float64) - other[name]
        for name, x in state.items()
        if name.startswith(DYNAMICS) and x.ndim
    }


def scaled(error: Error, size: float) -> Error:
    """Scale an error so that the norm of its temperature is `size`; a negative one turns its sign."""
    factor = size / float(np.sqrt(np.square(error[TEMPERATURE]).sum()))
    return {name: x * factor for name, x in error.items()}


def add(state: State, *errors: Error) -> State:
    """Add errors to a state; what its physics carries stays."""
    names = errors[0]
    return {
        name: (x + sum(error[name] for error in errors)).astype(x.dtype) if name in names else x
        for name, x in state.items()
    }
