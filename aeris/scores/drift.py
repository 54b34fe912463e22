"""Does a long forecast stay in the climate of the truth: global means, variances, spectra and extremes.

Every quantity is gathered for each lead time from the members and, where there is one, from the truth at the
valid time; the climatology of the training period says what is usual there. A forecast may run past the
truth: it is then compared with the climatology alone.

Legend: M members, C channels, Y rows, X cols, J lead times, Q groups of lead times, K groups of wavenumbers,
I init times.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from aeris.data.variables import Channel
from aeris.scores.areas import AreaMean
from aeris.scores.climatology import Climatology
from aeris.scores.collecting import Fields, Part
from aeris.scores.spectra import band_rows, spans_circle, zonal_power

Array = NDArray[np.float64]

MOST_SPECTRA = 60
"""At most so many spectra are kept; each is the mean of neighbouring lead times."""
_MOST_WAVES = 48
# Where the climatology hardly varies (humidity high up) a small error is no blow-up.
_LEAST_STD = 0.3
_FIELDS = ("mean", "variance", "anomaly", "low", "high")


@dataclass(frozen=True)
class Course:
    """How a quantity goes with lead time, [J, C], means over init times (and members); NaN where unknown."""

    mean: Array
    """Area mean."""
    variance: Array
    """Area variance of the field about its area mean."""
    anomaly: Array
    """Area mean of the squared difference from the climatology."""
    low: Array
    """Smallest value of all init times."""
    high: Array
    """Largest value of all init times."""


@dataclass(frozen=True)
class Drift:
    """What became of a long forecast, beside the truth and the climatology."""

    lead_h: tuple[int, ...]
    channels: tuple[Channel, ...]
    members: int
    inits: int
    forecast: Course
    truth: Course
    """NaN at lead times at which an init time has no truth."""
    reference: Course
    """What the forecast is held against: the truth of each init time, the climatology where there is none."""
    usual: Course
    """The climatology: mean of its mean field, and what the other quantities are expected to be."""
    member_mean_JMC: Array
    """Area mean of each member, mean over init times."""
    std_C: Array
    """Typical standard deviation of the climatology: root of its mean variance over area and lead times."""
    excess_IJMC: NDArray[np.float32]
    """Largest distance from the climatology, in its standard deviations; infinite where not finite."""
    truth_excess_C: Array
    """The largest distance the truth itself reaches; 0 without one."""
    spectrum_leads: tuple[tuple[int, ...], ...]
    """Numbers of the lead times of each spectrum."""
    wave_K: Array
    """Mean wavenumber of each group of wavenumbers, from 1."""
    forecast_QCK: Array
    """Zonal power at 30-60 degrees, mean over members."""
    truth_QCK: Array
    """NaN where a lead time or an init time has no truth."""
    climatology: str
    """What the climatology is."""

    def spectrum_ratio_QCK(self) -> Array:
        """Return the power of the members over that of the truth; where there is no truth, of its mean."""
        known_C1 = np.isfinite(self.truth_QCK).any(axis=0)
        count_CK = np.maximum(np.isfinite(self.truth_QCK).sum(axis=0), 1)
        mean_CK = np.where(known_C1, np.nansum(self.truth_QCK, axis=0) / count_CK, np.nan)
        truth_QCK = np.where(np.isfinite(self.truth_QCK), self.truth_QCK, mean_CK)
        positive = truth_QCK > 0
        return np.divide(self.forecast_QCK, truth_QCK, out=np.full_like(truth_QCK, np.nan), where=positive)


class DriftSums:
    """Gathers what a `Drift` is made of; a collector (aeris/scores/collecting.py) that can miss the truth.

    Args:
        lead_h: lead times [J].
        channels: channels [C] of the fields.
        members: M.
        latitude_deg: [Y].
        longitude_deg: [X].
        mask_CYX: True where a channel has a value.
        weight_Y: area weight of each row.
        climatology: of the same channels, with the slots of every valid time; it says what is usual.
    """

    needs_truth = False

    def __init__(
        self,
        lead_h: Sequence[int],
        channels: Sequence[Channel],
        members: int,
        latitude_deg: Array,
        longitude_deg: Array,
        mask_CYX: NDArray[np.bool_],
        weight_Y: Array,
        climatology: Climatology,
    ) -> None:
        self.lead_h, self.channels, self.members = tuple(lead_h), tuple(channels), members
        self.climatology = climatology
        self._mask_CYX, self._area = mask_CYX, AreaMean(weight_Y, mask_CYX)
        try:
            self._rows = band_rows(latitude_deg) if spans_circle(longitude_deg) else np.zeros(0, np.intp)
        except ValueError:
            self._rows = np.zeros(0, np.intp)
        self._latitude_deg = latitude_deg
        has_rows = len(self._rows) > 0
        self._whole_C = [bool(mask_YX[self._rows].all()) and has_rows for mask_YX in mask_CYX]
        groups = np.array_split(np.arange(len(self.lead_h)), min(len(self.lead_h), MOST_SPECTRA))
        self.spectrum_leads = tuple(tuple(group.tolist()) for group in groups)
        # of the last wavenumber of an even number of cols the grid holds only half
        self._groups = wave_groups(max(1, (mask_CYX.shape[2] - 1) // 2))
        self.begin(0)

    def begin(self, init: int) -> None:
        """Start an init time."""
        leads, channels = len(self.lead_h), len(self.channels)
        gap_JC = np.full((leads, channels), np.nan)
        self._forecast = {name: gap_JC.copy() for name in _FIELDS}
        self._truth = {name: gap_JC.copy() for name in _FIELDS}
        self._usual = {name: gap_JC.copy() for name in _FIELDS}
        self._member_JMC = np.full((leads, self.members, channels), np.nan)
        self._excess_JMC = np.full((leads, self.members, channels), np.nan, dtype=np.float32)
        self._truth_excess_C = np.zeros(channels, dtype=np.float32)
        self._power_2QCK = np.zeros((2, len(self.spectrum_leads), channels, len(self._groups)))
        self._count_2Q = np.zeros((2, len(self.spectrum_leads)), dtype=np.int64)

    def add(self, lead: int, x_MCYX: Fields, y_CYX: Fields | None, valid: np.datetime64) -> None:
        """Add a lead time; works on one channel at a time. Values may be infinite or NaN: a blow-up."""
        with np.errstate(invalid="ignore", over="ignore"):
            self._add(lead, x_MCYX, y_CYX, valid)

    def _add(self, lead: int, x_MCYX: Fields, y_CYX: Fields | None, valid: np.datetime64) -> None:
        usual_CYX, std_CYX = self.climatology.at(valid), self.climatology.std_at(valid)
        group = next(number for number, leads in enumerate(self.spectrum_leads) if lead in leads)
        for place in range(len(self.channels)):
            usual_YX = usual_CYX[place].astype(np.float64)
            self._add_usual(lead, place, usual_YX, std_CYX[place].astype(np.float64))
            x_MYX = x_MCYX[:, place].astype(np.float64)
            self._member_JMC[lead, :, place] = self._add_fields(self._forecast, lead, place, x_MYX, usual_YX)
            self._excess_JMC[lead, :, place] = self._excess(place, x_MYX, usual_YX, std_CYX[place])
            if y_CYX is not None:
                y_MYX = y_CYX[None, place].astype(np.float64)
                self._add_fields(self._truth, lead, place, y_MYX, usual_YX)
                reached = self._excess(place, y_MYX, usual_YX, std_CYX[place])[0]
                self._truth_excess_C[place] = max(self._truth_excess_C[place], reached)
            if self._whole_C[place]:
                self._power_2QCK[0, group, place] += self._power(x_MYX)
                if y_CYX is not None:
                    self._power_2QCK[1, group, place] += self._power(y_CYX[None, place])
        self._count_2Q[:, group] += (1, y_CYX is not None)

    def _add_usual(self, lead: int, place: int, usual_YX: Array, std_YX: Array) -> None:
        mean, variance = self._area.of(place, usual_YX), self._area.of(place, std_YX**2)
        self._usual["mean"][lead, place] = mean
        self._usual["anomaly"][lead, place] = variance
        # weather about the mean field, and the shape of the mean field itself
        self._usual["variance"][lead, place] = variance + self._area.of(place, (usual_YX - mean) ** 2)

    def _add_fields(
        self, into: dict[str, Array], lead: int, place: int, x_MYX: Array, usual_YX: Array
    ) -> Array:
        """Set the quantities of some members and return their area means [M]."""
        mean_M = self._area.of(place, x_MYX)
        variance_M = self._area.of(place, (x_MYX - mean_M[:, None, None]) ** 2)
        inside_MP = x_MYX[:, self._mask_CYX[place]]
        into["mean"][lead, place] = mean_M.mean()
        into["variance"][lead, place] = variance_M.mean()
        into["anomaly"][lead, place] = self._area.of(place, (x_MYX - usual_YX) ** 2).mean()
        into["low"][lead, place], into["high"][lead, place] = inside_MP.min(), inside_MP.max()
        return mean_M

    def _excess(self, place: int, x_MYX: Array, usual_YX: Array, std_YX: Fields) -> Array:
        """Return the largest anomaly [M] in standard deviations, infinite where a value is not finite.

        A channel without climatology has none: 0.
        """
        inside_YX = self._mask_CYX[place]
        x_MP, std_P = x_MYX[:, inside_YX], std_YX[inside_YX].astype(np.float64)
        typical = np.sqrt(self._area.of(place, std_YX.astype(np.float64) ** 2))
        least = max(_LEAST_STD * float(typical), float(np.finfo(np.float32).tiny))
        share_MP = np.abs(x_MP - usual_YX[inside_YX]) / np.maximum(std_P, least)
        share_MP = np.where(np.isnan(share_MP), 0.0, share_MP)
        return np.where(np.isfinite(x_MP), share_MP, np.inf).max(axis=1)

    def _power(self, x_MYX: NDArray[np.floating]) -> Array:
        """Return the zonal power by groups of wavenumbers [K], mean over members and rows of the band."""
        band_MYX = x_MYX[:, self._rows]
        power_K = zonal_power(band_MYX, self._latitude_deg[self._rows]).mean(axis=(0, 1))
        return np.array([power_K[first:end].sum() for first, end in self._groups])

    def end(self) -> dict[str, NDArray[np.floating]]:
        """Return what this init time contributes."""
        found: dict[str, NDArray[np.floating]] = {}
        for kind, fields in (("forecast", self._forecast), ("truth", self._truth), ("usual", self._usual)):
            found |= {f"{kind}_{name}": values for name, values in fields.items()}
        whole_Q = self._count_2Q == [len(leads) for leads in self.spectrum_leads]
        whole_2QC = whole_Q[:, :, None] & np.array(self._whole_C)
        count_2Q = np.maximum(self._count_2Q, 1)[:, :, None, None]
        power_2QCK = np.where(whole_2QC[..., None], self._power_2QCK / count_2Q, np.nan)
        found |= {"excess": self._excess_JMC, "truth_excess": self._truth_excess_C}
        return found | {"member": self._member_JMC, "power": power_2QCK}

    def combine(self, parts: Sequence[Part]) -> Drift:
        """Return the drift of all init times."""
        usual = _course(parts, "usual")
        # infinite values are no spectrum, a lead time without truth has none
        power_2QCK = np.mean([part["power"] for part in parts], axis=0)
        return Drift(
            lead_h=self.lead_h,
            channels=self.channels,
            members=self.members,
            inits=len(parts),
            forecast=_course(parts, "forecast"),
            truth=_course(parts, "truth"),
            reference=_course(parts, "truth", "usual"),
            usual=usual,
            member_mean_JMC=np.mean([part["member"] for part in parts], axis=0),
            std_C=np.sqrt(_mean_of_known(usual.anomaly)),
            excess_IJMC=np.stack([part["excess"] for part in parts]),
            truth_excess_C=np.max([part["truth_excess"] for part in parts], axis=0),
            spectrum_leads=self.spectrum_leads,
            wave_K=np.array([(first + end - 1) / 2 for first, end in self._groups]),
            forecast_QCK=power_2QCK[0],
            truth_QCK=power_2QCK[1],
            climatology=self.climatology.describe(),
        )


def _course(parts: Sequence[Part], kind: str, instead: str = "") -> Course:
    """Return means and ends over init times; NaN where one of them has no value, also none `instead`."""

    def of(name: str) -> Array:
        values_IJC = np.stack([part[f"{kind}_{name}"] for part in parts])
        if instead:
            others_IJC = np.stack([part[f"{instead}_{name}"] for part in parts])
            values_IJC = np.where(np.isfinite(values_IJC), values_IJC, others_IJC)
        return values_IJC

    with np.errstate(invalid="ignore", over="ignore"):
        means = {name: of(name).mean(axis=0) for name in ("mean", "variance", "anomaly")}
        return Course(**means, low=of("low").min(axis=0), high=of("high").max(axis=0))


def wave_groups(waves: int) -> list[tuple[int, int]]:
    """Return groups (first, end) of the wavenumbers 1..waves: each alone, of many the high ones together."""
    edges = np.arange(1, waves + 2)
    if waves > _MOST_WAVES:
        edges = np.unique(np.geomspace(1, waves + 1, _MOST_WAVES + 1).round().astype(np.int64))
    return list(zip(edges[:-1].tolist(), edges[1:].tolist()))


def _mean_of_known(values: NDArray[np.floating]) -> Array:
    """Return the mean over the first dim of what is finite, NaN where nothing is."""
    known = np.isfinite(values)
    count = known.sum(axis=0)
    total = np.where(known, values, 0.0).sum(axis=0, dtype=np.float64)
    return np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0)
