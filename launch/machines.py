"""The machines programs are started on: nodes, ranks, queues, and the words of their scheduler and launcher.

`MACHINES` is data with its sources; `Machine` turns it into hosts of an allocation and into command lines.
Another machine is another row. Nothing here starts a program but the question how long a job has left.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from launch import scheduler
from launch.hosts import expand, read_hostfile

SETTINGS = ("NODES", "DP", "PRESET", "RUN_DIR", "DATA", "OUT", "FLAGS", "CHAIN", "ARCHIVE", "VENV")
"""The environment variables that job scripts read. They travel with a job, and on to its successors."""


@dataclass(frozen=True)
class Queue:
    """A queue (PBS) or partition (Slurm): jobs of `smallest` to `largest` nodes run up to `hours`.

    `chains`: a job may submit its successor; not where a user may have one job only.
    """

    name: str
    smallest: int
    largest: int
    hours: float
    chains: bool = True


@dataclass(frozen=True)
class Machine:
    """A machine, or a kind of them.

    Attributes:
        ranks_per_node: one per device.
        scheduler: what jobs are given to.
        starter: the program that starts ranks, with the flags it always gets.
        cpu_bind: cores of each local rank, in the starter's own words; "" leaves binding to it.
        nodes: how many there are; 0 if that is not known.
        queues: where jobs can go; the first one that fits is taken if none is named.
        fast_domain: domain of the hosts' names on the fast network, where their own are on a slower one.
        resources: what every job asks for besides nodes and time, as flags of qsub or sbatch.
    """

    name: str
    ranks_per_node: int
    scheduler: Literal["pbs", "slurm", "none"]
    starter: tuple[str, ...]
    cpu_bind: tuple[str, ...] = ()
    nodes: int = 0
    queues: tuple[Queue, ...] = ()
    fast_domain: str = ""
    resources: tuple[str, ...] = ()

    def hosts(self, environ: Mapping[str, str]) -> list[str]:
        """List the hosts of this allocation once each, in the scheduler's order, the first runs the job.

        Raises:
            ValueError: there is no allocation, or its list cannot be read.
        """
        if self.scheduler == "none":
            return [socket.gethostname()]
        variable = {"pbs": "PBS_NODEFILE", "slurm": "SLURM_JOB_NODELIST"}[self.scheduler]
        said = environ.get(variable)
        if not said:
            where = "qsub or qsub -I" if self.scheduler == "pbs" else "sbatch or salloc"
            raise ValueError(f"{variable} is not set: {self.name} runs programs inside of a job ({where})")
        hosts = read_hostfile(Path(said)) if self.scheduler == "pbs" else expand(said)
        if not hosts:
            raise ValueError(f"{variable} ({said}) names no host")
        return hosts

    def command(
        self,
        program: Sequence[str],
        hosts: Sequence[str],
        ranks_per_node: int,
        hostfile: Path | None = None,
    ) -> list[str]:
        """Return the command line that starts `program` on every host, `ranks_per_node` times each.

        Rank r runs on `hosts[r // ranks_per_node]`. Slurm places by the order of its own list, so there the
        hosts of a hostfile must be in the order of `hosts(environ)`.

        Args:
            program: its words, python among them.
            hosts: where; on a machine without a scheduler there is one only.
            ranks_per_node: ranks on each.
            hostfile: has these hosts, one a line. None: all of the allocation.

        Raises:
            ValueError: no ranks, or several hosts without a scheduler that knows them.
        """
        if ranks_per_node < 1 or not hosts:
            raise ValueError(f"{len(hosts)} hosts with {ranks_per_node} ranks each: nothing would run")
        ranks = len(hosts) * ranks_per_node
        if self.scheduler == "none":
            if len(hosts) > 1:
                raise ValueError(f"{len(hosts)} hosts: {self.name} has one; name a machine with --machine")
            return [*self.starter, "-n", str(ranks), *program] if ranks > 1 else list(program)
        if self.scheduler == "pbs":
            flags = ["-n", str(ranks), "--ppn", str(ranks_per_node)]
            flags += ["--hostfile", str(hostfile)] if hostfile else []
            bind = ["--cpu-bind", "list:" + ":".join(self.cpu_bind[:ranks_per_node])]
            free = ["--cpu-bind", "none"]
        else:
            flags = [f"--nodes={len(hosts)}", f"--ntasks={ranks}", f"--ntasks-per-node={ranks_per_node}"]
            # srun takes a list with a slash in it for a file's name.
            flags += [f"--nodelist={Path(hostfile).absolute()}"] if hostfile else []
            bind = ["--cpu-bind=mask_cpu:" + ",".join(self.cpu_bind[:ranks_per_node])]
            free = ["--cpu-bind=none"]
        # One process alone on a node works for all of it, staging for example.
        bound = bind if 1 < ranks_per_node <= len(self.cpu_bind) else free
        return [*self.starter, *flags, *bound, *program]

    def submission(
        self,
        script: str,
        nodes: int,
        walltime_s: float,
        queue: str,
        account: str = "",
        settings: Mapping[str, str] | None = None,
        after: str = "",
    ) -> list[str]:
        """Return the command line that submits a job script; what it says overrides the script's directives.

        Args:
            script: path of it, from the directory the job is to run in.
            nodes: to ask for, spares among them.
            walltime_s: time to ask for.
            queue: queue or partition.
            account: whom it is charged to; "" leaves that to the scheduler.
            settings: environment variables the script reads.
            after: identifier of the job that must have ended before, however; "" if none.

        Raises:
            ValueError: nothing can be submitted here, or a setting has signs that a scheduler's list of
                settings cannot hold.
        """
        if self.scheduler == "none":
            raise ValueError(f"{self.name} has no scheduler: run the job script, or name a --machine")
        for name, value in (settings or {}).items():
            if bad := re.search(r"[,'\"\\\n]", value):
                raise ValueError(f"{name} is {value!r}: {bad.group()!r} cannot travel to a job")
        pairs = [f"{name}={value}" for name, value in (settings or {}).items()]
        limit = scheduler.clock(walltime_s)
        if self.scheduler == "pbs":
            flags = ["-A", account] if account else []
            flags += ["-q", queue, "-l", f"select={nodes}", "-l", f"walltime={limit}", *self.resources]
            flags += ["-W", f"depend=afterany:{after}"] if after else []
            return ["qsub", *flags, *(["-v", ",".join(pairs)] if pairs else []), script]
        flags = [f"--account={account}"] if account else []
        flags += [f"--partition={queue}", f"--nodes={nodes}", f"--time={limit}", *self.resources]
        flags += [f"--dependency=afterany:{after}"] if after else []
        return ["sbatch", *flags, "--export=" + ",".join(["ALL", *pairs]), script]

    def address(self, host: str) -> str:
        """Return the name by which other nodes reach `host`: over the fast network where that has its own."""
        return host.split(".")[0] + self.fast_domain if self.fast_domain else host

    def again(self, script: str, environ: Mapping[str, str], settings: Sequence[str] = SETTINGS) -> list[str]:
        """Return the command line that submits a job like the one this process is in.

        The nodes, time, queue and account are those of the running job, as its scheduler says.

        Args:
            script: path of the job script, from the working directory.
            environ: of this job.
            settings: names of environment variables to hand on, those that are set.

        Raises:
            ValueError: this is no job, or the scheduler does not say what it was given.
        """
        asked = {"pbs": scheduler.pbs_asked, "slurm": scheduler.slurm_asked}.get(self.scheduler)
        job = asked(environ) if asked else {}
        if missing := [what for what in ("nodes", "walltime", "queue") if not job.get(what)]:
            raise ValueError(f"{self.name}: nobody says with which {', '.join(missing)} this job was started")
        return self.submission(
            script,
            nodes=int(job["nodes"]),
            walltime_s=scheduler.seconds(job["walltime"]),
            queue=job["queue"],
            account=job["account"],
            settings={name: environ[name] for name in settings if name in environ},
        )

    def seconds_left(self, environ: Mapping[str, str]) -> float | None:
        """Return how long this job may still run, in seconds; None without a limit or if nobody says."""
        left = {"pbs": scheduler.pbs_seconds_left, "slurm": scheduler.slurm_seconds_left}
        return left[self.scheduler](environ) if self.scheduler in left else None


def guess(environ: Mapping[str, str]) -> Machine:
    """Return the machine this process is on, by what its scheduler says; without a job, `local`.

    Raises:
        ValueError: the job is of a machine that is not known here.
    """
    if job := environ.get("PBS_JOBID", ""):
        if "aurora" in job:  # 1234567.aurora-pbs-0001.hostmgmt.cm.aurora.alcf.anl.gov
            return MACHINES["alcf-aurora"]
        raise ValueError(f"PBS job {job} is of no machine known here: say --machine {'|'.join(MACHINES)}")
    if environ.get("SLURM_JOB_ID"):
        name = environ.get("SLURM_CLUSTER_NAME", "")
        if name in MACHINES:
            return MACHINES[name]
        raise ValueError(
            f"Slurm cluster {name!r} is not known here: say --machine lumi if it is like it, 8 devices a node"
        )
    return MACHINES["local"]


def machine(name: str | None, environ: Mapping[str, str]) -> Machine:
    """Return the machine of this name, or without one that this process is on; ValueError if unknown."""
    if name is None:
        return guess(environ)
    if name not in MACHINES:
        raise ValueError(f"there is no machine {name!r}; known are {', '.join(MACHINES)}")
    return MACHINES[name]


def meeting_name(host: str, environ: Mapping[str, str]) -> str:
    """Return the name by which other nodes of this job reach `host`, over the fast network if it is known."""
    try:
        return guess(environ).address(host)
    except ValueError:  # a job of a machine that is not known here; its own name must do
        return host


def first_host(environ: Mapping[str, str]) -> str:
    """Return the host that rank 0 is on by the lists of this job step or job; "" without one.

    `launch job` sets PBS_NODEFILE to the hosts it starts ranks on.
    """
    for variable in ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST"):
        if said := environ.get(variable):
            return expand(said)[0]
    if said := environ.get("PBS_NODEFILE"):
        return (read_hostfile(Path(said)) or [""])[0]
    return ""


def job_port(environ: Mapping[str, str]) -> str:
    """Return a port that all ranks of this job step know without talking; "" outside of a job.

    Below 32768, where systems take the ports from that they give to whoever asks for any. Another one for
    every attempt of `launch job`, so that none meets what is left of the one before.
    """
    for job, step in (("PBS_JOBID", "AERIS_ATTEMPT"), ("SLURM_JOB_ID", "SLURM_STEP_ID")):
        if match := re.match(r"\d+", environ.get(job, "")):
            further = re.match(r"\d+", environ.get(step, ""))
            return str(10_000 + (int(match.group()) + int(further.group() if further else 0)) % 20_000)
    return ""


_ALCF_AURORA = Machine(
    # docs.alcf.anl.gov/aurora, August 2026: 10,624 nodes of 6 Max 1550 = 12 tiles, 2 x 52 cores.
    name="alcf-aurora",
    ranks_per_node=12,
    scheduler="pbs",
    starter=("mpiexec", "--pmi=pmix"),
    # As in the published runs: 7 cores a rank. The core before them is its oneCCL worker's
    # (CCL_WORKER_AFFINITY in pbs/env/alcf-aurora.sh); 0 and 52 are the system's.
    cpu_bind=tuple(f"{first}-{first + 6}" for first in (*range(2, 43, 8), *range(54, 95, 8))),
    nodes=10_624,
    queues=(  # docs.alcf.anl.gov/aurora/running-jobs-aurora; prod routes by size, so it has three rows
        Queue("prod", 256, 1024, 12),
        Queue("prod", 1025, 1999, 18),
        Queue("prod", 2000, 10_624, 24),
        Queue("debug", 1, 2, 1, chains=False),
        Queue("debug-scaling", 2, 256, 1, chains=False),
        Queue("capacity", 1, 16, 168),
    ),
    fast_domain=".hsn.cm.aurora.alcf.anl.gov",
    resources=("-l", "filesystems=flare", "-l", "place=scatter", "-k", "doe"),
)

_LUMI = Machine(
    # docs.lumi-supercomputer.eu: LUMI-G, 2,978 nodes of 4 MI250X = 8 GCDs, 64 cores.
    name="lumi",
    ranks_per_node=8,
    scheduler="slurm",
    starter=("srun", "--distribution=block", "--kill-on-bad-exit=1"),
    # lumig-job: 6 cores of the chiplet next to each GCD, in the order of the GCDs. The node's first core is
    # the system's; the first and the last core of every chiplet are left out, so that ranks are alike.
    cpu_bind=tuple(f"{0x7E << 8 * chiplet:x}" for chiplet in (6, 7, 2, 3, 0, 1, 4, 5)),
    nodes=2_978,
    queues=(  # docs.lumi-supercomputer.eu/runjobs/scheduled-jobs/partitions
        Queue("standard-g", 1, 1024, 48),
        Queue("small-g", 1, 4, 72),
        Queue("dev-g", 1, 32, 3),
    ),
    # --no-kill: without it Slurm ends a job of which one node fails.
    resources=("--ntasks-per-node=8", "--gpus-per-node=8", "--exclusive", "--mem=0", "--no-kill"),
)

_LOCAL = Machine(name="local", ranks_per_node=1, scheduler="none", starter=("mpiexec",))

MACHINES = {machine.name: machine for machine in (_ALCF_AURORA, _LUMI, _LOCAL)}
"""Every machine by its name on the command line."""
