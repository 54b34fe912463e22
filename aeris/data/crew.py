"""The processes of one program that work on a conversion, and the one that watches them."""

from __future__ import annotations

import multiprocessing
import signal
import sys
from multiprocessing.connection import Connection
from types import TracebackType

from aeris.data import conversion
from aeris.data.options import Options
from aeris.data.plan import Conversion, plan
from aeris.data.sharing import Track, silent
from aeris.data.yearfile import StoreError

PATIENCE_S = 10.0  # until a process that was asked to end is killed


def run_in_processes(job: Conversion, track: Track = silent, place: int = 0, places: int = 1) -> None:
    """Run a conversion in `job.options.processes` processes.

    Args:
        place: number of this program among the `places` that were started together.

    Raises:
        StoreError: the data cannot be used, or a process was killed; what is finished stays.
    """
    count = job.options.processes
    if count == 1 or conversion.is_done(job):
        conversion.run(job, track, place, places)
        return
    with Crew(job.options, count, place * count, places * count) as crew:
        conversion.run(job, track, -1, check=crew.check)


class Crew:
    """Processes that each open the sources for themselves and join the work; they end with this context."""

    def __init__(self, options: Options, count: int, place: int, places: int) -> None:
        context = multiprocessing.get_context("forkserver")
        self._members = []
        for number in range(count):
            ours, theirs = context.Pipe(duplex=False)
            arguments = (options, place + number, places, theirs)
            process = context.Process(target=_join, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self._members.append((process, ours))

    def __enter__(self) -> Crew:
        """Use as a context, so that no process is left over."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the processes; after a conversion that went well they end by themselves."""
        for process, _ in self._members:
            if kind is not None:
                process.terminate()
        for process, _ in self._members:
            process.join(None if kind is None else PATIENCE_S)
            if process.is_alive():
                process.kill()
                process.join()

    def check(self) -> None:
        """Raise what a process has raised, or that it was killed."""
        for process, pipe in self._members:
            if process.exitcode in (None, 0):
                continue
            try:
                error = pipe.recv()
            except EOFError:
                error = None
            if isinstance(error, BaseException):
                raise error
            raise StoreError(
                f"a process of the conversion ended with {_ended(process.exitcode or 0)}: what is written "
                "stays, and the same command goes on, with fewer --processes if memory is short",
                of_a_file=True,
            )


def _ended(code: int) -> str:
    name = signal.Signals(-code).name if code < 0 else ""
    return f"{name} (out of memory, or killed)" if name == "SIGKILL" else name or f"status {code}"


def _join(options: Options, place: int, places: int, pipe: Connection) -> None:
    """Work until all is done; an error goes to the program that watches."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # gives back what it claims
    try:
        conversion.run(plan(options), silent, place, places)
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except Exception as error:
        pipe.send(error)
        raise SystemExit(1) from None
