"""Devices and process groups, with fakes for what this machine does not have, and two real ranks."""

from __future__ import annotations

import importlib
import os
import re
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed as dist

from swipe import backend, collectives, selftest
from swipe import groups as groups_module
from swipe.backend import XCCL_RULES, Rule, backend_for, choose_device, describe, finish, start
from swipe.collectives import Group, Message, exchange
from swipe.groups import Groups, choose_policy, make_pairs
from swipe.mesh import ParallelDims

RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
OTHERS = (
    *("TORCHELASTIC_USE_AGENT_STORE", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"),
    *("CCL_SEND", "CCL_RECV", "TORCH_FR_BUFFER_SIZE"),
)
IPEX, BINDINGS = "intel_extension_for_pytorch", "oneccl_bindings_for_pytorch"


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
    monkeypatch.setitem(sys.modules, IPEX, None)
    monkeypatch.setitem(sys.modules, BINDINGS, ModuleType(BINDINGS) if bindings else None)
    if expected:
        assert backend_for(kind) == expected
    else:
        with pytest.raises(ValueError, match=f"cannot connect ranks on {kind} devices: it is built without"):
            backend_for(kind)


@pytest.fixture
def imports(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What is imported on a stack without xCCL: the names asked for; put an error first to raise it."""
    asked: list[Any] = []

    def pretend(name: str) -> ModuleType:
        failure = asked.pop(0) if asked and isinstance(asked[0], BaseException) else None
        asked.append(name)
        if failure:
            raise failure
        return ModuleType(name)

    monkeypatch.setattr(dist, "is_xccl_available", lambda: False)
    monkeypatch.setattr(importlib, "import_module", pretend)
    return asked


def test_the_old_stack_is_imported_in_its_order(imports: list[Any]) -> None:
    assert backend_for("xpu") == "cpu:gloo,xpu:ccl"
    assert imports == [IPEX, BINDINGS]


def test_the_new_stack_imports_nothing_of_the_old(
    imports: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dist, "is_xccl_available", lambda: True)
    assert backend_for("xpu") == "cpu:gloo,xpu:xccl"
    assert imports == []


@pytest.mark.parametrize("failure", [SystemExit(127), AttributeError("module 'torch' has no"), ImportError()])
def test_an_extension_that_refuses_this_torch_ends_nothing(
    imports: list[Any], failure: BaseException
) -> None:
    """It ends the process, or fails in other ways; the bindings may do without."""
    imports.append(failure)
    assert backend_for("xpu") == "cpu:gloo,xpu:ccl"
    assert imports == [IPEX, BINDINGS]


def test_without_bindings_it_is_said_what_was_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "is_xccl_available", lambda: False)
    monkeypatch.setitem(sys.modules, IPEX, None)
    monkeypatch.setitem(sys.modules, BINDINGS, None)
    with pytest.raises(
        ValueError, match=f"built without xCCL, and {IPEX} cannot be .*, and {BINDINGS} cannot"
    ):
        backend_for("xpu")


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
    monkeypatch.setattr(backend, "_store", lambda *args: "store")
    monkeypatch.setattr(dist, "destroy_process_group", lambda: asked.append("destroyed"))
    return asked


def test_ranks_on_one_machine_keep_to_loopback(monkeypatch: pytest.MonkeyPatch, calls: list[Any]) -> None:
    be_rank(monkeypatch, 3, 4, "127.0.0.1")
    start(torch.device("xpu:1"), 60.0)
    group = {"store": "store", "rank": 3, "world_size": 4, "timeout": timedelta(seconds=60)}
    assert calls == [1, ("cpu:gloo,xpu:xccl", group)]
    assert os.environ["GLOO_SOCKET_IFNAME"] == os.environ["NCCL_SOCKET_IFNAME"]
    assert os.environ["GLOO_SOCKET_IFNAME"] in ("lo", "lo0")
    assert os.environ["TORCH_FR_BUFFER_SIZE"] == "200"


def test_ranks_of_several_machines_use_the_network(monkeypatch: pytest.MonkeyPatch, calls: list[Any]) -> None:
    be_rank(monkeypatch, 3, 4, "10.0.0.1")
    start(torch.device("xpu"), 60.0)  # without a number: the local rank's
    group = {"store": "store", "rank": 3, "world_size": 4, "timeout": timedelta(seconds=60)}
    assert calls == [3, ("cpu:gloo,xpu:xccl", group)]
    assert "GLOO_SOCKET_IFNAME" not in os.environ


def test_torchrun_has_a_store_of_its_own(monkeypatch: pytest.MonkeyPatch, calls: list[Any]) -> None:
    be_rank(monkeypatch, 3, 4, "127.0.1.1")
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    start(torch.device("xpu"), 60.0)
    assert calls == [3, ("cpu:gloo,xpu:xccl", {"init_method": "env://", "timeout": timedelta(seconds=60)})]


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


class Fake(ModuleType):
    """A module with a version."""

    def __init__(self, name: str, version: str = "") -> None:
        super().__init__(name)
        self.__version__ = version


def test_the_choice_is_described_with_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what takes part is named."""
    torch_version = f"torch {torch.__version__}"
    mpi = Fake("mpi4py.MPI")
    mpi.Get_library_version = lambda: "MPICH Version:      5.0.2\nMPICH Release date: x"  # type: ignore[attr-defined]
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 27, 3))
    monkeypatch.setattr(torch.version, "xpu", "20250302", raising=False)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setitem(sys.modules, IPEX, Fake(IPEX, "2.8.10+xpu"))
    monkeypatch.setitem(sys.modules, BINDINGS, Fake(BINDINGS, "2.8.0"))
    cases = {
        "gloo": [],
        "cpu:gloo,cuda:nccl": ["NCCL 2.27.3"],
        "cpu:gloo,xpu:xccl": ["SYCL 20250302"],
        "cpu:gloo,xpu:ccl": ["SYCL 20250302", f"{IPEX} 2.8.10+xpu", f"{BINDINGS} 2.8.0"],
    }
    for loaded in (None, mpi):
        if loaded:
            monkeypatch.setitem(sys.modules, "mpi4py.MPI", loaded)
        else:
            monkeypatch.delitem(sys.modules, "mpi4py.MPI", raising=False)
        for name, versions in cases.items():
            monkeypatch.setattr(dist, "get_backend", lambda name=name: name)
            library = ["MPICH Version 5.0.2"] if loaded else []
            assert describe() == ", ".join([name, torch_version, *versions, *library])
    monkeypatch.delitem(sys.modules, IPEX)
    assert f"{IPEX} absent, {BINDINGS} 2.8.0" in describe()


