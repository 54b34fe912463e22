"""Training on several ranks as a user starts it: the run of one process in any layout, and its faults."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.chaos import Ranks

MPIEXEC = shutil.which("mpiexec", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
SMALL = (
    *("--model.width", "32", "--model.hidden", "48", "--model.heads", "4", "--model.layers", "4"),
    *(
        "--model.precision",
        "fp32",
        "--model.residual",
        "fp32",
        "--train.batch",
        "4",
        "--train.microbatch",
        "1",
    ),
    *("--device", "cpu"),
)
TRAIN = (sys.executable, "-m", "aeris.train", "tiny", *SMALL)


def environment() -> dict[str, str]:
    """What the processes of a test see."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}


def run(command: tuple[str, ...], *arguments: str, ok: bool = True) -> str:
    """Run a command and return what it said."""
    done = subprocess.run(
        [*command, *arguments],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        check=False,
    )
    assert (done.returncode == 0) == ok, done.stdout
    return done.stdout


def mpi(ranks: int) -> tuple[str, ...]:
    """Start a program with mpiexec."""
    if MPIEXEC is None:
        pytest.skip("there is no mpiexec here")
    return (MPIEXEC, "-n", str(ranks))


def losses(run_dir: Path) -> list[float]:
    """Read the loss of every step, and check that there is one for each."""
    records = [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]
    assert [record["images_seen"] for record in records] == [4 * (n + 1) for n in range(len(records))]
    return [record["loss"] for record in records]


def directory(run_dir: Path) -> tuple[str, ...]:
    """Name the run directory on the command line."""
    return ("--run-dir", str(run_dir))


@pytest.mark.slow
def test_eight_ranks_train_the_run_of_one(tmp_path: Path) -> None:
    """50 steps: 25 in one layout of 8 ranks, saved, and 25 more in two others, against one process.

    With errors on the states, which first and last stage make alike.
    """
    first = ("--parallel.pp", "2", "--parallel.wp-y", "2", "--parallel.sp", "2")
    second = ("--parallel.pp", "1", "--parallel.wp-x", "2", "--parallel.sp", "4")
    third = ("--parallel.dp", "2", "--parallel.pp", "4")
    # The learning rate of a run depends on its length, so it is kept constant after the warm-up.
    rate = ("--optimizer.shape", "constant", "--optimizer.rampdown-images", "0")
    rate += ("--diffusion.state-error", "0.3")
    half, whole = (*rate, "--train.images", "100"), (*rate, "--train.images", "200")
    run(TRAIN, *whole, *directory(tmp_path / "one"))
    expected = losses(tmp_path / "one")
    said = run((*mpi(8), *TRAIN), *half, *first, *directory(tmp_path / "a"))
    assert "8 ranks (dp 1 x wp 2x1 x pp 2 x sp 2)" in said
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    for name, layout in (("a", second), ("b", third)):
        # Forked, not by mpiexec: eight processes that import torch take longer than all their steps.
        ranks = Ranks((*TRAIN[3:], *whole, *layout, *directory(tmp_path / name)), 8, tmp_path)
        assert ranks.wait() == [0] * 8, ranks.said()
        assert "resuming at image 100 of 200" in ranks.said()
        assert losses(tmp_path / name) == pytest.approx(expected, rel=1e-5)
        assert len(expected) == 50


@pytest.mark.slow
def test_torchrun_chooses_a_layout(tmp_path: Path) -> None:
    """Without --parallel.* the layout is chosen and said; the losses are those of one process."""
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "4", "-m", *TRAIN[2:])
    said = run(torchrun, "--train.images", "12", *directory(tmp_path / "four"))
    assert "4 ranks (dp 4 x wp 1x1 x pp 1 x sp 1)" in said
    run(TRAIN, "--train.images", "12", *directory(tmp_path / "one"))
    assert losses(tmp_path / "four") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)


