"""What comes with published weights: the configuration of their run, and the files of its statistics.

The configuration is the authors' (`.hydra/config.yaml`), or the same names in JSON. What the weights tell
themselves is taken from them and compared. The form of both: docs/forecasting.md.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from aeris.data.standards import Standards, check_standards
from aeris.data.statistics import Statistics
from aeris.data.variables import Channel, aeris_channels, channel, channel_of, in_order
from aeris.model.published import Sizes

# Choices of the network that are known; a configuration that says otherwise is of another network.
KNOWN: dict[str, Any] = {
    "model.diffusion": True,
    "model.norm": "pre",
    "model.patch_size": [1, 1],
    "model.sinusoidal_emb_max_period": 10_000,
    "model.learned_emb": False,
    "model.layerwise_t_emb": True,
    "model.layerwise_t_emb_after_mod_norm": True,
    "model.modulation_scale": 1,
    "model.head_nomod": False,
    "model.simple_mod": False,
    "model.fully_layerwise_mod": False,
    "model.rit": False,
}
FORCING_NAMES = {
    "toa_incident_solar_radiation": "solar",
    "geopotential_at_surface": "orography",
    "land_sea_mask": "land_sea_mask",
}
HOUR_S = 3600
SEA_ICE_K = 271.46
"""ERA5's sea surface temperature under ice, the smallest there is."""


@dataclass(frozen=True)
class Settings:
    """What a configuration says; None: it does not say."""

    channels: tuple[str, ...] | None
    """Names of ours, in order."""
    interval_h: int
    window: int
    head_dim: int
    sigma_min: float
    sigma_max: float
    sigma_data: float
    sizes: dict[str, int]
    """Sizes that the weights tell too: `width`, `hidden`, `layers`, `blocks`."""


def read_settings(path: Path) -> Settings:
    """Read a configuration.

    Raises:
        ValueError: it cannot be read, a number is missing or cannot be, or it is of another network.
    """
    values = _parse(path)

    def get(name: str) -> Any:
        found: Any = values
        for key in name.split("."):
            found = found.get(key) if isinstance(found, dict) else None
        return found

    for name, known in KNOWN.items():
        if get(name) is not None and get(name) != known:
            raise ValueError(
                f"{path}: {name} is {get(name)}; only weights with {known} are known to this reader"
            )

    def number(name: str, default: float | None = None) -> float:
        found = default if get(name) is None else get(name)
        if isinstance(found, bool) or not isinstance(found, (int, float)) or not found > 0:
            raise ValueError(f"{path}: {name} is {found}; a positive number is needed")
        return float(found)

    def whole(name: str, default: float | None = None) -> int:
        found = number(name, default)
        if found != int(found):
            raise ValueError(f"{path}: {name} is {found}; a whole number is needed")
        return int(found)

    window = get("model.window_size")
    if not (isinstance(window, list) and len(window) == 2 and window[0] == window[1]):
        raise ValueError(
            f"{path}: model.window_size is {window}; two equal numbers are needed, such as [30, 30]"
        )
    claims = {"width": "dim", "hidden": "mlp_dim", "blocks": "sublayers"}
    sizes = {ours: whole(f"model.{key}") for ours, key in claims.items() if get(f"model.{key}") is not None}
    if get("model.PP_stages") is not None:
        sizes["layers"] = whole("model.PP_stages") - 2
    settings = Settings(
        channels=_channels(path, get("data.dataset.variables")),
        interval_h=whole("model.interval"),
        window=int(window[0]),
        head_dim=whole("model.head_dim", 128),
        sigma_min=number("model.sigma_min"),
        sigma_max=number("model.sigma_max"),
        sigma_data=number("model.sigma_data", 1.0),
        sizes=sizes,
    )
    if settings.sigma_min >= settings.sigma_max:
        raise ValueError(f"{path}: model.sigma_min {settings.sigma_min:g} is not below model.sigma_max")
    return settings


