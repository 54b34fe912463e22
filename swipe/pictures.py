"""The pictures of docs/swipe.md, drawn from the plans the ranks themselves follow; any schedule as a picture.

    python -m swipe.pictures docs/pictures

matplotlib (the [plot] extra) is imported when the first picture is drawn. Lengths are in inches.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from swipe.mesh import ParallelDims
from swipe.schedule import SCHEDULES, Timeline, simulate
from swipe.shift import shift_plan
from swipe.windows import WindowGrid, WindowShard

INK, QUIET, LINE = "#1d2733", "#5f6b78", "#9aa5b1"
HUES = ("#4c8fd1", "#e39a4b", "#5fae7b", "#b07cc6", "#d36b6b", "#8a9a3c")
KINDS = {"F": "#7fb2e5", "B": "#f0b774", "I": "#f0b774", "W": "#8fc9a3"}
MEANINGS = {"F": "forward", "B": "backward", "I": "gradient of the input", "W": "gradient of the weights"}
WIDTH, HEAD, MARGIN, NOTE = 8.3, 0.6, 0.15, 0.17


@contextmanager
def _picture(path: Path, height: float, title: str, notes: Sequence[str]) -> Iterator[Any]:
    """Give a Figure with `height` to draw on between title and notes; then write it, whole or not at all."""
    try:
        import matplotlib
    except ImportError:
        raise ImportError("pictures need matplotlib: pip install 'aeris-swipe[plot]'") from None
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.image import imsave

    total = HEAD + height + 0.1 + NOTE * len(notes)
    with matplotlib.rc_context({"font.family": "DejaVu Sans", "font.size": 8.5, "text.color": INK}):
        figure: Any = Figure(figsize=(WIDTH, total), dpi=120, facecolor="white")
        figure.text(MARGIN / WIDTH, 1 - 0.1 / total, title, size=11.5, weight="bold", va="top")
        for number, note in enumerate(reversed(notes)):
            figure.text(MARGIN / WIDTH, (0.1 + NOTE * number) / total, note, color=QUIET, size=8.0)
        yield figure
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{path.name}.part")
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        pixels = np.asarray(canvas.buffer_rgba(), np.uint16)
        few: Any = ((pixels + 8) // 17 * 17).astype(np.uint8)  # 16 levels of a colour: half the bytes
        no_version: dict[str, Any] = {"Software": None}  # the same plans give the same bytes
        imsave(part, few, format="png", metadata=no_version, pil_kwargs={"optimize": True})
        os.replace(part, path)


def _canvas(figure: Any, x: float, y: float, size: tuple[float, float], limits: Sequence[float]) -> Any:
    """Return bare axes with their top left corner at (x, y), y down, from limits (x0, x1, y0, y1)."""
    width, height = figure.get_size_inches()
    axes = figure.add_axes((x / width, 1 - (y + size[1]) / height, size[0] / width, size[1] / height))
    axes.set(xlim=limits[:2], ylim=(limits[3], limits[2]))
    axes.axis("off")
    return axes


def _tile(axes: Any, x: float, y: float, w: float, h: float, fill: str, text: str = "", **look: Any) -> None:
    """Draw a rectangle with its top left corner at (x, y), and text in it."""
    from matplotlib.patches import Rectangle
    from matplotlib.patheffects import withStroke

    style: dict[str, Any] = {"edgecolor": "white", "linewidth": 0.8, "facecolor": fill} | look
    axes.add_patch(Rectangle((x, y), w, h, **style))
    if text:
        halo = [withStroke(linewidth=1.8, foreground=fill)]  # arrows pass below
        axes.text(x + w / 2, y + h / 2, text, ha="center", va="center", size=8, zorder=6, path_effects=halo)


def _frame(axes: Any, x: float, y: float, w: float, h: float, color: str, width: float) -> None:
    """Outline a rectangle, above what is drawn in it."""
    _tile(axes, x, y, w, h, "none", edgecolor=color, linewidth=width, zorder=4)


def _arrow(axes: Any, start: tuple[float, float], end: tuple[float, float], color: str, bend: float) -> None:
    """Draw an arrow that bends to one side, under the texts."""
    from matplotlib.patches import FancyArrowPatch

    look: dict[str, Any] = {"arrowstyle": "-|>", "color": color, "linewidth": 1.5, "mutation_scale": 11}
    look |= {"connectionstyle": f"arc3,rad={bend}", "shrinkA": 0, "shrinkB": 0, "zorder": 5, "clip_on": False}
    axes.add_patch(FancyArrowPatch(start, end, **look))


def _mix(color: str, share: float) -> str:
    """Mix a colour with white: `share` of it."""
    parts = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
    return "#" + "".join(f"{round(255 - (255 - part) * share):02x}" for part in parts)


def owners(grid: WindowGrid, wp: tuple[int, int], sp: int, sign: int = 0) -> NDArray[np.int64]:
    """Say at which place each token is, int64 [rows, cols] of the unshifted image, by the plans of the ranks.

    Args:
        sign: 0 in the unshifted tiling; +1 after the shift to the other one.
    """
    held = np.full(grid.rows * grid.cols, -1)
    for place in range(wp[0] * wp[1] * sp):
        shard = WindowShard.at_place(grid, wp, sp, place)
        pieces = shard.token_index().reshape(len(shard.windows) * len(shard.quadrants), -1)
        for part in shift_plan(grid, wp, sp, place, sign).sends:
            held[pieces[list(part.pieces)]] = part.place
    return held.reshape(grid.rows, grid.cols)


def token_way(dims: ParallelDims) -> list[int]:
    """List the ranks that the first piece of rank 0 passes, if the tiling changes at every edge."""
    grid = WindowGrid(2 * dims.sp * dims.wp_y, 2 * dims.sp * dims.wp_x, 2 * dims.sp)
    place, way = 0, [0]
    for stage in range(1, dims.pp):
        plan = shift_plan(grid, (dims.wp_y, dims.wp_x), dims.sp, place, 1 if stage % 2 else -1)
        place = next(part.place for part in plan.sends if 0 in part.pieces)
        way.append(dims.rank_at(0, stage, place))
    return way


def draw_mesh(path: Path, dims: ParallelDims) -> None:
    """Draw every rank of a mesh, and the way of one rank's tokens through the stages."""
    across = 2 if dims.sp % 2 == 0 else 1
    down = dims.sp // across
    stage_x, image_y = dims.wp_x * (across + 0.35) + 1.3, dims.wp_y * (down + 0.35) + 0.5
    limits = (-1.8, dims.pp * stage_x - 1.6, -0.9, dims.dp * image_y - 0.6)
    height = (limits[3] - limits[2]) * 0.29
    way = token_way(dims)

    def corner(rank: int) -> tuple[float, float]:
        at = dims.coordinate(rank)
        row, col = divmod(at.sp, across)
        x = at.pp * stage_x + at.wp_x * (across + 0.35) + col
        return x, at.dp * image_y + at.wp_y * (down + 0.35) + row

    notes = (
        f"wp: {dims.wp_y} x {dims.wp_x} boxes of a stage divide the windows of an image. "
        f"sp: the {dims.sp} ranks of a box divide the tokens of the same windows.",
        "Colour: ranks with the same weights, dp x wp x sp; they average gradients once a step.",
        f"Arrows: the tokens of rank {way[0]} move to the shifted windows on the way to odd stages, and back "
        "on the way to even ones.",
    )
    with _picture(path, height, f"The mesh of ranks: {dims}", notes) as figure:
        axes = _canvas(figure, MARGIN, HEAD - 0.15, (WIDTH - 2 * MARGIN, height), limits)
        for rank in range(dims.world):
            at, (x, y) = dims.coordinate(rank), corner(rank)
            hue = HUES[at.pp % len(HUES)]
            _tile(axes, x, y, 1, 1, _mix(hue, 0.8 if rank in way else 0.28), str(rank))
            if at.sp == 0:
                _frame(axes, x, y, across, down, hue, 1.3)
            if at[:3] + at[4:] == (0, 0, 0, 0):
                axes.text(x, -0.25, f"stage {at.pp}", weight="bold")
            if at[1:] == (0, 0, 0, 0):
                axes.text(-0.25, y + image_y / 2 - 0.5, f"dp {at.dp}", ha="right", va="center", weight="bold")
        for (x0, y0), (x1, y1) in zip(map(corner, way), map(corner, way[1:])):
            _arrow(axes, (x0 + 0.85, y0 + 0.5), (x1 + 0.1, y1 + 0.5), INK, -0.1)


