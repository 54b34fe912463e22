"""The replay buffer: who is drawn, who leaves, how far ahead, and that all of it is known beforehand."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from datetime import datetime, timedelta

import pytest
import torch

from aeris.aurora.batch import Batch, Metadata
from aeris.aurora.training.config import ReplayConfig
from aeris.aurora.training.replay import Buffer, Calendar, Draw, Ledger, State, advance

TIMES = 400
START = datetime(2020, 1, 1)


def calendar(last: int = TIMES - 1) -> Calendar:
    """A series of times 6 h apart, sampled in steps of 7, with no target behind the last."""
    return Calendar(
        lambda image: 1 + (7 * image) % (last - 1), lambda time: time + 1 if time < last else None, 6.0
    )


def ledger(place: int = 0, batch: int = 1, last: int = TIMES - 1, **changes: int) -> Ledger:
    """A small buffer's ledger."""
    config = replace(ReplayConfig(size=20, fresh_every=10, lead_h=96, later_lead_h=240), **changes)
    return Ledger(config, calendar(last), 0, place, batch)


class Reference:
    """The same told naively: a list of states in order of arrival."""

    def __init__(self, size: int) -> None:
        self.size, self.slots, self.age = size, dict[int, State](), dict[int, int]()
        self.count = 0

    def put(self, slot: int, state: State) -> None:
        if len(self.slots) == self.size:
            assert slot == min(self.age, key=self.age.__getitem__), "the oldest leaves"
        else:
            assert slot not in self.slots
        self.slots[slot], self.age[slot], self.count = state, self.count, self.count + 1


def test_states_come_stay_and_leave_in_order() -> None:
    """Fresh ones every tenth update, the prediction of every update; a drawn one stays; the oldest leaves."""
    book, naive = ledger(), Reference(20)
    drawn = Counter[int]()
    for update, draw in enumerate(advance([book], 500)):
        assert draw.image == update
        assert len(draw.fresh) == (2 if update == 0 else update % 10 == 0)
        for fresh in draw.fresh:
            naive.put(fresh.slot, State(fresh.time, 0))
        assert naive.slots[draw.slot] == draw.state
        assert draw.target == draw.state.time + 1  # the truth at the state's own valid time
        drawn[draw.slot] += 1
        if draw.put is not None:
            naive.put(draw.put, State(draw.target, draw.state.steps + 1))
    assert naive.slots == dict(enumerate(book.states))
    assert set(drawn) == set(range(20)) and max(drawn.values()) < 60  # evenly, with replacement


def test_leads_are_bounded_and_the_bound_rises() -> None:
    """No prediction is more than 4 days ahead at first, some are up to 10 days later."""
    leads = [
        (draw.image, 6 * (draw.state.steps + 1))
        for draw in advance([ledger(fresh_every=60, later_from_images=2_000)], 6_000)
    ]
    early = [lead for image, lead in leads if image < 2_000]
    late = [lead for image, lead in leads if image >= 2_000]
    assert max(early) == 96 and 96 < max(late) <= 240


def test_nothing_behind_the_last_target_is_put() -> None:
    """Every state drawn has a target; a prediction of the last time is dropped."""
    draws = list(advance([ledger(last=12)], 300))
    assert max(draw.target for draw in draws) == 12
    assert all(draw.put is None for draw in draws if draw.target == 12)
    assert any(draw.put is None for draw in draws)


def test_at_first_the_buffer_has_its_share_of_fresh_states() -> None:
    """As many as later on, unless a number is given."""
    assert len(ledger(size=200).advance().fresh) == 18
    assert len(ledger(size=200, at_first=7).advance().fresh) == 7
    assert len(ledger(size=1).advance().fresh) == 1


def test_places_of_the_batch_have_lives_of_their_own() -> None:
    """The same on one rank with two places as on two ranks; different from each other."""
    both = list(advance([ledger(0, 2), ledger(1, 2)], 50))
    assert [draw.image for draw in both] == list(range(100))
    assert both[::2] == list(advance([ledger(0, 2)], 50)) and both[1::2] == list(advance([ledger(1, 2)], 50))
    assert [d.slot for d in both[::2]] != [d.slot for d in both[1::2]]
    fresh = [fresh.time for draw in both for fresh in draw.fresh]
    assert len(set(fresh)) == len(fresh)


