"""The rules of the house: who imports whom, how large things get, which words occur where.

A rule is a function from modules to complaints. `test_rule_holds` runs each on the project and
`test_rule_can_fail` on a small module that breaks it.
`python tests/test_architecture.py` prints the largest files and functions.
"""

import ast
import re
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("swipe", "aeris", "launch")

# Visible exceptions: path -> why the file may be longer than MAX_FILE_LINES.
LONG_FILES: dict[str, str] = {}
# Visible exceptions: "path::function" -> why it may be longer than MAX_FUNCTION_LINES.
LONG_FUNCTIONS: dict[str, str] = {}
MAX_FILE_LINES, MAX_MEDIAN_LINES, MAX_FUNCTION_LINES, MAX_MODULE_DOCSTRING = 400, 170, 60, 12

DATA_PROGRAMS = tuple(f"aeris.data.{name}" for name in ("__main__", "convert", "speedy.__main__"))
PROGRAMS = (
    *("aeris.train", "aeris.replay", "aeris.forecast", "aeris.evaluate", "aeris.plan", "aeris.probe"),
    *("aeris.calibrate", "aeris.published", *DATA_PROGRAMS),
    *("aeris.aurora.finetune", "aeris.aurora.compare", "aeris.aurora.validate"),
)
# Aurora's model knows nothing beside itself; what trains and judges it may use the rest of the house.
ABOVE_AURORA = ("aeris.aurora.training", *(name for name in PROGRAMS if name.startswith("aeris.aurora.")))
# What a package may import of ours beside itself. A program inside a wing may also use aeris.log.
MAY_IMPORT: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("swipe", "launch", "aeris.config"), ()),
    "aeris.model": ("aeris.config",),
    "aeris.aurora": ("aeris.config",),
    "aeris.data": ("aeris.config", "swipe.windows"),
    "aeris.diffusion": ("aeris.config", "aeris.data.variables"),
    "aeris.scores": ("aeris.config", "aeris.data.variables"),
    "aeris.planning": ("aeris", "launch.layouts", "swipe"),
}
SPEAKERS = (*DATA_PROGRAMS, "aeris.data.commands", "aeris.diffusion.sampler")
# Inside swipe a file imports only from rows above its own.
SWIPE_ROWS = (
    ("windows", "mesh", "backend", "noise", "schedule", "stages", "sharding", "checkpoint_errors"),
    ("whereabouts", "inquiry", "stopwatch", "runthrough"),
    ("collectives", "shift", "checkpoint_files"),
    ("groups", "ulysses", "gradients", "checksums"),
    ("layout", "images", "checkpoint_reading", "watchdog", "stragglers"),
    ("edge", "checkpoint", "resume"),
    ("pipeline",),
    ("pictures", "selftest", "probe", "rehearsal"),
)
CHECKPOINTS = ("checkpoint", "checkpoint_errors", "checkpoint_files", "checkpoint_reading")
DISTRIBUTED = tuple(
    f"swipe.{name}"
    for name in ("backend", "collectives", "groups", "sharding", *CHECKPOINTS, "selftest", "inquiry")
)
FORBIDDEN_NAMES = ("util", "utils", "common", "helper", "helpers", "engine", "core", "misc")
FORBIDDEN_WORDS = re.compile(r"weather|latitude|longitude|era5|pressure", re.IGNORECASE)
CLUSTER_VARIABLES = re.compile(r"^(PBS|PALS|PMI|PMIX|OMPI|SLURM)_")
MACHINE_PATHS = re.compile(r"(?<![\w.~-])/(?:work|tmp|root|home|Users|lus|flare|scratch)/|\.\./shared\b")


@dataclass(frozen=True)
class Module:
    """A file of the project, as text and, for Python, as a syntax tree."""

    path: str
    source: str

    @cached_property
    def tree(self) -> ast.Module:
        """The syntax tree."""
        return ast.parse(self.source, self.path)

    @property
    def name(self) -> str:
        """The dotted name: swipe/windows.py is swipe.windows, swipe/__init__.py is swipe."""
        return self.path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")

    @property
    def packaged(self) -> bool:
        """Whether the file is a module of one of the packages."""
        return self.path.endswith(".py") and self.path.split("/")[0] in PACKAGES

    @cached_property
    def imports(self) -> frozenset[str]:
        """Dotted names of everything imported anywhere in the file, `from a import b` as "a.b"."""
        return frozenset(self._imports())

    def _imports(self) -> Iterator[str]:
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                base = node.module or ""
                if node.level:
                    package = (
                        self.name.split(".")
                        if self.path.endswith("/__init__.py")
                        else self.name.split(".")[:-1]
                    )
                    base = ".".join([*package[: len(package) - node.level + 1], *([base] if base else [])])
                yield from (f"{base}.{alias.name}" for alias in node.names)
            elif isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.distributed":
                yield "torch.distributed"
            elif isinstance(node, ast.Call) and ast.unparse(node.func) in (
                "importlib.import_module",
                "__import__",
            ):
                yield from (
                    arg.value
                    for arg in node.args
                    if isinstance(arg, ast.Constant) and isinstance(arg.value, str)
                )


