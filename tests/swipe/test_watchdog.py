"""The watchdog: who is named when nothing goes on, and that nobody is while all goes well."""

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import ClassVar

import pytest
import torch
import torch.distributed as dist

import swipe.watchdog
from swipe import inquiry
from swipe.collectives import Group, all_reduce, tell, waiting
from swipe.inquiry import State, conclude, ranges
from swipe.watchdog import Watchdog, flight_recorders
from tests.harness import run_distributed

LIMITS = {"start": 20.0, "read": 0.8, "step": 0.8, "save": 0.8}
WORLD = 4


def watched(directory: str, limits: dict[str, float], address: str = "127.0.0.1") -> Watchdog:
    """Let the ranks meet in a store as in a run, and watch this one; what is said goes to a file."""
    inquiry.PATIENCE_S = 0.6
    rank, world = dist.get_rank(), dist.get_world_size()
    port = 0
    if rank == 0:
        watched.store = dist.TCPStore(address, 0, world, True, wait_for_workers=False)
        port = watched.store.port
    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = address, str(tell(everyone(), port))

    def say(line: str) -> None:
        with Path(directory, "said").open("a") as file:
            file.write(line + "\n")

    hosts = [f"machine{rank // 2}" for rank in range(world)]
    return Watchdog(limits, rank, world, Path(directory, "faults"), say, 76, hosts)


def everyone() -> Group:
    world = dist.get_world_size()
    return Group("all ranks", tuple(range(world)), dist.get_rank(), dist.group.WORLD)


def samples(rank: int, stuck: int):
    for number in range(10):
        if rank == stuck and number == 2:
            read_from_a_dead_disk()
        yield number


def read_from_a_dead_disk() -> None:
    time.sleep(60)


def one_hangs(directory: str, how: str) -> None:
    rank = dist.get_rank()
    limits = LIMITS | ({"read": 0.5} if how == "reading" else {})
    watchdog = watched(directory, limits)
    for number in watchdog.reading(samples(rank, stuck=2 if how == "reading" else -1)):
        if number == 1:
            watchdog.phase("step")
        if number == 3 and rank == 2 and how == "stopped":
            os.kill(os.getpid(), signal.SIGSTOP)
        if number == 3 and rank == 2 and how == "computing":
            with waiting("pass 0F3 of the pipeline", computes=True):
                read_from_a_dead_disk()
        if number == 3 and rank == 1 and how == "parted":
            wait_for_nobody()
        all_reduce(torch.zeros(1), everyone(), "loss")
    time.sleep(60)


def wait_for_nobody() -> None:
    with waiting("all-to-all of q over sp"):
        dist.recv(torch.zeros(1), 3, tag=9)


def report_of(directory: Path, how: str) -> tuple[str, dict]:
    """Run four ranks of which one hangs; return the line that was said, and the file."""
    with pytest.raises(AssertionError, match="died with 76"):
        run_distributed(one_hangs, WORLD, str(directory), how, timeout_s=20)
    (line,) = (directory / "said").read_text().splitlines()  # once
    return line, json.loads((directory / "faults" / "late.json").read_text())


@pytest.mark.parametrize(("how", "doing"), [("reading", "reading samples"), ("computing", "pass 0F3")])
def test_names_the_rank_that_is_late_and_what_it_does(tmp_path: Path, how: str, doing: str) -> None:
    line, report = report_of(tmp_path, how)
    assert f"rank 2 ({os.uname().nodename.split('.')[0]}) is late: {doing}" in line
    assert "in read_from_a_dead_disk" in line
    assert "ranks 0-1, 3 wait in sum of loss over all ranks" in line
    assert [one["rank"] for one in report["late"]] == [2] and not report["silent"]
    stacks = (tmp_path / "faults" / "late_2.txt").read_text()
    assert "read_from_a_dead_disk" in stacks
    assert (tmp_path / "faults" / "late_0.txt").exists()  # one of those that wait
    assert not (tmp_path / "faults" / "late_1.txt").exists()


