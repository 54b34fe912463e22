"""The official Aurora package (microsoft-aurora), to compare with, where it is installed.

It needs timm, and timm imports torchvision for things of no use here. Where torchvision is missing, as beside
torch builds that have none, empty modules stand in for it.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from types import ModuleType
from typing import Any


class _Name(type):
    """A class that has any attribute: its name."""

    def __getattr__(cls, name: str) -> str:
        if name.startswith("__"):
            raise AttributeError(name)
        return name


class _Empty(ModuleType):
    """A module that has any attribute: a class of that name."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Name(name, (), {})


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds torchvision and every module inside it."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        """Claim torchvision."""
        ours = name.partition(".")[0] == "torchvision"
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if ours else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        """Make an empty module."""
        return _Empty(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Do nothing: there is no code."""


def load_official() -> ModuleType | None:
    """Import the package; None if it is not installed."""
    if importlib.util.find_spec("aurora") is None:
        return None
    if importlib.util.find_spec("torchvision") is None and not any(
        isinstance(finder, _Finder) for finder in sys.meta_path
    ):
        sys.meta_path.append(_Finder())
    return importlib.import_module("aurora")
