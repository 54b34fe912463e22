"""Whether a long forecast stays within stated bounds, and which members leave the climate for good.

A single time says little of a long forecast, so every quantity is averaged over blocks of ten days of lead
time first; the worst block is held against the bound. Mean drift is the difference of the area means of
forecast and truth over the climatological standard deviation at a point; the other quantities are ratios of
forecast to truth. Lead times without truth are held against the climatology, spectra against the mean
spectrum of the truth.

Legend: C channels, J lead times, N blocks, I init times, M members.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich import box
from rich.table import Table

from aeris.scores.display import lead_text
from aeris.scores.drift import Drift

Array = NDArray[np.float64]

BLOCK_H = 240
SCALES: dict[str, tuple[int, float]] = {
    "large": (1, 4),
    "medium": (4, 10),
    "small": (10, np.inf),
}
"""Zonal wavenumbers from .. below, at 30-60 degrees: longer than 7100 km, to 2800 km, and shorter."""
QUANTITIES = {
    "mean": "difference of global means, climatological std",
    "variance": "area variance / truth",
    "anomaly": "squared anomaly / truth",
    "large": "power of wavenumbers 1-3 / truth",
    "medium": "power of wavenumbers 4-9 / truth",
    "small": "power of wavenumbers from 10 / truth",
}


@dataclass(frozen=True)
class Bounds:
    """What still counts as stable."""

    mean: float = 0.25
    """Largest difference of area means, in climatological standard deviations at a point."""
    variance: tuple[float, float] = (0.8, 1.25)
    """Ratio of area variances to truth."""
    anomaly: tuple[float, float] = (0.67, 1.5)
    """Ratio of the mean squared anomaly to truth."""
    spectrum: tuple[float, float] = (0.5, 2.0)
    """Ratio of zonal power to truth, at large, medium and small scales."""
    sigma: float = 20.0
    """A member has blown up when a point is so many climatological standard deviations away, and twice as far
    as the truth of this channel ever is."""

    def of(self, quantity: str) -> tuple[float, float]:
        """Return the lowest and the highest value allowed."""
        if quantity == "mean":
            return -self.mean, self.mean
        chosen: tuple[float, float] = getattr(self, quantity, self.spectrum)
        return chosen


@dataclass(frozen=True)
class Verdict:
    """The worst block of one quantity of one channel; `value` is NaN where there is nothing to judge by."""

    channel: str
    quantity: str
    value: float
    from_h: int
    to_h: int
    passed: bool | None
    """None: nothing to judge by."""


@dataclass(frozen=True)
class BlowUp:
    """The first lead time at which a member is out of all bounds."""

    init: int
    member: int
    lead_h: int
    channel: str
    excess: float
    """Distance from the climatology in its standard deviations; infinite where not finite."""


def blocks(lead_h: tuple[int, ...]) -> list[NDArray[np.intp]]:
    """Return the numbers of the lead times of each block of ten days; lead 0 belongs to the first."""
    number_J = (np.maximum(np.array(lead_h), 1) - 1) // BLOCK_H
    return [np.flatnonzero(number_J == number) for number in np.unique(number_J)]


def course(drift: Drift, quantity: str) -> Array:
    """Return a quantity of `QUANTITIES` by block of lead time: [N, C], NaN where there is none."""
    if quantity in SCALES:
        return _spectrum_course(drift, quantity)
    ours, other_JC = getattr(drift.forecast, quantity), getattr(drift.reference, quantity)
    if quantity == "mean":
        change_JC = (ours - other_JC) / np.where(drift.std_C > 0, drift.std_C, np.nan)
        return np.stack([change_JC[leads].mean(axis=0) for leads in blocks(drift.lead_h)])
    found = []
    for leads in blocks(drift.lead_h):
        above_C, below_C = ours[leads].mean(axis=0), other_JC[leads].mean(axis=0)
        found.append(np.divide(above_C, below_C, out=np.full_like(above_C, np.nan), where=below_C > 0))
    return np.stack(found)


def _spectrum_course(drift: Drift, scale: str) -> Array:
    first, end = SCALES[scale]
    waves = (drift.wave_K >= first) & (drift.wave_K < end)
    # shares of each wavenumber count the same, as on the picture
    with np.errstate(divide="ignore", invalid="ignore"):
        log_QCK = np.log(drift.spectrum_ratio_QCK()[..., waves])
    found = []
    for leads in blocks(drift.lead_h):
        inside = np.array([group[0] in leads for group in drift.spectrum_leads])
        few = not inside.any() or not waves.any()
        gap_C = np.full(len(drift.channels), np.nan)
        found.append(gap_C if few else np.exp(log_QCK[inside].mean(axis=(0, 2))))
    return np.stack(found)


def judge(drift: Drift, bounds: Bounds) -> list[Verdict]:
    """Hold every quantity of every channel against its bounds."""
    verdicts = []
    parts = blocks(drift.lead_h)
    for quantity in QUANTITIES:
        low, high = bounds.of(quantity)
        value_NC = course(drift, quantity)
        distance_NC = np.abs(value_NC) if quantity == "mean" else np.abs(np.log(np.maximum(value_NC, 1e-30)))
        for place, channel in enumerate(drift.channels):
            known = np.isfinite(distance_NC[:, place])
            block = int(np.argmax(np.where(known, distance_NC[:, place], -np.inf)))
            value = float(value_NC[block, place]) if known.any() else float("nan")
            passed = low <= value <= high if known.any() else None
            first, last = parts[block][0], parts[block][-1]
            span = (drift.lead_h[first], drift.lead_h[last])
            verdicts.append(Verdict(channel.name, quantity, value, *span, passed))
    return verdicts


def blow_ups(drift: Drift, sigma: float) -> list[BlowUp]:
    """Return the members that leave the climate, each with its first lead time and worst channel there."""
    found = []
    excess_IJMC = np.where(np.isnan(drift.excess_IJMC), 0.0, drift.excess_IJMC)
    limit_C = np.maximum(sigma, 2.0 * np.where(np.isfinite(drift.truth_excess_C), drift.truth_excess_C, 0.0))
    for init, member in np.ndindex(excess_IJMC.shape[0], excess_IJMC.shape[2]):
        beyond_J = (excess_IJMC[init, :, member] > limit_C).any(axis=-1)
        if beyond_J.any():
            lead = int(np.argmax(beyond_J))
            place = int(np.argmax(excess_IJMC[init, lead, member] / limit_C))
            worst = float(excess_IJMC[init, lead, member, place])
            found.append(BlowUp(init, member, drift.lead_h[lead], drift.channels[place].name, worst))
    return found


def stability_table(drift: Drift, bounds: Bounds) -> Table:
    """Return a table of the worst block of every quantity, green inside its bounds and red outside."""
    look: dict[str, Any] = {"title_justify": "left", "title_style": "bold", "box": box.SIMPLE_HEAD}
    many = f"{drift.inits} init times" if drift.inits > 1 else "one init time"
    title = f"stability to {lead_text(drift.lead_h[-1])}: worst mean over 10 days, {many}"
    table = Table(title=title, pad_edge=False, padding=(0, 1, 0, 0), **look)
    table.add_column("channel", no_wrap=True)
    heads = {"mean": "mean drift\n(std)", "variance": "variance\nratio", "anomaly": "anomaly\nratio"}
    for quantity in QUANTITIES:
        table.add_column(heads.get(quantity, f"power\n{quantity}"), justify="right", no_wrap=True)
    verdicts = judge(drift, bounds)
    for channel in drift.channels:
        cells = [_cell(one) for one in verdicts if one.channel == channel.name]
        table.add_row(channel.name, *cells)
    allowed = ["allowed"]
    for quantity in QUANTITIES:
        low, high = bounds.of(quantity)
        allowed.append(f"±{high:g}" if quantity == "mean" else f"{low:g}-{high:g}")
    table.add_section()
    table.add_row(*allowed, style="dim")
    return table


def _cell(verdict: Verdict) -> str:
    if verdict.passed is None:
        return "-"
    sign = "+" if verdict.quantity == "mean" else ""
    return f"[{'green' if verdict.passed else 'red'}]{verdict.value:{sign}.2f}[/]"


def conditions(drift: Drift, bounds: Bounds) -> list[str]:
    """Say how the numbers were made and what stands out, a line each."""
    covered_J = np.asarray(np.isfinite(drift.truth.mean).any(axis=1))
    last = int(np.flatnonzero(covered_J)[-1]) if covered_J.any() else None
    lines = [f"{drift.members} members; climatology: {drift.climatology}"]
    if last is None:
        lines.append("no truth at any valid time: held against the climatology, spectra not judged")
    elif not covered_J.all():
        missing = int((~covered_J).sum())
        lines.append(
            f"{missing} of {len(covered_J)} lead times lack a truth: there the climatology stands in"
        )
    gone = blow_ups(drift, bounds.sigma)
    for one in gone[:5]:
        how = f"{one.excess:.0f} std away" if np.isfinite(one.excess) else "not finite"
        lines.append(
            f"member {one.member} of init number {one.init} blows up at {lead_text(one.lead_h)}: "
            f"{one.channel} is {how}"
        )
    if len(gone) > 5:
        lines.append(f"and {len(gone) - 5} more blow up")
    if not gone:
        lines.append(
            f"no member blows up ({bounds.sigma:g} climatological std away and twice as far as truth)"
        )
    return lines


def as_record(drift: Drift, bounds: Bounds) -> dict[str, Any]:
    """Return the report as plain data; numbers that do not exist are None."""

    def plain(value: float) -> float | None:
        return float(value) if np.isfinite(value) else None

    verdicts = [asdict(one) | {"value": plain(one.value)} for one in judge(drift, bounds)]
    gone = [asdict(one) | {"excess": plain(one.excess)} for one in blow_ups(drift, bounds.sigma)]
    excess = drift.excess_IJMC[np.isfinite(drift.excess_IJMC)]
    return {
        "stable": not gone and all(one["passed"] is not False for one in verdicts),
        "bounds": asdict(bounds),
        "meaning": QUANTITIES,
        "verdicts": verdicts,
        "blow_ups": gone,
        "largest_excess_std": plain(float(excess.max())) if excess.size else None,
        "conditions": conditions(drift, bounds),
        "lead_h": list(drift.lead_h),
        "global_mean": {
            one.name: {
                "forecast": [plain(value) for value in drift.forecast.mean[:, place]],
                "truth": [plain(value) for value in drift.truth.mean[:, place]],
                "climatology": [plain(value) for value in drift.usual.mean[:, place]],
            }
            for place, one in enumerate(drift.channels)
        },
    }