def within(name: str, *packages: str) -> bool:
    """Tell whether `name` is one of the packages or inside one."""
    return any(name == package or name.startswith(package + ".") for package in packages)


def guest_list(modules: list[Module]) -> Iterator[str]:
    """A package imports of ours only what its row in MAY_IMPORT says."""
    for module in modules:
        for package, allowed in MAY_IMPORT.items():
            if not within(module.name, package) or not module.packaged or within(module.name, *ABOVE_AURORA):
                continue
            extra = ("aeris.log", "launch.rank") if within(module.name, *SPEAKERS) else ()
            for target in sorted(module.imports):
                if within(target, *PACKAGES) and not within(target, package, *allowed, *extra):
                    yield f"{module.path} imports {target}; {package} may import only {[package, *allowed]}"


def nobody_imports_a_program(modules: list[Module]) -> Iterator[str]:
    """Programs are at the top: no module of a package imports one."""
    for module in modules:
        for target in sorted(module.imports):
            if module.packaged and within(target, *PROGRAMS) and not within(target, module.name):
                yield f"{module.path} imports the program {target}"


def swipe_points_down(modules: list[Module]) -> Iterator[str]:
    """Inside swipe, imports go to earlier rows of SWIPE_ROWS only, and every file has a row."""
    row = {f"swipe.{name}": index for index, names in enumerate(SWIPE_ROWS) for name in names}
    for module in modules:
        if not module.path.startswith("swipe/") or module.name == "swipe":
            continue
        if module.name not in row:
            yield f"{module.path} has no row in SWIPE_ROWS"
            continue
        for target in module.imports:
            for other, index in row.items():
                if within(target, other) and other != module.name and index >= row[module.name]:
                    yield f"{module.path} imports {other}, which is not below it"


def distributed_only_in_swipe(modules: list[Module]) -> Iterator[str]:
    """torch.distributed is used in a few files of swipe and nowhere else."""
    for module in modules:
        if module.packaged and module.name not in DISTRIBUTED:
            if any(within(target, "torch.distributed") for target in module.imports):
                yield f"{module.path} uses torch.distributed; only {DISTRIBUTED} may"


def launch_is_light(modules: list[Module]) -> Iterator[str]:
    """Launch imports the standard library, and mpi4py or ezpz where guarded by `try` or inside a function."""
    for module in modules:
        if not module.path.startswith("launch/"):
            continue
        top = Module(
            module.path, "\n".join(ast.unparse(n) for n in module.tree.body if not isinstance(n, ast.Try))
        )
        for target in sorted(module.imports):
            root = target.split(".")[0]
            if root not in (*sys.stdlib_module_names, "launch", "mpi4py", "ezpz"):
                yield f"{module.path} imports {target}, which is not of the standard library"
        outer = [n for n in top.tree.body if isinstance(n, (ast.Import, ast.ImportFrom))]
        for target in Module(module.path, "\n".join(map(ast.unparse, outer))).imports:
            if within(target, "mpi4py", "ezpz"):
                yield f"{module.path} imports {target} unguarded"


def cluster_variables_only_in_launch(modules: list[Module]) -> Iterator[str]:
    """Only launch reads the environment variables of schedulers and MPI libraries."""
    for module in modules:
        if not module.packaged or module.path.startswith("launch/"):
            continue
        for node in ast.walk(module.tree):
            if (
                isinstance(node, ast.Constant)
                and isinstance(node.value, str)
                and CLUSTER_VARIABLES.match(node.value)
            ):
                yield f"{module.path}:{node.lineno} names {node.value}; only launch reads it"


def no_cycles(modules: list[Module]) -> Iterator[str]:
    """No module imports itself through others."""
    names = {module.name for module in modules if module.packaged}
    links: dict[str, set[str]] = {}
    for module in modules:
        if module.packaged:
            found = {max((n for n in names if within(t, n)), key=len, default="") for t in module.imports}
            links[module.name] = found - {"", module.name}
    for start in sorted(links):
        seen: set[str] = set()
        open_ends = list(links[start])
        while open_ends:
            here = open_ends.pop()
            if here == start:
                yield f"{start} imports itself through {sorted(seen)}"
                break
            if here not in seen:
                seen.add(here)
                open_ends += links[here]


def swipe_knows_no_images(modules: list[Module]) -> Iterator[str]:
    """The words of one application do not occur in swipe, neither in code nor in prose."""
    for module in modules:
        if module.path.startswith("swipe/"):
            for number, line in enumerate(module.source.splitlines(), 1):
                if match := FORBIDDEN_WORDS.search(line):
                    yield f"{module.path}:{number} says {match.group()!r}"


