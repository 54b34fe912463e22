"""The U-Net: identity at the start, order and batch do not matter, checkpoints' keys, noise, compiling."""

import dataclasses
import warnings

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from aeris.aurora.attention import WindowAttention
from aeris.aurora.config import AuroraConfig
from aeris.aurora.context import NoiseMemory
from aeris.aurora.embeddings import lead_time_encoding
from aeris.aurora.reorder import reorder
from aeris.aurora.swin3d import Swin3DBackbone, compile_blocks
from aeris.aurora.swin_block import Block
from aeris.aurora.windows import Res, natural, plan_of_block
from tests.aurora.naive_windows import naive
from tests.aurora.tiny_aurora import CONFIG

RES, LEAD = (4, 9, 26), lead_time_encoding(torch.tensor([6.0, 12.0]), 32).double()
TOKENS = 4 * 9 * 26


def make_backbone(seed: int = 1, **changes: object) -> Swin3DBackbone:
    torch.manual_seed(seed)
    model = Swin3DBackbone(dataclasses.replace(CONFIG, **changes)).double().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


def tokens(batch: int = 2) -> Tensor:
    return torch.randn(batch, TOKENS, 32, dtype=torch.float64)


@pytest.mark.parametrize("number", [0, 1])
def test_block_is_the_published_formula(number: int) -> None:
    torch.manual_seed(0)
    block = Block(32, 4, 0.0, CONFIG).double()
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    context, x = torch.randn(2, 32, dtype=torch.float64), tokens()

    def adaptive(y: Tensor, norm: torch.nn.Module) -> Tensor:
        shift, scale = norm.ln_modulation(context).unsqueeze(1).chunk(2, -1)
        return F.layer_norm(y, (32,)) * scale + shift

    shift = (1, 3, 6) if number else (0, 0, 0)
    expected = x + adaptive(naive(x, block.attn, RES, CONFIG.window_size, shift, True), block.norm1)
    mlp = block.mlp.fc2(F.gelu(block.mlp.fc1(expected)))
    expected = expected + adaptive(mlp, block.norm2)
    here = plan_of_block(RES, CONFIG.window_size, number)
    y = block(reorder(x, natural(RES), here), F.silu(context), here.groups, None)
    torch.testing.assert_close(reorder(y, here, natural(RES)), expected, rtol=0, atol=1e-12)
    inputs = list(block.parameters())
    inputs = [p for p in inputs if p is not block.attn.qkv.bias]
    ours, theirs = (torch.autograd.grad(one.square().sum(), inputs) for one in (y, expected))
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12 * float(b.abs().max()))


def test_a_new_backbone_passes_the_finest_grid_through() -> None:
    x = tokens().float()
    y = Swin3DBackbone(CONFIG)(x, LEAD, RES)
    assert y.shape == (2, TOKENS, 64)
    assert torch.equal(y[..., 32:], x)  # blocks are the identity, the skip is kept


def test_samples_of_a_batch_do_not_know_each_other() -> None:
    model, x = make_backbone(), tokens()
    both = model(x, LEAD, RES)
    for i in range(2):
        torch.testing.assert_close(both[i], model(x[i : i + 1], LEAD[i : i + 1], RES)[0], rtol=0, atol=1e-12)


def first_layer(model: Swin3DBackbone, x: Tensor, res: Res) -> Tensor:
    """The output of the first U-Net layer's two blocks, on the grid."""
    first, last = (plan_of_block(res, CONFIG.window_size, i, model.config.wrap_longitude) for i in range(2))
    context = torch.ones(1, 32, dtype=x.dtype)
    _, y = model.encoder_layers[0](reorder(x, natural(res), first), context, res, None)
    return reorder(y, last, natural(res)).unflatten(1, res)


def test_longitude_wraps_only_when_asked_to() -> None:
    """Turning the globe by whole windows turns the output; on a regional grid the edges feel it."""
    res, x = (4, 12, 24), torch.randn(1, 4 * 12 * 24, 32, dtype=torch.float64)
    for wrap in (True, False):
        model = make_backbone(wrap_longitude=wrap, encoder_depths=(2, 1, 1), decoder_depths=(1, 1, 2))
        turned = x.unflatten(1, res).roll(12, 3).flatten(1, 3)
        ours, back = first_layer(model, x, res), first_layer(model, turned, res).roll(-12, 3)
        assert torch.allclose(back, ours, rtol=0, atol=1e-12) == wrap


def test_keys_are_the_published_ones() -> None:
    keys = set(make_backbone(use_lora=True).state_dict())
    block = "decoder_layers.1.blocks.0"
    expected = {
        *("time_mlp.0.weight", "time_mlp.2.bias", "encoder_layers.0.downsample.reduction.weight"),
        *("encoder_layers.1.downsample.norm.bias", "decoder_layers.0.upsample.lin1.weight"),
        *("decoder_layers.1.upsample.lin2.weight", "decoder_layers.0.upsample.norm.weight"),
        *(f"{block}.norm1.ln_modulation.1.weight", f"{block}.norm2.ln_modulation.1.bias"),
        *(f"{block}.attn.qkv.bias", f"{block}.attn.proj.weight", f"{block}.attn.lora_qkv.loras.0.lora_A"),
        *(f"{block}.attn.lora_proj.loras.0.lora_B", f"{block}.mlp.fc1.weight", f"{block}.mlp.fc2.bias"),
    }
    assert expected <= keys
    assert len(keys) == 4 + 12 * 16 + 2 * 3 + 2 * 4


