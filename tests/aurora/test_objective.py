"""How far gradients go back: which weights each setup trains, and where push-forward cuts."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timedelta

import pytest
import torch
from torch import Tensor, nn

from aeris.aurora.batch import Batch, Metadata
from aeris.aurora.loss import LossWeights, weighted_mae
from aeris.aurora.model import Aurora
from aeris.aurora.rollout import lead_times, start
from aeris.aurora.training.missing import count_missing, fill, fill_surface
from aeris.aurora.training.objective import Roll, truth
from aeris.aurora.training.presets import PRESETS
from aeris.aurora.training.scores import Scores
from aeris.aurora.training.starting_weights import build
from swipe.collectives import ALONE
from tests.aurora.tiny_runs import LEVELS, SMALL

ROWS, COLS, STEP = 12, 16, timedelta(hours=6)


def state(number: int, history: int = 1, samples: int = 1) -> Batch:
    """The state number `number` of a made-up series, 6 h apart, with as many before it as asked for."""

    def field(name: str, shape: tuple[int, ...]) -> Tensor:
        series = [
            torch.randn(samples, *shape, generator=torch.Generator().manual_seed(hash_of(name, n)))
            for n in range(number - history + 1, number + 1)
        ]
        return torch.stack(series, dim=1).double()

    metadata = Metadata(
        torch.linspace(90, -75, ROWS),
        torch.arange(COLS) * (360 / COLS),
        (datetime(2020, 1, 1) + number * STEP,) * samples,
        LEVELS,
    )
    static = {
        name: torch.randn(ROWS, COLS, generator=torch.Generator().manual_seed(5)).double()
        for name in ("lsm", "z")
    }
    surf = {name: field(name, (ROWS, COLS)) for name in SMALL.surf_vars}
    atmos = {name: field(name, (len(LEVELS), ROWS, COLS)) for name in SMALL.atmos_vars}
    return Batch(surf, static, atmos, metadata).unnormalise()


def hash_of(name: str, number: int) -> int:
    """A seed that is the same in every process."""
    return sum(ord(letter) * 31**place for place, letter in enumerate(name)) * 1000 + number + 10


def loss(prediction: Batch, target: Batch) -> Tensor:
    """The loss of these tests."""
    return weighted_mae(prediction, target, LossWeights())


class Damping(nn.Module):
    """Persistence times a factor that is learned, in normalised units: the simplest thing that can roll."""

    patch_size, timestep, variable_lead_time = 4, STEP, False

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(0.9, dtype=torch.float64))
        self.inputs: list[Batch] = []

    def batch_transform_hook(self, batch: Batch) -> Batch:
        return batch

    def apply_rollout_input_clipping(self, pred: Batch) -> Batch:
        return pred

    def forward(self, batch: Batch) -> Batch:
        self.inputs.append(batch)
        normal = batch.normalise()
        where = normal.metadata
        where = replace(where, time=(where.time[0] + STEP,), rollout_step=where.rollout_step + 1)
        last = [
            {k: self.factor * x[:, -1:] for k, x in part.items()}
            for part in (normal.surf_vars, normal.atmos_vars)
        ]
        return Batch(last[0], normal.static_vars, last[1], where).unnormalise()


def rolled(gradient: str, steps: int, **hooks: object) -> tuple[Damping, Tensor]:
    model = Damping()
    roll = Roll(model, loss, gradient, **hooks)  # type: ignore[arg-type]
    losses = roll.train(start(model, state(1, 2)), [state(2 + k) for k in range(steps)])
    return model, losses


def by_hand(steps: int, through: bool) -> tuple[Tensor, list[Tensor]]:
    """The gradient of the mean loss of f x, f f x ... by autograd, and each step's part of it."""
    factor = torch.tensor(0.9, dtype=torch.float64, requires_grad=True)
    x, parts = state(1).normalise(), []
    value = {"surf_vars": dict(x.surf_vars), "atmos_vars": dict(x.atmos_vars)}
    for step in range(steps):
        value = {kind: {k: factor * v for k, v in fields.items()} for kind, fields in value.items()}
        when = replace(x.metadata, time=state(2 + step).metadata.time)
        prediction = Batch(value["surf_vars"], {}, value["atmos_vars"], when).unnormalise()
        part = torch.autograd.grad(loss(prediction, state(2 + step)), factor, retain_graph=True)[0]
        parts.append(part / steps)
        if not through:
            value = {kind: {k: v.detach() for k, v in fields.items()} for kind, fields in value.items()}
    return torch.stack(parts).sum(), parts


