"""The run's log survives kills, and programs turn mistakes into one line."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from aeris import log
from aeris.interruption import Stopped
from aeris.log import RunLog, Speaker, run_program, status_of
from swipe.collectives import AgreedError, CommunicationError


def test_records_after_the_checkpoint_are_cut_and_broken_lines_dropped(tmp_path: Path) -> None:
    """A resumed run writes its steps once, whatever line the killed one was in."""
    path = tmp_path / "log.jsonl"
    path.write_text(
        "".join(json.dumps({"images_seen": n}) + "\n" for n in (2, 4, 6)) + '{"images_seen": 8, "lo'
    )
    with RunLog(path, 4) as log:
        log.write({"images_seen": 6, "loss": 1.0})
        log.write({"images_seen": 8, "loss": float("nan")})
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"images_seen": 2},
        {"images_seen": 4},
        {"images_seen": 6, "loss": 1.0},
        {"images_seen": 8, "loss": None},
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ValueError("bad [0, 1] size"), 2),
        (OSError("no disk"), 74),
        (AgreedError("no disk on rank 3", of_a_file=True), 74),
        (Stopped("stopped by [a signal]"), 75),
        (KeyboardInterrupt(), 130),
    ],
)
def test_mistakes_are_one_line(error: BaseException, status: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit status and message; brackets are text, not markup."""

    def main() -> None:
        raise error

    with pytest.raises(SystemExit) as caught:
        run_program(main)
    assert caught.value.code == status
    said = capsys.readouterr().err
    assert str(error) in said and said.count("\n") == 1


def test_too_little_memory_says_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    """torch's own error, on any device, becomes a line with the settings that help."""
    import torch

    def main() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore")

    with pytest.raises(SystemExit):
        run_program(main)
    assert "--train.microbatch" in capsys.readouterr().err


def test_a_lost_rank_has_a_status_of_its_own() -> None:
    """A job script starts the same command again, without the machine that was lost."""
    assert status_of(CommunicationError("rank 1 waited")) == status_of(ConnectionResetError()) == 76


class AcceleratorError(RuntimeError):
    """Named as torch names its error of a device."""


@pytest.mark.parametrize(
    "error",
    [
        AcceleratorError("uncorrectable ECC error encountered\nCompile with TORCH_USE_CUDA_DSA"),
        RuntimeError("CUDA error: uncorrectable ECC error encountered"),
        RuntimeError("HIP error: hipErrorIllegalState"),
        RuntimeError("level_zero backend failed with error: 20 (UR_RESULT_ERROR_DEVICE_LOST)"),
    ],
)
def test_a_broken_device_is_a_lost_rank_that_is_named(
    error: RuntimeError, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In one line that `launch job` can map to a machine, and with its status; it need not shut down."""
    from launch.verdict import suspects

    monkeypatch.setattr(log, "speaker", Speaker(3, 8))
    monkeypatch.setattr(Speaker, "wait_for_turn", lambda speaker: None)
    monkeypatch.setattr(log.os, "_exit", sys.exit)

    def main() -> None:
        raise error

    with pytest.raises(SystemExit) as caught:
        run_program(main)
    said = capsys.readouterr().err
    assert caught.value.code == 76 and said.count("\n") == 1
    assert said.startswith(f"error: rank 3: {type(error).__name__}: ") and said.count("rank 3") == 1
    assert list(suspects(said.splitlines(), ["a", "b", "c", "d"], 2)) == ["b"]


def test_what_another_device_would_have_too_is_no_broken_device() -> None:
    """A bug, and too little memory, whatever class torch gives them."""
    assert status_of(AcceleratorError("CUDA error: device-side assert triggered")) == 1
    assert status_of(AcceleratorError("CUDA error: out of memory")) == 2
    assert status_of(RuntimeError("level_zero: UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY")) == 2
    assert status_of(RuntimeError("shape mismatch")) == status_of(ZeroDivisionError("x")) == 1


def test_a_bug_on_one_of_several_ranks_names_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """After the traceback, in one line."""
    monkeypatch.setattr(log, "speaker", Speaker(0, 8))
    monkeypatch.setattr(log.os, "_exit", sys.exit)

    def main() -> None:
        raise RuntimeError("shapes\ndiffer")

    with pytest.raises(SystemExit) as caught:
        run_program(main)
    said = capsys.readouterr().err
    assert caught.value.code == 1 and said.startswith("Traceback") and "in main" in said
    assert said.endswith("\nerror: rank 0: RuntimeError: shapes\n")


@pytest.mark.parametrize(
    ("error", "at_once"),
    [
        (ValueError("bad sample"), True),
        (OSError("no disk"), True),
        (RuntimeError("a bug"), True),
        (AgreedError("no disk on rank 3", of_a_file=True), False),
        (Stopped("stopped"), False),
    ],
)
def test_an_error_of_one_rank_ends_it_at_once(
    error: Exception, at_once: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Groups whose messages are on their way may wait for the others, who wait for this one's end."""
    ends: list[int] = []
    monkeypatch.setattr(log, "speaker", Speaker(0, 8))
    monkeypatch.setattr(log.os, "_exit", ends.append)

    def main() -> None:
        raise error

    with pytest.raises(SystemExit) as caught:
        run_program(main)
    assert ends == [caught.value.code] * at_once


def test_ranks_speak_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 at once; of 120,960 ranks few within the seconds a launcher needs, and all within eleven."""
    waits: list[float] = []
    monkeypatch.setattr(log.time, "sleep", waits.append)
    for rank in range(120_960):
        Speaker(rank, 120_960).wait_for_turn()
    assert len(waits) == 120_959 and waits == sorted(waits) and waits[0] == 2.0 and waits[-1] < 11
    assert sum(wait <= 3.0 for wait in waits) == 4


def test_torchrun_is_told_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The file it reads a failure from holds the line, not a traceback."""
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))

    def main() -> None:
        raise ValueError("heads 3")

    with pytest.raises(SystemExit):
        run_program(main)
    about = json.loads((tmp_path / "error.json").read_text())["message"]
    assert about["extraInfo"]["py_callstack"] == about["message"] == "heads 3"
    assert int(about["extraInfo"]["timestamp"]) > 0


def test_our_own_mistakes_keep_their_traceback() -> None:
    """A bug is not dressed up as the user's."""
    with pytest.raises(ZeroDivisionError):
        run_program(lambda: 1 / 0)  # type: ignore[arg-type,return-value]
