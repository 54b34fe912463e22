"""Whole images on rank 0, tokens on all: images are put together there, and dealt out again.

A rank computes on its tokens only. Rank 0, which reads and writes, holds the images of one replica at a time.
Messages are CPU tensors between rank 0 and the first stage, whatever the ranks compute on; inside a replica
the first stage tells the others what they need to know.

Shapes: B samples of a replica, N windows held, T tokens held of each, C channels, Y rows, X columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from swipe.collectives import DATA_TAG, Message, Pending, broadcast, exchange, together
from swipe.groups import Groups
from swipe.windows import WindowGrid, WindowShard


class Images:
    """Moves images between rank 0 and the ranks that hold their tokens.

    Args:
        grid: the windows of an image.
        groups: the ranks; those of a (dp, pp) hold an image as `WindowShard.at_place` says.
    """

    def __init__(self, grid: WindowGrid, groups: Groups) -> None:
        self.grid, self.groups, self.dims = grid, groups, groups.dims
        self.at = groups.dims.coordinate(groups.rank)
        self._tokens: dict[int, Tensor] = {}
        self._leaving: Pending | None = None

    def tokens_NT(self, place: int) -> Tensor:
        """Return the numbers, row * cols + col, of the tokens of a place: int64 [N, T]."""
        if place not in self._tokens:
            wp = (self.dims.wp_y, self.dims.wp_x)
            shard = WindowShard.at_place(self.grid, wp, self.dims.sp, place)
            self._tokens[place] = torch.from_numpy(shard.token_index())
        return self._tokens[place]

    def collect(self, x_BNTC: Tensor, counts: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
        """Put the images of each replica in turn together on rank 0; all ranks iterate.

        Every rank of the first stage but rank 0 sends its tokens once, over dp, wp and sp, and goes on before
        they are taken: until it has heard from rank 0 it must keep this object, which holds them.

        Args:
            x_BNTC: this rank's tokens, equal on all stages.
            counts: samples B of every replica.

        Yields:
            On rank 0 the number of a replica that has samples, and its images [B, C, Y, X] on the CPU.
        """
        if self._leaving is not None:
            self._leaving.wait()
            self._leaving = None
        here = x_BNTC.cpu().contiguous()
        if self.groups.rank != 0:
            if self.at.pp == 0 and len(here):
                self._leaving = exchange([Message(0, here, DATA_TAG)], [], "images")
            return
        for replica, count in enumerate(counts):
            if count:
                like = here.new_empty((count, *here.shape[1:]))
                yield replica, self._assemble(replica, here, like)

    def _assemble(self, replica: int, here: Tensor, like: Tensor) -> Tensor:
        """Receive the tokens of every place of a replica, and put them where they belong."""
        ranks = [self.dims.rank_at(replica, 0, place) for place in range(self.dims.places)]
        parts = [here if rank == 0 else torch.empty_like(like) for rank in ranks]
        messages = [Message(rank, part, DATA_TAG) for rank, part in zip(ranks, parts) if rank != 0]
        exchange([], messages, "images").wait()
        image_BCS = like.new_empty((len(like), like.shape[-1], self.grid.rows * self.grid.cols))
        for place, part in enumerate(parts):
            image_BCS[:, :, self.tokens_NT(place).flatten()] = part.flatten(1, 2).transpose(1, 2)
        return image_BCS.unflatten(2, (self.grid.rows, self.grid.cols))

    def deal(self, read: Callable[[int], Tensor], counts: Sequence[int], channels: int) -> Tensor:
        """Give every rank its tokens of images that rank 0 reads, one replica after the other.

        All ranks call it. Rank 0 sends each rank of the first stage its tokens once (over dp, wp and sp), and
        that one sends them to the stages behind it (pp).

        Args:
            read: called on rank 0 with the number of each replica that has samples; returns its images,
                float32 [B, C, Y, X] on the CPU.
            counts: samples B of every replica.
            channels: C.

        Returns:
            This rank's tokens, float32 [B, N, T, C] on the CPU.

        Raises:
            ValueError: `read` failed; on every rank.
        """
        here = self.dims.place(self.groups.rank)
        x_BNTC = torch.empty((counts[self.at.dp], *self.tokens_NT(here).shape, channels))
        for replica, count in enumerate(counts):
            if not count:
                continue
            with together(self.groups.world):
                x_BCYX = read(replica) if self.groups.rank == 0 else None
            if x_BCYX is not None:
                self._send_parts(x_BCYX, replica, x_BNTC)
            elif self.at.dp == replica and self.at.pp == 0:
                exchange([], [Message(0, x_BNTC, DATA_TAG)], "images").wait()
        return broadcast(x_BNTC, self.groups.chain, 0, "images") if len(x_BNTC) else x_BNTC

    def _send_parts(self, x_BCYX: Tensor, replica: int, mine_BNTC: Tensor) -> None:
        """Send each place of a replica its tokens; if this rank is one of them, copy its own."""
        sends = []
        for place in range(self.dims.places):
            rank = self.dims.rank_at(replica, 0, place)
            part_BNTC = x_BCYX.flatten(2)[:, :, self.tokens_NT(place)].permute(0, 2, 3, 1).contiguous()
            if rank == 0:
                mine_BNTC.copy_(part_BNTC)
            else:
                sends.append(Message(rank, part_BNTC, DATA_TAG))
        exchange(sends, [], "images").wait()
