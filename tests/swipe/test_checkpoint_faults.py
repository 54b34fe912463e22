"""Saves that fail or are killed at any moment, what retention leaves, and what saving costs the training."""

from __future__ import annotations

import errno
import gc
import itertools
import os
import random
import shutil
import signal
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from swipe import checkpoint
from swipe.checkpoint import Checkpoints
from swipe.checksums import verify
from swipe.collectives import ALONE
from swipe.resume import newest
from tests.harness import run_distributed
from tests.swipe.test_checkpoint import Gate, check_loads, gate, refuse, saved, tensors  # noqa: F401

CALLS = ("fsync", "replace", "rename", "unlink", "rmdir", "mkdir")
"""What touches the disk: each ends a stretch of writing, so these are the moments that differ."""


def at_call(number: int, action: Callable[[], object], set_attribute: Callable[..., object]) -> list[str]:
    """Do `action` in place of call `number` of `CALLS`; return the list that their names are put into."""
    made: list[str] = []

    def wrap(name: str) -> Callable[..., Any]:
        real = getattr(os, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            made.append(name)
            if len(made) == number:
                action()
            return real(*args, **kwargs)

        return call

    for name in CALLS:
        set_attribute(os, name, wrap(name))
    return made


def no_space() -> None:
    """Be a full disk."""
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("again", [False, True], ids=["new", "replacing"])
def test_a_disk_full_at_any_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, again: bool) -> None:
    """At every call that reaches the disk: the reason is said, older checkpoints stay, no half one does."""
    failed = set[str]()
    for number in itertools.count(1):
        root = tmp_path / str(number)
        saved(root, 1)
        checkpoints = Checkpoints(root, keep=1, asynchronous=False)
        with monkeypatch.context() as patch:
            made = at_call(number, no_space, patch.setattr)
            try:
                checkpoints.save(1 if again else 2, tensors(), {})
            except OSError as error:
                failed.add(made[number - 1])
                assert "No space left on device (free some space); nothing half-written is left" in str(error)  # noqa: PT017
        names = [path.name[19:] or path.name[-1] for path in sorted(root.iterdir())]
        assert not any("partial" in name for name in names) or made[number - 1] in ("rmdir", "unlink"), made
        for path in checkpoint.complete(root):
            verify(path)
        assert newest(root, ALONE)[0] is not None
        if len(made) < number:
            break
        checkpoints.save(3, tensors(), {})
        assert [path.name[-1] for path in root.iterdir()] == ["3"]
        shutil.rmtree(root)
    assert failed == {"fsync", "replace", "rename", "mkdir"} and number > 12


def die() -> None:
    """Be killed."""
    os.kill(os.getpid(), signal.SIGKILL)


def killed(root: Path, images: int, number: int, pause_s: float = 0.0) -> bool:
    """Fork a process that saves and dies at call `number`, or after a pause if 0; return whether it did."""
    pid = os.fork()
    if pid == 0:
        if number:
            at_call(number, die, setattr)
        checkpoints = Checkpoints(root, keep=1)
        while True:
            checkpoints.save(images, tensors(), {})
            checkpoints.wait()
            if number:
                os._exit(0)
    if not number:
        time.sleep(pause_s)
        os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


def kill_again_and_again(root: Path) -> tuple[int, int]:
    """Kill saves at every call that touches the disk, and at random times; after each, look what is there."""
    saved(root / "first", 1)
    dice, ends = random.Random(0), []
    for images in (1, 2):  # one that takes the place of what is there, one that lets an older one go
        for number in itertools.count(1):
            directory = Path(shutil.copytree(root / "first", root / f"{images}-{number}"))
            more = killed(directory, images, number)
            for path in checkpoint.complete(directory):
                verify(path)
            path, remarks = newest(directory, ALONE)
            assert path is not None and not remarks
            verify(path)
            if not more:
                assert path.name[-1] == str(images)
                ends.append(number)
                break
    for _ in range(8):
        killed(root / "first", 1, 0, dice.uniform(0.0, 0.1))
        path, remarks = newest(root / "first", ALONE)
        assert path is not None and not remarks
    return ends[0], ends[1]


def test_a_save_killed_at_any_moment(tmp_path: Path) -> None:
    """There always is a checkpoint, and whatever has the name of one is whole."""
    ((replacing, new),) = run_distributed(kill_again_and_again, 1, tmp_path)
    assert replacing > 20 and new > 20


def test_retention_counts_good_checkpoints_only(tmp_path: Path) -> None:
    """keep=2 and the one before is damaged: the one before that stays, until there are two good ones."""

    def left() -> list[int]:
        return [int(path.name[-2:]) for path in checkpoint.complete(tmp_path)]

    for images in (1, 2, 3):
        saved(tmp_path, images, keep=2)
    assert left() == [2, 3]
    file = tmp_path / "images_000000000003" / "stage_000" / "__0_0.distcp"
    os.truncate(file, 100)
    saved(tmp_path, 4, keep=2)
    assert left() == [2, 3, 4]
    (tmp_path / "images_000000000004" / "stage_000" / ".metadata").unlink()
    saved(tmp_path, 5, keep=2)
    assert left() == [2, 3, 4, 5]
    saved(tmp_path, 6, keep=2)
    assert left() == [5, 6]


