"""The example of docs/swipe.md: the same losses on one rank and on four, in two layouts."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = ROOT / "docs/examples/image_windows.py"
# fp32, eight steps: sums in another order move a loss in the seventh digit; six are printed.
TOLERANCE = 1e-5


def losses(printed: str) -> list[float]:
    """Read the losses off what the example prints."""
    return [float(line.split("loss ")[1]) for line in printed.splitlines() if line.startswith("step ")]


@pytest.fixture
def serial(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Run the example in this process."""
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE)])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    return losses(capsys.readouterr().out)


def on_four_ranks(*flags: str) -> subprocess.CompletedProcess[str]:
    """Run the example on four ranks of this machine."""
    env = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "PYTHONWARNINGS": "error::UserWarning",
    }
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        env.pop(name, None)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    command += ["--nproc-per-node", "4", str(EXAMPLE), *flags]
    return subprocess.run(
        command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300, check=False
    )


@pytest.mark.slow
def test_one_rank_learns_and_any_layout_prints_the_same(serial: list[float]) -> None:
    assert len(serial) == 8
    assert serial[-1] < 0.3 * serial[0]
    for flags in (("--pp", "2", "--wp-x", "2"), ("--sp", "2", "--wp-y", "2")):
        done = on_four_ranks(*flags)
        assert done.returncode == 0, done.stderr
        np.testing.assert_allclose(losses(done.stdout), serial, rtol=0, atol=TOLERANCE)


def test_the_example_is_short() -> None:
    assert len(EXAMPLE.read_text().splitlines()) < 120
