"""Scores against independent packages, plain formulas, and what a calibrated ensemble must give."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import scoringrules
import xarray
from scores import probability

from aeris.scores.metrics import (
    EnsembleScores,
    fair_crps,
    first_bad_value,
    rank_weights,
    unbiased_spread_skill,
)

MEMBERS, CHANNELS, ROWS, COLS = 6, 3, 5, 8


def ensemble(seed=0, members=MEMBERS):
    rng = np.random.default_rng(seed)
    truth_CYX = (50_000 + 300 * rng.standard_normal((CHANNELS, ROWS, COLS))).astype(np.float32)
    shared_CYX = 90 * rng.standard_normal(truth_CYX.shape)
    x_MCYX = truth_CYX + shared_CYX + 100 * rng.standard_normal((members, *truth_CYX.shape))
    return x_MCYX.astype(np.float32), truth_CYX


def sums(members=MEMBERS, weight_Y=None, mask_CYX=None, leads=1):
    weight_Y = np.linspace(0.4, 1.6, ROWS) if weight_Y is None else weight_Y
    mask_CYX = np.ones((CHANNELS, ROWS, COLS), dtype=bool) if mask_CYX is None else mask_CYX
    return EnsembleScores(leads, members, weight_Y, mask_CYX)


@pytest.mark.parametrize("members", [2, 7, 50])
def test_fair_crps_equals_scoringrules(members):
    rng = np.random.default_rng(members)
    x_MP, y_P = rng.gamma(2.0, size=(members, 40)), rng.gamma(2.0, size=40)
    # the default estimator of scoringrules is biased; "fair" is the O(M^2) form and "pwm" the sorted one
    for estimator in ("fair", "pwm"):
        expected = scoringrules.crps_ensemble(y_P, x_MP, m_axis=0, estimator=estimator)
        np.testing.assert_allclose(fair_crps(x_MP - y_P), expected, rtol=1e-10, atol=1e-12)


def test_fair_crps_equals_scores():
    rng = np.random.default_rng(1)
    x_MP, y_P = rng.standard_normal((9, 30)), rng.standard_normal(30)
    expected = probability.crps_for_ensemble(
        xarray.DataArray(x_MP, dims=("member", "point")),
        xarray.DataArray(y_P, dims="point"),
        ensemble_member_dim="member",
        method="fair",
        preserve_dims="all",
    )
    np.testing.assert_allclose(fair_crps(x_MP - y_P), expected.values, rtol=1e-10, atol=1e-12)


def test_fair_crps_of_a_calibrated_ensemble_does_not_depend_on_its_size():
    rng = np.random.default_rng(2)
    for members in (2, 10):
        error_MP = rng.standard_normal((members, 200_000)) - rng.standard_normal(200_000)
        # 1 / sqrt(pi), the CRPS of N(0, 1) against itself; the biased form is 1 + 1/M times as large
        assert fair_crps(error_MP).mean() == pytest.approx(1 / np.sqrt(np.pi), rel=0.01)


def test_one_member_has_its_absolute_error_as_crps():
    np.testing.assert_array_equal(fair_crps(np.array([[-2.0, 3.0]])), [2.0, 3.0])


def test_spread_skill_is_one_when_calibrated():
    rng = np.random.default_rng(3)
    error_MP = rng.standard_normal((10, 100_000)) - rng.standard_normal(100_000)
    variance = error_MP.var(axis=0, ddof=1).mean()
    squared = (error_MP.mean(axis=0) ** 2).mean()
    assert unbiased_spread_skill(np.array(variance), np.array(squared), 10) == pytest.approx(1, abs=0.01)
    # the raw ratio is below 1 for the same ensemble: sqrt(M / (M + 1))
    assert np.sqrt(variance / squared) == pytest.approx(np.sqrt(10 / 11), abs=0.01)


def test_spread_skill_is_undefined_for_one_member_or_too_small_an_error():
    values = unbiased_spread_skill(np.array([1.0, 1.0]), np.array([0.05, 2.0]), 10)
    assert np.isnan(values[0])
    assert values[1] == pytest.approx(np.sqrt(1 / 1.9))
    assert np.isnan(unbiased_spread_skill(np.array([0.0]), np.array([1.0]), 1))


def test_ranks_count_members_below_the_truth():
    error_MP = np.array([[-1.0, 2.0, 1.0], [-2.0, 1.0, -1.0]])
    np.testing.assert_allclose(rank_weights(error_MP, np.array([1.0, 2.0, 4.0])), [2.0, 4.0, 1.0])


def test_ties_share_their_weight_over_the_ranks_they_may_take():
    # truth equal to two of three members, one member below it: rank 1, 2 or 3
    error_MP = np.array([[-1.0], [0.0], [0.0]])
    np.testing.assert_allclose(rank_weights(error_MP, np.ones(1)), [0, 1 / 3, 1 / 3, 1 / 3], atol=1e-15)


def test_ranks_of_a_calibrated_ensemble_are_flat():
    rng = np.random.default_rng(4)
    error_MP = rng.standard_normal((4, 100_000)) - rng.standard_normal(100_000)
    shares = rank_weights(error_MP, np.full(100_000, 1e-5))
    np.testing.assert_allclose(shares, 0.2, atol=0.01)


def test_scores_equal_plain_formulas_over_several_init_times():
    weight_Y = np.linspace(0.4, 1.6, ROWS)
    weight_YX = np.broadcast_to(weight_Y[:, None], (ROWS, COLS)) / (weight_Y.sum() * COLS)
    cases = [ensemble(seed) for seed in range(3)]
    running = sums(weight_Y=weight_Y)
    for x_MCYX, y_CYX in cases:
        running.add(0, x_MCYX, y_CYX)
    result = running.result()
    x_TMCYX = np.stack([x for x, _ in cases]).astype(np.float64)
    y_TCYX = np.stack([y for _, y in cases]).astype(np.float64)

    def mean(field):  # over area and init times
        return np.einsum("tcyx,yx->c", field, weight_YX) / len(cases)

    mean_TCYX, variance_TCYX = x_TMCYX.mean(axis=1), x_TMCYX.var(axis=1, ddof=1)
    squared_C = mean((mean_TCYX - y_TCYX) ** 2)
    np.testing.assert_allclose(result["rmse"][0], np.sqrt(squared_C), rtol=1e-12)
    members = np.sqrt(mean(((x_TMCYX - y_TCYX[:, None]) ** 2).mean(axis=1)))
    np.testing.assert_allclose(result["rmse_member"][0], members, rtol=1e-12)
    np.testing.assert_allclose(result["bias"][0], mean(mean_TCYX - y_TCYX), rtol=1e-9)
    np.testing.assert_allclose(result["spread"][0], np.sqrt(mean(variance_TCYX)), rtol=1e-9)
    ratio = np.sqrt(mean(variance_TCYX) / (squared_C - mean(variance_TCYX) / MEMBERS))
    np.testing.assert_allclose(result["ssr"][0], ratio, rtol=1e-9)
    pairs_TCYX = np.abs(x_TMCYX[:, :, None] - x_TMCYX[:, None]).sum(axis=(1, 2))
    skill_TCYX = np.abs(x_TMCYX - y_TCYX[:, None]).mean(axis=1)
    crps = mean(skill_TCYX - pairs_TCYX / (2 * MEMBERS * (MEMBERS - 1)))
    np.testing.assert_allclose(result["crps"][0], crps, rtol=1e-9)
    np.testing.assert_allclose(running.ranks().sum(axis=-1), 1.0, rtol=1e-12)


def test_masked_points_change_nothing_and_may_hold_anything():
    x_MCYX, y_CYX = ensemble()
    mask_CYX = np.random.default_rng(5).random(y_CYX.shape) < 0.7
    running, other = sums(mask_CYX=mask_CYX), sums(mask_CYX=mask_CYX)
    running.add(0, x_MCYX, y_CYX)
    other.add(0, np.where(mask_CYX, x_MCYX, np.nan), np.where(mask_CYX, y_CYX, 1e30).astype(np.float32))
    for name, values in running.result().items():
        np.testing.assert_array_equal(values, other.result()[name])
    weights = np.where(mask_CYX[0], np.linspace(0.4, 1.6, ROWS)[:, None], 0)
    squared = (x_MCYX[:, 0].astype(np.float64).mean(axis=0) - y_CYX[0]) ** 2
    expected = np.sqrt(np.average(squared, weights=weights))
    assert running.result()["rmse"][0, 0] == pytest.approx(expected, rel=1e-12)


def test_threads_change_no_bit():
    alone, together = sums(), sums()
    alone.add(0, *ensemble())
    with ThreadPoolExecutor(3) as threads:
        together.add(0, *ensemble(), threads)
    np.testing.assert_array_equal(alone._sums_JCRS, together._sums_JCRS)


def test_blocks_change_only_the_rounding(monkeypatch):
    whole, blocks = sums(), sums()
    whole.add(0, *ensemble())
    monkeypatch.setattr("aeris.scores.metrics.BLOCK_VALUES", 2 * COLS * MEMBERS)  # rows 0-1, 2-3, 4
    blocks.add(0, *ensemble())
    np.testing.assert_allclose(blocks._sums_JCRS, whole._sums_JCRS, rtol=1e-12, atol=1e-15)


def test_one_member_has_no_spread():
    running = sums(members=1)
    running.add(0, *ensemble(members=1))
    result = running.result()
    assert np.isnan(result["spread"]).all()
    assert np.isnan(result["ssr"]).all()
    np.testing.assert_array_equal(result["rmse"], result["rmse_member"])


def test_wrong_shapes_are_refused_and_missing_leads_are_nan():
    with pytest.raises(ValueError, match=r"expected fields \(6, 3, 5, 8\)"):
        sums().add(0, *ensemble(members=5))
    with pytest.raises(ValueError, match="4 latitude weights for fields of 5 rows"):
        sums(weight_Y=np.ones(4))
    with pytest.raises(ValueError, match="masked everywhere"):
        sums(mask_CYX=np.zeros((CHANNELS, ROWS, COLS), dtype=bool))
    running = sums(leads=2)
    running.add(0, *ensemble())
    assert np.isnan(running.result()["rmse"][1]).all()
    assert np.isfinite(running.result()["rmse"][0]).all()


def test_first_bad_value_is_found_inside_the_mask_only():
    x_MCYX, _ = ensemble()
    mask_CYX = np.ones(x_MCYX.shape[1:], dtype=bool)
    assert first_bad_value(x_MCYX, mask_CYX) is None
    x_MCYX[2, 1, 3, 4] = np.inf
    assert first_bad_value(x_MCYX, mask_CYX) == (2, 1, 3, 4)
    mask_CYX[1, 3, 4] = False
    assert first_bad_value(x_MCYX, mask_CYX) is None
