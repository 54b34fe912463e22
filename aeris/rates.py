"""How fast a run goes: images and FLOP/s now, over the run and at best, and how long it waits for data.

As published scaling results state them (AERIS, arXiv 2509.13523), over this start of the program:

- sustained: useful FLOPs of all steps since the end of the first over the time since then, with everything
  that passes in it: reading, communication, optimizer, checkpoints, validation, skipped steps;
- peak: those of the best single step after the first, by its time from the end of the step before to its own.

A skipped step does no useful work. A resumed run begins its account anew.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from aeris.flops import in_words

Sample = TypeVar("Sample")


@dataclass(frozen=True)
class Yardstick:
    """What rates are counted in: the work of an image, and the devices that share it."""

    flops: float
    """Useful work of an image, forward and backward."""
    recomputed_flops: float = 0.0
    """Work that activation checkpointing repeats."""
    devices: int = 1
    gemm_flops_per_s: float = 1.0
    """Measured rate of a matrix product on one device: what MFU and HFU are shares of."""

    @property
    def hardware_share(self) -> float:
        """All work over the useful: HFU over MFU."""
        return 1 + self.recomputed_flops / self.flops


class Rates:
    """The clock of a run. It passes the samples on, so it sees how long each one took to come.

    Args:
        images_seen: where the run starts.
        yardstick: to count FLOPs; None: they are not known.
    """

    def __init__(self, images_seen: int, yardstick: Yardstick | None = None) -> None:
        """Start the clock."""
        self.yardstick = yardstick
        self.steps = 0
        self._seen = self._seen_before = images_seen
        self._taken = self._taken_before = self._taken_first = 0  # images of steps that were not skipped
        self._steps_before = 0
        self._waited_s = 0.0
        self._start_s = self._step_s = self._first_s = time.perf_counter()
        self._best = 0.0  # images/s of the best step

    def samples(self, loader: Iterable[Sample]) -> Iterator[Sample]:
        """Pass samples on, adding up the time spent waiting for them.

        Raises:
            ValueError, OSError: a sample cannot be read; one line, also when a data worker says so.
        """
        source = iter(loader)
        while True:
            start_s = time.perf_counter()
            try:
                sample = next(source, None)
            except (ValueError, OSError) as error:
                said = _said_by_a_worker(str(error))
                if said is None:
                    raise
                raise type(error)(said) from error
            self._waited_s += time.perf_counter() - start_s
            if sample is None:
                return
            yield sample

    def end_step(self, images_seen: int, taken: bool = True) -> None:
        """Note the end of a step.

        Args:
            images_seen: by now.
            taken: whether the step changed the weights; the work of a skipped one is not useful.
        """
        now_s = time.perf_counter()
        images = (images_seen - self._seen) if taken else 0
        self._seen, self._taken, self.steps = images_seen, self._taken + images, self.steps + 1
        if self.steps == 1:
            self._first_s, self._taken_first = now_s, self._taken
        else:
            self._best = max(self._best, images / (now_s - self._step_s))
        self._step_s = now_s

    def since_last(self) -> dict[str, float]:
        """Return the rates from the last call (or the start) to the last step's end, for the run's record.

        Only from the second step on there are a sustained and a peak rate.
        """
        passed_s = self._step_s - self._start_s
        fields = {
            "images_per_s": (self._seen - self._seen_before) / passed_s,
            "step_s": passed_s / (self.steps - self._steps_before),
            "data_wait": self._waited_s / passed_s,
        }
        fields |= self._flops((self._taken - self._taken_before) / passed_s)
        self._seen_before, self._taken_before, self._steps_before = self._seen, self._taken, self.steps
        self._waited_s, self._start_s = 0.0, self._step_s
        return fields

    def _flops(self, images_per_s: float) -> dict[str, float]:
        """Put useful images per second of the whole run into FLOP/s, per device unless named total."""
        if (yard := self.yardstick) is None:
            return {}
        each = yard.flops / yard.devices
        fields = {
            "tflops": images_per_s * each / 1e12,
            "tflops_total": images_per_s * yard.flops / 1e12,
            "mfu": images_per_s * each / yard.gemm_flops_per_s,
        }
        if yard.recomputed_flops:
            fields["hfu"] = fields["mfu"] * yard.hardware_share
        if self.steps > 1:
            sustained = self._sustained(self._step_s)
            fields |= {"tflops_sustained": sustained * each / 1e12, "tflops_peak": self._best * each / 1e12}
        return fields

    def _sustained(self, now_s: float) -> float:
        """Return images of useful steps per second since the end of the first step."""
        return (self._taken - self._taken_first) / (now_s - self._first_s)

    def summary(self) -> str:
        """Say what this start of the run sustained until now, and its peak; "" before its second step."""
        if self.steps < 2:
            return ""
        now_s = time.perf_counter()
        sustained, count = self._sustained(now_s), self.steps - 1
        text = (
            f"sustained {self._in_words(sustained)}; peak {self._in_words(self._best)}; over the {count:,} "
        )
        text += f"step{'s' * (count > 1)} after this start's first, {now_s - self._first_s:,.0f} s"
        if (yard := self.yardstick) is None:
            return text
        share = sustained * yard.flops / yard.devices / yard.gemm_flops_per_s
        text += f"; MFU {share:.1%}"
        if yard.recomputed_flops:
            text += f", HFU {share * yard.hardware_share:.1%}"
        return f"{text} of a measured matrix product ({in_words(yard.gemm_flops_per_s)})"

    def _in_words(self, images_per_s: float) -> str:
        """Put a rate into words, with FLOP/s where they are known."""
        text = f"{images_per_s:.3g} images/s"
        if (yard := self.yardstick) is None:
            return text
        text += f", {in_words(images_per_s * yard.flops / yard.devices)} per device"
        return text + (f" ({in_words(images_per_s * yard.flops)} in all)" if yard.devices > 1 else "")


def short(rates: dict[str, float]) -> str:
    """Put a record's rates into words for the live line, whose end a narrow screen cuts off."""
    text = f"{rates['images_per_s']:.3g} img/s"
    if "tflops" in rates:
        text += f" {rates['tflops']:.3g} TFLOP/s MFU {rates['mfu']:.0%}"
    if "hfu" in rates:
        text += f" HFU {rates['hfu']:.0%}"
    text += f" data {rates['data_wait']:.0%}"
    if "tflops_peak" in rates:
        text += f" sustained {rates['tflops_sustained']:.3g} peak {rates['tflops_peak']:.3g}"
    return text


def _said_by_a_worker(text: str) -> str | None:
    """Take a data worker's own message out of the traceback that torch puts around it; None if it is not one.

    torch raises a worker's error again, as the same type, with the text "Caught <type> in DataLoader worker
    process <n>.", the worker's traceback, and on its last line the type and the message.
    """
    if not re.match(r"Caught \w+ in (DataLoader worker process|pin memory thread)", text):
        return None
    return re.sub(r"^[\w.]+: ", "", text.strip().splitlines()[-1])
