"""How ranks meet: where the first one listens, and what is said when they do not find each other."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from swipe.backend import start
from tests.swipe.test_backend import OTHERS, RANK_VARIABLES, be_rank


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Start every test as a process without launcher, and undo what `start` sets."""
    for variable in (*RANK_VARIABLES, *OTHERS, "CUDA_VISIBLE_DEVICES", "ZE_AFFINITY_MASK"):
        monkeypatch.setenv(variable, "")
        monkeypatch.delenv(variable)


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    be_rank(monkeypatch, 0, 2, "127.0.0.1")
    monkeypatch.delenv("MASTER_PORT")
    with pytest.raises(ValueError, match="WORLD_SIZE is 2, but MASTER_PORT is not set: start the ranks with"):
        start(torch.device("cpu"), 1.0)


def test_a_port_in_use_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        be_rank(monkeypatch, 0, 2, "localhost", port)
        with pytest.raises(
            OSError, match=f"rank 0 cannot listen at 127.0.0.1:{port}: Address already in use"
        ):
            start(torch.device("cpu"), 1.0)


def test_a_rank_that_stays_alone_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    be_rank(monkeypatch, 0, 2, "127.0.0.1", free_port())
    with pytest.raises(OSError, match=r"rank 0 of 2 did not find the others at 127.0.0.1:\d+ within 0.5 s"):
        start(torch.device("cpu"), 0.5)


def free_port(address: str = "127.0.0.1") -> int:
    with socket.socket() as probe:
        probe.bind((address, 0))
        return int(probe.getsockname()[1])


TWO_RANKS = """
import json, os, time
import torch
import torch.distributed as dist
from swipe import backend

def listening():
    own = set()
    for fd in os.listdir("/proc/self/fd"):
        try:
            own.add(os.readlink(f"/proc/self/fd/{fd}"))
        except OSError:
            pass
    rows = [line.split() for name in ("tcp", "tcp6") for line in open(f"/proc/net/{name}").readlines()[1:]]
    return sorted(row[1] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in own)

backend.start(backend.choose_device("cpu"), 120.0)
total = torch.tensor([1.0 + dist.get_rank()], dtype=torch.float64)
dist.all_reduce(total)
report = {"total": total.item(), "described": backend.describe(), "listening": listening()}
dist.barrier()
if dist.get_rank() == 0:
    time.sleep(0.5)  # the other has left
began = time.monotonic()
backend.finish()
print(json.dumps({**report, "left_s": time.monotonic() - began, "left": not dist.is_initialized()}))
"""


def network_address() -> str:
    """Return an address of this machine that others can reach, or nothing. No packet leaves."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.254", 9))
        except OSError:
            return ""
        address = str(probe.getsockname()[0])
    return "" if address.startswith("127.") else address


def two_ranks(address: str) -> tuple[int, list[dict[str, Any]]]:
    port, ranks = free_port(address), []
    for rank in range(2):
        values = (rank, 2, rank, 2, address, port)
        env = os.environ | {variable: str(value) for variable, value in zip(RANK_VARIABLES, values)}
        command = [sys.executable, "-W", "error", "-c", TWO_RANKS]
        ranks.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True))
    # torch 2.8 prints a line of gloo's before ours
    return port, [json.loads(process.communicate(timeout=180)[0].splitlines()[-1]) for process in ranks]


@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="no /proc")
def test_two_ranks_meet_and_nobody_else_can_listen_in() -> None:
    port, reports = two_ranks("127.0.0.1")
    for report in reports:
        assert report["total"] == 3.0
        assert report["described"] == f"gloo, torch {torch.__version__}"
        assert report["left"] and report["left_s"] < 5
        loopback = ("0100007F:", "00000000000000000000000001000000:", "0000000000000000FFFF00000100007F:")
        assert report["listening"] and all(at.startswith(loopback) for at in report["listening"])
    assert f"0100007F:{port:04X}" in reports[0]["listening"]


@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="no /proc")
@pytest.mark.skipif(not network_address(), reason="this machine is on no network")
def test_across_machines_nothing_listens_at_every_address() -> None:
    """Rank 0 listens at MASTER_ADDR, though that is on a network; gloo at the address of the host's name."""
    address = network_address()
    port, reports = two_ranks(address)
    number = socket.inet_aton(address)[::-1].hex().upper()
    assert f"{number}:{port:04X}" in reports[0]["listening"]
    for report in reports:
        assert report["total"] == 3.0
        assert not [at for at in report["listening"] if not at.split(":")[0].strip("0")], "0.0.0.0 or [::]"


def test_where_rank_0_cannot_be_reached_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that this machine takes for itself alone, an address of another machine, no name at all."""
    be_rank(monkeypatch, 0, 2, "head", free_port())
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")

    def says(found: str) -> None:
        table = [(socket.AF_INET6, 0, 0, "", ("fd00::9", 0)), (socket.AF_INET, 0, 0, "", (found, 0))]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **how: table)

    says("127.0.1.1")
    with pytest.raises(OSError, match=r"MASTER_ADDR head is 127.0.1.1 here, where ranks of other machines"):
        start(torch.device("cpu"), 1.0)
    says("192.0.2.77")
    with pytest.raises(
        OSError, match=r"at 192.0.2.77:\d+: .*; MASTER_ADDR must be an address of rank 0's own"
    ):
        start(torch.device("cpu"), 1.0)


def test_a_name_nobody_knows_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    be_rank(monkeypatch, 0, 2, "nobody.invalid", free_port())
    with pytest.raises(OSError, match="MASTER_ADDR nobody.invalid is no address: "):
        start(torch.device("cpu"), 1.0)
