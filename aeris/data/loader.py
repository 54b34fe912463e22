"""Training samples in an order that depends on nothing but the number of the image.

Image k is pair number k modulo n of permutation k div n, and permutations are drawn from (seed, epoch). So a
run that goes on at image k sees what it would have seen without a stop, whatever its batch, workers or
parallel layout.

Shapes: B batch, R ranks that share windows, N windows, T tokens per window, C channels, F forcings,
X = 2 C + F.
"""

from __future__ import annotations

import inspect
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache, partial
from multiprocessing import forkserver, resource_tracker
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset, default_collate

from aeris.data.forcing import Forcing
from aeris.data.normalize import Normalizer
from aeris.data.store import Period, Store
from swipe.windows import WindowShard

LEAST_ERROR = 0.03
"""Smallest error of a state, of the largest."""


class Sample(NamedTuple):
    """A training pair, standardised and window-major, without the batch dim B for a single one.

    Masked points are 0 in the state and in the residual.
    """

    state_BNTC: torch.Tensor
    residual_BNTC: torch.Tensor
    forcing_BNTF: torch.Tensor
    image_B: torch.Tensor
    """Number of the image, int64."""


class Packed(NamedTuple):
    """State, residual and forcings side by side, so that they are stacked, sent and copied as one tensor."""

    values_BRNTX: torch.Tensor
    """Every rank's part of the windows; a single pair has no batch dim B."""
    images: tuple[int, ...]
    """Numbers: a tensor would be a second file that a worker hands over."""

    @property
    def image_B(self) -> torch.Tensor:
        """Numbers of the images, int64."""
        return torch.tensor(self.images, dtype=torch.int64)

    @classmethod
    def stack(cls, singles: Sequence[Packed]) -> Packed:
        """Make a batch of single pairs; in a worker, in memory that it shares with the program."""
        values_BRNTX = default_collate([single.values_BRNTX for single in singles])
        return cls(values_BRNTX, tuple(image for single in singles for image in single.images))


def unpack(values_BNTX: torch.Tensor, channels: int, image_B: torch.Tensor) -> Sample:
    """Take a packed sample apart, without a copy."""
    forcings = values_BNTX.shape[-1] - 2 * channels
    state, residual, forcing = values_BNTX.split((channels, channels, forcings), dim=-1)
    return Sample(state, residual, forcing, image_B)


class SampleDataset(Dataset[Sample]):
    """The samples of one rank's windows, indexed by the number of the image (any integer from 0).

    Args:
        period: first and last time a pair may touch; None is the train period of the store.
        roll: turn the globe by a random number of columns for every image (fields and forcings together).
        state_error: largest error of a state, as a share of the change of another pair (docs/diffusion.md).

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
        state_error: float = 0.0,
    ) -> None:
        self.store = Store(store_path)
        if roll and self.store.masks:
            raise ValueError(
                f"{store_path} has masked channels ({', '.join(self.store.masks)}), which cannot be rolled: "
                f"pass --data.no-roll"
            )
        self.roll, self.state_error = roll, state_error
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
        values_RNTX, _ = self.packed(image)
        return unpack(values_RNTX[0], len(self.store.names), torch.tensor(image))

    def packed(self, image: int, parts: int = 1) -> Packed:
        """Read one image into one tensor, the windows cut into the `parts` of the ranks that share them.

        Every value is written to where it is sent from.
        """
        before, after = self.pair(image)
        roll = _columns(self.seed, image, self.store.cols) if self.roll else 0
        now_NTC, next_NTC = self._read(before, after, roll)
        if self.state_error:
            now_NTC = now_NTC + self._error(image, roll)
        forcing_NTF = torch.from_numpy(self._forcing.windows(self.store.times[before], self.shard, roll))
        windows, tokens, channels = now_NTC.shape
        widths = channels, channels, forcing_NTF.shape[-1]
        cut = (1, 1, 1, tokens) if parts == 1 else WindowShard(self.shard.grid, (), parts).split(tokens)
        values_RNTX = torch.empty(parts, windows, tokens // parts, sum(widths))
        sets, quadrants, strips, rest = cut
        places = values_RNTX.view(sets, strips, windows, quadrants, rest, -1).permute(2, 0, 3, 1, 4, 5)
        state, residual, forcing = places.split(widths, dim=-1)
        now, then = now_NTC.unflatten(1, cut), next_NTC.unflatten(1, cut)
        self._normalizer.standardise_pair(now, then, state, residual)
        forcing.copy_(forcing_NTF.unflatten(1, cut))
        if self._masked_NTC is not None:
            masked = torch.from_numpy(self._masked_NTC).unflatten(1, cut)
            state.masked_fill_(masked, 0.0)
            residual.masked_fill_(masked, 0.0)
        return Packed(values_RNTX, (image,))

    def _read(self, before: int, after: int, roll: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Read the windows of two times."""
        self.store.expect(after, self.shard, roll)
        now_NTC = torch.from_numpy(self.store.read_windows(before, self.shard, roll))
        return now_NTC, torch.from_numpy(self.store.read_windows(after, self.shard, roll))

    def _error(self, image: int, roll: int) -> torch.Tensor:
        """Draw the error [N, T, C] of a state: a random pair's change, less the mean change, times a size.

        Sizes are log-uniform from LEAST_ERROR times the largest up, with either sign.
        """
        raw = np.random.Philox(key=(self.seed % 2**64) + (1 << 126), counter=image).random_raw(3)
        before, after = self._pairs[int(raw[0] % len(self))]
        now_NTC, next_NTC = self._read(int(before), int(after), roll)
        size = self.state_error * LEAST_ERROR ** (int(raw[1]) / 2.0**64) * (-1 if raw[2] % 2 else 1)
        return size * self._normalizer.departure(now_NTC, next_NTC)


