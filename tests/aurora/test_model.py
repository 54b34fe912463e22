"""The model around the network: units, names, times, hooks, precision, and what it refuses."""

from __future__ import annotations

import copy
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
import torch
from torch import Tensor

from aeris.aurora.batch import Batch
from aeris.aurora.config import AuroraConfig
from aeris.aurora.embeddings import ABSOLUTE_TIME, LEAD_TIME, LEVEL, POSITION, Wavelengths
from aeris.aurora.initialise import initialise
from aeris.aurora.model import Aurora, AuroraPretrained
from aeris.aurora.normalisation import normalise_surf, unnormalise_surf
from aeris.aurora.variants import VARIANTS
from tests.aurora.tiny_aurora import CONFIG, LEVELS, START, batch, randomise


def model(cls: type[Aurora] = Aurora, **changes: Any) -> Aurora:
    """Make a model whose every weight counts, in float64."""
    built = randomise(cls(CONFIG, **changes))
    assert isinstance(built, Aurora)
    return built.eval()


def all_fields(pred: Batch) -> Tensor:
    """Every predicted number in units of roughly one."""
    normal = pred.normalise()
    return torch.cat([x.flatten() for x in (*normal.surf_vars.values(), *normal.atmos_vars.values())])


def test_a_prediction() -> None:
    data = batch(rows=17)
    pred = model()(data)
    assert list(pred.surf_vars) == list(CONFIG.surf_vars)
    assert list(pred.atmos_vars) == list(CONFIG.atmos_vars)
    assert {x.shape for x in pred.surf_vars.values()} == {(2, 1, 16, 24)}
    assert {x.shape for x in pred.atmos_vars.values()} == {(2, 1, 3, 16, 24)}
    assert {x.dtype for x in pred.surf_vars.values()} == {torch.float64}
    assert pred.metadata.time == (START + timedelta(hours=6), START + timedelta(hours=30))
    assert pred.metadata.rollout_step == 1
    assert torch.equal(pred.metadata.lat, data.metadata.lat[:-1])
    # Not through normalisation and back, as in the official package: they never change.
    assert all(torch.equal(x, data.static_vars[name][:-1]) for name, x in pred.static_vars.items())
    assert 100_000 < pred.surf_vars["msl"].mean() < 102_000


def test_the_same_again_and_each_sample_for_itself() -> None:
    net, data = model(), batch()
    whole = net(data)
    assert torch.equal(all_fields(whole), all_fields(net(data)))

    def second(fields: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: x[1:] for name, x in fields.items()}

    where = replace(data.metadata, time=data.metadata.time[1:])
    one = net(
        replace(data, surf_vars=second(data.surf_vars), atmos_vars=second(data.atmos_vars), metadata=where)
    )
    for name, x in one.atmos_vars.items():
        assert torch.allclose(x, whole.atmos_vars[name][1:], rtol=1e-11)


def test_what_tells_when_and_where_matters() -> None:
    net, data = model(), batch(samples=1)
    there = replace(data.metadata, lon=data.metadata.lon + 1)
    then = replace(data.metadata, time=(START + timedelta(days=40),))
    higher = replace(data.metadata, atmos_levels=(150, 500, 850))
    for metadata in (there, then, higher):
        other = replace(data.normalise(), metadata=metadata).unnormalise()
        assert (all_fields(net(other)) - all_fields(net(data))).abs().max() > 1e-3
    assert (all_fields(model(timestep_h=12.0)(data)) - all_fields(net(data))).abs().max() > 1e-3


