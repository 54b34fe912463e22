"""Training end to end on the packaged sample with a very small network: resume, faults, the command line."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import time
from pathlib import Path

import h5py
import pytest
import torch

from aeris import restore, train
from aeris.config import RunConfig
from aeris.data.loader import SampleDataset, make_loader
from aeris.data.store import StoreError, packaged_sample
from aeris.model.swin import Swin
from aeris.optim import check_finite
from aeris.parallelize import make_layout
from aeris.presets import PRESETS
from aeris.step import Training, noisy, train_step
from swipe import checkpoint

CPU = "cpu"


def small(images: int = 8, **sections: dict) -> RunConfig:
    """Return the tiny preset with a network of a few thousand parameters; `sections` override settings."""
    base = PRESETS["tiny"]()
    config = dataclasses.replace(
        base,
        model=dataclasses.replace(base.model, width=16, heads=2, hidden=24, layers=2),
        train=dataclasses.replace(base.train, images=images),
        checkpoint=dataclasses.replace(base.checkpoint, every_images=4),
    )
    for name, values in sections.items():
        config = dataclasses.replace(config, **{name: dataclasses.replace(getattr(config, name), **values)})
    return config


def go(config: RunConfig, run_dir: Path) -> Training:
    """Train in `run_dir` as the program does."""
    run = train.prepare(config, run_dir, CPU)
    train.train(run)
    return run


def records(run_dir: Path) -> list[dict]:
    """Read the log."""
    return [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]


def test_interrupted_and_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    """Bit for bit: weights, optimizer, average and losses, after a stop between two checkpoints."""
    whole = go(small(12), tmp_path / "whole")
    run = train.prepare(small(12), tmp_path / "stopped", CPU)

    class Killed(Exception):
        pass

    steps = itertools.count()

    def dying(*args: object) -> dict:
        if next(steps) == 3:  # after images 6: the last checkpoint is at 4, if its writer had the time
            while not checkpoint.complete(tmp_path / "stopped" / "checkpoints"):
                time.sleep(0.01)
            raise Killed
        return train_step(*args)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(train, "train_step", dying)
        train.train(run)
    assert [r["images_seen"] for r in records(tmp_path / "stopped")] == [2, 4, 6]
    resumed = go(small(12), tmp_path / "stopped")
    assert resumed.images_seen == whole.images_seen == 12
    for name, value in whole.tensors().items():
        assert torch.equal(value, resumed.tensors()[name]), name
    losses = [
        [(r["images_seen"], r["loss"], r["grad_norm"], r["lr"]) for r in records(tmp_path / d)]
        for d in ("whole", "stopped")
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 6
    # Sustained and peak leave out the first step of each start; the resumed run began at image 4.
    known = ["tflops_sustained" in r and "tflops_peak" in r for r in records(tmp_path / "stopped")]
    assert known == [False, True, False, True, True, True]


def test_more_images_go_on_and_old_checkpoints_go(tmp_path: Path) -> None:
    """A larger --train.images continues, and may begin to put errors on states; two checkpoints stay.

    A finished run starts nothing.
    """
    go(small(8), tmp_path)
    assert go(small(8), tmp_path).images_seen == 8
    run = go(small(12, train={"batch": 4, "images": 12}, diffusion={"state_error": 0.5}), tmp_path)
    assert run.images_seen == 12
    assert [p.name[-3:] for p in checkpoint.complete(tmp_path / "checkpoints")] == ["008", "012"]


def test_the_gradient_is_the_true_mean_whatever_the_microbatch(tmp_path: Path) -> None:
    """One microbatch of four and four of one give the same loss and, in float64, the same gradient."""
    gradients = []
    for microbatch in (4, 1):
        config = small(
            4, train={"batch": 4, "microbatch": microbatch}, model={"precision": "fp64", "residual": "fp64"}
        )
        run = train.prepare(config, tmp_path / str(microbatch), CPU)
        with torch.no_grad():
            for p in run.model.parameters():
                p.add_(torch.linspace(-0.1, 0.1, p.numel(), dtype=p.dtype).view_as(p))
        dataset = SampleDataset(run.store.path, 6, run.layout.shard, 0)
        record = train_step(run, iter(make_loader(dataset, range(4), microbatch)))
        gradients.append([record["loss"], *(p.grad for p in run.model.parameters())])
    assert gradients[0][0] == pytest.approx(gradients[1][0], rel=1e-6)
    for a, b in zip(gradients[0][1:], gradients[1][1:]):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_noise_belongs_to_the_image(tmp_path: Path) -> None:
    """Noise time, input and target of an image are the same bits in any batch."""
    run = train.prepare(small(4), tmp_path, CPU)
    dataset = SampleDataset(run.store.path, 6, run.layout.shard, 0)
    (batch,) = make_loader(dataset, range(4), 4)
    together = noisy(run, batch)
    for image, sample in enumerate(make_loader(dataset, range(4), 1)):
        alone = noisy(run, sample)
        for a, b in (
            (alone.x, together.x),
            (alone.conditions[0], together.conditions[0]),
            (alone.target, together.target),
        ):
            assert torch.equal(a[0], b[image])


def test_overfitting_reaches_the_floor(tmp_path: Path) -> None:
    """Three images with fixed noise are learned by heart: the loss falls to a twentieth."""
    config = small(
        900,
        model={"width": 96, "heads": 4, "hidden": 256, "window": 4, "rows": 8, "cols": 8},
        train={"batch": 3, "microbatch": 3},
        optimizer={"lr": 3e-3, "warmup_images": 60},
    )
    store = small_store(tmp_path / "store")
    run = train.prepare(
        dataclasses.replace(config, data=dataclasses.replace(config.data, store=str(store))),
        tmp_path / "run",
        CPU,
    )
    dataset = SampleDataset(store, 6, run.layout.shard, 0)
    (sample,) = make_loader(dataset, range(3), 3)
    first = train_step(run, iter([sample]))["loss"]
    for _ in range(299):
        last = train_step(run, iter([sample]))["loss"]
    assert last < 0.05 * first


def small_store(path: Path) -> Path:
    """Convert a synthetic atmosphere of 8 x 8 points and 3 channels."""
    import numpy as np
    import xarray as xr

    from aeris.data import conversion
    from aeris.data.options import Options
    from aeris.data.plan import plan

    rng = np.random.default_rng(0)
    dims = ("time", "latitude", "longitude")
    fields = {
        n: (dims, rng.standard_normal((12, 8, 8)).cumsum(0) + mean)
        for n, mean in (("2m_temperature", 280), ("10m_u_component_of_wind", 0))
    }
    static = {n: (dims[1:], rng.random((8, 8))) for n in ("geopotential_at_surface", "land_sea_mask")}
    coords = {
        "time": np.datetime64("2000-01-01", "ns") + np.arange(12) * np.timedelta64(6, "h"),
        "latitude": np.linspace(78.75, -78.75, 8),
        "longitude": np.arange(8) * 45.0,
    }
    source = path.with_suffix(".nc")
    xr.Dataset(fields | static, coords).to_netcdf(source, engine="h5netcdf")
    conversion.run(plan(Options((str(source), str(path)), window=4)))
    return path


def check(run: Training) -> None:
    """Stop the run where training would."""
    limit = run.config.train.nonfinite_limit
    check_finite(run.model, run.seat.groups.world, run.skipped_in_a_row, limit)


def test_nonfinite_steps_are_skipped_then_stop_the_run(tmp_path: Path) -> None:
    """A poisoned gradient changes nothing, is counted, and past the limit the first bad tensor is named."""
    run = train.prepare(small(40, train={"nonfinite_limit": 2}), tmp_path, CPU)
    dataset = SampleDataset(run.store.path, 6, run.layout.shard, 0)
    samples = iter(make_loader(dataset, range(40), 2))
    before = {name: value.clone() for name, value in run.tensors().items()}
    handle = run.model.layers["1"][0].mlp.down.weight.register_hook(lambda g: g * float("nan"))  # type: ignore[index]
    record = train_step(run, samples)
    check(run)
    assert record["skipped"] == 1 and all(
        torch.equal(value, before[name]) for name, value in run.tensors().items()
    )
    handle.remove()
    assert train_step(run, samples)["skipped"] == 1 and run.skipped_in_a_row == 0
    run.model.layers["1"][0].mlp.down.weight.register_hook(lambda g: g * float("nan"))  # type: ignore[index]
    with pytest.raises(
        ValueError, match=r"3 non-finite steps in a row.*gradient of layers.1.0.mlp.down.weight"
    ):
        for _ in range(3):
            train_step(run, samples)
            check(run)


def test_the_average_forecasts(tmp_path: Path) -> None:
    """A run gives back the averaged or the raw weights of its newest checkpoint."""
    run = go(small(8), tmp_path)
    for kind, weights in (("ema", run.ema.weights), ("raw", dict(run.model.named_parameters()))):
        trained = restore.find_trained(tmp_path, kind)
        model = restore.load_network(trained, make_layout(trained.config.model), "cpu")
        assert (
            isinstance(model, Swin)
            and not model.training
            and trained.config.train.images == 8
            and trained.meta["images_seen"] == 8
        )
        assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    with pytest.raises(ValueError, match="choose ema or raw"):
        restore.find_trained(tmp_path, "best")


def other_store(tmp_path: Path) -> Path:
    """Copy the packaged store and scale one statistic, as another conversion would."""
    copy = tmp_path / "other"
    copy.mkdir()
    for file in packaged_sample().glob("*.h5"):
        (copy / file.name).write_bytes(file.read_bytes())
    with h5py.File(copy / "store.h5", "r+") as file:
        file["statistics"]["mean"][0] += 1.0
    return copy


@pytest.mark.parametrize(
    ("sections", "says"),
    [
        ({"model": {"window": 10}}, "Windows that fit this image: 6 or 8 or 12"),
        ({"model": {"rows": 48}}, "--model.rows 24 --model.cols 48"),
        ({"model": {"heads": 3}}, "multiple of the 3 heads"),
        ({"train": {"batch": 3, "microbatch": 2}}, "microbatch 2 does not divide"),
        ({"train": {"microbatch": 0}}, "--train.microbatch is 0: it must be at least 1"),
        ({"diffusion": {"state_error": -1.0}}, "--diffusion.state-error is -1: it must be 0 or more"),
        ({"train": {"log_every": 0}}, "--train.log-every is 0"),
        ({"model": {"heads": 0}}, "--model.heads is 0"),
        ({"model": {"layers": 0}}, "--model.layers is 0"),
        ({"checkpoint": {"keep": 0}}, "--checkpoint.keep is 0"),
        ({"model": {"precision": "fp64"}}, "fp64 needs both"),
        ({"model": {"row_offset": 1}}, "pass --model.row-offset 0"),
        ({"diffusion": {"sigma_min": 0.0}}, "must be positive and rise"),
        ({"data": {"channels": ("t2m", "z1000")}}, "it lacks z1000"),
        ({"data": {"interval_h": 18}}, "not 18 h"),
        ({"data": {"store": "/nowhere"}}, "/nowhere"),
    ],
    ids=lambda v: str(v) if isinstance(v, dict) else "",
)
def test_bad_settings_are_refused_before_anything_is_written(
    sections: dict, says: str, tmp_path: Path
) -> None:
    """One error with advice, and no run directory."""
    with pytest.raises(ValueError, match=says):
        train.prepare(small(**sections), tmp_path / "run", CPU)
    assert not (tmp_path / "run").exists()


def test_another_run_or_other_data_in_the_directory_are_refused(tmp_path: Path) -> None:
    """What defines a run cannot change under its checkpoints; the differing settings are named."""
    go(small(4), tmp_path / "run")
    with pytest.raises(ValueError, match=r"another run \(--model.width 16 -> 32; --train.seed 0 -> 1\)"):
        train.prepare(small(4, model={"width": 32}, train={"seed": 1}), tmp_path / "run", CPU)
    with pytest.raises(ValueError, match="not the data this run was trained on: .*differ"):
        train.prepare(small(8, data={"store": str(other_store(tmp_path))}), tmp_path / "run", CPU)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_value_in_the_data_is_one_line(workers: int, tmp_path: Path) -> None:
    """What the store says of it reaches the user as it is, whichever process read the value."""
    path = small_store(tmp_path / "store")
    with h5py.File(path / "2000.h5", "r+") as file:
        file["fields"][:, 1, 3, 5] = float("nan")
    size = {"rows": 8, "cols": 8, "window": 4}
    run = train.prepare(
        small(4, model=size, data={"store": str(path), "workers": workers}), tmp_path / "run", CPU
    )
    with pytest.raises(StoreError) as caught:
        train.train(run)
    assert re.match(r"\w+ is nan at 2000-01-0\d\S+, row 3, col 5 of \S+2000.h5, where", str(caught.value))
    assert "\n" not in str(caught.value)


def test_an_unwritable_run_directory_is_one_error(tmp_path: Path) -> None:
    """A path below a file: the system's own words, nothing trained."""
    (tmp_path / "file").touch()
    with pytest.raises(
        OSError, match="cannot write the run directory .*Not a directory.*choose another --run-dir"
    ):
        train.prepare(small(4), tmp_path / "file" / "run", CPU)


