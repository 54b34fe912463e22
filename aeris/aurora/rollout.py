"""Long forecasts: every prediction becomes the input of the next step.

Shapes: B batch, T history.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from typing import Protocol

import torch
from torch import Tensor, nn

from aeris.aurora.batch import Batch


class Model(Protocol):
    """What a roll-out asks of a model; `aeris.aurora.model.Aurora` has it."""

    @property
    def patch_size(self) -> int:
        """Rows and columns of a patch."""
        ...

    @property
    def timestep(self) -> timedelta:
        """How far a step goes."""
        ...

    @property
    def variable_lead_time(self) -> bool:
        """Whether the lead time is an argument of the call."""
        ...

    def parameters(self) -> Iterator[nn.Parameter]:
        """Give the weights; the first says type and device."""
        ...

    def batch_transform_hook(self, batch: Batch) -> Batch:
        """Turn what users have into what the model reads."""
        ...

    def apply_rollout_input_clipping(self, pred: Batch) -> Batch:
        """Bound a prediction before it is fed back."""
        ...

    def set_noise_accumulation(self, n: int) -> None:
        """Average the noise over n calls; 0: new noise with every call."""
        ...

    def __call__(self, batch: Batch, lead_times: Tensor | None = None) -> Batch:
        """Predict."""
        ...


def start(model: Model, batch: Batch) -> Batch:
    """Make data the input of a roll-out: transformed, of the model's type, cropped, on its device.

    Physical units need 32 bits at least: a model of half precision gets float32 and casts after normalising.

    Raises:
        ValueError: the grid does not divide into patches.
    """
    weight = next(model.parameters())
    batch = model.batch_transform_hook(batch)
    wide = torch.promote_types(weight.dtype, torch.float32)
    return batch.type(wide).crop(model.patch_size).to(weight.device)


def next_input(batch: Batch, prediction: Batch) -> Batch:
    """Slide the history: drop the oldest time and append the prediction.

    Variables that only one of the two has are left out: the model makes those it only predicts. Metadata and
    static variables are the prediction's.

    Args:
        batch: the input of the step, fields [B, T, ...].
        prediction: what came out, fields [B, 1, ...], cropped like the input.

    Returns:
        The input of the next step, fields [B, T, ...], in the order of the prediction's variables.
    """

    def slide(old: Mapping[str, Tensor], new: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {
            name: torch.cat((old[name][:, 1:], x.to(old[name].dtype)), dim=1)
            for name, x in new.items()
            if name in old
        }

    return replace(
        prediction,
        surf_vars=slide(batch.surf_vars, prediction.surf_vars),
        atmos_vars=slide(batch.atmos_vars, prediction.atmos_vars),
    )


def rollout(
    model: Model,
    batch: Batch,
    steps: int,
    fine_lead_times: Sequence[float] | None = None,
    use_noise_accumulation: bool = True,
    apply_rollout_input_clipping: bool = True,
) -> Generator[Batch, None, None]:
    """Predict step after step.

    Args:
        model: predicts; gradients flow as its mode and the caller's context say.
        batch: the state to start from.
        steps: how many times a prediction is fed back, plus one.
        fine_lead_times: lead times in hours to predict within every step, all from the same state; the last
            is the model's time step and the only one fed back. Needs a model with `variable_lead_time`.
        use_noise_accumulation: with fine lead times, average the noise of a stochastic model over as many
            calls as there are fine lead times, so that neighbours in time resemble each other.
        apply_rollout_input_clipping: bound predictions as the model says before they are fed back.

    Yields:
        The prediction of every step, or of every fine lead time of every step.

    Raises:
        ValueError: the model takes no lead times, or the last fine one is not its time step; a bad `steps`.
    """
    step_h = model.timestep / timedelta(hours=1)
    if steps < 0:
        raise ValueError(f"{steps} steps: give 0 or more")
    if fine_lead_times is not None:
        _check_lead_times(model, fine_lead_times, step_h)
    return _rollout(
        model,
        batch,
        steps,
        (None,) if fine_lead_times is None else fine_lead_times,
        len(fine_lead_times) if fine_lead_times is not None and use_noise_accumulation else 0,
        apply_rollout_input_clipping,
    )


def _check_lead_times(model: Model, lead_times_h: Sequence[float], step_h: float) -> None:
    if not model.variable_lead_time:
        raise ValueError("fine_lead_times need a model with variable_lead_time, such as AuroraV1p5")
    if not lead_times_h or not math.isclose(lead_times_h[-1], step_h):
        raise ValueError(
            f"the last of fine_lead_times must be the model's time step of {step_h:g} h, "
            f"found {list(lead_times_h)}"
        )


def _rollout(
    model: Model,
    batch: Batch,
    steps: int,
    lead_times_h: Sequence[float | None],
    noise_calls: int,
    clip: bool,
) -> Generator[Batch, None, None]:
    """Do what `rollout` says; apart, so that wrong arguments are found when it is called."""
    batch = start(model, batch)
    if noise_calls:
        model.set_noise_accumulation(noise_calls)
    try:
        for step in range(steps):
            for lead_time_h in lead_times_h:
                prediction = model(batch, **lead_times(model, len(batch.metadata.time), lead_time_h))
                yield prediction
            if step + 1 < steps:
                if clip:
                    prediction = model.apply_rollout_input_clipping(prediction)
                batch = next_input(batch, prediction)
    finally:
        if noise_calls:
            model.set_noise_accumulation(0)


def lead_times(model: Model, samples: int, hours: float | None = None) -> dict[str, Tensor]:
    """Return the lead time of every sample as an argument [B]; none for a model that takes none.

    Args:
        hours: how far ahead; None: the model's time step.
    """
    if not model.variable_lead_time:
        return {}
    hours = model.timestep / timedelta(hours=1) if hours is None else hours
    return {"lead_times": torch.full((samples,), hours, dtype=torch.float64)}
