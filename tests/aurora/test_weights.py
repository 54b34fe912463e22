"""Reading and loading checkpoints: good ones, damaged ones, dangerous ones, and those of other models."""

from __future__ import annotations

import os
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from aeris.aurora import weights
from aeris.aurora.config import Published
from aeris.aurora.variants import VARIANTS
from aeris.aurora.weights import CheckpointError, compare, has_lora, identify, load, read_checkpoint
from tests.aurora.old_formats import State, air_pollution_pair, assert_same, build, old_format, random_state

# Names of the variants, and whether the class has adapters.
KINDS = [
    *(("aurora", True), ("pretrained", False), ("small", False), ("high-res", True), ("air-pollution", True)),
    *(("wave", True), ("v1.5", False), ("v1.5-ensemble", False), ("tiny", False)),
]


@pytest.mark.parametrize(("name", "adapters"), KINDS)
def test_variants_are_recognised_at_full_size(name: str, adapters: bool) -> None:
    with torch.device("meta"):
        state = VARIANTS[name]().state_dict()
    assert (identify(state), has_lora(state)) == (name, adapters)
    assert identify({"something": torch.zeros(1)}) == ""
    assert identify(random_state(build("pretrained"))) == ""


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, State]:
    """A checkpoint of the pretrained model in the old format, and its weights in today's."""
    state = random_state(build("pretrained"))
    torch.save(old_format(state), tmp_path / "x.ckpt")
    return tmp_path / "x.ckpt", state


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_loading(saved: tuple[Path, State], device: str) -> None:
    path, state = saved
    with torch.device(device):
        model = build("pretrained").requires_grad_(False)
    done = load(model, path)
    assert str(done) == "" == "".join((*done.initial, *done.unused))
    assert_same(dict(model.state_dict()), state)
    assert not any(weight.requires_grad for weight in model.parameters())
    path.write_bytes(b"")  # the weights are in memory, not in the file
    assert_same(dict(model.state_dict()), state)


def test_loading_casts_to_the_models_type(saved: tuple[Path, State]) -> None:
    for device in ("cpu", "meta"):
        with torch.device(device):
            model = build("pretrained").to(torch.bfloat16)
        load(model, saved[0])
        assert torch.equal(
            model.state_dict()["encoder.pos_embed.bias"], saved[1]["encoder.pos_embed.bias"].bfloat16()
        )


def test_files_of_old_torch_are_read(tmp_path: Path) -> None:
    state = random_state(build("pretrained"))
    torch.save(state, tmp_path / "x.ckpt", _use_new_zipfile_serialization=False)
    assert_same(read_checkpoint(tmp_path / "x.ckpt"), state)


def test_adapters_may_be_missing_if_not_strict(saved: tuple[Path, State]) -> None:
    model = build("aurora")
    fresh = {name: x.clone() for name, x in model.state_dict().items() if ".lora_" in name}
    with pytest.raises(
        CheckpointError, match=r"it lacks 16 weights: backbone\..*and 8 more.*strict=False would"
    ):
        load(model, saved[0])
    done = load(model, saved[0], strict=False)
    assert set(done.initial) == set(fresh)
    assert str(done).startswith("kept as they were: 16 weights: backbone.")
    assert_same({**saved[1], **fresh}, dict(model.state_dict()))
    with torch.device("meta"):
        nowhere = build("aurora")
    with pytest.raises(CheckpointError, match="no initial values"):
        load(nowhere, saved[0], strict=False)


def test_variables_and_stabilisation_may_differ_if_not_strict(saved: tuple[Path, State]) -> None:
    model = build("pretrained", surf_vars=("2t", "10u", "10v", "swh"), stabilise_level_agg=True)
    done = load(model, saved[0], strict=False)
    assert "encoder.surf_token_embeds.weights.swh" in done.initial
    assert "decoder.surf_heads.swh.bias" in done.initial
    assert "encoder.level_agg.layers.0.0.ln_k.weight" in done.initial
    assert set(done.unused) == {
        "encoder.surf_token_embeds.weights.msl",
        "decoder.surf_heads.msl.weight",
        "decoder.surf_heads.msl.bias",
    }
    assert "unused: 3 weights: " in str(done)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"embed_dim": 32, "num_heads": 2}, r"other shapes: \d+ weights: encoder\.\S+ \(.*instead of"),
        ({"encoder_depths": (2, 1)}, r"it lacks 12 weights: backbone.encoder_layers.0.blocks.1"),
        ({"patch_size": 8}, r"other shapes.*weights.2t \(16, 1, 2, 4, 4\) instead of \(16, 1, 2, 8, 8\)"),
        ({"max_history_size": 1}, "history of 2 times"),
    ],
)
def test_other_models_are_refused(
    saved: tuple[Path, State], strict: bool, changes: dict[str, Any], says: str
) -> None:
    model = build("pretrained", **changes)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=says):
        load(model, saved[0], strict=strict)
    assert_same(dict(model.state_dict()), before)


def test_the_other_model_is_named(tmp_path: Path) -> None:
    torch.save(VARIANTS["tiny"]().state_dict(), tmp_path / "tiny.ckpt")
    with pytest.raises(CheckpointError, match="looks like the variant 'tiny' without LoRA"):
        load(build("pretrained"), tmp_path / "tiny.ckpt", strict=False)
    torch.save(air_pollution_pair()[0], tmp_path / "air.ckpt")
    with pytest.raises(CheckpointError, match="looks like the variant 'air-pollution' with LoRA"):
        load(build("pretrained"), tmp_path / "air.ckpt", strict=False)


