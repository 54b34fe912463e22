"""Who reads which images and windows: every token once, no byte more than a rank's share, nothing else."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
import torch.distributed as dist

from aeris.data import yearfile
from aeris.data.loader import SampleDataset, make_loader
from aeris.parallelize import choose_degrees, take_seat
from aeris.presets import PRESETS
from aeris.reading import ImageOrder, read_samples, split_tokens
from aeris.restore import channel_counts, open_store
from swipe.windows import WindowGrid, WindowShard
from tests.harness import run_distributed


@pytest.mark.parametrize("dp", [1, 2, 3])
def test_images_are_dealt_to_replicas(dp: int) -> None:
    """Over the replicas every image of a step once, and a step of one replica is a step of all."""
    orders = [list(ImageOrder(24, 48, 2, dp, rank)) for rank in range(dp)]
    assert all(len(order) == len(ImageOrder(24, 48, 2, dp, 0)) == 24 // dp for order in orders)
    step = 12 // dp  # a batch of 12 images
    for number in range(2):
        images = [image for order in orders for image in order[number * step : (number + 1) * step]]
        assert sorted(images) == list(range(24 + 12 * number, 36 + 12 * number))
    assert list(ImageOrder(3, 9, 2)) == list(range(3, 9))


@pytest.mark.parametrize("sp", [1, 2, 3, 4, 6, 12])
def test_parts_of_a_window_are_those_of_the_ranks(sp: int) -> None:
    """What the reader cuts for a rank is what that rank would read itself."""
    grid = WindowGrid(24, 48, 12)
    whole = WindowShard.dealt(grid, (2, 2), (1, 0))
    tokens_NT = torch.from_numpy(whole.token_index())
    shard = WindowShard.dealt(grid, (2, 2), (1, 0), sp, 0)
    for rank, part in enumerate(split_tokens(tokens_NT[None, ..., None], shard)):
        expected = WindowShard.dealt(grid, (2, 2), (1, 0), sp, rank).token_index()
        assert np.array_equal(part[0, ..., 0].numpy(), expected)


def read_three(degrees: dict[str, int]) -> tuple:
    """Read three microbatches on this rank: tensors, their images, and the bytes read from files."""
    base = PRESETS["tiny"]()
    config = dataclasses.replace(
        base,
        train=dataclasses.replace(base.train, batch=6, microbatch=1),
        data=dataclasses.replace(base.data, roll=False),
        parallel=dataclasses.replace(base.parallel, **degrees),
    )
    store = open_store(config)
    dims = choose_degrees(config, dist.get_world_size())
    seat = take_seat(config, channel_counts(len(store.names)), dims, dist.get_rank(), torch.device("cpu"))
    read = 0
    chunks = yearfile.YearFile.chunks

    def counted(self: yearfile.YearFile, index: int, corners: list, channel: int | None = None) -> object:
        nonlocal read
        for chunk in chunks(self, index, corners, channel):
            read += chunk.nbytes
            yield chunk

    yearfile.YearFile.chunks = counted  # type: ignore[assignment,method-assign]
    images = ImageOrder(12, 12 + 3 * dims.dp, 1, dims.dp, seat.at.dp)
    samples = list(read_samples(config, store, seat, images))
    needed = 3 * 2 * seat.layout.shard.whole.token_index().size * len(store.names) * 4
    where = (seat.first or seat.last, seat.at.sp, seat.at.dp)
    return [tuple(sample) for sample in samples], read, needed, where


@pytest.mark.parametrize(
    ("world", "degrees"),
    [(8, {"wp_x": 2, "sp": 4}), (6, {"pp": 3, "sp": 2}), (4, {"dp": 2, "wp_y": 2})],
    ids=["wp 1x2 x sp 4", "pp 3 x sp 2", "dp 2 x wp 2x1"],
)
def test_only_readers_read_and_only_their_windows(world: int, degrees: dict[str, int]) -> None:
    """One reader to a sp group on the first and last stage; together the ranks have the image, bit for bit.

    Bytes are those of decompressed chunks. A window is a chunk here, so a reader needs what it reads.
    """
    results = run_distributed(read_three, world, degrees)
    base = PRESETS["tiny"]()
    whole = WindowShard.full(WindowGrid(24, 48, 12))
    dataset = SampleDataset(open_store(base).path, 6, whole, 0)
    dp = degrees.get("dp", 1)
    for replica in range(dp):
        order = ImageOrder(12, 12 + 3 * dp, 1, dp, replica)
        for number, expected in enumerate(make_loader(dataset, order, 1)):
            for samples, read, needed, (ends, sp_rank, dp_rank) in results:
                if dp_rank != replica:
                    continue
                assert torch.equal(samples[number][3], expected.image_B)
                assert ends or samples[number][0].numel() == 0
                reader = ends and sp_rank == 0
                assert read == (needed if reader else 0)
            parts = [s[number] for s, _, _, (ends, _, d) in results if ends and d == replica]
            copies = 2 if degrees.get("pp", 1) > 1 else 1
            for field in range(3):
                got = torch.cat([part[field].flatten(0, 2) for part in parts])
                assert len(got) == copies * 24 * 48
                total = expected[field].flatten(0, 2)
                assert torch.equal(got.sort(0).values, total.repeat(copies, 1).sort(0).values)
