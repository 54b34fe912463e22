"""Training of Aurora end to end with a very small model: resume, weights to start from, faults, programs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import xarray as xr
from torch.utils.flop_counter import FlopCounterMode

from aeris.aurora import finetune
from aeris.aurora.model import Aurora
from aeris.aurora.swin3d import compile_blocks
from aeris.aurora.training.curves import read_scores
from aeris.aurora.training.starting_weights import build, find_start
from aeris.aurora.training.step import learn_from, train_step
from swipe import checkpoint
from tests.aurora import tiny_runs
from tests.aurora.tiny_runs import SMALL, go, records, small


@pytest.mark.parametrize("preset", ["two-step", "lora-replay"])
def test_interrupted_and_resumed_equals_uninterrupted(
    preset: str, weather: tuple[str, str], base: Path, tmp_path: Path
) -> None:
    """Bit for bit: weights, optimizer, scores, replay buffer and log, with dropped paths and a worker."""
    # Checkpoints and validations come at different times.
    config = small(
        preset, weather, 6, weights=str(base), aurora={"drop_path": 0.3}, validate={"every_images": 6}
    )
    whole = go(config, tmp_path / "whole")
    run = finetune.prepare(config, tmp_path / "stopped", "cpu")
    save = run.save

    class Killed(Exception):
        pass

    def dying() -> None:
        if run.images_seen == 6:  # trained, validated and logged; the last checkpoint is at 4
            raise Killed
        save()

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(run, "save", dying)
        finetune.train(run)
    run.checkpoints.wait()
    assert [p.name[-3:] for p in checkpoint.complete(tmp_path / "stopped" / "checkpoints")] == ["004"]
    assert records(tmp_path / "stopped")[-1]["images_seen"] == 6
    workers = int(preset == "lora-replay")
    resumed = go(replace(config, data=replace(config.data, workers=workers)), tmp_path / "stopped")
    assert resumed.images_seen == whole.images_seen == 6
    tensors = resumed.tensors()
    assert whole.tensors().keys() == tensors.keys()
    assert preset != "lora-replay" or sum(name.startswith("replay.") for name in tensors) == 2 * 3 * 9
    for name, value in whole.tensors().items():
        assert torch.equal(value, tensors[name]), name
    logs = [records(tmp_path / name) for name in ("whole", "stopped")]
    assert logs[0] == logs[1]
    assert [r["images_seen"] for r in logs[0]] == [0, 2, 4, 6, 6]
    judged = [r["scores"] for r in logs[0] if "scores" in r]
    assert [set(scores) for scores in judged] == [{"validation"}, {"training", "validation"}]
    steps = 2 if preset == "two-step" else 1
    for part in ("training", "validation"):
        assert all(len(v) == steps and v[0] > 0 for v in judged[-1][part]["rmse"].values())
        assert {"2t", "msl", "z500", "q850"} < set(judged[-1][part]["mae"])


def test_more_images_go_on_and_a_finished_run_is_left_alone(
    weather: tuple[str, str], base: Path, tmp_path: Path
) -> None:
    """A larger --train.images continues; the weights it started from may be gone by then."""
    path = tmp_path / "base.ckpt"
    path.write_bytes(base.read_bytes())
    config = small("one-step", weather, 2, weights=str(path))
    go(config, tmp_path / "run")
    path.unlink()
    assert go(config, tmp_path / "run").images_seen == 2
    assert go(small("one-step", weather, 4, weights=str(path)), tmp_path / "run").images_seen == 4


def test_weights_go_from_setup_to_setup(weather: tuple[str, str], base: Path, tmp_path: Path) -> None:
    """File -> two-step -> LoRA on that run -> weights.pt: the base stays, the adapters move."""
    two = go(small("two-step", weather, weights=str(base)), tmp_path / "two")
    before = {name: p.detach().clone() for name, p in two.model.named_parameters()}
    start = torch.load(base, weights_only=True)
    assert all(not torch.equal(p, start[name]) for name, p in before.items())
    config = small("lora-three-step", weather, weights=str(tmp_path / "two"))
    run = finetune.prepare(config, tmp_path / "lora", "cpu")
    fresh = {name: p.detach().clone() for name, p in run.model.named_parameters() if ".lora_" in name}
    finetune.train(run)
    after = dict(run.model.named_parameters())
    assert after.keys() == before.keys() | fresh.keys()
    assert all(torch.equal(after[name], p) for name, p in before.items())
    assert all(not torch.equal(after[name], p) for name, p in fresh.items())
    run.export(tmp_path / "weights.pt")
    state = torch.load(tmp_path / "weights.pt", weights_only=True)
    model = Aurora(replace(SMALL, use_lora=True))
    model.load_checkpoint_local(tmp_path / "weights.pt")
    again = build("tiny", model.config, "cpu", seed=5)
    find_start(str(tmp_path / "lora"), again).load(again)
    for name, p in again.named_parameters():
        assert torch.equal(p, after[name]) and torch.equal(p, model.get_parameter(name)), name
        assert torch.equal(p, state[name])
    losses = [r for r in records(tmp_path / "lora") if "loss" in r]
    assert all(
        r["loss"] == pytest.approx(sum(r[f"loss_step_{k}"] for k in (1, 2, 3)) / 3, rel=1e-6) for r in losses
    )


def test_it_learns(weather: tuple[str, str], tmp_path: Path) -> None:
    """From fresh weights, in 20 updates, on waves that move: loss and error fall."""
    config = small(
        "pretrain",
        weather,
        40,
        optimizer={"lr": 5e-3, "warmup_images": 10},
        validate={"every_images": 40, "samples": 2},
        checkpoint={"every_images": 40},
        aurora={"drop_path": 0.0},
    )
    go(config, tmp_path)
    first, last = (one["scores"]["validation"] for one in read_scores(tmp_path / "log.jsonl"))
    assert last["loss"][0] < 0.9 * first["loss"][0]
    assert last["rmse"]["t500"][0] < 0.6 * first["rmse"]["t500"][0]


@pytest.mark.parametrize("policy", ["blocks", "encoder-decoder+layers"])
def test_checkpointing_changes_nothing_but_memory(
    policy: str, weather: tuple[str, str], base: Path, tmp_path: Path
) -> None:
    """The gradients of an update with dropped paths are those without it."""
    gradients = []
    for name in ("none", policy):
        config = small(
            "two-step",
            weather,
            weights=str(base),
            train={"checkpointing": name, "precision": "fp64"},
            aurora={"drop_path": 0.3},
        )
        run = finetune.prepare(config, tmp_path / name, "cpu")
        train_step(run, finetune.read_samples(config, run.data, range(2), False))
        gradients.append({n: p.grad for n, p in run.model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-9, atol=1e-14, msg=name)


@pytest.mark.parametrize(("preset", "known"), [("two-step", True), ("lora-three-step", False)])
def test_flops_of_an_update(
    preset: str, known: bool, weather: tuple[str, str], base: Path, tmp_path: Path
) -> None:
    """Three forward passes a model step, within 10 % for so small a model; unknown with a frozen base."""
    config = small(preset, weather, weights=str(base), train={"checkpointing": "none", "precision": "fp64"})
    run = finetune.prepare(config, tmp_path, "cpu")
    yardstick = finetune.make_rates(run).yardstick
    assert (yardstick is not None) == known
    if yardstick is None:
        return
    with FlopCounterMode(display=False) as counter:
        train_step(run, finetune.read_samples(config, run.data, range(2), False))
    assert 2 * yardstick.flops == pytest.approx(counter.get_total_flops(), rel=0.1)


def test_the_gradient_is_the_mean_whatever_the_microbatch(
    weather: tuple[str, str], base: Path, tmp_path: Path
) -> None:
    """One microbatch of two and two of one."""
    gradients = []
    for microbatch in (1, 2):
        config = small(
            "two-step", weather, weights=str(base), train={"microbatch": microbatch, "precision": "fp64"}
        )
        run = finetune.prepare(config, tmp_path / str(microbatch), "cpu")
        record = train_step(run, finetune.read_samples(config, run.data, range(2), False))
        gradients.append([record["loss"], *(p.grad for p in run.model.parameters())])
    assert gradients[0][0] == pytest.approx(gradients[1][0], rel=1e-12)
    for one, other in zip(gradients[0][1:], gradients[1][1:]):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-12)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch's compiler looks at it
def test_blocks_compile_whole_with_dropped_paths_and_recomputation(
    weather: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No graph breaks, and the update without compilation."""
    aurora = {"drop_path": 0.3, "encoder_depths": (1, 1), "decoder_depths": (1, 1)}
    train = {"checkpointing": "blocks", "precision": "fp64"}

    def compiled(model: torch.nn.Module, **options: Any) -> torch.nn.Module:
        assert options == {"fullgraph": True}
        return compile_blocks(model, backend="eager", **options)

    monkeypatch.setattr("aeris.aurora.training.run.compile_blocks", compiled)
    found = []
    for compile_ in (False, True):
        config = small(
            "one-step", weather, weights="fresh", aurora=aurora, train=train | {"compile": compile_}
        )
        run = finetune.prepare(config, tmp_path / str(compile_), "cpu")
        found.append(train_step(run, finetune.read_samples(config, run.data, range(2), False)))
    assert found[0] == pytest.approx(found[1], rel=1e-9)


