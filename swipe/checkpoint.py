"""Saving checkpoints, whole or not there at all: tensors by torch's DCP, everything else as JSON.

A checkpoint is a directory `images_<count>`: per pipeline stage a directory `stage_<number>`, which the
ranks of that stage write with DCP (torch.distributed.checkpoint), with its own index so that planning takes
as long for many stages as for one, and its `checksums.json`; then `meta.json` and, last, `.complete`, which
vouches for both (swipe/checksums.py). It is built under another name and renamed, so a killed or failed save
leaves no half checkpoint. A thread writes while training goes on. `load` and what else reads them is in
swipe/checkpoint_reading.py, and the choice of one to go on from in swipe/resume.py.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint.state_dict_saver as dcp_save
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from swipe.checkpoint_errors import reason
from swipe.checkpoint_files import INDEX, StageWriter
from swipe.checkpoint_reading import (
    PARTIAL,
    PREFIX,
    REPLACED,
    complete,
    load,
    put_back,
    read_meta,
    silence_remarks,
)
from swipe.checksums import COMPLETE, LIST, META, Sum, digest, stage_name, verify, write_list, write_text
from swipe.collectives import ALONE, agree
from swipe.groups import Groups

__all__ = ["Checkpoints", "complete", "load", "read_meta"]


class Checkpoints:
    """Saves the checkpoints of a run into one directory, in the background.

    Each rank has one, and all call `save` and `wait` in the same order. A save that fails on one rank fails
    on all, in the same words. Call `wait` before the program ends or its process groups are destroyed.

    Communication, by the writing thread, on the groups for saving only: over dp, wp and sp DCP's plan and
    results (about 0.6 kB per shard of a tensor), to and from the first rank of the stage, and to it the
    checksum of each file (0.1 kB); over all axes four times 8 bytes, by which all ranks agree that all are
    well.
    """

    def __init__(
        self,
        root: Path,
        keep: int,
        groups: Groups | None = None,
        asynchronous: bool = True,
    ) -> None:
        """Describe where to save; nothing is written yet.

        Args:
            root: directory of the checkpoints, one for all ranks.
            keep: newest complete checkpoints that stay, not counting any that lack a file or a part of one
                when first seen here.
            groups: this rank's; those for `saving` are used for nothing else. None in a single process.
            asynchronous: whether `save` returns before the checkpoint is on disk.

        Raises:
            ValueError: nothing would be kept, or there are several ranks and no groups.
        """
        if keep < 1:
            raise ValueError(f"keep is {keep}: at least 1 checkpoint stays")
        if groups is None and dist.is_initialized() and dist.get_world_size() > 1:
            raise ValueError("several ranks save together: pass their groups")
        self.root, self.keep, self.asynchronous = root, keep, asynchronous
        self.stage, self.stages, self.lead, self.world = 0, 1, True, ALONE
        self.group: dist.ProcessGroup | None = None  # the ranks of this stage; the first one makes its lists
        if groups is not None:
            self.stage, self.stages = groups.dims.coordinate(groups.rank).pp, groups.dims.pp
            self.lead = groups.rank == 0  # makes, renames and removes directories
            self.group, self.world = groups.saving[0].handle, groups.saving[1]
        self._written = threading.Event()  # not Thread.join: interrupted, it takes the thread for ended
        self._written.set()
        self._failure: tuple[str, BaseException | None] | None = None
        self._sums: dict[str, Sum] = {}  # of the files this rank wrote last
        self._whole: dict[Path, bool] = {}  # which complete checkpoints are, as they were when first seen

    def save(self, images: int, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
        """Save the checkpoint `images_<images>` and return as soon as `tensors` are copied.

        An earlier save is waited for first. Old checkpoints go when this one is complete.

        Args:
            images: images seen.
            tensors: this stage's tensors by name. One that several ranks name is a DTensor, or plain and
                equal on all of them; a rank may also name tensors that no other has. The copies are on the
                CPU and live until they are written.
            meta: anything JSON can hold; the lead's is written, with the number of `stages`.

        Raises:
            OSError: an earlier save failed on some rank, and this one is not begun; or, if not asynchronous,
                this one failed.
        """
        self.wait()
        silence_remarks()
        text, unable, copies = "", None, dict(tensors)
        try:
            text = json.dumps({**meta, "stages": self.stages}, indent=1) + "\n"
            if self.asynchronous:
                copies = {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
        except Exception as error:  # most likely no memory; told to all ranks by the thread
            unable = error
        written = threading.Event()

        def write() -> None:
            self._save(images, copies, text, unable)
            if self._failure is not None:
                _drop_tracebacks(self._failure[1])
            written.set()

        threading.Thread(target=write).start()  # no daemon: an early end still finishes its checkpoint
        self._written = written
        if not self.asynchronous:
            self.wait()

    def wait(self) -> None:
        """Wait until the last save is on disk.

        Raises:
            OSError: it failed on some rank; says which and why. Raised once, on every rank.
        """
        self._written.wait()
        try:
            self.check()
        finally:
            self._failure = None

    def check(self) -> None:
        """Raise if the last save has failed by now, without waiting or communicating.

        One rank may see a failure a moment before another. `wait` and `save` raise it again, so that they do
        so on all ranks.

        Raises:
            OSError: it failed on some rank; says which and why.
        """
        if self._failure is not None:
            message, cause = self._failure
            raise OSError(message) from cause

    def _save(self, images: int, tensors: dict[str, Tensor], meta: str, unable: Exception | None) -> None:
        """Write a checkpoint, in the thread; keep what goes wrong for `check`."""
        final = self.root / f"{PREFIX}{images:012d}"
        partial = final.with_name(final.name + PARTIAL)
        try:
            failure = (
                self._together(lambda: self._prepare(partial, unable))
                or self._together(lambda: self._write(partial / stage_name(self.stage), tensors))
                or self._together(lambda: self._list(partial / stage_name(self.stage)))
                or self._together(lambda: self._publish(partial, final, meta))
            )
            left = "nothing half-written is left"
            if failure:
                self._together(self._tidy)
        except BaseException as error:  # of the communication itself: a rank is gone
            failure, left = (reason(error), error), "the next save removes what is left of it"
        if failure:
            self._failure = f"cannot save the checkpoint {final}: {failure[0]}; {left}", failure[1]

    def _together(self, action: Callable[[], Any]) -> tuple[str, BaseException | None] | None:
        """Do `action` on every rank and wait for all of them.

        Bytes: those of `agree` over all ranks.

        Returns:
            None if all went well; else, on all ranks, the reason of the first rank that failed, and the error
            of this rank if it has one.
        """
        error: BaseException | None = None
        try:
            action()
        except BaseException as caught:  # DCP's own errors are not Exceptions
            error = caught
        said = agree(self.world, None if error is None else self._where(error) + reason(error))
        return None if said is None else (said, error)

    def _where(self, error: BaseException) -> str:
        """Name the rank that failed: this one, or the one of this stage that DCP blames; alone, none."""
        if self.group is None:
            return ""
        if isinstance(error, CheckpointException) and error.failures:
            return f"rank {dist.get_global_rank(self.group, min(error.failures))}: "
        return f"rank {dist.get_rank()}: "

    def _prepare(self, partial: Path, unable: Exception | None) -> None:
        """Remove what killed saves left and make the directories, before any rank writes."""
        if unable is not None:
            raise unable
        self._tidy()
        if self.lead:
            for stage in range(self.stages):
                (partial / stage_name(stage)).mkdir(parents=True)

    def _tidy(self) -> None:
        """Remove every checkpoint that is not whole, and put back one that made room for such."""
        if self.lead:
            put_back(self.root)
            for unfinished in self.root.glob(f"{PREFIX}*{PARTIAL}"):
                shutil.rmtree(unfinished, ignore_errors=True)

    def _write(self, directory: Path, tensors: dict[str, Tensor]) -> None:
        """Write this stage's tensors, each rank its own shards, and digest what this rank wrote."""
        writer = StageWriter(directory)
        dcp_save.save(tensors, storage_writer=writer, process_group=self.group, no_dist=self.group is None)
        self._sums = {name: digest(directory / name) for name in writer.names}

    def _list(self, directory: Path) -> None:
        """Write the checksums of this stage, on its first rank."""
        lists: list[Any] = [self._sums]
        if self.group is not None:
            first = dist.get_rank(self.group) == 0
            lists = [None] * dist.get_world_size(self.group) if first else []
            to = dist.get_global_rank(self.group, 0)
            dist.gather_object(self._sums, lists if first else None, dst=to, group=self.group)
        if lists:
            sums = {name: known for some in lists for name, known in some.items()}
            write_list(directory / LIST, sums | {INDEX: digest(directory / INDEX)})
            _sync_directory(directory)

    def _publish(self, partial: Path, final: Path, meta: str) -> None:
        """Complete and rename the checkpoint, and remove old ones."""
        if not self.lead:
            return
        write_text(partial / META, meta)
        lists = [f"{stage_name(stage)}/{LIST}" for stage in range(self.stages)]
        write_list(partial / COMPLETE, {file: digest(partial / file) for file in (META, *lists)})
        _sync_directory(partial)
        replaced = final.with_name(final.name + REPLACED + PARTIAL)
        if final.exists():
            os.replace(final, replaced)
        os.replace(partial, final)
        _sync_directory(self.root)
        _remove(replaced)
        self._whole[final] = True
        self._remove_old()

    def _remove_old(self) -> None:
        """Remove what is older than the newest `keep` good checkpoints; a damaged one does not count.

        Each is looked at once: a large one has a file per rank, and all ranks wait for this.
        """
        found, good = complete(self.root), 0
        for path in reversed(found) if len(found) > self.keep else ():
            if good >= self.keep:
                _remove(path)
                self._whole.pop(path, None)
                continue
            if path not in self._whole:
                self._whole[path] = _is_whole(path)
            good += self._whole[path]


def _is_whole(path: Path) -> bool:
    """Tell whether all files of a complete checkpoint are there, in their sizes."""
    try:
        verify(path, contents=False)
    except (ValueError, OSError):
        return False
    return True


def _remove(path: Path) -> None:
    """Remove a checkpoint, if it is there, so that it is never half there under its name."""
    unnamed = path if path.suffix == PARTIAL else path.with_name(path.name + PARTIAL)
    with suppress(OSError):  # what cannot be removed now is tried again with the next save
        if path != unnamed:
            os.replace(path, unnamed)
        shutil.rmtree(unnamed, ignore_errors=True)


def _sync_directory(path: Path) -> None:
    """Wait until the names in a directory are on disk, where the file system can tell."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


def _drop_tracebacks(error: BaseException | None) -> None:
    """Let go of the frames that an error and its causes went through: they hold the copies."""
    pending, seen = [error], set[int]()
    while pending:
        link = pending.pop()
        if link is not None and id(link) not in seen:
            seen.add(id(link))
            link.__traceback__ = None
            pending += [link.__cause__, link.__context__]
            pending += [inner[0] for inner in getattr(link, "failures", {}).values()]
