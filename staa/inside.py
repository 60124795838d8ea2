"""What the aggregator of a trained network does, layer by layer: tables, a figure, and a board to step through it."""

from collections.abc import Callable, Iterable

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor

from . import sliders
from .firing import evaluating, neurons
from .networks import SpikingNetwork
from .neuron import LIF
from .plots import COLORS, PAGE
from .tracing import effects, traced

#: Lines of what `tracing.effects` counts: the colour of a part, and how it is drawn.
PARTS = {"GC": ("lif", "s-"), "GC, over images": ("lif", "v--"), "where GC looks": ("lif", "d:"),
         "PE": ("input", "^-"), "PE, over steps": ("input", "<:"),
         "SA": ("staa", "o-"), "SA, over images": ("staa", "x--"), "SA, over steps": ("staa", "+:")}
Trace = dict[str, dict[str, Tensor]]
Effects = dict[str, dict[str, float]]


def look(network: SpikingNetwork, x: Tensor) -> Trace:
    """What the layers compute of images (B, C, H, W) or frames (B, T, C, H, W) in evaluation mode."""
    with torch.no_grad(), evaluating(network), traced(network) as seen:
        network(x)
    return seen


def measure(network: SpikingNetwork, x: Tensor) -> tuple[Trace, Effects]:
    """What table and figure need of it, S, k and M on the CPU, and what hangs on the parts, by `tracing.effects`."""
    seen = look(network, x)
    kept: Trace = {name: {symbol: parts[symbol].float().cpu() for symbol in ("S", "k", "M") if symbol in parts}
                   for name, parts in seen.items()}
    return kept, effects(network, seen)


def weighted(values: Iterable[float], seen: Trace) -> float:
    """The mean over layers, each counted by its neurons."""
    sizes = [parts["S"][:, 0].numel() for parts in seen.values()]
    return float(np.average(list(values), weights=sizes))


def focus(k: Tensor) -> float:
    """Over how much of a map k (T, B, H, W) is spread, exp(entropy) / HW: 1 where it is the same everywhere, 1 / HW
    where it is one place. The mean over images and time steps."""
    entropy = -torch.xlogy(k, k).flatten(2).sum(-1)
    return float(entropy.exp().mean()) / k[0, 0].numel()


def nine_tenths(layers: list[dict[str, Tensor]]) -> tuple[float, float]:
    """Between which two numbers nine tenths of the M of these layers lie; each counts for the neurons it weighs."""
    M = torch.cat([parts["M"].flatten() for parts in layers])
    places = torch.cat([torch.full((parts["M"].numel(),), parts["S"][0, 0, 0].numel()) for parts in layers])
    M, order = M.sort()
    share = places[order].cumsum(0).double() / places.sum()
    low, high = (M[min(int((share < q).sum()), len(M) - 1)] for q in (0.05, 0.95))
    return float(low), float(high)


def table(found: dict[str, tuple[Trace, Effects]]) -> pd.DataFrame:
    """A row a network, by label, as `measure` gives it, each layer counted by its neurons; over how much of a map k is
    spread, the mean over layers; and where the M of nine tenths of the neurons, steps and images lies."""
    rows = []
    for label, (seen, parts) in found.items():
        rate = weighted([float(p["S"].mean()) for p in seen.values()], seen)
        row = {"Network": label, "Firing rate, %": f"{100 * rate:.1f}"}
        for part in PARTS:
            own = [of.get(part, float("nan")) for of in parts.values()]
            row[part] = "off" if np.isnan(own).any() else f"{100 * weighted(own, seen):.2f}"
        spread = [100 * focus(p["k"]) for p in seen.values() if "k" in p]
        row["k spreads over, %"] = f"{np.mean(spread):.0f}" if spread else "off"
        gates = [p for p in seen.values() if "M" in p]
        row["M"] = "{:.2f} to {:.2f}".format(*nine_tenths(gates)) if gates else "off"
        rows.append(row)
    return pd.DataFrame(rows)


