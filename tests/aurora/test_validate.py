"""Two forecasts are compared point by point: equal ones differ by nothing, others by what was added."""

import csv
import dataclasses
import sys
from datetime import datetime
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from aeris.aurora import validate as program
from aeris.aurora.batch import Batch
from aeris.aurora.batch_files import to_cf
from aeris.aurora.config import AuroraConfig
from aeris.aurora.rollout import rollout
from aeris.aurora.training import errors, official, predictors
from aeris.aurora.training.made_up import made_up_batch
from aeris.aurora.training.pointwise import as_csv, check, difference_table
from aeris.aurora.training.sequences import first_batch
from aeris.aurora.training.sources import open_weather
from aeris.aurora.variants import VARIANTS
from aeris.data.variables import Channel
from aeris.log import console
from tests.aurora.tiny_runs import write

TIME = "2020-01-02T06"


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    made = VARIANTS["tiny"]().eval()
    with torch.no_grad():
        for weight in made.parameters():
            weight.add_(2e-2 * torch.randn_like(weight))
    return made


@pytest.fixture(scope="module")
def checkpoint(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "tiny.ckpt"
    torch.save(model.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def weather(tmp_path_factory):
    return write(tmp_path_factory.mktemp("data") / "weather.nc", count=10)


@pytest.fixture
def config(checkpoint, weather, tmp_path):
    made = program.CheckConfig(str(checkpoint), f"b={checkpoint}", data=(str(weather),), time=TIME)
    return dataclasses.replace(made, out=str(tmp_path / "out"), device="cpu", plots=False)


def made_up_fields(config=AuroraConfig(static_vars=("lsm",)), seed=0):  # noqa: B008
    return errors.fields_of(made_up_batch(config, 9, 16, datetime(2022, 1, 1), seed))


def test_a_difference_is_found_where_it_is():
    b = made_up_fields()
    a = dataclasses.replace(b, values_CYX=b.values_CYX.copy())
    place = a.names.index("z500")
    a.values_CYX[place, 2, 5] += 1000
    a.values_CYX[place, 2, 6] += 500
    a.values_CYX[0, 1, 1] = np.nan
    found = check(6, a, b, b, None)
    apart = found.difference
    assert apart.largest[place] == pytest.approx(1000, rel=1e-4)
    assert apart.mean[place] == pytest.approx(1500 / (9 * 16), rel=1e-4)
    assert apart.relative[place] == pytest.approx(
        apart.mean[place] / np.abs(b.values_CYX[place]).mean(), rel=1e-4
    )
    assert apart.normalised[place] == np.nanmax(apart.normalised)
    assert found.worst == np.inf
    assert (apart.latitude_deg[place], apart.longitude_deg[place]) == (45.0, 112.5)
    assert apart.missing.tolist() == [1] + [0] * (len(a.channels) - 1)
    assert np.delete(apart.largest, place).max() == 0
    assert found.rmse_b.max() == 0
    assert found.rmse_a[place] > 0
    rows = {
        (r["variable"], r["level_hpa"], r["metric"]): r["value"]
        for r in csv.DictReader(as_csv([found]).splitlines())
    }
    assert float(rows["z", "500", "largest"]) == pytest.approx(1000, rel=1e-4)
    assert float(rows["2t", "", "missing"]) == 1
    assert difference_table(found).row_count == len(a.channels)


def changed(fields, name, values):
    """Return fields with other values of a channel."""
    made = dataclasses.replace(fields, values_CYX=fields.values_CYX.copy())
    made.values_CYX[fields.names.index(name)] = values
    return made


def shown(found):
    with console.capture() as text:
        console.print(difference_table(found), width=80)
    return text.get()


def test_what_is_not_known_is_no_agreement():
    b = made_up_fields()
    assert check(6, b, b, None, None).worst == 0
    assert "missing" not in shown(check(6, b, b, None, None))
    for values in (np.nan, np.inf):
        found = check(6, changed(b, "2t", values), b, None, None)
        assert found.worst == np.inf
        assert found.difference.missing[0] == 9 * 16
        assert "144 missing" in shown(found)
    lost = changed(b, "2t", np.nan)
    assert check(6, lost, lost, None, None).worst == np.inf
    hole = np.where(np.arange(16) < 3, np.nan, b.values_CYX[0])
    assert check(6, changed(b, "2t", hole), changed(b, "2t", hole), None, None).worst == 0
    assert check(6, b, changed(b, "2t", hole), None, None).difference.missing.sum() == 9 * 3
    opposite = check(6, changed(b, "2t", np.inf), changed(b, "2t", -np.inf), None, None)
    assert opposite.difference.missing[0] == 9 * 16


def test_channels_without_statistics_count():
    b = made_up_fields()
    unknown = Channel("mine", "mine", None, "")
    b = dataclasses.replace(b, channels=(unknown, *b.channels[1:]))
    off = b.values_CYX[0].copy()
    off[4, 4] += 2 * off.std()
    found = check(6, changed(b, "mine", off), b, None, None)
    assert found.worst == pytest.approx(2, rel=1e-3)
    flat = changed(b, "mine", 3.0)
    assert check(6, flat, flat, None, None).worst == 0
    assert check(6, changed(b, "mine", 4.0), flat, None, None).worst == np.inf


def test_channels_that_only_one_has_are_named():
    both = made_up_fields()
    found = check(6, both, both.select([*both.names[2:5], *both.names[6:]]), both, None)
    assert found.only_a == (*both.names[:2], both.names[5])
    assert found.not_compared() == f"only A has 2t 10u {both.names[5]}: not compared"
    assert check(6, both.select(["2t"]), both, None, None).not_compared().startswith("only B has 10u ")
    assert check(6, both, both, None, None).not_compared() == ""


def test_statistics_of_a_model_come_before_the_usual_ones():
    b = made_up_fields()
    a = dataclasses.replace(b, values_CYX=b.values_CYX + np.float32(64))
    plain = check(6, a, b, None, AuroraConfig())
    own = check(6, a, b, None, AuroraConfig(surf_stats=(("msl", 1e5, 32.0),)))
    place = a.names.index("msl")
    assert own.difference.normalised[place] == pytest.approx(2)
    assert plain.difference.normalised[place] < 1
    assert np.isnan(plain.rmse_a).all()


def test_made_up_input_is_the_same_again_and_fits_a_model(model):
    one, other, another = (
        made_up_batch(model.config, 17, 32, datetime(2022, 1, 1), seed) for seed in (0, 0, 1)
    )
    assert torch.equal(one.atmos_vars["t"], other.atmos_vars["t"])
    assert not torch.equal(one.atmos_vars["t"], another.atmos_vars["t"])
    assert one.atmos_vars["q"].min() >= 0
    with torch.inference_mode():
        found = model(one)
    assert all(torch.isfinite(x).all() for x in (*found.surf_vars.values(), *found.atmos_vars.values()))


def test_a_model_equals_itself(config):
    (found,) = program.run(config)
    assert found.worst == 0
    assert np.array_equal(found.rmse_a, found.rmse_b)
    assert np.isfinite(found.rmse_a).all()
    assert found.truth is not None


@pytest.fixture(scope="module")
def start(model, weather):
    return first_batch(open_weather(weather, model.config), TIME)


def test_a_model_equals_its_own_predictions_in_a_file(config, model, start, tmp_path):
    paths = [tmp_path / "made.nc", tmp_path / "made.zarr"]
    with torch.inference_mode():
        predictions = list(rollout(model, start, 3))
    for path in paths:
        to_cf(predictions, path, start.metadata.time)
    config = dataclasses.replace(config, b=str(paths[0]), lead_h=(6, 18))
    assert [found.worst for found in program.run(config)] == [0, 0]
    both = dataclasses.replace(config, a=f"a={paths[1]}", data=())
    assert [found.worst for found in program.run(both)] == [0, 0]
    with pytest.raises(ValueError, match="needs the data they start from: --data"):
        program.Job(dataclasses.replace(config, data=()))
    with pytest.raises(ValueError, match="24 h ahead; it has 6, 12, 18"):
        program.run(dataclasses.replace(both, lead_h=(24,)))
    with pytest.raises(ValueError, match="no prediction from 2020-01-02 00:00:00; it has 1 starts"):
        program.run(dataclasses.replace(both, time="2020-01-02T00"))


def fill_with_280(self, batch):
    """Stand in for a model that reads missing values itself."""
    return dataclasses.replace(batch, surf_vars={k: x.nan_to_num(280.0) for k, x in batch.surf_vars.items()})


def test_a_model_that_reads_missing_values_gets_them(model, tmp_path, monkeypatch):
    weather = open_weather(write(tmp_path / "holes.nc", count=3, missing=True), model.config)
    start = first_batch(weather, "2020-01-01T06")
    seen = []

    def look(self, batch):
        seen.append({name for name, x in batch.surf_vars.items() if x.isnan().any()})
        return fill_with_280(self, batch)

    monkeypatch.setattr(VARIANTS["tiny"], "batch_transform_hook", look)
    next(predictors.ModelPredictor("plain", "", model).forecast(start, [6]))
    assert set().union(*seen) == set()
    monkeypatch.setattr(VARIANTS["tiny"], "reads_missing", ("2t",))
    next(predictors.ModelPredictor("reads", "", model).forecast(start, [6]))
    assert set().union(*seen) == {"2t"}


def test_one_batch_in_a_file_is_a_prediction_too(model, start, tmp_path):
    with torch.inference_mode():
        made = model(start)
    made.to_netcdf(tmp_path / "made.nc")
    found = predictors.open_predictor(str(tmp_path / "made.nc"))
    (fields,) = found.forecast(start, [6])
    assert np.array_equal(fields.values_CYX, errors.fields_of(made).values_CYX)
    with pytest.raises(ValueError, match="valid at 2020-01-02 12:00:00, not at 2020-01-02 18:00:00"):
        list(found.forecast(start, [12]))


def test_what_the_program_refuses(config, tmp_path):
    with pytest.raises(
        ValueError, match="needs 2020-01-04T18:00:00, 2020-01-05T00:00:00, which is not there"
    ):
        program.Job(dataclasses.replace(config, time="2020-01-05T00"))
    with pytest.raises(ValueError, match="--time soon is no time"):
        program.Job(dataclasses.replace(config, time="soon"))
    with pytest.raises(ValueError, match="7 h is no multiple"):
        program.Job(dataclasses.replace(config, lead_h=(7,)))
    (tmp_path / "junk.nc").write_bytes(b"junk")
    with pytest.raises(ValueError, match="junk.nc is neither NetCDF nor Zarr"):
        program.Job(dataclasses.replace(config, b=str(tmp_path / "junk.nc")))


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ("hub:small", r"slt \(only small\)"),
        ("hub:12h", r"a step in hours of 6 \(tiny\) and 12 \(12h\); the static variables slt \(only 12h\)"),
        ("hub:air-pollution", r"the surface variables pm1 .*levels \(hPa\) of its own, "),
    ],
)
def test_models_that_start_from_something_else_are_refused_before_they_are_made(config, other, words):
    """Before a download even, and not fed with what the first model reads."""
    with pytest.raises(ValueError, match=words):
        program.Job(dataclasses.replace(config, b=other))


