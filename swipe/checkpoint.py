"""Checkpoints, whole or not there at all: tensors by torch's DCP, everything else as JSON.

A checkpoint is a directory `images_<count>`: per pipeline stage a directory `stage_<number>`, which the
ranks of that stage write with DCP (torch.distributed.checkpoint), with its own index so that planning takes
as long for many stages as for one; then `meta.json` and, last, `.complete`. It is built under another name
and renamed, so a killed or failed save leaves no half checkpoint. A thread writes while training goes on.

Any layout of ranks loads what any other saved. Loading executes no code: tensors load with `weights_only`,
and DCP's pickled index goes through an unpickler that knows a handful of plain classes.
"""

from __future__ import annotations

import errno
import io
import json
import os
import pickle
import shutil
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint.state_dict_loader as dcp_load
import torch.distributed.checkpoint.state_dict_saver as dcp_save
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

_PREFIX, _PARTIAL = "images_", ".partial"
_INDEX_CLASSES = {
    "torch": {"Size", "device", "dtype", "layout", "strided", "memory_format"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "collections": {"OrderedDict"},
    "builtins": {"set", "frozenset"},
    "pathlib": {"Path", "PosixPath", "PurePosixPath"},
    "pathlib._local": {"Path", "PosixPath", "PurePosixPath"},
}


class _IndexUnpickler(pickle.Unpickler):
    """An unpickler for DCP's index that refuses every class but the index's own."""

    def find_class(self, module: str, name: str) -> Any:
        """Resolve a class of the index, or a torch dtype; nothing else."""
        if name in _INDEX_CLASSES.get(module, ()):
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise pickle.UnpicklingError(f"the checkpoint's index names {module}.{name}, which no index needs")


class _SafeReader(FileSystemReader):
    """DCP's file reader with its pickled index read once, by `_IndexUnpickler`."""

    def __init__(self, path: Path) -> None:
        """Read the index of the checkpoint at `path`."""
        super().__init__(path)
        self.index = _IndexUnpickler(io.BytesIO((path / ".metadata").read_bytes())).load()
        if not isinstance(self.index, Metadata):
            raise pickle.UnpicklingError("the checkpoint's index is not an index")
        # Tensors only: DCP would load any other entry with plain pickle.
        self.sizes = {
            name: tuple(entry.size)
            for name, entry in self.index.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Return the index."""
        if self.index.storage_meta is None:
            self.index.storage_meta = StorageMeta()
        self.index.storage_meta.load_id = self.load_id
        return self.index


class Checkpoints:
    """Saves the checkpoints of a run into one directory, in the background.

    Each rank has one, and all call `save` and `wait` in the same order. A save that fails on one rank fails
    on all, in the same words. Call `wait` before the program ends or its process groups are destroyed.

    Communication, by the writing thread, on `group` and `world` only: over dp, wp and sp DCP's plan and
    results (about 0.6 kB per shard of a tensor), to and from the first rank of the stage; over all axes three
    times 8 bytes, by which all ranks agree that all are well.
    """

    def __init__(
        self,
        root: Path,
        keep: int,
        stage: int = 0,
        stages: int = 1,
        group: dist.ProcessGroup | None = None,
        world: dist.ProcessGroup | None = None,
        lead: bool = True,
        asynchronous: bool = True,
    ) -> None:
        """Describe where to save; nothing is written yet.

        Args:
            root: directory of the checkpoints, one for all ranks.
            keep: newest complete checkpoints that stay.
            stage: pipeline stage of this rank, of `stages`.
            group: the ranks of this stage (gloo), used for nothing else; None in a single process.
            world: all ranks (gloo), used for nothing else; None in a single process.
            lead: whether this rank makes, renames and removes directories; true on one rank.
            asynchronous: whether `save` returns before the checkpoint is on disk.

        Raises:
            ValueError: a number is out of range, or there are several ranks and no groups.
        """
        if not 0 <= stage < stages or keep < 1:
            raise ValueError(f"stage {stage} of {stages}, keep {keep}: need 0 <= stage < stages, keep >= 1")
        alone = stages == 1 and not (dist.is_initialized() and dist.get_world_size() > 1)
        if (group is None) != (world is None) or (world is None and not alone):
            raise ValueError("several ranks save together: pass both the group of the stage and that of all")
        self.root, self.keep, self.stage, self.stages = root, keep, stage, stages
        self.group, self.world, self.lead, self.asynchronous = group, world, lead, asynchronous
        self._written = threading.Event()  # not Thread.join: interrupted, it takes the thread for ended
        self._written.set()
        self._failure: tuple[str, BaseException | None] | None = None

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
        _silence_remarks()
        text, unable = "", None
        try:
            text = json.dumps({**meta, "stages": self.stages}, indent=1) + "\n"
            if self.asynchronous:
                tensors = {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
        except Exception as error:  # most likely no memory; told to all ranks by the thread
            unable = error
        written = threading.Event()

        def write() -> None:
            self._save(images, tensors, text, unable)
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
        final = self.root / f"{_PREFIX}{images:012d}"
        partial = final.with_name(final.name + _PARTIAL)
        try:
            failure = (
                self._together(lambda: self._prepare(partial, unable))
                or self._together(lambda: self._write(partial / _stage_name(self.stage), tensors))
                or self._together(lambda: self._publish(partial, final, meta))
            )
            left = "nothing half-written is left"
            if failure:
                self._together(lambda: shutil.rmtree(partial, ignore_errors=True) if self.lead else None)
        except BaseException as error:  # of the communication itself: a rank is gone
            failure, left = (_reason(error), error), "the next save removes what is left of it"
        if failure:
            self._failure = f"cannot save the checkpoint {final}: {failure[0]}; {left}", failure[1]

    def _together(self, action: Callable[[], Any]) -> tuple[str, BaseException | None] | None:
        """Do `action` on every rank and wait for all of them.

        Bytes: an all-reduce of 8 over `world`; after a failure also its reason, broadcast.

        Returns:
            None if all went well; else, on all ranks, the reason of the first rank that failed, and the error
            of this rank if it has one.
        """
        error: BaseException | None = None
        try:
            action()
        except BaseException as caught:  # DCP's own errors are not Exceptions
            error = caught
        if self.world is None:
            return (_reason(error), error) if error else None
        size = dist.get_world_size(self.world)
        first = torch.tensor(dist.get_rank(self.world) if error else size)
        dist.all_reduce(first, op=dist.ReduceOp.MIN, group=self.world)
        if int(first) == size:
            return None
        reason = [self._where(error) + _reason(error) if error else ""]
        dist.broadcast_object_list(reason, dist.get_global_rank(self.world, int(first)), group=self.world)
        return reason[0], error

    def _where(self, error: BaseException) -> str:
        """Name the rank that failed: this one, or the one of this stage that DCP blames."""
        if isinstance(error, CheckpointException) and error.failures and self.group is not None:
            return f"rank {dist.get_global_rank(self.group, min(error.failures))}: "
        return f"rank {dist.get_rank()}: "

    def _prepare(self, partial: Path, unable: Exception | None) -> None:
        """Remove what killed saves left and make the directories, before any rank writes."""
        if unable is not None:
            raise unable
        if self.lead:
            for unfinished in self.root.glob(f"{_PREFIX}*{_PARTIAL}"):
                shutil.rmtree(unfinished, ignore_errors=True)
            for stage in range(self.stages):
                (partial / _stage_name(stage)).mkdir(parents=True)

    def _write(self, directory: Path, tensors: dict[str, Tensor]) -> None:
        """Write this stage's tensors, each rank its own shards."""
        # Nothing is copied ahead: the copies are on the CPU, and it would wait for the device's queue.
        writer = FileSystemWriter(
            directory, single_file_per_rank=True, sync_files=True, per_thread_copy_ahead=0
        )
        dcp_save.save(tensors, storage_writer=writer, process_group=self.group, no_dist=self.world is None)

    def _publish(self, partial: Path, final: Path, meta: str) -> None:
        """Complete and rename the checkpoint, and remove old ones."""
        if not self.lead:
            return
        with (partial / "meta.json").open("w") as file:
            file.write(meta)
            file.flush()
            os.fsync(file.fileno())
        (partial / ".complete").touch()
        replaced = final.with_name(f"{final.name}.replaced{_PARTIAL}")
        if final.exists():
            os.replace(final, replaced)
        os.replace(partial, final)
        for old in (replaced, *complete(self.root)[: -self.keep]):
            shutil.rmtree(old, ignore_errors=True)


def _stage_name(stage: int) -> str:
    """Name the directory of a pipeline stage inside a checkpoint."""
    return f"stage_{stage:03d}"


def _silence_remarks() -> None:
    """Silence DCP on itself: that it works without a process group, and (to torch 2.10) on its storages.

    For good, and by the caller's thread: `catch_warnings` would undo what other threads do to the filters.
    """
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")
    warnings.filterwarnings("ignore", message="TypedStorage is deprecated")


def _reason(error: BaseException) -> str:
    """Describe a failure on one line, in the operating system's words if it is one of its errors."""
    while isinstance(error, CheckpointException) and error.failures:
        error = error.failures[min(error.failures)][0]
    link: BaseException | None = error
    while link is not None:
        if isinstance(link, OSError) and link.errno is not None:
            where = f" ({link.filename})" if link.filename else ""
            return os.strerror(link.errno) + (" (free some space)" if link.errno == errno.ENOSPC else where)
        link = link.__cause__ or link.__context__
    return f"{type(error).__name__}: {error}".splitlines()[0]


def complete(root: Path) -> list[Path]:
    """List the complete checkpoints under `root`, oldest first."""
    return sorted(path.parent for path in root.glob(f"{_PREFIX}*/.complete") if not path.parent.suffix)


def read_meta(path: Path) -> dict[str, Any]:
    """Read the JSON part of a complete checkpoint.

    Raises:
        ValueError: there is no complete checkpoint at `path`, or its JSON is damaged.
    """
    if not (path / ".complete").exists():
        raise ValueError(f"{path} is not a complete checkpoint")
    try:
        meta: dict[str, Any] = json.loads((path / "meta.json").read_text())
    except (OSError, ValueError) as error:
        raise ValueError(
            f"the checkpoint {path} is damaged (meta.json: {error}); remove it to use the one before"
        ) from None
    return meta


def load(path: Path, tensors: dict[str, Tensor], near: float = 0.0) -> None:
    """Fill `tensors` in place from a complete checkpoint, without communication.

    Each is read from the stage that holds it, however many stages and ranks saved it; of a DTensor only this
    rank's shard is read.

    Args:
        path: the checkpoint.
        tensors: plain tensors or DTensors of the saved global shapes, by name; all or some of the saved ones.
        near: where to look first, as this rank's stage / stages: there, one or two indices suffice.

    Raises:
        ValueError: the checkpoint is damaged, its index names an unknown class, or it lacks one of `tensors`
            or its shape; then nothing was changed, unless data are damaged.
    """
    stages = read_meta(path).get("stages")
    missing, saved, parts = dict(tensors), dict[str, tuple[int, ...]](), []
    with _damage_is_named(path):
        for directory in _directories(path, stages, near):
            if missing:
                reader = _SafeReader(directory)
                part = {name: missing.pop(name) for name in reader.sizes if name in missing}
                saved |= {name: reader.sizes[name] for name in part}
                parts.append((reader, part))
    different = [name for name, tensor in tensors.items() if saved.get(name) != tuple(tensor.shape)]
    if different:
        name = different[0]
        there, here = saved.get(name, "missing"), tuple(tensors[name].shape)
        raise ValueError(
            f"the checkpoint {path} belongs to another model: {name} is {there} there and {here} here "
            f"({len(different)} of {len(tensors)} tensors differ)"
        )
    _silence_remarks()
    with _damage_is_named(path):
        for reader, part in parts:
            if part:
                dcp_load.load(part, storage_reader=reader, no_dist=True)


def _directories(path: Path, stages: int | None, near: float) -> list[Path]:
    """List the directories with an index, those about `near` of the way through the stages first."""
    if stages is None:
        return [path]  # written when there was one stage only
    first = int(near * stages + 1e-9)
    order = sorted(range(stages), key=lambda stage: abs(stage - first - 0.25))
    return [path / _stage_name(stage) for stage in order]


@contextmanager
def _damage_is_named(path: Path) -> Iterator[None]:
    """Turn what a damaged checkpoint may raise, which is nearly anything, into words for its owner."""
    try:
        yield
    except (Exception, CheckpointException) as error:
        if any(isinstance(inner[0], KeyboardInterrupt) for inner in getattr(error, "failures", {}).values()):
            raise KeyboardInterrupt from None
        raise ValueError(
            f"the checkpoint {path} is damaged ({_reason(error)}); remove it to use the one before"
        ) from error
