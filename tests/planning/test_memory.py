"""Planned memory: what is counted by hand, what formulas say, and what tensors take in real steps on gloo."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from aeris.config import RunConfig
from aeris.planning.activations import EMBEDDING, HEAD, LAYER, SHIFTED_LAYER, Tokens, passes
from aeris.planning.memory import groups, host_memory, memory
from aeris.presets import PRESETS
from aeris.restore import channel_counts
from benchmarks import memory as benchmark
from swipe.backend import choose_device
from swipe.mesh import ParallelDims
from tests.harness import run_distributed

CHANNELS = benchmark.CHANNELS
LAYOUTS = ("dp 2", "wp 1x2", "pp 2, gpipe", "sp 2, separate poles", "dp 2, recomputed")
PUBLISHED = ParallelDims(14, 6, 6, 20, 12)


def smallest(layout: str) -> tuple[ParallelDims, RunConfig]:
    """The benchmark's network as small as it can be with windows whose attention is fused on CPU."""
    dims, config = benchmark.varied(layout)
    model = replace(config.model, rows=24, cols=48, window=24, layers=2, width=64, heads=4, hidden=256)
    return dims, replace(config, model=model, train=replace(config.train, batch=2 * dims.dp))


def measured() -> list[int]:
    """Measure all layouts on this rank; two steps, as the second gathers ahead."""
    device, rank = torch.device("cpu"), dist.get_rank()
    torch.manual_seed(0)
    return [
        benchmark.measure(config, dims, rank, device, 2)
        for dims, config in (smallest(name) for name in LAYOUTS)
    ]


@pytest.fixture(scope="module")
def found() -> list[list[int]]:
    """Most bytes of tensors by layout and rank."""
    return [list(ranks) for ranks in zip(*run_distributed(measured, 2))]


@pytest.mark.parametrize("number", range(len(LAYOUTS)), ids=LAYOUTS)
def test_planned_is_what_tensors_take(number: int, found: list[list[int]]) -> None:
    dims, config = smallest(LAYOUTS[number])
    row = benchmark.row(LAYOUTS[number], config, dims, found[number])
    assert row["off"] < 0.06, row
    assert row["planned_MB"] == pytest.approx(sum(row[f"{part}_MB"] for part in benchmark.DRAWN), abs=0.05)


def test_a_block_keeps_what_is_counted_on_paper() -> None:
    """In d: input, norm, q, k, v, attention, that exchanged, branch, sum, norm, branch; 2 m: gate and up."""
    model = PRESETS["40b"]().model
    own = Tokens.of(model, PUBLISHED)
    assert (own.windows, own.tokens, own.shared, own.halved) == (32, 75, True, 0)
    kept = passes(model, (142, 69), LAYER, 1, own, True).kept
    paper = 2 * own.total * (11 * model.width + 2 * model.hidden)
    assert kept == pytest.approx(paper, rel=0.01)
    # As many tokens in one window, or in two images, are as much but for what belongs to an image.
    assert passes(model, (142, 69), LAYER, 1, own.together, True).kept == pytest.approx(kept, rel=0.005)
    half = replace(own, windows=16)
    assert passes(model, (142, 69), LAYER, 2, half, True).kept == pytest.approx(kept, rel=0.005)


def test_recomputing_keeps_the_input_and_needs_the_rest_once() -> None:
    model = PRESETS["1.3b-6h"]().model
    own = Tokens(1, 600, True)
    plain = passes(model, (142, 69), LAYER, 1, own, True)
    again = passes(replace(model, checkpointing="block"), (142, 69), LAYER, 1, own, True)
    assert again.kept == pytest.approx(plain.entered, rel=0.05)
    assert again.backward == pytest.approx(plain.backward, rel=0.05)


@pytest.mark.parametrize("sp", [1, 2, 4])
def test_windows_in_halves_keep_copies(sp: int) -> None:
    """Queries, keys and values of windows at the row edge, and both parts of the output beside the whole."""
    model = replace(PRESETS["tiny"]().model, precision="bf16", residual="bf16")
    own = Tokens.of(model, ParallelDims(sp=sp))
    plain, shifted = (passes(model, (50, 24), kind, 1, own).kept for kind in (LAYER, SHIFTED_LAYER))
    assert own.halved == 4 and plain < shifted <= plain + 5 * 2 * own.total * model.width


