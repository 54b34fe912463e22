"""An environment as one file and back: by one rank or by MPI, whole or not at all, never elsewhere."""

import io
import os
import re
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from launch import exits, rank, stage
from launch.__main__ import run_main


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a virtual environment with a package and what such environments have: links in and out."""
    root = tmp_path_factory.mktemp("made") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(root)], check=True)
    packages = next(root.glob("lib/python*/site-packages"))
    (packages / "rainfall.py").write_text("print('rain')\n")
    (root / "share").symlink_to(packages.absolute())  # absolute, though inside
    (root / "nowhere").symlink_to(root / "absent")
    return root


@pytest.fixture(scope="module")
def archive(environment: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("packed") / "env.tar"
    assert run_main(["pack", str(environment), str(path)]) == exits.DONE
    return path


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(("PMI", "PALS_", "SLURM_", "OMPI_", "RANK"))]:
        monkeypatch.delenv(name)


def test_what_was_packed_runs_elsewhere(
    archive: Path, environment: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run_main(["stage", str(archive), str(tmp_path)]) == exits.DONE
    there = stage.place(archive, tmp_path)
    found = subprocess.run([there / "bin" / "python", "-m", "rainfall"], capture_output=True, text=True)
    assert (found.stdout, found.returncode) == ("rain\n", 0)
    assert there.parent.stat().st_mode & 0o777 == 0o700
    assert not (there / "bin" / "python").resolve().is_relative_to(environment)
    assert [path.name for path in there.parent.iterdir()] == [there.name]  # nothing unfinished
    before = there.stat().st_ctime_ns
    assert run_main(["stage", str(archive), str(tmp_path)]) == exits.DONE
    assert there.stat().st_ctime_ns == before and "was there" in capfd.readouterr().out


def test_pack_and_stage_say_what_they_do(
    environment: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """They take minutes: a line at the start, and one at the end."""
    archive = tmp_path / "env.tar"
    count = sum(path.is_symlink() or path.is_file() for path in environment.rglob("*"))
    assert run_main(["pack", str(environment), str(archive)]) == exits.DONE
    first, last, *_ = capfd.readouterr().out.splitlines()
    assert re.fullmatch(rf"packs {re.escape(str(environment))}: {count:,} files, [\d,]+ MiB", first)
    assert last.startswith(f"{archive}: {count:,} files, ")
    assert run_main(["stage", str(archive), str(tmp_path)]) == exits.DONE
    first, last = capfd.readouterr().out.splitlines()
    assert re.fullmatch(rf"stages {re.escape(str(archive))}, [\d,]+ MiB, on 1 node", first)
    assert last.endswith(f": on 1 node, {count:,} files, read by each")


def test_pieces_are_read_in_linear_time(tmp_path: Path) -> None:
    """As tarfile reads: 10 KiB at a time, of pieces of 16 MiB; copies of what is left took 3 s."""
    (tmp_path / "archive").write_bytes(bytes(2 * stage.PIECE_BYTES + 5))
    pieces, begun = stage.Pieces(tmp_path / "archive"), time.process_time()
    sizes = [len(data) for data in iter(lambda: pieces.read(10240), b"")]
    assert time.process_time() - begun < 1
    pieces.drain()
    assert sum(sizes) == 2 * stage.PIECE_BYTES + 5 and max(sizes) == 10240


def test_what_is_not_packed_is_said(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    root, base = tmp_path / "venv", str(Path(sys.executable).parent)
    packages = root / "lib" / "python3.12" / "site-packages"
    packages.mkdir(parents=True)
    (root / "bin").mkdir()
    (root / "bin" / "python").symlink_to(sys.executable)
    (root / "pyvenv.cfg").write_text(f"home = {base}\ninclude-system-site-packages = true\n")
    assert run_main(["pack", str(root), str(tmp_path / "env.tar")]) == exits.DONE
    said = capfd.readouterr().out
    assert f"what lies in {Path(base).parent} is not in it" in said and "aeris is not in it" in said
    assert stage.environ(root) == {}  # else the ranks would not find it at all
    record = packages / "aeris_swipe-1.0.dist-info" / "direct_url.json"
    record.parent.mkdir()
    record.write_text('{"dir_info": {"editable": true}, "url": "file:///my%20home/aeris"}')
    assert run_main(["pack", str(root), str(tmp_path / "env.tar")]) == exits.DONE
    said = capfd.readouterr().out
    assert "aeris-swipe is installed editable from /my home/aeris: pip install . there first" in said
    assert "every rank imports it from there" in said and "aeris is not in it" not in said
    record.write_text('{"dir_info": {}, "url": "file:///my%20home/aeris"}')
    (packages / "aeris").mkdir()
    (root / "pyvenv.cfg").write_text(f"home = {base}\ninclude-system-site-packages = false\n")
    assert run_main(["pack", str(root), str(tmp_path / "env.tar")]) == exits.DONE
    said = capfd.readouterr().out
    assert "not in it" not in said and "editable" not in said
    assert stage.environ(root) == {"PYTHONSAFEPATH": "1"}


@pytest.mark.skipif(sys.version_info < (3, 11), reason="ignored before Python 3.11")
def test_the_staged_project_is_taken_and_not_the_working_directory(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv")], check=True)
    packages = next((tmp_path / "venv").glob("lib/python*/site-packages"))
    for place in (packages, tmp_path):
        (place / "aeris").mkdir()
        (place / "aeris" / "__main__.py").write_text(f"print({str(place)!r})")
    environ = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    command = [tmp_path / "venv" / "bin" / "python", "-m", "aeris"]
    for more, found in (({}, tmp_path), (stage.environ(tmp_path / "venv"), packages)):
        said = subprocess.run(command, cwd=tmp_path, env=environ | more, capture_output=True, text=True)
        assert said.stdout == f"{found}\n", said.stderr


class Ranks:
    """Ranks of a world of threads, with the calls of mpi4py that are used."""

    def __init__(self, world: int) -> None:
        self.world, self.meet, self.box = world, threading.Barrier(world, timeout=20), [None] * world
        self.own = threading.local()

    def Get_rank(self) -> int:
        return self.own.rank

    def allgather(self, value: Any) -> list[Any]:
        self.box[self.own.rank] = value
        self.meet.wait()
        found = list(self.box)
        self.meet.wait()
        return found

    def bcast(self, value: Any) -> Any:
        return self.allgather(value)[0]

    def allreduce(self, value: int) -> int:
        return sum(self.allgather(value))

    def run(self, archive: Path, directories: list[Path], monkeypatch: pytest.MonkeyPatch) -> list[int]:
        """Stage on every rank into its own directory, as on nodes of their own."""
        statuses = [-1] * self.world
        monkeypatch.setattr(stage, "discover", lambda _: rank.Ranks(self.own.rank, self.world, 0, 1, "pmi"))
        monkeypatch.setattr(stage, "_communicator", lambda world: self)
        monkeypatch.setattr(stage, "PIECE_BYTES", 100_000)

        def work(number: int) -> None:
            self.own.rank = number
            statuses[number] = run_main(["stage", str(archive), str(directories[number])])

        threads = [threading.Thread(target=work, args=(number,)) for number in range(self.world)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
        return statuses


def test_one_rank_reads_for_all(
    archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A rank that has it already takes part; one whose disk cannot take it is named, and hinders nobody."""
    directories = [tmp_path / name for name in ("a", "b", "c")]
    assert run_main(["stage", str(archive), str(directories[1])]) == exits.DONE
    opened = []
    real = Path.open

    def counted(self: Path, *args: Any, **kwargs: Any) -> Any:
        opened.append(self)
        return real(self, *args, **kwargs)

    monkeypatch.setattr(Path, "open", counted)
    assert Ranks(3).run(archive, directories, monkeypatch) == [exits.DONE] * 3
    assert opened.count(archive) == 1
    assert all((stage.place(archive, directory) / "bin" / "python").exists() for directory in directories)

    directories = [tmp_path / "d", tmp_path / "file", tmp_path / "f"]
    directories[1].touch()
    assert Ranks(3).run(archive, directories, monkeypatch) == [exits.IO] * 3
    assert (stage.place(archive, directories[2]) / "bin" / "python").exists()
    assert "could not be staged: [Errno 20] Not a directory" in capfd.readouterr().err


