"""What the ranks of a preflight measured: read from their lines, compared with each other, in a table."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from launch.pool import by_name

MARK = "PROBE "
"""What aeris.probe writes before the JSON of a line."""


class _Rate(NamedTuple):
    """One kind of rate: where it is in a line, what it is called, and how many limits it may stay below."""

    keys: tuple[str, ...]
    """The best of these counts: a slow neighbour slows one link of a rank, its own fault both."""
    name: str
    unit: str
    slack: float = 1.0


_RATES = (
    _Rate(("gemm_tflops",), "GEMM", "TFLOP/s"),
    _Rate(("memory_gbs",), "memory", "GB/s"),
    _Rate(("free_gib",), "free", "GiB"),
    _Rate(("to_device_gbs",), "to device", "GB/s"),
    _Rate(("to_host_gbs",), "to host", "GB/s"),
    _Rate(("file_mbs",), "file", "MB/s", 3.5),  # file systems are shared: 3.5 x 20 % below is bad
    _Rate(("next_gbs", "previous_gbs"), "link", "GB/s", 2.0),
)
_MANY_MADS = 6.0  # so far below the median, in robust standard deviations, nothing gets by chance
_DECODER = json.JSONDecoder()
_WHOLE_TABLE = 40  # hosts, above which only the bad ones are listed


class Reading(NamedTuple):
    """One line of a rank: what it measured, or what went wrong."""

    host: str
    rank: int
    local_rank: int
    phase: str
    error: str = ""
    values: Mapping[str, float] = {}


def parse(output: str, hosts: Sequence[str], ranks_per_node: int) -> tuple[list[Reading], str]:
    """Read the lines of the ranks out of what a launcher printed; return also what else it printed.

    Ranks are placed by their number, because hosts can have several names; one that says it is on another
    host of the list is believed.
    """
    short, last = by_name(hosts), len(hosts) * ranks_per_node
    readings, rest = [], []
    for line in output.splitlines():
        before, mark, text = line.partition(MARK)
        found = _decoded(text) if mark else None
        if found is None or not 0 <= found["rank"] < last:
            rest.append(line)
            continue
        host = short.get(str(found["host"]).split(".")[0], hosts[found["rank"] // ranks_per_node])
        values = {key: value for key, value in found.items() if isinstance(value, float)}
        where = host, found["rank"], found["local_rank"]
        readings.append(Reading(*where, found["phase"], found.get("error", ""), values))
        if before.strip():
            rest.append(before)
    return readings, "\n".join(rest)


def _decoded(text: str) -> dict[str, Any] | None:
    """Read one object; None if it is broken."""
    try:
        found, _ = _DECODER.raw_decode(text)
    except ValueError:
        return None
    known = (
        isinstance(found, dict) and isinstance(found.get("rank"), int) and isinstance(found.get("phase"), str)
    )
    return found if known and isinstance(found.get("local_rank"), int) and "host" in found else None


def slow(readings: Sequence[Reading], limit_pct: float) -> dict[str, str]:
    """Name the hosts with a rank far below the median of all, each with its worst rate.

    Far is `limit_pct` (more for what is shared), and more than chance: beyond six robust standard deviations
    of the rates, which are 1.48 times their median distance from the median.
    """
    worst: dict[str, tuple[float, str]] = {}
    for kind in _RATES:
        found = _of(kind, readings)
        if len(found) < 3:  # of two that differ nobody knows which is bad
            continue
        middle = statistics.median(rate for _, rate in found)
        spread = 1.4826 * statistics.median(abs(rate - middle) for _, rate in found)
        lowest = min(middle * (1 - min(0.95, kind.slack * limit_pct / 100)), middle - _MANY_MADS * spread)
        for one, rate in found:
            if rate < lowest:
                below = 1 - rate / middle
                text = (
                    f"local rank {one.local_rank}: {kind.name} {rate:.3g} {kind.unit}, {below:.0%} below the "
                    f"median {middle:.3g}"
                )
                if below > worst.get(one.host, (0.0, ""))[0]:
                    worst[one.host] = below, text
    return {host: text for host, (_, text) in worst.items()}


def table(readings: Sequence[Reading], hosts: Sequence[str], bad: Mapping[str, str]) -> str:
    """Write a row for each host, or for the bad ones of many: its ranks' lowest rates; and all medians."""
    found = {kind: _of(kind, readings) for kind in _RATES}
    kinds = [kind for kind in _RATES if found[kind]]
    rows = [["host", "ranks", *(f"{kind.name} {kind.unit}" for kind in kinds), ""]]
    shown = hosts if len(hosts) <= _WHOLE_TABLE else [host for host in hosts if host in bad]
    by_host: dict[str, list[Reading]] = {host: [] for host in shown}
    for one in readings:
        if one.host in by_host:
            by_host[one.host].append(one)
    for host in shown:
        own = by_host[host]
        rates = [min((rate for _, rate in _of(kind, own)), default=None) for kind in kinds]
        ranks = str(len({one.rank for one in own}))
        rows.append([host, ranks, *("-" if r is None else f"{r:.3g}" for r in rates), "bad" * (host in bad)])
    medians = [statistics.median(rate for _, rate in found[kind]) for kind in kinds]
    rows.append(
        ["median of ranks", str(len({one.rank for one in readings})), *(f"{m:.3g}" for m in medians), ""]
    )
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    return "\n".join(lines)


def _of(kind: _Rate, readings: Sequence[Reading]) -> list[tuple[Reading, float]]:
    """List the ranks that measured such a rate."""
    first, *others = kind.keys
    if not others:
        return [(one, one.values[first]) for one in readings if first in one.values]
    found = []
    for one in readings:
        rates = [one.values[key] for key in kind.keys if key in one.values]
        if rates:
            found.append((one, max(rates)))
    return found
