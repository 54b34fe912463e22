"""Train on ranks that a server forks, which imports torch once: a run starts in a moment.

The ranks run the functions of `python -m aeris.train`, without its self-test and its plots. Beside runs of
several ranks that know each other there can be runs of one rank each at the same time that do not.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
from contextlib import closing
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from multiprocessing.synchronize import Barrier
from pathlib import Path

import torch

from aeris import train
from aeris.config import RunConfig
from aeris.log import run_program, speaker
from aeris.run import carry_through
from aeris.step import Training
from launch.rank import Ranks

PRELOAD = ("benchmarks.forked", "torch._dynamo", "torch.distributed.fsdp", "torch.distributed.checkpoint")
"""What every rank would else import by itself."""
PATIENCE_S = 300.0
"""The longest a run may wait for the others to be ready."""


def train_at_once(config: RunConfig, directory: Path, *, ranks: int, copies: int, threads: int) -> list[Path]:
    """Train `copies` runs of the same settings at the same time, each on `ranks` ranks of this machine.

    All wait for each other before their first step, so that they do their steps at the same time. Copies know
    nothing of each other.

    Args:
        config: of one run; its degrees make `ranks` ranks.
        directory: gets a run directory of each.
        threads: of each rank.

    Returns:
        The run directories.

    Raises:
        ValueError: a rank failed; the last lines of what it said.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOAD))
    gate, crew = context.Barrier(ranks * copies), dict[BaseProcess, Path]()
    found = [directory / f"run_{copy}" for copy in range(copies)]
    for run_dir in found:
        port = _free_port()
        for rank in range(ranks):
            said = directory / f"{run_dir.name}.{rank}.out"
            given = (
                config,
                run_dir,
                Ranks(rank, ranks, rank, ranks, "environment"),
                port,
                threads,
                gate,
                said,
            )
            crew[context.Process(target=_be_rank, args=given)] = said
    directory.mkdir(parents=True, exist_ok=True)
    try:
        for process in crew:
            process.start()
        _see_through(crew)
    finally:
        for process in crew:
            if process.is_alive():
                process.kill()
    return found


def _see_through(crew: dict[BaseProcess, Path]) -> None:
    """Wait for all processes to end; ValueError at the first that fails."""
    running = list(crew)
    while running:
        ended = wait([process.sentinel for process in running])
        for process in [process for process in running if process.sentinel in ended]:
            running.remove(process)
            process.join()
            if process.exitcode:
                lines = crew[process].read_text(errors="replace").strip().splitlines()
                raise ValueError(
                    f"a run of the benchmark ended with status {process.exitcode}: {' | '.join(lines[-5:])}"
                )


def _be_rank(
    config: RunConfig, run_dir: Path, ranks: Ranks, port: int, threads: int, gate: Barrier, said: Path
) -> None:
    """Be one rank of a run, in a process of its own."""
    output = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    torch.set_num_threads(threads)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    speaker.take_turn(ranks.rank, ranks.world)

    def work(run: Training) -> None:
        gate.wait(PATIENCE_S)
        train.train(run)

    run_program(
        lambda: carry_through(
            ranks, config, run_dir, lambda guards: train.prepare(config, run_dir, "cpu", guards), work
        )
    )


def _free_port() -> int:
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
