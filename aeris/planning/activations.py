"""What the passes of one unit of the network allocate on a rank, by running the unit itself on meta tensors.

A pass there computes nothing and takes milliseconds, but every tensor is made and freed when it would be in a
run, so this counts what autograd keeps and what is alive at the fullest moment of each pass.

Shapes: B batch, N windows, T tokens per window, H heads, K head dim.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from aeris.config import ModelConfig
from aeris.data.forcing import FORCINGS
from aeris.diffusion.loss import weighted_mse
from aeris.diffusion.trigflow import add_noise, velocity
from aeris.model.swin import DTYPES, Swin
from swipe import noise
from swipe.layout import WindowLayout
from swipe.mesh import ParallelDims
from swipe.windows import WindowGrid, WindowShard


class Passes(NamedTuple):
    """Bytes of one unit's passes of one microbatch; weights, their copies and their gradients left out."""

    entered: int
    """What comes in, and `left` what goes out."""
    left: int
    kept: int
    """What autograd keeps from the forward to the backward pass; with the input, if it is among it."""
    beside: int
    """The input, if it is not among it: what whoever holds it holds besides."""
    forward: int
    """At the fullest moment of the forward pass, with the input and what is kept."""
    backward: int
    """At the fullest moment of the backward pass, with what was kept and the gradient that comes in."""


class Counter(TorchDispatchMode):
    """Counts the bytes of the tensors that operations make, as long as anything holds them.

    Attributes:
        now: bytes alive, and `peak`: the most since it was last set.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._alive: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Do one operation and count what it made."""
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        if (address := storage._cdata) not in self._alive:
            size = storage.nbytes()
            self.now += size
            self.peak = max(self.peak, self.now)

            def gone(_: Any) -> None:
                del self._alive[address]
                self.now -= size

            self._alive[address] = weakref.ref(storage, gone)


class _FusedAttention(TorchFunctionMode):
    """Attention as a fused kernel does it, without the scores, whatever torch would choose on meta."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Do one call of torch."""
        if func is F.scaled_dot_product_attention:
            return _Fused.apply(*args)
        return func(*args, **(kwargs or {}))


class _Fused(torch.autograd.Function):
    """Keeps q, k, v, the output and the logarithm of each softmax's sum in fp32."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.empty_like(q)  # laid out so on CPU; kernels of CUDA lay it out as it is wanted next
        ctx.save_for_backward(q, k, v, out, torch.empty(q.shape[:-1], device=q.device))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        q, k, v = ctx.saved_tensors[:3]
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


class _Swapped(torch.autograd.Function):
    """What an all-to-all allocates on the way in and back (swipe/ulysses.py), without sending anything."""

    @staticmethod
    def forward(ctx: Any, to_tokens: bool, *xs: Tensor) -> tuple[Tensor, ...]:
        ctx.to_tokens = to_tokens
        return _swap(xs, to_tokens)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, *_swap(grads, not ctx.to_tokens)


def _swap(xs: tuple[Tensor, ...], to_tokens: bool) -> tuple[Tensor, ...]:
    """Make what is sent, what is received and the result [B, N, H, T, K], or a view of [B, N, T, H, K].

    The heads and tokens of one rank: their number is the same on both sides.
    """
    send = torch.empty(len(xs), *xs[0].shape, dtype=xs[0].dtype, device=xs[0].device)
    received = torch.empty_like(send)
    if not to_tokens:
        return tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in received)
    return tuple(
        torch.empty(x.transpose(2, 3).shape, dtype=x.dtype, device=x.device).transpose(2, 3) for x in received
    )


@dataclass(frozen=True)
class Tokens:
    """The tokens a rank holds of one image.

    Attributes:
        windows: of which it holds tokens.
        tokens: of each.
        shared: whether other ranks hold the rest of them.
        halved: how many of the windows straddle the row edge in the shifted tiling and attend in halves.
    """

    windows: int
    tokens: int
    shared: bool = False
    halved: int = 0

    @classmethod
    def of(cls, model: ModelConfig, dims: ParallelDims) -> Tokens:
        """Count those of the rank with most to keep: one that holds windows of the last row."""
        windows = model.rows * model.cols // (model.window**2 * dims.wp)
        halved = model.cols // (model.window * dims.wp_x) if model.poles == "separate" else 0
        return cls(windows, model.window**2 // dims.sp, dims.sp > 1, halved)

    @property
    def total(self) -> int:
        """How many there are."""
        return self.windows * self.tokens

    @property
    def together(self) -> Tokens:
        """As many tokens in one window, where it does not matter in how many they lie."""
        return Tokens(1, self.total, self.shared)


class Layout:
    """The layout of a unit that runs alone: attention is the run's own, messages go nowhere."""

    def __init__(self, own: Tokens) -> None:
        """Take what the rank holds."""
        self.own, self.attention = own, WindowLayout._attend_whole
        # What the run's attention asks for. All windows but the halved ones come first.
        edge = "separate" if own.halved else "cyclic"
        self.shard = WindowShard(WindowGrid(2, 2, 2, edge), ())
        self._inner = own.windows - own.halved
        self.tokens_NT = torch.empty(own.windows, own.tokens, dtype=torch.int64, device="meta")
        self.positions_T2 = torch.empty(own.tokens, 2, dtype=torch.int64, device="meta")

    def shift(self, x_BNTD: Tensor, sign: int) -> Tensor:
        """Stay: a unit that runs alone has no edge."""
        return x_BNTD

    def attend(self, q_BNHTK: Tensor, k_BNHTK: Tensor, v_BNHTK: Tensor, shifted: bool) -> Tensor:
        """Attend as a rank does that holds whole windows, or a part of their heads after an all-to-all."""
        if not self.own.shared:
            return self.attention(self, q_BNHTK, k_BNHTK, v_BNHTK, shifted)  # type: ignore[arg-type]
        q, k, v = _Swapped.apply(False, q_BNHTK, k_BNHTK, v_BNHTK)
        out = self.attention(self, q, k, v, shifted)  # type: ignore[arg-type]
        found: Tensor = _Swapped.apply(True, out)[0]
        return found


