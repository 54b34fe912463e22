"""FLOPs by formula against torch's own counter on meta: every part, both passes, every kind of network."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from aeris.config import ModelConfig
from aeris.costs import costs
from aeris.flops import (
    Work,
    compare,
    flops_per_sample,
    in_words,
    published_flops,
    recompute_flops,
    unit_flops,
    work,
)
from aeris.model.swin import Swin, time_embedding
from aeris.parallelize import build_model, cut, make_layout
from aeris.presets import PRESETS
from aeris.restore import channel_counts

SMALL = ModelConfig(rows=16, cols=32, window=8, layers=4, width=32, heads=2, hidden=80)
IN, OUT = channel_counts(7)
CHOICES = (
    {},
    {"modulation_layers": 1},
    {"poles": "cyclic", "blocks": 2},
    {"norm_order": "modulate-norm", "rope": False},
    {"checkpointing": "block", "modulation_layers": 1},
    {"checkpointing": "block", "blocks": 2},
)
# Values of the published formula, FLOPs per sample; of 80b sizes are inferred, and with them this value.
PUBLISHED = {"1.3b-6h": 6.05e15, "1.3b-24h": 7.29e15, "13b": 60.6e15, "40b": 205.4e15, "80b": 391.6e15}


def build(config: ModelConfig, channels: tuple[int, int] = (IN, OUT), units: range | None = None) -> Swin:
    """Build the network, or a stage of it, on meta."""
    return build_model(config, *channels, make_layout(config), "meta", units)


def passes(model: Swin, x: torch.Tensor) -> tuple[int, int]:
    """Count forward and backward pass of one sample with torch's counter."""
    with FlopCounterMode(display=False) as forward:
        y = model(x, torch.empty(1, device="meta")).sum()
    with FlopCounterMode(display=False) as backward:
        y.backward()
    return forward.get_total_flops(), backward.get_total_flops()


def norm_flops(config: ModelConfig, units: range) -> int:
    """Count what ours leaves out and torch's counter sees: the gradient of a norm is a product over D."""
    blocks = sum(0 < unit <= config.layers for unit in units) * config.blocks
    norms = 2 * blocks + (config.layers + 1 in units)
    return 2 * norms * config.rows * config.cols * config.width


def total(parts: dict[str, Work]) -> Work:
    """Add parts up."""
    return Work(*map(sum, zip(*parts.values())))


@pytest.mark.parametrize("settings", CHOICES, ids=str)
def test_whole_network(settings: dict) -> None:
    """Every product of either pass, and every one that checkpointing repeats, to the last."""
    config = dataclasses.replace(SMALL, **settings)
    model = build(config)
    forward, backward = passes(model, torch.empty(1, *model.layout.tokens_NT.shape, IN, device="meta"))
    ours = total(work(config, IN, OUT))
    assert forward == ours.forward
    assert backward == ours.backward + ours.recomputed + norm_flops(config, model.units)
    assert ours.hardware == ours.useful + ours.recomputed == sum(ours)
    assert bool(ours.recomputed) == (config.checkpointing == "block")


@pytest.mark.parametrize("units", [range(2), range(2, 5), range(3, 4), range(5, 6)], ids=str)
@pytest.mark.parametrize("settings", [{}, {"modulation_layers": 1, "checkpointing": "block"}], ids=str)
def test_a_stage(units: range, settings: dict) -> None:
    """First, middle and last: tokens that arrive have a gradient, data have none."""
    config = dataclasses.replace(SMALL, **settings)
    model = build(config, units=units)
    shape = (1, *model.layout.tokens_NT.shape, IN if 0 in units else config.width)
    forward, backward = passes(model, torch.empty(shape, device="meta", requires_grad=0 not in units))
    ours = total(work(config, IN, OUT, units))
    assert (forward, backward) == (ours.forward, ours.backward + ours.recomputed + norm_flops(config, units))


def test_stages_make_the_network() -> None:
    """Units add up, part by part."""
    stages = [work(SMALL, IN, OUT, units) for units in cut(SMALL, IN, OUT, 3)]
    for name, whole in work(SMALL, IN, OUT).items():
        assert whole == total({str(i): parts[name] for i, parts in enumerate(stages)})
    assert sum(unit_flops(SMALL, IN, OUT)) == sum(flops_per_sample(SMALL, IN, OUT).values())


def one(module: nn.Module, *inputs: torch.Tensor) -> Work:
    """Count one call of a module, and its backward pass."""
    with FlopCounterMode(display=False) as forward:
        out = module(*inputs)
    with FlopCounterMode(display=False) as backward:
        sum(y.sum() for y in (out if isinstance(out, tuple) else (out,))).backward()
    return Work(forward.get_total_flops(), backward.get_total_flops())


class Attend(nn.Module):
    """What the layout does of a block, as a module."""

    def __init__(self, model: Swin, shifted: bool) -> None:
        super().__init__()
        self.layout, self.shifted = model.layout, shifted

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return self.layout.attend(q, k, v, self.shifted)


