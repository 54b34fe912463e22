"""Published weights made a run: converted or left in their files, on any ranks, with their own statistics."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from aeris import published
from aeris.config import ParallelConfig
from aeris.data.forcing import toa_solar_w_m2
from aeris.data.standards import RunStore, read_standards
from aeris.data.store import Store
from aeris.diffusion.sampler import SamplerConfig, for_training
from aeris.forecasting.rollout import Forecaster
from aeris.parallelize import choose_degrees, make_layout, make_network, take_seat
from aeris.restore import check_fingerprint, check_same_run, find_trained, load_network, open_store
from swipe import checkpoint
from tests.data.conftest import make_weather, run_conversion
from tests.harness import run_distributed
from tests.published_files import LEVELS, naive, variables, write_config, write_statistics, write_weights

ROWS, COLS, WINDOW = 12, 24, 6


@dataclasses.dataclass(frozen=True)
class Theirs:
    """What an author would hand over, and a store to forecast from."""

    path: Path
    interval_h: int
    stages: list[dict[str, torch.Tensor]]
    numbers: dict[str, tuple[float, float, float, float]]

    def words(self, run: str, *more: object) -> list[str]:
        files = ("--config", self.path / "config.json", "--statistics", self.path / "statistics")
        grid = ("--rows", ROWS, "--cols", COLS, "--precision", "fp32", "--store", self.path / "store")
        return [str(w) for w in (self.path / "weights", *files, "--run-dir", self.path / run, *grid, *more)]


def hand_over(path: Path, interval_h: int) -> Theirs:
    """Make everything there is to one of the published models."""
    weather = make_weather(6, ROWS + 1, COLS, LEVELS, poles=True, sst=interval_h == 24)
    weather.to_netcdf(path / "weather.nc")
    run_conversion(path / "weather.nc", path / "store", window=WINDOW, intervals_h=(6,))
    write_config(path / "config.json", interval_h, WINDOW)
    numbers = write_statistics(path / "statistics", interval_h)
    return Theirs(path, interval_h, write_weights(path / "weights", interval_h), numbers)


def make(theirs: Theirs, run: str, *more: object, rank: int = 0, world: int = 1) -> Path:
    arguments = published.parse(theirs.words(run, *more))
    published.make(arguments, published.prepare(arguments), rank, world)
    return arguments.run_dir


@pytest.fixture(scope="module")
def six(tmp_path_factory: pytest.TempPathFactory) -> Theirs:
    """The 6-hourly model."""
    return hand_over(tmp_path_factory.mktemp("six"), 6)


@pytest.fixture(scope="module", params=["six", "daily"])
def theirs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Theirs:
    """Both models, one after the other."""
    if request.param == "six":
        return request.getfixturevalue("six")
    return hand_over(tmp_path_factory.mktemp("daily"), 24)


@pytest.fixture(scope="module")
def converted(theirs: Theirs) -> Path:
    return make(theirs, "converted")


@pytest.fixture(scope="module")
def raw(theirs: Theirs) -> Path:
    return make(theirs, "raw", "--raw")


@pytest.fixture(scope="module")
def six_converted(six: Theirs) -> Path:
    return make(six, "converted")


@pytest.fixture(scope="module")
def six_raw(six: Theirs) -> Path:
    return make(six, "raw", "--raw")


def test_both_kinds_of_run_have_the_network(theirs: Theirs, converted: Path, raw: Path) -> None:
    x, t = torch.randn(1, 2 * len(variables(theirs.interval_h)) + 4, ROWS, COLS), math.atan(3.0)
    expected = naive(theirs.stages, x[0], t, WINDOW, heads=2)
    for run in (converted, raw):
        trained = find_trained(run)
        assert trained.meta["images_seen"] == 1_100_000
        layout = make_layout(trained.config.model)
        model = load_network(trained, layout)
        y = layout.from_windows(model(layout.to_windows(x), torch.tensor([t])))[0]
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    assert (
        trained.as_published,
        (raw / "checkpoints").exists() and checkpoint.complete(raw / "checkpoints"),
    ) == (True, [])


def answer(run: Path, layout: dict[str, int], x_BCYX: torch.Tensor, t: float) -> torch.Tensor | None:
    """Apply the network of a run on many ranks; the output of this rank's tokens, and which they are."""
    trained = find_trained(run, share=dist.get_rank(), of=dist.get_world_size())
    config = dataclasses.replace(trained.config, parallel=ParallelConfig(**layout))
    dims, device = choose_degrees(config, dist.get_world_size(), 1), torch.device("cpu")
    seat = take_seat(config, trained.counts, dims, dist.get_rank(), device)
    model = load_network(trained, seat.layout, device, seat.units, near=seat.at.pp / dims.pp)
    tokens_NT = seat.layout.tokens_NT
    x_BNTC = x_BCYX.flatten(2)[:, :, tokens_NT].permute(0, 2, 3, 1)
    with torch.no_grad():
        y_BNTC = make_network(model, seat, trained.counts[1])(x_BNTC, torch.tensor([t]))
    out = torch.zeros(1, y_BNTC.shape[-1], ROWS * COLS)
    out[:, :, tokens_NT] = y_BNTC.permute(0, 3, 1, 2)
    return out.view(1, -1, ROWS, COLS) if seat.at.pp == 0 else None


