"""A forecast opened beside its truth: what aeris.evaluate scores, with which climatology, and what it needs.

Everything a user can get wrong is found when an `Evaluation` is made, before hours of reading.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro
from numpy.typing import NDArray

from aeris import reports
from aeris.data.forecasts import open_forecast
from aeris.data.header import HEADER
from aeris.data.store import Store, packaged_sample
from aeris.scores import plots
from aeris.scores.climatology import Build, Climatology, needed_slots
from aeris.scores.climatology_files import open_climatology, save
from aeris.scores.collecting import Collector, Fields
from aeris.scores.display import headline_channels
from aeris.scores.matching import match
from aeris.scores.parts import Parts
from aeris.scores.rivals import Judged, read_rival
from aeris.scores.scoring import EVENT_CHANNELS, Labels, Options, Scoring
from aeris.scores.slots import draw_times
from aeris.scores.winds import PickedStore, components

SAMPLE_TITLE = "SPEEDY perfect-model experiment"
QUANTILES = (0.01, 0.1, 0.9, 0.95, 0.99)
FEWEST_BEYOND = 5
_VERSION = 1


@dataclass(frozen=True)
class EvaluateConfig:
    """What to score, and how."""

    forecast: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="FORECAST")]
    """Forecast written by aeris.forecast: a .zarr or a directory of NetCDF files."""
    truth: str = ""
    """Store with the truth; empty means the packaged sample."""
    out: str = ""
    """Directory for scores.json, scores.csv, spectra.npz, plots/ ...; empty means FORECAST.scores."""
    channels: tuple[str, ...] = ()
    """Channels to score, such as z500 t2m ws10; none means all, and the wind speeds ws10 and ws850."""
    lead_h: tuple[int, ...] = ()
    """Lead times (h) to score; none means all."""
    weights: Literal["cell", "wb2", "cos"] = "cell"
    """Area weights: cell = exact cells of the grid, wb2 = WeatherBench 2 (end rows reach the poles), cos."""
    climatology: str = "build"
    """build = from the training period of the truth; none; another store, for its training period; or a file:
    ours, or one of WeatherBench 2."""
    climatology_members: int = 0
    """Members drawn from the times of a climatology that is built, for each valid time: the probabilistic
    climatology, whose CRPS a forecast has to beat. As many fields are read each time; 0 leaves it out."""
    quantiles: tuple[float, ...] = QUANTILES
    """Quantiles of the climatology beyond which a value is an event; none leaves events out."""
    against: tuple[str, ...] = ()
    """Forecasts scored before with the same truth, to lay beside this one: FORECAST or NAME=FORECAST."""
    drift: Literal["auto", "yes", "no"] = "auto"
    """Stability report and Hovmoller sections; auto = where the longest lead time is 15 days or more."""
    tracks: str = ""
    """Tropical cyclones: `truth` to find the true ones in the truth too, or a CSV file of IBTrACS."""
    reference: reports.Truth = "none"
    """What the truth is, to stand beside the WeatherBench 2 scores of 2022: analysis (HRES-T0) or era5."""
    table_lead_h: tuple[int, ...] = ()
    """Lead times (h) to print tables of channels, regions and events for; none means the last."""
    case_init: str = ""
    """Init time of the maps, such as 2000-06-01T06; empty means the first."""
    case_lead_h: int = 0
    """Lead time (h) of the maps and spectra; 0 means the last."""
    plots: bool = True
    """Make pictures (needs matplotlib)."""
    threads: int = 0
    """Threads that score channels side by side; 0 means one per core of each rank."""
    timeout_s: float = 3600.0
    """How long ranks wait for each other before they give up; more than one init time takes."""
    dry_run: bool = False
    """Check everything, print what would be scored, and exit."""
    json: bool = False
    """Print one JSON object (the plan, or the scores) in place of tables."""


def _position(values: list[Any], wanted: Any, what: str) -> int:
    """Return the place of `wanted`, or raise a ValueError that lists what there is."""
    if wanted not in values:
        raise ValueError(f"the forecast has no {what} {wanted}; it has {', '.join(map(str, values))}")
    return values.index(wanted)


def _check_plots() -> None:
    try:
        plots.require_matplotlib()
    except plots.NoMatplotlib as error:
        raise ValueError(f"{error}, or leave pictures out: --no-plots") from None


class Evaluation:
    """A forecast beside its truth."""

    def __init__(self, config: EvaluateConfig) -> None:
        if config.plots and not config.dry_run:
            _check_plots()
        if config.threads < 0:
            raise ValueError("threads are 0 or more")
        if not all(0 < quantile < 1 for quantile in config.quantiles):
            raise ValueError(f"quantiles {config.quantiles} must lie between 0 and 1")
        if config.drift == "yes" and config.climatology == "none":
            raise ValueError("--drift yes needs a climatology: leave --climatology none out")
        self.config = config
        self.forecast = open_forecast(config.forecast)
        self.truth = Store(config.truth or packaged_sample())
        self.pair = match(self.forecast, self.truth, config.channels, config.lead_h)
        self.out = Path(config.out or config.forecast.rstrip("/") + ".scores")
        inits, lead_h = list(self.pair.inits), list(self.pair.lead_h)
        init = np.datetime64(config.case_init, "s") if config.case_init else inits[0]
        self.case_lead = _position(lead_h, config.case_lead_h or lead_h[-1], "lead time (h)")
        self.case = (_position(inits, init, "init time"), self.case_lead)
        shown_h = config.table_lead_h or lead_h[-1:]
        self.table_leads = [_position(lead_h, hours, "lead time (h)") for hours in shown_h]
        self.period = self.truth.statistics.train_period
        self.source = self._climatology_store()
        self._check_members()
        self.rivals = [read_rival(text) for text in config.against]
        self.opened = self._open_climatology()
        self.labels = Labels(
            self._title(), config.forecast, str(self.truth.path), config.weights, self._notes()
        )

    def _title(self) -> str:
        """Return what the data are, as they say it themselves; simulations are called by their name."""
        titles = (about.get("title") or about.get("source") for about in self.truth.made.get("about", ()))
        data = "; ".join(dict.fromkeys(title for title in titles if title))
        title = str(self.forecast.attrs.get("title") or data or self.truth.path.name)
        return SAMPLE_TITLE if "SPEEDY" in data and "perfect-model" not in title else title

    def _notes(self) -> tuple[str, ...]:
        notes = []
        inside = self.pair.inside(self.period)
        if inside:
            start, end = self.period
            notes.append(
                f"{inside} of {len(self.pair.inits)} forecasts lie in the training period {start} .. {end}"
            )
        if seen := self._seen_by_climatology():
            notes.append(
                f"{seen} valid times lie in the period of the climatology, which makes it look better"
            )
        if self.config.quantiles and not self.quantiles and self.config.climatology != "none":
            notes.append(f"no events: {self.config.climatology} has no quantiles")
        few = self._few_samples()
        return tuple([*notes, few] if few else notes)

    def _check_members(self) -> None:
        """Refuse members of climatology that cannot be drawn."""
        members = self.config.climatology_members
        if not members:
            return
        if members < 2 or self.build is None:
            raise ValueError(
                f"--climatology-members {members} must be 2 or more, from a climatology that is built "
                f"(--climatology build, or a store), not {self.config.climatology}"
            )
        if members > self.fewest_samples:
            raise ValueError(
                f"--climatology-members {members}: the climatology has {self.fewest_samples} times of a kind"
            )

    def _draw(self, valid: np.datetime64) -> Fields:
        """Return the members [M, C, Y, X] of the probabilistic climatology."""
        assert self.build is not None
        numbers = draw_times(self.build.samples, valid, self.config.climatology_members)
        return np.stack([self.build.store.read(int(number)) for number in numbers])

    def _climatology_store(self) -> Store | None:
        """Return the store whose training period the climatology is built from, if it is built."""
        if self.config.climatology == "build":
            return self.truth
        if not (Path(self.config.climatology) / HEADER).exists():
            return None
        store = Store(self.config.climatology)
        for what in ("latitude_deg", "longitude_deg"):
            here, there = getattr(self.truth, what), getattr(store, what)
            if len(here) != len(there) or not np.allclose(here, there, rtol=0, atol=1e-3):
                raise ValueError(f"--climatology {store.path} has another grid than the truth")
        return store

    def _open_climatology(self) -> Climatology | None:
        """Open the climatology of a file, if one is to be used."""
        if self.config.climatology == "none" or self.source is not None:
            return None
        own = [name for name in self.pair.names if not components(name)]
        try:
            opened = open_climatology(self.config.climatology, self.truth, self.pair.names)
        except ValueError:
            if len(own) == len(self.pair.names):
                raise
            opened = open_climatology(self.config.climatology, self.truth, own).widened(self.pair.names)
        lacking = opened.without(self.usual_times)
        if lacking:
            raise ValueError(f"{self.config.climatology} lacks {len(lacking)} slots, first {lacking[0]}")
        return opened

    @property
    def long(self) -> bool:
        """Whether there is a stability report."""
        config = self.config
        wanted = config.drift == "yes" or (config.drift == "auto" and self.pair.lead_h[-1] >= reports.LONG_H)
        return wanted and config.climatology != "none"

    @property
    def usual_times(self) -> NDArray[np.datetime64]:
        """Times a climatology is needed for: a stability report wants it without a truth too."""
        return self.pair.valid_times.ravel() if self.long else self.pair.truth_times

    @cached_property
    def build(self) -> Build | None:
        """How the climatology is made, if it is to be."""
        if self.source is None:
            return None
        return Build(
            PickedStore("climatology's store", self.source, self.pair.names),
            self.source.statistics.train_period,
            needed_slots(self.usual_times),
            tuple(range(len(self.pair.names))),
            self.config.quantiles,
            tuple(headline_channels(self.pair.names, EVENT_CHANNELS)),
        )

    @property
    def quantiles(self) -> tuple[float, ...]:
        """The quantiles that events are made of: those asked for, as far as a file has them."""
        if self.config.climatology == "none":
            return ()
        known = self.config.quantiles if self.opened is None else self.opened.quantiles
        missing = [q for q in self.config.quantiles if not np.isclose(q, known).any()]
        if missing and self.config.quantiles != QUANTILES:
            has = " ".join(f"{q:g}" for q in known) or "none"
            raise ValueError(f"{self.config.climatology} has no quantile {missing[0]:g}; it has {has}")
        return tuple(q for q in self.config.quantiles if q not in missing)

    def _seen_by_climatology(self) -> int:
        """Return how many valid times the climatology is made of too."""
        if self.opened is not None:
            return self.opened.about.inside(self.pair.truth_times)
        if self.build is None:
            return 0
        start, end = self.build.period
        times = self.pair.truth_times
        return int(((times >= start) & (times <= end)).sum())

    @cached_property
    def fewest_samples(self) -> int:
        """The number of times of the slot of the climatology that has the fewest; 0 if none is built."""
        build = self.build
        return min(len(build.samples.of(build.kind(slot))[0]) for slot in build.slots) if build else 0

    def _few_samples(self) -> str:
        """Say which quantiles have hardly a sample beyond them, or nothing."""
        if self.build is None or not self.quantiles:
            return ""
        count = self.fewest_samples
        far = [q for q in self.quantiles if count * min(q, 1 - q) < FEWEST_BEYOND]
        if not far:
            return ""
        named = " ".join(f"{q:g}" for q in far)
        return f"quantiles {named} are of {count} times: fewer than {FEWEST_BEYOND} lie beyond"

    @property
    def climatology_reads(self) -> int:
        """Number of fields to read for the climatology."""
        return self.build.reads if self.build else 0

    def make_climatology(self, path: Path, advance: Callable[[], None]) -> None:
        """Build the climatology into a file, unless it is there."""
        if self.build is None or path.exists():
            return
        made = self.build.run(advance)
        try:
            save(made, path, self.truth)
        except RuntimeError as error:  # what HDF5 makes of a full disk when it closes a file
            found = re.search(r"error message = '([^']+)'", str(error))
            reason = found[1] if found else str(error).splitlines()[0]
            raise OSError(f"{path} cannot be written: {reason}") from error

    def scoring(self, path: Path) -> Scoring:
        """Return what collects the scores.

        Args:
            path: file of the climatology, where one was built.
        """
        usual = self.opened
        if self.build is not None:
            usual = open_climatology(str(path), self.truth, self.pair.names)
        std_C = np.full(len(self.pair.names), np.nan)
        for place, picked in enumerate(self.pair.truth_picked.places):
            if len(picked) == 1:
                std_C[place] = self.truth.statistics.std_C[picked[0]]
        members = self.config.climatology_members
        drawn = self._draw if members else None
        rest = (self.more(usual), self.config.threads, not self.long)
        options = Options(std_C, self.quantiles, members, drawn, *rest)
        return Scoring(self.pair, self.labels, usual, options)

    def more(self, usual: Climatology | None) -> dict[str, Collector[Any]]:
        """Return the collectors beside those every scorecard has."""
        wanted = usual if self.long else None
        return reports.collectors(self.pair, self.config.weights, self.case[0], wanted, self.config.tracks)

    def key(self) -> dict[str, Any]:
        """Return what the contributions of init times depend on."""
        config = self.config
        pair = self.pair
        value = {
            "version": _VERSION,
            "forecast": str(Path(config.forecast).resolve()),
            "made": self.forecast.attrs,
            "inits": [str(init) for init in pair.inits],
            "lead_h": pair.lead_h,
            "members": self.forecast.members,
            "channels": pair.names,
            "truth": self.truth_id,
            "valid": pair.valid_IJ.tolist(),
            "weights": config.weights,
            "climatology": [config.climatology, self.source.fingerprint_id if self.source else ""],
            "climatology_members": config.climatology_members,
            "quantiles": self.quantiles,
            "more": [self.long, self.case[0] if self.long else 0, config.tracks],
        }
        plain: dict[str, Any] = json.loads(json.dumps(value, default=str))
        return plain

    @property
    def truth_id(self) -> str:
        """Return which store the truth is, wherever it lies."""
        return f"{self.truth.path.resolve().name} {self.truth.fingerprint_id}"

    @property
    def parts(self) -> Parts:
        """Where init times leave what they contribute."""
        return Parts(self.out / "parts", self.key(), list(self.pair.inits))

    def judged(self, sums_IJCS: Any) -> Judged:
        """Return what other evaluations need to stand beside this one."""
        return Judged(
            name=Path(self.config.forecast.rstrip("/")).stem,
            title=self.labels.title,
            truth=self.truth_id,
            weights=self.config.weights,
            members=self.forecast.members,
            inits=self.pair.inits,
            lead_h=self.pair.lead_h,
            channels=self.pair.names,
            sums_IJCS=sums_IJCS,
        )

    def plan(self) -> dict[str, Any]:
        """Return what would be scored, as plain data."""
        pair = self.pair
        steps = pair.valid_IJ.size
        field_bytes = 4 * self.truth.rows * self.truth.cols
        drawn = self.config.climatology_members
        truth_reads = steps * (1 + drawn) + len(pair.inits) + self.climatology_reads
        made_of = len(self.truth.names) + len(pair.names)
        init, lead = self.case
        return {
            "title": self.labels.title,
            "forecast": self.labels.forecast,
            "truth": self.labels.truth,
            "init_times": [str(time) for time in pair.inits],
            "lead_h": list(pair.lead_h),
            "members": self.forecast.members,
            "channels": [channel.name for channel in pair.channels],
            "area_weights": self.labels.weights,
            "climatology": self.config.climatology,
            "climatology_times": self.build.times_used if self.build else 0,
            "climatology_bytes": self.build.result_bytes if self.build else 0,
            "event_quantiles": list(self.quantiles),
            "forecast_bytes": steps * self.forecast.members * field_bytes * len(self.forecast.names),
            "truth_bytes": truth_reads * field_bytes * len(self.truth.names),
            "memory_bytes": (self.forecast.members + drawn + 2) * field_bytes * made_of,
            "against": [rival.name for rival in self.rivals],
            "maps_of": f"init {pair.inits[init]}, lead {pair.lead_h[lead]} h",
            "out": str(self.out),
            "notes": [*self.labels.notes, *pair.notes()],
        }
