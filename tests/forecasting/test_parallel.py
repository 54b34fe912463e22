"""A forecast under any layout of ranks is that of one process, also after a kill, and errors stop all ranks.

A small untrained network on the packaged atmosphere, in float64: layouts sum in other orders, which shows in
the last bits of float64, and so hardly ever in the float32 of states and files.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from aeris import config as configs
from aeris import forecast, train
from aeris.config import DiffusionConfig, ModelConfig, RunConfig, TrainConfig
from aeris.data.forecasts import MemberWriter, open_forecast
from aeris.data.store import Store, packaged_sample
from aeris.forecasting.portions import share_out
from aeris.model.initialise import initialise
from aeris.parallelize import build_model, choose_degrees, make_layout
from aeris.restore import channel_counts
from swipe import checkpoint
from swipe.collectives import AgreedError
from swipe.groups import make_groups
from swipe.images import Images, total
from swipe.mesh import ParallelDims
from swipe.windows import WindowGrid
from tests.harness import ROOT, run_distributed

LAYOUTS = {
    "dp 2": {"dp": 2},
    "dp 3 of 8 members": {"dp": 3},
    "wp 2x1": {"wp_y": 2},
    "sp 4": {"sp": 4},
    "pp 3": {"pp": 3},
    "wp 1x2, pp 2, sp 2": {"wp_x": 2, "pp": 2, "sp": 2},
    "dp 2, wp 2x1, pp 2, batched": {"dp": 2, "wp_y": 2, "pp": 2, "p2p": "batched"},
}


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with random weights that let every part of the network count."""
    run = tmp_path_factory.mktemp("run") / "tiny"
    model = ModelConfig(
        layers=3, width=16, heads=4, hidden=16, init="spike-no-more", precision="fp64", residual="fp64"
    )
    store = Store(packaged_sample())
    network = build_model(model, *channel_counts(len(store.names)), make_layout(model), "cpu")
    initialise(network, 1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    tensors = {f"ema.{name}": p.detach() for name, p in network.named_parameters()}
    meta = {"images_seen": 100, "channels": list(store.names), "fingerprint": store.fingerprint}
    checkpoint.Checkpoints(run / "checkpoints", keep=1, asynchronous=False).save(100, tensors, meta)
    configs.save(RunConfig(model=model, diffusion=DiffusionConfig(sigma_min=0.05)), run / "config.json")
    return run


def words(run: Path, out: Path, *extra: object, members: int = 8, lead_h: int = 12) -> list[str]:
    fixed = (run, "--init", "2000-06-01T00", "--lead-h", lead_h, "--members", members, "--out", out)
    return [str(word) for word in (*fixed, "--sampler.levels", 2, "--device", "cpu", *extra)]


def flags(layout: dict[str, object]) -> list[str]:
    return [text for k, v in layout.items() for text in (f"--parallel.{k.replace('_', '-')}", str(v))]


def prepare(argv: list[str]):
    """Prepare a forecast as the program does, on one of the ranks of `run_distributed`."""
    os.environ |= {"RANK": str(dist.get_rank()), "WORLD_SIZE": str(dist.get_world_size())}
    forecast.start = lambda device, timeout_s: None  # type: ignore[assignment]
    return forecast.prepare(forecast.parse(argv))


def make(argv: list[str], stop_after: int = -1) -> int:
    """Make a forecast, and let rank 0 die after so many writes; return the evaluations counted."""
    if stop_after >= 0 and dist.get_rank() == 0:
        write, left = MemberWriter.write, [stop_after]

        def dying(self: MemberWriter, *args: object) -> None:
            left[0] -= 1
            assert left[0] >= 0, "killed"
            write(self, *args)  # type: ignore[arg-type]

        MemberWriter.write = dying  # type: ignore[method-assign]
    evaluations: list[int] = []
    prepare(argv).run(evaluations.append)
    return sum(evaluations)


def everything(path: Path) -> np.ndarray:
    found = open_forecast(path)
    return np.stack([[found.read(i, j) for j in range(len(found.lead_h))] for i in range(len(found.inits))])


def ulps_apart(a: np.ndarray, b: np.ndarray) -> float:
    """The largest difference, in float32 units in the last place of the largest value of each channel."""
    largest = np.abs(a).max(axis=(0, 1, 2, 4, 5), keepdims=True)
    return float((np.abs(a.astype(np.float64) - b) / np.spacing(largest)).max())


@pytest.fixture(scope="module")
def whole(run_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    """The forecast of one process."""
    out = tmp_path_factory.mktemp("whole") / "f.zarr"
    forecast.prepare(forecast.parse(words(run_dir, out))).run()
    values = everything(out)
    change = values[0, 1] - values[0, 0]
    assert (
        np.isfinite(values).all()
        and change.std(axis=0).min() > 0
        and len(np.unique(values[0, 1, :, 0])) > 9000
    )
    return values


@pytest.mark.parametrize("name", LAYOUTS)
def test_any_layout_forecasts_what_one_process_does(
    name: str, run_dir: Path, whole: np.ndarray, tmp_path: Path
) -> None:
    layout = LAYOUTS[name]
    world = int(np.prod([degree for degree in layout.values() if isinstance(degree, int)]))
    out = tmp_path / "f.zarr"
    assert run_distributed(make, world, words(run_dir, out, *flags(layout))) == [2 * 8 * 2] * world
    got = everything(out)
    assert ulps_apart(got, whole) <= 1
    assert (got != whole).mean() < 1e-3


@pytest.mark.parametrize(
    ("before", "after"), [({"dp": 2, "sp": 2}, {"wp_x": 2, "pp": 2}), ({"dp": 1}, {"dp": 3, "wp_y": 2})]
)
def test_goes_on_after_a_kill_on_other_ranks(
    before: dict[str, int], after: dict[str, int], run_dir: Path, whole: np.ndarray, tmp_path: Path
) -> None:
    """Killed when some members have one lead time more than others; files give states back bit for bit."""
    argv = words(run_dir, tmp_path / "f.zarr", "--batch", 3)
    with pytest.raises(AssertionError, match="killed"):
        run_distributed(make, int(np.prod([*before.values()])), [*argv, *flags(before)], 3)
    part = open_forecast(tmp_path / "f.zarr", partial=True)
    done = [np.isfinite(part.read(0, lead)).all(axis=(1, 2, 3)).sum() for lead in range(2)]
    assert 8 >= done[0] > done[1] > 0
    counted = run_distributed(make, int(np.prod([*after.values()])), [*argv, *flags(after)])
    assert 0 < counted[0] < 2 * 8 * 2
    got = everything(tmp_path / "f.zarr")
    assert ulps_apart(got, whole) <= 1
    assert (got != whole).mean() < 1e-3


def breaks(argv: list[str], bad_rank: int) -> str:
    """Let the network of one rank fail in the second step; return the error of this rank."""
    ensemble = prepare(argv)
    network, calls = ensemble.forecaster.network, []

    def poisoned(x_BNTC: torch.Tensor, t_B: torch.Tensor) -> torch.Tensor:
        y_BNTC = network(x_BNTC, t_B)
        calls.append(1)
        if dist.get_rank() == bad_rank and len(calls) == 4:
            y_BNTC[1, 2, 5, 7] = float("inf")
        return y_BNTC

    ensemble.forecaster.network = poisoned
    try:
        ensemble.run()
    except AgreedError as error:
        return str(error)
    return "none"


def test_a_value_that_is_not_finite_stops_all_ranks_in_one_word(run_dir: Path, tmp_path: Path) -> None:
    """Rank 6 of dp 2 x wp 1x2 x sp 2 holds member 3, and every other column of windows from the second."""
    dims, layout = ParallelDims(dp=2, wp_x=2, sp=2), {"dp": 2, "wp_x": 2, "sp": 2}
    argv = words(run_dir, tmp_path / "f.zarr", *flags(layout), members=4)
    said = run_distributed(breaks, 8, argv, 6)
    assert len(set(said)) == 1
    groups = dataclasses.replace(make_groups(ParallelDims(), 0, torch.device("cpu")), dims=dims, rank=6)
    token = Images(WindowGrid(24, 48, 12), groups).tokens_NT(dims.place(6))[2, 5]
    row, col = divmod(int(token), 48)
    name = Store(packaged_sample()).names[7]
    assert said[0].startswith(f"{name} of member 3 is -inf at row {row}, col {col}, 12 h after 2000-06-01T00")
    assert col // 12 == 1
    part = open_forecast(tmp_path / "f.zarr", partial=True)
    assert np.isfinite(part.read(0, 0)).all() and np.isnan(part.read(0, 1)).all()


def refused(argv: list[str]) -> tuple[str, str]:
    """Return kind and words of the error of this rank."""
    try:
        prepare(argv)
    except (ValueError, OSError) as error:
        return type(error).__name__, str(error)
    return "none", ""


def test_another_forecast_in_the_way_is_said_by_one_rank(
    run_dir: Path, whole: np.ndarray, tmp_path: Path
) -> None:
    make_here = forecast.prepare(forecast.parse(words(run_dir, tmp_path / "f.zarr", members=1, lead_h=6)))
    make_here.run()
    argv = words(run_dir, tmp_path / "f.zarr", "--parallel.pp", 2, "--seed", 1, members=1, lead_h=6)
    kinds, texts = zip(*run_distributed(refused, 2, argv))
    assert kinds == ("AgreedError", "AgreedError")
    assert texts[0] == texts[1] and "holds another forecast (seed: 0 there, 1 now)" in texts[0]


@pytest.mark.parametrize(
    ("world", "extra", "message"),
    [
        (
            4,
            ("--parallel.sp", 3),
            "4 ranks with sp 3 cannot work: sp 3 does not divide the 4 attention heads",
        ),
        (9, ("--parallel.dp", 9), "dp 9 is more than the 8 samples. Nearest that do: --parallel.dp 3 --par"),
        (2, ("--parallel.pp", 4), "2 ranks with pp 4 cannot work"),
        (2, ("--parallel.wp-y", -1), "--parallel.wp-y is -1: it counts ranks"),
        (1, ("--parallel.dp", 2), "1 rank with dp 2 cannot work.*Nearest that do: 1 rank"),
    ],
)
def test_a_layout_that_cannot_work_is_refused_before_ranks_meet(
    world: int, extra: tuple[object, ...], message: str, run_dir: Path, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(world))
    monkeypatch.setattr(forecast, "start", lambda *args: pytest.fail("met"))
    with pytest.raises(ValueError, match=message):
        forecast.prepare(forecast.parse(words(run_dir, tmp_path / "f.zarr", *extra)))
    assert list(tmp_path.iterdir()) == []


def test_degrees_are_chosen_with_members_first(run_dir: Path) -> None:
    config = configs.load(run_dir / "config.json")
    chosen = {
        (world, members): str(choose_degrees(config, world, members))
        for world, members in [(4, 8), (8, 8), (16, 8), (4, 1), (3, 8), (6, 8)]
    }
    assert chosen == {
        (4, 8): "dp 4 x wp 1x1 x pp 1 x sp 1",
        (8, 8): "dp 8 x wp 1x1 x pp 1 x sp 1",
        (16, 8): "dp 8 x wp 1x2 x pp 1 x sp 1",
        (4, 1): "dp 1 x wp 2x2 x pp 1 x sp 1",
        (3, 8): "dp 3 x wp 1x1 x pp 1 x sp 1",  # 3 + 3 + 2 members: 1/9 idle; pp 3 would be 1/5
        (6, 8): "dp 3 x wp 1x2 x pp 1 x sp 1",
    }


def test_members_are_shared_out() -> None:
    assert share_out(range(4, 12), 3) == [range(4, 7), range(7, 10), range(10, 12)]
    assert share_out(range(2), 3) == [range(1), range(1, 2), range(2, 2)]


def there_and_back(dims: ParallelDims, counts: list[int]) -> tuple[int, int]:
    """Deal images out, check every token, change it, and collect the images again, twice; sum over them.

    Replicas do so one after the other: none needs the others.
    """
    groups = make_groups(dims, dist.get_rank(), torch.device("cpu"))
    images = Images(WindowGrid(8, 8, 4), groups)
    at = dims.coordinate(groups.rank)
    for replica in range(dims.dp):
        if replica == at.dp:
            check_images(images, counts[at.dp], at.dp)
        dist.barrier()
    tokens_NT = images.tokens_NT(dims.place(groups.rank))
    return int(total(tokens_NT.sum(), groups)), int(images.lead)


def check_images(images: Images, count: int, replica: int) -> None:
    image = torch.arange(64).view(1, 1, 8, 8) + 1000 * torch.arange(3).view(1, 3, 1, 1) + 1e5 * replica
    x_BCYX = image + 1e4 * torch.arange(count).view(-1, 1, 1, 1)
    x_BNTC = images.deal(x_BCYX if images.lead else None, count, 3)
    tokens_NT = images.tokens_NT(images.dims.place(images.groups.rank))
    expected = tokens_NT[None, ..., None] + 1000 * torch.arange(3) + 1e5 * replica
    assert torch.equal(x_BNTC, expected + 1e4 * torch.arange(count).view(-1, 1, 1, 1))
    for factor in (1, 2):
        got = images.collect(x_BNTC * factor)
        assert (got is not None) == images.lead
        assert got is None or torch.equal(got, factor * x_BCYX)
    images.wait()


@pytest.mark.parametrize(
    ("dims", "counts"),
    [
        (ParallelDims(), [2]),
        (ParallelDims(dp=3, pp=2), [2, 1, 0]),
        (ParallelDims(wp_y=2, wp_x=2, sp=2), [1]),
        (ParallelDims(dp=2, sp=4), [1, 3]),
    ],
)
def test_images_come_together_token_by_token(dims: ParallelDims, counts: list[int]) -> None:
    sums, leads = zip(*run_distributed(there_and_back, dims.world, dims, counts))
    assert set(sums) == {64 * 63 // 2} and sum(leads) == dims.dp


BESIDE = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
MPIEXEC = shutil.which("mpiexec", path=BESIDE)


@pytest.mark.skipif(MPIEXEC is None, reason="there is no mpiexec")
@pytest.mark.skipif(importlib.util.find_spec("mpi4py") is None, reason="there is no mpi4py")
def test_mpiexec(tmp_path: Path) -> None:
    """Train on one process, forecast on two by the program, and again with another seed: refused once."""
    run, model = tmp_path / "run", ModelConfig(layers=2, width=16, heads=2, hidden=16)
    train.train(train.prepare(RunConfig(model=model, train=TrainConfig(images=4, batch=2)), run, "cpu"))
    out, alone = tmp_path / "f.zarr", tmp_path / "alone.zarr"
    forecast.prepare(forecast.parse(words(run, alone, members=2))).run()
    program = [str(MPIEXEC), "-n", "2", sys.executable, "-m", "aeris.forecast"]
    program += [*words(run, out, members=2), "--parallel.pp", "2"]
    settings = {"cwd": ROOT, "capture_output": True, "text": True, "timeout": 120}
    done = subprocess.run(program, check=True, **settings)
    assert f"{out}: 1 init times x 2 members x 2 lead times on 2 ranks (dp 1 x wp 1x1 x pp 2" in done.stdout
    assert done.stdout.count("finished in") == 1
    assert ulps_apart(everything(out), everything(alone)) <= 64  # the tiny preset multiplies in bf16
    again = subprocess.run([*program, "--seed", "1"], check=False, **settings)
    assert again.returncode != 0  # 2, or what mpiexec makes of it
    assert again.stderr.count(f"error: {out} holds another forecast") == 1
