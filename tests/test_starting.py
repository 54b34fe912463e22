"""Start-up and weak scaling: what is read from runs, what is compared, and what is refused."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table

from aeris.train import parse
from benchmarks import starting, startup, weak_scaling
from tests.harness import ROOT


def finished(directory: Path, ranks: int | None, batch: int, speeds: list[float], width: int = 8) -> Path:
    """Write what a finished run leaves for the table of weak scaling."""
    directory.mkdir()
    config = {"model": {"width": width}, "train": {"batch": batch, "microbatch": 1}}
    (directory / "config.json").write_text(json.dumps(config))
    records = [{"images_seen": 1, "slow": []}, *({"images_per_s": s, "data_wait": 0.25} for s in speeds)]
    (directory / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    if ranks:
        (directory / "startup.json").write_text(json.dumps({"ranks": ranks, "parts": {}}))
    return directory


def test_finished_runs_are_compared_with_the_smallest(tmp_path: Path) -> None:
    """The median of what follows the warm records, per rank, over that of the fewest ranks."""
    many = finished(tmp_path / "many", None, 32, [999.0, 60.0, 48.0, 44.0])
    few = finished(tmp_path / "few", 2, 8, [999.0, 15.0, 17.0, 16.0])
    rows = weak_scaling.collect((f"8:{many}", str(few)), warm=1)
    assert [(row["ranks"], row["images_per_s"], row["per_rank"]) for row in rows] == [(2, 16, 8), (8, 48, 6)]
    assert [row["efficiency"] for row in rows] == [1.0, 0.75]
    assert [rows[1][name] for name in ("slowest", "fastest", "records", "data_wait")] == [44.0, 60.0, 3, 0.25]
    assert "75.0%" in shown(weak_scaling.table(rows))


def test_runs_that_cannot_be_compared_are_refused(tmp_path: Path) -> None:
    first = finished(tmp_path / "first", 2, 8, [1.0, 2.0])
    other = finished(tmp_path / "other", 4, 16, [1.0, 2.0], width=16)
    batch = finished(tmp_path / "batch", 4, 8, [1.0, 2.0])
    unknown = finished(tmp_path / "unknown", None, 8, [1.0, 2.0])
    for texts, warm, said in (
        ((first, other), 1, "2 and 4 ranks train different models"),
        ((first, batch), 1, "batch 8 on 2 ranks and 8 on 4: 16 would be"),
        ((unknown,), 1, r"no startup.json; say how many ranks it had: N:"),
        ((tmp_path / "nothing",), 1, "is no finished run of aeris.train: no config.json$"),
        ((first,), 2, "2 records, and --warm 2"),
    ):
        with pytest.raises(ValueError, match=said):
            weak_scaling.collect(tuple(map(str, texts)), warm)


def test_numbers_of_ranks_and_launchers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert starting.counts("1,8,32") == [1, 8, 32]
    for text in ("", "0,1", "2,1", "2,2", "a", "1,,2"):
        with pytest.raises(ValueError, match="rising numbers"):
            starting.counts(text)
    options = weak_scaling.Options(ranks="2,3", layout="pp 2")
    with pytest.raises(ValueError, match=r"--ranks 3 is no multiple of the 2 of --layout pp 2"):
        weak_scaling.train(options, [], tmp_path)
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
    assert "20.00" in shown(startup.table(found))


def shown(table: Table) -> str:
    """Print a table to text."""
    with (console := Console(width=120)).capture() as capture:
        console.print(table)
    return capture.get()


@pytest.mark.slow
def test_a_start_is_measured(tmp_path: Path) -> None:
    """One real start: its parts are read, summed and written."""
    program = [sys.executable, "-m", "benchmarks.startup", "--ranks", "1", "--rounds", "1"]
    files = ["--csv", str(tmp_path / "start.csv"), "--plot", str(tmp_path / "start.png")]
    subprocess.run([*program, *files], check=True, cwd=ROOT, timeout=300)
    with (tmp_path / "start.csv").open() as file:
        seconds = {row["part"]: float(row["seconds"]) for row in csv.DictReader(file)}
    assert {"imports", "model", "first batch", "first step"} <= seconds.keys()
    assert seconds["imports"] < seconds["first step done"] < seconds["program"]
    assert (tmp_path / "start.png").stat().st_size > 1000


def test_the_batch_grows_with_the_replicas(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The commands are ones that the trainer understands, with flags of the user's own behind."""
    commands: list[list[str]] = []

    def run(command: list[str], threads: int) -> starting.Spent:
        assert threads >= 1
        commands.append(command)
        return starting.Spent(1.0, 1.0)

    monkeypatch.setattr(weak_scaling, "run", run)
    options = weak_scaling.Options(ranks="2,6", layout="wp 1x2", batch=3, steps=5, launcher="torchrun")
    found = weak_scaling.train(options, ["--train.microbatch", "3"], tmp_path)
    assert found == [f"2:{tmp_path / 'ranks_2'}", f"6:{tmp_path / 'ranks_6'}"]
    for ranks, dp, command in zip((2, 6), (1, 3), commands):
        assert command[: command.index("aeris.train")] == starting.started(ranks, "torchrun")
        config = parse(command[command.index("aeris.train") + 1 :]).config
        assert (config.train.batch, config.train.microbatch, config.train.images) == (3 * dp, 3, 15 * dp)
        layout = config.parallel
        assert (layout.dp, layout.wp_y, layout.wp_x, layout.pp, layout.sp) == (dp, 1, 2, 1, 1)


def test_weak_scaling_is_drawn(tmp_path: Path) -> None:
    runs = [finished(tmp_path / f"r{n}", n, 4 * n, [1.0 * n, 2.0 * n, 1.5 * n]) for n in (1, 2)]
    rows = weak_scaling.collect(tuple(map(str, runs)), warm=1)
    weak_scaling.draw(rows, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000
