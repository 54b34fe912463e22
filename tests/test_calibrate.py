"""Calibration: the search on scores made up for it, and the program on a tiny untrained run."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from aeris import calibrate
from aeris import config as configs
from aeris.calibration import calibrated
from aeris.calibration.sweep import Search, Settings, crps_change, most_trials, read_sweep
from aeris.config import DiffusionConfig, ModelConfig, RunConfig
from aeris.data.store import Store, packaged_sample
from aeris.diffusion.sampler import SamplerConfig
from aeris.forecasting.perturbation import PerturbationConfig
from aeris.model.initialise import initialise
from aeris.parallelize import build_model, make_layout
from aeris.restore import channel_counts
from aeris.scores.metrics import EnsembleScores
from swipe import checkpoint

BASE = Settings(SamplerConfig(), PerturbationConfig())
DIFFUSION = DiffusionConfig(sigma_min=0.05, sigma_max=100.0)
INITS, LEADS, CHANNELS, MEMBERS = 12, 2, 3, 8


def toy(changes: dict[str, float], noise: float = 1.0) -> np.ndarray:
    """Score ensembles whose truth is N(0, 1) given the forecast and whose spread is 0.6, widened by changes.

    A change of `levels` adds a bias, which worsens CRPS.
    """
    spread = 0.6 + 0.03 * changes.get("churn", 0) + 2 * (changes.get("initial_scale", 1) - 1)
    spread += changes.get("perturb", 0)
    random = np.random.default_rng(0)
    sums = []
    for _ in range(INITS):
        scores = EnsembleScores(LEADS, MEMBERS, np.ones(20), np.ones((CHANNELS, 20, 30), bool))
        for lead in range(LEADS):
            y = random.standard_normal((CHANNELS, 20, 30)) * noise
            x = spread * random.standard_normal((MEMBERS, CHANNELS, 20, 30)) + 0.8 * (
                changes.get("levels", 19) != 19
            )
            scores.add(lead, x.astype(np.float32), y.astype(np.float32))
        sums.append(scores.state()["sums"][:, :, 0])
    return np.array(sums)


def test_the_search_moves_spread_to_error_and_improves_crps() -> None:
    search = Search(toy, MEMBERS)
    factors = {"churn": (2.5, 5.0), "initial_scale": (1.05, 1.1), "perturb": (0.1,)}
    best = search.run(factors, churn=0.0)
    base = search.trials[0]
    assert base.distance == pytest.approx(0.4, abs=0.03)
    assert best.changes == {"initial_scale": 1.1, "churn": 5.0, "perturb": 0.1}
    assert best.distance < 0.1 and best.worse < -0.02 and best.allowed
    assert len(search.trials) <= most_trials(factors, 0.0) == 8


def test_a_wider_ensemble_with_worse_crps_is_not_chosen() -> None:
    search = Search(
        lambda changes: toy(changes) if "levels" not in changes else toy({**changes, "perturb": 0.4}), 8
    )
    best = search.run({"levels": (9.0,), "churn": (2.5,)}, churn=0.0)
    wide = search.trials[1]
    assert wide.changes == {"levels": 9.0} and wide.distance < search.trials[2].distance
    assert not wide.allowed and wide.worse > wide.error > 0
    assert best.changes == {"churn": 2.5}


def test_settings_that_blow_up_are_left_out_and_said_unless_they_are_the_baseline() -> None:
    search = Search(lambda changes: "z500 is nan" if "churn" in changes else toy(changes), MEMBERS)
    best = search.run({"churn": (2.5, 5.0), "perturb": (0.1,)}, churn=0.0)
    assert best.changes == {"perturb": 0.1}
    assert [trial.failed for trial in search.trials] == ["", "z500 is nan", "z500 is nan", ""]
    assert calibrate.record(search.trials[1])["failed"] == "z500 is nan"
    with pytest.raises(ValueError, match="z500 is nan"):
        Search(lambda changes: "z500 is nan", MEMBERS).run({}, 0.0)


def test_noise_of_churn_is_tried_only_with_churn() -> None:
    search = Search(toy, MEMBERS)
    search.run({"churn_noise": (1.05,), "churn": (5.0,)}, churn=0.0)
    assert [trial.changes for trial in search.trials] == [
        {},
        {"churn": 5.0},
        {"churn": 5.0, "churn_noise": 1.05},
    ]


def test_change_of_crps_is_relative_paired_and_has_an_error() -> None:
    base = toy({})
    again = base.copy()
    again[..., 3] *= 1.02  # the CRPS
    mean, error = crps_change(again, base, MEMBERS)
    assert mean == pytest.approx(0.02, rel=1e-3) and 0 < error < 1e-3
    assert crps_change(base, base, MEMBERS) == (0.0, 0.0)
    assert crps_change(again[:2], base[:2], MEMBERS)[1] == 0.0  # too few to tell: none is allowed


def test_a_sweep_is_read_and_stays_inside_training() -> None:
    words = ["churn=0,2.5,5", "perturb=0,0.2", "levels=19,9"]
    assert read_sweep(words, BASE, DIFFUSION) == {"churn": (2.5, 5.0), "perturb": (0.2,), "levels": (9.0,)}
    default = read_sweep([], BASE, DIFFUSION)
    assert default["sigma_max"] == (25.0,) and default["churn_noise"] == (1.05,)
    assert default["perturb"] == (0.1, 0.2) and default["initial_scale"] == (1.05, 1.1)
    for word, said in [
        ("churn", "write a factor and its values"),
        ("solver=heun", "factors are churn"),
        ("churn=a,b", "no numbers"),
        ("sigma_max=500", "trained from 0.05 to 100 only"),
        ("churn=-1", "must be 0 or more"),
    ]:
        with pytest.raises(ValueError, match=said):
            read_sweep([word], BASE, DIFFUSION)


def test_changes_give_settings() -> None:
    changed = BASE.changed({"churn": 2.5, "perturb": 0.2, "levels": 9.0})
    assert changed.sampler == SamplerConfig(churn=2.5, levels=9) and changed.value("perturb") == 0.2
    assert changed.perturb == PerturbationConfig(kind="noise", amplitude=0.2)
    assert changed.changed({"perturb": 0.0}).perturb == PerturbationConfig()
    bred = Settings(SamplerConfig(), PerturbationConfig(kind="bred"))
    assert bred.changed({"perturb": 0.3}).perturb == PerturbationConfig(kind="bred", amplitude=0.3)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose random weights make small residuals."""
    run = tmp_path_factory.mktemp("run") / "tiny"
    model = ModelConfig(layers=2, width=16, heads=2, hidden=16, init="spike-no-more", precision="fp32")
    store = Store(packaged_sample())
    network = build_model(model, *channel_counts(len(store.names)), make_layout(model), "cpu")
    initialise(network, 1)
    with torch.no_grad():
        network.head.out.weight.normal_(0.0, 0.02, generator=torch.Generator().manual_seed(1))
    tensors = {
        f"{kind}.{name}": p.detach() for name, p in network.named_parameters() for kind in ("model", "ema")
    }
    meta = {"images_seen": 100, "channels": list(store.names), "fingerprint": store.fingerprint}
    checkpoint.Checkpoints(run / "checkpoints", keep=3, asynchronous=False).save(100, tensors, meta)
    configs.save(RunConfig(model=model, diffusion=DIFFUSION), run / "config.json")
    return run


