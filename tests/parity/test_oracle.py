"""The oracle against the program on the packaged sample as the program reads it, by one rank and by many."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from aeris.config import ParallelConfig
from aeris.data.forcing import Forcing
from aeris.data.loader import SampleDataset
from aeris.data.normalize import Normalizer
from aeris.data.store import packaged_sample
from aeris.parallelize import build_model, make_layout
from aeris.presets import PRESETS
from aeris.restore import channel_counts
from swipe.windows import WindowGrid, WindowShard
from tests.harness import run_distributed
from tests.parity import oracle, ranks
from tests.parity.comparison import random_weights

STEPS = 3
TIMEOUT_S = 180.0  # on a busy machine; seconds on an idle one


def plain_images(count: int, seed: int) -> oracle.Images:
    """Read images 0 to `count` of the packaged sample as whole fields."""
    dataset = SampleDataset(packaged_sample(), 6, WindowShard.full(WindowGrid(24, 48, 12)), seed)
    store = dataset.store
    normalizer, forcing = Normalizer(store.statistics, 6), Forcing(store, 6)
    state, residual, forcings = [], [], []
    for before, after in map(dataset.pair, range(count)):
        now, then = (np.moveaxis(store.read(index), 0, -1) for index in (before, after))
        state.append(np.moveaxis(normalizer.standardise(now), -1, 0))
        residual.append(np.moveaxis(normalizer.standardise_residual(now, then), -1, 0))
        forcings.append(forcing.fields(store.times[before]))
    fields = (torch.from_numpy(np.stack(x)).double() for x in (state, residual, forcings))
    return oracle.Images(*fields, store.names, store.latitude_deg)


@pytest.mark.parametrize(
    ("window", "poles", "microbatch", "parallel"),
    [
        (6, "cyclic", 2, ParallelConfig()),
        (12, "separate", 2, ParallelConfig()),
        (12, "separate", 1, ParallelConfig(dp=2, wp_y=1, wp_x=2, pp=2, sp=4)),
    ],
    ids=["window6", "window12", "window12-16-ranks"],
)
def test_the_oracle_trains_as_the_program_does(
    window: int, poles: str, microbatch: int, parallel: ParallelConfig
) -> None:
    """Three steps of the tiny preset in float64: loss, norm, every gradient, weights and average."""
    base = PRESETS["tiny"]()
    model = replace(
        base.model,
        window=window,
        poles=poles,
        width=16,
        heads=4,
        hidden=24,
        precision="fp64",
        residual="fp64",
    )
    config = replace(
        base,
        model=model,
        data=replace(base.data, roll=False),
        train=replace(base.train, batch=2, microbatch=microbatch),
        parallel=parallel,
    )
    images = plain_images(STEPS * 2, config.train.seed)
    shapes = build_model(model, *channel_counts(len(images.names)), make_layout(model), "meta")
    initial = random_weights({name: p.shape for name, p in shapes.named_parameters()})
    steps = oracle.train(initial, images, config, STEPS)
    assert all(step.norm > config.train.clip for step in steps), "nothing was clipped"
    world = max(1, parallel.dp * parallel.wp_y * parallel.wp_x * parallel.pp * parallel.sp)
    apart = run_distributed(ranks.compare, world, config, None, initial, steps, timeout_s=TIMEOUT_S)
    found = {key: max(rank[key] for rank in apart if key in rank) for rank in apart for key in rank}
    assert len(found) == STEPS * (2 + 3 * len(initial))
    worst = sorted(found.items(), key=lambda item: -item[1])[:5]
    assert worst[0][1] < 1e-10, f"relative differences: {worst}"