def draw_quadrants(path: Path) -> None:
    """Draw windows dealt to ranks, and one window cut for several sp."""
    window, wp, unit, chosen = 12, (2, 3), 0.5, (1, 1)
    grid = WindowGrid(4 * window, 6 * window, window)
    dealt = owners(grid, wp, 1)
    notes = (
        f"Left: {grid.windows_y} x {grid.windows_x} windows, and py, px of the wp {wp[0]} x {wp[1]} ranks "
        f"that hold them: row mod {wp[0]}, column mod {wp[1]}.",
        "Right: the framed window divided over sp ranks. A number is an sp rank, a small square a token.",
    )
    with _picture(
        path, 4 * unit + 0.1, "Windows are dealt like cards, and cut by quadrants", notes
    ) as figure:
        axes = _canvas(figure, MARGIN, HEAD - 0.1, (6 * unit, 4 * unit), (-0.03, 6.03, -0.03, 4.03))
        for wy, wx in np.ndindex(grid.windows_y, grid.windows_x):
            place = int(dealt[wy * window, wx * window])
            label = "{}, {}".format(*divmod(place, wp[1]))
            _tile(axes, wx, wy, 1, 1, _mix(HUES[place], 0.55), label, linewidth=1.5)
        _frame(axes, chosen[1], chosen[0], 1, 1, INK, 2.0)
        hue = HUES[dealt[chosen[0] * window, chosen[1] * window]]
        for number, sp in enumerate((1, 2, 4, 12)):
            x = 3.65 + 1.16 * number
            box = _canvas(figure, x, HEAD + 0.2, (1.04, 1.04), (-0.1, window + 0.1, -0.1, window + 0.1))
            tokens, quadrants = _draw_cut(box, window, sp, hue)
            box.text(window / 2, -0.7, f"sp {sp}", ha="center", weight="bold")
            text = f"a rank holds\n{tokens} tokens of\n{quadrants} quadrant{'s' * (quadrants > 1)}"
            box.text(window / 2, window + 0.8, text, ha="center", va="top", color=QUIET, size=8.0)


