"""Drift of made-up forecasts: of the same climate, warming, losing their waves, and blowing up."""

import dataclasses
import json
from itertools import pairwise

import numpy as np
import pytest
from rich.console import Console

from aeris.data.variables import channel, latitude_weights
from aeris.scores.climatology import About, Climatology
from aeris.scores.drift import DriftSums, wave_groups
from aeris.scores.plots.drift import plot_drift, plot_spectrum_drift
from aeris.scores.spectra import band_rows, zonal_power
from aeris.scores.stability import Bounds, as_record, blocks, blow_ups, conditions, judge, stability_table
from tests.scores.test_plots import check

ROWS, COLS, MEMBERS = 6, 16, 3
LATITUDE = np.array([75.0, 45, 15, -15, -45, -75])
LONGITUDE = np.arange(COLS) * 360 / COLS
LEADS = tuple(range(24, 24 * 31, 24))
CHANNELS = (channel("t2m"), channel("q700"), channel("sst"))
MASK = np.ones((3, ROWS, COLS), dtype=bool)
MASK[2, 1, 3] = False
WEIGHTS = latitude_weights(LATITUDE)
STD = np.array([2.0, 1e-3, 1.0])[:, None, None]
MEAN = np.array([280.0, 5e-3, 290.0])[:, None, None] + STD * np.cos(np.deg2rad(LATITUDE))[:, None] * 5


def usual_weather():
    about = About((np.datetime64("2001-01-01"), np.datetime64("2002-12-31")), 1460, True, "")
    fields = {"mean": np.broadcast_to(MEAN, MASK.shape), "std": np.broadcast_to(STD, MASK.shape)}

    class Always(frozenset):
        def __contains__(self, slot):
            return True

    usual = Climatology(about, ("t2m", "q700", "sst"), (), (), lambda kind, slot: fields[kind].astype("f4"))
    usual.slots = Always()
    return usual


def weather(rng, members):
    return (MEAN + STD * rng.standard_normal((members, *MASK.shape))).astype(np.float32)


def gather(change=lambda lead, x: x, truth_until=99, inits=2):
    """Return the drift of a forecast of other weather, changed, its parts and its last fields."""
    rng = np.random.default_rng(0)
    sums = DriftSums(LEADS, CHANNELS, MEMBERS, LATITUDE, LONGITUDE, MASK, WEIGHTS, usual_weather())
    parts, last = [], None
    for init in range(inits):
        sums.begin(init)
        for lead in range(len(LEADS)):
            last = (change(lead, weather(rng, MEMBERS)), weather(rng, 1)[0])
            valid = np.datetime64("2003-01-01T00", "s") + np.timedelta64(LEADS[lead], "h")
            sums.add(lead, last[0], last[1] if lead < truth_until else None, valid)
        parts.append(sums.end())
    return sums.combine(parts), parts, last


@pytest.fixture(scope="module")
def steady():
    return gather()


def test_numbers_against_plain_sums(steady):
    _, parts, (x_MCYX, y_CYX) = steady
    weight_YX = np.broadcast_to(WEIGHTS[:, None], (ROWS, COLS))
    for place in range(3):
        weight = np.where(MASK[place], weight_YX, 0)
        mean_M = [np.average(x, weights=weight) for x in x_MCYX[:, place].astype(np.float64)]
        np.testing.assert_allclose(parts[1]["member"][-1, :, place], mean_M, rtol=1e-12)
        variance = np.average((y_CYX[place] - np.average(y_CYX[place], weights=weight)) ** 2, weights=weight)
        np.testing.assert_allclose(parts[1]["truth_variance"][-1, place], variance, rtol=1e-4)
        anomaly = np.average((y_CYX[place] - MEAN[place]) ** 2, weights=weight)
        np.testing.assert_allclose(parts[1]["truth_anomaly"][-1, place], anomaly, rtol=1e-4)
        inside = x_MCYX[:, place][:, MASK[place]]
        assert parts[1]["forecast_low"][-1, place] == inside.min()
        excess_M = np.abs(x_MCYX[:, place] - MEAN[place])[:, MASK[place]].max(axis=1) / STD[place, 0, 0]
        np.testing.assert_allclose(parts[1]["excess"][-1, :, place], excess_M, rtol=1e-3)
    rows = band_rows(LATITUDE)
    power_K = zonal_power(x_MCYX[:, 0][:, rows], LATITUDE[rows]).mean(axis=(0, 1))[1:8]
    np.testing.assert_allclose(parts[1]["power"][0, -1, 0], power_K)
    assert np.isnan(parts[1]["power"][:, :, 2]).all()