# What is known of xCCL: a check for each rule.


def _device_first(monkeypatch: pytest.MonkeyPatch, calls: list[Any]) -> None:
    be_rank(monkeypatch, 3, 4, "127.0.0.1")
    start(torch.device("xpu:1"), 60.0)
    assert calls[0] == 1 and calls[1][0] == "cpu:gloo,xpu:xccl" and len(calls) == 2


def _no_device_bound(monkeypatch: pytest.MonkeyPatch, calls: list[Any]) -> None:
    be_rank(monkeypatch, 3, 4, "127.0.0.1")
    start(torch.device("xpu:1"), 60.0)
    assert calls[1][1].keys() == {"store", "rank", "world_size", "timeout"}


def _sends_directly(monkeypatch: pytest.MonkeyPatch, calls: list[Any]) -> None:
    be_rank(monkeypatch, 3, 4, "127.0.0.1")
    monkeypatch.setenv("CCL_RECV", "")
    monkeypatch.setattr(torch, "__version__", "2.10.0a0")
    start(torch.device("xpu:1"), 60.0)
    assert "CCL_SEND" not in os.environ
    monkeypatch.setattr(torch, "__version__", "2.8.0+xpu")
    start(torch.device("xpu:1"), 60.0)
    assert os.environ["CCL_SEND"] == "direct" and os.environ["CCL_RECV"] == "", "the user's word counts"


