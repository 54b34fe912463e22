"""What a scheduler is asked while a job runs: how long it has left, and what it was asked for."""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Mapping, Sequence

ASK_LIMIT_S = 30.0
"""How long a scheduler may take to answer a question."""
_DURATION = r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)"


def seconds(duration: str) -> float:
    """Return a duration in seconds: 30:00, 12:30:00 or Slurm's 1-12:30:00.

    Raises:
        ValueError: it is none of these; a bare number is seconds to one scheduler and minutes to the other.
    """
    if duration.isdigit():
        raise ValueError(
            f"{duration!r} has no unit: write {duration}:00:00 for hours, {duration}:00 for minutes"
        )
    if not (match := re.fullmatch(_DURATION, duration)):
        raise ValueError(f"{duration!r} is no duration: write hours:minutes:seconds")
    days, hours, minutes, rest = (int(number or 0) for number in match.groups())
    return 86400.0 * days + 3600.0 * hours + 60.0 * minutes + rest


def clock(duration_s: float) -> str:
    """Write seconds as hours:minutes:seconds, as schedulers want it."""
    minutes, rest = divmod(round(duration_s), 60)
    return f"{minutes // 60:02d}:{minutes % 60:02d}:{rest:02d}"


def ask(question: Sequence[str]) -> str:
    """Run a scheduler's command and return what it prints; "" if it is missing, fails or takes too long."""
    try:
        answer = subprocess.run(
            question,
            capture_output=True,
            text=True,
            timeout=ASK_LIMIT_S,
            check=True,
            stdin=subprocess.DEVNULL,
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return answer.stdout


def attributes(answer: str) -> dict[str, str]:
    """Read the lines `name = value` of `qstat -f`; a long value goes on in lines that begin with a tab."""
    pairs = (line.strip().partition(" = ") for line in answer.replace("\n\t", "").splitlines())
    return {name: value for name, equals, value in pairs if equals}


def pbs_seconds_left(environ: Mapping[str, str]) -> float | None:
    """Return how long this PBS job may still run; None if it is none, has no limit, or nobody says."""
    if not (job := environ.get("PBS_JOBID")):
        return None
    said = attributes(ask(["qstat", "-f", job]))
    if not re.fullmatch(_DURATION, limit := said.get("Resource_List.walltime", "")):
        return None
    try:  # the start is exact; the time used is brought up to date every few minutes only
        begun = time.mktime(time.strptime(said.get("stime", ""), "%a %b %d %H:%M:%S %Y"))
    except ValueError:
        used = said.get("resources_used.walltime", "")
        return seconds(limit) - seconds(used) if re.fullmatch(_DURATION, used) else None
    return begun + seconds(limit) - time.time()


def slurm_seconds_left(environ: Mapping[str, str]) -> float | None:
    """Return how long this Slurm job may still run; None if it is none, has no limit, or nobody says."""
    if environ.get("SLURM_JOB_END_TIME", "").isdigit():
        return float(environ["SLURM_JOB_END_TIME"]) - time.time()
    if not (job := environ.get("SLURM_JOB_ID")):
        return None
    left = ask(["squeue", "--noheader", "--jobs", job, "--format", "%L"]).strip()
    return seconds(left) if re.fullmatch(_DURATION, left) else None


def pbs_asked(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the nodes, walltime, queue and account this PBS job asked for, as far as PBS says."""
    if not (job := environ.get("PBS_JOBID")):
        return {}
    said = attributes(ask(["qstat", "-f", job]))
    return {
        "nodes": said.get("Resource_List.nodect", ""),
        "walltime": said.get("Resource_List.walltime", ""),
        # Where it was submitted: a routing queue hands jobs on to others, which take none directly.
        "queue": environ.get("PBS_O_QUEUE", said.get("queue", "")),
        "account": said.get("Account_Name", ""),
    }


def slurm_asked(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the nodes, walltime, partition and account this Slurm job asked for, as far as Slurm says."""
    if not (job := environ.get("SLURM_JOB_ID")):
        return {}
    return {
        "nodes": environ.get("SLURM_JOB_NUM_NODES", ""),
        "walltime": ask(["squeue", "--noheader", "--jobs", job, "--format", "%l"]).strip(),
        "queue": environ.get("SLURM_JOB_PARTITION", ""),
        "account": environ.get("SLURM_JOB_ACCOUNT", ""),
    }
