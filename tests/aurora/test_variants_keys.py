"""Every variant has the published names, shapes and number of weights; built without memory for them."""

from __future__ import annotations

import hashlib

import pytest
import torch

from aeris.aurora.config import AuroraConfig
from aeris.aurora.model import Aurora, AuroraSmall, AuroraSmallPretrained
from aeris.aurora.variants import VARIANTS

# Variant, LoRA: weights in all, in encoder, backbone and decoder; keys; SHA-256 of the lines "<key> <shape>",
# sorted by key. Read off microsoft-aurora 2.0.1.
PUBLISHED = {
    ("aurora", True): (
        (1259150992, 6764032, 1242793984, 9592976, 860),
        "ba7c9bf11d106e870be83ddfd0ecd047cf101bffa67431bf15123e4686f1e958",
    ),
    ("pretrained", False): (
        (1256300176, 6764032, 1239943168, 9592976, 668),
        "232a5f5f789253ea02001183d9ef50bdae32b7d417f31defd3d16610adc08330",
    ),
    ("small", False): (
        (112797584, 1743616, 108616704, 2437264, 332),
        "65106888821f64a067f16f0c0e6088f28c1c39b1058c64c203ac44a50cfee0a5",
    ),
    ("small", True): (
        (113338256, 1743616, 109157376, 2437264, 412),
        "abb17de15f65a788501d6138e389da8e0fba6a97d2f0d10aa57bbfaf3d495080",
    ),
    ("12h", False): (
        (1256300176, 6764032, 1239943168, 9592976, 668),
        "232a5f5f789253ea02001183d9ef50bdae32b7d417f31defd3d16610adc08330",
    ),
    ("high-res", True): (
        (1201987972, 7796224, 1183823872, 10367876, 796),
        "d1365ad27d95f934255013566ebfb0b4038e7bb28e688640075d72ba31150ed2",
    ),
    ("air-pollution", True): (
        (1272694198, 10075648, 1242793984, 19824527, 1689),
        "e8b545f440acebfbbe949049a10f2a7353f4d336400016a43404dad20a4e5c89",
    ),
    ("wave", True): (
        (1260595520, 7503360, 1242793984, 10298176, 995),
        "d80d79e4cc82c3c2d5c1d23ccff41642bdf200731921497e79cfbc2a10bc31f7",
    ),
    ("v1.5", False): (
        (1257562096, 7665152, 1239943168, 9953776, 767),
        "97be559da459cff57942244700bd8ade8b434d24438f398816e211b9a7ef5c38",
    ),
    ("v1.5-ensemble", False): (
        (1260184560, 7665152, 1242565632, 9953776, 773),
        "a1ea15d514bc8a42cf319c9eb1e90686cdf838abf7e5a24deb44b4f8c5d080a1",
    ),
}
CHECKPOINTS = {
    "aurora": "aurora-0.25-finetuned",
    "pretrained": "aurora-0.25-pretrained",
    "small": "aurora-0.25-small-pretrained",
    "12h": "aurora-0.25-12h-pretrained",
    "high-res": "aurora-0.1-finetuned",
    "air-pollution": "aurora-0.4-air-pollution",
    "wave": "aurora-0.25-wave",
    "v1.5": "aurora-0.25-v1.5",
    "v1.5-ensemble": "aurora-0.25-v1.5-ensemble",
}


@pytest.mark.parametrize(("name", "adapters"), PUBLISHED)
def test_names_shapes_and_counts_are_the_published_ones(name: str, adapters: bool) -> None:
    cls = VARIANTS[name]
    with torch.device("meta"):
        model = cls(use_lora=adapters)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert not list(model.buffers())
    parts = (model, model.encoder, model.backbone, model.decoder)
    counts = [sum(p.numel() for p in part.parameters()) for part in parts]
    state = model.state_dict()
    lines = [f"{key} {tuple(state[key].shape)}" for key in sorted(state)]
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    assert ((*counts, len(state)), digest) == PUBLISHED[name, adapters]
    if name != "small":
        assert cls.default.use_lora == adapters


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_checkpoints(name: str) -> None:
    published = VARIANTS[name].published
    assert published is not None
    assert published.name == f"{CHECKPOINTS[name]}.ckpt"
    assert len(published.revision) == 40
    assert published.repo == "microsoft/aurora"


def test_variables_of_a_kind_are_sorted() -> None:
    # The order of parameters is an optimizer's order of states.
    model = VARIANTS["small"](embed_dim=64, encoder_depths=(1, 1, 1), decoder_depths=(1, 1, 1))
    keys = [key for key in model.state_dict() if key.startswith("encoder.surf_token_embeds.weights.")]
    assert [key.split(".")[-1] for key in keys] == ["10u", "10v", "2t", "lsm", "msl", "slt", "z"]


def test_all_variants_are_there_and_a_wrong_name_says_which() -> None:
    assert set(VARIANTS) == {name for name, _ in PUBLISHED} | {"tiny"}
    assert len(VARIANTS) == 10
    assert VARIANTS["aurora"] is Aurora
    assert AuroraSmall is AuroraSmallPretrained
    assert VARIANTS["tiny"].published is None
    assert all(isinstance(cls.default, AuroraConfig) for cls in VARIANTS.values())
    with pytest.raises(KeyError, match="tiny"):
        VARIANTS["1.3B"]
