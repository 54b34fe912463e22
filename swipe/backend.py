"""The device a process computes on, what connects it to other ranks, and what makes a CPU fast.

Devices are CUDA (over NCCL), Intel XPU (xCCL) and CPU (gloo). A rank knows itself by RANK, WORLD_SIZE,
LOCAL_RANK, MASTER_ADDR and MASTER_PORT of the environment, as torchrun sets them. Without WORLD_SIZE, or with
1, a process is alone and nothing is started.
"""

from __future__ import annotations

import ctypes
import errno
import importlib
import ipaddress
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # <malloc.h> of glibc
# Where a launcher gives every rank one device of its own, these say so.
_MASKS = {"cuda": ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"), "xpu": ("ZE_AFFINITY_MASK",)}
_OLD_XPU_STACK = ("intel_extension_for_pytorch", "oneccl_bindings_for_pytorch")  # in the order to import
_XPU_BACKENDS = {"xccl", "ccl"}


class Rule(NamedTuple):
    """Something a communication library asks of its caller."""

    rule: str
    source: str
    kept_by: str
    """The function of this package that keeps it."""


_AUTHORS = "the authors' code of arXiv 2509.13523"
# Sources are reports of others: docs/faults.md says what of this has been run on which hardware.
XCCL_RULES = (
    Rule("the device is set before the group is made", "as NCCL (PyTorch's documentation)", "backend.start"),
    Rule("no device is bound to the group", "torch-xpu-ops#3233", "backend.start"),
    Rule("sending hangs with torch 2.8 unless it goes directly", "pytorch#156782", "backend.start"),
    Rule("no group is split off another: its members make it", "pytorch#186548", "groups.make_pairs"),
    Rule("a batch that lists a receive before a send hangs", "torchcomms#2885", "collectives.exchange"),
    Rule("messages match by order, not by tag", "as NCCL (PyTorch's documentation)", "groups.choose_policy"),
    Rule("an isend polls until it is matched: pairs can talk in turn", "sglang#23645", "groups.make_pairs"),
    Rule("batches have delivered wrong data", "torch-xpu-ops#3022", "selftest.self_test"),
    Rule("scatter and gather are not to be trusted", _AUTHORS, "collectives"),
    Rule("destroying a group has hung: a process just ends", _AUTHORS, "backend.finish"),
)
"""What is known of xCCL, each with a test in tests/swipe/test_backend.py."""


def choose_device(name: str) -> torch.device:
    """Return the device asked for; `auto` takes cuda, then xpu, then cpu.

    Among several ranks, a kind without a number means the device of this rank's number on its machine.

    Raises:
        ValueError: there is no such device here; names those there are.
    """
    present = [kind for kind in ("cuda", "xpu") if getattr(torch, kind).is_available()] + ["cpu"]
    kind, _, number = (present[0] if name == "auto" else name).partition(":")
    count = 1 if kind == "cpu" else getattr(torch, kind).device_count() if kind in present else 0
    if kind not in present or (number and not (number.isdigit() and int(number) < count)):
        raise ValueError(f"--device {name} is not available here: choose one of auto, {', '.join(present)}")
    if number or kind == "cpu" or _world() == 1:
        return torch.device(f"{kind}:{number}" if number else kind)
    local_rank = int(_variable("LOCAL_RANK"))
    if local_rank >= count == 1 and any(os.environ.get(mask) for mask in _MASKS[kind]):
        local_rank = 0
    if local_rank >= count:
        raise ValueError(
            f"there is no {kind} device for local rank {local_rank}: this machine shows {count}, so start at "
            f"most {count} ranks on it, or use --device cpu"
        )
    return torch.device(kind, local_rank)


def start(device: torch.device, timeout_s: float) -> None:
    """Join the other ranks in the default process group and make `device` the current one; alone, do nothing.

    CPU tensors go over gloo on every device, the device's own over NCCL or xCCL. Rank 0 listens at the
    address of MASTER_ADDR only. If that is a loopback address, all ranks are on this machine, and nothing
    listens where other machines could reach it (under torchrun the store is torchrun's, which listens at
    every address). No device is bound to the group: groups of a few ranks could not be made by those alone
    otherwise.

    Args:
        device: this rank's device.
        timeout_s: how long to wait for the other ranks, now and in any later exchange.

    Raises:
        ValueError: a variable is missing, or this torch cannot connect such devices.
        OSError: the ranks do not find each other in time, or rank 0 cannot listen at MASTER_PORT.
    """
    world = _world()
    if world == 1:
        return
    rank, address, port = int(_variable("RANK")), _variable("MASTER_ADDR"), int(_variable("MASTER_PORT"))
    backend, timeout = backend_for(device.type), timedelta(seconds=timeout_s)
    if device.type != "cpu":
        index = int(_variable("LOCAL_RANK")) if device.index is None else device.index
        getattr(torch, device.type).set_device(index)
    if device.type == "xpu" and _release() < (2, 9):
        for variable in ("CCL_SEND", "CCL_RECV"):
            os.environ.setdefault(variable, "direct")
    if _is_loopback(address):
        loopback = next((name for _, name in socket.if_nameindex() if name in ("lo", "lo0")), "")
        for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME") if loopback else ():
            os.environ.setdefault(variable, loopback)
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "200")  # calls kept for swipe/watchdog.py's report
    if _release() >= (2, 9):  # before, every rank would print a list of those it is not connected to
        # gloo connects two ranks when they first talk, not every rank with every other.
        os.environ.setdefault("TORCH_GLOO_LAZY_INIT", "1")
    try:
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            dist.init_process_group(backend, init_method="env://", timeout=timeout)
        else:
            store = _store(address, port, rank, world, timeout)
            dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)
    except dist.DistError as error:
        raise ConnectionError(
            f"rank {rank} of {world} did not find the others at {address}:{port} within {timeout_s:g} s "
            f"({str(error).splitlines()[0]})"
        ) from error


