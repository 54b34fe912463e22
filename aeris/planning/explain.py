"""Every formula of a plan with its numbers, in the order one would do it on paper.

The numbers of a line are an expression that gives its value; where there is none the value is counted:
by walking through a schedule, or through the operations of a block.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from aeris.flops import work
from aeris.model.swin import DTYPES
from aeris.planning.elementwise import stage_bytes
from aeris.planning.estimate import CHECKPOINT_BYTES, Plan
from aeris.planning.hardware import Hardware
from aeris.planning.timing import rate, step_read_bytes
from aeris.planning.traffic import Traffic, microbatch_traffic, passes, units_of_stage, weight_bytes
from aeris.reading import states_read
from aeris.restore import channel_counts


class Line(NamedTuple):
    """A quantity with its formula."""

    name: str
    formula: str
    numbers: str
    """The formula with numbers, as Python would compute it; "" if the value is counted."""
    value: float
    unit: str = ""

    def __str__(self) -> str:
        numbers = f" = {self.numbers}" if self.numbers else ""
        steps = f"{self.formula or 'counted'}{numbers} = {_written(self.value)} {self.unit}"
        return f"  {self.name:<24}{steps}".rstrip()


def explain(plan: Plan) -> Iterator[tuple[str, list[Line]]]:
    """Explain a plan: sections of lines, each with its title."""
    stages = plan.time.stages
    busiest = max(range(len(stages)), key=lambda n: stages[n].forward_s + stages[n].backward_s)
    yield "the network: T tokens, L of a window, B blocks, d width, m hidden", _network(plan)
    yield "the layout: M microbatches, t tokens of one on a rank", _layout(plan)
    yield f"one microbatch on stage {busiest}, which computes most: b blocks, s bytes", _pass(plan, busiest)
    yield "a step", _step(plan)
    yield f"memory of a device of stage {plan.stage}, which holds most", _memory(plan)
    yield (
        f"sent in a step by rank {plan.dims.rank_at(0, busiest, 0)}, of stage {busiest}",
        _sent(plan, busiest),
    )
    yield "files", _files(plan)


def _network(plan: Plan) -> list[Line]:
    model, flops, F = plan.config.model, plan.flops, "FLOP"
    T, L, B, d, m = (
        model.rows * model.cols,
        model.window**2,
        model.layers * model.blocks,
        model.width,
        model.hidden,
    )
    C_in, C_out = channel_counts(plan.channels)
    attention = Line(
        "attention in windows", "6 B 2 T L d", f"6 * {B} * 2 * {T} * {L} * {d}", flops["attention_windows"], F
    )
    if model.poles == "separate":  # less where halves of windows attend apart
        attention = attention._replace(formula="6 B 2 T L d, less across the poles", numbers="")
    return [
        Line("T", "rows x columns", f"{model.rows} * {model.cols}", T),
        Line("parameters", "", "", plan.parameters),
        Line("q, k, v, out", "6 B T 4 d^2", f"6 * {B} * {T} * 4 * {d}**2", flops["attention_projections"], F),
        attention,
        Line("MLP", "6 B T 3 d m", f"6 * {B} * {T} * 3 * {d} * {m}", flops["mlp"], F),
        Line("embedding", "4 T C_in d", f"4 * {T} * {C_in} * {d}", flops["embedding"], F),
        Line("head", "6 T C_out d", f"6 * {T} * {C_out} * {d}", flops["head"], F),
        Line("modulation", "", "", flops["modulation"], F),
        Line(
            "F", "of a sample, their sum", " + ".join(map(_written, flops.values())), plan.flops_per_sample, F
        ),
    ]


def _layout(plan: Plan) -> list[Line]:
    dims, train, T = plan.dims, plan.config.train, plan.config.model.rows * plan.config.model.cols
    degrees = (dims.dp, dims.wp_y, dims.wp_x, dims.pp, dims.sp)
    return [
        Line("ranks", "DP x WP x PP x SP", " * ".join(map(str, degrees)), dims.world),
        Line("ranks of a stage", "DP x WP x SP", f"{dims.dp} * {dims.wp} * {dims.sp}", dims.dp * dims.places),
        Line(
            "t", "microbatch T / (WP SP)", f"{train.microbatch} * {T} / ({dims.wp} * {dims.sp})", plan.tokens
        ),
        Line(
            "M",
            "batch / (microbatch DP)",
            f"{train.batch} / ({train.microbatch} * {dims.dp})",
            plan.microbatches,
        ),
    ]


def _pass(plan: Plan, stage: int) -> list[Line]:
    config, dims, hardware = plan.config, plan.dims, plan.hardware
    units, time = units_of_stage(config, plan.channels, dims, stage), plan.time.stages[stage]
    flops = work(config.model, *channel_counts(plan.channels), units)
    share = f"* {config.train.microbatch} / {dims.places}"
    products = flops["attention_projections"].forward + flops["mlp"].forward
    numbers = f"{_written(products)} {share} / {_written(rate(config, hardware))}"
    ends = flops["embedding"].forward + flops["head"].forward
    if ends:
        exact = hardware.fp32_flops_per_s * hardware.gemm_efficiency
        numbers += f" + {_written(ends)} {share} / {_written(exact)}"
    moved = stage_bytes(config, plan.channels, dims, units)
    memory = _written(hardware.memory_bytes_per_s)
    windows = f"{_written(flops['attention_windows'].forward)} {share} / {_written(rate(config, hardware))}"
    lines = [
        Line("products rate", "measured x efficiency", _efficiency(plan), rate(config, hardware), "FLOP/s"),
        Line("matrix products", "FLOPs of the stage / (WP SP rate)", numbers, time.forward["gemm"], "s"),
        Line("attention", "4 b t L d / rate", windows, time.forward["attention"], "s"),
        Line(
            "element by element",
            "bytes / memory rate",
            f"{_written(moved[0])} / {memory}",
            time.forward["elementwise"],
            "s",
        ),
    ]
    sent = microbatch_traffic(
        config, plan.channels, dims, dims.rank_at(0, stage, 0), hardware.devices_per_node
    )
    blocks = sum(0 < unit <= config.model.layers for unit in units) * config.model.blocks
    if time.forward["all_to_all"]:
        numbers = _transfer(sent, "all-to-all", hardware, 1 / passes(config), 2 * blocks)
        formula = "4 b t d s (SP-1)/SP / link + 2 b latency"
        lines.append(Line("all-to-all", formula, numbers, time.forward["all_to_all"], "s"))
    if time.forward["shift"]:
        lines.append(
            Line("shifts inside the stage", "t d s / link + latency, each", "", time.forward["shift"], "s")
        )
    back = " + ".join(_written(value) for value in time.backward.values() if value)
    ahead = " + ".join(_written(value) for value in time.forward.values() if value)
    lines.append(Line("forward pass", "their sum", ahead, time.forward_s, "s"))
    lines.append(Line("backward pass", "the same parts of the way back", back, time.backward_s, "s"))
    if dims.pp > 1:
        lines.append(Line("message to a stage", "t d s / link + latency", "", plan.time.message_s, "s"))
    return lines


def _efficiency(plan: Plan) -> str:
    hardware = plan.hardware
    half = plan.config.model.precision == "bf16"
    measured = hardware.gemm_flops_per_s if half else hardware.fp32_flops_per_s
    return f"{_written(measured)} * {_written(hardware.gemm_efficiency)}"


def _transfer(sent: Traffic, kind: str, hardware: Hardware, share: float, messages: int) -> str:
    """Write the time of messages of a kind: both links at once, the slower counts."""
    inside, between = sent.inside[kind] * share, sent.between[kind] * share
    links = [
        f"{_written(size)} / {_written(speed)}"
        for size, speed in ((inside, hardware.inside_bytes_per_s), (between, hardware.between_bytes_per_s))
        if size
    ]
    longest = links[0] if len(links) == 1 else f"max({', '.join(links)})"
    latency = hardware.between_latency_s if between else hardware.inside_latency_s
    return f"{longest} / {_written(hardware.link_efficiency)} + {messages} * {_written(latency)}"


def _step(plan: Plan) -> list[Line]:
    time, dims, count = plan.time, plan.dims, plan.microbatches
    busy = sum(stage.forward_s + stage.backward_s for stage in time.stages) * count
    slowest = max(stage.forward_s + stage.backward_s for stage in time.stages)
    equal = (count + dims.pp - 1) * slowest
    parts = (time.pipeline_s, time.weights_s, time.gradients_s, time.optimizer_s, time.read_s)
    batch, flops = plan.config.train.batch, _written(plan.flops_per_sample)
    rates, peak = _written(plan.flops_per_s), _written(plan.hardware.peak_flops_per_s)
    return [
        Line("pipeline", f"simulated, {time.schedule}, messages {time.policy}", "", time.pipeline_s, "s"),
        Line(
            "  were stages equal", "(M + PP - 1) (forward + backward)",
            f"({count} + {dims.pp} - 1) * {_written(slowest)}", equal, "s",
        ),
        Line(
            "  idle share", "1 - computing / (PP pipeline)",
            f"1 - {_written(busy)} / ({dims.pp} * {_written(time.pipeline_s)})", time.bubble,
        ),
        Line("weights", "gathered and cast, not hidden", "", time.weights_s, "s"),
        Line("gradients", "reduced, not hidden", "", time.gradients_s, "s"),
        Line("optimizer", "bytes of its share / memory rate", "", time.optimizer_s, "s"),
        Line("reading", "as far as nothing hides it", "", time.read_s, "s"),
        Line("step", "their sum", " + ".join(map(_written, parts)), plan.step_s, "s"),
        Line("images/s", "batch / step", f"{batch} / {_written(plan.step_s)}", plan.images_per_s),
        Line("FLOP/s", "F images/s", f"{flops} * {_written(plan.images_per_s)}", plan.flops_per_s),
        Line("MFU", "FLOP/s / (ranks peak)", f"{rates} / ({dims.world} * {peak})", plan.mfu),
    ]  # fmt: skip


def _memory(plan: Plan) -> list[Line]:
    config, dims, held = plan.config, plan.dims, plan.memory
    units = units_of_stage(config, plan.channels, dims, plan.stage)
    shares = config.parallel.shard or dims.dp * dims.places
    own = weight_bytes(config, plan.channels, units, shares)
    flying = (
        plan.microbatches
        if config.parallel.schedule == "gpipe"
        else min(plan.microbatches, dims.pp - plan.stage)
    )
    one, there = held["activations"] / flying, config.optimizer.offload == "none"
    weights = _written(held["weights"])
    lines = [
        Line("weights", f"fp32 / {shares} ranks", f"{_written(own)} / {shares}", held["weights"], "bytes"),
        Line("gradients", "as weights", "", held["gradients"], "bytes"),
        Line("optimizer", "two moments", f"2 * {weights}" if there else "", held["optimizer"], "bytes"),
        Line("average of weights", "as weights", weights if there else "", held["ema"], "bytes"),
        Line("gathered", "weights and gradients of the whole stage", "", held["gathered"], "bytes"),
        Line("casts", "matrices in the type of products", "", held["casts"], "bytes"),
        Line(
            "activations", "in flight x kept of a microbatch", f"{flying} * {_written(one)}",
            held["activations"], "bytes",
        ),
        Line("working", "messages, samples, the pass that runs", "", held["working"], "bytes"),
    ]  # fmt: skip
    parts = " + ".join(_written(size) for size in held.values())
    room = f"their sum, of {_written(plan.hardware.memory_bytes * (1 - plan.headroom))}"
    return [*lines, Line("all", room, parts, plan.memory_bytes, "bytes")]


def _sent(plan: Plan, stage: int) -> list[Line]:
    config, dims, model = plan.config, plan.dims, plan.config.model
    units = units_of_stage(config, plan.channels, dims, stage)
    blocks = sum(0 < unit <= model.layers for unit in units) * model.blocks
    each = plan.hardware.devices_per_node
    one = microbatch_traffic(config, plan.channels, dims, dims.rank_at(0, stage, 0), each).total
    count, heads, message = (
        plan.microbatches,
        DTYPES[model.precision].itemsize,
        DTYPES[model.residual].itemsize,
    )
    peers = (stage > 0) + (stage < dims.pp - 1)
    lines = []
    if one["all-to-all"]:
        times = f"{count} * {passes(config)} * 4 * {blocks}"
        numbers = f"{times} * {plan.tokens} * {model.width} * {heads} * ({dims.sp} - 1) / {dims.sp}"
        formula = f"M {passes(config)} passes 4 b t d s (SP-1)/SP"
        lines.append(Line("all-to-all", formula, numbers, count * one["all-to-all"], "bytes"))
    if one["pipeline"]:
        numbers = f"{count} * {peers} * {plan.tokens} * {model.width} * {message}"
        lines.append(Line("between stages", f"M {peers} t d s", numbers, count * one["pipeline"], "bytes"))
    if one["shift"]:
        lines.append(
            Line("shifts inside the stage", "M t d s, there and back", "", count * one["shift"], "bytes")
        )
    return lines


def _files(plan: Plan) -> list[Line]:
    config, write = plan.config, plan.hardware.write_bytes_per_s
    T, ends = config.model.rows * config.model.cols, 1 if plan.dims.pp == 1 else 2
    read, states = step_read_bytes(config, plan.channels, plan.dims), states_read(config)
    formula = f"batch x ends of the pipeline x {states} states x C T 4 bytes"
    numbers = f"{config.train.batch} * {ends} * {states} * {plan.channels} * {T} * 4"
    if config.data.roll and plan.dims.wp_x > 1:  # windows of a turned globe lie in two on disk
        formula, numbers = f"{formula} x 2, turned", f"{numbers} * 2"
    size = f"{CHECKPOINT_BYTES} * {plan.parameters}"
    return [
        Line("read in a step", formula, numbers, read, "bytes"),
        Line(
            "a second",
            "read / step",
            f"{_written(read)} / {_written(plan.step_s)}",
            plan.read_bytes_per_s,
            "bytes/s",
        ),
        Line("checkpoint", "weights, moments, average", size, plan.checkpoint_bytes, "bytes"),
        Line(
            "  written in",
            "",
            f"{_written(plan.checkpoint_bytes)} / {_written(write)}",
            plan.checkpoint_s,
            "s",
        ),
    ]


def _written(value: float) -> str:
    """Write a number so that it can be computed with, in at most five digits if it is no small whole one."""
    if value == int(value) and abs(value) < 1e7:
        return str(int(value))
    return f"{value:.5g}"
