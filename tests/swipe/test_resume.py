"""Which checkpoint a run goes on from: the newest good one, agreed by all ranks, and never none unasked."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch.distributed as dist

from swipe import checkpoint, checksums, resume
from swipe.checkpoint_errors import Damaged
from swipe.collectives import ALONE, AgreedError, CommunicationError, Group
from swipe.resume import newest
from tests.harness import run_distributed
from tests.swipe.test_checkpoint import be_a_rank, blank, saved
from tests.swipe.test_checkpoint_checksums import flip

WORLD = 3
NAMES = ["images_000000000001", "images_000000000002", "images_000000000003"]
DATA = "stage_000/__0_0.distcp"


def save_together(root: Path) -> None:
    """Save three checkpoints, each in three stages."""
    checkpoints, state = be_a_rank(root, WORLD, 1)
    checkpoints.keep = WORLD
    for images in (1, 2, 3):
        checkpoints.save(images, state, {})
    checkpoints.wait()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three good checkpoints of three stages."""
    root = tmp_path_factory.mktemp("whole") / "checkpoints"
    run_distributed(save_together, WORLD, root)
    return root


@pytest.fixture
def root(whole: Path, tmp_path: Path) -> Path:
    """A copy of three good checkpoints."""
    return Path(shutil.copytree(whole, tmp_path / "checkpoints"))


def everybody() -> Group:
    """All ranks."""
    ranks = tuple(range(dist.get_world_size()))
    return Group("all ranks", ranks, dist.get_rank(), dist.group.WORLD)


def choose(root: Path) -> tuple[str | None, list[str]]:
    """Choose together; return the name and the remarks."""
    path, remarks = newest(root, everybody())
    return path and path.name, remarks


def choose_and_fail(root: Path, kind: type[Exception]) -> str:
    """Choose together, which must fail; return what was said."""
    with pytest.raises(kind) as caught:
        newest(root, everybody())
    return str(caught.value)


def left(root: Path) -> list[str]:
    """List what is in `root`."""
    return sorted(path.name for path in root.iterdir())


def test_the_newest_is_taken_if_it_is_good(root: Path) -> None:
    """By any number of ranks, and nothing changes; no checkpoint at all is a fresh start."""
    assert run_distributed(choose, WORLD, root) == [(NAMES[2], [])] * WORLD
    assert run_distributed(choose, 2, root) == [(NAMES[2], [])] * 2
    assert left(root) == NAMES
    assert newest(root, ALONE) == (root / NAMES[2], [])
    assert newest(root / "nowhere", ALONE) == (None, [])


def test_damaged_ones_are_set_aside(root: Path) -> None:
    """Two in a row, each found by another rank: the third is used, the remarks say why and where they are."""
    os.truncate(root / NAMES[2] / "stage_002" / "__0_0.distcp", 5)
    size = (root / NAMES[0] / "stage_002" / "__0_0.distcp").stat().st_size
    flip(root / NAMES[1] / "stage_001" / ".metadata")
    why = (
        f"stage_002/__0_0.distcp: has 5 bytes, {size:,} were saved",
        "stage_001/.metadata: has other bytes than were saved (its SHA-256 differs)",
    )
    said = [
        f"the checkpoint {name} is damaged ({what}): it is called {name}.damaged now, and {NAMES[0]} is used"
        for name, what in zip((NAMES[2], NAMES[1]), why, strict=True)
    ]
    assert run_distributed(choose, WORLD, root) == [(NAMES[0], said)] * WORLD
    assert left(root) == [NAMES[0], NAMES[1] + ".damaged", NAMES[2] + ".damaged"]
    assert checkpoint.complete(root) == [root / NAMES[0]]
    assert newest(root, ALONE) == (root / NAMES[0], [])  # said once
    shutil.copytree(root / NAMES[0], root / NAMES[1])  # that count comes again, and is damaged again
    (root / NAMES[1] / "meta.json").unlink()
    assert newest(root, ALONE)[0] == root / NAMES[0]
    assert not (root / f"{NAMES[1]}.damaged" / "meta.json").exists()


