"""`python -m launch stage ARCHIVE DIR`, one rank on every node: a packed environment on the node's own disk.

One rank reads the archive and sends it to the others in pieces by MPI (mpi4py); without that each reads it.
What is there already stays. The directory is named by the archive's checksum; it is complete or not there.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import socket
import stat
import subprocess
import sys
import tarfile
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from launch import exits
from launch.hosts import counted
from launch.pack import CHECKSUM
from launch.rank import discover, leave

PIECE_BYTES = 1 << 24
_SHOWN = 100  # nodes whose disk fails; a job puts aside those that are named


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument("archive", type=Path, metavar="ARCHIVE", help="made by python -m launch pack")
    parser.add_argument("directory", type=Path, metavar="DIR", help="on a disk of the node")


def place(archive: Path, directory: Path) -> Path:
    """Return where an archive is unpacked under `directory`.

    Raises:
        ValueError: nobody says which archive it is.
    """
    try:
        digest = _digest(archive)
    except (OSError, IndexError):
        raise ValueError(f"{archive}{CHECKSUM} is missing: make both by python -m launch pack") from None
    return directory / f"aeris-{os.getuid()}" / digest[:16]


def environ(staged: Path) -> dict[str, str]:
    """Return what a program that runs on the Python of `staged` must find in its environment.

    With `-m` Python looks in the working directory before anywhere else, where a copy of the project is most
    likely: PYTHONSAFEPATH leaves that out (Python 3.11 and later; before, every rank reads it there). So too
    if the environment was packed without the project.
    """
    return {"PYTHONSAFEPATH": "1"} if any(staged.glob("lib/python*/site-packages/aeris")) else {}


def run(arguments: argparse.Namespace) -> int:
    """Unpack the archive on this node, with the others; return the exit status.

    Raises:
        ValueError: the archive has no checksum.
    """
    archive, target = arguments.archive, place(arguments.archive, arguments.directory)
    ranks = discover(os.environ)
    mpi = _communicator(ranks.world)
    missing = not target.is_dir()
    problem, count = "", 0
    if fresh := mpi.allreduce(int(missing)) if mpi else int(missing):
        pieces = Pieces(archive, mpi)
        if ranks.rank == 0:
            print(f"stages {_size(archive)} on {counted(fresh if mpi else ranks.world, 'node')}", flush=True)
        try:
            if missing:
                count = _unpack(pieces, target, _digest(archive))
        except (OSError, ValueError, tarfile.TarError, EOFError) as error:
            problem = f"{socket.gethostname()} could not be staged: {error}"
        finally:
            pieces.drain()  # whoever fails here still takes part
    problems = [text for text in (mpi.allgather(problem) if mpi else [problem]) if text]
    if ranks.rank == 0 or not mpi:
        for text in problems[:_SHOWN]:
            print(f"error: {text}", file=sys.stderr, flush=True)
        if not problems and ranks.rank == 0:
            how = f"{counted(count, 'file')}, " + ("sent by rank 0" if mpi else "read by each")
            nodes = counted(ranks.world, "node")
            print(f"{target}: on {nodes}, {how if missing else 'was there'}", flush=True)
    leave()
    return exits.IO if problems else exits.DONE


class Pieces:
    """An archive as a stream: read by this process, or by rank 0 and sent to all."""

    def __init__(self, archive: Path, mpi: Any = None) -> None:
        """Read nothing yet; `mpi` is a communicator, and all its ranks take the same number of pieces."""
        self.digest = hashlib.sha256()
        self._mpi, self._archive, self._over = mpi, archive, False
        self._piece, self._at = b"", 0
        self._file: IO[bytes] | None = None

    def read(self, size: int) -> bytes:
        """Return up to `size` bytes, "" at the end; OSError if they cannot be read, on every rank."""
        if self._at >= len(self._piece):
            self._piece, self._at = self._next(), 0
        data = self._piece[self._at : self._at + size]
        self._at += len(data)
        return data

    def drain(self) -> None:
        """Take what is left, without keeping it, and close the archive."""
        while not self._over:
            with suppress(OSError):
                self._next()
        if self._file is not None:
            self._file.close()
            self._file = None

    def _next(self) -> bytes:
        if self._over:
            return b""
        piece: bytes | str = b""
        if self._mpi is None or self._mpi.Get_rank() == 0:
            piece = self._from_file()
        if self._mpi is not None:
            piece = self._mpi.bcast(piece)
        self._over = not piece or isinstance(piece, str)
        if isinstance(piece, str):
            raise OSError(f"{self._archive}: {piece}")
        self.digest.update(piece)
        return piece

    def _from_file(self) -> bytes | str:
        """Read a piece, or the reason why not."""
        try:
            self._file = self._file or self._archive.open("rb")
            return self._file.read(PIECE_BYTES)
        except OSError as error:
            return error.strerror or str(error)


def _unpack(pieces: Pieces, target: Path, digest: str) -> int:
    """Unpack beside `target`, check, and rename; return the number of files.

    Raises:
        ValueError: the archive is not the one it should be, or leads outside; its Python does not start.
        OSError: it cannot be read or written.
    """
    own = target.parent
    own.mkdir(mode=0o700, parents=True, exist_ok=True)
    state = own.lstat()
    if not stat.S_ISDIR(state.st_mode) or state.st_uid != os.getuid() or state.st_mode & 0o022:
        raise ValueError(f"{own} is not only ours to write: remove it, or stage elsewhere")
    partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
    try:
        partial.mkdir(mode=0o700)
        count = 0
        with tarfile.open(fileobj=pieces, mode="r|*") as tar:  # type: ignore[call-overload]
            for member in tar:
                extract(tar, member, partial)
                count += 1
        pieces.drain()
        if pieces.digest.hexdigest() != digest:
            raise ValueError("the archive is damaged, or its checksum is another archive's: pack it again")
        python = [str(partial / "bin" / "python"), "-I", "-c", "pass"]
        if subprocess.run(python, check=False, capture_output=True, timeout=120).returncode:
            raise ValueError("its Python does not start on this node: what it is based on is not here")
        try:
            partial.rename(target)
        except OSError:
            if not target.is_dir():  # another process of this node was faster
                raise
    except subprocess.SubprocessError as error:
        raise OSError(str(error)) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return count


def extract(tar: tarfile.TarFile, member: tarfile.TarInfo, root: Path) -> None:
    """Extract a file, directory or link that stays under `root`.

    Raises:
        ValueError: it does not, or it is a device.
    """
    inside = root.resolve()
    ends = [root / member.name]
    if member.issym():
        ends.append(ends[0].parent / member.linkname)
    elif member.islnk():
        ends.append(root / member.linkname)
    elif not (member.isreg() or member.isdir()):
        raise ValueError(f"the archive holds {member.name}, which is neither a file nor a link")
    if outside := [end for end in ends if not end.resolve().is_relative_to(inside)]:
        raise ValueError(f"the archive's {member.name} leads outside, to {outside[0]}")
    if hasattr(tarfile, "data_filter"):
        tar.extract(member, root, filter="data")
    else:  # Python 3.10 and 3.11 before their security releases of 2023
        tar.extract(member, root, set_attrs=member.isreg())


def _size(archive: Path) -> str:
    """Name an archive, with what it holds and its size, if its size can be read."""
    try:
        return f"{archive}, {archive.stat().st_size / 2**20:,.0f} MiB,"
    except OSError:
        return f"{archive}"


def _digest(archive: Path) -> str:
    return archive.with_name(archive.name + CHECKSUM).read_text(encoding="utf-8").split()[0]


def _communicator(world: int) -> Any:
    """Return MPI's communicator of all ranks; None for one rank, and where mpi4py does not work."""
    if world == 1:
        return None
    try:
        import mpi4py

        mpi4py.rc.finalize = False  # a rank that fails must not wait for those that wait for it
        from mpi4py import MPI
    except (ImportError, RuntimeError):
        return None
    return MPI.COMM_WORLD if MPI.COMM_WORLD.Get_size() == world else None
