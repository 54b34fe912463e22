"""A job around a launcher that behaves as it is told: what is tried again, where, and what is not."""

import os
import sys
import time
from pathlib import Path

import pytest

from launch import exits, preflight, supervise, verdict
from tests.launch.told import AURORA, HOSTS, LOCAL, Told


def test_done_at_once(told: Told) -> None:
    told.on(1, "say('loss 0.5', end=''); record(10); checkpoint(10); ended(0, 'done')")
    assert told.job(*LOCAL) == exits.DONE
    assert "loss 0.5\njob: attempt 1: done\n" in told.said  # a line that did not end
    assert told.calls == [
        ["-n", "2", sys.executable, "-m", "aeris.train", "tiny", "--run-dir", str(told.run)]
    ]
    assert "loss 0.5" in (told.run / "job" / "attempt_1.log").read_text()
    (end,) = told.history("end")
    assert (end["status"], end["job"]) == (exits.DONE, "local")


def test_the_runs_words_count_not_the_launchers(told: Told) -> None:
    told.on(1, "ended(76, 'a rank is lost'); sys.exit(0)")  # hides it
    told.on(2, "sys.exit(0)")  # hides that all were killed, and nobody could say a word
    told.on(3, "ended(0, 'done'); sys.exit(143)")  # died when it was no longer needed
    assert told.job(*LOCAL) == exits.DONE
    assert [line["status"] for line in told.history("end")] == [exits.LOST, exits.LOST, exits.DONE]
    assert "the run said nothing of its end" in told.said


def test_words_of_an_earlier_attempt_are_not_believed(told: Told) -> None:
    told.run.mkdir()
    (told.run / "ended.json").write_text('{"status": 0, "why": "done"}')
    told.on(1, "os.kill(os.getpid(), signal.SIGKILL)")
    told.on(2, "ended(2, 'rank 5: --train.batch 0')")
    assert told.job(*LOCAL) == exits.MISTAKE
    assert "attempt 1: lost (status 76): the launcher ended with signal 9" in told.said
    assert len(told.calls) == 2  # a mistake is not tried again


def test_a_mistake_before_the_run_began(told: Told) -> None:
    told.on(1, "say('Unrecognized options: --nonsense'); sys.exit(2)")
    assert told.job(*LOCAL) == exits.MISTAKE
    assert "attempt 1: a mistake in the command (status 2)\n" in told.said
    assert len(told.calls) == 1


def test_another_program_is_judged_by_its_status(told: Told) -> None:
    told.on(1, "sys.exit(1)")
    told.on(2, "sys.exit(0)")
    assert told.job(*LOCAL, "--run-dir", str(told.run), words=("aeris.forecast", "somewhere")) == exits.DONE
    assert len(told.calls) == 2


def test_gives_up_without_progress_only(told: Told) -> None:
    told.on(0, "ended(76)")
    told.on(2, "record(5); ended(76)")  # got further, though nothing was saved
    told.on(3, "checkpoint(5); ended(1)")
    assert told.job(*LOCAL) == exits.LOST
    assert len(told.calls) == 7  # one, two with progress, then one and three restarts
    assert "4 attempts in a row brought nothing new" in told.said
    told.on(0, "checkpoint(6 + len(list(run.glob('checkpoints/*')))); ended(74)")
    assert told.job(*LOCAL, "--restarts", "1") == exits.IO
    assert len(told.calls) == 7 + 2
    assert (told.run / "job" / "attempt_9.log").exists()  # numbers go on from job to job