def test_retention_looks_at_a_checkpoint_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At those this run found when it first has too many, and at none that it saved."""
    for images in (1, 2, 3):
        saved(tmp_path, images, keep=3)
    looked: list[str] = []
    monkeypatch.setattr(checkpoint, "verify", lambda path, contents: looked.append(path.name[-1]))
    checkpoints = Checkpoints(tmp_path, keep=3, asynchronous=False)
    for images in range(4, 9):
        checkpoints.save(images, tensors(), {})
    assert looked == ["3", "2"]
    assert [path.name[-1] for path in checkpoint.complete(tmp_path)] == ["6", "7", "8"]


def test_what_cannot_be_removed_does_not_fail_the_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint is on disk; the old one goes with the next."""
    saved(tmp_path, 1)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda *args, **kwargs: None)
        saved(tmp_path, 2)
    assert [path.name[19:] for path in sorted(tmp_path.iterdir())] == [".partial", ""]
    saved(tmp_path, 3)
    assert [path.name for path in tmp_path.iterdir()] == ["images_000000000003"]


@pytest.mark.parametrize("fails", [False, True], ids=["well", "failing"])
def test_the_copies_are_freed(
    tmp_path: Path,
    gate: Gate,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    fails: bool,
) -> None:
    """Nothing holds a save's copies once it is done, nor if it failed and its error is kept."""
    copies: list[weakref.ref[torch.Tensor]] = []

    def watch(state: dict[str, torch.Tensor], **kwargs: object) -> None:
        copies.extend(weakref.ref(value) for value in state.values())
        gate(state, **kwargs)

    monkeypatch.setattr(checkpoint.dcp_save, "save", watch)
    if fails:  # deep inside DCP
        monkeypatch.setattr(os, "fsync", lambda handle: no_space())
    checkpoints, state = Checkpoints(tmp_path, keep=1), tensors()
    checkpoints.save(1, state, {})
    while not copies:
        time.sleep(0.001)
    assert all(copy() is not None for copy in copies)
    gate.open.set()
    kept = []
    try:
        checkpoints.wait()
    except OSError as error:
        kept.append(error)
    assert len(kept) == fails
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join(10)
    gc.collect()
    assert len(copies) == len(state) and all(copy() is None for copy in copies)


def test_training_goes_on_while_the_digest_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A digest that never ends holds up neither `save` nor anything after it, until the next save."""
    free, entered = threading.Event(), threading.Event()
    real = checkpoint.digest

    def slow(path: Path) -> object:
        entered.set()
        assert free.wait(30)
        return real(path)

    monkeypatch.setattr(checkpoint, "digest", slow)
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(1, tensors(), {})
    assert entered.wait(30)
    checkpoints.check()
    assert checkpoint.complete(tmp_path) == []
    free.set()
    checkpoints.wait()
    check_loads(checkpoint.complete(tmp_path)[0], tensors())


def fail_in_the_list(root: Path) -> list[str]:
    """Fail on one rank as it digests, and on the first of stage 1 as it writes the list."""
    from tests.swipe.test_checkpoint import be_a_rank

    checkpoints, state = be_a_rank(root, 2, 2)
    rank, said = torch.distributed.get_rank(), []
    for who, name in ((3, "digest"), (1, "write_list")):
        with pytest.MonkeyPatch.context() as patch:
            if rank == who:
                patch.setattr(checkpoint, name, lambda *args: no_space())
            checkpoints.save(1, state, {})
            with pytest.raises(OSError, match="nothing half-written is left") as caught:
                checkpoints.wait()
        said.append(str(caught.value))
        assert list(root.iterdir()) == []
        torch.distributed.barrier()
    checkpoints.save(2, state, {})
    checkpoints.wait()
    verify(root / "images_000000000002", rank, 4)
    return said


def test_a_failing_digest_or_list_of_one_rank_is_raised_on_all(tmp_path: Path) -> None:
    """No rank waits for the sums of one that failed; the next save works."""
    said = run_distributed(fail_in_the_list, 4, tmp_path)
    assert said[0] == said[1] == said[2] == said[3]
    for text, who in zip(said[0], (3, 1), strict=True):
        assert f"rank {who}: No space left on device (free some space)" in text


def test_a_refused_save_keeps_every_older_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However often it fails, retention removes nothing."""
    saved(tmp_path, 1, keep=2)
    saved(tmp_path, 2, keep=2)
    refuse(monkeypatch, OSError(errno.ENOSPC, "full"))
    for images in range(3, 7):
        with pytest.raises(OSError, match="free some space"):
            saved(tmp_path, images)
    assert [path.name[-1] for path in sorted(tmp_path.iterdir())] == ["1", "2"]