def _parse(path: Path) -> dict[str, Any]:
    """Read YAML or JSON without executing anything."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"the configuration {path} cannot be read ({error})") from None
    try:
        if path.suffix == ".json":
            values = json.loads(text)
        else:
            values = importlib.import_module("yaml").safe_load(text)
    except ImportError:
        raise ValueError(
            f"{path} is YAML: pip install pyyaml, or write the same names as a .json file"
        ) from None
    except Exception as error:  # of either parser
        raise ValueError(
            f"{path} is not {'JSON' if path.suffix == '.json' else 'YAML'}: {_line(error)}"
        ) from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds no settings, but {type(values).__name__}")
    return values


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:160]


def _channels(path: Path, variables: Any) -> tuple[str, ...] | None:
    """Turn their list of variables into our channels; forcings behind them are known anyway."""
    if variables is None:
        return None
    if not isinstance(variables, list) or not all(isinstance(name, str) for name in variables):
        raise ValueError(f"{path}: data.dataset.variables is no list of names")
    try:
        channels = [named(name) for name in variables if name not in FORCING_NAMES]
    except ValueError as error:
        raise ValueError(f"{path}: data.dataset.variables: {error}") from None
    names = tuple(one.name for one in channels)
    ordered = tuple(one.name for one in in_order(channels))
    if names != ordered:
        first = next(i for i, (is_, should) in enumerate(zip(names, ordered)) if is_ != should)
        raise ValueError(
            f"{path}: data.dataset.variables has {names[first]} where a store has {ordered[first]}; inputs "
            "are encoded by their place, so the order cannot be changed"
        )
    return names


def named(name: str) -> Channel:
    """Return the channel of one of their names, such as `2m_temperature` or `geopotential_500`.

    Raises:
        ValueError: there is none.
    """
    variable, _, level = name.rpartition("_")
    for candidate in ((variable, float(level)),) if variable and level.isdigit() else ():
        return channel_of(*candidate)
    return channel_of(name, None)


def choose_channels(settings: Settings, sizes: Sizes, where: Path) -> tuple[str, ...]:
    """Return the channels of the state: those of the configuration, or the published ones.

    Raises:
        ValueError: they are not as many as the weights'.
    """
    names = settings.channels or aeris_channels(sst=settings.interval_h == 24)
    if len(names) != sizes.channels:
        raise ValueError(
            f"{where} is of a {settings.interval_h}-hourly model of {len(names)} variables, "
            f"{2 * len(names) + 4} inputs; the weights are of {sizes.channels}, {sizes.in_channels} inputs: "
            "take the configuration they came with"
        )
    return names


def read_numbers(
    directory: Path, names: Sequence[str], interval_h: int, period: tuple[np.datetime64, np.datetime64]
) -> Standards:
    """Read `normalize_{mean,std}.npz` and `normalize_diff_{mean,std}_<hours>.npz`, keyed by variable.

    Sunshine is ERA5's energy of an hour there, J m-2; means in W m-2 are taken for what they are.

    Raises:
        ValueError: a file or a variable is missing, or a number cannot be.
    """
    spelled: list[tuple[str, ...]] = [_spellings(channel(name)) for name in names]
    forcings: list[tuple[str, ...]] = [(name,) for name in FORCING_NAMES]
    mean, std = (_read(directory / f"normalize_{what}.npz", spelled + forcings) for what in ("mean", "std"))
    change = [
        _read(directory / f"normalize_diff_{what}_{interval_h}.npz", spelled) for what in ("mean", "std")
    ]
    count = len(names)
    forcing = dict(zip(FORCING_NAMES.values(), zip(mean[count:].tolist(), std[count:].tolist())))
    forcing["solar"] = _watts(directory, *forcing["solar"])
    standards = Standards(
        tuple(names),
        Statistics(mean[:count], std[:count], {interval_h: change[0]}, {interval_h: change[1]}, period),
        forcing,
        {"sst": SEA_ICE_K} if "sst" in names else {},
    )
    try:
        check_standards(standards)
    except ValueError as error:
        raise ValueError(f"{directory}: {error}") from None
    return standards


def _spellings(one: Channel) -> tuple[str, ...]:
    """Return the names a channel may have in a file: the variable's, with its level, or our short one."""
    level = "" if one.level_hpa is None else f"_{one.level_hpa:g}"
    return one.variable + level, one.name


def _read(path: Path, spelled: Sequence[tuple[str, ...]]) -> Any:
    """Return one number for each name: float64 [n]."""
    try:
        with np.load(path, allow_pickle=False) as file:
            keys = [next((name for name in names if name in file), None) for names in spelled]
            missing = [names[0] for names, key in zip(spelled, keys) if key is None]
            if missing:
                raise ValueError(f"lacks {len(missing)} of {len(spelled)} variables, such as {missing[0]}")
            values = [np.asarray(file[key], dtype=np.float64).reshape(-1) for key in keys if key]
        wrong = [names[0] for names, value in zip(spelled, values) if value.size != 1]
        if wrong:
            raise ValueError(f"has not one number for {wrong[0]}")
    except FileNotFoundError:
        raise ValueError(f"{path} is missing: it comes with the weights' training data") from None
    except Exception as error:  # of a damaged archive, nearly anything
        raise ValueError(f"{path}: {_line(error)}") from None
    return np.concatenate(values)


def _watts(directory: Path, mean: float, std: float) -> tuple[float, float]:
    """Return the numbers of sunshine in W m-2; the mean over the globe is a quarter of 1361 W m-2."""
    for unit_s in (HOUR_S, 1):
        if 200 < mean / unit_s < 500:
            return mean / unit_s, std / unit_s
    raise ValueError(
        f"{directory / 'normalize_mean.npz'}: the mean of toa_incident_solar_radiation is {mean:g}; about "
        "1.2e6 J m-2 in an hour is expected"
    )
