"""A run that is broken again and again ends as one that nothing was done to."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos import INTERVAL, KINDS, chaos, summary


@pytest.mark.slow
def test_every_fault_is_survived(tmp_path: Path) -> None:
    """One of every kind, at random moments: the same final weights, averages and losses, bit for bit.

    A fault costs at most an interval, and the steps that a checkpoint was still being written in; a damaged
    checkpoint costs the interval up to the one before it as well.
    """
    faults = chaos(list(KINDS), seed=5, ranks=4, root=tmp_path)
    print(summary(faults))
    assert [fault.complaint for fault in faults if fault.complaint] == []
    assert len(faults) == len(KINDS)
    for fault in faults:
        assert fault.lost <= 2 * INTERVAL + ("newest" in fault.kind) * INTERVAL, fault
