"""Wire a model to `swipe`: make its layout, build it, hand it over. The only place that knows both sides."""

from __future__ import annotations

import torch

from aeris.config import ModelConfig
from aeris.model.attention import Layout
from aeris.model.swin import Swin
from swipe.layout import WindowLayout
from swipe.windows import WindowGrid, WindowShard


def make_layout(config: ModelConfig) -> WindowLayout:
    """Lay the grid out in windows on this process.

    Raises:
        ValueError: the window does not tile the grid; names the nearest sizes that do.
    """
    grid = WindowGrid(config.rows, config.cols, config.window, row_edge=config.poles)
    return WindowLayout(WindowShard.full(grid))


def build_model(
    config: ModelConfig, in_channels: int, out_channels: int, layout: Layout, device: torch.device | str
) -> Swin:
    """Build the network on `device` ("meta": shapes only), uninitialised, in fp32 (fp64 in fp64 runs)."""
    dtype = torch.float64 if config.precision == "fp64" else torch.float32
    with torch.device("meta"):
        model = Swin(config, in_channels, out_channels, layout).to(dtype)
    return model if str(device) == "meta" else model.to_empty(device=device)
