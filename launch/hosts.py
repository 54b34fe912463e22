"""Hosts: how many in words, files with one a line, and Slurm's shorthand."""

from __future__ import annotations

import re
from pathlib import Path


def read_hostfile(path: Path) -> list[str]:
    """List the hosts of a file with one a line, once each; ValueError if it cannot be read."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise ValueError(f"the list of hosts {path} cannot be read: {error.strerror}") from None
    return list(dict.fromkeys(line.split()[0] for line in lines if line.split()))


def counted(count: int, what: str) -> str:
    """Write a number of something: 1 node, 10,080 nodes."""
    return f"{count:,} {what}" + ("" if count == 1 else "s")


def expand(nodes: str) -> list[str]:
    """List the hosts that Slurm writes as `a[001-003,7],b`; ValueError if it is not such a list."""
    hosts: list[str] = []
    pattern = r"(?:[^\[\],\s]+|\[[\d,-]+\])+"
    if not re.fullmatch(rf"{pattern}(?:,{pattern})*", nodes):
        raise ValueError(f"{nodes!r} is no list of hosts as Slurm writes it, a[001-003,7],b")
    for word in re.findall(pattern, nodes):
        names = [""]
        for text, numbers in re.findall(r"([^\[\]]+)|\[([\d,-]+)\]", word):
            ends = [text] if text else _numbers(numbers)
            names = [name + end for name in names for end in ends]
        hosts += names
    return list(dict.fromkeys(hosts))


def _numbers(ranges: str) -> list[str]:
    """List `001-003,7` with the zeros kept."""
    listed: list[str] = []
    for part in ranges.split(","):
        first, _, last = part.partition("-")
        if not first.isdigit() or not (last or first).isdigit() or int(last or first) < int(first):
            raise ValueError(f"{part!r} in a list of hosts is no range of numbers")
        listed += [f"{number:0{len(first)}d}" for number in range(int(first), int(last or first) + 1)]
    return listed
