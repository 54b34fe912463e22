"""Zonal power spectra: how much of a field's variance sits at each scale.

    F_k = rfft(x) / N along longitude;  S_0 = C |F_0|^2,  S_k = 2 C |F_k|^2,  C = 2 pi R cos(latitude)

as in WeatherBench 2 (Rasp et al. 2024), in unit^2 m, averaged over the rows of a band of latitude
and over init times at equal wavenumber k. The one difference: at k = N/2 of an even N the factor
is 1, not 2, so that the sum over k is exactly C times the mean square of the row (Parseval).

Legend: M members, C channels, Y rows, X cols, J lead times, B bands, K wavenumbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Executor
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from aeris.scores.collecting import Fields, LeadSums, Part
from aeris.scores.display import spread_out
from aeris.scores.regions import rows_between

Array = NDArray[np.float64]

# Mean of the polar and the equatorial radius, as WeatherBench 2 has it.
EARTH_RADIUS_M = 6367.5e3
MID_LATITUDES = "30-60"
BANDS: dict[str, tuple[tuple[float, float], ...]] = {
    MID_LATITUDES: ((-60.0, -30.0), (30.0, 60.0)),
    "tropics": ((-20.0, 20.0),),
    "30-60N": ((30.0, 60.0),),
    "30-60S": ((-60.0, -30.0),),
    "polar": ((-90.0, -60.0), (60.0, 90.0)),
}
"""Lowest and highest latitude of the belts of each band, in degrees."""

# What the spectra of one init time may take: of finer grids and longer forecasts fewer channels and lead
# times have spectra.
MOST_BYTES = 16 * 2**20


def zonal_power(field: NDArray[np.floating], latitude_deg: Array) -> Array:
    """Return the zonal power spectrum of every row, [..., Y, K], in unit^2 m.

    Args:
        field: [..., Y, X], X equally spaced longitudes around the whole circle.
        latitude_deg: [Y].
    """
    cols = field.shape[-1]
    power = np.abs(np.fft.rfft(field.astype(np.float64), axis=-1) / cols) ** 2
    power[..., 1 : (cols + 1) // 2] *= 2.0
    circumference_Y = 2 * np.pi * EARTH_RADIUS_M * np.cos(np.deg2rad(latitude_deg))
    return np.asarray(power * circumference_Y[:, None])


def band_rows(latitude_deg: Array, band: str = MID_LATITUDES) -> NDArray[np.intp]:
    """Return the numbers of the rows that lie in a band of `BANDS`, ends included.

    Raises:
        ValueError: no row lies in the band.
    """
    inside_Y = np.any([rows_between(latitude_deg, ends) for ends in BANDS[band]], axis=0)
    rows = np.flatnonzero(inside_Y)
    if not len(rows):
        belts = " and ".join(f"{low:g} to {high:g}" for low, high in BANDS[band])
        raise ValueError(
            f"no row in the band {band!r} ({belts} degrees); the rows are {latitude_deg.min():g} to "
            f"{latitude_deg.max():g}"
        )
    return rows


def spans_circle(longitude_deg: Array) -> bool:
    """Tell whether longitudes are equally spaced around the whole circle, as a zonal spectrum needs."""
    steps = np.diff(longitude_deg, append=longitude_deg[0] + 360.0)
    return bool(np.allclose(steps, 360.0 / len(longitude_deg), rtol=0, atol=1e-3))


def log_spectral_distance(power_K: Array, truth_K: Array) -> Array:
    """Return the root mean square of 10 log10(power / truth) over k >= 1 along the last dim, in dB.

    Wavenumbers at which either spectrum is zero are left out; NaN where none is left.
    """
    power, truth = power_K[..., 1:], truth_K[..., 1:]
    used = (power > 0) & (truth > 0)
    ratio = np.divide(power, truth, out=np.ones_like(truth), where=used)
    squares = (10 * np.log10(ratio)) ** 2
    count = used.sum(axis=-1)
    return np.sqrt(np.divide(squares.sum(axis=-1), count, out=np.full(count.shape, np.nan), where=count > 0))


@dataclass(frozen=True)
class Spectra:
    """Mean spectra [J, C, K] in unit^2 m over a band; NaN where there are none (see `SpectrumSums`)."""

    band: str
    truth_JCK: Array
    member_JCK: Array
    """Mean over members of each member's spectrum."""
    mean_JCK: Array
    """Spectrum of the ensemble mean."""

    def wavelength_km(self) -> Array:
        """Return the wavelength [K] at the middle of the band; infinite for k = 0."""
        middle = np.deg2rad(abs(sum(BANDS[self.band][-1])) / 2)
        wavenumber = np.arange(self.truth_JCK.shape[-1])
        around_km = 2 * np.pi * EARTH_RADIUS_M * np.cos(middle) / 1000
        return np.divide(around_km, wavenumber, out=np.full(len(wavenumber), np.inf), where=wavenumber > 0)

    def distances(self) -> dict[str, Array]:
        """Return log-spectral distances from truth in dB, each [J, C]."""
        return {
            "lsd_member": log_spectral_distance(self.member_JCK, self.truth_JCK),
            "lsd_mean": log_spectral_distance(self.mean_JCK, self.truth_JCK),
        }


