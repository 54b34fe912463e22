"""A conversion that is killed, or meets a full disk: it continues, and nothing half-done looks whole."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from aeris.data import conversion, packing, sharing, statistics, yearwriter
from aeris.data.store import Store, StoreError

OPTIONS = {"round": 0.03, "compress": True, "train_period": ("1999", "2001")}


@pytest.fixture(scope="module")
def straight(weather, convert, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Return the store of a conversion with OPTIONS that nobody disturbed."""
    base = tmp_path_factory.mktemp("straight")
    weather(sst=True).to_netcdf(base / "source.nc", engine="h5netcdf")
    return convert(base / "source.nc", base / "store", **OPTIONS)


class Killed(BaseException):
    """Stands for a signal: nothing in the project catches it."""


def same(one: Store, other: Store) -> bool:
    """Compare data byte by byte, and everything about them."""
    fields = all(one.read(i).tobytes() == other.read(i).tobytes() for i in range(len(other)))
    masks = one.mask_CYX.tobytes() == other.mask_CYX.tobytes()
    names = sorted(path.name for path in one.path.glob("[0-9]*.h5"))
    files = all((one.path / name).read_bytes() == (other.path / name).read_bytes() for name in names)
    return fields and masks and files and one.fingerprint == other.fingerprint and one.made == other.made


def die_at(monkeypatch: pytest.MonkeyPatch, owner: object, name: str, call: int, before: bool = True) -> None:
    """Make the `call`th call of a function raise Killed, before or after it does its work."""
    real, count = getattr(owner, name), [0]

    def wrapped(*args: object, **kwargs: object) -> object:
        count[0] += 1
        if count[0] == call and before:
            raise Killed
        result = real(*args, **kwargs)
        if count[0] == call:
            raise Killed
        return result

    monkeypatch.setattr(owner, name, wrapped)


KILLS = {
    "making the first file": (yearwriter, "create", 1, False),
    "before the marks": (yearwriter, "publish", 2, True),
    "first time": (yearwriter.YearWriter, "write", 1, True),
    "data on disk, not marked": (yearwriter.YearWriter, "mark", 1, True),
    "half of the marks": (yearwriter, "_write_all", 8, True),
    "before a block is done": (sharing, "publish", 1, True),
    "between two blocks": (sharing, "publish", 1, False),
    "before a year has its name": (yearwriter, "publish", 5, True),
    "between two years": (yearwriter.YearWriter, "finish", 1, False),
    "in the second year": (yearwriter.YearWriter, "write", 8, False),
    "masks": (conversion, "find_masks", 1, True),
    "statistics": (statistics.Train, "moments", 3, True),
    "rounding steps": (packing, "round_to", 1, True),
    "packing the second year": (packing, "round_to", 7, False),
    "header": (conversion, "write_header", 1, True),
    "after the header": (conversion, "write_header", 1, False),
}


@pytest.mark.parametrize("where", KILLS)
def test_killed_conversion_continues(
    where: str, source: Path, straight, convert, tmp_path: Path, monkeypatch
) -> None:
    owner, name, call, before = KILLS[where]
    with monkeypatch.context() as patch:
        die_at(patch, owner, name, call, before)
        with pytest.raises(Killed):
            convert(source, tmp_path / "killed", **OPTIONS)
    assert not (tmp_path / "killed").exists()
    for path in ("killed", "killed.partial"):
        with pytest.raises(
            StoreError, match=r"killed.partial is an unfinished conversion: run the same .* again"
        ):
            Store(tmp_path / path)
    again = convert(source, tmp_path / "killed", **OPTIONS)
    assert same(again, straight)
    assert sorted(p.name for p in again.path.iterdir()) == ["1999.h5", "2000.h5", "store.h5"]
    assert not (tmp_path / "killed.partial").exists()


def test_killed_after_the_store_has_its_name(source: Path, convert, tmp_path: Path, monkeypatch) -> None:
    with monkeypatch.context() as patch:
        die_at(patch, conversion.shutil, "rmtree", 1)
        with pytest.raises(Killed):
            convert(source, tmp_path / "store")
    with pytest.raises(StoreError, match="unfinished conversion: run the same convert command again"):
        Store(tmp_path / "store")
    convert(source, tmp_path / "store")
    assert sorted(p.name for p in (tmp_path / "store").iterdir()) == ["1999.h5", "2000.h5", "store.h5"]


def test_finished_times_are_not_read_again(source: Path, convert, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(conversion, "READ_BYTES", 1)  # one time at once
    with monkeypatch.context() as patch:
        die_at(patch, yearwriter.YearWriter, "write", 8)
        with pytest.raises(Killed):
            convert(source, tmp_path / "store")
    asked = []
    real = conversion.read_fields
    monkeypatch.setattr(conversion, "read_fields", lambda c, a, b: asked.append((a, b)) or real(c, a, b))
    convert(source, tmp_path / "store")
    assert asked == [(7, 8), (8, 9), (9, 10)]


def test_killed_process_continues(source: Path, convert, tmp_path: Path) -> None:
    """A real SIGKILL in the middle of the second year."""
    script = (
        "import os, signal\nfrom aeris.data import yearwriter as y\nfrom aeris.data.convert import main\n"
        "w, n = y.YearWriter.write, []\n"
        "def write(*a):\n n.append(w(*a))\n if len(n) == 8: os.kill(os.getpid(), signal.SIGKILL)\n"
        "y.YearWriter.write = write; main()\n"
    )
    command = [sys.executable, "-c", script, str(source), str(tmp_path / "killed"), "--window", "6"]
    killed = subprocess.run(command, capture_output=True, check=False, cwd=Path(__file__).parents[2])
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert (tmp_path / "killed.partial" / "parts" / "fields-1999-00000.npz").exists()
    assert same(convert(source, tmp_path / "killed"), convert(source, tmp_path / "straight"))


def test_other_settings_do_not_continue(source: Path, convert, tmp_path: Path, monkeypatch) -> None:
    with monkeypatch.context() as patch:
        die_at(patch, yearwriter.YearWriter, "write", 3)
        with pytest.raises(Killed):
            convert(source, tmp_path / "store")
    with pytest.raises(
        StoreError, match=r"was begun with window 6, not 12: repeat the first command, or remove"
    ):
        convert(source, tmp_path / "store", window=12)
    convert(source, tmp_path / "store")
    convert(source, tmp_path / "store")  # done already
    with pytest.raises(
        StoreError, match=r"store exists and is not this store: remove it or choose another name"
    ):
        convert(source, tmp_path / "store", window=12)


def test_full_disk_is_one_error_and_leaves_nothing_that_looks_whole(source: Path, tmp_path: Path) -> None:
    """Files may not grow beyond 100 kB: the same errors as a full disk, at the same places."""
    script = (
        "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "from aeris.data.convert import main; from aeris.log import run_program; run_program(main)\n"
    )
    command = [sys.executable, "-c", script, str(source), str(tmp_path / "store"), "--window", "6"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2])
    assert done.returncode == 74
    assert "store.partial: File too large; what is written so far stays" in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "store").exists()
    left = {path.name for path in (tmp_path / "store.partial").iterdir()}
    assert left == {"plan.json", "parts"}


def test_too_little_room_is_said_before(source: Path, convert, tmp_path: Path, monkeypatch) -> None:
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(conversion.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(StoreError, match=r"needs 226 kB more, the disk has 1 kB free"):
        convert(source, tmp_path / "store")


def test_unwritable_destination_is_one_error(source: Path, convert) -> None:
    with pytest.raises(StoreError, match=r"cannot write .*source.nc/store.partial: Not a directory"):
        convert(source, source / "store")
