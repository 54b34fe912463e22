"""Aurora's backbone: a U-Net of shifted-window attention on latents, rows and columns, told the lead time.

Tokens are in window order inside the U-Net; one gather takes the order of one block to that of the next, and
merging, splitting and padding are part of the gather between two grids.
Source: Bodnar et al. 2025 (Aurora); microsoft-aurora 2.0.1, with whose weights the keys and the skips agree.
Shapes: B batch, N tokens, D width, E width of the context.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from aeris.aurora import checkpointing, lora
from aeris.aurora.config import AuroraConfig
from aeris.aurora.context import NoiseMemory, embedding_mlp
from aeris.aurora.reorder import coarser, merge, reorder, split
from aeris.aurora.swin_block import Block
from aeris.aurora.windows import Res, WindowPlan, natural, plan_of_block


class Merging(nn.Module):
    """Four neighbouring tokens become one: [B, N, D] -> [B, about N / 4, `width_out`]."""

    def __init__(self, width: int, width_out: int, norm: bool = True) -> None:
        """Make reduction [width_out, 4D] and, if asked for, a norm before it."""
        super().__init__()
        self.reduction = nn.Linear(4 * width, width_out, bias=False)
        self.norm = nn.LayerNorm(4 * width) if norm else nn.Identity()

    def forward(self, x_BND: Tensor, source: WindowPlan, target: WindowPlan) -> Tensor:
        """Merge tokens in the order of `source` into the order of `target`, on the grid of half the size."""
        x: Tensor = self.reduction(self.norm(merge(x_BND, source, target)))
        return x


class Splitting(nn.Module):
    """One token becomes four neighbours: [B, N, D] -> [B, about 4 N, D / 2]."""

    def __init__(self, width: int) -> None:
        """Make lin1 [2D, D], a norm and lin2 [D/2, D/2]."""
        super().__init__()
        self.lin1 = nn.Linear(width, 2 * width, bias=False)
        self.lin2 = nn.Linear(width // 2, width // 2, bias=False)
        self.norm = nn.LayerNorm(width // 2)

    def forward(self, x_BND: Tensor, source: WindowPlan, target: WindowPlan) -> Tensor:
        """Split tokens in the order of `source` into the order of `target`, on the grid of twice the size."""
        x: Tensor = self.lin2(self.norm(split(self.lin1(x_BND), source, target)))
        return x


class ULayer(nn.Module):
    """The blocks of the U-Net at one resolution, and the way to the next."""

    region: ClassVar[str] = "layer"

    def __init__(self, width: int, heads: int, drops: Sequence[float], config: AuroraConfig) -> None:
        """Make one block per probability of drop path in `drops`."""
        super().__init__()
        self.checkpointing = False
        self.window = config.window_size
        self.wrap = config.wrap_longitude
        self.blocks = nn.ModuleList(Block(width, heads, drop, config) for drop in drops)
        self.downsample: Merging | None = None
        self.upsample: Splitting | None = None

    def forward(
        self,
        x_BND: Tensor,
        active: Tensor,
        res: Res,
        adapter: int | None,
        target: WindowPlan | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Run the blocks, then merge or split.

        Args:
            x_BND: Tokens in the order of the first block.
            active: SiLU(context): [B, E], or [B, N, E] in natural order.
            res: Latents, rows, columns.
            adapter: Number of the LoRA adapter in use; None: none.
            target: Order of the tokens after merging or splitting.

        Returns:
            The tokens after merging or splitting, if the layer does, and before, as the last block left them.
        """
        return checkpointing.run(self, self._forward, x_BND, active, res, adapter, target)

    def _forward(
        self, x_BND: Tensor, active: Tensor, res: Res, adapter: int | None, target: WindowPlan | None
    ) -> tuple[Tensor, Tensor]:
        order = plan_of_block(res, self.window, 0, self.wrap)
        contexts: dict[WindowPlan, Tensor] = {}
        for number, block in enumerate(self.blocks):
            here = plan_of_block(res, self.window, number, self.wrap)
            x_BND, order = reorder(x_BND, order, here), here
            if here not in contexts:
                contexts[here] = reorder(active, natural(res), here) if active.ndim == 3 else active
            x_BND = block(x_BND, contexts[here], here.groups, adapter)
        if self.downsample is not None and target is not None:
            return self.downsample(x_BND, order, target), x_BND
        if self.upsample is not None and target is not None:
            return self.upsample(x_BND, order, target), x_BND
        return x_BND, x_BND


