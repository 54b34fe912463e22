"""The choice of a device, with fakes for what this machine does not have."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from swipe.backend import choose_device


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
