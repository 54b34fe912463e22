"""Checkpoints, whole or not there at all: tensors by torch's DCP, everything else as JSON.

A checkpoint is a directory `images_<count>` with the files of DCP (torch.distributed.checkpoint), `meta.json`
and, written last, `.complete`. It is built under another name and renamed, so a killed or failed save leaves
no half checkpoint. Loading executes no code: tensors load with `weights_only`, and DCP's pickled index goes
through an unpickler that knows a handful of plain classes.
"""

from __future__ import annotations

import errno
import io
import json
import os
import pickle
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint.state_dict_loader as dcp_load
import torch.distributed.checkpoint.state_dict_saver as dcp_save
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

_PREFIX = "images_"
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
        import torch

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

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Return the index."""
        if self.index.storage_meta is None:
            self.index.storage_meta = StorageMeta()
        self.index.storage_meta.load_id = self.load_id
        return self.index


def save(root: Path, images: int, tensors: dict[str, Tensor], meta: dict[str, Any], keep: int) -> Path:
    """Write the checkpoint `root/images_<images>` and remove all but the newest `keep`.

    Raises:
        OSError: the file system refuses (full, read-only); the unfinished files are removed.
    """
    final = root / f"{_PREFIX}{images:012d}"
    partial = final.with_name(final.name + ".partial")
    for unfinished in root.glob(f"{_PREFIX}*.partial"):
        shutil.rmtree(unfinished, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        writer = FileSystemWriter(partial, single_file_per_rank=True, sync_files=True)
        with _without_remarks():
            dcp_save.save(dict(tensors), storage_writer=writer, no_dist=not dist.is_initialized())
        (partial / "meta.json").write_text(json.dumps(meta, indent=1) + "\n")
        (partial / ".complete").touch()
        shutil.rmtree(final, ignore_errors=True)
        os.replace(partial, final)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, KeyboardInterrupt):
            raise
        reason = _disk_error(error) or f"{type(error).__name__}: {error}"
        raise OSError(
            f"cannot save the checkpoint {final}: {reason}; nothing half-written is left"
        ) from error
    for old in complete(root)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return final


@contextmanager
def _without_remarks() -> Iterator[None]:
    """Silence DCP on itself: that it works without a process group, and (to torch 2.10) on its storages."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        warnings.filterwarnings("ignore", message="TypedStorage is deprecated")
        yield


def _disk_error(error: BaseException | None) -> str | None:
    """Find the operating system's own words in a chain of wrapped errors."""
    while error is not None:
        if isinstance(error, OSError) and error.errno is not None:
            return os.strerror(error.errno) + (" (free some space)" if error.errno == errno.ENOSPC else "")
        for inner in getattr(error, "failures", {}).values():
            found = _disk_error(inner[0])
            if found:
                return found
        error = error.__cause__ or error.__context__
    return None


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
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(
            f"the checkpoint {path} is damaged (meta.json: {error}); remove it to use the one before"
        ) from None
    return meta


def load(path: Path, tensors: dict[str, Tensor]) -> None:
    """Fill `tensors` in place from a complete checkpoint.

    Raises:
        ValueError: the checkpoint is damaged, its index names an unknown class, or it lacks one of `tensors`
            or its shape.
    """
    read_meta(path)
    try:
        reader = _SafeReader(path)
        saved = {
            name: tuple(getattr(entry, "size", ()))
            for name, entry in reader.index.state_dict_metadata.items()
        }
        different = [name for name, tensor in tensors.items() if saved.get(name) != tuple(tensor.shape)]
        if not different:
            with _without_remarks():
                dcp_load.load(dict(tensors), storage_reader=reader, no_dist=not dist.is_initialized())
            return
    except (
        OSError,
        EOFError,
        RuntimeError,
        AttributeError,
        pickle.UnpicklingError,
        CheckpointException,
    ) as error:
        reason = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"the checkpoint {path} is damaged ({reason}); remove it to use the one before"
        ) from error
    name = different[0]
    raise ValueError(
        f"the checkpoint {path} belongs to another model: {name} is {saved.get(name, 'missing')} there and "
        f"{tuple(tensors[name].shape)} here ({len(different)} of {len(tensors)} tensors differ)"
    )
