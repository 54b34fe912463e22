"""The device a process computes on, what connects it to other ranks, and what makes a CPU fast.

Devices are CUDA (over NCCL), Intel XPU (xCCL) and CPU (gloo). A rank knows itself by RANK, WORLD_SIZE,
LOCAL_RANK, MASTER_ADDR and MASTER_PORT of the environment, as torchrun sets them. Without WORLD_SIZE, or with
1, a process is alone and nothing is started.
"""

from __future__ import annotations

import ctypes
import importlib
import ipaddress
import os
import socket
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # <malloc.h> of glibc
# Where a launcher gives every rank one device of its own, these say so.
_MASKS = {"cuda": ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"), "xpu": ("ZE_AFFINITY_MASK",)}


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

    CPU tensors go over gloo on every device, the device's own over NCCL or xCCL. If MASTER_ADDR is a loopback
    address, all ranks are on this machine, and nothing listens where other machines could reach it (under
    torchrun the store is torchrun's, not ours). No device is bound to the group: groups of a few ranks could
    not be made by those ranks alone otherwise.

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
    on_this_machine = _is_loopback(address)
    if on_this_machine:
        loopback = next((name for _, name in socket.if_nameindex() if name in ("lo", "lo0")), "")
        for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME") if loopback else ():
            os.environ.setdefault(variable, loopback)
    try:
        if on_this_machine and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
            store = _loopback_store(address, port, rank, world, timeout)
            dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)
        else:
            dist.init_process_group(backend, init_method="env://", timeout=timeout)
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
        if not {part.split(":")[-1] for part in dist.get_backend().split(",")} & {"xccl", "ccl"}:
            dist.destroy_process_group()


def describe() -> str:
    """Say what connects the ranks and which torch this is, for the first line of a run."""
    version = f"torch {torch.__version__}"
    if dist.is_available() and dist.is_initialized():
        return f"{dist.get_backend()}, {version}"
    return version


def backend_for(kind: str) -> str:
    """Return the backends of torch.distributed for devices of a kind ("cpu", "cuda", "xpu") and the CPU.

    Raises:
        ValueError: this torch has none.
    """
    if kind == "cpu":
        return "gloo"
    if kind == "cuda" and dist.is_nccl_available():
        return "cpu:gloo,cuda:nccl"
    if kind == "xpu":
        if dist.is_xccl_available():
            return "cpu:gloo,xpu:xccl"
        try:
            importlib.import_module("oneccl_bindings_for_pytorch")
            return "cpu:gloo,xpu:ccl"
        except (Exception, SystemExit):  # it refuses other versions of torch in several ways
            pass
    raise ValueError(f"torch {torch.__version__} cannot connect ranks on {kind} devices: it is built without")


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


def _loopback_store(address: str, port: int, rank: int, world: int, timeout: timedelta) -> Any:
    """Make the store in which ranks of one machine meet. By itself torch would listen on every address."""
    address = "127.0.0.1" if address == "localhost" else address
    listener = None
    if rank == 0:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with socket.socket(family, socket.SOCK_STREAM) as opened:
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                opened.bind((address, port))
            except OSError as error:
                reason = f"rank 0 cannot listen at {address}:{port}: {error.strerror}"
                raise OSError(f"{reason}; give MASTER_PORT a free port") from error
            listener = opened.detach()  # the store closes it
    store = dist.TCPStore  # type: ignore[attr-defined]
    return store(address, port, world, rank == 0, timeout, master_listen_fd=listener)
