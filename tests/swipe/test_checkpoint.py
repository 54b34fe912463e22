"""Checkpoints: exact round trip, atomic, pruned, and no code runs on loading."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch

from swipe import checkpoint


def tensors() -> dict[str, torch.Tensor]:
    """Make tensors of several types and shapes."""
    generator = torch.Generator().manual_seed(0)
    return {
        "model.a": torch.randn(3, 4, generator=generator),
        "model.b": torch.randn(5, generator=generator).bfloat16(),
        "step": torch.tensor(3.0),
        "count": torch.arange(4),
        "double": torch.randn(2, generator=generator, dtype=torch.float64),
    }


def blank() -> dict[str, torch.Tensor]:
    """Make tensors to load into."""
    return {name: torch.zeros_like(value) for name, value in tensors().items()}


def test_round_trip_is_exact(tmp_path: Path) -> None:
    """Every bit of every type comes back, and so does the meta."""
    path = checkpoint.save(tmp_path, 7, tensors(), {"images_seen": 7}, keep=1)
    loaded = blank()
    checkpoint.load(path, loaded)
    for name, value in tensors().items():
        assert torch.equal(loaded[name], value), name
    assert checkpoint.read_meta(path) == {"images_seen": 7}


def test_only_the_newest_stay_and_partial_ones_do_not_count(tmp_path: Path) -> None:
    """keep=2 keeps two; a directory without `.complete`, or still partial, is not a checkpoint."""
    for images in (1, 20, 300):
        checkpoint.save(tmp_path, images, tensors(), {}, keep=2)
    (tmp_path / "images_000000000999").mkdir()
    partial = tmp_path / "images_000000000998.partial"
    partial.mkdir()
    (partial / ".complete").touch()
    assert [path.name for path in checkpoint.complete(tmp_path)] == [
        "images_000000000020",
        "images_000000000300",
    ]
    with pytest.raises(ValueError, match="not a complete checkpoint"):
        checkpoint.load(tmp_path / "images_000000000999", blank())


def test_a_failed_save_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk while writing: one OSError with the reason, the older checkpoint whole, no partial one."""
    checkpoint.save(tmp_path, 1, tensors(), {}, keep=2)

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.dcp_save, "save", full)
    with pytest.raises(OSError, match="No space left on device .free some space.; nothing half-written"):
        checkpoint.save(tmp_path, 2, tensors(), {}, keep=2)
    assert [path.name for path in tmp_path.iterdir()] == ["images_000000000001"]


def test_another_model_is_named(tmp_path: Path) -> None:
    """A missing tensor or another shape says which, before anything is overwritten."""
    path = checkpoint.save(tmp_path, 1, tensors(), {}, keep=1)
    for wrong, says in (
        ({"model.z": torch.zeros(2)}, "missing there"),
        ({"model.a": torch.zeros(4, 4)}, r"\(3, 4\) there"),
    ):
        loaded = blank()
        with pytest.raises(ValueError, match=says):
            checkpoint.load(path, loaded | wrong)
        assert loaded["count"].sum() == 0


def test_a_truncated_checkpoint_says_what_to_do(tmp_path: Path) -> None:
    """Half a data file or half an index is reported as damage."""
    for kind in ("*.distcp", ".metadata"):
        path = checkpoint.save(tmp_path, 1, tensors(), {}, keep=1)
        file = next(path.glob(kind))
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
        with pytest.raises(ValueError, match="damaged.*remove it to use the one before"):
            checkpoint.load(path, blank())


class _Attack:
    """A pickle that runs a command when it is loaded by plain pickle."""

    def __reduce__(self) -> tuple:
        return (Path.touch, (Path("pwned"),))


def test_loading_executes_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A malicious index is refused; the same bytes do run under plain pickle."""
    monkeypatch.chdir(tmp_path)
    path = checkpoint.save(tmp_path / "c", 1, tensors(), {}, keep=1)
    (path / ".metadata").write_bytes(pickle.dumps(_Attack()))
    with pytest.raises(ValueError, match="no index needs"):
        checkpoint.load(path, blank())
    assert not Path("pwned").exists()
    pickle.loads((path / ".metadata").read_bytes())
    assert Path("pwned").exists()
