"""The order of images, and that a sample is what the store says, whoever reads it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from aeris.data.forcing import Forcing
from aeris.data.loader import Sample, SampleDataset, _columns, make_loader
from aeris.data.store import Store, StoreError, packaged_sample
from swipe.windows import WindowGrid, WindowShard

SHARD = WindowShard.full(WindowGrid(24, 48, 12))


@pytest.fixture
def dataset() -> SampleDataset:
    return SampleDataset(packaged_sample(), 6, SHARD, seed=3)


def test_every_epoch_is_a_permutation_of_its_own(dataset: SampleDataset) -> None:
    n = len(dataset)
    assert n == 119
    epochs = [[dataset.pair(epoch * n + k) for k in range(n)] for epoch in range(3)]
    for order in epochs:
        assert sorted(order) == [(i, i + 1) for i in range(119)]
    assert len({tuple(order) for order in epochs}) == 3
    other = SampleDataset(packaged_sample(), 6, SHARD, seed=4)
    assert [other.pair(k) for k in range(n)] != epochs[0]


def test_order_is_pinned(dataset: SampleDataset) -> None:
    """Checkpoints of old runs go on with this order: it must not change with numpy or with us."""
    assert [dataset.pair(k)[0] for k in (0, 1, 2, 118, 119, 10**6)] == [43, 78, 71, 53, 47, 7]


def test_sample_is_the_standardised_pair(dataset: SampleDataset) -> None:
    sample = dataset[17]
    before, after = dataset.pair(17)
    store, tokens = dataset.store, SHARD.token_index()
    now, then = (store.read(i).reshape(24, -1).T[tokens].astype(np.float64) for i in (before, after))
    numbers = store.statistics
    np.testing.assert_allclose(sample.state_BNTC, (now - numbers.mean_C) / numbers.std_C, atol=2e-4)
    residual = (then - now - numbers.residual_mean[6]) / numbers.residual_std[6]
    np.testing.assert_allclose(sample.residual_BNTC, residual, atol=1e-4)
    forcing = Forcing(store, 6).windows(store.times[before], SHARD)
    np.testing.assert_array_equal(sample.forcing_BNTF, forcing)
    assert sample.image_B == 17


@pytest.mark.parametrize("roll", [0, 12, 36, 1, 17, 47])
@pytest.mark.parametrize("side", [12, 6])
def test_a_rolled_window_is_a_window_of_the_rolled_globe(
    dataset: SampleDataset, roll: int, side: int
) -> None:
    """Fields and forcings together, for any columns, for all windows and for some, whatever the chunks."""
    store, shard = dataset.store, WindowShard(WindowGrid(24, 48, side), ((1, 3), (0, 0), (0, 2)))
    tokens = shard.token_index()
    rolled = np.roll(store.read(5), roll, axis=2).reshape(24, -1).T
    np.testing.assert_array_equal(store.read_windows(5, shard, roll), rolled[tokens])
    forcing, time = Forcing(store, 6), store.times[5]
    rolled = np.roll(forcing.fields(time), roll, axis=2).reshape(4, -1).T
    np.testing.assert_allclose(forcing.windows(time, shard, roll), rolled[tokens], atol=1e-6)


def test_rolls_belong_to_the_image_and_reach_every_column() -> None:
    """The pair is the same as without; the roll depends on seed and image only."""
    plain, rolled = (SampleDataset(packaged_sample(), 6, SHARD, 3, roll=roll) for roll in (False, True))
    seen = set()
    for image in range(300):
        roll = _columns(3, image, 48)
        seen.add(roll)
        if image < 5:
            assert plain.pair(image) == rolled.pair(image)
            expected = np.roll(plain.store.read(plain.pair(image)[0]), roll, axis=2).reshape(24, -1).T
            numbers = plain.store.statistics
            state = (expected[SHARD.token_index()] - numbers.mean_C) / numbers.std_C
            np.testing.assert_allclose(rolled[image].state_BNTC, state, atol=2e-4)
    assert seen == set(range(48))


def test_errors_of_states_are_changes_of_other_pairs_and_are_taken_out_again() -> None:
    """The next state is that of the pair; the error is a pair's departure, of a size that is log-uniform."""
    plain = SampleDataset(packaged_sample(), 6, SHARD, 3)
    other = SampleDataset(packaged_sample(), 6, SHARD, 3, state_error=0.5)
    numbers = plain.store.statistics
    std, residual_std = (torch.from_numpy(x).float() for x in (numbers.std_C, numbers.residual_std[6]))
    changes = {plain.pair(k): plain[k].residual_BNTC.flatten() for k in range(len(plain))}
    pairs, unit = list(changes), torch.nn.functional.normalize(torch.stack(list(changes.values())))
    sizes, of = [], []
    for image in range(60):
        true, wrong = plain[image], other[image]
        added = (wrong.state_BNTC - true.state_BNTC) * std
        taken = (true.residual_BNTC - wrong.residual_BNTC) * residual_std
        torch.testing.assert_close(taken, added, rtol=1e-3, atol=3e-4 * float(added.abs().max()))
        error = (added / residual_std).flatten()
        cosine = unit @ torch.nn.functional.normalize(error, dim=0)
        place = int(cosine.abs().argmax())
        assert cosine[place].abs() > 0.999
        of.append(pairs[place])
        sizes.append(float(error.norm() / changes[pairs[place]].norm() * cosine[place].sign()))
    assert len(set(of)) > 40 and of != [plain.pair(image) for image in range(60)]
    assert 15 < sum(size > 0 for size in sizes) < 45
    logs = np.log(np.abs(sizes) / 0.5) / np.log(0.03)
    assert 0 <= logs.min() < 0.1 and 0.9 < logs.max() <= 1.001 and logs.mean() == pytest.approx(0.5, abs=0.12)


