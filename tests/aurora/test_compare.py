"""Scores equal plain sums, forecasters are what their words say, and the program does what it says."""

import csv
import dataclasses
import json
import sys
from datetime import datetime

import numpy as np
import pytest
import torch

from aeris.aurora import compare as program
from aeris.aurora import finetune
from aeris.aurora.batch import Batch, Metadata
from aeris.aurora.config import AuroraConfig
from aeris.aurora.training import errors, predictors
from aeris.aurora.training.comparison import compare
from aeris.aurora.training.comparison_report import (
    as_csv,
    as_json,
    channel_table,
    headline_table,
    print_tables,
)
from aeris.aurora.training.conditions import read_time, require_same_input, steps_of
from aeris.aurora.training.predictors import Persistence
from aeris.aurora.variants import VARIANTS
from aeris.log import console
from tests.aurora.tiny_runs import LEVELS, small, write, write_pair, write_weights

ROWS, COLS = 9, 16
HOURS = np.timedelta64(6, "h")


def batch(time: datetime, value: float, history: int = 1, rows: int = ROWS) -> Batch:
    numbers = np.random.default_rng(int(value * 10))

    def field(*shape):
        return torch.from_numpy(numbers.standard_normal((1, history, *shape, rows, COLS))).float() + value

    lat, lon = torch.linspace(90, -90, ROWS).double()[:rows], torch.arange(COLS).double() * 360 / COLS
    land = torch.rand(rows, COLS)
    where = Metadata(lat, lon, (time,), (500, 850))
    return Batch({"2t": field(), "msl": field()}, {"lsm": land}, {"z": field(2)}, where)


@dataclasses.dataclass(frozen=True)
class Sample:
    """A start and what follows."""

    input: Batch
    targets: tuple[Batch, ...]


def samples(count: int = 4, steps: int = 3) -> list[Sample]:
    start = np.datetime64("2022-01-01T06", "s")
    times = [(start + n * HOURS).item() for n in range(count + steps)]
    return [
        Sample(batch(times[i], i, history=2), tuple(batch(times[i + k], i + k) for k in range(1, steps + 1)))
        for i in range(count)
    ]


