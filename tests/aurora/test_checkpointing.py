"""Checkpointing changes what is stored and computed again, never a number or a name."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from aeris.aurora import checkpointing
from aeris.aurora.config import AuroraConfig
from aeris.aurora.embeddings import lead_time_encoding
from aeris.aurora.model import Aurora
from aeris.aurora.swin3d import Swin3DBackbone
from tests.aurora import tiny_aurora
from tests.aurora.tiny_aurora import batch

CONFIG = replace(tiny_aurora.CONFIG, drop_path=0.3)
WIDE = AuroraConfig(
    embed_dim=64,
    encoder_depths=(1, 1),
    encoder_num_heads=(2, 4),
    decoder_depths=(1, 1),
    decoder_num_heads=(4, 2),
    num_heads=4,
)
# FLOPs of forward and backward over those of forward, counted with WIDE. AuroraSmall at 33 x 64 with 13
# levels has 3.00, 3.48, 3.71, 3.73, 3.72 and 3.97.
FLOPS = {
    "none": 2.96,
    "blocks": 3.35,  # the last product of an MLP, a third of a block, is not done again
    "lean-blocks": 3.53,
    "layers": 3.55,
    "encoder-decoder+blocks": 3.70,
    "encoder-decoder+layers": 3.90,
}
RES, LEAD = (4, 9, 26), lead_time_encoding(torch.tensor([6.0, 12.0]), 32).double()


def make_backbone() -> Swin3DBackbone:
    torch.manual_seed(1)
    model = Swin3DBackbone(CONFIG).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


def run(model: Swin3DBackbone, x: torch.Tensor) -> list[torch.Tensor]:
    torch.manual_seed(2)  # of drop path
    model.zero_grad()
    y = model(x, LEAD[: len(x)], RES)
    y.square().mean().backward()
    return [y.detach(), *(p.grad.clone() for p in model.parameters())]


@pytest.mark.parametrize("policy", [name for name in checkpointing.POLICIES if name != "none"])
def test_gradients_are_those_without_checkpointing(policy: str) -> None:
    model = make_backbone()
    names, x = list(model.state_dict()), torch.randn(2, 4 * 9 * 26, 32, dtype=torch.float64)
    plain = run(model, x)
    assert checkpointing.apply(model, policy) is model
    assert [name for name, _ in model.named_parameters()] == names
    for ours, expected in zip(run(model, x), plain):
        torch.testing.assert_close(ours, expected, rtol=0, atol=0)


def test_flops_of_an_update() -> None:
    with torch.device("meta"):
        model = Aurora(WIDE)
    data = batch(WIDE, samples=1)

    def total() -> torch.Tensor:
        pred = model(data)
        return torch.stack([x.sum() for x in (*pred.surf_vars.values(), *pred.atmos_vars.values())]).sum()

    with FlopCounterMode(display=False) as forward, torch.no_grad():
        total()
    found = {}
    for policy in checkpointing.POLICIES:
        model.configure_activation_checkpointing(policy)
        with FlopCounterMode(display=False) as both:
            total().backward()
        found[policy] = both.get_total_flops() / forward.get_total_flops()
    assert found == pytest.approx(FLOPS, abs=0.05)


def test_the_cheapest_policy_is_the_default() -> None:
    model = Aurora(CONFIG)
    model.configure_activation_checkpointing()
    on = {module.region for module in model.modules() if getattr(module, "checkpointing", False)}
    assert on == {"block"}
    assert min(set(FLOPS) - {"none"}, key=lambda policy: FLOPS[policy]) == "blocks"


def stored(model: Swin3DBackbone, policy: str, x: torch.Tensor) -> int:
    """Bytes autograd keeps between forward and backward, parameters aside."""
    checkpointing.apply(model, policy)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    seen: dict[int, int] = {}

    def keep(t: torch.Tensor) -> torch.Tensor:
        if t.untyped_storage().data_ptr() not in own:
            seen[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y = model(x, LEAD[:1], RES)
    assert y.requires_grad
    return sum(seen.values())


def test_policies_store_less() -> None:
    model, x = make_backbone().eval(), torch.randn(1, 4 * 9 * 26, 32, dtype=torch.float64)
    everything = stored(model, "none", x)
    # At most 12 numbers per number of a token in a block, and the merging and splitting between grids.
    by_block = sum(p * f for p, f in zip((4, 4, 4), (1, 0.5, 0.25))) * x.numel() * 8
    assert everything < 15 * by_block
    blocks, lean = stored(model, "blocks", x), stored(model, "lean-blocks", x)
    assert lean < blocks < 0.4 * everything


def test_nothing_is_checkpointed_without_gradients() -> None:
    model = checkpointing.apply(make_backbone(), "blocks")
    with torch.no_grad():
        assert not model(torch.randn(1, 4 * 9 * 26, 32).double(), LEAD[:1], RES).requires_grad


def test_unknown_policy_is_refused() -> None:
    with pytest.raises(ValueError, match="choose one of none, blocks, lean-blocks"):
        checkpointing.apply(torch.nn.Linear(1, 1), "some")
