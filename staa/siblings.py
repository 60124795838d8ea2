"""The sibling systems' notebooks: spectra of spike maps, attention maps, and tables of trained runs side by side."""

import statistics
from collections.abc import Iterable

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.utils.data import DataLoader

from . import data, plots, tables, train
from .config import Config
from .energy import Measurement, measure
from .firing import evaluating, neurons
from .fsta import dct
from .networks import SpikingNetwork
from .records import Record

#: Lines of FSTA's comparison: colour and marker of each label.
LINES = {"LIF": (plots.COLORS["lif"], "o-"), "FSTA's LIF": (plots.COLORS["ann"], "v:"),
         "FSTA": (plots.COLORS["fsta"], "^-."), "STAA": (plots.COLORS["staa"], "s--")}


def spectra(network: SpikingNetwork, batches: Iterable) -> dict[str, Tensor]:
    """Mean energy of the DCT coefficients of each layer's spike maps: name -> (T, H, W); entry (u, v) has frequency u
    along H and v along W. The coefficients of one map have the energy of its spikes, which is their number."""
    sums: dict[str, Tensor] = {}
    count = 0

    def add(name, spikes):
        coefficients = dct(spikes.shape[-2]).to(spikes) @ spikes @ dct(spikes.shape[-1]).to(spikes).T
        sums[name] = sums.get(name, 0) + coefficients.square().mean(2).sum(1).double()

    with torch.no_grad(), evaluating(network) as hooks:
        for name, layer in neurons(network).items():
            hooks.callback(layer.register_forward_hook(lambda _, x, spikes, name=name: add(name, spikes)).remove)
        for x, _ in batches:
            network(x.to(next(network.parameters()).device))
            count += len(x)
    return {name: total.cpu() / count for name, total in sums.items()}


def vertical_share(energy: Tensor) -> float:
    """Of the energy (..., H, W) of unequal frequencies along H and W, the share that varies faster along H: 1 for
    horizontal stripes, 0 for vertical ones, 1/2 where neither direction is preferred; nan on a map of 1 x 1."""
    h, w = energy.shape[-2:]
    u, v = torch.arange(h)[:, None] / h, torch.arange(w) / w
    vertical, horizontal = (float(energy[..., mask].sum()) for mask in (u > v, u < v))
    return vertical / (vertical + horizontal) if vertical + horizontal else float("nan")


def similarity(energy: Tensor) -> float:
    """Mean cosine between the spectra (T, H, W) of the time steps, pair by pair, without the mean (coefficient 0, 0);
    nan for one step or a map of 1 x 1."""
    rows = energy.flatten(1)[:, 1:]
    pairs = [(i, j) for i in range(len(rows)) for j in range(i)]
    if not pairs or not rows.numel():
        return float("nan")
    return statistics.mean(float(torch.cosine_similarity(rows[i], rows[j], dim=0)) for i, j in pairs)


