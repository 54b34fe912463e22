"""Which rank this process is: what launchers leave in the environment, turned into what torch reads.

A program calls `export(discover(os.environ))` at its start and `leave()` at its end. In between RANK,
WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT say everything, as under torchrun.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import re
import socket
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

_FIELDS = ("rank", "world", "local_rank", "local_world")
_PLAIN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
# Where a launcher says each of _FIELDS. PALS with --pmi=pmix and PMIx do not say all: MPI is asked.
_LAUNCHERS = {
    "pals": ("PALS_RANKID", "", "PALS_LOCAL_RANKID", "PALS_LOCAL_SIZE"),
    "openmpi": tuple(f"OMPI_COMM_WORLD_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")),
    "pmi": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    "pmi-cray": ("PMI_RANK", "PMI_SIZE", "PMI_LOCAL_RANK", "PMI_LOCAL_SIZE"),
    "pmix": ("PMIX_RANK", "", "", ""),
    "slurm": ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"),
    "environment": _PLAIN,
}
_EZPZ = ("get_rank", "get_world_size", "get_local_rank")
_BY_MPI = ("pals", "openmpi", "pmi", "pmix")
_Found = dict[str, tuple[str, int]]  # field -> (variable that says it, value)


@dataclass(frozen=True)
class Ranks:
    """This process among all: `rank` of `world`, and on its machine `local_rank` of `local_world`.

    `launcher` is torchrun, pals, openmpi, pmi, pmix, slurm, ezpz, "environment" (RANK was set by hand) or
    "none".
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1
    launcher: str = "none"


def discover(environ: Mapping[str, str]) -> Ranks:
    """Find out which rank this process is; without any launcher it is alone.

    AERIS_RANKS=ezpz asks the package ezpz (github.com/saforem2/ezpz) instead of the environment.

    Raises:
        ValueError: two sources contradict each other, or a number is nowhere to be found.
    """
    if (asked := environ.get("AERIS_RANKS", "")) == "ezpz":
        return _by_ezpz(discover({**environ, "AERIS_RANKS": ""}))
    if asked:
        raise ValueError(f"AERIS_RANKS is {asked!r}: it can be ezpz, or unset to look at the environment")
    if "TORCHELASTIC_RUN_ID" in environ:  # torchrun, perhaps itself started by one of the others
        return _ranks(_read(environ, _PLAIN), "torchrun")
    found, by = _Found(), ""
    try:
        for launcher, variables in _LAUNCHERS.items():
            said = _read(environ, variables)
            speaks = bool(by or said.keys() & {"rank", "world"})
            if launcher == "slurm":  # outside of srun it does not say both; its task may have started mpiexec
                speaks = all(f in said and said[f][1] == found.get(f, said[f])[1] for f in _FIELDS[:2])
            for field, (variable, value) in said.items() if speaks else ():
                known, number = found.setdefault(field, (variable, value))
                if number != value:
                    raise ValueError(f"{known} is {number}, but {variable} is {value}: unset the wrong one")
            by = by or launcher * speaks
        if by in _BY_MPI and len(found) < len(_FIELDS) and (mpi := _mpi()):
            host = mpi.COMM_WORLD.Split_type(mpi.COMM_TYPE_SHARED)
            for field, value in zip(_FIELDS, (*_place(mpi.COMM_WORLD), *_place(host))):
                found.setdefault(field, ("MPI", value))
        return _ranks(found, by) if by else Ranks()
    except ValueError:
        if by in _BY_MPI:
            _mpi()  # else mpiexec would not end the ranks that find nothing wrong and wait for this one
        raise


def export(ranks: Ranks) -> None:
    """Set what torch reads in os.environ, as far as it is not there; torchrun has set everything.

    Also lets this process open as many files as the system allows: a rank has sockets to many others.

    Where the ranks meet (MASTER_ADDR, MASTER_PORT) rank 0 says through MPI (mpi4py): 127.0.0.1 if all are on
    its machine, else its host name, and a port that is free there. Without MPI it is the first host of the
    job (PBS_NODEFILE, or Slurm's list) and a port made of the job's number; ValueError without those.
    """
    _allow_files()
    if ranks.launcher in ("torchrun", "none"):
        return
    exported = {variable: str(value) for variable, value in zip(_PLAIN, asdict(ranks).values())}
    address, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    if ranks.world > 1 and not (address and port):
        address, port = _meeting_place(ranks, address, port)
        exported |= {"MASTER_ADDR": address, "MASTER_PORT": port}
    os.environ.update(exported)


def leave() -> None:
    """End MPI if it was used: for every rank to call at the end of a run that went well.

    It waits for the others, so a rank that fails must not call it: it just ends, and mpiexec ends the rest.
    """
    mpi = sys.modules.get("mpi4py.MPI")
    if mpi and mpi.Is_initialized() and not mpi.Is_finalized():
        mpi.Finalize()


