"""Asking a run to stop or to save: signals, the file, the clock; what it leaves; what its start took."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from aeris import train
from aeris.aurora import finetune
from aeris.data.loader import read_ahead
from aeris.guards import Guards
from aeris.interruption import ENDED, STOP_FILE, Requests, Settled, Stopped
from aeris.run_directory import ending, parting
from aeris.startup import Clock, process_age
from swipe.collectives import ALONE, AgreedError, CommunicationError, Group, all_reduce
from tests.aurora import tiny_runs
from tests.harness import ROOT, run_distributed
from tests.test_train import CPU, go, records, small
from tests.test_train_parallel import TRAIN, environment, mpi

TINY = ("--train.images", "100000", "--checkpoint.every-images", "100000")


def ended(run_dir: Path) -> tuple[int, str, int | None]:
    """Read how a program says it ended."""
    said = json.loads((run_dir / ENDED).read_text())
    assert abs(said["time"] - time.time()) < 300
    return said["status"], said["why"], said["images_seen"]


def wait_until(true: Callable[[], bool], process: subprocess.Popen[str] | None = None) -> None:
    """Wait until something is so."""
    deadline = time.monotonic() + 120
    while not true():
        assert time.monotonic() < deadline
        assert process is None or process.poll() is None, process.communicate()[0]
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_is_a_wish(number: signal.Signals, tmp_path: Path) -> None:
    """It is noted by name, repeats at once are the same request, and handlers are put back."""
    before = signal.getsignal(number)
    with Requests(tmp_path) as requests:
        requests.begin()
        assert requests.wishes() == (0.0, 0.0) and requests.settle(0, 0) == Settled(False, False)
        for _ in range(3):
            os.kill(os.getpid(), number)
        wait_until(lambda: requests.wishes() == (1.0, 0.0))
        assert requests.settle(1, 0) == Settled(stop=True, save=False)
        said = str(requests.obeyed(1234))
    assert said == f"stopped by {number.name} at image 1,234, checkpoint saved; the same command goes on"
    assert signal.getsignal(number) == before and signal.set_wakeup_fd(-1) == -1


def test_others_are_named_as_they_asked(tmp_path: Path) -> None:
    """A rank that was not asked itself stops all the same, and does not say that it was."""
    lead, other = Requests(tmp_path, lead=True), Requests(tmp_path, lead=False)
    assert lead.settle(1, 0).stop and "stopped by a signal to another rank" in str(lead.obeyed(1))
    assert other.settle(3, 1) == (True, True) and "by a request to 3 other ranks" in str(other.obeyed(1))


def test_the_file_and_the_clock_are_the_leads(tmp_path: Path) -> None:
    """An old file is no request; a new one is, once; minutes count from the last checkpoint."""
    stop = tmp_path / STOP_FILE
    stop.touch()
    with Requests(tmp_path, lead=False) as other:
        assert stop.exists() and other.wishes() == (0.0, 0.0)
    with Requests(tmp_path, every_minutes=0.05 / 60) as requests:
        assert not stop.exists() and requests.wishes() == (0.0, 0.0)
        time.sleep(0.06)
        assert requests.wishes() == (0.0, 1.0) and requests.settle(0, 1) == Settled(False, True)
        requests.saved()
        assert requests.wishes() == (0.0, 0.0)
        stop.touch()
        time.sleep(1.0)  # so often is looked
        assert requests.wishes()[0] == 1.0
        assert f"by the file {stop}" in str(requests.obeyed(2))
        assert not stop.exists()


def test_a_run_stops_and_goes_on_as_if_it_had_not(tmp_path: Path) -> None:
    """The step that is under way is finished and saved; bit for bit the same run in the end."""
    whole = go(small(8), tmp_path / "whole")
    run = train.prepare(small(8), tmp_path / "run", CPU)
    (tmp_path / "run" / STOP_FILE).touch()
    with pytest.raises(Stopped, match=r"the file .*stop at image 2, checkpoint saved"):
        train.train(run)
    assert [path.name[-3:] for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["002"]
    again = go(small(8), tmp_path / "run")
    assert again.images_seen == 8
    for name, value in whole.tensors().items():
        assert torch.equal(value, again.tensors()[name]), name
    assert [r["loss"] for r in records(tmp_path / "run")] == [r["loss"] for r in records(tmp_path / "whole")]


def test_fine_tuning_stops_and_saves_as_it_is_asked(tmp_path: Path) -> None:
    """After the update that is under way, and by the clock; the end is that of a run left alone."""
    weather = tiny_runs.write_pair(tmp_path)
    config = tiny_runs.small(
        "one-step",
        weather,
        6,
        weights="fresh",
        checkpoint={"every_images": 100, "every_minutes": 1e-9, "keep": 9},
    )
    whole = tiny_runs.go(config, tmp_path / "whole")
    run = finetune.prepare(config, tmp_path / "run", CPU)
    (tmp_path / "run" / STOP_FILE).touch()
    with pytest.raises(Stopped, match="at image 2, checkpoint saved"):
        finetune.train(run)
    again = tiny_runs.go(config, tmp_path / "run")
    assert sorted(p.name[-1] for p in (tmp_path / "whole" / "checkpoints").iterdir()) == ["2", "4", "6"]
    for name, value in whole.tensors().items():
        assert torch.equal(value, again.tensors()[name]), name
    assert tiny_runs.records(tmp_path / "run") == tiny_runs.records(tmp_path / "whole")


def test_minutes_between_checkpoints(tmp_path: Path) -> None:
    """Whichever comes first: images alone would save at the end only."""
    rarely = {"every_images": 1000, "keep": 9}
    go(small(6, checkpoint={**rarely, "every_minutes": 1e-9}), tmp_path / "often")
    go(small(6, checkpoint={**rarely, "every_minutes": 60.0}), tmp_path / "once")
    kept = [sorted(p.name[-1] for p in (tmp_path / d / "checkpoints").iterdir()) for d in ("often", "once")]
    assert kept == [["2", "4", "6"], ["6"]]


def asked(run_dir: str, number: int) -> list[tuple[bool, str]]:
    """Be a rank of four that takes five steps; rank 2 gets a signal in the third."""
    rank = torch.distributed.get_rank()
    world = Group("all ranks", (0, 1, 2, 3), rank, torch.distributed.group.WORLD)
    seen = []
    with Requests(Path(run_dir), lead=rank == 0) as requests:
        requests.begin()
        for step in range(5):
            if rank == 2 and step == 2:
                os.kill(os.getpid(), number)
                wait_until(lambda: requests.wishes()[0] == 1.0)
            summed = all_reduce(torch.tensor(requests.wishes(), dtype=torch.float64), world, "wishes")
            seen.append((requests.settle(*summed.tolist()).stop, str(requests.obeyed(step))))
    return seen


def test_all_ranks_stop_after_the_same_step(tmp_path: Path) -> None:
    """One was asked."""
    results = run_distributed(asked, 4, str(tmp_path), int(signal.SIGTERM))
    assert all([stop for stop, _ in seen] == [False, False, True, True, True] for seen in results)
    assert "by SIGTERM at image 2" in results[2][2][1] and "by a signal to another" in results[0][2][1]


SCRIPT = """
import os, signal, sys, time
from pathlib import Path
from aeris import interruption
interruption._SAME_S = 0.2
with interruption.Requests(Path(sys.argv[1])) as requests:
    if sys.argv[2] == "late":
        requests.begin()
    print("ready", flush=True)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})
    signal.sigwait({signal.SIGUSR2})  # as if it waited for a message, where no Python runs