def file_names_say_something(modules: list[Module]) -> Iterator[str]:
    """No file or directory is called utils, common, helpers, engine or core."""
    for module in modules:
        for part in module.path.removesuffix(".py").split("/"):
            if part in FORBIDDEN_NAMES:
                yield f"{module.path}: {part!r} is no word a reader searches for"


def files_are_small(modules: list[Module]) -> Iterator[str]:
    """No file is over 400 lines, and half of the modules are at most 170."""
    sizes = [module.source.count("\n") for module in modules if module.packaged]
    if sizes and statistics.median(sizes) > MAX_MEDIAN_LINES:
        yield f"the median module has {statistics.median(sizes)} lines, more than {MAX_MEDIAN_LINES}"
    for module in modules:
        lines = module.source.count("\n")
        if module.path.endswith(".py") and lines > MAX_FILE_LINES and module.path not in LONG_FILES:
            yield f"{module.path} has {lines} lines, more than {MAX_FILE_LINES}"


def functions(module: Module) -> Iterator[tuple[str, int]]:
    """List every function of a module with its number of lines, the docstring not counted."""
    for node in ast.walk(module.tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.end_lineno:
            first = node.body[0]
            prose = (first.end_lineno or 0) - first.lineno + 1 if ast.get_docstring(node) is not None else 0
            yield f"{module.path}::{node.name}", node.end_lineno - node.lineno + 1 - prose


def functions_are_small(modules: list[Module]) -> Iterator[str]:
    """No function is over 60 lines; the aim is 45."""
    for module in modules:
        if module.path.endswith(".py"):
            for name, lines in functions(module):
                if lines > MAX_FUNCTION_LINES and name not in LONG_FUNCTIONS:
                    yield f"{name} has {lines} lines, more than {MAX_FUNCTION_LINES}"


def everything_public_is_described(modules: list[Module]) -> Iterator[str]:
    """Every module and everything public in it has a docstring; a module's has at most 12 lines."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    for module in modules:
        if not module.path.endswith(".py"):
            continue
        prose = ast.get_docstring(module.tree)
        if prose is None:
            yield f"{module.path} has no docstring"
        elif len(prose.splitlines()) > MAX_MODULE_DOCSTRING:
            yield f"{module.path}: its docstring has more than {MAX_MODULE_DOCSTRING} lines"
        if not module.packaged:
            continue
        nodes = [n for n in module.tree.body if isinstance(n, kinds)]
        classes = [n for n in nodes if isinstance(n, ast.ClassDef) and not n.name.startswith("_")]
        nodes += [n for c in classes for n in c.body if isinstance(n, kinds)]
        for node in nodes:
            # A stub (`...`) is described by the Protocol it belongs to.
            stub = ast.unparse(node.body[-1]) == "..."
            if not node.name.startswith("_") and not stub and ast.get_docstring(node) is None:
                yield f"{module.path}:{node.lineno} {node.name} has no docstring"


def no_machine_paths(modules: list[Module]) -> Iterator[str]:
    """Nothing in the tree depends on where somebody's machine keeps things."""
    for module in modules:
        for number, line in enumerate(module.source.splitlines(), 1):
            if module.path != "tests/test_architecture.py" and (match := MACHINE_PATHS.search(line)):
                yield f"{module.path}:{number} names {match.group()}"


Rule = Callable[[list[Module]], Iterator[str]]
# Each rule with modules that break it.
RULES: list[tuple[Rule, dict[str, str]]] = [
    (guest_list, {"swipe/x.py": "def f():\n    from aeris.data import store"}),
    (guest_list, {"aeris/model/x.py": "import swipe.windows"}),
    (guest_list, {"aeris/model/x.py": "from ..data import variables"}),
    (guest_list, {"aeris/data/x.py": "from swipe import noise"}),
    (guest_list, {"aeris/scores/x.py": "from aeris.data.store import Store"}),
    (guest_list, {"aeris/diffusion/x.py": "from aeris.model.swin import Swin"}),
    (guest_list, {"aeris/data/x.py": "from aeris.log import run_program"}),
    (nobody_imports_a_program, {"aeris/optim.py": "from aeris import train"}),
    (
        nobody_imports_a_program,
        {"aeris/data/x.py": "import importlib\nimportlib.import_module('aeris.data.convert')"},
    ),
    (swipe_points_down, {"swipe/schedule.py": "from swipe.pipeline import Stage"}),
    (swipe_points_down, {"swipe/windows.py": "from . import noise"}),
    (swipe_points_down, {"swipe/unheard_of.py": ""}),
    (distributed_only_in_swipe, {"aeris/train.py": "import torch.distributed as dist"}),
    (distributed_only_in_swipe, {"swipe/noise.py": "from torch import distributed"}),
    (distributed_only_in_swipe, {"aeris/ema.py": "import torch\ntorch.distributed.barrier()"}),
    (launch_is_light, {"launch/rank.py": "import numpy"}),
    (launch_is_light, {"launch/rank.py": "from mpi4py import MPI"}),
    (cluster_variables_only_in_launch, {"aeris/log.py": "import os\nos.environ['PBS_JOBID']"}),
    (
        no_cycles,
        {"swipe/a.py": "import swipe.b", "swipe/b.py": "from . import c", "swipe/c.py": "from .a import f"},
    ),
    (swipe_knows_no_images, {"swipe/x.py": '"""Tokens of a Weather map."""'}),
    (file_names_say_something, {"aeris/data/utils.py": ""}),
    (file_names_say_something, {"swipe/core/x.py": ""}),
    (files_are_small, {"swipe/x.py": "x = 1\n" * 401}),
    (files_are_small, {"swipe/x.py": "x = 1\n" * 171}),
    (functions_are_small, {"tests/x.py": "def f():\n" + "    x = 1\n" * 60}),
    (everything_public_is_described, {"swipe/x.py": "x = 1"}),
    (everything_public_is_described, {"swipe/x.py": '"""' + "Line.\n" * 13 + '"""'}),
    (everything_public_is_described, {"swipe/x.py": '"""Doc."""\ndef f(): return 1'}),
    (
        everything_public_is_described,
        {"swipe/x.py": '"""Doc."""\nclass A:\n    """Doc."""\n    def f(self): return 1'},
    ),
    (no_machine_paths, {"docs/x.md": "see /" + "home/somebody/data"}),
    (no_machine_paths, {"Makefile": "cp .." + "/shared/x ."}),
]


@cache
def project() -> list[Module]:
    """Read the project's own text files."""
    patterns = [f"{top}/**/*.py" for top in (*PACKAGES, "benchmarks", "tests")]
    patterns += ["*.py", "*.md", "*.toml", "*.yaml", "Makefile", ".ci/*", ".pre-commit-config.yaml"]
    patterns += ["docs/**/*.md", "pbs/**/*", "launch/slurm/**/*", "aeris/**/*.md", "tests/**/*.md"]
    found = sorted({path for pattern in patterns for path in ROOT.glob(pattern) if path.is_file()})
    return [Module(path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")) for path in found]


@pytest.mark.parametrize("rule", dict.fromkeys(rule for rule, _ in RULES), ids=lambda rule: rule.__name__)
def test_rule_holds(rule: Rule) -> None:
    problems = list(rule([m for m in project() if m.path.endswith(".py") or rule is no_machine_paths]))
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize(("rule", "files"), RULES, ids=lambda value: getattr(value, "__name__", ""))
def test_rule_can_fail(rule: Rule, files: dict[str, str]) -> None:
    assert list(rule([Module(path, source) for path, source in files.items()]))


def test_allowed_imports_pass() -> None:
    good = {
        "aeris/data/x.py": "from swipe.windows import WindowGrid\nfrom .variables import channel",
        "aeris/data/convert.py": "from aeris.log import run_program",
        "aeris/train.py": "from swipe import noise\nfrom aeris.model import swin\nimport aeris.data.store",
        "swipe/pipeline.py": "from swipe.schedule import schedule\nimport torch",
        "launch/rank.py": "import os\ntry:\n    from mpi4py import MPI\nexcept ImportError:\n    MPI = None",
    }
    modules = [Module(path, source) for path, source in good.items()]
    for rule in (guest_list, nobody_imports_a_program, swipe_points_down, launch_is_light, no_cycles):
        assert not list(rule(modules))


def test_exceptions_are_still_needed() -> None:
    files = {m.path: m for m in project() if m.path.endswith(".py")}
    lengths = {name: lines for m in files.values() for name, lines in functions(m)}
    assert all(files[path].source.count("\n") > MAX_FILE_LINES for path in LONG_FILES)
    assert all(lengths[name] > MAX_FUNCTION_LINES for name in LONG_FUNCTIONS)


def report(count: int = 12) -> None:
    """Print the largest files and functions."""
    modules = [m for m in project() if m.path.endswith(".py")]
    lengths = sorted((lines, name) for m in modules for name, lines in functions(m))
    sizes = sorted((m.source.count("\n"), m.path) for m in modules)
    for lines, name in [*sizes[-count:][::-1], *lengths[-count:][::-1]]:
        print(f"{lines:5d}  {name}")
    packaged = [m.source.count("\n") for m in modules if m.packaged]
    print(f"median of {len(packaged)} modules: {statistics.median(packaged)} lines")


if __name__ == "__main__":
    report()
