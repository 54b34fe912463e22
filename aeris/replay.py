"""Look into a skipped step of aeris.train: `python -m aeris.replay RUN_DIR`.

Takes the step again in one process, image by image, from the weights kept in RUN_DIR/faults. Says of each
image its loss and the norm of its gradient, where the network first gives a value that is not finite, and
which channels of the sample stand out. It needs 12 bytes per parameter and the activations of one image;
with --data-only neither.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from rich.markup import escape
from rich.table import Table

from aeris.data.loader import SampleDataset
from aeris.dumps import in_words
from aeris.log import console, progress_bar, run_program, speaker
from aeris.outliers import outliers
from aeris.retake import Retake, find_fault, samples_of
from launch.rank import discover
from swipe.backend import choose_device

SHOWN = 20
"""Images in the table; the JSON has all."""
COMPARED = 16
"""Images before the step whose values say what is usual."""


@dataclass(frozen=True)
class Arguments:
    """Take a skipped step of aeris.train again and see what was wrong with it."""

    run_dir: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN_DIR")]
    """Directory of the run."""
    fault: str = ""
    """Which step of RUN_DIR/faults, such as images_000000001200; empty takes the newest."""
    images: tuple[int, ...] = ()
    """Only these images of the step; none takes all."""
    data_only: bool = False
    """Look at the samples alone, without the network."""
    store: str = ""
    """Where the data are now; empty takes where the run read them."""
    device: str = "auto"
    """Where to compute: auto, cpu, cuda or xpu."""
    json: bool = False
    """Print one JSON object in place of tables."""


def replay(arguments: Arguments) -> dict[str, Any]:
    """Take the step again and return all that is known of it, as plain values.

    Raises:
        ValueError: no such step or image, other data, or damaged weights.
    """
    fault = find_fault(arguments.run_dir, arguments.fault, arguments.store)
    if wrong := [image for image in arguments.images if image not in fault.images]:
        raise ValueError(
            f"image {wrong[0]} is not of this step, which has {fault.images.start} to {fault.images.stop - 1}"
        )
    images = sorted(set(arguments.images)) or list(fault.images)
    samples = samples_of(fault)
    first = fault.images.start
    others = range(max(0, first - COMPARED), first) or range(fault.images.stop, fault.images.stop + COMPARED)
    judged = outliers(samples, fault.config.data.interval_h, images, others)
    rows: list[dict[str, Any]] = [
        {
            "image": image,
            "time": time_of(samples, image),
            "outliers": [{**asdict(one), "text": str(one)} for one in judged[image]],
        }
        for image in images
    ]
    found: dict[str, Any] = {
        "fault": fault.path.name,
        "why": fault.record["skip"],
        "images": [fault.images.start, fault.images.stop],
        "recorded": fault.record,
        "layout": fault.meta["layout"],
    }
    if not arguments.data_only:
        found |= take(Retake(fault, samples, choose_device(arguments.device)), rows, arguments.json)
    return found | {"per_image": rows}


def take(run: Retake, rows: list[dict[str, Any]], quiet: bool) -> dict[str, Any]:
    """Put the images of `rows` through the network, add what comes out to them, and return it for all."""
    progress = progress_bar("now")
    progress.disable |= quiet
    with progress:
        task = progress.add_task("image", total=len(rows), now="")
        for row, taken in zip(rows, run.images([row["image"] for row in rows])):
            row |= asdict(taken)
            progress.update(task, advance=1, now=str(row["image"]))
    loss = sum(row["loss"] for row in rows) / len(rows)
    return {"loss": loss, "grad_norm": run.grad_norm(), "bad_weight": run.bad_weight}


def time_of(samples: SampleDataset, image: int) -> str:
    """Return the time of an image's state, to the minute."""
    return str(np.datetime_as_string(samples.store.times[samples.pair(image)[0]], unit="m"))


