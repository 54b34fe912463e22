"""Roll-outs: what is fed back, what is not, and what a model is asked."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime, timedelta

import pytest
import torch
from torch import Tensor, nn

from aeris.aurora.batch import Batch, Metadata
from aeris.aurora.rollout import next_input, rollout, start
from aeris.aurora.variants import VARIANTS

TIME = datetime(2020, 6, 1, 12)


def make_batch(rows: int = 9, samples: int = 2) -> Batch:
    generator = torch.Generator().manual_seed(1)

    def field(*shape: int) -> Tensor:
        return torch.rand(*shape, rows, 16, generator=generator)

    return Batch(
        surf_vars={name: field(samples, 2) for name in ("2t", "10u", "10v", "msl")},
        static_vars={"lsm": field(), "z": field()},
        atmos_vars={name: field(samples, 2, 2) for name in ("z", "u", "v", "t", "q")},
        metadata=Metadata(
            lat=torch.linspace(80, -80, rows, dtype=torch.float64),
            lon=torch.arange(16, dtype=torch.float64) * 22.5,
            time=(TIME,) * samples,
            atmos_levels=(500, 850),
        ),
    )


class Clock:
    """Adds to the newest state the lead time in hours; predicts one variable more than it reads."""

    patch_size = 4
    timestep = timedelta(hours=6)

    def __init__(self, variable_lead_time: bool = False, dtype: torch.dtype = torch.float32) -> None:
        self.variable_lead_time, self.weight = variable_lead_time, nn.Parameter(torch.ones(1, dtype=dtype))
        self.inputs: list[Batch] = []
        self.noise: list[int] = []

    def parameters(self) -> Iterator[nn.Parameter]:
        yield self.weight

    def batch_transform_hook(self, batch: Batch) -> Batch:
        surf = {name: x for name, x in batch.surf_vars.items() if name != "10v"}
        return replace(batch, surf_vars=surf)

    def apply_rollout_input_clipping(self, pred: Batch) -> Batch:
        return replace(pred, surf_vars={name: x.clamp(max=6.5) for name, x in pred.surf_vars.items()})

    def set_noise_accumulation(self, n: int) -> None:
        self.noise.append(n)

    def __call__(self, batch: Batch, lead_times: Tensor | None = None) -> Batch:
        self.inputs.append(batch)
        assert (lead_times is not None) == self.variable_lead_time
        lead_h = 6.0 if lead_times is None else float(lead_times[0])
        surf = {name: x[:, -1:] + lead_h * self.weight for name, x in batch.surf_vars.items()}
        where = batch.metadata
        return Batch(
            surf_vars={"rain": surf["2t"], **dict(reversed(surf.items()))},
            static_vars=batch.static_vars,
            atmos_vars={name: x[:, -1:] + lead_h * self.weight for name, x in batch.atmos_vars.items()},
            metadata=replace(
                where,
                time=tuple(time + timedelta(hours=lead_h) for time in where.time),
                rollout_step=where.rollout_step + 1,
            ),
        )


def test_start_transforms_crops_and_casts() -> None:
    begun = start(Clock(dtype=torch.float64), make_batch())
    assert begun.spatial_shape == (8, 16)
    assert "10v" not in begun.surf_vars
    assert begun.surf_vars["2t"].dtype == begun.static_vars["z"].dtype == torch.float64


def test_physical_units_keep_32_bits() -> None:
    """Bfloat16 steps are 512 Pa at the pressure of the sea level."""
    begun = start(Clock(dtype=torch.bfloat16), make_batch())
    assert begun.surf_vars["msl"].dtype == torch.float32


def test_history_slides() -> None:
    model, batch = Clock(), make_batch()
    predictions = list(rollout(model, batch, 3))
    assert [p.metadata.rollout_step for p in predictions] == [1, 2, 3]
    assert [p.metadata.time[0] - TIME for p in predictions] == [timedelta(hours=6 * i) for i in (1, 2, 3)]
    first = model.inputs[0]
    assert torch.equal(first.surf_vars["2t"], batch.surf_vars["2t"][..., :8, :])
    for i in (1, 2):
        now, before = model.inputs[i], model.inputs[i - 1]
        assert torch.equal(now.surf_vars["2t"][:, 0], before.surf_vars["2t"][:, 1])
        assert torch.equal(now.atmos_vars["t"][:, 1], predictions[i - 1].atmos_vars["t"][:, 0])
        assert now.metadata.time == predictions[i - 1].metadata.time


def test_variables_of_one_side_are_not_fed_back() -> None:
    batch, model = make_batch(), Clock()
    prediction = next(rollout(model, batch, 1))
    fed = next_input(model.inputs[0], prediction)
    assert list(fed.surf_vars) == ["msl", "10u", "2t"]  # order of the prediction, without rain
    assert list(prediction.surf_vars) == ["rain", "msl", "10u", "2t"]


def test_clipping_bounds_what_is_fed_back_only() -> None:
    model = Clock()
    with torch.no_grad():
        predictions = list(rollout(model, make_batch(), 2))
    assert float(predictions[0].surf_vars["2t"].max()) > 6.5
    assert float(model.inputs[1].surf_vars["2t"].max()) == 6.5
    raw = Clock()
    with torch.no_grad():
        list(rollout(raw, make_batch(), 2, apply_rollout_input_clipping=False))
    assert float(raw.inputs[1].surf_vars["2t"].max()) > 6.5


def test_fine_lead_times_start_from_the_same_state() -> None:
    model = Clock(variable_lead_time=True)
    predictions = list(rollout(model, make_batch(), 2, fine_lead_times=(1, 4, 6)))
    hours = [(p.metadata.time[1] - TIME) / timedelta(hours=1) for p in predictions]
    assert hours == [1, 4, 6, 7, 10, 12]
    assert [p.metadata.rollout_step for p in predictions] == [1, 1, 1, 2, 2, 2]
    assert model.inputs[0] is model.inputs[2]
    assert model.noise == [3, 0]


def test_a_model_of_any_lead_time_gets_its_own_by_default() -> None:
    model = Clock(variable_lead_time=True)
    assert next(rollout(model, make_batch(), 1)).metadata.time[0] == TIME + timedelta(hours=6)
    assert model.noise == []


def test_noise_accumulation_ends_with_the_rollout() -> None:
    model = Clock(variable_lead_time=True)
    steps = rollout(model, make_batch(), 2, fine_lead_times=(3, 6))
    next(steps)
    steps.close()
    assert model.noise == [2, 0]
    quiet = Clock(variable_lead_time=True)
    list(rollout(quiet, make_batch(), 1, fine_lead_times=(3, 6), use_noise_accumulation=False))
    assert quiet.noise == []


def test_wrong_arguments_are_refused_at_once() -> None:
    batch = make_batch()
    with pytest.raises(ValueError, match="variable_lead_time"):
        rollout(Clock(), batch, 1, fine_lead_times=(6,))
    with pytest.raises(ValueError, match=r"time step of 6 h, found \[3, 5\]"):
        rollout(Clock(variable_lead_time=True), batch, 1, fine_lead_times=(3, 5))
    with pytest.raises(ValueError, match="found"):
        rollout(Clock(variable_lead_time=True), batch, 1, fine_lead_times=())
    with pytest.raises(ValueError, match="-1 steps"):
        rollout(Clock(), batch, -1)
    assert list(rollout(Clock(), batch, 0)) == []


def test_gradients_flow_through_all_steps() -> None:
    model = Clock()
    *_, last = rollout(model, make_batch(), 3, apply_rollout_input_clipping=False)
    last.surf_vars["2t"].mean().backward()
    assert model.weight.grad is not None
    assert float(model.weight.grad) == pytest.approx(18)


def test_a_real_model_is_fed_its_own_predictions() -> None:
    model = VARIANTS["tiny"](
        embed_dim=32, num_heads=2, encoder_num_heads=(1, 2, 4), decoder_num_heads=(4, 2, 1)
    )
    model.eval()
    with torch.inference_mode():
        first, second = rollout(model, make_batch(13), 2)
        again = model(next_input(start(model, make_batch(13)), first))
    assert second.metadata.time == again.metadata.time == (TIME + timedelta(hours=12),) * 2
    assert all(torch.equal(x, again.surf_vars[name]) for name, x in second.surf_vars.items())
    assert first.surf_vars["2t"].shape == (2, 1, 12, 16)