def test_the_settings_of_a_forecaster_are_known_before_it_is_made(config, checkpoint, tmp_path):
    assert predictors.settings_of(config.a) == VARIANTS["tiny"].default
    assert predictors.settings_of(f"x=official:{checkpoint}") == VARIANTS["tiny"].default
    assert predictors.settings_of("hub:v1.5") == VARIANTS["v1.5"].default
    assert predictors.settings_of("persistence") is predictors.settings_of("a=made.nc") is None


def test_the_official_package_is_asked_for_by_name(config, checkpoint, monkeypatch):
    monkeypatch.setitem(sys.modules, "aurora", None)
    with pytest.raises(ValueError, match="pip install microsoft-aurora"):
        program.Job(dataclasses.replace(config, b=f"official:{checkpoint}"))


def test_a_broken_official_package_is_no_missing_one(config, checkpoint, monkeypatch, tmp_path):
    """Without torchvision it works; what else it lacks is named."""
    (tmp_path / "aurora.py").write_text("import torchvision.ops\nimport timm_of_no_kind\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "aurora", raising=False)
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path])
    before = set(sys.modules)
    try:
        with pytest.raises(ValueError, match="is installed, but timm_of_no_kind is not: pip install timm_of"):
            program.Job(dataclasses.replace(config, b=f"official:{checkpoint}"))
    finally:
        for name in set(sys.modules) - before:
            if name.partition(".")[0] == "torchvision":
                del sys.modules[name]


