"""Break a training run on several ranks again and again, start it again each time, and judge its end.

    python -m tests.chaos --faults 40 --seed 1 --ranks 4

A fault is done to a run at a random moment. The run is then started again, by the same words, until it has
seen all its images. It must end with the weights, averages and losses, bit for bit, of a run that nothing was
done to. Reported are faults survived of faults tried, and the images that were trained again after each.
Ranks are forked by a server that has imported torch already, so that a start takes a second; they run
`aeris.train` as `python -m aeris.train` does, each with the environment of a launcher.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

INTERVAL = 16  # images between checkpoints: four steps
KINDS = (
    "kill a rank",
    "kill all ranks",
    "kill a rank during a save",
    "kill all ranks during a save",
    "fill the disk",
    "kill all ranks, truncate the newest checkpoint",
    "kill all ranks, flip a byte of the newest checkpoint",
    "kill all ranks, remove a file of the newest checkpoint",
    "ask a rank to end",
    "stop a rank without a word",
)
SMALL = (
    *("--model.width", "32", "--model.hidden", "48", "--model.heads", "4", "--model.layers", "4"),
    *("--model.precision", "fp32", "--model.residual", "fp32", "--device", "cpu"),
    *("--train.batch", "4", "--train.microbatch", "1", "--checkpoint.keep", "3"),
    *("--checkpoint.every-images", str(INTERVAL), "--faults.step-s", "8", "--faults.read-s", "8"),
)
WAIT_S = 120.0  # for anything a run is expected to do by itself


def layout(ranks: int) -> tuple[str, ...]:
    """Give pipeline, sequence and data parallelism to 4 and 8 ranks; leave the rest to the program."""
    degrees = {4: {"pp": 2, "sp": 2}, 8: {"dp": 2, "pp": 2, "sp": 2}}.get(ranks, {})
    return tuple(word for axis, degree in degrees.items() for word in (f"--parallel.{axis}", str(degree)))


def be_a_rank(words: tuple[str, ...], variables: dict[str, str], output: str) -> None:
    """Run the program in a process of its own, as if started by a launcher."""
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.update(variables)
    # Blocked if the server was started for data workers (aeris/data/loader.py).
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1})
    sys.argv = ["aeris.train", *words]
    from aeris.log import run_program
    from aeris.train import main

    run_program(main)


class Ranks:
    """One start of the command."""

    def __init__(self, words: tuple[str, ...], ranks: int, outputs: Path) -> None:
        """Start it."""
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = str(free.getsockname()[1])
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(
            ["aeris.train", "torch._dynamo", *(f"torch.distributed.{n}" for n in ("fsdp", "checkpoint"))]
        )
        self.began = time.time()
        self.outputs = [outputs / f"rank_{rank}" for rank in range(ranks)]
        self.processes = []
        for rank in range(ranks):
            variables = {"RANK": rank, "WORLD_SIZE": ranks, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": ranks}
            variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            texts = {name: str(value) for name, value in variables.items()}
            process = context.Process(target=be_a_rank, args=(words, texts, str(self.outputs[rank])))
            process.start()
            self.processes.append(process)

    @property
    def running(self) -> bool:
        """Whether no rank has ended yet."""
        return all(process.is_alive() for process in self.processes)

    def send(self, number: int, rank: int | None = None) -> None:
        """Send a signal to a rank, or to all."""
        for process in self.processes if rank is None else [self.processes[rank]]:
            if process.is_alive() and process.pid is not None:
                os.kill(process.pid, number)

    def wait(self, silent: int | None = None) -> list[int | None]:
        """Wait until every rank but a silent one has ended by itself; return their exit statuses.

        A signal is negative, None is a rank that has not ended and was killed.
        """
        end = time.monotonic() + WAIT_S
        for rank, process in enumerate(self.processes):
            if rank != silent:
                process.join(max(0.0, end - time.monotonic()))
        statuses = [process.exitcode for process in self.processes]
        self.send(signal.SIGKILL)
        return statuses

    def said(self) -> str:
        """What the ranks have printed."""
        return "\n".join(path.read_text(errors="replace") for path in self.outputs if path.exists())


@dataclass
class Fault:
    """One thing done to the run, and what came of it."""

    kind: str
    at: int
    """Images that had been trained on when it was done."""
    lost: int = -1
    """Of them, images that had to be trained on again."""
    statuses: list[int | None] = field(default_factory=list)
    complaint: str = ""
    """What was not as it should be; empty if the run survived it well."""


class Run:
    """A run that is broken and started again."""

    def __init__(self, run_dir: Path, ranks: int, images: int, chance: random.Random) -> None:
        """Describe it; nothing is started."""
        self.run_dir, self.ranks, self.images, self.chance = run_dir, ranks, images, chance
        self.words = (
            "tiny",
            *SMALL,
            *layout(ranks),
            "--train.images",
            str(images),
            "--run-dir",
            str(run_dir),
        )
        self.outputs = Path(tempfile.mkdtemp(prefix="said-"))
        self.last: Fault | None = None

    def seen(self) -> int:
        """Images of the last step in the log."""
        try:
            lines = (self.run_dir / "log.jsonl").read_text().splitlines()
        except OSError:
            return 0
        for line in reversed(lines):
            try:
                return int(json.loads(line)["images_seen"])
            except ValueError:
                continue
        return 0

    def start(self) -> Ranks:
        """Start the command."""
        return Ranks(self.words, self.ranks, self.outputs)

    def saves(self) -> bool:
        """Whether a checkpoint is being written."""
        return any((self.run_dir / "checkpoints").glob("images_*.partial"))

    def complete(self) -> list[Path]:
        """List the complete checkpoints, oldest first."""
        return sorted(path.parent for path in (self.run_dir / "checkpoints").glob("images_*/.complete"))

    def account(self, said: str) -> None:
        """Note, by what the next start says, how many images the last fault has cost."""
        if self.last is not None and self.last.lost < 0:
            self.last.lost = self.last.at - resumed_at(said)

    def until(self, ranks: Ranks, happened: Callable[[], bool], every_s: float) -> bool:
        """Wait for something, as long as the ranks run."""
        end = time.monotonic() + WAIT_S
        while not happened():
            if not ranks.running or time.monotonic() > end:
                return False
            time.sleep(every_s)
        return ranks.running

    def finish(self) -> str:
        """Start the command and let it come to its end; return what it said.

        Raises:
            AssertionError: it does not.
        """
        ranks = self.start()
        statuses = ranks.wait()
        if any(statuses) or self.seen() < self.images:
            raise AssertionError(f"{statuses} at image {self.seen()}: {ranks.said()}")
        self.account(ranks.said())
        return ranks.said()

    def break_once(self, kind: str) -> Fault | None:
        """Start the command and do something to it; None if it ended before that."""
        before = self.seen()
        ranks = self.start()
        moment = min(before + self.chance.randint(1, INTERVAL * 3 // 2), self.images - 4)
        ready = self.until(ranks, lambda: self.begun(ranks), 0.01)
        self.account(ranks.said())
        ready = ready and self.until(ranks, lambda: self.seen() >= moment, 0.005)
        if ready and "during a save" in kind:
            ready = self.until(ranks, self.saves, 0.0005)
        if ready and "newest" in kind:  # with only one, nothing could be gone back to
            ready = self.until(ranks, lambda: len(self.complete()) > 1, 0.005)
        if not ready:
            statuses = ranks.wait()
            if any(statuses):
                fault = Fault(f"before: {kind}", before, statuses=statuses)
                fault.complaint = f"the run did not get to image {moment}: {ranks.said()[-2000:]}"
                return fault
            return None
        self.last = fault = Fault(kind, self.seen())
        victim = self.chance.randrange(self.ranks)
        remedy = self.do(kind, ranks, victim)
        fault.statuses = ranks.wait(victim if kind.startswith("stop") else None)
        fault.at = self.seen()
        remedy()
        self.judge(fault, ranks)
        return fault

    def begun(self, ranks: Ranks) -> bool:
        """Whether this start has come to training."""
        path = self.run_dir / "startup.json"
        return path.exists() and path.stat().st_mtime > ranks.began

    def do(self, kind: str, ranks: Ranks, victim: int) -> Callable[[], Any]:
        """Do it; return what is to be done after the ranks have ended."""
        if kind == "fill the disk":
            return self.fill(ranks)
        if kind == "ask a rank to end":
            ranks.send(self.chance.choice((signal.SIGTERM, signal.SIGUSR1)), victim)
        elif kind == "stop a rank without a word":
            ranks.send(signal.SIGSTOP, victim)
        else:
            ranks.send(signal.SIGKILL, victim if "a rank" in kind else None)
        return (lambda: self.damage(kind)) if "newest" in kind else (lambda: None)

    def fill(self, ranks: Ranks) -> Callable[[], Any]:
        """Leave no room: on a disk of our own its last bytes, else by a limit on the size of files."""
        if self.run_dir.is_mount():
            ballast = self.run_dir / "ballast"
            with ballast.open("wb", buffering=0) as file:
                try:
                    while True:
                        file.write(bytes(4096))
                except OSError:
                    pass
            return ballast.unlink
        for process in ranks.processes:
            if process.pid is not None:
                resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (1, 1))
        return lambda: None

    def damage(self, kind: str) -> None:
        """Damage a file of the newest checkpoint."""
        path = self.chance.choice([path for path in sorted(self.complete()[-1].rglob("*")) if path.is_file()])
        content = bytearray(path.read_bytes())
        if "remove" in kind or not content:
            path.unlink()
        elif "truncate" in kind:
            path.write_bytes(content[: self.chance.randrange(len(content))])
        else:
            content[self.chance.randrange(len(content))] ^= 1 << self.chance.randrange(8)
            path.write_bytes(content)

    def judge(self, fault: Fault, ranks: Ranks) -> None:
        """Complain of ranks that did not end by themselves, with the wrong status or with a traceback."""
        right = {"ask a rank to end": {75}, "fill the disk": {74, 76}}.get(fault.kind, {76, -signal.SIGKILL})
        if fault.kind.startswith("stop"):
            right = {76, None}
        wrong = [status for status in fault.statuses if status not in right]
        if wrong or "Traceback" in ranks.said():
            fault.complaint = f"statuses {fault.statuses}: {ranks.said()[-3000:]}"


def resumed_at(said: str) -> int:
    """Find at which image a start went on."""
    found = re.search(r"(?:resuming|trained already) at image ([\d,]+)", said)
    return int(found[1].replace(",", "")) if found else 0


def state(run_dir: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Read the last checkpoint's tensors, and the losses of the log."""
    import torch

    from swipe.checkpoint_files import StageReader
    from swipe.checkpoint_reading import complete, load

    newest = complete(run_dir / "checkpoints")[-1]
    stages = [StageReader(path) for path in sorted(newest.glob("stage_*"))]
    tensors = {name: torch.empty(size) for stage in stages for name, size in stage.sizes.items()}
    load(newest, tensors)
    records = [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]
    return tensors, [{key: r[key] for key in ("images_seen", "loss", "grad_norm", "lr")} for r in records]


