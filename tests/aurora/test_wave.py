"""Waves: channels and back, absent waves, land, and a forecast of several steps."""

from __future__ import annotations

import math
from dataclasses import replace
from datetime import datetime

import pytest
import torch
from torch import Tensor

from aeris.aurora.batch import Batch, Metadata
from aeris.aurora.model import Aurora
from aeris.aurora.normalisation import location, scale
from aeris.aurora.rollout import rollout
from aeris.aurora.wave import (
    ANGLES,
    COMPONENTS,
    WAVE_VARS,
    AuroraWave,
    embed,
    embedded_surf_vars,
    mark_absent,
    split_wind,
    unembed,
)
from tests.aurora.tiny_aurora import LEAST

# The surface channels of the published model, microsoft-aurora 2.0.1.
PUBLISHED = """
    2t 10u 10v msl swh swh_density mwd_sin mwd_cos mwd_density mwp mwp_density pp1d pp1d_density shww
    shww_density mdww_sin mdww_cos mdww_density mpww mpww_density shts shts_density mdts_sin mdts_cos
    mdts_density mpts mpts_density swh1 swh1_density mwd1_sin mwd1_cos mwd1_density mwp1 mwp1_density swh2
    swh2_density mwd2_sin mwd2_cos mwd2_density mwp2 mwp2_density wind wind_density 10u_wave
    10u_wave_density 10v_wave 10v_wave_density
""".split()
ROWS, COLS, LEVELS = 17, 32, (850, 300)


def model(**changes: object) -> AuroraWave:
    """Make a small model in float64 whose every weight is random."""
    made = AuroraWave(**{**LEAST, **changes})
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return made.double().eval()


def batch() -> Batch:
    """Make waves on half of the cells, wind as speed and direction, two columns of land."""
    generator = torch.Generator().manual_seed(0)
    config = AuroraWave.default

    def field(name: str, *shape: int, level: float | None = None) -> Tensor:
        noise = torch.randn(*shape, ROWS, COLS, generator=generator, dtype=torch.float64)
        return location(name, level) + scale(name, level) * noise

    surf_vars = {name: field(name, 1, 2) for name in config.surf_vars if not name.endswith("_wave")}
    for name in COMPONENTS:
        surf_vars[name] = surf_vars[name].clamp(min=0) * (field("lsm", 1, 2) > 0)
    for name in (*ANGLES, "dwi"):
        surf_vars[name] = 360 * torch.rand(1, 2, ROWS, COLS, generator=generator, dtype=torch.float64)
    static_vars = {name: field(name) for name in config.static_vars}
    static_vars["wmb"] = torch.ones(ROWS, COLS, dtype=torch.float64)
    static_vars["wmb"][:, :2] = 0
    for name in WAVE_VARS:
        if name in surf_vars:
            surf_vars[name][..., :2] = math.nan
    return Batch(
        surf_vars,
        static_vars,
        {n: torch.stack([field(n, 1, 2, level=p) for p in LEVELS], 2) for n in config.atmos_vars},
        Metadata(
            torch.linspace(90, -90, ROWS),
            torch.linspace(0, 348.75, COLS),
            (datetime(2022, 1, 1),),
            LEVELS,
        ),
    )


def test_channels_are_the_published_ones() -> None:
    assert embedded_surf_vars(AuroraWave.default.surf_vars) == tuple(PUBLISHED)
    made = AuroraWave(**LEAST)
    assert set(made.decoder.surf_heads) == set(PUBLISHED)
    assert made.config.surf_vars == AuroraWave.default.surf_vars


def test_wind_comes_from_its_direction() -> None:
    wind = {"wind": torch.full((4,), 2.0), "dwi": torch.tensor([0.0, 90.0, 180.0, 270.0])}
    fields = split_wind(wind)
    assert list(fields) == ["wind", "10u_wave", "10v_wave"]
    torch.testing.assert_close(fields["10u_wave"], torch.tensor([0.0, -2.0, 0.0, 2.0]))
    torch.testing.assert_close(fields["10v_wave"], torch.tensor([-2.0, 0.0, 2.0, 0.0]))
    assert list(wind) == ["wind", "dwi"]
    assert split_wind({"wind": wind["wind"]}) == {"wind": wind["wind"]}


