"""Take a kept step (aeris/dumps.py) again in one process, image by image.

Data, noise and noise times belong to the numbers of the images, so they are those of the run, whatever its
layout. Sums are made in another order: the numbers agree with the run's to the precision of its products.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from aeris import config as configs
from aeris.config import ParallelConfig, RunConfig
from aeris.data.loader import SampleDataset, make_loader
from aeris.diffusion.trigflow import sigma_of
from aeris.dumps import directory
from aeris.optim import first_bad_tensor
from aeris.parallelize import build_model, make_layout, take_seat
from aeris.reading import open_samples
from aeris.restore import channel_counts, check_fingerprint, open_store
from aeris.step import Training, noisy
from swipe import checkpoint
from swipe.mesh import ParallelDims


@dataclass(frozen=True)
class Fault:
    """A step that was kept."""

    path: Path
    meta: dict[str, Any]
    config: RunConfig
    """Of the run at that moment, but for one process and image by image."""
    images: range
    record: dict[str, Any]
    """What the run logged of the step."""


def find_fault(run_dir: Path, name: str = "", store: str = "") -> Fault:
    """Find a kept step of a run, the newest if none is named.

    Args:
        store: where the data are now, if not where the run read them.

    Raises:
        ValueError: there is none, or none of this name, or it is damaged.
    """
    found = {path.name: path for path in checkpoint.complete(directory(run_dir))}
    if not run_dir.is_dir():
        raise ValueError(f"{run_dir} does not exist: give the --run-dir of a run of aeris.train")
    if not found:
        raise ValueError(
            f"{directory(run_dir)} holds no skipped step: aeris.train keeps the newest --faults.dumps of them"
        )
    if name and name not in found:
        raise ValueError(f"{directory(run_dir)} holds no {name}, but {', '.join(found)}")
    path = found[name or max(found)]
    meta = checkpoint.read_meta(path)
    config = configs.from_dict(RunConfig, meta["config"], f"{path / 'meta.json'}: config")
    config = replace(
        config,
        model=replace(config.model, compile=False),
        data=replace(config.data, store=store or config.data.store, workers=0),
        train=replace(config.train, microbatch=1),
        parallel=ParallelConfig(),
    )
    words = ("nan", "inf", "-inf")
    record = {key: float(value) if value in words else value for key, value in meta["record"].items()}
    return Fault(path, meta, config, range(*meta["images"]), record)


def samples_of(fault: Fault) -> SampleDataset:
    """Open the samples of the run, whole, as one rank alone reads them.

    Raises:
        ValueError: the data are not there, or others than the run's.
    """
    store, config = open_store(fault.config), fault.config
    check_fingerprint(fault.meta["fingerprint"], store)
    return open_samples(config, store, make_layout(config.model).shard)


class FirstBad:
    """Finds the first module whose output is not finite, and the first behind which the gradient is not.

    Modules are seen in the order they are used, those inside before what they are part of.
    """

    def __init__(self, model: nn.Module) -> None:
        """Watch every module of a model."""
        self.output: str | None = None
        self.gradient: str | None = None
        for name, module in model.named_modules():
            module.register_forward_hook(partial(self._see, name or "the network"))

    def forget(self) -> None:
        """Begin anew."""
        self.output = self.gradient = None

    def _see(self, name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        for tensor in output if isinstance(output, (tuple, list)) else (output,):
            if isinstance(tensor, Tensor) and tensor.is_floating_point():
                # Detached: a block that is computed again must save as many tensors as before.
                if self.output is None and not bool(tensor.detach().isfinite().all()):
                    self.output = name
                if tensor.requires_grad:
                    tensor.register_hook(partial(self._see_gradient, name))

    def _see_gradient(self, name: str, gradient: Tensor) -> None:
        if self.gradient is None and not bool(gradient.isfinite().all()):
            self.gradient = name


@dataclass(frozen=True)
class Taken:
    """What the network made of one image."""

    sigma: float
    """Its noise level."""
    loss: float
    grad_norm: float
    bad: str | None
    """The first thing that is not finite, if anything is."""


class Retake(Training):
    """The network of a kept step on one device, without optimizer, average and checkpoints."""

    def __init__(self, fault: Fault, samples: SampleDataset, device: torch.device) -> None:
        """Build the network and load its weights.

        Raises:
            ValueError: the kept weights are damaged.
        """
        self.config, self.run_dir = fault.config, fault.path
        self.store, self.samples, self.device = samples.store, samples, device
        counts = channel_counts(len(self.store.names))
        self.seat = take_seat(fault.config, counts, ParallelDims(), 0, device)
        self.layout = self.seat.layout
        self.tokens_NT = self.layout.tokens_NT.to(device)
        self.valid_NTC = None
        if self.store.masks:
            self.valid_NTC = torch.from_numpy(self.store.valid_windows(self.layout.shard)).to(device)
        self.model = build_model(fault.config.model, *counts, self.layout, device)
        checkpoint.load(
            fault.path, {f"model.{name}": p.detach() for name, p in self.model.named_parameters()}
        )
        self.bad_weight = first_bad_tensor(self.model)
        self.first_bad = FirstBad(self.model)
        self.loss = self._loss()
        self.total = [torch.zeros_like(p) for p in self.model.parameters()]
        self.taken = 0

    def images(self, images: Iterable[int]) -> Iterator[Taken]:
        """Take images one after the other, adding up their gradients.

        Raises:
            StoreError: a sample cannot be read.
        """
        for sample in make_loader(self.samples, images, 1):
            x, (t_B,), target = noisy(self, sample)
            assert x is not None, "one process has the first stage"
            self.first_bad.forget()
            self.model.zero_grad(set_to_none=True)
            loss = self.loss(self.model(x, t_B), target)
            torch.autograd.backward(loss)
            gradients = [
                p.grad if p.grad is not None else torch.zeros_like(p) for p in self.model.parameters()
            ]
            torch._foreach_add_(self.total, gradients)
            self.taken += 1
            sigma, value = sigma_of(float(t_B), self.config.diffusion.sigma_data), float(loss.detach())
            length = norm(gradients)
            yield Taken(sigma, value, length, self._bad(value, length))

    def grad_norm(self) -> float:
        """Return the norm of the mean gradient of all images taken."""
        return norm(self.total) / max(1, self.taken)

    def _bad(self, loss: float, length: float) -> str | None:
        """Name what was first not finite in the image just taken: a weight, an output, or on the way back."""
        if self.bad_weight:
            return self.bad_weight
        if self.first_bad.output:
            return f"the output of {self.first_bad.output}"
        if not math.isfinite(loss):
            return "the loss, of finite outputs"
        if self.first_bad.gradient:
            return f"the gradient arriving at {self.first_bad.gradient}"
        return first_bad_tensor(self.model) or (
            None if math.isfinite(length) else "the norm of a finite gradient"
        )


def norm(tensors: list[Tensor]) -> float:
    """Return the L2 norm of tensors together, summed as in training (`swipe.gradients.global_norm`)."""
    squares = torch.stack([one.double() for one in torch._foreach_norm(tensors)]).square()
    return float(squares.sum().sqrt())
