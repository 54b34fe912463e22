"""AdamW in host memory: what the optimizer keeps is not on the device.

As the published 1.3B runs kept it (DeepSpeed's CPU Adam). Of every parameter of this rank's shards stay on
the device the fp32 weight, which is gathered for a step, and its gradient, 8 bytes; the host has the master
weight, two moments and a buffer for the gradient, 16, and with aeris.train its average, 20. Without offload
all of it, 20 bytes, is on the device.

Every update moves 4 bytes per parameter to the host and 4 back. The names and values of a checkpoint are the
same with and without offload.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from aeris.config import OptimizerConfig
from swipe.sharding import local

NAMES = {"cpu": "DeepSpeed's CPU Adam", "cpu-torch": "torch's fused AdamW"}


class Offloaded(torch.optim.Optimizer):
    """AdamW whose master weights, moments and arithmetic are on the host; to the outside, an AdamW.

    Attributes:
        host: the master weight of every parameter: this rank's part, a plain tensor on the CPU, pinned where
            the parameter is on a device. It is current after `step`.
        state: as of `torch.optim.AdamW`, with tensors on the CPU, divided over ranks as the parameters are.
    """

    def __init__(self, groups: list[dict[str, Any]], config: OptimizerConfig) -> None:
        """Set the state to zero; the master weights are taken from the parameters by the first step.

        Args:
            groups: parameters and settings, as for `torch.optim.AdamW`.
            config: `offload` is "cpu" or "cpu-torch".

        Raises:
            ValueError: "cpu", and DeepSpeed is not there, cannot be used, or the weights are not fp32.
        """
        super().__init__(groups, {"lr": config.lr, "betas": config.betas, "eps": config.eps})
        self.offload = config.offload
        self.host: dict[Tensor, torch.nn.Parameter] = {}
        self._gradient: dict[Tensor, Tensor] = {}
        self._seen: dict[Tensor, int] = {}
        hosts = []
        for group in self.param_groups:
            for p in group["params"]:
                self.host[p] = torch.nn.Parameter(_buffer(p))
                self._gradient[p] = _buffer(p)
                moment = torch.zeros_like(p.detach().to("cpu", copy=True))
                self.state[p] = {
                    "step": torch.zeros((), dtype=torch.float32),
                    "exp_avg": moment,
                    "exp_avg_sq": torch.zeros_like(moment),
                }
            settings = {key: value for key, value in group.items() if key != "params"}
            hosts.append({**settings, "params": [self.host[p] for p in group["params"]]})
        self.adam = self._adam(hosts, config)

    def _adam(self, groups: list[dict[str, Any]], config: OptimizerConfig) -> torch.optim.Optimizer:
        """Make the optimizer of the master weights; it works in place on the tensors of `state`."""
        found: torch.optim.Optimizer
        if self.offload == "cpu":
            other = {p.dtype for p in self.host if p.dtype != torch.float32}
            if other:
                raise ValueError(
                    f"--optimizer.offload cpu: {NAMES['cpu']} works in fp32, the weights are {other.pop()}; "
                    "take --optimizer.offload cpu-torch"
                )
            found = _deepspeed_adam(groups, lr=config.lr, betas=config.betas, eps=config.eps)
        else:
            found = torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)
        for p, host in self.host.items():
            found.state[host] = {key: local(value) for key, value in self.state[p].items()}
        return found

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update master weights and state by the gradients of the parameters, then the parameters.

        A parameter that was changed by other hands since the last step, as by a checkpoint that was loaded,
        is taken over first.
        """
        self._fetch()
        for outer, inner in zip(self.param_groups, self.adam.param_groups):
            inner.update({key: value for key, value in outer.items() if key != "params"})
        if self.offload == "cpu-torch":
            self.adam.step()
        else:  # counts steps in an int of its own
            for p, host in self.host.items():
                self.adam.state[host]["step"] = int(self.state[p]["step"])
            self.adam.step()
            for p, host in self.host.items():
                self.state[p]["step"].fill_(self.adam.state[host]["step"])
        for p, host in self.host.items():
            if host.grad is not None:
                own = local(p.detach())
                own.copy_(host, non_blocking=True)  # in the order of the device's queue, before the next pass
                self._seen[p] = own._version

    def _fetch(self) -> None:
        """Copy gradients, and parameters where others changed them, to the host; wait for the copies."""
        devices = set()
        for p, host in self.host.items():
            own = local(p.detach())
            devices.add(own.device)
            if self._seen.get(p) != own._version:
                host.copy_(own, non_blocking=True)
            host.grad = None
            if p.grad is not None:
                host.grad = self._gradient[p].copy_(local(p.grad), non_blocking=True)
        for device in devices:
            if device.type != "cpu":
                getattr(torch, device.type).current_stream(device).synchronize()

    def __str__(self) -> str:
        """Say which Adam it is, and its bytes per parameter in either memory."""
        size = max(p.element_size() for p in self.host)
        device = next(iter(self.host)).device
        return (
            f"{NAMES[self.offload]} (--optimizer.offload {self.offload}): {4 * size} bytes per parameter in "
            f"host memory, and the average; {2 * size} on the device ({device.type})"
        )


def host_weights(optimizer: torch.optim.Optimizer) -> Mapping[Tensor, Tensor]:
    """Return the master weights in host memory by parameter; none where nothing is offloaded."""
    return optimizer.host if isinstance(optimizer, Offloaded) else {}


def _buffer(p: Tensor) -> Tensor:
    """Make a tensor on the CPU as large as this rank's part of `p`, pinned if `p` is on a device."""
    own = local(p.detach())
    return torch.empty(own.shape, dtype=own.dtype, device="cpu", pin_memory=own.device.type != "cpu")


def _deepspeed_adam(groups: list[dict[str, Any]], **settings: Any) -> torch.optim.Optimizer:
    """Make DeepSpeed's AdamW for tensors on the CPU; its C++ is compiled when it is used for the first time.

    Raises:
        ValueError: it is not installed, or cannot be compiled here.
    """
    instead = "; torch's own needs neither: --optimizer.offload cpu-torch"
    # Without it DeepSpeed would set up the device as well, and ask for its compiler.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        from deepspeed.ops.adam import DeepSpeedCPUAdam
    except Exception as error:  # one made for another torch fails in many ways
        raise ValueError(
            f"--optimizer.offload cpu needs DeepSpeed, which cannot be imported ({error}): "
            f"pip install 'aeris-swipe[deepspeed]'{instead}"
        ) from None
    try:
        return DeepSpeedCPUAdam(groups, adamw_mode=True, **settings)
    except (RuntimeError, OSError) as error:
        reason = str(error.__cause__ or error).splitlines()[0]
        raise ValueError(
            f"--optimizer.offload cpu: {NAMES['cpu']} cannot be built here ({reason}): "
            f"it needs ninja and a C++ compiler{instead}"
        ) from None