def test_the_official_package_gets_its_own_batches_with_the_zone_of_times(
    config, checkpoint, model, monkeypatch, tmp_path
):
    """A stand-in for the package checks how it is called; parity itself is tested in test_golden.py."""
    zones, missing = [], []

    class Network(torch.nn.Module):
        def __init__(self, **settings):
            super().__init__()
            self.settings = settings

        def load_checkpoint_local(self, path):
            assert path == str(checkpoint)

    class TheirBatch(SimpleNamespace):
        def to(self, device):
            return self

    def their_rollout(network, batch, steps):
        assert network.settings["embed_dim"] == model.config.embed_dim
        zones.append(batch.metadata.time[0].tzinfo)
        missing.extend(name for name, x in batch.surf_vars.items() if x.isnan().any())
        batch.surf_vars = {name: x.nan_to_num(280.0) for name, x in batch.surf_vars.items()}
        for made in rollout(model, official.ours(batch), steps):
            yield official.theirs(made)

    def network(timestep, embed_dim):
        return Network(timestep=timestep, embed_dim=embed_dim)

    package = SimpleNamespace(
        Aurora=network, Batch=TheirBatch, Metadata=SimpleNamespace, rollout=their_rollout
    )
    monkeypatch.setitem(sys.modules, "aurora", package)
    found = program.run(dataclasses.replace(config, b=f"official:{checkpoint}", lead_h=(6, 12)))
    assert [one.worst for one in found] == [0, 0]
    assert str(zones[0]) == "UTC"
    holes = write(tmp_path / "holes.nc", count=3, missing=True)
    start = first_batch(open_weather(holes, model.config), "2020-01-01T06")
    list(predictors.open_predictor(f"official:{checkpoint}").forecast(start, [6]))
    assert missing == []
    monkeypatch.setattr(VARIANTS["tiny"], "reads_missing", ("2t",))
    list(predictors.open_predictor(f"official:{checkpoint}").forecast(start, [6]))
    assert missing == ["2t"]


