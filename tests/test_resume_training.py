"""Both trainers and the forecast on a damaged checkpoint: what they use instead, and what they say."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from aeris import restore, train
from aeris.aurora import finetune
from aeris.config import RunConfig
from aeris.presets import PRESETS
from swipe import checkpoint
from swipe.collectives import AgreedError
from tests.aurora import tiny_runs

DATA = Path("stage_000", "__0_0.distcp")


def small(images: int) -> RunConfig:
    """Return the tiny preset with a network of a few thousand parameters, saved every 4 images."""
    base = PRESETS["tiny"]()
    return dataclasses.replace(
        base,
        model=dataclasses.replace(base.model, width=16, heads=2, hidden=24, layers=2),
        train=dataclasses.replace(base.train, images=images),
        checkpoint=dataclasses.replace(base.checkpoint, every_images=4),
    )


def go(program: Any, config: Any, run_dir: Path) -> dict[str, torch.Tensor]:
    """Run a trainer to its end; return its state."""
    run = program.prepare(config, run_dir, "cpu")
    program.train(run)
    return dict(run.tensors())


def flip(file: Path) -> None:
    """Change one bit of a file."""
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 64
    file.write_bytes(data)


def test_a_run_goes_on_from_the_checkpoint_before(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One bit of the newest is flipped: said in one line, and the end is that of an undisturbed run."""
    whole = go(train, small(12), tmp_path / "whole")
    go(train, small(8), tmp_path / "run")
    root = tmp_path / "run" / "checkpoints"
    four, eight = (path.name for path in checkpoint.complete(root))
    flip(root / eight / DATA)
    capsys.readouterr()
    resumed = go(train, small(12), tmp_path / "run")
    said = capsys.readouterr().out
    assert (
        f"the checkpoint {eight} is damaged (stage_000/__0_0.distcp: has other bytes than were saved (its "
        f"SHA-256 differs)): it is called {eight}.damaged now, and {four} is used\n"
    ) in said
    assert "resuming at image 4 of 12" in said
    for name, value in whole.items():
        assert torch.equal(value, resumed[name]), name
    for path in checkpoint.complete(root):
        os.truncate(path / DATA, 7)
    with pytest.raises(AgreedError, match=r"every checkpoint in .* is damaged: .* has 7 bytes"):
        train.prepare(small(16), tmp_path / "run", "cpu")


def test_fine_tuning_goes_on_from_the_checkpoint_before(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same of the other trainer."""
    weather = tiny_runs.write_pair(tmp_path)
    config = tiny_runs.small("one-step", weather, 4, weights="fresh", checkpoint={"every_images": 2})
    run_dir = tmp_path / "run"
    go(finetune, config, run_dir)
    before, newest = checkpoint.complete(run_dir / "checkpoints")
    (newest / "meta.json").write_text("{}")
    capsys.readouterr()
    run = finetune.prepare(config, run_dir, "cpu")
    assert run.images_seen == int(before.name[-12:])
    assert f"{newest.name} is damaged (meta.json: has 2 bytes" in capsys.readouterr().out


def test_a_forecast_names_a_truncated_file(tmp_path: Path) -> None:
    """Of the newest checkpoint or of the one asked for; it says which other could be taken."""
    go(train, small(8), tmp_path)
    four, eight = checkpoint.complete(tmp_path / "checkpoints")
    os.truncate(eight / DATA, 9)
    words = r"is damaged \(stage_000/__0_0.distcp: has 9 bytes, .* saved\)"
    for path in (None, eight):
        with pytest.raises(ValueError, match=f"{eight.name} {words}; --checkpoint {four.name} takes another"):
            restore.find_trained(tmp_path, path=path)
    assert restore.find_trained(tmp_path, path=four).meta["images_seen"] == 4
    (four / "stage_000" / ".metadata").unlink()
    (eight / ".complete").unlink()
    with pytest.raises(ValueError, match=r"\.metadata: is missing\); there is no other: put a good copy"):
        restore.find_trained(tmp_path)
