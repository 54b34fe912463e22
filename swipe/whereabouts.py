"""What a thread of this process is in: an operation that waits for other ranks, or a line of code."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import NamedTuple


class Inside(NamedTuple):
    """An operation that a thread is in."""

    operation: str
    since: float
    """On `time.monotonic`'s clock."""
    computes: bool
    """Whether it also computes there; else it only waits for other ranks."""


_inside: dict[int, Inside] = {}  # by thread: read by another thread, so neither local nor locked
_left: dict[int, float] = {}  # when a thread last came out of waiting


@contextmanager
def within(operation: str, computes: bool) -> Iterator[None]:
    """Let `whereabouts` know that this thread is in an operation while the context is open."""
    thread = threading.get_ident()
    before = _inside.get(thread)
    _inside[thread] = Inside(operation, time.monotonic(), computes)
    try:
        yield
    finally:
        if before is None:
            del _inside[thread]
        else:
            _inside[thread] = before
        if not computes:
            _left[thread] = time.monotonic()


def whereabouts(thread: int, since: float, reading: bool) -> tuple[str, float, bool]:
    """Say what a thread is in, since when at least, and whether it only waits for other ranks there.

    torch's own messages of weights and gradients are not announced: they are known by the files the thread
    (on a device: the thread of the backward pass) is in.
    """
    now, left = _inside.get(thread), _left.get(thread, 0.0)
    since = max(since, left)
    if now is not None and not now.computes:
        return now.operation, now.since, True
    frames = sys._current_frames()
    frame = frames.get(thread)
    if frame is None:
        return "nothing: its thread has ended", since, False
    if "torch/autograd/" in frame.f_code.co_filename:
        for other in frames.keys() - {thread, threading.get_ident()}:
            there = _inside.get(other)
            if there is not None and not there.computes:
                return there.operation, there.since, True
            if now is not None and _communicates(frames[other]):
                return now.operation, now.since, True
    place = _place(frame)
    if _communicates(frame):
        return (now.operation, now.since, True) if now else (f"torch's messages {place}", since, True)
    doing = "reading samples" if reading else now.operation if now else "computing"
    return f"{doing}, {place}", since, False


def _communicates(frame: FrameType) -> bool:
    _, torchs, path = frame.f_code.co_filename.replace(os.sep, "/").rpartition("torch/distributed/")
    # Those two compute, and leave for another file to communicate.
    return bool(torchs) and not path.startswith(("checkpoint/", "tensor/"))


def _place(frame: FrameType) -> str:
    """Name the innermost line of a stack that belongs to neither Python nor torch."""
    shown, at = frame, frame.f_back
    while _foreign(shown) and at is not None:
        shown, at = at, at.f_back
    if _foreign(shown):
        shown = frame
    short = "/".join(Path(shown.f_code.co_filename).parts[-2:])
    return f"at {short}:{shown.f_lineno} in {shown.f_code.co_name}"


def _foreign(frame: FrameType) -> bool:
    package = str(frame.f_globals.get("__name__", "")).split(".")[0]
    return package == "torch" or (package != "__main__" and package in sys.stdlib_module_names)
