"""Gaussian random fields on the sphere: isotropic, of a prescribed correlation length, on a grid of points.

    f(point) = sum_lm s_l a_lm Y_lm(point),   a_lm ~ N(0, 1),   s_l^2 ~ exp(-(L / R)^2 l (l + 1) / 2),  l >= 1

Neither poles nor the first meridian show. In the plane this spectrum gives the correlation exp(-r^2 / 2 L^2);
it is the one of ECMWF's stochastic physics (Palmer et al. 2009, ECMWF Technical Memorandum 598, section 2).
Without l = 0 no field has a global mean of its own.

Shapes: F fields, K coefficients, Y rows, X columns.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

EARTH_RADIUS_KM = 6371.0
NEGLIGIBLE = 1e-6  # share of the variance that may be cut off
MAX_DEGREE = 1000  # beyond, Legendre functions near the poles begin to leave the range of float64
CHUNK = 2**23  # complex numbers of a chunk of fields, 128 MiB

Values = NDArray[np.float64]


def power(length_km: float) -> Values:
    """Return the variance of the fields by degree l = 0 .. l_max: float64 [l_max + 1], sum 1.

    Degree l has 2 l + 1 coefficients, which share it evenly.

    Raises:
        ValueError: the length is not positive, or needs more than 1000 degrees.
    """
    shortest_km = np.sqrt(-2.0 * np.log(NEGLIGIBLE)) * EARTH_RADIUS_KM / MAX_DEGREE
    if not shortest_km <= length_km < np.inf:
        raise ValueError(f"a correlation length of {length_km:g} km: it must be {shortest_km:.0f} km or more")
    half = 0.5 * (length_km / EARTH_RADIUS_KM) ** 2
    degrees = max(1, int(np.ceil(np.sqrt(-np.log(NEGLIGIBLE) / half))))
    degree = np.arange(degrees + 1.0)
    # Relative to l = 1, so that very long lengths do not underflow.
    variance = (2 * degree + 1) * np.exp(-half * (degree * (degree + 1) - 2))
    variance[0] = 0.0
    return np.asarray(variance / variance.sum())


class SphericalNoise:
    """Turns white noise into fields on one grid.

    Args:
        latitude_deg: latitude of every row [Y].
        longitude_deg: longitude of every column [X]: equal steps round the whole circle.
        length_km: correlation length.

    Attributes:
        coefficients: numbers K a field is made of. Number l^2 + l + m belongs to degree l and
            cos(m longitude), or sin(|m| longitude) for m < 0, whatever the length: fields of two lengths
            resemble each other.

    Raises:
        ValueError: the columns are not equal steps round the circle, or the length is out of range.
    """

    def __init__(self, latitude_deg: Values, longitude_deg: Values, length_km: float) -> None:
        cols = len(longitude_deg)
        if not np.allclose(np.diff(longitude_deg), 360.0 / cols, atol=1e-3):
            raise ValueError(
                f"correlated noise needs columns {360.0 / cols:g} degrees apart round the whole circle, not "
                f"{cols} from {longitude_deg[0]:g} to {longitude_deg[-1]:g}"
            )
        self._sin_Y = np.sin(np.deg2rad(latitude_deg))
        self._cos_Y = np.cos(np.deg2rad(latitude_deg))
        self._first_rad, self._cols = float(np.deg2rad(longitude_deg[0])), cols
        share = power(length_km)
        self._scale = np.sqrt(share / (2 * np.arange(len(share)) + 1))
        self.degrees = len(share) - 1
        self.coefficients = len(share) ** 2

    def fields(self, white_FK: Values) -> NDArray[np.float32]:
        """Return the fields of white noise: float32 [F, Y, X], variance 1 at every point."""
        rows = len(self._sin_Y)
        each = max(1, CHUNK // (rows * max(self._cols, self.degrees + 1)))
        f_FYX = np.empty((len(white_FK), rows, self._cols), dtype=np.float32)
        for first in range(0, len(white_FK), each):
            part = slice(first, first + each)
            f_FYX[part] = self._synthesise(np.asarray(white_FK[part], dtype=np.float64))
        return f_FYX

    def _synthesise(self, white_FK: Values) -> Values:
        """Sum over degrees by matrix products, over orders by a Fourier transform."""
        degree = np.arange(self.degrees + 1)
        spectrum_FYX = np.zeros((len(white_FK), len(self._sin_Y), self._cols), dtype=np.complex128)
        for order, legendre_LY in enumerate(self._legendre()):
            place = degree[order:] ** 2 + degree[order:]
            wave = white_FK[:, place + order] - (1j * white_FK[:, place - order] if order else 0.0)
            turned = wave * self._scale[order:] * np.exp(1j * order * self._first_rad)
            # Orders beyond what the columns resolve fold back, as sampling a field at points does.
            spectrum_FYX[:, :, order % self._cols] += turned @ legendre_LY
        return np.asarray(np.fft.ifft(spectrum_FYX, axis=2, norm="forward").real)

    def _legendre(self) -> Iterator[Values]:
        """Yield for every order m the normalised functions of degree m .. l_max: float64 [L, Y].

        Their squares times cos^2 and sin^2 add up to 2 l + 1 over the orders of a degree (Holmes and
        Featherstone 2002, J. Geodesy 76, 279, equations 11 to 13).
        """
        sectoral_Y = np.ones_like(self._sin_Y)
        for order in range(self.degrees + 1):
            if order:
                sectoral_Y = sectoral_Y * self._cos_Y * np.sqrt(3.0 if order == 1 else 1.0 + 0.5 / order)
            p_LY = np.empty((self.degrees + 1 - order, len(self._sin_Y)))
            p_LY[0] = sectoral_Y
            below_Y = np.zeros_like(sectoral_Y)
            ratio = 0.0
            for degree in range(order + 1, self.degrees + 1):
                factor = np.sqrt((4.0 * degree**2 - 1.0) / (degree**2 - order**2))
                here_Y = p_LY[degree - order - 1]
                p_LY[degree - order] = factor * (self._sin_Y * here_Y - ratio * below_Y)
                below_Y, ratio = here_Y, 1.0 / factor
            yield p_LY
