"""What forecasters must have in common to be compared: starts, lead times, and what they start from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from aeris.aurora.batch import Batch
from aeris.aurora.config import AuroraConfig
from aeris.aurora.training.errors import ChannelFields

# What the input of a model depends on, and what it is called.
_INPUT = {
    "timestep_h": "a step in hours of",
    "max_history_size": "a history of",
    "surf_vars": "the surface variables",
    "static_vars": "the static variables",
    "atmos_vars": "the variables on levels",
    "output_only_surf_vars": "surface variables that are not fed in,",
    "output_only_atmos_vars": "variables on levels that are not fed in,",
    "level_condition": "levels (hPa) of its own,",
}


class Predictor(Protocol):
    """Something that forecasts."""

    @property
    def name(self) -> str:
        """What it is called in tables and pictures."""
        ...

    @property
    def made_from(self) -> str:
        """What it was opened from."""
        ...

    @property
    def config(self) -> AuroraConfig | None:
        """The model's settings; None where there is no model."""
        ...

    @property
    def timestep_h(self) -> float:
        """Hours between its steps; 0 where it has none of its own."""
        ...

    def forecast(self, batch: Batch, lead_h: Sequence[int]) -> Iterator[ChannelFields]:
        """Give the fields at lead times in hours, which rise."""
        ...


def steps_of(lead_h: Sequence[int], step_h: float) -> list[int]:
    """Return how many model steps every lead time takes.

    Raises:
        ValueError: a lead time is no multiple of the step.
    """
    for one in lead_h:
        if one <= 0 or one % step_h:
            raise ValueError(f"a lead time of {one} h is no multiple of the model's step, {step_h:g} h")
    return [round(one / step_h) for one in lead_h]


def require_same_input(settings: Mapping[str, AuroraConfig | None]) -> None:
    """Check that models start from the same states, so that one input serves all.

    Args:
        settings: of every forecaster, by its name; None where there is no model.

    Raises:
        ValueError: they do not; says what each has and the other lacks.
    """
    models = [(name, config) for name, config in settings.items() if config is not None]
    for name, config in models[1:]:
        first, reference = models[0]
        apart = [
            f"{words} {_apart(first, getattr(reference, key), name, getattr(config, key))}"
            for key, words in _INPUT.items()
            if _plain(getattr(reference, key)) != _plain(getattr(config, key))
        ]
        if apart:
            raise ValueError(
                f"{first} and {name} do not start from the same input: {'; '.join(apart)}. Compare models "
                "of one step, history and set of variables and levels"
            )


def _plain(value: Any) -> Any:
    """Return a setting as what it means: the order of variables does not matter."""
    return frozenset(value) if isinstance(value, tuple) else value


def _apart(first: str, one: Any, name: str, other: Any) -> str:
    """Say how a setting differs: what only one has, or both values."""
    if not isinstance(one, tuple):
        return f"{one:g} ({first}) and {other:g} ({name})"
    sides = ((first, [x for x in one if x not in other]), (name, [x for x in other if x not in one]))
    return ", ".join(f"{' '.join(map(str, more))} (only {side})" for side, more in sides if more)


def read_time(option: str, text: str) -> np.datetime64:
    """Read a time from a command line.

    Raises:
        ValueError: it is none; says how to write one.
    """
    problem = f"{option} {text} is no time; write it as 2022-01-01T06"
    try:
        time = np.datetime64(text, "s")
    except ValueError:
        raise ValueError(problem) from None
    if np.isnat(time):
        raise ValueError(problem)
    return time
