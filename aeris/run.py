"""What a run in training is and does, whatever it trains: meet, go on, count steps, save, stop, part.

`aeris.train` and `aeris.aurora.finetune` have models, data and steps of their own; this they share, in the
order it happens: `carry_through` (the program), `meet`, `claim`, `Run.begin`, `Run.left`, after each step
`Run.count`, `Run.report`, `Run.note` and `Run.end_step`, at last `Run.close`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from aeris.config import save
from aeris.guards import Guards
from aeris.interruption import Settled
from aeris.log import RunLog, TrainingLine, console
from aeris.optim import check_finite
from aeris.rates import Rates
from aeris.run_directory import NO_FLAGS, Flags, check_same_command, ending, make_directories, parting
from aeris.spikes import Spikes
from aeris.startup import clock
from launch.rank import Ranks, export
from swipe import checkpoint
from swipe.backend import keep_freed_memory, start
from swipe.collectives import together
from swipe.groups import Groups
from swipe.pipeline import Pipeline
from swipe.resume import newest
from swipe.selftest import self_test

Record = dict[str, Any]
"""What log.jsonl says of a step."""


class Run(ABC):
    """A run in memory on one rank: how far it came, where it is saved, what guards it.

    Attributes:
        images_seen: in all, whether their steps were taken or skipped.
        skipped: steps, non-finite ones and spikes.
        skipped_in_a_row: non-finite ones since the last other step.
        saved_at: images of the newest checkpoint, also one that is still being written.
        settled: what all ranks do after the last step.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer

    def __init__(
        self, config: Any, run_dir: Path, groups: Groups, device: torch.device, guards: Guards | None
    ) -> None:
        """Stand at the start; a collective call over all ranks.

        Args:
            config: of the run, with sections train, checkpoint, faults, optimizer and parallel.
            guards: of the program that trains; None: nothing is watched.
        """
        self.config, self.run_dir, self.groups, self.device = config, run_dir, groups, device
        self.checkpoints = checkpoint.Checkpoints(run_dir / "checkpoints", config.checkpoint.keep, groups)
        self.images_seen = self.skipped = self.skipped_in_a_row = self.saved_at = 0
        self.spikes = Spikes(config.faults, config.train.batch)
        self.guards = guards or Guards(run_dir, config.checkpoint.every_minutes, groups.rank == 0)
        self.guards.join(groups, device, config.faults)
        self.settled = Settled()

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """Name every tensor of the run's state that this rank holds, or holds a part of."""

    @abstractmethod
    def about_data(self) -> dict[str, Any]:
        """Say by what a checkpoint's meta.json knows the data."""

    @abstractmethod
    def load(self, path: Path, meta: dict[str, Any]) -> None:
        """Load a checkpoint, after checking that the data are those of its `meta`; a collective call."""

    def save(self) -> None:
        """Start to write a checkpoint of this moment; it is whole when `checkpoints.wait` returns."""
        meta = {
            "images_seen": self.images_seen,
            "skipped": self.skipped,
            "skipped_in_a_row": self.skipped_in_a_row,
            "spikes": self.spikes.state(),
        }
        self.checkpoints.save(self.images_seen, self.tensors(), meta | self.about_data())
        self.saved_at = self.images_seen
        self.guards.requests.saved()

    def resume(self) -> bool:
        """Load the newest good checkpoint, if there is one; a collective call over all ranks.

        It may have been saved by any number of ranks in any layout.

        Raises:
            ValueError: every checkpoint is damaged, or the data are others than before.
        """
        path, remarks = newest(self.run_dir / "checkpoints", self.groups.saving[1])
        for remark in remarks:
            console.print(remark, markup=False)
        if path is None:
            return False
        meta = checkpoint.read_meta(path)
        self.load(path, meta)
        self.images_seen = self.saved_at = meta["images_seen"]
        self.skipped, self.skipped_in_a_row = meta["skipped"], meta["skipped_in_a_row"]
        self.spikes.load_state(meta.get("spikes"))
        return True

    def begin(self, lines: Iterable[str], otherwise: str = "", pipeline: Pipeline | None = None) -> None:
        """Try all communication, go on from the newest checkpoint, and say so; a collective call.

        Args:
            lines: what is trained, on what.
            otherwise: what is said of a run that does not go on; "": nothing.
            pipeline: whose messages are tried too.

        Raises:
            ValueError: see `resume`.
            OSError: something wrong arrives, or `run_dir` cannot be written.
        """
        clock.mark("model")
        tested = self_test(self.groups, self.device, pipeline) if self.config.parallel.self_test else ""
        clock.mark("self test")
        with together(self.groups.world):
            resumed = self.resume()
            if self.groups.rank == 0:
                save(self.config, self.run_dir / "config.json")
        clock.mark("checkpoint")
        images = self.config.train.images
        done = "trained already" if self.images_seen >= images else "resuming"
        state = f"{done} at image {self.images_seen:,} of {images:,}" if resumed else otherwise
        offload = f"AdamW: {self.optimizer}" if self.config.optimizer.offload != "none" else ""
        for line in (*lines, tested, offload, state):
            if line:
                console.print(line)

    def left(self) -> tuple[int, int]:
        """Return how many steps are left, and how many images will have been seen after them."""
        train = self.config.train
        steps = max(0, -(-(train.images - self.images_seen) // train.batch))
        return steps, self.images_seen + steps * train.batch

    def count(self, loss: float, grad_norm: float, stop: float, save: float) -> str:
        """Count a step and settle what becomes of it, from sums that are the same on all ranks.

        Args:
            loss: mean over the batch.
            grad_norm: of the whole model.
            stop: how many ranks were asked to stop, and `save`: to save.

        Returns:
            "" if the step is to be taken, else why it is skipped.
        """
        self.settled = self.guards.requests.settle(stop, save)
        why = self.spikes.decide(loss, grad_norm)
        self.images_seen += self.config.train.batch
        self.skipped += bool(why)
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if why == "non-finite" else 0
        return why

    def report(self, record: Record, kept: str = "") -> None:
        """Say that a step was skipped and which ranks are slow; a collective call.

        Args:
            record: of the step; gets "slow" if there are such ranks.
            kept: the directory with skipped steps; "" if there is none.

        Raises:
            ValueError: too many steps were skipped.
        """
        limit = self.config.train.nonfinite_limit
        check_finite(self.model, self.groups.world, self.skipped_in_a_row, limit)
        self.spikes.report(record, kept)
        self.guards.compare(record)

    def note(
        self, record: Record, rates: Record, log: RunLog, line: TrainingLine, words: Callable[[Record], str]
    ) -> None:
        """Log a step if there are `rates`, or if it was skipped or slow; show it in the line.

        Args:
            words: says the rates.
        """
        if "skip" not in record:
            line.smooth(record["loss"])
        if rates or "skip" in record or "slow" in record:
            log.write(record | rates)
        if rates:
            line.show(self.images_seen, words(rates))

    def end_step(self, due: bool) -> bool:
        """Save if it is `due` or asked for; return whether the run shall stop.

        Raises:
            OSError: a checkpoint could not be written.
        """
        if due or self.settled.save or self.settled.stop:
            self.guards.phase("save")
            self.save()
        self.checkpoints.check()
        self.guards.phase("step")
        return self.settled.stop

    def close(self, last: int, rates: Rates) -> None:
        """Wait for the last checkpoint, and say how fast the run was.

        Raises:
            Stopped: the run was asked to stop before its `last` image.
            OSError: the checkpoint could not be written.
        """
        self.guards.phase("save")
        self.checkpoints.wait()
        if account := rates.summary():
            console.print(account)
        if self.images_seen < last:
            raise self.guards.requests.obeyed(self.images_seen)


def meet(device: torch.device, timeout_s: float, guards: Guards | None) -> None:
    """Join the other ranks; from here on a request is obeyed after a step.

    Raises:
        OSError: the other ranks are not there.
    """
    clock.mark("settings")
    start(device, timeout_s)
    if guards is not None:
        guards.requests.begin()
    clock.mark("rendezvous")


def claim(
    config: Any, run_dir: Path, groups: Groups, paths: Collection[str], flags: Flags = NO_FLAGS
) -> None:
    """Check that all ranks have the same settings, and make the run directory; a collective call.

    Args:
        paths: settings that may differ, and `flags`: see `check_same_command`.

    Raises:
        ValueError: ranks were started with other settings.
        OSError: `run_dir` cannot be written.
    """
    clock.mark("groups")
    with together(groups.world):
        check_same_command(config, groups.world, groups.rank, paths, flags)
        if groups.rank == 0:
            make_directories(run_dir)


Some = TypeVar("Some", bound=Run)


def carry_through(
    ranks: Ranks, config: Any, run_dir: Path, prepare: Callable[[Guards], Some], work: Callable[[Some], None]
) -> None:
    """Be the program of a run: on guard from before the ranks meet until they part, and saying how it ended.

    Args:
        prepare: makes the run, with the guards.
        work: trains it, and makes what is left in the end.
    """
    keep_freed_memory()
    export(ranks)
    lead = ranks.rank == 0
    guards = Guards(run_dir, config.checkpoint.every_minutes, lead)
    with ending(run_dir, lead) as end, guards.on_duty(config.faults, ranks.rank, ranks.world):
        end.run = run = prepare(guards)
        with parting(run.groups.world, end):
            work(run)