def test_names_the_rank_that_does_not_answer(tmp_path: Path) -> None:
    line, report = report_of(tmp_path, "stopped")
    assert "rank 2 (machine1) does not answer: stopped, or the machine is gone" in line
    assert "ranks 0-1, 3 wait in sum of loss" in line and "is late" not in line
    assert report["silent"] == [{"rank": 2, "host": "machine1"}]


def test_names_the_rank_that_waits_elsewhere(tmp_path: Path) -> None:
    line, report = report_of(tmp_path, "parted")
    assert line.index("rank 1 waits in all-to-all of q over sp") < line.index("ranks 0, 2-3 wait in sum of")
    assert "no rank is late" in line and not report["late"]
    assert report["waiting"][0]["ranks"] == "1"


def long_but_within_limits(directory: str) -> float:
    """Rank 1 saves for longer than a step may take, then reads as long; steps are short."""
    rank = dist.get_rank()
    watchdog = watched(directory, {"start": 9, "read": 5, "step": 0.5, "save": 5})

    def slow():
        for number in range(3):
            time.sleep(1.0 if rank == 1 and number == 1 else 0.0)
            yield number

    with watchdog:
        watchdog.phase("save")
        time.sleep(1.2 if rank == 1 else 0.0)
        watchdog.phase("step")
        for _ in watchdog.reading(slow()):
            all_reduce(torch.zeros(1), everyone(), "loss")
            time.sleep(0.3)
            watchdog.phase("step")
    return 1.0


def test_who_waits_for_a_rank_within_its_own_limit_goes_on(tmp_path: Path) -> None:
    assert run_distributed(long_but_within_limits, WORLD, str(tmp_path)) == [1.0] * WORLD
    assert not (tmp_path / "said").exists()


def phases_during_an_inquiry(directory: str) -> float:
    """Rank 0 waits and asks; rank 1 begins new phases and looks in each; rank 2 looks only much later."""
    rank = dist.get_rank()
    watchdog = watched(directory, {"start": 9, "read": 5, "step": 0.5, "save": 5})  # quiet for 0.05 s
    inquiry.PATIENCE_S = 3.0
    with watchdog:
        watchdog.phase("step")
        end = time.monotonic() + 1.2
        while rank and time.monotonic() < end:
            watchdog.phase("save")
            time.sleep(0.2 if rank == 1 else 0.02)
        watchdog.phase("save")
        time.sleep(0.4 if rank else 0.0)
        watchdog.phase("step")
        all_reduce(torch.zeros(1), everyone(), "loss")
    return 1.0


def test_a_rank_answers_an_inquiry_once_however_many_phases_it_begins(tmp_path: Path) -> None:
    assert run_distributed(phases_during_an_inquiry, 3, str(tmp_path)) == [1.0] * 3
    assert not (tmp_path / "said").exists()


class Looked:
    """In place of an inquiry: when it was made, and when it was looked at."""

    made: ClassVar[list[float]] = []
    looks: ClassVar[list[float]] = []

    def __init__(self, *arguments: object) -> None:
        Looked.made.append(time.monotonic())

    def take_part(self, *arguments: object) -> None:
        Looked.looks.append(time.monotonic())


