"""Samples: which times they touch, in which order they come, and who reads them."""

from __future__ import annotations

import itertools
import multiprocessing
import sys
import types
from datetime import datetime
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from aeris.aurora.batch import Batch
from aeris.aurora.config import AuroraConfig
from aeris.aurora.training import reading, sequences
from aeris.aurora.training.missing import fill
from aeris.aurora.training.sequences import Sequence, Sequences, first_batch, loader, read_batch
from aeris.aurora.training.sources import Snapshot, Weather, open_weather
from aeris.aurora.v1p5 import with_insolation
from aeris.data.loader import read_ahead
from aeris.data.store import packaged_sample
from aeris.reading import ImageOrder
from tests.aurora import tiny_runs

CONFIG = AuroraConfig(static_vars=("lsm", "z"))


class Numbered:
    """An origin whose fields say their own time: hours since 2020, at level p plus p."""

    mapping: tuple[tuple[str, str, str], ...] = ()
    lat, lon = np.array([60.0, 0.0, -60.0, -70.0]), np.arange(8) * 45.0

    def __init__(self, times: np.ndarray) -> None:
        self._times = times.astype("datetime64[s]")

    def offers(self) -> list[str]:
        return ["2m_temperature", "temperature"]

    def times(self, variable: str) -> np.ndarray:
        return self._times

    def levels(self, variable: str) -> list[float]:
        return [500.0, 850.0] if variable == "temperature" else []

    def read(self, wanted: list[tuple[str, tuple[float, ...]]], times: np.ndarray) -> list[np.ndarray]:
        hours = (times - np.datetime64("2020-01-01", "s")) / np.timedelta64(1, "h")
        found = []
        for _, levels in wanted:
            x = hours[:, None] + (np.array(levels) if len(levels) else np.zeros(1))
            found.append(np.tile(x[:, :, None, None], (1, 1, 4, 8)).astype(np.float32))
        return found

    def static(self, variable: str) -> np.ndarray | None:
        return np.zeros((4, 8), np.float32) if variable == "land_sea_mask" else None

    def describe(self, variable: str) -> str:
        return variable


def weather(times: np.ndarray) -> Weather:
    config = AuroraConfig(surf_vars=("2t",), atmos_vars=("t",), static_vars=("lsm",))
    return Weather(Numbered(times), config)


def six_hourly(start: str, end: str) -> np.ndarray:
    return np.arange(np.datetime64(start, "s"), np.datetime64(end, "s"), np.timedelta64(6, "h"))


def hours(x: torch.Tensor) -> list[float]:
    """Read the hour of every time of a surface field of batch 0."""
    return [float(one[0, 0]) for one in x[0]]


TWO_YEARS = six_hourly("2020-01-01", "2022-01-01")


@pytest.mark.parametrize(("targets", "count"), [(1, 2922), (2, 2921), (3, 2920)])
def test_two_years_have_the_published_numbers_of_samples(targets: int, count: int) -> None:
    whole = weather(TWO_YEARS)
    assert len(TWO_YEARS) == 2924
    assert len(Sequences(whole, ("2020", "2021"), targets=targets)) == count
    year = Sequences(weather(six_hourly("2021-06-01", "2023-06-01")), ("2022", "2022"), targets=targets)
    assert len(year) == 1459 - targets


def test_a_sample_is_its_past_and_what_follows() -> None:
    samples = Sequences(weather(TWO_YEARS), targets=3)
    one = samples[4]
    assert samples.starts[4] == 5 and samples.indices(4) == (4, 5, 6, 7, 8)
    assert hours(one.input.surf_vars["2t"]) == [24.0, 30.0]
    assert [hours(target.surf_vars["2t"]) for target in one.targets] == [[36.0], [42.0], [48.0]]
    assert one.input.metadata.time == (datetime(2020, 1, 2, 6),)
    assert [target.metadata.time[0].hour for target in one.targets] == [12, 18, 0]
    assert one.input.atmos_vars["t"].shape == (1, 2, 2, 4, 8)
    assert float(one.targets[0].atmos_vars["t"][0, 0, 1, 0, 0]) == 36.0 + 850.0
    assert one.input.metadata.atmos_levels == (500, 850)
    assert one.input.static_vars["lsm"].shape == (4, 8) and one.input.metadata.lat.dtype == torch.float64