def test_weights_are_those_of_the_model() -> None:
    model, counts, total = PRESETS["1.3b-6h"]().model, channel_counts(69), 0
    for kind, units in {EMBEDDING: 1, LAYER: model.layers * model.blocks, HEAD: 1}.items():
        group, rest, _ = groups(model, counts, kind, 192)
        total += units * (group.whole + rest.whole)
    assert total == 4 * 1_310_072_832  # published, see test_presets


def test_rows_are_filled_up_to_the_ranks_that_divide_them() -> None:
    """6,144 rows over 432 ranks are 15 each; over all 6,048 ranks of a stage 2, twice what is there."""
    model, counts = PRESETS["40b"]().model, channel_counts(69)
    group, rest, casts = groups(model, counts, LAYER, 432)
    assert group.narrow and not rest.narrow and casts == 0
    matrices = {"qkv": (18432, 6144), "out": (6144, 6144), "gate_up": (81920, 6144), "down": (6144, 40960)}
    for shards in (432, 6048):
        rows = sum(-(-count // shards) * width for count, width in matrices.values())
        assert groups(model, counts, LAYER, shards)[0].own == 4 * rows
        assert groups(model, counts, LAYER, shards)[0].gathered == 2 * rows * shards
    alone = groups(model, counts, LAYER, 0)
    assert alone[0].gathered == 0 and alone[2] == 2 * sum(a * b for a, b in matrices.values())


def test_microbatches_in_flight_are_those_of_the_schedule() -> None:
    config, dims = PRESETS["40b"](), PUBLISHED
    one = 2 * passes(config.model, (142, 69), LAYER, 1, Tokens.of(config.model, dims), True).kept
    held = [memory(config, 69, dims, stage)["activations"] for stage in (1, 10, 18)]
    assert [round(h / one, 1) for h in held] == [19, 10, 2]
    gpipe = replace(config, parallel=replace(config.parallel, schedule="gpipe"))
    assert memory(gpipe, 69, dims, 18)["activations"] == pytest.approx(100 * one, rel=0.02)


def test_messages_are_held_as_the_policy_holds_them() -> None:
    """Devices hold what was sent and received for two transfers per stage; blocking messages are gone."""
    config, message = PRESETS["40b"](), 2 * 2400 * 6144
    held = {
        policy: memory(replace(config, parallel=replace(config.parallel, p2p=policy)), 69, PUBLISHED, 18)[
            "working"
        ]
        for policy in ("auto", "batched", "async", "parity")
    }
    assert held["auto"] == held["batched"] > held["async"] > held["parity"]
    assert held["async"] - held["parity"] == pytest.approx(40 * message, rel=0.1)


def test_offload_moves_what_the_optimizer_keeps() -> None:
    config, dims = PRESETS["1.3b-6h"](), ParallelDims(1, 4, 4, 10, 12)
    here = memory(config, 69, dims, 1)
    moved = replace(config, optimizer=replace(config.optimizer, offload="cpu-torch"))
    there = memory(moved, 69, dims, 1)
    assert there == here | {"optimizer": 0, "ema": 0}
    assert host_memory(config, 69, dims, 1) == 0
    assert host_memory(moved, 69, dims, 1) == 5 * here["weights"]


def test_published_layouts_fit_their_devices() -> None:
    """64 GB of a tile, with the microbatches of the benchmark runs: 100 a replica."""
    for name, dims in {"40b": PUBLISHED, "80b": ParallelDims(1, 8, 8, 26, 12)}.items():
        config = PRESETS[name]()
        config = replace(config, train=replace(config.train, batch=100 * dims.dp))
        most = max(sum(memory(config, 69, dims, stage).values()) for stage in (0, 1, dims.pp - 1))
        assert 20e9 < most < 64e9, (name, most)


def test_rows_are_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    dims, config = smallest("dp 2")
    rows: list[dict[str, Any]] = [benchmark.row("dp 2", config, dims, [10**7, 10**7])] * 3
    benchmark.draw(rows, tmp_path / "rows.png", "here")
    assert (tmp_path / "rows.png").stat().st_size > 10_000


def test_an_unknown_stack_is_refused() -> None:
    with pytest.raises(ValueError, match="no preset: choose from tiny"):
        benchmark.stack(benchmark.Options(stack="2b"))


@pytest.mark.gpu
@pytest.mark.skipif(choose_device("auto").type == "cpu", reason="there is no GPU here")
def test_a_stack_of_blocks_takes_what_is_planned() -> None:
    (row,) = benchmark.stack(benchmark.Options(stack="1.3b-6h", blocks=4, steps=1))
    assert row["off"] < 0.10, row
