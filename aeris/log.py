"""What a program says: one-line errors, the run's `log.jsonl`, and one live progress line."""

from __future__ import annotations

import errno
import io
import json
import math
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, Task, TextColumn, TimeRemainingColumn
from rich.table import Column
from rich.text import Text

from aeris.interruption import Stopped
from launch import exits

console = Console(highlight=False, soft_wrap=True)

BROKEN = ("CUDA error", "HIP error", "UR_RESULT_", "level_zero")
"""Words by which an error of a device is told from one of the computation, where its type says nothing."""
NO_MEMORY = ("out of memory", "OUT_OF_DEVICE_MEMORY")
SOUND = ("device-side assert", "no kernel image")
"""Words of such errors that another device would have too."""


@dataclass
class Speaker:
    """Who this process is among others: rank 0 speaks, another rank only of an error of its own."""

    rank: int = 0
    world: int = 1

    def take_turn(self, rank: int, world: int = 1) -> None:
        """Be quiet on every rank but 0."""
        self.rank, self.world = rank, max(world, rank + 1)
        console.quiet = rank != 0

    def work_alone(self, what: str, rank: int, world: int) -> None:
        """Refuse to be one of several ranks that would all do the same.

        Raises:
            ValueError: `what` was started on several ranks.
        """
        self.take_turn(rank, world)
        if world > 1:
            raise ValueError(
                f"{what} works in one process, not on {world} ranks: start it without a launcher"
            )

    @contextmanager
    def hush(self) -> Iterator[None]:
        """Let only rank 0 print what a library prints by itself."""
        with ExitStack() as stack:
            if self.rank:
                stack.enter_context(redirect_stdout(io.StringIO()))
                stack.enter_context(redirect_stderr(io.StringIO()))
            yield

    def say(self, error: BaseException, text: str) -> None:
        """Say an error: on rank 0 at once, on others in turn, with their name where the text does not say it.

        What all ranks have, only rank 0 says. See `wait_for_turn`.
        """
        self.wait_for_turn()
        if self.rank and _all_have(error):
            return
        named = isinstance(error, ConnectionError) or broken_device(error)
        whose = f"rank {self.rank}: " if self.rank and not named else ""
        stderr = Console(stderr=True, highlight=False, soft_wrap=True)
        stderr.print(Text.assemble(("error: ", "bold red"), f"{whose}{text}"))

    def wait_for_turn(self) -> None:
        """Let ranks before this one speak first, the later the longer: rank 1 for 2 s, rank 100,000 for 10 s.

        A launcher ends all ranks when one ends. So where rank 0 has the same error, or has lost the same
        rank, it has said so by then, and this one is no more; of 100,000 ranks a few lines are left.
        """
        if self.rank:
            time.sleep(2.0 + 0.5 * math.log2(self.rank))

    def say_end(self, text: str) -> None:
        """Say, on rank 0, that the program ends early, as it was asked to."""
        if self.rank == 0:
            Console(stderr=True, highlight=False, soft_wrap=True).print(text, markup=False)


speaker = Speaker()


def status_of(error: BaseException) -> int:
    """Return the exit status of a program that ends with this error (launch/exits.py); 1: a bug of ours."""
    if isinstance(error, Stopped):
        return exits.STOPPED
    if isinstance(error, KeyboardInterrupt):
        return exits.INTERRUPTED
    if isinstance(error, ConnectionError) or broken_device(error):
        return exits.LOST
    if isinstance(error, OSError) or getattr(error, "of_a_file", False):
        return exits.IO
    # By its name: torch, which is not imported to start fast, has its own kind of RuntimeError.
    return exits.MISTAKE if isinstance(error, ValueError) or _no_memory(error) else 1


def _no_memory(error: BaseException) -> bool:
    if type(error).__name__ == "OutOfMemoryError":
        return True
    return _of_a_device(error) and any(word in str(error) for word in NO_MEMORY)


def broken_device(error: BaseException) -> bool:
    """Whether an error is that of a device that no longer works: the run goes on without its machine."""
    return _of_a_device(error) and not any(word in str(error) for word in (*NO_MEMORY, *SOUND))


def _of_a_device(error: BaseException) -> bool:
    if not isinstance(error, RuntimeError):
        return False
    return type(error).__name__ == "AcceleratorError" or any(word in str(error) for word in BROKEN)


def run_program(main: Callable[[], None]) -> None:
    """Run a program's `main`; what a user can mend becomes one line on stderr and the status of `status_of`.

    Among several ranks an error that all have is said once, and one of a single rank says whose it is.
    """
    try:
        main()
    except (KeyboardInterrupt, Exception) as error:
        status, text = status_of(error), words(error)
        if status == 1:
            if speaker.world == 1:
                raise
            _say_bug(error, text)
        else:
            _tell_torchrun(text)
            if status not in (exits.STOPPED, exits.INTERRUPTED):
                speaker.say(error, text)
            elif not getattr(error, "said", False):
                speaker.say_end(text)
        if status == exits.LOST or (speaker.world > 1 and not _all_have(error)):
            # A thread that waits for another rank, or a broken device, must not keep this one alive:
            # the others learn from its end.
            sys.stdout.flush()
            os._exit(status)
        sys.exit(status)