def _allow_files() -> None:
    """Raise the limit of open files from the soft to the hard one."""
    if sys.platform != "win32":
        import resource

        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        with contextlib.suppress(ValueError, OSError):  # macOS allows less than it says
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _meeting_place(ranks: Ranks, address: str, port: str) -> tuple[str, str]:
    """Agree on an address and a port, as far as they are not given."""
    from launch import machines  # here, because a process alone needs none of it

    if ranks.local_world == ranks.world:
        address = address or "127.0.0.1"
    if ranks.launcher != "environment" and (mpi := _mpi()):
        rank, world = _place(mpi.COMM_WORLD)
        if (rank, world) != (ranks.rank, ranks.world):
            said = f"{ranks.launcher} says rank {ranks.rank} of {ranks.world}, MPI {rank} of {world}"
            raise ValueError(f"{said}: mpi4py uses another MPI library than the launcher's")
        with socket.socket() as probe:
            probe.bind(("", 0))
            free = str(probe.getsockname()[1])
        here = machines.meeting_name(socket.gethostname(), os.environ)
        address, port = mpi.COMM_WORLD.bcast((address or here, port or free))
    if not address and (host := machines.first_host(os.environ)):
        here = socket.gethostname()
        if ranks.rank == 0 and here.split(".")[0] != host.split(".")[0]:
            raise ValueError(
                f"rank 0 is on {here}, but the job's list of hosts begins with {host}: set MASTER_ADDR"
            )
        address = machines.meeting_name(host, os.environ)
    port = port or machines.job_port(os.environ)
    if not (address and port):
        missing = " and ".join(n for n, v in (("MASTER_ADDR", address), ("MASTER_PORT", port)) if not v)
        other = "start them with mpiexec of an MPI library that mpi4py can load"
        raise ValueError(f"{ranks.world} ranks need a place to meet: set {missing}, or {other}")
    return address, port


def _by_ezpz(said: Ranks) -> Ranks:
    """Ask ezpz for the ranks; ValueError if it is not there or contradicts what the environment `said`."""
    mpi = _mpi()  # before ezpz starts it, with the settings of `_mpi`
    get = "pip install git+https://github.com/saforem2/ezpz, or unset AERIS_RANKS"
    try:
        ezpz = importlib.import_module("ezpz")
    except ImportError as error:
        raise ValueError(f"AERIS_RANKS is ezpz, which cannot be imported ({error}): {get}") from None
    if not all(hasattr(ezpz, name) for name in ("setup_torch", *_EZPZ)):
        raise ValueError(f"the ezpz that is installed is another project of the same name: {get}")
    rank, world, local_rank = (int(getattr(ezpz, name)()) for name in _EZPZ)
    if said.launcher != "none" and (rank, world, local_rank) != (said.rank, said.world, said.local_rank):
        raise ValueError(
            f"ezpz says rank {rank} of {world}, local {local_rank}, but {said.launcher} says rank "
            f"{said.rank} of {said.world}, local {said.local_rank}: unset AERIS_RANKS or what is wrong"
        )
    if said.launcher == "none" and world > 1 and not mpi:
        raise ValueError(
            f"ezpz says {world} ranks, but not how many are on a machine: mpi4py is needed for it"
        )
    local_world = said.local_world
    if said.launcher == "none" and mpi:
        local_world = _place(mpi.COMM_WORLD.Split_type(mpi.COMM_TYPE_SHARED))[1]
    launcher = said.launcher if said.launcher != "none" else "ezpz"
    return Ranks(rank, world, local_rank, local_world, launcher)


def _mpi() -> Any:
    """Start MPI and return mpi4py's module of it, or None where it or its library is not installed."""
    try:
        import mpi4py

        mpi4py.rc.finalize = False  # by default a failing rank waits for those that wait for it; see `leave`
        from mpi4py import MPI
    except (ImportError, RuntimeError):
        return None
    return MPI


def _place(communicator: Any) -> tuple[int, int]:
    return communicator.Get_rank(), communicator.Get_size()


def _read(environ: Mapping[str, str], variables: tuple[str, ...]) -> _Found:
    """Read one launcher's numbers, as far as they are there."""
    found: _Found = {}
    for field, variable in zip(_FIELDS, variables):
        if text := environ.get(variable):
            if variable.endswith(
                "_TASKS_PER_NODE"
            ):  # "2(x3),1": 2 tasks on each of 3 machines, 1 on the next
                runs = re.findall(r"(\d+)(?:\(x(\d+)\))?", text)
                tasks = [count for count, times in runs for _ in range(int(times or 1))]
                text = dict(enumerate(tasks)).get(int(environ.get("SLURM_NODEID", 0)), text)
            if not text.isdigit():
                raise ValueError(f"{variable} must be a number, not {text!r}")
            found[field] = (variable, int(text))
    return found


def _ranks(found: _Found, launcher: str) -> Ranks:
    """Check that the numbers are complete and possible."""
    if "world" in found and found["world"][1] == 1:
        found = {"local_rank": ("LOCAL_RANK", 0), "local_world": ("LOCAL_WORLD_SIZE", 1), **found}
    for field, variable in zip(_FIELDS, _PLAIN):
        if field not in found:
            known = ", ".join(sorted(variable for variable, _ in found.values()))
            raise ValueError(f"{known} set, but not {variable}: set it too, or use mpiexec with mpi4py")
    for low, high in (_FIELDS[:2], _FIELDS[2:]):
        if found[low][1] >= found[high][1]:
            raise ValueError("{} is {}, but {} is only {}".format(*found[low], *found[high]))
    return Ranks(**{field: value for field, (_, value) in found.items()}, launcher=launcher)