def figure(found: dict[str, tuple[Trace, Effects]]) -> Figure:
    """A column a network: above, what hangs on each part by depth, in percent of neurons and time steps; below M, its
    median, and where nine tenths and all of its numbers lie."""
    drawn, panels = plt.subplots(2, len(found), figsize=(PAGE, 3.6), sharex="col", sharey="row", squeeze=False)
    for (above, below), (label, (seen, parts)) in zip(panels.T, found.items()):
        depth = range(1, len(seen) + 1)
        for part, (color, line) in PARTS.items():
            shares = [100 * of.get(part, float("nan")) or float("nan") for of in parts.values()]  # a log axis has no 0
            above.plot(depth, shares, line, color=COLORS[color], ms=2.5, lw=0.8, label=part)
        gates = [p.get("M", torch.full((1,), float("nan"))) for p in seen.values()]
        low, nearly, median, most, high = zip(*(np.quantile(m, [0, 0.05, 0.5, 0.95, 1]) for m in gates))
        below.fill_between(depth, low, high, color=COLORS["staa"], alpha=0.15, lw=0, label="all")
        below.fill_between(depth, nearly, most, color=COLORS["staa"], alpha=0.4, lw=0, label="nine tenths")
        below.plot(depth, median, color=COLORS["staa"], lw=1, label="median")
        above.set_title(label.replace(", ", "\n", 1))
        if any(share for of in parts.values() for share in of.values()):
            above.set_yscale("log")
        below.set(xlabel="spiking layer, by depth", ylim=(0, max(2, *high)), xticks=depth[::3])
    panels[0, 0].set_ylabel("neurons and steps\nwhose spike changes, %")
    panels[1, 0].set_ylabel("M")
    panels[1, 0].legend(loc="upper right", handlelength=1.2)
    drawn.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
    return drawn


def board(network: SpikingNetwork, x: Tensor, pictures: list, **start) -> Callable[..., tuple[bytes, str]]:
    """A board of sliders over what the neurons of a network compute of images x (B, C, H, W): an image, a spiking
    layer, a time step, a channel and a place.

    pictures: the B images as they are shown. start: where a slider starts, if not at its first value. Returns what
    `sliders.explore` does. Raises ValueError where a neuron is no LIF, and on a start that is no slider's.
    """
    layers = neurons(network).items()
    if others := [name for name, neuron in layers if not isinstance(neuron, LIF)]:
        raise ValueError(f"the board shows the potential of LIF neurons, and {others[0]} is none")
    thresholds = {name: neuron.numbers()[2] for name, neuron in layers if isinstance(neuron, LIF)}
    shown = Board(look(network, x), thresholds, pictures)
    settings = dict(image=(1, len(x), 1, 1), layer=(1, len(shown.layers), 1, 1), t=(1, shown.T, 1, 1),
                    channel=(1, max(parts["X"].shape[2] for _, parts in shown.layers), 1, 1),
                    row=(0.0, 0.99, 0.01, 0.5), column=(0.0, 0.99, 0.01, 0.5))
    if unknown := start.keys() - settings:
        raise ValueError(f"start takes {', '.join(settings)}, got {', '.join(sorted(unknown))}")
    moved = {name: (*settings[name][:3], value) for name, value in start.items()}
    return sliders.explore(shown.figure, shown.update, **settings | moved)


