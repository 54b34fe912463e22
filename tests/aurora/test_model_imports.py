"""What importing the model imports."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path


def test_the_model_needs_torch_and_numpy_alone() -> None:
    """What reads and writes files is imported by the functions that do; followed from `aeris.aurora` on."""
    root, seen, others = Path(__file__).parents[2], set[str](), set[str]()
    waiting = ["aeris.aurora", *(f"aeris.aurora.{name}" for name in ("wave", "v1p5", "air_pollution"))]
    waiting += ["aeris.aurora.batch_files", "aeris.aurora.rollout", "aeris.aurora.tracker"]
    while waiting:
        name = waiting.pop()
        path = root / name.replace(".", "/")
        file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        if name in seen or not file.exists():
            continue
        seen.add(name)
        for target in imported_at_once(ast.parse(file.read_text(encoding="utf-8"))):
            waiting.append(target) if target.startswith("aeris") else others.add(target.partition(".")[0])
    assert len(seen) > 25
    assert others - {*sys.stdlib_module_names} == {"torch", "numpy"}


def imported_at_once(tree: ast.AST) -> Iterator[str]:
    """Give the names that importing a module imports: none inside functions, none for the type checker."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield str(node.module)
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif (
            not isinstance(node, (ast.FunctionDef, ast.Lambda))
            and "TYPE_CHECKING" not in ast.unparse(node)[:20]
        ):
            yield from imported_at_once(node)
