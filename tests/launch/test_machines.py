"""Machines: hosts of an allocation, command lines word for word, queues, and how long a job has left."""

from __future__ import annotations

import socket
import time
from pathlib import Path

import pytest

from launch import scheduler
from launch.hosts import expand, read_hostfile
from launch.machines import MACHINES, first_host, guess, job_port, machine, meeting_name

AURORA, LUMI, LOCAL = (MACHINES[name] for name in ("alcf-aurora", "lumi", "local"))
PBS = {"PBS_JOBID": "77.aurora-pbs-0001.hostmgmt"}
QSTAT = """Job Id: 77.aurora-pbs-0001
    Account_Name = climate
    resources_used.walltime = 00:10:00
    queue = large
    Resource_List.nodect = 10181
    Resource_List.walltime = 01:00:00
    Variable_List = PBS_O_PATH=a:b,
\tRUN_DIR = no line of its own
"""


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("b", ["b"]),
        ("a[001-003,7],b", ["a001", "a002", "a003", "a7", "b"]),
        ("nid[099-101]", ["nid099", "nid100", "nid101"]),
        ("r[1-2]n[3,5]", ["r1n3", "r1n5", "r2n3", "r2n5"]),
        ("a-1,a-1,b[2]x", ["a-1", "b2x"]),
    ],
)
def test_slurm_list_is_expanded(written: str, meant: list[str]) -> None:
    assert expand(written) == meant


@pytest.mark.parametrize("written", ["", "a[1-", "a[3-1]", "a[x]", "a,,b", "a b", "a[]", "a[1,]"])
def test_what_is_no_list_is_refused(written: str) -> None:
    with pytest.raises(ValueError, match="list of hosts"):
        expand(written)


def test_hosts_of_pbs_are_those_of_the_file_once_each(tmp_path: Path) -> None:
    listed = tmp_path / "nodes"
    listed.write_text("b.x\nb.x\n\na.x\n")
    assert AURORA.hosts({"PBS_NODEFILE": str(listed)}) == ["b.x", "a.x"] == read_hostfile(listed)
    with pytest.raises(ValueError, match="nothing cannot be read: No such file"):
        AURORA.hosts({"PBS_NODEFILE": "nothing"})
    with pytest.raises(ValueError, match="inside of a job"):
        AURORA.hosts({})
    assert LUMI.hosts({"SLURM_JOB_NODELIST": "n[1-2]"}) == ["n1", "n2"]
    assert LOCAL.hosts({}) == [socket.gethostname()]


def test_mpiexec_of_aurora_word_for_word() -> None:
    command = AURORA.command(["python", "-m", "x"], ["a", "b"], 12, Path("h"))
    cores = "2-8:10-16:18-24:26-32:34-40:42-48:54-60:62-68:70-76:78-84:86-92:94-100"
    flags = f"mpiexec --pmi=pmix -n 24 --ppn 12 --hostfile h --cpu-bind list:{cores} python -m x"
    assert command == flags.split()
    # One process of a node is bound to nothing; a few are bound to the first sets.
    assert AURORA.command(["x"], ["a", "b"], 1)[2:] == "-n 2 --ppn 1 --cpu-bind none x".split()
    assert AURORA.command(["x"], ["a"], 2)[-2:] == ["list:2-8:10-16", "x"]


def test_cores_of_aurora_are_free_and_differ() -> None:
    """7 cores a rank; 0 and 52 are the system's, and the core before each set is its oneCCL worker's."""
    script = Path(__file__).resolve().parents[2] / "pbs" / "env" / "alcf-aurora.sh"
    (line,) = (w for w in script.read_text().splitlines() if w.startswith("export CCL_WORKER_AFFINITY="))
    workers = [int(core) for core in line.partition("=")[2].split(",")]
    taken = [*workers]
    for worker, cores in zip(workers, AURORA.cpu_bind, strict=True):
        first, last = map(int, cores.split("-"))
        assert first == worker + 1 and last - first == 6
        assert first // 52 == last // 52 == worker // 52  # one socket
        taken += range(first, last + 1)
    assert len(set(taken)) == len(taken) == 12 * 8
    assert not {0, 52} & set(taken) and max(taken) < 104


