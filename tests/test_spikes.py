"""Skipped steps: what is a spike, that all ranks agree, that it survives a restart, what is kept of it."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from aeris import dumps, spikes, train
from aeris.config import FaultConfig, RunConfig, TrainFaults
from aeris.dumps import directory, dump_step
from aeris.parallelize import choose_degrees, take_seat
from aeris.reading import ImageOrder, read_samples
from aeris.restore import channel_counts, open_store
from aeris.retake import Retake, find_fault, samples_of
from aeris.spikes import FIRST, HALFLIFE, WINDOW, Spikes
from aeris.step import Training, train_step
from swipe import checkpoint
from swipe.collectives import AgreedError
from swipe.sharding import local
from tests.harness import run_distributed
from tests.test_train import CPU, go, records, small

NAN = float("nan")


def decider(limit: int = 20, spike: float = 6.0, batch: int = 2) -> Spikes:
    """Return one without a history."""
    return Spikes(FaultConfig(spike=spike, limit=limit), batch)


def losses(count: int, seed: int = 0) -> list[float]:
    """Return losses that fall and scatter by a tenth."""
    rng = np.random.default_rng(seed)
    return [float(np.exp(-n / 2000 + 0.1 * rng.standard_normal())) for n in range(count)]


def test_a_spike_is_told_and_nothing_else() -> None:
    """A loss of twice its neighbours is one; scatter, a fall and a rise within it are not."""
    found = decider()
    assert [found.decide(loss, 1.0) for loss in losses(1000)] == [""] * 1000
    before = found.state()["log_loss"]
    level = losses(1001)[-1]
    assert found.decide(2.5 * level, 1.0) == "spike" and found.decide(1e-6 * level, 1.0) == ""
    assert found.taken == 1001 and found.steps == 1002
    again = decider()
    for loss in losses(1000):
        again.decide(loss, 1.0)
    again.decide(2.5 * level, 1.0)
    assert again.state()["log_loss"] == before, "a spike teaches nothing"


def test_without_a_history_or_a_setting_only_non_finite_steps_are_skipped() -> None:
    """The first hundred steps, and --faults.spike 0."""
    new, never = decider(), decider(spike=0.0)
    for loss in losses(FIRST - 1):
        assert new.decide(loss, 1.0) == never.decide(loss, 1.0) == ""
    assert new.decide(1e3, 1.0) == "" and never.decide(1e9, 1.0) == ""
    for pair in ((NAN, 1.0), (math.inf, 1.0), (1.0, NAN), (1.0, math.inf)):
        assert new.decide(*pair) == never.decide(*pair) == "non-finite"
    assert never.in_a_row == 4 and never.decide(1.0, 1.0) == "" and never.in_a_row == 0
    same = decider()
    assert [same.decide(1.0, 1.0) for _ in range(200)] == [""] * 200
    assert same.decide(1.05, 1.0) == "" and same.decide(1.07, 1.0) == "spike", "6 times a percent"
    assert same.decide(0.0, 1.0) == "", "a loss of 0 has no logarithm and is no spike"


def test_what_breaks_early_does_not_hide_what_follows() -> None:
    """Three losses a million times too large before the first spike can be told, and one after."""
    found, values = decider(), losses(FIRST + 10)
    for number, loss in enumerate(values):
        assert found.decide(1e6 if number in (30, 50, 90) else loss, 1.0) == ""
    assert found.decide(5.0 * values[-1], 1.0) == "spike"


def test_mean_and_deviation_are_those_of_their_definition() -> None:
    """Against weights of 0.5 ** (age / half-life), summed at once."""
    found, values = decider(), losses(700)
    for loss in values:
        found.decide(loss, 1.0)
    weight = 0.5 ** (np.arange(len(values))[::-1] / HALFLIFE)
    mean = np.average(np.log(values), weights=weight)
    std = math.sqrt(np.average((np.log(values) - mean) ** 2, weights=weight))
    assert found.height(2.0) == pytest.approx((math.log(2.0) - mean) / std, rel=1e-9)


def test_a_state_goes_through_json_and_changes_nothing() -> None:
    """The same bits after a restart anywhere; the losses of another batch are forgotten, not the skips."""
    values = [*losses(150), NAN, *losses(50, 1), 9.0, *losses(100, 2)]
    whole = decider()
    for number, loss in enumerate(values):
        whole.decide(loss, 1.0)
        if number in (20, 150, 201):
            resumed = decider()
            resumed.load_state(json.loads(json.dumps(whole.state())))
            whole = resumed
    straight = decider()
    for loss in values:
        straight.decide(loss, 1.0)
    assert whole.state() == straight.state() and whole.state()["skipped"] == [151, 202]
    other = decider(batch=4)
    other.load_state(whole.state())
    assert (other.taken, other.steps) == (0, len(values)) and other.state()["skipped"] == [151, 202]
    fresh = decider()
    fresh.load_state(None)  # of a checkpoint of an older version
    assert fresh.state() == decider().state()


def test_too_many_skipped_steps_stop_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    """The limit counts the last thousand steps, of both kinds; it names the numbers and where to look."""
    found = decider(limit=3)
    skipped = {"images_seen": 10, "loss": NAN, "grad_norm": 1.0, "skip": "non-finite"}

    def skip() -> None:
        assert found.decide(NAN, 1.0) == "non-finite"
        found.report(skipped, "run/faults")

    skip()
    assert "image 10: non-finite step skipped (loss nan, gradient norm 1), 1 of" in capsys.readouterr().out
    for _ in range(WINDOW):
        found.decide(1.0, 1.0)
        found.report({"images_seen": 12, "loss": 1.0})
    assert not capsys.readouterr().out
    skip()
    skip()
    with pytest.raises(AgreedError, match=r"^3 of the last 1,000 steps .* --faults.limit is 3: .*run/faults"):
        skip()


def spiking(run: Training) -> None:
    """Multiply the loss of images 12 and 13 by 50."""
    inner = run.pipeline.step

    def step(*args: Any) -> torch.Tensor:
        return inner(*args) * (50.0 if run.images_seen == 12 else 1.0)

    run.pipeline.step = step  # type: ignore[method-assign]


def trained(config: RunConfig, run_dir: Path) -> Training:
    """Train with a spike at images 12 and 13."""
    run = train.prepare(config, run_dir, CPU)
    spiking(run)
    train.train(run)
    return run


def test_a_spike_is_skipped_kept_and_survives_a_restart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Weights as without the step; a run resumed before it takes the same decisions; the log names it."""
    monkeypatch.setattr(spikes, "FIRST", 3)
    config = small(20, faults={"spike": 12.0}, train={"log_every": 5}, optimizer={"rampdown_images": 0})
    whole = trained(config, tmp_path / "whole")
    said = capsys.readouterr().out
    assert "image 14: spike step skipped (loss" in said and "standard deviations up" in said
    assert f"python -m aeris.replay {tmp_path / 'whole'}" in said
    assert (whole.skipped, whole.skipped_in_a_row, whole.spikes.taken) == (1, 0, 9)
    (logged,) = (record for record in records(tmp_path / "whole") if "skip" in record)
    assert logged["images_seen"] == 14 and logged["skip"] == "spike", "logged between two records"
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    for path in checkpoint.complete(tmp_path / "resumed" / "checkpoints")[-1:]:
        shutil.rmtree(path)
    (left,) = checkpoint.complete(tmp_path / "resumed" / "checkpoints")
    assert left.name.endswith("016")
    meta = checkpoint.read_meta(left)
    assert meta["spikes"]["skipped"] == [7] and meta["spikes"]["taken"] == 7
    resumed = trained(config, tmp_path / "resumed")
    assert resumed.spikes.state() == whole.spikes.state()
    for name, value in whole.tensors().items():
        assert torch.equal(value, resumed.tensors()[name]), name
    (kept,) = checkpoint.complete(directory(tmp_path / "whole"))
    meta = checkpoint.read_meta(kept)
    assert kept.name == "images_000000000012" and meta["images"] == [12, 14]
    assert meta["record"]["skip"] == "spike" and meta["config"]["faults"]["spike"] == 12.0


