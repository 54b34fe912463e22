"""Air pollution: what goes in, what comes out, several samples at once."""

from __future__ import annotations

import math
from datetime import datetime

import pytest
import torch
from torch import Tensor

from aeris.aurora.air_pollution import (
    ATMOS_POLLUTANTS,
    SO2_BOTTOM_HPA,
    STEPS_BACK,
    SURF_POLLUTANTS,
    AuroraAirPollution,
    FeatureCombiner,
    add_previous,
)
from aeris.aurora.batch import Batch, Metadata
from aeris.aurora.normalisation import location, normalise_surf, scale
from aeris.aurora.rollout import rollout
from tests.aurora.tiny_aurora import LEAST

LEVELS = (1000, 850, 300)
SMALL = {**LEAST, "level_condition": (300, 850, 1000)}


def model(seed: int = 0, **changes: object) -> AuroraAirPollution:
    """Make a small model in float64 whose every weight is random."""
    made = AuroraAirPollution(**{**SMALL, **changes})
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return made.double().eval()


def batch(samples: int = 1, history: int = 2, seed: int = 0) -> Batch:
    """Make fields that are normal after normalisation, at the model's default variables."""
    generator = torch.Generator().manual_seed(seed)
    rows, cols, config = 10, 18, AuroraAirPollution.default

    def field(name: str, *shape: int, level: float | None = None) -> Tensor:
        noise = torch.randn(*shape, rows, cols, generator=generator, dtype=torch.float64)
        return location(name, level) + scale(name, level) * noise

    lead = (samples, history)
    return Batch(
        {name: field(name, *lead) for name in config.surf_vars},
        {name: field(name) for name in config.static_vars},
        {n: torch.stack([field(n, *lead, level=p) for p in LEVELS], 2) for n in config.atmos_vars},
        Metadata(
            torch.linspace(90, -90, rows),
            torch.linspace(0, 340, cols),
            tuple(datetime(2022, 6, 1 + sample, 12) for sample in range(samples)),
            LEVELS,
        ),
    )


def sample(whole: Batch, index: int) -> Batch:
    """Cut one sample out of a batch."""
    where = whole.metadata
    return Batch(
        {name: x[index : index + 1] for name, x in whole.surf_vars.items()},
        whole.static_vars,
        {name: x[index : index + 1] for name, x in whole.atmos_vars.items()},
        Metadata(where.lat, where.lon, where.time[index : index + 1], where.atmos_levels),
    )


def test_every_pollutant_has_a_state_before() -> None:
    assert set(STEPS_BACK) == {*SURF_POLLUTANTS, *ATMOS_POLLUTANTS}
    assert [name for name in SURF_POLLUTANTS if STEPS_BACK[name] == 1] == ["tcco", "gtco3", "tcso2"]


def test_combiner() -> None:
    combiner = FeatureCombiner().double()
    x = torch.tensor([-1.0, 0.0, 1e-4, 0.5, 2.5, 40.0], dtype=torch.float64)
    logarithm = torch.log(x.clamp(min=1e-4) / 1e-4) / math.log(1e4)
    torch.testing.assert_close(combiner(x), (x.clamp(0, 2.5) + logarithm) / 2)
    with torch.no_grad():
        combiner.weight.copy_(torch.tensor([[2.0, -3.0]]))
        combiner.bias.fill_(0.25)
    torch.testing.assert_close(combiner(x), 2 * x.clamp(0, 2.5) - 3 * logarithm + 0.25)
    assert {name: tuple(value.shape) for name, value in combiner.state_dict().items()} == {
        "weight": (1, 2),
        "bias": (1,),
    }


def test_change_is_of_the_right_state_for_every_sample() -> None:
    generator = torch.Generator().manual_seed(0)

    def field(*shape: int) -> Tensor:
        return torch.randn(*shape, 3, 4, generator=generator)

    past = {"2t": field(2, 2), "pm1": field(2, 2), "gtco3": field(2, 2), "no": field(2, 2, 5)}
    heads = {name: field(2, 1, *x.shape[2:-2]) for name, x in past.items()}
    heads |= {f"{name}_mod": field(2, 1, *past[name].shape[2:-2]) for name in ("pm1", "gtco3", "no")}
    values = add_previous(heads, past)
    assert list(values) == list(past)
    assert torch.equal(values["2t"], heads["2t"])
    for name, entry in (("pm1", 0), ("gtco3", 1), ("no", 0)):
        for index in range(2):
            expected = heads[name][index, 0] + (1 + heads[f"{name}_mod"][index, 0]) * past[name][index, entry]
            torch.testing.assert_close(values[name][index, 0], expected)
    with pytest.raises(ValueError, match="pm1 is predicted as a change of the state 2 steps before"):
        add_previous(heads, {name: x[:, 1:] for name, x in past.items()})


