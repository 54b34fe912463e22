"""Schedules as tables, and the one-stage pipeline against one backward pass over the whole batch."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from swipe.pipeline import Microbatch, Pipeline
from swipe.schedule import one_f_one_b


@pytest.mark.parametrize("stages", [1, 2, 4, 5])
@pytest.mark.parametrize("microbatches", [1, 2, 3, 8])
def test_1f1b_is_valid_on_every_stage(stages: int, microbatches: int) -> None:
    """Each pass once, backward after forward, microbatches in order, at most stages - stage in flight."""
    for stage in range(stages):
        actions = one_f_one_b(stage, stages, microbatches)
        for kind in "FB":
            assert [a.microbatch for a in actions if a.kind == kind] == list(range(microbatches))
        flying = most = 0
        done: set[int] = set()
        for action in actions:
            if action.kind == "F":
                flying += 1
                done.add(action.microbatch)
            else:
                assert action.microbatch in done
                flying -= 1
            most = max(most, flying)
        assert most == min(stages - stage, microbatches)


def test_one_stage_alternates() -> None:
    """With one stage the table is gradient accumulation."""
    assert " ".join(f"{a.kind}{a.microbatch}" for a in one_f_one_b(0, 1, 3)) == "F0 B0 F1 B1 F2 B2"


@pytest.mark.parametrize(("stage", "stages", "microbatches"), [(1, 1, 1), (-1, 2, 1), (0, 1, 0)])
def test_impossible_schedules_are_refused(stage: int, stages: int, microbatches: int) -> None:
    """A stage that does not exist, or nothing to do."""
    with pytest.raises(ValueError, match="no schedule"):
        one_f_one_b(stage, stages, microbatches)


def test_microbatches_accumulate_the_mean_gradient() -> None:
    """Four microbatches of two give the gradient of the mean over eight, and the losses."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    x, y = torch.randn(8, 3).double(), torch.randn(8, 2).double()
    nn.functional.mse_loss(model(x), y).backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    losses = Pipeline(model, nn.functional.mse_loss).step(
        (Microbatch((x[i : i + 2],), y[i : i + 2]) for i in range(0, 8, 2)), 4
    )
    for p, grad in zip(model.parameters(), expected):
        torch.testing.assert_close(p.grad, grad, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(losses.mean(), nn.functional.mse_loss(model(x), y).detach())


def test_too_few_microbatches_are_refused() -> None:
    """A loader that ends early does not silently change the mean."""
    model = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="3 microbatches got only 1"):
        Pipeline(model, nn.functional.mse_loss).step([Microbatch((torch.ones(1, 2),), torch.ones(1, 2))], 3)