def test_every_weight_gets_a_gradient() -> None:
    net = model(use_lora=True)
    net.configure_activation_checkpointing("encoder-decoder+blocks")
    all_fields(net(batch(samples=1, rows=28, columns=52))).square().sum().backward()
    assert [name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_precisions(dtype: torch.dtype) -> None:
    net, data = model(), batch()
    exact = all_fields(net(data))
    pred = net.to(dtype)(data)
    assert {x.dtype for x in pred.surf_vars.values()} == {torch.float32}
    bound = 2e-5 if dtype == torch.float32 else 0.2
    assert (all_fields(pred.type(torch.float64)) - exact).abs().max() < bound


@pytest.mark.parametrize(
    "parts", [("backbone",), ("encoder", "backbone", "decoder"), ("encoder",), ("decoder",)]
)
def test_autocast_of_parts(parts: tuple[str, ...]) -> None:
    net, data = model().float(), batch()
    cast = model(autocast=True, autocast_dtype=torch.bfloat16, autocast_parts=parts).float()
    error = (all_fields(cast(data)) - all_fields(net(data))).abs().max()
    assert 1e-5 < error < 0.2


def test_variables_without_weights_are_refused_and_some_may_lack() -> None:
    net, data = model(), batch()
    sst = replace(data, surf_vars={**data.surf_vars, "sst": data.surf_vars["2t"]})
    with pytest.raises(ValueError, match="sst"):
        net(sst)
    fewer = replace(data, surf_vars={name: data.surf_vars[name] for name in ("msl", "2t")})
    assert list(net(fewer).surf_vars) == ["msl", "2t"]
    with pytest.raises(ValueError, match="no surface variable"):
        net(replace(data, surf_vars={}))
    with pytest.raises(ValueError, match="3 times"):
        net(batch(history=3))
    assert net(batch(history=1)).spatial_shape == (16, 24)
    with pytest.raises(ValueError, match=r"levels \[100\]"):
        model(level_condition=LEVELS[1:])(data)


def test_lead_times_are_arguments_of_models_that_want_them() -> None:
    net, data = model(variable_lead_time=True), batch()
    with pytest.raises(ValueError, match="one for each of 2"):
        net(data)
    with pytest.raises(ValueError, match=r"\(3,\)"):
        net(data, torch.ones(3))
    pred = net(data, torch.tensor([1.5, 24.0]))
    assert pred.metadata.time == (START + timedelta(hours=1.5), START + timedelta(days=2))
    six = net(data, torch.tensor([6, 6]))
    assert torch.equal(all_fields(six), all_fields(model()(data, torch.tensor([1.0, 2.0]))))


def test_positive_variables_are_clamped_going_in_and_from_the_second_step_coming_out() -> None:
    names = {"positive_surf_vars": ("2t",), "positive_atmos_vars": ("q",)}
    net, data = model(**names), batch()
    net.register_forward_hook(lambda *_: None)
    seen: list[Tensor] = []
    net.encoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]["2t"].min()))
    first = net(data).normalise().surf_vars["2t"].min()
    later = replace(data, metadata=replace(data.metadata, rollout_step=1))
    assert seen[0] == 0 > first
    assert net(later).normalise().surf_vars["2t"].min() > -1e-9
    assert model(**names, clamp_at_first_step=True)(data).normalise().surf_vars["2t"].min() > -1e-9
    assert data.normalise().surf_vars["2t"].min() < 0


def test_output_only_variables_are_predicted_and_never_read() -> None:
    net, data = model(output_only_surf_vars=("msl",), output_only_atmos_vars=("q",)), batch()
    without = replace(
        data,
        surf_vars={name: x for name, x in data.surf_vars.items() if name != "msl"},
        atmos_vars={name: x for name, x in data.atmos_vars.items() if name != "q"},
    )
    assert torch.equal(all_fields(net(data)), all_fields(net(without)))


class Hooked(AuroraPretrained):
    """Renames on the way in and out, as ports of official subclasses do: some in place."""

    def batch_transform_hook(self, batch: Batch) -> Batch:
        """Name the temperature as the model knows it."""
        surf_vars = {name.replace("t2m", "2t"): x for name, x in batch.surf_vars.items()}
        return replace(batch, surf_vars=surf_vars)

    def _pre_norm_hook(self, batch: Batch) -> Batch:
        return replace(batch, surf_vars={name: x + 1 for name, x in batch.surf_vars.items()})

    def _pre_encoder_hook(self, batch: Batch) -> Batch:
        batch.surf_vars["10v"] = batch.surf_vars.pop("10u")
        return batch

    def _post_decoder_hook(self, batch: Batch, pred: Batch) -> Batch:
        assert "10u" in batch.surf_vars and "10u" not in pred.surf_vars
        pred.surf_vars["10u"] = pred.surf_vars.pop("10v")
        return pred

    def _post_unnorm_hook(self, batch: Batch, pred: Batch) -> Batch:
        return replace(pred, surf_vars={name: x - 1 for name, x in pred.surf_vars.items()})


