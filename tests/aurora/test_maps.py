"""Maps come out whole, not blank, and refuse what they cannot show; how they look is for people to judge."""

import dataclasses

import numpy as np
import pytest

from aeris.aurora.training.errors import ChannelFields, channel
from aeris.aurora.training.maps import headline, plot_maps
from aeris.scores.plots.atlas import Atlas, colours_of, limits, shown_scale, title_of, wants_contours

matplotlib = pytest.importorskip("matplotlib")

NAMES = (("2t", None), ("q", 700.0), ("z", 500.0), ("so2", 850.0))


def made_up(seed: int = 0, rows: int = 16, cols: int = 32, width_deg: float = 360.0) -> ChannelFields:
    numbers = np.random.default_rng(seed)
    channels = tuple(channel(name, level) for name, level in NAMES)
    values = numbers.standard_normal((len(channels), rows, cols)).astype(np.float32) + 280
    latitude, longitude = np.linspace(80, -80, rows), np.arange(cols) * width_deg / cols
    return ChannelFields(channels, values, latitude, longitude, np.datetime64("2022-01-01T06", "s"))


def read(path):
    from matplotlib.image import imread

    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert not list(path.parent.glob("*.part"))
    return imread(path)


@pytest.mark.parametrize("width_deg", [360.0, 40.0])
def test_maps_of_fields_and_differences(width_deg, tmp_path):
    fields = {name: made_up(seed, width_deg=width_deg) for seed, name in enumerate(["A", "B"])}
    land = (made_up(9).values_CYX[0] > 280).astype(np.float32)
    path = tmp_path / "plots" / "maps.png"
    plot_maps(fields, {"A − B": ("A", "B")}, path, "made-up", "6 h ahead", "foot", land_YX=land, most=1)
    image = read(path)
    assert min(image.shape[:2]) > 300
    assert (image[..., :3].min(axis=-1) < 0.9).mean() > 0.1


def test_maps_of_missing_values_equal_fields_and_fewer_rows(tmp_path):
    one = made_up()
    one.values_CYX[0, 3:5, 4:9] = np.nan
    one.values_CYX[1] = np.nan
    fewer = dataclasses.replace(one, values_CYX=one.values_CYX[:, :-1], latitude_deg=one.latitude_deg[:-1])
    path = tmp_path / "maps.png"
    plot_maps({"A": one, "B": fewer}, {"A − B": ("A", "B")}, path, "made-up", names=("2t", "q700"))
    read(path)


def test_the_same_numbers_give_the_same_picture(tmp_path):
    for name in ("one", "two"):
        plot_maps({"A": made_up(rows=4, cols=8)}, {}, tmp_path / f"{name}.png", "made-up", most=1)
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()


def test_maps_say_what_is_wrong(tmp_path):
    with pytest.raises(ValueError, match=r"no maps of z850: there are 2t q700 z500 so2_850"):
        plot_maps({"A": made_up()}, {}, tmp_path / "a.png", "made-up", names=("z850",))
    square = np.zeros((4, 4))
    with pytest.raises(ValueError, match="the latitudes have 2 dims"):
        Atlas(square, square)
    assert not list(tmp_path.iterdir())


def test_usual_channels_come_first():
    assert headline(["10v", "msl", "2t", "z500", "z50"], 4) == ["2t", "z500", "msl", "10v"]


def test_channels_look_as_they_are_read():
    temperature, height, wind, unknown = (
        channel(*one) for one in (("2t",), ("z", 500.0), ("u", 50.0), ("x",))
    )
    assert shown_scale(temperature) == (1.0, -273.15, "°C")
    assert title_of(height) == "geopotential at 500 hPa"
    assert wants_contours(height)
    assert colours_of(wind) == "PuOr_r"
    assert (unknown.units, unknown.variable) == ("", "x")


def test_limits_are_not_set_by_one_point_and_never_empty():
    field = np.linspace(0, 1, 10_000).reshape(100, 100)
    field[0, 0] = 1e6
    assert limits(field)[1] < 1.01
    assert limits(field - 0.2, symmetric=True)[0] == -limits(field - 0.2, symmetric=True)[1]
    for same in (np.zeros((3, 3)), np.full((3, 3), 1e5), np.full((3, 3), np.nan)):
        low, high = limits(same)
        assert low < high
