"""Checksums: every file of a checkpoint is vouched for, and whatever happens to one is found and named."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, Metadata

from swipe import checkpoint, checksums
from swipe.checkpoint_errors import Damaged
from swipe.checkpoint_files import StageReader
from swipe.checksums import Sum, digest, verify, verify_file, write_list
from tests.harness import run_distributed
from tests.swipe.test_checkpoint import Attack, blank, check_loads, save_layout, saved, tensors

FILES = (
    "stage_000/__0_0.distcp",
    "stage_000/.metadata",
    "stage_000/checksums.json",
    "meta.json",
    ".complete",
)


def test_every_file_is_listed(tmp_path: Path) -> None:
    """Four ranks in two stages: lists hold each rank's file and the index, `.complete` the lists and meta."""
    run_distributed(save_layout, 4, tmp_path, 2, 2)
    (path,) = checkpoint.complete(tmp_path)
    listed = {}
    for directory in ("", "stage_000/", "stage_001/"):
        name = "checksums.json" if directory else ".complete"
        listed |= {
            directory + n: Sum(*s) for n, s in json.loads((path / directory / name).read_text()).items()
        }
    there = {file.relative_to(path).as_posix(): file for file in path.rglob("*") if file.is_file()}
    assert listed.keys() == there.keys() - {".complete"} and len(listed) == 1 + 2 * (1 + 1 + 2)
    for name, file in there.items():
        if name != ".complete":
            data = file.read_bytes()
            assert listed[name] == Sum(len(data), hashlib.sha256(data).hexdigest())
    for of in (1, 2, 3, 7):
        for share in range(of):
            verify(path, share, of)


def flip(file: Path) -> None:
    """Change one bit in the middle."""
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def replace_by_directory(file: Path) -> None:
    """Put a directory where the file was."""
    file.unlink()
    file.mkdir()


DAMAGE: dict[str, Callable[[Path], object]] = {
    "shorter": lambda file: os.truncate(file, file.stat().st_size - 1),
    "empty": lambda file: os.truncate(file, 0),
    "longer": lambda file: file.write_bytes(file.read_bytes() + b"\0"),
    "flipped": flip,
    "missing": Path.unlink,
    "directory": replace_by_directory,
}


@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.parametrize("file", FILES)
def test_any_damage_to_any_file_is_named(tmp_path: Path, file: str, kind: str) -> None:
    """Some share finds it and names the file; without reading contents, all but a flipped bit of the data."""
    path = saved(tmp_path)
    DAMAGE[kind](path / file)

    def blamed(contents: bool) -> set[str]:
        names = set()
        for share in range(5):
            try:
                verify(path, share, 5, contents)
            except Damaged as error:
                names.add(error.file)
        return names

    assert blamed(True) == {file}
    assert blamed(False) == (set() if kind == "flipped" and file in FILES[:2] else {file})
    with pytest.raises(Damaged):
        verify_file(path, file)


