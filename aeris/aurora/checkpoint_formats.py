"""Turns the weights of every published file into today's names: one tensor per variable.

Older files hold the weights of all variables in one tensor, and those of the air-pollution model two patch
embeddings that were added up. Nothing here computes but that sum; all else is slices of what was given.

Shapes: D width, V variables, T history, P patch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from aeris.aurora.config import (
    ATMOS,
    ATMOS_POLLUTANTS,
    CALENDAR_VARS,
    EMISSIONS,
    STATIC,
    SURF,
    SURF_POLLUTANTS,
    AuroraConfig,
)

State = dict[str, Tensor]

EMBEDDING = re.compile(r"encoder\.(surf|atmos)_token_embeds\.(layers\.[^.]+\.)?weights\.")


def adapt(config: AuroraConfig, state: Mapping[str, Tensor]) -> State:
    """Give the weights of a file the names and shapes of a model.

    What cannot be recognised keeps its name, for `weights.compare` to complain about.

    Args:
        config: of the model that is to be loaded.
        state: as the file has it; not changed.

    Raises:
        ValueError: the file has weights for a longer history than the model.
    """
    found = {name.removeprefix("net."): x for name, x in state.items()}
    _split(found, config)
    _air_pollution(found, config)
    for name in list(found):  # the names in the wave model's file
        better = name.replace(".k_ln.", ".ln_k.").replace(".q_ln.", ".ln_q.")
        found[better] = found.pop(name)
    _lengthen_history(found, config.max_history_size)
    return found


def _split(state: State, config: AuroraConfig) -> None:
    """Split the embeddings and heads that hold all variables in one tensor."""
    own = (config.surf_vars, config.static_vars, config.atmos_vars)
    first = (SURF, STATIC, ATMOS)
    # The files of v1.5 follow the model's own lists, all others those of the first models.
    orders = (own, first) if config.variable_lead_time else (first, own)
    embeddings = "encoder.surf_token_embeds", "encoder.atmos_token_embeds"
    _split_embedding(
        state, f"{embeddings[0]}.weight", embeddings[0], *(surf + static for surf, static, _ in orders)
    )
    _split_embedding(state, f"{embeddings[1]}.weight", embeddings[1], *(atmos for *_, atmos in orders))
    # How many variables a head has cannot be seen from its rows, V·P²: P tells.
    patch = _patch_size(state) or config.patch_size
    for kind, column in (("surf", 0), ("atmos", 2)):
        for order in orders:
            _split_head(state, f"decoder.{kind}_head", f"decoder.{kind}_heads.{{}}", order[column], patch)


def _patch_size(state: State) -> int | None:
    """Return P, read off any patch embedding; None without one."""
    return next((x.shape[-1] for name, x in state.items() if EMBEDDING.match(name)), None)


def _split_embedding(state: State, name: str, place: str, *orders: Sequence[str]) -> None:
    """Split [D, V, T, P, P] into [D, 1, T, P, P] per variable, by the first order that has V names."""
    for order in orders:
        if name in state and state[name].shape[1] == len(order):
            weight = state.pop(name)
            state.update({f"{place}.weights.{one}": weight[:, [i]] for i, one in enumerate(order)})


def _split_head(
    state: State, name: str, place: str, order: Sequence[str], patch: int, keep: Sequence[str] | None = None
) -> None:
    """Split a map to V·P² rows, the variable last, into one map to P² rows per variable.

    Args:
        state: changed in place.
        name: of the head, without ".weight" and ".bias".
        place: name of a variable's head, "{}" for the variable.
        order: the V variables.
        patch: P.
        keep: variables to keep; all if None.
    """
    if f"{name}.weight" not in state or state[f"{name}.weight"].shape[0] != len(order) * patch**2:
        return
    for part in ("weight", "bias"):
        x = state.pop(f"{name}.{part}")
        x = x.reshape(patch**2, len(order), *x.shape[1:])
        for i, one in enumerate(order):
            if keep is None or one in keep:
                state[f"{place.format(one)}.{part}"] = x[:, i]


def _air_pollution(state: State, config: AuroraConfig) -> None:
    """Turn the air-pollution model's file into today's names."""
    new = "encoder.atmos_token_embeds_new"
    levels = sorted({name.split(".")[3] for name in state if name.startswith(f"{new}.layers.")})
    _split_embedding(
        state,
        "encoder.surf_token_embeds.weight_new",
        "encoder.surf_token_embeds",
        (*SURF_POLLUTANTS, *EMISSIONS, *CALENDAR_VARS),
    )
    if levels:
        _air_pollution_levels(state, levels, new)
    if levels or config.simulate_indexing_bug:
        # The published model reads both orographies through the weights of the second.
        for name in [one for one in state if one.endswith(".weights.static_z") and ".layers." in one]:
            state[name.removesuffix("static_z") + "z"] = state[name]
    # The file has combiners for base variables too, which the model does not combine.
    unused = [f"surf_feature_combiner.{name}" for name in SURF if name not in config.positive_surf_vars]
    unused += [f"atmos_feature_combiner.{name}" for name in ATMOS if name not in config.positive_atmos_vars]
    for name in unused:
        state.pop(f"{name}.weight", None)
        state.pop(f"{name}.bias", None)
    for name in [one for one in state if one.startswith("decoder.level_decoder_new")]:
        state[name.replace("level_decoder_new", "level_decoder_alternate", 1)] = state.pop(name)
    _air_pollution_heads(state)


def _air_pollution_levels(state: State, levels: Sequence[str], new: str) -> None:
    """Build the patch embedding of every level from those of the base model and of the new variables."""
    old = "encoder.atmos_token_embeds"
    base = {name: state.pop(f"{old}.weights.{name}") for name in ATMOS if f"{old}.weights.{name}" in state}
    bias = state.pop(f"{old}.bias", None)
    shared = state.pop(f"{old}.weight_new2", None)
    state.pop(f"{old}.weight_new", None)  # never used
    for level in levels:
        here = f"{old}.layers.{level}"
        state.update({f"{here}.weights.{name}": weight for name, weight in base.items()})
        if shared is not None:
            state[f"{here}.weight"] = shared
            fields = (*STATIC, *EMISSIONS, *CALENDAR_VARS)
            _split_embedding(state, f"{here}.weight", here, [f"static_{name}" for name in fields])
        _split_embedding(state, f"{new}.layers.{level}.weight_new", here, ATMOS_POLLUTANTS)
        # Two patch embeddings were added up, so their biases are.
        extra = state.pop(f"{new}.layers.{level}.bias", None)
        biases = [one for one in (bias, extra) if one is not None]
        if biases:
            state[f"{here}.bias"] = sum(biases[1:], start=biases[0])
        for unused in ("weight", "weight_new2"):
            state.pop(f"{new}.layers.{level}.{unused}", None)


def _air_pollution_heads(state: State) -> None:
    """Split the heads of the pollutants, and those of every level."""
    patch = _patch_size(state)
    if patch is None:
        return
    heads = "decoder.surf_heads"
    _split_head(state, "decoder.surf_head_new", f"{heads}.{{}}", SURF_POLLUTANTS, patch)
    everything = (*SURF, *SURF_POLLUTANTS)
    _split_head(state, "decoder.surf_head_mod", f"{heads}.{{}}_mod", everything, patch, keep=SURF_POLLUTANTS)
    pattern = re.compile(r"decoder\.atmos_head(_mod)?(_new)?\.layers\.([^.]+)\.weight")
    for match in [found for name in state if (found := pattern.fullmatch(name))]:
        mod, pollutants, level = match.groups(default="")
        _split_head(
            state,
            match.group().removesuffix(".weight"),
            f"decoder.atmos_heads.{{}}{mod}.layers.{level}",
            ATMOS_POLLUTANTS if pollutants else ATMOS,
            patch,
            keep=() if mod and not pollutants else None,
        )


def _lengthen_history(state: State, history: int) -> None:
    """Append zeros for the times that the file has no weights for.

    The weights read the oldest times first, so after this the trained ones read the oldest: as published.

    Raises:
        ValueError: the file has weights for more times than the model.
    """
    for name in [one for one in state if EMBEDDING.match(one)]:
        weight = state[name]
        missing = history - weight.shape[2]
        if missing < 0:
            raise ValueError(
                f"the checkpoint has weights for a history of {weight.shape[2]} times, the model for "
                f"{history}: build it with max_history_size={weight.shape[2]}"
            )
        if missing:
            zeros = weight.new_zeros((*weight.shape[:2], missing, *weight.shape[3:]))
            state[name] = torch.cat((weight, zeros), dim=2)
