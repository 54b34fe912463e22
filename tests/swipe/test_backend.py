"""Devices and process groups, with fakes for what this machine does not have, and two real ranks."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed as dist

from swipe import backend
from swipe.backend import backend_for, choose_device, describe, finish, start

RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
OTHERS = ("TORCHELASTIC_USE_AGENT_STORE", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Start every test as a process without launcher, and undo what `start` sets."""
    for variable in (*RANK_VARIABLES, *OTHERS, "CUDA_VISIBLE_DEVICES", "ZE_AFFINITY_MASK"):
        monkeypatch.setenv(variable, "")
        monkeypatch.delenv(variable)


def be_rank(monkeypatch: pytest.MonkeyPatch, rank: int, world: int, address: str, port: int = 1234) -> None:
    values = (rank, world, rank, world, address, port)
    for variable, value in zip(RANK_VARIABLES, values):
        monkeypatch.setenv(variable, str(value))


@pytest.mark.parametrize(
    ("cuda", "xpu", "name", "expected"),
    [
        (False, False, "auto", "cpu"),
        (True, False, "auto", "cuda"),
        (False, True, "auto", "xpu"),
        (True, True, "auto", "cuda"),
        (True, False, "cuda:1", "cuda:1"),
        (True, True, "cpu", "cpu"),
    ],
)
def test_auto_takes_the_accelerator(
    cuda: bool, xpu: bool, name: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.xpu, "is_available", lambda: xpu)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device(name) == torch.device(expected)


COUNT_FAULTS = """
import resource, sys
from swipe.backend import keep_freed_memory
import torch
if sys.argv[1] == "keep" and not keep_freed_memory():
    sys.exit("no glibc")
torch.set_num_threads(1)
for _ in range(30):
    torch.empty(12 * 2**20).fill_(1)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    torch.empty(12 * 2**20).fill_(1)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def test_freed_memory_is_kept() -> None:
    """Once the heap has grown, the pages of a freed tensor serve the next; by default they are new."""
    faults = {}
    for how in ("keep", "default"):
        done = subprocess.run(
            [sys.executable, "-c", COUNT_FAULTS, how], capture_output=True, text=True, check=False
        )
        if "no glibc" in done.stderr:
            pytest.skip("malloc is not glibc's here")
        faults[how] = int(done.stdout)
    assert faults["keep"] < 0.1 * faults["default"]


def test_a_device_that_is_not_here_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in ("cuda", "cuda:1", "cpu:foo", "cpu:1", "tpu"):
        with pytest.raises(ValueError, match=f"{name} is not available here: choose one of auto, cpu"):
            choose_device(name)


@pytest.mark.parametrize(
    ("count", "local_rank", "mask", "name", "expected"),
    [
        (4, 3, "", "auto", "cuda:3"),
        (4, 3, "", "cuda", "cuda:3"),
        (4, 3, "", "cuda:1", "cuda:1"),
        (4, 3, "", "cpu", "cpu"),
        (1, 3, "3", "auto", "cuda:0"),  # the launcher shows each rank its own device only
    ],
)
def test_each_rank_takes_its_own_device(
    count: int, local_rank: int, mask: str, name: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", mask)
    be_rank(monkeypatch, local_rank, 4, "127.0.0.1")
    assert choose_device(name) == torch.device(expected)


def test_a_rank_too_many_for_the_devices_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    be_rank(monkeypatch, 2, 4, "127.0.0.1")
    with pytest.raises(
        ValueError, match="no cuda device for local rank 2: this machine shows 2, so start at"
    ):
        choose_device("auto")
    monkeypatch.delenv("LOCAL_RANK")
    with pytest.raises(ValueError, match="WORLD_SIZE is 4, but LOCAL_RANK is not set"):
        choose_device("cuda")


@pytest.mark.parametrize(
    ("kind", "built_in", "bindings", "expected"),
    [
        ("cpu", "", False, "gloo"),
        ("cuda", "nccl", False, "cpu:gloo,cuda:nccl"),
        ("xpu", "xccl", False, "cpu:gloo,xpu:xccl"),
        ("xpu", "xccl", True, "cpu:gloo,xpu:xccl"),
        ("xpu", "", True, "cpu:gloo,xpu:ccl"),
        ("xpu", "", False, ""),
        ("cuda", "xccl", True, ""),
    ],
)
def test_the_backend_suits_the_device(
    kind: str, built_in: str, bindings: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dist, "is_nccl_available", lambda: built_in == "nccl")
    monkeypatch.setattr(dist, "is_xccl_available", lambda: built_in == "xccl")
    name = "oneccl_bindings_for_pytorch"
    monkeypatch.setitem(sys.modules, name, ModuleType(name) if bindings else None)
    if expected:
        assert backend_for(kind) == expected
    else:
        with pytest.raises(ValueError, match=f"cannot connect ranks on {kind} devices"):
            backend_for(kind)


def test_a_process_alone_starts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for world in ("", "1"):
        monkeypatch.setenv("WORLD_SIZE", world)
        start(torch.device("cpu"), 1.0)
        assert not dist.is_initialized()
        assert describe() == f"torch {torch.__version__}"
        finish()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What `start` and `finish` ask of torch, in order."""
    asked: list[Any] = []
    monkeypatch.setattr(dist, "is_xccl_available", lambda: True)
    monkeypatch.setattr(torch.xpu, "set_device", lambda index: asked.append(index))
    monkeypatch.setattr(dist, "init_process_group", lambda name, **how: asked.append((name, how)))
    monkeypatch.setattr(backend, "_loopback_store", lambda *args: "store")
    monkeypatch.setattr(dist, "destroy_process_group", lambda: asked.append("destroyed"))
    return asked


