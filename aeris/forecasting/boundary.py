"""Boundary fields of a forecast, by name: what the sea does that the model is, or is not, to predict.

    forecast  as the model predicts it
    persist   as at the init time
    anomaly   climatology of the valid time + anomaly of the init time
    truth     what the store has at the valid time: a hindcast with prescribed fields, no forecast

The climatology is a constant, a yearly and a half-yearly wave at every point, fitted by least squares to
times spread over the training period.

Shapes: B members, N windows, T tokens per window, C channels, H coefficients of the climatology, S times.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from aeris.data.store import Store, StoreError
from swipe.layout import WindowLayout

Choice = Literal["forecast", "persist", "anomaly", "truth"]

YEAR_S = 365.2425 * 86400
LEAST_DAYS = 360
CLIMATOLOGY_TIMES = 240
"""Times the climatology is fitted to at most: a rank reads its windows at each, once."""
GOLDEN = 0.6180339887498949
"""Multiples of it modulo 1 cover an interval evenly, however many there are."""


@dataclass(frozen=True)
class BoundaryConfig:
    """Where sea temperature and ice come from after the init time."""

    sst: Choice = "forecast"
    """Sea surface temperature: as the model predicts it, as at the init time (persist), climatology of the
    training period plus the anomaly at the init time (anomaly), or the store's (truth: a hindcast)."""
    sic: Choice = "forecast"
    """Sea ice cover, likewise."""
    climatology: str = ""
    """anomaly: a store with the training period; empty takes the one with the init times."""

    @property
    def choices(self) -> dict[str, Choice]:
        """What is to be set, and how, by the name of the channel."""
        every: dict[str, Choice] = {"sst": self.sst, "sic": self.sic}
        return {name: choice for name, choice in every.items() if choice != "forecast"}


