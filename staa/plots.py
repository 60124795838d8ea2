"""The one style of every figure, and how a figure gets to disk."""

import io

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
from matplotlib.figure import Figure

from . import lemaire, records
from .energy import Measurement

#: Widths of a CVPR page in inches: one column, and both.
COLUMN, PAGE = 3.25, 6.875

#: One colour a thing, in every figure; they differ in lightness too, so that they read in greyscale.
COLORS = {"lif": "#0173b2", "staa": "#d55e00", "fsta": "#029e73", "statten": "#cc78bc", "ann": "#56595c",
          "threshold": "#949494", "membrane": "#0173b2", "spike": "#000000", "input": "#de8f05"}

#: Grounds of the boxes in a diagram: pale, so that black text reads on them, and lighter from PE to SA in greyscale.
BLOCKS = {"pe": "#e2a76f", "gc": "#9ccbe8", "sa": "#f3e2a0", "plain": "#ffffff", "ground": "#f2f2f2"}


#: A line's markers, for whoever sees no colours.
MARKERS = {"lif": "o-", "staa": "s--", "fsta": "^-.", "statten": "d:"}


def style():
    """Set matplotlib for the figures of the paper: fonts of a CVPR column, embedded as text, no random ids."""
    sns.set_theme(context="paper", style="ticks", palette="colorblind")
    mpl.rcParams.update({
        "font.size": 8, "axes.titlesize": 8, "axes.labelsize": 8, "xtick.labelsize": 7, "ytick.labelsize": 7,
        "legend.fontsize": 7, "figure.titlesize": 9, "lines.linewidth": 1.2, "axes.linewidth": 0.6,
        "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False, "figure.dpi": 110,
        "savefig.dpi": 300, "pdf.fonttype": 42, "svg.hashsalt": "staa", "figure.constrained_layout.use": True})


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
    axes.text(100 * marked + 0.5, 0.32, "the paper's rate", fontsize=7, color=COLORS["ann"])
    axes.text(40, 1.05, "as much as the ANN twin", fontsize=7, ha="right", color=COLORS["ann"])
    axes.set(xlabel="firing rate, %", ylabel="energy of the ANN twin / its own", yscale="log", xlim=(0, 40),
             ylim=(0.3, 6))
    axes.set_yticks([0.5, 1, 2, 4], ["0.5", "1", "2", "4"])
    axes.minorticks_off()
    figure.legend(loc="outside upper center", ncols=2)
    return figure


def save(figure: Figure, name: str):
    """figures/NAME.pdf and .png, each whole or not at all; the same figure gives the same bytes."""
    for ending, metadata in (("pdf", {"CreationDate": None}), ("png", {"Software": None})):
        content = io.BytesIO()
        figure.savefig(content, format=ending, metadata=metadata)
        records.write(records.folder("figures") / f"{name}.{ending}", content.getvalue())