class Fake:
    """Knows the truth and adds something to it."""

    config, timestep_h = None, 6.0

    def __init__(self, name, wrong, rows=ROWS):
        self.name, self.made_from, self.wrong, self.rows = name, f"made of {name}", wrong, rows

    def forecast(self, start, lead_h):
        sample = next(one for one in samples() if one.input.metadata.time == start.metadata.time)
        for hours in lead_h:
            truth = errors.fields_of(sample.targets[hours // 6 - 1]).rows(
                np.linspace(90, -90, ROWS)[: self.rows]
            )
            yield dataclasses.replace(truth, values_CYX=truth.values_CYX + np.float32(self.wrong))


def made(*forecasters, **options):
    return compare(
        forecasters or (Fake("a", 2.0), Fake("b", -1.0), Persistence()), samples, (6, 18), **options
    )


def test_errors_equal_plain_sums():
    numbers = np.random.default_rng(0)
    one, other = numbers.standard_normal((2, 3, ROWS, COLS))
    one[0, 2, 3:6] = np.nan
    other[2] = np.nan
    latitude = np.linspace(80, -80, ROWS)
    found = errors.errors(one, other, errors.area_weights(latitude))
    for place in range(2):
        total = weight = np.zeros(3)
        for row in range(ROWS):
            for col in range(COLS):
                apart = one[place, row, col] - other[place, row, col]
                if np.isfinite(apart):
                    share = np.cos(np.deg2rad(latitude[row]))
                    total = total + share * np.array([apart**2, abs(apart), apart])
                    weight = weight + share
        expected = total / weight
        np.testing.assert_allclose(
            [found.mse[place], found.mae[place], found.bias[place]], expected, rtol=1e-12
        )
    assert np.isnan([found.mse[2], found.mae[2], found.bias[2]]).all()


def test_area_weights_of_points_are_those_of_rows():
    latitude = np.linspace(60, -30, ROWS)
    points = np.repeat(latitude[:, None], COLS, axis=1)
    np.testing.assert_allclose(errors.area_weights(points)[:, :1], errors.area_weights(latitude))
    with pytest.raises(ValueError, match="choose cos"):
        errors.area_weights(points, "cell")
    for one in (latitude, points):
        found = errors.area_weights(torch.from_numpy(one))
        assert torch.equal(found, torch.from_numpy(errors.area_weights(one)))


def test_fields_of_a_batch():
    found = errors.fields_of(batch(datetime(2022, 1, 1, 6), 3.0, history=2))
    assert found.names == ("2t", "msl", "z500", "z850")
    assert found.values_CYX.shape == (4, ROWS, COLS)
    assert found.time == np.datetime64("2022-01-01T06")
    assert [errors.variable_name(one) for one in found.channels] == ["2t", "msl", "z", "z"]
    assert errors.variable_name(errors.channel("so2", 850.0)) == "so2"
    assert (
        errors.fields_of(batch(datetime(2022, 1, 1), 1.0).type(torch.bfloat16)).values_CYX.dtype == np.float32
    )


def test_only_common_channels_and_rows_of_one_time_and_grid_are_compared():
    whole = errors.fields_of(batch(datetime(2022, 1, 1), 1.0))
    less = errors.fields_of(batch(datetime(2022, 1, 1), 1.0, rows=ROWS - 1)).select(["z850", "2t"])
    a, b = errors.matched(whole, less)
    assert a.names == b.names == ("2t", "z850")
    assert a.values_CYX.shape == b.values_CYX.shape == (2, ROWS - 1, COLS)
    later = dataclasses.replace(whole, time=whole.time + HOURS)
    with pytest.raises(ValueError, match="different times"):
        errors.matched(whole, later)
    moved = dataclasses.replace(whole, latitude_deg=whole.latitude_deg + 1)
    with pytest.raises(ValueError, match="different grids: 9 rows of latitude from 90 to -90"):
        errors.matched(whole, moved)
    east = dataclasses.replace(whole, longitude_deg=whole.longitude_deg + 1)
    with pytest.raises(ValueError, match="longitudes from 0 to 337.5 and 1 to 338.5"):
        errors.matched(whole, east)
    with pytest.raises(ValueError, match="no variable in common"):
        errors.matched(whole.select(["2t"]), less.select(["z850"]))


def test_a_comparison_equals_plain_means():
    result, case = made()
    assert result.names == ("a", "b", "persistence")
    assert result.mse_NIJC.shape == (3, 4, 2, 4)
    np.testing.assert_allclose(
        result.rmse()[:2], np.stack([np.full((2, 4), 2.0), np.full((2, 4), 1.0)]), rtol=1e-5
    )
    np.testing.assert_allclose(result.bias()[:2, 0, 0], [2, -1], rtol=1e-5)
    np.testing.assert_allclose(result.mean_ratio()[1], 0.5, rtol=1e-5)
    assert (result.wins()[1] == 1).all()
    start, target = samples()[2].input, samples()[2].targets[2]
    apart = (start.surf_vars["msl"][0, -1] - target.surf_vars["msl"][0, 0]).double().numpy()
    weights = np.cos(np.deg2rad(np.linspace(90, -90, ROWS)))[:, None]
    expected = (weights * apart**2).sum() / weights.sum() / COLS
    np.testing.assert_allclose(result.mse_NIJC[2, 2, 1, 1], expected, rtol=1e-6)
    assert str(case.init) == "2022-01-01T06:00:00"
    assert set(case.forecasts) == {"a", "b", "persistence"}
    assert case.land_YX is not None


def test_a_model_that_drops_a_row_and_another_start_for_the_maps():
    init = np.datetime64("2022-01-01T18", "s")
    result, case = made(Fake("a", 2.0), Fake("b", 1.0, rows=ROWS - 1), case_init=init)
    np.testing.assert_allclose(result.mean_ratio()[1], 0.5, rtol=1e-5)
    assert case.init == init
    assert case.forecasts["b"][6].values_CYX.shape[1] == ROWS - 1


def test_what_a_comparison_refuses():
    with pytest.raises(ValueError, match="no start at 2000-01-01"):
        made(case_init=np.datetime64("2000-01-01T00", "s"))
    with pytest.raises(ValueError, match="no start has all"):
        compare([Fake("a", 1.0)], list, (6,))
    with pytest.raises(ValueError, match="two forecasters are called 'a'"):
        made(Fake("a", 1.0), Fake("a", 2.0))
    slow = Fake("slow", 1.0)
    slow.timestep_h = 12.0
    with pytest.raises(ValueError, match="slow makes steps of 12 h, others of 6 h"):
        made(Fake("a", 1.0), slow)
    with pytest.raises(ValueError, match="7 h is no multiple of the model's step, 6 h"):
        steps_of([6, 7], 6.0)


def test_models_that_start_from_different_things_are_not_compared():
    def refusal(**changes):
        with pytest.raises(ValueError, match="a and b do not start from the same input") as found:
            require_same_input({"a": AuroraConfig(), "file": None, "b": AuroraConfig().changed(**changes)})
        return str(found.value)

    require_same_input({"a": AuroraConfig(), "b": AuroraConfig(surf_vars=("msl", "2t", "10u", "10v"))})
    assert "a history of 2 (a) and 3 (b)" in refusal(max_history_size=3)
    assert "a step in hours of 6 (a) and 12 (b)" in refusal(timestep_h=12.0)
    assert "the surface variables 10v msl (only a), tcc (only b)" in refusal(surf_vars=("2t", "10u", "tcc"))
    assert "the static variables slt (only a)" in refusal(static_vars=("lsm", "z"))
    assert "the variables on levels w (only b)" in refusal(atmos_vars=("z", "u", "v", "t", "q", "w"))
    assert "levels (hPa) of its own, 500 (only b)" in refusal(level_condition=(500,))
    one, other = Fake("a", 1.0), Fake("b", 1.0)
    one.config, other.config = AuroraConfig(), AuroraConfig(static_vars=("lsm",))
    with pytest.raises(ValueError, match=r"the static variables z slt \(only a\)"):
        made(one, other)


def test_times_of_a_command_line():
    assert read_time("--time", "2022-01-01T06") == np.datetime64("2022-01-01T06")
    for text in ("soon", "2022-13-01", "NaT"):
        with pytest.raises(ValueError, match=f"--case-init {text} is no time; write it as 2022-01-01T06"):
            read_time("--case-init", text)


@pytest.mark.parametrize("level_hpa", [5.0, 10.0, 850.0, 0.5])
@pytest.mark.parametrize("name", ["z", "t", "u", "so2", "co"])
def test_names_of_channels_are_split_as_they_were_made(name, level_hpa):
    assert errors.split_name(errors.channel(name, level_hpa).name) == (name, level_hpa)


def test_surface_variables_may_end_in_a_number():
    for name in ("2t", "10u", "msl", "pm10", "pm1", "pm2p5", "swh1", "mwd2", "swvl1", "tcno2", "tp_1h", "x7"):
        assert errors.split_name(name) == (name, None)


def test_reports_hold_the_numbers():
    result, _ = made()
    rows = list(csv.DictReader(as_csv(result).splitlines()))
    found = [r for r in rows if (r["configuration"], r["variable"], r["level_hpa"]) == ("b", "z", "850")]
    values = {(r["lead_h"], r["metric"]): float(r["value"]) for r in found}
    assert values["18", "rmse"] == pytest.approx(1, rel=1e-5)
    assert values["6", "mae"] == pytest.approx(1, rel=1e-5)
    assert values["6", "rmse_ratio"] == pytest.approx(0.5, rel=1e-5)
    plain = json.loads(json.dumps(as_json(result), allow_nan=False))
    assert plain["share_better"]["b"] == [1.0, 1.0]
    assert plain["scores"]["rmse"]["a"]["2t"] == pytest.approx([2, 2], rel=1e-5)
    assert headline_table(result).row_count == 3
    assert channel_table(result, 1).row_count == 4
    with console.capture() as shown:
        print_tables(result, console)
    assert "area weights cos(latitude)" in shown.get()


@pytest.mark.parametrize(
    ("word", "label", "what"),
    [
        ("one-step=runs/one", "one-step", "runs/one"),
        ("runs/lr1.5/", "lr1.5", "runs/lr1.5/"),
        ("a/small.ckpt", "small", "a/small.ckpt"),
        ("official:a/small.ckpt", "official small", "official:a/small.ckpt"),
        ("hub:v1.5", "v1.5", "hub:v1.5"),
        ("runs/a=b", "a=b", "runs/a=b"),
    ],
)
def test_labels(word, label, what):
    assert predictors.label_of(word) == (label, what)


def test_words_are_checked_before_any_work(tmp_path):
    with pytest.raises(ValueError, match="nowhere does not exist; a forecaster is a checkpoint file"):
        predictors.check(["nowhere"])
    with pytest.raises(ValueError, match="no model is called 'huge': choose one of aurora"):
        predictors.check(["hub:huge"])
    with pytest.raises(ValueError, match="two forecasters are called 'small'"):
        predictors.check(["hub:small", "small=persistence"])
    predictors.check(["hub:small", "x=persistence", str(tmp_path)])
    with pytest.raises(ValueError, match="is no run of aeris.aurora.finetune"):
        predictors.open_predictor(str(tmp_path))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Two checkpoints of the tiny model, of which no block is the identity."""
    torch.manual_seed(0)
    model = VARIANTS["tiny"]()
    paths = [tmp_path_factory.mktemp("weights") / f"{name}.ckpt" for name in ("first", "second")]
    for path, size in zip(paths, (2e-2, 1e-3)):
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(size * torch.randn_like(weight))
        torch.save(model.state_dict(), path)
    return paths


def test_the_program(checkpoints, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    data = write(tmp_path / "weather.nc", count=8, missing=True)
    words = [f"original={checkpoints[0]}", f"tuned={checkpoints[1]}", "--data", str(data), "--starts", "2"]
    words += ["--out", str(tmp_path / "out"), "--leads", "12", "--case-channels", "2t", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["compare", *words])
    program.main()
    assert "RMSE / RMSE of original" in capsys.readouterr().out
    rows = list(csv.DictReader((tmp_path / "out" / "scores.csv").read_text().splitlines()))
    assert {r["configuration"] for r in rows} == {"original", "tuned", "persistence"}
    assert {r["level_hpa"] for r in rows} == {"", *map(str, LEVELS)}
    assert {r["lead_h"] for r in rows} == {"12"}
    pictures = {path.name for path in (tmp_path / "out" / "plots").iterdir()}
    assert pictures == {"scores.png", "card.png", "errors_12h.png", "forecasts_12h.png"}
    kept = np.load(tmp_path / "out" / "errors.npz")
    assert kept["mse"].shape == (3, 2, 1, 4 + 5 * len(LEVELS))
    assert np.isfinite(kept["mse"]).all()


def test_a_model_scores_what_it_scores_by_hand(checkpoints, tmp_path):
    data = write(tmp_path / "weather.nc", count=5)
    config = program.CompareConfig(f"a={checkpoints[0]}", (), (str(data),), leads=(6,), plots=False)
    job = program.Job(dataclasses.replace(config, out=str(tmp_path), device="cpu", persistence=False))
    result, _ = job.run()
    assert len(result.inits) == 3
    model = VARIANTS["tiny"]()
    model.load_checkpoint_local(checkpoints[0])
    sample = job.sequences[1]
    with torch.inference_mode():
        made = model(sample.input).surf_vars["2t"][0, 0]
    apart = (made - sample.targets[0].surf_vars["2t"][0, 0, :-1]).double()
    weights = torch.cos(torch.deg2rad(sample.input.metadata.lat[:-1]))[:, None].expand_as(apart)
    expected = (weights * apart**2).sum() / weights.sum()
    np.testing.assert_allclose(result.mse_NIJC[0, 1, 0, 0], expected.item(), rtol=1e-5)


def test_a_start_of_the_maps_that_is_none_is_refused(checkpoints, tmp_path):
    data = write(tmp_path / "weather.nc", count=5)
    config = program.CompareConfig(f"a={checkpoints[0]}", (), (str(data),), leads=(6,), plots=False)
    with pytest.raises(ValueError, match="--case-init soon is no time"):
        program.Job(dataclasses.replace(config, case_init="soon"))
    with pytest.raises(ValueError, match="--case-init 2000-01-01 is none of the 3 starts used, 2020"):
        program.Job(dataclasses.replace(config, case_init="2000-01-01"))
    with pytest.raises(ValueError, match=r"the static variables slt \(only small\)"):
        program.Job(dataclasses.replace(config, others=("hub:small",)))


def test_a_run_is_a_forecaster(tmp_path):
    weather = write_pair(tmp_path)
    with pytest.raises(ValueError, match="is no run of aeris.aurora.finetune"):
        predictors.open_predictor(str(tmp_path))
    start = str(write_weights(tmp_path / "start.ckpt"))
    config = small(
        "lora-three-step", weather, 2, weights=start, validate={"every_images": 0}, rollout={"steps": 1}
    )
    trained = finetune.prepare(config, tmp_path / "run", "cpu")
    finetune.train(trained)
    found = predictors.open_predictor(f"{tmp_path}/run/", precision="fp32")
    assert found.name == "run"
    weights = trained.model.state_dict()
    assert any(".lora_" in name for name in weights)
    for name, weight in found.model.state_dict().items():
        assert torch.equal(weight, weights[name]), name


def test_precision_is_that_asked_for(checkpoints):
    word = str(checkpoints[0])
    assert not predictors.open_predictor(word).config.autocast
    assert predictors.open_predictor(word, precision="bf16").config.autocast
    assert next(predictors.open_predictor(word, precision="fp64").model.parameters()).dtype == torch.float64
    with pytest.raises(ValueError, match="fp32 or fp64, not bf16"):
        predictors.open_predictor(f"official:{word}", precision="bf16")


def test_the_program_refuses_several_ranks(monkeypatch):
    for name, value in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(ValueError, match="one process, not on 2 ranks"):
        program.main()
