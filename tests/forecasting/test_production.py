"""Forecasting at length: thinned output, ragged portions over replicas, stops, full disks, and what is said.

Networks of one line on the made-up store of test_rollout; a few ranks where that is the point.
"""

from __future__ import annotations

import errno
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from aeris.data.forecast_members import MemberWriter, read_progress
from aeris.data.forecasts import ForecastError, ForecastPlan, ForecastWriter, open_forecast
from aeris.data.statistics import Statistics
from aeris.forecasting.ensemble import Ensemble
from aeris.forecasting.portions import Timeline, choose_batch, deal, look, share_out
from aeris.forecasting.rollout import Forecaster, rollout
from aeris.forecasting.throughput import KINDS, Throughput, in_words
from aeris.forecasting.writer_thread import WriterThread
from aeris.interruption import Requests, Stopped
from benchmarks import forecast as bench
from swipe.collectives import AgreedError
from swipe.groups import make_groups
from swipe.layout import WindowLayout
from swipe.mesh import ParallelDims
from swipe.windows import WindowGrid, WindowShard
from tests.forecasting.test_rollout import EULER, NAMES, ToyStore, make, pointwise
from tests.harness import run_distributed


def mixing(x_BNTC: torch.Tensor, t_B: torch.Tensor) -> torch.Tensor:
    """A network whose bits depend on who is computed together."""
    return pointwise(x_BNTC, t_B) + 1e-6 * x_BNTC[..., :3].mean() * len(t_B)


def plan_of(
    members: int = 3, lead_h: tuple[int, ...] = (6, 12, 18, 24), names: tuple[str, ...] = NAMES
) -> ForecastPlan:
    store = ToyStore()
    return ForecastPlan(
        inits=tuple(str(time) for time in store.times),
        lead_h=lead_h,
        members=members,
        names=names,
        latitude_deg=tuple(store.latitude_deg.tolist()),
        longitude_deg=tuple(store.longitude_deg.tolist()),
        made={"seed": 3},
        about={},
    )


def ensemble(path: Path, plan: ForecastPlan, batch: int = 2, network=mixing, **settings: object) -> Ensemble:
    """An ensemble on the ranks there are, replicas only."""
    requests = settings.pop("requests", None)
    if dist.is_initialized():
        dims = ParallelDims(dp=dist.get_world_size())
        settings["groups"] = make_groups(dims, dist.get_rank(), torch.device("cpu"))
    forecaster = make(network, **settings)
    lead = forecaster.groups.rank == 0
    return Ensemble(forecaster, plan, ForecastWriter(path, plan) if lead else None, batch, requests)  # type: ignore[arg-type]


