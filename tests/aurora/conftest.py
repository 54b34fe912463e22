"""What tests of Aurora's training read and never write: weather and weights to start from, made once."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.aurora.tiny_runs import write_pair, write_weights


@pytest.fixture(scope="session")
def weather(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Six days to train on, in 2020, and two to validate on, in 2022."""
    return write_pair(tmp_path_factory.mktemp("weather"))


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of a model without adapters, none of them zero."""
    return write_weights(tmp_path_factory.mktemp("base") / "base.ckpt")