def test_srun_of_lumi_word_for_word(tmp_path: Path) -> None:
    command = LUMI.command(["python", "-m", "x"], ["a", "b"], 8, tmp_path / "h")
    masks = "7e000000000000,7e00000000000000,7e0000,7e000000,7e,7e00,7e00000000,7e0000000000"
    flags = "srun --distribution=block --kill-on-bad-exit=1 --nodes=2 --ntasks=16 --ntasks-per-node=8"
    assert command == [
        *flags.split(),
        f"--nodelist={tmp_path}/h",
        f"--cpu-bind=mask_cpu:{masks}",
        *"python -m x".split(),
    ]
    taken = [int(mask, 16) for mask in LUMI.cpu_bind]
    assert sum(taken) == sum(0x7E << 8 * chiplet for chiplet in range(8))  # each chiplet once
    # A list is a file to srun only if there is a slash in it.
    assert any(w.startswith("--nodelist=/") for w in LUMI.command(["x"], ["a"], 8, Path("h")))


def test_without_a_scheduler() -> None:
    assert LOCAL.command(["python", "x"], ["here"], 1) == ["python", "x"]
    assert LOCAL.command(["python", "x"], ["here"], 3, Path("h")) == "mpiexec -n 3 python x".split()
    with pytest.raises(ValueError, match="2 hosts: local has one"):
        LOCAL.command(["x"], ["a", "b"], 1)
    with pytest.raises(ValueError, match="nothing would run"):
        AURORA.command(["x"], [], 12)
    with pytest.raises(ValueError, match="no scheduler"):
        LOCAL.submission("s.sh", 1, 60, "q")


def test_submission_word_for_word() -> None:
    line = AURORA.submission("s.sh", 5, 5400, "prod", "climate", {"RUN_DIR": "a b", "FLAGS": "--x=1 --y 2"})
    resources = ["-l", "filesystems=flare", "-l", "place=scatter", "-k", "doe"]
    start = "qsub -A climate -q prod -l select=5 -l walltime=01:30:00".split()
    assert line == [*start, *resources, "-v", "RUN_DIR=a b,FLAGS=--x=1 --y 2", "s.sh"]
    line = LUMI.submission("s.sh", 5, 172800, "standard-g", "", {"NODES": "4"})
    flags = "--ntasks-per-node=8 --gpus-per-node=8 --exclusive --mem=0 --no-kill --export=ALL,NODES=4 s.sh"
    assert line == f"sbatch --partition=standard-g --nodes=5 --time=48:00:00 {flags}".split()
    line = AURORA.submission("s.sh", 5, 5400, "prod", after="7.aurora-pbs-0001")
    assert line == [*start[:1], *start[3:], *resources, "-W", "depend=afterany:7.aurora-pbs-0001", "s.sh"]
    line = LUMI.submission("s.sh", 5, 60, "standard-g", after="7")
    assert line[-3:] == ["--dependency=afterany:7", "--export=ALL", "s.sh"]
    for value in ("a,b", "it's", 'say "x"', "a\\b", "a\nb"):
        with pytest.raises(ValueError, match="RUN_DIR is .* cannot travel"):
            AURORA.submission("s.sh", 5, 60, "prod", "", {"RUN_DIR": value})


def test_the_next_job_is_like_this_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler, "ask", lambda question: QSTAT)
    environ = {**PBS, "PBS_O_QUEUE": "prod", "NODES": "10080", "HOME": "h", "CHAIN": "s.sh"}
    line = AURORA.again("s.sh", environ)
    assert line[:9] == "qsub -A climate -q prod -l select=10181 -l walltime=01:00:00".split()
    assert line[-3:] == ["-v", "NODES=10080,CHAIN=s.sh", "s.sh"]
    monkeypatch.setattr(scheduler, "ask", lambda question: "2-00:00:00\n")
    slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "81", "SLURM_JOB_PARTITION": "standard-g"}
    line = LUMI.again("s.sh", {**slurm, "SLURM_JOB_ACCOUNT": "p"})
    assert line[:5] == "sbatch --account=p --partition=standard-g --nodes=81 --time=48:00:00".split()
    monkeypatch.setattr(scheduler, "ask", lambda question: "")
    with pytest.raises(ValueError, match="nobody says with which nodes, walltime this job"):
        AURORA.again("s.sh", environ)
    with pytest.raises(ValueError, match="nodes, walltime, queue"):
        LOCAL.again("s.sh", environ)