def test_command_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Presets, overrides, dry runs as JSON with a layout, and half a launcher's environment refused."""
    arguments = train.parse(
        ["1.3b-24h", "--train.images", "7", "--model.poles", "separate", "--run-dir", str(tmp_path)]
    )
    assert (
        arguments.config.model.window == 60
        and arguments.config.train.images == 7
        and arguments.run_dir == tmp_path
    )
    assert train.parse([]).config == PRESETS["tiny"]()
    assert all(train.parse([name]).preset == name for name in PRESETS)
    named = train.parse(["--run-dir", "tiny", "13b"])  # a word is a preset only in its place
    assert named.preset == "13b" and named.config == PRESETS["13b"]() and named.run_dir == Path("tiny")
    assert train.parse(["40b"]).run_dir == Path("runs/40b")
    monkeypatch.setattr(
        "sys.argv", ["train", "tiny", "--dry-run", "--json", "--run-dir", str(tmp_path / "none")]
    )
    train.main()
    found = json.loads(capsys.readouterr().out)
    assert found["parameters"] == 1_276_544 and found["flops_per_sample"] == sum(
        found["flops_by_part"].values()
    )
    assert found["config"]["model"]["window"] == 12 and not (tmp_path / "none").exists()
    monkeypatch.setattr(
        "sys.argv", ["train", "tiny", "--dry-run", "--json", "--parallel.pp", "3", "--parallel.wp-x", "2"]
    )
    train.main()
    found = json.loads(capsys.readouterr().out)["parallel"]
    assert found["layout"] == "dp 1 x wp 1x2 x pp 3 x sp 1" and found["stages"] == [[0, 2], [2, 4], [4, 6]]
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ValueError, match="WORLD_SIZE set, but not RANK"):
        train.main()
