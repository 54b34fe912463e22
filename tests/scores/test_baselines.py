"""Climatology against a plain mean."""

import numpy as np
import pytest

from aeris.scores.baselines import climatology, climatology_times, second_of_day


def test_climatology_is_the_mean_by_hour_of_day_of_the_period(truth):
    period = (truth.times[2], truth.times[13])
    chosen = climatology_times(truth.times, period, [0, 43200, 0], 1)
    calls = []
    usual = climatology(truth, period, chosen, (2, 0), lambda: calls.append(1))
    for time, first in (("2031-05-07T00", 4), ("2031-05-07T12", 2)):
        expected = truth.fields[first:14:4, [2, 0]].mean(axis=0)
        np.testing.assert_allclose(usual.at(np.datetime64(time)), expected, rtol=1e-4)
    assert usual.times_used == len(calls) == 6
    assert usual.describe() == "training-period mean by hour of day, 2020-01-01 .. 2020-01-04, 6 times"


def test_a_stride_takes_fewer_times(truth):
    chosen = climatology_times(truth.times, (truth.times[0], truth.times[-1]), [21600], 3)
    np.testing.assert_array_equal(chosen[21600], [1, 13])


def test_an_hour_without_training_times_is_refused(truth):
    with pytest.raises(ValueError, match="no time at 03:00 UTC in the training period"):
        climatology_times(truth.times, (truth.times[0], truth.times[-1]), [3 * 3600], 1)


def test_second_of_day():
    times = np.array(["2000-01-01T00:00:00", "1969-12-31T18:30:05"], dtype="datetime64[s]")
    np.testing.assert_array_equal(second_of_day(times), [0, 18 * 3600 + 30 * 60 + 5])
