"""Find bad nodes before a run does: `python -m launch preflight`, inside of a job.

One launch of `aeris.probe` on every rank of every host measures all at once, so it takes seconds on any
number of nodes. Rates are judged by those of the others: nobody has to know what a good node does. Hosts
whose ranks could not communicate in a team are tried again in pairs, with two partners each, to tell who it
was.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from launch import machines
from launch.machines import Machine
from launch.pool import by_name
from launch.readings import Reading, parse, slow, table

TEAM = 16
"""Neighbouring hosts whose ranks communicate, in aeris.probe."""
IN_FILE = "in the reading of the file"
"""What a rank of aeris.probe says that fails there or is stuck."""
_FILE_BYTES = 2**20
_LOOKED_AT = 1000  # files of a store: some have millions
_GRACE_S = 5.0  # between asking a launcher to end and ending it
_LAUNCHES = 3  # times to start anew without the hosts that the launcher names


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Say which words the command takes."""
    parser.add_argument(
        "--machine", choices=list(machines.MACHINES), help="default: by the scheduler's words"
    )
    parser.add_argument("--ranks-per-node", type=int, help="default: as many as a node has devices")
    parser.add_argument("--file", type=Path, help="a large file to read, on the file system of the data")
    parser.add_argument("--limit-pct", type=float, default=20.0, help="how far below the median is bad (20)")
    parser.add_argument("--no-collective", action="store_true", help="leave out communication between ranks")
    parser.add_argument("--timeout-s", type=float, default=120.0, help="of one launch (120)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or xpu")
    parser.add_argument("--good-hosts", type=Path, help="write the good hosts to this file, one a line")


def run(arguments: argparse.Namespace) -> int:
    """Measure all hosts of the job, print what they do, and return 0 if all are good, else 1.

    Raises:
        ValueError: there is no job, or a setting is impossible.
        OSError: nothing could be measured, or a file cannot be written.
    """
    machine = machines.machine(arguments.machine, os.environ)
    hosts = machine.hosts(os.environ)
    # In a directory that all nodes can read.
    with _ended_cleanly(), tempfile.TemporaryDirectory(prefix="preflight-", dir=".") as directory:
        bad = examine(
            machine,
            hosts,
            arguments.ranks_per_node or machine.ranks_per_node,
            directory=Path(directory),
            file=arguments.file,
            limit_pct=arguments.limit_pct,
            collective=not arguments.no_collective,
            timeout_s=arguments.timeout_s,
            device=arguments.device,
            show=True,
        )
    for host, why in bad.items():
        print(f"{host} is bad: {why}")
    good = [host for host in hosts if host not in bad]
    if arguments.good_hosts:
        arguments.good_hosts.write_text("".join(f"{host}\n" for host in good), encoding="utf-8")
    print(f"{len(good)} of {len(hosts)} hosts are good")
    return 1 if bad else 0