def test_ranks_on_one_machine_keep_to_loopback(monkeypatch: pytest.MonkeyPatch, calls: list[Any]) -> None:
    be_rank(monkeypatch, 3, 4, "127.0.0.1")
    start(torch.device("xpu:1"), 60.0)
    group = {"store": "store", "rank": 3, "world_size": 4, "timeout": timedelta(seconds=60)}
    assert calls == [1, ("cpu:gloo,xpu:xccl", group)]
    assert os.environ["GLOO_SOCKET_IFNAME"] == os.environ["NCCL_SOCKET_IFNAME"]
    assert os.environ["GLOO_SOCKET_IFNAME"] in ("lo", "lo0")


@pytest.mark.parametrize(("address", "agent"), [("head-node", ""), ("127.0.1.1", "True"), ("10.0.0.1", "")])
def test_elsewhere_the_ordinary_way_is_taken(
    address: str, agent: str, monkeypatch: pytest.MonkeyPatch, calls: list[Any]
) -> None:
    """Several machines, or torchrun, whose agent has the store."""
    be_rank(monkeypatch, 3, 4, address)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", agent)
    start(torch.device("xpu"), 60.0)  # without a number: the local rank's
    assert calls == [3, ("cpu:gloo,xpu:xccl", {"init_method": "env://", "timeout": timedelta(seconds=60)})]
    assert ("GLOO_SOCKET_IFNAME" in os.environ) == bool(agent)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("gloo", ["destroyed"]), ("cpu:gloo,cuda:nccl", ["destroyed"]), ("cpu:gloo,xpu:xccl", []), ("ccl", [])],
)
def test_xccl_groups_end_with_the_process(
    name: str, expected: list[str], monkeypatch: pytest.MonkeyPatch, calls: list[Any]
) -> None:
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_backend", lambda: name)
    finish()
    assert calls == expected
    assert describe() == f"{name}, torch {torch.__version__}"


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


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
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


@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="no /proc")
def test_two_ranks_meet_and_nobody_else_can_listen_in() -> None:
    port, ranks = free_port(), []
    for rank in range(2):
        values = (rank, 2, rank, 2, "127.0.0.1", port)
        env = os.environ | {variable: str(value) for variable, value in zip(RANK_VARIABLES, values)}
        command = [sys.executable, "-W", "error", "-c", TWO_RANKS]
        ranks.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True))
    # torch 2.8 prints a line of gloo's before ours
    reports = [json.loads(process.communicate(timeout=180)[0].splitlines()[-1]) for process in ranks]
    for report in reports:
        assert report["total"] == 3.0
        assert report["described"] == f"gloo, torch {torch.__version__}"
        assert report["left"] and report["left_s"] < 5
        loopback = ("0100007F:", "00000000000000000000000001000000:", "0000000000000000FFFF00000100007F:")
        assert report["listening"] and all(at.startswith(loopback) for at in report["listening"])
    assert f"0100007F:{port:04X}" in reports[0]["listening"]
