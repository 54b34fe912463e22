"""Normalisation: the published numbers, what may be changed, what is said when they are missing."""

from __future__ import annotations

import math

import pytest
import torch

from aeris.aurora import normalisation
from aeris.aurora.normalisation import (
    level_name,
    location,
    log_transform,
    log_untransform,
    normalise_atmos,
    normalise_surf,
    scale,
    unnormalise_atmos,
    unnormalise_surf,
)


def test_every_published_variable_has_both() -> None:
    assert normalisation.locations.keys() == normalisation.scales.keys()
    assert len(normalisation.scales) == 244
    assert all(math.isfinite(value) and value > 0 for value in normalisation.scales.values())


@pytest.mark.parametrize(
    ("name", "level", "where", "size"),
    [
        # python -c "from aurora.normalisation import *; print(locations['z'], scales['z'])" and so on, 2.0.1
        ("z", None, -1386.496, 58844.67),
        ("slt", None, 0.0, 7.0),
        ("2t", None, 278.514, 21.22036),
        ("z", 500, 54115.37, 3353.515),
        ("so2", 50.0, 0.0, 7.246278e-12),
    ],
)
def test_published_numbers(name: str, level: float | None, where: float, size: float) -> None:
    assert location(name, level) == pytest.approx(where, rel=1e-6)
    assert scale(name, level) == pytest.approx(size, rel=1e-3)


@pytest.mark.parametrize(
    ("level", "name"), [(850, "850"), (850.0, "850"), (0.5, "0_5"), (62.50001, "62_5"), (1e3, "1000")]
)
def test_level_names(level: float, name: str) -> None:
    assert level_name(level) == name


def test_levels_follow_the_order_of_the_field() -> None:
    x = torch.randn(2, 1, 3, 4, 5, dtype=torch.float64)
    got = normalise_atmos("t", x, (850, 50, 500.0))
    for i, level in enumerate((850, 50, 500)):
        torch.testing.assert_close(got[:, :, i], (x[:, :, i] - location("t", level)) / scale("t", level))
    torch.testing.assert_close(unnormalise_atmos("t", got, (850, 50, 500)), x)


def test_stats_replace_the_published_numbers() -> None:
    x = torch.randn(2, 3)
    torch.testing.assert_close(normalise_surf("z", x, {"z": (1.0, 4.0)}), (x - 1) / 4)
    torch.testing.assert_close(
        unnormalise_surf("2t", normalise_surf("2t", x, {}), None), x, atol=1e-4, rtol=0
    )


def test_new_variables_and_changed_numbers_count_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.ones(1, 1, 1, 2, 2)
    normalise_atmos("t", x, (500,))
    for table, value in ((normalisation.locations, 3.0), (normalisation.scales, 2.0)):
        monkeypatch.setitem(table, "t_500", value)
        monkeypatch.setitem(table, "ozone_0_5", value)
    assert torch.equal(normalise_atmos("t", x, (500,)), torch.full_like(x, -1.0))
    assert torch.equal(normalise_atmos("ozone", x, (0.5,)), torch.full_like(x, -1.0))


def test_what_is_missing_is_named() -> None:
    x = torch.zeros(1, 1, 1, 1, 1)
    with pytest.raises(ValueError, match=r"'t' at 30 hPa; it has levels 50, .*locations\['t_30'\]"):
        normalise_atmos("t", x, (30,))
    with pytest.raises(ValueError, match=r"'rain' at the surface: set locations\['rain'\].*surf_stats"):
        normalise_surf("rain", x)


def test_what_is_made_in_inference_mode_can_be_trained_with() -> None:
    normalisation._tensors.clear()
    x = torch.ones(1, 1, 1, 2, 2)
    with torch.inference_mode():
        unnormalise_atmos("t", x, (600,))
    x.requires_grad_()
    unnormalise_atmos("t", x, (600,)).sum().backward()
    assert x.grad is not None
    assert float(x.grad[0, 0, 0, 0, 0]) == pytest.approx(scale("t", 600))


def test_fake_tensors_are_not_kept() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    normalisation._tensors.clear()
    with FakeTensorMode():
        normalise_atmos("t", torch.ones(1, 1, 1, 2, 2), (600,))
    assert not normalisation._tensors
    assert normalise_atmos("t", torch.ones(1, 1, 1, 2, 2, device="meta"), (600,)).shape == (1, 1, 1, 2, 2)


def test_logarithm_and_back() -> None:
    x = torch.tensor([0.0, 1e-4, 0.3], dtype=torch.float64)
    assert float(log_transform(x)[0]) == 0
    # math.log(0.301) - math.log(0.001)
    assert float(log_transform(x)[2]) == pytest.approx(5.707110, rel=1e-6)
    torch.testing.assert_close(log_untransform(log_transform(x)), x)
