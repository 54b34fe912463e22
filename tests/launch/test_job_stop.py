"""How a job ends: who asked for it, whether there is a successor, and what others leave in its way."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from launch import asked, exits, job, journal, output, preflight
from launch.__main__ import run_main
from tests.launch.told import AURORA, LOCAL, Told, later


def test_the_time_is_up(told: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGUSR1 saves and submits a successor; what the run forgets at its start it is told again."""
    monkeypatch.setattr(job.machines.Machine, "again", lambda self, script, environ: ["qsub", script])
    told.on(1, "until_asked(); checkpoint(7); (run / 'stop').unlink(); ended(75, 'stopped by the file stop')")
    thread = later(lambda: os.kill(os.getpid(), signal.SIGUSR1), lambda: told.calls)
    assert told.job(*AURORA, "--resubmit", "again.sh") == exits.STOPPED
    thread.join()
    assert (told.directory / "qsub").read_text() == "again.sh\n"
    assert "submitted the next job: qsub again.sh: 77.server" in told.said
    assert not (told.run / "stop").exists() and not (told.run / "job" / "stop").exists()


def test_the_clock_and_a_run_that_does_not_save(told: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing was saved in this job, so there is no other like it."""
    monkeypatch.setattr(job.machines.Machine, "seconds_left", lambda self, environ: 0.8)
    told.on(1, "until_asked(); time.sleep(60)")
    assert told.job(*AURORA, "--margin-s", "0.5", "--resubmit", "again.sh") == exits.STOPPED
    assert "are left of the job's time, and the run did not save in time" in told.said
    assert "another like it is not submitted" in told.said and not (told.directory / "qsub").exists()
    assert told.job(*AURORA, "--margin-s", "900") == exits.MISTAKE  # it would be stopped as it starts
    assert "1 s are left of the job's time, not more than --margin-s 900" in told.said


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, exits.STOPPED), (signal.SIGINT, 130)])
def test_a_person_ends_the_chain(told: Told, number: signal.Signals, status: int) -> None:
    told.on(1, "until_asked(); checkpoint(7); ended(75, 'stopped by the file stop')")
    thread = later(lambda: os.kill(os.getpid(), number), lambda: told.calls)
    assert told.job(*AURORA, "--resubmit", "again.sh") == status
    thread.join()
    doubt = (
        "PBS sends it when a node dies, too; if it was not you: submit again, or use python -m launch submit"
    )
    assert f"ends by {number.name}" in told.said and (doubt in told.said) == (number == signal.SIGTERM)
    assert not (told.directory / "qsub").exists()


def test_launch_stop(told: Told) -> None:
    told.on(1, "until_asked(); checkpoint(7); ended(75, 'stopped by the file stop')")
    thread = later(lambda: run_main(["stop", str(told.run)]), lambda: told.calls)
    assert told.job(*AURORA, "--resubmit", "again.sh") == exits.STOPPED
    thread.join()
    assert "ends by python -m launch stop" in told.said and not (told.directory / "qsub").exists()
    told.on(2, "ended(0)")  # and the request is not there for the next one
    assert told.job(*AURORA) == exits.DONE
    assert run_main(["stop", str(told.directory)]) == exits.MISTAKE


def test_launch_stop_while_the_job_waits_in_the_queue(told: Told) -> None:
    """It ends as it starts; the request is used up then, and said to be there until then."""
    (told.run / "job").mkdir(parents=True)
    assert run_main(["stop", str(told.run)]) == exits.DONE
    assert told.job(*AURORA, "--resubmit", "again.sh") == exits.STOPPED
    assert f"the next as it starts (rm {told.run / 'job' / 'stop'} takes it back)" in told.said
    assert "(submit --jobs) start the run again: qdel or scancel removes them" in told.said
    assert told.calls == [] and "ends by python -m launch stop" in told.said
    assert not list(told.run.rglob("stop")) and not (told.directory / "qsub").exists()


def test_launch_stop_where_nothing_runs(told: Told) -> None:
    """Of a finished run nothing is left to stop; else it is said that the next job obeys."""
    told.run.mkdir()
    (told.run / "config.json").touch()
    ended = told.run / "ended.json"
    for made in (False, True):
        if made:
            (told.run / "job").mkdir()
        ended.write_text('{"status": 0, "why": "done"}')
        assert run_main(["stop", str(told.run)]) == exits.DONE
        assert told.capfd.readouterr().out == f"{told.run} is done; nothing to stop\n"
        assert not list(told.run.rglob("stop"))
        ended.write_text('{"status": 76, "why": "a rank is lost"}')
        assert run_main(["stop", str(told.run)]) == exits.DONE
        said = told.capfd.readouterr().out
        assert f"no program runs in {told.run} (a rank is lost)" in said
        assert bool(list(told.run.rglob("stop"))) == made  # without a job it would be forgotten
        assert ("the next job there ends as it starts" in said) == made
        assert ("submit --jobs) start the run again: qdel" in said) == made
    ended.write_text('{"status": 0, "why": "done"}')
    with journal.alone(told.run / "job", output.Output()):  # one that goes on with the same directory
        assert run_main(["stop", str(told.run)]) == exits.DONE
    assert "the run saves after its step" in told.capfd.readouterr().out


def test_a_program_that_cannot_be_asked_has_all_the_time(told: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job.machines.Machine, "seconds_left", lambda self, environ: 5.0)
    told.on(1, "time.sleep(0.3)")
    words = ("aeris.forecast", "somewhere")
    assert told.job(*AURORA, "--margin-s", "4.9", "--run-dir", str(told.run), words=words) == exits.DONE
    assert told.job(*AURORA, "--margin-s", "4.9") == exits.STOPPED


def test_a_stop_file_by_hand_is_obeyed(told: Told) -> None:
    told.on(1, "ended(75, 'stopped by the file run/stop at image 7')")
    assert told.job(*LOCAL) == exits.STOPPED
    told.on(
        2, "checkpoint(8); ended(75, 'stopped by SIGTERM at image 8')"
    )  # of whatever: this job was not asked
    told.on(3, "ended(0)")
    assert told.job(*LOCAL) == exits.DONE


def test_asked_during_preflight(told: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    def examine(*args: object, **kwargs: object) -> dict[str, str]:
        os.kill(os.getpid(), signal.SIGTERM)
        return dict.fromkeys("abcd", "said nothing")

    monkeypatch.setattr(preflight, "examine", examine)
    assert told.job(*AURORA) == exits.STOPPED
    assert told.calls == [] and "aside" not in told.said


def test_a_second_signal_ends_at_once(told: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asked, "AGAIN_S", 0.05)
    told.on(1, "until_asked(); (run / 'heard').touch(); time.sleep(60)")
    thread = later(lambda: os.kill(os.getpid(), signal.SIGTERM), lambda: told.calls)
    second = later(
        lambda: (time.sleep(0.1), os.kill(os.getpid(), signal.SIGTERM)), (told.run / "heard").exists
    )
    assert told.job(*LOCAL) == exits.STOPPED
    thread.join(), second.join()
    assert "did not save in time" in told.said


def test_output_without_end(told: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    """The copy has a limit, what is passed on has none, and a culprit is found at its end."""
    monkeypatch.setattr(output, "COPY_BYTES", 1000)
    told.on(
        1, "say('x' * 3_000_000, end='\\r'); say('a.hsn: shepherd died from signal 9', end=''); ended(76)"
    )
    told.on(2, "ended(0)")
    assert told.job(*AURORA) == exits.DONE
    assert told.said.count("x") > 2_900_000
    assert (told.run / "job" / "attempt_1.log").stat().st_size == 1000
    assert told.hosts(2) == "b.hsn c.hsn"


def test_a_full_disk_for_the_copy(told: Told, tmp_path: Path) -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("no /dev/full here")
    mine = output.Output()
    with mine.copied(full):
        mine.say("goes on")
        mine.say("and on")
    said = told.capfd.readouterr().out
    assert (
        said == "job: goes on\njob: the copy of the output ends here: No space left on device\njob: and on\n"
    )


def test_two_jobs_in_one_directory(told: Told) -> None:
    (told.run / "job").mkdir(parents=True)
    with journal.alone(told.run / "job", output.Output()):
        assert told.job(*LOCAL) == exits.MISTAKE
    assert f"another job works in {told.run} (process {os.getpid()} on" in told.said
    assert told.calls == []


def test_what_a_killed_job_left_keeps_others_out(told: Told) -> None:
    (told.run / "job").mkdir(parents=True)
    with journal.alone(told.run / "job", output.Output()) as lock:
        left = subprocess.Popen(["sleep", "30"], pass_fds=lock)
    try:
        assert told.job(*LOCAL) == exits.MISTAKE
    finally:
        left.kill()
        left.wait()
    told.on(1, "ended(0)")
    assert told.job(*LOCAL) == exits.DONE


def test_what_outlives_its_launcher(told: Told) -> None:
    """It holds the other end of the output, and its noise is no sign of life of the next attempt."""
    noise = "os.setsid(); [(time.sleep(0.05), say('noise')) for n in range(100)]; os._exit(0)"
    told.on(1, f"record(1)\nif os.fork() == 0:\n    {noise}\nended(76)")
    told.on(2, "time.sleep(60)")
    told.on(3, "ended(0)")
    begun = time.monotonic()
    assert told.job(*LOCAL, "--silence-s", "0.8") == exits.DONE
    assert time.monotonic() - begun < 5
    assert [line["status"] for line in told.history("end")] == [exits.LOST, exits.LOST, exits.DONE]