def test_bf16_covers_encoder_and_decoder(weather: tuple[str, str], base: Path, tmp_path: Path) -> None:
    """Weights and predictions stay fp32, matrix products of all three parts are bf16."""
    config = small("one-step", weather, 2, weights=str(base), train={"precision": "bf16"})
    run = finetune.prepare(config, tmp_path, "cpu")
    seen: set[tuple[str, torch.dtype]] = set()
    for name, module in run.model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(
                lambda module, args, out, name=name: seen.add((name.split(".")[0], out.dtype))
            )
    finetune.train(run)
    assert seen >= {(part, torch.bfloat16) for part in ("encoder", "backbone", "decoder")}
    assert all(p.dtype == torch.float32 and p.grad.dtype == torch.float32 for p in run.model.parameters())
    assert records(tmp_path)[1]["loss"] > 0


def test_missing_values_are_left_out_and_counted(base: Path, tmp_path: Path) -> None:
    """Half of 2t is missing in every state: losses stay finite, the share is in the log."""
    path = tiny_runs.write(tmp_path / "holes.nc", missing=True)
    config = small("two-step", (str(path),), weights=str(base), validate={"every_images": 0})
    run = go(config, tmp_path / "run")
    values = 4 + 5 * 2
    share = (0.5 + 2 / (tiny_runs.ROWS * tiny_runs.COLS)) / values
    for record in records(tmp_path / "run"):
        assert record["loss"] > 0 and record["skipped"] == 0
        assert record["missing"] == pytest.approx(share)
    assert all(bool(torch.isfinite(p).all()) for p in run.model.parameters())