def fields(path: Path) -> np.ndarray:
    forecast = open_forecast(path)
    return np.stack(
        [[forecast.read(i, j) for j in range(len(forecast.lead_h))] for i in range(len(forecast.inits))]
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    """Everything, on one process: [I, J, M, C, Y, X]."""
    path = tmp_path_factory.mktemp("whole") / "f.zarr"
    ensemble(path, plan_of()).run()
    return fields(path)


def test_portions_are_shared_out_and_dealt() -> None:
    assert share_out(range(4, 12), 3) == [range(4, 7), range(7, 10), range(10, 12)]
    assert share_out(range(2), 3) == [range(1), range(1, 2), range(2, 2)]
    assert deal([4, 4, 4, 1, 4], 3) == [[0, 3], [1, 4], [2]]
    timeline = Timeline([4, 4, 4, 1, 4], 3)
    assert timeline.ticks == 8
    assert timeline.at(0) == timeline.beginning(0) == {0: 0, 1: 1, 2: 2}
    assert timeline.at(4) == timeline.beginning(4) == {0: 3, 1: 4}
    assert (timeline.at(7), timeline.beginning(7)) == ({1: 4}, {})
    seen = [portion for tick in range(8) for portion in timeline.at(tick).values()]
    assert [seen.count(portion) for portion in range(5)] == [4, 4, 4, 1, 4]
    assert sorted(portion for tick in range(8) for portion in timeline.beginning(tick).values()) == [
        *range(5)
    ]


def test_a_batch_is_chosen_that_leaves_few_replicas_idle() -> None:
    sizes = {case: choose_batch(*case) for case in [(1, 8, 1), (1, 8, 4), (1, 8, 3), (2, 5, 1), (1, 1, 8)]}
    assert list(sizes.values()) == [4, 2, 3, 4, 1]


def test_thinned_output_is_a_part_of_the_whole_and_goes_on_from_states(
    whole: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after each write in turn, between the fields and the note that they are there."""
    plan, path = plan_of(lead_h=(12, 24), names=("z500",)), tmp_path / "f.zarr"
    note, left = MemberWriter._note, [0]

    def dying(self: MemberWriter, *args: object) -> None:
        if not left[0]:
            raise RuntimeError("killed")
        left[0] -= 1
        note(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(MemberWriter, "_note", dying)
    for _ in range(8):  # notes of 2 init times x 2 portions x 2 lead times
        with pytest.raises(RuntimeError, match="killed"):
            ensemble(path, plan).run()
        left[0] = 1
        done_IM = read_progress(tmp_path / "f.zarr.partial")[1]
        states = {file.name for file in (tmp_path / "f.zarr.partial" / "states").glob("*")}
        assert states >= {f"{i}_{m}_{n - 1}.npy" for (i, m), n in np.ndenumerate(done_IM) if 0 < n < 2}
    ensemble(path, plan).run()
    np.testing.assert_array_equal(fields(path)[:, :, :, 0], whole[:, 1::2, :, 1])
    assert [entry.name for entry in tmp_path.iterdir()] == ["f.zarr"]


def test_a_state_that_is_gone_or_cut_off_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, path = plan_of(lead_h=(12, 24), names=("z500",)), tmp_path / "f.zarr"
    requests = Requests(tmp_path)
    monkeypatch.setattr(requests, "wishes", lambda: (float(one.throughput.steps >= 4), 0.0))
    one = ensemble(path, plan, requests=requests)
    with pytest.raises(Stopped, match=r"after a step, everything written \(4 of 24 steps of a member"):
        one.run()
    state = tmp_path / "f.zarr.partial" / "states" / "0_1_0.npy"
    state.write_bytes(state.read_bytes()[:-1])
    with pytest.raises(ForecastError, match=r"0_1_0\.npy, from which member 1 would go on, .*--overwrite"):
        ensemble(path, plan).run()
    state.unlink()
    with pytest.raises(ForecastError, match=r"0_1_0\.npy, .* is missing or damaged"):
        ensemble(path, plan).run()


def test_the_initial_states_are_lead_time_0(whole: np.ndarray, tmp_path: Path) -> None:
    store = ToyStore()
    for plan, path in [
        (plan_of(lead_h=(0, 24)), tmp_path / "f.zarr"),
        (plan_of(lead_h=(0, 24), names=("t2m",)), tmp_path / "thin.zarr"),
    ]:
        ensemble(path, plan).run()
        count = len(plan.names)
        got = fields(path)
        np.testing.assert_array_equal(got[:, 1], whole[:, 3, :, :count])
        expected = np.where(store.mask_CYX, store.fields, np.nan)[:, None, :count]
        np.testing.assert_array_equal(got[:, 0], np.broadcast_to(expected, got[:, 0].shape))


def on_ranks(path: str, members: int) -> tuple[int, float]:
    evaluations: list[int] = []
    one = ensemble(Path(path), plan_of(members))
    one.run(evaluations.append)
    return sum(evaluations), sum(one.throughput.shares(one.groups.world).values())


@pytest.mark.parametrize(("world", "members"), [(2, 3), (4, 3), (3, 5)])
def test_any_number_of_replicas_makes_the_same_bits(
    world: int, members: int, whole: np.ndarray, tmp_path: Path
) -> None:
    """2 init times x 2 or 3 portions: the last round leaves replicas without one."""
    got = run_distributed(on_ranks, world, str(tmp_path / "f.zarr"), members)
    assert [evaluations for evaluations, _ in got] == [3 * 2 * members * 4] * world
    assert all(shares == pytest.approx(1.0, abs=0.01) for _, shares in got)
    if members != 3:
        ensemble(tmp_path / "one.zarr", plan_of(members)).run()
        whole = fields(tmp_path / "one.zarr")
    np.testing.assert_array_equal(fields(tmp_path / "f.zarr"), whole)


def full_disk(path: str) -> tuple[str, bool]:
    """Let the disk be full for replica 1 in its second write; return what this rank says."""
    if dist.get_rank() == 1:
        write, left = MemberWriter.write, [1]

        def failing(self: MemberWriter, *args: object) -> None:
            left[0] -= 1
            if left[0] < 0:
                raise OSError(errno.ENOSPC, "No space left on device", "f.zarr")
            write(self, *args)  # type: ignore[arg-type]

        MemberWriter.write = failing  # type: ignore[method-assign]
    try:
        ensemble(Path(path), plan_of()).run()
    except AgreedError as error:
        return str(error), error.of_a_file
    return "none", False


def stopped_by_a_signal(path: str) -> str:
    """Send SIGTERM to rank 1 alone, in its fifth evaluation: in the second step."""
    calls: list[int] = []

    def network(x_BNTC: torch.Tensor, t_B: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 5 and dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
            while not requests.wishes()[0]:
                pass
        return mixing(x_BNTC, t_B)

    with Requests(Path(path).parent, lead=dist.get_rank() == 0) as requests:
        requests.begin()
        try:
            ensemble(Path(path), plan_of(), network=network, requests=requests).run()
        except Stopped as error:
            return str(error)
    return "none"


def test_a_full_disk_and_a_signal_of_one_rank_stop_all_and_it_goes_on(
    whole: np.ndarray, tmp_path: Path
) -> None:
    path = tmp_path / "f.zarr"
    assert set(run_distributed(full_disk, 2, str(path))) == {
        ("[Errno 28] No space left on device: 'f.zarr'", True)
    }
    first = read_progress(tmp_path / "f.zarr.partial")[1]
    assert first[0, 2] == 1 and first.max() <= 4
    said = run_distributed(stopped_by_a_signal, 2, str(path))
    assert "stopped by SIGTERM after a step" in said[1] and "a signal to another rank" in said[0]
    second = read_progress(tmp_path / "f.zarr.partial")[1]
    assert (second >= first).all() and second.sum() > first.sum() and not path.exists()
    ensemble(path, plan_of()).run()
    np.testing.assert_array_equal(fields(path), whole)


class Shifted:
    """Stands in for a perturbation: member i starts 10 i warmer, and it takes a step to find that out."""

    def steps(self, members: int) -> int:
        return members

    def states(self, x_NTC: torch.Tensor, init: np.datetime64, members: range, step) -> torch.Tensor:
        x_BNTC = x_NTC.expand(len(members), -1, -1, -1).clone()
        step(x_BNTC, init, 1, members)
        x_BNTC[..., 0] += 10 * torch.tensor([*members]).view(-1, 1, 1)
        return x_BNTC


class Held:
    """Stands in for a boundary: the first channel stays as it was."""

    needs_start = True

    def apply(self, x_BNTC: torch.Tensor, init: np.datetime64, lead_h: int, start_BNTC: torch.Tensor):
        return torch.cat([start_BNTC[..., :1], x_BNTC[..., 1:]], dim=-1)


def test_perturbed_starts_and_boundary_fields_are_the_same_after_a_stop(tmp_path: Path) -> None:
    def go(path: Path, until: int) -> int:
        requests, made = Requests(tmp_path), []
        one = ensemble(path, plan_of(), requests=requests, perturbation=Shifted(), boundary=Held())
        requests.wishes = lambda: (float(one.throughput.steps >= until), 0.0)  # type: ignore[method-assign]
        left = one.evaluations_left
        try:
            one.run(made.append)
        except Stopped:
            return left
        assert sum(made) == left
        return left

    assert go(tmp_path / "whole.zarr", 99) == 3 * (2 * 3 * 4 + 2 * 3)
    go(tmp_path / "f.zarr", 6)  # three steps of the first two members
    assert go(tmp_path / "f.zarr", 99) == 3 * (2 * 3 * 4 - 6 + 2 * 3)
    got = fields(tmp_path / "f.zarr")
    np.testing.assert_array_equal(got, fields(tmp_path / "whole.zarr"))
    start = ToyStore().fields[:, None, None, 0] + 10 * np.arange(3, dtype=np.float32)[:, None, None]
    np.testing.assert_array_equal(got[:, :, :, 0], np.broadcast_to(start, got[:, :, :, 0].shape))


def test_a_model_of_24_hours(tmp_path: Path) -> None:
    store = ToyStore()
    old = store.statistics
    store.statistics = Statistics(
        old.mean_C, old.std_C, {24: old.residual_mean[6]}, {24: old.residual_std[6]}, old.train_period
    )
    layout = WindowLayout(WindowShard.full(WindowGrid(4, 8, 2)))
    forecaster = Forecaster(pointwise, layout, store, 24, EULER)  # type: ignore[arg-type]
    plan = plan_of(2, (48, 96))
    Ensemble(forecaster, plan, ForecastWriter(tmp_path / "f.zarr", plan), 2).run()
    steps = dict(rollout(forecaster, store.times[1], range(2), 96))
    assert [*steps] == [24, 48, 72, 96]
    kept = np.stack([layout.from_windows(steps[lead_h]).numpy() for lead_h in (48, 96)])
    np.testing.assert_array_equal(fields(tmp_path / "f.zarr")[1], np.where(store.mask_CYX, kept, np.nan))


def test_two_programs_at_once_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "f.zarr"
    one, two = ForecastWriter(path, plan_of()), ForecastWriter(path, plan_of())
    one.begin()
    with pytest.raises(ForecastError, match="another program is making"):
        two.begin()
    one.release()
    two.begin()


def test_portions_of_members_that_differ_are_cut(tmp_path: Path) -> None:
    """As after a stop with another batch: every portion has one state of progress."""
    writer = ForecastWriter(tmp_path / "f.zarr", plan_of(5))
    shape = (3, 4, 8)
    for members, leads in [(range(1), 4), (range(1, 2), 1), (range(3, 5), 2)]:
        for lead in range(leads):
            writer.write(0, members, lead, np.zeros((len(members), *shape), dtype=np.float32))
    portions = look(writer, 4).portions
    assert [(portion.init, portion.members, portion.done) for portion in portions if portion.init == 0] == [
        (0, range(1, 2), 1),
        (0, range(2, 3), 0),
        (0, range(3, 5), 2),
    ]
    assert [portion.members for portion in portions if portion.init == 1] == [range(3), range(3, 5)]


def test_jobs_in_the_background_keep_their_order_and_end_at_the_first_failure() -> None:
    done: list[int] = []

    def job(number: int) -> None:
        if number == 3:
            raise OSError("full")
        done.append(number)

    writer_thread = WriterThread(room=1)
    for number in range(6):
        writer_thread.do(lambda number=number: job(number))
    with pytest.raises(OSError, match="full"):
        writer_thread.close()
    writer_thread.stop()
    assert done == [0, 1, 2]


def test_time_spent_inside_of_other_time_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("aeris.forecasting.throughput.time.perf_counter", lambda: now[0])
    account = Throughput(torch.device("cpu"), 6)
    account.begin()
    with account.spending("reading"):
        now[0] += 1
        with account.spending("network"):
            now[0] += 6
        now[0] += 1
    account.spent("waiting", 1.0)
    account.steps, now[0] = 20, 10.0
    shares = account.shares()
    assert shares == pytest.approx(
        {"network": 0.6, "reading": 0.2, "writing": 0, "waiting": 0.1, "rest": 0.1}
    )
    assert in_words(shares) == "network 60%, reading 20%, waiting 10%, rest 10%"
    assert account.member_days_per_h == pytest.approx(5 * 360)


def test_the_benchmark_counts_what_a_forecast_does(tmp_path: Path) -> None:
    options = bench.Options(batches=(1, 2), members=2, steps=1, levels=2, directory=tmp_path)
    rows = bench.measure(torch.device("cpu"), options)
    assert [(row["layout"], row["batch"]) for row in rows] == [("1 rank", 1), ("1 rank", 2)]
    for row in rows:
        assert sum(row[kind] for kind in (*KINDS, "rest")) == pytest.approx(1.0, abs=0.01)
        assert row["member_days_per_h"] * row["seconds"] == pytest.approx(0.5 * 3600)
        assert row["evaluations_per_s"] * row["seconds"] == pytest.approx(2 * 2)
    assert not list(tmp_path.iterdir())
    bench.draw(rows, tmp_path / "rows.png", "title")
    config = bench.configuration(options)
    shapes = [(one.dp, one.wp_y, one.wp_x) for one in bench.parallels(bench.Options(), config, 4)]
    assert shapes == [(4, 1, 1), (1, 2, 2)]
    with pytest.raises(ValueError, match="--model 7b is no preset"):
        bench.configuration(bench.Options(model="7b"))