def chaos(
    kinds: list[str], seed: int, ranks: int, root: Path, say: Callable[[str], Any] = print
) -> list[Fault]:
    """Do all of `kinds` to one run, in random order, and compare its end with an undisturbed run.

    Returns:
        What was done and what came of it; a last entry "the end" if the two runs differ.
    """
    import torch

    os.environ["OMP_NUM_THREADS"] = "1"
    chance = random.Random(seed)
    kinds = chance.sample(kinds, len(kinds))
    images = INTERVAL * (len(kinds) + 2)
    run_dir = root / "broken"
    run_dir.mkdir(parents=True)
    mounted = (
        shutil.which("mount")
        and not subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(run_dir)],
            capture_output=True,
            check=False,
        ).returncode
    )
    try:
        Run(root / "whole", ranks, images, chance).finish()
        run, faults = Run(run_dir, ranks, images, chance), list[Fault]()
        for kind in kinds:
            fault = run.break_once(kind)
            if fault is None:
                break
            faults.append(fault)
            say(f"{len(faults):3}. at image {fault.at:5}: {fault.kind}; ranks end: {words(fault.statuses)}")
            if fault.complaint:
                say(f"     not as it should be: {fault.complaint}")
        run.finish()
        (ours, log), (theirs, expected) = state(run_dir), state(root / "whole")
        same = ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
        if not same or log != expected:
            faults.append(
                Fault("the end", images, complaint=f"weights equal: {same}; log: {log == expected}")
            )
        return faults
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(run_dir)], check=False)


