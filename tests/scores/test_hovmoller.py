"""Sections and the Nino 3.4 index against plain means."""

import numpy as np
import pytest

from aeris.data.variables import channel, latitude_weights
from aeris.scores.hovmoller import HovmollerSums, band, default_sections
from aeris.scores.plots.hovmoller import plot_hovmoller, plot_nino34
from tests.scores.test_plots import check

LATITUDE = np.array([20.0, 4.0, -4.0, -20.0])
LONGITUDE = np.arange(24) * 15.0
LEADS = (0, 24, 48, 72)
INITS = np.array(["2003-01-01T00", "2003-02-01T00"], dtype="datetime64[s]")
NAMES = ("t2m", "q700", "sst")
MASK = np.ones((3, 4, 24), dtype=bool)
MASK[2, 1:3, 3] = False
MASK[2, 1, 13] = False


class Usual:
    """A climatology of three numbers."""

    def at(self, time):
        return np.full((3, 4, 24), [[[280.0]], [[5e-3]], [[290.0]]], dtype=np.float32)

    def describe(self):
        return "made up"


def gather(truth=True, names=NAMES, **options):
    channels = [channel(name) for name in names]
    weight_Y = latitude_weights(LATITUDE)
    where = (LATITUDE, LONGITUDE, MASK[: len(names)], weight_Y)
    sums = HovmollerSums(INITS, 1, LEADS, channels, 5, *where, Usual(), **options)
    rng = np.random.default_rng(0)
    fields = rng.standard_normal((2, 4, 6, 3, 4, 24)).astype(np.float32) + Usual().at(None)
    parts = []
    for init in range(2):
        sums.begin(init)
        for lead in range(4):
            x = fields[init, lead, :5, : len(names)]
            y = fields[init, lead, 5, : len(names)] if truth else None
            sums.add(lead, x, y, INITS[init] + np.timedelta64(LEADS[lead], "h"))
        parts.append(sums.end())
    return sums.combine(parts), fields, parts


def test_sections_are_means_over_the_band_without_the_climatology():
    found, fields, parts = gather(sections=("t2m", "sst"))
    assert found.band_deg == (-4.0, 4.0)
    assert found.member_MHJX.shape == (3, 2, 4, 24)
    assert [one.name for one in found.channels] == ["t2m", "sst"]
    assert found.init == INITS[1]
    expected = fields[1, 2, 1, 0, 1:3].mean(axis=0) - 280
    np.testing.assert_allclose(found.member_MHJX[1, 0, 2], expected, atol=1e-4)
    truth = fields[1, 3, 5, 2, 1:3].mean(axis=0) - 290
    assert np.isnan(found.truth_HJX[1, 3, 3])
    np.testing.assert_allclose(found.truth_HJX[1, 3, 13], fields[1, 3, 5, 2, 2, 13] - 290, atol=1e-4)
    others = [col for col in range(24) if col not in (3, 13)]
    np.testing.assert_allclose(found.truth_HJX[1, 3, others], truth[others], atol=1e-4)
    assert "member" not in parts[0]


def test_nino34_is_the_mean_of_its_box():
    found, fields, _ = gather()
    cols = [13, 14, 15, 16]  # 195 to 240 degrees east
    weights = MASK[2, 1:3][:, cols]
    box = fields[:, :, :, 2, 1:3][..., cols].astype(np.float64)
    expected = np.average(box.reshape(2, 4, 6, -1), axis=-1, weights=weights.ravel()) - 290
    np.testing.assert_allclose(found.nino34_IMJ, np.moveaxis(expected[:, :, :5], 1, 2), atol=1e-4)
    np.testing.assert_allclose(found.nino34_truth_IJ, expected[:, :, 5], atol=1e-4)


def test_default_sections_and_bands():
    assert default_sections(("t2m", "z500", "u850", "q700")) == ["u850", "z500"]
    assert default_sections(("q700", "sst")) == ["q700"]
    np.testing.assert_array_equal(band(LATITUDE), [1, 2])
    np.testing.assert_array_equal(band(np.array([60.0, 7.0, -7.0, -60.0])), [1, 2])
    np.testing.assert_array_equal(band(LATITUDE, (15.0, 25.0)), [0])
    with pytest.raises(ValueError, match="no section of z500: the scored channels are t2m q700 sst"):
        gather(sections=("z500",))


def test_pictures(tmp_path):
    found, _, _ = gather(sections=("sst",))
    plot_hovmoller(found, tmp_path / "a.png", "made-up weather")
    alone, _, _ = gather(truth=False)
    assert np.isnan(alone.truth_HJX).all()
    plot_nino34(alone, tmp_path / "b.png", "made-up weather", most=1)
    for path in tmp_path.iterdir():
        check(path)


def test_without_sea_surface_temperature_there_is_no_index(tmp_path):
    found, _, _ = gather(names=("t2m", "q700"))
    assert np.isnan(found.nino34_IMJ).all()
    with pytest.raises(ValueError, match="no Nino 3.4 index"):
        plot_nino34(found, tmp_path / "a.png", "made-up weather")


def test_fine_longitudes_are_averaged():
    longitude_deg = np.arange(1440) / 4
    mask = np.ones((1, 4, 1440), dtype=bool)
    where = (LATITUDE, longitude_deg, mask, latitude_weights(LATITUDE))
    sums = HovmollerSums(INITS, 0, (6,), [channel("t2m")], 1, *where, Usual())
    assert len(sums.longitude_deg) == 360
    np.testing.assert_allclose(sums.longitude_deg[0], 0.375)
