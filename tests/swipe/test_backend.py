"""The choice of a device, with fakes for what this machine does not have."""

from __future__ import annotations

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
    assert choose_device(name) == torch.device(expected)


def test_a_device_that_is_not_here_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="cuda is not available here: choose one of auto, cpu"):
        choose_device("cuda")
