"""Units, lead times and channels as a reader sees them; files keep SI units."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

# Shown first, in this order, where a forecast has them: the channels weather papers report.
HEADLINE = ("z500", "t850", "q700", "t2m", "msl", "u850", "u10", "sst", "v850", "v10")

_SHOWN = {
    "Pa": (0.01, "hPa"),
    "kg kg-1": (1000.0, "g/kg"),
    "kg kg**-1": (1000.0, "g/kg"),
}
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def display_unit(units: str) -> tuple[float, str]:
    """Return (factor, text): multiply an SI value by the factor to read it in `text`.

    Pressure is shown in hPa, specific humidity in g/kg, everything else in its own unit.
    """
    if units in _SHOWN:
        return _SHOWN[units]
    words = []
    for word in units.replace("**", "").split():
        letters = word.rstrip("-0123456789") or word
        words.append(letters + word[len(letters) :].translate(_SUPERSCRIPT))
    return 1.0, " ".join(words)


def lead_text(lead_h: int) -> str:
    """Return "18 h", or whole days from two days on: "3 d"."""
    return f"{lead_h // 24} d" if lead_h >= 48 and lead_h % 24 == 0 else f"{lead_h} h"


def time_text(time: np.datetime64) -> str:
    """Return "2000-06-01 06 UTC"; minutes only where they are not zero."""
    day, _, clock = str(time.astype("datetime64[m]")).partition("T")
    return f"{day} {clock.removesuffix(':00')} UTC"


def headline_channels(names: Sequence[str], most: int) -> list[int]:
    """Return the numbers of at most `most` channels to show, those of `HEADLINE` first."""
    known = [names.index(name) for name in HEADLINE if name in names]
    rest = [number for number in range(len(names)) if number not in known]
    return (known + rest)[:most]


def spread_out(count: int, most: int) -> list[int]:
    """Return at most `most` numbers of range(count), evenly spread, the last among them."""
    if count <= most:
        return list(range(count))
    return sorted({round((number + 1) * count / most) - 1 for number in range(most)})
