"""Fixtures of the tests of jobs."""

from tests.launch.told import told

__all__ = ["told"]
