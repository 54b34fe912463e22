"""The exit statuses of our programs: what somebody who starts them, a job script or a person, does next."""

from __future__ import annotations

DONE = 0
MISTAKE = 2
"""The user's: the same command would fail again. The message says what to change."""
IO = 74
"""A file could not be read or written (EX_IOERR of sysexits.h): mend that, and the same command goes on."""
STOPPED = 75
"""Asked to stop, and saved (EX_TEMPFAIL): the same command goes on."""
LOST = 76
"""A rank died or is stuck (EX_PROTOCOL): the same command goes on, if need be without that rank's machine."""
INTERRUPTED = 130
"""Ctrl-C: the same command goes on from the last checkpoint."""

GO_ON = (IO, STOPPED, LOST, INTERRUPTED)
"""Statuses after which starting the same command again makes sense without changing anything else."""
