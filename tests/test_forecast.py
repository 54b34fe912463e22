"""The program from its command line: what it makes, what it refuses, and that a killed forecast goes on.

A tiny untrained run on the packaged atmosphere; about a second a call.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from aeris import config as configs
from aeris import forecast
from aeris.config import DiffusionConfig, ModelConfig, RunConfig
from aeris.data.forecast_members import read_progress
from aeris.data.forecasts import open_forecast
from aeris.data.store import Store, packaged_sample
from aeris.interruption import Requests, Stopped
from aeris.model.initialise import initialise
from aeris.parallelize import build_model, make_layout
from aeris.restore import channel_counts
from launch.job import keeps_record
from swipe import checkpoint

FAST = ("--sampler.levels", "2", "--batch", "2")
ONE = ("--init", "2000-06-01T00", "--lead-h", 6)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with two checkpoints: weights of seed 1, later of seed 2; raw and averaged weights differ."""
    run = tmp_path_factory.mktemp("run") / "tiny"
    model = ModelConfig(layers=2, width=16, heads=2, hidden=16, init="spike-no-more", precision="fp32")
    config = RunConfig(model=model, diffusion=DiffusionConfig(sigma_min=0.05))
    store = Store(packaged_sample())
    network = build_model(model, *channel_counts(len(store.names)), make_layout(model), "cpu")
    for images, seed in [(100, 1), (200, 2)]:
        initialise(network, seed)
        with torch.no_grad():
            network.head.out.weight.normal_(0.0, 0.05, generator=torch.Generator().manual_seed(seed))
        tensors = {f"model.{name}": p.detach() * 0.9 for name, p in network.named_parameters()}
        tensors |= {f"ema.{name}": p.detach() for name, p in network.named_parameters()}
        meta = {"images_seen": images, "channels": list(store.names), "fingerprint": store.fingerprint}
        checkpoint.Checkpoints(run / "checkpoints", keep=3, asynchronous=False).save(images, tensors, meta)
    configs.save(config, run / "config.json")
    return run


def call(monkeypatch: pytest.MonkeyPatch, *words: object) -> None:
    monkeypatch.setattr("sys.argv", ["forecast", *map(str, words)])
    forecast.main()


def everything(path: Path) -> np.ndarray:
    found = open_forecast(path)
    return np.stack([[found.read(i, j) for j in range(len(found.lead_h))] for i in range(len(found.inits))])


