"""Zonal power spectra: how much of a field's variance sits at each scale.

    F_k = rfft(x) / N along longitude;  S_0 = C |F_0|^2,  S_k = 2 C |F_k|^2,  C = 2 pi R cos(latitude)

as in WeatherBench 2 (Rasp et al. 2024), in unit^2 m, averaged over the rows of a band of latitude (both
hemispheres) and over init times at equal wavenumber k. The one difference: at k = N/2 of an even N the factor
is 1, not 2, so that the sum over k is exactly C times the mean square of the row (Parseval).

Legend: M members, C channels, Y rows, X cols, J lead times, K wavenumbers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

# Mean of the polar and the equatorial radius, as WeatherBench 2 has it.
EARTH_RADIUS_M = 6367.5e3
BAND_DEG = (30.0, 60.0)


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


def band_rows(latitude_deg: Array, band_deg: tuple[float, float] = BAND_DEG) -> NDArray[np.intp]:
    """Return the numbers of the rows whose distance from the equator lies in `band_deg`, ends included.

    Raises:
        ValueError: no row lies in the band.
    """
    distance_deg = np.abs(latitude_deg)
    rows = np.flatnonzero((distance_deg >= band_deg[0]) & (distance_deg <= band_deg[1]))
    if not len(rows):
        middle = sum(band_deg) / 2
        nearest = latitude_deg[np.argmin(np.abs(distance_deg - middle))]
        low, high = band_deg
        raise ValueError(f"no row within {low:g}-{high:g} degrees; the nearest is at {nearest:g}")
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
    """Mean spectra [J, C, K] in unit^2 m; NaN for channels without values at every point of the band."""

    band_deg: tuple[float, float]
    truth_JCK: Array
    member_JCK: Array
    """Mean over members of each member's spectrum."""
    mean_JCK: Array
    """Spectrum of the ensemble mean."""

    def wavelength_km(self) -> Array:
        """Return the wavelength [K] at the middle of the band; infinite for k = 0."""
        middle = np.deg2rad(sum(self.band_deg) / 2)
        wavenumber = np.arange(self.truth_JCK.shape[-1])
        around_km = 2 * np.pi * EARTH_RADIUS_M * np.cos(middle) / 1000
        return np.divide(around_km, wavenumber, out=np.full(len(wavenumber), np.inf), where=wavenumber > 0)

    def distances(self) -> dict[str, Array]:
        """Return log-spectral distances from truth in dB, each [J, C]."""
        return {
            "lsd_member": log_spectral_distance(self.member_JCK, self.truth_JCK),
            "lsd_mean": log_spectral_distance(self.mean_JCK, self.truth_JCK),
        }


class SpectrumSums:
    """Sums of band-mean spectra over init times, for truth, members and the ensemble mean.

    Args:
        lead_times: J.
        latitude_deg: [Y].
        mask_CYX: True where a channel has a value; a channel with a gap inside the band gets no spectrum.
        band_deg: distance from the equator, both hemispheres.
    """

    def __init__(
        self,
        lead_times: int,
        latitude_deg: Array,
        mask_CYX: NDArray[np.bool_],
        band_deg: tuple[float, float] = BAND_DEG,
    ) -> None:
        self.band_deg = band_deg
        self._rows = band_rows(latitude_deg, band_deg)
        self._latitude_deg = latitude_deg[self._rows]
        self._whole_C = mask_CYX[:, self._rows].all(axis=(1, 2))
        channels, _, cols = mask_CYX.shape
        self._sums_3JCK = np.zeros((3, lead_times, channels, cols // 2 + 1))
        self._count_J = np.zeros(lead_times, dtype=np.int64)

    def _mean_power(self, field_YX: NDArray[np.floating]) -> Array:
        return np.asarray(zonal_power(field_YX[..., self._rows, :], self._latitude_deg).mean(axis=-2))

    def add(self, lead: int, forecast_MCYX: NDArray[np.float32], truth_CYX: NDArray[np.float32]) -> None:
        """Add the forecast of one init time at lead number `lead`; works on one channel at a time."""
        for channel in np.flatnonzero(self._whole_C):
            members_MYX = forecast_MCYX[:, channel]
            self._sums_3JCK[0, lead, channel] += self._mean_power(truth_CYX[channel])
            self._sums_3JCK[1, lead, channel] += self._mean_power(members_MYX).mean(axis=0)
            self._sums_3JCK[2, lead, channel] += self._mean_power(members_MYX.mean(axis=0, dtype=np.float64))
        self._count_J[lead] += 1

    def result(self) -> Spectra:
        """Return the mean spectra so far."""
        count_J11 = np.maximum(self._count_J, 1)[:, None, None]
        gap_C1 = np.where(self._whole_C, 0.0, np.nan)[:, None]
        truth, member, mean = self._sums_3JCK / count_J11 + gap_C1
        return Spectra(self.band_deg, truth, member, mean)
