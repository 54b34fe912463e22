"""Statistics that other projects publish are read by the names of their channels, in our order."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from aeris.data.foreign_statistics import is_foreign, read_statistics
from tests.data import writers

CHANNELS = ("t2m", "u10", "z500", "q850", "sst")
MEAN = {"t2m": 278.0, "u10": -0.1, "z500": 54100.0, "q850": 0.006, "sst": 287.0}
STD = {"t2m": 21.0, "u10": 5.5, "z500": 3350.0, "q850": 0.004, "sst": 11.5}
DIFF = {"t2m": 2.0, "u10": 2.5, "z500": 590.0, "q850": 0.001, "sst": 0.1}


def swift(root: Path, mean: dict[str, float] = MEAN) -> Path:
    """Write npz files keyed by WeatherBench 2 names; only the std of changes, as Swift does."""
    full = dict(zip(CHANNELS, ("2m_temperature", "10m_u_component_of_wind", "geopotential_500")))
    full |= {"q850": "specific_humidity_850", "sst": "sea_surface_temperature"}
    root.mkdir()
    for file, values in (("mean", mean), ("std", STD), ("diff_std_6", DIFF), ("diff_std_24", DIFF)):
        arrays = {full[name]: np.array([value]) for name, value in values.items()}
        np.savez(root / f"normalize_{file}.npz", **arrays)
    np.savez(root / "normalize_diff_mean_24.npz", **{full[name]: np.array([0.5]) for name in CHANNELS})
    return root


def makani(root: Path) -> Path:
    """Write npy files by channel, in another order, names in metadata/data.json; steps of 6 h."""
    writers.makani_metadata(root, writers.atmosphere(times=1))
    names = list(writers.columns(writers.atmosphere(times=1)))
    ours = {name: "u10" if name == "u10m" else name for name in names}
    (root / "stats").mkdir()
    for file, values in (
        ("global_means", MEAN),
        ("global_stds", STD),
        ("time_diff_stds_dt1", DIFF),
        ("time_diff_stds_dt4", DIFF),
        ("time_diff_means_dt4", dict.fromkeys(CHANNELS, 0.5)),
    ):
        array = np.array([values.get(ours[name], 1.0) for name in names], np.float32)
        np.save(root / "stats" / f"{file}.npy", array.reshape(1, -1, 1, 1))
    return root


@pytest.mark.parametrize("write", [swift, makani])
def test_statistics_are_chosen_by_name(write: Callable[[Path], Path], tmp_path: Path) -> None:
    path = write(tmp_path / "there")
    assert is_foreign(path) and not is_foreign(tmp_path)
    names = CHANNELS[::-1]
    found = read_statistics(path, names, (6, 24))
    np.testing.assert_allclose(found.mean_C, [MEAN[name] for name in names], rtol=1e-6)
    np.testing.assert_allclose(found.std_C, [STD[name] for name in names], rtol=1e-6)
    for hours, mean in ((6, 0.0), (24, 0.5)):
        np.testing.assert_allclose(found.residual_std[hours], [DIFF[name] for name in names], rtol=1e-6)
        np.testing.assert_array_equal(found.residual_mean[hours], mean)
    assert np.isnat(found.train_period[0])


def test_statistics_of_anemoi(tmp_path: Path) -> None:
    air = writers.atmosphere(times=3)
    path = writers.anemoi(tmp_path / "a.zarr", air, statistics_end_date="1999-12-31T18:00:00")
    found = read_statistics(path, ("z500", "t2m"), (6,))
    t2m = air["2m_temperature"].values.astype(np.float64)
    np.testing.assert_allclose([found.mean_C[1], found.std_C[1]], [t2m.mean(), t2m.std()], rtol=1e-6)
    assert (found.residual_mean[6][0], found.residual_std[6][0]) == (0.5, 2.0)
    assert np.isnat(found.train_period[1])  # only one end is known
    with pytest.raises(ValueError, match="has no changes over 24 h; its intervals: 6 h"):
        read_statistics(path, ("t2m",), (24,))


def test_what_is_missing_or_wrong_is_named(tmp_path: Path) -> None:
    path = swift(tmp_path / "s")
    with pytest.raises(ValueError, match="has no changes over 12 h; its intervals: 6 h 24 h"):
        read_statistics(path, CHANNELS, (12,))
    with pytest.raises(ValueError, match="has no mean of v10, z850; it has t2m, u10, z500"):
        read_statistics(path, ("t2m", "v10", "z850"), (6,))
    with pytest.raises(ValueError, match="the mean of t2m is 4.85 .*120 to 350 is expected .K.: it is"):
        read_statistics(swift(tmp_path / "c", {**MEAN, "t2m": 4.85}), CHANNELS, (6,))
    (path / "normalize_std.npz").write_bytes(b"PK\x03\x04 cut")
    with pytest.raises(ValueError, match="normalize_std.npz is damaged"):
        read_statistics(path, CHANNELS, (6,))
    (path / "normalize_std.npz").unlink()
    with pytest.raises(ValueError, match="normalize_std.npz is missing"):
        read_statistics(path, CHANNELS, (6,))
    root = makani(tmp_path / "m")
    np.save(root / "stats" / "global_stds.npy", np.ones((1, 3, 1, 1)))
    with pytest.raises(ValueError, match="global_stds.npy has 3 numbers, .* names 20 channels"):
        read_statistics(root / "stats", CHANNELS, (6,))
    with pytest.raises(ValueError, match="holds no statistics"):
        read_statistics(tmp_path, CHANNELS, (6,))
