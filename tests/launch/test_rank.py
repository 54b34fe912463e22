"""Ranks from the environments of launchers: faked ones, and a real mpiexec where there is one."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from launch import rank
from launch.rank import Ranks, discover, export

ROOT = Path(__file__).resolve().parents[2]
# What hydra (MPICH, Intel MPI) sets for the third of four ranks on one machine.
HYDRA = {"PMI_RANK": "2", "PMI_SIZE": "4", "MPI_LOCALRANKID": "2", "MPI_LOCALNRANKS": "4"}
PALS = {"PALS_RANKID": "13", "PALS_LOCAL_RANKID": "1", "PALS_LOCAL_SIZE": "12"}
PLAIN = {"RANK": "2", "WORLD_SIZE": "4", "LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "4"}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "8",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "PMIX_RANK": "3",
}
SRUN = {
    "SLURM_PROCID": "6",
    "SLURM_STEP_NUM_TASKS": "7",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "3",
    "SLURM_STEP_TASKS_PER_NODE": "2(x3),1",
}


class FakeCommunicator:
    """One rank's view of MPI's communicators. What rank 0 says, `bcast` returns."""

    def __init__(self, place: tuple[int, int], host: tuple[int, int] = (0, 1), said: Any = None) -> None:
        self.place, self.host, self.said = place, host, said

    def Get_rank(self) -> int:
        return self.place[0]

    def Get_size(self) -> int:
        return self.place[1]

    def Split_type(self, kind: str) -> FakeCommunicator:
        assert kind == "shared"
        return FakeCommunicator(self.host)

    def bcast(self, value: Any) -> Any:
        return self.said or value


@pytest.fixture(autouse=True)
def environ(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Give the module an empty environment, and no MPI."""
    variables: dict[str, str] = {}
    monkeypatch.setattr(rank, "os", SimpleNamespace(environ=variables))
    monkeypatch.setattr(rank, "_mpi", lambda: None)
    return variables


