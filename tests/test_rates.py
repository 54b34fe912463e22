"""The account of a run: rates now, sustained and peak, with a clock that stands still unless it is moved."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from rich.console import Console

from aeris import log, rates
from aeris.log import TrainingLine
from aeris.rates import Rates, Yardstick, short

# 8 GFLOP an image on 4 devices, a quarter of it repeated, beside a matrix product of 1 TFLOP/s.
YARD = Yardstick(8e9, recomputed_flops=2e9, devices=4, gemm_flops_per_s=1e12)


class Clock:
    """The time, in seconds."""

    now_s = 100.0

    def perf_counter(self) -> float:
        """Tell it."""
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Let rates read a clock of ours."""
    clock = Clock()
    monkeypatch.setattr(rates.time, "perf_counter", clock.perf_counter)
    return clock


class Steps:
    """A run that takes steps of 10 images."""

    def __init__(self, clock: Clock, found: Rates, images_seen: int) -> None:
        self.clock, self.rates, self.seen = clock, found, images_seen

    def take(self, seconds: float, wait_s: float = 0.0, taken: bool = True) -> None:
        """Wait for a sample, compute, and end the step."""

        def slow() -> Iterator[int]:
            self.clock.now_s += wait_s
            yield 1

        next(self.rates.samples(slow()))
        self.clock.now_s += seconds - wait_s
        self.seen += 10
        self.rates.end_step(self.seen, taken)


def test_now_sustained_and_peak(clock: Clock) -> None:
    """By hand: the first step counts for neither, waits and saves count, skipped work does not."""
    steps = Steps(clock, Rates(500, YARD), 500)
    steps.take(50.0)
    first = steps.rates.since_last()
    assert first["images_per_s"] == 0.2 and first["tflops"] == pytest.approx(0.2 * 2e9 / 1e12)
    assert "tflops_peak" not in first and "tflops_sustained" not in first and steps.rates.summary() == ""
    steps.take(2.0, wait_s=0.5)
    clock.now_s += 3.0  # a checkpoint, after the step's record: it belongs to the next one
    steps.take(1.0)
    steps.take(0.5, taken=False)
    found = steps.rates.since_last()
    passed_s = 2.0 + 3.0 + 1.0 + 0.5
    assert found == pytest.approx(
        {
            "images_per_s": 30 / passed_s,
            "step_s": passed_s / 3,
            "data_wait": 0.5 / passed_s,
            "tflops": 20 * 2e9 / passed_s / 1e12,
            "tflops_total": 20 * 8e9 / passed_s / 1e12,
            "mfu": 20 * 2e9 / passed_s / 1e12,
            "hfu": 1.25 * 20 * 2e9 / passed_s / 1e12,
            "tflops_sustained": 20 * 2e9 / passed_s / 1e12,
            "tflops_peak": 10 * 2e9 / 2.0 / 1e12,
        }
    )
    steps.take(4.0)
    last = steps.rates.since_last()
    assert last["tflops"] == pytest.approx(10 * 2e9 / 4.0 / 1e12) and last["data_wait"] == 0
    assert last["tflops_peak"] == found["tflops_peak"]
    assert last["tflops_sustained"] == pytest.approx(30 * 2e9 / 10.5 / 1e12)
    clock.now_s += 9.5  # the last checkpoint
    assert steps.rates.summary() == (
        "sustained 1.5 images/s, 3.00 GFLOP/s per device (12.0 GFLOP/s in all); "
        "peak 5 images/s, 10.0 GFLOP/s per device (40.0 GFLOP/s in all); "
        "over the 4 steps after this start's first, 20 s; "
        "MFU 0.3%, HFU 0.4% of a measured matrix product (1.00 TFLOP/s)"
    )


def test_one_record_a_step_has_the_step(clock: Clock) -> None:
    """With a record of every step, the peak is the largest of them, whatever happens between the steps."""
    steps, found = Steps(clock, Rates(0, YARD), 0), []
    for seconds in (9.0, 2.0, 1.0, 3.0):
        steps.take(seconds)
        clock.now_s += 0.25
        found.append(steps.rates.since_last())
    assert [one["step_s"] for one in found] == [9.0, 2.25, 1.25, 3.25]
    assert [one["tflops_peak"] for one in found[1:]] == [
        max(x["tflops"] for x in found[1 : n + 1]) for n in (1, 2, 3)
    ]


def test_alone_and_without_flops(clock: Clock) -> None:
    """One device has no total; where FLOPs are not known, images are counted."""
    rest = "; over the 1 step after this start's first, 2 s"
    for yardstick, says in (
        (None, f"sustained 5 images/s; peak 5 images/s{rest}"),
        (
            Yardstick(8e9, gemm_flops_per_s=8e10),
            f"sustained 5 images/s, 40.0 GFLOP/s per device; peak 5 images/s, 40.0 GFLOP/s per device{rest}; "
            "MFU 50.0% of a measured matrix product (80.0 GFLOP/s)",
        ),
    ):
        steps = Steps(clock, Rates(0, yardstick), 0)
        steps.take(1.0)
        steps.take(2.0)
        assert steps.rates.summary() == says
        found = steps.rates.since_last()
        assert ("tflops" in found) == (yardstick is not None) and "hfu" not in found
        assert short(found).startswith("6.67 img/s")


def test_the_live_line_keeps_to_80_columns(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A narrow screen cuts off sustained and peak, not the rates of now or the time left."""
    for columns, cut_off in ((80, True), (140, False)):
        monkeypatch.setattr(log, "console", Console(width=columns, force_terminal=True, color_system=None))
        line = TrainingLine(120_000, 0, keep=0.98, digits=3)
        line.smooth(0.1234)
        values = dict.fromkeys(("images_per_s", "tflops", "tflops_peak", "tflops_sustained"), 12.3)
        line.show(1_200, short(values | {"mfu": 0.45, "data_wait": 0.01}))
        log.console.print(line.bar.get_renderable())
        said = capsys.readouterr().out.rstrip()
        assert len(said.splitlines()) == 1 and said.endswith("left")
        assert "12.3 TFLOP/s MFU" in said and ("peak" in said) != cut_off, said
