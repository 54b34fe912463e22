"""Two forecasts are compared point by point: equal ones differ by nothing, others by what was added."""

import csv
import dataclasses
import subprocess
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
from aeris.aurora.training import errors, official
from aeris.aurora.training.made_up import made_up_batch
from aeris.aurora.training.sequences import first_batch
from aeris.aurora.training.sources import open_weather
from aeris.aurora.training.validation import as_csv, check, difference_table
from aeris.aurora.variants import VARIANTS
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
    made = program.ValidateConfig(str(checkpoint), f"b={checkpoint}", data=(str(weather),), time=TIME)
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
    assert apart.normalised[place] == pytest.approx(found.worst)
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


@pytest.mark.parametrize("suffix", [".nc", ".zarr"])
def test_a_model_equals_its_own_predictions_in_a_file(config, model, weather, suffix, tmp_path):
    batch = first_batch(open_weather(weather, model.config), TIME)
    path = tmp_path / f"made{suffix}"
    with torch.inference_mode():
        to_cf(rollout(model, batch, 3), path, batch.metadata.time)
    config = dataclasses.replace(config, b=str(path), lead_h=(6, 18))
    assert [found.worst for found in program.run(config)] == [0, 0]
    both = dataclasses.replace(config, a=f"a={path}", data=())
    assert [found.worst for found in program.run(both)] == [0, 0]
    with pytest.raises(ValueError, match="24 h ahead; it has 6, 12, 18"):
        program.run(dataclasses.replace(config, lead_h=(24,)))
    with pytest.raises(ValueError, match="no prediction from 2020-01-02 00:00:00; it has 1 starts"):
        program.run(dataclasses.replace(config, time="2020-01-02T00"))
    with pytest.raises(ValueError, match="needs the data they start from: --data"):
        program.run(dataclasses.replace(config, data=()))


def test_one_batch_in_a_file_is_a_prediction_too(config, model, weather, tmp_path):
    batch = first_batch(open_weather(weather, model.config), TIME)
    with torch.inference_mode():
        made = model(batch)
    made.to_netcdf(tmp_path / "made.nc")
    config = dataclasses.replace(config, b=str(tmp_path / "made.nc"))
    assert program.run(config)[0].worst == 0
    with pytest.raises(ValueError, match="valid at 2020-01-02 12:00:00, not at 2020-01-02 18:00:00"):
        program.run(dataclasses.replace(config, lead_h=(12,)))


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


def test_the_official_package_is_asked_for_by_name(config, checkpoint, monkeypatch):
    monkeypatch.setitem(sys.modules, "aurora", None)
    with pytest.raises(ValueError, match="pip install microsoft-aurora"):
        program.Job(dataclasses.replace(config, b=f"official:{checkpoint}"))


def test_the_official_package_gets_its_own_batches_with_the_zone_of_times(
    config, checkpoint, model, monkeypatch
):
    """A stand-in for the package checks how it is called; parity itself is tested in test_golden.py."""
    zones = []

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


def test_the_command_draws_maps_and_fails_above_its_tolerance(checkpoint, model, tmp_path):
    pytest.importorskip("matplotlib")
    other = tmp_path / "other.ckpt"
    torch.save({name: 1.001 * x for name, x in model.state_dict().items()}, other)
    words = [str(checkpoint), str(other), "--grid", "16", "32", "--out", str(tmp_path / "out")]
    run = [sys.executable, "-m", "aeris.aurora.validate", *words, "--tolerance", "1e-6"]
    done = subprocess.run(run, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert "above the tolerance 1e-06" in done.stdout
    assert (tmp_path / "out" / "maps_6h.png").stat().st_size > 10_000
    assert (tmp_path / "out" / "differences.csv").exists()


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