@pytest.mark.parametrize(
    ("ranks", "settings", "says"),
    [
        ("7", (), "7 ranks cannot work"),
        ("8", ("--parallel.sp", "3"), "sp 3 does not divide the 4 attention heads"),
        ("2", ("--parallel.pp", "7"), "pp 7 is more than the 6 stages"),
        ("4", ("--parallel.wp-y", "4"), "wp_y 4 does not divide the 2 rows of windows"),
        ("4", ("--parallel.pp", "2", "--parallel.sp", "4"), "the degrees must multiply to 4"),
        ("2", ("--parallel.dp", "2", "--train.microbatch", "4"), "With less than --train.microbatch 4"),
        ("4", ("--parallel.shard", "3"), "the shard degree can be 0 (all), 1, 2, 4"),
        ("4", ("--parallel.dp", "-1"), "--parallel.dp is -1"),
        ("4", ("--parallel.timeout-s", "0"), "--parallel.timeout-s is 0"),
    ],
)
def test_what_cannot_work_is_refused_before_ranks_meet(
    ranks: str, settings: tuple[str, ...], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without any other rank there, so nothing was waited for; degrees that do work are named."""
    from aeris import train

    for name, value in {"RANK": "0", "WORLD_SIZE": ranks, "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    arguments = train.parse(["tiny", *SMALL, *settings, *directory(tmp_path / "run")])
    with pytest.raises(ValueError) as caught:
        train.prepare(arguments.config, arguments.run_dir, "cpu")
    assert says in str(caught.value)
    if "cannot work" in str(caught.value):
        assert re.search("Nearest that do: --parallel.|nearest numbers", str(caught.value))
    with pytest.raises(ValueError, match=re.escape(says)):  # the dry run refuses it too
        monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
        monkeypatch.setattr("sys.argv", ["train", "tiny", *SMALL, *settings, "--dry-run"])
        train.main()
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_an_error_is_said_once_or_by_whose_it_is(tmp_path: Path) -> None:
    """What all have rank 0 says; what one has alone it says with its name; other settings are noticed."""
    mine = ("--train.images", "8", *directory(tmp_path / "run"))
    said = run((*mpi(3), *TRAIN), *mine, "--data.store", "nowhere", ok=False)
    assert said.count("error:") == 1 and "rank" not in said.split("error:")[1].splitlines()[0], said
    both = (*mpi(1), *TRAIN, *mine, ":", "-n", "1", *TRAIN, *mine)
    said = run(both, "--data.store", "nowhere", ok=False)
    assert said.count("error:") == 1 and "error: rank 1: " in said, said
    said = run(both, "--train.seed", "5", ok=False)
    assert "error: rank 1 was started with --train.seed 5, rank 0 with 0" in said, said


@pytest.mark.slow
def test_a_killed_rank_ends_all_and_the_run_goes_on(tmp_path: Path) -> None:
    """Every survivor says where it waited, within seconds; the same command resumes from the checkpoint."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    arguments = ("--train.images", "4000", "--checkpoint.every-images", "8", "--parallel.pp", "2")
    with ExitStack() as stack:
        ranks = []
        for rank in range(4):
            variables = {
                "RANK": str(rank),
                "WORLD_SIZE": "4",
                "LOCAL_RANK": str(rank),
                "LOCAL_WORLD_SIZE": "4",
            }
            process = subprocess.Popen(
                [*TRAIN, *arguments, "--parallel.sp", "2", *directory(tmp_path)],
                env={**environment(), **variables, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            ranks.append(stack.enter_context(process))
            stack.callback(process.kill)
        log, deadline = tmp_path / "log.jsonl", time.monotonic() + 120
        while not log.exists() or len(log.read_text().splitlines()) < 6:
            assert time.monotonic() < deadline and all(rank.poll() is None for rank in ranks)
            time.sleep(0.1)
        ranks[3].send_signal(signal.SIGKILL)
        for number, rank in enumerate(ranks[:3]):
            said, _ = rank.communicate(timeout=60)
            assert rank.returncode == 76, said
            assert f"rank {number} waited in the" in said and "a rank died or is stuck" in said, said
            assert "Traceback" not in said
    run(TRAIN, "--train.images", "48", *directory(tmp_path))
    assert len(losses(tmp_path)) == 12
