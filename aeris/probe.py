"""Measure one rank's device, links and file system: the program that `python -m launch preflight` starts.

Every rank prints one line for what it measures alone, and one for what it measures together with the ranks
of a few neighbouring hosts, its team: a bad host spoils its own team only. Nothing grows with the machine.
Whatever fails is a line too, and the exit status is 0: else a launcher would end ranks yet to speak.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro

from aeris.log import run_program, speaker
from launch.preflight import TEAM
from launch.rank import Ranks, discover, leave
from launch.readings import MARK
from swipe import probe
from swipe.backend import choose_device, finish, start
from swipe.collectives import Group, barrier

ALONE, TOGETHER = "alone", "together"


@dataclass(frozen=True)
class Arguments:
    """Measure this rank's device, links and file system."""

    device: str = "auto"
    """What to measure: auto, cpu, cuda or xpu."""
    file: Path | None = None
    """A file to read a part of; on the file system that the training data are on."""
    hosts: Path | None = None
    """A file with the address of every host, one a line, in the order of the ranks; without: of one host."""
    team: int = TEAM
    """Neighbouring hosts whose ranks communicate; 0: none do."""
    offset: int = 0
    """How many places the teams are moved along the ring of hosts, to give each other partners."""
    port: int = 29400
    """Where the first rank of a team listens."""
    limit_s: float = 60.0
    """A rank that has not finished by then says where it is, and ends."""


class Report:
    """What this rank prints, and where it is."""

    def __init__(self, rank: Ranks, limit_s: float) -> None:
        """Start the clock."""
        self.rank = rank.rank
        self.place = {"rank": rank.rank, "local_rank": rank.local_rank, "host": socket.gethostname()}
        self.phase, self.at = ALONE, "the start"
        self.timer = threading.Timer(limit_s, self._give_up, (limit_s,))
        self.timer.daemon = True
        self.timer.start()

    def line(self, **values: Any) -> None:
        """Print a line in one piece, so that those of many ranks do not mix."""
        text = json.dumps({"phase": self.phase, **self.place, **values})
        sys.stdout.flush()
        os.write(1, f"{MARK}{text}\n".encode())

    def measure(self, at: str, work: Callable[[], Any]) -> Any:
        """Do something, and remember what, for the line that says that it took too long."""
        self.at = at
        return work()

    def _give_up(self, limit_s: float) -> None:
        self.line(error=f"not done within {limit_s:g} s, in {self.at}")
        os._exit(0)


def alone(report: Report, arguments: Arguments) -> torch.device:
    """Measure what needs no other rank, and print it.

    Raises:
        ValueError: there is no such device.
        OSError: the file cannot be read.
        RuntimeError: the device fails.
    """
    device = report.measure("the choice of the device", lambda: choose_device(arguments.device))
    if device.type != "cpu":
        getattr(torch, device.type).set_device(device.index or 0)
    free = report.measure("the look at the memory", lambda: probe.free_bytes(device))
    values = {"device": str(device), "free_gib": free / 2**30}
    values["gemm_tflops"] = report.measure("the matrix product", lambda: probe.gemm_flops(device)) / 1e12
    values["memory_gbs"] = report.measure("the copy in memory", lambda: probe.memory_rate(device)) / 1e9
    if host := report.measure("the copy from the host", lambda: probe.host_rates(device)):
        values["to_device_gbs"], values["to_host_gbs"] = (rate / 1e9 for rate in host)
    if arguments.file:
        path, number = arguments.file, report.rank
        values["file_mbs"] = (
            report.measure("the reading of the file", lambda: probe.file_rate(path, number)) / 1e6
        )
    report.line(**{name: round(v, 4) if isinstance(v, float) else v for name, v in values.items()})
    return device


def team_of(ranks: Ranks, hosts: int, offset: int = 0) -> tuple[int, int, int]:
    """Return a rank's team of `hosts` neighbours: the host that leads it, the rank in it, and its size.

    Teams are cut from the ring of all hosts, in the order of their ranks, `offset` places before the first.
    """
    here = ranks.local_world
    count = ranks.world // here
    team, number = divmod((ranks.rank // here + offset) % count, hosts)
    leader = (team * hosts - offset) % count
    return leader, number * here + ranks.local_rank, min(hosts, count - team * hosts) * here


def together(report: Report, arguments: Arguments, ranks: Ranks, device: torch.device) -> None:
    """Measure the links to the ranks of the same team, and print them.

    Raises:
        OSError: they do not find each other, do not answer, or what arrives is wrong.
        RuntimeError: the communication library fails.
    """
    leader, rank, size = team_of(ranks, arguments.team, arguments.offset)
    if size < 2:
        return
    report.phase = TOGETHER
    addresses = arguments.hosts.read_text(encoding="utf-8").split() if arguments.hosts else ["127.0.0.1"]
    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = addresses[leader], str(arguments.port)
    os.environ.update({"RANK": str(rank), "WORLD_SIZE": str(size)})
    report.measure("the meeting of the ranks", lambda: start(device, arguments.limit_s))
    group = Group("all ranks of the team", tuple(range(size)), rank)  # without a handle: the default group
    added = report.measure("the sum over the ranks", lambda: probe.sum_rate(group, device))
    stride = ranks.local_world if size > ranks.local_world else 1
    ahead, back = report.measure("the ring of messages", lambda: probe.link_rates(group, device, stride))
    report.line(
        sum_gbs=round(added / 1e9, 4), next_gbs=round(ahead / 1e9, 4), previous_gbs=round(back / 1e9, 4)
    )
    report.measure("the end", lambda: barrier(group, "the end"))


def main() -> None:
    """Run the program."""
    ranks = discover(os.environ)
    speaker.take_turn(ranks.rank, ranks.world)
    arguments = tyro.cli(Arguments, prog="python -m aeris.probe")
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    numbers = (ranks.rank, ranks.world, ranks.local_rank, ranks.local_world)
    os.environ.update({name: str(number) for name, number in zip(names, numbers)})
    report = Report(ranks, arguments.limit_s)
    try:
        device = alone(report, arguments)
        if arguments.team and ranks.world > 1:
            together(report, arguments, ranks, device)
    except (ValueError, OSError, RuntimeError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        report.line(error=f"{reason} (in {report.at})")
        os._exit(0)
    finish()
    leave()


if __name__ == "__main__":
    run_program(main)
