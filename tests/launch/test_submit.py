"""`python -m launch`: submit prints and submits exact lines, refuses what cannot run; errors are one line."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from launch import exits, submit
from launch.__main__ import COMMANDS, run_main
from launch.machines import MACHINES, SETTINGS

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _at_the_top(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for name in SETTINGS:
        monkeypatch.delenv(name, raising=False)


def test_full_machine_dry_run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", None)  # a dry run calls nothing
    assert run_main(["submit", "40b", "--nodes", "10080", "--account", "climate", "--dry-run"]) == exits.DONE
    first, second, submits, runs, check = capsys.readouterr().out.splitlines()
    assert first == "10,080 nodes and 101 spares, prod for 24:00:00"
    assert second == "120,960 ranks as dp 14 x wp 6x6 x pp 20 x sp 12, 100 microbatches a replica and step"
    settings = "PRESET=40b,NODES=10080,DP=14,RUN_DIR=runs/40b,DATA=era5,CHAIN=pbs/train_10080nodes.sh"
    where = "-l filesystems=flare -l place=scatter -k doe"
    asked = f"-A climate -q prod -l select=10181 -l walltime=24:00:00 {where} -v {settings}"
    assert submits == f"submits: qsub {asked} pbs/train_10080nodes.sh"
    cores = ":".join(MACHINES["alcf-aurora"].cpu_bind)
    start = f"mpiexec --pmi=pmix -n 120960 --ppn 12 --hostfile runs/40b/job/hosts.1 --cpu-bind list:{cores}"
    words = "python -m aeris.train 40b --run-dir runs/40b --data.store era5 --checkpoint.every-minutes 15"
    mesh = "--parallel.dp 14 --parallel.wp-y 6 --parallel.wp-x 6 --parallel.pp 20 --parallel.sp 12"
    assert runs == f"runs:    {start} {words} {mesh}"
    assert check == f"check:   {words} {mesh} --dry-run"


def test_settings_in_the_environment_travel(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """PBS takes only what is named; what Slurm takes along by itself must not overrule what is said here."""
    for name, value in {
        "VENV": "/v",
        "ARCHIVE": "env.tar",
        "RUN_DIR": "old",
        "FLAGS": "--x",
        "HOME": "h",
    }.items():
        monkeypatch.setenv(name, value)
    assert run_main(["submit", "tiny", "--nodes", "1", "--dry-run"]) == exits.DONE
    settings = "PRESET=tiny,NODES=1,RUN_DIR=runs/tiny,DATA=sample,ARCHIVE=env.tar,FLAGS=,CHAIN=,VENV=/v"
    assert f" -v {settings} pbs/train_1node.sh\n" in capsys.readouterr().out
    assert run_main(["submit", "tiny", "--nodes", "1", "--dry-run", "--archive", "a"]) == exits.DONE
    assert ",ARCHIVE=a," in capsys.readouterr().out


@pytest.mark.parametrize(
    ("machine", "answers", "depends"),
    [
        ("alcf-aurora", ("7.aurora-pbs-0001.cm\n", "8.aurora-pbs-0001.cm\n", "9\n"), "-W depend={}"),
        ("lumi", ("Submitted batch job 7\n", "Submitted batch job 8\n", "9\n"), "--dependency={}"),
    ],
)
def test_jobs_one_after_the_other(
    machine: str,
    answers: tuple[str, ...],
    depends: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Each waits for the one before, however that ends, and none submits another."""
    called: list[str] = []

    def submitted(line: list[str], **named: Any) -> Any:
        called.append(shlex.join(line))
        return subprocess.CompletedProcess(line, 0, answers[len(called) - 1])

    monkeypatch.setattr(subprocess, "run", submitted)
    words = ["submit", "40b", "--machine", machine, "--nodes", "720", "--jobs", "3", "--no-check"]
    assert run_main([*words, "--dry-run"]) == exits.DONE and not called
    lines = [line[9:] for line in capsys.readouterr().out.splitlines() if line.startswith("submits: ")]
    assert run_main(words) == exits.DONE
    jobs = [answer.split()[-1] for answer in answers]
    assert called == [lines[0], lines[1].replace("ID1", jobs[0]), lines[2].replace("ID2", jobs[1])]
    assert depends.format(f"afterany:{jobs[1]}") in called[2] and "afterany" not in called[0]
    assert all("CHAIN= " in line for line in called)
    called, answers = [], ("none\n",)
    assert run_main(words) == exits.MISTAKE and len(called) == 1
    assert "names no job in 'none\\n': 2 more are not submitted" in capsys.readouterr().err


