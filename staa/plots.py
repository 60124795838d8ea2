"""The one style of every figure, and how a figure gets to disk."""

import io

import matplotlib as mpl
import seaborn as sns
from matplotlib.figure import Figure

from . import records

#: Widths of a CVPR page in inches: one column, and both.
COLUMN, PAGE = 3.25, 6.875

#: One colour a thing, in every figure; they differ in lightness too, so that they read in greyscale.
COLORS = {"lif": "#0173b2", "staa": "#d55e00", "fsta": "#029e73", "statten": "#cc78bc", "ann": "#56595c",
          "threshold": "#949494", "membrane": "#0173b2", "spike": "#000000", "input": "#de8f05"}

#: Grounds of the boxes in a diagram: pale, so that black text reads on them, and lighter from PE to SA in greyscale.
BLOCKS = {"pe": "#e2a76f", "gc": "#9ccbe8", "sa": "#f3e2a0", "plain": "#ffffff", "ground": "#f2f2f2"}


def style():
    """Set matplotlib for the figures of the paper: fonts of a CVPR column, embedded as text, no random ids."""
    sns.set_theme(context="paper", style="ticks", palette="colorblind")
    mpl.rcParams.update({
        "font.size": 8, "axes.titlesize": 8, "axes.labelsize": 8, "xtick.labelsize": 7, "ytick.labelsize": 7,
        "legend.fontsize": 7, "figure.titlesize": 9, "lines.linewidth": 1.2, "axes.linewidth": 0.6,
        "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False, "figure.dpi": 110,
        "savefig.dpi": 300, "pdf.fonttype": 42, "svg.hashsalt": "staa", "figure.constrained_layout.use": True})


def save(figure: Figure, name: str):
    """figures/NAME.pdf and .png, each whole or not at all; the same figure gives the same bytes."""
    for ending, metadata in (("pdf", {"CreationDate": None}), ("png", {"Software": None})):
        content = io.BytesIO()
        figure.savefig(content, format=ending, metadata=metadata)
        records.write(records.folder("figures") / f"{name}.{ending}", content.getvalue())
