"""How every figure looks, and the two kinds of panel that tables need: curves and bars."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # of Okabe and Ito 2008
INK, FAINT = "#222222", "#777777"
STYLE = {
    "axes.edgecolor": FAINT,
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 12,
    "figure.constrained_layout.h_pad": 0.1,
    "figure.constrained_layout.w_pad": 0.1,
    "figure.titlesize": 13,
    "font.size": 11,
    "grid.color": "#E8E8E8",
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "savefig.dpi": 160,
    "text.color": INK,
    "xtick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.color": FAINT,
    "ytick.labelcolor": INK,
}


@contextmanager
def figure(file: Path, title: str, height: float) -> Iterator["Figure"]:
    """An empty figure to draw on, 10 by `height` inches, written to `file` at the end; makes its folder.

    Raises:
        ValueError: matplotlib is not installed.
        OSError: the file cannot be written.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError('plots need matplotlib: pip install -e ".[train]"') from None
    file.parent.mkdir(parents=True, exist_ok=True)
    with rc_context(STYLE):
        drawn = Figure(figsize=(10, height), layout="constrained")
        drawn.suptitle(title)
        yield drawn
        drawn.savefig(file)


def curves(axes: "Axes", series: Mapping[str, Sequence[tuple[float, float]]]) -> None:
    """One line through the points (x, y) of each name, colours in the order of the names."""
    for color, (name, points) in zip(PALETTE, series.items(), strict=False):
        if points:
            axes.plot(*zip(*points, strict=True), "o-", color=color, markersize=4, label=name)


def bars(axes: "Axes", groups: Mapping[str, Mapping[str, float]], names: Sequence[str]) -> None:
    """A group of labelled bars for each key of `groups`: one for each of `names` that it has, in that name's colour."""
    width = 0.8 / len(names)
    for index, (color, name) in enumerate(zip(PALETTE, names, strict=False)):
        heights = {
            place + (index - (len(names) - 1) / 2) * width: group[name]
            for place, group in enumerate(groups.values())
            if name in group
        }
        if heights:
            drawn = axes.bar(list(heights), list(heights.values()), 0.92 * width, color=color, label=name)
            axes.bar_label(drawn, fmt="%.3g", padding=2, fontsize=9)
    axes.set_xticks(range(len(groups)), labels=list(groups))
    axes.set_xlim(-0.5, len(groups) - 0.5)
    axes.grid(visible=False, axis="x")
    axes.set_axisbelow(True)
    axes.margins(y=0.15)
