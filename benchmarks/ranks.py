"""Run a function on ranks that know each other: started here, or those that a launcher has started.

A server process imports torch once and forks the ranks, so that eight of them start in a moment. What a
program measures is the same under mpiexec, torchrun or srun: it then runs once, on the ranks that are there.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from aeris.log import console, speaker
from benchmarks.records import Row
from launch.rank import Ranks, discover, export, leave
from swipe.backend import choose_device, finish, keep_freed_memory, start

Measure = Callable[..., list[Row]]
"""Measures on all ranks together: called as `measure(device, *args)`; its rows are those of rank 0."""
TIMEOUT_S = 300.0


def rows_of(measure: Measure, worlds: Sequence[int], device: str, *args: Any) -> list[Row]:
    """Measure on each number of ranks in turn, or on the ranks that are there; no rows but on rank 0.

    Args:
        measure: at the top of its module.
        worlds: numbers of ranks to start here, if no launcher has started any.
        device: as `swipe.backend.choose_device` takes it.

    Raises:
        ValueError: a rank failed; says which and how.
    """
    found = discover(os.environ)
    if found.launcher == "none":
        rows = []
        for world in worlds:
            console.print(f"{world} rank{'s' * (world > 1)}")
            rows += on_ranks(measure, world, device, *args)
        return rows
    speaker.take_turn(found.rank)
    export(found)
    rows = _as_rank(measure, device, args)
    leave()
    return rows if found.rank == 0 else []


def on_ranks(function: Callable[..., Any], world: int, device: str, *args: Any) -> Any:
    """Call `function(device, *args)` on `world` new ranks of this machine; return what rank 0 returns.

    Raises:
        ValueError: a rank failed; says which and how. The others are stopped.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch.distributed.tensor", "benchmarks.ranks"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    links, ranks = [], []
    for rank in range(world):
        ours, theirs = context.Pipe(duplex=False)
        place = Ranks(rank, world, rank, world, "environment")
        process = context.Process(
            target=_rank, args=(theirs, place, port, function, device, args), daemon=True
        )
        process.start()
        theirs.close()
        links.append(ours)
        ranks.append(process)
    try:
        return _first_result(links)
    finally:
        for process in ranks:
            process.kill()
            process.join()


def _first_result(links: list[Connection]) -> Any:
    """Wait for all ranks or the first failure; return the result of rank 0."""
    results: dict[int, Any] = {}
    while len(results) < len(links):
        ready = wait([link for rank, link in enumerate(links) if rank not in results], TIMEOUT_S)
        if not ready:
            slow = sorted({*range(len(links))} - {*results})
            raise ValueError(f"ranks {slow} of {len(links)} said nothing for {TIMEOUT_S:g} s")
        for rank in [rank for rank, link in enumerate(links) if link in ready]:
            try:
                error, results[rank] = links[rank].recv()
            except EOFError:
                error = "it died"
            if error:
                raise ValueError(f"rank {rank} of {len(links)}: {error}")
    return results[0]


def _rank(
    link: Connection, place: Ranks, port: int, function: Callable[..., Any], device: str, args: Sequence[Any]
) -> None:
    """Be one rank: say what became of it over `link`."""
    speaker.take_turn(place.rank)
    console.quiet = place.rank > 0
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    export(place)
    try:
        result = _as_rank(function, device, args)
    except Exception as error:
        link.send((f"{type(error).__name__}: {error}", None))
        return
    link.send(("", result if place.rank == 0 else None))


def _as_rank(function: Callable[..., Any], device: str, args: Sequence[Any]) -> Any:
    """Join the other ranks, call the function, leave them."""
    keep_freed_memory()
    chosen = choose_device(device)
    start(chosen, TIMEOUT_S)
    result = function(chosen, *args)
    finish()
    return result