def test_weather_of_the_same_climate_is_stable(steady):
    drift, _, _ = steady
    np.testing.assert_allclose(drift.std_C, STD[:, 0, 0], rtol=1e-6)
    np.testing.assert_allclose(drift.usual.variance[0], drift.truth.variance.mean(axis=0), rtol=0.1)
    verdicts = judge(drift, Bounds())
    assert len(verdicts) == 18
    judged = [one for one in verdicts if one.channel != "sst" and one.quantity != "small"]
    assert {one.passed for one in judged} == {True}
    sst = {one.quantity: one.passed for one in verdicts if one.channel == "sst"}
    assert sst == dict.fromkeys(("mean", "variance", "anomaly"), True) | dict.fromkeys(
        ("large", "medium", "small")
    )
    # 7 wavenumbers: none is small
    assert next(one for one in verdicts if one.quantity == "small").passed is None
    assert blow_ups(drift, 15.0) == []


def test_warming_is_found(steady):
    def warm(lead, x_MCYX):
        x_MCYX[:, 0] += 0.05 * lead
        return x_MCYX

    failed = [one for one in judge(gather(warm)[0], Bounds()) if one.passed is False]
    assert {(one.channel, one.quantity) for one in failed} >= {("t2m", "mean")}
    mean = next(one for one in failed if one.quantity == "mean")
    # the last ten days are 0.05 x 24.5 K off on average, of a std of 2 K
    assert mean.value == pytest.approx(0.05 * 24.5 / 2, abs=0.06)
    assert (mean.from_h, mean.to_h) == (504, 720)


def test_lost_waves_are_found():
    def smooth(lead, x_MCYX):
        usual = MEAN[1].astype(np.float32)
        x_MCYX[:, 1] = usual + (x_MCYX[:, 1] - usual) * 0.6
        return x_MCYX

    values = {(one.channel, one.quantity): one for one in judge(gather(smooth)[0], Bounds())}
    assert values["q700", "anomaly"].value == pytest.approx(0.36, rel=0.15)
    assert values["q700", "medium"].value == pytest.approx(0.36, rel=0.25)
    assert values["q700", "mean"].passed
    assert not values["q700", "medium"].passed


@pytest.mark.parametrize(("value", "said"), [(np.nan, "not finite"), (1e9, "std away")])
def test_a_blow_up_is_dated(value, said):
    def burst(lead, x_MCYX):
        if lead >= 17:
            x_MCYX[1, 0, 2, 5] = value
        return x_MCYX

    drift = gather(burst)[0]
    found = blow_ups(drift, 15.0)
    assert [(one.init, one.member, one.lead_h, one.channel) for one in found] == [
        (0, 1, 18 * 24, "t2m"),
        (1, 1, 18 * 24, "t2m"),
    ]
    text = "\n".join(conditions(drift, Bounds()))
    assert "member 1 of init number 0 blows up at 18 d: t2m is " in text
    assert said in text
    record = as_record(drift, Bounds())
    json.dumps(record, allow_nan=False)
    assert record["stable"] is False


def test_beyond_the_truth_the_climatology_stands_in():
    drift, parts, _ = gather(truth_until=20)
    assert np.isfinite(drift.truth.mean[:20]).all()
    assert np.isnan(drift.truth.mean[20:]).all()
    np.testing.assert_array_equal(drift.reference.mean[20:], drift.usual.mean[20:])
    np.testing.assert_array_equal(drift.reference.mean[:20], drift.truth.mean[:20])
    assert np.isfinite(drift.spectrum_ratio_QCK()[:, :2]).all()
    assert "10 of 30 lead times lack a truth: there the climatology stands in" in conditions(drift, Bounds())
    assert {one.passed for one in judge(drift, Bounds()) if one.channel == "t2m"} == {True, None}
    # one init time has a truth, the other has not: nothing is mixed
    sums = DriftSums(LEADS, CHANNELS, MEMBERS, LATITUDE, LONGITUDE, MASK, WEIGHTS, usual_weather())
    mixed = sums.combine([parts[0], gather(truth_until=0, inits=1)[1][0]])
    assert np.isnan(mixed.truth.mean).all()
    half = (parts[0]["truth_mean"][:20] + mixed.usual.mean[:20]) / 2
    np.testing.assert_allclose(mixed.reference.mean[:20], half)