def test_hooks() -> None:
    data = batch()
    fields = {"t2m": data.surf_vars["2t"], "10u": data.surf_vars["10u"]}
    pred = model(Hooked)(replace(data, surf_vars=fields))
    assert list(pred.surf_vars) == ["2t", "10u"]
    renamed = unnormalise_surf("10v", normalise_surf("10u", fields["10u"] + 1))
    plain = {"2t": fields["t2m"] + 1, "10v": renamed}
    expected = model()(replace(data, surf_vars=plain))
    assert torch.allclose(pred.surf_vars["2t"], expected.surf_vars["2t"] - 1)


def test_bounds_on_what_is_fed_back() -> None:
    net = model(rollout_input_clipping={"2t": {"min": 280.0, "max": None}, "q": {"min": 0.0, "max": 1e-3}})
    pred = net(batch())
    fed = net.apply_rollout_input_clipping(pred)
    assert fed.surf_vars["2t"].min() == 280 > pred.surf_vars["2t"].min()
    assert 0 <= fed.atmos_vars["q"].min() <= fed.atmos_vars["q"].max() <= 1e-3
    assert fed.surf_vars["msl"] is pred.surf_vars["msl"]
    assert model().apply_rollout_input_clipping(pred).surf_vars == pred.surf_vars


def test_own_statistics_of_a_static_field() -> None:
    data = batch()
    net = model(surf_stats={"z": (0.0, 1.0)})
    scaled = replace(data, static_vars={**data.static_vars, "z": data.normalise().static_vars["z"]})
    assert torch.allclose(all_fields(net(scaled)), all_fields(model()(data)))


