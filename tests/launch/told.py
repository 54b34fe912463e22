"""A launcher that does as it is told, and a machine of four hosts whose jobs use it."""

import json
import os
import re
import stat
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from launch import job, journal, preflight, supervise, verdict
from launch.__main__ import run_main

# A launcher: it acts as the file of its attempt says, in the directory that TOLD names, and starts nothing.
LAUNCHER = """#!{python} -IS
import json, os, pathlib, signal, sys, time
run, told = pathlib.Path(os.environ["RUN"]), pathlib.Path(os.environ["TOLD"])
with (told / "calls").open("a") as file:
    file.write(json.dumps(sys.argv[1:]) + "\\n")
hosts = []
if "--hostfile" in sys.argv:
    hosts = pathlib.Path(sys.argv[sys.argv.index("--hostfile") + 1]).read_text().split()
def say(text, end="\\n"):
    print(text, end=end, flush=True)
def checkpoint(images):
    path = run / "checkpoints" / f"images_{{images:012d}}"
    path.mkdir(parents=True)
    (path / ".complete").touch()
def record(images):
    with (run / "log.jsonl").open("a") as file:
        file.write(json.dumps({{"images_seen": images}}) + "\\n")
def ended(status, why="said so"):
    (run / "ended.json").write_text(json.dumps({{"status": status, "why": why}}))
def until_asked():
    (run / "stop").unlink(missing_ok=True)  # as a run does when it begins
    say("trains")
    while not (run / "stop").exists():
        time.sleep(0.02)
if "hosts.stage" in " ".join(sys.argv):
    exec((told / "stage").read_text())
    sys.exit()
attempt = told / os.environ["AERIS_ATTEMPT"]
exec((attempt if attempt.exists() else told / "else").read_text())
"""


class Told:
    """What the launcher is told to do, and what came of it."""

    def __init__(self, directory: Path, capfd: pytest.CaptureFixture[str]) -> None:
        self.run, self.directory, self.capfd = directory / "run", directory / "told", capfd
        self.directory.mkdir()
        self.said = ""

    def on(self, attempt: int | str, behaviour: str) -> None:
        (self.directory / (str(attempt) if attempt else "else")).write_text(behaviour)

    def job(self, *flags: str, words: tuple[str, ...] = ()) -> int:
        words = words or ("aeris.train", "tiny", "--run-dir", str(self.run))
        status = run_main(["job", *flags, "--", *words])
        said = self.capfd.readouterr()
        self.said = said.out + said.err
        return status

    @property
    def calls(self) -> list[list[str]]:
        path = self.directory / "calls"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def hosts(self, attempt: int) -> str:
        return (self.run / "job" / f"hosts.{attempt}").read_text().replace("\n", " ").strip()

    def history(self, event: str) -> list[dict[str, object]]:
        lines = map(json.loads, (self.run / "job" / "history.jsonl").read_text().splitlines())
        return [line for line in lines if line["event"] == event]


def program(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


@pytest.fixture
def told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Told:
    """Put the launcher and a machine of four hosts, two of them spares, in this process's way."""
    told = Told(tmp_path, capfd)
    programs = tmp_path / "bin"
    programs.mkdir()
    program(programs / "mpiexec", LAUNCHER.format(python=sys.executable))
    program(programs / "qsub", f'#!/bin/sh\necho "$@" >> {told.directory}/qsub\necho 77.server\n')
    (tmp_path / "nodes").write_text("\n".join(("a.hsn", *HOSTS)) + "\n")  # PBS may repeat
    for name in [name for name in os.environ if re.match("PBS_|SLURM_|PALS_|PMI", name)]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")
    monkeypatch.setenv("RUN", str(told.run))
    monkeypatch.setenv("TOLD", str(told.directory))
    monkeypatch.setenv("PBS_NODEFILE", str(tmp_path / "nodes"))
    for module, name, value in (
        (job, "PAUSE_S", 0.01),
        (verdict, "SETTLE_S", 0.05),
        (supervise, "POLL_S", 0.05),
        (supervise, "END_S", 0.5),
        (supervise, "LAST_S", 0.5),
        (supervise, "AT_ONCE_S", 0.2),
        (journal, "LOCK_WAIT_S", 0.2),
    ):
        monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(preflight, "examine", lambda *args, **kwargs: {})
    return told


HOSTS = ("a.hsn", "b.hsn", "c.hsn", "d.hsn")
AURORA = ("--machine", "alcf-aurora", "--nodes", "2", "--ranks-per-node", "2")
LOCAL = ("--machine", "local", "--ranks-per-node", "2")


def later(act: Callable[[], object], when: Callable[[], object]) -> threading.Thread:
    """Act as soon as something is so."""

    def wait() -> None:
        end = time.monotonic() + 10
        while not when() and time.monotonic() < end:
            time.sleep(0.02)
        act()

    thread = threading.Thread(target=wait)
    thread.start()
    return thread