def poisoned(run: Training, images: range) -> None:
    """Make the loss of the steps that begin at these images NaN."""
    inner = run.pipeline.step

    def step(*args: Any) -> torch.Tensor:
        return inner(*args) * (NAN if run.images_seen in images else 1.0)

    run.pipeline.step = step  # type: ignore[method-assign]


def test_the_first_of_a_row_is_kept_and_the_newest_rows_stay(tmp_path: Path) -> None:
    """Two steps in a row are one dump; the oldest goes, and those of steps that are taken again."""
    run = train.prepare(small(24, faults={"dumps": 2}), tmp_path, CPU)
    for first in (90, 92):
        (directory(tmp_path) / f"images_{first:012d}").mkdir(parents=True)
        (directory(tmp_path) / f"images_{first:012d}" / ".complete").touch()
    bad = {2, 4, 8, 14, 16, 18}
    inner = run.pipeline.step
    run.pipeline.step = lambda *args: inner(*args) * (NAN if run.images_seen in bad else 1.0)  # type: ignore[method-assign]
    train.train(run)
    assert run.skipped == 6
    assert [path.name[-2:] for path in checkpoint.complete(directory(tmp_path))] == ["08", "14"]
    assert checkpoint.read_meta(checkpoint.complete(directory(tmp_path))[0])["record"]["loss"] == "nan"


