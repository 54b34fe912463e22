"""The run's log survives kills, and programs turn mistakes into one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from aeris.interruption import Stopped
from aeris.log import RunLog, run_program, status_of
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
