"""Energy score, anomaly correlation and wind against packages and plain formulas."""

import numpy as np
import pytest
import scoringrules

from aeris.scores.anomalies import AnomalyScores
from aeris.scores.areas import AreaMean
from aeris.scores.energy import EnergyScores, energy_score
from aeris.scores.regions import region_weights, rows_between
from aeris.scores.winds import Picked, components, headline_speeds, speed_channel, vectors

CHANNELS, ROWS, COLS, MEMBERS = 2, 4, 6, 5
TIME = np.datetime64("2000-01-01T00", "s")
WEIGHT_Y = np.array([0.5, 1.5, 1.2, 0.8])


@pytest.fixture
def fields():
    rng = np.random.default_rng(0)
    y_CYX = rng.standard_normal((CHANNELS, ROWS, COLS)).astype(np.float32)
    x_MCYX = (y_CYX + 0.5 * rng.standard_normal((MEMBERS, *y_CYX.shape))).astype(np.float32)
    mask_CYX = np.ones(y_CYX.shape, dtype=bool)
    mask_CYX[1, 2, 3:] = False
    return x_MCYX, y_CYX, mask_CYX


def weights(mask_YX):
    weight_YX = np.where(mask_YX, WEIGHT_Y[:, None], 0.0)
    return weight_YX / weight_YX.sum()


def collected(collector, x_MCYX, y_CYX):
    collector.begin(0)
    collector.add(0, x_MCYX, y_CYX, TIME)
    return collector.combine([collector.end()])


def test_the_energy_score_equals_scoringrules(fields):
    x_MCYX, y_CYX, mask_CYX = fields
    std_C = np.array([2.0, 3.0])
    energy_JC, all_J = collected(EnergyScores(1, AreaMean(WEIGHT_Y, mask_CYX), std_C), x_MCYX, y_CYX)
    scaled = []
    for channel in range(CHANNELS):
        root_P = np.sqrt(weights(mask_CYX[channel]))[mask_CYX[channel]]
        x_MP = x_MCYX[:, channel, mask_CYX[channel]] * root_P
        y_P = y_CYX[channel, mask_CYX[channel]] * root_P
        # the default estimator of scoringrules is biased
        expected = scoringrules.es_ensemble(y_P, x_MP, m_axis=0, v_axis=1, estimator="fair")
        assert energy_JC[0, channel] == pytest.approx(float(expected), rel=1e-6)
        scaled.append((x_MP / std_C[channel], y_P / std_C[channel]))
    x_MP, y_P = (np.concatenate(both, axis=-1) / np.sqrt(CHANNELS) for both in zip(*scaled))
    expected = scoringrules.es_ensemble(y_P, x_MP, m_axis=0, v_axis=1, estimator="fair")
    assert all_J[0] == pytest.approx(float(expected), rel=1e-6)


def test_one_member_has_its_distance_as_energy_score():
    assert energy_score(np.array([9.0]), np.zeros((1, 1))) == 3.0
    # members 1 and 2 from the truth on either side, 3 apart: (1 + 2) / 2 - 3 / 2
    assert energy_score(np.array([1.0, 4.0]), np.array([[0.0, 9.0], [9.0, 0.0]])) == 0.0


def test_correlation_and_activity_equal_plain_formulas(fields):
    x_MCYX, y_CYX, mask_CYX = fields
    usual_CYX = np.full_like(y_CYX, 0.3)
    found = collected(AnomalyScores(1, AreaMean(WEIGHT_Y, mask_CYX), lambda time: usual_CYX), x_MCYX, y_CYX)
    for channel in range(CHANNELS):
        weight_YX = weights(mask_CYX[channel])
        f_YX = x_MCYX[:, channel].mean(axis=0, dtype=np.float64) - usual_CYX[channel]
        o_YX = (y_CYX - usual_CYX)[channel].astype(np.float64)

        def mean(field_YX, weight_YX=weight_YX):
            return (field_YX * weight_YX).sum()

        expected = mean(f_YX * o_YX) / np.sqrt(mean(f_YX**2) * mean(o_YX**2))
        assert found["acc"][0, channel] == pytest.approx(expected, rel=1e-6)
        assert found["activity"][0, channel] == pytest.approx(
            np.sqrt(mean((f_YX - mean(f_YX)) ** 2)), rel=1e-6
        )
        assert found["activity_truth"][0, channel] == pytest.approx(
            np.sqrt(mean((o_YX - mean(o_YX)) ** 2)), rel=1e-6
        )
        members = [x_YX - mean(x_YX) for x_YX in x_MCYX[:, channel] - usual_CYX[channel].astype(np.float64)]
        expected = np.sqrt(np.mean([mean(x_YX**2) for x_YX in members]))
        assert found["activity_member"][0, channel] == pytest.approx(expected, rel=1e-6)


def test_correlation_is_the_mean_of_ratios_over_init_times(fields):
    x_MCYX, y_CYX, mask_CYX = fields
    scores = AnomalyScores(2, AreaMean(WEIGHT_Y, mask_CYX), lambda time: 0 * y_CYX)
    parts = []
    for x, y in ((x_MCYX, y_CYX), (-x_MCYX, y_CYX)):  # the second one is wrong throughout
        scores.begin(0)
        scores.add(0, x, y, TIME)
        parts.append(scores.end())
    found = scores.combine(parts)["acc"]
    np.testing.assert_allclose(found[0], 0, atol=1e-12)
    assert np.isnan(found[1]).all()


def test_regions_are_those_of_weatherbench():
    latitude_deg = np.array([90.0, 20.0, 0.0, -20.0, -45.0])
    found = region_weights(latitude_deg, np.arange(1.0, 6))
    assert list(found) == ["global", "n-hem", "tropics", "s-hem"]
    np.testing.assert_array_equal(found["n-hem"], [1, 2, 0, 0, 0])
    np.testing.assert_array_equal(found["tropics"], [0, 2, 3, 4, 0])
    np.testing.assert_array_equal(rows_between(latitude_deg, (-90, -20)), [0, 0, 0, 1, 1])
    assert list(region_weights(np.array([60.0, 50.0]), np.ones(2))) == ["global", "n-hem"]


class Source:
    """Channels by name."""

    names = ("u10", "v10", "u850", "t2m")


def test_wind_speeds_are_made_of_their_components():
    assert (components("ws10"), components("ws_850")) == (("u10", "v10"), ("u850", "v850"))
    assert components("t2m") is None
    assert headline_speeds(Source.names) == ["ws10"]
    assert speed_channel("ws850").variable == "wind_speed"
    picked = Picked("forecast", Source(), ["t2m", "ws10"])
    x = np.zeros((2, 4, 1, 1), dtype=np.float32)
    x[:, 0], x[:, 1], x[:, 3] = 3, -4, 7
    np.testing.assert_array_equal(picked.fields(x)[:, :, 0, 0], [[7, 5], [7, 5]])
    mask = np.ones((4, 1, 2), dtype=bool)
    mask[1, 0, 0] = False
    np.testing.assert_array_equal(picked.mask(mask)[1], [[False, True]])
    with pytest.raises(
        ValueError, match="the forecast has no channel v850, which ws850 is made of; it has u10"
    ):
        Picked("forecast", Source(), ["ws850"])
    assert Picked("truth", Source(), Source.names).fields(x) is x


def test_wind_vectors_need_both_components():
    assert vectors(("u10", "v10", "u850", "z500", "u500", "v500")) == {"wv10": (0, 1), "wv500": (4, 5)}
