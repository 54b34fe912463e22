"""Write the years of an unfinished store anew, rounded and compressed: for small stores that travel.

Rounding to a power of two leaves zero bits behind that compress away.

Shapes: C channels, Y rows, X cols.
"""

from __future__ import annotations

import json
from collections.abc import Callable

import h5py
import numpy as np
from numpy.typing import NDArray

from aeris.data.plan import Conversion
from aeris.data.statistics import Statistics
from aeris.data.yearfile import Field, Years
from aeris.data.yearwriter import create, publish

ROUNDING = "rounding.json"
PACKED = "packed"


def rounding_steps(conversion: Conversion, find: Callable[[], Statistics]) -> NDArray[np.float64]:
    """Return the power of two every channel is rounded to: float64 [C].

    It is the largest that is not above `rounding` x the residual standard deviation over the shortest
    interval. It is kept on disk: once a year is rounded, the statistics that `find` computes are others.
    """
    path = conversion.partial / ROUNDING
    if not path.exists():
        numbers = find()
        std_C = numbers.residual_std[min(numbers.residual_std)]
        step_C = 2.0 ** np.floor(np.log2(conversion.rounding * std_C))
        temporary = path.with_name(path.name + ".partial")
        temporary.write_text(json.dumps(step_C.tolist()))
        publish(temporary, path)
    return np.array(json.loads(path.read_text()))


def round_to(x_CYX: Field, step_C: NDArray[np.float64]) -> Field:
    """Round every channel to a multiple of its step."""
    step = step_C[:, None, None]
    return np.asarray(np.rint(x_CYX / step) * step, dtype=np.float32)


def pack(
    conversion: Conversion, years: Years, step_C: NDArray[np.float64] | None, advance: Callable[[], None]
) -> None:
    """Write every year anew, rounded to `step_C`, compressed as asked; a year packed already is skipped."""
    grid = (conversion.latitude_deg, conversion.longitude_deg, conversion.window)
    for file in years.files:
        time_s = file.time_s()
        temporary = file.path.with_name(file.path.name + ".packed")
        if PACKED not in file.dataset.attrs:
            create(temporary, conversion.names, time_s, *grid, compress=conversion.compress)
            with h5py.File(temporary, "r+", locking=False) as packed:
                fields = packed["fields"]
                for n in range(len(time_s)):
                    x_CYX = file.read(n, (0, 0), conversion.size)
                    fields[n] = x_CYX if step_C is None else round_to(x_CYX, step_C)
                    advance()
                fields.attrs[PACKED] = True
            file.close()
            publish(temporary, file.path)
        else:
            for _ in time_s:
                advance()
