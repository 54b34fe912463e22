"""How long ranks compute, and which of them are slow: not those that wait for a slow one."""

import os
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from aeris.config import FaultConfig
from aeris.guards import Guards
from swipe.collectives import byte_log, host_names
from swipe.groups import Groups, make_groups
from swipe.mesh import ParallelDims
from swipe.pipeline import Microbatch, Pipeline
from swipe.sharding import shard
from swipe.stopwatch import Stopwatch, crowded, runnable_s
from swipe.stragglers import Slow, Stragglers, named
from tests.harness import run_distributed

CPU = torch.device("cpu")
SLOW = 2


def spin(seconds: float) -> None:
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass


class Layer(nn.Module):
    """A layer that computes for a while, both ways."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))
        self.seconds = seconds

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        spin(self.seconds)
        y = x * self.weight
        if y.requires_grad:
            y.register_hook(lambda grad: spin(self.seconds))
        return y


def train(steps: int) -> tuple[list[list[Slow] | None], float, float]:
    """Share weights over 4 ranks (dp), of which one computes for longer; the others wait inside passes."""
    os.environ["LOCAL_WORLD_SIZE"] = "1000"  # the tests' machine may be busy: count only what a thread ran
    rank = int(torch.distributed.get_rank())
    groups = make_groups(ParallelDims(dp=4), rank, CPU)
    hosts = host_names(groups.world)
    assert hosts == [os.uname().nodename.split(".")[0]] * 4 and hosts[0] is hosts[3]
    model = Layer(0.02 if rank == SLOW else 0.01)
    shard(model, [], groups.weights)
    pipeline = Pipeline(model, lambda y, _: y.square().mean())
    stopwatch = pipeline.stopwatch = Stopwatch(CPU)
    stragglers = Stragglers(groups, hosts, pct=40, every=2)
    found, busy, start = [], 0.0, time.monotonic()
    for _ in range(steps):
        pipeline.step((Microbatch(torch.ones(1, 8)) for _ in range(2)), 2)
        seconds = stopwatch.take()
        busy += seconds
        with byte_log() as log:
            found.append(stragglers.step_done(seconds))
        assert sum(sent.bytes for sent in log) == (0 if found[-1] is None else 3 * 8)
    return found, busy / steps, (time.monotonic() - start) / steps


def test_names_the_rank_that_computes_longer_and_none_that_waits_for_it() -> None:
    results = run_distributed(train, 4, 7)
    found = results[0][0]
    assert all(other[0] == found for other in results)
    # Step 1 is not counted. The look after steps 2 and 3 names nobody yet.
    assert [one if one is None else len(one) for one in found] == [None, None, 0, None, 1, None, 1]
    (slow,) = found[-1] or []
    assert slow.rank == SLOW and slow.stage == 0 and slow.seconds > 1.4 * slow.median
    for rank, (_, busy, wall) in enumerate(results):
        assert 0.95 * (0.08 if rank == SLOW else 0.04) < busy < wall  # 2 microbatches, 2 passes


def groups_of(**degrees: int) -> Groups:
    """Make groups that are only looked at."""
    from swipe.collectives import ALONE

    return Groups(ParallelDims(**degrees), 0, ALONE, ALONE, ALONE, ALONE, (ALONE, ALONE), None)


def times(*seconds: float) -> torch.Tensor:
    return torch.tensor(seconds, dtype=torch.float64)


def test_compares_within_a_stage() -> None:
    stragglers = Stragglers(groups_of(dp=2, pp=2), ["a", "a", "b", "b"], pct=8, every=1)
    assert stragglers.compare(times(1.0, 3.0, 1.05, 3.1)) == []
    (slow,) = stragglers.compare(times(1.0, 3.0, 1.0, 3.3))
    assert slow == Slow(3, "b", 1, 3.3, 3.0)
    assert str(slow) == "rank 3 (b) 3.3 s a step, 3 s is the median of stage 1 (+10%)"
    assert [one.rank for one in stragglers.compare(times(1.2, 3.0, 1.0, 6.0))] == [3, 0]


def test_knows_every_ranks_stage_on_any_mesh() -> None:
    dims = {"dp": 2, "wp_y": 2, "wp_x": 3, "pp": 4, "sp": 3}
    groups = groups_of(**dims)
    stages = [groups.dims.coordinate(rank).pp for rank in range(groups.dims.world)]
    stragglers = Stragglers(groups, [f"n{rank}" for rank in range(groups.dims.world)], pct=8, every=1)
    seconds = times(*(1.0 + stage for stage in stages))
    assert stragglers.compare(seconds) == []
    for rank, stage in enumerate(stages):
        one = seconds.clone()
        one[rank] *= 1.5
        assert stragglers.compare(one) == [Slow(rank, f"n{rank}", stage, 1.5 * (1 + stage), 1.0 + stage)]


def test_never_looks_if_asked_not_to_or_alone() -> None:
    assert Stragglers(groups_of(dp=2), ["a", "a"], pct=0, every=1).step_done(1.0) is None
    assert [Stragglers(groups_of(), ["a"], pct=8, every=1).step_done(1.0) for _ in range(3)] == [None] * 3


def test_one_line_names_few() -> None:
    slow = [Slow(rank, "n", 0, 2.0, 1.0) for rank in range(10_000)]
    assert named(slow).endswith("; and 9996 more") and len(named(slow)) < 400
    assert named(slow[:1]).count("rank") == 1 and "more" not in named(slow[:1])


def test_waiting_is_not_computing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1000")
    stopwatch = Stopwatch(CPU)
    with stopwatch.computing():
        time.sleep(0.2)
    assert stopwatch.take() < 0.1
    with stopwatch.computing():
        spin(0.05)
    with stopwatch.computing(waits=True):
        spin(0.05)
    spin(0.05)
    assert 0.1 <= stopwatch.take() < 0.15
    assert stopwatch.take() == 0


def test_a_thread_without_a_core_is_slow_unless_the_ranks_take_the_cores_from_each_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1000")
    assert crowded()
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(1000)), raising=False)
    assert not crowded()
    monkeypatch.setattr(Path, "read_text", lambda path: "5 3000000000 7")
    assert runnable_s(only_ran=False) - runnable_s(only_ran=True) == pytest.approx(3.0, abs=0.1)
    monkeypatch.setattr(Path, "read_text", lambda path: "")
    assert runnable_s(only_ran=False) == pytest.approx(runnable_s(only_ran=True), abs=0.1)


class FakeEvent:
    """An event of a device whose clock is a number."""

    now = 0.0
    through = 0.0  # what the device has done
    made = 0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing
        FakeEvent.made += 1

    def record(self) -> None:
        self.at = FakeEvent.now

    def query(self) -> bool:
        return self.at <= FakeEvent.through

    def elapsed_time(self, other: "FakeEvent") -> float:
        return 1000 * (other.at - self.at)


def test_events_of_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.xpu, "Event", FakeEvent)
    stopwatch = Stopwatch(torch.device("xpu:0"))
    for waits in (False, True, False):
        with stopwatch.computing(waits):
            FakeEvent.now += 2.0
        FakeEvent.now += 1.0
    assert stopwatch.take() == 0
    FakeEvent.through = 3.0  # nothing is waited for: the second one counts next time
    assert [stopwatch.take(), stopwatch.take()] == [2.0, 0.0]
    FakeEvent.through = FakeEvent.now
    assert [stopwatch.take(), stopwatch.take()] == [2.0, 0.0]
    made = FakeEvent.made
    off = Stopwatch(torch.device("xpu:0"), on=False)
    with off.computing(), off.computing(waits=True):
        FakeEvent.now += 2.0
    assert off.take() == 0 and FakeEvent.made == made == 4


@pytest.mark.parametrize(
    ("degrees", "pct", "on"), [({"dp": 2}, 8, True), ({"dp": 2}, 0, False), ({}, 8, False)]
)
def test_nothing_is_measured_where_nothing_is_compared(
    degrees: dict[str, int], pct: float, on: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1000")
    monkeypatch.setattr("aeris.guards.host_names", lambda group: [])
    guards = Guards(tmp_path)
    guards.join(groups_of(**degrees), CPU, FaultConfig(slow_pct=pct))
    with guards.stopwatch.computing():
        spin(0.02)
    assert (guards.stopwatch.take() > 0) == on
