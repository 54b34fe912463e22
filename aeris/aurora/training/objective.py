"""What an update learns from: one or more model steps, their losses, and how far gradients go back.

Two ways from the losses of a roll-out of K steps to gradients, both of the mean of the K losses:

| gradient     | a prediction that is fed back | gradients reach                      | memory of  |
| ------------ | ----------------------------- | ------------------------------------ | ---------- |
| through      | stays in the graph            | every step, through all later ones   | K steps    |
| push-forward | is cut off (detached)         | every step, from its own loss alone  | one step   |

With push-forward the graphs of the steps share nothing, so each step's loss / K goes backward at once. A
prediction is cut off as it is fed back, not as it enters its loss: every step trains.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from aeris.aurora.batch import Batch
from aeris.aurora.rollout import Model, lead_times, next_input

Gradient = Literal["through", "push-forward"]


def forward(model: Model, batch: Batch) -> Batch:
    """Predict one time step ahead."""
    return model(batch, **lead_times(model, len(batch.metadata.time)))


def detached(batch: Batch) -> Batch:
    """Return a batch that no gradient leaves."""
    return replace(
        batch,
        surf_vars={name: x.detach() for name, x in batch.surf_vars.items()},
        static_vars={name: x.detach() for name, x in batch.static_vars.items()},
        atmos_vars={name: x.detach() for name, x in batch.atmos_vars.items()},
    )


def truth(model: Model, target: Batch, like: Batch) -> Batch:
    """Make a target comparable with the predictions for `like`: cropped, and on the same device."""
    x = next(iter({**like.surf_vars, **like.atmos_vars}.values()))
    return model.batch_transform_hook(target).crop(model.patch_size).to(x.device)


class Roll:
    """How the roll-outs of a run are done: what is asked before a step and told after it.

    Attributes:
        model: predicts.
        loss: of a prediction and its target, a scalar that is the mean over samples.
        gradient: how far gradients go back.
        before: called with the number of the step before it is taken; the place to seed what is random.
        after: called with the number of the step, its input, its prediction (detached) and its target.
        last: called with whether the next backward pass is the last of the update.
    """

    def __init__(
        self,
        model: Model,
        loss: Callable[[Batch, Batch], Tensor],
        gradient: Gradient,
        before: Callable[[int], None] = lambda step: None,
        after: Callable[[int, Batch, Batch, Batch], None] = lambda *seen: None,
        last: Callable[[bool], None] = lambda last: None,
    ) -> None:
        """Take the parts; nothing is computed yet."""
        self.model, self.loss, self.gradient = model, loss, gradient
        self.before, self.after, self.last = before, after, last

    def train(self, batch: Batch, targets: Sequence[Batch], share: float = 1.0, last: bool = True) -> Tensor:
        """Add the gradient of `share` times the mean loss of a roll-out to the weights.

        Args:
            batch: where it starts, nothing missing, from `aeris.aurora.rollout.start`.
            targets: the truth at every step, from `truth`.
            share: of these samples in the update.
            last: whether the update has no more samples after these.

        Returns:
            The loss of every step, detached: [K].
        """
        losses: list[Tensor] = []
        whole: Tensor | float = 0.0
        count = len(targets)
        for step, target in enumerate(targets):
            self.before(step)
            prediction = forward(self.model, batch)
            loss = self.loss(prediction, target)
            losses.append(loss.detach())
            cut = detached(prediction)
            self.after(step, batch, cut, target)
            if self.gradient == "push-forward":
                self.last(last and step == count - 1)
                (loss * (share / count)).backward()
                prediction = cut
            else:
                whole = whole + loss
            if step < count - 1:
                batch = next_input(batch, self.model.apply_rollout_input_clipping(prediction))
        if isinstance(whole, Tensor):
            self.last(last)
            (whole * (share / count)).backward()
        return torch.stack(losses)

    @torch.no_grad()
    def evaluate(self, batch: Batch, targets: Sequence[Batch]) -> Tensor:
        """Return the loss of every step of a roll-out, [K], without gradients."""
        losses = []
        for step, target in enumerate(targets):
            self.before(step)
            prediction = forward(self.model, batch)
            losses.append(self.loss(prediction, target))
            self.after(step, batch, prediction, target)
            if step < len(targets) - 1:
                batch = next_input(batch, self.model.apply_rollout_input_clipping(prediction))
        return torch.stack(losses)
