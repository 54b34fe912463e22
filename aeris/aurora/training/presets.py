"""Named trainings of Aurora. The source of every number stands beside it.

Sources: [paper] Bodnar et al. 2025 (Nature 641, 1180); [said] its authors, in issues of microsoft/aurora;
[port] the article "Microsoft's Aurora in JAX" and its code; [repeated] by public code after the paper.

| preset          | trains   | steps          | gradient     | starts from                   |
| --------------- | -------- | -------------- | ------------ | ----------------------------- |
| pretrain        | all      | 1              | through      | fresh weights                 |
| one-step        | all      | 1              | through      | pretrained                    |
| two-step        | all      | 2              | through      | pretrained                    |
| lora-three-step | adapters | 3              | push-forward | pretrained, or two-step's run |
| lora-replay     | adapters | 1 of up to 40  | push-forward | fine-tuned                    |
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from aeris.aurora.config import AuroraConfig
from aeris.aurora.training.config import (
    FRESH,
    FineTuneConfig,
    LossConfig,
    ReplayConfig,
    RolloutConfig,
    TrainConfig,
)
from aeris.config import CheckpointConfig, OptimizerConfig


@dataclass(frozen=True)
class Preset:
    """A named training, for any model: the settings of the run, and what it changes in the model's.

    What trains all weights trains without adapters, whatever the model's default: beside them a base that
    learns too has nothing to be adapted to. Weights that have adapters want --aurora.use-lora: both train.
    """

    config: FineTuneConfig
    aurora: Mapping[str, Any] = field(default_factory=dict)

    def of(self, variant: str, aurora: AuroraConfig) -> FineTuneConfig:
        """Return the configuration for a variant and its settings."""
        return replace(self.config, variant=variant, aurora=replace(aurora, **self.aurora))


def pretrain() -> Preset:
    """From scratch: 150,000 updates, half a cosine down to a tenth. [repeated]; drop path [said]."""
    return Preset(
        FineTuneConfig(
            weights=FRESH,
            loss=LossConfig(table="pretraining", dataset="era5"),
            train=TrainConfig(images=150_000, clip=0.0),
            optimizer=_adamw(lr=5e-4, shape="cosine", lr_floor=0.1),
            checkpoint=CheckpointConfig(every_images=1_000, keep=2),
        ),
        {"drop_path": 0.2, "use_lora": False},
    )


def one_step() -> Preset:
    """All weights, one target: setup 1 of the article. [port]; 8,000 updates [repeated]."""
    return Preset(
        FineTuneConfig(
            rollout=RolloutConfig(steps=1),
            train=TrainConfig(images=8_000, clip=0.0),  # clipping only in roll-outs [said]
            optimizer=_adamw(lr=5e-5),
            checkpoint=CheckpointConfig(every_images=1_000, keep=2),
        ),
        {"use_lora": False},
    )


def two_step() -> Preset:
    """All weights, the mean loss of two steps, gradients through both: setup 2 of the article. [port]"""
    preset = one_step()
    train = replace(preset.config.train, clip=1.0)
    rollout = RolloutConfig(steps=2, gradient="through")
    return Preset(replace(preset.config, rollout=rollout, train=train), preset.aurora)


def lora_three_step() -> Preset:
    """Adapters on a frozen base, three steps, predictions cut off as they are fed back: setup 3. [port]

    Every step's loss trains, as the article says; in the port's code only the last one does. Its script has
    a learning rate of 1e-4 for the adapters, the article 5e-5 for all setups.
    """
    preset = one_step()
    return Preset(
        replace(
            preset.config,
            rollout=RolloutConfig(steps=3, gradient="push-forward", train="adapters"),
            train=replace(preset.config.train, clip=1.0),
        ),
        {"use_lora": True, "lora_mode": "single"},
    )


def lora_replay() -> Preset:
    """Adapters, trained on states the model has made itself, up to ten days ahead. [paper, said]

    Buffer 200, a fresh state every 10 updates, 4 days ahead and after 5,000 updates 10 days [repeated]. The
    paper's run had a batch of 20, one per device; images here are for a batch of 1.
    """
    preset = lora_three_step()
    return Preset(
        replace(
            preset.config,
            rollout=RolloutConfig(steps=1, gradient="push-forward", train="adapters"),
            replay=ReplayConfig(
                size=200, fresh_every=10, lead_h=96, later_lead_h=240, later_from_images=5_000
            ),
            train=replace(preset.config.train, images=10_000),
        ),
        preset.aurora,
    )


def _adamw(**changes: Any) -> OptimizerConfig:
    """AdamW with torch's betas, decay 5e-6, 1,000 updates of warm-up, then constant. [repeated, port]"""
    plain = OptimizerConfig(
        lr=5e-5, betas=(0.9, 0.999), eps=1e-8, weight_decay=5e-6, warmup_images=1_000, shape="constant",
        cosine_images=0, rampdown_images=0, lr_floor=0.0,
    )  # fmt: skip
    return replace(plain, **changes)


PRESETS: dict[str, Callable[[], Preset]] = {
    "pretrain": pretrain,
    "one-step": one_step,
    "two-step": two_step,
    "lora-three-step": lora_three_step,
    "lora-replay": lora_replay,
}