def test_a_full_disk_does_not_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No room for it and the next checkpoint, or a write that fails: said, and the run goes on."""
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(dumps.shutil, "disk_usage", lambda path: usage(free=1_000))
    run = train.prepare(small(8), tmp_path / "a", CPU)
    poisoned(run, range(2, 4))
    train.train(run)
    assert "images 2 to 3 is not kept for replay: 0.0 GB are free" in capsys.readouterr().out
    assert run.images_seen == 8 and not directory(tmp_path / "a").exists()
    monkeypatch.undo()
    run = train.prepare(small(8), tmp_path / "b", CPU)
    directory(tmp_path / "b").touch()  # a file where the directory should be
    poisoned(run, range(2, 4))
    train.train(run)
    assert "is not kept for replay: cannot save" in capsys.readouterr().out and run.images_seen == 8
    run = train.prepare(small(8, faults={"dumps": 0}), tmp_path / "c", CPU)
    poisoned(run, range(2, 4))
    train.train(run)
    assert run.skipped == 1 and not directory(tmp_path / "c").exists()


def test_the_limit_stops_training(tmp_path: Path) -> None:
    """Skipped steps that are not in a row end the run, which has kept them; a raised limit lets it go on."""
    config = small(24, faults={"limit": 3, "dumps": 5})
    run = train.prepare(config, tmp_path, CPU)
    bad = {2, 6, 10}
    inner = run.pipeline.step
    run.pipeline.step = lambda *args: inner(*args) * (NAN if run.images_seen in bad else 1.0)  # type: ignore[method-assign]
    with pytest.raises(AgreedError, match=f"3 of the last 6 steps .*{directory(tmp_path)} with python -m"):
        train.train(run)
    run.checkpoints.wait()
    assert [path.name[-2:] for path in checkpoint.complete(directory(tmp_path))] == ["02", "06", "10"]
    assert go(dataclasses.replace(config, faults=TrainFaults(limit=9)), tmp_path).images_seen == 24


def step_with_a_bad_rank(run_dir: Path, config: RunConfig) -> tuple[list[dict], list[str], bool]:
    """Take three steps, in the second of which one rank's gradient breaks; return records and changes."""
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    store, cpu = open_store(config), torch.device("cpu")
    counts, dims = channel_counts(len(store.names)), choose_degrees(config, world)
    seat = take_seat(config, counts, dims, rank, cpu)
    run = Training(config, run_dir, store, seat)
    order = ImageOrder(0, 3 * config.train.batch, config.train.microbatch, dims.dp, seat.at.dp)
    samples: Iterator[Any] = iter(read_samples(config, store, seat, order))
    found, changed = [], []
    inner = run.pipeline.step

    def step(*args: Any) -> torch.Tensor:
        losses = inner(*args)
        if rank == 1 and run.images_seen == config.train.batch:
            next(run.model.parameters()).grad.mul_(NAN)  # type: ignore[union-attr]
        return losses

    run.pipeline.step = step  # type: ignore[method-assign]
    kept = False
    for _ in range(3):
        before = {name: local(value).clone() for name, value in run.tensors().items()}
        found.append(train_step(run, samples))
        if "skip" in found[-1]:
            kept = dump_step(run, found[-1])
            changed = [n for n, value in run.tensors().items() if not torch.equal(local(value), before[n])]
    return found, changed, kept


@pytest.mark.parametrize("parallel", [{"dp": 2, "pp": 2}, {"wp_x": 2, "sp": 2}], ids=str)
def test_all_ranks_skip_what_breaks_on_one(parallel: dict, tmp_path: Path) -> None:
    """NaN in the gradient of one rank: no rank takes the step, all keep its weights together."""
    config = small(12, train={"batch": 2, "microbatch": 1}, parallel=parallel)
    results = run_distributed(step_with_a_bad_rank, 4, tmp_path, config)
    assert all(str(result) == str(results[0]) for result in results)  # NaN is not NaN
    found, changed, kept = results[0]
    assert [record.get("skip") for record in found] == [None, "non-finite", None] and kept and not changed
    train.configs.save(config, tmp_path / "config.json")
    fault = find_fault(tmp_path)
    again = Retake(fault, samples_of(fault), torch.device("cpu"))
    taken = list(again.images(fault.images))
    assert list(fault.images) == [2, 3] and fault.meta["layout"] != str(again.seat.dims)
    assert sum(one.loss for one in taken) / 2 == pytest.approx(found[1]["loss"], rel=1e-3)  # bf16 products
