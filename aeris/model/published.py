"""The weights AERIS's authors published: `checkpoint_PP0.pth` .. `checkpoint_PP9.pth`, one file per stage.

Each file is a dict that has, among others, the averaged weights (`ema_state_dict`, fp32). Stage 0 is the
embedding, the last one the head, every other a layer of some blocks. Files are mapped into memory and read
without executing code. Every key must be one of the network's, of the right shape, or one that their runs
left over.

Sources: the authors' configuration and code (github.com/argonne-lcf/AERIS-GB).
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aeris.config import ModelConfig

FORCINGS = 4
"""Input channels beside noisy residual and state: sunshine before and after, orography, land-sea mask."""
EMA = "ema_state_dict"

# Their name -> ours, in the file of a stage; a layer's are behind `modulelist.<block>.`.
_EMBEDDING = {"proj.weight": "embed.proj.weight", "proj.bias": "embed.proj.bias"}
_BLOCK = {
    "0.weight": "norm1.weight",
    "1.to_qkv.weight": "attention.qkv.weight",
    "1.wo.weight": "attention.out.weight",
    "2.weight": "norm2.weight",
    "3.w1.weight": "mlp.gate_up.weight",
    "3.w2.weight": "mlp.down.weight",
    "4.modulation.0.weight": "modulation.hidden.weight",
    "4.modulation.0.bias": "modulation.hidden.bias",
    "4.modulation.2.weight": "modulation.out.weight",
    "4.modulation.2.bias": "modulation.out.bias",
}
_HEAD = {
    "norm.weight": "head.norm.weight",
    "modulation.0.weight": "head.modulation.hidden.weight",
    "modulation.0.bias": "head.modulation.hidden.bias",
    "modulation.2.weight": "head.modulation.out.weight",
    "modulation.2.bias": "head.modulation.out.bias",
    "head.weight": "head.out.weight",
}
# In the files, and no part of the network: a buffer that is computed, and modules that were never called.
_LEFTOVER = re.compile(r"ape\.inv_freq|latent_embed\.w[12]\.(weight|bias)|modulelist\.\d+\.1\.norm\.weight")
_FILE = re.compile(r"checkpoint_PP(\d+)\.pth")


class PublishedError(ValueError):
    """A file of published weights is missing, damaged, or of another network; says which and how."""


@dataclass(frozen=True)
class Sizes:
    """What the shapes in the files say of the network."""

    channels: int
    """Channels of the state C; the network has 2 C + 4 inputs and C outputs."""
    width: int
    hidden: int
    layers: int
    blocks: int

    @property
    def in_channels(self) -> int:
        """Input channels of the network."""
        return 2 * self.channels + FORCINGS

    @classmethod
    def of(cls, config: ModelConfig, channels: int) -> Sizes:
        """Return those of a configuration with C channels."""
        return cls(channels, config.width, config.hidden, config.layers, config.blocks)


def file_name(stage: int) -> str:
    """Name the file of a stage."""
    return f"checkpoint_PP{stage}.pth"


def stage_files(directory: Path) -> list[Path]:
    """Return the files of all stages, in order.

    Raises:
        PublishedError: there are none, or one is missing.
    """
    found = {int(match[1]) for path in directory.glob("*.pth") if (match := _FILE.fullmatch(path.name))}
    if not found:
        raise PublishedError(f"{directory} has no {file_name(0)}: it is not a directory of published weights")
    missing = sorted(set(range(max(max(found) + 1, 3))) - found)
    if missing:
        raise PublishedError(
            f"{directory} lacks {', '.join(file_name(stage) for stage in missing)}: copy all of its files"
        )
    return [directory / file_name(stage) for stage in range(max(found) + 1)]


def read_stage(path: Path) -> tuple[dict[str, Tensor], int]:
    """Map the averaged weights of a file into memory, and return them with the images they have seen.

    Pages are read when a tensor is used, and are not this process's own memory.

    Raises:
        PublishedError: the file is missing, cut off, no such file, or holds more than numbers.
    """
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        raise PublishedError(f"{path} is missing: copy it again") from None
    except PermissionError:
        raise PublishedError(f"{path} cannot be read by this user") from None
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        what = f"it names {named[1]}" if named else "its pickle is no list of tensors"
        raise PublishedError(f"{path} was not loaded: {what}, which weights do not need") from None
    except Exception as error:  # a damaged archive may raise nearly anything
        raise PublishedError(
            f"{path} cannot be read ({_shortly(error)}): cut off, or no file of torch.save: copy it again"
        ) from None
    weights = content.get(EMA) if isinstance(content, dict) else None
    if not isinstance(weights, dict) or not all(isinstance(x, Tensor) for x in weights.values()):
        there = ", ".join(map(str, content)) if isinstance(content, dict) else type(content).__name__
        raise PublishedError(f"{path} has no {EMA} of tensors, only {there[:120] or 'nothing'}")
    try:
        images = int(content.get("cur_nimg", 0))
    except (TypeError, ValueError):
        images = 0
    return {str(name): value for name, value in weights.items()}, images


def _shortly(error: BaseException, limit: int = 160) -> str:
    text = (str(error) or type(error).__name__).splitlines()[0].split(". ")[0]
    return text if len(text) <= limit else text[: limit - 3] + "..."


def measure(directory: Path) -> Sizes:
    """Find the sizes of the network from the shapes in the first, second and last file.

    Raises:
        PublishedError: a file is missing or damaged, or a tensor that tells a size is.
    """
    files = stage_files(directory)
    first, layer, last = (read_stage(files[stage])[0] for stage in (0, 1, -1))
    if "head.weight" not in last:
        raise PublishedError(
            f"{files[-1]} has no head.weight: it is not the last stage, {file_name(len(files))} is missing"
        )
    width, inputs = _matrix(files[0], first, "proj.weight")
    hidden = _matrix(files[1], layer, "modulelist.0.3.w2.weight")[1]
    blocks = {int(name.split(".")[1]) for name in layer if re.match(r"modulelist\.\d+\.", name)}
    outputs = _matrix(files[-1], last, "head.weight")[0]
    sizes = Sizes(outputs, width, hidden, len(files) - 2, max(blocks) + 1)
    if inputs != sizes.in_channels:
        raise PublishedError(
            f"{files[0]}: proj.weight has {inputs} input channels; {file_name(len(files) - 1)} has {outputs} "
            f"outputs, which makes {sizes.in_channels}: are these files of one run?"
        )
    return sizes


def _matrix(path: Path, weights: dict[str, Tensor], name: str) -> tuple[int, int]:
    if name not in weights or weights[name].dim() != 2:
        raise PublishedError(f"{path} has no matrix {name}: it is not the file of its stage")
    rows, cols = weights[name].shape
    return rows, cols


def expected(sizes: Sizes, stage: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Map the names in the file of a stage to ours and the shape."""
    d, m = sizes.width, sizes.hidden
    vectors = 6
    if stage == 0:
        names, shapes = _EMBEDDING, {"proj.weight": (d, sizes.in_channels)}
    elif stage == sizes.layers + 1:
        names, vectors = _HEAD, 2
        shapes = {"head.weight": (sizes.channels, d)}
    else:
        names = {
            f"modulelist.{block}.{theirs}": f"layers.{stage - 1}.{block}.{ours}"
            for block in range(sizes.blocks)
            for theirs, ours in _BLOCK.items()
        }
        shapes = {}
    endings: dict[str, tuple[int, ...]] = {
        "to_qkv.weight": (3 * d, d),
        "wo.weight": (d, d),
        "w1.weight": (2 * m, d),
        "w2.weight": (d, m),
        "modulation.0.weight": (d, d),
        "modulation.2.weight": (vectors * d, d),
        "modulation.2.bias": (vectors * d,),
        "": (d,),  # norms and the other biases
    }
    return {
        theirs: (
            ours,
            shapes.get(theirs) or next(shape for end, shape in endings.items() if theirs.endswith(end)),
        )
        for theirs, ours in names.items()
    }