@pytest.mark.parametrize(
    ("kind", "layout"),
    [("raw", {"pp": 2, "sp": 2}), ("converted", {"wp_y": 2, "wp_x": 2}), ("raw", {"wp_x": 2, "pp": 3})],
    ids=str,
)
def test_any_layout_has_it_too(
    kind: str, layout: dict[str, int], six: Theirs, six_converted: Path, six_raw: Path
) -> None:
    x, t = torch.randn(1, 2 * len(variables(six.interval_h)) + 4, ROWS, COLS), 1.2
    run = six_raw if kind == "raw" else six_converted
    parts = run_distributed(answer, int(np.prod([*layout.values()])), run, layout, x, t)
    y = sum(part for part in parts if part is not None)[0]
    torch.testing.assert_close(y, naive(six.stages, x[0], t, WINDOW, heads=2), rtol=1e-5, atol=1e-5)


def convert_on_many(words: list[str]) -> None:
    arguments = published.parse(words)
    published.make(arguments, published.prepare(arguments), dist.get_rank(), dist.get_world_size())


def test_several_ranks_convert_to_the_same_run(six: Theirs, six_converted: Path) -> None:
    run_distributed(convert_on_many, 3, six.words("three"))
    run = six.path / "three"
    (path,) = checkpoint.complete(run / "checkpoints")
    assert len(list(path.glob("stage_*"))) == 3
    one, three = find_trained(six_converted), find_trained(run)
    assert {**one.meta, "stages": 3} == three.meta
    layout = make_layout(one.config.model)
    weights = [dict(load_network(trained, layout).named_parameters()) for trained in (one, three)]
    assert all(torch.equal(p, weights[1][name]) for name, p in weights[0].items())


def test_the_network_sees_their_numbers(theirs: Theirs, raw: Path) -> None:
    """State and forcings by the means of the npz files, sunshine in J m-2, the change by the interval's."""
    trained = find_trained(raw)
    store, plain = open_store(trained.config), Store(theirs.path / "store")
    check_fingerprint(trained.meta["fingerprint"], store)
    seen: list[torch.Tensor] = []

    def network(x_BNTC: torch.Tensor, t_B: torch.Tensor) -> torch.Tensor:
        seen.append(x_BNTC)
        return torch.zeros(*x_BNTC.shape[:-1], len(store.names))

    layout, diffusion = make_layout(trained.config.model), trained.config.diffusion
    sampler = for_training(SamplerConfig(levels=2), diffusion)
    forecaster = Forecaster(network, layout, store, theirs.interval_h, sampler)
    init = plain.times[0]
    before = forecaster.state(init, range(1))
    after = forecaster.step(before, init, 1, range(1))
    inputs = layout.from_windows(seen[0])[0].numpy().astype(np.float64)
    names, count = variables(theirs.interval_h), len(store.names)
    x_CYX = plain.read(0).astype(np.float64)
    for place, name in enumerate(names):
        mean, std = theirs.numbers[name][:2]
        valid = plain.mask_CYX[place]
        expected = np.where(valid, (x_CYX[place] - mean) / std, (271.46 - mean) / std)
        np.testing.assert_allclose(
            inputs[count + place], expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max()
        )
    interval = np.timedelta64(theirs.interval_h, "h")
    lat, lon = plain.latitude_deg, plain.longitude_deg
    fields = {
        "toa_incident_solar_radiation": (3600 * toa_solar_w_m2(init, lat, lon), 2 * count),
        "geopotential_at_surface": (plain.static["geopotential_at_surface"], 2 * count + 1),
        "land_sea_mask": (plain.static["land_sea_mask"], 2 * count + 2),
    }
    later = 3600 * toa_solar_w_m2(init + interval, lat, lon)
    for name, (field, place) in fields.items():
        mean, std = theirs.numbers[name][:2]
        np.testing.assert_allclose(inputs[place], (field - mean) / std, atol=1e-5)
    mean, std = theirs.numbers["toa_incident_solar_radiation"][:2]
    np.testing.assert_allclose(inputs[-1], (later - mean) / std, atol=1e-5)
    change = layout.from_windows(after - before)[0].numpy()
    assert np.isfinite(change).all()
    for place, name in enumerate(names):
        if name.startswith("10m"):  # a residual of 0 by x_t - t v is noise: only the scale is theirs
            assert 0.1 < change[place].std() / (theirs.numbers[name][3] * diffusion.sigma_min) < 10


