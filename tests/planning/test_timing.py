"""Seconds of a step: parts against hand calculation, counts of bytes against the operations themselves."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from aeris.config import ModelConfig, RunConfig
from aeris.costs import FusedLayout
from aeris.parallelize import build_model, make_layout
from aeris.planning.elementwise import product_weights, stage_bytes
from aeris.planning.hardware import HARDWARE
from aeris.planning.timing import OURS, PARTS, PUBLISHED, StepTime, step_read_bytes, step_time
from aeris.presets import PRESETS
from swipe.mesh import ParallelDims

AURORA = HARDWARE["alcf-aurora"]
REPLICA = ParallelDims(1, 6, 6, 20, 12)


def run_40b(batch: int = 100, **model: Any) -> RunConfig:
    """40B in microbatches of one image."""
    preset = PRESETS["40b"]()
    return replace(preset, model=replace(preset.model, **model), train=replace(preset.train, batch=batch))


def middle(time: StepTime) -> dict[str, float]:
    """Seconds of a microbatch on a stage of one layer, both ways."""
    stage = time.stages[1]
    return {part: stage.forward[part] + stage.backward[part] for part in PARTS}


def test_parts_by_hand() -> None:
    """A 40B stage on a tile: 2400 tokens, 2 blocks, width 6144, 40,960 hidden features, windows of 900."""
    parts = middle(step_time(run_40b(poles="cyclic"), 69, REPLICA, AURORA))
    rate = AURORA.gemm_flops_per_s * AURORA.gemm_efficiency
    weights = 2 * (4 * 6144**2 + 3 * 6144 * 40_960)
    assert parts["gemm"] == pytest.approx(6 * 2400 * weights / rate)
    assert parts["attention"] == pytest.approx(3.5 * 2 * 4 * 2400 * 900 * 6144 / rate)
    message = 2400 * 6144 * 2
    sent = 2 * 2 * 4 * message * 11 / 12
    assert parts["all_to_all"] == pytest.approx(sent / AURORA.inside_bytes_per_s + 8 * 10e-6)
    assert parts["shift"] == 0 and 0.02 < parts["elementwise"] < 0.05
    time = step_time(run_40b(), 69, REPLICA, AURORA)
    assert time.message_s == pytest.approx(message / AURORA.between_bytes_per_s + 20e-6)


def test_one_device_computes_all_the_time() -> None:
    config = PRESETS["tiny"]()
    config = replace(config, train=replace(config.train, batch=8, microbatch=2))
    time = step_time(config, 24, ParallelDims(), HARDWARE["cpu"])
    (stage,) = time.stages
    assert time.pipeline_s == pytest.approx(4 * (stage.forward_s + stage.backward_s))
    assert time.bubble == pytest.approx(0) and time.message_s == time.gradients_s == time.read_s == 0
    assert stage.forward["all_to_all"] == stage.forward["shift"] == 0
    rest = time.weights_s + time.optimizer_s
    assert time.step_s == pytest.approx(time.pipeline_s + rest) and time.optimizer_s > 0


@pytest.mark.parametrize("schedule", ["1f1b", "gpipe"])
@pytest.mark.parametrize("p2p", ["async", "batched", "parity"])
def test_a_long_pipeline_is_its_short_one_and_more_of_the_same(schedule: Any, p2p: Any) -> None:
    """With short first and last stages, as simulated whole; slow messages leave a per cent of doubt."""
    for count, slower, doubt in ((1, 1, 1e-9), (12, 1, 1e-9), (60, 1, 3e-3), (60, 5, 1.5e-2)):
        machine = replace(AURORA, between_bytes_per_s=AURORA.between_bytes_per_s / slower)
        config = run_40b(count, layers=4)
        config = replace(config, parallel=replace(config.parallel, schedule=schedule, p2p=p2p))
        time = step_time(config, 69, ParallelDims(1, 6, 6, 6, 12), machine)
        assert time.pipeline_s == pytest.approx(time.timeline.ticks, rel=doubt)
        assert time.bubble == pytest.approx(time.timeline.bubble, abs=2 * doubt)


def test_what_makes_a_step_longer() -> None:
    config = run_40b()
    now = step_time(config, 69, REPLICA, AURORA)

    def longer(**changes: Any) -> StepTime:
        return step_time(config, 69, REPLICA, replace(AURORA, **changes))

    assert middle(longer(gemm_efficiency=AURORA.gemm_efficiency / 2))["gemm"] == 2 * middle(now)["gemm"]
    half = middle(longer(link_efficiency=0.5))["all_to_all"]
    assert half == pytest.approx(2 * middle(now)["all_to_all"], rel=0.01)
    across = longer(devices_per_node=6, between_bytes_per_s=1e9)  # sp over two nodes
    assert middle(across)["all_to_all"] > 2 * middle(now)["all_to_all"]
    assert longer(read_bytes_per_s=1e9).read_s > 0 == now.read_s
    again = step_time(run_40b(checkpointing="block"), 69, REPLICA, AURORA)
    assert middle(again)["all_to_all"] == pytest.approx(1.5 * middle(now)["all_to_all"])
    assert middle(again)["gemm"] == pytest.approx(4 / 3 * middle(now)["gemm"])
    # Few tokens: the products take as long as reading their weights.
    tiles = middle(step_time(config, 69, ParallelDims(1, 24, 24, 20, 12), AURORA))
    read = 3 * 2 * product_weights(config.model, 69) / AURORA.memory_bytes_per_s
    assert tiles["gemm"] == pytest.approx(read)


def test_shifts_inside_a_stage_hold_it_up() -> None:
    few = step_time(run_40b(), 69, ParallelDims(1, 6, 6, 4, 12), AURORA)
    assert all(stage.forward["shift"] == stage.backward["shift"] > 0 for stage in few.stages)


def test_weights_are_gathered_stage_by_stage_or_at_once() -> None:
    config = run_40b()
    together = step_time(config, 69, REPLICA, AURORA, replace(OURS, gathers_on_use=False))
    in_turn = step_time(config, 69, REPLICA, AURORA, replace(OURS, gathers_on_use=True))
    assert 17 < in_turn.weights_s / together.weights_s < 20
    published = step_time(config, 69, REPLICA, AURORA, PUBLISHED)
    assert published.gradients_s < together.gradients_s  # half the bytes
    offload = replace(config, optimizer=replace(config.optimizer, offload="cpu"))
    assert step_time(offload, 69, REPLICA, AURORA).optimizer_s > together.optimizer_s
    assert step_read_bytes(config, 69, REPLICA) == 100 * 2 * 2 * 69 * 720 * 1440 * 4


class Moved(TorchDispatchMode):
    """Adds up the bytes that operations read and write, but for matrix products, views and empty tensors."""

    FREE = ("mm", "bmm", "addmm", "empty", "new_empty", "empty_like", "detach", "_unsafe_view", "view")

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Do it, and count."""
        kwargs = kwargs or {}
        result, name = func(*args, **kwargs), func.overloadpacket.__name__
        given = [x for x in tree_leaves((args, {**kwargs, "out": None})) if isinstance(x, Tensor)]
        made = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        alias = {x.untyped_storage()._cdata for x in given} & {x.untyped_storage()._cdata for x in made}
        if name not in self.FREE and (not alias or name.endswith("_") or "out" in kwargs):
            for x in given[name == "copy_" :] + made:
                self.bytes += min(x.untyped_storage().nbytes(), x.numel() * x.element_size())
        return result