def test_gaps_are_never_bridged() -> None:
    times = np.delete(six_hourly("2020-01-01", "2020-01-06"), [7, 15])
    samples = Sequences(weather(times), targets=1)
    # runs of 7, 7 and 4 times have 5, 5 and 2 samples of three
    assert len(samples) == 5 + 5 + 2
    for i in range(len(samples)):
        one = samples[i]
        found = hours(one.input.surf_vars["2t"]) + hours(one.targets[0].surf_vars["2t"])
        assert np.diff(found).tolist() == [6.0, 6.0]


def test_the_step_is_that_of_the_model() -> None:
    samples = Sequences(weather(TWO_YEARS), targets=2, step_h=12.0)
    one = samples[1]
    assert hours(one.input.surf_vars["2t"]) == [6.0, 18.0]
    assert [hours(target.surf_vars["2t"]) for target in one.targets] == [[30.0], [42.0]]
    assert len(samples) == len(TWO_YEARS) - 6


def test_a_period_bounds_the_whole_sample() -> None:
    whole = weather(TWO_YEARS)
    samples = Sequences(whole, ("2020-03-01", "2020-03-01"), targets=1)
    assert len(samples) == 2
    assert samples[1].targets[0].metadata.time == (datetime(2020, 3, 1, 18),)
    assert len(Sequences(whole, ("2020-03-01", "2020-03-01T12"), targets=1)) == 1
    for end in (np.datetime64("2020-03-01T18", "s"), np.datetime64("2020-03-01T18", "ns")):
        assert len(Sequences(whole, (np.datetime64("2020-03-01", "s"), end), targets=1)) == 2
    assert len(Sequences(whole, ("", "2020-01-01"), targets=1)) == 2
    with pytest.raises(ValueError, match="no data from 2030-01-01T00:00:00 to .* has 2020-01-01"):
        Sequences(whole, ("2030", "2031"))
    with pytest.raises(ValueError, match="no 3 times are 6 h apart: the weather has 2924 times"):
        Sequences(whole, ("2020-03-01", "2020-03-01T06"))
    with pytest.raises(ValueError, match="are not two dates"):
        Sequences(whole, ("yesterday", "2031"))
    with pytest.raises(ValueError, match="ends before it begins"):
        Sequences(whole, ("2021", "2020"))
    with pytest.raises(ValueError, match="not 0 states"):
        Sequences(whole, history=0)


