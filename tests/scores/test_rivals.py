"""Parts of init times on disk, intervals, and forecasts side by side."""

import numpy as np
import pytest

from aeris.scores.confidence import block_length, draw_counts, ratio_interval
from aeris.scores.flatness import rank_deviation, rank_outliers
from aeris.scores.metrics import scores_of
from aeris.scores.parts import Parts
from aeris.scores.rivals import Judged, compete, read_judged

START = np.datetime64("2004-01-10T00", "s")


def days(*numbers):
    return START + np.array(numbers) * np.timedelta64(86400, "s")


def test_parts_are_kept_until_the_settings_change(tmp_path):
    inits = list(days(0, 28))
    parts = Parts(tmp_path / "parts", {"seed": 0}, inits)
    assert not parts.prepare()
    assert parts.missing() == [0, 1]
    parts.write(1, {"energy": {"sums": np.arange(3.0)}})
    again = Parts(tmp_path / "parts", {"seed": 0}, inits)
    assert not again.prepare()
    assert again.missing() == [0]
    np.testing.assert_array_equal(again.of("energy")[1]["sums"], [0, 1, 2])
    assert again.read(1, "other") == {}
    changed = Parts(tmp_path / "parts", {"seed": 1}, inits)
    assert changed.prepare()
    assert changed.missing() == [0, 1]


def test_a_damaged_part_is_named(tmp_path):
    parts = Parts(tmp_path, {}, list(days(0)))
    parts.prepare()
    (tmp_path / "2004-01-10T000000.npz").write_bytes(b"PK\x03\x04 and then nothing")
    with pytest.raises(ValueError, match=r"2004-01-10T000000\.npz cannot be read .* remove it"):
        parts.read(0, "energy")


def test_intervals_hold_the_true_ratio_about_as_often_as_they_say():
    rng = np.random.default_rng(0)
    held, cases = 0, 200
    for _ in range(cases):
        weather_I = rng.gamma(4.0, size=40)  # the same for both
        above_I, below_I = (weather_I * scale * rng.gamma(20.0, 0.05, 40) for scale in (0.9, 1.0))
        low, high = ratio_interval(draw_counts(40, 1, 300), above_I, below_I)
        held += low < 0.9 < high
    assert 0.86 < held / cases < 0.99


def test_blocks_follow_the_overlap_of_forecasts():
    assert block_length(days(*range(0, 280, 28)), (24, 240)) == 1
    assert block_length(days(*range(40)), (24, 240)) == 10
    assert block_length(days(*range(12)), (240,)) == 3
    counts = draw_counts(12, 3, 5)
    np.testing.assert_array_equal(counts.sum(axis=1), 12)
    np.testing.assert_array_equal(counts, draw_counts(12, 3, 5))


def test_few_init_times_give_no_interval():
    found = ratio_interval(draw_counts(4, 1), np.ones((4, 2)), np.ones((4, 2)))
    assert np.isnan(found).all()


def test_flat_histograms_have_no_outliers_too_many():
    flat, narrow = np.full(5, 0.2), np.array([0.4, 0.1, 0.0, 0.1, 0.4])
    assert (rank_outliers(flat), rank_deviation(flat)) == pytest.approx((1, 0))
    assert (rank_outliers(narrow), rank_deviation(narrow)) == pytest.approx((2, 0.8))


def judged(name, inits, scale=1.0, members=4, **other):
    rng = np.random.default_rng(0)
    numbers = ((inits - START) / np.timedelta64(86400, "s")).astype(int)
    sums = np.abs(rng.standard_normal((400, 2, 2, 6)))[numbers] + 1
    sums[..., 0] *= scale**2
    sums[..., 3] *= scale
    about = {"title": "made-up", "truth": "store2004 0123", "weights": "cell", "lead_h": (24, 48)}
    about |= {"channels": ("t2m", "ws10")} | other
    return Judged(name=name, members=members, inits=inits, sums_IJCS=sums, **about)


def test_forecasts_are_compared_where_both_are(tmp_path):
    ours, other = judged("a", days(*range(10)), 0.5), judged("perfect", days(*range(2, 14)), members=10)
    assert read_judged(str(other.write(tmp_path).parent), "b").name == "b"
    contest = compete(ours, [read_judged(str(tmp_path))])
    np.testing.assert_array_equal(contest.inits, days(*range(2, 10)))
    found = contest.comparisons["rmse"]
    assert found.truth == "store2004"
    np.testing.assert_allclose(found.difference_JC("perfect"), -0.5)
    np.testing.assert_allclose(contest.intervals["crps"]["perfect"], 0.5)
    expected = scores_of(other.sums_IJCS[:8].mean(axis=0), 10)["crps"]
    np.testing.assert_allclose(contest.comparisons["crps"].others["perfect"], expected)


def test_times_without_a_truth_are_left_out_of_both():
    ours, other = judged("a", days(*range(6))), judged("b", days(*range(6)), 2.0)
    ours.sums_IJCS[3:, 1] = np.nan
    found = compete(ours, [other]).comparisons["rmse"]
    np.testing.assert_allclose(found.difference_JC("b"), -0.5)


def test_what_cannot_be_compared_is_refused(tmp_path):
    ours = judged("a", days(0, 1))
    with pytest.raises(
        ValueError, match=r"b was scored with the truth other 9, this one with store2004 0123"
    ):
        compete(ours, [judged("b", days(0, 1), truth="other 9")])
    with pytest.raises(ValueError, match="b has area weights 'cos'"):
        compete(ours, [judged("b", days(0, 1), weights="cos")])
    with pytest.raises(ValueError, match="no init time in common with b"):
        compete(ours, [judged("b", days(2))])
    with pytest.raises(ValueError, match="two forecasts are called b"):
        compete(ours, [judged("b", days(0))] * 2)
    with pytest.raises(ValueError, match=r"nothing.zarr has no scores yet: python -m aeris.evaluate"):
        read_judged(str(tmp_path / "nothing.zarr"))