"""


@pytest.mark.parametrize(("when", "status"), [("early", 75), ("late", 143)])
def test_signals_that_end_at_once(when: str, status: int, tmp_path: Path) -> None:
    """Before the ranks have met one is enough; later it takes a second SIGTERM, wherever the program is."""
    command = [sys.executable, "-c", SCRIPT, str(tmp_path), when]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        if when == "late":
            time.sleep(0.3)
            process.send_signal(signal.SIGUSR1)  # asks for the same thing again
            time.sleep(0.2)
            assert process.poll() is None
            process.send_signal(signal.SIGTERM)
        said = process.communicate(timeout=20)[1]
    assert process.returncode == status and said.count("\n") == 1
    assert ended(tmp_path) == (status, said.strip(), None)
    assert ("nothing saved" if when == "late" else "before the first step") in said


class Slow(torch.utils.data.Dataset[int]):
    """Numbers that take their time."""

    def __getitem__(self, number: int) -> tuple[int, int]:
        """Return the number and who read it."""
        time.sleep(0.02)
        return number, os.getpid()


def test_data_workers_outlive_signals(tmp_path: Path) -> None:
    """Those a launcher sends to all; so does what starts them. Only the program itself ends them."""
    loader = read_ahead(Slow(), range(60), 1, 2, False)
    reading = iter(loader)
    workers = {int(next(reading)[1]) for _ in range(6)}
    parents = {int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]) for pid in workers}
    assert len(workers) == 2 and os.getpid() not in parents
    for name in ("TERM", "USR1", "INT"):  # by another process: from this one they would mean the end
        subprocess.run(["kill", f"-{name}", *map(str, workers | parents)], check=True)
    assert [int(number) for number, _ in reading] == list(range(6, 60))
    assert all(worker.is_alive() for worker in reading._workers)  # type: ignore[attr-defined]
    worker = reading._workers[0]  # type: ignore[attr-defined]
    worker.terminate()
    worker.join(20)
    assert worker.exitcode == 0


class Counted:
    """Something with images."""

    images_seen = 12


def leave_with(error: BaseException | None, run_dir: Path, lead: bool = True, *, run: Any = None) -> None:
    """End as a program does that raises an error."""
    with suppress(*([type(error)] if error is not None else [])), ending(run_dir, lead) as end:
        end.run = run
        if error is not None:
            raise error


def test_how_a_program_ended_is_written_down(tmp_path: Path) -> None:
    """Status and reason of whatever ended it, and nothing while it runs or where there is no directory."""
    for error, expected in (
        (None, (0, "done", 12)),
        (Stopped("stopped by me"), (75, "stopped by me", 12)),
        (AgreedError("no room", of_a_file=True), (74, "no room", 12)),
        (ValueError("heads"), (2, "heads", 12)),
        (CommunicationError("rank 0 waited"), (76, "rank 0 waited", 12)),
        (ZeroDivisionError("x"), (1, "ZeroDivisionError: x", 12)),
    ):
        leave_with(error, tmp_path, run=Counted())
        assert ended(tmp_path) == expected
        os.utime(tmp_path / ENDED, (0, 0))  # as if by an earlier process
    with ending(tmp_path, True):
        assert not (tmp_path / ENDED).exists()
    leave_with(ValueError("x"), tmp_path / "none")
    assert not (tmp_path / "none").exists()
    assert [path.name for path in tmp_path.iterdir()] == [ENDED]


def test_the_cause_is_kept_not_what_the_lead_makes_of_it(tmp_path: Path) -> None:
    """Rank 3 cannot read and says so; then the lead misses it. What all have, the lead writes."""
    with ending(tmp_path, True):
        pass
    (tmp_path / ENDED).unlink()
    with pytest.raises(CommunicationError), ending(tmp_path, True):
        leave_with(OSError("rank 3's file"), tmp_path, lead=False)
        raise CommunicationError("rank 0 waited")
    assert ended(tmp_path)[:2] == (74, "rank 3's file")
    (tmp_path / ENDED).unlink()
    for error in (AgreedError("all"), CommunicationError("rank 3 waited"), Stopped("all")):
        leave_with(error, tmp_path, lead=False)
        assert not (tmp_path / ENDED).exists()


def test_a_rank_that_fails_before_the_lead_is_there_is_heard(tmp_path: Path) -> None:
    """It replaces the words of an earlier run; the lead, which comes and then misses it, leaves its own."""
    leave_with(Stopped("of another run"), tmp_path)
    os.utime(tmp_path / ENDED, (0, 0))
    leave_with(ValueError("rank 3's flags"), tmp_path, lead=False)
    leave_with(CommunicationError("rank 0 waited"), tmp_path)
    assert ended(tmp_path)[:2] == (2, "rank 3's flags")


def test_a_stop_is_said_before_any_rank_is_gone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A launcher ends the others as soon as one has ended."""
    with pytest.raises(Stopped) as caught, ending(tmp_path, True) as end:
        with parting(ALONE, end):
            raise Stopped("stopped by me")
    assert caught.value.said and capsys.readouterr().err == "stopped by me\n"


