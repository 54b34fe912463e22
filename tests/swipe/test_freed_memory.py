"""What makes a CPU fast: freed memory stays with the process."""

from __future__ import annotations

import subprocess
import sys

import pytest

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