def shallow_and_deep(spectrum: dict[str, Tensor]) -> tuple[float, float]:
    """Mean vertical share of the first and of the last third of the layers, those with maps above 1 x 1."""
    shares = [vertical_share(e) for e in spectrum.values() if e[0].numel() > 1]
    third = max(len(shares) // 3, 1)
    return statistics.mean(shares[:third]), statistics.mean(shares[-third:])


def label(record: Record) -> str:
    """What a run of `experiments.fsta`, `statten` or `rows` is called in a table."""
    c = record.config
    if c["network"].startswith("sdt"):
        return "SDT"
    if c["network"].startswith("statten"):
        chunk = c["network_settings"]["chunk"]
        return f"joint, c = {chunk}" if chunk > 1 else "spatial, c = 1"
    return "FSTA's LIF" if c["neuron_settings"].get("spatial") is False else c["neuron"].upper()


def groups(runs: list[Record]) -> dict[str, list[Record]]:
    """Runs by label, seeds together, in the order of the grid."""
    found: dict[str, list[Record]] = {}
    for run in runs:
        found.setdefault(label(run), []).append(run)
    return found


def trained(run: Record) -> SpikingNetwork:
    """The trained network of a run, on a GPU where there is one."""
    return train.trained(run).to("cuda" if torch.cuda.is_available() else "cpu")


def measured(run: Record) -> Measurement:
    """The trained network of a run, counted over its whole test set."""
    return measure(trained(run), test_batches(run))


def test_batches(run: Record) -> DataLoader:
    config = Config.from_dict(run.config)
    return data.batches(train.evaluation_set(config), config.batch_size, shuffle=False)


def mean(values: Iterable[float], form: str) -> str:
    """Mean and, of several, the standard deviation."""
    values = list(values)
    spread = f" ± {statistics.stdev(values):{form}}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{form}}{spread}"


def table(found: dict[str, list[tuple[Record, Measurement]]]) -> pd.DataFrame:
    """One row a label: what was trained, and what it costs for one image of the test set."""
    rows = []
    for name, pairs in found.items():
        runs, counts = zip(*pairs)
        rows.append({"System": name, "Network": tables.ARCHITECTURES.get(runs[0].config["network"],
                                                                        runs[0].config["network"]),
                     "Test accuracy, %": tables.mean_sd(list(runs)), "Parameters": f"{counts[0].parameters:,}",
                     "Multiply-adds": tables.count(counts[0].total("multiply_adds")),
                     "Firing rate, %": mean((100 * m.firing_rate for m in counts), ".1f"),
                     "Energy, µJ": mean((1000 * m.millijoules for m in counts), ".2f"),
                     "Training, s": mean((sum(run.seconds) for run in runs), ".0f")})
    return pd.DataFrame(rows)


def against(what: str, first: dict[int, float], second: dict[int, float], form: str = ".2f") -> str:
    """One sentence: a quantity of two rows by seed, and in how many seeds the first is higher."""
    higher = sum(first[seed] > second[seed] for seed in first)
    return (f"{what}: {mean(first.values(), form)} against {mean(second.values(), form)}; "
            f"higher in {higher} of {len(first)} seeds")


def decided(runs: list[Record]) -> str:
    """One sentence: what it is worth that all seeds agree on a sign (two-sided)."""
    n = len({run.config["seed"] for run in runs})
    chance = 2.0 ** (1 - n)
    return (f"That all {n} seeds agree on a sign happens by chance with probability {chance:.2g}: where they do, it "
            f"{'settles' if chance < 0.05 else 'does not settle'} a claim.")


def by_seed(runs: list[Record]) -> dict[int, float]:
    """Accuracy in percent by seed."""
    return {run.config["seed"]: run.accuracy for run in runs}


def layers(found: dict[str, list[float]], title: str, ylabel: str, axes, at: float | None = None) -> None:
    """One line a label over the spiking layers, by depth; nan leaves a gap."""
    for name, values in found.items():
        color, line = LINES[name]
        axes.plot(range(1, len(values) + 1), values, line, ms=3, color=color, label=name)
    if at is not None:
        axes.axhline(at, color=plots.COLORS["threshold"], lw=0.8)
    axes.set(title=title, xlabel="spiking layer, by depth", ylabel=ylabel)


def figure_fsta(found: dict[str, dict[str, Tensor]]) -> Figure:
    """By layer, one line a neuron: vertical share, similarity of time steps, firing rate; from `spectra`."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(plots.PAGE, 2.3))
    each = {name: list(spectrum.values()) for name, spectrum in found.items()}
    layers({n: [100 * vertical_share(e) for e in s] for n, s in each.items()}, "vertical frequencies",
           "share of the energy, %", left, at=50)
    layers({n: [similarity(e) for e in s] for n, s in each.items()}, "time steps' spectra", "cosine", middle, at=1)
    layers({n: [100 * float(e.sum((-2, -1)).mean()) / e[0].numel() for e in s] for n, s in each.items()},
           "spikes", "firing rate, %", right)
    right.set_ylim(0, None)
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=4)
    return figure


def figure_attention(images: Tensor, maps: dict[str, list[Tensor]], T: int) -> Figure:
    """Frames (T, H, W) of one sample over the mean over blocks of each network's attention maps (T/c, c N, c N), laid
    out as T N query tokens by T N key tokens; what lies outside the chunks is never compared, and left white."""
    figure = plt.figure(figsize=(plots.PAGE, 3.4))
    above, below = figure.subfigures(2, 1, squeeze=False, height_ratios=[1, 2.6])[:, 0]
    for t, axes in enumerate(np.atleast_1d(above.subplots(1, T))):
        axes.imshow(images[t].numpy(), cmap="gray_r")
        axes.set(xticks=[], yticks=[], title=f"step {t + 1}")
        axes.spines[:].set_visible(True)
    whole = {name: torch.stack([torch.block_diag(*(m + 1e-9)) for m in blocks]).mean(0)
             for name, blocks in maps.items()}
    top = max(float(m.max()) for m in whole.values())
    panels = below.subplots(1, len(whole))
    for axes, (name, m) in zip(np.atleast_1d(panels), whole.items()):
        image = axes.imshow(np.ma.masked_equal(m.numpy(), 0), cmap="cividis", vmin=0, vmax=top, interpolation="nearest")
        n = len(m) // T
        axes.set(title=name, xlabel="key token, by step", ylabel="query token, by step")
        axes.set_xticks([n * t + (n - 1) / 2 for t in range(T)], range(1, T + 1))
        axes.set_yticks([n * t + (n - 1) / 2 for t in range(T)], range(1, T + 1))
    below.colorbar(image, ax=panels, label="channels that spike in both")
    return figure
