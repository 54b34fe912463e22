"""The weights a run starts from: a checkpoint file, another run, or a published name to be downloaded.

They are read and compared with the model before anything starts. Adapters (LoRA) may be lacking: they start
fresh. Anything else that differs is refused, with the names of what differs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from aeris.aurora import weights
from aeris.aurora.config import AuroraConfig
from aeris.aurora.initialise import initialise
from aeris.aurora.model import Aurora
from aeris.aurora.training import config as configs
from aeris.aurora.variants import VARIANTS
from swipe import checkpoint

HUB = "hub:"


def build(variant: str, config: AuroraConfig, device: torch.device | str, seed: int = 0) -> Aurora:
    """Build a model with fresh weights in fp32; on "meta", shapes only.

    Raises:
        ValueError: there is no such variant, or its settings contradict each other.
    """
    if variant not in VARIANTS:
        raise ValueError(f"there is no model {variant!r}: choose one of {', '.join(VARIANTS)}")
    with torch.device("meta"):
        model = VARIANTS[variant](config)
    if str(device) != "meta":
        model = model.to_empty(device=device)
        initialise(model, seed)
    return model


@dataclass(frozen=True)
class Start:
    """Weights that were found to fit a model.

    Attributes:
        source: where they come from, as the user wrote it.
        state: the tensors of a file, by the model's names; of a run only their shapes.
        run_checkpoint: the checkpoint of a run, if they come from one.
        fresh: weights of the model that keep their initial values.
    """

    source: str
    state: Mapping[str, Tensor]
    run_checkpoint: Path | None
    fresh: tuple[str, ...]

    def load(self, model: nn.Module) -> None:
        """Copy the weights into a model that is not divided yet."""
        own = dict(model.named_parameters())
        if self.run_checkpoint is None:
            model.load_state_dict({name: x for name, x in self.state.items() if name in own}, strict=False)
            return
        shared = {f"model.{name}": own[name].detach() for name in self.state if name in own}
        checkpoint.load(self.run_checkpoint, shared)

    def __str__(self) -> str:
        """Say in a line what was found."""
        if not self.fresh:
            return f"weights of {self.run_checkpoint or self.source}"
        kind = "adapters" if all(".lora_" in name for name in self.fresh) else "weights"
        return f"weights of {self.run_checkpoint or self.source}, {len(self.fresh)} fresh tensors ({kind})"


def find_start(source: str, model: Aurora, partial: bool = False) -> Start:
    """Find the weights `source` names and compare them with a model, which may be on "meta".

    Args:
        source: a file, a run directory, or "hub:" and a name of aeris.aurora.variants.
        partial: accept differences in variables.

    Raises:
        ValueError: there are none, they are damaged, or of another model: names what differs.
    """
    if source.startswith(HUB):
        return _from_file(source, _download(source.removeprefix(HUB)), model, partial)
    path = Path(source)
    if path.is_dir():
        return _from_run(source, path, model, partial)
    return _from_file(source, path, model, partial)


def _download(name: str) -> Path:
    if name not in VARIANTS:
        published = [known for known in VARIANTS if VARIANTS[known].published]
        raise ValueError(f"--weights {HUB}{name}: published are {', '.join(published)}")
    return weights.download(VARIANTS[name].published)


def _from_file(source: str, path: Path, model: Aurora, partial: bool) -> Start:
    raw = weights.read_checkpoint(path)
    try:
        state = weights.adapt(model.config, raw)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    fresh = _check(path, model, state, partial, weights.identify(raw))
    return Start(source, state, None, fresh)


def _from_run(source: str, run_dir: Path, model: Aurora, partial: bool) -> Start:
    found = configs.load(run_dir / "config.json")
    complete = checkpoint.complete(run_dir / "checkpoints")
    if not complete:
        raise ValueError(f"the run {run_dir} has no complete checkpoint yet")
    state = build(found.variant, found.aurora, "meta").state_dict()
    fresh = _check(run_dir, model, state, partial, found.variant)
    return Start(source, state, complete[-1], fresh)


def _check(
    path: Path, model: Aurora, state: Mapping[str, Tensor], partial: bool, looks_like: str
) -> tuple[str, ...]:
    """Compare weights with a model; return what stays fresh.

    Raises:
        ValueError: they differ in more than adapters that are lacking, or variables with `partial`.
    """
    differences = weights.compare(model, state)
    fits = not differences.unexpected and not differences.shapes
    fits = fits and all(".lora_" in name for name in differences.missing)
    if fits or (partial and differences.optional):
        return differences.missing
    advice = ""
    if looks_like:
        adapters = "with" if weights.has_lora(state) else "without"
        advice = f". They look like the model {looks_like!r} {adapters} LoRA"
    if differences.unexpected and all(".lora_" in name for name in differences.unexpected):
        advice += ": pass --aurora.use-lora"
    elif differences.optional:
        advice += ": --partial would take what fits"
    raise ValueError(f"the weights {path} do not fit the model: {differences}{advice}")
