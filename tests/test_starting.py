"""How long a start takes: what is started, what is read of it, and what is refused."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import starting, startup
from tests.harness import ROOT


def test_numbers_of_ranks_and_launchers(monkeypatch: pytest.MonkeyPatch) -> None:
    assert starting.counts("1,8,32") == [1, 8, 32]
    for text in ("", "0,1", "2,1", "2,2", "a", "1,,2"):
        with pytest.raises(ValueError, match="--ranks .*rising numbers"):
            starting.counts(text)
    monkeypatch.setattr("shutil.which", lambda name, path: None)
    assert starting.started(1, "mpiexec") == [sys.executable, "-m"]
    assert starting.started(3, "auto")[-3:] == ["--nproc-per-node", "3", "-m"]
    with pytest.raises(ValueError, match=r"aeris-swipe\[mpi\]"):
        starting.started(2, "mpiexec")
    monkeypatch.setattr("shutil.which", lambda name, path: "/bin/mpiexec")
    assert starting.started(2, "auto")[:3] == ["/bin/mpiexec", "-n", "2"]
    assert starting.split(["--ranks", "2", "--", "--a", "--"]) == (["--ranks", "2"], ["--a", "--"])


def test_a_program_that_fails_says_why() -> None:
    words = [sys.executable, "-c", "print('one'); raise SystemExit('because')"]
    with pytest.raises(ValueError, match=r"ended with status 1: one \| because$"):
        starting.run(words, 1)
    burn = "import time\nwhile time.process_time() < 0.3: pass"
    spent = starting.run([sys.executable, "-c", burn], 1)
    assert 0.3 <= spent.cpu_s and 0.3 <= spent.wall_s


def test_what_grows_faster_than_the_ranks_is_named() -> None:
    """Against the two largest numbers of ranks; what is short in the end does not count."""

    def start(ranks: int, wall: float, **parts: float) -> startup.Start:
        return startup.Start(ranks, parts, starting.Spent(wall, 2.0 * ranks))

    starts = [
        start(1, 3.0, imports=1.0, groups=0.01),
        start(8, 9.0, imports=4.0, groups=0.1, rendezvous=0.1),
        start(8, 12.0, imports=6.0, groups=0.3, rendezvous=0.1),
        start(32, 30.0, imports=20.0, groups=1.2, rendezvous=0.19),
    ]
    found = startup.medians(starts)
    sums = {"first step done": 5.3, "program": 10.5, "CPU per rank": 2.0}
    assert found[8] == pytest.approx({"imports": 5.0, "groups": 0.2, "rendezvous": 0.1, **sums})
    assert startup.faster_than_ranks(found) == ["groups (0.20 s on 8, 1.20 s on 32)"]
    assert startup.rows(found)[1] == {"ranks": 8, **found[8]}


@pytest.mark.slow
def test_a_start_is_measured(tmp_path: Path) -> None:
    """One real start: its parts are read, summed and written."""
    program = [sys.executable, "-m", "benchmarks.startup", "--ranks", "1", "--rounds", "1"]
    files = ["--csv", str(tmp_path / "start.csv"), "--plot", str(tmp_path / "start.png")]
    subprocess.run([*program, *files], check=True, cwd=ROOT, timeout=300)
    with (tmp_path / "start.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert {"imports", "model", "first batch", "first step"} <= row.keys()
    assert float(row["imports"]) < float(row["first step done"]) < float(row["program"])
    assert (tmp_path / "start.png").stat().st_size > 1000
