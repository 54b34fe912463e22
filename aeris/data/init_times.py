"""Init times as a user writes them: single ones, or START:END:STEPh."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

RANGE = re.compile(r"(\d{4}-[^:]*(?::\d\d){0,2}):(\d{4}-.*):(\d+)h")
"""START:END:STEPh, where the times may have minutes and seconds."""


def read_init_times(words: Sequence[str]) -> list[np.datetime64]:
    """Read init times, both ends of a range included: sorted, each once, to the second.

    Raises:
        ValueError: not a time, or an empty range.
    """
    times: set[np.datetime64] = set()
    for word in words:
        match = RANGE.fullmatch(word)
        try:
            start, end = (
                np.datetime64(text, "s") for text in (match.groups()[:2] if match else (word, word))
            )
        except ValueError:
            raise ValueError(
                f"init time {word!r} is not a time: write 2000-05-31T00, or START:END:STEPh such as "
                "2000-05-31T00:2000-06-02T00:24h"
            ) from None
        step = np.timedelta64(int(match[3]) if match else 1, "h")
        if np.isnat(start) or np.isnat(end) or end < start or step <= np.timedelta64(0, "h"):
            raise ValueError(
                f"init times {word!r} are none: the end comes before the start, or the step is 0"
            )
        times.update(np.arange(start, end + np.timedelta64(1, "s"), step))
    return sorted(times)
