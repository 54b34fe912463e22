"""Training of Aurora on two ranks: the gradients, weights, scores and buffers of one rank, in every setup."""

from __future__ import annotations

import dataclasses
import os
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from aeris import run as run_module
from aeris.aurora import finetune
from aeris.aurora.training.config import FineTuneConfig
from aeris.aurora.training.run import FineTuning
from aeris.aurora.training.step import train_step
from swipe.sharding import full
from tests.aurora.tiny_runs import records, small
from tests.harness import run_distributed

PRESETS = ("two-step", "lora-three-step", "lora-replay")
SETUPS = (*PRESETS, "two-step on copies")
"""The last: every rank holds all weights, instead of half of them."""


def prepare(config: FineTuneConfig, run_dir: Path) -> FineTuning:
    """Prepare a run as the program does, on one of the ranks of `run_distributed` or alone."""
    if dist.is_initialized():
        os.environ |= {"RANK": str(dist.get_rank()), "WORLD_SIZE": str(dist.get_world_size())}
        run_module.start = lambda device, timeout_s: None  # type: ignore[assignment]
    return finetune.prepare(config, run_dir, "cpu")


def settings(preset: str, data: tuple[str, str], weights: Path, images: int) -> FineTuneConfig:
    """Four images per update in float64, one by one, with dropped paths: two microbatches on each rank."""
    return small(
        preset,
        data,
        images,
        weights=str(weights),
        aurora={"drop_path": 0.3},
        train={"batch": 4, "precision": "fp64", "images": images, "clip": 0.05},
        validate={"every_images": 4, "samples": 1},
        checkpoint={"every_images": 4},
    )


def gradients(presets: tuple[str, ...], data: tuple[str, str], weights: Path, out: Path) -> dict[str, Any]:
    """Take one update in each setup; return its record, and every gradient whole."""
    found = {}
    for preset in presets:
        config = settings(preset.removesuffix(" on copies"), data, weights, 4)
        if "copies" in preset:
            config = dataclasses.replace(config, parallel=dataclasses.replace(config.parallel, shard=1))
        run = prepare(config, out / preset)
        items = run.replay.read(1, False) if run.replay else None
        if items is None:
            images = finetune.ImageOrder(0, 4, 1, run.seat.world, run.seat.rank)
            items = finetune.read_samples(run.config, run.data, images, False)
        record = train_step(run, items)
        named = run.model.named_parameters()
        found[preset] = record, {n: None if p.grad is None else full(p.grad).clone() for n, p in named}
    return found


def finish(
    presets: tuple[str, ...], data: tuple[str, str], weights: Path, out: Path, images: int
) -> dict[str, Any]:
    """Train to the end; return the state, whole."""
    found = {}
    for preset in presets:
        run = prepare(settings(preset, data, weights, images), out / preset)
        finetune.train(run)
        run.export(out / f"{preset}.pt")
        found[preset] = {name: full(x).clone() for name, x in run.tensors().items()}
    return found


@cache
def alone_and_together(
    data: tuple[str, str], weights: Path, out: Path
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Do one update alone and on two ranks."""
    one = gradients(PRESETS, data, weights, out / "one")
    two = run_distributed(gradients, 2, SETUPS, data, weights, out / "two", timeout_s=120)[0]
    return one, two


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory for the runs."""
    return tmp_path_factory.mktemp("runs")


@pytest.mark.parametrize("setup", SETUPS)
def test_gradients_of_two_ranks_are_those_of_one(
    setup: str,
    weather: tuple[str, str],
    base: Path,
    out: Path,
) -> None:
    """Also of weights outside of the divided parts, with a model applied twice before the backward pass."""
    preset = setup.removesuffix(" on copies")
    alone, together = alone_and_together(weather, base, out)
    (record, one), (other, two) = alone[preset], together[setup]
    assert one.keys() == two.keys() and "backbone.time_mlp.0.weight" in one
    for name, value in record.items():
        assert other[name] == pytest.approx(value, rel=1e-11), name
    for name, gradient in one.items():
        assert (gradient is None) == (two[name] is None) == ("lora" in preset and ".lora_" not in name), name
        if gradient is not None:
            assert bool(gradient.any()) or ".lora_A" in name, name  # B is zero at first
            torch.testing.assert_close(two[name], gradient, rtol=1e-9, atol=1e-15, msg=name)


def test_two_ranks_are_one_and_either_goes_on_for_the_other(
    weather: tuple[str, str],
    base: Path,
    tmp_path: Path,
) -> None:
    """Weights, optimizer, scores, buffers and logs; what one rank saved two resume, and vice versa."""
    presets, whole, other = ("two-step", "lora-replay"), tmp_path / "whole", tmp_path / "other"
    eight = finish(presets, weather, base, whole, 8)
    shutil.copytree(whole, other)
    for preset in presets:  # where one rank had seen 4 images
        shutil.rmtree(other / preset / "checkpoints" / "images_000000000008")
    both = run_distributed(finish, 2, presets, weather, base, other, 8, timeout_s=120)
    check_equal({preset: both[0][preset] | both[1][preset] for preset in presets}, eight)
    twelve = finish(presets[1:], weather, base, whole, 12)
    check_equal(finish(presets[1:], weather, base, other, 12), twelve)
    for preset, validations in zip(presets, (3, 4)):
        logs = [records(where / preset) for where in (whole, other)]
        assert len(logs[0]) == len(logs[1]) == 2 * validations - 1
        for here, there in zip(*logs):
            assert flat(there) == pytest.approx(flat(here), rel=1e-7)
    places = {name.split(".")[1] for name in twelve["lora-replay"] if name.startswith("replay.")}
    assert places == {"0", "1", "2", "3"}
    states = [torch.load(where / "two-step.pt", weights_only=True) for where in (whole, other)]
    check_equal({"exported": states[1]}, {"exported": states[0]})


def check_equal(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Compare the tensors of runs, to rounding."""
    for preset, tensors in expected.items():
        assert found[preset].keys() == tensors.keys()
        for name, value in tensors.items():
            torch.testing.assert_close(found[preset][name], value, rtol=1e-7, atol=1e-12, msg=name)


def flat(record: dict) -> dict[str, float]:
    """Name the numbers in nested records."""
    found: dict[str, float] = {}
    for name, value in record.items():
        parts = (
            value if isinstance(value, dict) else dict(enumerate(value)) if isinstance(value, list) else None
        )
        found |= {name: value} if parts is None else {f"{name}.{k}": v for k, v in flat(parts).items()}
    return found


def test_what_does_not_divide_is_refused_before_ranks_meet(
    weather: tuple[str, str],
    base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A batch for fewer ranks; nobody else is there."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "3", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="--train.batch 4 is no multiple of 3 ranks"):
        finetune.prepare(settings("one-step", weather, base, 4), tmp_path / "run", "cpu")
    assert not (tmp_path / "run").exists()


def differently(data: tuple[str, str], weights: Path, out: Path) -> str:
    """Start ranks with different settings."""
    config = settings("one-step", data, weights, 4)
    changed = dataclasses.replace(config.train, seed=dist.get_rank())
    try:
        prepare(dataclasses.replace(config, train=changed), out)
    except ValueError as error:
        return str(error)
    return ""


def test_ranks_with_other_settings_are_noticed(
    weather: tuple[str, str],
    base: Path,
    tmp_path: Path,
) -> None:
    """Every rank says which rank and which setting."""
    said = run_distributed(differently, 2, weather, base, tmp_path / "run")
    assert said == ["rank 1 was started with --train.seed 1, rank 0 with 0"] * 2
