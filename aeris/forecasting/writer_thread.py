"""Work done in a thread beside the computation, in order, with so much waiting and no more."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable

Job = Callable[[], None]


class WriterThread:
    """Does jobs one after the other in a thread of its own.

    After a job has failed, those behind it are dropped. Nothing here raises but `check` and `close`, so that
    a rank which talks to others can choose where it does.

    Attributes:
        busy_s: how long jobs have taken.
    """

    def __init__(self, room: int) -> None:
        """Start the thread.

        Args:
            room: jobs that may wait; `do` waits for room. One more is being done.
        """
        self.busy_s = 0.0
        self._failure: Exception | None = None
        self._jobs: queue.Queue[Job | None] = queue.Queue(room)
        self._thread = threading.Thread(target=self._work, daemon=True, name="writer")
        self._thread.start()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            begun = time.perf_counter()
            try:
                if self._failure is None:
                    job()
            except Exception as error:
                self._failure = error
            del job  # what it holds may be large
            self.busy_s += time.perf_counter() - begun

    def do(self, job: Job) -> None:
        """Do a job later; waits while there is no room for it."""
        self._jobs.put(job)

    def check(self) -> None:
        """Raise the error of a job that failed."""
        if self._failure is not None:
            raise self._failure

    def stop(self) -> None:
        """Wait until everything is done, and end the thread."""
        if self._thread.is_alive():
            self._jobs.put(None)
            self._thread.join()

    def close(self) -> None:
        """Do the same, and raise the error of a job that failed."""
        self.stop()
        self.check()
