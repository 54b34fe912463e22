"""Which device a process computes on: CUDA, Intel XPU or CPU, and what makes a CPU fast."""

from __future__ import annotations

import ctypes

import torch

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # <malloc.h> of glibc


def choose_device(name: str) -> torch.device:
    """Return the device asked for; `auto` takes cuda, then xpu, then cpu.

    Raises:
        ValueError: there is no such device here; names those there are.
    """
    present = [kind for kind in ("cuda", "xpu") if getattr(torch, kind).is_available()] + ["cpu"]
    if name == "auto":
        return torch.device(present[0])
    kind, _, number = name.partition(":")
    count = 1 if kind == "cpu" else getattr(torch, kind).device_count() if kind in present else 0
    if kind not in present or (number and not (number.isdigit() and int(number) < count)):
        raise ValueError(f"--device {name} is not available here: choose one of auto, {', '.join(present)}")
    return torch.device(name)


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
