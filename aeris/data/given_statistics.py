"""Statistics that are taken over in place of being computed: of another store, or of another project.

Shapes: C channels.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from aeris.data.foreign_statistics import read_statistics
from aeris.data.header import HEADER
from aeris.data.statistics import Statistics
from aeris.data.store import Store


def is_store(path: str) -> bool:
    """Whether the statistics are those of a store, whose train period is taken over as well."""
    return bool(path) and (Path(path) / HEADER).exists()


def check(path: str, names: Sequence[str], intervals_h: Sequence[int], size: tuple[int, int]) -> None:
    """Refuse statistics of other channels, and masks of another grid, before hours of work.

    Args:
        size: rows and cols of the new store.

    Raises:
        ValueError: says in what they differ.
    """
    if not is_store(path):
        read_statistics(path, names, intervals_h)
        return
    other = Store(path)
    if other.names != tuple(names):
        raise ValueError(f"{other.path} has the channels {' '.join(other.names)}, not {' '.join(names)}")
    if other.masks and (other.rows, other.cols) != size:
        raise ValueError(
            f"{other.path} has masks, on a {other.rows} x {other.cols} grid: coarsen to that grid"
        )


def read(path: str, names: Sequence[str], intervals_h: Sequence[int], train_s: tuple[int, int]) -> Statistics:
    """Read them, in the order of `names`.

    Args:
        train_s: first and last time (s since 1970) to train on, where the statistics do not say.

    Raises:
        ValueError: a channel or an interval is missing.
    """
    if is_store(path):
        return Store(path).statistics
    numbers = read_statistics(path, names, intervals_h)
    if not np.isnat(numbers.train_period[0]):
        return numbers
    start, end = (np.datetime64(second, "s") for second in train_s)
    return dataclasses.replace(numbers, train_period=(start, end))


def fingerprint_id(path: str, names: Sequence[str], intervals_h: Sequence[int]) -> str:
    """Tell statistics apart by 16 hexadecimal digits."""
    if is_store(path):
        return Store(path).fingerprint_id
    numbers = read_statistics(path, names, intervals_h)
    columns = [numbers.mean_C, numbers.std_C, *numbers.residual_mean.values(), *numbers.residual_std.values()]
    text = " ".join(f"{value + 0.0:.8e}" for column in columns for value in column)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
