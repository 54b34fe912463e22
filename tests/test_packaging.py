"""What setup.py declares fits the code: imports, requirements, data files."""

import ast
import fnmatch
import re
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import setuptools
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).resolve().parents[1]
# Distribution -> the name it is imported by, where they differ.
IMPORT_NAMES = {
    "huggingface-hub": "huggingface_hub",
    "intel-extension-for-pytorch": "intel_extension_for_pytorch",
    "microsoft-aurora": "aurora",
}
# Needed without being imported by name: xarray's engine for NetCDF; MPI, imported where it is found.
INDIRECT = {"h5netcdf", "mpi4py"}


@pytest.fixture(scope="module")
def declared() -> dict[str, Any]:
    """Return the arguments setup.py passes to setuptools.setup."""
    caught: dict[str, Any] = {}
    patch = pytest.MonkeyPatch()
    with patch.context() as context:
        context.chdir(ROOT)
        context.setattr(setuptools, "setup", caught.update)
        runpy.run_path("setup.py")
    return caught


def names(requirements: list[str]) -> set[str]:
    """Return the import names of a list of requirements."""
    parsed = (Requirement(text).name for text in requirements)
    return {IMPORT_NAMES.get(name, name) for name in parsed}


def third_party(path: Path) -> set[str]:
    """Return the top-level names of other people's packages that a file imports, at any depth."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            found.add(node.module.split(".")[0])
    return found - set(sys.stdlib_module_names) - {"aeris", "swipe", "launch"}


def package_files(suffix: str) -> list[Path]:
    """List the files of the packages."""
    return [path for top in ("aeris", "swipe", "launch") for path in sorted((ROOT / top).rglob(f"*{suffix}"))]


def test_every_package_is_installed(declared: dict[str, Any]) -> None:
    folders = {path.parent for path in package_files(".py")}
    assert {folder.relative_to(ROOT).as_posix().replace("/", ".") for folder in folders} == set(
        declared["packages"]
    )


def test_every_import_is_declared(declared: dict[str, Any]) -> None:
    required = names(declared["install_requires"])
    optional = set().union(*(names(extra) for extra in declared["extras_require"].values()))
    for path in package_files(".py"):
        assert third_party(path) <= required | optional, path
    used = set().union(*(third_party(path) for path in package_files(".py")))
    assert required - used <= INDIRECT, "required but never imported"


def test_optional_packages_are_not_imported_at_the_top(declared: dict[str, Any]) -> None:
    lazy = set().union(*(names(extra) for extra in declared["extras_require"].values())) | {"mpi4py"}
    for path in package_files(".py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                assert re.findall(r"\w+", ast.unparse(node))[1] not in lazy, path


def test_data_files_are_shipped(declared: dict[str, Any]) -> None:
    for path in package_files(""):
        inside = path.relative_to(ROOT).as_posix()
        if path.is_dir() or path.suffix in (".py", ".pyc"):
            continue
        patterns = [
            f"{package.replace('.', '/')}/{pattern}"
            for package, listed in declared["package_data"].items()
            for pattern in listed
        ]
        assert any(fnmatch.fnmatch(inside, pattern) for pattern in patterns), f"{inside} would be missing"


def test_the_sample_is_small() -> None:
    sizes_bytes = [path.stat().st_size for path in (ROOT / "aeris/data/sample").glob("*")]
    assert 0 < sum(sizes_bytes) <= 12e6


def test_versions(declared: dict[str, Any]) -> None:
    torch = next(
        Requirement(text) for text in declared["install_requires"] if Requirement(text).name == "torch"
    )
    for version in ("2.8.0", "2.10.0a0+git449b176", "2.11.0", "2.13.0+cpu"):
        assert torch.specifier.contains(version, prereleases=True)
    assert not torch.specifier.contains("2.14.0")
    assert SpecifierSet(declared["python_requires"]).contains("3.10")
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert "## Unreleased" in changes or f"## {declared['version']}" in changes


def test_ezpz_is_never_declared(declared: dict[str, Any]) -> None:
    """The public package of that name is another project."""
    groups = [declared["install_requires"], *declared["extras_require"].values()]
    assert not any("ezpz" in names(group) for group in groups)
    assert set(declared["extras_require"]) == {
        *("mpi", "plot", "dev", "deepspeed", "intel", "hub", "official", "speedy", "grib", "cloud")
    }
