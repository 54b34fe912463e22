"""One update of a training run of Aurora, and one validation."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from aeris.aurora.batch import Batch
from aeris.aurora.loss import weighted_mae
from aeris.aurora.rollout import next_input, start
from aeris.aurora.training.objective import Roll, truth
from aeris.aurora.training.reading import Item, evenly, read_validation
from aeris.aurora.training.run import FineTuning
from aeris.optim import learning_rate
from aeris.run import Record
from swipe import noise
from swipe.collectives import all_reduce, waiting
from swipe.gradients import clip, global_norm
from swipe.sharding import drop_gathered, last_backward, replicas

# Which random numbers of an image: dropped paths and noise of a stochastic model, in training and validation.
TRAIN_STREAM, VALIDATE_STREAM = 1, 2


def seeded(run: FineTuning, stream: int, image: int) -> Callable[[int], None]:
    """Return what seeds torch for a step of an image: what a model draws is then keyed by both."""
    seed = run.config.train.seed
    return lambda step: _seed(noise.key(seed, stream, image, step))


def _seed(key: int) -> None:
    torch.manual_seed(key & 0x7FFFFFFFFFFFFFFF)


def train_step(run: FineTuning, samples: Iterator[Item]) -> Record:
    """Take one update over the next `train.batch` images; return its record for the log."""
    train, world = run.config.train, run.seat.groups.world
    lr = learning_rate(run.images_seen, run.config.optimizer, train.images)
    for group in run.optimizer.param_groups:
        group["lr"] = lr
    run.optimizer.zero_grad(set_to_none=True)
    run.model.train()
    count = train.batch // (train.microbatch * run.seat.world)
    losses_K = torch.zeros(run.config.rollout.steps, dtype=torch.float64, device=run.device)
    missing = torch.zeros(2, dtype=torch.float64)
    for number, item in enumerate(islice(samples, count)):
        last = number == count - 1
        # The first gathers the weights and the last reduces the gradients. Of two nothing would be left.
        waits = count > 2 and (number == 0 or last)
        losses, lacking = learn_from(run, item, 1 / count, last, waits)
        losses_K += losses.double() / count
        missing += torch.tensor(lacking)
    known = [*missing.tolist(), *run.guards.requests.wishes()]  # filled in: a copy would wait for the device
    numbers = [*(losses_K / run.seat.world), *(losses_K.new_full((), number) for number in known)]
    norm, sums = global_norm(run.model.parameters(), world, replicas(run.seat.groups.weights), numbers)
    # On a device, all waiting of an update happens here.
    with waiting("sum of gradient norm and loss", world, computes=world.size == 1):
        summed = torch.cat((norm[None], sums)).tolist()
    norm_value, *losses_by_step, lacking_values, values, stop, save = summed
    loss = sum(losses_by_step) / len(losses_by_step)
    why = run.count(loss, norm_value, stop, save)
    if not why:
        with run.guards.stopwatch.computing():
            if train.clip:
                clip(run.model.parameters(), norm, train.clip)
            run.optimizer.step()
    record = {"images_seen": run.images_seen, "loss": loss, "grad_norm": norm_value, "lr": lr}
    if len(losses_by_step) > 1:
        record |= {f"loss_step_{step}": value for step, value in enumerate(losses_by_step, 1)}
    record |= {"missing": lacking_values / max(1.0, values), "skipped": run.skipped}
    return record | ({"skip": why} if why else {})


def learn_from(
    run: FineTuning, item: Item, share: float, last: bool, waits: bool = False
) -> tuple[Tensor, tuple[int, int]]:
    """Add the gradient of one microbatch; return its losses by step [K], and how many values were missing.

    Args:
        share: of the microbatch in the update.
        last: whether it is the update's last one.
        waits: whether its time is left out on a device, because it waits for other ranks there.
    """
    model = run.model
    batch = start(model, item.input)
    targets = [truth(model, target, batch) for target in item.targets]

    def after(step: int, before: Batch, prediction: Batch, target: Batch) -> None:
        run.scores.add(step, prediction, target)
        if item.draw is not None and run.replay is not None:
            fed_back = next_input(before, model.apply_rollout_input_clipping(prediction))
            run.replay.keep(item.draw, fed_back, target)

    roll = Roll(
        model,
        lambda prediction, target: weighted_mae(prediction, target, run.loss_weights, run.surf_stats),
        run.config.rollout.gradient,
        before=seeded(run, TRAIN_STREAM, item.images[0]),
        after=after,
        last=lambda last: last_backward(model, last),
    )
    with run.guards.stopwatch.computing(waits):
        return roll.train(batch, targets, share, last), item.missing


@torch.no_grad()
def validate(run: FineTuning) -> dict[str, Any]:
    """Judge the model on held-out data; a collective call.

    Returns:
        "loss" of every step, and "rmse" and "mae" by variable and step (`Scores.result`).
    """
    sequences, settings, seat = run.data.validation, run.config.validate, run.seat
    assert sequences is not None, "asked for"
    run.model.eval()
    chosen = evenly(len(sequences), settings.samples)
    scores = run.new_scores(sequences.targets)
    sums_K = torch.zeros(sequences.targets, dtype=torch.float64, device=run.device)
    # A rank without a sample of its own in the last round works on another's: weights are gathered together.
    rounds = -(-len(chosen) // seat.world)
    own = [chosen[min(n * seat.world + seat.rank, len(chosen) - 1)] for n in range(rounds)]
    pin_memory = run.device.type != "cpu"
    for number, item in enumerate(read_validation(run.config, run.data, own, pin_memory)):
        counts = number * seat.world + seat.rank < len(chosen)
        batch = start(run.model, item.input)
        roll = Roll(
            run.model,
            lambda prediction, target: weighted_mae(prediction, target, run.loss_weights, run.surf_stats),
            run.config.rollout.gradient,
            before=seeded(run, VALIDATE_STREAM, own[number]),
            after=(lambda step, _, *pair: scores.add(step, *pair)) if counts else (lambda *seen: None),
        )
        losses_K = roll.evaluate(batch, [truth(run.model, one, batch) for one in item.targets])
        sums_K += losses_K.double() * counts
        run.guards.tick()
    drop_gathered(run.model)
    scores.fold(seat.groups.world)
    world = seat.groups.world
    losses_K = all_reduce(sums_K, world, "validation losses") / len(chosen)
    with waiting("sum of validation losses", world, computes=world.size == 1):
        losses = losses_K.tolist()
    return {"loss": [x if math.isfinite(x) else None for x in losses], **scores.result()}


def training_scores(run: FineTuning) -> dict[str, Any]:
    """Return the scores of the predictions made in training since the last time; a collective call."""
    run.scores.fold(run.seat.groups.world)
    found = run.scores.result() if bool(run.scores.total[..., 2].any()) else {}
    run.scores.clear()
    return found
