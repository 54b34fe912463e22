"""A skipped step taken again: what was wrong with it is named, from the data or from the weights."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import h5py
import pytest
import torch
from torch import nn

from aeris import replay, train
from aeris.data.loader import SampleDataset
from aeris.data.store import Store, packaged_sample
from aeris.parallelize import make_layout
from aeris.replay import Arguments
from aeris.retake import FirstBad
from aeris.step import Training
from swipe import checkpoint
from tests.test_train import CPU, small

FP32 = {"precision": "fp32", "residual": "fp32"}


def bad_store(path: Path, image: int) -> tuple[Path, str]:
    """Copy the packaged store with one temperature of an image of the run at a million kelvin."""
    shutil.copytree(packaged_sample(), path)
    shard = make_layout(small().model).shard
    samples = SampleDataset(path, 6, shard, 0, Store(path).statistics.train_period)
    before, _ = samples.pair(image)
    with h5py.File(path / "2000.h5", "r+") as file:
        file["fields"][before, samples.store.names.index("t850"), 5, 7] = 1e6
    with h5py.File(path / "store.h5", "r+") as file:
        file["files/bytes"][0] = (path / "2000.h5").stat().st_size
    return path, str(samples.store.times[before])[:16]


def broken(run_dir: Path, break_: Any, **sections: dict) -> Training:
    """Train four steps of four images; `break_(run)` changes the run before the third."""
    sections = {"train": {"batch": 4, "microbatch": 2}, "model": FP32, **sections}
    run = train.prepare(small(16, **sections), run_dir, CPU)
    inner = run.pipeline.step

    def step(*args: Any) -> torch.Tensor:
        if run.images_seen == 8:
            break_(run)
        return inner(*args)

    run.pipeline.step = step  # type: ignore[method-assign]
    train.train(run)
    return run


def asked(run_dir: Path, **settings: Any) -> dict[str, Any]:
    """Replay on the CPU."""
    return replay.replay(Arguments(run_dir, device=CPU, **settings))


def test_a_bad_sample_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The loss overflows; replay names image, time, channel, place and value, with and without network."""
    store, time = bad_store(tmp_path / "store", image=6)
    data = {"store": str(store), "roll": False}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("aeris.spikes.FIRST", 1)
        run = broken(tmp_path / "run", lambda run: None, data=data, faults={"spike": 9.0})
    assert run.skipped == 1
    found = asked(tmp_path / "run")
    assert found["fault"] == "images_000000000004" and found["images"] == [4, 8]
    assert found["loss"] == pytest.approx(found["recorded"]["loss"], rel=1e-4)
    assert found["grad_norm"] == pytest.approx(found["recorded"]["grad_norm"], rel=1e-4)
    rows = {row["image"]: row for row in found["per_image"]}
    (worst, *_) = rows[6]["outliers"]
    assert (worst["channel"], worst["value"], worst["row"], worst["col"]) == ("t850", 1e6, 5, 7)
    assert worst["field"] == "state" and rows[6]["time"] == time
    assert not any(rows[image]["outliers"] for image in (4, 5, 7)) and rows[6]["loss"] > 1e3 * rows[4]["loss"]
    replay.show(found)
    said = capsys.readouterr().out
    assert f"image 6 ({time}): " in said and "t850 = 1e+06 K at row 5 col 7" in said
    only = asked(tmp_path / "run", data_only=True, images=(6, 7))
    assert [row["image"] for row in only["per_image"]] == [6, 7] and "loss" not in only
    assert [one["value"] for one in only["per_image"][0]["outliers"]] == [
        x["value"] for x in rows[6]["outliers"]
    ]
    replay.show(only)
    assert "t850 = 1e+06 K at row 5 col 7" in capsys.readouterr().out


def poke(name: str, value: float) -> Any:
    """Return what sets one number of a weight."""

    def change(run: Training) -> None:
        with torch.no_grad():
            dict(run.model.named_parameters())[name].view(-1)[3] = value

    return change


def test_a_bad_weight_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """NaN in a weight: named, with how many; all steps from there on fail and are one dump."""
    run = broken(tmp_path, poke("layers.1.0.mlp.down.weight", float("nan")))
    assert run.skipped == 2
    found = asked(tmp_path, images=(9,))
    assert found["fault"] == "images_000000000008" and math.isnan(found["recorded"]["loss"])
    assert found["bad_weight"].startswith("the weight of layers.1.0.mlp.down.weight (1 of ")
    replay.show(found)
    said = capsys.readouterr().out
    assert "the weight of layers.1.0.mlp.down.weight (1 of 384 values) is not finite" in said


