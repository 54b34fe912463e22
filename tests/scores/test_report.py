"""Tables and files hold the numbers of the scorecard."""

import csv
import dataclasses
import io
import json

import numpy as np
import pytest
from rich.console import Console

from aeris.scores.display import display_unit, headline_channels, lead_text, spread_out, time_text
from aeris.scores.report import as_json, decimals, number, print_tables, write_files
from aeris.scores.scorecard import MEANING


def printed(card, leads, width=80):
    console = Console(width=width, record=True, file=io.StringIO())
    print_tables(card, console, leads)
    return console.export_text()


def test_tables_fit_a_terminal_and_say_how_they_were_made(card):
    text = printed(card, [0, 2])
    assert "…" not in text
    for words in (
        "made-up weather: mean over 6 channels",
        "made-up weather: 6 h ahead",
        "made-up weather: 24 h ahead",
        "4 members, 2 init times, 2020-01-03 12 UTC to 2020-01-04 12 UTC, area weights 'cell'",
        "mean by hour of day, 2020-01-01 .. 2020-01-03, 7 times (shorter than a year",
        "regions, 24 h ahead",
        "unbiased spread/skill ratio",
    ):
        assert words in text
    line = next(line for line in text.splitlines() if line.strip().startswith("q700"))
    value = card.values["rmse"][0, card.names.index("q700")] * 1000
    assert line.split()[1:3] == ["g/kg", number(value, decimals(value))]


def test_of_many_lead_times_every_nth_is_shown_and_the_last(card, monkeypatch):
    monkeypatch.setattr("aeris.scores.report._ROWS", 2)
    table = printed(card, []).split("regions")[0]
    shown = [text for text in map(lead_text, card.lead_h) if f" {text} " in table]
    assert "1 lead time in 2" in table
    assert shown == [lead_text(hours) for hours in card.lead_h[::-1][::2][::-1]]


def test_one_member_is_said(one_member_card):
    assert "one member: CRPS is the mean absolute error" in printed(one_member_card, [0])


def test_csv_is_tidy_and_in_si_units(card, tmp_path):
    csv_path = write_files(card, tmp_path / "out")[1]
    with csv_path.open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["channel", "lead_h", "metric", "value"]
    assert {row["metric"] for row in rows} <= set(MEANING)
    found = [row for row in rows if (row["channel"], row["lead_h"], row["metric"]) == ("q700", "24", "crps")]
    assert float(found[0]["value"]) == pytest.approx(
        card.values["crps"][2, card.names.index("q700")], rel=1e-7
    )
    assert not [row for row in rows if (row["channel"], row["metric"]) == ("sst", "lsd_mean")]
    assert sorted(path.name for path in csv_path.parent.iterdir()) == [
        "regions.csv",
        "scores.csv",
        "scores.json",
        "spectra.npz",
    ]


def test_json_is_strict_and_complete(card, tmp_path):
    path = write_files(card, tmp_path)[0]
    record = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert record["lead_h"] == [6, 12, 24]
    assert record["area_weights"] == "cell"
    assert record["units"]["msl"] == "Pa"
    assert set(record["scores"]) == set(record["meaning"]) == set(card.values)
    np.testing.assert_allclose(record["scores"]["rmse"]["z500"], card.values["rmse"][:, 2])
    assert record["scores"]["lsd_member"]["sst"] == [None, None, None]
    assert np.shape(record["rank_histogram"]["t2m"]) == (3, 5)


def test_spectra_are_arrays_with_names(card, tmp_path):
    write_files(card, tmp_path)
    with np.load(tmp_path / "spectra.npz") as arrays:
        np.testing.assert_array_equal(arrays["mean"][0], card.spectra.mean_JCK)
        assert arrays["band"].tolist() == ["30-60", "tropics", "30-60N", "30-60S", "polar"]
        assert arrays["truth"].shape == (5, 3, 6, 9)
        assert arrays["channel"].tolist() == list(card.names)
    card = dataclasses.replace(card, spectra=None, bands={})
    written = [path.name for path in write_files(card, tmp_path / "none")]
    assert written == ["scores.json", "scores.csv", "regions.csv"]


def test_the_same_scores_give_the_same_bytes(card, one_member_card, tmp_path):
    first = [path.read_bytes() for path in write_files(card, tmp_path)]
    assert [path.read_bytes() for path in write_files(card, tmp_path)] == first
    assert as_json(one_member_card)["scores"]["ssr"]["t2m"] == [None, None, None]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1234.5, "1234"),
        (12.345, "12.3"),
        (0.01234, "0.0123"),
        (1.2e-9, "0.000000"),
        (0.0, "0.00"),
        (np.nan, "-"),
    ],
)
def test_numbers_have_three_digits(value, text):
    assert number(value, decimals(value)) == text


def test_words_a_reader_sees():
    assert display_unit("m2 s-2") == (1.0, "m² s⁻²")
    assert display_unit("Pa") == (0.01, "hPa")
    assert display_unit("kg m-2") == (1.0, "kg m⁻²")
    assert display_unit("1") == (1.0, "1")
    assert [lead_text(hours) for hours in (6, 24, 48, 54, 240)] == ["6 h", "24 h", "2 d", "54 h", "10 d"]
    assert time_text(np.datetime64("2000-06-01T06:00:00")) == "2000-06-01 06 UTC"
    assert time_text(np.datetime64("2000-06-01T06:30:00")) == "2000-06-01 06:30 UTC"
    assert headline_channels(["u300", "t850", "z500", "u500"], 3) == [2, 1, 0]
    assert spread_out(4, 3) == [0, 2, 3]
    assert spread_out(2, 3) == [0, 1]
    assert spread_out(40, 4) == [9, 19, 29, 39]