@pytest.mark.parametrize("wrong", ["factor", "missing"])
def test_the_command_fails_above_its_tolerance(wrong, checkpoint, model, tmp_path, monkeypatch, capsys):
    other, state = tmp_path / "other.ckpt", dict(model.state_dict())
    if wrong == "factor":
        state = {name: 1.001 * x for name, x in state.items()}
    else:
        name = next(name for name in state if "surf_heads.msl" in name and "bias" in name)
        state[name] = state[name] * np.nan
    torch.save(state, other)
    words = [str(other), str(checkpoint), "--grid", "16", "32", "--out", str(tmp_path / "out")]
    words += ["--tolerance", "1e-6" if wrong == "factor" else "10", "--device", "cpu"]
    words += ["--no-plots"]
    monkeypatch.setattr(sys, "argv", ["validate", *words])
    with pytest.raises(SystemExit) as stop:
        program.main()
    assert stop.value.code == 1
    assert "above the tolerance" in capsys.readouterr().out
    assert (tmp_path / "out" / "differences.csv").exists()


def test_the_command_draws_maps_and_succeeds_within_its_tolerance(checkpoint, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    words = [str(checkpoint), f"b={checkpoint}", "--grid", "16", "32", "--out", str(tmp_path)]
    words += ["--channels", "2t"]
    monkeypatch.setattr(sys, "argv", ["validate", *words, "--tolerance", "1e-6", "--device", "cpu"])
    program.main()
    assert "above" not in capsys.readouterr().out
    assert (tmp_path / "maps_6h.png").stat().st_size > 10_000


def test_the_program_refuses_several_ranks(monkeypatch):
    for name, value in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(ValueError, match="one process, not on 2 ranks"):
        program.main()


def test_a_batch_of_the_official_package_and_back():
    batch = made_up_batch(AuroraConfig(static_vars=("lsm",)), 9, 16, datetime(2022, 1, 1))
    with pytest.MonkeyPatch.context() as patch:
        package = SimpleNamespace(Batch=SimpleNamespace, Metadata=SimpleNamespace)
        patch.setitem(sys.modules, "aurora", package)
        again = official.ours(official.theirs(batch))
    assert isinstance(again, Batch)
    assert again.metadata.time == batch.metadata.time
    assert torch.equal(again.atmos_vars["q"], batch.atmos_vars["q"])
    torch.testing.assert_close(again.metadata.lon, batch.metadata.lon)