def test_nonfinite_updates_are_skipped_then_stop_the_run(
    weather: tuple[str, str], base: Path, tmp_path: Path
) -> None:
    """A poisoned gradient changes nothing, is counted, and past the limit the tensor is named."""
    config = small("one-step", weather, 20, weights=str(base), train={"nonfinite_limit": 2})
    run = finetune.prepare(config, tmp_path, "cpu")
    before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    run.model.decoder.surf_heads["2t"].weight.register_hook(lambda g: g * float("nan"))
    with pytest.raises(ValueError, match="3 non-finite steps in a row; .*gradient of .*surf_heads.2t"):
        finetune.train(run)
    assert all(torch.equal(p, before[name]) for name, p in run.model.named_parameters())


def test_a_spike_is_skipped(
    weather: tuple[str, str], base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A loss far above those before is no update; it is said, logged, and in the checkpoint."""
    config = small("one-step", weather, 12, weights=str(base), faults={"spike": 9.0})
    run = finetune.prepare(config, tmp_path, "cpu")
    before: dict[str, torch.Tensor] = {}

    def learn(*args: Any, **settings: Any) -> Any:
        losses, lacking = learn_from(*args, **settings)
        if run.images_seen != 8:
            return losses, lacking
        before.update({name: p.detach().clone() for name, p in run.model.named_parameters()})
        return losses * 1e4, lacking

    def taken(*args: Any) -> dict[str, Any]:
        record = train_step(*args)
        if record["images_seen"] == 10:
            assert all(torch.equal(p, before[name]) for name, p in run.model.named_parameters())
        return record

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("aeris.spikes.FIRST", 3)
        patch.setattr("aeris.aurora.training.step.learn_from", learn)
        patch.setattr(finetune, "train_step", taken)
        finetune.train(run)
    assert before and "image 10: spike step skipped" in capsys.readouterr().out
    assert [r["images_seen"] for r in records(tmp_path) if "skip" in r] == [10]
    meta = checkpoint.read_meta(checkpoint.complete(tmp_path / "checkpoints")[-1])
    assert meta["skipped"] == 1 and meta["spikes"]["skipped"] == [5] and meta["spikes"]["taken"] == 5


def test_weights_that_cannot_be_written_leave_nothing(
    weather: tuple[str, str], base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = finetune.prepare(small("one-step", weather, weights=str(base)), tmp_path / "run", "cpu")

    def full(state: Any, path: Path) -> None:
        path.write_bytes(b"half")
        raise RuntimeError("unexpected pos 15212480 vs 15212368")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match=r"cannot write .*weights.pt \(is the disk full"):
        run.export(tmp_path / "run" / "weights.pt")
    assert not list((tmp_path / "run").glob("weights*"))


def test_what_the_data_lack_is_said(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Times without a variable are counted, and a variable without a value is named."""
    lacking = tmp_path / "lacking.nc"
    with xr.open_dataset(tiny_runs.write(tmp_path / "train.nc"), engine="h5netcdf") as data:
        data.isel(time=slice(None, 4)).drop_vars("2m_temperature").to_netcdf(lacking, engine="h5netcdf")
    validate = tmp_path / "validate.nc"
    with xr.open_dataset(tiny_runs.write(tmp_path / "whole.nc", "2022-01-01", 9), engine="h5netcdf") as data:
        data.load()["mean_sea_level_pressure"][:] = float("nan")
        data.to_netcdf(validate, engine="h5netcdf")
    with xr.open_dataset(tmp_path / "train.nc", engine="h5netcdf") as data:
        data.isel(time=slice(4, None)).to_netcdf(tmp_path / "rest.nc", engine="h5netcdf")
    paths = (str(lacking), str(tmp_path / "rest.nc"), str(validate))
    go(small("one-step", paths, 2, weights=str(base)), tmp_path / "run")
    said = capsys.readouterr().out
    assert "4 times are left out" in said
    assert "no score of msl: missing" in said


def test_the_optimizer_may_be_in_host_memory(weather: tuple[str, str], base: Path, tmp_path: Path) -> None:
    """The same run to the bit with adapters alone trained, saved without offload and resumed with it."""
    config = small("lora-three-step", weather, 4, weights=str(base), checkpoint={"every_images": 2})
    offloaded = replace(config, optimizer=replace(config.optimizer, offload="cpu-torch"))
    whole = go(config, tmp_path / "whole")
    go(replace(config, train=replace(config.train, images=2)), tmp_path / "parts")
    parts = go(offloaded, tmp_path / "parts")
    assert parts.images_seen == 4 and str(parts.optimizer).startswith(
        "torch's fused AdamW (--optimizer.offload"
    )
    assert whole.tensors().keys() == parts.tensors().keys()
    for name, value in whole.tensors().items():
        assert torch.equal(value, parts.tensors()[name]), name