@pytest.mark.parametrize(
    ("gradient", "steps"), [("through", 1), ("through", 2), ("through", 3), ("push-forward", 3)]
)
def test_gradient_is_that_of_the_mean_loss(gradient: str, steps: int) -> None:
    """Against autograd of the same written out: through all steps, or of each step alone."""
    model, losses = rolled(gradient, steps)
    expected, parts = by_hand(steps, gradient == "through")
    torch.testing.assert_close(model.factor.grad, expected, rtol=1e-12, atol=0)
    assert losses.shape == (steps,) and not losses.requires_grad
    assert all(abs(float(part)) > 1e-3 * abs(float(expected)) for part in parts)  # every step trains


def test_push_forward_cuts_at_what_is_fed_back_and_nowhere_else() -> None:
    """Inputs carry no gradient, all but the first with it otherwise; losses and times are the same."""
    cut, losses = rolled("push-forward", 3)
    whole, same = rolled("through", 3)
    assert torch.equal(losses, same)
    assert [b.surf_vars["2t"].requires_grad for b in cut.inputs] == [False, False, False]
    assert [b.surf_vars["2t"].requires_grad for b in whole.inputs] == [False, True, True]
    assert not torch.allclose(cut.factor.grad, whole.factor.grad, rtol=1e-3)
    for model in (cut, whole):
        assert [b.metadata.rollout_step for b in model.inputs] == [0, 1, 2]
        assert [b.metadata.time[0].hour for b in model.inputs] == [6, 12, 18]
    # Both are fed with (state 0, state 1), (state 1, prediction 1), (prediction 1, prediction 2).
    torch.testing.assert_close(cut.inputs[1].surf_vars["2t"][:, 0], state(1).surf_vars["2t"][:, 0])
    assert torch.equal(cut.inputs[2].surf_vars["2t"][:, 0], cut.inputs[1].surf_vars["2t"][:, 1])


def test_who_listens_is_told_every_step_and_the_last_backward() -> None:
    """Seeds before each step, pairs after it, and the last pass of an update, in both ways."""
    for gradient, passes in (("through", [True]), ("push-forward", [False, False, True])):
        heard: list[tuple] = []
        last: list[bool] = []
        rolled(
            gradient,
            3,
            before=lambda step, heard=heard: heard.append(("before", step)),
            after=lambda step, x, y, t, heard=heard: heard.append((step, t.metadata.time == y.metadata.time)),
            last=last.append,
        )
        assert heard == [e for k in range(3) for e in (("before", k), (k, True))]
        assert last == passes


def trained(preset: str) -> tuple[Aurora, dict[str, Tensor]]:
    """Take the gradient of a preset on a small model with no weight at zero; return those not zero."""
    config = PRESETS[preset]().of("tiny", SMALL)
    model = build("tiny", config.aurora, "cpu").double()
    draw = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=draw, dtype=p.dtype))
    if config.rollout.train == "adapters":
        model.freeze_base()
    model.eval()  # no dropped paths
    roll = Roll(model, loss, config.rollout.gradient)
    targets = [truth(model, state(2 + k), state(1, 2)) for k in range(config.rollout.steps)]
    roll.train(start(model, state(1, 2)), targets)
    return model, {
        n: p.grad for n, p in model.named_parameters() if p.grad is not None and bool(p.grad.any())
    }


@pytest.mark.parametrize("preset", list(PRESETS))
def test_each_setup_trains_what_it_says(preset: str) -> None:
    """All weights, or the adapters alone; the base of a LoRA setup has no gradient at all."""
    model, gradients = trained(preset)
    names = {name for name, _ in model.named_parameters()}
    adapters = {name for name in names if ".lora_" in name}
    if preset.startswith("lora"):
        assert adapters and set(gradients) == adapters
        assert all(
            p.grad is None and not p.requires_grad for n, p in model.named_parameters() if n not in adapters
        )
    else:
        assert not adapters and set(gradients) == names


