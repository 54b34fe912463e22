"""How fast a run goes: images per second, FLOP/s, and the share of the time it waits for data."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

Sample = TypeVar("Sample")


class Rates:
    """The clock of a run. It passes the samples on, so it sees how long each one took to come.

    Args:
        images_seen: where the run starts.
        flops_per_image: useful work of one image, forward and backward.
        peak_flops_per_s: what `mfu` is a share of.
    """

    def __init__(self, images_seen: int, flops_per_image: float, peak_flops_per_s: float) -> None:
        """Start the clock."""
        self.flops_per_image = flops_per_image
        self.peak_flops_per_s = peak_flops_per_s
        self._images = images_seen
        self._waited_s = 0.0
        self._start_s = time.perf_counter()

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

    def since_last(self, images_seen: int) -> dict[str, float]:
        """Return the rates since the last call (or the start), as fields of the run's record."""
        now_s = time.perf_counter()
        passed_s = now_s - self._start_s
        images_per_s = (images_seen - self._images) / passed_s
        fields = {
            "images_per_s": images_per_s,
            "tflops": images_per_s * self.flops_per_image / 1e12,
            "mfu": images_per_s * self.flops_per_image / self.peak_flops_per_s,
            "data_wait": self._waited_s / passed_s,
        }
        self._images, self._waited_s, self._start_s = images_seen, 0.0, now_s
        return fields


def _said_by_a_worker(text: str) -> str | None:
    """Take a data worker's own message out of the traceback that torch puts around it; None if it is not one.

    torch raises a worker's error again, as the same type, with the text "Caught <type> in DataLoader worker
    process <n>.", the worker's traceback, and on its last line the type and the message.
    """
    if not re.match(r"Caught \w+ in (DataLoader worker process|pin memory thread)", text):
        return None
    return re.sub(r"^[\w.]+: ", "", text.strip().splitlines()[-1])
