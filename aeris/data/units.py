"""Units of source variables, and what turns them into ours."""

from __future__ import annotations

GRAVITY_M_S2 = 9.80665  # standard gravity, ISO 80000-3; turns geopotential height into geopotential

_SPELLINGS = {
    "m2 s-2": ("m2/s2", "m2s-2", "j kg-1", "j/kg"),
    "m s-1": ("m/s", "ms-1", "meter second-1", "metre second-1"),
    "K": ("k", "kelvin", "degk"),
    "degC": ("degc", "c", "celsius", "degree_celsius", "degrees_celsius"),
    "Pa": ("pa", "pascal", "pascals"),
    "hPa": ("hpa", "mbar", "mb", "millibar", "millibars"),
    "Pa s-1": ("pa s-1", "pa/s"),
    "kg kg-1": ("kg/kg", "kgkg-1"),
    "g kg-1": ("g/kg",),
    "kg m-2": ("kg/m2",),
    "1": ("1", "", "(0 - 1)", "0-1", "0 - 1", "-", "~", "dimensionless", "fraction", "proportion"),
    "%": ("%", "percent"),
    "m": ("gpm", "meter", "metre", "meters", "metres"),
    "mm": ("mm",),
}
_MEANING = {spelled: unit for unit, spellings in _SPELLINGS.items() for spelled in (unit.lower(), *spellings)}

# (from, to) -> factor, offset
_CONVERSIONS = {
    ("hPa", "Pa"): (100.0, 0.0),
    ("Pa", "hPa"): (0.01, 0.0),
    ("%", "1"): (0.01, 0.0),
    ("g kg-1", "kg kg-1"): (1e-3, 0.0),
    ("1", "kg kg-1"): (1.0, 0.0),
    ("m", "m2 s-2"): (GRAVITY_M_S2, 0.0),
    ("degC", "K"): (1.0, 273.15),
    ("mm", "m"): (1e-3, 0.0),
    ("kg m-2", "m"): (1e-3, 0.0),
}


def conversion(given: str, wanted: str) -> tuple[float, float]:
    """Return (factor, offset) such that given * factor + offset is in the unit `wanted`.

    Raises:
        ValueError: the unit is not known or does not fit; names both.
    """
    unit = _MEANING.get(" ".join(given.replace("**", "").replace("^", "").lower().split()))
    if unit == wanted:
        return 1.0, 0.0
    if unit is None or (unit, wanted) not in _CONVERSIONS:
        raise ValueError(f"the unit {given!r} cannot be turned into {wanted!r}")
    return _CONVERSIONS[unit, wanted]


def alternatives(wanted: str) -> list[str]:
    """Return the other units that can be turned into `wanted`."""
    return [given for given, to in _CONVERSIONS if to == wanted]
