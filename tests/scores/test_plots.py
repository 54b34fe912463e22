"""Pictures come out whole, the same every time, and not blank; what they look like is for people to judge."""

import dataclasses
import json
import sys

import numpy as np
import pytest
from matplotlib.image import imread

from aeris.scores import plots
from aeris.scores.plots.training import read_log, smoothed


def check(path):
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert not list(path.parent.glob("*.part"))
    image = imread(path)
    assert image.shape[0] > 300
    assert image.shape[1] > 600
    assert (image[..., :3].min(axis=-1) < 0.9).mean() > 0.01


@pytest.mark.parametrize(
    ("draw", "options"),
    [(plots.plot_scorecard, {}), (plots.plot_curves, {"most": 2}), (plots.plot_ranks, {"most": 2})],
    ids=["scorecard", "curves", "ranks"],
)
@pytest.mark.parametrize("which", ["card", "one_member_card"])
def test_pictures_of_scores(draw, options, which, request, tmp_path):
    path = tmp_path / "plots" / "a.png"
    draw(request.getfixturevalue(which), path, **options)
    check(path)


@pytest.mark.parametrize("which", ["card", "one_member_card"])
def test_maps(which, request, tmp_path):
    case = request.getfixturevalue(which).case
    order = (5, 2)  # the sea surface temperature too, so that gaps are drawn
    fields = {
        name: None if getattr(case, name) is None else getattr(case, name)[list(order)]
        for name in ("truth_CYX", "mean_CYX", "member_CYX", "spread_CYX")
    }
    case = dataclasses.replace(case, channels=tuple(case.channels[place] for place in order), **fields)
    plots.plot_maps(case, "made-up weather", tmp_path / "maps.png", most=2)
    check(tmp_path / "maps.png")


def test_maps_of_a_box_without_coast(card, tmp_path):
    case = dataclasses.replace(card.case, longitude_deg=card.case.longitude_deg / 8 + 3, land_YX=None)
    plots.plot_maps(case, "made-up weather", tmp_path / "maps.png", most=1)
    check(tmp_path / "maps.png")


def test_spectra(card, tmp_path):
    plots.plot_spectra(card, tmp_path / "spectra.png", lead=2, most=2)
    check(tmp_path / "spectra.png")
    with pytest.raises(ValueError, match="no spectra to draw"):
        plots.plot_spectra(dataclasses.replace(card, spectra=None), tmp_path / "none.png", lead=0)


def test_the_same_scores_give_the_same_picture(card, tmp_path):
    plots.plot_scorecard(card, tmp_path / "a.png")
    plots.plot_scorecard(card, tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_unknown_ratios_are_drawn(card, tmp_path):
    values = dict(card.values)
    values["rmse_ratio"] = values["rmse_ratio"].copy()
    values["rmse_ratio"][0] = np.nan
    values["rmse_ratio"][1, 0] = 50.0
    plots.plot_scorecard(dataclasses.replace(card, values=values), tmp_path / "a.png")
    check(tmp_path / "a.png")


def test_without_matplotlib_the_message_says_what_to_install(card, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install 'aeris-swipe\[plot\]'"):
        plots.plot_scorecard(card, tmp_path / "a.png")
    assert issubclass(plots.NoMatplotlib, ValueError)
    assert not list(tmp_path.iterdir())


def write_log(path, records, tail=""):
    path.write_text("".join(json.dumps(record) + "\n" for record in records) + tail)
    return path


def record(images, loss):
    return {"images_seen": images, "loss": loss, "lr": 1e-3}


@pytest.mark.parametrize("fall", [1.0, 0.01])
def test_training_curve(fall, tmp_path):
    records = [record(8 * n, 0.1 + fall * float(np.exp(-n / 20))) for n in range(1, 100)]
    records[40]["loss"] = float("nan")  # a skipped step
    log = write_log(tmp_path / "log.jsonl", records, '{"images_seen": 8')
    plots.plot_training(log, tmp_path / "plots" / "training.png")
    check(tmp_path / "plots" / "training.png")


def test_training_curve_of_one_record(tmp_path):
    plots.plot_training(write_log(tmp_path / "log.jsonl", [record(8, 1.0)]), tmp_path / "a.png")
    check(tmp_path / "a.png")


def test_a_resumed_log_keeps_the_later_records(tmp_path):
    records = [
        record(8, 1.0),
        record(16, 2.0),
        record(24, 3.0),
        record(16, 4.0),
        {"images_seen": 20, "note": "hello"},
    ]
    images, loss, rate = read_log(write_log(tmp_path / "log.jsonl", records))
    np.testing.assert_array_equal(images, [8, 16])
    np.testing.assert_array_equal(loss, [1.0, 4.0])
    np.testing.assert_array_equal(rate, 1e-3)


def test_a_log_without_losses_or_with_nonsense_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no record with images_seen and loss"):
        read_log(write_log(tmp_path / "log.jsonl", []))
    (tmp_path / "log.jsonl").write_text("what\n" + json.dumps(record(8, 1.0)) + "\n")
    with pytest.raises(ValueError, match="line 1: not a JSON record"):
        read_log(tmp_path / "log.jsonl")


def test_smoothing_is_a_running_mean_of_what_is_finite():
    np.testing.assert_allclose(smoothed(np.array([1.0, 2, np.nan, 6, 8]), 3), [1.5, 1.5, 4, 7, 7])
    assert np.isnan(smoothed(np.array([np.nan]), 3)).all()
