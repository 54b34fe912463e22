"""`python -m launch job -- aeris.train ...`: keep a run going on the nodes of this job until it is done.

Stages its Python, measures the nodes, starts the program on the good ones, watches it, and starts it again
after a failure without the machines that failed; asks it to save when the time is up, and submits the job's
successor. Every decision is a line of output and one of RUN_DIR/job/history.jsonl.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from launch import exits, layouts, machines, preflight, stage
from launch.asked import MARGIN_S, Asked
from launch.journal import Journal, alone
from launch.output import Output
from launch.pool import Pool
from launch.supervise import supervise
from launch.verdict import Ended, forget, furthest, judge, newest, suspects

AFTER = "program"
"""Name of the words after `--`: a module of Python and its own words."""
RUNS = ("aeris.train", "aeris.aurora.finetune")
"""Programs that leave checkpoints and last words in their --run-dir, and look for requests there."""
FRUITLESS = 3
"""Restarts in a row that may bring nothing new."""
PAUSE_S = 10.0
"""Before a restart after nothing new, doubled each time: what failed may need a moment."""
_WORDS = {
    exits.DONE: "done",
    exits.MISTAKE: "a mistake in the command",
    exits.IO: "a file failed",
    exits.STOPPED: "stopped",
    exits.LOST: "lost",
    exits.INTERRUPTED: "interrupted",
}
_DOUBT = {
    "SIGTERM": " (PBS sends it when a node dies, too; if it was not you: submit again, or use "
    "python -m launch submit --jobs)"
}
_STAGINGS = 3
"""Times to stage over all hosts, without those that could not."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.usage = "python -m launch job [OPTIONS] -- MODULE WORDS (aeris.train 40b --run-dir DIR)"
    said = "; ".join(f"{status} {word}" for status, word in _WORDS.items())
    parser.epilog = (
        f"Exit status: {said}. After {exits.DONE} or {exits.MISTAKE} there is nothing to go on with; "
    )
    parser.epilog += "after any other the same command goes on."
    add = parser.add_argument
    add("--machine", help="one of launch/machines.py (default: by the scheduler's environment)")
    add("--nodes", type=int, help="nodes to run on; the others are spares (default: all)")
    add("--ranks-per-node", type=int, help="ranks on each (default: the machine's devices)")
    add("--run-dir", type=Path, help="where job/ is put, for a program that has no --run-dir")
    add("--restarts", type=int, default=30, help="restarts in one job (default: %(default)s)")
    add("--no-preflight", action="store_true", help="take the nodes as they are")
    add("--preflight-file", type=Path, metavar="FILE", help="it reads it (default: one of --data.store)")
    add("--silence-s", type=float, default=2400.0, help="end a run that is silent so long (%(default)s)")
    add(
        "--margin-s", type=float, default=MARGIN_S, help="ask it to save so long before the end (%(default)s)"
    )
    add("--resubmit", default="", metavar="SCRIPT", help="submit it when the time is up and the run not done")
    add("--stage", default="", metavar="ARCHIVE", help="unpack it (launch pack) on the nodes, use its Python")


