"""Give a store that is whole other statistics: of another train period, or taken over."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from aeris.data import given_statistics
from aeris.data.header import HEADER, Header, read_header, write_header
from aeris.data.plan import BLOCK_TIMES, read_period
from aeris.data.statistics import HOUR_S, Statistics, Train, compute
from aeris.data.store import Store


def recompute(
    store: Store,
    period: tuple[str, str],
    intervals_h: Sequence[int] = (),
    processes: int = 1,
    show: Callable[[int, int], None] = lambda done, total: None,
) -> Statistics:
    """Compute the statistics of a train period as a conversion would, to the same bits.

    Args:
        period: first and last date.
        intervals_h: of the changes; those of the store if empty.
        show: called with the times done and all times.

    Raises:
        ValueError: the period has no time, or no two times of it are an interval apart.
    """
    start, end = read_period(period, store.times)
    time_s = store.times.astype(np.int64)
    inside = np.flatnonzero((store.times >= start) & (store.times <= end))
    if not inside.size:
        raise ValueError(
            f"no time from {start} to {end}: the store covers {store.times[0]} to {store.times[-1]}"
        )
    hours = tuple(sorted(set(intervals_h))) or tuple(sorted(store.statistics.residual_std))
    for one in hours:
        if one < 1 or not np.isin(time_s[inside] + one * HOUR_S, time_s[inside]).any():
            raise ValueError(
                f"no two times from {start} to {end} are {one} h apart: choose other --intervals-h"
            )
    masks = {store.names.index(name): valid_YX for name, valid_YX in store.masks.items()}
    train = Train(store.years, time_s, (int(time_s[inside[0]]), int(time_s[inside[-1]])), hours, masks)
    blocks = [(first, stop) for first, stop in _blocks(store) if first <= inside[-1] and stop > inside[0]]
    total, done = sum(stop - first for first, stop in blocks), [0]

    def advance(times: int) -> None:
        done[0] += times
        show(done[0], total)

    return compute(train, store.names, blocks, processes, advance)


def _blocks(store: Store) -> list[tuple[int, int]]:
    """Cut the times as a conversion does."""
    blocks, first = [], 0
    for _, count, _ in read_header(store.path / HEADER).files:
        blocks += [(first + n, first + min(n + BLOCK_TIMES, count)) for n in range(0, count, BLOCK_TIMES)]
        first += count
    return blocks


def read_for(store: Store, path: str, intervals_h: Sequence[int] = ()) -> Statistics:
    """Read statistics of another store or project for this one; the train period stays if they have none.

    Raises:
        ValueError: they lack a channel or an interval.
    """
    hours = tuple(intervals_h) or tuple(sorted(store.statistics.residual_std))
    given_statistics.check(path, store.names, hours, (store.rows, store.cols))
    period = store.statistics.train_period
    return given_statistics.read(
        path, store.names, hours, (int(period[0].astype(int)), int(period[1].astype(int)))
    )


def changed(store: Store, numbers: Statistics, path: str = "") -> Header:
    """Return the header with other statistics; what it says of its making says so."""
    header = read_header(store.path / HEADER)
    made = {
        **header.made,
        "train period": [str(time) for time in numbers.train_period],
        "intervals_h": sorted(numbers.residual_std),
        "statistics from": path
        and given_statistics.fingerprint_id(path, store.names, sorted(numbers.residual_std)),
    }
    return dataclasses.replace(header, statistics=numbers, made=made)


def write(store: Store, header: Header) -> None:
    """Put the header in place of the old one: whoever reads sees the old or the new.

    Raises:
        OSError: the disk is full or not ours to write; the old one stays.
    """
    write_header(store.path / HEADER, header)
