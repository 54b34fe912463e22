"""Pictures come out whole and the same every time, and show what the plans say; and what `swipe` names."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

import swipe
from swipe import pictures
from swipe.mesh import ParallelDims
from swipe.schedule import SCHEDULES, one_f_one_b, render, simulate
from swipe.windows import WindowGrid

ROOT = Path(__file__).resolve().parents[2]
MAX_BYTES = 80_000


def check(path: Path) -> None:
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert path.stat().st_size < MAX_BYTES
    assert not list(path.parent.glob("*.part"))
    image = imread(path)
    assert min(image.shape[:2]) > 150
    assert (image[..., :3].min(axis=-1) < 0.9).mean() > 0.02


def test_all_pictures_of_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pictures.main([str(tmp_path / "new")])
    names = sorted(path.name for path in (tmp_path / "new").iterdir())
    assert names == ["mesh.png", "quadrants.png", "schedule.png", "shift.png"]
    assert len(capsys.readouterr().out.splitlines()) == 4
    page = (ROOT / "docs/swipe.md").read_text(encoding="utf-8")
    for name in names:
        check(tmp_path / "new" / name)
        check(ROOT / "docs/pictures" / name)
        assert f"](pictures/{name})" in page


@pytest.mark.parametrize("degrees", [(1, 1, 1, 1, 1), (1, 1, 2, 4, 2), (1, 2, 3, 2, 12), (3, 1, 1, 8, 1)])
def test_any_mesh(degrees: tuple[int, ...], tmp_path: Path) -> None:
    pictures.draw_mesh(tmp_path / "mesh.png", ParallelDims(*degrees))
    check(tmp_path / "mesh.png")


@pytest.mark.parametrize(
    ("name", "stages", "microbatches"), [("1f1b", 1, 1), ("zero-bubble", 3, 2), ("1f1b", 12, 40)]
)
def test_any_schedule(name: str, stages: int, microbatches: int, tmp_path: Path) -> None:
    pictures.draw_schedule(simulate(SCHEDULES[name](stages, microbatches)), tmp_path / "a.png", name)
    pictures.draw_schedule(simulate(SCHEDULES[name](stages, microbatches)), tmp_path / "b.png", name)
    check(tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


@pytest.mark.parametrize("wp", [(1, 1), (2, 2), (2, 3), (4, 1)])
@pytest.mark.parametrize("sp", [1, 2, 3, 4, 12])
def test_owners_after_the_shift_are_those_of_the_rolled_image(wp: tuple[int, int], sp: int) -> None:
    grid = WindowGrid(4 * 12, 6 * 12, 12)
    before, after = pictures.owners(grid, wp, sp), pictures.owners(grid, wp, sp, +1)
    np.testing.assert_array_equal(np.bincount(before.flat), grid.rows * grid.cols // (wp[0] * wp[1] * sp))
    np.testing.assert_array_equal(after, np.roll(before, (6, 6), (0, 1)))


def test_tokens_are_back_in_their_place_on_every_second_stage() -> None:
    dims = ParallelDims(dp=2, wp_y=2, wp_x=2, pp=4, sp=4)
    way = pictures.token_way(dims)
    assert way == [0, 55, 8, 63]  # place 0, top left of its windows, and place 15, bottom right of others
    assert [dims.coordinate(rank).pp for rank in way] == [0, 1, 2, 3]
    assert [dims.place(rank) for rank in way] == [0, 15, 0, 15]


def test_without_matplotlib_the_message_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install 'aeris-swipe\[plot\]'"):
        pictures.draw_shift(tmp_path / "a.png")
    assert not list(tmp_path.iterdir())


def test_public_names_are_those_a_type_checker_sees() -> None:
    tree = ast.parse(Path(swipe.__file__).read_text(encoding="utf-8"))
    imports = [
        node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module != "typing"
    ]
    seen = {alias.name: node.module for node in imports for alias in node.names if node.module != "importlib"}
    assert sorted(seen) == sorted(swipe.__all__)
    for name, module in seen.items():
        assert getattr(swipe, name).__module__ == module
        assert name in dir(swipe)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = swipe.nothing  # type: ignore[attr-defined]


def test_importing_swipe_imports_neither_torch_nor_numpy() -> None:
    code = "import sys, swipe; swipe.ParallelDims(); print({'torch', 'numpy'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "set()"


def test_the_table_of_the_page_is_what_render_prints() -> None:
    page = (ROOT / "docs/swipe.md").read_text(encoding="utf-8")
    assert f"```\n{render(simulate(one_f_one_b(4, 6), backward=1.0))}\n```" in page