def test_no_run_starts_from_scratch_unasked(root: Path) -> None:
    """All damaged: an error on every rank, nothing is renamed; nor is it forgotten if all are set aside."""
    for name in NAMES:
        (root / name / "stage_000" / ".metadata").unlink()
    said = run_distributed(choose_and_fail, WORLD, root, AgreedError)
    listed = ", ".join(f"{name} (stage_000/.metadata: is missing)" for name in reversed(NAMES))
    assert said[0] == (
        f"every checkpoint in {root} is damaged: {listed}; put a good copy there, or remove all of them to "
        "start from scratch"
    )
    assert said == said[:1] * WORLD and left(root) == NAMES
    for name in NAMES:
        (root / name).rename(root / f"{name}.damaged")
    with pytest.raises(AgreedError, match=f"damaged: {NAMES[0]}.damaged, {NAMES[1]}.damaged"):
        newest(root, ALONE)
    for name in NAMES:
        shutil.rmtree(root / f"{name}.damaged")
    assert newest(root, ALONE) == (None, [])


def one_rank_reads_wrongly(root: Path, times: int) -> tuple[str | None, list[str]] | str:
    """Let rank 2 find a good file missing for the first `times` looks."""
    looks = 0

    def verify(path: Path, share: int, of: int) -> None:
        nonlocal looks
        looks += 1
        if share == 2 and looks <= times:
            raise Damaged("stage_002/.metadata", "is missing")
        checksums.verify(path, share, of)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resume, "PAUSES_S", (0.0, 0.01, 0.02))
        patch.setattr(resume, "verify", verify)
        return choose(root) if times < 3 else choose_and_fail(root, CommunicationError)


def test_a_checkpoint_is_not_given_up_for_one_machine(root: Path) -> None:
    """What rank 0 reads well is looked at again; if it stays so, that rank is blamed and nothing renamed."""
    assert run_distributed(one_rank_reads_wrongly, WORLD, root, 2) == [(NAMES[2], [])] * WORLD
    said = run_distributed(one_rank_reads_wrongly, WORLD, root, 3)
    what = r"\(stage_002/.metadata: is missing\): its machine or its file system is at fault"
    assert all(re.match(rf"rank 2 \(.+\) does not read .*{NAMES[2]} as rank 0 does {what}$", s) for s in said)
    assert left(root) == NAMES


@pytest.mark.parametrize(
    ("number", "damage"), [(errno.EIO, True), (errno.EACCES, False), (errno.ESTALE, False)]
)
def test_what_cannot_be_read_now_is_not_damage(
    root: Path, monkeypatch: pytest.MonkeyPatch, number: int, damage: bool
) -> None:
    """A broken disk is damage; a lack of rights or a server that is away is an error, nothing is renamed."""
    digest = checksums.digest

    def read(path: Path) -> checksums.Sum:
        if path == root / NAMES[2] / DATA:
            raise OSError(number, os.strerror(number), str(path))
        return digest(path)

    monkeypatch.setattr(checksums, "digest", read)
    if damage:
        path, (remark,) = newest(root, ALONE)
        assert path == root / NAMES[1] and f"{DATA}: Input/output error" in remark
    else:
        words = rf"{NAMES[2]} cannot be read: {DATA}: {os.strerror(number)}"
        with pytest.raises(AgreedError, match=words) as caught:
            newest(root, ALONE)
        assert caught.value.of_a_file
        assert left(root) == NAMES


def test_one_that_made_room_is_put_back(root: Path) -> None:
    """A save of the same count was killed after it had moved the good one away."""
    (root / NAMES[2]).rename(root / f"{NAMES[2]}.replaced.partial")
    (root / f"{NAMES[2]}.partial").mkdir()
    assert newest(root, ALONE) == (root / NAMES[2], [])


def test_one_from_before_checksums_is_taken_and_judged(tmp_path: Path) -> None:
    """By the sizes its index needs."""
    make: Callable[[int], Path] = lambda images: saved(tmp_path, images, keep=2)  # noqa: E731
    paths = [make(1), make(2)]
    for path in paths:
        (path / ".complete").write_text("")
        (path / "stage_000" / "checksums.json").unlink()
    assert newest(tmp_path, ALONE) == (paths[1], [])
    os.truncate(paths[1] / DATA, 10)
    assert newest(tmp_path, ALONE)[0] == paths[0]
    checkpoint.load(paths[0], blank())
