"""Figures 3 and 5, convergence and the leak: accuracy over a setting, and loss and accuracy over epochs."""

import itertools
import math
import statistics
import textwrap

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from .experiments import CONVERGENCE, LEAK
from .plots import COLORS, COLUMN, PAGE
from .records import Record
from .stats import seeds
from .studies import curve, groups, leak_rows, multiply_adds
from .tables import paper_section

#: Lines by order: this run, then each recorded training; they differ in lightness and in their markers.
SERIES = [(COLORS["staa"], "s-"), (COLORS["lif"], "o--"), (COLORS["fsta"], "^-."), (COLORS["statten"], "d:"),
          (COLORS["ann"], "v-"), (COLORS["input"], "x--")]
Series = dict[str, dict[str, list[Record]]]


def over_setting(axes, series: Series) -> None:
    """Mean accuracy by the number that labels a row, and that of guessing; bars are standard deviations over seeds."""
    for chance in {100 / r.outcome["classes"] for rows in series.values() for found in rows.values() for r in found}:
        axes.axhline(chance, color=COLORS["threshold"], lw=0.8, label=f"guessing: {chance:.0f} %")
    for (name, rows), (color, line) in zip(series.items(), itertools.cycle(SERIES)):
        values = [[r.accuracy for r in found] for found in rows.values()]
        spread = [statistics.stdev(v) if len(v) > 1 else 0 for v in values] if max(map(len, values)) > 1 else None
        axes.errorbar([float(label) for label in rows], [statistics.mean(v) for v in values], spread, fmt=line, ms=3.5,
                      color=color, capsize=2, label=textwrap.fill(name, 50))
    axes.set_ylabel("test accuracy, %")


def figure3(series: Series) -> Figure:
    """Accuracy over the probability of TSRD, with what the paper's text says of it."""
    figure, axes = plt.subplots(figsize=(COLUMN, 3.1))
    good, best = (paper_section("tsrd", "probability")[name] for name in ("good below", "best"))
    axes.axvspan(0, float(good), color="0.92", lw=0, label=f"below {good}: good in the paper")
    axes.axvline(float(best), color=COLORS["ann"], lw=0.8, ls=":", label=f"{best}: best in the paper")
    over_setting(axes, series)
    axes.set(xlabel="probability of TSRD", xlim=(-0.03, 1.03), xticks=[0, 0.2, 0.4, 0.6, 0.8, 1])
    figure.legend(loc="outside upper center", ncols=1, borderpad=0)
    return figure


def figure5(series: Series) -> Figure:
    """Accuracy over r, and below what r costs in parameters and multiply-adds, against the paper's r."""
    best = paper_section("gc_r", "r")["best"]
    figure, (axes, cost) = plt.subplots(2, 1, figsize=(COLUMN, 3.9), sharex=True, height_ratios=(3, 2))
    axes.axvline(float(best), color=COLORS["ann"], lw=0.8, ls=":", label=f"{best}: best in the paper")
    over_setting(axes, series)
    rows = next(iter(series.values()))
    for label, line, number in (("parameters", "v-", lambda r: r.outcome["parameters"]),
                                ("multiply-adds", "x--", multiply_adds)):
        counted = {float(r): number(found[0]) for r, found in rows.items()}
        base = counted.get(float(best), max(counted.values()))
        cost.plot(list(counted), [100 * n / base - 100 for n in counted.values()], line, ms=3.5, lw=0.9,
                  color=COLORS["ann"], label=label)
    cost.set(xlabel="scaling coefficient r of GC", ylabel=f"cost against\nr = {best}, %", xscale="log")
    cost.legend()
    cost.set_xticks(ticks := [1, 2, 4, 8, 16], [str(r) for r in ticks])
    cost.minorticks_off()
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=1, borderpad=0)
    return figure


def leak(found: dict[str, list[Record]]) -> Figure:
    """Accuracy of each part of the aggregator with the leak and without, a panel a training; bars are standard
    deviations over seeds, and a part that a training lacks has no mark."""
    figure, panels = plt.subplots(1, len(found), figsize=(PAGE, 2.8), sharey=True, squeeze=False)
    kinds = [("leak", COLORS["staa"], "s"), ("no leak", COLORS["lif"], "o")]
    for axes, (name, records) in zip(panels[0], found.items()):
        for k, (kind, color, mark) in enumerate(kinds):
            values = {i: [r.accuracy for r in pair[k]] for i, pair in enumerate(leak_rows(records).values()) if pair[k]}
            axes.errorbar([i + 0.12 * k for i in values], [statistics.mean(v) for v in values.values()],
                          [statistics.stdev(v) if len(v) > 1 else 0 for v in values.values()], fmt=mark, ms=4,
                          color=color, capsize=2, label=kind)
        axes.axhline(100 / records[0].outcome["classes"], color=COLORS["threshold"], lw=0.8, zorder=0)
        axes.set(title=textwrap.fill(f"{name}, {seeds(records)}", 96 // len(found)), xlim=(-0.3, len(LEAK) - 0.6))
        axes.set_xticks(range(len(LEAK)), [part.replace(" + ", "\n+ ") for part in LEAK])
    panels[0][0].set_ylabel("test accuracy, %")
    figure.legend(*panels[0][-1].get_legend_handles_labels(), loc="outside upper center", ncols=2)
    return figure


def convergence(runs: list[Record]) -> Figure:
    """Training loss and test accuracy by epoch, with those of guessing in grey; bands are standard deviations over
    seeds."""
    figure, panels = plt.subplots(1, 2, figsize=(PAGE, 2.4))
    styles = [(COLORS["lif"], "o-"), (COLORS["staa"], "s--"), (COLORS["fsta"], "^-.")]
    for axes, quantity, label in zip(panels, ("train_loss", "test_accuracy"), ("training loss", "test accuracy, %")):
        for (name, found), (color, line) in zip(groups(CONVERGENCE, runs).items(), styles):
            mean, spread = zip(*curve(found, quantity))
            epochs = range(1, len(mean) + 1)
            axes.plot(epochs, mean, line, ms=3.5, markevery=max(len(mean) // 8, 1), color=color, label=name)
            axes.fill_between(epochs, [m - s for m, s in zip(mean, spread)], [m + s for m, s in zip(mean, spread)],
                              color=color, alpha=0.15, lw=0)
        classes = runs[0].outcome["classes"]
        axes.hlines(math.log(classes) if quantity == "train_loss" else 100 / classes, 1, len(mean),
                    color=COLORS["threshold"], lw=0.8, zorder=0)
        axes.set(xlabel="epoch", ylabel=label)
        axes.xaxis.get_major_locator().set_params(integer=True)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    return figure
