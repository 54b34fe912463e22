"""Benchmarks of blocks, attention, shift and pipeline: what they count and list, not how long it takes."""

import csv
import dataclasses
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from aeris.presets import PRESETS
from benchmarks import attention, parts, pipeline, ranks, shift, step
from swipe.backend import choose_device
from tests.harness import run_distributed

CPU = torch.device("cpu")


# Blocks and steps


def test_a_device_gets_the_full_table_and_a_cpu_a_short_one() -> None:
    """Without wishes: three widths, two windows, eager and compiled; what is asked for is taken."""
    full = step.cases(step.Options(), torch.device("cuda"))
    blocks = [(case.preset, case.window, case.mode) for case in full if case.what == "block"]
    assert len(blocks) == 12 and ("40b", 60, "compiled") in blocks and ("1.3b-6h", 30, "eager") in blocks
    assert {case.precision for case in full} == {"bf16"}
    assert [case.mode for case in full if case.what == "training step"] == ["eager", "compiled"]
    short = step.cases(step.Options(), CPU)
    assert [case.preset for case in short] == ["tiny", "1.3b-6h", "tiny"]
    asked = step.cases(step.Options(presets=("13b",), windows=(60,), precision=("fp32",), steps=()), CPU)
    assert asked == [step.Case("block", "13b", 60, "fp32", "eager")]
    assert asked[0].config().model.residual == "fp32" and asked[0].config().model.window == 60
    with pytest.raises(ValueError, match="'7b' is no preset: choose from tiny"):
        step.cases(step.Options(steps=("7b",)), CPU)


@pytest.mark.parametrize(
    ("preset", "window", "windows", "tokens"),
    [("40b", 30, 32, 75), ("40b", 60, 8, 300), ("13b", 30, 72, 75), ("1.3b-6h", 60, 18, 300)],
)
def test_a_block_has_the_tokens_of_a_published_rank(
    preset: str, window: int, windows: int, tokens: int
) -> None:
    """40B: 2,400 of 1,036,800 over wp 6x6 and sp 12; the others 5,400. What is asked for is whole windows."""
    case = step.Case("block", preset, window, "bf16", "eager")
    assert step.block_layout(case, 0).tokens_NT.shape == (windows, tokens)
    assert step.block_layout(case, 2 * window**2 + 1).tokens_NT.shape == (2, window**2)


def test_one_rank_attends_in_whole_windows_with_its_part_of_the_heads() -> None:
    """With sp 1 it is plain attention; with sp 4 the kernel gets a quarter of the heads and all tokens."""
    case = step.Case("block", "tiny", 12, "fp32", "eager")
    q = torch.randn(3, 1, 8, 4, 144, 32).unbind()
    whole = step.block_layout(case, 0)
    torch.testing.assert_close(whole.attend(*q, False), attention.attention(*q))
    quarter = step.OneRank(whole.shard.at_place(whole.shard.grid, (1, 1), 4, 0), (1, 1), range(4))
    q = torch.randn(3, 1, 8, 4, 36, 32).unbind()
    seen = [x.reshape(1, 8, 1, 144, 32) for x in q]
    torch.testing.assert_close(quarter.attend(*q, False), attention.attention(*seen).reshape(1, 8, 4, 36, 32))


def test_flops_of_a_block_are_those_of_the_published_formula() -> None:
    """6 (4 T d^2 + 2 T L d + 3 T d m) for the tokens of one rank."""
    model = PRESETS["40b"]().model
    d, hidden, tokens = model.width, model.hidden, 2400
    expected = 6 * tokens * (4 * d * d + 2 * 900 * d + 3 * d * hidden)
    assert step.block_flops(model, tokens) == pytest.approx(expected, rel=1e-12)
    of_products = sum(2 * n * k * m for n, k, m in step.products(model, tokens))
    assert of_products == 6 * tokens * (4 * d * d + 3 * d * hidden)


def test_events_belong_to_parts() -> None:
    """By the names of torch's operations; a product with one column is a sum, not attention."""
    kinds = [
        ("aten::mm", [], "gemm"),
        ("aten::_scaled_dot_product_flash_attention_backward", [], "attention"),
        ("aten::_softmax_backward_data", [], "attention"),
        ("aten::bmm", [[8, 144, 32], [8, 32, 144]], "attention"),
        ("aten::bmm", [[8, 144, 32], [8, 32, 1]], "elementwise"),
        ("aten::mul", [[8, 144, 32], []], "elementwise"),
        ("triton_poi_fused_mul_0", [], "elementwise"),
        ("Optimizer.step#AdamW.step", [], "host"),
    ]
    assert [parts.part_of(name, shapes) for name, shapes, _ in kinds] == [part for *_, part in kinds]


@pytest.mark.parametrize("what", ["block", "training step"])
def test_a_row_splits_its_time(what: str) -> None:
    """The parts add up to the whole on a CPU, and every kind of work is found."""
    torch.manual_seed(0)
    case = step.Case(what, "tiny", 12, "bf16", "eager")
    row = step.measure(case, step.Options(tokens=144, microbatches=1, rounds=1), CPU)
    assert sum(row[f"{name}_ms"] for name in parts.PARTS) == pytest.approx(row["ms"])
    assert all(row[f"{name}_ms"] > 0 for name in parts.PARTS[:3])
    assert row["tokens"] == (144 if what == "block" else 2 * 24 * 48)
    assert row["fraction_of_best"] == pytest.approx(row["tflops"] / row["best_tflops"])


