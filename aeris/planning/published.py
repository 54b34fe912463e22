"""The published scaling of AERIS, and what the planner says of the same runs.

One number, the smallest run of 40B, fixes one constant of the machine, the GEMM efficiency (`calibrate`). All
others are predicted. EFLOP/s count FLOPs by the published formula. What is not public is taken as in 40B and
said: 100 microbatches of one image per replica, window, WP and depth as [inferred] in aeris/presets.py.

Source: AERIS, arXiv 2509.13523, scaling figure (read off, to about 0.5 %) and the authors' snapshot.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from aeris.config import RunConfig
from aeris.flops import published_flops
from aeris.planning.hardware import HARDWARE, Hardware
from aeris.planning.timing import PUBLISHED, Practice, StepTime, step_time
from aeris.presets import PRESETS
from swipe.mesh import ParallelDims

CHANNELS = 69
"""In and out: the benchmarked networks take a state alone."""
MICROBATCHES = 100
"""Per replica and step: 1,400 images on 14 replicas. [code] for 40B, [assumed] for the others."""


@dataclass(frozen=True)
class Model:
    """A network of the published figure, on one replica.

    Attributes:
        name: as in the figure.
        machine: it ran on.
        preset: whose sizes it has, but for `sizes`.
        sizes: settings of the network that differ from the preset.
        dims: one replica.
        points: (nodes, EFLOP/s).
        known: what is certain of sizes and layout, and what is not.
    """

    name: str
    machine: str
    preset: str
    sizes: dict[str, Any]
    dims: ParallelDims
    points: tuple[tuple[int, float], ...]
    known: str

    def config(self, replicas: int, microbatches: int = MICROBATCHES) -> RunConfig:
        """Return the run, on so many replicas: as published, without RoPE and over the poles."""
        preset = PRESETS[self.preset]()
        model = replace(
            preset.model, rope=False, poles="cyclic", modulation_layers=1, norm_order="norm-modulate",
            **self.sizes,
        )  # fmt: skip
        batch = replicas * microbatches
        return replace(preset, model=model, train=replace(preset.train, batch=batch, microbatch=1))


MODELS = (
    Model(
        "40B", "alcf-aurora", "40b", {}, ParallelDims(1, 6, 6, 20, 12),
        ((720, 0.76), (1440, 1.364), (3600, 3.483), (5040, 5.05), (7200, 7.44), (10_080, 10.21)),
        "all certain",
    ),
    Model(
        "13B", "alcf-aurora", "13b", {}, ParallelDims(1, 4, 4, 16, 12),
        ((256, 0.203), (768, 0.607), (1280, 1.001), (2560, 1.964), (5120, 3.953), (7680, 5.834)),
        "width, heads, hidden certain; depth, window, WP, PP from 256-node steps",
    ),
    Model(
        "80B", "alcf-aurora", "80b", {}, ParallelDims(1, 8, 8, 26, 12),
        ((1664, 1.090), (3328, 2.126), (4992, 3.193), (8320, 5.268)),
        "all from 1,664-node steps and the number of parameters",
    ),
    Model(
        "1.3B", "alcf-aurora", "40b", {"width": 1536, "heads": 12, "hidden": 9216, "layers": 10, "blocks": 2},
        ParallelDims(1, 2, 2, 12, 12),
        ((288, 0.166), (480, 0.275), (960, 0.532), (1440, 0.821), (1920, 1.096)),
        "window and WP certain; the rest from 48-node replicas and the number of parameters",
    ),
    Model(
        "26B", "lumi", "40b",
        {"window": 60, "width": 6144, "heads": 48, "hidden": 38_400, "layers": 12, "blocks": 2},
        ParallelDims(1, 6, 6, 14, 8), ((504, 0.27), (1008, 0.54)),
        "only nodes and parameters; sizes made up to fit them",
    ),
)  # fmt: skip
"""What the figure shows, and the runs behind it as far as they are known."""


@dataclass(frozen=True)
class Row:
    """A point of the figure beside its prediction.

    Attributes:
        model: its name.
        nodes: of the machine.
        published: EFLOP/s.
        predicted: EFLOP/s.
        step_s: predicted seconds of a step.
        bubble: idle share of the stages in the pipeline.
        microbatches: per replica and step, as assumed.
        would_explain: microbatches per replica with which the prediction would be as published; 0: none. A
            diagnosis, nothing is taken from it.
        recomputed: EFLOP/s that would be predicted if every block were recomputed: another.
        known: see `Model`.
    """

    model: str
    nodes: int
    published: float
    predicted: float
    step_s: float
    bubble: float
    microbatches: int
    would_explain: int
    recomputed: float
    known: str

    @property
    def residual(self) -> float:
        """Predicted over published, less 1."""
        return self.predicted / self.published - 1


def predict(
    model: Model, nodes: int, hardware: Hardware, practice: Practice = PUBLISHED
) -> tuple[RunConfig, StepTime]:
    """Predict a step of a run of the figure.

    Raises:
        ValueError: the nodes do not hold whole replicas.
    """
    replicas, over = divmod(nodes * hardware.devices_per_node, model.dims.world)
    if over or not replicas:
        raise ValueError(
            f"{nodes} nodes of {hardware.devices_per_node} devices hold no whole number of replicas of "
            f"{model.dims.world}"
        )
    config = model.config(replicas)
    return config, step_time(config, CHANNELS, replace(model.dims, dp=replicas), hardware, practice)


def exaflops(config: RunConfig, seconds: float) -> float:
    """Return the EFLOP/s of a step, with the FLOPs of the published formula."""
    return published_flops(config.model, CHANNELS, CHANNELS) * config.train.batch / seconds / 1e18


def calibrate(hardware: Hardware = HARDWARE["alcf-aurora"], practice: Practice = PUBLISHED) -> float:
    """Find the GEMM efficiency with which the smallest run of 40B comes out as published.

    Products take a time in inverse proportion to it, and nearly all else none: a secant finds it.

    Raises:
        ValueError: none between 0 and 1 does: some other number of the machine is too low.
    """
    model = MODELS[0]
    nodes, published = model.points[0]

    def seconds(inverse: float) -> float:
        config, time = predict(model, nodes, replace(hardware, gemm_efficiency=1 / inverse), practice)
        return time.step_s - exaflops(config, 1.0) / published  # EFLOP / EFLOP/s

    inverses = [1.0, 2.0]
    errors = [seconds(inverse) for inverse in inverses]
    if errors[0] > 0:
        config, time = predict(model, nodes, replace(hardware, gemm_efficiency=1.0), practice)
        raise ValueError(
            f"no GEMM efficiency gives the published {published} EFLOP/s on {nodes} nodes: on "
            f"{hardware.name} {exaflops(config, time.step_s):.3f} are possible"
        )
    while abs(errors[-1]) > 1e-6:
        slope = (errors[-1] - errors[-2]) / (inverses[-1] - inverses[-2])
        inverses.append(max(1.0, inverses[-1] - errors[-1] / slope))
        errors.append(seconds(inverses[-1]))
    return 1 / inverses[-1]


def table(
    hardware: Hardware | None = None, models: Iterable[Model] = MODELS, practice: Practice = PUBLISHED
) -> list[Row]:
    """Predict every point of the figure.

    Args:
        hardware: in place of the machine of that name.
        models: of the figure.
        practice: of the program that ran; the authors'.
    """
    rows = []
    for model in models:
        recomputing = {**model.sizes, "checkpointing": "block"}
        machine = hardware if hardware and hardware.name == model.machine else HARDWARE[model.machine]
        for nodes, published in model.points:
            config, time = predict(model, nodes, machine, practice)
            again = predict(replace(model, sizes=recomputing), nodes, machine, practice)[1]
            rows.append(
                Row(
                    model=model.name,
                    nodes=nodes,
                    published=published,
                    predicted=exaflops(config, time.step_s),
                    step_s=time.step_s,
                    bubble=time.bubble,
                    microbatches=MICROBATCHES,
                    would_explain=would_explain(config, time, published),
                    recomputed=exaflops(config, again.step_s),
                    known=model.known,
                )
            )
    return rows


def would_explain(config: RunConfig, time: StepTime, published: float) -> int:
    """Find with how many microbatches per replica a run would have been as fast as published; 0: none.

    A step takes its period for each, and the same on top whatever their number.
    """
    each = exaflops(config, 1.0) / MICROBATCHES  # EFLOP
    on_top = time.step_s - MICROBATCHES * time.period_s
    spare = each / published - time.period_s
    return round(on_top / spare) if spare > 0 else 0
