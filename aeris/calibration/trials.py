"""The forecasts of a calibration: made, scored and forgotten; their scores are kept on disk.

Replicas of the network (dp) take different init times and step together. A forecast is scored when it is
made, on the lead of its replica, and never written. What came of one init time is added to
RUN/calibration/KEY.json, where KEY stands for all the numbers depend on: a stopped calibration goes on, and
another sweep finds what it has in common with an earlier one.

Legend: I init times, J lead times, M members, C channels, S sums, Y rows, X cols.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from aeris.calibration.calibrated import plain
from aeris.calibration.sweep import Settings
from aeris.data.variables import latitude_weights
from aeris.diffusion.sampler import for_training
from aeris.forecasting.opening import Opened, make_perturbation
from aeris.forecasting.rollout import ahead, lead_times, not_finite
from aeris.scores.metrics import EnsembleScores
from swipe.collectives import agree, all_reduce, tell, together
from swipe.images import Images

Array = NDArray[np.float64]

SUMS = 6  # of EnsembleScores


class Trials:
    """Makes the forecasts of one set of settings after the other. All ranks have one and call the same.

    Args:
        opened: the run.
        directory: where scores are kept.
        inits: init times; the store has them and their valid times.
        members: M.
        lead_h: last lead time in hours.
        channels: that are scored.
        batch: members computed at the same time.
        seed: of all noise.
    """

    def __init__(
        self,
        opened: Opened,
        directory: Path,
        inits: Sequence[str],
        members: int,
        lead_h: int,
        channels: Sequence[str],
        batch: int,
        seed: int,
    ) -> None:
        self.opened, self.directory, self.members, self.seed = opened, directory, members, seed
        self.inits = [np.datetime64(init, "s") for init in inits]
        self.lead_h = lead_times(lead_h, opened.forecaster.interval_h)
        self.channels = tuple(channels)
        self._places = [opened.store.names.index(name) for name in channels]
        self._batches = [range(first, min(first + batch, members)) for first in range(0, members, batch)]
        self._images = Images(opened.forecaster.layout.shard.grid, opened.seat.groups)

    def key(self, settings: Settings) -> str:
        """Return 16 hexadecimal digits for all that the scores depend on."""
        depends = {
            "sampler": plain(settings.sampler),
            "perturbation": plain(settings.perturb),
            "inits": [str(init) for init in self.inits],
            "members": self.members,
            "lead_h": self.lead_h,
            "channels": self.channels,
            "seed": self.seed,
            "weights": self.opened.weights_sha256,
            "data": self.opened.store.fingerprint_id,
        }
        return hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()[:16]

    def run(self, settings: Settings, advance: Callable[[int], None] = lambda steps: None) -> Array | str:
        """Make and score the forecasts that are not scored yet; a collective call.

        Args:
            advance: called with the steps of a member that all replicas have made, or found done.

        Returns:
            Sums [I, J, C, S], or what is to be said of forecasts that did not stay finite.

        Raises:
            ValueError: an initial state cannot be made.
            OSError: the scores cannot be written; among several ranks a ValueError.
        """
        opened, world = self.opened, self.opened.seat.groups.world
        diffusion = opened.trained.config.diffusion
        closed = Settings(for_training(settings.sampler, diffusion), settings.perturb)
        path = self.directory / f"{self.key(closed)}.json"
        found: dict[str, Any] = tell(world, _read(path) if opened.seat.lead else None)
        steps = self.members * len(self.lead_h)
        if "failed" in found:
            advance(steps * len(self.inits))
            return str(found["failed"])
        forecaster = opened.forecaster
        forecaster.sampler = closed.sampler
        forecaster.perturbation = make_perturbation(
            closed.perturb, opened.store, opened.seat, forecaster.interval_h, self.seed
        )
        if forecaster.perturbation is not None:
            forecaster.perturbation.check(self.inits, self.members)
        names = [str(init) for init in self.inits]
        todo = [number for number, name in enumerate(names) if name not in found]
        advance(steps * (len(names) - len(todo)))
        for first in range(0, len(todo), opened.replicas):
            here = todo[first : first + opened.replicas]
            sums = self._round(here, advance)
            if isinstance(sums, str):
                found["failed"] = sums
            else:
                found.update({names[number]: one.tolist() for number, one in zip(here, sums)})
            with together(world):
                if opened.seat.lead:
                    _write(path, found)
            if "failed" in found:
                advance(steps * (len(todo) - first))
                return str(found["failed"])
        return np.array([found[name] for name in names])

    def _round(self, here: list[int], advance: Callable[[int], None]) -> Array | str:
        """Make and score the forecasts of one init time on every replica: sums [replicas, J, C, S]."""
        opened = self.opened
        forecaster, world = opened.forecaster, opened.seat.groups.world
        busy = opened.replica < len(here)
        init = self.inits[here[opened.replica if busy else 0]]
        batches = self._batches if busy else []
        scores = self._empty()
        states: list[Tensor] = []
        with together(world):
            states = [forecaster.state(init, batch) for batch in batches]
        starts = list(states)
        for lead, lead_h in enumerate(self.lead_h):
            error = None
            for number, batch in enumerate(batches):
                start = starts[number]
                states[number] = ahead(forecaster, states[number], init, lead_h, batch, start)
                error = error or not_finite(states[number], forecaster, init, batch, lead_h)
            if said := agree(world, error):
                return said
            with together(world):
                self._score(scores, lead, init + np.timedelta64(lead_h, "h"), states)
            advance(self.members * len(here))
        sums = torch.zeros((opened.replicas, len(self.lead_h), len(self.channels), SUMS), dtype=torch.float64)
        if busy and self._images.lead:
            sums[opened.replica] = torch.from_numpy(scores.state()["sums"][:, :, 0])
        return np.asarray(all_reduce(sums, world, "scores"))

    def _empty(self) -> EnsembleScores:
        store = self.opened.store
        weight_Y = latitude_weights(store.latitude_deg)
        return EnsembleScores(len(self.lead_h), self.members, weight_Y, store.mask_CYX[self._places])

    def _score(self, scores: EnsembleScores, lead: int, valid: np.datetime64, states: list[Tensor]) -> None:
        """Put the images of one lead time together on the lead of the replica, and score them."""
        parts = [self._images.collect(x_BNTC) for x_BNTC in states]
        self._images.wait()
        images = [part.numpy()[:, self._places] for part in parts if part is not None]
        if images:
            store = self.opened.store
            truth_CYX = store.read(store.index_of(valid))[self._places]
            scores.add(lead, np.concatenate(images), truth_CYX)


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}  # nothing there, or damaged: made again
    return found if isinstance(found, dict) else {}


def _write(path: Path, found: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(found) + "\n")
    partial.replace(path)
