"""How fast this rank's device, memory, links and file system are: a few short measurements.

What one host of many does slower than the others is found by comparing them (`python -m launch preflight`).
Rates are the best of several tries, so that a busy moment does not count.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from swipe.collectives import CommunicationError, Group, Message, all_reduce, exchange

_CPU, _DEVICE = 2**22, 2**26  # bytes that are moved on CPU and on devices
_TURNS = 4  # of an exchange between ranks; the first, which connects them, does not count
_TRIES_S = 0.15  # how long to repeat a measurement, after one to warm up


def gemm_flops(device: torch.device, size: int = 0) -> float:
    """Measure FLOP/s of a square matrix product: bf16 on devices, fp32 on CPU.

    Args:
        size: side of the matrices; 0 is 512 on CPU and 8192 on devices.
    """
    size = size or (512 if device.type == "cpu" else 8192)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    a, b = (torch.ones(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2.0 * size**3 / _best_s(lambda: torch.mm(a, b), device)


def memory_rate(device: torch.device) -> float:
    """Measure bytes/s of a copy inside the memory of a device, read and written counted."""
    source = torch.ones(8 * _bytes(device) // 4, device=device)
    target = torch.empty_like(source)
    return 2.0 * source.nbytes / _best_s(lambda: target.copy_(source), device)


def host_rates(device: torch.device) -> tuple[float, float] | None:
    """Measure bytes/s from the host's memory to the device's and back; None on CPU."""
    if device.type == "cpu":
        return None
    host = torch.ones(_bytes(device) // 4).pin_memory()
    there = torch.empty_like(host, device=device)
    to_device = _best_s(lambda: there.copy_(host, non_blocking=True), device)
    back = _best_s(lambda: host.copy_(there, non_blocking=True), device)
    return host.nbytes / to_device, host.nbytes / back


def free_bytes(device: torch.device) -> int:
    """Return the memory that is free on a device, or on the host for CPU."""
    if device.type == "cpu":
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    free, _ = getattr(torch, device.type).mem_get_info(device)
    return int(free)


def file_rate(path: Path, rank: int, count: int = 2**24) -> float:
    """Measure bytes/s of reading `count` bytes of a file, at a place that differs by rank.

    The system is asked to forget what it has of the file, so that the file system is measured and not memory.

    Raises:
        OSError: the file cannot be read.
    """
    with path.open("rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        places = max(1, size // count)
        file.seek(rank % places * count)
        started, got = time.perf_counter(), 0
        while got < count and (piece := file.read(min(2**22, count - got))):
            got += len(piece)
        return got / max(time.perf_counter() - started, 1e-9)


def sum_rate(group: Group, device: torch.device) -> float:
    """Measure bytes/s of an all-reduce over the group: 2 (size - 1) / size of the bytes pass each rank.

    Raises:
        CommunicationError: the sum is wrong, or a rank does not answer.
    """
    assert group.size > 1, "a rank alone has nobody to add to"
    x = torch.ones(_bytes(device) // 4, device=device)
    took = []
    for _ in range(_TURNS):
        x.fill_(group.rank + 1)
        _wait(device)
        started = time.perf_counter()
        all_reduce(x, group, "numbers")
        _wait(device)
        took.append(time.perf_counter() - started)
    wanted = group.size * (group.size + 1) // 2
    _check(x, wanted, f"the sum over {group.size} ranks")
    return 2.0 * x.nbytes * (group.size - 1) / group.size / min(took[1:])


def link_rates(group: Group, device: torch.device, stride: int) -> tuple[float, float]:
    """Measure bytes/s to the rank `stride` after this one, and to the one as far before it.

    The ranks form a ring; all send one way at the same time, then all the other way.

    Raises:
        CommunicationError: what arrives is wrong, or a rank does not answer.
    """
    rates = []
    for step in (stride, -stride):
        to, source = ((group.rank + way) % group.size for way in (step, -step))
        assert to != group.rank, "the stride leads to another rank"
        x = torch.full((_bytes(device) // 4,), float(group.rank), device=device)
        got = torch.zeros_like(x)
        send, receive = Message(group.ranks[to], x, 1), Message(group.ranks[source], got, 1)
        took = []
        for _ in range(_TURNS):
            _wait(device)
            started = time.perf_counter()
            exchange([send], [receive], "numbers", policy="batched").wait()
            _wait(device)
            took.append(time.perf_counter() - started)
        _check(got, source, f"the message of rank {group.ranks[source]}")
        rates.append(x.nbytes / min(took[1:]))
    return rates[0], rates[1]


def _check(x: Tensor, wanted: int, what: str) -> None:
    different = int((x != wanted).sum())
    if different:
        wrong = float(x[x != wanted][0])
        raise CommunicationError(f"{what} is wrong: {wrong:g} instead of {wanted}, {different} times")


def _bytes(device: torch.device) -> int:
    return _CPU if device.type == "cpu" else _DEVICE


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        getattr(torch, device.type).synchronize(device)


def _best_s(work: Callable[[], object], device: torch.device) -> float:
    """Return the shortest of several runs, in seconds; the first, which warms up, does not count."""
    work()
    _wait(device)
    best, end = float("inf"), time.perf_counter() + _TRIES_S
    while time.perf_counter() < end:
        started = time.perf_counter()
        work()
        _wait(device)
        best = min(best, time.perf_counter() - started)
    return best
