"""Plans, the search for the best of them, and their formulas; small networks on small made-up machines."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest

from aeris.config import RunConfig
from aeris.parallelize import limits
from aeris.planning import pictures, report
from aeris.planning.estimate import Plan, breakdown, estimate, shortage
from aeris.planning.explain import explain
from aeris.planning.hardware import HARDWARE, Hardware
from aeris.planning.memory import PARTS
from aeris.planning.search import (
    TIE,
    Candidate,
    Planner,
    Rejected,
    bound_s,
    stages_bound_s,
    with_batch,
)
from aeris.presets import PRESETS
from swipe.mesh import ParallelDims

CHANNELS = 24


def small(batch: int = 8, **sections: dict) -> RunConfig:
    """Return the tiny preset on a few features, with a larger batch; `sections` override settings."""
    base = with_batch(PRESETS["tiny"](), batch, 1)
    config = dataclasses.replace(base, model=dataclasses.replace(base.model, width=32, hidden=64))
    for name, values in sections.items():
        config = dataclasses.replace(config, **{name: dataclasses.replace(getattr(config, name), **values)})
    return config


def held(config: RunConfig, channels: int, dims: ParallelDims, stage: int) -> dict[str, int]:
    """Stand in for aeris.planning.memory.memory, which takes too long for hundreds of layouts."""
    flying = min(config.train.batch // (config.train.microbatch * dims.dp), dims.pp - stage)
    tokens = config.train.microbatch * config.model.rows * config.model.cols // dims.places
    shares = config.parallel.shard or dims.dp * dims.places
    parts = {"weights": 10**6 // dims.pp // shares, "gathered": 10**6 // dims.pp, "working": 100 * tokens}
    return dict.fromkeys(PARTS, 0) | parts | {"activations": flying * tokens * 20_000 // dims.pp}


@pytest.fixture
def light(monkeypatch: pytest.MonkeyPatch) -> None:
    """Count memory by `held`."""
    monkeypatch.setattr("aeris.planning.estimate.memory", held)


def machine(memory_bytes: float = 1e9, **numbers: float) -> Hardware:
    """Return a machine of nodes with four devices."""
    return dataclasses.replace(HARDWARE["cpu"], devices_per_node=4, memory_bytes=memory_bytes, **numbers)


def whole(config: RunConfig, hardware: Hardware, devices: int, headroom: float = 0.05) -> list[Plan]:
    """Plan every layout without a search, the fastest first: what a search is held to."""
    plans = []
    for size in (1, 2, 4, 8):
        run = with_batch(config, config.train.batch, size)
        for dims in limits(run).layouts(devices):
            for shard in {0, dims.places if dims.dp > 1 and dims.places > 1 else 0}:
                parallel = dataclasses.replace(run.parallel, shard=shard)
                one = dataclasses.replace(run, parallel=parallel)
                plans.append(estimate(one, CHANNELS, dims, hardware, headroom))
    fits = [plan for plan in plans if not plan.problem]
    return sorted(fits, key=lambda plan: plan.step_s)


@pytest.mark.usefixtures("light")
def test_search_finds_what_trying_everything_finds() -> None:
    """The pruning loses nothing but shapes of the window grid: with room for all, and with room for some."""
    config = small()
    everything = whole(config, machine(), 8)
    sizes = sorted(plan.memory_bytes for plan in everything)
    for memory in (1e9, sizes[len(sizes) // 3] / 0.95):
        expected = [p for p in everything if p.memory_bytes <= 0.95 * memory]
        planner = Planner(config, CHANNELS, machine(memory), 8)
        found = planner.best(planner.candidates(), 3).plans
        assert expected[0].step_s * (1 - 1e-9) <= found[0].step_s <= expected[0].step_s * 1.02
        tied = [p for p in found if p.step_s <= found[0].step_s * (1 + TIE)]
        assert [p.memory_bytes for p in tied[:2]] == sorted(p.memory_bytes for p in tied[:2])
        assert all(not plan.problem and plan.dims.world == 8 for plan in found)


@pytest.mark.usefixtures("light")
def test_bounds_are_bounds() -> None:
    """No step is faster than what sorts the candidates, nor than the sharper bound from its stages."""
    config, hardware = small(16), machine()
    planner = Planner(config, CHANNELS, hardware, 8)
    for candidate in planner.candidates()[::5]:
        plan = estimate(candidate.config, CHANNELS, candidate.dims, hardware)
        per_image = plan.step_s / plan.config.train.batch
        sharper = stages_bound_s(candidate.config, CHANNELS, candidate.dims, hardware)
        assert candidate.bound_s <= sharper * (1 + 1e-9)
        assert sharper <= per_image * (1 + 1e-9)


@pytest.mark.usefixtures("light")
def test_what_is_rejected_without_looking_does_not_fit() -> None:
    """A guess by proportion is never the reason to lose a layout that fits."""
    config = small(16)
    sizes = [p.memory_bytes for p in whole(config, machine(), 8)]
    hardware = machine(min(sizes) * 2)
    planner = Planner(config, CHANNELS, hardware, 8)
    guessed = 0
    for candidate in planner.candidates():
        found = planner.look(candidate)
        if isinstance(found, Rejected) and "about" in found.problem:
            guessed += 1
            assert shortage(candidate.config, CHANNELS, candidate.dims, hardware)[0]
    assert guessed


@pytest.mark.usefixtures("light")
def test_fixed_degrees_and_microbatches_are_kept() -> None:
    """What the run gives is not searched."""
    config = small(parallel={"pp": 2, "sp": 2, "shard": 2})
    planner = Planner(config, CHANNELS, machine(), 8)
    candidates = planner.candidates([2])
    assert candidates
    for one in candidates:
        assert (one.dims.pp, one.dims.sp, one.config.train.microbatch) == (2, 2, 2)
        assert one.config.parallel.shard == 2
    with pytest.raises(ValueError, match="pp 7"):
        Planner(small(parallel={"pp": 7}), CHANNELS, machine(), 7).candidates()
    with pytest.raises(ValueError, match=r"no layout of 8 devices .* microbatches of 3"):
        planner.candidates([3])
    with pytest.raises(ValueError, match="weights divided over 3 ranks"):
        Planner(small(parallel={"shard": 3}), CHANNELS, machine(), 8).candidates()
    with pytest.raises(ValueError, match="dp divide 2"):  # the microbatch of the run, 2, is not asked for
        Planner(with_batch(small(), 2, 2), CHANNELS, machine(), 56).candidates()


@pytest.mark.usefixtures("light")
def test_batch_per_replica_lets_the_batch_grow() -> None:
    """Every candidate has that many images on each replica, and dp need not divide the run's batch."""
    planner = Planner(small(8), CHANNELS, machine(), 12)
    candidates = planner.candidates(batch_per_replica=6)
    assert {one.dims.dp for one in candidates} >= {1, 3, 12}
    assert all(one.config.train.batch == 6 * one.dims.dp for one in candidates)
    best = planner.best(candidates, 1).plans[0]
    assert best.images_per_s == pytest.approx(best.config.train.batch / best.step_s)


