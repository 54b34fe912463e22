"""Our models predict what the official package predicts: numbers it gave, for every variant.

The files hold outputs only (tests/golden/make_aurora.py writes them); weights and inputs come from names.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor

from aeris.aurora import embeddings
from aeris.aurora.batch import Batch, Metadata
from aeris.aurora.model import Aurora
from aeris.aurora.rollout import rollout
from tests.golden import cases
from tests.golden.cases import CASES, ROUNDING, SUNLIGHT, Case, summarise

GOLDEN = Path(cases.__file__).parent
FILES = {"AuroraAirPollution": "air_pollution", "AuroraWave": "wave"}
FILES |= {"AuroraV1p5": "v1p5", "AuroraV1p5Ensemble": "v1p5"}


def load(name: str) -> dict[str, np.ndarray]:
    """Read a golden file."""
    with np.load(GOLDEN / f"aurora_{name}.npz") as stored:
        return {key: stored[key] for key in stored.files}


def build(case: Case) -> Aurora:
    """Make our model with weights by name."""
    module = importlib.import_module(f"aeris.aurora.{FILES.get(case.model, 'model')}")
    model: Aurora = getattr(module, case.model)(**case.arguments, **case.ours)
    model = model.to(getattr(torch, case.dtype)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(cases.weight(name, tuple(parameter.shape))))
    return model


def latitudes_and_longitudes(case: Case) -> tuple[Tensor, Tensor]:
    """Return the grid."""
    lat, lon = map(torch.from_numpy, cases.grid(case))
    return lat, lon


@contextmanager
def areas(root_area: np.ndarray) -> Iterator[None]:
    """Encode the package's roots of patch areas: their last bits, on which all hangs, are a processor's."""
    encode = embeddings.Wavelengths.encode

    def with_areas(self: embeddings.Wavelengths, x: Tensor, d: int) -> Tensor:
        return encode(self, torch.from_numpy(root_area) if self is embeddings.SCALE else x, d)

    with mock.patch.object(embeddings.Wavelengths, "encode", with_areas):
        yield


@contextmanager
def named_noise() -> Iterator[None]:
    """Draw noise by number of the call."""
    draw = cases.noise()

    def randn(*shape: Any, **kwargs: Any) -> Tensor:
        return torch.from_numpy(draw(shape[0] if len(shape) == 1 else shape)).to(kwargs["dtype"])

    with mock.patch.object(torch, "randn", randn):
        yield


def statistics(golden: dict[str, np.ndarray]) -> tuple[dict[str, float], dict[str, float]]:
    """Return the package's location and scale of every variable."""
    names = golden["statistics"].tolist()
    return dict(zip(names, golden["location"].tolist())), dict(zip(names, golden["scale"].tolist()))


def make_batch(case: Case, location: dict[str, float], scale: dict[str, float]) -> Batch:
    """Make the input that make_aurora.py gave to the package."""
    dtype = getattr(torch, case.dtype)
    surf, static, atmos = (
        {k: torch.from_numpy(v).to(dtype) for k, v in fields.items()}
        for fields in cases.inputs(case, location, scale)
    )
    metadata = Metadata(*latitudes_and_longitudes(case), case.times, case.levels)
    return Batch(surf, static, atmos, metadata)


def predict(case: Case, batch: Batch) -> list[Batch]:
    """Run our model as make_aurora.py runs the package's."""
    with torch.inference_mode(), named_noise():
        model = build(case)
        if case.lead_times:
            return [model(batch, torch.tensor(case.lead_times))]
        return list(rollout(model, batch, case.steps, case.fine_lead_times or None))


