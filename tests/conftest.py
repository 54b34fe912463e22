"""What every test shares: few threads, a fixed seed, being one process, and the `gpu` mark."""

import os

# Before torch is imported: small tensors are fastest on one thread, and sums keep their order.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

import signal
import threading

import pytest
import torch

from aeris.log import speaker

torch.set_num_threads(1)
# A shell starts what runs in the background with Ctrl-C ignored, and what is started from here inherits it.
if threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `gpu` on a machine without one."""
    if torch.cuda.is_available() or (hasattr(torch, "xpu") and torch.xpu.is_available()):
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="no GPU on this machine"))


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    """Start every test from the same global random state, whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _one_process() -> None:
    """Start every test as the only rank, whichever rank a program in an earlier test pretended to be."""
    speaker.take_turn(0)
