"""Spectra of fields whose spectrum is known on paper."""

import numpy as np
import pytest

from aeris.scores.spectra import (
    EARTH_RADIUS_M,
    SpectrumSums,
    band_rows,
    log_spectral_distance,
    spans_circle,
    zonal_power,
)

LATITUDE_DEG = np.array([75.0, 45.0, 15.0, -15.0, -45.0, -75.0])


def wave(cols, wavenumber, amplitude=3.0):
    return amplitude * np.cos(2 * np.pi * wavenumber * np.arange(cols) / cols + 0.4)


@pytest.mark.parametrize("cols", [15, 16])
def test_a_sinusoid_has_its_power_at_its_wavenumber(cols):
    power_YK = zonal_power(np.tile(5 + wave(cols, 4), (6, 1)), LATITUDE_DEG)
    around_m = 2 * np.pi * EARTH_RADIUS_M * np.cos(np.deg2rad(LATITUDE_DEG))
    np.testing.assert_allclose(power_YK[:, 4], around_m * 3.0**2 / 2, rtol=1e-12)
    np.testing.assert_allclose(power_YK[:, 0], around_m * 25, rtol=1e-12)
    assert np.delete(power_YK, [0, 4], axis=1).max() < 1e-20 * around_m.max()


@pytest.mark.parametrize("cols", [15, 16])
def test_power_sums_to_the_mean_square(cols):
    field = np.random.default_rng(0).standard_normal((2, 6, cols))
    around_m = 2 * np.pi * EARTH_RADIUS_M * np.cos(np.deg2rad(LATITUDE_DEG))
    np.testing.assert_allclose(
        zonal_power(field, LATITUDE_DEG).sum(axis=-1), around_m * (field**2).mean(axis=-1), rtol=1e-12
    )


def test_bands_take_their_belts():
    np.testing.assert_array_equal(band_rows(LATITUDE_DEG), [1, 4])
    np.testing.assert_array_equal(band_rows(LATITUDE_DEG, "30-60S"), [4])
    np.testing.assert_array_equal(band_rows(LATITUDE_DEG, "tropics"), [2, 3])
    np.testing.assert_array_equal(band_rows(LATITUDE_DEG, "polar"), [0, 5])
    with pytest.raises(ValueError, match="no row in the band '30-60' .* the rows are -80 to 75"):
        band_rows(np.array([75.0, 0.0, -80.0]))


def test_only_a_full_circle_of_equal_steps_counts():
    assert spans_circle(np.arange(0, 360, 7.5))
    assert spans_circle(np.arange(3.75, 360, 7.5))
    assert not spans_circle(np.arange(0, 180, 7.5))
    assert not spans_circle(np.array([0.0, 90.0, 200.0, 270.0]))


def test_distance_is_in_decibels_and_leaves_out_empty_wavenumbers():
    truth = np.array([1.0, 2.0, 4.0, 0.0])
    assert log_spectral_distance(truth, truth) == 0
    assert log_spectral_distance(truth * [1, 10, 10, 1], truth) == pytest.approx(10)
    assert np.isnan(log_spectral_distance(np.zeros(4), truth))


def test_running_means_of_truth_members_and_ensemble_mean():
    cols, rng = 16, np.random.default_rng(1)
    mask_CYX = np.ones((2, 6, cols), dtype=bool)
    mask_CYX[1, 4, 0] = False  # a gap inside the band: no spectrum for that channel
    sums = SpectrumSums(1, LATITUDE_DEG, mask_CYX)
    cases = [rng.standard_normal((5, 2, 6, cols)).astype(np.float32) for _ in range(2)]
    parts = []
    for x_MCYX in cases:
        sums.begin(0)
        sums.add(0, x_MCYX[1:], x_MCYX[0], np.datetime64("2000-01-01"))
        parts.append(sums.end())
    bands = sums.combine(parts)
    spectra = bands["30-60"]
    x_TMYX = np.stack(cases)[:, :, 0].astype(np.float64)

    def expected(field):
        return zonal_power(field, LATITUDE_DEG)[..., [1, 4], :].mean(axis=tuple(range(field.ndim - 1)))

    np.testing.assert_allclose(spectra.truth_JCK[0, 0], expected(x_TMYX[:, 0]), rtol=1e-12)
    np.testing.assert_allclose(spectra.member_JCK[0, 0], expected(x_TMYX[:, 1:]), rtol=1e-12)
    np.testing.assert_allclose(spectra.mean_JCK[0, 0], expected(x_TMYX[:, 1:].mean(axis=1)), rtol=1e-12)
    assert np.isnan(spectra.truth_JCK[0, 1]).all()
    distances = spectra.distances()
    assert np.isnan(distances["lsd_member"][0, 1])
    # four independent members: their mean has a quarter of the power
    assert distances["lsd_mean"][0, 0] > distances["lsd_member"][0, 0]
    around_km = 2 * np.pi * EARTH_RADIUS_M * np.cos(np.deg2rad(45)) / 1000
    np.testing.assert_allclose(spectra.wavelength_km()[1:3], [around_km, around_km / 2])
    both = (bands["30-60N"].truth_JCK[0, 0] + bands["30-60S"].truth_JCK[0, 0]) / 2
    np.testing.assert_allclose(both, spectra.truth_JCK[0, 0], rtol=1e-12)
    assert np.isfinite(bands["tropics"].truth_JCK).all()


def test_spectra_that_are_too_many_are_of_some_leads_and_channels():
    mask_CYX = np.ones((3, 6, 16), dtype=bool)
    sums = SpectrumSums(4, LATITUDE_DEG, mask_CYX, first=(2,), most_bytes=2 * 3 * 5 * 9 * 8)
    assert (sums.leads, sums.channels, sums.complete) == ((1, 3), (2,), False)
    sums.begin(0)
    x_MCYX = np.ones((1, 3, 6, 16), dtype=np.float32)
    for lead in range(4):
        sums.add(lead, x_MCYX, x_MCYX[0], np.datetime64("2000-01-01"))
    truth_JC = sums.combine([sums.end()])["polar"].truth_JCK[..., 0]
    np.testing.assert_array_equal(np.isfinite(truth_JC), [[0, 0, 0], [0, 0, 1], [0, 0, 0], [0, 0, 1]])
