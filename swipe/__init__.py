"""SWiPe: window, sequence and pipeline parallelism for any window transformer, and what it needs to run.

This package knows tensors, windows and ranks, and nothing of what the images show. What a program needs is
named here and loaded when it is first used, so `import swipe` does not import torch; the rest is in the file
of its name. How the parts fit together: docs/swipe.md, and docs/examples/image_windows.py as a program.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from swipe.backend import choose_device, finish, start
    from swipe.checkpoint import Checkpoints
    from swipe.edge import Edge
    from swipe.gradients import clip, global_norm
    from swipe.groups import Groups, make_groups
    from swipe.layout import WindowLayout
    from swipe.mesh import Limits, ParallelDims
    from swipe.pipeline import Microbatch, Pipeline
    from swipe.sharding import full, replicas, shard
    from swipe.stages import balanced_cut
    from swipe.windows import WindowGrid, WindowShard

__all__ = [
    "Checkpoints",
    "Edge",
    "Groups",
    "Limits",
    "Microbatch",
    "ParallelDims",
    "Pipeline",
    "WindowGrid",
    "WindowLayout",
    "WindowShard",
    "balanced_cut",
    "choose_device",
    "clip",
    "finish",
    "full",
    "global_norm",
    "make_groups",
    "replicas",
    "shard",
    "start",
]

if not TYPE_CHECKING:  # to a type checker only what is imported above exists
    _FILES = {
        "backend": ("choose_device", "finish", "start"),
        "checkpoint": ("Checkpoints",),
        "edge": ("Edge",),
        "gradients": ("clip", "global_norm"),
        "groups": ("Groups", "make_groups"),
        "layout": ("WindowLayout",),
        "mesh": ("Limits", "ParallelDims"),
        "pipeline": ("Microbatch", "Pipeline"),
        "sharding": ("full", "replicas", "shard"),
        "stages": ("balanced_cut",),
        "windows": ("WindowGrid", "WindowShard"),
    }

    def __getattr__(name):
        """Import a public name from its file."""
        from importlib import import_module

        for file, names in _FILES.items():
            if name in names:
                return getattr(import_module(f"swipe.{file}"), name)
        raise AttributeError(f"module 'swipe' has no attribute {name!r}")

    def __dir__():
        """List the public names beside the usual."""
        return sorted({*globals(), *__all__})
