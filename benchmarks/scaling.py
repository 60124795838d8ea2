"""Time and memory of a training step against T, batch and width, beside SpikingJelly: python benchmarks/scaling.py.

ResNet-20 at width 1/4, T 4, batch 16, of which one is changed at a time. Writes benchmarks/scaling-cpu.json (or -cuda)
and the plot beside it.
"""

import argparse
from collections.abc import Iterator

import matplotlib.pyplot as plt
import torch
from matplotlib.ticker import LogLocator
from speed import SpikingJelly, batch, kept, network, training_step
from timing import HERE, interleaved, machine, summary, write

from staa import plots

AXES = {"batch": [4, 8, 16, 32, 64], "width": [1 / 8, 1 / 4, 1 / 2, 1], "T": [1, 2, 4, 8, 16, 32]}  # T compiles longest
START = {"T": 4, "batch": 16, "width": 1 / 4}
NEURONS = {"SpikingJelly": (SpikingJelly, {}), "LIF": ("lif", {}), "STAA": ("staa", {"beta": 0.0})}
LINES = {"SpikingJelly": (plots.COLORS["ann"], "v:"), "LIF": (plots.COLORS["lif"], "o-"),
         "STAA": (plots.COLORS["staa"], "s--")}


def measure(device: torch.device, rounds: int) -> Iterator[dict]:
    """Yields what is found so far, after each axis."""
    found = {}
    for axis, values in AXES.items():
        found[axis] = {}
        for value in values:
            size = START | {axis: value}
            x, labels = batch(size["batch"], device)
            nets = {name: network(neuron, device, size["T"], size["width"], **settings)
                    for name, (neuron, settings) in NEURONS.items()}
            times = interleaved({name: training_step(net, x, labels) for name, net in nets.items()}, device, rounds)
            found[axis][f"{value:g}"] = {name: summary(times[name]) | {"MiB kept": round(kept(net, x), 1)}
                                         for name, net in nets.items()}
            print(axis, f"{value:g}", {name: f"{n['median']:.0f} ms, {n['MiB kept']:.0f} MiB"
                                       for name, n in found[axis][f"{value:g}"].items()}, flush=True)
        yield found


def plot(found: dict, path):
    plots.style()
    figure, panels = plt.subplots(2, 3, figsize=(plots.PAGE, 3.6), sharex="col")
    for column, (axis, values) in zip(panels.T, found.items()):
        x = [float(value) for value in values]
        for name, (color, marker) in LINES.items():
            for axes, key in zip(column, ("median", "MiB kept")):
                axes.loglog(x, [n[name][key] for n in values.values()], marker, ms=3, color=color, label=name)
        column[1].set(xlabel={"T": "T", "batch": "batch size", "width": "width"}[axis])
        column[1].set_xticks(x, values.keys())
        for axes in column:
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.minorticks_off()
    panels[0, 0].set(ylabel="training step, ms")
    panels[1, 0].set(ylabel="kept for backward, MiB")
    panels[0, 0].legend()
    figure.savefig(path)


def main(device: torch.device, rounds: int):
    for found in measure(device, rounds):
        write("scaling", device, {"machine": machine(device, "spikingjelly"), "rounds": rounds, "unit": "ms", **found})
    plot(found, HERE / f"scaling-{device.type}.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    main(torch.device(arguments.device), arguments.rounds)