class Board:
    """The figure of `board`: maps of a channel above, and below the potential at a place and the weights over time."""

    MAPS = {"image": (None, 0, 1), "k": ("viridis", 0, 4), **dict.fromkeys(["X", "X~", "U"], ("PuOr_r", -3, 3)),
            "S": ("gray_r", 0, 1)}

    def __init__(self, seen: Trace, thresholds: dict[str, float], pictures: list):
        self.layers = [(name, {symbol: tensor.float().cpu() for symbol, tensor in parts.items()})
                       for name, parts in seen.items()]
        self.thresholds, self.pictures, self.T = thresholds, pictures, self.layers[0][1]["X"].shape[0]
        self.figure = Figure(figsize=(PAGE, 3.2))
        above, below = self.figure.subfigures(2, 1, squeeze=False, height_ratios=[1, 1.3])[:, 0]
        self.maps, self.squares = {}, []
        for axes, (name, (cmap, low, high)) in zip(above.subplots(1, 6), self.MAPS.items()):
            axes.set_title({"image": name, "S": name, "k": "k · HW, 0 to 4"}.get(name, f"{name}, {low} to {high}"))
            axes.set(xticks=[], yticks=[])
            self.maps[name] = axes.imshow([[0]], cmap=cmap, vmin=low, vmax=high,
                                          extent=(0, 1, 1, 0), interpolation="nearest")
            self.squares += axes.plot([], [], "s", ms=5, mfc="none", mec="#e60000")
        left, right = below.subplots(1, 2)
        left.set(ylabel="U, then Hm; squares: X~", ylim=(-3, 3))
        most = max([2.0, *(float((parts["M"] + parts["N"]).max()) for _, parts in self.layers if "M" in parts)])
        right.set(ylabel="M (circles) and N", ylim=(0, most))
        for axes in (left, right):
            axes.set(xlabel="time step t", xlim=(0.7, self.T + 0.3), xticks=range(1, self.T + 1))
        kinds = {"threshold": (left, "--", "threshold"), "U": (left, "-", "membrane"), "X~": (left, "s:", "input"),
                 "M": (right, "o-", "membrane"), "N": (right, "s--", "input")}
        self.lines = {name: axes.plot([], [], style, color=COLORS[color], ms=3)[0]
                      for name, (axes, style, color) in kinds.items()}
        self.now = [axes.plot([], [], color=COLORS["threshold"], lw=0.6)[0] for axes in (left, right)]

    def update(self, image: int, layer: int, t: int, channel: int, row: float, column: float) -> str:
        """Draw what is chosen; the line that stands below."""
        name, parts = self.layers[layer - 1]
        channels, *size = parts["X"].shape[2:]
        now, b, c = t - 1, image - 1, min(channel, channels) - 1
        h, w = (int(share * pixels) for share, pixels in zip((row, column), size))
        of = {symbol: parts.get(symbol, parts["X"])[:, b, c] for symbol in ("X", "X~", "U", "Hm", "S")}  # (T, H, W)
        weights: dict[str, Tensor] = {symbol: parts[symbol][:, b, c] for symbol in ("v", "M", "N") if symbol in parts}
        k = parts["k"][now, b] * size[0] * size[1] if "k" in parts else torch.full((1, 1), torch.nan)
        maps = {"image": self.pictures[b], "k": k} | {symbol: over_time[now] for symbol, over_time in of.items()}
        for symbol, drawn in self.maps.items():
            drawn.set_data(np.asarray(maps[symbol]))
        steps = np.arange(1, self.T + 1)
        self.lines["threshold"].set_data([0, self.T + 1], [self.thresholds[name]] * 2)
        self.lines["U"].set_data(steps.repeat(2), torch.stack([of["U"], of["Hm"]], 1)[..., h, w].flatten().numpy())
        self.lines["X~"].set_data(steps, of["X~"][:, h, w].numpy())
        for symbol in ("M", "N"):
            self.lines[symbol].set_data(steps, weights.get(symbol, torch.full((self.T,), torch.nan)).numpy())
        for square in self.squares:
            square.set_data([column], [row])
        for line in self.now:
            line.set_data([t, t], [-100, 100])
        numbers = {"PE": parts["PE"][now, c]} if "PE" in parts else {}
        numbers |= {symbol: over_time[now] for symbol, over_time in weights.items()}
        numbers |= {symbol: of[symbol][now, h, w] for symbol in ("X~", "U")}
        return (f"{name}, channel {c + 1} of {channels}, t = {t}: "
                + ", ".join(f"{symbol} {float(number):.2f}" for symbol, number in numbers.items())
                + f"; fires at {100 * of['S'][now].mean():.0f} %")
