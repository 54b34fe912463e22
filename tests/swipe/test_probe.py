"""What the preflight measures on a rank: plausible rates on CPU, and wrong data noticed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from swipe import probe
from swipe.collectives import CommunicationError, Group
from tests.harness import run_distributed

CPU = torch.device("cpu")


def test_rates_are_those_of_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock of ours: work over time, the first run left out, the best of the others taken."""
    took = iter([100.0, 0.5, 0.25, 1.0])
    now = [0.0]

    def work(*args: object, **how: object) -> None:
        now[0] += next(took)

    monkeypatch.setattr(probe.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(probe, "_TRIES_S", 1.7)
    monkeypatch.setattr(torch, "mm", work)
    assert probe.gemm_flops(CPU, 1000) == 2e9 / 0.25


def test_a_cpu_has_rates_and_free_memory() -> None:
    """Between those of a pocket calculator and of a rack."""
    assert 1e8 < probe.gemm_flops(CPU) < 1e14
    assert 1e8 < probe.memory_rate(CPU) < 1e13
    assert 2**20 < probe.free_bytes(CPU) < 2**50
    assert probe.host_rates(CPU) is None


def test_a_file_is_read_at_the_place_of_the_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(10 * 1024))
    seeks: list[int] = []
    original = Path.open

    def opened(self: Path, *args: object, **how: object) -> object:
        file = original(self, *args, **how)  # type: ignore[call-overload]
        return Spy(file, seeks)

    monkeypatch.setattr(Path, "open", opened)
    for rank in range(5):
        assert probe.file_rate(path, rank, count=4096) > 0
    assert seeks == [0, 4096, 0, 4096, 0]
    monkeypatch.undo()
    with pytest.raises(FileNotFoundError):
        probe.file_rate(tmp_path / "none", 0)


class Spy:
    """A file that remembers where it was read."""

    def __init__(self, file: object, seeks: list[int]) -> None:
        self.file, self.seeks = file, seeks

    def __enter__(self) -> Spy:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()  # type: ignore[attr-defined]

    def seek(self, place: int) -> None:
        self.seeks.append(place)
        self.file.seek(place)  # type: ignore[attr-defined]

    def __getattr__(self, name: str) -> object:
        return getattr(self.file, name)


def links(stride: int) -> tuple[float, tuple[float, float]]:
    group = Group("all ranks", (0, 1, 2, 3), dist.get_rank())
    return probe.sum_rate(group, CPU), probe.link_rates(group, CPU, stride)


@pytest.mark.parametrize("stride", [1, 2])
def test_links_are_measured_in_both_directions(stride: int) -> None:
    for added, rates in run_distributed(links, 4, stride):
        assert 1e6 < added < 1e12 and all(1e6 < rate < 1e12 for rate in rates)


def disturbed() -> list[str]:
    """Let a sum, then a message, arrive wrong everywhere; return what this rank says."""
    group, said = Group("all ranks", (0, 1), dist.get_rank()), []
    sum_up, send_all = dist.all_reduce, dist.batch_isend_irecv

    def wrong_sum(x: torch.Tensor, *args: object, **how: object) -> None:
        sum_up(x, *args, **how)
        x[3] += 1

    def wrong_batch(ops: list[dist.P2POp]) -> list[object]:
        for work in send_all(ops):
            work.wait()
        ops[1].tensor[5:7] += 1
        return []

    dist.all_reduce, dist.batch_isend_irecv = wrong_sum, wrong_batch
    with pytest.raises(CommunicationError) as error:
        probe.sum_rate(group, CPU)
    said.append(str(error.value))
    with pytest.raises(CommunicationError) as error:
        probe.link_rates(group, CPU, 1)
    dist.all_reduce, dist.batch_isend_irecv = sum_up, send_all
    return [*said, str(error.value)]


def test_wrong_data_are_noticed() -> None:
    for rank, (added, message) in enumerate(run_distributed(disturbed, 2)):
        assert added == "the sum over 2 ranks is wrong: 4 instead of 3, 1 times"
        other = 1 - rank
        assert message == f"the message of rank {other} is wrong: {other + 1} instead of {other}, 2 times"
