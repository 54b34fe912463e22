"""Weak and strong scaling, trained, collected and planned; and the program that runs all benchmarks."""

from __future__ import annotations

import csv
import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from aeris.presets import PRESETS
from benchmarks import forked, run, scaling, strong_scaling, weak_scaling
from benchmarks.parallelism import read_layout
from benchmarks.records import Row
from benchmarks.scaling import Case
from benchmarks.scaling_picture import draw, family, shares
from swipe.mesh import ParallelDims
from tests.harness import ROOT

TINY = PRESETS["tiny"]()


def finished(directory: Path, ranks: int | None, batch: int, speeds: list[float], width: int = 8) -> Path:
    """Write what a finished run leaves for the tables of scaling."""
    directory.mkdir(parents=True)
    config = {"model": {"width": width}, "train": {"batch": batch, "microbatch": 1}}
    if ranks:
        config["parallel"] = {"dp": ranks, "wp_y": 1, "wp_x": 1, "pp": 1, "sp": 1}
        (directory / "startup.json").write_text(json.dumps({"ranks": ranks, "parts": {}}))
    (directory / "config.json").write_text(json.dumps(config))
    sums = {"tflops_sustained": 0.5, "tflops_peak": 0.6}
    records = [{"images_seen": 1, "slow": []}]
    records += [{"images_per_s": s, "data_wait": 0.25, **(sums if n else {})} for n, s in enumerate(speeds)]
    (directory / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return directory


def test_finished_runs_are_compared_with_the_smallest(tmp_path: Path) -> None:
    """The median of what follows the warm records, per rank, over that of the fewest ranks."""
    many = finished(tmp_path / "many", None, 32, [999.0, 60.0, 48.0, 44.0])
    few = finished(tmp_path / "few", 2, 8, [999.0, 15.0, 17.0, 16.0])
    rows = scaling.collect((f"8:{many}", str(few)), 1, weak_scaling.problem)
    columns = ("layout", "ranks", "images_per_s", "efficiency", "shared_cores")
    assert [tuple(row[name] for name in columns) for row in rows] == [
        ("dp 2", 2, 16, 1.0, ""),
        ("chosen", 8, 48, 0.75, ""),
    ]
    assert [rows[1][name] for name in ("slowest", "fastest", "data_wait")] == [44.0, 60.0, 0.25]
    assert [rows[1][name] for name in ("tflops", "tflops_peak")] == [0.5, 0.6]
    short = finished(tmp_path / "short", 1, 1, [1.0])  # one step has no sustained rate yet
    assert scaling.read_run(str(short), 0)[0]["tflops"] == ""


def test_runs_that_cannot_be_compared_are_refused(tmp_path: Path) -> None:
    first = finished(tmp_path / "first", 2, 8, [1.0, 2.0])
    other = finished(tmp_path / "other", 4, 16, [1.0, 2.0], width=16)
    same = finished(tmp_path / "same", 4, 8, [1.0, 2.0])
    grown = finished(tmp_path / "grown", 4, 16, [1.0, 2.0])
    unknown = finished(tmp_path / "unknown", None, 8, [1.0, 2.0])
    for texts, warm, module, said in (
        ((first, other), 1, weak_scaling, "2 and 4 ranks train different models"),
        ((first, same), 1, weak_scaling, "batch 8 on 2 ranks and 8 on 4: 16 would be"),
        ((first, grown), 1, strong_scaling, "batch 8 on 2 ranks and 16 on 4: it must be the same"),
        ((unknown,), 1, weak_scaling, r"no startup.json; say how many ranks it had: N:"),
        ((tmp_path / "nothing",), 1, weak_scaling, "is no finished run of aeris.train: no config.json$"),
        ((first,), 2, weak_scaling, "2 records, and --warm 2"),
    ):
        with pytest.raises(ValueError, match=said):
            scaling.collect(tuple(map(str, texts)), warm, module.problem)
    assert len(scaling.collect((str(first), str(grown)), 1, weak_scaling.problem)) == 2
    assert len(scaling.collect((str(first), str(same)), 1, strong_scaling.problem)) == 2


def test_the_batch_grows_with_the_replicas() -> None:
    options = weak_scaling.Options(ranks="2,6", layout="wp 1x2", batch=6)
    found, alone = weak_scaling.cases(options, read_layout(options.layout))
    assert found == [Case(ParallelDims(1, 1, 2), 6), Case(ParallelDims(3, 1, 2), 18)]
    assert alone == Case(ParallelDims(), 3)  # as much work as a rank of a replica has
    config = found[1].config(TINY, 5)
    assert (config.train.batch, config.train.images, config.checkpoint.every_images) == (18, 90, 90)
    assert (config.parallel.dp, config.parallel.wp_x, config.parallel.sp) == (3, 2, 1)
    for ranks, layout, batch, said in (
        ("2,3", "pp 2", 4, r"--ranks 3 is no multiple of the 2 of --layout pp 2"),
        ("2", "pp 2", 3, r"batch of 3 is no multiple of the 2 ranks of a replica.*--batch 4"),
        ("2", "dp 2", 4, r"leave dp out"),
    ):
        with pytest.raises(ValueError, match=said):
            weak_scaling.cases(
                weak_scaling.Options(ranks=ranks, layout=layout, batch=batch), read_layout(layout)
            )
    with pytest.raises(ValueError, match=r"--train.batch is chosen by the benchmark"):
        scaling.settings("tiny", ["--train.batch", "3"])
    assert scaling.settings("tiny", ["--model.width", "32"]).model.width == 32


def test_every_axis_takes_all_ranks_in_turn() -> None:
    """pp 8 is more than the stages of tiny, sp 8 more than its heads, dp 8 as many as its microbatches."""
    config = dataclasses.replace(TINY, train=dataclasses.replace(TINY.train, batch=8, microbatch=1))
    options = strong_scaling.Options(ranks="1,2,8")
    found = [str(dims) for dims in strong_scaling.layouts(options, config)]
    one = "dp 1 x wp 1x1 x pp 1 x sp 1"
    two = [one.replace(part, new) for part, new in
           (("dp 1", "dp 2"), ("1x1", "1x2"), ("pp 1", "pp 2"), ("sp 1", "sp 2"))]  # fmt: skip
    assert found == [one, *two, one.replace("dp 1", "dp 8"), one.replace("1x1", "2x4")]
    asked = strong_scaling.Options(layouts=("pp 2 x sp 2", "pp 2 x sp 2"))
    assert strong_scaling.layouts(asked, config) == [ParallelDims(pp=2, sp=2)]
    with pytest.raises(ValueError, match="does not divide the 4 attention heads"):
        strong_scaling.layouts(strong_scaling.Options(layouts=("sp 3",)), config)
    with pytest.raises(ValueError, match="neither dp, wp, pp nor sp"):
        strong_scaling.layouts(strong_scaling.Options(ranks="7"), config)


def test_shared_cores_are_told_from_communication(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank alone makes 10 images/s, four at once 5 each, four together 16; the middle of three rounds."""
    called: list[tuple[int, int, int]] = []

    def train(config: object, directory: Path, *, ranks: int, copies: int, threads: int) -> list[Path]:
        called.append((ranks, copies, threads))
        speed = {(1, 1): 10.0, (1, 4): 5.0}.get((ranks, copies), [9.0, 16.0, 17.0][len(called) // 3 - 1])
        return [finished(directory / f"r{n}", None, 4, [speed] * 2) for n in range(copies)]

    monkeypatch.setattr(scaling, "train_at_once", train)
    monkeypatch.setattr(scaling, "cores", lambda: 8)
    options, alone = weak_scaling.Options(steps=2, warm=1, rounds=3), Case(ParallelDims(), 4)
    rows = scaling.measure(options, TINY, [alone, Case(ParallelDims(dp=4), 16)], alone, tmp_path)
    assert called == 3 * [(1, 1, 2), (1, 4, 2), (4, 1, 2)]
    names = ("layout", "ranks", "images_per_s", "efficiency", "shared_cores", "communication")
    assert [tuple(row[name] for name in names) for row in rows] == [
        ("1 rank", 1, 10.0, 1.0, 1.0, 1.0),
        ("dp 4", 4, 16.0, 0.4, 0.5, 0.8),
    ]
    parts = shares(rows[1])
    assert sum(parts.values()) == pytest.approx(1.0)
    assert parts["lost to shared cores"] == 0.5
    assert parts["lost to communication and waiting"] == pytest.approx(0.1)
    gained = shares(rows[1] | {"efficiency": 0.6})  # ranks that together divide the optimizer's work
    assert (gained["lost to shared cores"], gained["lost to communication and waiting"]) == (0.4, 0.0)
    with pytest.raises(ValueError, match="--steps 2, of which --warm 2"):
        scaling.measure(weak_scaling.Options(steps=2, warm=2), TINY, [alone], alone, tmp_path)


def planned(nodes: str, batch: str = "", layout: str = "dp 1", preset: str = "tiny") -> list[Row]:
    """Plan tiny on the generic CPU, in the manner of weak scaling."""
    options = weak_scaling.Options(predict=preset, machine="cpu", nodes=nodes)
    return scaling.predict(options, TINY, layout, lambda dp: int(batch or 2 * dp))


def test_losses_of_planned_runs_add_up() -> None:
    rows = planned("1,4", layout="pp 2")
    assert [(row["ranks"], row["nodes"], row["batch"]) for row in rows] == [(8, 1, 8), (32, 4, 32)]
    for row in rows:
        assert row["efficiency"] == pytest.approx(
            row["images_per_s"] / row["ranks"] / (rows[0]["images_per_s"] / 8), rel=1e-3
        )
        lost = sum(row[name] for name in row if name.startswith("lost_"))
        assert row["efficiency"] + lost == pytest.approx(1.0, abs=1e-4)
    assert rows[0]["efficiency"] == 1.0
    for nodes, batch, layout, preset, said in (
        ("1,2", "", "pp 3", "tiny", r"--nodes 1: 8 devices make no whole replicas of 3 \(pp 3\); 3 would"),
        ("2,1", "", "pp 2", "tiny", r"--nodes 2,1: give rising"),
        ("1", "3", "pp 2", "tiny", "dp 4"),
        ("1", "", "", "40b", "no published layout of 40b on cpu: give one with --layout"),
    ):
        with pytest.raises(ValueError, match=said):
            planned(nodes, batch, layout, preset)
    assert str(scaling.published_replica("40b", "alcf-aurora")) == "dp 1 x wp 6x6 x pp 20 x sp 12"


def test_scaling_is_drawn(tmp_path: Path) -> None:
    """Of runs that were measured, collected and planned, along one axis or several."""
    assert [family(text) for text in ("1 rank", "dp 4", "dp 2 x wp 2x2 x pp 2", "")] == [
        "",
        "dp",
        "wp x pp",
        "",
    ]
    base = {"images_per_s": 4.0, "slowest": 3.0, "fastest": 5.0, "efficiency": 0.5}
    measured = [{"layout": "1 rank", "ranks": 1, **base, "shared_cores": 1.0}]
    measured += [{"layout": name, "ranks": 2, **base, "shared_cores": 0.7} for name in ("dp 2", "pp 2")]
    collected = [{"layout": "chosen", "ranks": n, **base, "shared_cores": ""} for n in (1, 2)]
    known = weak_scaling.beside_published([{"nodes": n} for n in (256, 512, 768)], "13b", "alcf-aurora")
    assert [row["published"] for row in known] == [1.0, "", pytest.approx(0.607 / 0.609)]
    future = [row | {"published": 0.9} for row in planned("1,4")]
    every: tuple[list[Row], ...] = (measured, collected, future)
    for number, rows in enumerate(every):
        draw(rows, tmp_path / f"{number}.png", "title", what="strong scaling")
        assert (tmp_path / f"{number}.png").stat().st_size > 1000


def test_runs_at_once_and_a_run_that_fails(tmp_path: Path) -> None:
    """Two runs that do not know each other, and one of two ranks; then one whose data are not there."""
    small = dataclasses.replace(TINY.model, width=32, heads=2, hidden=32, layers=2)
    config = dataclasses.replace(TINY, model=small, train=dataclasses.replace(TINY.train, microbatch=1))
    for dp, copies in ((1, 2), (2, 1)):
        case = Case(ParallelDims(dp=dp), 2)
        found = forked.train_at_once(
            case.config(config, 3), tmp_path / f"dp {dp}", ranks=dp, copies=copies, threads=1
        )
        assert len(found) == copies
        for directory in found:
            row, _ = scaling.read_run(f"{dp}:{directory}", 1)
            assert row["images_per_s"] > 0 and row["tflops_peak"] >= row["tflops"] > 0
    lost = dataclasses.replace(config, data=dataclasses.replace(config.data, store=str(tmp_path / "none")))
    with pytest.raises(ValueError, match=r"a run of the benchmark ended with status \d+: .*none"):
        forked.train_at_once(Case(ParallelDims(), 1).config(lost, 1), tmp_path, ranks=1, copies=1, threads=1)


def test_started_by_its_path_from_anywhere(tmp_path: Path) -> None:
    program = [sys.executable, str(ROOT / "benchmarks" / "weak_scaling.py"), "--ranks", "2,1"]
    ran = subprocess.run(program, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ran.returncode == 2 and "rising numbers" in ran.stderr, ran.stderr


def test_all_benchmarks_are_run() -> None:
    """Every program of the directory, and each can compare its rows."""
    sources = {path.stem: path.read_text() for path in (ROOT / "benchmarks").glob("*.py")}
    programs = {name for name, source in sources.items() if "run_program(main)" in source}
    assert programs - {"run"} == {*run.BENCHMARKS}
    assert all("deliver(" in sources[name] for name in run.BENCHMARKS)


WRITES = """
import sys
open(sys.argv[1], "w").write("ranks,speed\\n1,2\\n")
print("now over before\\n ranks  speed\\n 1      0.50")
sys.exit(int(sys.argv[2]))
"""


def test_one_that_fails_does_not_stop_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    programs = {
        "good": [WRITES, str(tmp_path / "out" / "good.csv"), "0"],
        "slower": [WRITES, str(tmp_path / "out" / "slower.csv"), "1"],
        "crash": ["raise KeyError('a bug')"],
        "wrong": ["import sys; sys.exit('error: no such flag')"],
        "late": ["import time; time.sleep(60)"],
        "absent": [""],
    }
    known = {name: run.Benchmark(needs="no_such_package" * (name == "absent")) for name in programs}
    monkeypatch.setattr(run, "BENCHMARKS", known)
    monkeypatch.setattr(run, "command", lambda name, options: [sys.executable, "-S", "-c", *programs[name]])
    monkeypatch.setattr(sys, "argv", ["run", "--out", str(tmp_path / "out"), "--timeout-s", "1"])
    with pytest.raises(SystemExit, match="^1$"):
        run.main()
    lines = capsys.readouterr().out.splitlines()
    states = {line.split()[0]: line for line in lines if line.split()[0] in programs}
    assert list(states) == list(programs)
    for name, said in (
        ("good", "ok"), ("slower", "worse"), ("crash", "failed    status 1: KeyError: 'a bug'"),
        ("wrong", "failed    status 1: error: no such flag"), ("late", "failed    not done after 1 s"),
        ("absent", "left out  the package no_such_package"),
    ):  # fmt: skip
        assert said in states[name]
    assert any("0.50" in line for line in lines)
    assert lines[-1].startswith("to look at: slower worse, crash failed, wrong failed, late failed;")


def test_the_file_to_compare_with(tmp_path: Path) -> None:
    """One of an earlier call, else the newest record of that hardware; its rows stay where they are."""
    options = run.Options(out=tmp_path / "out", compare=tmp_path, plots=False)
    assert run.earlier("step", options) is None
    for name in ("step_cpu_2026-01-01", "step_cpu_2026-11-30", "step_h200_2027-01-01"):
        (tmp_path / f"{name}.csv").touch()
    assert run.earlier("step", options) == tmp_path / "step_cpu_2026-11-30.csv"
    assert run.earlier("step", dataclasses.replace(options, hardware="h200")).name.startswith("step_h200")  # type: ignore[union-attr]
    (tmp_path / "step.csv").touch()
    assert run.command("step", options)[-2:] == ["--compare", str(tmp_path / "step.csv")]
    assert "--compare" not in run.command("aurora", options)
    for words, said in (
        (["--only", "speed"], "--only speed: choose from step, attention"),
        (["--compare", str(tmp_path / "none")], "there is no such directory"),
        (["--compare", str(tmp_path), "--out", str(tmp_path)], "the earlier files would be lost"),
    ):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(ValueError, match=said):
            patch.setattr(sys, "argv", ["run", *words])
            run.main()


def test_rows_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The program on runs that are there: a file, a comparison with it, and a status that says worse."""
    for speed, status in ((16.0, 0), (8.0, 1)):
        few = finished(tmp_path / f"few {speed}", 2, 8, [speed, speed])
        table = tmp_path / f"{speed}.csv"
        words = ["weak_scaling", "--collect", str(few), "--warm", "1", "--csv", str(table)]
        words += ["--compare", str(tmp_path / "16.0.csv")] if status else []
        monkeypatch.setattr(sys, "argv", words)
        with pytest.raises(SystemExit, match=f"^{status}$"):
            weak_scaling.main()
        with table.open(newline="") as file:
            (row,) = csv.DictReader(file)
        assert (row["layout"], float(row["images_per_s"])) == ("dp 2", speed)
