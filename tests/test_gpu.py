"""What only an accelerator can show: the same noise, the same network, the same training step as on CPU."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from aeris import train
from aeris.data.loader import SampleDataset, make_loader
from aeris.flops import measure_gemm_rate
from aeris.parallelize import take_seat
from aeris.presets import PRESETS
from aeris.reading import ImageOrder, read_samples
from aeris.restore import channel_counts, open_store
from aeris.step import noisy, train_step
from swipe.backend import choose_device
from swipe.mesh import ParallelDims
from swipe.noise import key, normal, uniform

DEVICE = choose_device("auto")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(DEVICE.type == "cpu", reason="there is no GPU here")]


def test_noise_is_that_of_the_cpu() -> None:
    """The integers are equal; logarithm and cosine of another library may differ in the last bits."""
    tokens, keys = torch.arange(4096).view(4, 1024), [key(0, 1), key(0, 2)]
    torch.testing.assert_close(
        normal(keys, tokens.to(DEVICE), 7).cpu(), normal(keys, tokens, 7), rtol=0, atol=2e-6
    )
    assert torch.equal(uniform(keys, DEVICE).cpu(), uniform(keys))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_training_step_is_that_of_the_cpu(precision: str, tmp_path: Path) -> None:
    """Loss, gradients of every tensor and the input of the network; in bf16 as close as bf16 allows."""
    base = PRESETS["tiny"]()
    config = dataclasses.replace(base, model=dataclasses.replace(base.model, precision=precision))
    results = []
    for device in ("cpu", DEVICE.type):
        run = train.prepare(config, tmp_path / device, device)
        with torch.no_grad():
            for number, p in enumerate(run.model.parameters()):
                generator = torch.Generator().manual_seed(number)
                p.add_(0.02 * torch.randn(p.shape, generator=generator).to(device))
        dataset = SampleDataset(run.store.path, 6, run.layout.shard, 0)
        (sample,) = make_loader(dataset, range(2), 2)
        x = noisy(run, sample).x
        assert x is not None
        inputs = x.cpu()
        record = train_step(run, iter([sample]))
        results.append(
            (record["loss"], inputs, [p.grad.cpu() for p in run.model.parameters() if p.grad is not None])
        )
    (loss, inputs, gradients), (loss_gpu, inputs_gpu, gradients_gpu) = results
    tolerance = 1e-3 if precision == "fp32" else 5e-2
    torch.testing.assert_close(inputs_gpu, inputs, rtol=1e-5, atol=1e-5)
    assert loss_gpu == pytest.approx(loss, rel=tolerance)
    for a, b in zip(gradients_gpu, gradients):
        assert (a - b).norm() <= tolerance * b.norm() + 1e-7


def test_the_gemm_rate_is_that_of_a_gpu() -> None:
    """More than any CPU: the measurement waits for the device."""
    assert 1e12 < measure_gemm_rate(DEVICE, torch.bfloat16) < 1e16


@pytest.mark.parametrize("workers", [0, 1])
def test_samples_on_the_device_are_those_on_the_host(workers: int, tmp_path: Path) -> None:
    """Copied ahead on a stream of their own, through pinned memory, and used while others are copied."""
    base = PRESETS["tiny"]()
    config = dataclasses.replace(base, data=dataclasses.replace(base.data, workers=workers))
    store, order = open_store(config), ImageOrder(0, 24, 2)
    found = []
    for device in (torch.device("cpu"), DEVICE):
        seat = take_seat(config, channel_counts(len(store.names)), ParallelDims(), 0, device)
        found.append([[x.sin().cpu() for x in s[:3]] for s in read_samples(config, store, seat, order)])
    for ours, theirs in zip(*found):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
