"""Which device a process computes on: CUDA, Intel XPU or CPU."""

from __future__ import annotations

import torch


def choose_device(name: str) -> torch.device:
    """Return the device asked for; `auto` takes cuda, then xpu, then cpu.

    Raises:
        ValueError: there is no such device here; names those there are.
    """
    present = [kind for kind in ("cuda", "xpu") if getattr(torch, kind).is_available()] + ["cpu"]
    if name == "auto":
        return torch.device(present[0])
    if name.split(":")[0] not in present:
        raise ValueError(f"--device {name} is not available here: choose one of auto, {', '.join(present)}")
    return torch.device(name)
