"""The reader of published weights: their keys, their network written naively, files that are refused."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from aeris.config import ModelConfig
from aeris.model import published
from aeris.model.published import PublishedError, Sizes
from aeris.parallelize import build_model, make_layout
from aeris.presets import PRESETS
from tests.published_files import naive, stage_shapes, write_weights

LIKE_THEIRS = {
    "row_offset": 1,
    "layers": 8,
    "blocks": 3,
    "width": 16,
    "heads": 2,
    "hidden": 24,
    "rope": False,
    "poles": "cyclic",
    "norm_order": "modulate-norm",
    "norm_eps": 2.0**-23,
    "time_rounding": "bf16",
    "precision": "fp32",
    "residual": "fp32",
}
GRIDS = {6: (12, 24, 6), 24: (24, 48, 12)}  # rows, columns, window


@pytest.fixture(scope="module", params=[6, 24])
def files(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple:
    directory = tmp_path_factory.mktemp("weights")
    return request.param, directory, write_weights(directory, request.param)


@pytest.fixture(scope="module")
def six(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("six")
    write_weights(directory, 6)
    return directory


def test_output_equals_the_naive_network(files: tuple) -> None:
    """8 layers of 3 blocks, 142 inputs and 69 outputs (6 h) or 144 and 70 (24 h), in fp32, to 1e-5."""
    interval_h, directory, stages = files
    rows, cols, window = GRIDS[interval_h]
    sizes = published.measure(directory)
    config = ModelConfig(rows=rows, cols=cols, window=window, **LIKE_THEIRS)  # type: ignore[arg-type]
    assert Sizes.of(config, sizes.channels) == sizes
    assert (sizes.in_channels, sizes.channels) == {6: (142, 69), 24: (144, 70)}[interval_h]
    layout = make_layout(config)
    model = build_model(config, sizes.in_channels, sizes.channels, layout, "cpu").requires_grad_(False)
    published.load(directory, sizes, dict(model.named_parameters()))
    x = torch.randn(1, sizes.in_channels, rows, cols)
    for t in (math.atan(0.2), 1.5688):
        y = layout.from_windows(model(layout.to_windows(x), torch.tensor([t])))[0]
        expected = naive(stages, x[0], t, window, heads=2)
        assert 0.1 < expected.std() < 100
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("interval_h", [6, 24])
def test_every_tensor_of_the_full_model_has_its_key(interval_h: int) -> None:
    """1.31 billion parameters by name and shape; 4,758,528 are left over."""
    preset = PRESETS[f"1.3b-{interval_h}h"]()
    channels = len(preset.data.channels)
    sizes = Sizes.of(preset.model, channels)
    shapes = build_model(preset.model, sizes.in_channels, channels, make_layout(preset.model), "meta")
    theirs = stage_shapes(interval_h, width=1536, hidden=6144)
    names, used, left = {}, 0, 0
    for stage, file in enumerate(theirs):
        wanted = published.expected(sizes, stage)
        for key, shape in file.items():
            if key in wanted:
                assert wanted.pop(key)[1] == shape
                used += math.prod(shape)
            elif key != "ape.inv_freq":
                left += math.prod(shape)
        assert not wanted
        names |= dict(published.expected(sizes, stage).values())
        assert all(
            published.stage_of(ours, sizes) == stage for ours, _ in published.expected(sizes, stage).values()
        )
    assert {name: tuple(p.shape) for name, p in shapes.named_parameters()} == names
    assert used == {6: 1_310_072_832, 24: 1_310_072_832 + 3 * 1536}[interval_h]
    assert left == 4_758_528


def test_a_stage_opens_its_files_only(six: Path, tmp_path: Path) -> None:
    sizes = published.measure(six)
    (tmp_path / "checkpoint_PP3.pth").symlink_to(six / "checkpoint_PP3.pth")
    name = "layers.2.1.mlp.down.weight"
    tensor = torch.empty(16, 24)
    published.load(tmp_path, sizes, {name: tensor})
    weights, images = published.read_stage(six / "checkpoint_PP3.pth")
    assert torch.equal(tensor, weights["modulelist.1.3.w2.weight"])
    assert images == 1_100_000


class Hostile:
    """Makes a directory when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., None], tuple[str]]:
        return os.mkdir, (str(self.path),)