def test_gradient_through_two_steps_of_the_model_is_the_derivative() -> None:
    """Against a central difference along the gradient, so through encoder, U-Net and decoder twice."""
    model, gradients = trained("two-step")
    norm = torch.sqrt(sum((g**2).sum() for g in gradients.values()))

    def mean_loss(step: float) -> float:
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.add_(gradients[name], alpha=step / float(norm))
        losses = Roll(model, loss, "through").evaluate(start(model, state(1, 2)), [state(2), state(3)])
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.sub_(gradients[name], alpha=step / float(norm))
        return float(losses.mean())

    eps = 1e-6  # the loss has kinks, so no smaller error can be asked for
    assert (mean_loss(eps) - mean_loss(-eps)) / (2 * eps) == pytest.approx(float(norm), rel=1e-4)


def test_missing_inputs_become_the_mean_of_their_variable() -> None:
    """Zero in normalised units, per level, also where the model has statistics of its own."""
    batch = state(1, 2)
    batch.surf_vars["2t"][0, 0, 1] = float("nan")
    batch.surf_vars["msl"][0, 1, 2, 3] = float("inf")
    batch.atmos_vars["z"][0, 0, 1, 4] = float("nan")
    fields = [*batch.surf_vars.values(), *batch.atmos_vars.values()]
    assert count_missing(fields) == (2 * COLS + 1, (4 + 2 * 5) * 2 * ROWS * COLS)
    filled = fill(batch, {"msl": (5.0, 1.0)})
    normal = filled.normalise()
    assert count_missing([*filled.surf_vars.values(), *filled.atmos_vars.values()])[0] == 0
    assert normal.surf_vars["2t"][0, 0, 1].abs().max() < 1e-12
    assert filled.surf_vars["msl"][0, 1, 2, 3] == 5.0
    assert normal.atmos_vars["z"][0, 0, 1, 4].abs().max() < 1e-12
    assert torch.equal(filled.surf_vars["10u"], batch.surf_vars["10u"])


def test_sums_that_overflow_or_cancel_hide_nothing() -> None:
    """The fast look at a sum is only trusted where it is finite."""
    large = torch.full((4,), 3e38)
    assert count_missing([large]) == (0, 4) and fill_surface("2t", large) is large
    assert count_missing([torch.tensor([float("inf"), -float("inf"), 1.0])]) == (2, 3)


def test_lead_times_are_an_argument_where_a_model_takes_them() -> None:
    """The model's own step, or another."""
    model = Damping()
    assert lead_times(model, 2) == {}
    model.variable_lead_time = True
    assert lead_times(model, 2)["lead_times"].tolist() == [6.0, 6.0]
    assert lead_times(model, 1, 3.0)["lead_times"].tolist() == [3.0]


def test_scores_are_weighted_means_over_samples() -> None:
    """RMSE and MAE by the formula, in float64 numpy, with missing points and a sample without any."""
    scores = Scores(SMALL.surf_vars, SMALL.atmos_vars, LEVELS, 2)
    pairs = [(state(10 + n), replace(state(20 + n), metadata=state(10 + n).metadata)) for n in range(3)]
    pairs[0][1].atmos_vars["z"][..., 1, 2:5, :] = float("nan")
    pairs[1][1].surf_vars["2t"][:] = float("nan")
    for pair in pairs:
        scores.add(1, *pair)
    scores.fold(ALONE)
    found = scores.result()
    weight = torch.cos(torch.deg2rad(pairs[0][0].metadata.lat))[:, None].expand(ROWS, COLS)
    for channel, part in (
        ("2t", lambda b: b.surf_vars["2t"][0, 0]),
        ("z850", lambda b: b.atmos_vars["z"][0, 0, 1]),
    ):
        squares, absolutes = [], []
        for x, y in pairs:
            error, known = part(x) - part(y), torch.isfinite(part(y))
            if known.any():
                w = weight[known] / weight[known].sum()
                squares.append((w * error[known] ** 2).sum())
                absolutes.append((w * error[known].abs()).sum())
        assert len(squares) == (2 if channel == "2t" else 3)
        assert found["rmse"][channel][1] == pytest.approx(float(torch.stack(squares).mean().sqrt()), rel=1e-6)
        assert found["mae"][channel][1] == pytest.approx(float(torch.stack(absolutes).mean()), rel=1e-6)
        assert found["rmse"][channel][0] is None
