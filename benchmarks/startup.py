"""What the start of a training run takes on more and more ranks of one machine, part by part.

    python -m benchmarks.startup --ranks 1,8,32 --csv FILE --plot FILE

Every run of `aeris.train` writes what its first rank spent until the end of the first step
(`startup.json`). Ranks that share cores wait for each other's CPU time, so the CPU time per rank, all of the
program in it, says what one rank costs: what grows there grows on a cluster as well.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from aeris.log import console, run_program
from benchmarks.records import Output, Row, deliver, hardware
from benchmarks.starting import Launcher, Spent, counts, run, split, started

FASTER = 1.25
"""A part grows faster than linearly if its growth exceeds that of the ranks by this factor."""


@dataclass(frozen=True)
class Options:
    """Start aeris.train for one step on several numbers of ranks; further flags of it behind `--`."""

    ranks: str = "1,8,32"
    """Numbers of ranks, with commas between."""
    rounds: int = 3
    """Starts of each, in turn with the others; the median counts."""
    launcher: Launcher = "auto"
    """auto, mpiexec or torchrun."""
    output: Annotated[Output, tyro.conf.arg(name="")] = field(default_factory=Output)
    """Where the medians go."""


@dataclass(frozen=True)
class Start:
    """One start: its ranks, the seconds of each part on the first rank, and what all of the program took."""

    ranks: int
    parts: dict[str, float]
    spent: Spent

    @property
    def numbers(self) -> dict[str, float]:
        """The parts, their sum, wall-clock time to the end of the program, and CPU time per rank, in s."""
        whole = {"first step done": sum(self.parts.values()), "program": self.spent.wall_s}
        return self.parts | whole | {"CPU per rank": self.spent.cpu_s / self.ranks}


def start(ranks: int, options: Options, further: list[str], directory: Path) -> Start:
    """Start the smallest run on so many ranks, each with one image, and read what its start took.

    Raises:
        ValueError: it failed.
    """
    run_dir = directory / f"ranks_{ranks}"
    settings = {"run-dir": run_dir, "train.batch": ranks, "train.images": ranks, "train.microbatch": 1}
    settings |= {"parallel.dp": ranks}
    words = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    small = ["--model.width", "32", "--model.heads", "2", "--model.hidden", "32", "--device", "cpu"]
    spent = run([*started(ranks, options.launcher), "aeris.train", "tiny", *small, *words, *further], 1)
    return Start(ranks, json.loads((run_dir / "startup.json").read_text())["parts"], spent)


def medians(starts: list[Start]) -> dict[int, dict[str, float]]:
    """Return the median of every number by ranks, in the order in which they came."""
    found: dict[int, dict[str, float]] = {}
    for ranks in dict.fromkeys(start.ranks for start in starts):
        here = [start.numbers for start in starts if start.ranks == ranks]
        found[ranks] = {name: statistics.median(one.get(name, 0.0) for one in here) for name in here[0]}
    return found


def faster_than_ranks(found: dict[int, dict[str, float]], least_s: float = 0.2) -> list[str]:
    """Name what grows faster than the number of ranks, among what takes `least_s` in the end."""
    if len(found) < 2:
        return []
    few, many = list(found)[-2:]
    before, after = found[few], found[many]
    return [
        f"{name} ({before.get(name, 0.0):.2f} s on {few}, {seconds:.2f} s on {many})"
        for name, seconds in after.items()
        if seconds >= least_s and seconds > FASTER * many / few * before.get(name, 0.0)
    ]


def rows(found: dict[int, dict[str, float]]) -> list[Row]:
    """Return a row of every number of ranks, with all parts in s, 0 where one was not met."""
    parts = list(dict.fromkeys(name for numbers in found.values() for name in numbers))
    return [
        {"ranks": ranks} | {part: numbers.get(part, 0.0) for part in parts}
        for ranks, numbers in found.items()
    ]


def draw(found: dict[int, dict[str, float]], path: Path, title: str) -> None:
    """Draw the parts stacked, and the CPU time per rank, against ranks; needs matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    stacked, own = figure.subplots(1, 2)
    names, places = [str(ranks) for ranks in found], range(len(found))
    sums = ("first step done", "program", "CPU per rank")
    bottom = [0.0] * len(found)
    for part in dict.fromkeys(name for numbers in found.values() for name in numbers if name not in sums):
        values = [numbers.get(part, 0.0) for numbers in found.values()]
        stacked.bar(places, values, bottom=bottom, label=part)
        bottom = [below + value for below, value in zip(bottom, values)]
    stacked.set(xlabel="ranks on one machine", ylabel="s until the first step is done")
    stacked.legend(fontsize=8, frameon=False)
    own.bar(places, [numbers["CPU per rank"] for numbers in found.values()], color="tab:gray")
    own.set(xlabel="ranks on one machine", ylabel="CPU time of the program per rank, s")
    for axes in (stacked, own):
        axes.set_xticks(places, names)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Run the benchmark."""
    own, further = split(sys.argv[1:])
    options = tyro.cli(Options, args=own, description=Options.__doc__)
    starts = []
    for number in range(options.rounds):
        for ranks in counts(options.ranks):
            with tempfile.TemporaryDirectory(prefix="startup-") as directory:
                starts.append(start(ranks, options, further, Path(directory)))
            done = starts[-1].numbers["first step done"]
            console.print(
                f"round {number + 1} of {options.rounds}, {ranks} ranks: first step after {done:.1f} s"
            )
    found = medians(starts)
    growing = faster_than_ranks(found)
    worse = deliver(
        rows(found),
        options.output,
        key=("ranks",),
        numbers={"program": "less", "CPU per rank": "less"},
        draw=lambda _, path, title: draw(found, path, title),
        about=f"s; {options.rounds} starts of each, {hardware()}",
    )
    console.print(f"grows faster than the ranks: {'; '.join(growing) or 'nothing'}")
    sys.exit(1 if worse else 0)


if __name__ == "__main__":
    run_program(main)
