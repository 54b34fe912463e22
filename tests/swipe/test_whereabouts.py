"""What a thread is said to be in: an operation that waits for other ranks, or a line of code."""

import threading
import time

from swipe.collectives import waiting
from swipe.whereabouts import whereabouts


def test_whereabouts() -> None:
    inner, outer, end = threading.Event(), threading.Event(), threading.Event()

    def work() -> None:
        with waiting("outer", computes=True):
            with waiting("sum of x"):
                inner.wait(5)
            outer.set()
            end.wait(5)

    thread = threading.Thread(target=work)
    thread.start()
    place = thread.ident or 0
    while whereabouts(place, 0.0, False)[0] != "sum of x":
        time.sleep(0.001)
    _, since, waits = whereabouts(place, 0.0, False)
    assert waits
    inner.set()
    assert outer.wait(5)
    doing, later, waits = whereabouts(place, 0.0, False)
    assert doing.startswith("outer, at swipe/test_whereabouts.py:") and not waits
    assert later > since  # since it came out of waiting
    end.set()
    thread.join()
    assert "ended" in whereabouts(place, 0.0, False)[0]


def test_which_files_of_torch_communicate() -> None:
    """Computation on divided weights goes through torch/distributed/tensor, and is no waiting."""

    def waits_in(path: str) -> bool:
        at: list[str] = []  # what the thread has come to, and is told
        names: dict = {"at": at}
        exec(compile("def work():\n at.append('inside')\n while len(at) < 2: pass", path, "exec"), names)
        thread = threading.Thread(target=names["work"])
        thread.start()
        while not at:
            time.sleep(0.001)
        waits = whereabouts(thread.ident or 0, 0.0, False)[2]
        at.append("end")
        thread.join()
        return waits

    torchs = "/env/torch/distributed/"
    for path in (
        "distributed_c10d.py",
        "_functional_collectives.py",
        "fsdp/_fully_shard/_fsdp_collectives.py",
    ):
        assert waits_in(torchs + path), path
    for path in (torchs + "tensor/_dispatch.py", torchs + "checkpoint/state_dict.py", "/models/a.py"):
        assert not waits_in(path), path
    assert waits_in("/tensor/" + torchs + "distributed_c10d.py")
