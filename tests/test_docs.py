"""What the README and docs/ say is true: places exist, links resolve, commands and their flags are real."""

import os
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
MAX_README_LINES = 150
# Need no row of their own in the where-is-what table; the parts of "aeris" have theirs.
UNLISTED = {"aeris", "runs", "build", "dist"}

LINK = re.compile(r"\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+\s+(.*)$", re.MULTILINE)
FENCE = re.compile(r"^```[a-z]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`([^`\n]+)`")
MODULE = re.compile(r"\bpython3? -m ((?:aeris|swipe|launch)[\w.]*)(.*)")
FLAG = re.compile(r"--[a-z][\w.-]*")
COMMANDS = {"launch": "[a-z]+", "aeris.data": "[a-z]+", "aeris.data.speedy": "ensemble"}


def links(text: str) -> list[str]:
    """List the targets of a page's links that point into the project, code left out."""
    prose = INLINE.sub("", FENCE.sub("", text))
    return [target for target in LINK.findall(prose) if not re.match(r"[a-z]+:", target)]


def anchors(text: str) -> set[str]:
    """List the names a page's headings can be linked by."""
    plain = (re.sub(r"[^\w\- ]", "", title.lower()) for title in HEADING.findall(FENCE.sub("", text)))
    return {title.strip().replace(" ", "-") for title in plain}


def broken_links(page: Path, text: str) -> list[str]:
    """List the links of a page that lead nowhere."""
    broken = []
    for target in links(text):
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (anchor and anchor not in anchors(file.read_text(encoding="utf-8"))):
            broken.append(target)
    return broken


def commands(text: str) -> list[tuple[str, tuple[str, ...]]]:
    """List the (program, flags) of every `python -m ...` command a page shows.

    A program is a module, or a module and its command ("launch submit"); behind ` -- ` stands another.
    """
    found = []
    indented = "\n".join(line for line in FENCE.sub("", text).splitlines() if line.startswith("    "))
    code = [*FENCE.findall(text), indented, *INLINE.findall(FENCE.sub("", text))]
    for line in "\n".join(code).replace("\\\n", " ").splitlines():
        if match := MODULE.search(line.split(" # ")[0]):
            own, _, after = match[2].partition(" -- ")
            command = re.match(rf" {COMMANDS[match[1]]}\b", own) if match[1] in COMMANDS else None
            found.append((match[1] + (command[0] if command else ""), tuple(FLAG.findall(own))))
            if started := re.match(r"(aeris[\w.]+)(.*)", after):
                found.append((started[1], tuple(FLAG.findall(started[2]))))
    return found


def table(readme: str) -> list[str]:
    """List the places of the where-is-what table: the code words in the first column."""
    section = readme.split("## Where is what", 1)[1].split("\n## ", 1)[0]
    rows = [line.split("|")[1] for line in section.splitlines() if line.startswith("|")]
    return [word for row in rows for word in INLINE.findall(row)]


def missing_places(places: list[str], root: Path) -> list[str]:
    """List what the table names and the tree does not have."""
    return [place for place in places if not (root / place).exists()]


def unlisted_places(places: list[str], root: Path) -> list[str]:
    """List package directories and top-level files of packages that the table does not name."""
    inits = [path for top in ("aeris", "swipe", "launch") for path in root.glob(f"{top}/**/__init__.py")]
    wanted = {path.parent.relative_to(root).as_posix() for path in inits}
    wanted |= {
        path.relative_to(root).as_posix() for path in root.glob("aeris/*.py") if path.name != "__init__.py"
    }
    tops = {
        p.name
        for p in root.iterdir()
        if p.is_dir() and not p.name.startswith((".", "_")) and ".egg" not in p.name
    }
    return sorted((wanted | tops) - UNLISTED - {place.rstrip("/") for place in places})


@cache
def help_text(module: str) -> str:
    """Return what `python -m module --help` prints, wide enough that no flag is wrapped."""
    env = {**os.environ, "COLUMNS": "200", "OMP_NUM_THREADS": "1", "NO_COLOR": "1"}
    command = [sys.executable, "-m", *module.split(), "--help"]
    done = subprocess.run(
        command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, f"{shlex.join(command)} failed:\n{done.stderr}"
    return done.stdout


def unknown_flags(text: str, help_of: dict[str, str]) -> list[str]:
    """List the flags a page shows that the help of their program does not name."""
    known = {module: {*FLAG.findall(shown), "--help"} for module, shown in help_of.items()}
    return [
        f"{module} {flag}" for module, flags in commands(text) for flag in flags if flag not in known[module]
    ]


README = (ROOT / "README.md").read_text(encoding="utf-8")
SHOWN = sorted({module for page in PAGES for module, _ in commands(page.read_text(encoding="utf-8"))})


def test_readme_is_short() -> None:
    assert len(README.splitlines()) <= MAX_README_LINES


def test_every_place_in_the_table_exists() -> None:
    assert not missing_places(table(README), ROOT)


def test_every_package_and_program_is_in_the_table() -> None:
    assert not unlisted_places(table(README), ROOT)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_resolve(page: Path) -> None:
    assert not broken_links(page, page.read_text(encoding="utf-8"))


@pytest.mark.parametrize("module", SHOWN)
def test_shown_commands_are_real(module: str) -> None:
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        ours = "\n".join(
            f"`python -m {name} {' '.join(flags)}`" for name, flags in commands(text) if name == module
        )
        assert not unknown_flags(ours, {module: help_text(module)}), page.name


def test_make_targets_shown_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        code = "\n".join([*FENCE.findall(text), *INLINE.findall(FENCE.sub("", text))])
        shown = set(re.findall(r"(?:^|\s)make ([a-z]+)\b", code, re.MULTILINE))
        assert shown <= targets, f"{page.name}: {sorted(shown - targets)}"


def test_these_checks_can_fail(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    assert broken_links(page, "[a](missing.md) [b](https://example.org) `[c](code.md)`") == ["missing.md"]
    assert broken_links(ROOT / "README.md", "[a](CHANGELOG.md#no-such-heading)") == [
        "CHANGELOG.md#no-such-heading"
    ]
    shown = "```sh\npython -m aeris.train tiny --run-dir x \\\n  --no-such 1  # not --this\n```"
    assert commands(shown) == [("aeris.train", ("--run-dir", "--no-such"))]
    assert unknown_flags(shown, {"aeris.train": "usage: --run-dir DIR"}) == ["aeris.train --no-such"]
    rows = table("## Where is what\n\n| `aeris/train.py` | trains |\n| `nowhere` | - |\n\n## Next\n| `x` |")
    assert missing_places(rows, ROOT) == ["nowhere"]
    assert "swipe" in unlisted_places(rows, ROOT)
