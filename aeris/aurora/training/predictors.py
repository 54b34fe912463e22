"""What can be compared: a model or a file of predictions, opened from one word of a command line.

hub:NAME            published weights (aurora, pretrained, small, 12h, high-res, ...), downloaded
FILE                a checkpoint, ours or published; which model it is for is read off its keys
RUN                 directory of a run of aeris.aurora.finetune: its newest checkpoint
official:FILE       the same checkpoint in the installed package microsoft-aurora
FILE.nc, DIR.zarr   predictions written before
persistence         the weather stays as it is
LABEL=...           any of these with a name for tables and pictures
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from aeris.aurora import weights
from aeris.aurora.batch import Batch
from aeris.aurora.config import AuroraConfig
from aeris.aurora.model import Aurora
from aeris.aurora.rollout import rollout
from aeris.aurora.training import config as configs
from aeris.aurora.training.conditions import Predictor
from aeris.aurora.training.errors import ChannelFields, fields_of
from aeris.aurora.training.missing import fill
from aeris.aurora.training.official import OfficialPredictor
from aeris.aurora.training.prediction_files import FilePredictor
from aeris.aurora.training.starting_weights import HUB, build, find_start
from aeris.aurora.variants import VARIANTS

OFFICIAL = "official:"
KINDS = "a checkpoint file, a directory of a run, hub:NAME, official:FILE, FILE.nc, DIR.zarr or persistence"
Precision = Literal["auto", "fp32", "bf16", "fp64"]
_PREDICTIONS = (".nc", ".nc4", ".zarr")
_SUFFIXES = (*_PREDICTIONS, ".ckpt", ".pt", ".pth")
_LABEL = re.compile(r"([\w .+-]+)=(.+)")


class ModelPredictor:
    """One of our models, rolled out; missing values it cannot read are filled with their mean."""

    def __init__(self, name: str, made_from: str, model: Aurora) -> None:
        self.name, self.made_from, self.model = name, made_from, model.eval()
        self.config: AuroraConfig | None = model.config
        self.timestep_h = model.config.timestep_h
        self._stats = model.config.stats

    def forecast(self, batch: Batch, lead_h: Sequence[int]) -> Iterator[ChannelFields]:
        """Roll the model out and give the fields at the lead times."""
        steps = {round(hours / self.timestep_h) for hours in lead_h}
        with torch.inference_mode():
            start = fill(batch, self._stats, self.model.reads_missing)
            for number, prediction in enumerate(rollout(self.model, start, max(steps)), 1):
                if number in steps:
                    yield fields_of(prediction)


class Persistence:
    """The weather stays as it is at the start."""

    name = made_from = "persistence"
    config: AuroraConfig | None = None
    timestep_h = 0.0

    def forecast(self, batch: Batch, lead_h: Sequence[int]) -> Iterator[ChannelFields]:
        """Give the fields of the start, dated ahead."""
        now = fields_of(batch)
        for hours in lead_h:
            yield replace(now, time=now.time + np.timedelta64(hours, "h"))


def label_of(word: str) -> tuple[str, str]:
    """Split a word of the command line into (label, what to open); a label is made where none is given."""
    match = _LABEL.fullmatch(word)
    if match:
        return match[1].strip(), match[2]
    if word.startswith(HUB):
        return word.removeprefix(HUB), word
    path = Path(word.removeprefix(OFFICIAL).rstrip("/"))
    name = path.stem if path.suffix in _SUFFIXES else path.name
    return (f"official {name}" if word.startswith(OFFICIAL) else name), word


def open_predictor(
    word: str, model: str = "", device: str = "cpu", precision: Precision = "auto"
) -> Predictor:
    """Open what a word of the command line names.

    Args:
        word: see the head of this file.
        model: name of the model a checkpoint file is for, one of `VARIANTS`; empty reads it off the keys.
        device: where to compute.
        precision: bf16 casts what is safe to cast, fp32 and fp64 nothing; auto leaves a model as published.

    Raises:
        ValueError: there is no such thing, or weights and model do not fit.
    """
    name, word = label_of(word)
    if word == "persistence":
        return Persistence()
    if word.startswith(OFFICIAL):
        path = _existing(word.removeprefix(OFFICIAL))
        if precision == "bf16":
            raise ValueError(f"{word} is computed in fp32 or fp64, not bf16")
        dtype = torch.float64 if precision == "fp64" else torch.float32
        return OfficialPredictor(name, word, path, model or identify(path), device, dtype)
    if not word.startswith(HUB) and _holds_predictions(Path(word)):
        return FilePredictor(name, word, Path(word))
    found = _open_model(word, model, device, precision)
    return ModelPredictor(name, word, found.double() if precision == "fp64" else found)


def check(words: Sequence[str]) -> None:
    """Find out what can be found out of words of a command line before any model is made.

    Raises:
        ValueError: something does not exist, or two have one name.
    """
    labels = [label_of(word)[0] for word in words]
    twice = sorted({label for label in labels if labels.count(label) > 1})
    if twice:
        raise ValueError(f"two forecasters are called {twice[0]!r}: name them, LABEL=...")
    for _, word in map(label_of, words):
        if word.startswith(HUB):
            _known(word.removeprefix(HUB))
        elif word != "persistence":
            _existing(word.removeprefix(OFFICIAL))


def settings_of(word: str, model: str = "") -> AuroraConfig | None:
    """Return the settings of what a word names, without making a model or a download; None if it is none.

    Raises:
        ValueError: there is no such thing.
    """
    _, word = label_of(word)
    if word == "persistence" or (not word.startswith((HUB, OFFICIAL)) and _holds_predictions(Path(word))):
        return None
    if word.startswith(OFFICIAL):
        return VARIANTS[_known(model or identify(_existing(word.removeprefix(OFFICIAL))))].default
    return _settings(word, model)[1]


def _settings(word: str, model: str) -> tuple[str, AuroraConfig]:
    """Return which variant one of our models is, and its settings."""
    path = Path(word)
    if word.startswith(HUB):
        variant = _known(word.removeprefix(HUB))
        return variant, VARIANTS[variant].default
    if path.is_dir():
        if not (path / "config.json").exists():
            raise ValueError(f"{word} is no run of aeris.aurora.finetune; a forecaster is {KINDS}")
        found = configs.load(path / "config.json")
        return found.variant, found.aurora
    raw = weights.read_checkpoint(_existing(word))
    variant = _known(model or _identified(path, raw))
    return variant, VARIANTS[variant].default.changed(use_lora=weights.has_lora(raw))


def _open_model(word: str, model: str, device: str, precision: Precision) -> Aurora:
    """Make the model a word names, with its weights."""
    variant, settings = _settings(word, model)
    if precision != "auto":
        settings = settings.changed(autocast=precision == "bf16", autocast_dtype="bfloat16")
    made = build(variant, settings, device)
    find_start(word, made).load(made)
    return made


def identify(path: Path) -> str:
    """Return the name of the model a checkpoint file is for.

    Raises:
        ValueError: its keys do not tell.
    """
    return _identified(path, weights.read_checkpoint(path))


def _identified(path: Path, raw: Mapping[str, Any]) -> str:
    name = weights.identify(raw)
    if not name:
        raise ValueError(f"{path}: the keys do not tell which model this is for; say it with --model")
    return name


def _known(name: str) -> str:
    if name not in VARIANTS:
        raise ValueError(f"no model is called {name!r}: choose one of {', '.join(VARIANTS)}")
    return name


def _existing(word: str) -> Path:
    path = Path(word)
    if not path.exists():
        raise ValueError(f"{word} does not exist; a forecaster is {KINDS}")
    return path


def _holds_predictions(path: Path) -> bool:
    return path.suffix in _PREDICTIONS