def test_official_arguments() -> None:
    net = Aurora(
        CONFIG,
        timestep=timedelta(hours=12),
        autocast_dtype=torch.float16,
        surf_stats={"z": (1, 2)},
        level_condition=None,
        bf16_mode=False,
        encoder_depths=[1, 1, 1],
    )
    assert net.timestep == timedelta(hours=12)
    assert net.config.autocast_dtype == "float16"
    assert net.surf_stats == {"z": (1.0, 2.0)}
    assert net.config.encoder_depths == (1, 1, 1)
    assert CONFIG.changed(bf16_mode=True).autocast_parts == ("backbone",)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"depth": 3}, "depth"),
        ({"embed_dim": 30}, "30"),
        ({"patch_size": 1}, "patch_size"),
        ({"latent_levels": 1}, "latent_levels"),
        ({"encoder_depths": (1, 1)}, "equally long"),
        ({"surf_vars": ()}, "surface variable"),
        ({"autocast": True, "autocast_dtype": "float16"}, "use_fp16_safe_attention"),
    ],
)
def test_settings_that_do_not_go_together(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        AuroraConfig().changed(**changes)


def test_initial_weights_come_from_the_seed_and_the_name() -> None:
    torch.manual_seed(3)
    one, two = Aurora(CONFIG, use_lora=True), Aurora(CONFIG, use_lora=True, atmos_vars=("t", "q"))
    assert not torch.equal(one.encoder.pos_embed.weight, two.encoder.pos_embed.weight)
    initialise(one, 5)
    initialise(two, 5)
    state = one.state_dict()
    assert all(torch.equal(x, state[name]) for name, x in two.state_dict().items())
    with torch.device("meta"):
        empty = Aurora(CONFIG, use_lora=True)
    with pytest.raises(ValueError, match="to_empty"):
        initialise(empty)
    empty.to_empty(device="cpu")
    initialise(empty, 5)
    assert all(torch.equal(x, state[name]) for name, x in empty.state_dict().items())


def test_distributions_of_initial_weights() -> None:
    state = Aurora(CONFIG, use_lora=True).state_dict()
    for name, x in state.items():
        if "ln_modulation" in name or name.endswith("lora_B"):
            assert not x.any(), name
        elif name.endswith("lora_A"):
            assert 0.8 < x.abs().max() * x.shape[1] ** 0.5 <= 1, name
        elif "token_embeds" in name:
            assert 0.6 < x.abs().max() * 32**0.5 <= 1, name
        elif x.dim() == 2:
            assert 0.015 < x.std() < 0.025, name
    assert not state["decoder.surf_heads.2t.bias"].any()
    assert (state["encoder.surf_norm.weight"] == 1).all()
    assert 0.01 < state["encoder.surf_level_encoding"].std() < 0.03


def test_untrained_blocks_are_the_identity() -> None:
    net = Aurora(CONFIG).double()
    x = torch.randn(1, 4 * 24, 32, dtype=torch.float64)
    # The last half of the output is that of the first U-Net layer.
    assert torch.equal(net.backbone(x, torch.zeros(1, 32, dtype=x.dtype), (4, 4, 6))[..., 32:], x)


def test_parts_are_the_model_in_order() -> None:
    net = model()
    parts = net.parts()
    assert parts[0] is net.encoder and parts[-1] is net.decoder
    assert len(parts) == 8
    order: list[int] = []
    for index, part in enumerate(parts):
        part.register_forward_hook(lambda *_, index=index: order.append(index))
    net(batch())
    assert order == list(range(8))
    inside = {id(p) for part in parts for p in part.parameters()}
    outside = [name for name, p in net.named_parameters() if id(p) not in inside]
    assert outside and all(name.startswith("backbone.time_mlp") for name in outside)


def test_copies_and_inference_mode_and_training_after_it() -> None:
    net, data = model(), batch()
    with torch.inference_mode():
        pred = net(data)
    twin = copy.deepcopy(net)
    all_fields(twin(data)).sum().backward()
    assert torch.equal(all_fields(pred), all_fields(twin(data)))


def test_freezing_leaves_the_adapters() -> None:
    net = model(use_lora=True)
    net.freeze_base()
    trained = [name for name, p in net.named_parameters() if p.requires_grad]
    assert trained and all("lora_" in name for name in trained)


def test_tiny_is_small() -> None:
    assert sum(p.numel() for p in VARIANTS["tiny"]().parameters()) == 5_262_928


@pytest.mark.parametrize("changes", [{"use_lora": True}, {"autocast": True}], ids=str)
def test_a_dry_run_without_memory(changes: dict[str, Any]) -> None:
    with torch.device("meta"):
        net = Aurora(CONFIG, level_condition=LEVELS, **changes)
    pred = net(batch(rows=17))
    assert all(x.is_meta and x.shape == (2, 1, 16, 24) for x in pred.surf_vars.values())
    assert pred.metadata.time[0] == START + timedelta(hours=6)


def test_encodings_come_before_the_network_and_only_times_are_made_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    net, data, made = model(dynamic_vars=True), batch(), list[str]()
    encode = Wavelengths.encode

    def note(self: Wavelengths, x: Tensor, d: int) -> Tensor:
        made.append(self.name)
        return encode(self, x, d)

    monkeypatch.setattr(Wavelengths, "encode", note)
    for part in (net.encoder, net.backbone, net.decoder):
        part.register_forward_pre_hook(lambda *_: made.append("a part"))
    parts = ["a part"] * 3
    first = net(data)
    assert made[-3:] == parts and {LEVEL.name, LEAD_TIME.name, POSITION.name} <= {*made[:-3]}
    made.clear()
    assert torch.equal(all_fields(net(data)), all_fields(first))
    assert made == [ABSOLUTE_TIME.name, *parts]
    made.clear()
    later = replace(data, metadata=replace(data.metadata, atmos_levels=(150, 500, 850)))
    net(later)
    assert made == [ABSOLUTE_TIME.name, LEVEL.name, LEVEL.name, *parts]


@pytest.mark.gpu
def test_a_gpu_is_not_waited_for() -> None:
    """A second call with fields on the GPU: nothing of it waits for what is queued."""
    if not torch.cuda.is_available():
        pytest.skip("only CUDA tells")
    net, data = model().float().cuda(), batch().type(torch.float32).to("cuda")
    with torch.inference_mode():
        net(data)
        torch.cuda.set_sync_debug_mode("error")
        try:
            net(data)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("autocast", [False, True])
def test_a_gpu_predicts_the_same(autocast: bool) -> None:
    data = batch(rows=33, columns=64)
    exact = all_fields(model(use_lora=True)(data))
    device = torch.device("cuda" if torch.cuda.is_available() else "xpu")
    net = model(use_lora=True, autocast=autocast).float().to(device)
    pred = net(data)
    assert {x.device.type for x in pred.surf_vars.values()} == {device.type}
    error = (all_fields(pred.to("cpu").type(torch.float64)) - exact).abs().max()
    assert error < (0.2 if autocast else 1e-4)
