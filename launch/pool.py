"""The hosts of a job: which of them a program is started on, and which are put aside."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence


def by_name(hosts: Sequence[str]) -> dict[str, str]:
    """Return hosts by their names without a domain: launchers and ranks say it or leave it out."""
    return {host.split(".")[0]: host for host in hosts}


class Pool:
    """Hosts by how much they are blamed. None is ever lost: without spares the least blamed serve again."""

    def __init__(self, hosts: Sequence[str], nodes: int, say: Callable[..., None]) -> None:
        """Take the hosts of an allocation; a program runs on `nodes` of them, `say` is told of decisions."""
        self.hosts, self.nodes = tuple(hosts), nodes
        self._bad: dict[str, str] = {}  # as measured last
        self._suspected = dict.fromkeys(hosts, 0)  # how often
        self._say = say

    def chosen(self) -> list[str]:
        """Return the hosts that are blamed least, in the scheduler's order: neighbours stay neighbours."""
        place = {host: number for number, host in enumerate(self.hosts)}
        blame = [(host in self._bad, self._suspected[host], place[host]) for host in self.hosts]
        least = [self.hosts[number] for *_, number in sorted(blame)[: self.nodes]]
        if bad := [host for host in least if not self._good(host)]:
            shown = ", ".join(bad[:8]) + (" .." if len(bad) > 8 else "")
            self._say(f"no spares are left: {len(bad)} hosts serve again: {shown}", "spares", hosts=bad)
        return sorted(least, key=place.__getitem__)

    def put_aside(self, bad: Mapping[str, str]) -> None:
        """Put aside the hosts that were measured to be bad, each with its reason; all others are good."""
        self._bad = dict(bad)
        for host, why in bad.items():
            self._say(f"puts {host} aside: {why}", "host", host=host)

    def suspect(self, named: Mapping[str, str]) -> None:
        """Put aside those that a failure is blamed on, the first named first, as far as there are spares."""
        if len(self.hosts) == 1:  # it is this one's own fault, or nobody's
            return
        spares = sum(map(self._good, self.hosts)) - self.nodes
        for host, line in named.items():
            good = self._good(host)
            if spares > 0 or not good:
                spares -= good
                self._suspected[host] += 1
                self._say(f"puts {host} aside: {line}", "host", host=host)
            else:
                self._say(f"no spare for {host}: {line}", "host", host=host)

    def _good(self, host: str) -> bool:
        return host not in self._bad and not self._suspected[host]
