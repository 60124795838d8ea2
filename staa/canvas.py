"""Boxes, arrows and labels: what a block diagram is drawn with."""

from typing import Any, NamedTuple

from matplotlib import pyplot as plt
from matplotlib.layout_engine import PlaceHolderLayoutEngine
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch, Rectangle
from matplotlib.path import Path
from matplotlib.text import Text

from .plots import BLOCKS


class Box(NamedTuple):
    """A drawn node, by its centre and its size; its sides are where arrows begin and end."""

    x: float
    y: float
    w: float
    h: float

    @property
    def left(self) -> tuple[float, float]:
        return self.x - self.w / 2, self.y

    @property
    def right(self) -> tuple[float, float]:
        return self.x + self.w / 2, self.y

    @property
    def top(self) -> tuple[float, float]:
        return self.x, self.y + self.h / 2

    @property
    def bottom(self) -> tuple[float, float]:
        return self.x, self.y - self.h / 2


class Canvas:
    """A figure without axes, in inches from the lower left corner; `at` moves the origin for one panel."""

    def __init__(self, width: float, height: float):
        # Given "none", savefig would fall back to the layout of `plots.style`.
        still = PlaceHolderLayoutEngine(adjust_compatible=True, colorbar_gridspec=True)
        self.figure = plt.figure(figsize=(width, height), layout=still)
        self.axes = self.figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(0, height))
        self.axes.set_axis_off()
        self.at = (0.0, 0.0)

    def _moved(self, point: tuple[float, float]) -> tuple[float, float]:
        return point[0] + self.at[0], point[1] + self.at[1]

    def text(self, x: float, y: float, text: str, size: float = 6.5, **style: Any) -> Text:
        look: dict[str, Any] = {"ha": "center", "va": "center", "linespacing": 1.15} | style
        return self.axes.text(*self._moved((x, y)), text, size=size, zorder=4, **look)

    def box(self, x: float, y: float, text: str, color: str = "plain", w: float = 0.8, h: float = 0.24) -> Box:
        corner = self._moved((x - w / 2, y - h / 2))
        self.axes.add_patch(FancyBboxPatch(corner, w, h, boxstyle="round,pad=0,rounding_size=0.05", linewidth=0.7,
                                           facecolor=BLOCKS[color], edgecolor="black", zorder=3))
        self.text(x, y, text)
        return Box(x, y, w, h)

    def operator(self, x: float, y: float, sign: str) -> Box:
        """A circle with + or ×, drawn by strokes so that the sign sits in its centre in every font."""
        radius = 0.085
        centre, arm = self._moved((x, y)), 0.6 * radius
        self.axes.add_patch(Circle(centre, radius, linewidth=0.7, facecolor="white", edgecolor="black", zorder=3))
        for dx, dy in {"+": [(arm, 0), (0, arm)], "×": [(0.7 * arm, 0.7 * arm), (0.7 * arm, -0.7 * arm)]}[sign]:
            self.axes.plot([centre[0] - dx, centre[0] + dx], [centre[1] - dy, centre[1] + dy], color="black",
                           linewidth=0.8, zorder=4)
        return Box(x, y, 2 * radius, 2 * radius)

    def arrow(self, *points: tuple, head: bool = True, dashes: bool = False) -> None:
        """A line through these points, with a head at the last one."""
        path = Path([self._moved(point) for point in points])
        self.axes.add_patch(FancyArrowPatch(path=path, arrowstyle="-|>" if head else "-", mutation_scale=6,
                                            linewidth=0.7, linestyle="--" if dashes else "-", color="black",
                                            shrinkA=0, shrinkB=0, joinstyle="miter", capstyle="butt", zorder=2))

    def dot(self, x: float, y: float) -> None:
        """Where a line branches."""
        self.axes.add_patch(Circle(self._moved((x, y)), 0.02, color="black", zorder=3))

    def area(self, x: float, y: float, w: float, h: float) -> None:
        """A pale ground under what belongs together."""
        self.axes.add_patch(Rectangle(self._moved((x, y)), w, h, facecolor=BLOCKS["ground"], linewidth=0, zorder=0))

    def chain(self, x: float, top: float, step: float, items: list[tuple[str, str, str]], w: float = 0.8) -> list[Box]:
        """Boxes downwards, from (text, colour, label of the arrow that leaves it), joined by arrows; returns the boxes.

        The arrow that leaves the last one is left to the caller."""
        boxes = [self.box(x, top - i * step, text, color, w) for i, (text, color, _) in enumerate(items)]
        for upper, lower, (_, _, label) in zip(boxes, boxes[1:], items):
            self.arrow(upper.bottom, lower.top)
            self.text(x + 0.06, (upper.bottom[1] + lower.top[1]) / 2, label, size=6, ha="left")
        return boxes
