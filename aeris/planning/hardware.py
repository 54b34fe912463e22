"""Machines as data: what a device computes, stores and sends per second, each number with its source.

"Per device" is a GPU tile, GCD or GPU: what one rank drives. Rates are with all devices of a node busy.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

AURORA_GEMM_EFFICIENCY = 0.871
"""What `aeris.planning.published.calibrate` finds."""
UNCALIBRATED = 0.7
"""Share of the measured GEMM rate taken for machines without a published run to hold it to."""


@dataclass(frozen=True)
class Hardware:
    """A machine. Bytes, bytes per second, FLOP per second and seconds, all per device unless said.

    Raises:
        ValueError: a number is negative, not finite, or zero where it divides.
    """

    name: str
    devices_per_node: int
    nodes: int
    """Nodes of the machine; 0: not known."""
    memory_bytes: float
    peak_flops_per_s: float
    """bf16, theoretical: what MFU is a share of."""
    gemm_flops_per_s: float
    """bf16, measured for a large matrix product."""
    fp32_flops_per_s: float
    """Matrix products in fp32 (embedding and head)."""
    memory_bytes_per_s: float
    inside_bytes_per_s: float
    """Sent by one device in an all-to-all among all devices of its node."""
    between_bytes_per_s: float
    """Sent by one device to other nodes, all devices of the node sending."""
    inside_latency_s: float
    between_latency_s: float
    host_bytes: float
    """Host memory of a node."""
    host_bytes_per_s: float
    """Between device and host."""
    read_bytes_per_s: float
    """From the file system, all nodes together."""
    write_bytes_per_s: float
    gemm_efficiency: float = UNCALIBRATED
    """Share of `gemm_flops_per_s` that the products of a step reach."""
    link_efficiency: float = 1.0
    """Share of the two link rates that the messages of a step reach."""
    sources: Mapping[str, str] = field(default_factory=dict)
    """Field -> where its number is from."""

    def __post_init__(self) -> None:
        """Check the numbers."""
        for name in NUMBERS:
            value = getattr(self, name)
            if not isinstance(value, int | float) or isinstance(value, bool):
                raise ValueError(f"machine {self.name!r}: {name} is {value!r}, not a number")
            if not math.isfinite(value) or value < 0 or (value == 0 and name not in MAY_BE_ZERO):
                least = "0 or more" if name in MAY_BE_ZERO else "more than 0"
                raise ValueError(f"machine {self.name!r}: {name} is {value:g}: it must be {least}")
        for name in ("devices_per_node", "nodes"):
            if getattr(self, name) != int(getattr(self, name)):
                raise ValueError(
                    f"machine {self.name!r}: {name} is {getattr(self, name):g}, not a whole number"
                )
        for name in ("gemm_efficiency", "link_efficiency"):
            if getattr(self, name) > 1:
                raise ValueError(f"machine {self.name!r}: {name} is {getattr(self, name):g}: at most 1")
        if unknown := sorted(set(self.sources) - set(NUMBERS)):
            raise ValueError(
                f"machine {self.name!r}: sources name {unknown[0]!r}, which is not a number of it"
            )


NUMBERS = tuple(f.name for f in dataclasses.fields(Hardware) if f.name not in ("name", "sources"))
"""Fields that are numbers."""
OPTIONAL = ("nodes", "gemm_efficiency", "link_efficiency", "sources")
"""What a file may leave out."""
MAY_BE_ZERO = ("nodes", "inside_latency_s", "between_latency_s")


def load(name: str) -> Hardware:
    """Return a machine of `HARDWARE`, or read one from a JSON file: an object with the fields of `Hardware`.

    Raises:
        ValueError: no such machine or file, or a field is unknown, missing or not what it must be.
    """
    if name in HARDWARE:
        return HARDWARE[name]
    path = Path(name)
    if path.suffix != ".json":
        raise ValueError(
            f"no machine {name!r}: choose {', '.join(HARDWARE)}, or a .json file with its numbers"
        )
    try:
        values = json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist: it should describe a machine") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON ({error})") from None
    return _from_values(values, path)


def _from_values(values: Any, path: Path) -> Hardware:
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected an object with the fields of a machine, found {values!r}")
    values = {"name": path.stem, "nodes": 0, **values}
    if not isinstance(values["name"], str):
        raise ValueError(f"{path}: name is {values['name']!r}, not text")
    for name in ("devices_per_node", "nodes"):
        if isinstance(value := values.get(name), float) and value.is_integer():  # 4.0 and 1e4 are fine
            values[name] = int(value)
    known = {f.name for f in dataclasses.fields(Hardware)}
    if unknown := sorted(set(values) - known):
        raise ValueError(f"{path}: unknown field {unknown[0]!r}; a machine has {', '.join(sorted(known))}")
    if missing := sorted(known - set(values) - set(OPTIONAL)):
        raise ValueError(f"{path}: {', '.join(missing)} missing")
    if not isinstance(values.get("sources", {}), dict):
        raise ValueError(f"{path}: sources must be an object, field to text")
    try:
        return Hardware(**values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


_ALCF = "ALCF user guide, node performance, 12 January 2026: "
_AURORA = Hardware(
    name="alcf-aurora", devices_per_node=12, nodes=10_624, memory_bytes=64e9,
    peak_flops_per_s=367e12, gemm_flops_per_s=2487e12 / 12, fp32_flops_per_s=247e12 / 12,
    memory_bytes_per_s=1e12, inside_bytes_per_s=143e9 / 12, between_bytes_per_s=200e9 / 12,
    inside_latency_s=10e-6, between_latency_s=20e-6, host_bytes=1024e9, host_bytes_per_s=257e9 / 12,
    read_bytes_per_s=650e9, write_bytes_per_s=650e9, gemm_efficiency=AURORA_GEMM_EFFICIENCY,
    sources={
        "devices_per_node": "ALCF user guide: 6 Max 1550 of 2 tiles",
        "nodes": "ALCF user guide",
        "memory_bytes": "ALCF user guide: HBM2e of a tile",
        "peak_flops_per_s": "448 matrix engines x 512 FLOPs a cycle x 1.6 GHz; ALCF runs them at 1.5 GHz",
        "gemm_flops_per_s": _ALCF + "bf16 GEMM, 2,487 TFLOP/s a node (256 on one tile alone)",
        "fp32_flops_per_s": _ALCF + "SGEMM, 247 TFLOP/s a node",
        "memory_bytes_per_s": _ALCF + "triad, 12 TB/s a node",
        "inside_bytes_per_s": _ALCF + "GPU to GPU both ways, 143 GB/s by 12 tiles, each with one other; what"
        " all links of a tile carry at once is not published: up to 5 times as much",
        "between_bytes_per_s": "ALCF user guide: 8 Slingshot-11 NICs of 25 GB/s; not measured",
        "inside_latency_s": "assumed: a collective between GPUs",
        "between_latency_s": "assumed: a collective between GPUs",
        "host_bytes": "ALCF user guide: DDR5 of a node",
        "host_bytes_per_s": _ALCF + "device to host, 257 GB/s a node",
        "read_bytes_per_s": "ALCF user guide: Flare, 650 GB/s",
        "write_bytes_per_s": "ALCF user guide: Flare, 650 GB/s",
        "gemm_efficiency": "from one published number, 0.76 EFLOP/s of 40B on 720 nodes"
        " (aeris/planning/published.py)",
        "link_efficiency": "not calibrated: one number cannot tell it from the other",
    },
)  # fmt: skip

_MAMF = "S. Bekman, ml-engineering, best bf16 matrix product measured: "
_LUMI = Hardware(
    name="lumi", devices_per_node=8, nodes=2_978, memory_bytes=64e9,
    peak_flops_per_s=191.5e12, gemm_flops_per_s=147e12, fp32_flops_per_s=35e12, memory_bytes_per_s=1.3e12,
    inside_bytes_per_s=50e9, between_bytes_per_s=100e9 / 8,
    inside_latency_s=10e-6, between_latency_s=20e-6, host_bytes=512e9, host_bytes_per_s=25e9,
    read_bytes_per_s=240e9, write_bytes_per_s=240e9, gemm_efficiency=AURORA_GEMM_EFFICIENCY,
    sources={
        "devices_per_node": "LUMI documentation: 4 MI250X of 2 GCDs",
        "nodes": "LUMI documentation: LUMI-G",
        "memory_bytes": "LUMI documentation: HBM2e of a GCD",
        "peak_flops_per_s": "AMD data sheet: 383 TFLOP/s of an MI250X, two GCDs",
        "gemm_flops_per_s": _MAMF + "147 of 191.5 TFLOP/s on one GCD",
        "fp32_flops_per_s": "assumed: three quarters of the 47.9 of AMD's data sheet",
        "memory_bytes_per_s": "assumed: four fifths of the 1.6 TB/s of AMD's data sheet",
        "inside_bytes_per_s": "assumed: one Infinity Fabric link, the least between GCDs (OLCF user guide)",
        "between_bytes_per_s": "LUMI documentation: 4 Slingshot-11 endpoints of 25 GB/s; not measured",
        "inside_latency_s": "assumed",
        "between_latency_s": "assumed",
        "host_bytes": "LUMI documentation",
        "host_bytes_per_s": "assumed: two thirds of the 36 GB/s of a link (OLCF user guide)",
        "read_bytes_per_s": "LUMI documentation: one LUMI-P file system",
        "write_bytes_per_s": "LUMI documentation: one LUMI-P file system",
        "gemm_efficiency": "assumed: that of alcf-aurora",
        "link_efficiency": "not calibrated",
    },
)  # fmt: skip

_H200 = Hardware(
    name="h200", devices_per_node=8, nodes=0, memory_bytes=141e9,
    peak_flops_per_s=989.5e12, gemm_flops_per_s=792e12, fp32_flops_per_s=50e12, memory_bytes_per_s=4.3e12,
    inside_bytes_per_s=360e9, between_bytes_per_s=45e9,
    inside_latency_s=10e-6, between_latency_s=20e-6, host_bytes=2000e9, host_bytes_per_s=50e9,
    read_bytes_per_s=100e9, write_bytes_per_s=100e9,
    sources={
        "devices_per_node": "NVIDIA HGX H200",
        "nodes": "a kind of node, not a machine",
        "memory_bytes": "NVIDIA data sheet",
        "peak_flops_per_s": "NVIDIA data sheet, dense",
        "gemm_flops_per_s": _MAMF + "792 TFLOP/s on an H100 SXM, the same processor",
        "fp32_flops_per_s": "assumed: three quarters of the 67 of the data sheet; TF32 is off",
        "memory_bytes_per_s": "assumed: nine tenths of the 4.8 TB/s of the data sheet",
        "inside_bytes_per_s": "assumed: four fifths of the 450 GB/s of NVLink each way",
        "between_bytes_per_s": "assumed: nine tenths of a 400 Gbit/s NIC for each device",
        "inside_latency_s": "assumed",
        "between_latency_s": "assumed",
        "host_bytes": "assumed",
        "host_bytes_per_s": "assumed: four fifths of PCIe 5 x16",
        "read_bytes_per_s": "assumed: a middling parallel file system",
        "write_bytes_per_s": "assumed: a middling parallel file system",
        "gemm_efficiency": "assumed",
        "link_efficiency": "not calibrated",
    },
)  # fmt: skip

_A100 = Hardware(
    name="a100", devices_per_node=4, nodes=0, memory_bytes=80e9,
    peak_flops_per_s=312e12, gemm_flops_per_s=268e12, fp32_flops_per_s=15e12, memory_bytes_per_s=1.8e12,
    inside_bytes_per_s=240e9, between_bytes_per_s=22e9,
    inside_latency_s=10e-6, between_latency_s=20e-6, host_bytes=512e9, host_bytes_per_s=25e9,
    read_bytes_per_s=100e9, write_bytes_per_s=100e9,
    sources={
        "devices_per_node": "NVIDIA HGX A100, 4 devices",
        "nodes": "a kind of node, not a machine",
        "memory_bytes": "NVIDIA data sheet, SXM 80 GB",
        "peak_flops_per_s": "NVIDIA data sheet, dense",
        "gemm_flops_per_s": _MAMF + "267.9 TFLOP/s on an A100 SXM",
        "fp32_flops_per_s": "assumed: three quarters of the 19.5 of the data sheet; TF32 is off",
        "memory_bytes_per_s": "assumed: nine tenths of the 2.0 TB/s of the data sheet",
        "inside_bytes_per_s": "assumed: four fifths of the 300 GB/s of NVLink each way",
        "between_bytes_per_s": "assumed: nine tenths of a 200 Gbit/s NIC for each device",
        "inside_latency_s": "assumed",
        "between_latency_s": "assumed",
        "host_bytes": "assumed",
        "host_bytes_per_s": "assumed: four fifths of PCIe 4 x16",
        "read_bytes_per_s": "assumed: a middling parallel file system",
        "write_bytes_per_s": "assumed: a middling parallel file system",
        "gemm_efficiency": "assumed",
        "link_efficiency": "not calibrated",
    },
)  # fmt: skip

_CPU = Hardware(
    name="cpu", devices_per_node=8, nodes=0, memory_bytes=4e9,
    peak_flops_per_s=200e9, gemm_flops_per_s=100e9, fp32_flops_per_s=60e9, memory_bytes_per_s=6e9,
    inside_bytes_per_s=1e9, between_bytes_per_s=0.125e9,
    inside_latency_s=100e-6, between_latency_s=300e-6, host_bytes=32e9, host_bytes_per_s=6e9,
    read_bytes_per_s=0.5e9, write_bytes_per_s=0.5e9,
    sources={
        name: "assumed: an ordinary computer, a process of gloo on each of 8 cores"
        for name in NUMBERS
        if name not in ("nodes", "link_efficiency")
    } | {"nodes": "a kind of node, not a machine", "link_efficiency": "not calibrated"},
)  # fmt: skip

HARDWARE: dict[str, Hardware] = {machine.name: machine for machine in (_AURORA, _LUMI, _H200, _A100, _CPU)}
"""Machines by name; `load` also reads others from a file."""
