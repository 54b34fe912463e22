"""The weighted mean absolute error, against its formula written out, and what missing values do to it."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime

import numpy as np
import pytest
import torch

from aeris.aurora import normalisation
from aeris.aurora.batch import Batch, Metadata
from aeris.aurora.loss import GAMMA, PUBLISHED, LossWeights, loss_weights, weighted_mae

LEVELS = (500, 850)
NAN = float("nan")


def batch(seed: int, samples: int = 2, dtype: torch.dtype = torch.float64) -> Batch:
    """Random fields about their usual values, one history entry."""
    draw = torch.Generator().manual_seed(seed)
    metadata = Metadata(
        torch.linspace(90, -90, 4), torch.arange(6) * 60.0, (datetime(2020, 1, 1),) * samples, LEVELS
    )
    surf = {name: torch.randn(samples, 1, 4, 6, generator=draw, dtype=dtype) for name in ("2t", "msl")}
    atmos = {name: torch.randn(samples, 1, 2, 4, 6, generator=draw, dtype=dtype) for name in ("z", "q", "t")}
    return Batch(surf, {}, atmos, metadata).unnormalise()


def test_is_the_formula() -> None:
    """gamma / (V_S + V_A) [1/4 sum w mean |d| + sum mean w |d|], with a level of its own weight."""
    one, other = batch(1), batch(2)
    weights = LossWeights({**PUBLISHED["pretraining"], "z_500": 10.0}, gamma=2.0)
    surface = sum(
        PUBLISHED["pretraining"][name]
        * np.abs((one.surf_vars[name] - other.surf_vars[name]).numpy() / normalisation.scale(name)).mean()
        for name in ("2t", "msl")
    )
    levels = 0.0
    for name in ("z", "q", "t"):
        apart = np.abs((one.atmos_vars[name] - other.atmos_vars[name]).numpy())[:, 0]
        for place, level in enumerate(LEVELS):
            weight = 10.0 if (name, level) == ("z", 500) else PUBLISHED["pretraining"][name]
            levels += weight * apart[:, place].mean() / normalisation.scale(name, level) / len(LEVELS)
    expected = 2.0 / 5 * (0.25 * surface + levels)
    assert float(weighted_mae(one, other, weights)) == pytest.approx(expected, rel=1e-12)


def test_statistics_of_the_model_replace_the_usual_ones() -> None:
    """A larger scale makes the same error smaller."""
    one, other = batch(1), batch(2)
    only = [replace(x, surf_vars={"msl": x.surf_vars["msl"]}, atmos_vars={}) for x in (one, other)]
    usual = weighted_mae(*only, LossWeights())
    changed = weighted_mae(*only, LossWeights(), {"msl": (0.0, 2 * normalisation.scale("msl"))})
    assert float(changed) == pytest.approx(float(usual) / 2)


def test_a_batch_is_the_mean_of_its_samples() -> None:
    """Also where one sample knows less than the other, so that ranks may share a batch."""
    one, other = batch(1), batch(2)
    other.surf_vars["2t"][0, 0, :2] = NAN
    other.atmos_vars["q"][1] = NAN

    def sample(x: Batch, number: int) -> Batch:
        part = slice(number, number + 1)
        return Batch(
            {k: v[part] for k, v in x.surf_vars.items()},
            {},
            {k: v[part] for k, v in x.atmos_vars.items()},
            replace(x.metadata, time=x.metadata.time[part]),
        )

    alone = [weighted_mae(sample(one, n), sample(other, n), LossWeights()) for n in range(2)]
    assert float(weighted_mae(one, other, LossWeights())) == pytest.approx(float(sum(alone)) / 2, rel=1e-12)


def test_missing_targets_neither_count_nor_spoil_the_gradient() -> None:
    """The gradient is zero exactly there; the mean is over what is known."""
    one, other = batch(1, samples=1), batch(2, samples=1)
    known = weighted_mae(one, other, LossWeights())
    x = one.surf_vars["msl"].requires_grad_()
    other.surf_vars["msl"][..., 2, 3] = NAN
    other.surf_vars["msl"][..., 0, 0] = float("inf")
    other.surf_vars["2t"][:] = NAN
    loss = weighted_mae(one, other, LossWeights())
    loss.backward()
    assert torch.isfinite(loss) and loss < known
    assert torch.isfinite(x.grad).all() and (x.grad == 0).sum() == 2
    assert x.grad[..., 2, 3] == 0 and x.grad[..., 0, 0] == 0
    one.surf_vars["msl"] = x.detach()
    apart = (x.detach() - other.surf_vars["msl"]).abs()
    mean = float(apart[torch.isfinite(apart)].mean()) / normalisation.scale("msl")
    only = [replace(b, surf_vars={"msl": b.surf_vars["msl"]}, atmos_vars={}) for b in (one, other)]
    weight = LossWeights().of("msl")
    assert float(weighted_mae(*only, LossWeights())) == pytest.approx(0.25 * weight * mean, rel=1e-12)


def test_weights_come_from_tables_and_changes() -> None:
    """Published numbers, data sets, changes, and a default for the rest."""
    weights = loss_weights(
        "fine-tuning", "era5", ("2t",), ("z", "r"), (50, 500.0, 850), {"2t": 1.0, "z_500": 9.0}, default=0.5
    )
    assert weights.gamma == GAMMA["era5"] == 2.0 and GAMMA["hres-t0"] == 1.0
    assert (weights.of("2t"), weights.of("z", 850), weights.of("z", 500), weights.of("r", 50)) == (
        1.0,
        3.5,
        9.0,
        0.5,
    )


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((("2t", "swh"), ("r",)), "none for swh, r"),
        ((("2t",), (), None, {"2m_temperature": 1.0}), "for 2m_temperature, but the model predicts 2t"),
        ((("2t",), ("z",), None, {"z_500": 1.0, "2t_500": 1.0, "z_x": 1.0}), "for 2t_500, z_x, but"),
        ((("2t",), ("z",), LEVELS, {"z_501": 1.0}), "for z_501, but .* 2t, z, on levels 500, 850: z"),
        ((("2t",), (), None, {"2t": -1.0}), "at least 0"),
        ((("2t",), (), None, {"2t": NAN}), "at least 0"),
    ],
)
def test_bad_weights_are_refused(arguments: tuple, says: str) -> None:
    """One error that names the variables."""
    with pytest.raises(ValueError, match=says):
        loss_weights("fine-tuning", "other", *arguments)


def test_only_predictions_and_truth_of_one_time_and_place_are_compared() -> None:
    """Another time, another grid, a variable without a truth or weight."""
    one, other = batch(1), batch(2)
    later = replace(other, metadata=replace(other.metadata, time=(datetime(2020, 1, 2),) * 2))
    with pytest.raises(ValueError, match="for 2020-01-01 .* against the truth of 2020-01-02"):
        weighted_mae(one, later, LossWeights())
    with pytest.raises(ValueError, match=r"on \(4, 6\) points .* on \(3, 6\)"):
        weighted_mae(one, other.crop(3), LossWeights())
    with pytest.raises(ValueError, match="no msl"):
        weighted_mae(one, replace(other, surf_vars={"2t": other.surf_vars["2t"]}), LossWeights())
    with pytest.raises(ValueError, match="no loss weight for the variable 'msl'"):
        weighted_mae(one, other, LossWeights({"2t": 1.0}))