def test_every_epoch_sees_every_sample_once_in_another_order() -> None:
    samples = Sequences(weather(six_hourly("2020-01-01", "2020-01-11")))
    n = len(samples)
    epochs = [[samples.sample_at(epoch * n + k, seed=3) for k in range(n)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert epochs[0] != [samples.sample_at(k, seed=4) for k in range(n)]
    # Fixed for good: a run must go on with another version of numpy as it began.
    assert epochs[0][:6] == [6, 13, 31, 26, 1, 34]


def content(one: Sequence) -> list[list[float]]:
    return [x[:, 0, 0, 0].tolist() for x in (one.input.surf_vars["2t"], one.targets[0].surf_vars["2t"])]


def test_a_run_goes_on_at_any_image_and_ranks_share_the_images() -> None:
    samples = Sequences(weather(six_hourly("2020-01-01", "2020-01-06")))
    whole = list(loader(samples, range(40), 4, seed=1))
    assert [one.images for one in whole[:2]] == [(0, 1, 2, 3), (4, 5, 6, 7)]
    rest = list(loader(samples, range(24, 40), 4, seed=1))
    assert [content(one) for one in rest] == [content(one) for one in whole[6:]]
    # two ranks with half the microbatch read the two halves
    for rank in range(2):
        mine = [k for start in range(2 * rank, 40, 4) for k in (start, start + 1)]
        half = list(loader(samples, mine, 2, seed=1))
        for one, both in zip(half, whole, strict=True):
            part = slice(2 * rank, 2 * rank + 2)
            assert one.images == both.images[part]
            assert one.input.metadata.time == both.input.metadata.time[part]
            assert content(one) == [x[part] for x in content(both)]


def test_missing_values_reach_the_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = weather(TWO_YEARS)
    read = whole.read_many

    def with_hole(indices: list[int]) -> Snapshot:
        fields = read(indices)
        fields.surf["2t"][-1, 2, 3] = np.nan
        return fields

    monkeypatch.setattr(whole, "read_many", with_hole)
    one = Sequences(whole)[0]
    assert not one.input.surf_vars["2t"].isnan().any()
    assert one.targets[0].surf_vars["2t"].isnan().nonzero().tolist() == [[0, 0, 2, 3]]


def with_gaps(path: Path) -> Weather:
    """Weather of which half of 2t and two points of z are missing at all times."""
    return open_weather(tiny_runs.write(path, missing=True), CONFIG)


def test_inputs_are_filled_and_counted_where_they_are_read(tmp_path: Path) -> None:
    """In the worker, not between two updates; targets keep what is missing, and counts add up."""
    weather = with_gaps(tmp_path / "x.nc")
    weather.statics["lsm"][0, 0] = np.nan
    stats = {"2t": (5.0, 1.0), "lsm": (0.25, 1.0)}
    plain, filling = Sequences(weather, targets=2), Sequences(weather, targets=2, filling=stats)
    for workers in (0, 1):
        one = next(loader(filling, [3, 7], 2, seed=0, workers=workers))
        raw = next(loader(plain, [3, 7], 2, seed=0))
        half, two = tiny_runs.ROWS * tiny_runs.COLS // 2, 2
        values = (4 + 5 * 2) * tiny_runs.ROWS * tiny_runs.COLS
        assert one.missing == (2 * 4 * (half + two), 2 * 4 * values) and raw.missing == (0, 0)
        wanted = fill(raw.input, stats)
        assert one.input.surf_vars["2t"][0, 1, 3, 0] == 5.0 and one.input.static_vars["lsm"][0, 0] == 0.25
        for kind in ("surf_vars", "static_vars", "atmos_vars"):
            for name, x in getattr(wanted, kind).items():
                assert torch.equal(getattr(one.input, kind)[name], x), name
        for mine, truth in zip(one.targets, raw.targets, strict=True):
            torch.testing.assert_close(mine.surf_vars["2t"], truth.surf_vars["2t"], equal_nan=True)
            assert int(mine.surf_vars["2t"].isnan().sum()) == 2 * half
    assert np.isnan(weather.statics["lsm"][0, 0])


@pytest.mark.parametrize("preset", ["two-step", "lora-replay"])
def test_training_neither_fills_nor_counts_between_updates(
    preset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the loop gets is filled and has its counts with it; so is what is validated."""
    path = str(tiny_runs.write(tmp_path / "x.nc", missing=True))
    config = tiny_runs.small(preset, (path,), validate={"every_images": 0})
    data = reading.open_data(config)
    if preset == "two-step":
        items = list(reading.read_samples(config, data, ImageOrder(0, 4, 1), False))
        judged = reading.Data(data.weather, data.training, data.training)
        items += list(reading.read_validation(config, judged, [2, 5], False))
        assert [one.images for one in items] == [(0,), (1,), (2,), (3,), (2,), (5,)]
    else:
        items = list(itertools.islice(reading.Replay(config, data, torch.float32).read(1, False), 2))
    for item in items:
        assert all(bool(x.isfinite().all()) for x in (*item.input.surf_vars.values(),))
        assert bool(item.targets[0].surf_vars["2t"].isnan().any())
        assert 0 < item.missing[0] < item.missing[1]


def test_validation_samples_are_pinned_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the training hands on, with and without workers."""
    config = tiny_runs.small("one-step", tiny_runs.write_pair(tmp_path))
    data = reading.open_data(config)
    asked = []

    def read_ahead(dataset: object, order: object, size: int, workers: int, pin: bool, ahead: int) -> list:
        asked.append(pin)
        return []

    monkeypatch.setattr(sequences, "read_ahead", read_ahead)
    assert list(reading.read_validation(config, data, [0], True)) == []
    assert list(reading.read_samples(config, data, ImageOrder(0, 2, 1), True)) == []
    assert asked == [True, True]
    one, pinned = data.training[0], []
    monkeypatch.setattr(Batch, "pin_memory", lambda batch: pinned.append(batch) or batch)
    assert one.pin_memory().images == one.images and len(pinned) == 2


def test_training_and_validation_share_no_time(tmp_path: Path) -> None:
    """Inputs as well as targets; both periods are named."""
    pair = tiny_runs.write_pair(tmp_path)  # 1 to 6 January 2020, and 1 to 3 January 2022

    def opened(train: tuple[str, str], validate: tuple[str, str], steps: int = 1) -> reading.Data:
        periods = {"train_period": train, "validate_period": validate}
        config = tiny_runs.small("one-step", pair, data=periods, rollout={"steps": steps})
        return reading.open_data(config)

    apart = opened(("2020-01-01", "2020-01-03"), ("2020-01-04", "2020-01-06"))
    assert apart.training.span == (np.datetime64("2020-01-01"), np.datetime64("2020-01-03T18"))
    for train, validate in (
        (("2020-01-01", "2020-01-03"), ("2020-01-03T18", "2020-01-06")),
        (("2020-01-04", "2020-01-06"), ("2020-01-01", "2020-01-04T00")),
        (("", ""), ("2022", "2022")),
        (("2020-01-02", "2020-01-04"), ("2020-01-01", "2020-01-06")),
    ):
        with pytest.raises(ValueError, match=r"training, .* to .*, and validation, .* to .*, share times"):
            opened(train, validate)


def test_states_of_any_times_are_read_for_replay() -> None:
    whole = weather(TWO_YEARS)
    batch = read_batch(whole, [3, 10])
    assert hours(batch.surf_vars["2t"]) == [18.0, 60.0]
    assert batch.metadata.time == (datetime(2020, 1, 3, 12),)


def test_sunlight_is_computed_where_the_model_reads_it() -> None:
    """At every time of a sample, of replay and of a forecast, as the model computes it for itself."""
    config = AuroraConfig(surf_vars=("2t", "insolation"), atmos_vars=("t",), static_vars=("lsm",))
    whole = Weather(Numbered(TWO_YEARS), config)
    sample = Sequences(whole, targets=1)[100]
    for batch in (first_batch(whole, "2020-06-01T06"), sample.input, *sample.targets):
        found = batch.surf_vars["insolation"]
        torch.testing.assert_close(found, with_insolation(batch).surf_vars["insolation"])
        assert found.dtype == torch.float32 and float(found.max()) > 0.5
    days = read_batch(whole, [3, 10])  # any times, not a step apart
    alone = read_batch(whole, [3]).surf_vars["insolation"]
    assert torch.equal(days.surf_vars["insolation"][:, :1], alone)


def test_a_forecast_starts_from_a_time_with_its_past() -> None:
    whole = weather(TWO_YEARS)
    batch = first_batch(whole, "2020-01-02T06")
    assert hours(batch.surf_vars["2t"]) == [24.0, 30.0]
    assert batch.metadata.time == (datetime(2020, 1, 2, 6),)
    assert hours(first_batch(whole, whole.times[8], history=1).surf_vars["2t"]) == [48.0]
    with pytest.raises(ValueError, match=r"needs 2019-12-31T18:00:00, which is not there"):
        first_batch(whole, "2020-01-01")


def test_workers_read_the_same_as_the_program_itself() -> None:
    samples = Sequences(open_weather(packaged_sample(), CONFIG), targets=2)
    alone = list(loader(samples, range(6), 2, seed=5))
    shared = list(loader(samples, range(6), 2, seed=5, workers=2))
    for one, other in zip(alone, shared, strict=True):
        assert one.images == other.images and one.input.metadata.time == other.input.metadata.time
        for mine, theirs in zip((one.input, *one.targets), (other.input, *other.targets), strict=True):
            for name, x in {**mine.surf_vars, **mine.atmos_vars}.items():
                assert torch.equal(x, {**theirs.surf_vars, **theirs.atmos_vars}[name])
    first = next(islice(loader(samples, range(6), 2, seed=5, workers=1), 1))  # leaving early ends the worker
    assert first.images == (0, 1)


def test_worker_processes_know_the_data_set_before_they_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fork server imports its module, and what the program imports, once for all of them.

    Not the program itself: Python warns in every worker that runs a module which is imported already.
    """
    asked: list[list[str]] = []
    program = types.ModuleType("__main__")
    vars(program).update(torch=torch, choose=read_ahead, own=type("Own", (), {"__module__": "__main__"}))
    monkeypatch.setitem(sys.modules, "__main__", program)
    context = multiprocessing.get_context("forkserver")
    monkeypatch.setattr(type(context), "set_forkserver_preload", lambda self, names: asked.append(names))
    read_ahead(sequences._Images(Sequences(weather(TWO_YEARS)), 0), range(2), 1, 1, False)
    assert asked == [[sequences.__name__, read_ahead.__module__, "torch"]]


def test_a_microbatch_moves_with_its_targets() -> None:
    one = Sequences(weather(TWO_YEARS))[0].to("meta")
    assert one.input.surf_vars["2t"].is_meta and one.targets[0].atmos_vars["t"].is_meta
    assert one.images == (0,)
