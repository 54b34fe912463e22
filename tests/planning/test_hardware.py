"""Machines as data: every number has a source, and a file is read or refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from aeris.planning.hardware import HARDWARE, NUMBERS, Hardware, load


@pytest.mark.parametrize("name", HARDWARE)
def test_every_number_has_a_source(name: str) -> None:
    machine = load(name)
    assert machine.name == name and set(machine.sources) == set(NUMBERS)
    assert all(machine.sources.values())
    assert machine.gemm_flops_per_s <= machine.peak_flops_per_s
    assert machine.fp32_flops_per_s <= machine.gemm_flops_per_s


def own(path: Path, **changes: Any) -> Path:
    """Write the machine of a user, with changes; None leaves a field out."""
    values = dataclasses.asdict(HARDWARE["h200"]) | {"name": "mine"} | changes
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))
    return path


def test_a_machine_from_a_file(tmp_path: Path) -> None:
    path = own(tmp_path / "mine.json", name=None, nodes=4.0, gemm_efficiency=None, sources=None)
    machine = load(str(path))
    assert isinstance(machine.nodes, int)  # ranks are divided by such numbers
    assert dataclasses.replace(HARDWARE["h200"], name="mine", nodes=4, sources={}) == machine


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"nics": 4}, "unknown field 'nics'"),
        ({"memory_bytes": None, "host_bytes": None}, "host_bytes, memory_bytes missing"),
        ({"memory_bytes": -1.0}, "memory_bytes is -1: it must be more than 0"),
        ({"inside_bytes_per_s": 0}, "inside_bytes_per_s is 0: it must be more than 0"),
        ({"inside_latency_s": -1}, "inside_latency_s is -1: it must be 0 or more"),
        ({"memory_bytes": "64 GB"}, "memory_bytes is '64 GB', not a number"),
        ({"memory_bytes": float("inf")}, "must be more than 0"),
        ({"devices_per_node": 1.5}, "devices_per_node is 1.5, not a whole number"),
        ({"name": ["mine"]}, r"name is \['mine'\], not text"),
        ({"gemm_efficiency": 1.2}, "gemm_efficiency is 1.2: at most 1"),
        ({"sources": {"colour": "red"}}, "sources name 'colour'"),
        ({"sources": ["red"]}, "sources must be an object"),
    ],
)
def test_a_wrong_file_is_refused(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=words) as error:
        load(str(own(tmp_path / "mine.json", **changes)))
    assert "\n" not in str(error.value) and "mine.json" in str(error.value)


def test_what_is_no_machine(tmp_path: Path) -> None:
    for text, words in (("[]", "expected an object"), ("{", "is not JSON")):
        path = tmp_path / "other.json"
        path.write_text(text)
        with pytest.raises(ValueError, match=words):
            load(str(path))
    with pytest.raises(ValueError, match="does not exist"):
        load(str(tmp_path / "none.json"))
    with pytest.raises(ValueError, match="no machine 'aurora': choose alcf-aurora, lumi"):
        load("aurora")


def test_whoever_changes_a_machine_is_held_to_the_same() -> None:
    with pytest.raises(ValueError, match="link_efficiency is 0"):
        dataclasses.replace(HARDWARE["lumi"], link_efficiency=0.0)
    assert isinstance(dataclasses.replace(HARDWARE["lumi"], nodes=0), Hardware)