def use_mpi(monkeypatch: pytest.MonkeyPatch, *args: Any, **kwargs: Any) -> None:
    fake = SimpleNamespace(COMM_WORLD=FakeCommunicator(*args, **kwargs), COMM_TYPE_SHARED="shared")
    monkeypatch.setattr(rank, "_mpi", lambda: fake)


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, Ranks(0, 1, 0, 1, "none")),
        (HYDRA, Ranks(2, 4, 2, 4, "pmi")),
        (OPEN_MPI, Ranks(3, 8, 1, 2, "openmpi")),
        (SRUN, Ranks(6, 7, 0, 1, "slurm")),
        ({**SRUN, "SLURM_PROCID": "4", "SLURM_NODEID": "2"}, Ranks(4, 7, 0, 2, "slurm")),
        (PLAIN, Ranks(2, 4, 2, 4, "environment")),
        ({**PLAIN, "TORCHELASTIC_RUN_ID": "x"}, Ranks(2, 4, 2, 4, "torchrun")),
        ({"RANK": "0", "WORLD_SIZE": "1"}, Ranks(0, 1, 0, 1, "environment")),
        # PALS with --pmi=cray; a wrapper script that exported what it found.
        (
            {**PALS, "PMI_RANK": "13", "PMI_SIZE": "24", "PMI_LOCAL_RANK": "1", "PMI_LOCAL_SIZE": "12"},
            Ranks(13, 24, 1, 12, "pals"),
        ),
        ({**HYDRA, **PLAIN}, Ranks(2, 4, 2, 4, "pmi")),
        # srun with PMI-2, which says nothing of machines.
        ({**SRUN, "PMI_RANK": "6", "PMI_SIZE": "7"}, Ranks(6, 7, 0, 1, "pmi")),
        # mpiexec inside a Slurm job reaches its machines through srun: one task each, which is not ours.
        ({**HYDRA, **SRUN, "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}, Ranks(2, 4, 2, 4, "pmi")),
        # A batch script is a task of Slurm, but not one of a step.
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_LOCALID": "0"}, Ranks(0, 1, 0, 1, "none")),
        # One torchrun on each of two machines, started by mpiexec.
        (
            {**HYDRA, **PLAIN, "PMI_RANK": "1", "PMI_SIZE": "2", "TORCHELASTIC_RUN_ID": "x"},
            Ranks(2, 4, 2, 4, "torchrun"),
        ),
    ],
)
def test_launchers_are_understood(variables: dict[str, str], expected: Ranks) -> None:
    assert discover(variables) == expected


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({**HYDRA, "RANK": "0"}, "PMI_RANK is 2, but RANK is 0: unset the wrong one"),
        ({**HYDRA, "WORLD_SIZE": "8"}, "PMI_SIZE is 4, but WORLD_SIZE is 8"),
        ({**HYDRA, "LOCAL_RANK": "0"}, "MPI_LOCALRANKID is 2, but LOCAL_RANK is 0"),
        ({**PALS, "PMI_RANK": "12"}, "PALS_RANKID is 13, but PMI_RANK is 12"),
        ({**OPEN_MPI, "PMIX_RANK": "4"}, "OMPI_COMM_WORLD_RANK is 3, but PMIX_RANK is 4"),
        ({**SRUN, "RANK": "0"}, "SLURM_PROCID is 6, but RANK is 0"),
        ({**PLAIN, "RANK": "4"}, "RANK is 4, but WORLD_SIZE is only 4"),
        ({**HYDRA, "MPI_LOCALRANKID": "4"}, "MPI_LOCALRANKID is 4, but MPI_LOCALNRANKS is only 4"),
        ({**HYDRA, "PMI_RANK": "two"}, "PMI_RANK must be a number, not 'two'"),
        ({**SRUN, "SLURM_STEP_TASKS_PER_NODE": "many"}, "SLURM_STEP_TASKS_PER_NODE must be a number"),
        ({"RANK": "0"}, "RANK set, but not WORLD_SIZE"),
        ({"WORLD_SIZE": "4"}, "WORLD_SIZE set, but not RANK"),
        ({"RANK": "0", "WORLD_SIZE": "4"}, "RANK, WORLD_SIZE set, but not LOCAL_RANK"),
        ({"PMIX_RANK": "3"}, "PMIX_RANK set, but not WORLD_SIZE: set it too, or use mpiexec with mpi4py"),
    ],
)
def test_contradictions_name_both_variables(variables: dict[str, str], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        discover(variables)


def test_what_the_environment_does_not_say_mpi_does(monkeypatch: pytest.MonkeyPatch) -> None:
    use_mpi(monkeypatch, (13, 24), (1, 12))
    assert discover(PALS) == Ranks(13, 24, 1, 12, "pals")
    assert discover({"PMIX_RANK": "13"}) == Ranks(13, 24, 1, 12, "pmix")


def test_one_machine_meets_on_loopback(monkeypatch: pytest.MonkeyPatch, environ: dict[str, str]) -> None:
    use_mpi(monkeypatch, (0, 4))
    export(Ranks(0, 4, 0, 4, "pmi"))
    assert 1024 <= int(environ.pop("MASTER_PORT")) < 2**16
    assert environ == {
        "RANK": "0",
        "WORLD_SIZE": "4",
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "4",
        "MASTER_ADDR": "127.0.0.1",
    }


def test_machines_meet_at_the_name_of_rank_0(
    monkeypatch: pytest.MonkeyPatch, environ: dict[str, str]
) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "this-machine")
    use_mpi(monkeypatch, (0, 24))
    export(Ranks(0, 24, 0, 12, "pals"))
    assert environ["MASTER_ADDR"] == "this-machine"
    environ.clear()
    use_mpi(monkeypatch, (13, 24), said=("that-machine", "1234"))
    export(Ranks(13, 24, 1, 12, "pals"))
    assert (environ["MASTER_ADDR"], environ["MASTER_PORT"]) == ("that-machine", "1234")


def test_what_is_given_is_kept(monkeypatch: pytest.MonkeyPatch, environ: dict[str, str]) -> None:
    use_mpi(monkeypatch, (0, 24))
    environ.update(MASTER_PORT="4321")
    export(Ranks(0, 24, 0, 12, "pals"))
    assert environ["MASTER_PORT"] == "4321"
    monkeypatch.setattr(rank, "_mpi", lambda: pytest.fail("MPI is not needed"))
    environ.update(MASTER_ADDR="given", MASTER_PORT="1")
    export(Ranks(0, 24, 0, 12, "pals"))
    assert (environ["MASTER_ADDR"], environ["MASTER_PORT"]) == ("given", "1")


