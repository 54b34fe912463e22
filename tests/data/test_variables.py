"""Names, units and weights, against published numbers and naive formulas."""

from __future__ import annotations

import numpy as np
import pytest

from aeris.data.variables import (
    ALIASES,
    LEVELLED,
    STATIC,
    SURFACE,
    aeris_channels,
    channel,
    channel_of,
    channel_weights,
    in_order,
    latitude_weights,
)


def test_channel_names_and_back() -> None:
    assert channel("z500").variable == "geopotential"
    assert (channel("t2m").level_hpa, channel("t2m").units) == (None, "K")
    for name in (*aeris_channels(sst=True), "w700", "r850", "q0.5", "u10hpa", "t2"):
        one = channel(name)
        assert one.name == name
        assert channel_of(one.variable, one.level_hpa) == one


def test_wind_at_ten_metres_is_not_wind_at_ten_hectopascals() -> None:
    assert channel("u10").variable == "10m_u_component_of_wind"
    assert channel_of("u_component_of_wind", 10).name == "u10hpa"
    assert channel("u10hpa").level_hpa == 10


@pytest.mark.parametrize("name", ["foo", "z", "x500", "t2m500", ""])
def test_unknown_channel_lists_the_known(name: str) -> None:
    with pytest.raises(ValueError, match="t2m u10 v10 msl"):
        channel(name)
    with pytest.raises(ValueError, match="geopotential"):
        channel_of("fluff", 500)


def test_published_order_has_69_channels_and_70_with_sea_temperature() -> None:
    names = aeris_channels(sst=False)
    assert len(names) == 69
    assert names[:6] == ("t2m", "u10", "v10", "msl", "z50", "z100")
    assert names[-1] == "q1000"
    assert aeris_channels(sst=True) == (*names, "sst")
    assert tuple(one.name for one in in_order(map(channel, sorted(aeris_channels(sst=True))))) == (
        *names,
        "sst",
    )


def test_aliases_lead_to_known_names() -> None:
    known = {name for table in (SURFACE, LEVELLED, STATIC) for name, _ in table.values()}
    assert set(ALIASES.values()) == known


# Numbers of the AERIS paper's weights, read from the published code: the divisor is 6.3, or 6.4 with sst.
@pytest.mark.parametrize(
    ("name", "sst", "expected"),
    [
        ("t2m", False, 1 / 6.3),
        ("t2m", False, 0.1587),
        ("u10", False, 0.01587),
        ("msl", False, 0.01587),
        ("z50", False, 0.00132),
        ("q1000", False, 0.02635),
        ("t2m", True, 0.15625),
        ("sst", True, 0.1 / 6.4),
    ],
)
def test_published_channel_weights(name: str, sst: bool, expected: float) -> None:
    names = aeris_channels(sst)
    weights = channel_weights(names, "pressure")
    assert weights[names.index(name)] == pytest.approx(expected, abs=6e-6 if expected < 0.02 else 6e-5)
    assert weights.sum() == pytest.approx(1.0, abs=1e-12)


def test_level_weights_are_shares_of_the_levels_there_are() -> None:
    weights = channel_weights(("z300", "z500", "t850"), "pressure")
    np.testing.assert_allclose(weights, np.array([300 / 800, 500 / 800, 1.0]) / 2, rtol=1e-14)
    np.testing.assert_allclose(channel_weights(("z300", "t2m"), "uniform"), [0.5, 0.5])
    with pytest.raises(ValueError, match="uniform, pressure"):
        channel_weights(("t2m",), "loud")


def naive_cells(latitude_deg: np.ndarray, stretch: bool) -> np.ndarray:
    """Integrate cos over every row's cell, one by one."""
    order = np.argsort(latitude_deg)
    phi = np.deg2rad(latitude_deg[order])
    area = np.empty(len(phi))
    for i in range(len(phi)):
        low = (
            (phi[i - 1] + phi[i]) / 2
            if i
            else (-np.pi / 2 if stretch else max(-np.pi / 2, 1.5 * phi[0] - 0.5 * phi[1]))
        )
        high = (
            (phi[i] + phi[i + 1]) / 2
            if i + 1 < len(phi)
            else (np.pi / 2 if stretch else min(np.pi / 2, 1.5 * phi[-1] - 0.5 * phi[-2]))
        )
        area[order[i]] = np.sin(high) - np.sin(low)
    return area / area.mean()


GRIDS = {
    "721": np.linspace(90, -90, 721),
    "720": np.linspace(90, -90, 721)[1:],
    "gaussian": np.array([85.76, 80.27, 74.74, 0.0, -69.2, -80.0]),
    "box": np.arange(30, 60.25, 0.25),
}


@pytest.mark.parametrize("grid", GRIDS)
def test_cell_and_wb2_weights(grid: str) -> None:
    latitude_deg = GRIDS[grid]
    np.testing.assert_allclose(latitude_weights(latitude_deg), naive_cells(latitude_deg, False), rtol=1e-9)
    np.testing.assert_allclose(
        latitude_weights(latitude_deg, "wb2"), naive_cells(latitude_deg, True), rtol=1e-9
    )
    turned = latitude_weights(latitude_deg[::-1])[::-1]
    np.testing.assert_allclose(turned, latitude_weights(latitude_deg), rtol=1e-14)


def test_end_rows_of_the_wb2_scheme() -> None:
    """Over the true cell: 1 with both poles, 1.125 on the 720-row crop, 397 and 62 on a box at 30-60 N."""

    def ratio(grid: str) -> np.ndarray:
        latitude_deg = np.deg2rad(np.sort(GRIDS[grid]))
        half = np.deg2rad(0.125)
        low, high = np.maximum(latitude_deg - half, -np.pi / 2), np.minimum(latitude_deg + half, np.pi / 2)
        true = np.sin(high) - np.sin(low)
        wb2 = latitude_weights(np.sort(GRIDS[grid]), "wb2")
        middle = len(true) // 2
        return wb2[[0, -1]] / true[[0, -1]] * (true[middle] / wb2[middle])

    np.testing.assert_allclose(ratio("721"), [1, 1], rtol=1e-9)
    np.testing.assert_allclose(ratio("720"), [1, 1.125], rtol=1e-3)
    np.testing.assert_allclose(ratio("box"), [397, 62], rtol=0.02)


def test_cosine_weights() -> None:
    latitude_deg = GRIDS["721"]
    cosine = np.cos(np.deg2rad(latitude_deg))
    np.testing.assert_allclose(latitude_weights(latitude_deg, "cos"), cosine / cosine.mean(), rtol=1e-14)
    train = (cosine + 0.01) / (cosine + 0.01).mean()
    np.testing.assert_allclose(latitude_weights(latitude_deg, "train"), train, rtol=1e-14)
    for scheme in ("cell", "wb2", "cos", "train"):
        assert latitude_weights(latitude_deg, scheme).mean() == pytest.approx(1)
    assert latitude_weights(np.array([45.0])) == pytest.approx(1)
    with pytest.raises(ValueError, match="cell, wb2"):
        latitude_weights(latitude_deg, "flat")
    with pytest.raises(ValueError, match="rise or fall"):
        latitude_weights(np.array([10.0, 20.0, 15.0]))
