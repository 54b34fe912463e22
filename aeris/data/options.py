"""What a user can say about a conversion."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import tyro

from aeris.data.variables import MASKED


@dataclass(frozen=True)
class Options:
    """Make a store from weather data.

    Says how it reads the sources, and writes HDF5. Processes, ranks of a launcher and the same command on
    other machines share the work. A killed conversion goes on when the same command is given again.
    """

    paths: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE... STORE")]
    """Files, directories or addresses (gs://...), cut by time or variable; last the new store."""
    window: int
    """Side of the windows (points) that fields are chunked in; best the window of the model."""
    channels: tuple[str, ...] = ()
    """Channels, such as t2m z500; a letter alone, such as z, means all levels. Empty: everything found."""
    levels_hpa: Annotated[tuple[float, ...], tyro.conf.arg(aliases=["--levels"])] = ()
    """Levels (hPa) of the variables that are given without one. Empty: all that are found."""
    period: tuple[str, str] = ("", "")
    """First and last date to convert, such as 1979 2020 or 2000-05-01 2000-05-31T18. Empty: all."""
    step_h: int = 0
    """Keep only times that are a multiple of so many hours after midnight. 0: all."""
    train_period: tuple[str, str] = ("", "")
    """First and last date the statistics are computed from. Empty: the first 75 % of the times."""
    intervals_h: tuple[int, ...] = (6, 24)
    """Intervals (hours) that get residual statistics; a model is trained for one of them."""
    allow_gaps: bool = False
    """Take times with gaps, such as one season of several years; a pair over a gap is no sample."""
    member: int | None = None
    """Which ensemble member to take, if there are several."""
    units: tuple[str, ...] = ()
    """Units that the sources do not say or say wrongly, such as 2m_temperature=degC."""
    coarsen: int = 1
    """Average boxes of so many points a side, weighted by area. 1: keep the grid."""
    round: float = 0.0
    """Lossy: round to a power of two, at most this share of a channel's residual std. 0: no."""
    compress: bool = False
    """Compress: smaller and slower to read; for small stores."""
    masked: tuple[str, ...] = MASKED
    """Channels that may have missing points; points missing at any time are then masked at all times."""
    allow_missing_static: bool = False
    """Take zeros for orography and land-sea mask where the sources have none."""
    statistics_from: str = ""
    """Store whose statistics to take over, for data a model of that store will be run on; or statistics of
    another project (makani, Swift, anemoi)."""
    processes: int = 1
    """Processes that share the work, on each rank."""
    dry_run: bool = False
    """Say what would be done, with sizes and hours, and stop."""
    rate_mb_s: float = 0.0
    """With --dry-run: MB/s of the store that one process gets done. 0: measure it on the first times."""
    json: bool = False
    """With --dry-run: print one JSON object and nothing else."""

    @property
    def units_told(self) -> dict[str, str]:
        """Name of a variable -> its unit.

        Raises:
            ValueError: see `read_units`.
        """
        return read_units(self.units)

    @property
    def sources(self) -> tuple[str, ...]:
        """Where the data come from."""
        return self.paths[:-1]

    @property
    def store(self) -> str:
        """Directory of the new store."""
        return self.paths[-1]


def read_units(words: Sequence[str]) -> dict[str, str]:
    """Read what `--units` says: name of a variable -> its unit.

    Raises:
        ValueError: not written as NAME=UNIT.
    """
    for one in words:
        if not all(one.partition("=")):
            raise ValueError(f"--units {one}: write it as NAME=UNIT, such as 2m_temperature=degC")
    return {name: unit for name, _, unit in (one.partition("=") for one in words)}