@pytest.fixture(scope="module")
def inits() -> tuple[str, ...]:
    store = Store(packaged_sample())
    first = store.statistics.train_period[1] + np.timedelta64(6, "h")
    return tuple(str(first + np.timedelta64(24 * day, "h")) for day in range(2))


def call(monkeypatch: pytest.MonkeyPatch, *words: object) -> None:
    monkeypatch.setattr("sys.argv", ["calibrate", *map(str, words)])
    calibrate.main()


def words(run_dir: Path, inits: tuple[str, ...], *more: object) -> list[object]:
    small = ("--members", 3, "--lead-h", 12, "--sampler.levels", 2, "--batch", 2)
    return [run_dir, "--init", *inits, *small, "--sweep", "churn=0,2.5", "perturb=0,0.5", *more]


def test_the_program_chooses_writes_and_goes_on(
    run_dir: Path, inits: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(calibrated.CalibrationError, match="is not calibrated: python -m aeris.calibrate"):
        calibrated.read(run_dir)
    call(monkeypatch, *words(run_dir, inits))
    said = capsys.readouterr().out
    assert "trials at most: 4" in said and "chosen" in said and "--calibrated" in said
    values = json.loads((run_dir / "calibration.json").read_text())
    assert len(values["trials"]) in (3, 4) and values["members"] == 3 and values["lead_h"] == [6, 12]
    sampler, perturbation = calibrated.read(run_dir)
    best = min((one for one in values["trials"] if one["allowed"]), key=lambda one: one["distance"])
    chosen = dataclasses.replace(SamplerConfig(levels=2), churn=best["changes"].get("churn", 0.0))
    assert sampler == chosen
    assert (perturbation.kind == "noise") == ("perturb" in best["changes"])
    assert (run_dir / "calibration.png").stat().st_size > 10_000

    def never(*_: object) -> None:
        raise AssertionError("the network was asked again")

    before = (run_dir / "calibration.json").read_text()
    monkeypatch.setattr("aeris.calibration.trials.ahead", never)
    call(monkeypatch, *words(run_dir, inits))
    assert (run_dir / "calibration.json").read_text() == before
    for path in (run_dir / "calibration").glob("*.json"):
        path.write_text(path.read_text()[:50])
    with pytest.raises(AssertionError):
        call(monkeypatch, *words(run_dir, inits))


def test_the_trial_is_the_forecast_and_its_scores(
    run_dir: Path, inits: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from aeris import forecast
    from aeris.data.forecasts import open_forecast
    from aeris.data.variables import latitude_weights
    from aeris.scores.metrics import scores_of

    task = calibrate.prepare(
        calibrate.parse([*map(str, words(run_dir, inits, "--channels", "t850", "z500"))])
    )
    changes = {"churn": 2.5, "perturb": 0.5}
    sums = task.trials.run(task.base.changed(changes))
    found = scores_of(sums.mean(axis=0), 3)
    out = tmp_path / "f.zarr"
    same = (
        "--sampler.levels",
        2,
        "--sampler.churn",
        2.5,
        "--perturb.kind",
        "noise",
        "--perturb.amplitude",
        0.5,
    )
    asked = (run_dir, "--init", *inits, "--members", 3, "--lead-h", 12, "--batch", 2, "--out", out, *same)
    monkeypatch.setattr("sys.argv", ["forecast", *map(str, asked)])
    forecast.main()
    store, ensemble = Store(packaged_sample()), open_forecast(out)
    places = [store.names.index(name) for name in ("t850", "z500")]
    scores = EnsembleScores(2, 3, latitude_weights(store.latitude_deg), store.mask_CYX[places])
    for i, init in enumerate(ensemble.inits):
        for j, hours in enumerate(ensemble.lead_h):
            truth = store.read(store.index_of(init + np.timedelta64(int(hours), "h")))
            scores.add(j, ensemble.read(i, j)[:, places], truth[places])
    for name in ("crps", "ssr", "rmse"):
        np.testing.assert_allclose(found[name], scores.result()[name], rtol=1e-5)


def test_what_cannot_be_is_said_before_anything_is_computed(
    run_dir: Path, inits: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    train = str(Store(packaged_sample()).statistics.train_period[1])
    for more, said in [
        (("--init", train), "touches the training period"),
        (("--members", 1), "must be 2 or more to have a spread"),
        (("--channels", "t1000"), "--channels t1000: the run has"),
        (("--lead-h", 7), "no multiple of the model's 6 h"),
        (("--target-ssr", 0), "must be positive"),
        (("--sweep", "sigma_max=500"), "trained from 0.05 to 100 only"),
        (("--init", "2000-06-09T18"), "has no time 2000-06-09T18"),
        (("--json",), "--json goes with --dry-run"),
    ]:
        with pytest.raises(ValueError, match=said):
            call(monkeypatch, *words(run_dir, inits, *more))


def test_a_calibration_belongs_to_its_weights(run_dir: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "checkpoints" / (run_dir / "checkpoints").iterdir().__next__().name).symlink_to(
        next((run_dir / "checkpoints").iterdir()), target_is_directory=True
    )
    name = calibrated.checkpoint_name(run, "")
    settings = (SamplerConfig(churn=2.5), PerturbationConfig(kind="noise", channels=("t850",)))
    calibrated.write(run, *settings, {"checkpoint": name, "weights": "ema"})
    assert calibrated.read(run) == calibrated.read(run, "100") == settings
    with pytest.raises(calibrated.CalibrationError, match="made with the ema weights .* not the raw weights"):
        calibrated.read(run, weights="raw")
    for damage in ("{", "[]", '{"version": 2}', '{"version": 1}'):
        (run / "calibration.json").write_text(damage)
        with pytest.raises(calibrated.CalibrationError, match="cannot be read .* make it anew"):
            calibrated.read(run)