@pytest.mark.parametrize(
    ("line", "blamed"),
    [
        ("b.hsn: shepherd died from signal 9\nc.hsn: rank 3 died from signal 15", "b"),
        ("ping failed on a.other.domain", "a"),
        ("ping RPC timeout from b after 120s", "b"),
        ("srun: error: Node failure on a", "a"),
        ("error: rank 3 (b) is late in the all-reduce, 3 ranks (a) wait for it", "b"),
        ("error: rank 2 does not answer", "b"),
        ("error: rank 1: cannot read era5.h5: Input/output error", "a"),
        ("a.hsn: rank 1 died from signal 9\nb.hsn: rank 3 died from signal 15", "a"),
        ("b.hsn: rank 3 died from signal 15\na.hsn: rank 1 died from signal 9", ""),
        ("b.hsn: rank 2 died from signal 15\n" * 9 + "RPC timeout from a", "a"),
        ("error: rank 1 waited in the all-reduce with rank 3, and that failed", ""),
        ("b.hsn: rank 3 died from signal 11 and dumped core\na.hsn: rank 1 died from signal 15", "b"),
        ("b.hsn: rank 3 died from signal 6", "b"),
        ("b.hsn: rank 3 died from signal 7", "b"),
        ("a.hsn: rank 1 died from signal 15\nb.hsn: rank 3 died from signal 11", ""),
        ("srun: error: b: task 3: Segmentation fault (core dumped)", "b"),
        ("srun: error: b: task 3: Out Of Memory", "b"),
        ("srun: error: b: tasks 2-3: Aborted", "b"),
        ("srun: error: a: task 1: Exited with exit code 76", ""),
        ("error: rank 1: cannot save part 1: No space left on device", ""),  # of a file system that all share
        ("error: rank 1: [Errno 122] Disk quota exceeded: 'part'", ""),
        ("error: a could not be staged: No space left on device", "a"),
        ("ping failed on z and on abc, not b-1", ""),
    ],
)
def test_hosts_that_a_failure_began_on(line: str, blamed: str) -> None:
    kept: list[str] = []
    for text in line.split("\n"):
        kept += [text] * verdict.telling(text, kept)
    assert len(kept) <= 2
    found = verdict.suspects(kept, ["a.hsn", "b.hsn"], 2)
    assert " ".join(found) == " ".join(f"{host}.hsn" for host in blamed.split())


def test_a_crash_of_all_is_no_hosts_fault() -> None:
    hosts = [f"x{number}" for number in range(40)]
    crashes = [f"{host}: rank {rank} died from signal 6" for rank, host in enumerate(hosts)]
    assert list(verdict.suspects(crashes[:3], hosts, 1)) == hosts[:3]
    assert list(verdict.suspects([*crashes, "ping failed on x7"], hosts, 1)) == ["x7"]


def test_spares_run_out(told: Told) -> None:
    for attempt, host in enumerate("abcd", start=1):
        told.on(attempt, f"checkpoint({attempt}); say('{host}.hsn: shepherd died from signal 9'); ended(76)")
    told.on(5, "ended(0)")
    assert told.job(*AURORA) == exits.DONE
    assert [told.hosts(n) for n in (2, 3, 4)] == ["b.hsn c.hsn", "c.hsn d.hsn", "c.hsn d.hsn"]
    assert "no spare for c.hsn" in told.said
    assert len(told.hosts(5).split()) == 2