@pytest.mark.usefixtures("light")
def test_neighbours_change_one_thing() -> None:
    """Each has the value it is named after, and none beats the best."""
    planner = Planner(small(16), CHANNELS, machine(), 8)
    candidates = planner.candidates()
    best = planner.best(candidates, 1).plans[0]
    other = estimate(with_batch(small(16), 16, 1), CHANNELS, ParallelDims(1, 2, 2, 2, 1), machine())
    found = planner.neighbours(best, candidates, other)
    assert {"wp", "pp"} <= {name for name, _, _ in found}
    for name, value, result in found:
        for plan in result.plans:
            values = {
                **dataclasses.asdict(plan.dims),
                "wp": plan.dims.wp,
                "microbatch": plan.config.train.microbatch,
            }
            assert values[name] == value
            assert plan.images_per_s <= best.images_per_s * (1 + 2 * TIE)


@pytest.mark.parametrize(
    ("preset", "dims", "hardware"),
    [
        ("40b", ParallelDims(14, 6, 6, 20, 12), "alcf-aurora"),
        ("tiny", ParallelDims(1, 2, 2, 2, 1), "cpu"),
        ("tiny", ParallelDims(), "h200"),
    ],
)
def test_every_formula_gives_its_value(preset: str, dims: ParallelDims, hardware: str) -> None:
    """The numbers of --explain are an expression; computed, it is what the plan says, but for rounding."""
    config = PRESETS[preset]()
    if hardware == "cpu":  # with what is read for errors of states
        config = dataclasses.replace(config, diffusion=dataclasses.replace(config.diffusion, state_error=1.0))
    plan = estimate(config, len(config.data.channels) or CHANNELS, dims, HARDWARE[hardware])
    computed = 0
    for _, lines in explain(plan):
        for line in lines:
            assert math.isfinite(line.value), line
            if line.numbers:
                value = eval(line.numbers, {"__builtins__": {}, "max": max})
                tiny = 0 if line.unit else 1e-4  # a share is a difference of rounded numbers
                assert value == pytest.approx(line.value, rel=1e-3, abs=tiny), str(line)
                computed += 1
    assert computed > 20


