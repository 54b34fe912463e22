"""`python -m aeris.data inspect|stats|convert|bench`: what they say, and what they change."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aeris.data.__main__ import main
from aeris.data.inspection import times_of
from aeris.data.options import Options
from aeris.data.plan import plan
from aeris.data.statistics import Statistics
from aeris.data.statistics_hints import hints
from aeris.data.store import Store, packaged_sample
from aeris.log import console

Program = Callable[..., Any]


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Program:
    """Return what runs the program and returns what it says, read as JSON if it was asked for."""

    def run(*words: object) -> Any:
        monkeypatch.setattr(sys, "argv", ["data", *map(str, words)])
        monkeypatch.setattr(console, "width", 200)
        main()
        said = capsys.readouterr().out
        return json.loads(said) if "--json" in words else said

    return run


@pytest.fixture
def copy(store_path: Path, tmp_path: Path) -> Path:
    """Return a copy of the store that may be changed."""
    return Path(shutil.copytree(store_path, tmp_path / "copy"))


def test_inspect_says_what_a_source_holds(program: Program, weather, tmp_path: Path) -> None:
    dataset = weather(times=12, sst=True).isel(time=[0, 1, 2, 3, 6, 7, 8, 9, 10, 11])
    dataset["2m_temperature"] = 250 + 0.05 * (dataset["2m_temperature"] - 280)  # as on Earth
    dataset.to_netcdf(tmp_path / "gap.nc", engine="h5netcdf")
    (report,) = program("inspect", tmp_path / "gap.nc", "--json")["reports"]
    assert report["layout"].startswith("NetCDF")
    assert len(report["fingerprint"]) == 16
    assert (report["times"]["count"], report["times"]["step_h"]) == (10, 6)
    assert report["times"]["gaps"] == [["1999-12-31T12:00:00", "2000-01-01T06:00:00"]]
    assert "not all 6 h apart: 1 gaps" in report["problems"][0]
    by_name = {row["name"]: row for row in report["values"]}
    field = dataset["temperature"].values[-1, 1]
    assert by_name["temperature 500 hPa"]["mean"] == pytest.approx(field.mean(dtype=np.float64), rel=1e-7)
    assert by_name["sea_surface_temperature"]["missing"] == pytest.approx(0.5)
    assert by_name["2m_temperature"]["odd"] is None
    assert "-250 to 250 is expected" in by_name["u_component_of_wind 300 hPa"]["odd"]
    said = program("inspect", tmp_path / "gap.nc", "--no-values")
    assert "12 x 24" in said
    assert "problem: the times are not all" in said
    assert "highest" not in said


def test_inspect_names_what_it_refuses_and_shows_the_rest(
    program: Program, source: Path, tmp_path: Path
) -> None:
    (tmp_path / "text.nc").write_text("no weather")
    with pytest.raises(ValueError, match=r"text.nc.*neither NetCDF") as caught:
        program("inspect", tmp_path / "text.nc", source, tmp_path / "none.nc")
    assert "none.nc does not exist" in str(caught.value)
    with pytest.raises(ValueError, match="name at least one"):
        program("inspect")


def test_inspect_store(program: Program, copy: Path) -> None:
    (report,) = program("inspect", copy, "--json")["reports"]
    assert report["fingerprint"] == Store(copy).fingerprint_id
    assert [(one["name"], one["times"], one["state"]) for one in report["files"]] == [
        ("1999.h5", 5, ""),
        ("2000.h5", 5, ""),
    ]
    sst = next(row for row in report["values"] if row["name"] == "sst")
    assert sst["missing"] == pytest.approx(1 - Store(copy).masks["sst"].mean())
    with (copy / "1999.h5").open("r+b") as file:
        file.truncate(1000)
    (copy / "2000.h5").unlink()
    said = program("inspect", copy)
    assert "problem: 1999.h5: 1000 bytes in place of" in said
    assert "problem: 2000.h5: missing; copy it again" in said


def test_inspect_unfinished(program: Program, source: Path, tmp_path: Path, monkeypatch) -> None:
    from aeris.data import conversion

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(conversion, "find_masks", stop)
    with pytest.raises(KeyboardInterrupt):
        conversion.run(plan(Options((str(source), str(tmp_path / "store")), window=6)))
    for path in ("store", "store.partial"):
        said = program("inspect", tmp_path / path)
        assert "10 of 10" in said
        assert "run the same convert command again" in said


@pytest.mark.parametrize(
    ("hours", "step", "gaps"),
    [([0, 6, 12], 6, 0), ([0, 6, 18, 24], 6, 1), ([0, 1, 6, 12, 18], 6, 2), ([0], None, 0)],
)
def test_times(hours: list[int], step: int | None, gaps: int) -> None:
    report = times_of(np.datetime64("2000-02-28", "s") + np.array(hours) * np.timedelta64(3600, "s"))
    assert report.get("step_h") == step
    assert len(report["gaps"]) == gaps
    assert len(report["problems"]) == (gaps > 0)


def test_stats_shows_and_writes_nothing(program: Program, copy: Path) -> None:
    before = (copy / "store.h5").read_bytes()
    found = program("stats", copy, "--json")
    numbers = Store(copy).statistics
    assert found["channels"]["z500"]["change_std"]["24"] == numbers.residual_std[24][5]
    said = program("stats", copy, "--recompute", "1999", "2000", "--dry-run")
    assert "mean before" in said
    assert (copy / "store.h5").read_bytes() == before


def test_recomputed_statistics_are_those_of_a_conversion(
    program: Program, copy: Path, source, convert
) -> None:
    """Of another period and interval, and back again: to the last bit, so runs take the store as before."""
    old = Store(copy)
    period, other = [str(time) for time in old.statistics.train_period], ("1999-12-31", "2000-01-01")
    said = program("stats", copy, "--recompute", *other, "--intervals-h", "12")
    expected = convert(source, copy.parent / "expected", train_period=other, intervals_h=(12,))
    new = Store(copy)
    assert new.fingerprint == expected.fingerprint
    assert new.statistics.residual_std[12].tobytes() == expected.statistics.residual_std[12].tobytes()
    assert (new.made["train period"], new.made["intervals_h"]) == (expected.made["train period"], [12])
    assert f"now has the fingerprint {new.fingerprint_id}, before {old.fingerprint_id}" in said
    program("stats", copy, "--recompute", *period, "--intervals-h", "6", "24", "--processes", "1")
    assert Store(copy).fingerprint == old.fingerprint
    assert Store(copy).read(3).tobytes() == old.read(3).tobytes()


def test_recompute_refuses(program: Program, copy: Path) -> None:
    before = (copy / "store.h5").read_bytes()
    for words, message in (
        (("--recompute", "1979", "1980"), "no time from 1979.* the store covers 1999-12-30T18"),
        (("--recompute", "1999", "2000", "--intervals-h", "9"), "are 9 h apart: choose other --intervals-h"),
        (("--recompute", "1999", "2000", "--from", copy), "two ways"),
        (("--intervals-h", "12"), "go with --recompute or --from"),
        (("--processes", "2"), "--processes goes with --recompute"),
    ):
        with pytest.raises(ValueError, match=message):
            program("stats", copy, *words)
    assert (copy / "store.h5").read_bytes() == before


def write_foreign(folder: Path, store: Store, without: str = "") -> None:
    """Write statistics as Swift does, by the name of the field."""
    folder.mkdir()
    names = [name for name in store.names if name != without]
    for kind, value in (("mean", 0.0), ("std", 2.0), ("diff_std_6", 3.0)):
        means = {"z": 5e4, "t": 280.0, "s": 290.0, "m": 1e5}
        numbers = {
            f"{name[0]}_{name[1:]}" if name[1:].isdigit() and name not in ("u10", "v10") else name: np.array(
                [
                    value
                    or {"z300": 9e4, "z500": 5.5e4, "z850": 1.4e4, "q850": 1e-2}.get(
                        name, means.get(name[0], 0.0)
                    )
                ]
            )
            for name in names
        }
        np.savez(folder / f"normalize_{kind}.npz", **numbers)


def test_statistics_of_others_are_taken_over(program: Program, copy: Path, source, convert, tmp_path) -> None:
    store = Store(copy)
    write_foreign(tmp_path / "swift", store)
    write_foreign(tmp_path / "few", store, without="sst")
    with pytest.raises(ValueError, match=r"few has no mean of sst"):
        program("stats", copy, "--from", tmp_path / "few", "--intervals-h", 6)
    with pytest.raises(ValueError, match=r"no changes over 24 h; its intervals: 6 h"):
        program("stats", copy, "--from", tmp_path / "swift")
    program("stats", copy, "--from", tmp_path / "swift", "--intervals-h", 6)
    numbers = Store(copy).statistics
    assert numbers.mean_C[store.names.index("z850")] == 1.4e4
    assert (numbers.std_C == 2.0).all()
    assert (numbers.residual_std[6] == 3.0).all()
    assert numbers.train_period == store.statistics.train_period
    options = {"intervals_h": (6,), "train_period": ("1999-12-30", "2000-01-01T06")}
    other = convert(source, tmp_path / "other", statistics_from=str(tmp_path / "swift"), **options)
    assert other.fingerprint == Store(copy).fingerprint
    assert other.made["statistics from"] == Store(copy).made["statistics from"] != ""


def test_hints_name_what_is_odd() -> None:
    store = Store(packaged_sample())
    good = store.statistics
    assert hints(store, good) == ["the train period has 30 days: its statistics know one season, not a year"]
    c = store.names.index("z500")

    def changed(**parts: Any) -> list[str]:
        fields = {key: getattr(good, key) for key in ("mean_C", "std_C", "residual_mean", "residual_std")}
        period = (np.datetime64("1999-01-01", "s"), np.datetime64("2000-01-01", "s"))
        return hints(store, Statistics(**{**fields, **parts}, train_period=period))

    def with_one(numbers: np.ndarray, value: float) -> np.ndarray:
        return np.where(np.arange(len(numbers)) == c, value, numbers)

    assert changed() == []
    (said,) = changed(mean_C=with_one(good.mean_C, 5600.0))
    assert said.startswith("the mean is not plausible; another unit?: z500 5600 m2 s-2")
    (said, *_) = changed(std_C=with_one(good.std_C, 0.0))
    assert "z500 0" in said
    residual = {**good.residual_std, 24: with_one(good.residual_std[24], 1.0)}
    (said, *_) = changed(residual_std=residual)
    assert said == "changes less over 24 h than over a shorter interval: z500 1"
    drift = {**good.residual_mean, 6: with_one(good.residual_mean[6], 100.0)}
    (said,) = changed(residual_mean=drift)
    assert said.startswith("drifts: mean change over 6 h in units of its std: z500 0.7")
    store.made = {"sources": ["1959-2023-era5.zarr"]}
    said = changed(mean_C=with_one(good.mean_C, 44000.0))
    assert "z500: mean 44000, where ERA5 at 1.5 degrees has 54133" in said


def test_dry_run_says_hours_memory_and_stripes(
    program: Program, source: Path, tmp_path: Path, monkeypatch
) -> None:
    words = ("convert", source, tmp_path / "store", "--window", 6, "--dry-run", "--processes", 4)
    said = program(*words, "--rate-mb-s", 2, "--json")
    expected, size = said["expected"], said["bytes"]
    assert expected["hours"] == pytest.approx(size / 2e6 / 4 / 3600)
    assert expected["read_back_bytes"] == pytest.approx(0.7 * size)  # 7 of 10 times
    assert not expected["measured"]
    assert expected["stripes"] == ""
    measured = program(*words, "--json")["expected"]
    assert measured["measured"]
    assert measured["mb_per_s"] > 0
    monkeypatch.setattr("aeris.data.conversion_estimate.LARGE_BYTES", 1e4)
    said = program(*words)
    assert f"mkdir {tmp_path / 'store.partial'} && lfs setstripe -c 8 -S 16M" in said
    assert "with 4 processes of" in said


def test_units_can_be_told(weather, convert, tmp_path: Path) -> None:
    dataset = weather()
    dataset["mean_sea_level_pressure"] = dataset["mean_sea_level_pressure"] / 100
    dataset.to_netcdf(tmp_path / "hpa.nc", engine="h5netcdf")
    told = convert(tmp_path / "hpa.nc", tmp_path / "told", units=("msl=hPa",))
    assert told.statistics.mean_C[3] == pytest.approx(101500, rel=0.01)
    assert told.made["units"] == ["msl=hPa"]
    with pytest.raises(ValueError, match="--units msl: write it as NAME=UNIT"):
        convert(tmp_path / "hpa.nc", tmp_path / "other", units=("msl",))


def test_a_placeholder_is_said(program: Program, weather, tmp_path: Path) -> None:
    dataset = weather(sst=True)
    dataset["sea_surface_temperature"] = dataset["sea_surface_temperature"].fillna(9999.0)
    dataset["sea_surface_temperature"].attrs["units"] = "K"
    dataset.to_netcdf(tmp_path / "x.nc", engine="h5netcdf")
    said = program("convert", tmp_path / "x.nc", tmp_path / "store", "--window", 6, "--dry-run")
    assert "sea_surface_temperature of 9999 is read as missing" in said


def test_bench_reads_a_share(program: Program, store_path: Path) -> None:
    words = ("bench", store_path, "--layout", 2, 1, "--workers", 0, "--images-per-s", 3)
    found = program(*words, "--json")
    assert found["sample_bytes"] == 2 * 6 * 24 * 20 * 4
    assert found["needed_bytes_per_s"] == 3 * found["sample_bytes"]
    assert len(found["rates"]) == 4
    assert all(rate > 0 for rate in found["rates"].values())
    assert "samples/s" in program(*words)
    with pytest.raises(ValueError, match="does not tile"):
        program("bench", store_path, "--window", 5)
