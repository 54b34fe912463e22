"""What tests on many ranks stand on: results, failures and hangs are reported by rank, and quickly."""

from __future__ import annotations

import os
import time

import pytest
import torch
import torch.distributed as dist

from tests.harness import run_distributed


def gather(offset: float) -> tuple[int, torch.Tensor]:
    """Add up rank + offset over the world; a view and a random number travel back too."""
    x = torch.full((4,), dist.get_rank() + offset)
    dist.all_reduce(x)
    return dist.get_rank(), torch.cat((x[:1], torch.rand(1)))


@pytest.mark.parametrize("world", [1, 3])
def test_results_come_back_by_rank(world: int) -> None:
    """Each rank's own result, in order; all ranks draw the same random numbers."""
    results = run_distributed(gather, world, 0.5)
    assert [rank for rank, _ in results] == list(range(world))
    assert all(torch.equal(x, results[0][1]) for _, x in results)
    assert float(results[0][1][0]) == sum(range(world)) + world * 0.5


def one_raises(kind: str) -> None:
    """Fail on rank 1 while the others wait for it."""
    if dist.get_rank() == 1:
        if kind == "raises":
            raise ArithmeticError("seven is not even")
        print("the last words", flush=True)
        os._exit(7)
    dist.barrier()


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        (
            "raises",
            r"rank 1 of 3 raised\nTraceback(.|\n)*one_raises(.|\n)*ArithmeticError: seven is not even",
        ),
        ("dies", r"rank 1 died with 7 (.|\n)*the last words"),
    ],
)
def test_a_failure_names_the_rank_that_began_it(kind: str, says: str) -> None:
    """The traceback of the first rank that failed, at once, although the others wait for it."""
    start = time.monotonic()
    with pytest.raises(AssertionError, match=says):
        run_distributed(one_raises, 3, kind)
    assert time.monotonic() - start < 10


def hang() -> None:
    """Wait on ranks 0 and 2 for a message that rank 1 never sends."""
    if dist.get_rank() != 1:
        dist.recv(torch.zeros(1), src=1)


def test_a_hang_ends_and_names_the_ranks() -> None:
    """Past the time limit the ranks that wait are named with the place where they wait."""
    with pytest.raises(AssertionError, match=r"ranks \[0, 2\] of 3 did not finish in 4 s(.|\n)*in hang"):
        run_distributed(hang, 3, timeout_s=4)


def test_only_functions_of_modules() -> None:
    """A function the ranks cannot find is refused here."""
    with pytest.raises(TypeError, match="not at the top of a module"):
        run_distributed(lambda: None, 1)


def test_sixteen_ranks_start_in_seconds() -> None:
    """Sixteen ranks start, add up and end in far less than the seconds that new processes would take."""
    run_distributed(gather, 1, 0.0)  # the server is up
    start = time.monotonic()
    run_distributed(gather, 16, 0.0)
    assert time.monotonic() - start < 8
