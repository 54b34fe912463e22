"""`python -m launch pack VENV ARCHIVE`: a Python environment as one file, for `launch stage` to put on nodes.

Thousands of small files are read slowly from a parallel file system by thousands of nodes; one is not.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import tarfile
from pathlib import Path

from launch import exits

CHECKSUM = ".sha256"
"""Suffix of the file beside an archive that says which one it is."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument("environment", type=Path, metavar="VENV", help="directory with bin/python")
    parser.add_argument(
        "archive", type=Path, metavar="ARCHIVE", help="file to write: .tar, or .tar.gz (slow)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Pack.

    Raises:
        ValueError: it is no environment, or needs a directory that is outside of it.
        OSError: it cannot be read, or the archive not be written.
    """
    root, archive = arguments.environment, arguments.archive
    if not (root / "bin" / "python").exists():
        raise ValueError(f"{root} is no Python environment: it has no bin/python")
    partial = archive.with_name(archive.name + ".partial")
    try:
        if archive.suffix in (".gz", ".tgz"):
            with tarfile.open(partial, "w:gz", compresslevel=1) as tar:
                count = _fill(tar, root)
        else:
            with tarfile.open(partial, "w") as tar:
                count = _fill(tar, root)
        digest = hashlib.sha256()
        with partial.open("rb") as file:
            while piece := file.read(1 << 24):
                digest.update(piece)
        checksum = archive.with_name(archive.name + CHECKSUM)
        checksum.unlink(missing_ok=True)  # never the checksum of another archive
        partial.replace(archive)
        checksum.write_text(f"{digest.hexdigest()}  {archive.name}\n", encoding="utf-8")
    finally:
        partial.unlink(missing_ok=True)
    print(f"{archive}: {count:,} files, {archive.stat().st_size / 2**20:,.0f} MiB, {digest.hexdigest()[:16]}")
    return exits.DONE


def _fill(tar: tarfile.TarFile, root: Path) -> int:
    """Add everything under `root`; what a link outside of it leads to is added in its place."""
    inside, count = root.resolve(), 0
    for directory, names, files in os.walk(root):
        links = [name for name in names if Path(directory, name).is_symlink()]
        for path in (Path(directory, name) for name in sorted([*links, *files])):
            info = tar.gettarinfo(path, arcname=path.relative_to(root).as_posix())
            if path.is_symlink():
                end = path.resolve()
                if end.is_relative_to(inside):
                    info.linkname = os.path.relpath(end, path.parent.resolve())
                elif end.is_file():  # the interpreter, most likely
                    info = tar.gettarinfo(end, arcname=path.relative_to(root).as_posix())
                    info.type, info.linkname = tarfile.REGTYPE, ""
                    info.size = end.stat().st_size
                elif end.exists():
                    raise ValueError(f"{path} leads to the directory {end} outside of {root}: put it inside")
                else:
                    continue  # leads nowhere, here too
            if info.isreg():
                with path.open("rb") as file:
                    tar.addfile(info, file)
            else:
                tar.addfile(info)
            count += 1
    return count