def _draw_cut(axes: Any, window: int, sp: int, hue: str) -> tuple[int, int]:
    """Draw which sp rank holds each token of a window; return the tokens and quadrants of a rank."""
    grid = WindowGrid(window, window, window)
    held = owners(grid, (1, 1), sp)
    for (row, col), holder in np.ndenumerate(held):
        shade = 0.3 + 0.5 * (1 - holder / sp) if sp > 1 else 0.55
        _tile(axes, col, row, 1, 1, _mix(hue, shade), linewidth=0.3)
    for rank in range(sp):
        shard = WindowShard(grid, ((0, 0),), sp, rank)
        for piece in shard.positions().reshape(len(shard.quadrants), -1, 2):
            (y, x), (height, width) = piece.min(axis=0), np.ptp(piece, axis=0) + 1
            _frame(axes, x, y, width, height, INK, 0.7)
            axes.text(x + width / 2, y + height / 2, str(rank), ha="center", va="center", size=8, zorder=6)
    return len(shard.positions()), len(shard.quadrants)


def draw_shift(path: Path) -> None:
    """Draw who holds which quadrant before and after the shift, and where four ranks' tokens go."""
    wp, sp, unit, gap = (2, 2), 4, 0.395, 4.2
    grid = WindowGrid(8, 8, 2)  # a quadrant is one token here
    tilings = {
        "unshifted windows": owners(grid, wp, sp),
        "shifted by half a window": owners(grid, wp, sp, +1),
    }
    before, after = tilings.values()
    quadrants = [(2, 2), (2, 3), (3, 2), (3, 3)]  # of one window
    ranks = [int(before[token]) for token in quadrants]
    moves = ", ".join(f"{here} to {after[before == here][0]}" for here in ranks)
    notes = (
        "wp 2 x 2, sp 4. A number is the rank that holds a quadrant, a colour the ranks that share a window. "
        "The image wraps around.",
        f"Arrows: the quadrants of a window go four ways, with all else their ranks hold: {moves}.",
    )
    size = ((16 + gap) * unit, 8.9 * unit)
    with _picture(path, size[1], "The half-window shift is a permutation of ranks", notes) as figure:
        axes = _canvas(figure, MARGIN, HEAD - 0.2, size, (-0.05, 16 + gap, -0.8, 8.1))
        for number, (name, held) in enumerate(tilings.items()):
            left = number * (8 + gap)
            axes.text(left, -0.25, name, weight="bold")
            for (row, col), rank in np.ndenumerate(held):
                share = 0.8 if before[row, col] in ranks else 0.28
                _tile(axes, left + col, row, 1, 1, _mix(HUES[rank // sp], share), str(rank), linewidth=0.4)
            for line in range(number, 9, 2):
                axes.plot((left, left + 8), (line, line), color=INK, linewidth=1.0, zorder=3)
                axes.plot((left + line, left + line), (0, 8), color=INK, linewidth=1.0, zorder=3)
        for row, col in quadrants:
            bend = (0.07 if row == 3 else -0.07) * (4 - col)
            end = (8 + gap + col + 0.2, row + 0.5)
            _arrow(axes, (col + 0.8, row + 0.5), end, HUES[after[row, col] // sp], bend)


def draw_schedule(timeline: Timeline, path: Path, name: str = "schedule") -> None:
    """Draw what each stage does when, for one simulated table."""
    draw_schedules({name: timeline}, path)


def draw_schedules(timelines: Mapping[str, Timeline], path: Path) -> None:
    """Draw simulated tables under each other, on one clock: bars with the numbers of the microbatches."""
    row, head, left, right = 0.2, 0.3, 0.75, 0.8
    stages = [len(timeline.held) for timeline in timelines.values()]
    ticks = max(timeline.ticks for timeline in timelines.values())
    inch = (WIDTH - left - right) / ticks  # of a tick
    notes = (
        "A number is a microbatch, white is idle. On the right: the most microbatches alive at once. A whole "
        "backward takes two ticks.",
    )
    height = sum(stages) * row + len(stages) * head + 0.15
    with _picture(path, height, "Pipeline schedules", notes) as figure:
        y = HEAD - 0.25
        for (name, timeline), count in zip(timelines.items(), stages):
            limits = (-left / inch, ticks + right / inch, -head / row, count)
            axes = _canvas(figure, 0, y, (WIDTH, head + count * row), limits)
            idle = f"{name}: {timeline.ticks:g} ticks, {100 * timeline.bubble:.0f} % idle"
            axes.text(0, -0.3, idle, weight="bold")
            for stage, alive in enumerate(timeline.held):
                axes.text(-0.08 / inch, stage + 0.5, f"stage {stage}", ha="right", va="center", color=QUIET)
                axes.text(ticks + 0.1 / inch, stage + 0.5, f"{alive} alive", va="center", color=QUIET)
            for stage, action, start, end in timeline.spans:
                number = str(action.microbatch) if (end - start) * inch > 0.11 else ""
                _tile(axes, start, stage + 0.06, end - start, 0.88, KINDS[action.kind], number, linewidth=0.6)
            y += head + count * row
        _draw_key(figure, y + 0.08, left, {s.action.kind for t in timelines.values() for s in t.spans})


def _draw_key(figure: Any, y: float, x: float, kinds: set[str]) -> None:
    """Say on one line what the colours of a schedule mean."""
    axes = _canvas(figure, 0, y, (WIDTH, 0.2), (0, WIDTH, 0, 0.2))
    shown: dict[str, list[str]] = {}
    for kind in KINDS:
        if kind in kinds:
            shown.setdefault(KINDS[kind], []).append(MEANINGS[kind])
    for color, meanings in shown.items():
        _tile(axes, x, 0.03, 0.14, 0.14, color)
        axes.text(x + 0.2, 0.1, " or ".join(meanings), va="center", size=8.0, color=QUIET)
        x += 0.5 + 0.062 * len(" or ".join(meanings))


def pictures() -> dict[str, Callable[[Path], None]]:
    """Name the pictures of docs/swipe.md, and what draws each."""
    dims = ParallelDims(dp=2, wp_y=2, wp_x=2, pp=3, sp=4)
    runs = {name: simulate(table(4, 8)) for name, table in SCHEDULES.items()}
    return {
        "mesh": lambda path: draw_mesh(path, dims),
        "quadrants": draw_quadrants,
        "shift": draw_shift,
        "schedule": lambda path: draw_schedules(runs, path),
    }


def main(argv: Sequence[str]) -> None:
    """Draw all pictures into a directory."""
    parser = argparse.ArgumentParser(prog="python -m swipe.pictures", description=main.__doc__)
    parser.add_argument("directory", type=Path, help="where to; made if need be")
    directory = parser.parse_args(argv).directory
    for name, draw in pictures().items():
        draw(directory / f"{name}.png")
        print(directory / f"{name}.png")


if __name__ == "__main__":
    main(sys.argv[1:])
