"""The one style of every figure, and how a figure gets to disk."""

import io
import textwrap
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from . import lemaire, records
from .energy import Measurement

#: Widths of a CVPR page in inches: one column, and both.
COLUMN, PAGE = 3.25, 6.875

#: One colour a thing, in every figure; in grey, lines are told apart by their markers and dashes.
COLORS = {"lif": "#0173b2", "staa": "#d55e00", "fsta": "#029e73", "statten": "#cc78bc", "ann": "#56595c",
          "threshold": "#949494", "membrane": "#0173b2", "spike": "#000000", "input": "#de8f05", "darker": "#0173b2",
          "brighter": "#de8f05"}

#: Grounds of the boxes in a diagram: pale, so that black text reads on them, and lighter from PE to SA in greyscale.
BLOCKS = {"pe": "#e2a76f", "gc": "#9ccbe8", "sa": "#f3e2a0", "plain": "#ffffff", "ground": "#f2f2f2"}


#: A line's markers, for whoever sees no colours.
MARKERS = {"lif": "o-", "staa": "s--", "fsta": "^-.", "statten": "d:"}


def style() -> None:
    """Set matplotlib for the figures of the paper: fonts of a CVPR column, embedded as text, no random ids."""
    mpl.rcdefaults()  # a matplotlibrc of the reader's changes no figure
    sns.set_theme(context="paper", style="ticks", palette="colorblind")
    mpl.rcParams.update({
        "font.size": 8, "axes.titlesize": 8, "axes.labelsize": 8, "xtick.labelsize": 7, "ytick.labelsize": 7,
        "legend.fontsize": 7, "figure.titlesize": 9, "lines.linewidth": 1.2, "axes.linewidth": 0.6,
        "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False, "figure.dpi": 110,
        "legend.handlelength": 3, "savefig.dpi": 300, "pdf.fonttype": 42, "svg.hashsalt": "staa",
        "figure.constrained_layout.use": True})


def firing(found: dict[str, Measurement]) -> Figure:
    """Firing rates by depth and time step, one heat map a neuron, and their means over time by depth."""
    widths = [1] * len(found) + [1.25]
    figure, (*maps, lines) = plt.subplots(1, len(widths), width_ratios=widths, figsize=(PAGE, 2.2))
    top = 100 * max(rate for m in found.values() for rates in m.rates.values() for rate in rates)
    for i, (axes, (neuron, m)) in enumerate(zip(maps, found.items())):
        rates = 100 * np.array(list(m.rates.values()))  # (layers, T)
        image = axes.pcolormesh(np.arange(1, m.T + 2) - 0.5, np.arange(1, len(rates) + 2) - 0.5, rates, cmap="cividis",
                                vmin=0, vmax=top)
        axes.set(title=neuron.upper(), xlabel="time step", xticks=range(1, m.T + 1), yticks=range(1, len(rates) + 1, 3))
        axes.set_ylabel("" if i else "spiking layer, by depth")
        lines.plot(range(1, len(rates) + 1), rates.mean(1), MARKERS[neuron], ms=3, color=COLORS[neuron],
                   label=neuron.upper())
    figure.colorbar(image, ax=maps, label="firing rate, %")
    lines.set(title="mean over time", xlabel="spiking layer, by depth", ylabel="firing rate, %", ylim=(0, None))
    lines.legend()
    return figure


def advantage(found: dict[str, Measurement], twin: Measurement, marked: float) -> Figure:
    """Energy of the ANN twin over the network's own against the firing rate: by operations alone, and with memory."""
    figure, axes = plt.subplots(figsize=(COLUMN, 2.6))
    rates = np.linspace(0.01, 0.4, 40)
    for neuron, m in found.items():
        alone, memory = zip(*(lemaire.advantage(m.at_rate(rate), twin) for rate in rates))
        for ratio, line, what in ((alone, "--", "operations alone"), (memory, "-", "with memory traffic")):
            axes.plot(100 * rates, ratio, line, marker=MARKERS[neuron][0], ms=3, markevery=6, color=COLORS[neuron],
                      label=f"{neuron.upper()}, {what}")
    axes.axhline(1, color=COLORS["ann"], lw=0.8)
    axes.axvline(100 * marked, color=COLORS["threshold"], lw=0.8, ls=":")
    axes.text(100 * marked + 0.5, 0.32, "the rate of the paper's ACs", fontsize=7, color=COLORS["ann"])
    axes.text(40, 1.05, "as much as the ANN twin", fontsize=7, ha="right", color=COLORS["ann"])
    axes.set(xlabel="firing rate, %", ylabel="energy: ANN twin / SNN", yscale="log", xlim=(0, 40),
             ylim=(0.3, 6))
    axes.set_yticks([0.5, 1, 2, 4], ["0.5", "1", "2", "4"])
    axes.minorticks_off()
    figure.legend(loc="outside upper center", ncols=2)
    return figure


def polarity(frame: np.ndarray, top: float) -> np.ndarray:
    """(H, W, 3): counts of events (2, H, W), 0 darker, 1 brighter, as two colours on white, full from `top` on."""
    image = np.ones((*frame.shape[1:], 3))
    for counts, color in zip(frame, ("darker", "brighter")):
        alpha = np.minimum(np.asarray(counts) / top, 1)[..., None]
        image = (1 - alpha) * image + alpha * mpl.colors.to_rgb(COLORS[color])
    return image


