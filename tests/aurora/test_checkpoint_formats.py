"""Checkpoints in every published layout become today's names and shapes."""

from __future__ import annotations

import pytest
import torch

from aeris.aurora.checkpoint_formats import adapt
from aeris.aurora.config import AuroraConfig
from aeris.aurora.weights import identify
from tests.aurora.old_formats import (
    STATIC,
    SURF,
    air_pollution_pair,
    assert_same,
    build,
    fuse_embedding,
    old_format,
    random_state,
)


def test_the_first_models_files() -> None:
    model = build("aurora")
    state = random_state(model)
    assert len(old_format(state)) < len(state)
    assert_same(adapt(model.config, old_format(state)), state)
    assert_same(adapt(model.config, state), state)


def test_a_file_with_patches_of_another_size_is_taken_apart_by_its_own() -> None:
    state = random_state(build("pretrained"))
    state = {k: x for k, x in state.items() if not k.startswith("decoder.")}
    fuse_embedding(state, "encoder.surf_token_embeds", SURF + STATIC)
    assert len(adapt(AuroraConfig(patch_size=10), state)) == len(state) + 6


def test_v1p5_files_follow_the_models_own_lists() -> None:
    model = build("v1.5")
    state = random_state(model)
    old = old_format(state, model.config.surf_vars, model.config.static_vars)
    assert old["net.encoder.surf_token_embeds.weight"].shape[1] == 62
    assert_same(adapt(model.config, old), state)
    assert (identify(old), identify(state)) == ("v1.5", "v1.5")


def test_wave_files_name_two_norms_otherwise() -> None:
    model = build("wave")
    state = random_state(model)
    old = {name.replace(".ln_k.", ".k_ln.").replace(".ln_q.", ".q_ln."): x for name, x in state.items()}
    assert len(old.keys() - state.keys()) == 4
    assert_same(adapt(model.config, old), state)
    assert identify(old) == "wave"


def test_air_pollution_files() -> None:
    old, state = air_pollution_pair()
    before = {name: x.clone() for name, x in old.items()}
    model = build("air-pollution")
    assert_same(adapt(model.config, old), state)
    assert_same(old, before)
    assert identify(old) == identify(state) == "air-pollution"
    # Today's layout: the two orographies share weights where the model repeats the published mistake.
    state["encoder.atmos_token_embeds.layers.500.weights.z"] = torch.randn(16, 1, 2, 3, 3)
    z = "encoder.atmos_token_embeds.layers.500.weights."
    got = adapt(model.config, state)
    assert torch.equal(got[f"{z}z"], state[f"{z}static_z"])
    assert_same(adapt(AuroraConfig(simulate_indexing_bug=False), state), state)


def test_longer_history_gets_zeros_at_the_end() -> None:
    """Trained weights stay where they were: on the oldest times, as published."""
    state = random_state(build("pretrained"))
    got = adapt(build("pretrained", max_history_size=4).config, state)
    for name in ("encoder.surf_token_embeds.weights.2t", "encoder.atmos_token_embeds.weights.q"):
        assert torch.equal(got[name][:, :, :2], state[name])
        assert not got[name][:, :, 2:].any()
    levels = random_state(build("pretrained", level_condition=(500, 850)))
    got = adapt(AuroraConfig(max_history_size=3), levels)
    assert got["encoder.atmos_token_embeds.layers.500.weights.t"].shape[2] == 3
    with pytest.raises(ValueError, match=r"history of 2 times, the model for 1.*max_history_size=2"):
        adapt(AuroraConfig(max_history_size=1), state)