def test_absent_waves_lose_all_they_have() -> None:
    given = {name: torch.tensor([0.0, 1.0]) for name in WAVE_VARS}
    given["shww"] = torch.tensor([1.0, math.nan])
    fields = mark_absent(given)
    gone = {name for name, x in fields.items() if bool(x[0].isnan())}
    kept = {"shww", "mdww", "mpww", "wind", "10u_wave", "10v_wave"}
    assert gone == set(WAVE_VARS) - kept
    assert "mpts" in gone, "the official package forgets the period of swell"
    assert not any(bool(x[1].isnan()) for name, x in fields.items() if name != "shww")
    assert not bool(mark_absent(given, keep=("mpts",))["mpts"].isnan().any())
    assert not bool(given["swh"].isnan().any())
    assert mark_absent({"shts": given["shts"], "2t": given["swh"]}).keys() == {"shts", "2t"}


def test_there_and_back() -> None:
    generator = torch.Generator().manual_seed(0)
    given = {name: torch.randn(1, 1, 5, 6, generator=generator) for name in ("2t", "swh", "mwd", "10u_wave")}
    given["mwd"] = 360 * torch.rand(1, 1, 5, 6, generator=generator)
    for name in ("swh", "mwd"):
        given[name][..., 2, 3] = math.nan
    channels = embed(given)
    assert not any(bool(x.isnan().any()) for x in channels.values())
    assert set(channels) == set(embedded_surf_vars(tuple(given)))
    assert float(channels["swh_density"].sum()) == 29
    assert torch.equal(embed(channels)["mwd_sin"], channels["mwd_sin"])
    logits = {k: (x - 0.5) * 8 if k.endswith("_density") else x for k, x in channels.items()}
    sea = torch.ones(5, 6, dtype=torch.bool)
    sea[0] = False
    back = unembed(logits, sea)
    assert set(back) == set(given)
    for name, x in given.items():
        expected = x if name == "2t" else x.masked_fill(~sea, math.nan)
        torch.testing.assert_close(back[name], expected, rtol=0, atol=1e-3, equal_nan=True)


@torch.inference_mode()
def test_forecast() -> None:
    made, given = model(), batch()
    states = list(rollout(made, given, 3))
    sea = given.static_vars["wmb"][:-1] > 0
    for state in states:
        assert set(state.surf_vars) == set(AuroraWave.default.surf_vars)
        for name, x in state.surf_vars.items():
            if name in WAVE_VARS:
                assert bool(x[..., ~sea].isnan().all()) and not bool(x.isnan().all())
            else:
                assert not bool(x.isnan().any())
            if name in ANGLES:
                assert float(x.nan_to_num(0).min()) >= 0 and float(x.nan_to_num(0).max()) <= 360
    assert "dwi" in given.surf_vars and not bool(given.surf_vars["swh"][..., 2:].isnan().any())


@torch.inference_mode()
def test_adapters_are_off_at_the_first_step_only() -> None:
    made, given = model(), batch()
    first, second = rollout(made, given, 2)
    for name, x in made.state_dict().items():
        if "lora_B" in name:
            x.zero_()
    first_without, second_without = rollout(made, given, 2)
    assert torch.equal(first.surf_vars["2t"], first_without.surf_vars["2t"])
    assert not torch.equal(second.surf_vars["2t"], second_without.surf_vars["2t"])


@torch.inference_mode()
def test_period_of_absent_swell() -> None:
    given = batch()
    one, other = model(), model(keep_mpts=True)
    assert bool(one.batch_transform_hook(given).surf_vars["mpts"][..., 2:].isnan().any())
    assert not bool(other.batch_transform_hook(given).surf_vars["mpts"][..., 2:].isnan().any())
    assert not torch.equal(one(given).surf_vars["2t"], other(given).surf_vars["2t"])


def test_transform_is_idempotent_and_leaves_predictions_alone() -> None:
    made, given = model(), batch()
    once = made.batch_transform_hook(given)
    twice = made.batch_transform_hook(once)
    for name, x in once.surf_vars.items():
        torch.testing.assert_close(twice.surf_vars[name], x, rtol=0, atol=0, equal_nan=True)
    predicted = replace(given, metadata=replace(given.metadata, rollout_step=1))
    kept = made.batch_transform_hook(predicted).surf_vars["swh"]
    torch.testing.assert_close(kept, given.surf_vars["swh"], equal_nan=True)


@torch.inference_mode()
def test_sea_mask_is_asked_for() -> None:
    given = batch()
    del given.static_vars["wmb"]
    with pytest.raises(ValueError, match="needs the static variable wmb"):
        model()(given)


def test_missing_waves_are_left_to_the_model() -> None:
    assert Aurora.reads_missing == ()
    assert set(AuroraWave.reads_missing) == {*WAVE_VARS, "dwi"}
