"""What must agree between a forecast and the truth, and how a disagreement is told."""

import numpy as np
import pytest

from aeris.scores.matching import match


def test_a_match_knows_the_times_and_channels(ensemble, truth):
    pair = match(ensemble, truth, ("z_500", "t2m"))
    assert [channel.name for channel in pair.channels] == ["z500", "t2m"]
    assert pair.truth_picked.places == [(2,), (0,)]
    np.testing.assert_array_equal(pair.start_I, [10, 14])
    np.testing.assert_array_equal(pair.valid_IJ, [[11, 12, 14], [15, 16, 18]])
    np.testing.assert_array_equal(pair.read_truth(11), truth.read(11)[[2, 0]])
    np.testing.assert_array_equal(pair.read_forecast(1, 2), ensemble.fields[1, 2][:, [2, 0]])


def test_forecasts_inside_the_training_period_are_counted(ensemble, truth):
    pair = match(ensemble, truth)
    assert pair.inside((truth.times[0], truth.times[10])) == 0
    assert pair.inside((truth.times[0], truth.times[11])) == 1
    assert pair.inside((truth.times[0], truth.times[20])) == 2


def test_channels_one_of_them_lacks_are_named(ensemble, truth):
    with pytest.raises(ValueError, match="the forecast has no channel z850; it has t2m"):
        match(ensemble, truth, ("z850",))
    ensemble.names = ("t2m", "msl", "z500", "q700", "v850", "sst")
    with pytest.raises(ValueError, match="the truth has no channel v850"):
        match(ensemble, truth)


def test_units_must_agree(ensemble, truth):
    ensemble.attrs = {"units": {"z500": "m"}}
    with pytest.raises(ValueError, match="z500 is in m in the forecast and in m2 s-2 in the truth"):
        match(ensemble, truth)


def test_grids_must_agree(ensemble, truth):
    ensemble.longitude_deg[3] += 0.5
    with pytest.raises(
        ValueError, match=r"longitudes differ, first at number 3: 68 degrees .* 67.5 in the truth"
    ):
        match(ensemble, truth)
    ensemble.latitude_deg = ensemble.latitude_deg[:-1]
    with pytest.raises(ValueError, match="the forecast has 7 latitudes, the truth 8"):
        match(ensemble, truth)


def test_valid_times_without_a_truth_are_left_out_and_said(ensemble, truth):
    truth.times = truth.times[:17]
    pair = match(ensemble, truth)
    np.testing.assert_array_equal(pair.valid_IJ, [[11, 12, 14], [15, 16, -1]])
    assert "1 of 6 valid times have no truth, which covers 2020-01-01" in pair.notes()[0]
    assert len(pair.truth_times) == 5
    truth.times = truth.times[:8]
    with pytest.raises(ValueError, match=r"no valid time .* is for 2020-01-03T12.* covers 2020-01-01"):
        match(ensemble, truth)


def test_lead_times_can_be_chosen(ensemble, truth):
    pair = match(ensemble, truth, lead_h=(24, 6))
    assert (pair.lead_h, pair.leads) == ((6, 24), (0, 2))
    np.testing.assert_array_equal(pair.read_forecast(1, 1), ensemble.fields[1, 2])
    with pytest.raises(ValueError, match="no lead time of 7 h; it has 6, 12, 24"):
        match(ensemble, truth, lead_h=(7,))


def test_a_missing_value_is_named(ensemble, truth):
    ensemble.fields[1, 0, 2, 4, 3, 5] = np.nan
    with pytest.raises(
        ValueError, match=r"init 2020-01-04T12:00:00, lead 6 h, member 2 has u850 = nan at row 3, col 5"
    ):
        match(ensemble, truth).read_forecast(1, 0)
    row, col = np.argwhere(~truth.mask_CYX[5])[0]
    ensemble.fields[0, 0, :, 5, row, col] = np.nan  # on land nobody asks for a sea surface temperature
    match(ensemble, truth).read_forecast(0, 0)