class Boundary:
    """Sets boundary channels after every step.

    Args:
        config: what is to be set, and how.
        store: where the fields come from.
        layout: how this rank's tokens lie.
        device: where states are.

    Attributes:
        active: anything is set at all.
        needs_start: `apply` needs the states at the init time.

    Raises:
        ValueError: the store has no such channel, or less than a year to take a climatology from.
        StoreError: the store of the climatology cannot be opened.
    """

    def __init__(
        self,
        config: BoundaryConfig,
        store: Store,
        layout: WindowLayout,
        *,
        device: torch.device | str = "cpu",
    ) -> None:
        self.config, self.store, self.layout = config, store, layout
        self.device = torch.device(device)
        self._choices = config.choices
        self._past = Store(config.climatology) if config.climatology else store
        for name, choice in self._choices.items():
            if name not in store.names:
                raise ValueError(
                    f"--boundary.{name} {choice}: {store.path} has no {name}, so the model does not see it: "
                    "leave it at forecast"
                )
            if name not in self._past.names:
                raise ValueError(f"--boundary.climatology {self._past.path} has no {name}")
        if config.climatology and (self._past.rows, self._past.cols) != (store.rows, store.cols):
            raise ValueError(
                f"--boundary.climatology {self._past.path} has {self._past.rows} x {self._past.cols} points, "
                f"but {store.path} has {store.rows} x {store.cols}"
            )
        self.active = bool(self._choices)
        self.needs_start = not {"persist", "anomaly"}.isdisjoint(self._choices.values())
        self._true: tuple[np.datetime64, Tensor] | None = None
        self._seasons: dict[str, Tensor] = {}
        self._valid_NTC = torch.from_numpy(store.valid_windows(layout.shard)).to(self.device)
        if "anomaly" in self._choices.values():
            self._times = fit_times(self._past)

    def check(self, inits: Sequence[np.datetime64], lead_h: Sequence[int]) -> None:
        """Check that every boundary field of a forecast is there.

        Raises:
            ValueError: names the first time that is not.
        """
        prescribed = [name for name, choice in self._choices.items() if choice == "truth"]
        for init in inits if prescribed else ():
            for hours in lead_h:
                try:
                    self.store.index_of(_after(init, hours))
                except StoreError as error:
                    raise ValueError(
                        f"--boundary.{prescribed[0]} truth, {hours} h after {init}: {error}"
                    ) from None

    def apply(
        self, x_BNTC: Tensor, init: np.datetime64, lead_h: int, start_BNTC: Tensor | None = None
    ) -> Tensor:
        """Return states with their boundary channels set: [B, N, T, C], physical units; no communication.

        Points that a mask hides keep their fill value.

        Args:
            lead_h: hours after `init` that the states are valid at.
            start_BNTC: the same members at the init time (`needs_start`).

        Raises:
            ValueError: the store does not have the valid time ("truth").
        """
        if not (self.active and len(x_BNTC)):
            return x_BNTC
        x_BNTC = x_BNTC.clone()
        for name, choice in self._choices.items():
            number = self.store.names.index(name)
            valid_NT = self._valid_NTC[..., number]
            if choice == "truth":
                field = self._truth(_after(init, lead_h))[..., number]
            else:
                assert start_BNTC is not None, f"{choice} needs the states at the init time"
                field = start_BNTC[..., number]
            if choice == "anomaly":
                field = field + self._change(name, init, lead_h)
                field = field.clamp(0.0, 1.0) if name == "sic" else field
            x_BNTC[..., number] = torch.where(valid_NT, field, x_BNTC[..., number])
        return x_BNTC

    def _truth(self, time: np.datetime64) -> Tensor:
        """Return the store's fields at a time, of which the last is kept: [N, T, C]."""
        if self._true is None or self._true[0] != time:
            x_NTC = self.store.read_windows(self.store.index_of(time), self.layout.shard)
            self._true = time, torch.from_numpy(x_NTC).to(self.device)
        return self._true[1]

    def _change(self, name: str, init: np.datetime64, lead_h: int) -> Tensor:
        """Return how much the climatology of a channel changes from the init to the valid time: [N, T]."""
        if not self._seasons:
            self._seasons = self._fit([name for name, choice in self._choices.items() if choice == "anomaly"])
        ends = waves(np.array([_after(init, 0), _after(init, lead_h)]))
        change_H = torch.from_numpy((ends[1] - ends[0]).astype(np.float32)).to(self.device)
        return torch.einsum("h,hnt->nt", change_H, self._seasons[name])

    def _fit(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Fit the climatology at this rank's tokens: float32 [H, N, T] for every name."""
        numbers = [self._past.names.index(name) for name in names]
        waves_SH = waves(self._past.times[self._times])
        sums = np.zeros((waves_SH.shape[1], len(names), *self.layout.tokens_NT.shape))
        for index, wave_H in zip(self._times, waves_SH):
            x_NTC = self._past.read_windows(int(index), self.layout.shard)
            sums += np.multiply.outer(wave_H, np.moveaxis(x_NTC[..., numbers], -1, 0).astype(np.float64))
        normal_HH = waves_SH.T @ waves_SH
        fits = np.linalg.solve(normal_HH, sums.reshape(len(sums), -1)).reshape(sums.shape)
        return {
            name: torch.from_numpy(fits[:, number].astype(np.float32)).to(self.device)
            for number, name in enumerate(names)
        }


def waves(times_S: NDArray[np.datetime64]) -> NDArray[np.float64]:
    """Return 1, the yearly and the half-yearly cosine and sine at each time: float64 [S, H]."""
    angle_S = 2 * np.pi * times_S.astype("datetime64[s]").astype(np.int64) / YEAR_S
    functions = [np.ones_like(angle_S)]
    for order in (1, 2):
        functions += [np.cos(order * angle_S), np.sin(order * angle_S)]
    return np.stack(functions, axis=-1)


def fit_times(store: Store) -> NDArray[np.int64]:
    """Choose times of the training period for the climatology: their numbers, rising.

    Raises:
        ValueError: the store has less than a year of that period.
    """
    start, end = store.statistics.train_period
    inside = np.flatnonzero((store.times >= start) & (store.times <= end))
    days = (store.times[inside[-1]] - store.times[inside[0]]) / np.timedelta64(1, "D") if inside.size else 0.0
    if days < LEAST_DAYS:
        raise ValueError(
            f"a climatology needs a year, but {store.path} has {days:.0f} days of the training period "
            f"{start} to {end}: name a store that has it with --boundary.climatology, or take persist"
        )
    place = np.unique(np.arange(CLIMATOLOGY_TIMES) * GOLDEN % 1.0 * len(inside)).astype(np.int64)
    return np.unique(inside[place])


def _after(init: np.datetime64, hours: int) -> np.datetime64:
    """Return the time so many hours after another."""
    return init.astype("datetime64[s]") + np.timedelta64(int(hours), "h")
