"""Members of a forecast in the making: written and read back by one process of several.

`aeris/data/forecasts.py` begins and finishes the forecast. In PATH.partial, beside the fields in forecast/:

    progress.json    the plan, and how many lead times each member had when the program was last started
    done/PART        what this part of the processes has written since: "init first last+1 lead times" a line
    states/          where the forecast keeps less than a state: the last whole state of each member

A line is added when the fields of a lead time, and the state, are on disk: a kill costs what was on its way.

Shapes: M members, C channels, Y rows, X columns.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aeris.data.forecast_netcdf import NetcdfFiles
from aeris.data.forecast_plan import Field, ForecastError, ForecastPlan
from aeris.data.forecast_zarr import ZarrFiles

PROGRESS, CONTENTS, DONE, STATES = "progress.json", "forecast", "done", "states"  # in PATH.partial
Files = ZarrFiles | NetcdfFiles


def partial_of(path: Path) -> Path:
    """Return where the forecast `path` is made."""
    return path.with_name(path.name + ".partial")


def files_of(path: Path, plan: ForecastPlan) -> Files:
    """Return the files of a forecast in the making, of the kind that its name asks for."""
    kind = ZarrFiles if path.suffix == ".zarr" else NetcdfFiles
    return kind(partial_of(path) / CONTENTS, plan)


class MemberWriter:
    """Writes members of a forecast that was begun; each process writes its own ones.

    Args:
        path: of the forecast.
        plan: of the forecast.
        part: number of this writer; no two at the same time have the same.
        done_IM: lead times each member has; by default what is on disk.
    """

    def __init__(
        self, path: Path, plan: ForecastPlan, part: int = 0, done_IM: NDArray[np.int64] | None = None
    ) -> None:
        self.plan, self._partial, self._part = plan, partial_of(path), part
        self._files = files_of(path, plan)
        self._done_IM = read_progress(self._partial)[1] if done_IM is None else done_IM

    @property
    def restartable(self) -> bool:
        """Whether a member that was stopped goes on where it was."""
        return self._files.restartable

    def write(
        self, init: int, members: range, lead: int, x_MCYX: Field, state_MCYX: Field | None = None
    ) -> None:
        """Write one lead time of consecutive members; those that have it already are left alone.

        Args:
            state_MCYX: whole states to go on from, where `x_MCYX` is less.

        Raises:
            OSError: the disk is full or cannot be written; what was written before stays good.
        """
        behind = [member for member in members if self._done_IM[init, member] == lead]
        for group in runs(behind):
            place = slice(group.start - members.start, group.stop - members.start)
            self._files.write(init, group, lead, x_MCYX[place])
            if state_MCYX is not None and lead + 1 < len(self.plan.lead_h):
                self._save_states(init, group, lead, state_MCYX[place])
            self._note(init, group, lead + 1)
            self._done_IM[init, group.start : group.stop] = lead + 1
            self._forget_states(init, group, lead - 1)

    def _note(self, init: int, members: range, leads: int) -> None:
        path = self._partial / DONE / str(self._part)
        path.parent.mkdir(exist_ok=True)
        with path.open("a") as file:
            file.write(f"{init} {members.start} {members.stop} {leads}\n")

    def close(self) -> None:
        """Let go of files that are still open, as after an error."""
        self._files.close()

    def read(self, init: int, members: range, lead: int) -> Field:
        """Read back what was written: float32 [M, C, Y, X]."""
        return self._files.read(init, members, lead)

    def _state(self, init: int, member: int, lead: int) -> Path:
        return self._partial / STATES / f"{init}_{member}_{lead}.npy"

    def _save_states(self, init: int, members: range, lead: int, state_MCYX: Field) -> None:
        (self._partial / STATES).mkdir(exist_ok=True)
        for member, x_CYX in zip(members, state_MCYX):
            path = self._state(init, member, lead)
            partial = path.with_name(path.name + ".partial")
            with partial.open("wb") as file:
                np.save(file, x_CYX)
            partial.replace(path)

    def _forget_states(self, init: int, members: range, lead: int) -> None:
        for member in members:
            self._state(init, member, lead).unlink(missing_ok=True)

    def read_states(self, init: int, members: range, lead: int) -> Field:
        """Read the whole states of consecutive members after a lead time: float32 [M, C, Y, X].

        Raises:
            ForecastError: a file is missing or damaged.
        """
        found = []
        for member in members:
            path = self._state(init, member, lead)
            try:
                found.append(np.load(path, allow_pickle=False))
            except (OSError, ValueError, EOFError) as error:
                raise ForecastError(
                    f"{path}, from which member {member} would go on, is missing or damaged ({error}): make "
                    "the forecast anew, with --overwrite or another --out"
                ) from None
        return np.stack(found)


def read_progress(partial: Path) -> tuple[ForecastPlan, NDArray[np.int64]]:
    """Read what an unfinished forecast will be, and how many lead times each init and member has: [I, M].

    Raises:
        ForecastError: it is none, or damaged.
    """
    try:
        values = json.loads((partial / PROGRESS).read_text())
        plan = ForecastPlan.from_json(values["plan"])
        done_IM = np.array(values["leads_done"], dtype=np.int64).reshape(len(plan.inits), plan.members)
    except (OSError, ValueError, KeyError) as error:
        raise ForecastError(
            f"{partial} is in the way and no forecast in the making ({error}): remove it, or change --out"
        ) from None
    for path in sorted((partial / DONE).glob("*")):
        for line in path.read_text().split("\n")[:-1]:  # the last may be cut off by a kill
            words = line.split()
            if len(words) == 4 and all(map(str.isdecimal, words)):
                init, first, last, leads = map(int, words)
                done_IM[init, first:last] = np.maximum(done_IM[init, first:last], leads)
    return plan, done_IM


def write_progress(partial: Path, plan: ForecastPlan, done_IM: NDArray[np.int64]) -> None:
    """Write what an unfinished forecast will be and has, and forget how it came to have it; atomically."""
    temporary = partial / (PROGRESS + ".partial")
    values: dict[str, Any] = {"plan": plan.as_json(), "leads_done": done_IM.tolist()}
    temporary.write_text(json.dumps(values) + "\n")
    temporary.replace(partial / PROGRESS)
    for path in (partial / DONE).glob("*"):
        path.unlink()


def runs(numbers: list[int]) -> list[range]:
    """Group rising integers into runs without gaps."""
    found: list[range] = []
    for number in numbers:
        if found and found[-1].stop == number:
            found[-1] = range(found[-1].start, number + 1)
        else:
            found.append(range(number, number + 1))
    return found
