"""Noise on the state a step starts from, in training only: so that a forecast mends its own errors.

    state' = state + e s_change / s_state    residual' = residual - e    e = a white + b smooth

s: standard deviations of the change and of the state, in which both are given. Sizes a and b are drawn for
every image, log-uniformly up to the amplitude (docs/diffusion.md, "State noise"). Smooth: over thousands of
kilometres, half of it shared by all levels of a variable.
Sources: Ho et al. 2022, JMLR 23(47), section 4; Sanchez-Gonzalez et al. 2020 (arXiv 2002.09405), section 4.4.

Shapes: B samples, N windows, T tokens per window, C channels, K coefficients.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from aeris.data.spherical import SphericalNoise
from swipe import noise

LENGTH_KM = 3000.0
"""Correlation length of the smooth errors."""
LEAST = 0.01
"""Smallest size, of the largest."""
SURFACE = {"t2m": "t", "d2m": "q", "u10": "u", "v10": "v", "msl": "z", "sp": "z"}
"""The variable whose smooth errors a surface channel shares."""
WHITE, SMOOTH, SHARED, WHITE_SIZE, SMOOTH_SIZE = range(5)  # which random numbers of an image


class StateNoise:
    """Makes and applies the errors of images on the tokens of a rank.

    Args:
        amplitude: largest size of an error, in standard deviations of the change.
        names: short name of every channel [C].
        latitude_deg: of every row of the grid [Y].
        longitude_deg: of every column [X].
        tokens_NT: global token numbers row * X + column of this rank.
        change_per_state_C: standard deviation of the change over that of the state.
        valid_NTC: 0 where a point has no value; None where all have.
    """

    def __init__(
        self,
        amplitude: float,
        names: Sequence[str],
        latitude_deg: NDArray[np.float64],
        longitude_deg: NDArray[np.float64],
        tokens_NT: Tensor,
        change_per_state_C: NDArray[np.float64],
        valid_NTC: Tensor | None = None,
    ) -> None:
        self.amplitude, self._tokens_NT, self._valid_NTC = amplitude, tokens_NT, valid_NTC
        device, cols = tokens_NT.device, len(longitude_deg)
        self._ratio_C = torch.from_numpy(change_per_state_C).float().to(device)
        variables = [SURFACE.get(name, name.rstrip("0123456789")) for name in names]
        known = sorted(set(variables))
        self._variable_C = torch.tensor([known.index(name) for name in variables], device=device)
        rows, row_NT = np.unique(tokens_NT.cpu().numpy() // cols, return_inverse=True)
        smooth = SphericalNoise(latitude_deg[rows], longitude_deg, LENGTH_KM)
        fields_KYX = smooth.fields(np.eye(smooth.coefficients))
        basis_NTK = fields_KYX[:, row_NT.reshape(tokens_NT.shape), tokens_NT.cpu().numpy() % cols]
        self._basis_NTK = torch.from_numpy(np.moveaxis(basis_NTK, 0, -1).copy()).to(device)
        self._numbers_1K = torch.arange(smooth.coefficients, device=device)[None]

    def __call__(
        self, keys: Sequence[int], state_BNTC: Tensor, residual_BNTC: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return state and residual with an error in the state, which the residual takes out again.

        Args:
            keys: one per image, see `swipe.noise.key`.
        """
        channels = state_BNTC.shape[-1]
        white = noise.normal([noise.key(k, WHITE) for k in keys], self._tokens_NT, channels)
        own_B1KC, shared_B1KC = (
            noise.normal([noise.key(k, which) for k in keys], self._numbers_1K, channels)
            for which in (SMOOTH, SHARED)
        )
        drawn_BKC = (own_B1KC + shared_B1KC[..., self._variable_C])[:, 0] * 0.5**0.5
        smooth = torch.einsum("ntk,bkc->bntc", self._basis_NTK, drawn_BKC)
        error = self._size(keys, WHITE_SIZE) * white + self._size(keys, SMOOTH_SIZE) * smooth
        if self._valid_NTC is not None:
            error = error * self._valid_NTC
        return state_BNTC + self._ratio_C * error, residual_BNTC - error

    def _size(self, keys: Sequence[int], which: int) -> Tensor:
        """Draw the size of an error for every image [B, 1, 1, 1]."""
        u_B = noise.uniform([noise.key(k, which) for k in keys], self._tokens_NT.device)
        return self.amplitude * (LEAST**u_B)[:, None, None, None]