@lru_cache(maxsize=4)
def permutation(seed: int, epoch: int, length: int) -> NDArray[np.int64]:
    """Permute an epoch by sorting raw Philox output, which unlike numpy's `permutation` never changes."""
    raw = np.random.Philox(key=(seed % 2**64) + (epoch << 64)).random_raw(length)
    return np.argsort(raw, kind="stable")


def _columns(seed: int, image: int, cols: int) -> int:
    """Draw the columns an image is rolled by, from seed and image; far from the keys of the permutations."""
    return int(np.random.Philox(key=(seed % 2**64) + (1 << 127), counter=image).random_raw() % cols)


class _InParts(Dataset[Packed]):
    """The samples of a data set, each cut into the parts of the ranks that share windows."""

    def __init__(self, samples: SampleDataset, parts: int) -> None:
        self.samples, self.parts = samples, parts

    def __getitem__(self, image: int) -> Packed:
        return self.samples.packed(image, self.parts)


def make_loader(
    dataset: SampleDataset,
    images: Iterable[int],
    microbatch: int,
    workers: int = 0,
    pin_memory: bool = False,
) -> Iterator[Sample]:
    """Read `images` in order, `microbatch` at a time; each worker opens the store for itself."""
    for packed in read_packed(dataset, images, microbatch, 1, workers, pin_memory):
        yield unpack(packed.values_BRNTX[:, 0], len(dataset.store.names), packed.image_B)


def read_packed(
    dataset: SampleDataset,
    images: Iterable[int],
    microbatch: int,
    parts: int,
    workers: int = 0,
    pin_memory: bool = False,
    begin: Callable[[], object] | None = None,
) -> DataLoader[Packed]:
    """Read `images` in order, `microbatch` at a time, cut into `parts`; see `read_ahead`."""
    return read_ahead(
        _InParts(dataset, parts), images, microbatch, workers, pin_memory, 4, Packed.stack, begin
    )


def read_ahead(
    dataset: Any,
    order: Iterable[Any],
    batch_size: int | None,
    workers: int,
    pin_memory: bool,
    prefetch: int = 2,
    stack: Callable[[Any], Any] | None = None,
    begin: Callable[[], object] | None = None,
) -> DataLoader[Any]:
    """Read the entries of a data set that `order` names, in processes of their own if there are any.

    They are started by a fork server: forking a process that uses MPI or an accelerator hangs or crashes.

    Args:
        batch_size: entries that are stacked; None hands on one after the other as it is.
        workers: processes that read; 0 reads when asked.
        pin_memory: hand on tensors in memory that a GPU reads from without waiting.
        prefetch: batches each worker has ready.
        stack: makes a batch of entries; None: as torch does.
        begin: called in every process before it reads.
    """
    parallel: dict[str, Any] = {}
    if workers:
        start_workers(type(dataset).__module__)
        parallel = {
            "multiprocessing_context": multiprocessing.get_context("forkserver"),
            "worker_init_fn": partial(_begin_worker, begin),
            "persistent_workers": True,
            "prefetch_factor": prefetch,
        }
    return DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=order,
        num_workers=workers,
        pin_memory=pin_memory,
        collate_fn=stack,
        **parallel,
    )


def start_workers(module: str = __name__) -> None:
    """Start the process that data workers are forked from, if it does not run; the program goes on meanwhile.

    It imports, once for all of them, what a worker needs: the module of the data set, and what the program
    imports, which Python runs again in every worker.
    """
    program = vars(sys.modules["__main__"]).values()
    imported = {x.__name__ if inspect.ismodule(x) else getattr(x, "__module__", None) for x in program}
    wanted = sorted(name for name in imported if isinstance(name, str) and name in sys.modules)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([module, *(name for name in wanted if name != "__main__")])
    _start_unmoved_by_signals()


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


def _begin_worker(begin: Callable[[], object] | None, worker: int) -> None:
    """Prepare a worker; called in it."""
    if begin is not None:
        begin()
    _end_for_the_parent_only()


def _end_for_the_parent_only() -> None:
    """Let a worker end when the program terminates it, and for nobody else."""
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