@pytest.mark.gpu
def test_a_row_splits_its_time_on_a_device() -> None:
    """Kernels are found through the operations that start them, eager and compiled."""
    for mode in ("eager", "compiled"):
        case = step.Case("block", "1.3b-6h", 30, "bf16", mode)
        row = step.measure(case, step.Options(tokens=3600, rounds=2), choose_device("auto"))
        assert all(row[f"{name}_ms"] > 0 for name in parts.PARTS[:3])
        assert sum(row[f"{name}_ms"] for name in parts.PARTS) == pytest.approx(row["ms"], rel=0.2)


# Attention


def test_attention_is_told_printed_compared_and_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file of before that was faster ends the program with status 1; the same numbers with 0."""
    file, picture = tmp_path / "attention.csv", tmp_path / "attention.png"
    words = ["attention", "--device", "cpu", "--windows", "4", "--tokens", "64", "--heads", "1"]
    words += ["--rounds", "1", "--csv", str(file)]
    monkeypatch.setattr(sys, "argv", [*words, "--plot", str(picture)])
    with pytest.raises(SystemExit) as done:
        attention.main()
    with file.open(newline="") as opened:
        rows = list(csv.DictReader(opened))
    assert done.value.code == 0 and picture.stat().st_size > 5_000
    ways = {"as run", "written out", "fused"}
    assert {(row["precision"], row["way"]) for row in rows} == {
        (p, w) for p in ("bf16", "fp32") for w in ways
    }
    assert max(float(row["of_fastest"]) for row in rows) == 1.0
    better = tmp_path / "better.csv"
    better.write_text(file.read_text())
    with better.open("w", newline="") as opened:
        writer = csv.DictWriter(opened, list(rows[0]))
        writer.writeheader()
        writer.writerows({**row, "fraction_of_gemm": 1e6} for row in rows)
    monkeypatch.setattr(sys, "argv", [*words, "--compare", str(better)])
    with pytest.raises(SystemExit) as done:
        attention.main()
    assert done.value.code == 1


def test_kernels_that_refuse_are_left_out() -> None:
    """A way that raises is none of the ways."""
    q = torch.randn(1, 1, 4, 8, requires_grad=True)

    def refuse(*_: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("No available kernel")

    assert not attention.works(refuse, [q, q, q], torch.ones_like(q))
    assert attention.works(attention.written_out, [q, q, q], torch.ones_like(q))


# Shift and pipeline


def shifts() -> list[dict[str, object]]:
    """Measure the shift on the ranks of this test."""
    return shift.measure(CPU, shift.Options(rows=16, cols=16, window=4, width=6, rounds=2))


def test_the_shift_sends_what_the_plan_says(tmp_path: Path) -> None:
    """On 4 ranks: all to one peer with sp 4, three quarters with wp 2x2; between stages a rank's tokens."""
    rows = run_distributed(shifts, 4)[0]
    tensor_mb = 16 * 16 * 6 * 2 / 4 / 1e6
    found = {row["layout"]: row for row in rows}
    sent = {name: (row["how"], row["sent_mb"] / tensor_mb, row["peers"]) for name, row in found.items()}
    assert sent == {
        "wp 2x2": ("in a stage", pytest.approx(0.75), 3),
        "wp 1x2 x sp 2": ("in a stage", pytest.approx(1), 2),
        "sp 4": ("in a stage", pytest.approx(1), 1),
        "wp 1x2 x pp 2": ("between stages", pytest.approx(2), 2),
        "pp 2 x sp 2": ("between stages", pytest.approx(2), 1),
    }
    assert found["sp 4"]["tensor_mb"] == pytest.approx(tensor_mb)
    alone = shift.measure(CPU, shift.Options(rows=8, cols=8, window=4, width=2, rounds=1))
    assert [row["against"] for row in alone] == ["torch.roll"] and alone[0]["sent_mb"] == 0
    shift.draw(rows + alone, tmp_path / "shift.png", "title")
    assert (tmp_path / "shift.png").stat().st_size > 5_000


def test_layouts_that_do_not_fit_are_refused() -> None:
    """With the reason of the mesh."""
    with pytest.raises(ValueError, match="these degrees need 2 ranks, not 4"):
        shift.layouts(shift.Options(layouts=("sp 2",)), 4)


SHORT = pipeline.Options(forward_ms=0.2, backward_ms=0.4, tokens=8, width=4, rounds=1)


def bubbles() -> list[dict[str, object]]:
    """Measure the bubble on the ranks of this test."""
    return pipeline.measure(CPU, dataclasses.replace(SHORT, policies=("auto", "batched")))


def test_the_bubble_stands_beside_its_formula(tmp_path: Path) -> None:
    """In flight is what the schedule says; the simulated idle share is that of the formula, or more."""
    rows = run_distributed(bubbles, 3)[0]
    assert len(rows) == 2 * 2 * 3 and {row["policy"] for row in rows} == {"async", "batched"}
    for row in rows:
        assert row["as_planned"] and row["stages"] == 3
        assert row["formula"] == pytest.approx(2 / (row["microbatches"] + 2))
        assert row["formula"] <= row["simulated"] + 1e-9
        assert 0 < row["idle"] < 1
        most = [3, 2, 1] if row["schedule"] == "1f1b" else [row["microbatches"]] * 3
        assert row["in_flight"] == " ".join(map(str, most))
    pipeline.draw(rows, tmp_path / "pipeline.png", "title")
    assert (tmp_path / "pipeline.png").stat().st_size > 5_000


def test_ranks_are_started_and_failures_named() -> None:
    """Real processes that find each other; what fails on a rank is said with its number."""
    assert len(ranks.on_ranks(pipeline.measure, 2, "cpu", SHORT)) == 6
    wrong = dataclasses.replace(SHORT, policies=("sideways",))
    with pytest.raises(ValueError, match=r"rank \d of 2: .*sideways"):
        ranks.on_ranks(pipeline.measure, 2, "cpu", wrong)
    assert not dist.is_initialized()