def finish() -> None:
    """Leave the process group, if there is one, without waiting for the others: a barrier is the caller's.

    A group over xCCL ends with the process: destroying it has been seen to hang.
    """
    if dist.is_available() and dist.is_initialized():
        if not _libraries() & _XPU_BACKENDS:
            dist.destroy_process_group()


@contextmanager
def pretending(rank: int, world: int) -> Iterator[None]:
    """Be one of `world` ranks of which no other is there: groups can be made, and nothing is sent in them."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    try:
        yield
    finally:
        dist.destroy_process_group()


def describe() -> str:
    """Say what connects the ranks, and the versions of what takes part, for the first line of a run."""
    versions = [f"torch {torch.__version__}"]
    if not (dist.is_available() and dist.is_initialized()):
        return versions[0]
    used = _libraries()
    if "nccl" in used:
        name = "RCCL" if torch.version.hip else "NCCL"
        versions.append(f"{name} {'.'.join(map(str, torch.cuda.nccl.version()))}")
    if used & _XPU_BACKENDS and torch.version.xpu:
        versions.append(f"SYCL {torch.version.xpu}")
    for module in _OLD_XPU_STACK if "ccl" in used else ():
        loaded = sys.modules.get(module)
        versions.append(f"{module} {loaded.__version__ if loaded else 'absent'}")
    if mpi := sys.modules.get("mpi4py.MPI"):
        versions.append(" ".join(mpi.Get_library_version().split(chr(10))[0].replace(":", "").split()))
    return ", ".join([dist.get_backend(), *versions])


def backend_for(kind: str) -> str:
    """Return the backends of torch.distributed for devices of a kind ("cpu", "cuda", "xpu") and the CPU.

    On XPU without xCCL it imports Intel's older packages, the extension first.

    Raises:
        ValueError: this torch has none; says what was tried.
    """
    if kind == "cpu":
        return "gloo"
    if kind == "cuda" and dist.is_nccl_available():
        return "cpu:gloo,cuda:nccl"
    tried = {"cuda": "NCCL", "xpu": "xCCL"}.get(kind, "a backend for them")
    if kind == "xpu":
        if dist.is_xccl_available():
            return "cpu:gloo,xpu:xccl"
        failed = {}
        for module in _OLD_XPU_STACK:
            try:
                importlib.import_module(module)
            except (Exception, SystemExit) as error:  # they refuse other versions of torch in several ways
                reason = (str(error) or type(error).__name__).splitlines()[0]
                failed[module] = f"{module} cannot be imported ({reason})"
        if _OLD_XPU_STACK[1] not in failed:  # newer bindings can do without the extension
            return "cpu:gloo,xpu:ccl"
        tried = ", and ".join([tried, *failed.values()])
    raise ValueError(
        f"torch {torch.__version__} cannot connect ranks on {kind} devices: it is built without {tried}"
    )


def keep_freed_memory() -> bool:
    """Let glibc keep freed memory instead of giving it back to the system; return whether it could be asked.

    On CPU every step frees and allocates the same large tensors. By default glibc maps each anew, and the
    system clears its pages: a quarter of a step of a small model (docs/log.md). Elsewhere nothing happens.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # not glibc: macOS, musl, Windows
        return False
    largest = 2**31 - 1
    trim = mallopt(_M_TRIM_THRESHOLD, largest)
    # Older glibc refuses more than 32 MB here.
    return bool((mallopt(_M_MMAP_THRESHOLD, largest) or mallopt(_M_MMAP_THRESHOLD, 2**25)) and trim)


