"""Extremes against `scores`, `scoringrules` and tables worked out by hand."""

import numpy as np
import pytest
import scoringrules
import xarray
from scores.categorical import BinaryContingencyManager
from scores.probability import roc_curve_data

from aeris.scores.areas import AreaMean
from aeris.scores.events import EventCounts, Events, contingency_scores, event_name

ROWS, COLS, MEMBERS = 6, 10, 5
TIME = np.datetime64("2000-01-01T00", "s")


def counted(x_TMYX, y_TYX, limit, quantile, weight_Y=None):
    """Return the events of some init times of one channel with one lead time."""
    area = AreaMean(np.ones(ROWS) if weight_Y is None else weight_Y, np.ones((1, ROWS, COLS), dtype=bool))
    limit_CYX = np.full((1, ROWS, COLS), limit, dtype=np.float32)
    counts = EventCounts(1, x_TMYX.shape[1], area, [0], [quantile], lambda time, q: limit_CYX)
    parts = []
    for x_MYX, y_YX in zip(x_TMYX, y_TYX):
        counts.begin(0)
        counts.add(0, x_MYX[:, None], y_YX[None], TIME)
        parts.append(counts.end())
    return counts.combine(parts)


@pytest.fixture(scope="module")
def case():
    rng = np.random.default_rng(0)
    signal = rng.standard_normal((3, 1, ROWS, COLS))
    x = (signal + 0.8 * rng.standard_normal((3, MEMBERS, ROWS, COLS))).astype(np.float32)
    y = (signal[:, 0] + 0.8 * rng.standard_normal((3, ROWS, COLS))).astype(np.float32)
    return x, y


@pytest.mark.parametrize(("quantile", "limit"), [(0.9, 0.7), (0.1, -0.7)])
def test_scores_equal_those_of_the_packages(case, quantile, limit):
    x_TMYX, y_TYX = case
    found = {name: value[0, 0, 0] for name, value in counted(*case, limit, quantile).scores().items()}
    yes_x, yes_y = (x_TMYX > limit, y_TYX > limit) if quantile > 0.5 else (x_TMYX < limit, y_TYX < limit)
    dims = ("t", "m", "y", "x")
    every = BinaryContingencyManager(
        xarray.DataArray(yes_x.astype(float), dims=dims),
        xarray.DataArray(np.broadcast_to(yes_y[:, None], yes_x.shape).astype(float), dims=dims),
    ).transform()
    for ours, theirs in {
        "pod": "probability_of_detection",
        "far": "false_alarm_ratio",
        "pofd": "probability_of_false_detection",
        "csi": "critical_success_index",
        "ets": "equitable_threat_score",
        "sedi": "symmetric_extremal_dependence_index",
        "frequency_bias": "frequency_bias",
        "base_rate": "base_rate",
    }.items():
        assert found[ours] == pytest.approx(float(getattr(every, theirs)()), rel=1e-9), ours
    share = yes_x.mean(axis=1)
    roc = roc_curve_data(
        xarray.DataArray(share.ravel(), dims="p"),
        xarray.DataArray(yes_y.ravel().astype(float), dims="p"),
        [0, *(np.arange(1, MEMBERS + 1) / MEMBERS - 1e-9), 1.1],
        check_args=False,
    )
    assert found["roc_area"] == pytest.approx(float(roc.AUC), rel=1e-9)
    raw = scoringrules.brier_score(yes_y.astype(float), share)
    debiased = (raw - share * (1 - share) / (MEMBERS - 1)).mean()
    assert found["brier"] == pytest.approx(debiased, rel=1e-9)
    base = yes_y.mean()
    assert found["brier_skill"] == pytest.approx(1 - debiased / (base * (1 - base)), rel=1e-9)


def test_the_debiased_brier_score_does_not_depend_on_the_members():
    rng = np.random.default_rng(1)
    shape = (400, ROWS, COLS)
    chance = rng.random(shape)
    y = (rng.random(shape) < chance).astype(np.float32)
    scores = []
    for members in (2, 10):
        x = (rng.random((400, members, ROWS, COLS)) < chance[:, None]).astype(np.float32)
        scores.append(counted(x, y, 0.5, 0.9).scores()["brier"][0, 0, 0])
    # a perfect probability p has E (p - o)^2 = E p (1 - p) = 1/6 for uniform p
    np.testing.assert_allclose(scores, 1 / 6, atol=0.006)


def test_reliability_is_the_observed_frequency_by_count(case):
    events = counted(*case, 0.7, 0.9)
    observed, share = events.reliability()
    count = (case[0] > 0.7).sum(axis=1)
    for members in range(MEMBERS + 1):
        inside = count == members
        assert share[0, 0, 0, members] == pytest.approx(inside.mean())
        assert observed[0, 0, 0, members] == pytest.approx((case[1] > 0.7)[inside].mean())


def test_weights_count(case):
    weight_Y = np.arange(1.0, ROWS + 1)
    base = counted(*case, 0.7, 0.9, weight_Y).scores()["base_rate"][0, 0, 0]
    expected = np.average((case[1] > 0.7).mean(axis=(0, 2)), weights=weight_Y)
    assert base == pytest.approx(expected)


def test_a_table_by_hand():
    found = contingency_scores(*(np.array([value]) for value in (28.0, 23.0, 72.0, 2680.0)))
    # Finley's tornado forecasts of 1884
    assert found["pod"][0] == pytest.approx(28 / 51)
    assert found["far"][0] == pytest.approx(72 / 100)
    assert found["pofd"][0] == pytest.approx(72 / 2752)
    assert found["csi"][0] == pytest.approx(28 / 123)
    assert found["ets"][0] == pytest.approx((28 - 51 * 100 / 2803) / (123 - 51 * 100 / 2803))


def test_what_does_not_exist_is_nan():
    found = contingency_scores(*(np.zeros(1) for _ in range(4)))
    assert all(np.isnan(value).all() for value in found.values())
    table = np.zeros((1, 1, 1, 2, 3))
    table[..., 0, 0] = 1.0
    scores = Events((0,), (0.99,), table).scores()
    assert scores["brier"][0, 0, 0] == 0
    assert np.isnan(scores["roc_area"]).all()
    assert event_name(0.05) == "below q0.05"
