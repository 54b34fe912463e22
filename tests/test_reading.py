"""Who reads which images and windows: every token once, no byte more than a rank's share, nothing else."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist

from aeris.data import yearfile
from aeris.data.loader import SampleDataset, make_loader, unpack
from aeris.data.store import packaged_sample
from aeris.parallelize import choose_degrees, take_seat
from aeris.presets import PRESETS
from aeris.reading import ImageOrder, Part, copy_ahead, read_bytes, read_samples
from aeris.restore import channel_counts, open_store
from swipe.mesh import ParallelDims
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
    """What the reader cuts for a rank is what that rank would read itself, bit for bit."""
    grid = WindowGrid(24, 48, 12)
    whole = WindowShard.dealt(grid, (2, 2), (1, 0))
    packed = SampleDataset(packaged_sample(), 6, whole, 0, roll=True, state_error=0.5).packed(7, sp)
    assert packed.values_BRNTX.is_contiguous() and packed.values_BRNTX.shape[0] == sp
    for rank in range(sp):
        shard = WindowShard.dealt(grid, (2, 2), (1, 0), sp, rank)
        expected = SampleDataset(packaged_sample(), 6, shard, 0, roll=True, state_error=0.5)[7]
        for ours, theirs in zip(unpack(packed.values_BRNTX[rank], 24, torch.tensor(7)), expected):
            assert torch.equal(ours, theirs)


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


def test_what_a_step_reads() -> None:
    """As counted by hand; a turned globe has windows across two chunks where columns are divided."""
    reading = read_bytes(PRESETS["40b"](), 69, ParallelDims(dp=14, wp_y=6, wp_x=6, pp=20, sp=12))
    assert reading == (14 * 36 * 2, 100 * 2 * 69 * 20 * 1440 * 4)
    assert reading.total == 2 * 1400 * 2 * 69 * 720 * 1440 * 4
    tiny = PRESETS["tiny"]()
    assert read_bytes(tiny, 24, ParallelDims()) == (1, 2 * 2 * 24 * 24 * 48 * 4)
    assert read_bytes(tiny, 24, ParallelDims(wp_y=2)).total == 2 * 2 * 24 * 24 * 48 * 4
    assert read_bytes(tiny, 24, ParallelDims(wp_x=2)).total == 2 * 2 * 2 * 24 * 24 * 48 * 4


class Recorder:
    """Stands for an accelerator's streams, events and tensors; notes what is asked of them, in order."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def Stream(self, device: torch.device) -> Recorder:
        return self

    def current_stream(self, device: torch.device) -> Recorder:
        return self

    @contextmanager
    def stream(self, stream: Recorder) -> Iterator[None]:
        self.calls.append("copying:")
        yield
        self.calls.append("done")

    def record_event(self) -> int:
        return len([call for call in self.calls if call == "copying:"])

    def wait_event(self, event: int) -> None:
        self.calls.append(f"computing waits for copy {event}")

    def batch(self, number: int) -> Any:
        """Return microbatch `number`, whose tensor can only be copied without waiting."""

        class Tokens:
            def to(tokens, device: torch.device, non_blocking: bool) -> Tokens:
                assert non_blocking
                self.calls.append(f"copy {number}")
                return tokens

            def record_stream(tokens, stream: Recorder) -> None:
                self.calls.append(f"{number} is kept")

        return Part(Tokens(), torch.tensor([number]))  # type: ignore[arg-type]


def test_a_microbatch_is_copied_while_the_one_before_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that waits for the device is called; without a microbatch there is nothing to do."""
    fake, device = Recorder(), torch.device("cuda")
    monkeypatch.setattr(torch, "get_device_module", lambda device: fake)
    for number, part in enumerate(copy_ahead(map(fake.batch, (1, 2, 3)), device), start=1):
        fake.calls.append(f"compute {part.image_B.item()}")
        assert part.image_B.item() == number
    copies = [f"copying: copy {number} done" for number in (1, 2, 3)]
    uses = [f"computing waits for copy {n} {n} is kept compute {n}" for n in (1, 2, 3)]
    assert " ".join(fake.calls) == " ".join((copies[0], copies[1], uses[0], copies[2], uses[1], uses[2]))
    assert list(copy_ahead([], device)) == []


def test_on_cpu_nothing_is_copied() -> None:
    part = Part(torch.ones(2), torch.tensor([1]))
    (same,) = copy_ahead([part], torch.device("cpu"))
    assert same is part
