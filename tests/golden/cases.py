"""What the official package and our model are compared on: models, grids, weights and inputs, all by formula.

Weights and inputs come from the bits of a counter-based generator whose key is a digest of their name. So two
models with equal names get equal weights, and a golden file holds outputs only. Needs NumPy alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Any

import numpy as np

Fields = dict[str, np.ndarray]
POINTS = 40
"""Points of a field that are stored, beside its mean and root mean square."""

SUNLIGHT = 1e-6
"""Difference of sunlight, which the package computes in float32, we in float64 from the same hour angle."""

ROUNDING = 1.5
"""In fewer bits than float64: our distance from the package over its own from its float64, at most.

Two roundings of one size are √2 apart on average. Greatest and root mean square of all stored values count.
"""

STATIC = ("lsm", "z", "slt")
ATMOS = ("z", "u", "v", "t", "q")
METEOROLOGY = ("2t", "10u", "10v", "msl")
POLLUTANTS = ("pm1", "pm2p5", "pm10", "tcco", "tc_no", "tcno2", "gtco3", "tcso2")
EMISSIONS = tuple(f"static_{gas}{kind}" for gas in ("ammonia", "co", "nox", "so2") for kind in ("", "_log"))
WAVES = ("swh", "mwd", "mwp", "pp1d", "shww", "mdww", "mpww", "shts", "mdts", "mpts")
WAVES += ("swh1", "mwd1", "mwp1", "swh2", "mwd2", "mwp2", "wind", "dwi")
DIRECTIONS = ("mwd", "mdww", "mdts", "mwd1", "mwd2", "dwi")
HEIGHTS = ("swh", "shww", "shts", "swh1", "swh2")
MASKS = ("lsm", "wmb", "lat_mask")
V1P5_INPUTS = METEOROLOGY + ("2d", "tcwv", "tcc", "100u", "100v", "sp", "lcc", "mcc", "hcc", "skt", "stl1")
V1P5_INPUTS += ("swvl1", "ci", "scaled_sd", "insolation")
V1P5_STATIC = ("lsm", "z", "anor", "isor", "cvh", "cl", "dl", "cvl", "slor")
V1P5_STATIC += tuple(f"slt_{i}" for i in range(8)) + ("sdfor", "sdor")
V1P5_STATIC += tuple(f"tvh_{i}" for i in (0, 18, 19, 3, 4, 5, 6))
V1P5_STATIC += tuple(f"tvl_{i}" for i in (0, 1, 10, 11, 13, 16, 17, 2, 7, 9))

NARROW: dict[str, Any] = {
    "embed_dim": 32, "num_heads": 2, "encoder_depths": (2, 2, 2), "encoder_num_heads": (2, 4, 8),
    "decoder_depths": (2, 2, 2), "decoder_num_heads": (8, 4, 2),
}  # fmt: skip
"""Constructor arguments that make every variant small."""


@dataclass(frozen=True)
class Case:
    """One comparison: a class of the package, made small, on a grid."""

    model: str
    """Name of the class."""
    rows: int
    cols: int
    levels: tuple[float, ...] = (300, 500, 850, 1000)
    steps: int = 3
    dtype: str = "float64"
    batch: int = 1
    history: int = 2
    changes: dict[str, Any] = field(default_factory=dict)
    """Constructor arguments beside NARROW; `timestep` is a timedelta, `surf_stats` a dict."""
    ours: dict[str, Any] = field(default_factory=dict)
    """Arguments that only our class has."""
    fine_lead_times: tuple[float, ...] = ()
    """Lead times inside a step of the roll-out."""
    lead_times: tuple[float, ...] = ()
    """Call the model once with these, one per sample, instead of rolling out."""
    regional: bool = False
    """A grid of its own with two-dimensional latitudes and longitudes, which does not go round the globe."""
    exact: str = ""
    """Of a case in fewer bits: the case that the package computed in float64, from the same input."""
    exact_at: tuple[int, ...] = (0, 1, 2)
    """Which predictions of that case, from zero, are those of this one."""
    surf: tuple[str, ...] = METEOROLOGY
    static: tuple[str, ...] = STATIC
    atmos: tuple[str, ...] = ATMOS

    def tolerance(self, prediction: int, rounding: float = 0.0) -> float:
        """Return the greatest difference in normalised units of the n-th prediction from zero.

        In float32 the first prediction has a bound of its own; those fed back, and all in bfloat16, have
        ROUNDING. In v1.5 sunlight is fed back, which the package has in float32.

        Args:
            prediction: n.
            rounding: How far the package's prediction is from its own of the case `exact`.
        """
        fed_back = prediction >= (len(self.fine_lead_times) or 1)
        if self.exact:
            return ROUNDING * rounding if fed_back or self.ours else 1e-5
        return SUNLIGHT if fed_back and "insolation" in self.surf else 1e-9

    @property
    def first_lead_times(self) -> tuple[float, ...]:
        """Lead times of one call of the model, for which gradients are compared; nothing if it takes none."""
        takes = self.model.startswith("AuroraV1p5")
        return self.lead_times or ((self.fine_lead_times or (6.0,))[0],) * self.batch if takes else ()

    @property
    def arguments(self) -> dict[str, Any]:
        """Constructor arguments that both classes take."""
        return NARROW | self.changes

    @property
    def times(self) -> tuple[datetime, ...]:
        """Time of the last history entry of every sample."""
        return tuple(datetime(2022, 5, 11, 6) + i * timedelta(days=101, hours=6) for i in range(self.batch))


def _variant(model: str, changes: dict[str, Any] | None = None, **others: Any) -> Case:
    """Make a case of a variant with variables of its own."""
    if model == "AuroraAirPollution":
        static, atmos = STATIC + EMISSIONS, ATMOS + ("co", "no", "no2", "go3", "so2")
        own = {"surf": METEOROLOGY + POLLUTANTS, "static": static, "atmos": atmos, "rows": 16, "cols": 27}
    elif model == "AuroraWave":
        static = STATIC + ("wmb", "lat_mask")
        own = {"surf": METEOROLOGY + WAVES, "static": static, "rows": 17, "cols": 32}
    else:
        changes = {"autocast": False} | (changes or {})
        own = {"surf": V1P5_INPUTS, "static": V1P5_STATIC, "rows": 17, "cols": 32}
    return Case(model, changes=changes or {}, **{"levels": (500, 850, 1000), **own, **others})


_LORA = Case("Aurora", 17, 32)
_PADDED = Case("AuroraPretrained", 33, 64, (500, 700, 850), changes={"patch_size": 2}, steps=2)
CASES: dict[str, Case] = {
    "lora": _LORA,
    "lora_fp32": Case("Aurora", 17, 32, dtype="float32", exact="lora"),
    "lora_from_second": Case("Aurora", 17, 32, changes={"lora_mode": "from_second", "lora_steps": 2}),
    "lora_all": Case("Aurora", 17, 32, changes={"lora_mode": "all", "lora_steps": 2}),
    "padded_windows": _PADDED,
    "padded_windows_fp32": replace(_PADDED, dtype="float32", exact="padded_windows"),
    "odd": Case("AuroraPretrained", 20, 36, batch=2, levels=(500, 700, 850), changes={"patch_size": 2}),
    "small_grid": Case("AuroraSmallPretrained", 12, 20, levels=(50, 500, 925)),
    "12h": Case("Aurora12hPretrained", 17, 32),
    "high_res": Case(
        "AuroraHighRes", 41, 80, levels=(500, 700, 850), changes={"surf_stats": {"z": (-3270.407, 65403.35)}}
    ),
    "stabilised": Case(
        "AuroraPretrained", 17, 32, changes={"stabilise_level_agg": True, "enc_depth": 2, "dec_depth": 2}
    ),
    "one_time": Case("AuroraPretrained", 17, 32, history=1, steps=1),
    "long_history": Case("AuroraPretrained", 17, 32, changes={"max_history_size": 3}),
    "regional": Case("AuroraPretrained", 28, 64, regional=True, steps=2),
    "bf16_backbone": Case(
        "AuroraPretrained", 17, 32, steps=1, dtype="float32", changes={"autocast": True},
        ours={"autocast_parts": ("backbone",)},
        exact="lora_from_second", exact_at=(0,),  # its first step has no adapter
    ),
    "air_pollution": _variant("AuroraAirPollution"),
    "air_pollution_fp32": _variant("AuroraAirPollution", dtype="float32", exact="air_pollution"),
    "wave": _variant("AuroraWave"),
    "wave_fp32": _variant("AuroraWave", dtype="float32", exact="wave"),
    "v1p5": _variant("AuroraV1p5", steps=2, fine_lead_times=(1.0, 6.0)),
    "v1p5_fp32": _variant(
        "AuroraV1p5", steps=2, dtype="float32", exact="v1p5", exact_at=(1, 3)
    ),
    "v1p5_lead_times": _variant("AuroraV1p5", batch=2, lead_times=(2.0, 5.5)),
    "v1p5_ensemble": _variant("AuroraV1p5Ensemble", steps=2, fine_lead_times=(3.0, 6.0)),
    "v1p5_ensemble_odd": _variant(
        "AuroraV1p5Ensemble", {"patch_size": 2}, rows=20, cols=36, steps=1, batch=2
    ),
}  # fmt: skip


def uniform(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Return uniform numbers of mean 0 and variance 1, float64, that depend on the name only."""
    key = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=16).digest(), "little")
    bits = np.random.Philox(key=key).random_raw(int(np.prod(shape, dtype=int)))
    return ((bits >> np.uint64(11)) * 2.0**-53 - 0.5).reshape(shape) * 12**0.5


def weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Return a parameter: matrices that keep the size of what they map, norms near 1, others small."""
    x = uniform(name, shape)
    if name.endswith("ln_modulation.1.weight"):  # zero in a new model, which makes blocks the identity
        return 0.2 * x / shape[1] ** 0.5
    if name.endswith("ln_modulation.1.bias"):
        return 0.3 * x
    if len(shape) == 1:
        return 1 + 0.1 * x if name.endswith(".weight") else 0.1 * x
    if "_mod." in name:  # or the fields of air pollution grow with every step
        return 0.1 * x / shape[-1] ** 0.5
    if ".weights." in name:  # patch embedding of one variable among several
        return 0.3 * x / np.prod(shape[1:]) ** 0.5
    return x / shape[-1] ** 0.5


def noise() -> Callable[..., np.ndarray]:
    """Return a stand-in for the noise of a stochastic model: the n-th call gives the n-th numbers."""
    calls = iter(range(1_000))
    return lambda shape: uniform(f"noise {next(calls)}", tuple(shape))


def grid(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """Return latitudes and longitudes: rows with both poles if odd in number, else between the poles."""
    n = case.rows
    lat = np.linspace(90, -90, n) if n % 2 else 90 - (np.arange(n) + 0.5) * 180 / n
    lon = np.arange(case.cols) * 360 / case.cols
    if not case.regional:
        return lat, lon
    lat, lon = 20 + lat[:, None] / 3, 10 + lon[None] / 4
    return lat + np.sin(lon / 30), lon + 3 * np.cos(lat / 40)


def inputs(case: Case, location: dict[str, float], scale: dict[str, float]) -> tuple[Fields, Fields, Fields]:
    """Return surface [B, T, H, W], static [H, W] and atmospheric [B, T, C, H, W] fields, physical units.

    `location` and `scale` are those of the normalisation, by name and, on levels, "name_level".
    """
    shape, (b, t) = (case.rows, case.cols), (case.batch, case.history)
    static = {k: _physical(k, uniform(f"static {k}", shape), location, scale) for k in case.static}
    surf = {k: _physical(k, uniform(k, (b, t, *shape)), location, scale) for k in case.surf}
    atmos = {}
    for k in case.atmos:
        levels = [uniform(f"{k}_{p}", (b, t, *shape)) for p in case.levels]
        atmos[k] = np.stack(
            [_physical(f"{k}_{p}", x, location, scale) for p, x in zip(case.levels, levels)], axis=2
        )
    if "wmb" in static:  # no waves on land; and no swell has no period (the package forgets to say so)
        surf |= {k: np.where(static["wmb"] > 0, surf[k], np.nan) for k in WAVES}
        surf["mpts"] = np.where(surf["shts"] < 1e-4, np.nan, surf["mpts"])
    return surf, static, atmos


def _physical(name: str, x: np.ndarray, location: dict[str, float], scale: dict[str, float]) -> np.ndarray:
    """Give numbers of variance 1 the units of a variable, and a range that it can have."""
    if name in MASKS:
        return (x > -0.5).astype(float)
    if name in DIRECTIONS:
        return 180 + 103 * x
    if name == "insolation":
        return x / 3
    y = location[name] + scale[name] * x
    if name.startswith("scaled_"):
        return 1e-3 * np.expm1(abs(y))
    if name in HEIGHTS:
        return y.clip(0)
    return abs(y) + 0.5 if name in WAVES else y


def _normalised(name: str, x: np.ndarray, location: dict[str, float], scale: dict[str, float]) -> np.ndarray:
    """Bring a predicted field to variance near 1; a direction to one number without a jump at north."""
    if name in DIRECTIONS:
        return np.cos(np.deg2rad(x) - 1)
    if name.startswith("scaled_"):
        return np.arcsinh(x / 1e-3) / scale[name]  # a logarithm that may be asked just below zero
    return (x - location[name]) / scale[name]


def summarise(prediction: Any, location: dict[str, float], scale: dict[str, float]) -> dict[str, np.ndarray]:
    """Return POINTS values, mean and root mean square of every field of a Batch, ours or the package's."""
    fields = {k: v.double().numpy()[:, 0] for k, v in prediction.surf_vars.items()}
    for k, v in prediction.atmos_vars.items():
        for i, level in enumerate(prediction.metadata.atmos_levels):
            fields[f"{k}_{level}"] = v.double().numpy()[:, 0, i]
    found = {}
    for name, x in sorted(fields.items()):
        y = _normalised(name, x, location, scale).ravel()
        at = (uniform(f"points {name}", (POINTS,)) / 12**0.5 + 0.5) * y.size
        found[name] = np.array([*y[at.astype(int)], np.nanmean(y), np.nanmean(y**2) ** 0.5])
    return found


def loss(prediction: Any, location: dict[str, float], scale: dict[str, float]) -> Any:
    """Return a number that hangs on every predicted value, to take the gradient of; a Batch holds tensors."""
    fields = {k: v[:, 0] for k, v in prediction.surf_vars.items()}
    for k, v in prediction.atmos_vars.items():
        fields |= {f"{k}_{p}": v[:, 0, i] for i, p in enumerate(prediction.metadata.atmos_levels)}
    sizes = [((x - location[k]) / scale[k]).asinh() for k, x in sorted(fields.items())]
    return sum(x[x == x].mean() for x in sizes)  # without those that are not a number


def digest(name: str, gradient: np.ndarray) -> tuple[float, float]:
    """Return the size of a parameter's gradient, and its product with numbers of the parameter's name."""
    product = (gradient * uniform(f"gradient {name}", gradient.shape)).sum()
    return float(np.linalg.norm(gradient)), float(product)
