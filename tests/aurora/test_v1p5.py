"""Aurora v1.5: inputs that are made, lead times, sunlight, clipping, members."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timedelta

import pytest
import torch
from torch import Tensor

from aeris.aurora.batch import Batch, Metadata
from aeris.aurora.insolation import insolation
from aeris.aurora.normalisation import location, scale
from aeris.aurora.rollout import rollout
from aeris.aurora.v1p5 import (
    CLIPPING,
    OUTPUT_ONLY,
    STATIC_VARS,
    SURF_VARS,
    AuroraV1p5,
    AuroraV1p5Ensemble,
    with_bounds,
    with_insolation,
)
from tests.aurora.tiny_aurora import LEAST

SMALL = {**LEAST, "autocast": False}
ROWS, COLS, LEVELS = 17, 32, (850, 300)
NOON = datetime(2022, 3, 1, 12)


def model(kind: type[AuroraV1p5] = AuroraV1p5, **changes: object) -> AuroraV1p5:
    """Make a small model in float64 whose every weight is random."""
    made = kind(**{**SMALL, **changes})
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return made.double().eval()


def batch(samples: int = 1, dtype: torch.dtype = torch.float64) -> Batch:
    """Make normal fields; amounts are positive."""
    generator = torch.Generator().manual_seed(0)

    def field(name: str, *shape: int, level: float | None = None) -> Tensor:
        noise = torch.randn(*shape, ROWS, COLS, generator=generator, dtype=torch.float64)
        return location(name, level) + scale(name, level) * noise

    surf_vars = {name: field(name, samples, 2) for name in SURF_VARS if name not in OUTPUT_ONLY}
    surf_vars["scaled_sd"] = surf_vars["scaled_sd"].abs() / 100
    given = Batch(
        surf_vars,
        {name: field(name) for name in STATIC_VARS},
        {
            n: torch.stack([field(n, samples, 2, level=p) for p in LEVELS], 2)
            for n in ("z", "u", "v", "t", "q")
        },
        Metadata(torch.linspace(90, -90, ROWS), torch.linspace(0, 348.75, COLS), (NOON,) * samples, LEVELS),
    )
    return with_insolation(given).type(dtype)


def hours(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_variables() -> None:
    assert (len(SURF_VARS), len(OUTPUT_ONLY), len(STATIC_VARS)) == (26, 7, 36)
    assert len({*SURF_VARS}) == 26 and len({*STATIC_VARS}) == 36
    assert {name for name, _, _ in CLIPPING} < {*SURF_VARS} - {*OUTPUT_ONLY}


def test_sunlight_of_the_whole_history() -> None:
    given = batch(samples=2)
    times = [NOON - timedelta(hours=6), NOON]
    expected = insolation(times, given.metadata.lat, given.metadata.lon)
    assert torch.equal(given.surf_vars["insolation"], torch.stack([expected, expected]))
    later = with_insolation(given, timedelta(hours=12)).surf_vars["insolation"]
    assert torch.equal(later[:, 1], given.surf_vars["insolation"][:, 1])
    assert not torch.equal(later[:, 0], given.surf_vars["insolation"][:, 0])
    assert with_insolation(batch(dtype=torch.float32)).surf_vars["insolation"].dtype == torch.float32


@torch.inference_mode()
def test_what_is_only_predicted_is_no_input() -> None:
    made, given = model(), batch()
    plain = made(given, hours(6))
    assert set(plain.surf_vars) == set(SURF_VARS)
    shown = {**given.surf_vars, "blh": torch.full_like(given.surf_vars["2t"], 1234.0)}
    with_answer = made(replace(given, surf_vars=shown), hours(6))
    for name, x in plain.surf_vars.items():
        torch.testing.assert_close(with_answer.surf_vars[name], x, rtol=1e-10, atol=0)


@torch.inference_mode()
def test_amounts_are_logarithms_inside() -> None:
    made, given = model(), batch()
    seen = {}
    inner = made._pre_encoder_hook
    made._pre_encoder_hook = lambda b: seen.setdefault("batch", inner(b))
    predicted = made(given, hours(6))
    depth = given.surf_vars["scaled_sd"][:, :, :-1]
    expected = (torch.log1p(depth * 1000) - location("scaled_sd")) / scale("scaled_sd")
    torch.testing.assert_close(seen["batch"].surf_vars["scaled_sd"], expected)
    for name in ("scaled_sd", "scaled_tp_1h", "scaled_sf_1h"):
        assert float(predicted.surf_vars[name].min()) > -1e-3
    assert not bool(seen["batch"].surf_vars["scaled_tp_1h"].any())


@torch.inference_mode()
def test_lead_times_of_samples_differ() -> None:
    made, both = model(), batch(samples=2)
    predicted = made(both, hours(3, 6))
    where = both.metadata
    assert predicted.metadata.time == (NOON + timedelta(hours=3), NOON + timedelta(hours=6))
    sun = insolation(predicted.metadata.time, where.lat[:-1], where.lon)[:, None]
    assert torch.equal(predicted.surf_vars["insolation"], sun)
    for index, lead_h in enumerate((3, 6)):
        alone = made(batch(samples=2), hours(lead_h, lead_h))
        torch.testing.assert_close(predicted.surf_vars["2t"][index], alone.surf_vars["2t"][index])
    with pytest.raises(ValueError, match="lead_times"):
        made(both)


@torch.inference_mode()
def test_roll_out_clips_what_is_fed_back() -> None:
    made, given = model(), batch()
    raw = list(rollout(made, given, 2, apply_rollout_input_clipping=False))
    clipped = list(rollout(made, given, 2))
    assert torch.equal(raw[0].surf_vars["tcc"], clipped[0].surf_vars["tcc"])
    assert float(clipped[0].surf_vars["tcc"].max()) > 1
    assert not torch.equal(raw[1].surf_vars["2t"], clipped[1].surf_vars["2t"])
    fed_back = made.apply_rollout_input_clipping(clipped[0])
    for name, least, greatest in CLIPPING:
        x = fed_back.surf_vars[name]
        assert least is None or float(x.min()) >= least
        assert greatest is None or float(x.max()) <= greatest


@torch.inference_mode()
def test_fine_lead_times() -> None:
    made, given = model(), batch()
    states = list(rollout(made, given, 2, fine_lead_times=[2, 4, 6]))
    leads = [(state.metadata.time[0] - NOON) / timedelta(hours=1) for state in states]
    assert leads == [2, 4, 6, 8, 10, 12]
    coarse = list(rollout(made, given, 2))
    torch.testing.assert_close(states[5].surf_vars["2t"], coarse[1].surf_vars["2t"])


def test_bounds_as_the_official_package_writes_them() -> None:
    known = (("tcc", 0.0, 1.0), ("ci", 0.0, 1.0))
    assert with_bounds({"tcc": {"max": 2.0}, "sp": {"min": 1.0}}, known) == (
        ("tcc", None, 2.0),
        ("ci", 0.0, 1.0),
        ("sp", 1.0, None),
    )
    made = AuroraV1p5(**SMALL, rollout_input_clipping={"tcwv": {"min": 1.0}})
    assert made.config.rollout_input_clipping == (("tcwv", 1.0, None), *CLIPPING[1:])
    assert AuroraV1p5(**SMALL).config.rollout_input_clipping == CLIPPING


@torch.inference_mode()
def test_every_call_is_another_member_and_the_seed_decides() -> None:
    made, one_sample = model(AuroraV1p5Ensemble), batch()
    where = one_sample.metadata
    both = Batch(
        {name: x.repeat(2, 1, 1, 1) for name, x in one_sample.surf_vars.items()},
        one_sample.static_vars,
        {name: x.repeat(2, 1, 1, 1, 1) for name, x in one_sample.atmos_vars.items()},
        replace(where, time=where.time * 2),
    )

    def members(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return made(both, hours(6, 6)).surf_vars["2t"]

    one = members(1)
    assert torch.equal(one, members(1))
    assert not torch.equal(one, members(2))
    assert not torch.equal(one[0], one[1])
    plain = model()(both, hours(6, 6)).surf_vars["2t"]
    torch.testing.assert_close(plain[0], plain[1])


@torch.inference_mode()
def test_noise_is_shared_between_fine_lead_times() -> None:
    made, given = model(AuroraV1p5Ensemble), batch()

    def spread(accumulate: bool) -> float:
        torch.manual_seed(0)
        fine = [5.998, 5.999, 6.0]
        near = rollout(made, given, 1, fine_lead_times=fine, use_noise_accumulation=accumulate)
        fields = torch.stack([state.surf_vars["2t"] for state in near])
        return float((fields[1:] - fields[:-1]).square().mean())

    assert spread(True) < spread(False)


@torch.inference_mode()
def test_half_precision_is_near() -> None:
    made, given = model().float(), batch(dtype=torch.float32)
    exact = made(given, hours(6)).surf_vars["2t"]
    half = model(autocast=True).float()
    assert (half.config.autocast, half.config.autocast_dtype) == (True, "float16")
    rough = half(given, hours(6)).surf_vars["2t"]
    assert rough.dtype == torch.float32
    assert 0 < float((rough - exact).abs().max()) < 0.05 * float(exact.std())