def test_ranks_look_one_after_the_other_over_one_connection(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(swipe.watchdog, "Inquiry", Looked)
    monkeypatch.setattr(swipe.watchdog, "RANKS_PER_S", 10)  # so that 4 ranks look every 0.4 s
    limits = dict.fromkeys(("start", "read", "step", "save"), 1.0)  # quiet for 0.1 s
    with Watchdog(limits, 3, 4, tmp_path, print, 76) as watchdog:
        begun = [time.monotonic()]
        time.sleep(0.9)  # looks after 0.4 and 0.8 s
        watchdog.phase("save")
        begun.append(time.monotonic())
        for _ in range(8):  # a new clock, but no new phase
            time.sleep(0.08)
            watchdog.tick()
    first, second, third = Looked.looks
    assert len(Looked.made) == 1 and second - first >= 0.38
    for start, look in zip(begun, (first, third)):
        assert 0.35 <= look - start < 0.75  # the clock begins a moment before `start` or after it


def first_rank_stopped(directory: str) -> None:
    watchdog = watched(directory, LIMITS)
    watchdog.phase("step")
    all_reduce(torch.zeros(1), everyone(), "loss")
    if dist.get_rank() == 0:
        os.kill(os.getpid(), signal.SIGSTOP)
    all_reduce(torch.zeros(1), everyone(), "loss")


def test_says_so_when_the_place_to_meet_is_gone(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="died with 76"):
        run_distributed(first_rank_stopped, 2, str(tmp_path), timeout_s=20)
    line = (tmp_path / "said").read_text()
    assert "nothing answers at 127.0.0.1:" in line
    assert "rank 0 (machine0) does not answer: stopped, or the machine is gone" in line
    assert "rank 1 waits in sum of loss" in line


def alone(directory: str) -> None:
    watchdog = watched(directory, LIMITS)
    watchdog.phase("save")
    read_from_a_dead_disk()


def test_one_process_is_watched_too(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="died with 76"):
        run_distributed(alone, 1, str(tmp_path), timeout_s=20)
    assert "is late: computing, at" in (tmp_path / "said").read_text()


def test_a_full_disk_does_not_keep_it_from_ending(tmp_path: Path) -> None:
    (tmp_path / "faults").write_text("a file where a directory should be")
    with pytest.raises(AssertionError, match="died with 76"):
        run_distributed(alone, 1, str(tmp_path), timeout_s=20)
    assert (tmp_path / "said").exists()


def stopped_together(directory: str) -> float:
    """Stop all ranks for longer than any limit, as a batch system may: nobody is late."""
    watchdog = watched(directory, {"start": 9, "read": 1, "step": 1, "save": 1})
    watchdog.phase("step")
    with watchdog:
        time.sleep(0.3)
        if os.fork() == 0:  # a child wakes this rank up
            time.sleep(2.5)
            os.kill(os.getppid(), signal.SIGCONT)
            os._exit(0)
        os.kill(os.getpid(), signal.SIGSTOP)
        os.wait()
        time.sleep(0.3)
        all_reduce(torch.zeros(1), everyone(), "loss")
    return 1.0


def test_time_in_which_the_process_stood_still_does_not_count(tmp_path: Path) -> None:
    assert run_distributed(stopped_together, 2, str(tmp_path), timeout_s=20) == [1.0, 1.0]
    assert not (tmp_path / "said").exists()


def state(rank: int, doing: str = "sum", age: float = 11, waits: bool = True, busy: float = 11) -> State:
    return State(rank, f"n{rank}", "step", 10.0, age, doing, busy, waits)


def test_judgement() -> None:
    hosts = ["a", "b", "c"]
    busy = state(2, "pass", age=9, waits=False, busy=9)
    assert conclude([state(0), state(1), busy], 3, 1, hosts) is None  # who is waited for has a second left
    assert conclude([state(0), state(1, busy=0.1), busy], 3, 1, hosts) is None
    assert conclude([state(0), state(1, age=8, busy=0.5)], 2, 1, hosts) is None  # goes on in small pieces
    found = conclude(
        [state(0), state(1, busy=0.5)], 2, 1, hosts
    )  # but for longer than the limit on every rank
    assert found is not None and "no rank is late" in found.line
    found = conclude([state(0), state(1), state(2, "pass", waits=False)], 3, 1, hosts)
    assert found is not None and [one.rank for one in found.late] == [2]
    # In short pieces between waiting, but all are over: whoever computes now is named.
    found = conclude([state(0), state(1), state(2, "pass", waits=False, busy=1)], 3, 1, hosts)
    assert found is not None and [one.rank for one in found.late] == [2]
    found = conclude([state(0), state(2)], 3, 1, [])
    assert found is not None and found.silent == [(1, "machine unknown")]


def test_a_report_of_very_many_ranks_is_small() -> None:
    world = 120_960
    states = [state(rank, f"message {rank % 500} (rank {rank + 1})") for rank in range(0, world, 2)]
    states += [state(1, "reading", waits=False)]
    report = conclude(states, world, 1, ["host"] * world)
    assert report is not None and len(report.line) < 1500 and len(report.dump) < 80
    data = report.data()
    assert len(json.dumps(data)) < 100_000 and data["silent_count"] == world // 2 - 1


def test_ranks_in_one_operation_with_different_peers_are_named_together() -> None:
    hosts = ["n"] * 4
    waiting = [state(rank, f"half-window shift (ranks {rank + 1}, {rank + 2})") for rank in range(3)]
    report = conclude([*waiting, state(3, "reading", waits=False)], 4, 1, hosts)
    assert report is not None and "; ranks 0-2 wait in half-window shift, for 11 s" in report.line
    report = conclude([waiting[0], state(1), state(2)], 3, 1, hosts)
    assert report is not None and "rank 0 waits in half-window shift (ranks 1, 2), for 11 s" in report.line


def test_an_inquiry_whose_asker_vanishes_and_one_of_another_attempt(monkeypatch: pytest.MonkeyPatch) -> None:
    store = dist.TCPStore("127.0.0.1", 0, 2, True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    monkeypatch.setattr(inquiry, "PATIENCE_S", 0.3)
    stuck = state(0)
    asker = inquiry.Inquiry(0, 2, 0.01, 0.01)
    found = asker.take_part(lambda: stuck, True, ["a", "b"])
    assert found is not None and found.silent == [(1, "b")] and found.mine
    other = inquiry.Inquiry(1, 2, 0.01, 0.01)  # wakes up, answers late and learns the verdict
    theirs = other.take_part(lambda: state(1), False, [])
    assert theirs is not None and theirs.dump == found.dump and not theirs.mine and theirs.asked == 1
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    anew = inquiry.Inquiry(1, 2, 0.01, 0.01)
    assert anew.take_part(lambda: stuck, False, []) is None
    store.add("watchdog/1/1/claims", 1)  # by a rank that dies now
    with pytest.raises(inquiry.Unreachable, match="has vanished"):
        for _ in range(1000):
            assert anew.take_part(lambda: stuck, True, []) is None
            time.sleep(0.01)


def test_an_inquiry_is_over_when_every_rank_has_answered_not_when_there_are_as_many_answers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store = dist.TCPStore("127.0.0.1", 0, 2, True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    monkeypatch.setattr(inquiry, "PATIENCE_S", 3.0)
    asker, other, *anew = (inquiry.Inquiry(rank, 3, 0.01, 0.01) for rank in (0, 1, 2, 1))
    found: list[object] = []
    asking = threading.Thread(target=lambda: found.append(asker.take_part(lambda: state(0), True, [])))
    asking.start()
    while not store.add("watchdog/newest", 0) and not store.add("watchdog/0/newest", 0):
        time.sleep(0.001)
    busy = state(1, age=1, waits=False, busy=1)
    for _ in range(3):  # a new phase each: it has answered
        assert other.take_part(lambda: busy, False, []) is None
    assert store.add("watchdog/0/1/count", 0) == 2
    assert anew[1].take_part(lambda: busy, False, []) is None  # rank 1 again, as one that knows of nothing
    time.sleep(0.1)
    assert asking.is_alive() and not store.check(["watchdog/0/1/verdict"])
    assert anew[0].take_part(lambda: state(2, age=1), False, []) is None
    asking.join()
    assert found == [None] and store.get("watchdog/0/1/verdict") == b"go on"


def test_a_connection_that_has_broken_is_made_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    store = dist.TCPStore("127.0.0.1", 0, 2, True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    asker = inquiry.Inquiry(0, 2, 0.01, 0.01)

    class Broken:
        def add(self, *arguments: object) -> None:
            raise RuntimeError("Broken pipe")

    asker._store = Broken()
    assert asker.take_part(lambda: state(0), False, []) is None
    assert not isinstance(asker._store, Broken)


def test_ranges() -> None:
    assert ranges([0, 1, 2, 5]) == "0-2, 5"
    assert ranges([0, 2, 4, 6, 8, 9]) == "0, 2, 4, 6 and 2 more"


def recorded() -> list[str]:
    all_reduce(torch.zeros(1), everyone(), "loss")
    return sorted(flight_recorders())


def test_flight_recorder() -> None:
    assert run_distributed(recorded, 2) == [["flight"], ["flight"]]


if sys.platform != "linux":
    pytest.skip("signals and schedules of Linux", allow_module_level=True)
