"""Plans as a picture: memory and step of several, part by part, and the pipeline of the first on a clock.

matplotlib (the [plot] extra) is imported when a picture is drawn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from aeris.planning.estimate import Plan, breakdown
from aeris.planning.report import rate, seconds
from swipe.schedule import Span

MEMORY = {
    "weights": "#2f5d8a", "gradients": "#4c8fd1", "optimizer": "#8fb8e0", "ema": "#c3d9ee",
    "gathered": "#5fae7b", "casts": "#a9d6b8", "activations": "#e39a4b", "working": "#b07cc6",
}  # fmt: skip
STEP = {
    "gemm": "#2f5d8a", "attention": "#4c8fd1", "elementwise": "#8fb8e0", "all_to_all": "#e39a4b",
    "shift": "#b8742a", "waiting": "#d8dde2", "gradients": "#5fae7b", "weights": "#a9d6b8",
    "optimizer": "#b07cc6", "reading": "#d36b6b",
}  # fmt: skip
LABELS = {"gemm": "matrix products", "all_to_all": "all-to-all", "elementwise": "element by element"}
PASSES = {"F": "#7fb2e5", "B": "#f0b774", "I": "#f0b774", "W": "#8fc9a3"}
MOST_SPANS = 300
"""Up to so many passes a pipeline is drawn whole; of a longer one both ends are."""
GREY = "#5f6b78"


def draw(named: Sequence[tuple[str, Plan]], path: Path, title: str) -> None:
    """Draw plans below each other, and the pipeline of the first.

    Args:
        named: plans and what to call them.
        path: of the PNG.
        title: above it.

    Raises:
        ImportError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("pictures need matplotlib: pip install 'aeris-swipe[plot]'") from None

    first = named[0][1]
    bars, stages = 1.3 + 0.34 * len(named), 1.3 + 0.16 * max(4, first.dims.pp)
    figure = Figure(figsize=(13, 0.4 + bars + stages), layout="constrained")
    halves: Any = figure.subfigures(2, 1, height_ratios=(bars, stages))
    upper, lower = halves
    memory, step = upper.subplots(1, 2, sharey=True)
    names = [f"{name} {_short(plan)}".strip() for name, plan in named]
    memory.set_yticks(range(len(names)), names, fontsize=8)
    _stack(memory, [_scaled(plan.memory, 1e9) for _, plan in named], MEMORY)
    hardware = first.hardware
    for size, style in ((hardware.memory_bytes, "-"), (hardware.memory_bytes * (1 - first.headroom), ":")):
        memory.axvline(size / 1e9, color="#c0392b", linestyle=style, linewidth=1.2)
    room = f"it has {hardware.memory_bytes / 1e9:.0f} (dotted: less what is kept free)"
    memory.set_xlabel(f"GB on a device of the fullest stage; {room}", fontsize=8)
    _stack(step, [_per_image(plan, first) for _, plan in named], STEP)
    step.set_xlabel(f"seconds of a step of {first.config.train.batch:,} images", fontsize=8)
    memory.invert_yaxis()
    for number, (_, plan) in enumerate(named):
        text = f" {rate(plan.flops_per_s)}, MFU {plan.mfu:.0%}"
        step.text(sum(_per_image(plan, first).values()), number, text, va="center", fontsize=7, color=GREY)
    step.margins(x=0.22)
    _timeline(lower, first)
    figure.suptitle(title, fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=74, pil_kwargs={"optimize": True})


def _short(plan: Plan) -> str:
    dims = plan.dims
    wp = f"{dims.wp_y}x{dims.wp_x}"
    text = f"dp {dims.dp}  wp {wp}  pp {dims.pp}  sp {dims.sp}  mb {plan.config.train.microbatch}"
    shard = plan.config.parallel.shard
    return text + (f"  shard {shard}" if shard else "")


