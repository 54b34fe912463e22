"""Where a step waits for the device, the watchdog knows that it waits for the other ranks."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from aeris.aurora import finetune
from aeris.parallelize import take_seat
from aeris.reading import ImageOrder, read_samples
from aeris.restore import channel_counts, open_store
from aeris.step import Training, train_step
from swipe.mesh import ParallelDims
from swipe.whereabouts import whereabouts
from tests.aurora import tiny_runs
from tests.harness import run_distributed
from tests.test_train import small


def where_numbers_are_read(go: Callable[[], Any]) -> set[tuple[str, bool]]:
    """Run, and return what this thread is said to be in as tensors become lists, and if it waits."""
    found = set()
    original = torch.Tensor.tolist

    def spy(x: torch.Tensor) -> Any:
        doing, _, waits = whereabouts(threading.get_ident(), 0.0, False)
        found.add((doing.split(", at")[0], waits))
        return original(x)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "tolist", spy)
        go()
    return {(doing, waits) for doing, waits in found if doing.startswith("sum of")}


def one_step(directory: str) -> list[Any]:
    config = small(2, train={"batch": 2, "microbatch": 1}, parallel={"dp": 2})
    store, rank = open_store(config), torch.distributed.get_rank()
    seat = take_seat(config, channel_counts(len(store.names)), ParallelDims(dp=2), rank, torch.device("cpu"))
    run = Training(config, Path(directory), store, seat)
    samples = iter(read_samples(config, store, seat, ImageOrder(0, 2, 1, 2, rank)))
    return sorted(where_numbers_are_read(lambda: train_step(run, samples)))


def test_a_step_waits_for_the_others_where_it_reads_their_sum(tmp_path: Path) -> None:
    assert run_distributed(one_step, 2, str(tmp_path)) == [[("sum of gradient norm and loss", True)]] * 2


def test_an_update_and_a_validation_do_too_but_alone_they_compute(
    weather: tuple[str, str], base: Path, tmp_path: Path
) -> None:
    run = finetune.prepare(tiny_runs.small("one-step", weather, 2, weights=str(base)), tmp_path, "cpu")
    found = where_numbers_are_read(lambda: finetune.train(run))
    assert found == {("sum of gradient norm and loss", False), ("sum of validation losses", False)}