class _Nothing(torch.autograd.Function):
    """Attention that moves nothing."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Make a tensor of the right shape."""
        return torch.empty_like(q)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Make its gradients."""
        return torch.empty_like(grads[0]), torch.empty_like(grads[0]), torch.empty_like(grads[0])


class Idle(FusedLayout):
    """A layout whose attention moves nothing."""

    def attend(self, q_BNHTK: Tensor, k_BNHTK: Tensor, v_BNHTK: Tensor, shifted: bool) -> Tensor:
        """Return what attention would."""
        out: Tensor = _Nothing.apply(q_BNHTK, k_BNHTK, v_BNHTK)
        return out


SMALL = {"rows": 60, "cols": 120, "width": 256, "heads": 2, "hidden": 1024, "layers": 1, "blocks": 1}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rope": False},
        {"norm_order": "modulate-norm", "modulation_layers": 2},
        {"residual": "fp32"},
        {"precision": "fp32", "residual": "fp32"},
    ],
    ids=str,
)
def test_bytes_of_a_block_are_those_of_its_operations(changes: dict[str, Any]) -> None:
    """A block on meta, forward and backward, in the second microbatch: gradients are added."""
    model: ModelConfig = replace(PRESETS["40b"]().model, **SMALL, poles="cyclic", **changes)
    run = replace(PRESETS["40b"](), model=model)
    built = build_model(model, 142, 69, Idle(make_layout(model)), "meta", range(1, 2))
    built.keep_casts()
    dtype = torch.bfloat16 if model.residual == "bf16" else torch.float32
    shape = (1, *built.layout.tokens_NT.shape, model.width)
    x = torch.empty(shape, device="meta", dtype=dtype, requires_grad=True)
    t_B = torch.empty(1, device="meta")
    built(x, t_B).sum().backward()
    forward, backward = Moved(), Moved()
    x.grad = None
    with forward:
        y = built(x, t_B)
    with backward:
        torch.autograd.backward(y, torch.empty_like(y))
    expected = stage_bytes(run, 69, ParallelDims(), range(1, 2))
    assert expected == pytest.approx((forward.bytes, backward.bytes), rel=0.03)