def test_torchrun_and_a_process_alone_are_left_as_they_are(environ: dict[str, str]) -> None:
    export(Ranks(1, 2, 1, 2, "torchrun"))
    export(Ranks())
    assert environ == {}
    export(Ranks(0, 1, 0, 1, "pmi"))
    assert "MASTER_ADDR" not in environ


def test_without_mpi_the_port_must_be_given(environ: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="4 ranks need a place to meet: set MASTER_PORT, or start them"):
        export(Ranks(1, 4, 1, 4, "pmi"))
    with pytest.raises(ValueError, match="24 ranks need a place to meet: set MASTER_ADDR and MASTER_PORT"):
        export(Ranks(13, 24, 1, 12, "slurm"))
    assert environ == {}
    environ["MASTER_PORT"] = "1234"
    export(Ranks(1, 4, 1, 4, "pmi"))
    assert environ["MASTER_ADDR"] == "127.0.0.1"


def test_without_mpi_the_job_says_where_to_meet(
    monkeypatch: pytest.MonkeyPatch, environ: dict[str, str], tmp_path: Path
) -> None:
    """Every rank finds the same host and port by itself: in PBS's list of hosts, or in Slurm's."""
    nodes = tmp_path / "nodes"
    nodes.write_text("x1.hostmgmt.cm\nx2.hostmgmt.cm\n")
    pbs = {"PBS_JOBID": "12.aurora-pbs-0001", "PBS_NODEFILE": str(nodes)}
    slurm = {"SLURM_JOB_ID": "12", "SLURM_JOB_NODELIST": "n[1-3]", "SLURM_STEP_NODELIST": "n[2-3]"}
    for job, host in ((pbs, "x1.hsn.cm.aurora.alcf.anl.gov"), (slurm, "n2")):
        met = []
        for number, here in ((0, host.split(".")[0]), (13, "elsewhere")):
            environ.clear()
            environ.update(job)
            monkeypatch.setattr(socket, "gethostname", lambda here=here: here)
            export(Ranks(number, 24, number % 12, 12, "pals"))
            met.append((environ["MASTER_ADDR"], environ["MASTER_PORT"]))
        assert met == [(host, "10012")] * 2
    environ.clear()
    environ.update(pbs)
    monkeypatch.setattr(socket, "gethostname", lambda: "x2")
    with pytest.raises(ValueError, match=r"rank 0 is on x2, but the job's list of hosts begins with x1"):
        export(Ranks(0, 24, 0, 12, "pals"))


def test_machines_meet_over_the_fast_network(
    monkeypatch: pytest.MonkeyPatch, environ: dict[str, str]
) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "x7")
    use_mpi(monkeypatch, (0, 24))
    environ["PBS_JOBID"] = "12.aurora-pbs-0001"
    export(Ranks(0, 24, 0, 12, "pals"))
    assert environ["MASTER_ADDR"] == "x7.hsn.cm.aurora.alcf.anl.gov"


def use_ezpz(monkeypatch: pytest.MonkeyPatch, rank_: int, world: int, local_rank: int) -> None:
    numbers = {"get_rank": rank_, "get_world_size": world, "get_local_rank": local_rank}
    fake = SimpleNamespace(setup_torch=None, **{name: lambda n=n: n for name, n in numbers.items()})
    monkeypatch.setitem(sys.modules, "ezpz", fake)


def test_ezpz_is_asked_if_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    use_mpi(monkeypatch, (13, 24), (1, 12))
    use_ezpz(monkeypatch, 13, 24, 1)
    assert discover({"AERIS_RANKS": "ezpz"}) == Ranks(13, 24, 1, 12, "ezpz")
    assert discover({"AERIS_RANKS": "ezpz", **PALS}) == Ranks(13, 24, 1, 12, "pals")
    assert discover({}) == Ranks()  # only then
    with pytest.raises(
        ValueError, match="ezpz says rank 13 of 24, local 1, but pmi says rank 2 of 4, local 2"
    ):
        discover({"AERIS_RANKS": "ezpz", **HYDRA})
    with pytest.raises(ValueError, match="AERIS_RANKS is 'ezzp': it can be ezpz"):
        discover({"AERIS_RANKS": "ezzp"})
    monkeypatch.setattr(rank, "_mpi", lambda: None)
    with pytest.raises(ValueError, match="24 ranks, but not how many are on a machine"):
        discover({"AERIS_RANKS": "ezpz"})