def test_the_clock_of_a_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parts add up from the start of the process; it is told once; unless begun nothing is measured."""
    clock = Clock()
    clock.mark("model")
    clock.finish("first step", tmp_path, 1, True)
    assert not clock.parts and not list(tmp_path.iterdir())
    clock.begin("imports")
    assert clock.parts["imports"] == pytest.approx(process_age(), abs=0.5)
    ticks = os.sysconf("SC_CLK_TCK")
    started = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]) / ticks
    assert process_age() == pytest.approx(time.clock_gettime(time.CLOCK_BOOTTIME) - started, abs=0.1)
    time.sleep(0.1)
    clock.mark("model")
    samples = clock.first(iter("abc"), "first batch")
    assert "".join(samples) == "abc"
    for _ in range(2):
        clock.finish("first step", tmp_path, 4, True)
    found = json.loads((tmp_path / "startup.json").read_text())
    assert list(found["parts"]) == ["imports", "model", "first batch", "first step"] and found["ranks"] == 4
    assert found["total"] == pytest.approx(sum(found["parts"].values()), abs=0.01)
    assert found["parts"]["model"] == pytest.approx(0.1, abs=0.08)
    said = capsys.readouterr().out
    assert said.startswith(f"first step after {found['total']:.1f} s: imports ") and said.count("\n") == 1


def test_guards_on_duty(tmp_path: Path) -> None:
    """What the watchdog says of a late rank is said aloud and written down; off duty nothing is watched."""
    guards = Guards(tmp_path)
    guards.phase("save"), guards.tick()
    assert list(guards.reading("ab")) == ["a", "b"]
    faults = dataclasses.replace(small().faults, step_s=0.4)
    with guards.on_duty(faults, 0, 1):
        guards.phase("step")
        assert list(guards.reading("ab")) == ["a", "b"] and guards._watchdog is not None
    assert guards._watchdog is None
    guards._say_late("rank 3 (here) is late")
    assert ended(tmp_path) == (76, "rank 3 (here) is late", None)


@pytest.mark.slow
def test_ctrl_c_before_the_program_begins(tmp_path: Path) -> None:
    """While torch is imported: no traceback."""
    command = [*TRAIN, "--run-dir", str(tmp_path / "run")]
    with subprocess.Popen(
        command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        maps = Path(f"/proc/{process.pid}/maps")
        wait_until(lambda: "libtorch" in maps.read_text(), process)
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=60)[0]
    assert process.returncode in (130, -signal.SIGINT) and said == ""


@pytest.mark.slow
def test_mpiexec_passes_the_signal_and_the_status_on(tmp_path: Path) -> None:
    """Four ranks with data workers, in one group of processes that all get it; 75 reaches who asked."""
    command = [*mpi(4), *TRAIN, *TINY, "--data.workers", "1", "--run-dir", str(tmp_path)]
    with subprocess.Popen(
        command,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        log = tmp_path / "log.jsonl"
        wait_until(lambda: log.exists() and log.read_text().count("\n") >= 2, process)
        os.killpg(process.pid, signal.SIGTERM)
        said = process.communicate(timeout=60)[0]
    status, why, images = ended(tmp_path)
    assert (process.returncode, status) == (75, 75), said
    assert said.count("stopped by SIGTERM") == 1 and why in said and "Traceback" not in said
    assert (tmp_path / "checkpoints" / f"images_{images:012d}" / ".complete").exists()
    assert json.loads((tmp_path / "startup.json").read_text())["ranks"] == 4