def test_the_archive_cannot_be_read(
    archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    moved = tmp_path / "env.tar"
    stage.place(archive, tmp_path)
    (tmp_path / "env.tar.sha256").write_text(Path(f"{archive}.sha256").read_text())
    assert Ranks(2).run(moved, [tmp_path / "a", tmp_path / "b"], monkeypatch) == [exits.IO] * 2
    assert capfd.readouterr().err.count("No such file or directory") == 2


@pytest.mark.parametrize("damage", ["cut", "flipped", "swapped"])
def test_a_damaged_archive_is_not_used(
    archive: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], damage: str
) -> None:
    data = bytearray(archive.read_bytes())
    if damage == "flipped":  # in the middle of a file, where tar does not look
        data[data.index(b"print('rain')")] ^= 1
    (tmp_path / "env.tar").write_bytes(data[: len(data) // 2] if damage == "cut" else data)
    checksum = Path(f"{archive}.sha256").read_text()
    other = ("1" if checksum[0] == "0" else "0") + checksum[1:]
    (tmp_path / "env.tar.sha256").write_text(other if damage == "swapped" else checksum)
    assert run_main(["stage", str(tmp_path / "env.tar"), str(tmp_path)]) == exits.IO
    assert "could not be staged" in capfd.readouterr().err
    assert not list((tmp_path / f"aeris-{os.getuid()}").iterdir())


def malicious(name: str, kind: bytes, target: str) -> list[tarfile.TarInfo]:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return [member]


def through_a_link() -> list[tarfile.TarInfo]:
    return [*malicious("in", tarfile.SYMTYPE, "."), *malicious("in/up", tarfile.SYMTYPE, "../..")]


@pytest.mark.parametrize(
    "members",
    [
        malicious("../evil", tarfile.REGTYPE, ""),
        malicious("/evil", tarfile.REGTYPE, ""),
        malicious("link", tarfile.SYMTYPE, "../../evil"),
        malicious("link", tarfile.SYMTYPE, "/etc"),
        malicious("hard", tarfile.LNKTYPE, "../outside"),
        malicious("device", tarfile.CHRTYPE, ""),
        malicious("pipe", tarfile.FIFOTYPE, ""),
        through_a_link(),
    ],
    ids=lambda members: members[-1].name,
)
@pytest.mark.parametrize("filtered", [True, False])
def test_nothing_leaves_the_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, members: list[tarfile.TarInfo], filtered: bool
) -> None:
    """With the filter of tarfile, and as on a Python without it."""
    if not filtered:
        monkeypatch.delattr(tarfile, "data_filter", raising=False)
    (tmp_path / "outside").touch()
    root = tmp_path / "top" / "root"
    root.mkdir(parents=True)
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for member in members:
            tar.addfile(member)
    file.seek(0)
    with tarfile.open(fileobj=file, mode="r|*") as tar, pytest.raises((ValueError, tarfile.TarError)):
        for member in tar:
            stage.extract(tar, member, root)
    assert not list(tmp_path.rglob("evil"))


def test_a_place_that_others_can_write_is_refused(
    archive: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / f"aeris-{os.getuid()}").mkdir()
    (tmp_path / f"aeris-{os.getuid()}").chmod(0o777)
    assert run_main(["stage", str(archive), str(tmp_path)]) == exits.IO
    assert "is not only ours to write" in capfd.readouterr().err


def test_what_cannot_be_packed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run_main(["pack", str(tmp_path), str(tmp_path / "x.tar")]) == exits.MISTAKE
    (tmp_path / "env" / "bin").mkdir(parents=True)
    (tmp_path / "env" / "bin" / "python").symlink_to(sys.executable)
    (tmp_path / "lib").mkdir()
    (tmp_path / "env" / "lib").symlink_to(tmp_path / "lib")
    assert run_main(["pack", str(tmp_path / "env"), str(tmp_path / "x.tar")]) == exits.MISTAKE
    said = capfd.readouterr().err
    assert "it has no bin/python" in said and f"leads to the directory {tmp_path / 'lib'} outside" in said
    assert not list(tmp_path.glob("x.tar*"))


@pytest.mark.slow
def test_by_mpiexec(archive: Path, tmp_path: Path) -> None:
    """Two ranks of one machine, one directory: each takes the other's for its own."""
    mpiexec = Path(sys.executable).with_name("mpiexec")
    if not mpiexec.exists():
        pytest.skip("no mpiexec beside this Python")
    command = [sys.executable, "-m", "launch", "stage", str(archive), str(tmp_path)]
    found = subprocess.run([mpiexec, "-n", "2", *command], capture_output=True, text=True, timeout=60)
    assert found.returncode == 0, found.stderr
    assert re.search(r"on 2 nodes, [\d,]+ files, sent by rank 0", found.stdout)
    assert len(list((tmp_path / f"aeris-{os.getuid()}").iterdir())) == 1
