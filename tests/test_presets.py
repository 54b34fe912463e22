"""Presets on the meta device: parameters as published, what a run costs, settings in files."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from aeris import config as configs
from aeris.config import ModelConfig
from aeris.costs import activation_bytes, costs
from aeris.parallelize import build_model, make_layout
from aeris.presets import PRESETS
from aeris.restore import channel_counts

# Blocks alone, B (4 d^2 + 3 d m + k d^2): the published totals leave out embedding, head and small vectors.
PUBLISHED_BLOCK_PARAMETERS = {
    "1.3b-6h": 1.302e9,
    "1.3b-24h": 1.302e9,
    "13b": 13.08e9,
    "40b": 40.77e9,
    "80b": 79.27e9,
}


@pytest.mark.parametrize("name", PUBLISHED_BLOCK_PARAMETERS)
def test_published_sizes(name: str) -> None:
    """Parameters of the blocks within 0.1 % of the published, below 1 % beside them."""
    config = PRESETS[name]()
    model = build_model(
        config.model, *channel_counts(len(config.data.channels)), make_layout(config.model), "meta"
    )
    blocks = sum(p.numel() for p in model.layers.parameters())
    assert blocks == pytest.approx(PUBLISHED_BLOCK_PARAMETERS[name], rel=1e-3)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(blocks, rel=1e-2)


def test_the_released_checkpoint_has_our_parameters() -> None:
    """The 6-hourly network has exactly the 1,310,072,832 parameters the published checkpoint uses."""
    assert costs(PRESETS["1.3b-6h"](), 69)["parameters"] == 1_310_072_832


def test_checkpointing_keeps_much_less() -> None:
    """By block, under a third of what autograd keeps otherwise."""
    kept = {}
    for policy in ("none", "block"):
        config = ModelConfig(checkpointing=policy)  # type: ignore[arg-type]
        model = build_model(config, 20, 8, make_layout(config), "meta")
        kept[policy] = activation_bytes(model, 20, 1)
    assert kept["block"] < 0.3 * kept["none"]


def test_activations_are_those_of_fused_attention() -> None:
    """The 1.3B network keeps 13 d + 2 m bf16 numbers a token and block, not T x T."""
    config = PRESETS["1.3b-24h"]()
    numbers = 13 * config.model.width + 2 * config.model.hidden
    estimate = 2 * numbers * config.model.rows * config.model.cols * config.model.layers * config.model.blocks
    assert 0.97 < costs(config, 70)["memory_bytes"]["activations"] / estimate < 1.05


def test_tiny_divides_under_every_small_layout() -> None:
    """wp up to 2 x 4, sp 1, 2, 4, pp up to 4."""
    model = PRESETS["tiny"]().model
    assert (model.rows // model.window, model.cols // model.window) == (2, 4)
    assert model.heads % 4 == 0 and (model.window // 2) ** 2 % 4 == 0 and model.layers % 4 == 0


@pytest.mark.parametrize("name", PRESETS)
def test_configurations_survive_json(name: str, tmp_path: Path) -> None:
    """Saved and loaded, every preset is equal."""
    configs.save(PRESETS[name](), tmp_path / "config.json")
    assert configs.load(tmp_path / "config.json") == PRESETS[name]()


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        (("model", "windw"), 3, "unknown setting 'windw'"),
        (("model", "poles"), "open", "choose one of cyclic, separate"),
        (("train", "images"), "many", "expected int"),
        (("optimizer", "betas"), 0.9, "expected a list"),
        (("data",), 3, "expected a section"),
    ],
)
def test_bad_configurations_name_the_entry(path: tuple, value: object, says: str) -> None:
    """A mistake in config.json is named, not guessed around."""
    values = json.loads(json.dumps(dataclasses.asdict(PRESETS["tiny"]())))
    target = values
    for part in path[:-1]:
        target = target[part]
    target[path[-1]] = value
    with pytest.raises(ValueError, match=says):
        configs.from_dict(configs.RunConfig, values, "config.json")


def test_costs_do_not_compile() -> None:
    """What a compiled run costs is counted on the plain network."""
    config = PRESETS["tiny"]()
    compiled = dataclasses.replace(config, model=dataclasses.replace(config.model, compile=True))
    assert costs(compiled, 24) == costs(config, 24)
