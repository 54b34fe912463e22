"""The training loss: weighted mean absolute error of normalised variables, over what is known of the truth.

L = gamma / (V_S + V_A) * (alpha * sum_k w_k mean_HW |d| + beta * sum_k mean_CHW (w_kc |d|)), d normalised, as
the Aurora paper (Bodnar et al. 2025) trains. Its text does not print all numbers: those here are what several
public repositories agree on, and where they do not, that is said. A weight can be set for every variable, and
for one level of it. Nothing is weighted by latitude.

Shapes: B batch, T history, C levels, H rows, W columns.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from aeris.aurora import normalisation
from aeris.aurora.batch import Batch
from aeris.aurora.normalisation import Stats, level_name

PUBLISHED: dict[str, dict[str, float]] = {
    "pretraining": {
        "2t": 3.0, "10u": 0.77, "10v": 0.66, "msl": 1.5,
        "z": 2.8, "q": 0.78, "t": 1.7, "u": 0.87, "v": 0.6,
    },
    # msl: 1.6 in the JAX port of the model, 3.5 in another repository; the paper does not say.
    "fine-tuning": {
        "2t": 3.5, "10u": 0.77, "10v": 0.66, "msl": 1.6,
        "z": 3.5, "q": 0.8, "t": 1.7, "u": 0.87, "v": 0.6,
    },
}  # fmt: skip
"""Weights of variables in the two kinds of training."""

GAMMA: dict[str, float] = {"era5": 2.0, "gfs-t0": 1.5, "hres-t0": 1.0, "other": 1.0}
"""Weight of a data set; only "era5" and "gfs-t0" are other than 1."""

ALPHA, BETA = 0.25, 1.0  # weights of surface variables and of variables on levels as a whole


@dataclass(frozen=True)
class LossWeights:
    """The factors of the loss.

    Attributes:
        variables: weight of every variable; "<name>_<level>" is that of one level of it.
        alpha: weight of the surface variables as a whole.
        beta: weight of the variables on levels as a whole.
        gamma: weight of the data set.
    """

    variables: Mapping[str, float] = field(default_factory=lambda: PUBLISHED["fine-tuning"])
    alpha: float = ALPHA
    beta: float = BETA
    gamma: float = 1.0

    def of(self, name: str, level: float | None = None) -> float:
        """Return the weight of a variable, at a level in hPa if it has levels.

        Raises:
            ValueError: it has none.
        """
        at_level = None if level is None else self.variables.get(f"{name}_{level_name(level)}")
        weight = self.variables.get(name) if at_level is None else at_level
        if weight is None:
            known = ", ".join(self.variables) or "none"
            raise ValueError(f"no loss weight for the variable {name!r} (there are: {known})")
        return weight


def loss_weights(
    table: str,
    dataset: str,
    surf_vars: Iterable[str],
    atmos_vars: Iterable[str],
    levels: Iterable[float] | None = None,
    changes: Mapping[str, float] | None = None,
    default: float | None = None,
) -> LossWeights:
    """Make the weights of a run from a published table, and check that they cover its variables.

    Args:
        table: a name in `PUBLISHED`.
        dataset: a name in `GAMMA`.
        surf_vars: surface variables the model predicts.
        atmos_vars: variables on levels it predicts.
        levels: in hPa, of the data; None: not known yet, any may have a weight.
        changes: weights that replace those of the table or add to it, as `LossWeights.variables`.
        default: weight of what is in neither; None: there must be nothing.

    Raises:
        ValueError: variables without a weight, a weight below zero or of what is not predicted.
    """
    atmos_vars, changes = list(atmos_vars), dict(changes or {})
    variables = [*surf_vars, *atmos_vars]
    weights = {**PUBLISHED[table], **changes}
    lacking = [name for name in variables if name not in weights]
    if lacking and default is None:
        raise ValueError(
            f"the weights of {table} have none for {', '.join(lacking)}: give each one, or all of them one"
        )
    weights |= {name: default for name in lacking if default is not None}
    _check_predicted(changes, variables, atmos_vars, levels)
    if bad := {name: value for name, value in weights.items() if not value >= 0}:
        raise ValueError(f"loss weights must be at least 0: {bad}")
    return LossWeights(weights, gamma=GAMMA[dataset])


def _check_predicted(
    names: Iterable[str], variables: list[str], atmos_vars: list[str], levels: Iterable[float] | None
) -> None:
    """Check that everything a weight is given for is predicted.

    Raises:
        ValueError: something is not; names it, and what is.
    """
    at = None if levels is None else [level_name(level) for level in levels]
    # Without known levels a level is what begins with a digit behind a variable on levels.
    known = {*variables, *(f"{name}_{level}" for name in atmos_vars for level in at or ())}
    strange = [name for name in names if name not in known]
    if at is None:
        beginnings = tuple(f"{name}_{digit}" for name in atmos_vars for digit in range(10))
        strange = [name for name in strange if not name.startswith(beginnings)]
    if strange:
        where = "" if at is None else f", on levels {', '.join(at)}: {', '.join(atmos_vars)}"
        raise ValueError(
            f"a loss weight for {', '.join(strange)}, but the model predicts {', '.join(variables)}{where}"
        )


def weighted_mae(
    prediction: Batch, target: Batch, weights: LossWeights, surf_stats: Stats | None = None
) -> Tensor:
    """Return the loss, a scalar: the mean over the samples of the batch.

    A target value that is not finite is left out of the mean of its variable and sample; where nothing is
    known of a variable, it adds 0 to the loss of the sample. So a batch has the loss of its samples alone.

    Args:
        prediction: of the model, one history entry.
        target: the truth at the same time and places; may have more variables.
        surf_stats: location and scale of surface variables that replace the usual ones.

    Raises:
        ValueError: they are not of the same time, grid and levels, or a variable has no target or weight.
    """
    _check_pair(prediction, target)
    levels = prediction.metadata.atmos_levels
    total: Tensor | float = 0.0
    for name, x in prediction.surf_vars.items():
        scale = surf_stats[name][1] if surf_stats and name in surf_stats else normalisation.scale(name)
        factor = weights.alpha * weights.of(name) / scale
        total = total + factor * _mean_known(x, target.surf_vars[name])
    for name, x in prediction.atmos_vars.items():
        factors = [weights.of(name, level) / normalisation.scale(name, level) for level in levels]
        factor_C11 = _tensor(factors, x)[:, None, None]
        total = total + weights.beta * _mean_known(x, target.atmos_vars[name], factor_C11)
    count = len(prediction.surf_vars) + len(prediction.atmos_vars)
    assert isinstance(total, Tensor), "a batch has at least one variable"
    return (weights.gamma / count) * total.mean()


def _mean_known(x: Tensor, truth: Tensor, factor: Tensor | None = None) -> Tensor:
    """Return for every sample the mean of factor |x - truth| over the known values of the truth: [B]."""
    known = torch.isfinite(truth)
    # The unknown is replaced before the difference: NaN times 0 would still be NaN in a gradient.
    apart = (x - torch.where(known, truth.to(x.dtype), 0.0)).abs()
    apart = torch.where(known, apart if factor is None else apart * factor, 0.0)
    return apart.flatten(1).sum(1) / known.flatten(1).sum(1).clamp(min=1)


_tensors: dict[tuple[tuple[float, ...], torch.dtype, torch.device], Tensor] = {}  # made once, not per step


def _tensor(values: list[float], like: Tensor) -> Tensor:
    key = (tuple(values), like.dtype, like.device)
    if key not in _tensors:
        with torch.inference_mode(False):  # a tensor made in inference mode could not be trained with later
            _tensors[key] = torch.tensor(values, dtype=like.dtype, device=like.device)
    return _tensors[key]


def _check_pair(prediction: Batch, target: Batch) -> None:
    """Check that a prediction is compared with the truth of its own time and place."""
    here, there = prediction.metadata, target.metadata
    if here.time != there.time:
        raise ValueError(
            f"a prediction for {', '.join(map(str, here.time))} against the truth of "
            f"{', '.join(map(str, there.time))}"
        )
    if prediction.spatial_shape != target.spatial_shape or here.atmos_levels != there.atmos_levels:
        raise ValueError(
            f"a prediction on {prediction.spatial_shape} points and levels {here.atmos_levels} hPa against "
            f"the truth on {target.spatial_shape} and {there.atmos_levels} hPa"
        )
    for kind in ("surf_vars", "atmos_vars"):
        if lacking := [name for name in getattr(prediction, kind) if name not in getattr(target, kind)]:
            raise ValueError(f"the truth has no {', '.join(lacking)}, which the model predicts")
