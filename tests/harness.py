"""Run a function on many ranks of this machine: `run_distributed(function, world, *args)`.

A server process imports torch and the function's module once and forks the ranks, so they start in a moment
and share what they only read. They meet through a file, talk by gloo over the loopback device, have one
thread each, and hand their results back as files.
"""

from __future__ import annotations

import atexit
import faulthandler
import functools
import gc
import importlib
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parents[1]
PRELOAD = ("pytest", "torch._dynamo", *(f"torch.distributed.{n}" for n in ("tensor", "fsdp", "checkpoint")))


def run_distributed(
    function: Callable[..., Any],
    world: int,
    *args: Any,
    timeout_s: float = 60.0,
    patience_s: float | None = None,
) -> list[Any]:
    """Call `function(*args)` in `world` processes with torch.distributed initialised; return results by rank.

    `function` is at the top of a module that the ranks can import. Every rank starts from torch's seed 0.

    Args:
        timeout_s: for all that the ranks do.
        patience_s: of a rank that waits for another; by default it outlasts the timeout, so that a hang ends
            with the stacks of all.

    Raises:
        AssertionError: ranks raised, died or did not finish in time; names them and says where they were.
    """
    if "<" in function.__qualname__:
        raise TypeError(f"{function.__qualname__} is not at the top of a module: ranks could not find it")
    with tempfile.TemporaryDirectory(prefix="ranks-") as name:
        torch.save(args, Path(name, "args"))
        server = _server()
        try:
            server.send((function.__module__, function.__qualname__, world, name, timeout_s, patience_s))
            verdict: str = server.recv()
        except BaseException:  # interrupted: the server kills its ranks when the connection closes
            server.close()
            _server.cache_clear()
            raise
        if verdict:
            raise AssertionError(verdict)
        return [torch.load(Path(name, f"{rank}.result"), weights_only=False) for rank in range(world)]


@functools.lru_cache(maxsize=1)
def _server() -> Connection:
    """Start the server that forks the ranks of this test run; it ends when its connection closes."""
    ours, theirs = multiprocessing.Pipe()
    path = os.pathsep.join([str(ROOT), *filter(None, sys.path)])
    loopback = next(name for _, name in socket.if_nameindex() if name.startswith("lo"))
    settings = {"OMP_NUM_THREADS": "1", "PYTHONPATH": path, "GLOO_SOCKET_IFNAME": loopback}
    settings["TORCH_FR_BUFFER_SIZE"] = "20"  # as a run has a flight recorder
    command = [sys.executable, "-c", f"import tests.harness as h; h.serve({theirs.fileno()})"]
    process = subprocess.Popen(command, cwd=ROOT, env=os.environ | settings, pass_fds=[theirs.fileno()])
    theirs.close()
    atexit.register(process.wait)
    atexit.register(ours.close)
    return ours


def serve(descriptor: int) -> None:
    """Be the server: fork ranks for every request until the other end of the connection closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # meant for the tests; this end follows them
    connection = Connection(descriptor)
    for module in PRELOAD:
        importlib.import_module(module)
    torch.set_num_threads(1)
    while True:
        try:
            connection.send(_fork_ranks(connection, *connection.recv()))
        except (EOFError, OSError):
            return


def _fork_ranks(
    connection: Connection,
    module: str,
    name: str,
    world: int,
    directory: str,
    timeout_s: float,
    patience_s: float | None,
) -> str:
    """Fork the ranks, wait for all or the first failure, kill the rest; return what went wrong, if it did."""
    try:
        function = getattr(importlib.import_module(module), name)
        args = torch.load(Path(directory, "args"), weights_only=False)
    except Exception:
        return f"the ranks could not start: {traceback.format_exc()}"
    gc.freeze()  # a collection in a rank would touch, and so copy, every shared page
    pids: dict[int, int] = {}
    for rank in range(world):
        if (pid := os.fork()) == 0:
            _rank(function, args, rank, world, Path(directory), patience_s or 2 * timeout_s + 10)
        pids[pid] = rank
    gc.unfreeze()
    codes: dict[int, int] = {}  # of the ranks that end by themselves
    end = time.monotonic() + timeout_s
    while pids and not any(codes.values()) and time.monotonic() < end:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            codes[pids.pop(pid)] = os.waitstatus_to_exitcode(status)
        elif connection.poll(0.005):  # nothing is asked now, so the tests have ended
            break
    if pids and not any(codes.values()):
        for pid in pids:
            os.kill(pid, signal.SIGUSR1)  # prints the stack
        time.sleep(0.5)
    for pid in pids:  # all stand still before the first is gone: none shall raise because of that
        os.kill(pid, signal.SIGSTOP)
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return _verdict(codes, world, Path(directory), timeout_s)


def _verdict(codes: dict[int, int], world: int, directory: Path, timeout_s: float) -> str:
    """Say which rank failed first and how, or which ranks did not finish and where they were."""
    printed = {int(path.stem): path.read_text(errors="replace")[-4000:] for path in directory.glob("*.out")}
    raised = {int(path.stem): path.read_text() for path in directory.glob("*.error")}
    failed = [raised[rank] for rank in sorted(raised, key=lambda rank: int(raised[rank].split()[0]))]
    for rank, code in codes.items():
        if code and rank not in raised:
            failed.insert(0, f"rank {rank} died with {code} (below 0: a signal):\n{printed.get(rank)}")
    if failed:
        return f"{failed[0]}\n({len(failed)} of {world} ranks failed, the others were stopped)"
    slow = [rank for rank in range(world) if not (directory / f"{rank}.result").exists()]
    where = [f"rank {rank} was at:\n{printed.get(rank)}" for rank in slow[:4] or range(min(world, 4))]
    late = f"ranks {slow} of {world} did not finish in {timeout_s:g} s"
    return "" if len(codes) == world else "\n".join([late, *where])


def _rank(
    function: Callable[..., Any], args: Any, rank: int, world: int, directory: Path, patience_s: float
) -> NoReturn:
    """Be one rank."""
    code = 1
    try:
        output = os.open(directory / f"{rank}.out", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        faulthandler.enable()
        faulthandler.register(signal.SIGUSR1)
        torch.manual_seed(0)
        store, wait = dist.FileStore(str(directory / "store"), world), timedelta(seconds=patience_s)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=wait)
        torch.save(function(*args), directory / f"{rank}.result")
        if dist.is_initialized():
            dist.barrier()
        code = 0
    except BaseException:
        text = f"{time.monotonic_ns()} ns: rank {rank} of {world} raised\n{traceback.format_exc()}"
        (directory / f"{rank}.partial").write_text(text)  # renamed: this rank may be killed as it writes
        (directory / f"{rank}.partial").rename(directory / f"{rank}.error")
    finally:
        sys.stdout.flush()
        os._exit(code)