def stage_tensors(path: Path, sizes: Sizes, stage: int) -> tuple[dict[str, Tensor], list[str], int]:
    """Read a stage and account for every key.

    Returns:
        Its tensors by our names, mapped into memory; the keys that are left over; the images seen.

    Raises:
        PublishedError: the file is damaged; a tensor is missing, not expected, or of another shape.
    """
    weights, images = read_stage(path)
    wanted = expected(sizes, stage)
    left = [name for name in weights if _LEFTOVER.fullmatch(name)]
    missing = [name for name in wanted if name not in weights]
    foreign = [name for name in weights if name not in wanted and name not in left]
    for names, what in ((missing, "lacks"), (foreign, "has, beyond what the network needs,")):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise PublishedError(f"{path} {what} {names[0]}{more}: it is of another network or stage")
    for theirs, (_, shape) in wanted.items():
        found = tuple(weights[theirs].shape)
        if found != shape:
            raise PublishedError(f"{path}: {theirs} is {found}, the network's is {shape}")
        if not weights[theirs].is_floating_point():
            raise PublishedError(f"{path}: {theirs} is {weights[theirs].dtype}, not floating point")
    return {ours: weights[theirs] for theirs, (ours, _) in wanted.items()}, left, images


def stage_of(name: str, sizes: Sizes) -> int:
    """Return the stage whose file has the tensor of that name of ours."""
    first, _, rest = name.partition(".")
    if first == "layers":
        return int(rest.split(".")[0]) + 1
    return {"embed": 0, "head": sizes.layers + 1}[first]


def stages_of(names: Iterable[str], sizes: Sizes) -> list[int]:
    """Return the stages whose files have the tensors of these names, in order."""
    return sorted({stage_of(name, sizes) for name in names})


def tensors(directory: Path, sizes: Sizes, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """Give tensors by our names, file by file, in fp32 and mapped into memory where they are that already.

    Raises:
        PublishedError: a file is missing or damaged, or a weight is not a finite number.
    """
    wanted = set(names)
    for stage in stages_of(wanted, sizes):
        path = directory / file_name(stage)
        found, _, _ = stage_tensors(path, sizes, stage)
        theirs = {ours: name for name, (ours, _) in expected(sizes, stage).items()}
        for name, value in found.items():
            if name in wanted:
                value = value.float()
                if not bool(torch.isfinite(value.sum())):
                    raise PublishedError(f"{path}: {theirs[name]} is not finite: copy the file again")
                yield name, value


def load(directory: Path, sizes: Sizes, into: dict[str, Tensor]) -> None:
    """Fill tensors, by our names, from the files that have them; no other file is opened.

    Raises:
        PublishedError: see `tensors`.
    """
    for name, value in tensors(directory, sizes, into):
        into[name].copy_(value)
