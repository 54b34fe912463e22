"""The clock of a start: what the time from the start of the process to the end of the first step goes to."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

from aeris.log import console

Item = TypeVar("Item")

_IMPORTED = time.monotonic()


def process_age() -> float:
    """Return the seconds since this process was started; where Linux's /proc is not, since this import."""
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        started = int(fields[19]) / os.sysconf("SC_CLK_TCK")  # field 22 of proc(5), since the machine's boot
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - started
    except (OSError, ValueError, IndexError, AttributeError):
        age = -1.0
    least = time.monotonic() - _IMPORTED
    return age if age >= least else least


class Clock:
    """Splits the start of a program into named parts. Without `begin` it does nothing."""

    def __init__(self) -> None:
        """Wait for `begin`."""
        self.parts: dict[str, float] = {}
        self._last: float | None = None

    def begin(self, name: str) -> None:
        """Start with the part that lies behind: from the start of the process to here."""
        self.parts = {name: process_age()}
        self._last = time.monotonic()

    def mark(self, name: str) -> None:
        """End a part: the time since the last mark is `name`'s."""
        if self._last is None:
            return
        now = time.monotonic()
        self.parts[name] = self.parts.get(name, 0.0) + now - self._last
        self._last = now

    def first(self, samples: Iterator[Item], name: str) -> Iterator[Item]:
        """Pass samples on, and end the part `name` when the first of them has come."""
        for number, sample in enumerate(samples):
            if number == 0:
                self.mark(name)
            yield sample

    def finish(self, name: str, run_dir: Path, ranks: int, lead: bool) -> None:
        """End the last part, once: the lead says all of them and writes them to `startup.json`.

        Raises:
            OSError: the file cannot be written.
        """
        if self._last is None:
            return
        self.mark(name)
        self._last, total = None, sum(self.parts.values())
        if not lead:
            return
        shown = ", ".join(f"{part} {seconds:.1f}" for part, seconds in self.parts.items() if seconds >= 0.05)
        console.print(f"first step after {total:.1f} s: {shown}")
        rounded = {part: round(seconds, 3) for part, seconds in self.parts.items()}
        text = json.dumps({"ranks": ranks, "total": round(total, 3), "parts": rounded}, indent=1)
        path = run_dir / "startup.json"
        partial = path.with_name(path.name + ".partial")
        partial.write_text(text + "\n")
        partial.replace(path)


clock = Clock()
"""That of this process."""