def bright(frames: np.ndarray) -> float:
    """The number of events that `polarity` draws in full colour: what one of ten pixels with events exceeds."""
    frames = np.asarray(frames)
    return float(np.quantile(frames[frames > 0], 0.9)) if (frames > 0).any() else 1.0


def event_frames(frames: np.ndarray, figure: Figure | None = None) -> Figure:
    """Frames (T, 2, H, W) side by side, about as many columns as rows, in two colours for the polarities."""
    figure = figure or plt.figure(figsize=(COLUMN, COLUMN))
    side = int(np.ceil(len(frames) ** 0.5))
    axes = figure.subplots(-(-len(frames) // side), side, squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for t, (axis, frame) in enumerate(zip(axes.flat, np.asarray(frames))):
        axis.imshow(polarity(frame, bright(frames)), interpolation="nearest")
        axis.set_title(f"t = {t + 1}", fontsize=6, pad=2)
    return figure


def event_cloud(events: np.ndarray, sensor: int, most: int = 4000) -> Figure:
    """Events in space and time, every n-th of them where there are more than `most`."""
    figure = plt.figure(figsize=(0.7 * PAGE, 3))
    axes = figure.add_subplot(projection="3d")
    events = events[::max(-(-len(events) // most), 1)]
    for p, name in enumerate(("darker", "brighter")):
        own = events[events["p"] == p]
        axes.scatter(own["t"] / 1000, own["x"], own["y"], s=1, color=COLORS[name], label=name, lw=0)
    ticks = [0, sensor // 2, sensor]
    axes.set(xlabel="t, ms", ylabel="x, pixels", zlabel="y, pixels", yticks=ticks, zticks=ticks[:2])
    axes.set(zlim=(sensor, 0))  # y counts from above
    axes.set_box_aspect((2, 1, 1), zoom=0.95)
    axes.view_init(elev=18, azim=-60)
    figure.legend(loc="outside upper center", ncols=2, markerscale=4)
    return figure


def event_animation(frames: np.ndarray) -> Any:
    """Frames (T, 2, H, W) as an animated GIF for a notebook, about 204 pixels wide; it loops."""
    from base64 import b64encode

    from IPython.display import HTML
    from PIL import Image

    scale = max(204 // frames.shape[-1], 1)
    images = [Image.fromarray((255 * polarity(frame, bright(frames))).astype(np.uint8)) for frame in np.asarray(frames)]
    images = [image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST) for image in images]
    gif = io.BytesIO()
    images[0].save(gif, "GIF", save_all=True, append_images=images[1:], duration=100, loop=0)
    content = b64encode(gif.getvalue()).decode()
    return HTML(f'<img alt="{len(frames)} frames of events" src="data:image/gif;base64,{content}">')


def grad_cam(frames: np.ndarray, found: dict[str, dict[str, np.ndarray]], outline: np.ndarray | None = None) -> Figure:
    """Figure 4: frames (T, 2, H, W), and beside them a row a neuron of Grad-CAM maps (H, W) by layer, each scaled to
    its own maximum. outline: the object's mask (H, W)."""
    figure = plt.figure(figsize=(PAGE, 2.5))
    left, right = figure.subfigures(1, 2, squeeze=False, width_ratios=[1, 1.9])[0]
    event_frames(frames, left)
    cam_rows({neuron.upper(): maps for neuron, maps in found.items()}, outline, right)
    return figure


def cam_rows(found: dict[str, dict[str, np.ndarray]], outline: np.ndarray | None = None, figure: Any = None) -> Any:
    """A row a label of Grad-CAM maps (H, W) by layer, each scaled to its own maximum; a picture (H, W, 3) among them is
    shown as it is."""
    figure = figure or plt.figure(figsize=(PAGE, 2.5))
    axes = figure.subplots(len(found), len(next(iter(found.values()))), squeeze=False)
    for i, (row, (label, maps)) in enumerate(zip(axes, found.items())):
        for axis, (layer, cam) in zip(row, maps.items()):
            axis.imshow(cam, cmap="cividis", vmin=0, vmax=cam.max() or 1)
            if outline is not None:
                line = axis.contour(outline, [0.5], colors="white", linewidths=0.8)
                line.set_path_effects([withStroke(linewidth=1.6, foreground="black")])
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
            axis.set_title("" if i else layer, fontsize=7)
        row[0].set_ylabel(label)
    return figure


def save(figure: Figure, name: str, note: str = "") -> None:
    """figures/NAME.pdf and .png, each whole or not at all; the same figure gives the same bytes. note: stands under
    the figure, which grows for it: what its numbers stand on, since a picture leaves its notebook."""
    if note:
        lines = textwrap.wrap(note, int(22 * figure.get_figwidth()))
        room = 0.05 + 0.1 * len(lines)
        height = figure.get_figheight() + room
        figure.set_figheight(height)
        figure.set_layout_engine("constrained", rect=(0, room / height, 1, 1 - room / height))
        figure.text(0.01, 0.04 / height, "\n".join(lines), fontsize=6, color=COLORS["ann"])
    for ending, metadata in (("pdf", {"CreationDate": None}), ("png", {"Software": None})):
        content = io.BytesIO()
        figure.savefig(content, format=ending, metadata=metadata)
        records.write(records.folder("figures") / f"{name}.{ending}", content.getvalue())
