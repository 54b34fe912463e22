"""Training samples in an order that depends on nothing but the number of the image.

Image k is pair number k modulo n of permutation k div n, and permutations are drawn from (seed, epoch). So a
run that goes on at image k sees what it would have seen without a stop, whatever its batch, workers or
parallel layout.

Shapes: B batch, N windows, T tokens per window, C channels, F forcings.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterable
from functools import lru_cache
from multiprocessing import forkserver, resource_tracker
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from aeris.data.forcing import Forcing
from aeris.data.normalize import Normalizer
from aeris.data.store import Period, Store
from swipe.windows import WindowShard


class Sample(NamedTuple):
    """A training pair, standardised and window-major, without the batch dim B for a single one.

    Masked points are 0 in the state and in the residual.
    """

    state_BNTC: torch.Tensor
    residual_BNTC: torch.Tensor
    forcing_BNTF: torch.Tensor
    image_B: torch.Tensor
    """Number of the image, int64."""


class SampleDataset(Dataset[Sample]):
    """The samples of one rank's windows, indexed by the number of the image (any integer from 0).

    Args:
        period: first and last time a pair may touch; None is the train period of the store.
        roll: turn the globe by a random number of columns for every image (fields and forcings together).

    Raises:
        ValueError: no pair, no statistics for the interval, a shard of another grid, or masks with `roll`.
    """

    def __init__(
        self,
        store_path: str | Path,
        interval_h: int,
        shard: WindowShard,
        seed: int,
        period: Period | None = None,
        roll: bool = False,
    ) -> None:
        self.store = Store(store_path)
        if roll and self.store.masks:
            raise ValueError(
                f"{store_path} has masked channels ({', '.join(self.store.masks)}), which cannot be rolled: "
                f"pass --data.no-roll"
            )
        self.roll = roll
        self.shard = shard
        self.seed = seed
        self._pairs = self.store.pairs(interval_h, period or self.store.statistics.train_period)
        self._normalizer = Normalizer(self.store.statistics, interval_h)
        self._forcing = Forcing(self.store, interval_h)
        self._masked_NTC = ~self.store.valid_windows(shard) if self.store.masks else None

    def __len__(self) -> int:
        """Return the number of pairs, the length of an epoch."""
        return len(self._pairs)

    def pair(self, image: int) -> tuple[int, int]:
        """Return the numbers of the two times of an image."""
        epoch, place = divmod(image, len(self))
        before, after = self._pairs[permutation(self.seed, epoch, len(self))[place]]
        return int(before), int(after)

    def __getitem__(self, image: int) -> Sample:
        """Read one image: tensors [N, T, C], [N, T, C], [N, T, F] and the number."""
        before, after = self.pair(image)
        roll = _columns(self.seed, image, self.store.cols) if self.roll else 0
        now_NTC = self.store.read_windows(before, self.shard, roll)
        next_NTC = self.store.read_windows(after, self.shard, roll)
        state_NTC = self._normalizer.standardise(now_NTC)
        residual_NTC = self._normalizer.standardise_residual(now_NTC, next_NTC)
        if self._masked_NTC is not None:
            state_NTC[self._masked_NTC] = 0.0
            residual_NTC[self._masked_NTC] = 0.0
        forcing_NTF = self._forcing.windows(self.store.times[before], self.shard, roll)
        return Sample(
            torch.from_numpy(state_NTC),
            torch.from_numpy(residual_NTC),
            torch.from_numpy(forcing_NTF),
            torch.tensor(image, dtype=torch.int64),
        )


@lru_cache(maxsize=4)
def permutation(seed: int, epoch: int, length: int) -> NDArray[np.int64]:
    """Permute an epoch by sorting raw Philox output, which unlike numpy's `permutation` never changes."""
    raw = np.random.Philox(key=(seed % 2**64) + (epoch << 64)).random_raw(length)
    return np.argsort(raw, kind="stable")


def _columns(seed: int, image: int, cols: int) -> int:
    """Draw the columns an image is rolled by, from seed and image; far from the keys of the permutations."""
    return int(np.random.Philox(key=(seed % 2**64) + (1 << 127), counter=image).random_raw() % cols)


def make_loader(
    dataset: SampleDataset,
    images: Iterable[int],
    microbatch: int,
    workers: int = 0,
    pin_memory: bool = False,
) -> DataLoader[Sample]:
    """Read `images` in order, `microbatch` at a time; each worker opens the store for itself."""
    return read_ahead(dataset, images, microbatch, workers, pin_memory, prefetch=4)


def read_ahead(
    dataset: Any,
    order: Iterable[Any],
    batch_size: int | None,
    workers: int,
    pin_memory: bool,
    prefetch: int = 2,
) -> DataLoader[Any]:
    """Read the entries of a data set that `order` names, in processes of their own if there are any.

    They are started by a fork server: forking a process that uses MPI or an accelerator hangs or crashes.

    Args:
        batch_size: entries that are stacked; None hands on one after the other as it is.
        workers: processes that read; 0 reads when asked.
        pin_memory: hand on tensors in memory that a GPU reads from without waiting.
        prefetch: batches each worker has ready.
    """
    parallel: dict[str, Any] = {}
    if workers:
        context = multiprocessing.get_context("forkserver")
        # torch is imported once, not in every worker
        context.set_forkserver_preload([type(dataset).__module__])
        _start_unmoved_by_signals()
        parallel = {
            "multiprocessing_context": context,
            "worker_init_fn": _end_for_the_parent_only,
            "persistent_workers": True,
            "prefetch_factor": prefetch,
        }
    return DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=order,
        num_workers=workers,
        pin_memory=pin_memory,
        **parallel,
    )


_ASKING = ("SIGINT", "SIGTERM", "SIGUSR1")
"""Signals by which a program is asked to stop; launchers send them to its data workers as well."""


def _start_unmoved_by_signals() -> None:
    """Start the processes that start workers, with signals blocked that ask to stop: workers inherit it.

    The program itself decides when it has read enough; signals that come meanwhile reach it afterwards.
    """
    numbers = {getattr(signal, name) for name in _ASKING if hasattr(signal, name)}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        resource_tracker.ensure_running()  # lets two of them through when it is there
        signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end_for_the_parent_only(worker: int) -> None:
    """Let a worker end when the program terminates it, and for nobody else; called in the worker."""
    parent = multiprocessing.parent_process()
    if parent is None or not hasattr(signal, "sigwaitinfo"):  # macOS
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def wait() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent.pid:
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()