def like() -> Batch:
    """An input of a model, on two levels."""
    where = Metadata(torch.linspace(90, -90, 3), torch.arange(4) * 90.0, (START,), (500, 850))
    return Batch({"2t": torch.zeros(1, 2, 3, 4)}, {}, {"z": torch.zeros(1, 2, 2, 3, 4)}, where)


def filled(value: float, time: int = 0, steps: int = 0) -> Batch:
    """An input full of a number."""
    one = like()
    where = replace(one.metadata, time=(clock(time),), rollout_step=steps)
    surf = {name: torch.full_like(x, value) for name, x in one.surf_vars.items()}
    return replace(one, surf_vars=surf, atmos_vars={"z": torch.full((1, 2, 2, 3, 4), value)}, metadata=where)


def clock(time: int) -> datetime:
    """The time of a number."""
    return START + time * timedelta(hours=6)


def newest(batch: Batch) -> Batch:
    """The last history entry alone."""
    return replace(
        batch,
        surf_vars={k: x[:, -1:] for k, x in batch.surf_vars.items()},
        atmos_vars={k: x[:, -1:] for k, x in batch.atmos_vars.items()},
    )


def live(buffer: Buffer, updates: int) -> None:
    """Use a buffer as training does, with fields that say which state they are."""
    for draw in advance([buffer.ledger], updates):
        for fresh in draw.fresh:
            buffer.put(fresh.slot, filled(float(fresh.time), fresh.time))
        state = buffer.state(draw)
        assert state.metadata.time == (clock(draw.state.time),)
        assert state.metadata.rollout_step == draw.state.steps
        assert float(state.surf_vars["2t"].mean()) == draw.state.time + draw.state.steps / 1024
        made = filled(draw.target + (draw.state.steps + 1) / 1024, draw.target, draw.state.steps + 1)
        buffer.put_prediction(draw, made, newest(made))


def test_fields_follow_the_ledger_and_a_saved_buffer_goes_on() -> None:
    """A state drawn has the fields, time and step that were put; loaded into another buffer, likewise."""
    buffer = Buffer(ledger(), like(), clock)
    live(buffer, 137)
    saved = {name: x.clone() for name, x in buffer.tensors().items()}
    assert len(saved) == 2 * 20 and "replay.0.19.atmos.z" in saved
    other = Buffer(ledger(), like(), clock)
    other.make_room(137)
    assert other.tensors().keys() == saved.keys()
    for name, x in other.tensors().items():
        x.copy_(saved[name])
    live(other, 40)
    live(buffer, 40)
    assert all(torch.equal(x, buffer.tensors()[name]) for name, x in other.tensors().items())


def test_a_half_filled_buffer_is_saved_as_it_is() -> None:
    """Only states that exist."""
    buffer, other = (Buffer(ledger(size=100, at_first=3), like(), clock) for _ in range(2))
    live(buffer, 5)
    other.make_room(5)
    assert buffer.tensors().keys() == other.tensors().keys() and len(buffer.slots) == 8


def test_a_buffer_keeps_copies_in_memory_of_its_own() -> None:
    """Not what a worker shares with the trainer, nor what is written to afterwards."""
    buffer = Buffer(ledger(), like(), clock)
    read = filled(1.0)
    for x in (*read.surf_vars.values(), *read.atmos_vars.values()):
        x.share_memory_()
    buffer.put(0, read)
    made = filled(2.0, 1, 1)
    buffer.put_prediction(Draw(0, (), 0, State(0, 0), 1, 1), made, newest(filled(3.0, 1)))
    for batch in (read, made):
        for x in (*batch.surf_vars.values(), *batch.atmos_vars.values()):
            x.fill_(9.0)
    for slot, value in enumerate((1.0, 2.0)):
        for x in buffer.slots[slot].values():
            assert not x.is_shared() and bool((x == value).all())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_prediction_that_is_not_finite_is_replaced_by_the_truth(bad: float) -> None:
    """Point by point; where the truth is missing too, by what was there before."""
    buffer = Buffer(ledger(), like(), clock)
    buffer.put(0, filled(1.0))
    draw = Draw(0, (), 0, State(0, 0), 1, 1)
    made, truth = filled(2.0, 1, 1), newest(filled(3.0, 1))
    made.surf_vars["2t"][0, 1, 0, :2] = bad
    truth.surf_vars["2t"][0, 0, 0, 0] = float("nan")
    buffer.put_prediction(draw, made, truth)
    kept = buffer.slots[1]["surf.2t"][0, 1]
    assert kept[0].tolist() == [1.0, 3.0, 2.0, 2.0] and bool((kept[1:] == 2.0).all())