def test_without_any_truth(tmp_path):
    drift = gather(truth_until=0, inits=1)[0]
    assert "no truth at any valid time: held against the climatology, spectra not judged" in conditions(
        drift, Bounds()
    )
    assert {one.passed for one in judge(drift, Bounds()) if one.quantity == "large"} == {None}
    with pytest.raises(ValueError, match="no spectra to draw"):
        plot_spectrum_drift(drift, tmp_path / "b.png", "made-up weather")


def test_pictures_table_and_record(steady, tmp_path):
    drift = steady[0]
    plot_drift(gather(truth_until=20)[0], tmp_path / "a.png", "made-up weather", most=1)
    plot_spectrum_drift(drift, tmp_path / "b.png", "made-up weather", most=1)
    check(tmp_path / "a.png")
    check(tmp_path / "b.png")
    console = Console(width=120)
    with console.capture() as capture:
        console.print(stability_table(drift, Bounds()))
    assert "stability to 30 d: worst mean over 10 days, 2 init times" in capture.get()
    assert "±0.25" in capture.get()
    record = json.loads(json.dumps(as_record(drift, Bounds()), allow_nan=False))
    assert record["stable"] is True
    assert record["bounds"]["variance"] == [0.8, 1.25]
    assert len(record["global_mean"]["t2m"]["truth"]) == 30


def test_blocks_are_ten_days():
    assert [group.tolist() for group in blocks((0, 120, 240, 246, 480, 486))] == [[0, 1, 2], [3, 4], [5]]


def test_many_wavenumbers_are_grouped():
    assert wave_groups(4) == [(1, 2), (2, 3), (3, 4), (4, 5)]
    groups = wave_groups(719)
    assert groups[0] == (1, 2)
    assert groups[-1][1] == 720
    assert len(groups) < 48
    assert all(before[1] == after[0] for before, after in pairwise(groups))


def test_many_lead_times_share_spectra():
    leads = tuple(range(6, 6 * 125, 6))
    sums = DriftSums(leads, CHANNELS, 1, LATITUDE, LONGITUDE, MASK, WEIGHTS, usual_weather())
    assert len(sums.spectrum_leads) == 60
    assert sorted(lead for group in sums.spectrum_leads for lead in group) == list(range(124))
    rng = np.random.default_rng(1)
    for lead in range(3):
        sums.add(lead, weather(rng, 1), None, np.datetime64("2003-01-01T00", "s"))
    part = sums.end()
    # the first group of three lead times is whole, the second is not
    assert np.isfinite(part["power"][0, 0, 0]).all()
    assert np.isnan(part["power"][0, 1, 0]).all()


def test_bounds_are_settings():
    bounds = dataclasses.replace(Bounds(), spectrum=(0.9, 1.1))
    assert bounds.of("small") == (0.9, 1.1)
    assert bounds.of("mean") == (-0.25, 0.25)
    assert bounds.of("anomaly") == (0.67, 1.5)


def test_a_channel_without_climatology_has_no_excess_but_what_is_not_finite():
    sums = DriftSums(LEADS, CHANNELS, 2, LATITUDE, LONGITUDE, MASK, WEIGHTS, usual_weather())
    known = sums.climatology
    gap_CYX = np.ones(MASK.shape, dtype=np.float32)
    gap_CYX[0] = np.nan
    sums.climatology = Climatology(known.about, known.names, (), (), lambda kind, slot: gap_CYX)
    sums.climatology.slots = known.slots
    x_MCYX = weather(np.random.default_rng(0), 2)
    sums.add(0, x_MCYX, None, np.datetime64("2003-01-01T00", "s"))
    assert (sums.end()["excess"][0, :, 0] == 0).all()
    x_MCYX[1, 0, 0, 0] = np.inf
    sums.add(0, x_MCYX, None, np.datetime64("2003-01-01T00", "s"))
    np.testing.assert_array_equal(sums.end()["excess"][0, :, 0], [0, np.inf])
