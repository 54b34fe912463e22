"""Errors put on states in training: their size and shape, that the target takes them out, on any shard."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from aeris.data.spherical import SphericalNoise
from aeris.state_noise import LEAST, LENGTH_KM, SHARED, SMOOTH, SMOOTH_SIZE, WHITE, WHITE_SIZE, StateNoise
from swipe import noise

ROWS, COLS = 12, 24
NAMES = ("t2m", "z500", "t500", "t850")
CHANNELS = len(NAMES)
LATITUDE = np.linspace(82.5, -82.5, ROWS)
LONGITUDE = np.arange(COLS) * 15.0
RATIO = np.array([0.5, 0.25, 2.0, 1.0])
TOKENS = torch.arange(ROWS * COLS).reshape(2, -1)
AMPLITUDE = 0.6


def errors(images: int, tokens: Tensor = TOKENS, **how: Tensor) -> tuple[Tensor, Tensor]:
    """Return what is added to a state and to a residual of zeros, [B, N, T, C]."""
    keys = [noise.key(0, 2, image) for image in range(images)]
    make = StateNoise(AMPLITUDE, NAMES, LATITUDE, LONGITUDE, tokens, RATIO, **how)
    zeros = torch.zeros(images, *tokens.shape, CHANNELS)
    return make(keys, zeros, zeros)


def test_the_residual_takes_the_error_out_again() -> None:
    """The next state is the same: state + ratio x residual of it, channel by channel."""
    state, residual = errors(4)
    torch.testing.assert_close(state + torch.tensor(RATIO).float() * residual, torch.zeros_like(state))
    assert state.abs().mean() > 0.01


def test_an_error_is_white_and_smooth_parts_of_random_sizes() -> None:
    """By hand, with the fields that the module of spherical noise makes of the same numbers."""
    sphere = SphericalNoise(LATITUDE, LONGITUDE, LENGTH_KM)
    numbers = torch.arange(sphere.coefficients)[None]
    for image in range(3):
        key = noise.key(0, 2, image)
        own, shared = (
            sphere.fields(noise.normal([noise.key(key, which)], numbers, CHANNELS)[0, 0].T.double().numpy())
            for which in (SMOOTH, SHARED)
        )
        shared = shared[[0, 1, 0, 0]]  # t2m goes with t; variables are numbered by name
        white = noise.normal([noise.key(key, WHITE)], TOKENS, CHANNELS)[0].reshape(-1, CHANNELS)
        a, b = (
            AMPLITUDE * LEAST ** noise.uniform([noise.key(key, which)]).item()
            for which in (WHITE_SIZE, SMOOTH_SIZE)
        )
        smooth = torch.from_numpy(((own + shared) * 0.5**0.5).reshape(CHANNELS, -1).T)
        torch.testing.assert_close(-errors(3)[1][image].reshape(-1, CHANNELS), a * white + b * smooth)


def test_sizes_reach_the_amplitude_and_seldom() -> None:
    """Log-uniform over two decades: the mean square is that of the formula, a quarter lies beyond a third."""
    size = errors(800)[1].square().mean((1, 2, 3)).sqrt()
    expected = 2 * AMPLITUDE**2 * (1 - LEAST**2) / (2 * math.log(1 / LEAST))
    assert size.square().mean().item() == pytest.approx(expected, rel=0.15)
    assert size.min() < 0.05 and AMPLITUDE < size.max() < 2 * AMPLITUDE


def test_levels_of_a_variable_go_together_and_variables_do_not() -> None:
    """Smooth errors correlate by one half between t2m, t500 and t850, not with z500."""
    images = range(400)
    smooth = errors(len(images))[1].mean(2)  # over half a hemisphere's tokens the white part is small
    related = torch.corrcoef(smooth.reshape(-1, CHANNELS).T)
    assert related[0, 2].item() == pytest.approx(0.5, abs=0.12) and related[2, 3].item() > 0.38
    assert related[1, [0, 2, 3]].abs().max() < 0.12


def test_a_shard_has_its_part_of_the_whole() -> None:
    """Whatever tokens a rank holds, in whatever order."""
    whole = errors(3)[0].flatten(1, 2)
    part = torch.randperm(ROWS * COLS, generator=torch.Generator().manual_seed(0))[:40].reshape(4, 10)
    torch.testing.assert_close(errors(3, tokens=part)[0], whole[:, part])


def test_hidden_points_stay_hidden() -> None:
    """Where a mask hides a point, state and residual stay 0."""
    valid = (torch.arange(ROWS * COLS).reshape(2, -1, 1) % 3 > 0).float().expand(-1, -1, CHANNELS)
    for values in errors(2, valid_NTC=valid):
        assert ((values != 0) == valid.bool()).all()
