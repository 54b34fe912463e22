"""Write the years of an unfinished store anew, rounded and compressed: for small stores that travel.

Rounding to a power of two leaves zero bits behind that compress away.

Shapes: C channels, Y rows, X cols.
"""

from __future__ import annotations

from collections.abc import Callable

import h5py
import numpy as np
from numpy.typing import NDArray

from aeris.data.plan import Conversion
from aeris.data.sharing import Part
from aeris.data.statistics import Statistics
from aeris.data.yearfile import Field, YearFile
from aeris.data.yearwriter import create, publish, tagged

PACKED = "packed"


def rounding_step(conversion: Conversion, numbers: Statistics) -> Part:
    """Return the power of two every channel is rounded to: `step`, float64 [C].

    It is the largest that is not above `rounding` x the residual standard deviation over the shortest
    interval. It is kept on disk: once a year is rounded, its statistics are others.
    """
    std_C = numbers.residual_std[min(numbers.residual_std)]
    return {"step": 2.0 ** np.floor(np.log2(conversion.rounding * std_C))}


def round_to(x_CYX: Field, step_C: NDArray[np.float64]) -> Field:
    """Round every channel to a multiple of its step."""
    step = step_C[:, None, None]
    return np.asarray(np.rint(x_CYX / step) * step, dtype=np.float32)


def pack_year(
    conversion: Conversion, year: int, step_C: NDArray[np.float64] | None, beat: Callable[[], None]
) -> Part:
    """Write a year anew, rounded to `step_C`, compressed as asked; one that is packed already stays."""
    grid = (conversion.latitude_deg, conversion.longitude_deg, conversion.window)
    file = YearFile(conversion.partial / f"{year}.h5")
    time_s, temporary = file.time_s(), tagged(file.path)
    if PACKED not in file.dataset.attrs:
        create(temporary, conversion.names, time_s, *grid, compress=conversion.compress)
        with h5py.File(temporary, "r+", locking=False) as packed:
            fields = packed["fields"]
            for n in range(len(time_s)):
                x_CYX = file.read(n, (0, 0), conversion.size)
                fields[n] = x_CYX if step_C is None else round_to(x_CYX, step_C)
                beat()
            fields.attrs[PACKED] = True
        file.close()
        publish(temporary, file.path)
    file.close()
    return {}
