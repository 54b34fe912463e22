"""Time-longitude (Hovmoller) sections of one forecast, and the Nino 3.4 index of all.

A section is the mean over a band of latitude, 5S-5N by default, at every lead time, of the first members and
of the truth, as the difference from the climatology at the valid time: waves and the Madden-Julian
oscillation show as stripes that lean eastward or westward.

Legend: M members, C channels, Y rows, X cols, J lead times, I init times, H channels with a section.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from aeris.data.variables import Channel
from aeris.scores.climatology import Climatology
from aeris.scores.collecting import Fields, Part

Array = NDArray[np.float64]

BAND_DEG = (-5.0, 5.0)
MOST_MEMBERS = 3
"""Members whose sections are kept."""
MOST_COLS = 360
SECTIONS = ("u850", "v850", "z500", "t2m")
"""Channels with a section where a forecast has them, the first two of these."""
# Trenberth (1997), BAMS 78, 2771.
NINO34_LATITUDE_DEG, NINO34_LONGITUDE_DEG = (-5.0, 5.0), (190.0, 240.0)


@dataclass(frozen=True)
class Hovmoller:
    """Sections of one init time, and the Nino 3.4 index of all where there is a sea surface temperature."""

    init: np.datetime64
    lead_h: tuple[int, ...]
    channels: tuple[Channel, ...]
    longitude_deg: Array
    band_deg: tuple[float, float]
    """Southernmost and northernmost row that entered."""
    member_MHJX: Fields
    """Differences from the climatology; NaN where unknown, here and below."""
    truth_HJX: Fields
    nino34_IMJ: Fields
    """Difference of the sea surface temperature in the Nino 3.4 box from the climatology, K."""
    nino34_truth_IJ: Fields
    climatology: str


def default_sections(names: Sequence[str]) -> list[str]:
    """Return the channels to draw sections of: at most two of `SECTIONS`, else the first there is."""
    return [name for name in SECTIONS if name in names][:2] or list(names[:1])


def band(latitude_deg: Array, ends_deg: tuple[float, float] = BAND_DEG) -> NDArray[np.intp]:
    """Return the rows inside a band; on a coarse grid without one, the row or rows nearest its middle."""
    rows = np.flatnonzero((latitude_deg >= ends_deg[0]) & (latitude_deg <= ends_deg[1]))
    if len(rows):
        return rows
    apart_deg = np.abs(latitude_deg - sum(ends_deg) / 2)
    return np.flatnonzero(apart_deg <= apart_deg.min() + 1e-6)


class HovmollerSums:
    """Gathers sections and the index; a collector (aeris/scores/collecting.py) that can miss the truth.

    Args:
        inits: init times [I] of the forecast.
        case: number of the init time with sections.
        lead_h: lead times [J].
        channels: channels [C] of the fields.
        members: M.
        latitude_deg: [Y].
        longitude_deg: [X], 0 to 360.
        mask_CYX: True where a channel has a value.
        weight_Y: area weight of each row.
        climatology: of the same channels, with the slots of every valid time.
        sections: names of the channels with sections; none means `default_sections`.
        ends_deg: latitudes between which rows are averaged.

    Raises:
        ValueError: a channel of `sections` is not there.
    """

    needs_truth = False

    def __init__(
        self,
        inits: NDArray[np.datetime64],
        case: int,
        lead_h: Sequence[int],
        channels: Sequence[Channel],
        members: int,
        latitude_deg: Array,
        longitude_deg: Array,
        mask_CYX: NDArray[np.bool_],
        weight_Y: Array,
        climatology: Climatology,
        sections: Sequence[str] = (),
        ends_deg: tuple[float, float] = BAND_DEG,
    ) -> None:
        names = [one.name for one in channels]
        wanted = list(sections) or default_sections(names)
        missing = [name for name in wanted if name not in names]
        if missing:
            raise ValueError(f"no section of {missing[0]}: the scored channels are {' '.join(names)}")
        self.inits, self.case, self.lead_h = inits, case, tuple(lead_h)
        self.channels = tuple(channels[names.index(name)] for name in wanted)
        self.members, self.climatology = members, climatology
        self._places = [names.index(name) for name in wanted]
        self._rows = band(latitude_deg, ends_deg)
        self.band_deg = (float(latitude_deg[self._rows].min()), float(latitude_deg[self._rows].max()))
        step = next(n for n in range(1, len(longitude_deg) + 1) if len(longitude_deg) / n <= MOST_COLS)
        self._step = step if len(longitude_deg) % step == 0 else 1
        self.longitude_deg = longitude_deg.reshape(-1, self._step).mean(axis=1)
        self._weight_HYX = weight_Y[self._rows, None] * mask_CYX[self._places][:, self._rows]
        self._sst = names.index("sst") if "sst" in names else None
        self._weight_YX = self._nino_weights(latitude_deg, longitude_deg, mask_CYX, weight_Y)
        self.begin(0)

    def _nino_weights(
        self, latitude_deg: Array, longitude_deg: Array, mask_CYX: NDArray[np.bool_], weight_Y: Array
    ) -> Array | None:
        """Return the weight [Y, X] of the points in the Nino 3.4 box, None without a sea surface there."""
        if self._sst is None:
            return None
        west, east = NINO34_LONGITUDE_DEG
        inside_X = (longitude_deg % 360.0 >= west) & (longitude_deg % 360.0 <= east)
        weight_YX = np.zeros(mask_CYX.shape[1:])
        rows = band(latitude_deg, NINO34_LATITUDE_DEG)
        weight_YX[rows] = weight_Y[rows, None] * (inside_X & mask_CYX[self._sst, rows])
        return weight_YX / weight_YX.sum() if weight_YX.any() else None

    def begin(self, init: int) -> None:
        """Start an init time."""
        self._init = init
        leads = len(self.lead_h)
        shape = (min(self.members, MOST_MEMBERS), len(self._places), leads, len(self.longitude_deg))
        self._member_MHJX = np.full(shape, np.nan, dtype=np.float32)
        self._truth_HJX = np.full(shape[1:], np.nan, dtype=np.float32)
        self._nino_MJ = np.full((self.members, leads), np.nan, dtype=np.float32)
        self._nino_J = np.full(leads, np.nan, dtype=np.float32)

    def add(self, lead: int, x_MCYX: Fields, y_CYX: Fields | None, valid: np.datetime64) -> None:
        """Add a lead time."""
        if self._init != self.case and self._weight_YX is None:
            return
        usual_CYX = self.climatology.at(valid)
        if self._init == self.case:
            usual_HX = self._section(usual_CYX[None])[0]
            kept_MCYX = x_MCYX[: len(self._member_MHJX)]
            self._member_MHJX[:, :, lead] = self._section(kept_MCYX) - usual_HX
            if y_CYX is not None:
                self._truth_HJX[:, lead] = self._section(y_CYX[None])[0] - usual_HX
        if self._weight_YX is not None and self._sst is not None:
            usual = self._nino(usual_CYX[None, self._sst])
            self._nino_MJ[:, lead] = self._nino(x_MCYX[:, self._sst]) - usual
            if y_CYX is not None:
                self._nino_J[lead] = (self._nino(y_CYX[None, self._sst]) - usual)[0]

    def _section(self, x_MCYX: Fields) -> Array:
        """Return the means over the band by column [M, H, X]; NaN where no row has a value."""
        x_MHYX = x_MCYX[:, self._places][:, :, self._rows].astype(np.float64)
        weight_HYX = self._weight_HYX
        total_MHX = np.where(weight_HYX > 0, x_MHYX * weight_HYX, 0.0).sum(axis=2)
        share_HX = weight_HYX.sum(axis=1)
        total = total_MHX.reshape(*total_MHX.shape[:2], -1, self._step).sum(axis=-1)
        share = share_HX.reshape(len(share_HX), -1, self._step).sum(axis=-1)
        return np.divide(total, share, out=np.full(total.shape, np.nan), where=share > 0)

    def _nino(self, sst_MYX: Fields) -> Array:
        """Return the mean [M] over the Nino 3.4 box."""
        weight_YX = self._weight_YX
        assert weight_YX is not None
        return np.asarray(np.where(weight_YX > 0, sst_MYX * weight_YX, 0.0).sum(axis=(1, 2)))

    def end(self) -> dict[str, NDArray[np.float32]]:
        """Return what this init time contributes: its sections if it is the case, and its index."""
        found = {"nino34": self._nino_MJ, "nino34_truth": self._nino_J}
        if self._init == self.case:
            found |= {"member": self._member_MHJX, "truth": self._truth_HJX}
        return found

    def combine(self, parts: Sequence[Part]) -> Hovmoller:
        """Return the sections of the case and the index of all init times."""
        chosen = parts[self.case]
        return Hovmoller(
            init=self.inits[self.case],
            lead_h=self.lead_h,
            channels=self.channels,
            longitude_deg=self.longitude_deg,
            band_deg=self.band_deg,
            member_MHJX=chosen["member"],
            truth_HJX=chosen["truth"],
            nino34_IMJ=np.stack([part["nino34"] for part in parts]),
            nino34_truth_IJ=np.stack([part["nino34_truth"] for part in parts]),
            climatology=self.climatology.describe(),
        )