def heads(config: ModelConfig, windows: int) -> list[torch.Tensor]:
    """Make q, k, v [B, N, H, T, K]."""
    shape = (1, windows, config.heads, config.window**2, config.width // config.heads)
    return [torch.empty(shape, device="meta", requires_grad=True) for _ in range(3)]


@pytest.mark.parametrize("settings", CHOICES[:3], ids=str)
def test_every_part(settings: dict) -> None:
    """Both passes of each part by itself, block by block."""
    config = dataclasses.replace(SMALL, **settings)
    model, ours = build(config), work(config, IN, OUT)
    blocks = [(block, name) for name, layer in model.layers.items() for block in layer]
    tokens_NT = model.layout.tokens_NT

    def tokens(features: int, grad: bool = True) -> torch.Tensor:
        return torch.empty(1, *tokens_NT.shape, features, device="meta", requires_grad=grad)

    time_BD = time_embedding(torch.empty(1, device="meta"), config.width)
    embed, head = model.embed, model.head
    assert embed is not None and head is not None
    windows = [one(Attend(model, bool(int(name) % 2)), *heads(config, len(tokens_NT))) for _, name in blocks]
    found = {
        "embedding": [one(embed, tokens(IN, grad=False))],
        "head": [one(head.out, tokens(config.width))],
        "mlp": [one(block.mlp, tokens(config.width)) for block, _ in blocks],
        "modulation": [one(block.modulation, time_BD) for block, _ in blocks]
        + [one(head.modulation, time_BD)],
        "attention_windows": windows,
        "attention_projections": [
            one(linear, tokens(config.width))
            for block, _ in blocks
            for linear in (block.attention.qkv, block.attention.out)
        ],
    }
    assert {name: total(dict(enumerate(parts))) for name, parts in found.items()} == ours  # type: ignore[arg-type]


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets(name: str) -> None:
    """Published value, formula, ours and torch's counter on the whole network at full size."""
    preset = PRESETS[name]()
    config, channels = preset.model, channel_counts(len(preset.data.channels))
    ours = total(work(config, *channels)).useful
    published = published_flops(config, *channels)
    assert published == pytest.approx(PUBLISHED[name], rel=1e-3)
    assert published_flops(config, 69, 69) == pytest.approx(published, rel=5e-4)
    assert ours == pytest.approx(published, rel=5e-4)
    model = build(config, channels)
    x = torch.empty(1, *model.layout.tokens_NT.shape, channels[0], device="meta")
    assert sum(passes(model, x)) == ours + norm_flops(config, model.units)


def test_differences_are_explained() -> None:
    """Each has a reason, they add up, and there is none where the formulas agree."""
    rows = compare(SMALL, IN, OUT)
    assert {row.part for row in rows if row.published != row.ours} == {
        "attention_windows",
        "embedding",
        "modulation",
    }
    assert all(bool(row.why) == (row.published != row.ours) for row in rows if row.published or row.ours)
    assert sum(row.published for row in rows) == published_flops(SMALL, IN, OUT)
    assert sum(row.ours for row in rows) == total(work(SMALL, IN, OUT)).useful
    checkpointed = dataclasses.replace(SMALL, checkpointing="block", poles="cyclic")
    rows = compare(checkpointed, IN, OUT)
    assert {row.part for row in rows if row.published != row.ours} == {"embedding", "modulation"}
    assert any(row.part == "recomputed" and "in HFU, not in MFU" in row.why for row in rows)


def test_equal_layers_are_cut_by_rule() -> None:
    """Of stages as good as others the later are the lighter: of whole numbers, so no rounding decides."""
    for name, stages in (("40b", 7), ("40b", 12), ("80b", 11), ("80b", 19)):
        config = PRESETS[name]().model
        lengths = [len(units) for units in cut(config, 142, 69, stages)[1:-1]]
        assert lengths == sorted(lengths, reverse=True), (name, stages)


def test_what_a_run_costs_has_them() -> None:
    """The dry run's numbers are these."""
    preset = PRESETS["tiny"]()
    channels = channel_counts(24)
    config = dataclasses.replace(preset, model=dataclasses.replace(preset.model, checkpointing="block"))
    found, ours = costs(config, 24), total(work(config.model, *channels))
    assert found["flops_per_sample"] == ours.useful == sum(found["flops_by_part"].values())
    assert found["forward_flops_per_sample"] == ours.forward
    assert found["published_flops_per_sample"] == published_flops(config.model, *channels)
    assert found["recompute_flops_per_sample"] == ours.recomputed == recompute_flops(config.model, *channels)


@pytest.mark.parametrize(
    ("rate", "text"),
    [
        (10.21e18, "10.2 EFLOP/s"),
        (9.996e17, "1.00 EFLOP/s"),
        (999.4e15, "999 PFLOP/s"),
        (84.4e12, "84.4 TFLOP/s"),
        (100e12, "100 TFLOP/s"),
        (5.3e10, "53.0 GFLOP/s"),
        (2e6, "0.00200 GFLOP/s"),
        (0.0, "0.00 GFLOP/s"),
    ],
)
def test_rates_in_words(rate: float, text: str) -> None:
    """Three digits and the largest prefix that fits."""
    assert in_words(rate) == text