def words(statuses: list[int | None]) -> str:
    """Put exit statuses into words: a signal killed it, or it did not end and was killed at last."""
    names = ["no end" if s is None else signal.Signals(-s).name if s < 0 else str(s) for s in statuses]
    return ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))


def summary(faults: list[Fault]) -> str:
    """Report the figure: faults survived of faults tried, and what they cost."""
    survived = [fault for fault in faults if not fault.complaint]
    lost = [fault.lost for fault in faults if fault.lost >= 0]
    end = "differs from" if any(fault.kind == "the end" for fault in faults) else "is, bit for bit, that of"
    return (
        f"{len(survived)} of {len(faults)} faults survived; the end {end} an undisturbed run; images trained "
        f"again after a fault: {max(lost, default=0)} at most, {sum(lost) / max(1, len(lost)):.1f} in the "
        f"mean, with a checkpoint every {INTERVAL}"
    )


def main() -> None:
    """Run the program."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--faults", type=int, default=20, help="faults to try")
    parser.add_argument("--seed", type=int, default=0, help="of their kinds and moments")
    parser.add_argument("--ranks", type=int, default=4, help="processes of the run")
    arguments = parser.parse_args()
    times, rest = divmod(arguments.faults, len(KINDS))
    kinds = [*KINDS * times, *random.Random(arguments.seed).sample(KINDS, rest)]
    with tempfile.TemporaryDirectory() as root:
        faults = chaos(kinds, arguments.seed, arguments.ranks, Path(root))
    print(summary(faults))
    sys.exit(any(fault.complaint for fault in faults))


if __name__ == "__main__":
    main()