class _Entering(torch.autograd.Function):
    """An input that nothing but the unit keeps, and that has a gradient."""

    @staticmethod
    def forward(ctx: Any, leaf: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, None


EMBEDDING, LAYER, SHIFTED_LAYER, HEAD = range(4)
"""Kinds of units, and their numbers in the network of `one_block`."""


def one_block(model: ModelConfig) -> ModelConfig:
    """Return the smallest network that has a unit of every kind, with layers of one block."""
    return replace(model, layers=2, blocks=1, compile=False)


def narrow_parameters(unit: Swin) -> list[nn.Parameter]:
    """List the parameters that divided weights are gathered of in bf16 (`Swin.products`)."""
    return [p for modules in unit.products() for module in modules for p in module.parameters()]


@cache
def passes(
    model: ModelConfig,
    channels: tuple[int, int],
    kind: int,
    microbatch: int,
    own: Tokens,
    divided: bool = False,
) -> Passes:
    """Count the bytes of a unit's passes of one microbatch, in a step under way, with the loss for the head.

    Args:
        channels: input and output channels of the network.
        kind: of unit.
        microbatch: images.
        own: tokens of the rank.
        divided: whether the weights are divided over ranks: then those used in bf16 come in bf16, and their
            gradients are bf16 until the end of the unit's backward pass.
    """
    config = one_block(model)
    with torch.device("meta"):
        layout = Layout(own)
        unit = Swin(config, *channels, layout, range(kind, kind + 1))
        narrow = narrow_parameters(unit) if divided else []
        for parameter in narrow:
            parameter.data = parameter.data.to(torch.bfloat16)
        unit.keep_casts()
        weight_NTC = torch.empty(own.windows, own.tokens, channels[1])
        target = torch.empty(microbatch, *weight_NTC.shape)
        leaf, t_B = torch.empty((), requires_grad=kind != EMBEDDING), torch.empty(microbatch)
    for parameter in set(unit.parameters()) - set(narrow):
        parameter.grad = torch.empty_like(parameter)
    width = channels[0] if kind == EMBEDDING else model.width
    dtype = torch.float32 if kind == EMBEDDING else DTYPES[model.residual]
    shape = (microbatch, own.windows, own.tokens, width)

    def loss(y: Tensor) -> Tensor:
        return weighted_mse(1.0 * y, target, weight_NTC)[0] if kind == HEAD else y

    with Counter() as counter, _FusedAttention():
        for _ in range(2):  # the first time makes what stays
            start = counter.peak = counter.now
            x = _Entering.apply(leaf, shape, dtype)
            y = loss(unit(x, t_B))
            forward, entered, left, form = counter.peak - start, x.nbytes, y.nbytes, (y.shape, y.dtype)
            edge = torch.autograd.graph.get_gradient_edge(y.view_as(y))
            del y
            held = counter.now - start
            del x
            kept, counter.peak = counter.now - start, counter.now
            grad = torch.empty(form[0], dtype=form[1], device="meta")
            torch.autograd.backward((edge,), (grad,))
            backward = counter.peak - start
            del edge, grad
            for parameter in narrow:
                parameter.grad = None
    return Passes(entered, left, kept, held - kept, forward, backward)


class Making(NamedTuple):
    """Bytes of making a microbatch out of a sample: alive at the fullest moment, and what is left of it."""

    peak: int
    left: int


@cache
def making(channels: int, microbatch: int, own: Tokens, first: bool) -> Making:
    """Count what the input of the `first` stage takes, or the target of the last; the sample left out."""
    with torch.device("meta"):
        tokens_NT = torch.empty(own.windows, own.tokens, dtype=torch.int64)
        residual = torch.empty(microbatch, own.windows, own.tokens, channels)
        state, forcing = torch.empty_like(residual), torch.empty(*residual.shape[:-1], len(FORCINGS))
        t_B = torch.empty(microbatch)
    with Counter() as counter:
        z = noise.normal([0] * microbatch, tokens_NT, channels)
        if first:
            made = torch.cat((add_noise(residual, z, t_B) / 1.0, state, forcing), dim=-1)
        else:
            made = velocity(residual, z, t_B)
        return Making(counter.peak, made.nbytes)
