"""`python -m launch pack VENV ARCHIVE`: a Python environment as one file, for `launch stage` to put on nodes.

Thousands of small files are read slowly from a parallel file system by thousands of nodes; one is not. What
an environment takes from the installation it is based on (the standard library; with --system-site-packages
its packages, torch most likely) is not in the archive, and is read where it lies.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import tarfile
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import unquote

from launch import exits
from launch.hosts import counted

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
    paths = _members(root)
    size = sum(path.lstat().st_size for path in paths)
    print(f"packs {root}: {counted(len(paths), 'file')}, {size / 2**20:,.0f} MiB", flush=True)
    partial = archive.with_name(archive.name + ".partial")
    try:
        if archive.suffix in (".gz", ".tgz"):
            with tarfile.open(partial, "w:gz", compresslevel=1) as tar:
                count = _fill(tar, root, paths)
        else:
            with tarfile.open(partial, "w") as tar:
                count = _fill(tar, root, paths)
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
    size = archive.stat().st_size
    print(f"{archive}: {counted(count, 'file')}, {size / 2**20:,.0f} MiB, {digest.hexdigest()[:16]}")
    for line in _left_out(root):
        print(line)
    return exits.DONE


def _left_out(root: Path) -> list[str]:
    """Say what the ranks will not find in the archive and so read from a file system that they share."""
    said, packages = [], list(root.glob("lib/python*/site-packages"))
    with contextlib.suppress(OSError):
        text = (root / "pyvenv.cfg").read_text(encoding="utf-8")
        cfg = {key.strip(): value.strip() for key, _, value in (x.partition("=") for x in text.splitlines())}
        if cfg.get("include-system-site-packages", "").lower() == "true":
            base = Path(cfg.get("home", "")).parent
            said.append(
                f"what lies in {base} is not in it, torch for example, and is read there by all ranks"
            )
    editable = {name: where for path in packages for name, where in _editable(path)}
    for name, where in editable.items():
        said.append(
            f"{name} is installed editable from {where}: pip install . there first, else every rank imports "
            "it from there"
        )
    if "aeris-swipe" not in editable and not any((path / "aeris").is_dir() for path in packages):
        said.append("aeris is not in it: ranks read it from the working directory (pip install . puts it in)")
    return said


def _editable(packages: Path) -> list[tuple[str, str]]:
    """List the packages that only lead to where their source is, and where that is."""
    found = []
    for path in packages.glob("*.dist-info/direct_url.json"):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            said = json.loads(path.read_text(encoding="utf-8"))
            if said.get("dir_info", {}).get("editable"):
                where = unquote(said.get("url", "").removeprefix("file://"))
                found.append((path.parent.name.partition("-")[0].replace("_", "-"), where))
    return found


def _members(root: Path) -> list[Path]:
    """List the files and links under `root`."""
    found: list[Path] = []
    for directory, names, files in os.walk(root):
        links = [name for name in names if Path(directory, name).is_symlink()]
        found += (Path(directory, name) for name in sorted([*links, *files]))
    return found


def _fill(tar: tarfile.TarFile, root: Path, paths: Sequence[Path]) -> int:
    """Add `paths`, all under `root`; what a link outside of it leads to is added in its place."""
    inside, count = root.resolve(), 0
    for path in paths:
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