@contextlib.contextmanager
def _ended_cleanly() -> Iterator[None]:
    """Leave by an exception at SIGTERM, so that what was started is ended too."""

    def leave(number: int, _: object) -> NoReturn:
        sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def examine(
    machine: Machine,
    hosts: Sequence[str],
    ranks_per_node: int,
    *,
    directory: Path,
    file: Path | None = None,
    python: str = sys.executable,
    environ: Mapping[str, str] | None = None,
    limit_pct: float = 20.0,
    collective: bool = True,
    timeout_s: float = 120.0,
    device: str = "auto",
    say: Callable[[str], None] = print,
    show: bool = False,
) -> dict[str, str]:
    """Measure hosts; return the bad ones with what is wrong with them.

    Args:
        directory: for the lists of hosts that the launcher and the ranks read; every node sees it.
        file: to read a part of, by every rank; left out if most hosts cannot, or not in time.
        python: what the ranks run on.
        environ: for them; this process's own if None.
        limit_pct: how far below the median of all ranks a rate is bad, if the rates are alike otherwise.
        collective: whether ranks also communicate.
        timeout_s: of one launch; there are more if hosts are bad, up to six.
        say: is told what was left out.
        show: print the table of rates too.

    Raises:
        ValueError: `limit_pct` or `timeout_s` is impossible, or `file` too small.
        OSError: no host measured anything, or not even the launcher can be started.
    """
    if not 0 < limit_pct < 100 or timeout_s <= 0:
        raise ValueError(f"--limit-pct {limit_pct:g} must be between 0 and 100, --timeout-s above 0")
    if file and (size := file.stat().st_size) < _FILE_BYTES:
        raise ValueError(
            f"{file} has {size} bytes: reading it says nothing, take one of {_FILE_BYTES} or more"
        )
    words = ["--device", device, "--team", str(TEAM * collective)]
    reads = ["--file", str(file.absolute())] if file else []
    probe = _Probe(machine, ranks_per_node, directory, timeout_s, python, environ)
    bad, readings = _all_speak(probe, hosts, [*words, *reads])
    stuck = {one.host for one in readings if IN_FILE in one.error}
    if 2 * len(stuck) > len(hosts) > 1:
        say(f"{len(stuck)} of {len(hosts)} hosts cannot read {file}, or not in time: measured without it")
        bad, readings = _all_speak(probe, hosts, words)
    good = [host for host in hosts if host not in bad]
    bad |= _faults([one for one in readings if one.phase == "alone"], good, ranks_per_node)
    bad |= {host: why for host, why in slow(readings, limit_pct).items() if host not in bad}
    if collective and len(good) * ranks_per_node > 1:
        together = [one for one in readings if one.phase == "together"]
        failed = {
            host: why for host, why in _faults(together, good, ranks_per_node).items() if host not in bad
        }
        if failed:
            bad |= _in_pairs(probe, failed, [host for host in good if host not in bad], words[:2])
    if show:
        print(table(readings, list(hosts), bad))
    return bad


def data_file(store: str) -> Path | None:
    """Return the largest of the first files of a store to read a part of; None without one that is enough."""
    found = (Path(root, name) for root, _, names in os.walk(store) for name in names)
    sizes = []
    for path in itertools.islice(found, _LOOKED_AT):
        with contextlib.suppress(OSError):
            sizes.append((path.stat().st_size, path))
    size, path = max(sizes, default=(0, Path()))
    return path if size >= _FILE_BYTES else None


class _Probe:
    """Starts aeris.probe on hosts and returns what it prints."""

    def __init__(
        self,
        machine: Machine,
        ranks_per_node: int,
        directory: Path,
        timeout_s: float,
        python: str,
        environ: Mapping[str, str] | None,
    ) -> None:
        self.machine, self.ranks_per_node, self.timeout_s = machine, ranks_per_node, timeout_s
        self.python = python
        self.environ = dict(os.environ if environ is None else environ)
        self.hostfile, self.addresses = directory / "hosts.preflight", directory / "addresses.preflight"

    def __call__(self, hosts: Sequence[str], words: Sequence[str]) -> tuple[list[Reading], str]:
        """Run it; return the readings and everything else that was printed."""
        meeting = [self.machine.address(host) for host in hosts] if len(hosts) > 1 else ["127.0.0.1"]
        for path, names in ((self.hostfile, hosts), (self.addresses, meeting)):
            path.write_text("".join(f"{name}\n" for name in names), encoding="utf-8")
        program = [self.python, "-m", "aeris.probe", *words, "--hosts", str(self.addresses.absolute())]
        # A rank that is stuck says so before the launcher is stopped; a port of an earlier launch may linger.
        program += ["--limit-s", str(self.timeout_s / 2), "--port", str(random.randint(20000, 32000))]
        command = self.machine.command(program, hosts, self.ranks_per_node, self.hostfile)
        output = _output(command, self.timeout_s, self._environ(len(hosts)))
        return parse(output, hosts, self.ranks_per_node)

    def _environ(self, hosts: int) -> dict[str, str]:
        """Say how many ranks there are where the launcher does not, so that nobody has to ask MPI."""
        world = str(hosts * self.ranks_per_node)
        return {**self.environ, **({"WORLD_SIZE": world} if self.machine.scheduler == "pbs" else {})}


