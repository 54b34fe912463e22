"""Adapters: which one is in use at a roll-out step, what it adds, what it leaves frozen."""

import dataclasses

import pytest
import torch

from aeris.aurora import lora
from aeris.aurora.config import AuroraConfig
from aeris.aurora.lora import LoRA, LoRARollout
from aeris.aurora.swin3d import Swin3DBackbone

TINY = AuroraConfig(
    embed_dim=16,
    encoder_depths=(1, 1, 1),
    encoder_num_heads=(2, 2, 2),
    decoder_depths=(1, 1, 1),
    decoder_num_heads=(2, 2, 2),
    use_lora=True,
)


@pytest.mark.parametrize(
    ("mode", "expected"),
    [("single", [0, 0, 0, None]), ("from_second", [None, 0, 0, None]), ("all", [0, 1, 39, None])],
)
def test_adapter_of_a_step(mode: str, expected: list[int | None]) -> None:
    config = AuroraConfig(use_lora=True, lora_mode=mode)
    assert [lora.adapter_of(config, step) for step in (0, 1, 39, 40)] == expected
    assert lora.adapter_of(AuroraConfig(lora_mode=mode), 1) is None


def test_an_adapter_adds_the_scaled_low_rank_product() -> None:
    one = LoRA(6, 9, rank=4, alpha=6.0).double()
    x, base = torch.randn(2, 5, 6, dtype=torch.float64), torch.randn(2, 5, 9, dtype=torch.float64)
    assert torch.equal(one(x, base), base)  # B is zero at the start
    torch.nn.init.normal_(one.lora_B)
    expected = base + x @ one.lora_A.t() @ one.lora_B.t() * (6.0 / 4)
    torch.testing.assert_close(one(x, base), expected, rtol=0, atol=1e-12)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = one.float()(x.float(), base.bfloat16())
    torch.testing.assert_close(mixed.double(), expected, rtol=0, atol=0.2)


def test_one_adapter_per_step_only_in_mode_all() -> None:
    config = dataclasses.replace(TINY, lora_mode="all", lora_steps=3, lora_rank=2)
    many = LoRARollout(4, 8, config)
    assert [tuple(p.shape) for p in many.parameters()] == [(2, 4), (8, 2)] * 3
    assert len(LoRARollout(4, 8, TINY).loras) == 1
    base = torch.randn(1, 3, 8)
    assert many(torch.randn(1, 3, 4), base, None) is base


def test_freezing_leaves_only_adapters_trainable() -> None:
    model = Swin3DBackbone(TINY)
    trainable = lora.freeze_base(model)
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(names) == len(trainable) == 6 * 2 * 2
    assert all("lora_" in name for name in names)
    with pytest.raises(ValueError, match="use_lora=True"):
        lora.freeze_base(Swin3DBackbone(dataclasses.replace(TINY, use_lora=False)))


def test_frozen_weights_get_no_gradient_and_adapters_the_right_one() -> None:
    torch.manual_seed(0)
    model = Swin3DBackbone(TINY).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    x, lead = torch.randn(1, 4 * 7 * 13, 16, dtype=torch.float64), torch.randn(1, 16).double()
    grads = []
    for freeze in (False, True):
        if freeze:
            lora.freeze_base(model)
        model.zero_grad()
        model(x, lead, (4, 7, 13)).square().mean().backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert set(grads[1]) == {name for name in grads[0] if "lora_" in name}
    for name, grad in grads[1].items():
        torch.testing.assert_close(grad, grads[0][name], rtol=1e-12, atol=1e-15)


def test_adapters_can_be_limited_to_one_map() -> None:
    model = Swin3DBackbone(dataclasses.replace(TINY, lora_targets=("proj",)))
    names = [name for name, _ in model.named_parameters() if "lora" in name]
    assert names and all("lora_proj" in name for name in names)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"lora_rank": 0}, "lora_rank 0"),
        ({"lora_targets": ("mlp",)}, "'qkv' and 'proj'"),
        ({"lora_mode": "last"}, "'from_second'"),
    ],
)
def test_adapters_that_cannot_be_built_are_refused(changes: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Swin3DBackbone(dataclasses.replace(TINY, **changes))


def test_negative_step_is_refused() -> None:
    with pytest.raises(ValueError, match="rollout_step is -1"):
        lora.adapter_of(TINY, -1)