def test_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = ""
    monkeypatch.setattr(scheduler, "ask", lambda question: answer)
    assert AURORA.seconds_left(PBS) is None  # nobody answers
    answer = QSTAT
    assert AURORA.seconds_left(PBS) == 3000.0  # by the time used
    begun = time.localtime(time.time() - 1200)
    answer += time.strftime("    stime = %a %b %d %H:%M:%S %Y\n", begun)
    assert AURORA.seconds_left(PBS) == pytest.approx(2400.0, abs=5)  # by the start, which is exact
    assert AURORA.seconds_left({}) is None and LOCAL.seconds_left(PBS) is None
    assert LUMI.seconds_left({"SLURM_JOB_END_TIME": str(int(time.time()) + 90)}) == pytest.approx(90, abs=5)
    answer = "1-00:00:30\n"
    assert LUMI.seconds_left({"SLURM_JOB_ID": "7"}) == 86430.0
    answer = "UNLIMITED\n"
    assert LUMI.seconds_left({"SLURM_JOB_ID": "7"}) is None


def test_durations_and_answers() -> None:
    assert [scheduler.seconds(text) for text in ("30:00", "12:30:00", "1-00:00:01")] == [
        1800,
        45000,
        86401,
    ]
    with pytest.raises(ValueError, match="'a day' is no duration"):
        scheduler.seconds("a day")
    with pytest.raises(ValueError, match="'90' has no unit: write 90:00:00 for hours, 90:00 for minutes"):
        scheduler.seconds("90")  # minutes to Slurm, seconds to PBS
    assert [scheduler.clock(s) for s in (59.9, 86400.0, 172800.0)] == ["00:01:00", "24:00:00", "48:00:00"]
    assert scheduler.attributes(QSTAT)["Variable_List"] == "PBS_O_PATH=a:b,RUN_DIR = no line of its own"
    assert scheduler.ask(["true-nobody-has-this"]) == "" == scheduler.ask(["false"])
    assert scheduler.ask(["echo", "a"]) == "a\n"


def test_which_machine_this_is() -> None:
    assert guess(PBS) is AURORA and guess({}) is LOCAL
    assert guess({"SLURM_JOB_ID": "7", "SLURM_CLUSTER_NAME": "lumi"}) is LUMI
    with pytest.raises(ValueError, match="PBS job 7.polaris is of no machine known"):
        guess({"PBS_JOBID": "7.polaris"})
    with pytest.raises(ValueError, match="cluster 'juno' is not known"):
        guess({"SLURM_JOB_ID": "7", "SLURM_CLUSTER_NAME": "juno"})
    assert machine("lumi", PBS) is LUMI and machine(None, PBS) is AURORA
    with pytest.raises(ValueError, match="no machine 'ulmi'; known are alcf-aurora, lumi, local"):
        machine("ulmi", {})


def test_where_ranks_meet_without_mpi(tmp_path: Path) -> None:
    nodes = tmp_path / "nodes"
    nodes.write_text("x7.hostmgmt.cm\nx8.hostmgmt.cm\n")
    assert first_host({**PBS, "PBS_NODEFILE": str(nodes)}) == "x7.hostmgmt.cm" and first_host({}) == ""
    assert first_host({"SLURM_JOB_NODELIST": "n[1-4]", "SLURM_STEP_NODELIST": "n[3-4]"}) == "n3"
    # On Aurora a host is named by another network than the fast one.
    assert meeting_name("x7.hostmgmt.cm", PBS) == "x7.hsn.cm.aurora.alcf.anl.gov" == AURORA.address("x7.y")
    assert (
        meeting_name("x7.hostmgmt.cm", {})
        == "x7.hostmgmt.cm"
        == meeting_name("x7.hostmgmt.cm", {"PBS_JOBID": "1.z"})
    )
    ports = [job_port({"SLURM_JOB_ID": job, "SLURM_STEP_ID": step}) for job in "12" for step in "03"]
    assert len(set(ports)) == 4 and job_port(PBS) == "10077" and job_port({}) == ""
    assert all(10_000 <= int(port) < 30_000 for port in (*ports, job_port({"PBS_JOBID": "123456789.x"})))