class SpectrumSums(LeadSums):
    """Gathers spectra of truth, members and ensemble mean (aeris/scores/collecting.py).

    A channel with a gap inside a band has no spectrum there. Bands without a row are left out.

    Args:
        lead_times: J.
        latitude_deg: [Y].
        mask_CYX: True where a channel has a value.
        first: channels to keep first where not all fit into `most_bytes`; all are kept if they do.
        executor: works on channels side by side.
        most_bytes: size of the spectra of one init time.

    Raises:
        ValueError: no row lies in any band.
    """

    def __init__(
        self,
        lead_times: int,
        latitude_deg: Array,
        mask_CYX: NDArray[np.bool_],
        first: Sequence[int] = (),
        executor: Executor | None = None,
        most_bytes: int = MOST_BYTES,
    ) -> None:
        self.bands: dict[str, NDArray[np.intp]] = {}
        for band in BANDS:
            with suppress(ValueError):
                self.bands[band] = band_rows(latitude_deg, band)
        if not self.bands:
            band_rows(latitude_deg)
        self._latitude_deg, self._executor = latitude_deg, executor
        channels, _, cols = mask_CYX.shape
        self._all = (lead_times, channels)
        waves = cols // 2 + 1
        most = max(1, most_bytes // (8 * 3 * len(self.bands) * waves))
        self.leads, self.channels = _kept(lead_times, channels, first, most)
        self._whole_BC = np.array(
            [[mask_CYX[channel, rows].all() for channel in self.channels] for rows in self.bands.values()]
        )
        super().__init__((len(self.leads), len(self.channels), len(self.bands), 3, waves))

    @property
    def complete(self) -> bool:
        """Whether every channel and lead time has its spectra."""
        return (len(self.leads), len(self.channels)) == self._all

    def _band_means(self, field_YX: NDArray[np.floating]) -> Array:
        """Return the mean spectrum of each band: [B, K]."""
        power_YK = zonal_power(field_YX, self._latitude_deg)
        return np.stack([power_YK[rows].mean(axis=0) for rows in self.bands.values()])

    def add(self, lead: int, x_MCYX: Fields, y_CYX: Fields | None, valid: np.datetime64) -> None:
        """Add a lead time; works on one field at a time."""
        assert y_CYX is not None
        if lead not in self.leads:
            return
        truth_CYX, place = y_CYX, self.leads.index(lead)

        def sums_of(channel: int) -> Array:
            members_MYX = x_MCYX[:, channel]
            member_BK = sum(self._band_means(x_YX) for x_YX in members_MYX) / len(members_MYX)
            mean_BK = self._band_means(members_MYX.mean(axis=0, dtype=np.float64))
            return np.stack([self._band_means(truth_CYX[channel]), member_BK, mean_BK], axis=1)

        run = map if self._executor is None else self._executor.map
        for number, sums_B3K in enumerate(run(sums_of, self.channels)):
            self._sums[place, number] += sums_B3K
        self._counted(place)

    def combine(self, parts: Sequence[Part]) -> dict[str, Spectra]:
        """Return the mean spectra by band; NaN where a channel has a gap, or had no room."""
        means_JCB3K = self._mean(parts)
        found = {}
        for number, band in enumerate(self.bands):
            spectra_3JCK = np.full((3, *self._all, self._shape[-1]), np.nan)
            kept_JC3K = np.where(self._whole_BC[number][:, None, None], means_JCB3K[:, :, number], np.nan)
            spectra_3JCK[:, np.array(self.leads)[:, None], self.channels] = np.moveaxis(kept_JC3K, 2, 0)
            found[band] = Spectra(band, *spectra_3JCK)
        return found


def _kept(
    leads: int, channels: int, first: Sequence[int], most: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the lead times and channels that have spectra, at most `most` pairs where that is possible."""
    if leads * channels <= most or not first:
        return tuple(range(leads)), tuple(range(channels))
    places = tuple(sorted(first[: max(1, most)]))
    return tuple(spread_out(leads, max(1, most // len(places)))), places