def _scaled(parts: Mapping[str, float], unit: float) -> dict[str, float]:
    return {part: size / unit for part, size in parts.items()}


def _per_image(plan: Plan, first: Plan) -> dict[str, float]:
    """Return a step by part, for as many images as the first plan's has."""
    return _scaled(breakdown(plan), plan.config.train.batch / first.config.train.batch)


def _stack(axes: Any, rows: Sequence[Mapping[str, float]], colors: Mapping[str, str]) -> None:
    """Draw one bar a row, its parts one after the other; parts that are too thin to see have no label."""
    left = [0.0] * len(rows)
    longest = max(sum(row.values()) for row in rows)
    for part, color in colors.items():
        values = [row.get(part, 0.0) for row in rows]
        label = LABELS.get(part, part) if max(values) > 0.004 * longest else "_"
        axes.barh(range(len(rows)), values, left=left, color=color, label=label, height=0.72)
        left = [before + value for before, value in zip(left, values)]
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
    axes.legend(fontsize=7, frameon=False, ncols=4, loc="lower left", bbox_to_anchor=(0, 1.0))


def _timeline(figure: Any, plan: Plan) -> None:
    """Draw the stages below each other, time to the right: whole, or both ends side by side."""
    spans, stages = plan.time.timeline.spans, plan.dims.pp
    end = plan.time.timeline.ticks
    microbatches = {span.action.microbatch for span in spans}
    count = len(microbatches)
    what = f"{stages} stage{'s' * (stages > 1)}, {count} microbatch{'es' * (count > 1)}, "
    what += f"{plan.time.bubble:.1%} idle"
    if len(spans) <= MOST_SPANS:
        _passes(figure.subplots(), spans, stages, 0.0, end, end)
        figure.suptitle(f"pipeline of the first: {what}; forward blue, backward orange", fontsize=9)
        return
    longest = max(sum(s.forward.values()) + sum(s.backward.values()) for s in plan.time.stages)
    length = min(end / 2, (stages + 6) * longest)
    both = figure.subplots(1, 2, sharey=True)
    _passes(both[0], spans, stages, 0.0, length, end)
    _passes(both[1], spans, stages, end - length, end, end)
    note = f"its first and last {seconds(length)} of {seconds(end)}"
    figure.suptitle(f"pipeline of the first: {what}; {note}; forward blue, backward orange", fontsize=9)


def _passes(axes: Any, spans: Sequence[Span], stages: int, start: float, stop: float, end: float) -> None:
    """Draw the passes between two times, with the number of their microbatch where there is room."""
    room = (stop - start) / 75
    for kind, color in PASSES.items():
        for stage in range(stages):
            some = [
                s
                for s in spans
                if s.stage == stage and s.action.kind == kind and s.end > start and s.start < stop
            ]
            pieces = [(s.start, s.end - s.start) for s in some]
            if pieces:  # the edge of a thin one would cover it
                thin = max(length for _, length in pieces) < room / 4
                look = {"facecolor": color, "edgecolor": color if thin else "white", "linewidth": 0.4}
                axes.broken_barh(pieces, (stage - 0.42, 0.84), **look)
            for span in some:
                middle = (span.start + span.end) / 2
                if span.end - span.start > room and start < middle < stop:
                    text = str(span.action.microbatch)
                    axes.text(middle, stage, text, ha="center", va="center", fontsize=5, color="#1d2733")
    axes.set_xlim(start, stop)
    axes.set_ylim(stages - 0.5, -0.5)
    axes.set_yticks(range(0, stages, max(1, stages // 10)))
    axes.set_xlabel("s", fontsize=8)
    axes.set_ylabel("stage", fontsize=8) if start == 0 else None
    axes.tick_params(labelsize=7)
    axes.spines[["top", "right"]].set_visible(False)
    if stop < end:
        axes.spines["right"].set(visible=True, linestyle=":")
    if start > 0:
        axes.spines["left"].set_linestyle(":")
