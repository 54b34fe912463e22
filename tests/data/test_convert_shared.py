"""Conversions that several processes share: claims, the dead, and that the bytes are those of one process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from aeris.data import conversion, crew, sharing
from aeris.data.options import Options
from aeris.data.plan import plan
from aeris.data.sharing import Claims, Shared
from aeris.data.store import Store, StoreError

ROOT = Path(__file__).parents[2]
OPTIONS = {"window": 6, "round": 0.03, "compress": True, "train_period": ("1999", "2001")}


@pytest.fixture(scope="module")
def fields(weather, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the directory of a source of two years, and of the store that one process makes of it."""
    base = tmp_path_factory.mktemp("shared")
    weather(times=14, sst=True).to_netcdf(base / "source.nc", engine="h5netcdf")
    conversion.run(plan(Options((str(base / "source.nc"), str(base / "one")), **OPTIONS)))
    return base


def same(one: Path, other: Path) -> bool:
    """Compare the years byte by byte, and what the headers say."""
    files = all((one / name).read_bytes() == (other / name).read_bytes() for name in ("1999.h5", "2000.h5"))
    ours, theirs = Store(one), Store(other)
    numbers = [store.statistics.residual_std[6].tobytes() for store in (ours, theirs)]
    return files and ours.fingerprint == theirs.fingerprint and numbers[0] == numbers[1]


def test_a_claim_is_respected_until_its_owner_is_gone(tmp_path: Path) -> None:
    claims, path = Claims(tmp_path), tmp_path / "piece.claim"
    assert claims.take("piece")
    assert claims.take("piece")  # our own, from before an error
    mine = path.read_text()
    host, process, began = mine.split(" ")
    claims.release("piece")
    claims.release("piece")
    living = f"{host} {os.getppid()} {sharing._began(os.getppid())}"
    path.write_text(living)
    assert not claims.take("piece")
    path.write_text(f"elsewhere {process} {began}")
    assert not claims.take("piece")
    path.write_text(f"{host} {os.getppid()} 0")  # the number of a process that ended, used again
    assert claims.take("piece")
    assert path.read_text() == mine
    for owner in (living, "elsewhere 1 1", ""):
        path.write_text(owner)
        os.utime(path, (0, 0))  # silent since 1970
        assert claims.take("piece")
    assert [one.name for one in tmp_path.iterdir()] == ["piece.claim"]


def test_pieces_are_done_once_and_waited_for(tmp_path: Path, monkeypatch) -> None:
    """Another process has one piece; it finishes while we wait, and does another that we then leave out."""
    monkeypatch.setattr(sharing, "POLL_S", 0.001)
    monkeypatch.setattr(sharing, "SHOW_S", 0.0)
    claim = tmp_path / "stage-b.claim"
    claim.write_text(f"elsewhere {os.getpid()} 0")
    done, shown, checks = [], [], []

    def other() -> None:
        checks.append(1)
        if len(checks) == 9:
            for name in "bd":
                np.savez(tmp_path / f"stage-{name}.npz", who=1)
            claim.unlink()

    def work(name: str) -> sharing.Part:
        done.append(name)
        return {"who": np.array(0)}

    shared = Shared(
        tmp_path, 1, 2, lambda name, length: lambda count: shown.append((name, count, length)), other
    )
    claim_d = tmp_path / "stage-d.claim"
    claim_d.write_text(f"elsewhere {os.getpid()} 0")
    shared.each("stage", {"a": 2, "b": 3, "c": 4, "d": 5}, work)
    assert done == ["c", "a"]  # the second of two begins in the middle
    assert [int(shared.part("stage", name)["who"]) for name in "abcd"] == [0, 1, 0, 1]
    assert shown[-1] == ("stage", 14, 14)
    assert int(shared.once("only", lambda: work("e"))["who"]) == 0
    shared.once("only", lambda: work("e"))
    assert done == ["c", "a", "e"]


def test_an_error_gives_the_piece_back(tmp_path: Path) -> None:
    def fail(name: str) -> sharing.Part:
        raise ValueError(name)

    with pytest.raises(ValueError, match="a"):
        Shared(tmp_path).each("stage", {"a": 1}, fail)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("place", [1, 2])
def test_any_place_can_do_all_of_it(place: int, fields: Path, tmp_path: Path) -> None:
    job = plan(Options((str(fields / "source.nc"), str(tmp_path / "store")), **OPTIONS))
    conversion.run(job, place=place, places=3)
    assert same(tmp_path / "store", fields / "one")


def test_processes_make_the_same_bytes(fields: Path, tmp_path: Path) -> None:
    """Each year is one block, so both have something to do."""
    job = plan(Options((str(fields / "source.nc"), str(tmp_path / "store")), processes=2, **OPTIONS))
    shown: dict[str, list[int]] = {}
    crew.run_in_processes(job, lambda name, length: shown.setdefault(name, [length]).append)
    assert same(tmp_path / "store", fields / "one")
    assert sorted(path.name for path in (tmp_path / "store").iterdir()) == ["1999.h5", "2000.h5", "store.h5"]
    assert shown["fields"][0] == 14
    assert shown["fields"][-1] == 14


def test_an_error_of_a_process_is_that_of_the_program(weather, tmp_path: Path) -> None:
    dataset = weather()
    dataset["2m_temperature"][7, 2, 3] = np.nan
    dataset.to_netcdf(tmp_path / "bad.nc", engine="h5netcdf")
    job = plan(Options((str(tmp_path / "bad.nc"), str(tmp_path / "store")), window=6, processes=2))
    with pytest.raises(StoreError, match="t2m is nan at 2000-01-01T12:00:00, row 2, col 3"):
        crew.run_in_processes(job)


def test_a_killed_process_is_named(monkeypatch) -> None:
    def empty() -> None:
        raise EOFError

    crowd = crew.Crew.__new__(crew.Crew)
    member = SimpleNamespace(exitcode=-signal.SIGKILL), SimpleNamespace(recv=empty)
    crowd._members = [member]
    message = (
        r"ended with SIGKILL \(out of memory, or killed\): what is written stays, and the same command goes"
    )
    with pytest.raises(StoreError, match=message) as caught:
        crowd.check()
    assert caught.value.of_a_file  # the same command goes on


def test_ranks_share_the_work_and_one_speaks(fields: Path, tmp_path: Path) -> None:
    words = [
        str(fields / "source.nc"),
        str(tmp_path / "store"),
        "--window",
        "6",
        "--round",
        "0.03",
        "--compress",
    ]
    command = [sys.executable, "-m", "aeris.data.convert", *words, "--train-period", "1999", "2001"]
    alone = {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "2"}
    ranks = [
        subprocess.Popen(
            command,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, **alone, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]
    said = [rank.communicate(timeout=120)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], said
    assert "is ready" in said[0] or "nothing to do" in said[0]
    assert said[1] == ""
    assert same(tmp_path / "store", fields / "one")


def test_a_store_that_got_its_name_meanwhile_is_not_begun_anew(fields: Path, tmp_path: Path) -> None:
    job = plan(Options((str(fields / "source.nc"), str(fields / "one")), **OPTIONS))
    conversion.begin(job)
    assert not job.partial.exists()
    assert conversion._just_finished(job, FileNotFoundError())
    assert not conversion._just_finished(job, PermissionError())
