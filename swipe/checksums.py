"""Checksums of a checkpoint: SHA-256 and size of every file, and whether the files are still that.

`stage_<number>/checksums.json` lists the data files and the index of a stage, and `.complete` lists those
lists and `meta.json`, so that `.complete` vouches for all. Each rank digests the file it wrote, and when a
run goes on each verifies a share. SHA-256 and not a faster sum: today's processors have instructions for it
(1.8 GB/s on one core; the fastest of hashlib but SHA-1), and a match means the same bytes.

A checkpoint from before there were checksums has an empty `.complete`; of it only sizes can be checked.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from swipe.checkpoint_errors import Damaged, reason
from swipe.checkpoint_files import INDEX, StageReader

LIST, COMPLETE, META = "checksums.json", ".complete", "meta.json"
_PIECE = 1 << 20  # bytes read at a time; hashlib works on them without the interpreter's lock
_GONE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EIO)  # other errors are not the file's fault


class Sum(NamedTuple):
    """What a file was when it was saved."""

    bytes: int
    sha256: str = ""
    """In hexadecimal; empty: not known, and the file may be longer."""


def stage_name(stage: int) -> str:
    """Name the directory of a pipeline stage inside a checkpoint."""
    return f"stage_{stage:03d}"


def digest(path: Path) -> Sum:
    """Read a file and return its size and SHA-256."""
    sha, size, buffer = hashlib.sha256(), 0, memoryview(bytearray(_PIECE))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            sha.update(buffer[:count])
            size += count
    return Sum(size, sha.hexdigest())


def write_text(path: Path, text: str) -> None:
    """Write a small file that is on disk when this returns."""
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def write_list(path: Path, sums: dict[str, Sum]) -> None:
    """Write a list of checksums, by file name, to disk."""
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(sums[name])}" for name in sorted(sums))
    write_text(path, "{" + lines + "}")  # its last byte matters: one that is cut off is no list


def _read_list(path: Path, file: str) -> dict[str, Sum]:
    """Read the list `file` of the checkpoint at `path`; nothing of its content is trusted.

    Raises:
        Damaged: it cannot be such a list.
    """
    try:
        found: Any = json.loads((path / file).read_bytes())
        sums = {name: Sum(*entry) for name, entry in found.items()}
    except (ValueError, TypeError, AttributeError, RecursionError):
        raise Damaged(file, "is not a list of checksums") from None
    except OSError as error:
        raise _fault(file, error) from None
    if any(type(known.bytes) is not int or not isinstance(known.sha256, str) for known in sums.values()):
        raise Damaged(file, "is not a list of checksums")
    return sums


def _fault(file: str, error: OSError) -> Exception:
    """Tell a file that is damaged from one that cannot be read at the moment or by this user."""
    if error.errno not in _GONE:
        return error
    return Damaged(file, "is missing" if error.errno == errno.ENOENT else os.strerror(error.errno or 0))


def check_file(path: Path, file: str, known: Sum, contents: bool = True) -> None:
    """Check one file of the checkpoint at `path`.

    Raises:
        Damaged: it is missing, has another size or, with `contents`, another SHA-256.
        OSError: it cannot be read at the moment or by this user.
    """
    try:
        status = (path / file).stat()
        if not stat.S_ISREG(status.st_mode):
            raise Damaged(file, "is no file")
        if status.st_size < known.bytes or (known.sha256 and status.st_size != known.bytes):
            raise Damaged(file, f"has {status.st_size:,} bytes, {known.bytes:,} were saved")
        if contents and known.sha256 and digest(path / file) != known:
            raise Damaged(file, "has other bytes than were saved (its SHA-256 differs)")
    except OSError as error:
        raise _fault(file, error) from None


def verify(path: Path, share: int = 0, of: int = 1, contents: bool = True) -> None:
    """Check a share of a complete checkpoint's files; all shares together check every file.

    A share reads `meta.json`, the lists of the stages it has a part in (of one stage if there are more shares
    than stages), and its part of their files.

    Args:
        path: the checkpoint.
        share: which one, of `of`; usually the rank, of all ranks.
        of: how many shares there are.
        contents: whether to read the data; else they must be there and have the right sizes.

    Raises:
        Damaged: a file is not what was saved; names the first.
        OSError: one cannot be read at the moment or by this user.
    """
    vouched = _vouched(path)
    directories = _directories(path)
    for stage, first, every in _part(len(directories), share, of):
        files = _stage_files(path, directories[stage], vouched)
        for file in sorted(files)[first::every]:
            check_file(path, file, files[file], contents)


def verify_file(path: Path, file: str) -> None:
    """Check one file of a checkpoint, and what vouches for it; see `verify`."""
    vouched = _vouched(path)
    for directory in _directories(path):
        if "/" not in file or file.startswith(f"{directory}/"):
            files = _stage_files(path, directory, vouched)
            if file in files:
                check_file(path, file, files[file])


def _vouched(path: Path) -> dict[str, Sum]:
    """Read what `.complete` vouches for, and check `meta.json`; nothing if there were no checksums yet."""
    try:
        old = not (path / COMPLETE).stat().st_size
    except OSError as error:
        raise _fault(COMPLETE, error) from None
    if old:
        if (path / stage_name(0) / LIST).exists():
            raise Damaged(COMPLETE, "is empty")
        return {}
    vouched = _read_list(path, COMPLETE)
    if META not in vouched:
        raise Damaged(COMPLETE, f"does not list {META}")
    check_file(path, META, vouched[META])
    return vouched


def _directories(path: Path) -> list[str]:
    """Name the directories of the stages; "" is the checkpoint's own, from before there were stages."""
    try:
        stages = json.loads((path / META).read_bytes()).get("stages")
        if stages is not None and (type(stages) is not int or not 0 < stages < 10**6):
            raise ValueError
    except OSError as error:
        raise _fault(META, error) from None
    except (ValueError, TypeError, AttributeError, RecursionError):
        raise Damaged(META, "is not the JSON of a checkpoint") from None
    return [""] if stages is None else [stage_name(stage) for stage in range(stages)]


def _stage_files(path: Path, directory: str, vouched: dict[str, Sum]) -> dict[str, Sum]:
    """List the files of a stage by their names inside the checkpoint, after checking the list."""
    if not vouched:
        return _indexed_files(path, directory)
    file = f"{directory}/{LIST}"
    if file not in vouched:
        raise Damaged(COMPLETE, f"does not list {file}")
    check_file(path, file, vouched[file])
    listed = _read_list(path, file)
    for name in listed:
        if name != Path(name).name:
            raise Damaged(file, f"names {name}, which is not beside it")
    return {f"{directory}/{name}": known for name, known in listed.items()}


def _indexed_files(path: Path, directory: str) -> dict[str, Sum]:
    """List what the index of a stage without checksums needs, by how long the files must be at least."""
    file = f"{directory}/{INDEX}" if directory else INDEX
    try:
        extents = StageReader(path / directory).extents()
    except Damaged:
        raise
    except OSError as error:
        raise _fault(file, error) from None
    except Exception as error:  # a damaged pickle may raise nearly anything
        raise Damaged(file, reason(error)) from None
    return {str(Path(directory, name)): Sum(size) for name, size in extents.items()}


def _part(stages: int, share: int, of: int) -> Iterator[tuple[int, int, int]]:
    """Deal stages to shares: which stages a share works on, and its number and their number at each."""
    if of <= stages:
        yield from ((stage, 0, 1) for stage in range(share, stages, of))
    elif stages:
        stage = share * stages // of
        begin, end = -(-stage * of // stages), -(-(stage + 1) * of // stages)
        yield stage, share - begin, end - begin