def change(path: Path, entry: str, **tensors: object) -> None:
    """Write a file anew with other tensors; None removes one."""
    content = torch.load(path, weights_only=True)
    content[entry] |= tensors
    content[entry] = {name: x for name, x in content[entry].items() if x is not None}
    torch.save(content, path)


@pytest.mark.parametrize("how", ["pickle", "legacy"])
def test_a_file_that_would_run_code_is_refused(how: str, six: Path, tmp_path: Path) -> None:
    path, trap = tmp_path / "checkpoint_PP0.pth", tmp_path / "trap"
    content = {"ema_state_dict": {}, "more": Hostile(trap)}
    torch.save(content, path, _use_new_zipfile_serialization=how == "pickle")
    with pytest.raises(PublishedError, match="checkpoint_PP0.pth (was not loaded: it names|cannot be read)"):
        published.read_stage(path)
    assert not trap.exists()


def damaged(kind: str, directory: Path) -> None:
    third, last = directory / "checkpoint_PP3.pth", directory / "checkpoint_PP9.pth"
    d = torch.zeros(16)
    if kind == "truncated":
        third.write_bytes(third.read_bytes()[:-1000])
    elif kind == "empty":
        third.write_bytes(b"")
    elif kind in ("stage", "last stage"):
        (third if kind == "stage" else last).unlink()
    elif kind == "nothing":
        shutil.rmtree(directory)
    elif kind == "no averages":
        torch.save({"model_state_dict": {}}, third)
    elif kind == "missing":
        change(third, "ema_state_dict", **{"modulelist.1.1.wo.weight": None})
    elif kind == "unexpected":
        change(third, "ema_state_dict", **{"modulelist.1.5.weight": d})
    elif kind == "shape":
        change(third, "ema_state_dict", **{"modulelist.2.3.w2.weight": torch.zeros(16, 20)})
    elif kind == "other stage":
        shutil.copy(last, third)
    elif kind == "nan":
        change(third, "ema_state_dict", **{"modulelist.0.0.weight": d / 0})
    elif kind == "head":
        change(last, "ema_state_dict", **{"head.weight": torch.zeros(70, 16)})


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("truncated", r"checkpoint_PP3.pth cannot be read \(.*\): cut off, or no file of torch.save"),
        ("empty", "checkpoint_PP3.pth cannot be read"),
        ("stage", "lacks checkpoint_PP3.pth: copy all of its files"),
        ("last stage", "checkpoint_PP8.pth has no head.weight: .* checkpoint_PP9.pth is missing"),
        ("nothing", "has no checkpoint_PP0.pth: it is not a directory of published weights"),
        ("no averages", "checkpoint_PP3.pth has no ema_state_dict of tensors, only model_state_dict"),
        ("missing", r"checkpoint_PP3.pth lacks modulelist.1.1.wo.weight: it is of another"),
        ("unexpected", r"checkpoint_PP3.pth has, beyond .*, modulelist.1.5.weight: it is of another"),
        ("shape", r"PP3.pth: modulelist.2.3.w2.weight is \(16, 20\), the network's is \(16, 24\)"),
        ("other stage", "checkpoint_PP3.pth lacks modulelist.0.0.weight and 29 more"),
        ("nan", "checkpoint_PP3.pth: modulelist.0.0.weight is not finite"),
        ("head", "proj.weight has 142 input channels; checkpoint_PP9.pth has 70 outputs, which makes 144"),
    ],
)
def test_what_is_wrong_is_said(kind: str, message: str, six: Path, tmp_path: Path) -> None:
    directory = tmp_path / "weights"
    shutil.copytree(six, directory)
    damaged(kind, directory)
    with pytest.raises(PublishedError, match=message):
        sizes = published.measure(directory)
        names = [ours for stage in range(10) for ours, _ in published.expected(sizes, stage).values()]
        for _ in published.tensors(directory, sizes, names):
            pass
