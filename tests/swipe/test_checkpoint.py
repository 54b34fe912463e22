"""Checkpoints: exact between any layouts, in the background, whole or not there, and no code runs."""

from __future__ import annotations

import math
import os
import pickle
import resource
import shutil
import signal
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from swipe import checkpoint
from swipe.checkpoint import Checkpoints
from swipe.groups import make_groups
from swipe.mesh import ParallelDims
from tests.harness import run_distributed


def tensors() -> dict[str, torch.Tensor]:
    """Make tensors of several types and shapes."""
    generator = torch.Generator().manual_seed(0)
    return {
        "model.a": torch.randn(3, 4, generator=generator),
        "model.b": torch.randn(5, generator=generator).bfloat16(),
        "step": torch.tensor(3.0),
        "images": torch.tensor(2**53 + 1),
        "count": torch.arange(4),
        "double": torch.randn(2, generator=generator, dtype=torch.float64),
        "strided": torch.randn(4, 3, generator=generator).T,
    }


def blank() -> dict[str, torch.Tensor]:
    """Make tensors to load into."""
    return {name: torch.zeros_like(value) for name, value in tensors().items()}


def check_loads(path: Path, right: dict[str, torch.Tensor]) -> None:
    """Load a checkpoint in one process and compare every bit."""
    loaded = {name: torch.zeros_like(value) for name, value in right.items()}
    checkpoint.load(path, loaded)
    for name, value in right.items():
        assert torch.equal(loaded[name], value), name


def saved(root: Path, images: int = 1, keep: int = 1) -> Path:
    """Save a checkpoint and wait for it."""
    Checkpoints(root, keep, asynchronous=False).save(images, tensors(), {})
    return checkpoint.complete(root)[-1]


class Gate:
    """Stands in for DCP's save and waits until it is opened."""

    def __init__(self) -> None:
        self.open, self.save = threading.Event(), checkpoint.dcp_save.save

    def __call__(self, *args: object, **kwargs: object) -> None:
        assert self.open.wait(30)
        self.save(*args, **kwargs)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    """Hold every write until the gate is opened."""
    monkeypatch.setattr(checkpoint.dcp_save, "save", gate := Gate())
    yield gate
    gate.open.set()