def _all_have(error: BaseException) -> bool:
    """Whether all ranks end with this error together. By name: torch is not imported to start fast."""
    return type(error).__name__ in ("AgreedError", "WrongData", "Stopped")


def _say_bug(error: BaseException, text: str) -> None:
    """Print the traceback, and after it whose it is: a supervisor looks for that line."""
    speaker.wait_for_turn()
    trace = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    print(f"{trace}error: rank {speaker.rank}: {text.splitlines()[0]}", file=sys.stderr, flush=True)


def words(error: BaseException) -> str:
    """Return what a user is told of an error, in one line."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted; the same command goes on from the last checkpoint or finished piece, if any"
    if _no_memory(error):
        hint = "try a smaller --train.microbatch or --batch, or checkpointing (--help names it)"
        return f"{str(error).splitlines()[0]}: {hint}"
    if broken_device(error):
        whose = f"rank {speaker.rank}: " if speaker.world > 1 else ""
        return f"{whose}{type(error).__name__}: {' '.join(str(error).split())}"
    if isinstance(error, OSError) and error.errno is not None and error.args[:1] == (error.errno,):
        where = f" ({error.filename})" if error.filename else ""  # raised by the system, not in words of ours
        room = "; free some space, and the same command goes on" if error.errno == errno.ENOSPC else ""
        return f"{error.strerror}{where}{room}"
    return str(error) if status_of(error) != 1 else f"{type(error).__name__}: {error}"


def _tell_torchrun(text: str) -> None:
    """Let torchrun end its long report of a failure with our line: it shows what this file holds."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        about = {"py_callstack": text, "timestamp": str(int(time.time()))}
        with suppress(OSError):
            Path(path).write_text(json.dumps({"message": {"message": text, "extraInfo": about}}))


class _Cropped(TextColumn):
    """A text whose end is left out where the line is too long, before any other column gives way."""

    def render(self, task: Task) -> Text:
        text = super().render(task)
        text.no_wrap, text.overflow = True, "ellipsis"
        return text


def progress_bar(*fields: str) -> Progress:
    """Make the live progress line: a bar, done/total, the named `fields`, time left; 80 columns hold it."""
    return Progress(
        TextColumn("[bold]{task.description}"),
        BarColumn(bar_width=8),
        TextColumn("{task.completed:.0f}/{task.total:.0f}"),
        *(_Cropped(f"{{task.fields[{name}]}}", table_column=Column()) for name in fields),
        TimeRemainingColumn(),
        TextColumn("left"),
        console=console,
        refresh_per_second=2,
        disable=console.quiet,  # no thread to draw what nobody sees
    )


class TrainingLine:
    """The live line of a run: images done, smoothed loss, rates; without a terminal, one every 30 s."""

    EVERY_S = 30.0

    def __init__(self, images: int, images_seen: int, keep: float, digits: int) -> None:
        """Make the line; it shows while `bar` is open as a context.

        Args:
            images: where the run ends.
            images_seen: where it begins.
            keep: share of the smoothed loss that a new one leaves.
            digits: of the loss, behind the point.
        """
        self.bar = progress_bar("numbers")
        self._task = self.bar.add_task("", total=images, completed=images_seen, numbers="")
        self._loss = math.nan
        self._keep, self._digits = keep, digits
        self._said = time.monotonic()

    def smooth(self, loss: float) -> None:
        """Take in the loss of a step; that of a skipped step is left out."""
        if math.isfinite(loss):
            keep = self._keep if math.isfinite(self._loss) else 0.0
            self._loss = loss if not keep else keep * self._loss + (1 - keep) * loss

    def show(self, images_seen: int, rates: str) -> None:
        """Show how far the run is, and how fast."""
        numbers = f"loss {self._loss:.{self._digits}f} {rates}"
        self.bar.update(self._task, completed=images_seen, numbers=numbers)
        if not console.is_terminal and time.monotonic() - self._said > self.EVERY_S:
            self._said = time.monotonic()
            console.print(f"image {images_seen:,}: {numbers}")


class RunLog:
    """The records of a run, one JSON object per line in `log.jsonl`, each with `images_seen`."""

    def __init__(self, path: Path | None, images_seen: int) -> None:
        """Open for appending; cut off records after `images_seen`, whose steps a resumed run takes again.

        Without a path nothing is written: only one rank of a run writes its log.
        """
        self._file = None
        if path is None:
            return
        kept = []
        if path.exists():
            for line in path.read_text().splitlines():
                try:
                    record = json.loads(line)
                except json.JSONDecodeError:
                    break  # the line a killed run was writing
                if record["images_seen"] <= images_seen:
                    kept.append(line)
            partial = path.with_name(path.name + ".partial")
            partial.write_text("".join(line + "\n" for line in kept))
            partial.replace(path)
        self._file = path.open("a", buffering=1)

    def write(self, record: dict[str, Any]) -> None:
        """Append one record; a number that is not finite becomes null, as JSON has no other word for it."""
        if self._file is not None:
            try:
                self._file.write(json.dumps(_finite(record), allow_nan=False) + "\n")
            except OSError as error:
                raise OSError(error.errno, error.strerror, self._file.name) from error

    def __enter__(self) -> RunLog:
        """Use as a context, so that the file is closed whatever happens."""
        return self

    def __exit__(self, *error: object) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()


def _finite(value: Any) -> Any:
    """Put None for numbers that are not finite, at any depth."""
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