def test_differences_are_told_apart() -> None:
    model = build("pretrained")
    state = random_state(model)
    assert not compare(model, state)
    assert str(compare(model, state)) == ""
    state["decoder.surf_heads.rain.bias"] = torch.zeros(16)
    assert compare(model, state).optional
    state["backbone.strange"] = torch.zeros(1)
    differences = compare(model, state)
    assert differences
    assert not differences.optional
    assert (
        str(differences)
        == "the model has no place for 2 weights: decoder.surf_heads.rain.bias, backbone.strange"
    )


class Bomb:
    """Makes a directory when it is read by a careless reader."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("archive", [True, False])
def test_files_that_could_run_code_are_refused(tmp_path: Path, archive: bool) -> None:
    path = tmp_path / "x.ckpt"
    bomb = {"a": torch.zeros(1), "b": Bomb(tmp_path / "made")}
    torch.save(bomb, path, _use_new_zipfile_serialization=archive)
    with pytest.raises(CheckpointError, match=r"pickle of objects.*call \w+\.mkdir.*could run code") as said:
        read_checkpoint(path)
    # torch advises to read it nevertheless; nobody is to be told that here.
    assert "weights_only" not in str(said.value)
    assert not (tmp_path / "made").exists()


def test_damaged_files_are_refused(saved: tuple[Path, State], tmp_path: Path) -> None:
    path = saved[0]
    whole = path.read_bytes()
    torch.save({"a": torch.zeros(100)}, tmp_path / "old", _use_new_zipfile_serialization=False)
    for content in (whole[: len(whole) // 2], whole[:200], b"", b"\x80\x02not a pickle", b"<html>404</html>"):
        path.write_bytes(content)
        with pytest.raises(
            CheckpointError, match=rf"\({len(content):,} bytes\) is no checkpoint, or cut off"
        ) as said:
            read_checkpoint(path)
        assert "weights_only" not in str(said.value)
    path.write_bytes((tmp_path / "old").read_bytes()[:-150])
    with pytest.raises(CheckpointError, match="cut off"):
        read_checkpoint(path)
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")
    with pytest.raises(CheckpointError, match="git lfs pull"):
        read_checkpoint(path)
    with pytest.raises(CheckpointError, match="no checkpoint"):
        read_checkpoint(tmp_path / "none.ckpt")
    with pytest.raises(CheckpointError, match="no checkpoint"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"", "is empty"),
        (b"<!DOCTYPE html>", "seems to be a web page"),
        (b"\x89HDF\r\n\x1a\n" + bytes(100), "seems to be HDF5 or NetCDF-4"),
        (b"PK\x03\x04" + bytes(100), "seems to be an archive of torch.save"),
        (b"\x80\x02not a pickle", "seems to be a pickle"),
        (b"\x08\0\0\0\0\0\0\0" + b'{"a": 1}', "seems to be safetensors"),
        (b"some words", "is of an unknown kind"),
    ],
)
def test_it_is_said_what_a_file_seems_to_be(tmp_path: Path, content: bytes, kind: str) -> None:
    (tmp_path / "x.ckpt").write_bytes(content)
    with pytest.raises(CheckpointError, match=f"it {kind}; copy it again") as said:
        read_checkpoint(tmp_path / "x.ckpt")
    assert "weights_only" not in str(said.value)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ([torch.zeros(1)], "holds a list"),
        (torch.zeros(3), "holds a Tensor"),
        ({}, "holds a dict, no dict of tensors"),
        ({"state_dict": {"a": torch.zeros(1)}, "step": 3}, "it also holds state_dict, step: save"),
        ({1: torch.zeros(1)}, "no plain dict"),
    ],
)
def test_other_contents_are_refused(tmp_path: Path, content: object, says: str) -> None:
    torch.save(content, tmp_path / "x.ckpt")
    with pytest.raises(CheckpointError, match=says):
        read_checkpoint(tmp_path / "x.ckpt")


PUBLISHED = Published("model.ckpt", "abc")


@pytest.mark.parametrize(
    ("published", "arguments", "asked"),
    [
        (PUBLISHED, {}, ("microsoft/aurora", "model.ckpt", "abc")),
        (PUBLISHED, {"name": "other.ckpt"}, ("microsoft/aurora", "other.ckpt", "abc")),
        (PUBLISHED, {"repo": "me/mine"}, ("me/mine", "model.ckpt", "main")),
        (None, {"repo": "me/mine", "name": "x", "revision": "r"}, ("me/mine", "x", "r")),
    ],
)
def test_download(
    monkeypatch: pytest.MonkeyPatch,
    published: Published,
    arguments: dict[str, str],
    asked: tuple[str, str, str],
) -> None:
    hub: Any = types.ModuleType("huggingface_hub")
    calls: list[tuple[str, str, str]] = []

    def give(repo_id: str, filename: str, revision: str) -> str:
        calls.append((repo_id, filename, revision))
        return "cache/file"

    hub.hf_hub_download = give
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    assert weights.download(published, **arguments) == Path("cache/file")
    assert calls == [asked]


def test_downloads_that_fail_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError, match="no published checkpoint"):
        weights.download(None)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(CheckpointError, match=r"aeris-swipe\[hub\]"):
        weights.download(PUBLISHED)
    hub: Any = types.ModuleType("huggingface_hub")

    def refuse(**_: str) -> str:
        raise OSError("401 Unauthorized\nlong text")

    hub.hf_hub_download = refuse
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    with pytest.raises(
        CheckpointError, match=r"model.ckpt of microsoft/aurora at abc: OSError: 401 Unauthorized$"
    ):
        weights.download(PUBLISHED)
