"""Plans as text: a table of the best, one in detail, what others would change, why the rest does not fit."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from aeris.planning import published
from aeris.planning.estimate import Plan, breakdown
from aeris.planning.search import TIE, Rejected, Search

Row = dict[str, Any]
"""A plan in plain numbers, in SI units: what `--csv` and `--json` write."""
PARTS_SHOWN = 0.001
"""Parts below this share of the whole are not printed."""
NAMES = {"all_to_all": "all-to-all", "gemm": "matrix products", "elementwise": "element by element"}
"""Parts of a step that are printed under another name."""


def row(plan: Plan) -> Row:
    """Put a plan into one row of plain numbers."""
    dims, inside, between = plan.dims, plan.traffic.inside, plan.traffic.between
    found: Row = {
        "machine": plan.hardware.name,
        "devices": dims.world,
        **{axis: getattr(dims, axis) for axis in ("dp", "wp_y", "wp_x", "pp", "sp")},
        "shard": plan.config.parallel.shard,
        "batch": plan.config.train.batch,
        "microbatch": plan.config.train.microbatch,
        "microbatches": plan.microbatches,
        "tokens_per_rank": plan.tokens,
        "step_s": plan.step_s,
        "images_per_s": plan.images_per_s,
        "flops_per_s": plan.flops_per_s,
        "mfu": plan.mfu,
        "gemm_share": plan.gemm_share,
        "bubble": plan.time.bubble,
        "memory_bytes": plan.memory_bytes,
        "fullest_stage": plan.stage,
        "host_bytes": plan.host_bytes,
        "checkpoint_bytes": plan.checkpoint_bytes,
        "checkpoint_s": plan.checkpoint_s,
        "read_bytes_per_s": plan.read_bytes_per_s,
        "problem": plan.problem,
    }
    found |= {f"memory_{part}_bytes": size for part, size in plan.memory.items()}
    found |= {f"step_{part}_s": seconds for part, seconds in breakdown(plan).items()}
    found |= {f"sent_inside_{kind}_bytes": size for kind, size in inside.items()}
    return found | {f"sent_between_{kind}_bytes": size for kind, size in between.items()}


def table(named: Sequence[tuple[str, Plan]]) -> Table:
    """Lay plans out below each other, each with a name in front."""
    found = Table(box=SIMPLE_HEAD, padding=(0, 0), show_edge=False, collapse_padding=True)
    heads = (
        "dp",
        "wp",
        "pp",
        "sp",
        "shard",
        "micro\nbatch",
        "x",
        "step",
        "FLOP/s",
        "MFU",
        "img/s",
        "idle",
        "GB",
    )
    for number, head in enumerate(("", *heads)):
        found.add_column(head, justify="left" if number == 0 else "right", no_wrap=True)
    for name, plan in named:
        dims, train = plan.dims, plan.config.train
        found.add_row(
            name,
            str(dims.dp),
            f"{dims.wp_y}x{dims.wp_x}",
            str(dims.pp),
            str(dims.sp),
            str(plan.config.parallel.shard or "all"),
            str(train.microbatch),
            str(plan.microbatches),
            seconds(plan.step_s),
            _scaled(plan.flops_per_s),
            f"{plan.mfu:.1%}",
            f"{plan.images_per_s:.3g}",
            f"{plan.time.bubble:.1%}",
            f"{plan.memory_bytes / 1e9:.1f}"
            if not plan.problem
            else f"[red]{plan.memory_bytes / 1e9:.1f}[/]",
        )
    return found


COLUMNS = (
    "shard: ranks that divide the weights of a stage; x: microbatches of a step on each replica; MFU: of the "
    "theoretical peak; idle: share of the pipeline's time in which a stage computes nothing, on average; GB: "
    f"on a device of the fullest stage. Within {TIE:.1%} of the fastest, what needs least memory comes first"
)
"""What the heads of `table` stand for."""


def details(plan: Plan) -> Iterator[Table]:
    """Lay one plan out: memory, step and messages by part, and the rest."""
    hardware, sent = plan.hardware, plan.traffic
    memory = _plain(f"memory of a device, stage {plan.stage} of 0 to {plan.dims.pp - 1}", "bytes", "")
    for part, size in plan.memory.items():
        memory.add_row(part, amount(size), f"{size / plan.memory_bytes:.0%}")
    room = f"of {amount(hardware.memory_bytes)}, {plan.headroom:.0%} of it kept free"
    memory.add_row("all", amount(plan.memory_bytes), room)
    yield memory
    step = _plain("a step, on the stage that computes most", "time", "")
    for part, value in breakdown(plan).items():
        if value > PARTS_SHOWN * plan.step_s:
            step.add_row(NAMES.get(part, part), seconds(value), f"{value / plan.step_s:.1%}")
    step.add_row("all", seconds(plan.step_s), "")
    yield step
    messages = _plain("sent by a rank in a step", "in its node", "between nodes")
    for kind, size in sent.inside.items():
        if size or sent.between[kind]:
            messages.add_row(kind, *(amount(way) if way else "-" for way in (size, sent.between[kind])))
    yield messages
    rest = _plain("besides")
    rest.add_row("FLOPs", f"{_scaled(plan.flops_per_sample)}FLOP of a sample; {_shares(plan)}")
    rest.add_row("checkpoint", f"{amount(plan.checkpoint_bytes)}, {seconds(plan.checkpoint_s)} to write")
    rest.add_row("reading", f"{amount(plan.read_bytes_per_s)}/s of {amount(hardware.read_bytes_per_s)}/s")
    if plan.host_bytes:
        rest.add_row("host memory of a node", f"{amount(plan.host_bytes)} of {amount(hardware.host_bytes)}")
    yield rest


def _shares(plan: Plan) -> str:
    words = f"{plan.gemm_share:.0%} of a measured matrix product, {plan.mfu:.0%} of theory"
    return words + (f" ({plan.hfu:.0%} with what is computed twice)" if plan.hfu > plan.mfu else "")


def difference(best: Plan, other: Plan, name: str) -> Table:
    """Set the best plan beside another one, part by part of the step, for images of one batch."""
    found = _plain(f"what changes against {name}", name, "best", "")
    scale = best.config.train.batch / other.config.train.batch  # for steps of as many images
    ours, theirs = breakdown(best), breakdown(other)
    for part in ours:
        old = theirs.get(part, 0.0) * scale
        if max(ours[part], old) > PARTS_SHOWN * best.step_s:
            found.add_row(
                NAMES.get(part, part) + ", s", f"{old:.4g}", f"{ours[part]:.4g}", f"{ours[part] - old:+.3g}"
            )
    old = other.step_s * scale
    found.add_row("step", seconds(old), seconds(best.step_s), f"{best.step_s / old - 1:+.1%}")
    memory = (other.memory_bytes, best.memory_bytes)
    found.add_row("memory", *map(amount, memory), f"{memory[1] / memory[0] - 1:+.0%}")
    sent = [sum(plan.traffic.between.values()) * times for plan, times in ((other, scale), (best, 1.0))]
    found.add_row("sent between nodes", *map(amount, sent), "")
    found.add_row("tokens of a rank", f"{other.tokens:,}", f"{best.tokens:,}", "")
    return found


def changes(best: Plan, found: Sequence[tuple[str, str, Search]]) -> Table:
    """List what the best layout with another value of an axis, or another setting, would change.

    Args:
        found: what is changed, its value, and what a search with it found.
    """
    lines = _plain("one thing changed, the rest as good as it gets", "images/s", "memory", "layout")
    for name, value, result in found:
        head = f"{name} {value}"
        if result.plans:
            plan = result.plans[0]
            change = plan.images_per_s / best.images_per_s - 1
            lines.add_row(head, f"{change:+.1%}", amount(plan.memory_bytes), _layout(plan))
        elif result.rejected:
            near = min(result.rejected, key=lambda one: one.need)
            lines.add_row(head, "no", "", f"{_layout(near)} {near.problem}")
    return lines


def reasons(rejected: Sequence[Rejected]) -> Table:
    """Count why layouts do not fit, the most frequent reason first, each with its nearest miss."""
    found = _plain(
        "what might be faster, by its matrix products alone, but does not fit", "layouts", "nearest miss"
    )
    kinds = Counter(one.part for one in rejected)
    for kind, count in kinds.most_common():
        near = min((one for one in rejected if one.part == kind), key=lambda one: one.need)
        found.add_row(kind, f"{count:,}", f"{_layout(near)} {near.problem}")
    return found


def _layout(one: Plan | Rejected) -> str:
    shard = one.config.parallel.shard
    words = f"{one.dims}, microbatch {one.config.train.microbatch}"
    return words + (f", shard {shard}" if shard else "")


def assumptions(plan: Plan) -> list[str]:
    """Say what the prediction rests on, with the numbers of this plan."""
    hardware = plan.hardware
    return [
        f"matrix products run at {hardware.gemm_efficiency:.0%} of the measured "
        f"{rate(hardware.gemm_flops_per_s)} whatever their size, and attention too; here a rank has "
        f"{plan.tokens:,} tokens",
        f"links give {hardware.link_efficiency:.0%} of their rate however many nodes talk: no congestion, no "
        "slow node, no fault",
        f"{plan.headroom:.0%} of a device's memory is enough for drivers, libraries and gaps between tensors",
    ]


def residuals(rows: Sequence[published.Row]) -> Table:
    """Lay the published scaling runs out beside what is predicted for them."""
    found = Table(box=SIMPLE_HEAD, padding=(0, 0), show_edge=False, collapse_padding=True)
    for head in ("", "nodes", "published\nEFLOP/s", "predicted", "residual", "step", "idle", "explained by"):
        found.add_column(head, justify="right", no_wrap=True)
    last = ""
    for one in rows:
        count = f"{one.would_explain} microbatches" if one.would_explain else "-"
        found.add_row(
            one.model if one.model != last else "",
            f"{one.nodes:,}",
            f"{one.published:.3f}",
            f"{one.predicted:.3f}",
            f"{one.residual:+.1%}",
            seconds(one.step_s),
            f"{one.bubble:.0%}",
            count,
        )
        last = one.model
    return found


def write(rows: Sequence[Row], path: Path) -> None:
    """Write rows with the same columns to a CSV file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def _plain(title: str, *heads: str) -> Table:
    """Make a table without lines whose first column is names."""
    found = Table(title=title, title_justify="left", box=None, show_header=any(heads), padding=(0, 2, 0, 0))
    found.add_column("")
    for head in heads or ("",):
        words = head in ("", "layout", "nearest miss") or not heads
        found.add_column(head, justify="left" if words else "right", overflow="fold")
    return found


def rate(flops_per_s: float) -> str:
    """Write a rate with the prefix that fits: 10.2 EFLOP/s."""
    return f"{_scaled(flops_per_s)}FLOP/s"


def amount(size: float) -> str:
    """Write bytes with the prefix that fits: 652 GB."""
    return f"{_scaled(size)}B"


def _scaled(value: float) -> str:
    for prefix, unit in (("E", 1e18), ("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= unit:
            digits = 3 if value / unit < 999.5 else 4
            return f"{value / unit:.{digits}g} {prefix}"
    return f"{value:.3g} "


def seconds(value: float) -> str:
    """Write a time: 28.2 s, 31 ms."""
    return f"{value:.3g} s" if value >= 1 else f"{value * 1e3:.3g} ms"