def test_submitting_calls_that_very_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[list[str]] = []

    def qsub(line: list[str], **named: Any) -> Any:
        called.append(line)
        return subprocess.CompletedProcess(line, 3, "")

    monkeypatch.setattr(subprocess, "run", qsub)
    words = "submit tiny --nodes 1 --no-check --run-dir".split()
    words += ["my runs/a", "--", "--train.images", "40"]
    assert run_main(words) == 3  # qsub's own status
    submits, runs, _ = capsys.readouterr().out.splitlines()[-3:]
    assert called == [shlex.split(submits.partition(" ")[2])]
    # In the debug queue a user has one job: no chain. No mesh is asked for: the trainer chooses.
    settings = "PRESET=tiny,NODES=1,RUN_DIR=my runs/a,DATA=sample,FLAGS=--train.images 40,CHAIN="
    assert called[0][-3:] == ["-v", settings, "pbs/train_1node.sh"] and called[0][1:3] == ["-q", "debug"]
    assert shlex.split(runs)[-2:] == ["--train.images", "40"] and "--parallel" not in runs


@pytest.mark.parametrize(
    ("prints", "says"),
    [
        ("error: --train.batch 3 is odd", "not submitted: aeris.train says: --train.batch 3 is odd"),
        (
            "╭─ Unrecognized options ─╮\n│ Unrecognized options:  │\n│ --train.nonsense, 280  │\n│ ───── │\n"
            "│ For full helptext, run │\n╰────────────────────────╯",
            "not submitted: aeris.train says: Unrecognized options: --train.nonsense, 280",
        ),
        ("Traceback\nModuleNotFoundError: No module named 'torch'", "torch, or give --no-check"),
        ("", "not submitted: aeris.train says: status 2"),
    ],
)
def test_what_the_program_refuses_is_not_submitted(
    prints: str,
    says: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """The very words that are printed as the check are tried; those of a dry run are not."""
    fake, asked, given = tmp_path / "python", tmp_path / "asked", tmp_path / "given"
    fake.write_text(f"#!/bin/sh\necho $@ > {asked}\ncat >&2 <<'END'\n{prints}\nEND\nexit 2\n")
    (tmp_path / "qsub").write_text(f"#!/bin/sh\ntouch {given}\n")
    for path in (fake, tmp_path / "qsub"):
        path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(sys, "executable", str(fake))
    words = ["submit", "tiny", "--nodes", "1", "--"]
    assert run_main([*words[:-1], "--dry-run"]) == exits.DONE and not asked.exists()
    assert "12 ranks, the layout is chosen at the start" in capsys.readouterr().out
    assert run_main([*words, "--train.nonsense", "280"]) == exits.MISTAKE and not given.exists()
    said = capsys.readouterr()
    assert f"check:   python {asked.read_text()}" in said.out
    assert len(said.err.splitlines()) == 1 and says in said.err
    assert run_main([*words[:-1], "--no-check"]) == exits.DONE and given.exists()
    fake.write_text("#!/bin/sh\n")
    given.unlink()
    assert run_main(words) == exits.DONE and given.exists()


@pytest.mark.slow
def test_a_flag_that_is_unknown_is_refused_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    """As the real program says it."""
    assert run_main(["submit", "tiny", "--nodes", "1", "--", "--train.nonsense", "280"]) == exits.MISTAKE
    said = "error: not submitted: aeris.train says: Unrecognized options: --train.nonsense, 280\n"
    assert capsys.readouterr().err == said


def test_lumi(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main(["submit", "1.3b-24h", "--machine", "lumi", "--nodes", "80", "--dry-run"]) == exits.DONE
    out = capsys.readouterr().out
    assert "640 ranks as dp 1 x wp 4x4 x pp 10 x sp 4, 20 microbatches" in out
    assert "submits: sbatch --partition=standard-g --nodes=81 --time=48:00:00" in out
    assert "--nodes=80 --ntasks=640 --ntasks-per-node=8" in out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("40b --nodes 10079", "error: 10,079 nodes x 12 ranks = 120,948 ranks"),
        (
            "40b --nodes 720 -- --train.batch 100 --train.microbatch 3",
            "microbatches of 3 do not divide a batch",
        ),
        ("13b --nodes 768", "dp 3 does not divide the 1400 microbatches of a step; dp 2 or 4 does"),
        (
            "13b --nodes 512 --queue debug",
            "queue debug does not take 518 nodes; they take: prod 256 to 1,024, 12 h",
        ),
        ("13b --nodes 512 --walltime 13:00:00", "no queue takes 518 nodes for 13:00:00"),
        ("40b --nodes 10080 --spares 600", "alcf-aurora has 10,624, so there can be at most 544 --spares"),
        (
            "13b --machine lumi --nodes 128",
            "no layout of '13b' for lumi; known are tiny, 1.3b-6h, 1.3b-24h, 40b",
        ),
        ("5b --nodes 1", "no layout of '5b' for alcf-aurora"),
        ("40b --nodes 720 --run-dir a,b", "RUN_DIR is 'a,b': ',' cannot travel to a job"),
        ("tiny --nodes 0", "--nodes 0: it must be 1 or more"),
        ("40b --nodes 20000", "20,000 nodes, but alcf-aurora has 10,624: dp 14 on 10,080 nodes would fit"),
        ("tiny --nodes 1 --walltime 2", "'2' has no unit: write 2:00:00 for hours, 2:00 for minutes"),
        (
            "tiny --nodes 1 --walltime 19:59",
            "a job saves 00:15:00 before its end, so give it 00:20:00 or more",
        ),
        ("tiny --nodes 1 --jobs 2", "--jobs 2: queue debug takes one job of a user"),
        ("40b --nodes 720 --jobs 0", "--jobs 0: it must be 1 or more"),
        ("40b --nodes 720 -- --account x", "--account stands after --, where flags of aeris.train are"),
        ("40b --nodes 720 -- --run_dir=x", "--run-dir stands after --"),
        (
            "40b --nodes 720 -- --parallel.pp 10 --parallel.dp 3",  # what comes after replaces the layout's
            "dp 3 x wp 6x6 x pp 10 x sp 12 needs 12,960",
        ),
    ],
)
def test_what_cannot_run_is_refused(words: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main(["submit", "--dry-run", *words.split()]) == exits.MISTAKE
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and says in line


def test_words_with_blanks_cannot_travel(capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        run_main(["submit", "tiny", "--nodes", "1", "--dry-run", "--", "--data.store", "a b"])
        == exits.MISTAKE
    )
    assert "'a b' after --" in capsys.readouterr().err


def test_elsewhere_and_without_a_scheduler(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert run_main(["submit", "tiny", "--nodes", "1", "--no-check"]) == exits.MISTAKE
    assert "qsub is not here: submit from a login node of alcf-aurora" in capsys.readouterr().err
    monkeypatch.chdir(tmp_path)
    assert run_main(["submit", "tiny", "--nodes", "1"]) == exits.MISTAKE
    assert "submit from the top directory" in capsys.readouterr().err


def test_spares_and_queues() -> None:
    aurora = MACHINES["alcf-aurora"]
    assert [submit.spare_nodes(aurora, n) for n in (1, 19, 20, 160, 10_080, 10_600)] == [0, 0, 1, 2, 101, 24]
    chosen = [submit.choose_queue(aurora, n, None, None).name for n in (1, 3, 200, 256, 10_624)]
    assert chosen == ["debug", "debug-scaling", "debug-scaling", "prod", "prod"]
    assert submit.choose_queue(aurora, 16, None, 7200.0).name == "capacity"
    assert [submit.choose_queue(aurora, n, "prod", None).hours for n in (1024, 1025, 2000)] == [12, 18, 24]


@pytest.mark.parametrize("error", [ValueError, ConnectionError, OSError, KeyboardInterrupt])
def test_errors_have_their_status(
    error: type[BaseException], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(arguments: object) -> int:
        raise error("because")

    monkeypatch.setattr(submit, "run", fail)
    statuses = {ValueError: 2, ConnectionError: 76, OSError: 74, KeyboardInterrupt: 130}
    assert run_main(["submit", "tiny", "--nodes", "1"]) == statuses[error]
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_every_command_explains_itself() -> None:
    for name, (module, _) in COMMANDS.items():
        result = subprocess.run(
            [sys.executable, "-m", "launch", name, "--help"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 0 and f"python -m launch {name}" in result.stdout, (module, result.stderr)


def test_help_imports_almost_nothing() -> None:
    """On a login node it must answer at once: neither torch nor any command's module is loaded for it."""
    code = "import atexit, runpy, sys; atexit.register(lambda: print(*sys.modules)); "
    code += "sys.argv = ['launch', '--help']; runpy.run_module('launch', run_name='__main__')"
    command = [sys.executable, "-c", code]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout
    assert "preflight" in out  # the help itself
    loaded = set(out.splitlines()[-1].split())
    assert {name for name in loaded if name.startswith("launch")} == {"launch", "launch.exits"}
    assert not loaded & {"torch", "numpy", "mpi4py", "rich", "tyro", "subprocess"}
