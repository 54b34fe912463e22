"""Job scripts: shellcheck, the same words as `launch submit`, and every one run under pretended schedulers.

The shims (tests/launch/shims) execute the very commands of a small run on one rank, and of the largest one as
a dry run; the words of the others are tried here: the mesh must have the ranks of the command line.
"""

from __future__ import annotations

import csv
import json
import os
import re
import shlex
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import pytest

import aeris.config
from aeris import forecast, train
from aeris.data import convert
from aeris.parallelize import choose_degrees
from benchmarks import strong_scaling, weak_scaling
from launch.__main__ import run_main
from launch.layouts import LAYOUTS
from launch.machines import MACHINES, SETTINGS

ROOT = Path(__file__).resolve().parents[2]
SHIMS = ROOT / "tests" / "launch" / "shims"
PBS, SLURM = sorted((ROOT / "pbs").glob("*.sh")), sorted((ROOT / "launch" / "slurm").glob("*.sh"))
BESIDE = [*(ROOT / "pbs" / "env").glob("*.sh"), *(ROOT / "launch" / "slurm" / "env").glob("*.sh")]
SMALL = "--train.images 4 --checkpoint.every-images 2 --device cpu"
# Script -> settings to run it with, beside a run directory; "ranks": what becomes of programs (shim.py).
RUNS: dict[str, dict[str, str]] = {
    "pbs/train_10080nodes.sh": {"ranks": "dry run"},
    "pbs/train_1.3b_160nodes.sh": {},
    "pbs/train_13b.sh": {"NODES": "256", "DP": "1"},
    "pbs/train_80b.sh": {"NODES": "1664", "DP": "1"},
    "pbs/train_1node.sh": {"PRESET": "tiny", "DATA": "sample", "FLAGS": SMALL, "ranks": "1"},
    "pbs/weak_scaling.sh": {"REPLICAS": "1 2 3", "ranks": "fail 25920"},
    "pbs/strong_scaling.sh": {"REPLICAS": "1 2"},
    "launch/slurm/train_40b.sh": {},
    "launch/slurm/train_1.3b.sh": {"PRESET": "1.3b-6h"},
    "launch/slurm/train_1node.sh": {"PRESET": "tiny", "DATA": "sample"},
    "launch/slurm/weak_scaling.sh": {"REPLICAS": "2 4"},
    "launch/slurm/strong_scaling.sh": {"REPLICAS": "2 4"},
    "pbs/convert.sh": {"FLAGS": "--window 6 --allow-missing-static --dry-run", "PROCESSES": "1"},
    "launch/slurm/convert.sh": {"FLAGS": "--window 6 --allow-missing-static --dry-run", "PROCESSES": "1"},
}


class Ran(NamedTuple):
    """How a script went: its status, all it printed, and the words of every shim that was called."""

    status: int
    output: str
    calls: list[tuple[str, list[str]]]

    def named(self, program: str) -> list[list[str]]:
        """List the words of every call of one shim."""
        return [words for name, words in self.calls if name == program]


