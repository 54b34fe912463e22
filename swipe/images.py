"""Whole images on the lead rank of a replica, tokens on all: put together there, and dealt out again.

A rank computes on its tokens only. The lead of a replica is its first rank of the first stage; it reads and
writes whole images. Messages are CPU tensors between it and the first stage, whatever the ranks compute on;
inside a replica the first stage tells the others what they need to know. Replicas need not be in step.

Shapes: B samples of a replica, N windows held, T tokens held of each, C channels, Y rows, X columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from swipe.collectives import DATA_TAG, Message, Pending, broadcast, exchange
from swipe.groups import Groups
from swipe.windows import WindowGrid, WindowShard


class Images:
    """Moves images between the lead of this rank's replica and the ranks that hold their tokens.

    Args:
        grid: the windows of an image.
        groups: the ranks; those of a (dp, pp) hold an image as `WindowShard.at_place` says.

    Attributes:
        lead: whether this rank is the lead of its replica.
    """

    def __init__(self, grid: WindowGrid, groups: Groups) -> None:
        self.grid, self.groups, self.dims = grid, groups, groups.dims
        self._at = groups.dims.coordinate(groups.rank)
        self._ranks = groups.ranks_of_stage(0)
        self.lead = groups.rank == self._ranks[0]
        self._tokens: dict[int, Tensor] = {}
        self._leaving: Pending | None = None

    def tokens_NT(self, place: int) -> Tensor:
        """Return the numbers, row * cols + col, of the tokens of a place: int64 [N, T]."""
        if place not in self._tokens:
            wp = (self.dims.wp_y, self.dims.wp_x)
            shard = WindowShard.at_place(self.grid, wp, self.dims.sp, place)
            self._tokens[place] = torch.from_numpy(shard.token_index())
        return self._tokens[place]

    def collect(self, x_BNTC: Tensor) -> Tensor | None:
        """Put the images of this replica together on its lead; all its ranks call it.

        Every other rank of the first stage sends its tokens once, over wp and sp, and goes on before they are
        taken: until `wait`, or the next call, this object holds them.

        Args:
            x_BNTC: this rank's tokens, equal on all stages.

        Returns:
            On the lead the images [B, C, Y, X] on the CPU, else None.
        """
        self.wait()
        if self._at.pp > 0:
            return None
        here = x_BNTC.cpu().contiguous()
        if not self.lead:
            if len(here):
                self._leaving = exchange([Message(self._ranks[0], here, DATA_TAG)], [], "images")
            return None
        parts = [here, *(torch.empty_like(here) for _ in self._ranks[1:])]
        if len(here):
            messages = [Message(rank, part, DATA_TAG) for rank, part in zip(self._ranks[1:], parts[1:])]
            exchange([], messages, "images").wait()
        image_BCS = here.new_empty((len(here), here.shape[-1], self.grid.rows * self.grid.cols))
        for place, part in enumerate(parts):
            image_BCS[:, :, self.tokens_NT(place).flatten()] = part.flatten(1, 2).transpose(1, 2)
        return image_BCS.unflatten(2, (self.grid.rows, self.grid.cols))

    def wait(self) -> None:
        """Wait until what this rank sent last has been taken."""
        if self._leaving is not None:
            self._leaving.wait()
            self._leaving = None

    def deal(self, x_BCYX: Tensor | None, count: int, channels: int) -> Tensor:
        """Give every rank of this replica its tokens of the lead's images; all its ranks call it.

        The lead sends each rank of the first stage its tokens once (over wp and sp), and that one sends them
        to the stages behind it (pp).

        Args:
            x_BCYX: on the lead the images, float32 on the CPU; else None.
            count: samples B.
            channels: C.

        Returns:
            This rank's tokens, float32 [B, N, T, C] on the CPU.
        """
        mine_NT = self.tokens_NT(self.dims.place(self.groups.rank))
        x_BNTC = torch.empty((count, *mine_NT.shape, channels))
        if not count:
            return x_BNTC
        if x_BCYX is not None:
            parts = [self._tokens_of(x_BCYX, place) for place in range(len(self._ranks))]
            x_BNTC = parts[0]
            sends = [Message(rank, part, DATA_TAG) for rank, part in zip(self._ranks[1:], parts[1:])]
            exchange(sends, [], "images").wait()
        elif self._at.pp == 0:
            exchange([], [Message(self._ranks[0], x_BNTC, DATA_TAG)], "images").wait()
        return broadcast(x_BNTC, self.groups.chain, 0, "images")

    def _tokens_of(self, x_BCYX: Tensor, place: int) -> Tensor:
        """Cut out the tokens of a place: [B, N, T, C]."""
        return x_BCYX.flatten(2)[:, :, self.tokens_NT(place)].permute(0, 2, 3, 1).contiguous()


def total(x: Tensor, groups: Groups) -> Tensor:
    """Sum a small CPU tensor over the ranks that share an image and a stage; the same bits on all of them.

    They call it together, other replicas need not. The sum is made by one of them, place after place, over wp
    and sp; it gets each one's bytes and sends them the sum.
    """
    first, *others = groups.place_ranks
    x = x.contiguous()
    if not others:
        return x
    if groups.rank != first:
        out = torch.empty_like(x)
        exchange([Message(first, x, DATA_TAG)], [Message(first, out, DATA_TAG)], "sums over an image").wait()
        return out
    parts = [torch.empty_like(x) for _ in others]
    exchange(
        [], [Message(rank, part, DATA_TAG) for rank, part in zip(others, parts)], "parts of a sum"
    ).wait()
    out = x.clone()
    for part in parts:
        out += part
    exchange([Message(rank, out, DATA_TAG) for rank in others], [], "sums over an image").wait()
    return out
