"""Running scores of training: the errors of single fields added up, and what cannot be added left out."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path

import pytest
import torch

from aeris.aurora.batch import Batch, Metadata
from aeris.aurora.training.errors import area_weights, errors
from aeris.aurora.training.scores import Scores
from aeris.log import RunLog
from swipe.groups import make_groups
from swipe.mesh import ParallelDims

LEVELS = (500, 850)
NAN, INF = float("nan"), float("inf")


def batch(seed: int, samples: int = 3) -> Batch:
    """Random fields, one history entry."""
    draw = torch.Generator().manual_seed(seed)
    where = Metadata(
        torch.linspace(90, -90, 5), torch.arange(6) * 60.0, (datetime(2020, 1, 1),) * samples, LEVELS
    )
    surf = {"2t": torch.randn(samples, 1, 5, 6, generator=draw)}
    return Batch(surf, {}, {"z": torch.randn(samples, 1, 2, 5, 6, generator=draw)}, where)


def result(*pairs: tuple[Batch, Batch]) -> tuple[Scores, dict]:
    """Score pairs as one rank does."""
    scores = Scores(("2t",), ("z",), LEVELS, 1)
    for pair in pairs:
        scores.add(0, *pair)
    scores.fold(make_groups(ParallelDims(dp=1), 0, torch.device("cpu")).world)
    return scores, scores.result()


def test_they_are_the_errors_of_single_fields() -> None:
    """Mean squares and magnitudes over samples of what `errors` gives for each, with missing truth."""
    pairs = [(batch(1), batch(2)), (batch(3), batch(4))]
    pairs[0][1].surf_vars["2t"][0, 0, 1:3] = NAN
    pairs[0][1].atmos_vars["z"][1, 0, 0] = NAN
    _, found = result(*pairs)
    weight = area_weights(pairs[0][0].metadata.lat.numpy())
    for name, pick in {
        "2t": lambda b: b.surf_vars["2t"][:, 0],
        "z500": lambda b: b.atmos_vars["z"][:, 0, 0],
        "z850": lambda b: b.atmos_vars["z"][:, 0, 1],
    }.items():
        one, other = (torch.cat([pick(pair[part]) for pair in pairs]).numpy() for part in (0, 1))
        alone = errors(one, other, weight)  # samples in place of channels
        known = alone.mse == alone.mse
        assert known.sum() == (5 if name == "z500" else 6)
        assert found["rmse"][name][0] == pytest.approx(alone.mse[known].mean() ** 0.5, rel=1e-5)
        assert found["mae"][name][0] == pytest.approx(alone.mae[known].mean(), rel=1e-5)


@pytest.mark.parametrize("bad", [NAN, INF, 1e30])
def test_a_prediction_that_diverged_spoils_no_other(bad: float) -> None:
    """Its sample does not count, of its variable and level alone; 1e30 has a square beyond float32."""
    one, other = batch(1), batch(2)
    whole = result((one, other))[1]
    one.surf_vars["2t"][1, 0, 2, 2] = bad
    one.atmos_vars["z"][:, 0, 0] = bad
    scores, found = result((one, other))
    assert scores.total[0, :, 2].tolist() == [2.0, 0.0, 3.0]
    assert 0 < found["rmse"]["2t"][0] < 5 and 0 < found["mae"]["2t"][0] < 5
    assert found["rmse"]["z500"] == found["mae"]["z500"] == [None]
    assert found["rmse"]["z850"] == whole["rmse"]["z850"]
    json.dumps(found, allow_nan=False)


def test_the_log_holds_no_number_that_json_does_not_know(tmp_path: Path) -> None:
    """At any depth."""
    with RunLog(tmp_path / "log.jsonl", -1) as log:
        log.write({"images_seen": 0, "loss": INF, "scores": {"rmse": {"2t": [1.0, NAN, -INF, None]}}})
    text = (tmp_path / "log.jsonl").read_text()
    assert json.loads(text)["scores"] == {"rmse": {"2t": [1.0, None, None, None]}}
    assert "NaN" not in text and "Infinity" not in text