@torch.inference_mode()
def test_zero_heads_repeat_the_state() -> None:
    made, given = model(), batch()
    for name, value in made.state_dict().items():
        if name.startswith("decoder.") and "_heads." in name:
            value.zero_()
    predicted = made(given)
    for name in SURF_POLLUTANTS:
        expected = given.surf_vars[name][:, -STEPS_BACK[name], None, :-1]
        torch.testing.assert_close(predicted.surf_vars[name], expected, rtol=1e-12, atol=0)
    for name in ("co", "no2", "go3"):
        expected = given.atmos_vars[name][:, -STEPS_BACK[name], None, :, :-1]
        torch.testing.assert_close(predicted.atmos_vars[name], expected, rtol=1e-12, atol=0)
    low = torch.tensor([level >= SO2_BOTTOM_HPA for level in LEVELS])
    so2 = given.atmos_vars["so2"][:, -1:, :, :-1]
    limit = torch.tensor([scale("so2", level) for level in LEVELS], dtype=torch.float64)[:, None, None]
    clamped = torch.where(low[:, None, None], so2.minimum(limit), so2)
    torch.testing.assert_close(predicted.atmos_vars["so2"], clamped, rtol=1e-12, atol=0)
    assert not torch.equal(clamped, so2)


@torch.inference_mode()
def test_two_samples_at_once_equal_one_after_the_other() -> None:
    made, both = model(), batch(samples=2)
    together = made(both)
    for index in range(2):
        alone = made(sample(both, index))
        for name, x in {**alone.surf_vars, **alone.atmos_vars}.items():
            found = {**together.surf_vars, **together.atmos_vars}[name][index : index + 1]
            torch.testing.assert_close(found, x, rtol=1e-9, atol=0)


@torch.inference_mode()
def test_pollutants_are_positive_from_the_second_step() -> None:
    made, given = model(), batch()
    states = list(rollout(made, given, 3))
    assert [list(state.surf_vars) for state in states] == [list(given.surf_vars)] * 3
    assert [list(state.atmos_vars) for state in states] == [list(given.atmos_vars)] * 3
    least = [float(normalise_surf("pm10", state.surf_vars["pm10"]).min()) for state in states]
    assert least[0] < 0 and least[1] >= 0 and least[2] >= 0
    assert (states[2].metadata.time[0] - given.metadata.time[0]).total_seconds() == 36 * 3600
    first = model(clamp_at_first_step=True)(given)
    assert float(first.surf_vars["pm10"].min()) >= 0


def test_every_combiner_learns() -> None:
    made = model(use_lora=False)
    prediction = made(batch())
    sum(x.square().mean() / scale(name) ** 2 for name, x in prediction.surf_vars.items()).backward()
    parameters = {name: p for name, p in made.named_parameters() if "feature_combiner" in name}
    assert len(parameters) == 2 * (len(SURF_POLLUTANTS) + len(ATMOS_POLLUTANTS))
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in parameters.values())


def test_new_model_starts_from_even_mixtures() -> None:
    made = AuroraAirPollution(**SMALL)
    for name, parameter in made.named_parameters():
        if "feature_combiner" in name:
            assert torch.equal(parameter, torch.full_like(parameter, 0.5 if name.endswith("weight") else 0))


@torch.inference_mode()
def test_so2_is_cut_with_adapters_only() -> None:
    so2 = model(use_lora=False)(batch()).atmos_vars["so2"]
    assert float(so2[:, :, 0].max()) > scale("so2", LEVELS[0])
    cut = model()(batch()).atmos_vars["so2"]
    assert float(cut[:, :, 0].max()) == pytest.approx(scale("so2", LEVELS[0]))
    assert float(cut[:, :, 2].max()) > scale("so2", LEVELS[2])