def run(arguments: argparse.Namespace) -> int:
    """Run the program until it is done; return how it ended (launch/exits.py).

    Raises:
        ValueError: the program, the nodes, the layout or the time left do not fit together.
        OSError: the run directory cannot be written.
    """
    words: list[str] = list(arguments.program)
    run_dir = _run_dir(arguments.run_dir, words)
    machine = machines.machine(arguments.machine, os.environ)
    hosts = machine.hosts(os.environ)
    ranks = machine.ranks_per_node if arguments.ranks_per_node is None else arguments.ranks_per_node
    nodes = len(hosts) if arguments.nodes is None else arguments.nodes
    if nodes > len(hosts):
        raise ValueError(f"--nodes {nodes}, but this job has {len(hosts)}: submit it with more, or ask less")
    limits = layouts.Limits(machine.name, machine.nodes, machine.ranks_per_node)
    if machine.scheduler == "none":
        limits = layouts.Limits(machine.name, nodes=1, ranks=sys.maxsize)
    layouts.check(nodes, ranks, layouts.degrees(words), limits)
    if arguments.preflight_file and not arguments.preflight_file.is_file():
        raise ValueError(f"--preflight-file {arguments.preflight_file}: there is no such file")
    if arguments.stage:
        stage.place(Path(arguments.stage), Path(tempfile.gettempdir()))
    left_s = machine.seconds_left(os.environ)
    margin_s = arguments.margin_s if keeps_record(words) else 0.0  # another program has no use for it
    if left_s is not None and left_s <= margin_s:
        raise ValueError(
            f"{left_s:.0f} s are left of the job's time, not more than --margin-s {margin_s:g}: "
            "ask for more time, or give a smaller margin"
        )
    directory, output = run_dir / "job", Output()
    directory.mkdir(parents=True, exist_ok=True)
    with alone(directory, output) as lock, Asked(run_dir, left_s, margin_s) as asked:
        if left_s is None and machine.scheduler != "none":
            output.say("nobody says how long this job may run: only SIGUSR1 will tell that its time is up")
        journal = Journal(directory, output)
        pool = Pool(hosts, nodes, journal.say)
        return Job(arguments, machine, ranks, words, run_dir, pool, journal, asked, lock).run()


def _run_dir(own: Path | None, words: Sequence[str]) -> Path:
    """Return the run directory that the program's words name, or else the job's own."""
    if not words or not re.fullmatch(r"(?!python)[A-Za-z_]\w*(\.\w+)*", words[0]):
        first = words[0] if words else "nothing"
        raise ValueError(f"{first} is no module: write -- aeris.train and its words, without python -m")
    said = layouts.flag(words, "run-dir")
    if said and own and Path(said) != own:
        raise ValueError(f"--run-dir {own} for the job, but {said} for {words[0]}: leave out the job's")
    if not said and not own:
        raise ValueError(f"--run-dir is missing: give it to {words[0]}, or to launch job before the --")
    return Path(said) if said else Path(own or "")


def keeps_record(words: Sequence[str]) -> bool:
    """Tell whether a program leaves a record and last words, and saves when it is asked to stop.

    A forecast does so in the directory it is given; without, it does so where this job does not look.
    """
    told = words[0] == "aeris.forecast" and layouts.flag(words, "run-dir") is not None
    return (words[0] in RUNS or told) and "--dry-run" not in words