def compile_blocks(model: nn.Module, **options: Any) -> nn.Module:
    """Compile every block of the U-Net in `model` with torch.compile(**options); equal blocks share code.

    Gives the model. Only the first call of each kind of block on a new grid waits for the compiler.
    """
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    # One entry for each width, order of tokens, adapter and use (training or not), and no fall back to eager.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 128)
    for block in blocks:
        block.compile(**options)
    return model


class Swin3DBackbone(nn.Module):
    """The U-Net: tokens and lead times in, tokens of twice the width out."""

    def __init__(self, config: AuroraConfig) -> None:
        """Make the U-Net.

        Raises:
            ValueError: Heads do not divide a width, or the adapters cannot be built.
        """
        super().__init__()
        lora.check(config)
        self.config = config
        width, count = config.embed_dim, len(config.encoder_depths)
        self.time_mlp = embedding_mlp(width)
        self.noise: NoiseMemory | None = None
        if config.stochastic:
            self.noise_mlp = embedding_mlp(width)
            self.noise = NoiseMemory()
        self.encoder_layers = nn.ModuleList()
        if config.stochastic:
            self.context_down_layers = nn.ModuleList()
        drops = _ramps(config.drop_path, config.encoder_depths)
        for i, heads in enumerate(config.encoder_num_heads):
            layer = ULayer(width * 2**i, heads, drops[i], config)
            if i < count - 1:
                layer.downsample = Merging(width * 2**i, width * 2 ** (i + 1))
                if config.stochastic:
                    self.context_down_layers.append(Merging(width, width, norm=False))
            self.encoder_layers.append(layer)
        self.decoder_layers = nn.ModuleList()
        drops = _ramps(config.drop_path, config.decoder_depths)
        for i, heads in enumerate(config.decoder_num_heads):
            layer = ULayer(width * 2 ** (count - 1 - i), heads, drops[i], config)
            if i < count - 1:
                layer.upsample = Splitting(width * 2 ** (count - 1 - i))
            self.decoder_layers.append(layer)

    def layers(self) -> list[nn.Module]:
        """The U-Net layers in the order of the forward pass."""
        return [*self.encoder_layers, *self.decoder_layers]

    def reset_noise(self) -> None:
        """Forget the noise of earlier calls, as at the start of a forecast."""
        if self.noise is not None:
            self.noise.clear()

    def set_noise_accumulation(self, n: int = 0) -> None:
        """Mix the noise of the last `n` calls, so that calls resemble each other; 0: a new draw each time."""
        if self.noise is not None:
            self.noise.set_length(n)

    def forward(self, x_BND: Tensor, lead_time_BE: Tensor, patch_res: Res, rollout_step: int = 0) -> Tensor:
        """Run the U-Net.

        Args:
            x_BND: Tokens in natural order (latents, rows, columns).
            lead_time_BE: Encoding of the lead times, of width `embed_dim`; see `aeris.aurora.embeddings`.
            patch_res: Latents, rows and columns.
            rollout_step: Which roll-out step this is, from 0; chooses the LoRA adapter.

        Returns:
            [B, N, 2D]: the result beside the output of the first U-Net layer.

        Raises:
            ValueError: The number of tokens is not that of the grid, or the grid is too small to be halved.
        """
        grids = self._grids(x_BND, patch_res)
        adapter = lora.adapter_of(self.config, rollout_step)
        contexts = self._contexts(x_BND, lead_time_BE, grids)
        x = reorder(x_BND, natural(patch_res), self._first(grids[0]))
        skips: list[Tensor | None] = []
        for i, layer in enumerate(self.encoder_layers):
            target = self._first(grids[i + 1]) if i + 1 < len(grids) else None
            x, skip = layer(x, contexts[i], grids[i], adapter, target)
            # The first U-Net layer of the way back takes no skip, so the last grids' are not kept.
            skips.append(skip if i < max(1, len(grids) - 2) else None)
        return self._decode(x, skips, contexts, grids, adapter)

    def _decode(
        self,
        x: Tensor,
        skips: list[Tensor | None],
        contexts: list[Tensor],
        grids: list[Res],
        adapter: int | None,
    ) -> Tensor:
        """The way back to the finest grid. The skips are those of the published weights, odd as they are."""
        config, last = self.config, len(grids) - 1
        x = reorder(x, self._last(grids[last], config.encoder_depths[last]), self._first(grids[last]))
        for i, layer in enumerate(self.decoder_layers):
            index = last - i
            target = self._first(grids[index - 1]) if index else None
            x, _ = layer(x, contexts[index], grids[index], adapter, target)
            skip = skips[index - 1] if index else None
            if i and target is not None and skip is not None:
                left = self._last(grids[index - 1], config.encoder_depths[index - 1])
                x = x + reorder(skip, left, target)
        assert skips[0] is not None
        out = natural(grids[0])
        x = reorder(x, self._last(grids[0], config.decoder_depths[last]), out)
        skip = reorder(skips[0], self._last(grids[0], config.encoder_depths[0]), out)
        return torch.cat((x, skip), dim=-1)

    def _first(self, res: Res) -> WindowPlan:
        """The order tokens enter a U-Net layer in."""
        return plan_of_block(res, self.config.window_size, 0, self.config.wrap_longitude)

    def _last(self, res: Res, depth: int) -> WindowPlan:
        """The order tokens leave a U-Net layer of `depth` blocks in."""
        return plan_of_block(res, self.config.window_size, depth - 1, self.config.wrap_longitude)

    def _grids(self, x_BND: Tensor, patch_res: Res) -> list[Res]:
        """The grid of each U-Net layer, the finest first."""
        tokens = patch_res[0] * patch_res[1] * patch_res[2]
        if x_BND.shape[1] != tokens:
            raise ValueError(f"{x_BND.shape[1]} tokens, but a grid of {patch_res} has {tokens}")
        grids = coarser(patch_res, len(self.config.encoder_depths))
        if any(min(grid[1:]) < 2 for grid in grids[:-1]):
            least = 2 ** (len(grids) - 2) + 1 if len(grids) > 1 else 1
            raise ValueError(
                f"a grid of {patch_res[1]} x {patch_res[2]} patches cannot be halved {len(grids) - 1} times; "
                f"it needs at least {least} rows and columns"
            )
        return grids

    def _contexts(self, x_BND: Tensor, lead_time_BE: Tensor, grids: list[Res]) -> list[Tensor]:
        """SiLU of the context on each grid: [B, E], or with noise [B, N, E] in natural order."""
        width = self.config.embed_dim
        context: Tensor = self.time_mlp(lead_time_BE.to(x_BND.dtype))
        if self.noise is None:
            return [nn.functional.silu(context)] * len(grids)
        noise = self.noise.draw((*x_BND.shape[:-1], width), x_BND.device, x_BND.dtype)
        contexts = [context.unsqueeze(1) + self.noise_mlp(noise)]
        for down, fine, coarse in zip(self.context_down_layers, grids, grids[1:]):
            contexts.append(down(contexts[-1], natural(fine), natural(coarse)))
        return [nn.functional.silu(one) for one in contexts]


def _ramps(rate: float, depths: Sequence[int]) -> list[list[float]]:
    """Probabilities of drop path, from 0 at the first block to `rate` at the last, by U-Net layer."""
    most = max(sum(depths) - 1, 1)
    starts = [sum(depths[:i]) for i in range(len(depths))]
    return [[rate * block / most for block in range(a, a + depth)] for a, depth in zip(starts, depths)]
