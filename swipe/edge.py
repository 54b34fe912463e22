"""The link between two pipeline stages: tokens leave already shifted by half a window, if need be.

Between the two tilings tokens must move to other ranks anyway, and they must move to the next stage: both are
one message to one peer (SWiPe, arXiv 2509.13523). So a shifted edge moves exactly the bytes of an unshifted
one, M / (SP WP) per rank and microbatch of M bytes of tokens. Gradients take the same way back.

Shapes: B batch, N windows, T tokens per window, D width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from swipe.collectives import BACKWARD_TAG, FORWARD_TAG, HEADER_TAG, CommunicationError, Message, Pending
from swipe.layout import WindowLayout
from swipe.shift import Mover

DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.float16)
Shape = Sequence[int]


class Arriving:
    """A tensor on its way to this rank, in one or more messages.

    Attributes:
        messages: the buffers it arrives in.
        pending: set when they are posted.
    """

    def __init__(
        self,
        mover: Mover,
        ranks: Sequence[int],
        tag: int,
        like: tuple[Shape, torch.dtype],
        device: torch.device,
    ) -> None:
        """Allocate its buffers."""
        self._mover, self._shape = mover, like[0]
        buffers = mover.buffers(*like, device)
        self.messages = [Message(ranks[place], tensor, tag) for place, tensor in buffers]
        self.pending: Pending | None = None

    def take(self) -> Tensor:
        """Wait for it and put it together: [B, N, T, D]."""
        assert self.pending is not None, "posted before it is taken"
        self.pending.wait()
        return self._mover.assemble([message.tensor for message in self.messages], self._shape)


class Edge:
    """One side of the link between two stages.

    Args:
        layout: how this rank's tokens lie; the other stage lays them out likewise.
        shift: +1, 0, -1: the shift on the way forward.
        ranks: global ranks of the other stage by place.
        after: True on the side that sends activations, to the stage after; False on the one that gets them.
    """

    def __init__(self, layout: WindowLayout, shift: int, ranks: Sequence[int], after: bool) -> None:
        self.ranks, self.shift, self.after = tuple(ranks), shift, after
        self._out = layout.movers[shift if after else -shift]
        self._in = layout.movers[-shift if after else shift]
        self._tags = (FORWARD_TAG, BACKWARD_TAG) if after else (BACKWARD_TAG, FORWARD_TAG)
        self._tokens = tuple(layout.tokens_NT.shape)
        self._quadrants = layout.shard.quadrants

    def slots(self) -> list[int]:
        """Name this rank's peers in an order in which both sides of every pair have the same place.

        The quadrants a sender holds are numbered; all its pieces of one quadrant go to one peer, so each
        number pairs every rank of one stage with exactly one of the other.
        """
        count = len(self._quadrants)
        found = [0] * count
        for piece, quadrant in enumerate(self._quadrants):  # the pieces of the first window
            parts = self._out.plan.sends if self.after else self._in.plan.receives
            (place,) = {part.place for part in parts if piece in part.pieces}
            sender = quadrant if self.after or self.shift == 0 else 3 - quadrant
            found[sender % count] = self.ranks[place]
        return found

    def outgoing(self, x_BNTD: Tensor) -> list[Message]:
        """Cut a tensor into the messages it leaves in."""
        return [Message(self.ranks[place], x, self._tags[0]) for place, x in self._out.outgoing(x_BNTD)]

    def expect(self, shape: Shape, dtype: torch.dtype, device: torch.device) -> Arriving:
        """Allocate what a tensor [B, N, T, D] of the other stage arrives in."""
        return Arriving(self._in, self.ranks, self._tags[1], (shape, dtype), device)

    def announcement(self, x_BNTD: Tensor) -> list[Message]:
        """Make the messages that say what will come, type and shape: 48 bytes to each peer."""
        header = torch.tensor([DTYPES.index(x_BNTD.dtype), x_BNTD.dim(), *x_BNTD.shape], device=x_BNTD.device)
        return [Message(self.ranks[part.place], header, HEADER_TAG) for part in self._out.plan.sends]

    def headers(self, device: torch.device) -> list[Message]:
        """Make the buffers in which the announcement of the stage before arrives."""
        parts = self._in.plan.receives
        empty = [torch.zeros(6, dtype=torch.int64, device=device) for _ in parts]
        return [Message(self.ranks[part.place], header, HEADER_TAG) for part, header in zip(parts, empty)]

    def announced(self, headers: Sequence[Message]) -> tuple[tuple[int, ...], torch.dtype]:
        """Read shape and type off the headers that have arrived.

        Raises:
            CommunicationError: the peers do not agree, or their tokens are not laid out as here.
        """
        found = sorted({tuple(header.tensor.tolist()) for header in headers})
        kind, dims, *shape = found[0]
        if len(found) > 1 or dims != 4 or tuple(shape[1:3]) != self._tokens:
            raise CommunicationError(
                f"ranks {[header.rank for header in headers]} announce activations (type, dims, shape) "
                f"{found}, but this rank holds {self._tokens} windows x tokens: the stages were built "
                "differently"
            )
        return tuple(shape), DTYPES[kind]