def test_another_ezpz_or_none_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """The public index has a package of that name that crops images."""
    monkeypatch.setitem(sys.modules, "ezpz", SimpleNamespace(crop=None))
    with pytest.raises(ValueError, match="another project of the same name: pip install git"):
        discover({"AERIS_RANKS": "ezpz"})
    monkeypatch.setitem(sys.modules, "ezpz", None)
    with pytest.raises(ValueError, match="ezpz, which cannot be imported"):
        discover({"AERIS_RANKS": "ezpz"})


def test_another_mpi_library_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every process would be rank 0 of 1 of its own."""
    use_mpi(monkeypatch, (0, 1))
    with pytest.raises(ValueError, match="pmi says rank 2 of 4, MPI 0 of 1: mpi4py uses another MPI library"):
        export(Ranks(2, 4, 2, 4, "pmi"))


PROGRAM = """
import os, sys
from launch.rank import discover, export, leave
try:
    ranks = discover(os.environ)
    export(ranks)
except ValueError as error:
    sys.exit(f"{error}")
names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
if "OUT" in os.environ:  # in a file of its own: lines of two ranks may mix on the way through mpiexec
    with open(os.path.join(os.environ["OUT"], str(ranks.rank)), "w") as file:
        print(*(os.environ[name] for name in names), file=file)
if "fail" in sys.argv:
    import time
    sys.exit("failed on purpose") if ranks.rank == 1 else time.sleep(300)
leave()
"""


def run_mpiexec(
    *args: str, program: tuple[str, ...] = ("-c", PROGRAM), **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run a program as two ranks of the mpiexec beside this Python, or of any."""
    pytest.importorskip("mpi4py")
    mpiexec = shutil.which("mpiexec", path=str(Path(sys.executable).parent)) or shutil.which("mpiexec")
    if not mpiexec:
        pytest.skip("no mpiexec")
    command = [mpiexec, "-n", "2", sys.executable, *program, *args]
    launcher = re.compile("(PALS|PMI|PMIX|MPI|OMPI|SLURM|TORCHELASTIC|MASTER|LOCAL)_|RANK$|WORLD_SIZE$")
    clean = {name: value for name, value in os.environ.items() if not launcher.match(name)}
    env = {**clean, "PYTHONPATH": str(ROOT), **variables}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)


def test_ranks_of_mpiexec_agree(tmp_path: Path) -> None:
    done = run_mpiexec(OUT=str(tmp_path))
    assert done.returncode == 0, done.stderr
    first, second = ((tmp_path / name).read_text().split() for name in "01")
    assert first[:5] == ["0", "2", "0", "2", "127.0.0.1"]
    assert second[:5] == ["1", "2", "1", "2", "127.0.0.1"]
    assert first[5] == second[5]


def test_a_rank_that_fails_ends_the_others() -> None:
    """Also when it fails because of its environment, while another waits for it in MPI."""
    assert "failed on purpose" in run_mpiexec("fail").stderr
    assert "PMI_RANK is 1, but RANK is 0" in run_mpiexec(RANK="0").stderr


def test_the_command_prints_every_rank() -> None:
    """`mpiexec -n 2 python -m launch ranks`: one line each, with one meeting place."""
    done = run_mpiexec(program=("-m", "launch", "ranks"))
    lines = sorted(done.stdout.splitlines())
    here = socket.gethostname()
    assert [re.sub(r":\d+$", "", line) for line in lines] == [
        f"rank {r} of 2, {r} of 2 on {here}, by pmi, meets at 127.0.0.1" for r in range(2)
    ]
    assert len({line.rpartition(":")[2] for line in lines}) == 1


@pytest.mark.skipif(sys.platform == "win32", reason="has no such limit")
def test_ranks_may_open_as_many_files_as_the_system_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    import resource

    asked = []
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (1024, 524288))
    monkeypatch.setattr(resource, "setrlimit", lambda kind, limits: asked.append((kind, limits)))
    export(Ranks())
    assert asked == [(resource.RLIMIT_NOFILE, (524288, 524288))]

    def refuse(kind: int, limits: tuple[int, int]) -> None:
        raise ValueError("not so many")

    monkeypatch.setattr(resource, "setrlimit", refuse)
    export(Ranks())


def test_it_is_light() -> None:
    code = "import sys, launch.rank; print([n for n in ('torch', 'mpi4py', 'numpy') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"
