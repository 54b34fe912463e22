"""Nothing of ours gives text to a shell or an interpreter, and nothing loads objects that could run code."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PLACES = ("aeris", "swipe", "launch", "benchmarks", "docs")
# What takes a string and runs it, or unpickles what it is given.
FORBIDDEN = (
    "os.system", "os.popen", "os.execl", "os.execlp", "os.spawnl", "os.spawnlp", "eval", "exec",
    "subprocess.getoutput", "subprocess.getstatusoutput", "asyncio.create_subprocess_shell", "pty.spawn",
    "pickle.load", "pickle.loads", "pickle.Unpickler", "marshal.load", "marshal.loads", "shelve.open",
    "yaml.load", "joblib.load", "code.interact",
)  # fmt: skip
# Loads of objects that are allowed: file -> why.
TRUSTED: dict[str, str] = {}


def dangers(source: str) -> Iterator[str]:
    """Find calls that a text from outside could turn into a program."""
    tree = ast.parse(source)
    names = {}  # what a name stands for: `from os import system as s` makes s os.system
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.asname: alias.name for alias in node.names if alias.asname}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        first, dot, rest = ast.unparse(node.func).partition(".")
        called = f"{names.get(first, first)}{dot}{rest}"
        named = {word.arg: ast.unparse(word.value) for word in node.keywords}
        if called in FORBIDDEN:
            yield f"{node.lineno}: calls {called}"
        if named.get("shell", "False") != "False":
            yield f"{node.lineno}: {called} with a shell"
        if called == "torch.load" and named.get("weights_only") != "True":
            yield f"{node.lineno}: torch.load without weights_only=True"
        if called in ("numpy.load", "np.load") and named.get("allow_pickle", "False") != "False":
            yield f"{node.lineno}: {called} of pickles"
        if (
            called.startswith("subprocess.")
            and node.args
            and isinstance(node.args[0], (ast.JoinedStr, ast.BinOp))
        ):
            if not isinstance(node.args[0], ast.BinOp) or not isinstance(node.args[0].left, ast.List):
                yield f"{node.lineno}: {called} of a text that is put together"


def test_nothing_runs_what_it_is_told() -> None:
    files = [path for place in PLACES for path in sorted((ROOT / place).rglob("*.py"))]
    assert len(files) > 100
    found = {
        path.relative_to(ROOT).as_posix(): list(dangers(path.read_text(encoding="utf-8"))) for path in files
    }
    problems = [f"{name}:{what}" for name, these in found.items() if name not in TRUSTED for what in these]
    assert not problems, "\n".join(problems)
    assert all(found[name] for name in TRUSTED), "no longer needed"


@pytest.mark.parametrize(
    "source",
    [
        "import os\nos.system('a')",
        "from os import popen as p\np('a')",
        "import subprocess as s\ns.run('a', shell=True)",
        "import subprocess\nsubprocess.run(['a'], shell=words)",
        "import subprocess\nsubprocess.run(f'a {b}')",
        "import torch\ntorch.load(f)",
        "import torch\ntorch.load(f, weights_only=False)",
        "from torch import load\nload(f)",
        "eval('1')",
        "import pickle\npickle.loads(b)",
        "import numpy as np\nnp.load(f, allow_pickle=True)",
    ],
)
def test_the_rule_can_fail(source: str) -> None:
    assert list(dangers(source))


def test_the_rule_lets_pass_what_is_harmless() -> None:
    source = "import subprocess, torch\nsubprocess.run(['a', b], shell=False)\nsubprocess.run([*a] + b)\n"
    assert not list(dangers(source + "model.eval()\ntorch.load(f, weights_only=True)\nre.compile('a')"))