def test_no_flipped_byte_goes_unseen(tmp_path: Path) -> None:
    """A hundred places all over each file, with the low and the high bit."""
    path = saved(tmp_path)
    for file in (path / name for name in FILES):
        whole = file.read_bytes()
        for place in range(0, len(whole), -(-len(whole) // 100)):
            for bit in (1, 128):
                file.write_bytes(whole[:place] + bytes([whole[place] ^ bit]) + whole[place + 1 :])
                with pytest.raises(Damaged):
                    verify(path)
        file.write_bytes(whole)
    verify(path)


def test_shares_check_every_file_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Any number of ranks, more or fewer than stages and files; none reads more than its part."""
    path = saved(tmp_path)
    seen: Counter[str] = Counter()
    monkeypatch.setattr(checksums, "check_file", lambda path, file, *rest: seen.update([file]))
    monkeypatch.setattr(checksums, "_vouched", lambda path: {})
    files = {"a", "b", "c", "d", "e", "f", "g"}
    for stages in range(1, 6):
        names = [f"stage_{stage}" for stage in range(stages)]
        monkeypatch.setattr(checksums, "_directories", lambda path, names=names: names)
        monkeypatch.setattr(
            checksums, "_stage_files", lambda path, directory, _: {f"{directory}/{f}": Sum(1) for f in files}
        )
        for of in range(1, 41):
            seen.clear()
            most = 0
            for share in range(of):
                before = sum(seen.values())
                verify(path, share, of)
                most = max(most, sum(seen.values()) - before)
            assert seen == Counter({f"{name}/{file}": 1 for name in names for file in files})
            assert most <= -(-stages // of) * 7 and (of < stages or most <= -(-7 // (of // stages)))


def without_checksums(path: Path) -> Path:
    """Make of a checkpoint what older versions wrote."""
    (path / ".complete").write_text("")
    (path / "stage_000" / "checksums.json").unlink()
    return path


def test_a_checkpoint_without_checksums_is_checked_by_its_index(tmp_path: Path) -> None:
    """Older ones load, and what is missing or cut off is still named, before and when it is loaded."""
    path = without_checksums(saved(tmp_path))
    verify(path)
    check_loads(path, tensors())
    data = path / "stage_000" / "__0_0.distcp"
    size = data.stat().st_size
    os.truncate(data, size - 10)
    words = rf"stage_000/__0_0.distcp: has {size - 10:,} bytes, {size:,} were saved"
    with pytest.raises(Damaged, match=f"^{words}$"):
        verify(path)
    with pytest.raises(ValueError, match=rf"images_000000000001 is damaged \({words}\); remove"):
        checkpoint.load(path, blank())
    data.unlink()
    with pytest.raises(Damaged, match="stage_000/__0_0.distcp: is missing"):
        verify(path)
    for index, says in ((b"nonsense", "UnpicklingError"), (pickle.dumps(Attack()), "which no index needs")):
        (path / "stage_000" / ".metadata").write_bytes(index)
        with pytest.raises(Damaged, match=f"stage_000/.metadata: .*{says}"):
            verify(path)


@pytest.mark.parametrize(
    ("kind", "name", "reads"),
    [
        (_MEM_FORMAT_ENCODING, "TORCH_CONTIGUOUS_FORMAT", True),
        (_MEM_FORMAT_ENCODING, "__init__", False),
        (Metadata, "__reduce__", False),
        (torch.Size, "count", False),
    ],
    ids=str,
)
def test_members_of_enums_only_by_getattr(tmp_path: Path, kind: type, name: str, reads: bool) -> None:
    """So Python 3.11.0 to 3.11.3, Debian's among them, pickles the members of an index."""

    class Asked:
        def __reduce__(self) -> tuple[Any, ...]:
            return getattr, (kind, name)

    (tmp_path / ".metadata").write_bytes(pickle.dumps(Asked()))
    with pytest.raises(pickle.UnpicklingError, match="is not an index" if reads else "which no index needs"):
        StageReader(tmp_path)


HOSTILE = (
    "[]", "3", '{"a": 1}', '{"a": []}', '{"a": [1, 2]}', '{"a": ["1", "x"]}', '{"a": [1, "x", 3]}',
    '{"a": [true, "x"]}', "[" * 100_000, '{"__0_0.distcp": [1e400, "x"]}', "\xff", '{"a": [NaN, ""]}',
)  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_a_list_that_is_none_is_damage(tmp_path: Path, text: str) -> None:
    """Whatever is in a list, reading it ends in one kind of error, even if `.complete` vouches for it."""
    path = saved(tmp_path)
    file = path / "stage_000" / "checksums.json"
    file.write_text(text, encoding="latin-1")
    write_list(path / ".complete", {name: digest(path / name) for name in FILES[2:4]})
    with pytest.raises(Damaged, match="stage_000/checksums.json: is not a list of checksums"):
        verify(path)
    (path / ".complete").write_text(text, encoding="latin-1")
    with pytest.raises(Damaged, match=r"\.complete"):
        verify(path)


@pytest.mark.parametrize("name", ["/dev/zero", "../../outside", "sub/file"])
def test_a_list_does_not_lead_outside(tmp_path: Path, name: str) -> None:
    """A name with a directory in it is refused before anything is opened."""
    path = saved(tmp_path)
    write_list(path / "stage_000" / "checksums.json", {name: Sum(0, "0" * 64)})
    write_list(path / ".complete", {file: digest(path / file) for file in FILES[2:4]})
    with pytest.raises(Damaged, match=f"checksums.json: names {name}, which is not beside it"):
        verify(path)


@pytest.mark.parametrize("stages", ["0", "-1", "1000000000000", '"1"', "1.5", "[1]", "true"])
def test_a_number_of_stages_that_is_none_is_damage(tmp_path: Path, stages: str) -> None:
    """An older checkpoint's meta.json is vouched for by nothing."""
    path = without_checksums(saved(tmp_path))
    (path / "meta.json").write_text(f'{{"stages": {stages}}}')
    with pytest.raises(Damaged, match="meta.json: is not the JSON of a checkpoint"):
        verify(path)


def test_malicious_data_with_right_checksums_run_no_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who writes the data writes the checksums too: a pickle in a data file is refused by what loads it."""
    monkeypatch.chdir(tmp_path)
    path = saved(tmp_path / "c")
    stage = path / "stage_000"
    index = pickle.loads((stage / ".metadata").read_bytes())
    for make in (torch.save, lambda attack, file: file.write(pickle.dumps(attack))):
        buffer = io.BytesIO()
        make(Attack(), buffer)
        (stage / "__0_0.distcp").write_bytes(buffer.getvalue())
        for where in index.storage_data.values():
            where.offset, where.length = 0, len(buffer.getvalue())
        (stage / ".metadata").write_bytes(pickle.dumps(index))
        write_list(stage / "checksums.json", {name.name: digest(name) for name in stage.glob("*_*")})
        write_list(path / ".complete", {file: digest(path / file) for file in FILES[2:4]})
        verify(path)
        with pytest.raises(ValueError, match="is damaged"):
            checkpoint.load(path, blank())
        assert not Path("pwned").exists()
    pickle.loads(buffer.getvalue())
    assert Path("pwned").exists()  # the attack is one
