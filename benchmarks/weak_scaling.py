"""Weak scaling: images per second when the batch grows with the ranks.

    python -m benchmarks.weak_scaling --ranks 1,2,4 [--layout "pp 2 x sp 2"] [-- --model.width 64 ...]
    python -m benchmarks.weak_scaling --collect RUN_DIR RUN_DIR ... --csv FILE --plot FILE

The first trains on this machine, where ranks beyond the cores only share them; the second tabulates runs of
`aeris.train` that have been made elsewhere, one per number of nodes (pbs/weak_scaling.sh).
"""

from __future__ import annotations

import csv
import json
import os
import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from rich.table import Table

from aeris.log import console, run_program
from benchmarks.parallelism import read_layout
from benchmarks.starting import Launcher, counts, run, split, started
from swipe.mesh import AXES

Row = dict[str, Any]
"""A run: ranks, batch, steps, images_per_s (median), slowest, fastest, per_rank, efficiency, data_wait."""


@dataclass(frozen=True)
class Options:
    """Train on several numbers of ranks, the batch growing with them; or tabulate such runs."""

    ranks: str = "1,2,4"
    """Numbers of ranks, with commas between."""
    layout: str = ""
    """How the ranks of one replica are laid out, such as "pp 2 x sp 2"; without, a replica is one rank."""
    preset: str = "tiny"
    """Model to train."""
    batch: int = 8
    """Images per step of one replica."""
    steps: int = 20
    """Steps of a run; the first ones are not counted."""
    warm: int = 3
    """Records of a run's log that are not counted."""
    launcher: Launcher = "auto"
    """auto, mpiexec or torchrun."""
    collect: tuple[str, ...] = ()
    """Run directories to tabulate; nothing is trained. N:DIR gives the number of ranks of one that does not
    know it (no startup.json)."""
    csv: Path | None = None
    """Also write the rows to this file."""
    plot: Path | None = None
    """Also draw them (PNG; needs matplotlib)."""


def read_run(text: str, warm: int) -> tuple[Row, dict[str, Any]]:
    """Read a finished run.

    Args:
        text: its directory, or "N:DIR" with its number of ranks.
        warm: records at the beginning that are left out.

    Returns:
        its row, without efficiency, and its configuration.

    Raises:
        ValueError: it is no run, its number of ranks is not known, or it has too few records.
    """
    given, colon, name = text.partition(":")
    directory = Path(name) if colon and given.isdigit() else Path(text)
    try:
        config = json.loads((directory / "config.json").read_text())
        lines = (directory / "log.jsonl").read_text().splitlines()
        ranks = int(given) if colon and given.isdigit() else None
        ranks = ranks or json.loads((directory / "startup.json").read_text())["ranks"]
    except FileNotFoundError as error:
        missing = Path(error.filename).name
        how = f"; say how many ranks it had: N:{directory}" if missing == "startup.json" else ""
        raise ValueError(f"{directory} is no finished run of aeris.train: no {missing}{how}") from None
    rates = [record for record in map(json.loads, lines) if "images_per_s" in record]
    if len(rates) <= warm:
        raise ValueError(
            f"{directory} has {len(rates)} records, and --warm {warm} are not counted: train longer"
        )
    speeds = [record["images_per_s"] for record in rates[warm:]]
    row = {
        "ranks": ranks,
        "batch": config["train"]["batch"],
        "records": len(speeds),
        "images_per_s": statistics.median(speeds),
        "slowest": min(speeds),
        "fastest": max(speeds),
        "data_wait": statistics.median(record["data_wait"] for record in rates[warm:]),
    }
    return row, config


def collect(texts: tuple[str, ...], warm: int) -> list[Row]:
    """Read runs and compare them with the one of fewest ranks.

    Raises:
        ValueError: one cannot be read, or they differ in more than ranks and batch.
    """
    found = sorted((read_run(text, warm) for text in texts), key=lambda pair: pair[0]["ranks"])
    (first, config), rows = found[0], []
    for row, other in found:
        if (other["model"], other["train"]["microbatch"]) != (config["model"], config["train"]["microbatch"]):
            raise ValueError(f"the runs of {first['ranks']} and {row['ranks']} ranks train different models")
        if row["batch"] * first["ranks"] != first["batch"] * row["ranks"]:
            raise ValueError(
                f"no weak scaling: batch {first['batch']} on {first['ranks']} ranks and {row['batch']} on "
                f"{row['ranks']}: {first['batch'] * row['ranks'] / first['ranks']:g} would be as much each"
            )
        row["per_rank"] = row["images_per_s"] / row["ranks"]
        row["efficiency"] = row["per_rank"] * first["ranks"] / first["images_per_s"]
        rows.append(row)
    return rows


