"""What a pipeline does when its stages do not fit each other, or the data of one rank ends."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist

from swipe.groups import make_groups
from swipe.layout import WindowLayout
from swipe.mesh import ParallelDims
from swipe.pipeline import Microbatch
from swipe.windows import WindowGrid
from tests.harness import run_distributed
from tests.swipe.meshes import GRID, WIDTH, Stage, draw, linked

kept: list[Any] = []
"""What a rank holds until its process ends, as a program that ends with an error does.

gloo may wait for the other rank where it lets go of a group whose messages are on their way.
"""


def misfit(kind: str) -> tuple[str, str]:
    """Run two stages that do not fit; return the error of this rank, as type and text."""
    groups = make_groups(ParallelDims(pp=2), dist.get_rank(), torch.device("cpu"))
    late = groups.rank == 1
    other = {"windows": WindowGrid(8, 16, 4), "window": WindowGrid(8, 8, 2)}
    grid = other.get(kind, GRID) if late else GRID
    layout = WindowLayout.of(grid, groups)
    model = Stage(groups.rank, 2, WIDTH + (late and kind == "width"))
    if late and kind == "type":
        model.float()
    pipeline = linked(model, grid, groups, (1,), schedule="gpipe")

    def read(samples: int = 1) -> Iterator[Microbatch]:
        for m in range(2 if kind == "early end" else 4):
            if kind == "loader" and late and m == 2:
                raise KeyError("the data")
            x, y, condition = draw(m, 2 if m == 3 and kind == "sizes" else samples, grid)
            condition = condition[:1] if kind == "hidden" else condition
            yield Microbatch(layout.to_windows(x), (condition,), layout.to_windows(y))

    try:
        pipeline.step(read(), 4)
        pipeline.step(read(3), 4)
    except Exception as error:
        kept.extend((groups, pipeline))
        dist.destroy_process_group()  # as a program does that ends
        return type(error).__name__, str(error)
    return "", ""


CLOSED = ("CommunicationError", r"waited in the pipeline messages of stage \d .* a rank died or is stuck")
ENDED = ("ValueError", "a step of 4 microbatches got only 2")
EITHER = ("ValueError|CommunicationError", "got only 2|a rank died")


@pytest.mark.parametrize(
    ("kind", "errors"),
    [
        (
            "windows",
            (CLOSED, ("CommunicationError", r"\[0\] announce .*1, 4, 16, 5.*holds \(8, 16\) windows")),
        ),
        (
            "window",
            (CLOSED, ("CommunicationError", r"\[0\] announce .*1, 4, 16, 5.*holds \(16, 4\) windows")),
        ),
        ("width", (CLOSED, ("CommunicationError|RuntimeError", "5.*6"))),
        ("type", (CLOSED, ("CommunicationError|RuntimeError", "type.*[dD]ouble.*[fF]loat"))),
        ("hidden", (("ValueError", r"stage 0 made \(\(3, 4.*after \(\(1, 4"), CLOSED)),
        ("sizes", (("ValueError|CommunicationError|RuntimeError", "2, 4, 16, 5.*1, 4, 16, 5"), CLOSED)),
        ("early end", (ENDED, EITHER)),
        ("loader", (CLOSED, ("KeyError", "the data"))),
    ],
)
def test_stages_that_do_not_fit_end_with_an_error(kind: str, errors: Sequence[tuple[str, str]]) -> None:
    """Other windows, width or type on the second stage, batches that change unannounced, data that ends.

    Nothing is taken for what it is not, and whoever waits for the rank that found out is told so: at once, or
    when its patience ends, as gloo loses a send that begins just as the other end closes.
    """
    ends = run_distributed(misfit, 2, kind, timeout_s=30, patience_s=8)
    for (found, text), (expected, says) in zip(ends, errors):
        assert re.fullmatch(expected, found) and re.search(says, text), f"{found}: {text}"
