"""Where the time of a call goes: matrix products, attention, all else on the device, and the program itself.

The profiler of torch says how long each operation took; on a device, how long the kernels that it started.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

PARTS = ("gemm", "attention", "elementwise", "host")
"""Products; attention inside windows; all else that passes over tensors; what only the program takes, while
a device waits."""
_PRODUCTS = ("aten::mm", "aten::addmm", "aten::_addmm_activation", "mkldnn::_linear_pointwise")
_BATCHED = ("aten::bmm", "aten::baddbmm")
_KERNELS = ("aten::", "triton", "cpp_fused", "Compiled", "Memcpy", "Memset")


def synchronize(device: torch.device) -> None:
    """Wait for the device's work; the CPU has done its own when a call returns."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Time one call of `work`, to the end of its work on the device."""
    synchronize(device)
    start = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - start


def part_of(name: str, shapes: Any) -> str:
    """Say to which of `PARTS` an event of the profiler belongs, by its name and the shapes of its inputs.

    Batched products are attention written out, but one with a single column is a sum over features (in the
    gradient of a norm).
    """
    if name in _PRODUCTS or "extern_kernels.mm" in name:
        return "gemm"
    if any(word in name for word in ("attention", "softmax", "sdpa")):
        return "attention"
    if name in _BATCHED and not any(1 in shape[-2:] for shape in shapes if len(shape) == 3):
        return "attention"
    return "elementwise" if any(word in name for word in _KERNELS) else "host"


def split(call: Callable[[], object], device: torch.device, measured_ms: float) -> dict[str, float]:
    """Profile one call and split `measured_ms`, what it takes without a profiler: ms by `PARTS`.

    On a device the kernels keep their own times, and the rest is the program's. On the CPU, where a profiled
    call takes longer, its shares are kept.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or the profiler says on stderr that it starts
    kinds = [ProfilerActivity.CPU]
    if device.type != "cpu":
        kinds.append(getattr(ProfilerActivity, device.type.upper()))
    synchronize(device)
    with profile(activities=kinds, record_shapes=True) as profiled:
        profiled_ms = 1e3 * seconds(call, device)
    found = dict.fromkeys(PARTS, 0.0)
    for event in profiled.key_averages(group_by_input_shape=True):
        if event.device_type.name != "CPU":  # a kernel, which is counted with the operation that started it
            continue
        own_us = event.self_cpu_time_total if device.type == "cpu" else event.self_device_time_total
        found[part_of(event.key, event.input_shapes)] += own_us / 1e3
    if device.type == "cpu":
        found["host"] = max(0.0, profiled_ms - sum(found.values()) + found["host"])
        return {name: own_ms * measured_ms / sum(found.values()) for name, own_ms in found.items()}
    found["elementwise"] += found["host"]  # whatever started them, kernels are not the program
    found["host"] = max(0.0, measured_ms - sum(found[name] for name in PARTS[:3]))
    return found