def test_preflight_puts_hosts_aside(told: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = [{"a.hsn": "said nothing"}, {"b.hsn": "slow", "c.hsn": "slow"}, dict.fromkeys(HOSTS[1:], "slow")]
    answers = iter(bad)
    monkeypatch.setattr(preflight, "examine", lambda *args, **kwargs: next(answers))
    told.on(1, "ended(76)")  # nobody is named: measured again
    told.on(2, "ended(76)")
    told.on(3, "ended(0)")
    assert told.job(*AURORA) == exits.DONE
    assert told.hosts(3) == "a.hsn b.hsn"
    assert (told.hosts(1), told.hosts(2)) == ("b.hsn c.hsn", "a.hsn d.hsn")
    assert "puts a.hsn aside: said nothing" in told.said
    assert "1 hosts serve again: b.hsn" in told.said


def test_preflight_that_fails_stops_nothing(told: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    def examine(*args: object, **kwargs: object) -> dict[str, str]:
        raise OSError("no space left")

    monkeypatch.setattr(preflight, "examine", examine)
    told.on(1, "ended(0)")
    assert told.job(*AURORA) == exits.DONE
    assert "preflight failed, and says nothing of the hosts: no space left" in told.said
    call = " ".join(told.calls[0])
    assert "-n 4 --ppn 2 --hostfile" in call and call.endswith(f"--run-dir {told.run}")


def test_silence_ends_a_run(told: Told) -> None:
    told.on(1, "signal.signal(signal.SIGTERM, signal.SIG_IGN); checkpoint(1); say('so far'); time.sleep(60)")
    told.on(2, "[(time.sleep(0.1), record(n)) for n in range(12)]; ended(0)")  # a record is a sign of life
    begun = time.monotonic()
    assert told.job(*LOCAL, "--silence-s", "0.8") == exits.DONE
    assert time.monotonic() - begun < 5
    assert "neither output nor a record nor a part of a checkpoint for 1 s" in told.said


def test_output_alone_is_no_progress(told: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervise, "NOISE", 2)
    told.on(1, "[(time.sleep(0.05), say('event queue overflow')) for n in range(1000)]")
    told.on(2, "ended(0)")
    assert told.job(*LOCAL, "--silence-s", "0.6") == exits.DONE
    assert "output, but neither a record" in told.said


def test_staged_before_it_is_measured(told: Told, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once over all hosts, and what measures them uses it; one whose disk is full is left out."""
    (tmp_path / "env.tar.sha256").write_text("0123456789abcdef0000  env.tar\n")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "2000.h5").write_bytes(bytes(2**20))
    measured = []

    def examine(machine: object, hosts: list[str], ranks: int, **how: object) -> dict[str, str]:
        measured.append((" ".join(hosts), how["python"], how["file"]))
        return {}

    monkeypatch.setattr(preflight, "examine", examine)
    full = "error: b could not be staged: No space left on device"
    told.on("stage", f"if 'b.hsn' in hosts: say('{full}'); sys.exit(74)")
    told.on(1, "say('ping failed on a'); ended(76)")
    told.on(2, "ended(0)")
    words = ("aeris.train", "--run-dir", str(told.run), "--data.store", str(tmp_path / "data"))
    assert told.job(*AURORA, "--stage", str(tmp_path / "env.tar"), words=words) == exits.DONE
    python = f"/aeris-{os.getuid()}/0123456789abcdef/bin/python"
    ((hosts, used, file),) = measured
    assert hosts == "a.hsn c.hsn d.hsn" and str(used).endswith(python)
    assert file == tmp_path / "data" / "2000.h5"
    failed, staged, first, again, second = (" ".join(call) for call in told.calls)
    assert "-n 4 --ppn 1 --hostfile" in failed and f"-m launch stage {tmp_path / 'env.tar'} /" in failed
    assert "-n 3 --ppn 1" in staged and f"{python} -m aeris.train" in first
    assert (
        "-m launch stage" in again and f"{told.run}/job/hosts.2" in again
    )  # what a restart finds is unknown
    assert f"{python} -m aeris.train" in second
    assert (told.hosts(1), told.hosts(2)) == ("a.hsn c.hsn", "c.hsn d.hsn")


def test_hosts_that_cannot_be_staged_are_not_measured(told: Told, tmp_path: Path) -> None:
    (tmp_path / "env.tar.sha256").write_text("0123456789abcdef0000  env.tar\n")
    told.on("stage", "say('error: the archive is damaged'); sys.exit(74)")
    told.on(0, "sys.exit(74)")
    assert told.job(*AURORA, "--stage", str(tmp_path / "env.tar"), "--restarts", "0") == exits.IO
    assert "says nothing of the hosts: the hosts could not be staged: status 74" in told.said
    assert len(told.calls) == 2  # over all hosts, and of the attempt


@pytest.mark.parametrize(
    ("flags", "words", "problem"),
    [
        (("--nodes", "3"), (), "--nodes 3, but this job has 1"),
        ((), ("aeris.train", "--parallel.dp", "3", "--run-dir", "x"), "2 ranks, but dp 3"),
        ((), ("python", "-m", "aeris.train"), "python is no module"),
        ((), ("aeris.train", "tiny"), "--run-dir is missing"),
        (("--run-dir", "y"), ("aeris.train", "--run-dir", "x"), "leave out the job's"),
        (("--stage", "absent.tar"), (), "absent.tar.sha256 is missing"),
        (("--preflight-file", "absent.h5"), (), "--preflight-file absent.h5: there is no such file"),
    ],
)
def test_refused_before_anything_starts(
    told: Told, flags: tuple[str, ...], words: tuple[str, ...], problem: str
) -> None:
    assert told.job(*LOCAL, *flags, words=words) == exits.MISTAKE
    assert problem in told.said and told.said.count("\n") == 1
    assert told.calls == []


def test_no_launcher(told: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert told.job(*LOCAL) == exits.MISTAKE
    assert "error: cannot start mpiexec (No such file or directory): load its module" in told.said


def test_what_the_job_cannot_write_is_tried_again(told: Told) -> None:
    (told.run / "job" / "hosts.1").mkdir(parents=True)
    told.on(2, "ended(0)")
    assert told.job(*LOCAL) == exits.DONE
    assert [line["status"] for line in told.history("end")] == [exits.IO, exits.DONE]
    assert "cannot start it: [Errno 21] Is a directory" in told.said


def test_the_run_directory_vanishes(told: Told) -> None:
    told.on(1, "import shutil; shutil.rmtree(run); sys.exit(9)")
    told.on(2, "ended(0)")
    assert told.job(*LOCAL) == exits.DONE