def train(options: Options, further: list[str], directory: Path) -> list[str]:
    """Train on every number of ranks, one after the other; return the runs for `collect`.

    Raises:
        ValueError: the ranks are no multiple of the layout's, or a run failed.
    """
    own = ("--run-dir", "--train.batch", "--train.images", "--train.log-every", "--checkpoint.every-images")
    if taken := [word for word in further if word.startswith(own)]:
        raise ValueError(f"{taken[0]} is chosen by the benchmark: use --batch and --steps")
    if options.steps <= options.warm:
        raise ValueError(
            f"--steps {options.steps}, of which --warm {options.warm} are not counted: take more"
        )
    numbers, dims = counts(options.ranks), read_layout(options.layout or "dp 1")
    if dims.dp != 1:
        raise ValueError(f"--layout {options.layout}: leave dp out, it grows with the ranks")
    if other := [ranks for ranks in numbers if ranks % dims.world]:
        raise ValueError(
            f"--ranks {other[0]} is no multiple of the {dims.world} of --layout {options.layout}"
        )
    threads = max(1, (os.cpu_count() or 1) // numbers[-1])
    for ranks in numbers:
        dp = ranks // dims.world
        batch = options.batch * dp
        settings = {"run-dir": directory / f"ranks_{ranks}", "train.batch": batch, "train.log-every": 1}
        settings |= {"train.images": batch * options.steps, "checkpoint.every-images": batch * options.steps}
        settings |= {f"parallel.{axis.replace('_', '-')}": getattr(dims, axis) for axis in AXES}
        settings |= {"parallel.dp": dp}
        words = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
        spent = run(
            [*started(ranks, options.launcher), "aeris.train", options.preset, *words, *further], threads
        )
        console.print(f"ranks {ranks}, batch {batch}: {options.steps} steps, in all {spent.wall_s:.1f} s")
    return [f"{ranks}:{directory / f'ranks_{ranks}'}" for ranks in numbers]


def table(rows: list[Row]) -> Table:
    """Put the rows under each other."""
    heads = ("ranks", "batch", "images/s", "slowest", "fastest", "per rank", "efficiency", "data wait")
    found = Table(box=None)
    for head in heads:
        found.add_column(head, justify="right")
    for row in rows:
        rates = [f"{row[name]:.4g}" for name in ("images_per_s", "slowest", "fastest", "per_rank")]
        shares = [f"{row[name]:.1%}" for name in ("efficiency", "data_wait")]
        found.add_row(f"{row['ranks']:,}", f"{row['batch']:,}", *rates, *shares)
    return found


def draw(rows: list[Row], path: Path) -> None:
    """Draw images per second, the ideal through the first run, and the efficiency; needs matplotlib."""
    from matplotlib.figure import Figure

    ranks = [row["ranks"] for row in rows]
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    speed, share = figure.subplots(1, 2)
    middle = [row["images_per_s"] for row in rows]
    spread = [[abs(row[end] - row["images_per_s"]) for row in rows] for end in ("slowest", "fastest")]
    speed.errorbar(ranks, middle, yerr=spread, marker="o", capsize=2, label="measured, slowest to fastest")
    ideal = [rows[0]["per_rank"] * number for number in ranks]
    speed.plot(ranks, ideal, "k--", linewidth=1, label="as much per rank as in the first run")
    wide = ranks[-1] / ranks[0] > 10  # else a logarithmic axis has hardly a number on it
    speed.set(yscale="log" if wide else "linear", xlabel="ranks", ylabel="images/s")
    if not wide:
        speed.set_ylim(0, None)
    speed.legend(fontsize=8, frameon=False)
    shares = [100 * row["efficiency"] for row in rows]
    share.plot(ranks, shares, marker="o")
    share.axhline(100, color="black", linestyle="--", linewidth=1)
    share.set(ylim=(0, 1.1 * max(100, *shares)), xlabel="ranks", ylabel="efficiency, % of the first run's")
    for axes in (speed, share):
        axes.set_xscale("log")
        axes.set_xticks(ranks, [f"{number:,}" for number in ranks])
        axes.minorticks_off()
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Run the benchmark."""
    own, further = split(sys.argv[1:])
    options = tyro.cli(Options, args=own, description=Options.__doc__)
    if options.collect:
        rows = collect(options.collect, options.warm)
    else:
        with tempfile.TemporaryDirectory(prefix="weak-scaling-") as directory:
            rows = collect(tuple(train(options, further, Path(directory))), options.warm)
    console.print(table(rows))
    if options.csv:
        with options.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    if options.plot:
        draw(rows, options.plot)


if __name__ == "__main__":
    run_program(main)
