"""Every way to spread a run over ranks trains like the oracle: loss, gradients, weights and average.

Three steps in float64 from weights that shut no gate. The oracle (oracle.py) uses none of the parallel code.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field, replace
from typing import Any, get_args, get_type_hints

import pytest

from aeris.config import (
    DiffusionConfig,
    EMAConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    TrainConfig,
)
from aeris.parallelize import build_model, make_layout
from aeris.restore import channel_counts
from tests.harness import run_distributed
from tests.parity import oracle, ranks
from tests.parity.comparison import NAMES, deviations, random_images, random_weights

STEPS = 3
TIMEOUT_S = 180.0  # of the largest meshes on a busy machine; seconds on an idle one

SMALL = ModelConfig(
    rows=8, cols=12, window=4, layers=4, blocks=1, width=16, heads=4, hidden=24, rope_base=100.0,
    poles="separate", precision="fp64", residual="fp64",
)  # fmt: skip
NETWORKS = {
    # 2 x 3 windows of 4 x 4 tokens, 4 heads: sp 1, 2, 4.
    "quarters": SMALL,
    # 2 x 3 windows of 6 x 6 tokens, 12 heads: sp 1, 2, 3, 4, 6, 12. Attention crosses the poles.
    "thirds": replace(
        SMALL, rows=12, cols=18, window=6, layers=2, width=48, heads=12, hidden=40, poles="cyclic"
    ),
    # 4 x 6 windows, so that a rank has several: slots turn when they shift. Nothing shifts before the head.
    "many": replace(SMALL, rows=16, cols=24, layers=3, norm_order="modulate-norm", modulation_layers=1),
    # More layers for more stages; attention crosses the poles, without rotary positions.
    "deep": replace(SMALL, layers=6, poles="cyclic", rope=False, row_offset=1),
}
MASKED = ("many",)  # the last channel has no value at some points, and channels weigh differently


@dataclass(frozen=True)
class Case:
    """A mesh and how it is used. `tolerance` is relative to the largest value of each tensor."""

    network: str
    dp: int = 1
    wp: tuple[int, int] = (1, 1)
    pp: int = 1
    sp: int = 1
    shard: int = 0
    schedule: str = "1f1b"
    p2p: str = "async"
    batch: int = 4
    microbatch: int = 1
    model: dict[str, Any] = field(default_factory=dict)
    # The same sums in another order: 1e-16 each, times up to 1e3 where a gradient is a small difference of
    # large terms, or where AdamW divides a small gradient by its own size.
    tolerance: float = 1e-10

    @property
    def world(self) -> int:
        """Number of ranks."""
        return self.dp * self.wp[0] * self.wp[1] * self.pp * self.sp

    def __str__(self) -> str:
        """Name the mesh and what is not the default."""
        name = f"{self.network}-dp{self.dp}-wp{self.wp[0]}x{self.wp[1]}-pp{self.pp}-sp{self.sp}"
        shown = ("shard", "schedule", "p2p", "batch", "microbatch")
        extras = [f"{n}-{getattr(self, n)}" for n in shown if getattr(self, n) != getattr(Case, n)]
        return "-".join([name, *extras, *(f"{key}-{value}" for key, value in self.model.items())])

    def config(self) -> RunConfig:
        """Return the run: large steps and a short average, so that an error in them shows."""
        return RunConfig(
            model=replace(NETWORKS[self.network], **self.model),
            diffusion=DiffusionConfig(channel_weights="pressure" if self.network in MASKED else "uniform"),
            train=TrainConfig(images=20, batch=self.batch, microbatch=self.microbatch, clip=1.0),
            optimizer=OptimizerConfig(
                lr=1e-2, weight_decay=0.4, warmup_images=5, cosine_images=0, rampdown_images=0
            ),
            ema=EMAConfig(halflife_images=6, rampup_ratio=1.0),
            parallel=ParallelConfig(self.dp, *self.wp, self.pp, self.sp, self.shard, self.schedule, self.p2p),
        )


CASES = [
    # One rank: the program itself is the oracle's equal.
    *(Case(network) for network in NETWORKS),
    # One axis at a time.
    Case("quarters", dp=2),
    Case("quarters", wp=(2, 1)),
    Case("quarters", wp=(1, 3)),
    Case("quarters", sp=2),
    Case("thirds", sp=3),
    Case("thirds", sp=4),
    Case("thirds", sp=6),
    Case("thirds", sp=12),
    Case("quarters", pp=2),
    Case("quarters", pp=3),
    Case("quarters", pp=6),
    # Window ranks alone and with a sequence; several windows a rank; both treatments of the poles.
    Case("many", wp=(2, 2)),
    Case("many", wp=(2, 3), model={"poles": "cyclic"}),
    Case("many", wp=(2, 3), sp=2, shard=1),
    Case("quarters", wp=(2, 3), sp=2, model={"poles": "cyclic"}),
    Case("thirds", wp=(2, 1), sp=4, model={"poles": "separate"}),
    # Pipelines: uneven cuts, every schedule, fewer microbatches than stages, how messages are posted.
    Case("deep", pp=4),
    *(Case("deep", pp=6, schedule=name) for name in get_args(get_type_hints(ParallelConfig)["schedule"])),
    Case("deep", pp=6, batch=2),
    Case("deep", pp=4, sp=2, p2p="batched"),
    Case("deep", pp=4, sp=4, p2p="parity"),
    Case("deep", wp=(2, 1), pp=3, p2p="parity", schedule="gpipe"),
    Case("deep", dp=2, pp=2, model={"checkpointing": "block"}, microbatch=2),
    # All axes, and weights divided over all ranks of a stage, over none, over some.
    Case("quarters", dp=2, wp=(2, 1), pp=2, sp=2, model={"blocks": 2}),
    Case("quarters", dp=2, wp=(2, 1), pp=2, sp=2, shard=1),
    Case("quarters", dp=2, wp=(2, 1), pp=2, sp=2, shard=2),
    Case("quarters", dp=2, wp=(2, 1), pp=2, sp=2, shard=4, p2p="batched"),
    Case("many", dp=2, wp=(2, 2), pp=2, sp=2, model={"checkpointing": "block"}),
    # 48 ranks.
    Case("deep", dp=2, wp=(2, 3), pp=4),
    Case("many", wp=(2, 3), pp=2, sp=4, shard=6),
    Case("thirds", dp=2, wp=(2, 1), sp=12, microbatch=2),
    Case("deep", wp=(2, 1), pp=6, sp=4, shard=1),
]


@functools.cache
def expected(
    network: str, batch: int, *settings: Any
) -> tuple[oracle.Images, oracle.Weights, list[oracle.Step]]:
    """Run the oracle, once for all meshes of a network."""
    config = Case(network, batch=batch, model=dict(settings)).config()
    model = build_model(config.model, *channel_counts(len(NAMES)), make_layout(config.model), "meta")
    initial = random_weights({name: p.shape for name, p in model.named_parameters()})
    images = random_images(config.model, STEPS * batch, network in MASKED)
    return images, initial, oracle.train(initial, images, config, STEPS)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_ranks_train_as_the_oracle_does(case: Case) -> None:
    """Loss, norm, every gradient, and after the update every weight and its average, on every rank."""
    config = case.config()
    settings = [item for item in case.model.items() if item[0] != "checkpointing"]
    images, initial, steps = expected(case.network, case.batch, *settings)
    assert any(step.norm > config.train.clip for step in steps)
    apart = run_distributed(ranks.compare, case.world, config, images, initial, steps, timeout_s=TIMEOUT_S)
    found = {key: max(rank[key] for rank in apart if key in rank) for rank in apart for key in rank}
    kinds = [f"{kind} of {name}" for kind in ("gradients", "weights", "ema") for name in initial]
    wanted = {f"step {number}: {key}" for number in range(STEPS) for key in ("loss", "norm", *kinds)}
    assert found.keys() == wanted, f"not on any rank: {sorted(wanted - found.keys())[:4]}"
    worst = sorted(found.items(), key=lambda item: -item[1])[:5]
    assert worst[0][1] <= case.tolerance, f"relative differences: {worst}"


def test_the_networks_hide_nothing() -> None:
    """No gradient of the oracle is nearly zero, every weight and average moves, and a wrong step is found."""
    for network in NETWORKS:
        _, initial, steps = expected(network, 4)
        for name, before in initial.items():
            assert all(float(step.gradients[name].abs().max()) > 1e-8 for step in steps), name
            assert float((steps[-1].weights[name] - before).abs().max()) > 1e-3, name
            assert float((steps[-1].ema[name] - steps[-1].weights[name]).abs().max()) > 1e-3, name
        assert min(deviations(steps[0], steps[1]).values()) > 1e-4
