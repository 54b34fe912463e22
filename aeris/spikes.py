"""Which steps to skip: a loss or gradient that is not finite, and a loss far above those before it.

All ranks look at the same numbers, which one sum over all ranks gave them, so they agree without a message.
A spike is measured on the logarithm of the loss, against a running mean and standard deviation of the steps
that were taken. The rule looks upwards only: a loss that falls fast is no fault.
"""

from __future__ import annotations

import math
from typing import Any

from aeris.config import FaultConfig
from aeris.log import console
from swipe.collectives import AgreedError

HALFLIFE = 100
"""Steps after which a loss counts half in mean and standard deviation."""
FIRST = 100
"""Steps that must have been taken before the first spike can be told."""
CAPPED_FROM, CAP = 20, 4.0
"""After so many steps no loss counts as more than so many standard deviations above the mean: what breaks
before the first spike can be told must not hide those that follow."""
LEAST_STD = 0.01
"""Smallest standard deviation of the log loss: where nothing varies, a percent is no spike."""
WINDOW = 1000
"""Steps within which skipped ones are counted for `faults.limit`."""


class Spikes:
    """Decides which steps of a run are skipped.

    Attributes:
        steps: decided on so far.
        in_a_row: skipped steps since the last one that was taken, of either kind.
    """

    def __init__(self, faults: FaultConfig, batch: int) -> None:
        """Begin without a history; see `load_state`.

        Args:
            faults: `spike`, in standard deviations (0: none is ever told), and `limit`.
            batch: images per step: the losses of another batch vary otherwise.
        """
        self.faults, self.batch = faults, batch
        self.steps = self.in_a_row = self.taken = 0
        self._weight = self._mean = self._square = 0.0
        self._skipped: list[int] = []  # numbers of the steps skipped, of the last WINDOW

    def decide(self, loss: float, grad_norm: float) -> str:
        """Decide on a step, given its mean loss and the norm of its gradient, and remember it.

        Returns:
            "" if it is to be taken, else why not: "non-finite" or "spike".
        """
        why = ""
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            why = "non-finite"
        elif self.faults.spike and self.taken >= FIRST and self.height(loss) > self.faults.spike:
            why = "spike"
        self.steps += 1
        self._skipped = [step for step in self._skipped if step > self.steps - WINDOW]
        if why:
            self._skipped.append(self.steps)
            self.in_a_row += 1
        else:
            self._learn(loss)
            self.in_a_row = 0
        return why

    def height(self, loss: float) -> float:
        """Say how many standard deviations the log of a loss lies above the mean."""
        if loss <= 0 or not self._weight:
            return 0.0
        return (math.log(loss) - self._mean) / self._std()

    def _std(self) -> float:
        """Return the standard deviation of the log loss, or the least there is."""
        return max(math.sqrt(self._square / self._weight), LEAST_STD) if self._weight else LEAST_STD

    def _learn(self, loss: float) -> None:
        """Take the loss of a step into mean and variance, exponentially weighted (West 1979)."""
        self.taken += 1
        if loss <= 0:
            return  # has no logarithm
        value = math.log(loss)
        if self.taken > CAPPED_FROM:
            value = min(value, self._mean + CAP * self._std())
        keep = 0.5 ** (1.0 / HALFLIFE)
        self._weight = keep * self._weight + 1.0
        off = value - self._mean
        self._mean += off / self._weight
        self._square = keep * self._square + off * (value - self._mean)

    def report(self, record: dict[str, Any], where: str = "") -> None:
        """Say that a step was skipped, and stop a run in which too many are; nothing for a step taken.

        Args:
            record: of the step, with "images_seen", "loss", "grad_norm" and, if it was skipped, "skip".
            where: the directory with dumps of such steps; "" if there are none.

        Raises:
            AgreedError: `faults.limit` steps of the last thousand were skipped; on every rank alike.
        """
        if "skip" not in record:
            return
        loss, norm, why = record["loss"], record["grad_norm"], record["skip"]
        high = f", {self.height(loss):.1f} standard deviations up" if why == "spike" else ""
        count = f"{len(self._skipped)} of the last {min(self.steps, WINDOW):,} steps"
        console.print(
            f"image {record['images_seen']:,}: {why} step skipped (loss {loss:.4g}{high}, "
            f"gradient norm {norm:.4g}), {count}"
        )
        if len(self._skipped) >= self.faults.limit:
            look = f"look at {where} with python -m aeris.replay" if where else "look at the data they read"
            raise AgreedError(
                f"{count} were skipped, and --faults.limit is {self.faults.limit}: {look}; then lower "
                "--optimizer.lr, or raise --faults.limit or --faults.spike; the same command goes on from "
                "the last checkpoint"
            )

    def state(self) -> dict[str, Any]:
        """Return all that `decide` remembers, as plain numbers for a checkpoint's JSON."""
        return {
            "batch": self.batch,
            "steps": self.steps,
            "in_a_row": self.in_a_row,
            "taken": self.taken,
            "log_loss": [self._weight, self._mean, self._square],
            "skipped": self._skipped,
        }

    def load_state(self, state: dict[str, Any] | None) -> None:
        """Go on from a `state`; from none (of an older checkpoint) as at the start.

        Losses of another batch size are forgotten; the skipped steps are not.
        """
        if state is None:
            return
        self.steps, self.in_a_row = state["steps"], state["in_a_row"]
        self._skipped = list(state["skipped"])
        if state["batch"] == self.batch:
            self.taken = state["taken"]
            self._weight, self._mean, self._square = state["log_loss"]