def submit(script: str, tmp_path: Path, settings: dict[str, str], *flags: str) -> Ran:
    """Give a script to the shim of its scheduler, which runs it at once."""
    log = tmp_path / "log"
    given = {name: value for name, value in settings.items() if name != "ranks"}
    pairs = ",".join(f"{name}={value}" for name, value in given.items())
    command = (
        ["qsub", *flags, "-v", pairs] if script.startswith("pbs/") else ["sbatch", f"--export=ALL,{pairs}"]
    )
    hidden = ("PBS_", "SLURM_", "PALS_", "PMI", "OMPI_", "RANK", "WORLD_SIZE", "MASTER_", "SHIM_", *SETTINGS)
    environ = {name: value for name, value in os.environ.items() if not name.startswith(hidden)}
    environ |= {"SHIM_LOG": str(log), "SHIM_ROOT": str(ROOT), "SHIM_RANKS": settings.get("ranks", "")}
    environ |= {"OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path), "SHIM_PYTHON": sys.executable}
    environ["PATH"] = os.pathsep.join([str(SHIMS), str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        [*command, script], cwd=ROOT, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, timeout=300, check=False,
    )  # fmt: skip
    calls = [json.loads(line) for line in log.read_text().splitlines()]
    return Ran(done.returncode, done.stdout, [(call["program"], call["words"]) for call in calls])


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Future[Ran]]:
    """Run every script, two at a time."""
    pool, started = ThreadPoolExecutor(2), {}
    for script, settings in RUNS.items():
        place = tmp_path_factory.mktemp("script")
        here = {"RUN_DIR": str(place / "run"), **settings}
        if script.endswith("convert.sh"):
            source = ROOT / "tests" / "data" / "files" / "ecmwf_open_10deg_20240603.nc"
            here = {"SOURCE": str(source), "STORE": str(place / "store"), **settings}
        # The one node has a spare, to be measured with it.
        flags = ["-l", "select=2"] if script == "pbs/train_1node.sh" else []
        started[script] = pool.submit(submit, script, place, here, *flags)
    pool.shutdown(wait=False)
    return started


def test_there_are_scripts_and_they_run_in_the_tests() -> None:
    present = {path.relative_to(ROOT).as_posix() for path in (*PBS, *SLURM)}
    assert present - set(RUNS) == {"pbs/forecast.sh", "launch/slurm/forecast.sh"}  # after a training, below
    assert set(RUNS) <= present and BESIDE


def test_shellcheck() -> None:
    """Every variable is quoted, every file that is read in is known, every name is set."""
    checker = Path(sys.executable).parent / "shellcheck"
    command = [str(checker) if checker.exists() else "shellcheck", "-x", *map(str, (*PBS, *SLURM, *BESIDE))]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("script", [*PBS, *SLURM], ids=lambda path: path.relative_to(ROOT).as_posix())
def test_outside_of_a_job_a_script_says_so(script: Path) -> None:
    """In one line, before it loads anything, and what to use instead."""
    hidden = ("PBS_", "SLURM_")
    environ = {name: value for name, value in os.environ.items() if not name.startswith(hidden)}
    done = subprocess.run(
        ["bash", script], cwd=ROOT, env=environ, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and not done.stdout
    (line,) = [line for line in done.stderr.splitlines() if "aeris" in line]
    names = ("PBS_NODEFILE", "qsub") if script in PBS else ("SLURM_JOB_ID", "sbatch")
    assert all(name in line for name in (*names, "python -m launch job --machine local"))
    assert "module" not in done.stderr


@pytest.mark.parametrize("script", [*PBS, *SLURM], ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_logic_and_no_unknown_setting(script: Path) -> None:
    """Directives, a directory, an environment, a program; and settings that travel to the next job."""
    text = script.read_text()
    words = re.findall(r"^\s*(if|while|case|function|eval|sed|awk|trap|for)\b", text, re.MULTILINE)
    assert words == (["for"] if script.name.endswith("_scaling.sh") else [])
    assert text.count("\nexec python -m ") == 1 and "set -euo pipefail\n" in text
    used = {name for name in re.findall(r"\$\{([A-Z_]+)", text) if not name.startswith(("PBS_", "SLURM_"))}
    own = {"SOURCE", "STORE", "PROCESSES"} if script.name == "convert.sh" else set()
    assert used <= {*SETTINGS, "REPLICAS", *own}
    lacking = {name for name in used | {"VENV"} if not re.search(rf"^#.*\b{name}\b", text, re.MULTILINE)}
    assert not lacking, "settings the comment does not name"
    assert script.stat().st_mode & 0o111


@pytest.mark.parametrize(
    ("machine", "preset", "script"),
    sorted(
        {(m, p, y.script) for m, known in LAYOUTS.items() for p, y in known.items() if y.degrees.known > 1}
    ),
)
def test_submit_and_script_say_the_same(
    machine: str,
    preset: str,
    script: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The script's own defaults, nodes with spares and mesh, are those that `launch submit` works out."""
    text = (ROOT / script).read_text()
    nodes = re.search(r'NODES="\$\{NODES:-(\d+)\}"', text)
    flags = re.search(r"^(?:#PBS -l select=|#SBATCH --nodes=)(\d+)$", text, re.MULTILINE)
    queue = re.search(r"^(?:#PBS -q |#SBATCH --partition=)(\S+)$", text, re.MULTILINE)
    assert nodes and flags and queue
    monkeypatch.chdir(ROOT)
    assert run_main(["submit", preset, "--machine", machine, "--nodes", nodes[1], "--dry-run"]) == 0
    out = capsys.readouterr().out
    line = shlex.split(out.partition("submits: ")[2].splitlines()[0])
    assert {f"select={flags[1]}", f"--nodes={flags[1]}"} & set(line)
    assert queue[1] in line or f"--partition={queue[1]}" in line
    last = text[text.index("exec python") :].replace("\\\n", " ")
    last = re.sub(r"\$\{PRESET:-[\w.-]+\}", preset, re.sub(r"\$\{(?!PRESET)\w+:-([^{}]*)\}", r"\1", last))
    last = re.sub(r"\$\{\w+:-(runs/[^{}]*)\}", r"\1", last)
    words = shlex.split(last)
    assert f"check:   python -m {' '.join(words[words.index('--') + 1 : -1])} --dry-run" in out.splitlines()


@pytest.mark.slow
@pytest.mark.parametrize("script", RUNS)
def test_script_runs(script: str, runs: dict[str, Future[Ran]]) -> None:
    ran = runs[script].result()
    assert ran.status == 0, ran.output
    assert ran.named("module")
    starts = ran.named("mpiexec" if script.startswith("pbs/") else "srun")
    if script.endswith("convert.sh"):
        (start,) = starts  # one program on a node, free to use all its cores
        assert {"-n", "1"} <= set(start) or "--ntasks=1" in start
        assert "none" in start or "--cpu-bind=none" in start
        return
    trainings = [words for words in starts if "aeris.train" in words]
    assert len(trainings) == len(RUNS[script].get("REPLICAS", "1").split())
    for start in trainings:
        printed = shlex.join(["mpiexec" if script.startswith("pbs/") else "srun", *start])
        assert printed in ran.output  # the exact line


@pytest.mark.slow
@pytest.mark.parametrize("script", [name for name in RUNS if "convert" not in name and "1node" not in name])
def test_mesh_has_the_ranks_of_the_command(script: str, runs: dict[str, Future[Ran]]) -> None:
    """What the trainer makes of the words a script starts it with, on that many ranks."""
    for start in runs[script].result().named("mpiexec" if script.startswith("pbs/") else "srun"):
        if "aeris.train" in start:
            sizes = [word.rpartition("=")[2] for word in start if word.startswith("--ntasks=")]
            ranks = int(sizes[0] if sizes else start[start.index("-n") + 1])
            config = train.parse(start[start.index("aeris.train") + 1 :]).config
            aeris.config.check(config)
            assert choose_degrees(config, ranks).world == ranks


@pytest.mark.slow
@pytest.mark.parametrize("script", [name for name in RUNS if name.endswith("_scaling.sh")])
def test_scaling_of_the_sizes_that_were_finished(
    script: str, runs: dict[str, Future[Ran]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the first size measures the nodes; the last of one twin fails, which costs no other its row."""
    ran, module = runs[script].result(), strong_scaling if "strong" in script else weak_scaling
    starts = ran.named("mpiexec" if script.startswith("pbs/") else "srun")
    assert "aeris.probe" in starts[0] and not any("aeris.probe" in words for words in starts[1:])
    for start in starts[1:3]:
        found = train.parse(start[start.index("aeris.train") + 1 :])
        (found.run_dir / "config.json").write_text(json.dumps(asdict(found.config)))
    (words,) = (words for words in ran.named("python") if module.__name__ in words)
    monkeypatch.setattr(sys, "argv", words[1:])
    with pytest.raises(SystemExit, match="^0$"):
        module.main()
    with Path(words[words.index("--csv") + 1]).open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["efficiency"] for row in rows] == ["1.0", "1.0"]
    assert len({row["batch"] for row in rows}) == (1 if "strong" in script else 2)


@pytest.mark.slow
@pytest.mark.parametrize("script", [name for name in RUNS if name.endswith("convert.sh")])
def test_conversion_is_planned(
    script: str,
    runs: dict[str, Future[Ran]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (words,) = runs[script].result().named("mpiexec" if script.startswith("pbs/") else "srun")
    monkeypatch.setattr(sys, "argv", words[words.index("aeris.data.convert") :])
    convert.main()
    assert "6 x 6 points" in capsys.readouterr().out


@pytest.mark.slow
def test_full_machine(runs: dict[str, Future[Ran]]) -> None:
    """`bash pbs/train_10080nodes.sh` in its job: the exact line, and a dry run of 120,960 ranks behind it."""
    ran = runs["pbs/train_10080nodes.sh"].result()
    (start,) = [words for words in ran.named("mpiexec") if "aeris.train" in words]
    hosts = Path(start[start.index("--hostfile") + 1])
    assert hosts.parent.name == "job" and len(set(hosts.read_text().split())) == 10_080
    cores = ":".join(MACHINES["alcf-aurora"].cpu_bind)
    flags = f"--pmi=pmix -n 120960 --ppn 12 --hostfile {hosts} --cpu-bind list:{cores}"
    words = (
        f"-m aeris.train 40b --run-dir {hosts.parent.parent} --data.store era5 --checkpoint.every-minutes 15"
    )
    mesh = "--parallel.dp 14 --parallel.wp-y 6 --parallel.wp-x 6 --parallel.pp 20 --parallel.sp 12"
    python = Path(start[start.index("-m") - 1])  # pytest may run under another name of the same
    assert python.samefile(sys.executable)
    assert start == [*flags.split(), str(python), *words.split(), *mesh.split()]
    assert "shim: the dry run has 120960 ranks" in ran.output


@pytest.mark.parametrize(
    ("settings", "asked", "says"),
    [
        (
            {"NODES": "10079"},
            "10181",
            "10,079 nodes x 12 ranks = 120,948 ranks, but dp 14 x wp 6x6 x pp 20 x sp 12",
        ),
        ({"DP": "13"}, "10181", "10,080 nodes x 12 ranks = 120,960 ranks, but dp 13 x wp 6x6"),
        ({}, "10079", "10079"),  # fewer than the script starts on
    ],
)
def test_wrong_number_of_nodes_is_refused(
    settings: dict[str, str], asked: str, says: str, tmp_path: Path
) -> None:
    given = {"RUN_DIR": str(tmp_path / "run"), **settings}
    ran = submit("pbs/train_10080nodes.sh", tmp_path, given, "-l", f"select={asked}")
    assert ran.status == 2 and says in ran.output
    assert not ran.named("mpiexec")


@pytest.mark.slow
def test_small_run_is_real_and_its_forecast_too(runs: dict[str, Future[Ran]], tmp_path: Path) -> None:
    """On one node: a rank trains and saves; the forecast scripts find that run."""
    ran = runs["pbs/train_1node.sh"].result()
    (start,) = [words for words in ran.named("mpiexec") if "aeris.train" in words]
    assert start[1:5] == ["-n", "12", "--ppn", "12"]
    assert [words[1:3] for words in ran.named("mpiexec") if "aeris.probe" in words] == [["-n", "24"]]
    assert "preflight failed" not in ran.output
    run_dir = Path(start[start.index("--run-dir") + 1])
    saved = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
    assert [int(name.removeprefix("images_")) for name in saved] == [2, 4], ran.output
    flags = "--init 2000-05-31T00 --lead-h 6 --members 2 --device cpu"
    given = {"RUN_DIR": str(run_dir), "OUT": str(tmp_path / "f.zarr"), "FLAGS": flags, "ranks": "1"}
    first = submit("pbs/forecast.sh", tmp_path, given)
    assert first.status == 0, first.output
    assert (tmp_path / "f.zarr").is_dir()
    twin = submit("launch/slurm/forecast.sh", tmp_path, given)  # it is there: done
    assert twin.status == 0, twin.output
    ((*_, launcher), (*_, other)) = first.named("mpiexec"), twin.named("srun")
    same = [words[words.index("aeris.forecast") + 1 :] for words in (launcher, other)]
    assert same[0] == same[1] and forecast.parse(same[1]).out == tmp_path / "f.zarr"