def _output(command: Sequence[str], timeout_s: float, environ: Mapping[str, str]) -> str:
    """Run a command for at most a time; return what it printed by then, and leave nothing of it running."""
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=environ,
        start_new_session=True,
    ) as process:
        try:
            return process.communicate(timeout=timeout_s)[0]
        except subprocess.TimeoutExpired:
            _end(process, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                return process.communicate(timeout=_GRACE_S)[0]
            _end(process, signal.SIGKILL)
            return process.communicate()[0]
        finally:
            _end(process, signal.SIGKILL)


def _end(process: subprocess.Popen[str], how: signal.Signals) -> None:
    """Signal everything that a process has started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, how)


def _all_speak(
    probe: _Probe, hosts: Sequence[str], words: Sequence[str]
) -> tuple[dict[str, str], list[Reading]]:
    """Launch on all hosts, and again without those that keep it from starting; return these, and readings."""
    bad: dict[str, str] = {}
    for _ in range(_LAUNCHES):
        trying = [host for host in hosts if host not in bad]
        readings, said = probe(trying, words)
        spoke = {one.host for one in readings}
        silent = [host for host in trying if host not in spoke]
        named = named_in(said, silent)
        if len(silent) < len(trying) and not (named and len(silent) > len(named)):
            nothing = f"none of its {probe.ranks_per_node} ranks said anything"
            return bad | {host: named.get(host, nothing) for host in silent}, readings
        if not named or len(named) == len(trying):
            last = (said.strip().splitlines() or ["nothing"])[-1]
            raise OSError(f"the preflight measured nothing on {len(trying)} hosts; the launcher said: {last}")
        bad |= named
    raise OSError(f"the preflight could not start, even without {', '.join(bad)}")


def named_in(said: str, hosts: Sequence[str]) -> dict[str, str]:
    """Find hosts that a launcher names in what it says, each with the first line that does."""
    found: dict[str, str] = {}
    names = by_name(hosts)
    for line in said.splitlines():
        for word in re.findall(r"[A-Za-z0-9][\w-]*", line):
            if word in names:
                found.setdefault(names[word], f"the launcher said: {line.strip()}")
    return found


def _faults(readings: Sequence[Reading], hosts: Sequence[str], ranks_per_node: int) -> dict[str, str]:
    """Name the hosts of which a rank said that something failed, or did not say anything."""
    found: dict[str, str] = {}
    by_host: dict[str, list[Reading]] = {host: [] for host in hosts}
    for one in readings:
        by_host.get(one.host, []).append(one)
    for host, own in by_host.items():
        failed = next((one for one in own if one.error), None)
        if failed:
            found[host] = f"local rank {failed.local_rank}: {failed.error}"
        elif len(own) < ranks_per_node:
            found[host] = f"{len(own)} of {ranks_per_node} ranks said what they measured"
    return found


def _in_pairs(
    probe: _Probe, suspects: Mapping[str, str], hosts: Sequence[str], words: Sequence[str]
) -> dict[str, str]:
    """Try suspects in pairs with each other and as many good `hosts`; bad is who fails with all partners."""
    good = [host for host in hosts if host not in suspects][: len(suspects)]
    trying = [host for host in hosts if host in suspects or host in good]  # in the order of the launcher
    tried, failed, why = dict.fromkeys(trying, 0), dict.fromkeys(trying, 0), dict(suspects)
    # Each host gets two partners: of an odd number one stays alone in every round; two have only each other.
    for offset in range(1 if len(trying) == 2 else 2 + len(trying) % 2):
        readings, _ = probe(trying, [*words, "--team", "2", "--offset", str(offset)])
        together = [one for one in readings if one.phase == "together"]
        if not together:  # somebody ended the whole launch
            continue
        order = [trying[(place - offset) % len(trying)] for place in range(len(trying))]
        paired = order[: len(order) // 2 * 2]  # the last of an odd number has no partner
        wrong = _faults(together, paired, probe.ranks_per_node)
        for host in paired:
            tried[host] += 1
            failed[host] += host in wrong
        why |= wrong
    return {host: f"cannot communicate: {why[host]}" for host in suspects if failed[host] == tried[host]}
