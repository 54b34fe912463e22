"""Dry runs: degrees as published, asked or chosen; a step of all ranks gone through; faults named."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from aeris import dry_run as dry_runs
from aeris import rehearse as rehearsals
from aeris import train
from aeris.config import RunConfig
from aeris.planning.traffic import traffic
from aeris.presets import PRESETS
from aeris.rehearse import Rehearsal, rehearse, sample
from launch.layouts import LAYOUTS
from swipe.mesh import ParallelDims

PUBLISHED = [
    (machine, preset) for machine, presets in LAYOUTS.items() for preset in presets if preset != "tiny"
]


def gone_through(config: RunConfig, dims: ParallelDims, sampled: int = 2) -> Rehearsal:
    """A rehearsal of which nobody hears."""
    return rehearse(config, len(config.data.channels) or 24, dims, lambda *said: None, sampled)


def few(preset: str, microbatches: int, **parallel: Any) -> RunConfig:
    """A preset with so many microbatches a step."""
    config = PRESETS[preset]()
    config = replace(config, train=replace(config.train, batch=microbatches * config.train.microbatch))
    return replace(config, parallel=replace(config.parallel, **parallel))


@pytest.mark.parametrize(("machine", "preset"), PUBLISHED)
def test_published_layouts_pass(machine: str, preset: str) -> None:
    """With one replica and so many microbatches that all stages are busy; else at full size."""
    degrees = LAYOUTS[machine][preset].degrees
    dims = ParallelDims(1, *degrees[1:])
    found = gone_through(few(preset, degrees.pp), dims)
    assert found.actions == dims.world * 2 * degrees.pp
    assert found.links == 2 * dims.places * (degrees.pp - 1) and found.sampled == (0, dims.world - 1)
    assert found.policies == ("async", "batched")


@pytest.mark.parametrize(
    ("dims", "parallel"),
    [
        (ParallelDims(2, 2, 2, 3, 4), {"p2p": "parity"}),
        (ParallelDims(1, 1, 4, 2, 2), {"schedule": "gpipe", "shard": 2}),
        (ParallelDims(2, 1, 2, 1, 1), {"p2p": "batched"}),
    ],
    ids=str,
)
def test_what_is_sent_is_what_is_planned_for_every_rank(dims: ParallelDims, parallel: dict[str, Any]) -> None:
    """Also with shifts inside stages, weights in several copies and every way to post messages."""
    config = few("tiny", 4, **parallel)
    found = gone_through(config, dims, 6)
    ranks = [traffic(config, 24, dims, rank, 1).total for rank in range(dims.world)]
    assert found.sent == {kind: sum(rank[kind] for rank in ranks) for kind in found.sent}
    assert len(found.sampled) == min(6, dims.world)


def test_degrees_are_those_asked_for_published_or_chosen() -> None:
    config = PRESETS["40b"]()
    dims, origin = dry_runs.spread(config, "40b", 120_960)
    assert str(dims) == "dp 14 x wp 6x6 x pp 20 x sp 12" and origin.startswith(
        "published for 40b on alcf-aurora"
    )
    assert dry_runs.spread(config, "40b", 5_760)[1].startswith("published for 40b on lumi")
    dims, origin = dry_runs.spread(config, "40b", 1_000)
    assert dims.world == 1_000 and origin == "chosen"
    fixed = replace(config, parallel=replace(config.parallel, sp=4))
    assert dry_runs.spread(fixed, "40b", 8_640) == (dry_runs.choose_degrees(fixed, 8_640), "completed")
    whole = replace(config, parallel=replace(config.parallel, dp=1, wp_y=1, wp_x=2, pp=1, sp=1))
    assert dry_runs.spread(whole, "40b", 2)[1] == "as asked"
    with pytest.raises(ValueError, match="these degrees need 2 ranks, not 3"):
        dry_runs.spread(whole, "40b", 3)
    with pytest.raises(ValueError, match="--world-size -2: it is a number of ranks"):
        dry_runs.spread(config, "40b", -2)


def test_sampled_ranks_are_the_first_the_last_and_others() -> None:
    dims = ParallelDims(14, 6, 6, 20, 12)
    chosen = sample(dims, 12, 0)
    assert len(set(chosen)) == 12 and chosen[0] == 0 and chosen[-1] == dims.world - 1
    assert chosen == sample(dims, 12, 0) != sample(dims, 12, 1)
    assert sample(ParallelDims(2), 12, 0) == (0, 1)


def wrong_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank sits where another should."""
    right = rehearsals.take_seat
    monkeypatch.setattr(rehearsals, "take_seat", lambda c, n, dims, rank, d: right(c, n, dims, rank ^ 1, d))


def wrong_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank's stage lacks a unit."""
    right = rehearsals.build_model
    wrong = lambda *args: right(*args[:-1], args[-1][:1])  # noqa: E731
    monkeypatch.setattr(rehearsals, "build_model", wrong)


def wrong_links(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stage is linked without its shifts."""
    right = rehearsals.make_pipeline

    def wrong(model: Any, seat: Any, *args: Any) -> Any:
        return right(model, replace(seat, shifts=(0, 0)), *args)

    monkeypatch.setattr(rehearsals, "make_pipeline", wrong)


def wrong_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Less is planned than is sent."""
    right = rehearsals.plan_of
    monkeypatch.setattr(rehearsals, "plan_of", lambda *args: right(*args)._replace(shape=(1, 64)))


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (wrong_place, r"rank 0: its coordinate: \(0, 0, 0, 0, 1\) is built, \(0, 0, 0, 0, 0\) is planned"),
        (wrong_weights, "rank 0: its bytes of its stage: .* is built, .* is planned"),
        (
            wrong_links,
            r"rank \d+: its messages \(rank, tag, bytes\) with stage 1: .* is built, .* is planned",
        ),
        (wrong_bytes, "pipeline: ranks send .* bytes, planned are .*"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_rank_that_is_not_as_planned_is_named(
    fault: Any, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fault(monkeypatch)
    with pytest.raises(ValueError, match=says):
        gone_through(few("tiny", 2), ParallelDims(1, 2, 2, 3, 2))


def test_program(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Tables or one object, memory of a device in both; without --world-size nothing is gone through."""

    def said(*words: str) -> str:
        monkeypatch.setattr("sys.argv", ["train", "tiny", "--dry-run", *words])
        train.main()
        return capsys.readouterr().out

    text = said("--world-size", "16", "--train.batch", "8")
    for words in ("16 ranks, each the only one at its place", "each sent and received once", "chosen: --par"):
        assert words in " ".join(text.split()), text
    assert "1f1b, async" in text and "1f1b, batched" in text and "memory of a device, on stage" in text
    found = json.loads(said("--world-size", "4", "--json", "--parallel.sp", "2"))
    assert found["rehearsal"]["actions"] == 4 * 2 and found["parallel"]["world"] == 4
    assert sum(found["device_bytes"].values()) > 4 * found["parameters"] / 4
    assert "rehearsal" not in json.loads(said("--json"))
    monkeypatch.setattr("sys.argv", ["train", "tiny", "--world-size", "4"])
    with pytest.raises(ValueError, match="--world-size goes with --dry-run"):
        train.main()
    with pytest.raises(ValueError, match="--world-size speaks for all ranks"):
        dry_runs.dry_run(PRESETS["tiny"](), "tiny", 2, True, 4)