class Job:
    """The attempts of one job to bring a run to its end."""

    def __init__(
        self,
        settings: argparse.Namespace,
        machine: machines.Machine,
        ranks_per_node: int,
        words: Sequence[str],
        run_dir: Path,
        pool: Pool,
        journal: Journal,
        asked: Asked,
        keep: Sequence[int] = (),
    ) -> None:
        """Nothing runs yet.

        Args:
            settings: those of `add_arguments`.
            machine: where.
            ranks_per_node: on each.
            words: of the program, its module first.
            run_dir: of the run.
            pool: hosts.
            journal: is told every decision.
            asked: who may end it.
            keep: file descriptors that programs inherit.
        """
        self.settings, self.machine, self.ranks, self.words = settings, machine, ranks_per_node, words
        self.run_dir, self.pool, self.journal, self.asked, self.keep = run_dir, pool, journal, asked, keep
        self.say = journal.say
        self.record = run_dir if keeps_record(words) else None
        self.staged = (
            stage.place(Path(settings.stage), Path(tempfile.gettempdir())) if settings.stage else None
        )
        self.python = str(self.staged / "bin" / "python") if self.staged else sys.executable
        self.fresh: set[str] = set()  # staged since the last attempt
        self.begun = newest(run_dir)

    def run(self) -> int:
        """Try until the run is done, cannot be done, or must make place; return the exit status."""
        restarts = fruitless = 0
        best = (self.begun, furthest(self.run_dir))
        if not self.asked.look():  # it may be older than this job, which waited in the queue
            self.examine()
        while not self.asked.look():
            try:
                ended, named = self.attempt()
            except OSError as error:
                ended, named = Ended(exits.IO, f"cannot start it: {error}"), {}
            reached = (newest(self.run_dir), furthest(self.run_dir))
            gained = any(now > before for now, before in zip(reached, best))
            best = (max(best[0], reached[0]), max(best[1], reached[1]))
            word = _WORDS.get(ended.status, "failed")
            word += f" (status {ended.status})" if ended.status != exits.DONE else ""
            why = "" if ended.why in ("done", f"status {ended.status}") else f": {ended.why}"
            self.say(f"attempt {self.journal.attempt}: {word}{why}", "end", status=ended.status)
            if ended.status in (exits.DONE, exits.MISTAKE) or self.asked.look() or by_hand(ended):
                return self.leave(ended)
            fruitless = 0 if gained else fruitless + 1
            if fruitless > FRUITLESS:
                self.say(f"gives up: {fruitless} attempts in a row brought nothing new", "give up")
                return ended.status if ended.status in exits.GO_ON else exits.LOST
            if restarts == self.settings.restarts:
                self.say(f"gives up here after {restarts} restarts", "give up")
                self.asked.again = True  # on other nodes it may go on
                return self.leave(ended)
            restarts += 1
            self.pool.suspect(named)
            if not named:
                self.examine()
            self.pause(PAUSE_S * 2 ** (fruitless - 1) if fruitless else 0.0)
        return self.leave(Ended(exits.STOPPED, self.asked.why))

    def attempt(self) -> tuple[Ended, dict[str, str]]:
        """Start the program once and wait for its end; return that, and the hosts it is blamed on.

        Raises:
            ValueError: the launcher is not there.
            OSError: it cannot be started, or a file not be written.
        """
        self.journal.attempt += 1
        number, directory = self.journal.attempt, self.journal.directory
        directory.mkdir(parents=True, exist_ok=True)
        hosts = self.pool.chosen()
        hostfile = directory / f"hosts.{number}"
        hostfile.write_text("\n".join(hosts) + "\n", encoding="utf-8")
        if self.record is not None:
            forget(self.record)
        with self.journal.output.copied(directory / f"attempt_{number}.log"):
            ended, ranks = self.unpack(hosts, hostfile), 1
            if ended.status == exits.DONE:
                program, ranks = [self.python, "-m", *self.words], self.ranks
                ended = self.start(program, hosts, hostfile, ranks, self.record)
                self.fresh.clear()
            return ended, suspects(self.journal.output.signs, hosts, ranks)

    def start(
        self, program: Sequence[str], hosts: Sequence[str], hostfile: Path, ranks: int, record: Path | None
    ) -> Ended:
        """Run a program on hosts, `ranks` on each, and say how it ended.

        Raises:
            ValueError: the launcher is not there.
            OSError: it cannot be started.
        """
        number, environ = self.journal.attempt, self.environ()
        environ["AERIS_ATTEMPT"] = str(number)
        if self.machine.scheduler == "pbs":
            environ["PBS_NODEFILE"] = str(hostfile.absolute())
        listed = None if self.machine.scheduler == "none" else hostfile
        command = self.machine.command(program, hosts, ranks, listed)
        self.say(f"attempt {number}: {shlex.join(command)}", "start", hosts=len(hosts))
        output, silence_s = self.journal.output, self.settings.silence_s
        status, why = supervise(command, output, self.asked, record, silence_s, environ, self.keep)
        return judge(record, status, why)

    def environ(self) -> dict[str, str]:
        """Return the environment of the programs."""
        return {**os.environ, **(stage.environ(self.staged) if self.staged else {})}

    def unpack(self, hosts: Sequence[str], hostfile: Path) -> Ended:
        """Stage on hosts, but not again where that was done since the last attempt; OSError as `start`."""
        if not self.staged or self.fresh.issuperset(hosts):
            return Ended(exits.DONE, "")
        program = [sys.executable, "-m", "launch", "stage", self.settings.stage, tempfile.gettempdir()]
        ended = self.start(program, hosts, hostfile, 1, None)
        if ended.status == exits.DONE:
            self.fresh.update(hosts)
        return ended

    def unpacked(self) -> list[str]:
        """Stage on all hosts, so that those are measured from their own disks; return those that could.

        Raises:
            ValueError: the launcher is not there.
            OSError: no staging went well.
        """
        hosts, directory, ended = list(self.pool.hosts), self.journal.directory, None
        for _ in range(_STAGINGS if self.staged else 0):
            hostfile = directory / "hosts.stage"
            hostfile.write_text("\n".join(hosts) + "\n", encoding="utf-8")
            with self.journal.output.copied(directory / "stage.log"):
                ended = self.unpack(hosts, hostfile)
                named = suspects(self.journal.output.signs, hosts, 1)
            if ended.status == exits.DONE:
                break
            self.pool.suspect(named)
            hosts = [host for host in hosts if host not in named]
            if not named or not hosts or self.asked.look():
                break
        if ended and ended.status != exits.DONE:
            raise OSError(f"the hosts could not be staged: {ended.why}")
        return hosts

    def examine(self) -> None:
        """Measure all hosts, and put the bad ones aside; a single one has none to be compared with."""
        if self.settings.no_preflight or len(self.pool.hosts) == 1:
            return
        try:
            hosts = self.unpacked()
            bad = preflight.examine(
                self.machine,
                hosts,
                self.ranks,
                directory=self.journal.directory,
                file=self.settings.preflight_file or self.data_file(),
                python=self.python,
                environ=self.environ(),
                say=lambda text: self.say(text, "preflight"),
            )
        except (ValueError, OSError, subprocess.SubprocessError) as error:
            self.say(f"preflight failed, and says nothing of the hosts: {error}", "preflight")
            return
        if not self.asked.look():  # what ends this job's programs says nothing of the hosts either
            self.pool.put_aside(bad)

    def data_file(self) -> Path | None:
        """Return a file of the store that the program's words name, if they do and it is large enough."""
        store = layouts.flag(self.words, "data.store")
        return preflight.data_file(store) if store else None

    def pause(self, pause_s: float) -> None:
        """Wait, unless somebody asks for the end."""
        if pause_s:
            self.say(f"nothing new came of it: the next attempt in {pause_s:.0f} s", "pause")
        until = time.monotonic() + pause_s
        while time.monotonic() < until and not self.asked.look():
            time.sleep(0.1)

    def leave(self, ended: Ended) -> int:
        """End the job after `ended`, with a successor if its time was up; return the exit status."""
        asked = self.asked
        if ended.status in (exits.DONE, exits.MISTAKE) or not (asked.why or asked.again):
            return ended.status
        status = exits.INTERRUPTED if asked.interrupted else exits.STOPPED if asked.why else ended.status
        if not asked.again:
            self.say(f"ends by {asked.why}: the same command goes on{_DOUBT.get(asked.why, '')}", "leave")
        elif not self.settings.resubmit:
            self.say("ends: the same command goes on in another job", "leave")
        elif newest(self.run_dir) <= self.begun:
            self.say("no checkpoint was completed in this job: another like it is not submitted", "leave")
        elif self.submitted():
            return exits.STOPPED
        return status

    def submitted(self) -> bool:
        """Submit the job's successor; return whether that worked."""
        try:
            command = self.machine.again(self.settings.resubmit, os.environ)
            said = subprocess.run(
                command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120, check=False
            )
        except (ValueError, OSError, subprocess.SubprocessError) as error:
            self.say(f"cannot submit the next job: {error}", "submit", well=False)
            return False
        well, answer = said.returncode == 0, (said.stdout + said.stderr).strip() or said.returncode
        text = "submitted the next job" if well else "cannot submit the next job"
        self.say(f"{text}: {shlex.join(command)}: {answer}", "submit", well=well)
        return well


def by_hand(ended: Ended) -> bool:
    """Tell whether a person ended the run beside the job: Ctrl-C to its ranks, or its own stop file."""
    return ended.status == exits.INTERRUPTED or (
        ended.status == exits.STOPPED and "stopped by the file" in ended.why
    )
