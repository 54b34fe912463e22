"""Predictions on disk as a forecaster: files of aeris.aurora.batch_files, or one batch as Batch writes it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import datetime, timedelta
from pathlib import Path

from aeris.aurora.batch import Batch
from aeris.aurora.batch_files import Predictions, open_cf
from aeris.aurora.config import AuroraConfig
from aeris.aurora.training.errors import ChannelFields, fields_of


class FilePredictor:
    """Predictions read from a file.

    Raises:
        ValueError: the file is not one of predictions.
    """

    def __init__(self, name: str, made_from: str, path: Path) -> None:
        self.name, self.made_from, self._path = name, made_from, path
        self.config: AuroraConfig | None = None
        self.timestep_h = 0.0  # whatever was written
        self._batch: Batch | None = None
        self._forecast: Predictions | None = None
        try:
            self._forecast = open_cf(path)
        except ValueError as no_forecast:
            if path.is_dir():
                raise
            try:
                self._batch = Batch.from_netcdf(path)
            except ValueError:
                raise no_forecast from None

    def forecast(self, batch: Batch, lead_h: Sequence[int]) -> Iterator[ChannelFields]:
        """Read the fields that were predicted from the time of a batch.

        Raises:
            ValueError: the file does not have that start or lead time.
        """
        start = batch.metadata.time[0]
        for hours in lead_h:
            yield fields_of(self._read(start, timedelta(hours=hours)))

    def _read(self, start: datetime, lead: timedelta) -> Batch:
        if self._batch is not None:
            found = self._batch.metadata.time[0]
            if found != start + lead:
                raise ValueError(f"{self._path} is valid at {found}, not at {start + lead}")
            return self._batch
        assert self._forecast is not None, "one of the two was opened"
        starts, leads = self._forecast.starts, self._forecast.leads
        if start not in starts:
            raise ValueError(
                f"{self._path} has no prediction from {start}; it has {len(starts)} starts, "
                f"{min(starts)} to {max(starts)}"
            )
        if lead not in leads:
            have = ", ".join(f"{one / timedelta(hours=1):g}" for one in leads)
            raise ValueError(
                f"{self._path} has no prediction {lead / timedelta(hours=1):g} h ahead; it has {have}"
            )
        return self._forecast.read(starts.index(start), leads.index(lead))
