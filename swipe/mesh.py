"""Ranks as a mesh of five axes, and which meshes a model allows. Pure rank arithmetic, no process is needed.

| axis       | ranks that differ along it hold    | and exchange                          |
| ---------- | ---------------------------------- | ------------------------------------- |
| dp         | other samples of the batch         | gradients, once a step                |
| wp_y, wp_x | other windows of the same image    | tokens at the half-window shift       |
| pp         | other stages of the model          | tokens between stages                 |
| sp         | other tokens of the same windows   | tokens for heads, around attention    |

rank = (((dp WP_Y + py) WP_X + px) PP + pp) SP + sp: what talks most is nearest.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from itertools import product
from typing import NamedTuple


class Coordinate(NamedTuple):
    """Where a rank is on each axis of the mesh, counted from 0."""

    dp: int
    wp_y: int
    wp_x: int
    pp: int
    sp: int


AXES = Coordinate._fields


@dataclass(frozen=True)
class ParallelDims:
    """The degree of every axis: how many ranks there are along it; ValueError if one is less than 1."""

    dp: int = 1
    wp_y: int = 1
    wp_x: int = 1
    pp: int = 1
    sp: int = 1

    def __post_init__(self) -> None:
        for axis, degree in asdict(self).items():
            if degree < 1:
                raise ValueError(f"{axis} is a number of ranks and must be at least 1, not {degree}")

    @property
    def world(self) -> int:
        """Number of ranks of the whole mesh."""
        return self.dp * self.wp_y * self.wp_x * self.pp * self.sp

    @property
    def wp(self) -> int:
        """Number of ranks the windows of an image are dealt to."""
        return self.wp_y * self.wp_x

    @property
    def places(self) -> int:
        """Number of ranks that share one image on one stage."""
        return self.wp * self.sp

    def coordinate(self, rank: int) -> Coordinate:
        """Return where `rank` is on each axis; ValueError if there is no such rank."""
        _check(rank, self.world, "rank")
        rest, sp = divmod(rank, self.sp)
        rest, pp = divmod(rest, self.pp)
        rest, wp_x = divmod(rest, self.wp_x)
        dp, wp_y = divmod(rest, self.wp_y)
        return Coordinate(dp, wp_y, wp_x, pp, sp)

    def rank(self, coordinate: Coordinate) -> int:
        """Return the rank at a coordinate, the inverse of `coordinate`; ValueError if there is none."""
        for axis, value in zip(AXES, coordinate):
            _check(value, getattr(self, axis), f"{axis} coordinate")
        return sum(value * stride for value, stride in zip(coordinate, self._strides()))

    def along(self, rank: int, *axes: str) -> tuple[int, ...]:
        """List, ascending, the ranks that differ from `rank` along these axes only, and itself.

        ValueError if there is no such rank or axis.
        """
        if unknown := set(axes) - set(AXES):
            raise ValueError(f"{', '.join(sorted(unknown))} is no axis of the mesh: {', '.join(AXES)} are")
        offsets = [  # of all ranks along an axis from this one
            range(-here * stride, (getattr(self, axis) - here) * stride, stride)
            for axis, here, stride in zip(AXES, self.coordinate(rank), self._strides())
            if axis in axes
        ]
        return tuple(rank + sum(offset) for offset in product(*offsets))

    def place(self, rank: int) -> int:
        """Return which of the `places` of its stage a rank takes: (py WP_X + px) SP + sp."""
        _, wp_y, wp_x, _, sp = self.coordinate(rank)
        return (wp_y * self.wp_x + wp_x) * self.sp + sp

    def rank_at(self, dp: int, pp: int, place: int) -> int:
        """Return the rank at `place` of stage `pp` of replica `dp`; ValueError if there is none."""
        _check(place, self.places, "place")
        window, sp = divmod(place, self.sp)
        return self.rank(Coordinate(dp, *divmod(window, self.wp_x), pp, sp))

    def flags(self, prefix: str = "--") -> str:
        """Write command-line flags that ask for this mesh, without degrees of 1; "1 rank" if none is left."""
        named = [(axis.replace("_", "-"), degree) for axis, degree in asdict(self).items() if degree > 1]
        return " ".join(f"{prefix}{axis} {degree}" for axis, degree in named) or "1 rank"

    def __str__(self) -> str:
        return f"dp {self.dp} x wp {self.wp_y}x{self.wp_x} x pp {self.pp} x sp {self.sp}"

    def _strides(self) -> tuple[int, ...]:
        """By how much the rank grows from one coordinate to the next, for each axis."""
        degrees = (self.dp, self.wp_y, self.wp_x, self.pp, self.sp)
        return tuple(math.prod(degrees[index + 1 :]) for index in range(len(degrees)))


@dataclass(frozen=True)
class Limits:
    """How far a model and a batch can be spread out, whatever the machine.

    Attributes:
        windows_y: rows of windows of an image; wp_y divides it.
        windows_x: columns of windows of an image; wp_x divides it.
        window: tokens along a side of a window, even; sp cuts its four quadrants into equal strips.
        heads: attention heads; sp divides them.
        units: most stages the model can be cut into.
        samples: microbatches of one step over all of dp, which divides them.
        prefix: what a program's flags for the degrees begin with; errors name them.
        uneven: some replicas may have one sample more than others, so dp need not divide them.

    ValueError if one of them is not positive or the window is odd.
    """

    windows_y: int
    windows_x: int
    window: int
    heads: int
    units: int
    samples: int
    uneven: bool = False
    prefix: str = "--"

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if name not in ("uneven", "prefix") and value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        if self.window % 2:
            raise ValueError(f"a window of {self.window} x {self.window} tokens has no four equal quadrants")

    def problems(self, dims: ParallelDims, world: int | None = None) -> list[str]:
        """List why these degrees do not suit the model, the batch or, if given, `world` ranks."""
        rows, cols, half = self.windows_y, self.windows_x, self.window // 2
        strips, quarter = dims.sp // math.gcd(dims.sp, 4), f"{half} x {half} tokens of a quarter window"
        reasons = [
            (world not in (None, dims.world), f"these degrees need {_ranks(dims.world)}, not {world}"),
            (dims.dp not in self._dp(), self._dp_problem(dims.dp)),
            (rows % dims.wp_y, f"wp_y {dims.wp_y} does not divide the {rows} rows of windows"),
            (cols % dims.wp_x, f"wp_x {dims.wp_x} does not divide the {cols} columns of windows"),
            (dims.pp > self.units, f"pp {dims.pp} is more than the {self.units} stages the model can have"),
            (self.heads % dims.sp, f"sp {dims.sp} does not divide the {self.heads} attention heads"),
            (half**2 % strips, f"sp {dims.sp} needs {strips} equal strips of the {quarter}"),
        ]
        return [reason for holds, reason in reasons if holds]

    def layouts(self, world: int) -> list[ParallelDims]:
        """List every mesh of `world` ranks without problems, the one `choose` would take first."""
        found = []
        for wp_y, wp_x, sp in self._places():
            rest, over = divmod(world, wp_y * wp_x * sp)
            for dp in () if over else self._dp():
                if rest % dp == 0 and rest // dp <= self.units:
                    found.append(ParallelDims(dp, wp_y, wp_x, rest // dp, sp))
        return sorted(found, key=self._cost)

    def nearest(self, dims: ParallelDims, world: int, count: int = 3) -> list[ParallelDims]:
        """List the `count` meshes of `world` ranks without problems whose degrees are nearest to `dims`.

        Nearest by the product of the factors between the degrees, axis by axis.
        """

        def factor(other: ParallelDims) -> Fraction:
            pairs = zip(asdict(dims).values(), asdict(other).values())
            return math.prod((Fraction(max(pair), min(pair)) for pair in pairs), start=Fraction(1))

        return sorted(self.layouts(world), key=factor)[:count]

    def check(self, dims: ParallelDims, world: int) -> None:
        """Raise ValueError if these degrees have problems.

        It says which, and the nearest meshes that do or, if there is none, the nearest numbers of ranks.
        """
        if reasons := self.problems(dims, world):
            raise self._refusal(f"{_ranks(world)} as {dims}", reasons, dims, world)

    def choose(self, world: int, *, fixed: dict[str, int]) -> ParallelDims:
        """Choose the degrees that `fixed` leaves open (absent or 0), so that they make `world` ranks.

        The least idle share of the pipeline first, then what communicates least: the largest dp, the largest
        and squarest wp (the longer side along x), the smallest sp. ValueError as of `check` if nothing suits.
        """
        asked = {axis: degree for axis, degree in fixed.items() if degree}
        wanted = ParallelDims(**asked)
        for dims in self.layouts(world):
            if all(getattr(dims, axis) == degree for axis, degree in asked.items()):
                return dims
        if len(asked) == len(AXES):
            self.check(wanted, world)
        dp = f"be at most {self.samples}, wp_y divide" if self.uneven else f"divide {self.samples}, wp_y"
        divide = f"dp {dp} {self.windows_y}, wp_x {self.windows_x} and sp {self.heads}"
        general = f"the degrees must multiply to {world}, {divide}, and pp be at most {self.units}"
        degrees = " and ".join(f"{axis} {degree}" for axis, degree in asked.items())
        what = _ranks(world) + f" with {degrees}" * bool(asked)
        raise self._refusal(what, self.problems(wanted) or [general], wanted, world)

    def _refusal(self, what: str, reasons: list[str], asked: ParallelDims, world: int) -> ValueError:
        if near := self.nearest(asked, world):
            advice = f"Nearest that do: {'; '.join(dims.flags(self.prefix) for dims in near)}"
        else:
            flat = {math.prod(place) * dp for place in self._places() for dp in self._dp()}
            below = max(n * min(self.units, (world - 1) // n) for n in flat)
            above = min((n * (world // n + 1) for n in flat if world // n < self.units), default=None)
            numbers = f"{below} or {above}" if above else str(below)
            advice = f"No mesh of {_ranks(world)} does; the nearest numbers of ranks that can: {numbers}"
        return ValueError(f"{what} cannot work: {'; '.join(reasons)}. {advice}")

    def _dp(self) -> Sequence[int]:
        """List the degrees dp can have."""
        return range(1, self.samples + 1) if self.uneven else _divisors(self.samples)

    def _dp_problem(self, dp: int) -> str:
        if self.uneven:
            return f"dp {dp} is more than the {self.samples} samples"
        return f"dp {dp} does not divide the {self.samples} microbatches of a step"

    def _places(self) -> list[tuple[int, int, int]]:
        """List the (wp_y, wp_x, sp) that suit the windows and the heads."""
        fits = [sp for sp in _divisors(self.heads) if not self.problems(ParallelDims(sp=sp))]
        return list(product(_divisors(self.windows_y), _divisors(self.windows_x), fits))

    def _cost(self, dims: ParallelDims) -> tuple[float, ...]:
        """What `choose` makes small, most important first. The first is the idle share of the ranks.

        A replica's stages wait while the pipeline fills and drains, and for replicas with one sample more.
        """
        passes = dims.dp * (-(-self.samples // dims.dp) + dims.pp - 1)
        idle = (passes - self.samples) / passes
        return idle, -dims.dp, -dims.wp, max(dims.wp_y, dims.wp_x), -dims.wp_x, dims.sp


def _check(value: int, count: int, what: str) -> None:
    if not 0 <= value < count:
        raise ValueError(f"there is no {what} {value}: there are {count}, counted from 0")


def _divisors(number: int) -> list[int]:
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})


def _ranks(count: int) -> str:
    return "1 rank" if count == 1 else f"{count} ranks"