def test_a_step_is_the_sum_of_its_parts() -> None:
    """In the plan, in its breakdown, and in the row that is written."""
    plan = estimate(PRESETS["40b"](), 69, ParallelDims(14, 6, 6, 20, 12), HARDWARE["alcf-aurora"])
    assert sum(breakdown(plan).values()) == pytest.approx(plan.step_s)
    row = report.row(plan)
    assert sum(row[f"step_{part}_s"] for part in breakdown(plan)) == pytest.approx(row["step_s"])
    assert sum(row[f"memory_{part}_bytes"] for part in plan.memory) == row["memory_bytes"]
    assert row["flops_per_s"] == pytest.approx(plan.flops_per_sample * 1400 / plan.step_s)
    assert row["mfu"] == pytest.approx(row["flops_per_s"] / (120_960 * 367e12))
    assert plan.parameters == pytest.approx(40.8e9, rel=0.01)
    assert plan.checkpoint_bytes == 16 * plan.parameters


def test_problem_names_the_numbers() -> None:
    """What is needed, what there is, what most of it is and where; and the host's memory with offload."""
    tight = machine(1e5)
    plan = estimate(small(), CHANNELS, ParallelDims(dp=8), tight)
    assert "GB" in plan.problem and "on stage 0" in plan.problem
    moved = estimate(
        small(optimizer={"offload": "cpu-torch"}), CHANNELS, ParallelDims(dp=8), machine(host_bytes=1e3)
    )
    assert (
        "host memory" in moved.problem and not estimate(small(), CHANNELS, ParallelDims(8), machine()).problem
    )


def test_fastest_bound_first_and_squarest_grid_only() -> None:
    """Candidates come sorted; of 1x4, 2x2 and 4x1 windows 2x2 stays, unless a side is asked for."""
    planner = Planner(small(), CHANNELS, machine(), 4)
    found = planner.candidates()
    assert [c.bound_s for c in found] == sorted(c.bound_s for c in found)
    assert {(c.dims.wp_y, c.dims.wp_x) for c in found if c.dims.wp == 4} == {(2, 2)}
    asked = Planner(small(parallel={"wp_y": 1}), CHANNELS, machine(), 4).candidates()
    assert {(c.dims.wp_y, c.dims.wp_x) for c in asked if c.dims.wp == 4} == {(1, 4)}
    first = Candidate(small(), ParallelDims(), bound_s(small(), CHANNELS, ParallelDims(), machine()))
    assert first.bound_s > 0


@pytest.mark.usefixtures("light")
def test_picture(tmp_path: Path) -> None:
    """Short and long pipelines are drawn, and layouts that do not fit beside those that do."""
    pytest.importorskip("matplotlib")
    short = estimate(small(4), CHANNELS, ParallelDims(1, 1, 1, 2, 1), machine())
    long = estimate(small(200), CHANNELS, ParallelDims(1, 1, 1, 2, 1), machine(1e5))
    for name, plans in (("short", [("1", short), ("published", long)]), ("long", [("1", long)])):
        path = tmp_path / "pictures" / f"{name}.png"
        pictures.draw(plans, path, "title")
        assert path.read_bytes()[:4] == b"\x89PNG"
