"""What stands out in a training sample: values far from what other samples have in the same channel.

A channel's reach in one image is its largest standardised value, in the state, the state after it, and the
change between them. Distributions differ (rain has tails, temperature has none), so a reach is judged beside
the median of that channel over other images, not against a number for all.

Shapes: C channels, Y rows, X columns, I images.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from aeris.data.loader import SampleDataset
from aeris.data.normalize import Normalizer

FIELDS = ("state", "state after", "change")
TIMES_USUAL, LEAST = 4.0, 6.0
"""An outlier reaches so many times as far as usual, and at least so many standard deviations."""


@dataclass(frozen=True)
class Extreme:
    """The largest standardised value of one channel in one field of an image."""

    channel: str
    field: str
    """One of FIELDS."""
    value: float
    """In physical units; a change is per interval."""
    units: str
    row: int
    col: int
    deviations: float
    """Standard deviations from the mean, without sign."""
    usual: float = float("nan")
    """The median of `deviations` over other images."""

    @property
    def out(self) -> bool:
        """Whether this is an outlier; a value that is not finite always is."""
        return not self.deviations <= max(LEAST, TIMES_USUAL * self.usual)

    def __str__(self) -> str:
        """Say it in words."""
        where = f"at row {self.row} col {self.col}"
        off = f"{self.deviations:.4g} standard deviations off, where {self.usual:.2g} is usual"
        return f"{self.field} {self.channel} = {self.value:.6g} {self.units} {where}: {off}"


def extremes(dataset: SampleDataset, interval_h: int, image: int) -> list[Extreme]:
    """Find the largest standardised value of every channel and field of an image, on the store's own grid.

    Raises:
        StoreError: the data cannot be read, or a value is missing.
    """
    store = dataset.store
    before, after = dataset.pair(image)
    now_YXC, next_YXC = (np.moveaxis(store.read(time), 0, -1) for time in (before, after))
    normalizer = Normalizer(store.statistics, interval_h)
    physical = (now_YXC, next_YXC, next_YXC - now_YXC)
    standard = (
        normalizer.standardise(now_YXC),
        normalizer.standardise(next_YXC),
        normalizer.standardise_residual(now_YXC, next_YXC),
    )
    found = []
    for field, x_YXC, z_YXC in zip(FIELDS, physical, standard):
        reach_PC = np.abs(z_YXC).reshape(-1, z_YXC.shape[-1])
        for number, channel in enumerate(store.channels):
            place = int(reach_PC[:, number].argmax())
            row, col = divmod(place, store.cols)
            value, far = float(x_YXC[row, col, number]), float(reach_PC[place, number])
            found.append(Extreme(channel.name, field, value, channel.units, row, col, far))
    return found


def outliers(
    dataset: SampleDataset, interval_h: int, images: Iterable[int], others: Iterable[int]
) -> dict[int, list[Extreme]]:
    """Find the outliers of every image: states before changes, the farthest first.

    Args:
        images: to be judged.
        others: further images to compare with.
    """
    images = list(images)
    found = {image: extremes(dataset, interval_h, image) for image in dict.fromkeys((*others, *images))}
    reach_IF: NDArray[np.float64] = np.array([[one.deviations for one in each] for each in found.values()])
    usual_F = np.median(reach_IF, axis=0)
    judged = {}
    for image in images:
        named = [Extreme(**{**asdict(one), "usual": float(u)}) for one, u in zip(found[image], usual_F)]
        # A value that is wrong makes a wrong change, so it is named first.
        order = sorted((one for one in named if one.out), key=lambda one: -one.deviations)
        judged[image] = sorted(order, key=lambda one: one.field == "change")
    return judged