def refuse(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """Make every write fail."""
    monkeypatch.setattr(checkpoint.dcp_save, "save", lambda *args, **kwargs: (_ for _ in ()).throw(error))


@pytest.mark.parametrize("asynchronous", [True, False])
def test_round_trip_is_exact(tmp_path: Path, asynchronous: bool) -> None:
    """Every bit of every type comes back, and so does the meta; what is not asked for is not needed."""
    checkpoints = Checkpoints(tmp_path, keep=1, asynchronous=asynchronous)
    checkpoints.save(7, tensors(), {"images_seen": 7})
    checkpoints.wait()
    (path,) = checkpoint.complete(tmp_path)
    for part in (tensors(), {"count": torch.arange(4)}):
        check_loads(path, part)
    assert checkpoint.read_meta(path) == {"images_seen": 7, "stages": 1}


def test_a_checkpoint_without_stages_still_loads(tmp_path: Path) -> None:
    """The directory as it was before there were stages: DCP's files beside meta.json."""
    path = saved(tmp_path)
    for file in (path / "stage_000").iterdir():
        file.rename(path / file.name)
    (path / "stage_000").rmdir()
    (path / "meta.json").write_text('{"images_seen": 1}')
    check_loads(path, tensors())


def test_saving_goes_on_in_the_background(tmp_path: Path, gate: Gate) -> None:
    """`save` returns before anything is written, and what is written are the values at the call."""
    checkpoints, state = Checkpoints(tmp_path, keep=1), tensors()
    checkpoints.save(1, state, {})
    assert checkpoint.complete(tmp_path) == []
    checkpoints.check()
    for value in state.values():
        value.zero_()
    gate.open.set()
    checkpoints.wait()
    check_loads(checkpoint.complete(tmp_path)[0], tensors())


def test_the_next_save_waits_for_the_last(tmp_path: Path, gate: Gate) -> None:
    """Two saves one after the other are both whole, even if waiting was interrupted."""
    checkpoints = Checkpoints(tmp_path, keep=2)
    checkpoints.save(1, tensors(), {})
    with pytest.raises(KeyboardInterrupt):
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
        checkpoints.wait()
    threading.Timer(0.1, gate.open.set).start()
    checkpoints.save(2, tensors(), {})
    assert checkpoint.complete(tmp_path)[0].name == "images_000000000001"
    checkpoints.wait()
    assert [path.name[-1] for path in checkpoint.complete(tmp_path)] == ["1", "2"]


def test_only_the_newest_stay_and_partial_ones_do_not_count(tmp_path: Path) -> None:
    """keep=2 keeps two; a directory without `.complete`, or still partial, is not a checkpoint."""
    for images in (1, 20, 300):
        saved(tmp_path, images, keep=2)
    (tmp_path / "images_000000000999").mkdir()
    (tmp_path / "images_000000000998.partial").mkdir()
    (tmp_path / "images_000000000998.partial" / ".complete").touch()
    assert [path.name[-3:] for path in checkpoint.complete(tmp_path)] == ["020", "300"]
    with pytest.raises(ValueError, match="not a complete checkpoint"):
        checkpoint.load(tmp_path / "images_000000000999", blank())
    with pytest.raises(ValueError, match="at least 1 checkpoint stays"):
        Checkpoints(tmp_path, keep=0)


def test_a_failed_save_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk: one OSError with the reason, the older checkpoint whole, no partial one; then it works."""
    saved(tmp_path)
    saved(tmp_path)  # the same count again: takes its place
    checkpoints = Checkpoints(tmp_path, keep=2)
    with monkeypatch.context() as patch:
        refuse(patch, OSError(28, "No space left on device"))
        checkpoints.save(2, tensors(), {})
        words = r"cannot save .*002: No space left on device \(free some space\); nothing half-written"
        with pytest.raises(OSError, match=words):
            checkpoints.wait()
    assert [path.name for path in tmp_path.iterdir()] == ["images_000000000001"]
    checkpoints.wait()  # raised once
    checkpoints.save(3, tensors(), {})
    checkpoints.wait()
    assert len(list(tmp_path.iterdir())) == 2


def test_check_and_the_next_save_raise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`check` raises without taking the failure away from `save`, which does not begin."""
    refuse(monkeypatch, PermissionError(13, "Permission denied", "there"))
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(1, tensors(), {})
    checkpoints._written.wait(30)
    for call in (checkpoints.check, checkpoints.check, lambda: checkpoints.save(2, tensors(), {})):
        with pytest.raises(OSError, match=r"images_000000000001: Permission denied \(there\); nothing"):
            call()
    checkpoints.save(3, {}, {"names": {"a"}})
    with pytest.raises(OSError, match="003: TypeError: Object of type set is not JSON serializable; nothing"):
        checkpoints.wait()
    checkpoints.check()
    assert list(tmp_path.iterdir()) == []


def kill_in_the_middle(root: Path) -> None:
    """Write a checkpoint and die when its data are on disk, but not `.complete`."""
    checkpoint.Checkpoints._publish = lambda *args: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore
    Checkpoints(root, keep=1).save(2, tensors(), {})
    signal.pause()


def test_a_killed_save_leaves_no_checkpoint(tmp_path: Path) -> None:
    """The last whole checkpoint stays the newest; the next save removes what the killed one left."""
    saved(tmp_path)
    with pytest.raises(AssertionError, match="died with -9"):
        run_distributed(kill_in_the_middle, 1, tmp_path)
    assert sorted(path.name[19:] for path in tmp_path.iterdir()) == ["", ".partial"]
    assert [path.name for path in checkpoint.complete(tmp_path)] == ["images_000000000001"]
    saved(tmp_path, 3)
    assert [path.name for path in tmp_path.iterdir()] == ["images_000000000003"]


def test_another_model_is_named(tmp_path: Path) -> None:
    """A missing tensor or another shape says which, before anything is overwritten."""
    path = saved(tmp_path)
    for wrong, says in (
        ({"model.z": torch.zeros(2)}, "model.z is missing there"),
        ({"model.a": torch.zeros(4, 4)}, r"\(3, 4\) there and \(4, 4\) here \(1 of 7 tensors differ"),
    ):
        loaded = blank()
        with pytest.raises(ValueError, match=says):
            checkpoint.load(path, loaded | wrong)
        assert loaded["count"].sum() == 0


@pytest.mark.parametrize("kind", ["stage_000/*.distcp", "stage_000/.metadata", "meta.json"])
def test_a_damaged_checkpoint_says_what_to_do(tmp_path: Path, kind: str) -> None:
    """Half or none of a data file, an index or the JSON is reported as damage."""
    path = saved(tmp_path)
    file = path / kind if "*" not in kind else next(path.glob(kind))
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(ValueError, match="damaged.*remove it to use the one before"):
        checkpoint.load(path, blank())
    file.unlink()
    with pytest.raises(ValueError, match=r"damaged \(.*No such file.*remove it to use the one before"):
        checkpoint.load(path, blank())


class Attack:
    """A pickle that runs a command when it is loaded by plain pickle."""

    def __reduce__(self) -> tuple:
        return (Path.touch, (Path("pwned"),))


def test_loading_executes_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A malicious index is refused; the same bytes do run under plain pickle."""
    monkeypatch.chdir(tmp_path)
    path = saved(tmp_path / "c")
    index = path / "stage_000" / ".metadata"
    index.write_bytes(pickle.dumps(Attack()))
    with pytest.raises(ValueError, match="no index needs"):
        checkpoint.load(path, blank())
    assert not Path("pwned").exists()
    pickle.loads(index.read_bytes())
    assert Path("pwned").exists()


def test_an_entry_that_is_no_tensor_is_not_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """DCP loads objects, as opposed to tensors, with plain pickle: an index that says so is not followed."""
    monkeypatch.chdir(tmp_path)
    path = saved(tmp_path / "c")
    file = path / "stage_000" / ".metadata"
    index = pickle.loads(file.read_bytes())
    data, attack = next(file.parent.glob("*.distcp")), pickle.dumps(Attack())
    where = next(iter(index.storage_data.values()))
    where.offset, where.length = data.stat().st_size, len(attack)
    data.write_bytes(data.read_bytes() + attack)
    index.state_dict_metadata["step"] = BytesStorageMetadata()
    index.storage_data[MetadataIndex("step")] = where
    file.write_bytes(pickle.dumps(index))
    with pytest.raises(ValueError, match="step is missing there"):
        checkpoint.load(path, blank())
    assert not Path("pwned").exists()


UNITS = 4  # modules of the pipeline, dealt to its stages in order


def make_unit(unit: int) -> torch.nn.Module:
    """Make a module whose tensors do not divide evenly: 5 rows over 2 ranks, 3 over 4."""
    torch.manual_seed(unit)
    return torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.LayerNorm(5), torch.nn.Linear(5, 3).double())


def state_of(modules: dict[int, torch.nn.Module]) -> dict[str, torch.Tensor]:
    """Name weights, optimizer state after one step, and a plain tensor of each unit."""
    state = {}
    for unit, module in modules.items():
        optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
        for p in module.parameters():
            p.grad = p.detach().clone()
        optimizer.step()
        for name, p in module.named_parameters():
            state[f"model.{unit}.{name}"] = p.detach()
            state |= {f"optimizer.{unit}.{name}.{key}": v for key, v in optimizer.state[p].items()}
        state[f"images.{unit}"] = torch.tensor(2**53 + 1 + unit)
    return state


def expected() -> dict[str, torch.Tensor]:
    """Make the state of all units in one process."""
    return state_of({unit: make_unit(unit) for unit in range(UNITS)})


def be_a_rank(root: Path, stages: int, *mesh_shape: int) -> tuple[Checkpoints, dict[str, torch.Tensor]]:
    """Build a rank of a pipeline of `stages`, each sharded by FSDP2 over a mesh (HSDP if of two axes)."""
    warnings.simplefilter("error")
    dims = ParallelDims(dp=math.prod(mesh_shape), pp=stages)
    groups = make_groups(dims, dist.get_rank(), torch.device("cpu"), shard=mesh_shape[-1])
    stage = dims.coordinate(groups.rank).pp
    modules = {u: make_unit(u) for u in range(stage * UNITS // stages, (stage + 1) * UNITS // stages)}
    for part in (part for module in modules.values() for part in module):
        if groups.weights:
            fully_shard(part, mesh=groups.weights)
    return Checkpoints(root, 1, groups), state_of(modules)


def save_layout(root: Path, *layout: int) -> None:
    """Save in the background while training changes the weights and communicates on its own group."""
    checkpoints, state = be_a_rank(root, *layout)
    checkpoint.dcp_save.save = gate = Gate()
    checkpoints.save(5, state, {"by": dist.get_rank()})
    for value in state.values():
        value.zero_()
    for index in range(20):
        total = torch.tensor(1)
        dist.all_reduce(total)
        assert int(total) == 4
        if index == 5:
            assert not checkpoint.complete(root)
            gate.open.set()
    checkpoints.wait()
    assert [path.name for path in root.iterdir()] == ["images_000000000005"]


def load_layout(path: Path, *layout: int) -> None:
    """Load into a layout and compare every value with one process."""
    checkpoints, state = be_a_rank(path.parent, *layout)
    for value in state.values():
        value.zero_()
    checkpoint.load(path, state, near=checkpoints.stage / checkpoints.stages)
    for name, right in expected().items():
        if name in state:
            value = state[name]
            assert torch.equal(value.full_tensor() if isinstance(value, DTensor) else value, right), name


# Layouts are (stages, ranks that shard) or (stages, replicas, ranks that shard).
LAYOUTS = {(2, 2): [(1, 4), (1, 2, 2), (4, 1)], (1, 2, 2): [(2, 2), (1, 1, 4)], (4, 1): [(2, 2)]}


@pytest.mark.parametrize("saved_by", LAYOUTS, ids=str)
def test_any_layout_loads_what_any_other_saved(tmp_path: Path, saved_by: tuple[int, ...]) -> None:
    """Saved by one layout and loaded by others and by one process: every value is that of one process."""
    run_distributed(save_layout, 4, tmp_path, *saved_by)
    (path,) = checkpoint.complete(tmp_path)
    assert checkpoint.read_meta(path) == {"by": 0, "stages": saved_by[0]}
    for layout in LAYOUTS[saved_by]:
        run_distributed(load_layout, 4, path, *layout)
    check_loads(path, expected())
    if saved_by[0] == 4:  # what is near needs one index only
        for stage in "013":
            shutil.rmtree(path / f"stage_00{stage}")
        checkpoint.load(path, {"images.2": torch.tensor(0)}, near=0.5)
        with pytest.raises(ValueError, match="damaged .No such file"):
            check_loads(path, expected())


def fail_on_one_rank(root: Path) -> list[str]:
    """Save four times: a file too large, no copy, no directory, and well; return what was said."""
    with pytest.raises(ValueError, match="pass their groups"):
        Checkpoints(root, keep=1)
    checkpoints, state = be_a_rank(root, 2, 2)
    rank, said, partial = dist.get_rank(), [], root / "images_000000000003.partial"

    def attempt(images: int, tensors: dict[str, torch.Tensor]) -> None:
        checkpoints.save(images, tensors, {})
        with pytest.raises(OSError, match="nothing half-written is left") as caught:
            checkpoints.wait()
        assert [path for path in root.iterdir() if path.is_dir()] == []
        said.append(str(caught.value))
        dist.barrier()

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if rank == 3:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    attempt(1, state)
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    attempt(2, {"a": torch.zeros(2, device="meta")} if rank == 1 else state)
    partial.touch()  # a file where the directory must be
    attempt(3, state)
    partial.unlink(missing_ok=True)
    dist.barrier()
    checkpoints.save(4, state, {})
    checkpoints.wait()
    return said


def test_a_failure_of_one_rank_is_raised_on_all(tmp_path: Path) -> None:
    """Each rank hears which rank failed and why; nothing is left, and the next save works."""
    said = run_distributed(fail_on_one_rank, 4, tmp_path)
    assert said[0] == said[1] == said[2] == said[3]
    reasons = ["001: rank 3: File too large;", "002: rank 1: NotImpl", "003: rank 0: Not a directory ("]
    assert all(reason in text for text, reason in zip(said[0], reasons, strict=True))
    assert [path.name for path in checkpoint.complete(tmp_path)] == ["images_000000000004"]