def test_the_first_output_that_overflows_is_named(tmp_path: Path) -> None:
    """A finite weight that is far too large: the module whose output overflows is named, not what follows."""
    recomputed = {**FP32, "checkpointing": "block"}  # whose hooks see every output twice
    broken(tmp_path, poke("layers.1.0.norm2.weight", 3e38), model=recomputed)
    found = asked(tmp_path)
    assert found["bad_weight"] is None
    assert {row["bad"] for row in found["per_image"]} == {"the output of layers.1.0.norm2"}
    (line, *_) = replay.verdict(found, found["per_image"])
    assert "first not finite is the output of layers.1.0.norm2; its sample is like others" in line


def test_a_step_that_is_sound_here_is_said_to_be(tmp_path: Path) -> None:
    """NaN that neither data nor weights explain, as of a device that fails; a spike that is real is none."""

    def fail(run: Training) -> None:
        inner = run.pipeline.loss
        run.pipeline.loss = lambda y, v: inner(y, v) * (math.nan if run.images_seen == 8 else 1.0)

    broken(tmp_path, fail)
    found = asked(tmp_path)
    (line,) = replay.verdict(found, found["per_image"])
    assert re.match(r"the run had loss nan, here the same step has 0\.\d+: data and weights are so", line)
    found["recorded"] = {"loss": found["loss"] * 1.05, "grad_norm": 1.0}
    (line,) = replay.verdict(found, found["per_image"])
    assert line.startswith("nothing is out of range")
    found["recorded"]["loss"] = found["loss"] * 1.5
    assert replay.differs(found) and not replay.differs({**found, "images": [8, 13]})


def test_a_gradient_too_long_for_its_type_is_said(tmp_path: Path) -> None:
    """All values finite, the squares of the gradient not: training skips the step, and replay says why."""
    broken(tmp_path, lambda run: run.model.head.out.weight.data.mul_(1e18))  # type: ignore[union-attr]
    (row,) = asked(tmp_path, images=(8,))["per_image"]
    assert math.isfinite(row["loss"]) and not math.isfinite(row["grad_norm"])
    assert row["bad"] == "the norm of a finite gradient"


def test_the_first_module_on_the_way_back_is_named() -> None:
    """The slope of a square root at 0: outputs are finite, and the gradient breaks before the first map."""

    class Root(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.sqrt()

    model = nn.Sequential(nn.Linear(2, 2, bias=False), Root(), nn.Linear(2, 2))
    found = FirstBad(model)
    model(torch.zeros(1, 2)).sum().backward()
    assert (found.output, found.gradient) == (None, "0")
    found.forget()
    model(torch.full((1, 2), float("inf"))).sum().backward()
    assert found.output == "0"


def test_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """JSON that any parser reads; wrong names are one line with those there are."""
    with pytest.raises(ValueError, match="holds no skipped step"):
        asked(tmp_path)
    run = broken(tmp_path / "run", poke("head.out.weight", float("inf")))
    monkeypatch.setattr("sys.argv", ["replay", str(run.run_dir), "--json", "--device", "cpu"])
    capsys.readouterr()
    replay.main()
    found = json.loads(capsys.readouterr().out, parse_constant=lambda word: pytest.fail(word))
    assert found["recorded"]["loss"] in ("nan", "inf") and len(found["per_image"]) == 4
    with pytest.raises(ValueError, match="holds no images_7, but images_000000000008"):
        asked(run.run_dir, fault="images_7")
    with pytest.raises(ValueError, match="image 12 is not of this step, which has 8 to 11"):
        asked(run.run_dir, images=(12,))
    with pytest.raises(ValueError, match="is missing|does not exist"):
        asked(run.run_dir, store=str(tmp_path / "nowhere"))
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "29500")
    with pytest.raises(ValueError, match="one process, not on 2 ranks"):
        replay.main()


def test_damaged_dumps_are_refused(tmp_path: Path) -> None:
    """A file of weights that is cut off is said, and no numbers come out."""
    broken(tmp_path, poke("head.out.weight", float("inf")))
    (kept,) = checkpoint.complete(tmp_path / "faults")
    for file in kept.glob("stage_000/*.distcp"):
        file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match="damaged"):
        asked(tmp_path)
