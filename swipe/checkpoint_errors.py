"""Words for what goes wrong with a checkpoint: one line, in the operating system's words where it has any."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch.distributed.checkpoint.api import CheckpointException


class Damaged(ValueError):
    """A file of a checkpoint is not what was saved."""

    def __init__(self, file: str, what: str) -> None:
        """Name the file.

        Args:
            file: its name inside the checkpoint, such as "stage_000/__0_0.distcp".
            what: what is wrong with it.
        """
        super().__init__(f"{file}: {what}")
        self.file = file


def reason(error: BaseException) -> str:
    """Describe a failure on one line, in the operating system's words if it is one of its errors."""
    while isinstance(error, CheckpointException) and error.failures:
        error = error.failures[min(error.failures)][0]
    if isinstance(error, Damaged):
        return str(error)
    link: BaseException | None = error
    while link is not None:
        if isinstance(link, OSError) and link.errno is not None:
            where = f" ({link.filename})" if link.filename else ""
            full = link.errno in (errno.ENOSPC, errno.EDQUOT)
            return os.strerror(link.errno) + (" (free some space)" if full else where)
        link = link.__cause__ or link.__context__
    return f"{type(error).__name__}: {error}".splitlines()[0]


@contextmanager
def damage_is_named(path: Path) -> Iterator[None]:
    """Turn what a damaged checkpoint may raise, which is nearly anything, into words for its owner.

    Raises:
        ValueError: whatever was raised inside, with the checkpoint's `path` and what to do.
    """
    try:
        yield
    except (Exception, CheckpointException) as error:
        if any(isinstance(inner[0], KeyboardInterrupt) for inner in getattr(error, "failures", {}).values()):
            raise KeyboardInterrupt from None
        raise ValueError(
            f"the checkpoint {path} is damaged ({reason(error)}); remove it to use the one before"
        ) from error
