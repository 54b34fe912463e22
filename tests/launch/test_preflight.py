"""The preflight: lines read, rates judged, hosts told apart, with a launcher that plays bad nodes."""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from aeris import probe as program
from launch import machines, preflight, readings
from launch.machines import Machine
from launch.preflight import examine, named_in
from launch.rank import Ranks
from launch.readings import parse

HOSTS = [f"x{number}.cluster" for number in range(6)]


def test_a_launcher_names_hosts_in_whole_words() -> None:
    said = "start\nping failed on x1.cluster: 5\nx12 is fine, also x3-eth and ax2\nx1 again"
    assert named_in(said, HOSTS) == {"x1.cluster": "the launcher said: ping failed on x1.cluster: 5"}


@pytest.mark.parametrize(
    ("hosts", "here", "team", "offset"), [(5, 3, 2, 0), (5, 3, 2, 1), (6, 1, 2, 1), (7, 2, 16, 0)]
)
def test_teams_are_neighbours_led_by_their_first_rank(hosts: int, here: int, team: int, offset: int) -> None:
    world = hosts * here
    members: dict[int, dict[int, tuple[int, int]]] = {}
    for rank in range(world):
        leader, number, size = program.team_of(Ranks(rank, world, rank % here, here), team, offset)
        members.setdefault(leader, {})[number] = (rank, size)
    assert sum(len(ranks) for ranks in members.values()) == world
    for leader, ranks in members.items():
        assert sorted(ranks) == list(range(len(ranks))) and ranks[0][0] == leader * here
        assert {size for _, size in ranks.values()} == {len(ranks)}
        order = [ranks[number][0] // here for number in range(0, len(ranks), here)]
        assert order == [(leader + step) % hosts for step in range(len(order))]
    assert sorted(len(ranks) // here for ranks in members.values())[1:] == [team] * (len(members) - 1)


# A launcher that plays nodes. It finds what is wrong with which host in a file beside itself.

LAUNCHER = """
import json, sys, time
from pathlib import Path
words = sys.argv[1:]
def after(flag, default=""):
    return words[words.index(flag) + 1] if flag in words else default
faults = json.loads(Path(__file__).with_name("faults.json").read_text())
hosts = Path(after("--hostfile")).read_text().split()
with Path(__file__).with_name("calls").open("a") as calls:
    calls.write(json.dumps({"hosts": hosts, "words": words}) + chr(10))
here, team, offset = int(after("--ppn")), int(after("--team", "16")), int(after("--offset", "0"))
for host in hosts:
    if host in faults.get("refused", []):
        sys.exit(f"launch failed: ping failed on {host}")
if faults.get("ends"):
    sys.exit(faults["ends"])
teams = {}
for number, host in enumerate(hosts):
    place = (number + offset) % len(hosts)
    if team:
        teams.setdefault(place // team, []).append(host)
    for local in range(here):
        rank = number * here + local
        place = {"rank": rank, "local_rank": local, "host": host}
        if host in faults.get("silent", []) or [host, local] in faults.get("dead", []):
            continue
        if "--file" in words and host in faults.get("stuck", []):
            error = "not done within 60 s, in the reading of the file"
            print("PROBE " + json.dumps({"phase": "alone", "error": error, **place}))
            continue
        if host in faults.get("broken", []):
            print("PROBE " + json.dumps({"phase": "alone", "error": "no such device", **place}))
            continue
        rate = 20.0 if host in faults.get("slow", []) else 100.0
        print("PROBE " + json.dumps({"phase": "alone", "gemm_tflops": rate, **place}))
away = {h for kind in ("silent", "broken", "mute") for h in faults.get(kind, [])}
for members in teams.values():
    for host in members if len(members) * here > 1 else []:
        if host in faults.get("silent", []) + faults.get("broken", []):
            continue
        for local in range(here):
            place = {"rank": hosts.index(host) * here + local, "local_rank": local, "host": host}
            alone = len(members) == 1
            values = {"next_gbs": 1.0} if alone or not away & set(members) else {"error": "nobody answers"}
            print("PROBE " + json.dumps({"phase": "together", **values, **place}))
sys.stdout.flush()
time.sleep(faults.get("lingers_s", 0.0))
"""

Play = Callable[..., tuple[dict[str, str], list[dict[str, Any]]]]


@pytest.fixture
def play(tmp_path: Path) -> Play:
    """Examine hosts with faults; returns the bad ones, and what was launched."""
    launcher = tmp_path / "launcher.py"
    launcher.write_text(LAUNCHER)
    machine = Machine("played", 2, "pbs", (sys.executable, "-IS", str(launcher)))

    def played(hosts: list[str], ranks: int, how: Any = None, **faults: Any) -> tuple[Any, Any]:
        (tmp_path / "faults.json").write_text(json.dumps(faults))
        bad = examine(machine, hosts, ranks, directory=tmp_path, say=lambda said: None, **(how or {}))
        return bad, [json.loads(call) for call in (tmp_path / "calls").read_text().splitlines()]

    return played


def test_good_hosts_take_one_launch(play: Play) -> None:
    bad, calls = play(HOSTS, 2)
    assert bad == {} and [call["hosts"] for call in calls] == [HOSTS]
    words = calls[0]["words"]
    at = words.index(sys.executable)
    assert words[:4] == ["-n", "12", "--ppn", "2"] and words[at : at + 3] == [
        sys.executable,
        "-m",
        "aeris.probe",
    ]
    addresses = Path(words[words.index("--hosts") + 1])
    assert addresses.read_text().split() == HOSTS


def test_hosts_are_told_apart_by_what_they_do(play: Play) -> None:
    bad, calls = play(HOSTS, 2, slow=[HOSTS[1]], silent=[HOSTS[3]], dead=[[HOSTS[4], 1]], broken=[HOSTS[5]])
    assert bad == {
        HOSTS[1]: "local rank 0: GEMM 20 TFLOP/s, 80% below the median 100",
        HOSTS[3]: "none of its 2 ranks said anything",
        HOSTS[4]: "1 of 2 ranks said what they measured",
        HOSTS[5]: "local rank 0: no such device",
    }
    assert [call["hosts"] for call in calls[1:]] == [[HOSTS[0], HOSTS[2]]], "their team had bad hosts"


@pytest.mark.parametrize(("count", "mute"), [(2, 1), (3, 0), (5, 2), (6, 5)])
def test_who_cannot_communicate_is_found_in_pairs(play: Play, count: int, mute: int) -> None:
    """All hosts of the team fail together. Of two hosts, both may be it."""
    bad, calls = play(HOSTS[:count], 1, mute=[HOSTS[mute]])
    assert set(bad) == ({HOSTS[mute]} if count > 2 else set(HOSTS[:2]))
    assert bad[HOSTS[mute]] == "cannot communicate: local rank 0: nobody answers"
    offsets = [call["words"][call["words"].index("--offset") + 1] for call in calls[1:]]
    assert offsets == [str(offset) for offset in range({2: 1, 3: 3, 5: 3, 6: 2}[count])]


def test_only_the_team_that_failed_is_tried_again(play: Play) -> None:
    hosts = [f"y{number}" for number in range(40)]
    bad, calls = play(hosts, 1, mute=["y20"])
    assert list(bad) == ["y20"]
    assert set(hosts[16:32]) <= set(calls[1]["hosts"]) and len(calls[1]["hosts"]) == 32


def test_hosts_that_keep_a_launcher_from_starting_are_left_out(play: Play) -> None:
    bad, calls = play(HOSTS, 2, refused=[HOSTS[2], HOSTS[4]])
    reason = "the launcher said: launch failed: ping failed on {}"
    assert bad == {host: reason.format(host) for host in (HOSTS[2], HOSTS[4])}
    assert [len(call["hosts"]) for call in calls] == [6, 5, 4]


def test_a_launcher_that_fails_by_itself_says_nothing_of_hosts(play: Play) -> None:
    with pytest.raises(OSError, match="measured nothing on 6 hosts; the launcher said: no more licences"):
        play(HOSTS, 2, ends="no more licences")


def test_without_communication_nobody_is_tried_for_it(play: Play) -> None:
    bad, calls = play(HOSTS, 2, {"collective": False}, mute=[HOSTS[1]])
    assert bad == {} and len(calls) == 1 and "0" == calls[0]["words"][calls[0]["words"].index("--team") + 1]


def test_a_launcher_that_does_not_end_is_ended(play: Play) -> None:
    """What it has printed counts."""
    started = time.monotonic()
    bad, _ = play(HOSTS, 2, {"timeout_s": 1.0}, slow=[HOSTS[1]], lingers_s=60)
    assert list(bad) == [HOSTS[1]] and time.monotonic() - started < 10


def test_nothing_of_a_launcher_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its children are ended too, though they do not listen to SIGTERM."""
    stubborn = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
    parent = (
        f"import subprocess, sys; child = subprocess.Popen([sys.executable, '-c', {stubborn!r}]);"
        "print(child.pid, flush=True); child.wait()"
    )
    monkeypatch.setattr(preflight, "_GRACE_S", 0.2)
    said = preflight._output([sys.executable, "-c", parent], 4.0, os.environ)
    child = int(said.split()[0])
    for _ in range(100):
        try:
            state = Path(f"/proc/{child}/stat").read_text().rsplit(")")[-1].split()[0]
        except OSError:
            break
        if state == "Z":
            break
        time.sleep(0.05)
    else:
        pytest.fail(f"process {child} is still there")


@pytest.mark.parametrize("how", [{"limit_pct": 0.0}, {"limit_pct": 100.0}, {"timeout_s": 0.0}])
def test_impossible_settings_are_refused(play: Play, how: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must be between 0 and 100"):
        play(HOSTS, 2, how)


def test_a_file_too_small_to_tell_is_refused(play: Play, tmp_path: Path) -> None:
    (tmp_path / "small").write_bytes(bytes(1000))
    with pytest.raises(
        ValueError, match="has 1000 bytes: reading it says nothing, take one of 1048576 or more"
    ):
        play(HOSTS, 2, {"file": tmp_path / "small"})


def test_a_file_system_too_slow_for_all_is_no_hosts_fault(play: Play, tmp_path: Path) -> None:
    """Most ranks do not get their piece in time: measured again without it. A few that do not are bad."""
    (tmp_path / "file").write_bytes(bytes(2**20))
    how = {"file": tmp_path / "file", "python": "/staged/python", "environ": {"PATH": os.environ["PATH"]}}
    bad, calls = play(HOSTS, 2, how, stuck=HOSTS[:4], broken=[HOSTS[5]])
    assert list(bad) == [HOSTS[5]]
    assert ["--file" in call["words"] for call in calls[:2]] == [True, False]
    assert all("/staged/python" in call["words"] for call in calls)
    bad, calls = play(HOSTS, 2, how, stuck=[HOSTS[0]])
    assert bad == {HOSTS[0]: "local rank 0: not done within 60 s, in the reading of the file"}


def test_a_file_of_a_store_is_its_largest(tmp_path: Path) -> None:
    (tmp_path / "c").mkdir()
    for name, size in (("store.h5", 10), ("c/0", 2**20), ("c/1", 2**20 + 1)):
        (tmp_path / name).write_bytes(bytes(size))
    assert preflight.data_file(str(tmp_path)) == tmp_path / "c" / "1"
    assert preflight.data_file("sample") is None  # packaged, or not local


def test_the_mark_and_the_team_are_those_of_the_program() -> None:
    """Launch imports nothing of it."""
    assert readings.MARK == program.MARK and preflight.TEAM == program.Arguments().team


def command(words: list[str], directory: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """Run the command in a job of two played hosts."""
    (directory / "nodes").write_text("x0\nx1\nx2\n")
    launcher = directory / "launcher.py"
    launcher.write_text(LAUNCHER)
    machine = Machine("played", 2, "pbs", (sys.executable, "-IS", str(launcher)))
    monkeypatch.setitem(machines.MACHINES, "played", machine)
    monkeypatch.setenv("PBS_NODEFILE", str(directory / "nodes"))
    monkeypatch.chdir(directory)
    parser = argparse.ArgumentParser()
    preflight.add_arguments(parser)
    return preflight.run(parser.parse_args(["--machine", "played", *words]))


def test_the_command_says_who_is_bad_and_lists_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "faults.json").write_text('{"slow": ["x1"]}')
    assert command(["--good-hosts", "good"], tmp_path, monkeypatch) == 1
    *rows, bad, last = capsys.readouterr().out.splitlines()
    assert [row.split()[0] for row in rows] == ["host", "x0", "x1", "x2", "median"]
    assert bad == "x1 is bad: local rank 0: GEMM 20 TFLOP/s, 80% below the median 100"
    assert last == "2 of 3 hosts are good" and (tmp_path / "good").read_text() == "x0\nx2\n"
    (tmp_path / "faults.json").write_text("{}")
    assert command(["--no-collective"], tmp_path, monkeypatch) == 0
    assert not list(tmp_path.glob("preflight-*"))


def test_the_command_can_be_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "faults.json").write_text('{"lingers_s": 60}')
    timer, started = threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGTERM)), time.monotonic()
    before = signal.getsignal(signal.SIGTERM)
    timer.start()
    with pytest.raises(SystemExit) as ended:
        command([], tmp_path, monkeypatch)
    assert ended.value.code == 128 + signal.SIGTERM and time.monotonic() - started < 20
    assert signal.getsignal(signal.SIGTERM) is before and not list(tmp_path.glob("preflight-*"))


def start(words: list[str], directory: Path, **more: str) -> subprocess.Popen[str]:
    """Start a program of ours."""
    root = str(Path(__file__).resolve().parents[2])
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PBS_", "SLURM_", "PMI_"))}
    path = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"  # mpiexec, if it was installed here
    env |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": root, "PATH": path, **more}
    return subprocess.Popen(
        [sys.executable, "-m", *words],
        cwd=directory,
        env=env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


@pytest.mark.slow
def test_this_machine_is_measured(tmp_path: Path) -> None:
    """Two real ranks under mpiexec, by the command line."""
    (tmp_path / "file").write_bytes(bytes(2**21))
    words = ["--machine", "local", "--ranks-per-node", "2", "--device", "cpu", "--file", "file"]
    said, wrong = start(["launch", "preflight", *words, "--good-hosts", "good"], tmp_path).communicate(
        timeout=200
    )
    head, row, *_, last = said.splitlines() or [wrong]
    assert [name in head for name in ("GEMM TFLOP/s", "memory GB/s", "file MB/s", "link GB/s")] == [True] * 4
    assert row.split()[1] == "2" and "-" not in row.split()[2:]
    assert last == "1 of 1 hosts are good" and len((tmp_path / "good").read_text().split()) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "good"], "nothing else is left"


@pytest.mark.slow
def test_a_rank_that_fails_says_so_and_ends_well(tmp_path: Path) -> None:
    """A launcher would end the others otherwise: no such device, a partner who does not come."""
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    missing = start(["aeris.probe", "--device", "cuda:99"], tmp_path, **place)
    lonely = start(["aeris.probe", "--device", "cpu", "--limit-s", "2"], tmp_path, **place)
    expected = (
        (missing, "alone", r"--device cuda:99 is not available here: .* \(in the choice of the device\)"),
        (lonely, "together|alone", r"not done within 2 s, in the "),  # where, depends on this machine's load
    )
    for process, phase, error in expected:
        found, _ = parse(process.communicate(timeout=200)[0], ["here"], 2)
        assert process.returncode == 0 and re.fullmatch(phase, found[-1].phase)
        assert re.match(error, found[-1].error), found[-1].error