def test_standards_are_kept_and_checked(theirs: Theirs, raw: Path, tmp_path: Path) -> None:
    standards = read_standards(raw / "standards.json")
    numbers = standards.statistics
    for place, name in enumerate(variables(theirs.interval_h)):
        row = (
            numbers.mean_C,
            numbers.std_C,
            *(x[theirs.interval_h] for x in (numbers.residual_mean, numbers.residual_std)),
        )
        assert tuple(float(values[place]) for values in row) == theirs.numbers[name]
    assert standards.forcing["solar"] == pytest.approx((1.07e6 / 3600, 400.0))
    assert str(numbers.train_period[1]) == "2018-12-31T18:00:00"
    store = RunStore(theirs.path / "store", standards)
    other = dataclasses.replace(standards, forcing={**standards.forcing, "solar": (300.0, 401.0)})
    with pytest.raises(ValueError, match="not the data this run was trained on: statistics_sha256 differ"):
        check_fingerprint(store.fingerprint, RunStore(theirs.path / "store", other))
    text = (raw / "standards.json").read_text()
    path = tmp_path / "standards.json"
    for broken, words in [
        (text[:500], "is damaged .JSONDecodeError"),
        (text.replace('"std": [', '"std": [0.0,'), "is damaged .ValueError: "),
        (text.replace('"sunshine"', "").replace('"solar"', '"moon"'), "is damaged .KeyError: 'solar'"),
    ]:
        path.write_text(broken)
        with pytest.raises(ValueError, match=words):
            read_standards(path)
    with pytest.raises(ValueError, match="is missing: make the run again with aeris.published"):
        read_standards(tmp_path / "none.json")


def test_a_published_run_is_not_trained_and_has_no_raw_weights(six: Theirs, six_raw: Path) -> None:
    config = find_trained(six_raw).config
    with pytest.raises(ValueError, match="published weights forecast, they are not trained on"):
        check_same_run(config, six_raw)
    with pytest.raises(ValueError, match="published weights, which are averages: take --weights ema"):
        find_trained(six_raw, "raw")
    with pytest.raises(ValueError, match=r"lacks t2m.*: the run's \d\d channels are needed"):
        open_store(
            dataclasses.replace(config, data=dataclasses.replace(config.data, store=str(other_store(six))))
        )


def other_store(theirs: Theirs) -> Path:
    path = theirs.path / "few"
    if not path.exists():
        make_weather(6, ROWS + 1, COLS, (500,), poles=True).to_netcdf(theirs.path / "few.nc")
        channels = ("u10", "z500", "u500")
        run_conversion(theirs.path / "few.nc", path, window=WINDOW, channels=channels, intervals_h=(6,))
    return path


def test_files_that_change_under_a_run_are_noticed(six: Theirs) -> None:
    run, file = make(six, "watched", "--raw"), six.path / "weights" / "checkpoint_PP4.pth"
    content = file.read_bytes()
    try:
        file.write_bytes(content[:-10])
        with pytest.raises(
            ValueError, match=r"checkpoint_PP4.pth: it has [\d,]+ bytes, [\d,]+ when the run was"
        ):
            find_trained(run)
        file.unlink()
        with pytest.raises(ValueError, match="checkpoint_PP4.pth: it is missing"):
            find_trained(run)
    finally:
        file.write_bytes(content)
    (run / "published.json").write_text("{")
    with pytest.raises(ValueError, match="published.json is damaged"):
        find_trained(run)


def test_a_weight_that_is_no_number_stops_the_conversion(six: Theirs) -> None:
    file = six.path / "weights" / "checkpoint_PP4.pth"
    content = file.read_bytes()
    stage = torch.load(file, weights_only=True)
    stage["ema_state_dict"]["modulelist.0.0.weight"][3] = float("inf")
    try:
        torch.save(stage, file)
        with pytest.raises(ValueError, match="checkpoint_PP4.pth: modulelist.0.0.weight is not finite"):
            make(six, "infinite")
    finally:
        file.write_bytes(content)
    assert not (six.path / "infinite" / "config.json").exists()


def test_the_same_command_again_and_another_run_in_the_way(six: Theirs, six_converted: Path) -> None:
    make(six, "converted")
    with pytest.raises(ValueError, match="holds another run: choose another --run-dir"):
        make(six, "converted", "--norm-eps", 1e-6)


def test_the_program_says_what_it_found(theirs: Theirs, monkeypatch, capsys) -> None:
    monkeypatch.setattr("sys.argv", ["published", *theirs.words("none", "--dry-run", "--json")])
    published.main()
    values = json.loads(capsys.readouterr().out)
    assert (values["channels"], values["inputs"]) == {6: (69, 142), 24: (70, 144)}[theirs.interval_h]
    assert values["parameters"] == sum(
        x.numel() for stage in theirs.stages for name, x in stage.items() if not is_left(name)
    )
    assert values["left_over_keys"] == 1 + 4 + 24
    assert not (theirs.path / "none").exists()
    monkeypatch.setattr("sys.argv", ["published", *theirs.words("told", "--raw")])
    published.main()
    said = capsys.readouterr().out
    assert "layers 8 x 3 blocks" in " ".join(said.split()) and "--sampler.solver heun" in said


def is_left(name: str) -> bool:
    return name.startswith(("ape", "latent")) or ".1.norm." in name
