"""Run all benchmarks, one after the other, and flag what became slower.

    python -m benchmarks.run --out runs/benchmarks                       a file and a picture of each
    python -m benchmarks.run --out runs/new --compare runs/benchmarks    against an earlier call
    python -m benchmarks.run --compare benchmarks/results --only step shift

Each runs as its own program with its own short defaults; what it prints is in OUT/NAME.log. One that fails
does not stop the others. The status is 1 if one failed, or a number is worse by more than a tenth.
Numbers compare only if both were taken on the same machine, with nothing else running on it.
"""

from __future__ import annotations

import csv
import importlib.util
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

if not __package__:  # started by its path, from anywhere
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import tyro
from rich.markup import escape

from aeris.log import console, run_program
from benchmarks.records import TOLERANCE

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Benchmark:
    """A module of this package, as it is run here."""

    flags: tuple[str, ...] = ()
    needs: str = ""
    """An optional package without which it is left out."""


BENCHMARKS = {
    "step": Benchmark(),
    "attention": Benchmark(),
    "shift": Benchmark(),
    "pipeline": Benchmark(),
    "io": Benchmark(),
    "memory": Benchmark(),
    "parallelism": Benchmark(("--rounds", "2")),
    "weak_scaling": Benchmark(),
    "strong_scaling": Benchmark(),
    "startup": Benchmark(("--ranks", "1,4", "--rounds", "1")),
    "forecast": Benchmark(),
    "aurora": Benchmark(("--model", "tiny", "--rounds", "2"), needs="aurora"),
}
"""In the order they run."""


@dataclass(frozen=True)
class Options:
    """Run all benchmarks with short settings; flag what is slower than in an earlier run."""

    out: Path = Path("runs/benchmarks")
    """Directory that gets NAME.csv, NAME.png and NAME.log of each."""
    only: tuple[str, ...] = ()
    """Names of those to run; without, all."""
    compare: Path | None = None
    """Directory of an earlier run, or benchmarks/results."""
    hardware: str = "cpu"
    """Which files of benchmarks/results are meant: NAME_HARDWARE_DATE.csv, the newest of them."""
    plots: bool = True
    """Also draw the pictures; needs matplotlib."""
    timeout_s: float = 900.0
    """A benchmark that runs longer has failed."""


@dataclass(frozen=True)
class Outcome:
    """How a benchmark went.

    Attributes:
        state: ok, worse, failed or left out.
        said: why it failed or was left out; what it said of the comparison.
    """

    state: str
    said: str = ""
    rows: int = 0
    seconds: float = 0.0


def earlier(name: str, options: Options) -> Path | None:
    """Return the file to compare with; None if there is none."""
    if options.compare is None:
        return None
    same = options.compare / f"{name}.csv"
    if same.exists():
        return same
    recorded = sorted(options.compare.glob(f"{name}_{options.hardware}_*.csv"))  # dates sort as text
    return recorded[-1] if recorded else None


def command(name: str, options: Options) -> list[str]:
    """Return the words that start a benchmark."""
    files = ["--csv", str((options.out / f"{name}.csv").resolve())]
    if options.plots:
        files += ["--plot", str((options.out / f"{name}.png").resolve())]
    if before := earlier(name, options):
        files += ["--compare", str(before.resolve())]
    return [sys.executable, "-m", f"benchmarks.{name}", *BENCHMARKS[name].flags, *files]


def run(name: str, options: Options) -> Outcome:
    """Run a benchmark to its end, or to the end of its time."""
    needs = BENCHMARKS[name].needs
    if needs and importlib.util.find_spec(needs) is None:
        return Outcome("left out", f"the package {needs} is not installed")
    table, log = options.out / f"{name}.csv", options.out / f"{name}.log"
    table.unlink(missing_ok=True)
    start = time.monotonic()
    environment = os.environ | {"COLUMNS": "200"}
    with log.open("w") as file:
        process = subprocess.Popen(
            command(name, options), cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        try:
            status = process.wait(options.timeout_s)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # its ranks with it
                process.wait()
    seconds = time.monotonic() - start
    return judge(status, log.read_text(errors="replace"), table, seconds, options.timeout_s)


def judge(status: int | None, said: str, table: Path, seconds: float, timeout_s: float) -> Outcome:
    """Say how a benchmark went.

    Args:
        status: its exit status; 1 are numbers that became worse, or an error of the program. None: too late.
        said: all it printed.
        table: the file it should have written.
        seconds: it took, of `timeout_s`.
    """
    if status is None:
        return Outcome("failed", f"not done after {timeout_s:g} s", seconds=seconds)
    lines = [line for line in said.splitlines() if line.strip()]
    if status not in (0, 1) or "Traceback (most recent call last)" in said or not table.exists():
        why = lines[-1].strip() if lines else "it said nothing"
        return Outcome("failed", f"status {status}: {why}", seconds=seconds)
    with table.open(newline="") as file:
        rows = len(list(csv.DictReader(file)))
    compared = [number for number, line in enumerate(lines) if line.strip().startswith("now over ")]
    return Outcome(
        "worse" if status else "ok", "\n".join(lines[compared[-1] :]) if compared else "", rows, seconds
    )


def main() -> None:
    """Run the benchmarks."""
    options = tyro.cli(Options, description=Options.__doc__)
    if unknown := sorted({*options.only} - {*BENCHMARKS}):
        raise ValueError(f"--only {unknown[0]}: choose from {', '.join(BENCHMARKS)}")
    if options.compare and not options.compare.is_dir():
        raise ValueError(f"--compare {options.compare}: there is no such directory")
    options.out.mkdir(parents=True, exist_ok=True)
    if options.compare and options.compare.resolve() == options.out.resolve():
        raise ValueError(f"--compare and --out are both {options.out}: the earlier files would be lost")
    bad = []
    for name in options.only or BENCHMARKS:
        found = run(name, options)
        if found.state in ("failed", "worse"):
            bad.append(f"{name} {found.state}")
        color = {"ok": "green", "left out": "dim"}.get(found.state, "red")
        before = earlier(name, options)
        against = "nothing earlier" if options.compare and not before else f"over {before}" if before else ""
        rest = [f"{found.seconds:5.0f} s", f"{found.rows:3d} rows", against]
        text = found.said if found.state in ("failed", "left out") else "  ".join(rest)
        console.print(f"{name:15s} [{color}]{found.state:9s}[/] {escape(text)}")
        if found.state == "worse":
            console.print(found.said, markup=False)
    if bad:
        console.print(f"[red]to look at: {', '.join(bad)}; worse is by more than {100 * TOLERANCE:g} %")
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    run_program(main)
