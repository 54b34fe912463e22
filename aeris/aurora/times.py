"""Times in UTC, whatever zone the host is in."""

from __future__ import annotations

from datetime import datetime, timezone


def utc(time: datetime) -> datetime:
    """Return a time in UTC without its zone; one that has none is in UTC already."""
    return time if time.tzinfo is None else time.astimezone(timezone.utc).replace(tzinfo=None)


def hours_since_1970(time: datetime) -> float:
    """Return the hours from 1970-01-01 00 UTC; a time without a zone is UTC."""
    return utc(time).replace(tzinfo=timezone.utc).timestamp() / 3600
