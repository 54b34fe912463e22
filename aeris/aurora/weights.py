"""Reads checkpoints, published ones and our own, into a model, or says precisely why not.

A checkpoint is a dict of tensors, saved by `torch.save`. It is read without running anything it contains.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from aeris.aurora.checkpoint_formats import State
from aeris.aurora.checkpoint_formats import adapt as adapt
from aeris.aurora.config import AuroraConfig, Published

# What may differ without strictness: adapters, variables, stabilised level aggregation.
OPTIONAL = re.compile(
    r"\.lora_(qkv|proj)\.|^encoder\.(surf|atmos)_token_embeds\.|^decoder\.(surf|atmos)_heads\.|"
    r"^decoder\.level_decoder_alternate\.|^(surf|atmos)_feature_combiner\.|\.level_agg\..*\.ln_[kq]\."
)
# Width, patch and blocks of the U-Net's encoder layers, by name in aeris/aurora/variants.py.
SIZES: dict[tuple[int, int, tuple[int, ...]], str] = {
    (512, 4, (6, 10, 8)): "pretrained",
    (256, 4, (2, 6, 2)): "small",
    (512, 10, (6, 8, 8)): "high-res",
    (64, 4, (2, 2, 2)): "tiny",
}


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged, unsafe, or of another model."""


@dataclass(frozen=True)
class Differences:
    """In what a checkpoint and a model differ."""

    missing: tuple[str, ...]
    """Weights of the model that the checkpoint lacks."""
    unexpected: tuple[str, ...]
    """Weights of the checkpoint that the model has no place for."""
    shapes: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...]
    """(name, shape in the checkpoint, shape in the model)."""

    def __bool__(self) -> bool:
        """Tell whether there is any."""
        return bool(self.missing or self.unexpected or self.shapes)

    @property
    def optional(self) -> bool:
        """Whether all of it is adapters, variables and stabilisation, and every shared weight fits."""
        return not self.shapes and all(OPTIONAL.search(name) for name in (*self.missing, *self.unexpected))

    def __str__(self) -> str:
        """List them, the first few of each kind by name."""
        shapes = [f"{name} {there} instead of {here}" for name, there, here in self.shapes]
        parts = [
            _list("it lacks", self.missing),
            _list("the model has no place for", self.unexpected),
            _list("other shapes:", shapes),
        ]
        return "; ".join(part for part in parts if part)


def _list(title: str, names: Iterable[str], most: int = 8) -> str:
    names = list(names)
    if not names:
        return ""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{title} {len(names)} weight{'s' * (len(names) > 1)}: {', '.join(names[:most])}{more}"


@dataclass(frozen=True)
class Loaded:
    """What loading did."""

    initial: tuple[str, ...]
    """Weights of the model that the checkpoint lacks: they keep the values they had."""
    unused: tuple[str, ...]
    """Weights of the checkpoint that the model has no place for."""

    def __str__(self) -> str:
        """Say it in a line; empty if everything fitted."""
        return "; ".join(
            filter(None, (_list("kept as they were:", self.initial), _list("unused:", self.unused)))
        )


def read_checkpoint(path: str | Path) -> State:
    """Read the tensors of a checkpoint into memory as they are needed, on the CPU.

    Raises:
        CheckpointError: there is no such file; it is damaged, cut off, or no dict of tensors; or it contains
            more than tensors and could run code.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint {path}")
    with path.open("rb") as file:
        head = file.read(64)
    if head.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{path} is a pointer of Git LFS, not the weights: run git lfs pull")
    try:
        # Files of torch before 1.6 are no archives and cannot be mapped into memory.
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=head.startswith(b"PK"))
    except pickle.UnpicklingError as error:
        # Of torch's words only a name is passed on: they say how to read such files nevertheless.
        if asks := _asks_for(str(error)):
            raise CheckpointError(
                f"{path} seems to be a pickle of objects: reading it would call {asks}, so it could run code "
                f"and was not read; save it as torch.save(model.state_dict(), path)"
            ) from None
        raise CheckpointError(_damaged(path, head)) from None
    except (RuntimeError, OSError, EOFError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{_damaged(path, head)} ({_first_line(error)})") from None
    if not isinstance(state, dict) or not state:
        raise CheckpointError(f"{path} holds a {type(state).__name__}, no dict of tensors")
    strange = [
        str(name) for name, x in state.items() if not isinstance(name, str) or not isinstance(x, Tensor)
    ]
    if strange:
        raise CheckpointError(
            f"{path} is no plain dict of tensors, it also holds {', '.join(strange[:8])}: "
            f"save the state_dict alone"
        )
    return state


def _asks_for(message: str) -> str:
    """Return what a pickle that torch refused wants to call; "" if it was refused for another reason."""
    named = re.search(r"GLOBAL ([\w.]+)", message)
    if named:
        return named.group(1)
    return "a function" if "Unsupported global" in message or "Unsupported class" in message else ""


# What a file begins with -> what it seems to be.
BEGINNINGS: dict[bytes, str] = {
    b"PK": "an archive of torch.save",
    b"\x80": "a pickle",
    b"\x89HDF": "HDF5 or NetCDF-4",
    b"CDF": "NetCDF",
    b"<": "a web page",
    b"\x1f\x8b": "packed by gzip",
}


def _damaged(path: Path, head: bytes) -> str:
    seems = next((kind for begin, kind in BEGINNINGS.items() if head.lstrip().startswith(begin)), "")
    if head[8:10] == b'{"':
        seems = "safetensors"
    seems = f"seems to be {seems}" if seems else "is of an unknown kind" if head else "is empty"
    size = path.stat().st_size
    return f"{path} ({size:,} bytes) is no checkpoint, or cut off: it {seems}; copy it again"


def _first_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:200] if lines else ''}"


def compare(model: nn.Module, state: Mapping[str, Tensor]) -> Differences:
    """Compare names and shapes of a model's weights with those of an adapted checkpoint."""
    own = model.state_dict()
    return Differences(
        missing=tuple(name for name in own if name not in state),
        unexpected=tuple(name for name in state if name not in own),
        shapes=tuple(
            (name, tuple(x.shape), tuple(own[name].shape))
            for name, x in state.items()
            if name in own and x.shape != own[name].shape
        ),
    )


