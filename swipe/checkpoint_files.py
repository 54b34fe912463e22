"""DCP's files of one stage: written with a note of their names, and read without running code.

DCP (torch.distributed.checkpoint) writes a data file per rank, `__<rank>_0.distcp`, and an index `.metadata`,
which is a pickle. The index goes through an unpickler that knows a handful of plain classes; tensors load
with `weights_only`.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterable
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner

from swipe.checkpoint_errors import Damaged

INDEX = ".metadata"
"""Name of DCP's index."""
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
        if (module, name) == ("builtins", "getattr"):
            return _member
        if name in _INDEX_CLASSES.get(module, ()):
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise pickle.UnpicklingError(f"the checkpoint's index names {module}.{name}, which no index needs")


def _member(kind: Any, name: Any) -> Any:
    """Stand in for `getattr`, by which Python 3.11.0 to 3.11.3 pickles members of enums: for these alone."""
    if isinstance(kind, type) and issubclass(kind, Enum) and name in kind.__members__:
        return kind[name]
    raise pickle.UnpicklingError(f"the checkpoint's index asks for {name} of {kind}, which no index needs")


class StageReader(FileSystemReader):
    """DCP's file reader with its pickled index read once, by `_IndexUnpickler`."""

    def __init__(self, path: Path) -> None:
        """Read the index of the stage at `path`."""
        super().__init__(path)
        self.directory = path
        self.index = _IndexUnpickler(io.BytesIO((path / INDEX).read_bytes())).load()
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

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Any:
        """Read what is planned, if the files are long enough.

        Raises:
            Damaged: a file is missing or too short.
        """
        needed = self._extents(self.index.storage_data[item.storage_index] for item in plan.items)
        for name, size in needed.items():
            found = (self.directory / name).stat().st_size
            if found < size:
                raise Damaged(f"{self.directory.name}/{name}", f"has {found:,} bytes, {size:,} were saved")
        return super().read_data(plan, planner)

    def extents(self) -> dict[str, int]:
        """Return how many bytes the index needs each data file to have, by name.

        Raises:
            Damaged: it names a file outside its directory.
        """
        return self._extents(self.index.storage_data.values())

    def _extents(self, entries: Iterable[Any]) -> dict[str, int]:
        needed: dict[str, int] = {}
        for entry in entries:
            name = str(entry.relative_path)
            needed[name] = max(needed.get(name, 0), entry.offset + entry.length)
        for name in needed:
            if name != Path(name).name:
                raise Damaged(f"{self.directory.name}/{INDEX}", f"names {name}, which is not beside it")
        return needed


class StageWriter(FileSystemWriter):
    """DCP's file writer that notes which files this rank wrote anything into."""

    def __init__(self, path: Path) -> None:
        """Write into the directory `path`, one file per rank, on disk before it is called written."""
        # Nothing is copied ahead: the copies are on the CPU, and it would wait for the device's queue.
        super().__init__(path, single_file_per_rank=True, sync_files=True, per_thread_copy_ahead=0)
        self.names: set[str] = set()

    def write_data(self, *args: Any, **kwargs: Any) -> Any:
        """Write this rank's data; the future holds DCP's results."""
        future = super().write_data(*args, **kwargs)
        self.names |= {result.storage_data.relative_path for result in future.value()}
        return future
