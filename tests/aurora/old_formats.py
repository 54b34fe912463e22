"""Random weights of small models, today's and in the layouts of older files.

The old layouts are made from today's by stacking what `adapt` is to take apart. That the official package
takes the same files apart into the same tensors was checked by hand.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from aeris.aurora.model import Aurora
from aeris.aurora.variants import VARIANTS

State = dict[str, Tensor]
SURF, STATIC, ATMOS = ("2t", "10u", "10v", "msl"), ("lsm", "z", "slt"), ("z", "u", "v", "t", "q")
SMALL: dict[str, Any] = {
    "embed_dim": 16,
    "num_heads": 1,
    "encoder_depths": (1, 1),
    "encoder_num_heads": (1, 2),
    "decoder_depths": (1, 1),
    "decoder_num_heads": (2, 1),
}


def build(name: str, **changes: Any) -> Aurora:
    return VARIANTS[name](**{**SMALL, **changes})


def random_state(model: Aurora) -> State:
    return {name: torch.randn(x.shape) for name, x in model.state_dict().items()}


def fuse_embedding(state: State, place: str, names: tuple[str, ...], key: str = "weight") -> None:
    state[f"{place}.{key}"] = torch.cat([state.pop(f"{place}.weights.{name}") for name in names], dim=1)


def fuse_head(state: State, old: str, new: str, names: tuple[str, ...]) -> None:
    """Row p V + i of an old head is row p of variable i."""
    for part in ("weight", "bias"):
        heads = [state.pop(f"{new.format(name)}.{part}") for name in names]
        state[f"{old}.{part}"] = torch.stack(heads, dim=1).flatten(0, 1)


def old_format(state: State, surf: tuple[str, ...] = SURF, static: tuple[str, ...] = STATIC) -> State:
    old = dict(state)
    fuse_embedding(old, "encoder.surf_token_embeds", surf + static)
    fuse_embedding(old, "encoder.atmos_token_embeds", ATMOS)
    fuse_head(old, "decoder.surf_head", "decoder.surf_heads.{}", surf)
    fuse_head(old, "decoder.atmos_head", "decoder.atmos_heads.{}", ATMOS)
    return {f"net.{name}": x for name, x in old.items()}


def assert_same(got: State, wanted: State) -> None:
    assert got.keys() == wanted.keys(), sorted(got.keys() ^ wanted.keys())[:8]
    for name, x in wanted.items():
        assert torch.equal(got[name], x), name


LEVELS = (50, 100, 150, 200, 250, 300, 400, 500, 600, 700, 850, 925, 1000)
SURF_GASES = ("pm1", "pm2p5", "pm10", "tcco", "tc_no", "tcno2", "gtco3", "tcso2")
GASES = ("co", "no", "no2", "go3", "so2")
EMISSIONS = ("ammonia", "ammonia_log", "co", "co_log", "nox", "nox_log", "so2", "so2_log")
CALENDAR = ("tod_cos", "tod_sin", "dow_cos", "dow_sin", "doy_cos", "doy_sin")


def subset(state: State, start: str) -> State:
    return {name: x for name, x in state.items() if name.startswith(start)}


def stacked_heads(state: State, place: str, names: tuple[str, ...], old: str) -> State:
    """Return the fused form of some heads, called `old`."""
    found = dict(state)
    fuse_head(found, old, place, names)
    return subset(found, f"{old}.")


def air_pollution_pair() -> tuple[State, State]:
    """Return random weights in the published layout, and what they are in today's.

    In the published one the embeddings of the base variables and of the static ones serve all levels, biases
    are kept in two parts, z is read through the weights of static_z, and some weights are never used.
    """
    state = random_state(build("air-pollution"))
    embeds, new = "encoder.atmos_token_embeds", "encoder.atmos_token_embeds_new"
    static = tuple(f"static_{name}" for name in EMISSIONS)
    shared = tuple(f"static_{name}" for name in STATIC + static + CALENDAR)
    base, statics, bias = torch.randn(16, 5, 2, 3, 3), torch.randn(16, 17, 2, 3, 3), torch.randn(16)
    old: State = {f"{embeds}.weight": base, f"{embeds}.weight_new2": statics, f"{embeds}.bias": bias}
    old[f"{embeds}.weight_new"] = torch.randn(16, 5, 2, 3, 3)
    for level in LEVELS:
        here, there = f"{embeds}.layers.{level}", f"{new}.layers.{level}"
        state.update({f"{here}.weights.{name}": base[:, [i]] for i, name in enumerate(ATMOS)})
        state.update({f"{here}.weights.{name}": statics[:, [i]] for i, name in enumerate(shared)})
        state[f"{here}.weights.z"] = state[f"{here}.weights.static_z"]
        old[f"{there}.bias"] = torch.randn(16)
        state[f"{here}.bias"] = bias + old[f"{there}.bias"]
        old[f"{there}.weight_new"] = torch.cat([state[f"{here}.weights.{gas}"] for gas in GASES], dim=1)
        old |= {f"{there}.weight": torch.randn(16, 5, 2, 3, 3), f"{there}.weight_new2": statics.clone()}
        heads, head = f"decoder.atmos_heads.{{}}.layers.{level}", f"decoder.atmos_head{{}}.layers.{level}"
        old |= stacked_heads(state, heads, ATMOS, head.format(""))
        old |= stacked_heads(state, heads, GASES, head.format("_new"))
        old |= stacked_heads(state, heads.replace("{}", "{}_mod"), GASES, head.format("_mod_new"))
        old |= {f"{head.format('_mod')}.{part}": x for part, x in unused_head(5).items()}
    rest = {k: x for k, x in state.items() if not k.startswith((f"{embeds}.", "decoder.atmos_heads."))}
    fuse_embedding(rest, "encoder.surf_token_embeds", SURF + STATIC)
    fuse_embedding(rest, "encoder.surf_token_embeds", SURF_GASES + static + CALENDAR, "weight_new")
    fuse_head(rest, "decoder.surf_head", "decoder.surf_heads.{}", SURF)
    fuse_head(rest, "decoder.surf_head_new", "decoder.surf_heads.{}", SURF_GASES)
    for name in SURF:
        rest |= {f"decoder.surf_heads.{name}_mod.{part}": x for part, x in unused_head(1).items()}
    fuse_head(rest, "decoder.surf_head_mod", "decoder.surf_heads.{}_mod", SURF + SURF_GASES)
    for combiner in [f"surf_feature_combiner.{v}" for v in SURF] + [
        f"atmos_feature_combiner.{v}" for v in ATMOS
    ]:
        rest |= {f"{combiner}.weight": torch.randn(1, 2), f"{combiner}.bias": torch.randn(1)}
    rest = {k.replace("level_decoder_alternate", "level_decoder_new"): x for k, x in rest.items()}
    return {f"net.{name}": x for name, x in (rest | old).items()}, state


def unused_head(variables: int) -> State:
    return {"weight": torch.randn(9 * variables, 32), "bias": torch.randn(9 * variables)}