def _not_split(monkeypatch: pytest.MonkeyPatch, calls: list[Any]) -> None:
    monkeypatch.setattr(dist, "split_group", lambda *args, **how: pytest.fail("split"))
    monkeypatch.setattr(dist, "new_group", lambda ranks, **how: calls.append((ranks, how)))
    assert make_pairs(0, [1, None]).keys() == {1}
    assert [ranks for ranks, _ in calls] == [[0, 1], [0]]
    assert all(how["use_local_synchronization"] for _, how in calls)


def _sends_first(monkeypatch: pytest.MonkeyPatch, calls: list[Any]) -> None:
    monkeypatch.setattr(dist, "P2POp", lambda call, tensor, peer, *rest: (call, peer))
    monkeypatch.setattr(dist, "batch_isend_irecv", lambda batch: [calls.append(op) for op in batch][:0])
    sends, receives = ([Message(peer, torch.zeros(1), 1) for peer in peers] for peers in ((5, 3), (2, 9)))
    exchange(sends, receives, "tokens", policy="batched")
    assert calls == [(dist.isend, 5), (dist.isend, 3), (dist.irecv, 2), (dist.irecv, 9)]


def _no_tags(monkeypatch: pytest.MonkeyPatch, calls: list[Any]) -> None:
    with pytest.raises(ValueError, match="between xpu devices, that match them by their order"):
        choose_policy("async", torch.device("xpu"))
    assert choose_policy("auto", torch.device("xpu")) == "batched"


def _pairs_in_turn(monkeypatch: pytest.MonkeyPatch, calls: list[Any]) -> None:
    monkeypatch.setattr(dist, "new_group", lambda ranks, **how: str(ranks))
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    for name in ("send", "recv"):
        call = lambda x, peer, group, tag, name=name: calls.append((name, peer, group))  # noqa: E731
        monkeypatch.setattr(dist, name, call)
    message = [Message(1, torch.zeros(1), 1)]
    for first in (True, False):
        exchange(message, message, "x", policy="parity", sends_first=first, pairs=make_pairs(0, [1]))
    assert calls == [(name, 1, "[0, 1]") for name in ("send", "recv", "recv", "send")]


def _checked_at_start(monkeypatch: pytest.MonkeyPatch, calls: list[Any]) -> None:
    """The whole of it is tested in test_selftest.py."""
    group = Group("all ranks", (0, 1), 0)
    groups = Groups(ParallelDims(dp=2), 0, group, group, group, group, (group, group), None)
    trial = selftest._Trial(groups, torch.device("cpu"))
    trial._compare("messages", group, torch.tensor([1.0, 2.0]), torch.tensor([1, 2]))
    assert trial.problem is None
    trial._compare("messages", group, torch.tensor([1.0, 2.5]), torch.tensor([1, 2]))
    assert trial.problem and "rank 0 got 2.5 instead of 2 at 1 of 2" in trial.problem


def _no_scatter(monkeypatch: pytest.MonkeyPatch, calls: list[Any]) -> None:
    for module in (collectives, groups_module, selftest):
        used = set(re.findall(r"\bdist\.(\w+)\(", Path(module.__file__ or "").read_text(encoding="utf-8")))
        assert used and not used & {"scatter", "gather", "scatter_object_list", "gather_object"}


def _not_destroyed(monkeypatch: pytest.MonkeyPatch, calls: list[Any]) -> None:
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_backend", lambda: "cpu:gloo,xpu:xccl")
    finish()
    assert calls == []


CHECKS = (
    *(_device_first, _no_device_bound, _sends_directly, _not_split, _sends_first, _no_tags, _pairs_in_turn),
    *(_checked_at_start, _no_scatter, _not_destroyed),
)


@pytest.mark.parametrize(("rule", "check"), list(zip(XCCL_RULES, CHECKS)), ids=lambda value: "")
def test_the_rules_of_xccl_are_kept(
    rule: Rule, check: Callable[..., None], monkeypatch: pytest.MonkeyPatch, calls: list[Any]
) -> None:
    check(monkeypatch, calls)
    module, _, name = rule.kept_by.partition(".")
    keeper = importlib.import_module(f"swipe.{module}")
    assert rule.source and (not name or callable(getattr(keeper, name)))


def test_every_rule_has_its_check() -> None:
    assert len(CHECKS) == len(XCCL_RULES)
