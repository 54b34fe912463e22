"""The loss: a mean of squared errors, weighted by latitude and channel, over the points that have a value.

    loss = sum_ntc w_ntc (a_ntc - b_ntc)^2 / sum_ntc w_ntc    w_ntc = alpha(latitude) kappa(channel) valid_ntc

alpha and kappa are in aeris/data/variables.py. Sources: AERIS (arXiv 2509.13523), GenCast (2312.15796).

Shapes: B samples, N windows, T tokens per window, C channels, Y rows, X columns.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from aeris.data.variables import channel_weights, latitude_weights


def loss_weights(
    names: Sequence[str],
    latitude_deg: NDArray[np.float64],
    tokens_NT: Tensor,
    cols: int,
    *,
    channel_scheme: str = "uniform",
    weight_latitudes: bool = True,
    mask_CYX: NDArray[np.bool_] | None = None,
) -> Tensor:
    """Return the weights of a rank's tokens: float32 [N, T, C], 0 where a point has no value.

    They are scaled on the whole grid, never on the shard: over all its points and channels their mean is 1,
    hidden points counted as 0. So the plain mean of w (a - b)^2 over tokens and channels is the weighted mean
    over the valid points, and the means of equally large shards average to that of the grid.

    Args:
        names: channel names, in order.
        latitude_deg: latitude of every row of the grid [Y].
        tokens_NT: global token numbers row * cols + col of this rank (`WindowLayout.tokens_NT`).
        cols: columns X of the grid.
        channel_scheme: "uniform" or "pressure".
        weight_latitudes: weight rows by (cos(latitude) + 0.01) / mean; otherwise all rows count the same.
        mask_CYX: True where a point of a channel has a value; None where all have.

    Raises:
        ValueError: the tokens or the mask do not fit the grid, or no point is valid.
    """
    rows = len(latitude_deg)
    if int(tokens_NT.max()) >= rows * cols:
        raise ValueError(f"token {int(tokens_NT.max())} is not on a grid of {rows} x {cols} points")
    if mask_CYX is not None and mask_CYX.shape != (len(names), rows, cols):
        raise ValueError(f"the mask has shape {mask_CYX.shape}, the data {(len(names), rows, cols)}")
    alpha_Y = latitude_weights(latitude_deg, "train") if weight_latitudes else np.ones(rows)
    weight_CY = channel_weights(names, channel_scheme)[:, None] * alpha_Y
    valid_CY = np.full((len(names), rows), cols) if mask_CYX is None else mask_CYX.sum(axis=2)
    total = float((weight_CY * valid_CY).sum())
    if total <= 0:
        raise ValueError("no point has both a value and a weight: the mask hides the whole grid")
    weight_CY = weight_CY * (len(names) * rows * cols / total)
    tokens = tokens_NT.cpu().numpy()
    weight_NTC = weight_CY.T[tokens // cols]
    if mask_CYX is not None:
        weight_NTC = weight_NTC * np.moveaxis(mask_CYX.reshape(len(names), -1)[:, tokens], 0, -1)
    return torch.from_numpy(weight_NTC.astype(np.float32)).to(tokens_NT.device)


def weighted_mse(prediction_BNTC: Tensor, target_BNTC: Tensor, weight_NTC: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean loss of a batch (a scalar) and of every sample [B], for weights of `loss_weights`."""
    loss_B = (weight_NTC * (prediction_BNTC - target_BNTC).square()).mean(dim=(1, 2, 3))
    return loss_B.mean(), loss_B