@pytest.mark.parametrize("name", CASES)
def test_predictions_are_those_of_the_package(name: str) -> None:
    case = CASES[name]
    golden = load(name)
    location, scale = statistics(golden)
    with areas(golden["root_area"]):
        found = predict(case, make_batch(case, location, scale))
    assert len(found) == len(golden["values"])
    for step, prediction in enumerate(found):
        times = [datetime.fromisoformat(text) for text in golden["times"][step]]
        assert list(prediction.metadata.time) == times
        assert prediction.surf_vars["2t"].dtype == getattr(torch, case.dtype)
        fields = summarise(prediction, location, scale)
        assert [*fields] == golden["variables"].tolist()
        theirs = golden["values"][step].astype(float)
        own = theirs - load(case.exact)["values"][case.exact_at[step]] if case.exact else np.zeros(1)
        for variable, values in zip(fields, theirs):
            bound = max(case.tolerance(step, np.nanmax(abs(own))), SUNLIGHT * (variable == "insolation"))
            np.testing.assert_allclose(
                fields[variable], values, rtol=0, atol=bound, err_msg=f"{variable}, step {step + 1}"
            )
        if case.exact:
            far = np.stack([*fields.values()]) - theirs
            assert np.nanmean(far**2) <= ROUNDING**2 * np.nanmean(own**2)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.dtype == "float64"])
def test_gradients_are_those_of_the_package(name: str) -> None:
    case, golden = CASES[name], load(name)
    location, scale = statistics(golden)
    model, lead_times = build(case), case.first_lead_times
    with areas(golden["root_area"]), named_noise():
        prediction = model(
            make_batch(case, location, scale), torch.tensor(lead_times) if lead_times else None
        )
    cases.loss(prediction, location, scale).backward()
    parameters = dict(sorted(model.named_parameters()))
    assert [*parameters] == golden["parameters"].tolist()
    size = golden["gradients"][:, 0]
    assert (size > 0).mean() > 0.4  # of levels and adapters only those that the input asks for
    found = np.array([
        cases.digest(name, np.zeros(p.shape) if p.grad is None else p.grad.numpy())
        for name, p in parameters.items()
    ])  # fmt: skip
    np.testing.assert_allclose(found, golden["gradients"], rtol=0, atol=1e-9 * float(size.max()))
    np.testing.assert_allclose(found[:, 0], size, rtol=1e-7, atol=1e-12 * float(size.max()))


@pytest.mark.parametrize("name", ["lora", "high_res", "regional", "air_pollution"])
def test_areas_are_rounded_as_in_the_package(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit, by the same float32 operations; and near those of the processor that made the files."""
    case, seen = CASES[name], list[Tensor]()
    patch, rows = build(case).patch_size, case.rows - case.rows % build(case).patch_size
    lat, lon = (x[:rows] if len(x) == case.rows else x for x in latitudes_and_longitudes(case))
    encode = embeddings.Wavelengths.encode

    def look(self: embeddings.Wavelengths, x: Tensor, d: int) -> Tensor:
        seen.extend([x] * (self is embeddings.SCALE))
        return encode(self, x, d)

    monkeypatch.setattr(embeddings.Wavelengths, "encode", look)
    embeddings.grid_encoding(lat, lon, patch, 32)
    lat, lon = (x.float().expand(rows, case.cols) for x in (lat.view(rows, -1), lon))
    corners = torch.stack([x.unfold(0, patch, patch).unfold(1, patch, patch).flatten(2) for x in (lat, lon)])
    high, low = (getattr(corners, end)(-1).flatten(1) for end in ("amax", "amin"))
    sines = torch.sin(torch.deg2rad(high[0])) - torch.sin(torch.deg2rad(low[0]))
    expected = torch.sqrt(6371**2 * torch.pi * sines * (torch.deg2rad(high[1]) - torch.deg2rad(low[1])))
    assert seen[0].dtype == torch.float32 and torch.equal(seen[0], expected)
    np.testing.assert_allclose(expected, load(name)["root_area"], rtol=1e-5)


def test_every_case_has_a_file_and_all_are_small() -> None:
    files = {path.stem.removeprefix("aurora_"): path.stat().st_size for path in GOLDEN.glob("*.npz")}
    assert {*files} == {*CASES}
    assert sum(files.values()) < 1.5e6
    assert all("microsoft-aurora 2.0.1" in str(load(name)["about"]) for name in CASES)