def show(found: dict[str, Any]) -> None:
    """Print what was found; images with something to see first, then those with the largest gradients."""
    rows, recorded = found["per_image"], found["recorded"]
    count, network = found["images"][1] - found["images"][0], "loss" in found
    console.print(
        f"{found['fault']}: {found['why']} step of {count:,} images on {found['layout']}: loss "
        f"{recorded['loss']:.6g}, gradient norm {recorded['grad_norm']:.6g}"
    )
    if network and len(rows) == count:
        console.print(f"taken again: loss {found['loss']:.6g}, gradient norm {found['grad_norm']:.6g}")
    table = Table(box=None)
    for name in ("image", "time", *(("sigma", "loss", "gradient") if network else ())):
        table.add_column(name, justify="right")
    table.add_column("stands out" if not network else "not finite, or stands out", overflow="fold")
    rows = sorted(rows, key=_order)
    for row in rows[:SHOWN]:
        numbers = [f"{row[key]:.4g}" for key in ("sigma", "loss", "grad_norm")] if network else []
        names = list(dict.fromkeys(one["channel"] for one in row["outliers"]))
        seen = ", ".join([*([row["bad"]] if row.get("bad") else []), *names[:6]])
        table.add_row(str(row["image"]), row["time"], *numbers, escape(seen))
    console.print(table)
    if len(rows) > SHOWN:
        console.print(f"{SHOWN} of {len(rows):,} images; --json prints all")
    for line in verdict(found, rows):
        console.print(line, markup=False)


def _order(row: dict[str, Any]) -> tuple[bool, float]:
    gradient = row.get("grad_norm", 0.0)
    nothing = not (row["outliers"] or row.get("bad"))
    return nothing, -gradient if math.isfinite(gradient) else -math.inf


def verdict(found: dict[str, Any], rows: list[dict[str, Any]], most: int = 5) -> list[str]:
    """Say in sentences what is wrong with a step, as far as that can be seen.

    Args:
        rows: of the images, those with something to see first.
        most: images to be named.
    """
    if found.get("bad_weight"):
        return [f"{found['bad_weight']} is not finite: something broke before this step, not in it"]
    if differs(found):
        return [
            f"the run had loss {found['recorded']['loss']:.6g}, here the same step has {found['loss']:.6g}: "
            "data and weights are sound, so look for a device, memory or network that computes wrongly"
        ]
    lines = []
    for row in rows:
        name = f"image {row['image']} ({row['time']})"
        if row["outliers"]:
            lines.append(f"{name}: {row['outliers'][0]['text']}")
        elif row.get("bad"):
            lines.append(f"{name}: first not finite is {row['bad']}; its sample is like others")
    if not lines:
        return ["nothing is out of range: all values are finite and the samples are like others"]
    return lines[:most] + ([f"and {len(lines) - most} more images"] if len(lines) > most else [])


def differs(found: dict[str, Any], share: float = 0.1) -> bool:
    """Whether the whole step was taken again and is sound here, with another loss than in the run.

    Args:
        share: of the loss, that other sums and types of numbers may make.
    """
    count = found["images"][1] - found["images"][0]
    if "loss" not in found or len(found["per_image"]) != count or not math.isfinite(found["loss"]):
        return False
    if any(row["bad"] or row["outliers"] for row in found["per_image"]):
        return False
    recorded = found["recorded"]
    if not (math.isfinite(recorded["loss"]) and math.isfinite(recorded["grad_norm"])):
        return True
    return abs(recorded["loss"] - found["loss"]) > share * abs(found["loss"])


def main() -> None:
    """Run the program."""
    ranks = discover(os.environ)
    speaker.work_alone("aeris.replay", ranks.rank, ranks.world)
    arguments = tyro.cli(Arguments, prog="python -m aeris.replay", description=Arguments.__doc__)
    found = replay(arguments)
    if arguments.json:
        print(json.dumps(in_words(found), allow_nan=False))
    else:
        show(found)


if __name__ == "__main__":
    run_program(main)
