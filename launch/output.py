"""What a job prints: its own lines and all that its programs print, with a copy of each attempt in a file.

A full disk or a closed terminal must not end a run, so what cannot be written is left out, once with a word.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from launch.verdict import telling

COPY_BYTES = 1 << 26
"""Largest copy of an attempt's output: a rank that prints without end must not fill the file system."""
_LINES, _LINE_BYTES = 2000, 4096


class Output:
    """Passes output on as it comes, in pieces or lines, and keeps the lines that say who failed."""

    def __init__(self) -> None:
        """Nothing is printed yet."""
        self.last = time.monotonic()
        self.signs: list[str] = []
        self._lock = threading.Lock()
        self._open_ends: list[IO[bytes]] = [sys.stdout.buffer]
        self._copy: IO[bytes] | None = None
        self._stream: IO[bytes] | None = None
        self._room = 0
        self._line = b""
        self._ended = True  # the last line passed on

    @contextmanager
    def copied(self, path: Path) -> Iterator[None]:
        """Copy what is printed meanwhile into a file, and collect `signs` anew.

        Raises:
            OSError: the file cannot be made.
        """
        self.signs, self._line, self._room = [], b"", COPY_BYTES
        with path.open("wb", buffering=0) as self._copy:
            self._open_ends.append(self._copy)
            try:
                yield
            finally:
                with self._lock:
                    if self._copy in self._open_ends:
                        self._open_ends.remove(self._copy)
                    self._copy = None

    def say(self, text: str) -> None:
        """Print a line of the job's own."""
        with self._lock:
            self._write((b"" if self._ended else b"\n") + f"job: {text}\n".encode())

    def follow(self, stream: IO[bytes]) -> None:
        """Pass on what comes from a program until it and all that it started have closed their end."""
        self._stream = stream
        with suppress(OSError, ValueError), stream:
            while data := os.read(stream.fileno(), 1 << 16):
                if self._stream is not stream:  # what an earlier program left is no sign of life of this one
                    return
                self.last = time.monotonic()
                with self._lock:
                    self._write(data)
                    self._search(data)
        with self._lock:
            self._search(b"\n")  # the last line need not end

    def _write(self, data: bytes) -> None:
        """Write to all that still takes it."""
        self._ended = data.endswith(b"\n")
        for end in list(self._open_ends):
            piece = data[: self._room] if end is self._copy else data
            try:
                end.write(piece)
                end.flush()
            except (OSError, ValueError) as error:
                self._leave_out(end, getattr(error, "strerror", None) or str(error))
            if end is self._copy:
                self._room -= len(piece)
                if self._room <= 0:
                    self._leave_out(end, f"it has {COPY_BYTES >> 20} MiB already")

    def _leave_out(self, end: IO[bytes], why: str) -> None:
        self._open_ends.remove(end)
        what = "the copy of the output" if end is self._copy else "this output"
        for other in self._open_ends:
            with suppress(OSError, ValueError):
                other.write(f"job: {what} ends here: {why}\n".encode())
                other.flush()

    def _search(self, data: bytes) -> None:
        """Keep the lines that name who failed; a line may come in pieces, and need not end."""
        *lines, self._line = (self._line + data).replace(b"\r", b"\n").split(b"\n")
        self._line = self._line[-_LINE_BYTES:]
        for line in lines:
            text = line[:_LINE_BYTES].decode(errors="replace")
            if len(self.signs) < _LINES and telling(text, self.signs):
                self.signs.append(text)