def load(model: nn.Module, path: str | Path, strict: bool = True) -> Loaded:
    """Load a checkpoint into a model that has a `config`; a model on "meta" gets its tensors on the CPU.

    Args:
        model: an Aurora.
        path: a published checkpoint or one of ours.
        strict: refuse any difference. Otherwise adapters, variables and stabilisation may differ.

    Returns:
        What kept its initial value and what was not used; nothing, if strict.

    Raises:
        CheckpointError: see `read_checkpoint`; or the weights do not fit: names them and their variant.
    """
    raw = read_checkpoint(path)
    config = model.config
    assert isinstance(config, AuroraConfig)
    try:
        state = adapt(config, raw)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None
    differences = compare(model, state)
    if differences and (strict or not differences.optional):
        raise CheckpointError(
            f"{path} does not fit the model: {differences}{_advice(raw, differences, strict)}"
        )
    return load_state(model, state, differences)


def load_state(model: nn.Module, state: Mapping[str, Tensor], differences: Differences) -> Loaded:
    """Copy the weights that a model and an adapted checkpoint share.

    Args:
        model: its other weights stay as they are.
        state: the checkpoint.
        differences: between the two, without shapes.

    Raises:
        CheckpointError: the model is on "meta" and some of its weights are not in the checkpoint.
    """
    own = model.state_dict()
    meta = any(x.is_meta for x in own.values())
    if meta and differences.missing:
        raise CheckpointError(
            f"the model is on the device meta and has no initial values; "
            f"{_list('the checkpoint lacks', differences.missing)}"
        )
    shared = {name: x for name, x in state.items() if name in own}
    if meta:  # copies, as what was read still lies in the file
        shared = {name: x.to(own[name].dtype, copy=True) for name, x in shared.items()}
    model.load_state_dict(shared, strict=False, assign=meta)
    return Loaded(differences.missing, differences.unexpected)


def _advice(raw: Mapping[str, Tensor], differences: Differences, strict: bool) -> str:
    name = identify(raw)
    adapters = "with" if has_lora(raw) else "without"
    looks = f". It looks like the variant {name!r} {adapters} LoRA" if name else ""
    if strict and differences.optional:
        return f"{looks}. strict=False would load the rest"
    return looks


def has_lora(state: Mapping[str, Tensor]) -> bool:
    """Tell whether a checkpoint has adapters."""
    return any(".lora_" in name for name in state)


def identify(state: Mapping[str, Tensor]) -> str:
    """Guess the variant of a checkpoint, adapted or not: a name of `variants.VARIANTS`, or "" if none fits.

    The 6 h and 12 h pretrained models have the same weights by name and shape; both are "pretrained".
    """
    names = {name.removeprefix("net."): x for name, x in state.items()}
    text = "\n".join(names)
    if "feature_combiner" in text or "level_decoder_alternate" in text or "level_decoder_new" in text:
        return "air-pollution"
    if "swh_density" in text:
        return "wave"
    if "backbone.noise_mlp." in text:
        return "v1.5-ensemble"
    fused = names.get("encoder.surf_token_embeds.weight")
    if "token_embeds.weights.insolation" in text or (fused is not None and fused.shape[1] == 62):
        return "v1.5"
    embedding = fused if fused is not None else names.get("encoder.surf_token_embeds.weights.2t")
    if embedding is None:
        return ""
    block = re.compile(r"backbone\.encoder_layers\.(\d+)\.blocks\.(\d+)\.")
    depths: dict[int, int] = {}
    for layer, index in (match.groups() for name in names if (match := block.match(name))):
        depths[int(layer)] = max(depths.get(int(layer), 0), int(index) + 1)
    size = (embedding.shape[0], embedding.shape[-1], tuple(depths[layer] for layer in sorted(depths)))
    name = SIZES.get(size, "")
    return "aurora" if name == "pretrained" and has_lora(state) else name


def download(
    published: Published | None,
    repo: str | None = None,
    name: str | None = None,
    revision: str | None = None,
) -> Path:
    """Download a checkpoint from the Hugging Face hub, unless it is in the hub's cache already.

    Args:
        published: where the variant's own checkpoint lies; None if it has none.
        repo: another repository, "user/name".
        name: another file in it.
        revision: another commit.

    Returns:
        The file in the cache.

    Raises:
        CheckpointError: the package for it is missing, there is nothing to download, or the hub says no.
    """
    if published is None and (repo is None or name is None):
        raise CheckpointError("this variant has no published checkpoint: give repo and name, or load a file")
    try:
        from huggingface_hub import hf_hub_download
    except ImportError:
        raise CheckpointError(
            "downloading weights needs huggingface-hub: pip install 'aeris-swipe[hub]', "
            "or download the file yourself"
        ) from None
    where = published or Published(name=name or "", revision="main", repo=repo or "")
    # A file of another repository has another history.
    default = where.revision if repo in (None, where.repo) else "main"
    arguments = {
        "repo_id": repo or where.repo,
        "filename": name or where.name,
        "revision": revision or default,
    }
    try:
        return Path(hf_hub_download(**arguments))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            "the hub did not give {filename} of {repo_id} at {revision}: ".format(**arguments)
            + _first_line(error)
        ) from None