def test_held_out_times_are_never_touched(dataset: SampleDataset) -> None:
    assert max(dataset.pair(k)[1] for k in range(len(dataset))) == 119
    times = dataset.store.times
    held_out = SampleDataset(packaged_sample(), 24, SHARD, seed=0, period=(times[120], times[159]))
    assert sorted(held_out.pair(k) for k in range(len(held_out))) == [(i, i + 4) for i in range(120, 156)]
    with pytest.raises(StoreError, match="36 h apart"):
        SampleDataset(packaged_sample(), 36, SHARD, seed=0, period=(times[0], times[5]))


def test_shard_reads_its_part_of_the_same_image(dataset: SampleDataset) -> None:
    part = WindowShard(SHARD.grid, SHARD.windows[1::2])
    alone = SampleDataset(packaged_sample(), 6, part, seed=3)[40]
    whole = dataset[40]
    for one, all_of_them in zip(alone[:3], whole[:3]):
        torch.testing.assert_close(one, all_of_them[1::2], rtol=0, atol=0)


def test_masked_points_are_zero(store_path: Path) -> None:
    shard = WindowShard.full(WindowGrid(12, 24, 6))
    dataset = SampleDataset(store_path, 6, shard, seed=0)
    hidden = ~torch.from_numpy(Store(store_path).valid_windows(shard))
    assert hidden[..., -1].any()
    for image in range(len(dataset)):
        sample = dataset[image]
        assert torch.all(sample.state_BNTC[hidden] == 0)
        assert torch.all(sample.residual_BNTC[hidden] == 0)
        assert torch.all(sample.residual_BNTC[~hidden].isfinite())


def read(dataset: SampleDataset, first: int, last: int, microbatch: int, workers: int) -> list[Sample]:
    return list(make_loader(dataset, range(first, last), microbatch, workers))


def test_starting_at_an_image_gives_the_rest_of_the_run(dataset: SampleDataset) -> None:
    whole = read(dataset, 0, 130, 5, 0)
    rest = read(dataset, 110, 130, 4, 0)
    images = torch.cat([batch.image_B for batch in rest])
    assert images.tolist() == list(range(110, 130))
    for field in range(3):
        late = torch.cat([batch[field] for batch in whole])[110:]
        torch.testing.assert_close(torch.cat([batch[field] for batch in rest]), late, rtol=0, atol=0)


def test_workers_read_the_same(dataset: SampleDataset) -> None:
    dataset[0]  # the parent has the file open: workers must open it anew
    alone = read(dataset, 7, 18, 2, workers=0)
    helped = read(dataset, 7, 18, 2, workers=2)
    assert [type(batch) for batch in helped] == [Sample] * 6
    assert helped[0].state_BNTC.shape == (2, 8, 144, 24)
    assert helped[-1].image_B.tolist() == [17]
    for one, other in zip(alone, helped):
        for ours, theirs in zip(one, other):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
