"""The whole pass over a forecast against the same scores computed from all fields at once."""

import numpy as np
import pytest

from aeris.scores.climatology import build, needed_slots
from aeris.scores.matching import match
from aeris.scores.scoring import Labels, Options, Scoring, score
from aeris.scores.spectra import zonal_power

LABELS = Labels("made-up weather", "forecast", "truth", "cell")


def test_streaming_equals_everything_at_once(ensemble, truth, weight_Y, card):
    place = truth.names.index("z500")
    x_IJMYX = ensemble.fields[:, :, :, place].astype(np.float64)
    valid_IJ, start_I = card_times(ensemble, truth)
    y_IJYX = truth.fields.astype(np.float32)[valid_IJ, place].astype(np.float64)
    weight_YX = np.broadcast_to(weight_Y[:, None], y_IJYX.shape[-2:])

    def mean(field_IJYX):
        return np.average(
            field_IJYX, axis=(-2, -1), weights=np.broadcast_to(weight_YX, field_IJYX.shape)
        ).mean(axis=0)

    rmse_J = np.sqrt(mean((x_IJMYX.mean(axis=2) - y_IJYX) ** 2))
    np.testing.assert_allclose(card.values["rmse"][:, place], rmse_J, rtol=1e-9)
    start = truth.fields.astype(np.float32)[start_I, place].astype(np.float64)[:, None]
    persistence_J = np.sqrt(mean((start - y_IJYX) ** 2))
    np.testing.assert_allclose(card.values["rmse_persistence"][:, place], persistence_J, rtol=1e-9)
    np.testing.assert_allclose(card.values["rmse_ratio"][:, place], rmse_J / persistence_J, rtol=1e-9)
    np.testing.assert_allclose(
        card.values["mae_persistence"][:, place], mean(np.abs(start - y_IJYX)), rtol=1e-9
    )
    hours = (truth.times[valid_IJ].astype("datetime64[h]").astype(int) % 24) // 6
    usual = np.stack([truth.fields[hour:10:4, place].astype(np.float32).mean(axis=0) for hour in range(4)])
    climate_J = np.sqrt(mean((usual[hours] - y_IJYX) ** 2))
    np.testing.assert_allclose(card.values["rmse_climatology"][:, place], climate_J, rtol=1e-5)
    band = (np.abs(truth.latitude_deg) >= 30) & (np.abs(truth.latitude_deg) <= 60)
    power_JK = zonal_power(y_IJYX[..., band, :], truth.latitude_deg[band]).mean(axis=(0, 2))
    np.testing.assert_allclose(card.spectra.truth_JCK[:, place], power_JK, rtol=1e-9)


def card_times(ensemble, truth):
    start_I = np.array([truth.index_of(init) for init in ensemble.inits])
    return start_I[:, None] + ensemble.lead_h[None] // 6, start_I


def test_the_case_keeps_what_was_read(ensemble, truth, card):
    case = card.case
    assert (case.lead_h, str(case.init), str(case.valid)) == (
        24,
        "2020-01-04T12:00:00",
        "2020-01-05T12:00:00",
    )
    place = truth.names.index("t2m")
    np.testing.assert_array_equal(case.truth_CYX[place], truth.read(18)[place])
    np.testing.assert_array_equal(case.member_CYX[place], ensemble.fields[1, 2, 0, place])
    np.testing.assert_allclose(case.mean_CYX[place], ensemble.fields[1, 2, :, place].mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(
        case.spread_CYX[place], ensemble.fields[1, 2, :, place].std(axis=0, ddof=1), rtol=1e-4
    )
    np.testing.assert_array_equal(np.isnan(case.truth_CYX[5]), ~truth.mask_CYX[5])


def test_sea_surface_temperature_is_scored_on_the_sea_and_has_no_spectrum(card, truth):
    place = truth.names.index("sst")
    assert np.isfinite(card.values["rmse"][:, place]).all()
    assert np.isnan(card.values["lsd_member"][:, place]).all()


def test_a_perfect_forecast_scores_zero(ensemble, truth):
    ensemble.fields[:] = truth.fields.astype(np.float32)[card_times(ensemble, truth)[0]][:, :, None]
    card = score(match(ensemble, truth), LABELS, None, (0, 0))
    for name in ("rmse", "rmse_member", "bias", "crps", "spread", "rmse_ratio"):
        np.testing.assert_array_equal(card.values[name], 0)
    assert np.isnan(card.values["ssr"]).all()
    assert "rmse_climatology" not in card.values
    np.testing.assert_allclose(card.ranks_JCS, 1 / 5)  # every truth ties with all members


def test_the_headline_names_the_worst_channel(card):
    rows = card.headline()
    assert [row["lead_h"] for row in rows] == [6, 12, 24]
    ratios_C = card.values["rmse_ratio"][2]
    assert rows[2]["rmse_ratio"] == pytest.approx(ratios_C.mean())
    assert rows[2]["worst_channel"] == card.names[int(np.argmax(ratios_C))]
    assert rows[2]["worst_ratio"] == ratios_C.max()


def test_lead_zero_has_no_ratio_to_persistence(ensemble, truth):
    ensemble.lead_h = np.array([0, 6, 12])
    card = score(match(ensemble, truth), LABELS, None, (0, 0))
    assert np.isnan(card.values["rmse_ratio"][0]).all()
    assert np.isfinite(card.values["rmse_ratio"][1:]).all()
    first = card.headline()[0]
    assert np.isnan(first["rmse_ratio"])
    assert first["worst_channel"] == ""


def test_a_box_without_a_full_circle_has_no_spectra(ensemble, truth):
    truth.longitude_deg = truth.longitude_deg / 4
    ensemble.longitude_deg = truth.longitude_deg
    card = score(match(ensemble, truth), LABELS, None, (0, 0))
    assert card.spectra is None
    assert "no spectra" in card.notes[0]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_member_that_blew_up_leaves_its_lead_time_without_scores(ensemble, truth, bad):
    place = truth.names.index("z500")
    ensemble.fields[1, 2, 0, place, 2, 5] = bad
    pair = match(ensemble, truth)
    period = (truth.times[0], truth.times[9])
    usual = build(truth, period, needed_slots(pair.truth_times), range(len(truth.names)), (0.9,))
    scoring = Scoring(pair, LABELS, usual, Options(quantiles=(0.9,), threads=1, finite=False))
    parts = [scoring.collect(init) for init in range(2)]
    card = scoring.combine(lambda name: [part[name] for part in parts])[0]
    row = card.events.channels.index(place)
    for values_J in (
        *(card.values[name][:, place] for name in ("rmse", "crps", "ssr", "acc", "energy", "lsd_member")),
        card.ranks_JCS[:, place, 0],
        card.events.scores()["brier"][:, row, 0],
    ):
        assert np.isfinite(values_J).tolist() == [True, True, False]
    assert np.isfinite(card.values["rmse"][:, truth.names.index("t2m")]).all()