def test_construction_on_meta_with_drop_path() -> None:
    with torch.device("meta"):
        model = Swin3DBackbone(AuroraConfig(drop_path=0.2, stochastic=True, use_lora=True))
    assert all(parameter.is_meta for parameter in model.parameters())
    drops = [[b.drop_path for b in layer.blocks] for layer in model.layers()]
    assert drops[0][0] == drops[3][0] == 0
    assert drops[2][-1] == drops[5][-1] == pytest.approx(0.2)
    assert drops[1][0] == pytest.approx(0.2 * 6 / 23) and drops[4][0] == pytest.approx(0.2 * 8 / 23)


def test_drop_path_skips_branches_of_samples() -> None:
    model = make_backbone(drop_path=0.9).train()
    block = model.encoder_layers[2].blocks[1]
    here = plan_of_block((4, 3, 7), CONFIG.window_size, 1)
    x, context = torch.randn(120, 84, 128).double(), torch.randn(120, 32).double()
    with torch.no_grad():
        y = block(x, context, here.groups, None)
        unchanged = (y == x).flatten(1).all(1).double().mean()
        expected = block.eval()(x, context, here.groups, None)
    rate = block.drop_path
    assert abs(float(unchanged) - rate**2) < 0.1  # both branches skipped
    assert not torch.equal(y, expected)


def test_noise_gives_another_member_each_time_and_resembles_the_last_ones() -> None:
    model, x = make_backbone(stochastic=True), tokens()
    torch.manual_seed(3)
    one, two = model(x, LEAD, RES), model(x, LEAD, RES)
    assert not torch.equal(one, two)
    torch.manual_seed(3)
    assert torch.equal(model(x, LEAD, RES), one)
    model.set_noise_accumulation(2)
    model(x, LEAD, RES)
    assert model.noise is not None and len(model.noise.draws) == 2
    model.reset_noise()
    assert not model.noise.draws


def test_accumulated_noise_is_a_window_over_the_draws() -> None:
    memory, (shape, device, dtype) = NoiseMemory(), ((2, 3), torch.device("cpu"), torch.float64)
    memory.set_length(3)
    torch.manual_seed(0)
    drawn = [torch.randn(shape, dtype=dtype) for _ in range(4)]
    torch.manual_seed(0)
    torch.testing.assert_close(memory.draw(shape, device, dtype), sum(drawn[:3]) / 3**0.5)
    torch.testing.assert_close(memory.draw(shape, device, dtype), sum(drawn[1:]) / 3**0.5)
    assert memory.draw((4, 3), device, dtype).shape == (4, 3)  # another shape starts anew
    with pytest.raises(ValueError, match="-1 calls"):
        memory.set_length(-1)


def test_autocast_is_close_and_keeps_the_stream_in_float32() -> None:
    model, x = make_backbone().float(), tokens().float()
    exact = model(x, LEAD, RES).detach()
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(x, LEAD, RES)
    mixed.float().square().mean().backward()
    assert mixed.dtype == torch.float32
    assert float((mixed.detach() - exact).abs().mean() / exact.std()) < 0.01
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize(("number", "backend"), [(0, "aot_eager"), (1, "eager")])
def test_a_block_compiles_whole(number: int, backend: str) -> None:
    """No graph break, in forward and backward, with an adapter in use and windows of several sizes."""
    model = make_backbone(use_lora=True, encoder_depths=(2, 1, 1), decoder_depths=(1, 1, 1))
    block, here = model.encoder_layers[0].blocks[number], plan_of_block(RES, CONFIG.window_size, number)
    assert len(here.groups) > 1
    x, context, results = tokens(), torch.randn(2, 32, dtype=torch.float64), []
    for compiled in (False, True):
        if compiled:
            assert compile_blocks(block, fullgraph=True, backend=backend) is block
        block.zero_grad()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the compiler, about itself
            y = block(x, context, here.groups, 0)
            y.square().mean().backward()
        results.append([y.detach(), *(p.grad for p in block.parameters())])
    for ours, expected in zip(*results):
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12 * float(expected.abs().max()))


def test_errors_name_the_numbers() -> None:
    model = make_backbone()
    with pytest.raises(ValueError, match="936 tokens, but a grid of"):
        model(tokens(), LEAD, (4, 8, 16))
    with pytest.raises(ValueError, match="at least 3 rows and columns"):
        model(torch.randn(1, 4 * 2 * 8, 32).double(), LEAD[:1], (4, 2, 8))
    with pytest.raises(ValueError, match="3 heads do not divide a width of 64"):
        make_backbone(encoder_num_heads=(2, 3, 8))


def test_dropout_acts_in_training_only() -> None:
    model, x = make_backbone(drop_rate=0.5), tokens()
    assert torch.equal(model(x, LEAD, RES), model(x, LEAD, RES))
    model.train()
    assert not torch.equal(model(x, LEAD, RES), model(x, LEAD, RES))


def test_the_hidden_layer_is_made_in_parts_without_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = make_backbone(), tokens()
    with torch.no_grad():
        whole = model(x, LEAD, RES)
        monkeypatch.setattr("aeris.aurora.swin_block.MOST_TOKENS", 100)
        torch.testing.assert_close(model(x, LEAD, RES), whole, rtol=0, atol=1e-12)


def test_attention_is_called_in_pieces_kernels_accept(monkeypatch: pytest.MonkeyPatch) -> None:
    attention = WindowAttention(16, 2, CONFIG)
    here = plan_of_block(RES, CONFIG.window_size, 1)
    x = torch.randn(2, TOKENS, 16)
    whole = attention(x, here.groups, None)
    monkeypatch.setattr("aeris.aurora.attention.MOST_BLOCKS", 3)
    torch.testing.assert_close(attention(x, here.groups, None), whole)
