"""The optimizer in host memory: the updates of AdamW on the device, and checkpoints that do not tell."""

from __future__ import annotations

import dataclasses
import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from aeris.config import EMAConfig, OptimizerConfig, RunConfig
from aeris.costs import costs
from aeris.ema import EMA
from aeris.offload import Offloaded, host_weights
from aeris.optim import make_optimizer, optimizer_tensors
from aeris.parallelize import choose_degrees, take_seat
from aeris.presets import PRESETS
from aeris.reading import ImageOrder, read_samples
from aeris.restore import channel_counts, open_store
from aeris.step import Training, train_step
from swipe.backend import choose_device
from swipe.sharding import local
from tests.harness import run_distributed

CONFIG = OptimizerConfig(lr=0.01, betas=(0.85, 0.95), weight_decay=0.3)
DEVICE = choose_device("auto")


class FakeDeepSpeedCPUAdam(torch.optim.Optimizer):
    """DeepSpeed's way to keep state and count steps, with the formulas written out."""

    def __init__(self, groups: list[dict[str, Any]], adamw_mode: bool = True, **settings: Any) -> None:
        assert adamw_mode
        super().__init__(groups, {**settings, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                assert type(p) is nn.Parameter and p.device.type == "cpu"
                state, (a, b) = self.state[p], group["betas"]
                assert isinstance(state["step"], int)
                state["step"] += 1
                m, v = state["exp_avg"], state["exp_avg_sq"]
                m.mul_(a).add_(p.grad, alpha=1 - a)
                v.mul_(b).addcmul_(p.grad, p.grad, value=1 - b)
                p.mul_(1 - group["lr"] * group["weight_decay"])
                size = (v / (1 - b ** state["step"])).sqrt() + group["eps"]
                p.sub_(group["lr"] * m / (1 - a ** state["step"]) / size)


def pretend(monkeypatch: pytest.MonkeyPatch, adam: object) -> None:
    """Put a DeepSpeed with this Adam in the place of any that is installed."""
    for name in ("deepspeed", "deepspeed.ops"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    module = types.ModuleType("deepspeed.ops.adam")
    module.DeepSpeedCPUAdam = adam  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)


def trained(
    offload: Any, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> dict[str, Tensor]:
    """Take ten steps with a rate that changes and a parameter left out once; return the whole state."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(37, 64), nn.RMSNorm(64), nn.Linear(64, 5)).to(dtype).to(device)
    model[2].bias.requires_grad_(False)
    optimizer = make_optimizer(model, dataclasses.replace(CONFIG, offload=offload))
    ema = EMA(model, EMAConfig(halflife_images=100, rampup_ratio=1.0), host_weights(optimizer))
    for step in range(10):
        for group in optimizer.param_groups:
            group["lr"] = 0.01 / (1 + step)
        optimizer.zero_grad(set_to_none=True)
        model(torch.randn(8, 37, dtype=dtype).to(device)).square().mean().backward()
        if step == 3:
            model[1].weight.grad = None
        optimizer.step()
        ema.update(model, 50 * step, 20)
    found = {name: p.detach() for name, p in model.named_parameters()}
    found |= {f"ema.{name}": value for name, value in ema.weights.items()}
    return {name: x.cpu() for name, x in (found | optimizer_tensors(model, optimizer)).items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_torchs_adam_on_the_host_is_the_same_to_the_bit(dtype: torch.dtype) -> None:
    """Weights, moments, steps and average after ten steps, decay on matrices only."""
    expected, found = trained("none", dtype), trained("cpu-torch", dtype)
    assert expected.keys() == found.keys()
    assert float(found["1.weight.step"]) == 9 and float(found["0.weight.step"]) == 10
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Require the same names, and values equal to a few roundings of fp32."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, rtol=2e-6, atol=2e-7, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_deepspeeds_adam_is_the_same() -> None:
    """The real one, where it is installed and can be compiled."""
    pytest.importorskip("deepspeed")
    close(trained("cpu"), trained("none"))


def test_an_adam_as_deepspeeds_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own count of steps, its settings by group, its state in place: with a stand-in."""
    pretend(monkeypatch, FakeDeepSpeedCPUAdam)
    close(trained("cpu"), trained("none"))


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type == "cpu", reason="there is no GPU here")
def test_on_a_device_it_is_the_same() -> None:
    """Gradients and weights go through pinned memory; only moments and arithmetic are elsewhere."""
    close(trained("cpu-torch", device=DEVICE), trained("none", device=DEVICE))


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """No DeepSpeed, one that cannot be compiled, weights it does not know: one line, and what would work."""
    model = nn.Linear(2, 2)
    config = dataclasses.replace(CONFIG, offload="cpu")

    def unbuilt(*args: object, **settings: object) -> None:
        raise RuntimeError("the op failed to build") from OSError("no compiler 'c++'\nmore")

    pretend(monkeypatch, unbuilt)
    with pytest.raises(ValueError, match=r"cannot be built here \(no compiler 'c\+\+'\).*ninja.* cpu-torch$"):
        make_optimizer(model, config)
    with pytest.raises(ValueError, match=r"works in fp32, the weights are torch.float64; take .*cpu-torch$"):
        make_optimizer(model.double(), config)
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    monkeypatch.delitem(sys.modules, "deepspeed.ops.adam")
    with pytest.raises(ValueError, match=r"needs DeepSpeed.*aeris-swipe\[deepspeed\].* cpu-torch$"):
        make_optimizer(nn.Linear(2, 2), config)


def test_what_others_change_is_taken_over() -> None:
    """Weights that are loaded after the optimizer was made, or between two steps, are the ones it updates."""
    model = nn.Linear(3, 3, bias=False)
    optimizer = make_optimizer(model, dataclasses.replace(CONFIG, offload="cpu-torch", weight_decay=0.0))
    assert isinstance(optimizer, Offloaded)
    for value in (5.0, 7.0):
        with torch.no_grad():
            model.weight.detach().fill_(value)
        model.weight.grad = torch.ones(3, 3)
        optimizer.step()
        assert float((model.weight.detach() - value).abs().max()) < 0.02
        assert torch.equal(optimizer.host[model.weight].detach(), model.weight.detach())
        before = optimizer.host[model.weight]._version
        model.weight.grad = None
        optimizer.step()
        assert optimizer.host[model.weight]._version == before  # nothing new, nothing copied
    assert "16 bytes per parameter in host memory, and the average; 8 on the device (cpu)" in str(optimizer)


def settings(offload: Any) -> RunConfig:
    """Make the smallest run, in fp32."""
    tiny = PRESETS["tiny"]()
    model = dataclasses.replace(
        tiny.model, width=16, heads=2, hidden=16, layers=2, precision="fp32", residual="fp32"
    )
    train = dataclasses.replace(tiny.train, batch=4, images=1000)
    optimizer = dataclasses.replace(tiny.optimizer, warmup_images=0, offload=offload)
    return dataclasses.replace(tiny, model=model, train=train, optimizer=optimizer)


def go_on(directory: str, offload: str, until: int) -> dict[str, Tensor]:
    """Resume the run if there is one, train until so many images are seen, save; return this rank's part."""
    config = settings(offload)
    store = open_store(config)
    world = dist.get_world_size() if dist.is_initialized() else 1
    rank = dist.get_rank() if world > 1 else 0
    dims = choose_degrees(config, world)
    seat = take_seat(config, channel_counts(len(store.names)), dims, rank, torch.device("cpu"))
    run = Training(config, Path(directory), store, seat)
    run.resume()
    assert isinstance(run.optimizer, Offloaded) == (offload != "none")
    order = ImageOrder(run.images_seen, until, config.train.microbatch, dims.dp, seat.at.dp)
    samples = iter(read_samples(config, store, seat, order))
    while run.images_seen < until:
        train_step(run, samples)
    run.save()
    run.checkpoints.wait()
    return {name: local(tensor).clone() for name, tensor in run.tensors().items()}


@pytest.mark.parametrize(
    "there_and_back", [("none", "cpu-torch", "none"), ("cpu-torch", "none", "cpu-torch")]
)
def test_a_run_goes_on_with_and_without(there_and_back: tuple[str, ...], tmp_path: Path) -> None:
    """Two ranks with divided weights: saved with, resumed without, and back; as if nothing had changed."""
    expected = run_distributed(go_on, 2, str(tmp_path / "straight"), "none", 24)
    for part, offload in enumerate(there_and_back):
        found = run_distributed(go_on, 2, str(tmp_path / "parts"), offload, 8 * (part + 1))
    for here, there in zip(found, expected):
        assert here.keys() == there.keys()
        for name in there:
            assert torch.equal(here[name], there[name]), name
    meta = json.loads(next((tmp_path / "parts" / "checkpoints").glob("*24/meta.json")).read_text())
    assert meta["images_seen"] == 24


def test_what_it_costs_is_said() -> None:
    """The optimizer's and the average's bytes are the host's, and those of what is moved come on top."""
    here, there = costs(settings("none"), 3), costs(settings("cpu-torch"), 3)
    count = here["parameters"]
    assert here["memory_bytes"]["optimizer"] == 8 * count
    assert there["host_bytes"] == 20 * count and here["host_bytes"] == 0
    assert there["memory_bytes"]["total"] == here["memory_bytes"]["total"] - 12 * count