def _release() -> tuple[int, int]:
    """Return torch's version, as far as its behaviour hangs on it."""
    major, minor = torch.__version__.split(".")[:2]
    return int(major), int(minor)


def _world() -> int:
    return int(os.environ.get("WORLD_SIZE") or 1)


def _variable(name: str) -> str:
    value = os.environ.get(name)
    if not value:
        raise ValueError(
            f"WORLD_SIZE is {_world()}, but {name} is not set: start the ranks with torchrun or mpiexec"
        )
    return value


def _is_loopback(address: str) -> bool:
    """Whether an address as written, without asking a name server, is of this machine alone."""
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return address == "localhost"


def _libraries() -> set[str]:
    """Name the libraries of the default group: {"gloo", "nccl"} of "cpu:gloo,cuda:nccl"."""
    return {part.split(":")[-1] for part in dist.get_backend().split(",")}


def _store(address: str, port: int, rank: int, world: int, timeout: timedelta) -> Any:
    """Make the store in which ranks meet, at one address. By itself torch would listen on every one."""
    number = _resolve(address, world)
    listener = None
    if rank == 0:
        family = socket.AF_INET6 if ":" in number else socket.AF_INET
        with socket.socket(family, socket.SOCK_STREAM) as opened:
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                opened.bind((number, port))
            except OSError as error:
                advice = "give MASTER_PORT a free port"
                if error.errno == errno.EADDRNOTAVAIL:
                    advice = "MASTER_ADDR must be an address of rank 0's own machine"
                raise OSError(
                    f"rank 0 cannot listen at {number}:{port}: {error.strerror}; {advice}"
                ) from error
            listener = opened.detach()  # the store closes it
    store = dist.TCPStore  # type: ignore[attr-defined]
    return store(number, port, world, rank == 0, timeout, master_listen_fd=listener)


def _resolve(address: str, world: int) -> str:
    """Return the number of an address, on all ranks of the same family: the one that rank 0 listens at.

    Raises:
        OSError: nobody knows the name, or this machine takes it for itself alone though ranks are elsewhere.
    """
    try:
        found = socket.getaddrinfo(address, None, type=socket.SOCK_STREAM)
    except OSError as error:
        raise OSError(f"MASTER_ADDR {address} is no address: {error.strerror}") from error
    number = str(min(found, key=lambda one: one[0] != socket.AF_INET)[4][0])
    elsewhere = int(os.environ.get("LOCAL_WORLD_SIZE") or world) < world
    if elsewhere and _is_loopback(number):
        raise OSError(
            f"MASTER_ADDR {address} is {number} here, where ranks of other machines cannot come: give it an "
            "address of rank 0's machine on the network"
        )
    return number
