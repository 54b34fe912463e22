"""AERIS: pixel-level Swin diffusion models of the weather."""

import sys
from types import TracebackType


def _interrupted(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """End without a word where Ctrl-C came before the program could take it."""
    if issubclass(kind, KeyboardInterrupt):
        raise SystemExit(130)
    sys.__excepthook__(kind, error, trace)


if sys.argv[:1] == ["-m"]:  # so it is while Python looks for the program of `python -m aeris...`
    sys.excepthook = _interrupted
