"""The published layouts as data, and whether a number of nodes fits the degrees a command asks for.

Sources: [paper] AERIS, arXiv 2509.13523; [code] the authors' public snapshot; [inferred] from published node
counts; [ours] the same with the tokens of a window over the devices of another machine's node, where they
divide: sp divides the heads, and the quadrants of a window are cut into sp / 4 equal strips.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from launch.hosts import counted


class Degrees(NamedTuple):
    """The degrees of parallelism a command gives as --parallel.dp and so on; 0 leaves one to be chosen."""

    dp: int = 0
    wp_y: int = 0
    wp_x: int = 0
    pp: int = 0
    sp: int = 0

    @property
    def known(self) -> int:
        """Product of the degrees that are given."""
        return math.prod(degree for degree in self if degree)

    @property
    def flags(self) -> list[str]:
        """The words of a command line that ask for the degrees that are given."""
        pairs = zip(self._fields, self)
        return [
            w for n, degree in pairs if degree for w in (f"--parallel.{n.replace('_', '-')}", str(degree))
        ]

    def __str__(self) -> str:
        named = [f"{name.replace('_', '-')} {degree}" for name, degree in zip(self._fields, self) if degree]
        if self.wp_y and self.wp_x:
            named[bool(self.dp) : bool(self.dp) + 2] = [f"wp {self.wp_y}x{self.wp_x}"]
        return " x ".join(named)


class Layout(NamedTuple):
    """How a preset of aeris.train is started on a machine.

    Attributes:
        script: job script, from the top of the project.
        degrees: of one replica; dp is what the nodes leave.
        batch: images per step of the preset. Where degrees are given, microbatches are of one image.
    """

    script: str
    degrees: Degrees
    batch: int


LAYOUTS = {
    "alcf-aurora": {
        "tiny": Layout("pbs/train_1node.sh", Degrees(), 2),
        "1.3b-6h": Layout("pbs/train_1.3b_160nodes.sh", Degrees(0, 4, 4, 10, 12), 20),  # [code] 160 nodes
        "1.3b-24h": Layout("pbs/train_1.3b_160nodes.sh", Degrees(0, 4, 4, 10, 12), 20),  # [code] 160 nodes
        "13b": Layout("pbs/train_13b.sh", Degrees(0, 4, 4, 16, 12), 1400),  # [inferred] 256 nodes
        "40b": Layout("pbs/train_10080nodes.sh", Degrees(0, 6, 6, 20, 12), 1400),  # [code] 720 nodes
        "80b": Layout("pbs/train_80b.sh", Degrees(0, 8, 8, 26, 12), 1400),  # [inferred] 1,664 nodes
    },
    # sp 8 would need 8 to divide the heads (12 in 1.3b) and windows whose quadrants halve (15 x 15 do not).
    "lumi": {
        "tiny": Layout("launch/slurm/train_1node.sh", Degrees(), 2),
        "1.3b-6h": Layout("launch/slurm/train_1.3b.sh", Degrees(0, 4, 4, 10, 4), 20),  # [ours] 80 nodes
        "1.3b-24h": Layout("launch/slurm/train_1.3b.sh", Degrees(0, 4, 4, 10, 4), 20),  # [ours] 80 nodes
        # By aeris.plan: the published 6 x 6 x 20 with sp 4 would need 106 of 64 GB a device, this 52.
        "40b": Layout("launch/slurm/train_40b.sh", Degrees(0, 12, 12, 10, 4), 1400),  # [ours] 720 nodes
    },
}
"""Layouts by machine and preset."""


def flag(words: Sequence[str], name: str) -> str | None:
    """Return the last value of `--name value` or `--name=value` in a command line, dashes as underscores.

    Raises:
        ValueError: the flag is there without a value.
    """
    found = None
    for index, word in enumerate(words):
        head, equals, value = word.partition("=")
        if head.startswith("--") and head[2:].replace("_", "-") == name:
            if not equals and index + 1 == len(words):
                raise ValueError(f"{word} stands last, without a value")
            found = value if equals else words[index + 1]
    return found


def number(words: Sequence[str], name: str, default: int) -> int:
    """Return the whole number a flag gives, `default` without it; ValueError if it is none or negative."""
    if (value := flag(words, name)) is None:
        return default
    if not value.isdigit():
        raise ValueError(f"--{name} {value}: it must be a whole number")
    return int(value)


def degrees(words: Sequence[str]) -> Degrees:
    """Read the degrees out of the words of a command; ValueError if one is no number."""
    return Degrees(*(number(words, f"parallel.{name.replace('_', '-')}", 0) for name in Degrees._fields))


class Limits(NamedTuple):
    """What advice must keep to.

    Attributes:
        name: whose limits they are.
        nodes: how many there are; 0 if that is not known.
        ranks: most ranks a node that may be advised; 0 where nothing but the nodes can be chosen.
    """

    name: str = ""
    nodes: int = 0
    ranks: int = 0


NO_LIMITS = Limits()


def check(nodes: int, ranks_per_node: int, asked: Degrees, limits: Limits = NO_LIMITS) -> Degrees:
    """Return the degrees with dp filled in, if that is the only one left open.

    Raises:
        ValueError: there are not so many nodes, or their ranks cannot be arranged so; names the nearest
            numbers of nodes that can, or of ranks on each.
    """
    for name, count in (("nodes", nodes), ("ranks-per-node", ranks_per_node)):
        if count < 1:
            raise ValueError(f"--{name} {count}: it must be 1 or more")
    ranks, known = nodes * ranks_per_node, asked.known
    many = 0 < limits.nodes < nodes
    if many or (ranks % known if 0 in asked else ranks != known):
        said = f"{counted(nodes, 'node')} x {counted(ranks_per_node, 'rank')} = {counted(ranks, 'rank')}"
        needs = f"{asked} needs {'a multiple of ' if 0 in asked else ''}{known:,}"
        start = f"{said}, but {needs}"
        if many:
            start = f"{counted(nodes, 'node')}, but {limits.name} has {limits.nodes:,}"
        raise ValueError(f"{start}: {_advice(nodes, ranks_per_node, asked, limits)}")
    only_dp = asked.dp == 0 and all(asked[1:])
    return asked._replace(dp=ranks // known) if only_dp else asked


def batch_problem(batch: int, microbatch: int, dp: int) -> str:
    """Say why a batch cannot be shared by `dp` replicas, and which could share it; "" if it can."""
    if not (batch and microbatch) or batch % microbatch:
        return f"microbatches of {microbatch} do not divide a batch of {batch}"
    count = batch // microbatch
    if count % dp == 0:
        return ""
    near = sorted((d for d in range(1, count + 1) if count % d == 0), key=lambda d: abs(d - dp))[:2]
    return (
        f"dp {dp} does not divide the {count} microbatches of a step; dp {' or '.join(map(str, near))} does"
    )


def _advice(nodes: int, ranks_per_node: int, asked: Degrees, limits: Limits) -> str:
    """Name the numbers of nodes next to `nodes` on which these degrees, or these with another dp, fit."""
    most = limits.nodes or math.inf
    exact = 0
    if 0 not in asked and asked.known % ranks_per_node == 0:
        exact = asked.known // ranks_per_node
    exact = exact if exact <= most else 0
    full = all(asked[1:])  # another dp changes nothing else
    unit = asked._replace(dp=0).known if full else asked.known
    step = unit // math.gcd(unit, ranks_per_node)  # nodes of the smallest whole number of replicas
    below = int(min(nodes, most)) // step * step
    other = []
    for count in (below, below + step):
        if 0 < count <= most and count not in (exact, nodes):
            dp = f"dp {count * ranks_per_node // unit} on " if full else ""
            other.append(dp + counted(count, "node"))
    each = asked.known // math.gcd(asked.known, nodes)  # ranks on each of these nodes
    if each <= limits.ranks and (0 in asked or each * nodes == asked.known):
        other.append(f"--ranks-per-node {each} on {counted(nodes, 'node')}")
    advice = f"{' or '.join(other)} would fit" if other else "no number of nodes fits"
    if exact:
        advice = f"start it on {counted(exact, 'node')}" + (
            f", or take {' or '.join(other)}" if other else ""
        )
    cut = 1 < most < below + step and nodes <= most  # a single machine need not be counted
    return advice + (f" ({limits.name} has {limits.nodes:,} nodes)" if cut else "")