def test_makes_a_forecast(run_dir: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    out = tmp_path / "f.zarr"
    inits = ("--init", "2000-06-01T00", "2000-06-02")
    words = (run_dir, *inits, "--members", 3, "--lead-h", 12, "--out", out, *FAST)
    call(monkeypatch, *words)
    assert f"python -m aeris.evaluate {out}" in capsys.readouterr().out
    found = open_forecast(out)
    assert [str(t) for t in found.inits] == ["2000-06-01T00:00:00", "2000-06-02T00:00:00"]
    assert (found.lead_h.tolist(), found.members, found.names) == ([6, 12], 3, Store(packaged_sample()).names)
    assert found.attrs["images_seen"] == 200
    assert found.attrs["sampler_sigma_min"] == 0.05
    values = everything(out)
    assert np.isfinite(values).all()
    assert values[:, :, :, 0].std(axis=2).min() > 0
    call(monkeypatch, *words)
    assert "is there already" in capsys.readouterr().out


def test_same_numbers_as_netcdf_and_in_other_batches(run_dir: Path, tmp_path: Path, monkeypatch) -> None:
    """Bitwise in the noise; the network's sums may round differently in another batch."""
    words = (run_dir, *ONE, "--members", 3, "--sampler.levels", 2)
    call(monkeypatch, *words, "--out", tmp_path / "a.zarr", "--batch", 1)
    call(monkeypatch, *words, "--out", tmp_path / "b", "--batch", 3)
    a, b = everything(tmp_path / "a.zarr"), everything(tmp_path / "b")
    spread = a.std(axis=(0, 1, 2, 4, 5), keepdims=True)
    assert np.abs((a - b) / spread).max() < 1e-6


@pytest.mark.parametrize(
    ("extra", "changes"),
    [
        (("--seed", 1), True),
        (("--weights", "raw"), True),
        (("--checkpoint", "images_000000000100"), True),
        (("--checkpoint", "200"), False),
        (("--sampler.sigma-min", "0.06"), True),
        (("--store", packaged_sample()), False),
    ],
)
def test_options_count(run_dir: Path, tmp_path: Path, monkeypatch, extra: tuple, changes: bool) -> None:
    words = (run_dir, *ONE, "--members", 1, "--out", tmp_path / "f.zarr", *FAST)
    call(monkeypatch, *words)
    before = everything(tmp_path / "f.zarr")
    if changes:
        with pytest.raises(ValueError, match="holds another forecast"):
            call(monkeypatch, *words, *extra)
    call(monkeypatch, *words, *extra, "--overwrite")
    assert np.array_equal(before, everything(tmp_path / "f.zarr")) == (not changes)


def test_dry_run_writes_nothing_and_counts(run_dir: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    out = tmp_path / "f.zarr"
    words = (
        run_dir, "--init", "2000-06-01T00:2000-06-02T00:12h", "--lead-h", 24, "--out", out, "--dry-run",
        "--sampler.solver", "heun", "--sampler.levels", 10,
    )  # fmt: skip
    call(monkeypatch, *words, "--json")
    values = json.loads(capsys.readouterr().out)
    assert len(values["init_times"]) == 3
    assert values["evaluations_per_step"] == 19
    assert values["evaluations"] == values["evaluations_left"] == 3 * 8 * 4 * 19
    assert values["output_bytes"] == 3 * 8 * 4 * 24 * 24 * 48 * 4
    call(monkeypatch, *words)
    assert "heun, 10 levels from 200 to 0.05" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_thinned_output_with_perturbed_starts(run_dir: Path, tmp_path: Path, monkeypatch) -> None:
    words = (run_dir, "--init", "2000-06-01T00", "--lead-h", 24, "--members", 2, *FAST)
    call(monkeypatch, *words, "--out", tmp_path / "all.zarr", "--keep-initial")
    thin = ("--keep-every-h", 12, "--keep-channels", "z500", "t2m", "--keep-initial")
    call(monkeypatch, *words, "--out", tmp_path / "thin", *thin)
    found = open_forecast(tmp_path / "thin")
    names = Store(packaged_sample()).names
    kept = [names.index(name) for name in found.names]
    assert found.lead_h.tolist() == [0, 12, 24] and set(found.names) == {"t2m", "z500"}
    np.testing.assert_array_equal(
        everything(tmp_path / "thin"), everything(tmp_path / "all.zarr")[:, ::2, :, kept]
    )
    noisy = ("--perturb.kind", "noise", "--perturb.amplitude", 0.5)
    call(monkeypatch, *words, "--out", tmp_path / "noisy.zarr", "--keep-initial", *noisy)
    change = everything(tmp_path / "noisy.zarr")[0, 0] - everything(tmp_path / "all.zarr")[0, 0]
    assert change.std(axis=(2, 3)).min() > 0 and not np.array_equal(change[0], change[1])
    assert open_forecast(tmp_path / "noisy.zarr").attrs["perturb_amplitude"] == 0.5


def test_a_stopped_program_says_so_and_goes_on(run_dir: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    out, beside = tmp_path / "f.zarr", tmp_path / "f.zarr.job"
    words = (run_dir, *ONE, "--members", 4, "--out", out, *FAST)
    with monkeypatch.context() as patch:
        patch.setattr(Requests, "wishes", lambda self: (1.0, 0.0))
        with pytest.raises(Stopped, match="after a step, everything written .2 of 4 steps"):
            call(monkeypatch, *words)
    said = json.loads((beside / "ended.json").read_text())
    assert (said["status"], said["images_seen"]) == (75, 2) and "goes on" in capsys.readouterr().err
    call(monkeypatch, *words)
    assert "going on, 2 of 4 steps of a member are done" in capsys.readouterr().out
    assert json.loads((beside / "ended.json").read_text())["status"] == 0
    records = [json.loads(line) for line in (beside / "log.jsonl").read_text().splitlines()]
    assert records[-1]["images_seen"] == 4 and records[-1]["share_network"] > 0
    assert keeps_record(["aeris.forecast", "run", "--run-dir", str(beside)])
    assert not keeps_record(["aeris.forecast", "run"])


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (("--init", "2000-06-01T03"), r"has no time 2000-06-01T03:00:00: the nearest is 2000-06-01T0[06]"),
        (("--init", "soon"), "'soon' is not a time"),
        (("--lead-h", 20), "no multiple of the model's 6 h: take 18 or 24"),
        (("--members", 0), "must be 1 or more"),
        (
            ("--keep-every-h", 4),
            "--keep-every-h 4 must be a multiple of the model's 6 h and divide --lead-h 6",
        ),
        (("--keep-every-h", 12), "and divide --lead-h 6"),
        (("--keep-channels", "z500", "z1"), "--keep-channels z1: the run has t2m "),
        (("--calibrated",), "leave out their flags"),
        (("--calibrated", "--sampler.levels", 19), "is not calibrated"),
        (("--sampler.sigma-min", 0.02), "trained from 0.05 to 200 only"),
        (("--checkpoint", "300"), "no complete checkpoint 300; there are: images_000000000100, images_"),
        (("--device", "abacus"), "--device abacus is not available"),
        (("--out", "f.nc"), "a forecast is a directory"),
        (("--store", "nowhere"), "nowhere does not exist"),
    ],
)
def test_refusals(run_dir: Path, tmp_path: Path, monkeypatch, extra: tuple, message: str) -> None:
    words = (run_dir, *ONE, "--out", tmp_path / "f.zarr", *FAST)
    with pytest.raises(ValueError, match=message):
        call(monkeypatch, *words, *extra)
    assert list(tmp_path.iterdir()) == []


def test_refuses_data_the_run_was_not_trained_on(run_dir: Path, tmp_path: Path, monkeypatch) -> None:
    other = tmp_path / "run"
    shutil.copytree(run_dir, other)
    meta_path = other / "checkpoints" / "images_000000000200" / "meta.json"
    meta = json.loads(meta_path.read_text())
    meta["fingerprint"]["units"][0] = "degC"
    meta_path.write_text(json.dumps(meta))
    (meta_path.parent / ".complete").write_text("")  # like one of before there were checksums
    for listed in meta_path.parent.rglob("checksums.json"):
        listed.unlink()
    with pytest.raises(ValueError, match="units differ"):
        call(monkeypatch, other, *ONE, "--out", tmp_path / "f.zarr")


def test_not_a_run(tmp_path: Path, monkeypatch) -> None:
    with pytest.raises(ValueError, match="is not a run directory"):
        call(monkeypatch, tmp_path, *ONE, "--out", tmp_path / "f.zarr")


def test_killed_forecast_goes_on_with_the_same_command(run_dir: Path, tmp_path: Path, monkeypatch) -> None:
    """SIGKILL while it writes; the rest is computed by the same command and no bit differs."""
    inits = ["--init", "2000-06-01T00", "2000-06-02T00"]
    words = [str(run_dir), *inits, "--members", "4", "--lead-h", "48", *FAST]
    call(monkeypatch, *words, "--out", tmp_path / "whole.zarr")
    out = tmp_path / "killed.zarr"
    command = [sys.executable, "-m", "aeris.forecast", *words, "--out", str(out)]
    progress = tmp_path / "killed.zarr.partial" / "progress.json"

    def steps() -> int:
        return int(read_progress(progress.parent)[1].sum()) if progress.exists() else 0

    process = subprocess.Popen(command, cwd=Path(forecast.__file__).parents[1], stdout=subprocess.DEVNULL)
    while process.poll() is None:
        if steps() >= 6:
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.005)
    assert process.wait(60) == -signal.SIGKILL
    assert not out.exists()
    assert 6 <= steps() < 64
    call(monkeypatch, *words, "--out", out)
    np.testing.assert_array_equal(everything(out), everything(tmp_path / "whole.zarr"))


def test_help_describes_every_option(capsys) -> None:
    with pytest.raises(SystemExit):
        forecast.parse(["--help"])
    printed = capsys.readouterr().out.replace("-", "_")
    for field in dataclasses.fields(forecast.Arguments):
        assert field.name in printed.lower()
