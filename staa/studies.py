"""The tables of Tables 2 and 4, of Figures 3 and 5 and of convergence: records in, table out."""

import statistics

import pandas as pd
import torch

from . import records, stats
from .config import Config
from .data import describe
from .energy import ELEMENTWISE, measure
from .experiments import ABLATED, CONVERGENCE, FIGURE3, FIGURE5, LEAK, TABLE2, TABLE4, TABLE4_STEPS
from .records import Record
from .tables import (
    ARCHITECTURES,
    LOST,
    ablation,
    count,
    mean_and_n,
    mean_sd,
    paper,
    recorded,
    select,
    setups,
    vouched_setups,
)
from .weights import new_network

Rows = list[tuple[str, dict]]


def groups(rows: Rows, found: list[Record]) -> dict[str, list[Record]]:
    """The records of each row of an ablation, by its label; rows without any are left out."""
    by_row = {label: select(found, neuron_settings=settings) for label, settings in rows}
    return {label: records for label, records in by_row.items() if records}


def series(rows: Rows, runs: list[Record]) -> dict[str, dict[str, list[Record]]]:
    """What a figure draws: this run's rows, and those of each training that the project vouches for."""
    own = runs[0].config
    this = f"this run: {own['dataset']}, " + f"{own['neuron']}, " * (own["neuron"] != "staa") + stats.seeds(runs)
    return {this: groups(rows, runs)} | {f"recorded: {name}, {stats.seeds(found)}": groups(rows, found)
                                         for name, found in vouched_setups(rows, runs).items()}


def table2(runs: list[Record]) -> pd.DataFrame:
    """Table 2 as the paper prints it, and beside its own rows the project's records and this run, STAA and LIF."""
    rows, names = paper("table2"), {ARCHITECTURES[n].replace("-", ""): n for n in TABLE2}
    lines = []
    for row in rows.itertuples():
        is_own = not row.cited and row.architecture in names
        own: dict | None = dict(network=names[row.architecture], T=4) if is_own else None
        line = {"Method": row.method + (f" [{row.cited}]" if row.cited else ""), "Architecture": row.architecture,
                "T": row.T, "Paper: ImageNet": row.accuracy}
        for neuron in ("staa", "lif"):
            line[f"Recorded: ImageNet, {neuron.upper()}"] = (
                recorded(neuron, dataset="imagefolder:imagenet", **own) if own else "")
        for dataset in dict.fromkeys(run.config["dataset"] for run in runs):
            for neuron in ("staa", "lif"):
                line[f"This run: {dataset.removeprefix('imagefolder:')}, {neuron.upper()}"] = mean_sd(
                    select(runs, dataset=dataset, neuron=neuron, **own)) if own else ""
        lines.append(line)
    return pd.DataFrame(lines)


def table4(runs: list[Record]) -> pd.DataFrame:
    """Table 4: accuracy and gain over the baseline, in the paper, the records and this run; parameters and seconds."""
    printed = {label: line for (label, _), line in zip(TABLE4, paper("table4").itertuples())}
    table = ablation(TABLE4, {label: line.accuracy for label, line in printed.items()}, "cifar100", runs)
    table = table.drop(columns=["Neuron settings", "Parameters"])
    table.insert(2, "Paper: gain", [printed[label].gain or "-" for label, _ in TABLE4])
    own = groups(TABLE4, runs)
    tests = len(TABLE4) - 1
    table["This run: gain [95 %]"] = [
        "-" if label == "baseline" else gained(own, label, "baseline", tests) for label, _ in TABLE4]
    table["Parameters"] = [f"{own[k][0].outcome['parameters']:,}" if k in own else "not run" for k, _ in TABLE4]
    table["Seconds an epoch"] = [f"{seconds(own[k]):.1f}" if k in own else "not run" for k, _ in TABLE4]
    return table


def gained(found: dict[str, list[Record]], after: str, before: str, tests: int) -> str:
    gain = stats.gain(found.get(after, []), found.get(before, []), tests)
    return str(gain) if gain else "not run"


def steps(found: list[Record]) -> dict[str, stats.Gain | None]:
    """What each block adds to Table 4's row without it, with intervals that hold together (Bonferroni)."""
    rows = groups(TABLE4, found)
    return {name: stats.gain(rows.get(after, []), rows.get(before, []), len(TABLE4_STEPS))
            for name, (after, before) in TABLE4_STEPS.items()}


def table4_steps(runs: list[Record]) -> pd.DataFrame:
    """What each block adds: the paper's difference, the records' and this run's, with interval and p-value."""
    printed = {label: float(line.accuracy) for (label, _), line in zip(TABLE4, paper("table4").itertuples())}
    lines = []
    found = {f"Recorded: {name}": steps(rs) for name, rs in vouched_setups(TABLE4, runs).items()}
    found["This run"] = steps(runs)
    for name, (after, before) in TABLE4_STEPS.items():
        line = {"Block": name, "From": before, "To": after, "Paper": f"{printed[after] - printed[before]:+.2f}"}
        lines.append(line | tested(found, name))
    return pd.DataFrame(lines)


def tested(found: dict[str, dict[str, stats.Gain | None]], name: str) -> dict[str, str]:
    """A gain's columns: with its interval and p-value, from each of these sources."""
    line = {}
    for head, gains in found.items():
        gain = gains[name]
        line[f"{head}: gain [95 %]"] = str(gain) if gain else "not run"
        line[f"{head}: p"] = f"{gain.p:.3f}" if gain and gain.p is not None else "-"
    return line


def figure3(runs: list[Record]) -> pd.DataFrame:
    """Figure 3, the probability of TSRD; the paper's curve is lost."""
    return ablation(FIGURE3, {}, "cifar10", runs).drop(columns=["Neuron settings", "Parameters"]).rename(
        columns={"Row": "TSRD probability"})


def figure5(runs: list[Record]) -> pd.DataFrame:
    """Figure 5, the scaling coefficient of GC, with what it costs; the paper's curve is lost."""
    table = ablation(FIGURE5, {}, "cifar10", runs).drop(columns="Neuron settings").rename(columns={"Row": "r"})
    own = groups(FIGURE5, runs)
    table["Multiply-adds of one image"] = [count(multiply_adds(own[k][0])) if k in own else LOST for k, _ in FIGURE5]
    return table


def multiply_adds(record: Record) -> float:
    """Multiply-adds of one image over all time steps, without those of elementwise products, as the energy table has
    them; they do not depend on the weights."""
    config = Config.from_dict(record.config)
    network = new_network(config, record.outcome["classes"])
    found = measure(network, [torch.rand(1, describe(config.dataset).channels, *[config.image_size] * 2)])
    return found.total("multiply_adds") - found.total("multiply_adds", *ELEMENTWISE)


def seconds(found: list[Record]) -> float:
    """Seconds of an epoch, the mean over runs of each one's median, as `Record.seconds` has them."""
    return statistics.mean(statistics.median(record.seconds) for record in found)


def curve(found: list[Record], quantity: str) -> list[tuple[float, float]]:
    """(mean, standard deviation) over seeds of an epoch's "train_loss", "test_accuracy", ..., by epoch."""
    values = zip(*([epoch[quantity] for epoch in record.outcome["epochs"]] for record in found))
    return [(statistics.mean(v), statistics.stdev(v) if len(v) > 1 else 0.0) for v in values]


def convergence(runs: list[Record]) -> pd.DataFrame:
    """How fast LIF, STAA and STAA without TSRD learn. The common loss is the largest of their last training losses, so
    that each of them reaches it; the data they learn from decide, not the test set."""
    own = groups(CONVERGENCE, runs)
    losses = {name: [mean for mean, _ in curve(found, "train_loss")] for name, found in own.items()}
    common = max(loss[-1] for loss in losses.values())
    lines = []
    for name, found in own.items():
        reached = next(i for i, loss in enumerate(losses[name], 1) if loss <= common)
        lines.append({"Neuron": name, "Last training loss": f"{losses[name][-1]:.3f}",
                      "Last test accuracy, %": mean_sd(found), f"Epochs to a loss of {common:.3f}": str(reached),
                      "Seconds an epoch": f"{seconds(found):.1f}",
                      "Seconds to that loss": f"{reached * seconds(found):.1f}"})
    return pd.DataFrame(lines)


def leak_rows(found: list[Record]) -> dict[str, tuple[list[Record], list[Record]]]:
    """The records of each part of the aggregator, with the leak and without it."""
    return {part: (select(found, neuron=a, neuron_settings=own), select(found, neuron=b, neuron_settings=other))
            for part, ((a, own), (b, other)) in LEAK.items()}


def vouched_leaks() -> dict[str, list[Record]]:
    """The project's records of the rows of LEAK, by their training."""
    vouched = records.vouched()
    return setups([record for pair in LEAK.values() for neuron, own in pair
                   for record in select(vouched, **ABLATED | {"neuron": neuron}, neuron_settings=own)])


def leak_gains(found: list[Record]) -> dict[str, stats.Gain | None]:
    """What the leak gives each part; what SA gives with a leak and without; and what the whole aggregator gives LIF, in
    both readings of eq. 14 the one that leaks, as in the networks. The intervals hold together (Bonferroni)."""
    rows = leak_rows(found)
    (lif, _), without_sa, whole = rows.values()
    pairs = {f"leak in {part}": pair for part, pair in rows.items()}
    pairs |= {f"SA {kind}": pair for kind, pair in zip(("with a leak", "without a leak"), zip(whole, without_sa))}
    pairs |= {f"{name} over LIF": (after, lif) for name, after in zip(("staa-leaky", "staa"), whole)}
    return {name: stats.gain(after, before, len(pairs)) for name, (after, before) in pairs.items()}


def leak(runs: list[Record]) -> pd.DataFrame:
    """Test accuracy of each part with the leak and without, in the records by their training and in this run."""
    found = {f"Recorded: {name}": rs for name, rs in vouched_leaks().items()} | {"This run": runs}
    kinds = list(enumerate(("leak", "no leak")))
    return pd.DataFrame([{"Neuron": part} | {f"{head}: {kind}": mean_and_n(leak_rows(rs)[part][k])
                                             for head, rs in found.items() for k, kind in kinds} for part in LEAK])


def leak_differences(runs: list[Record]) -> pd.DataFrame:
    """`leak_gains` of the records by their training and of this run, with the p-value of each by itself."""
    found = {f"Recorded: {name}": rs for name, rs in vouched_leaks().items()} | {"This run": runs}
    gains = {head: leak_gains(rs) for head, rs in found.items()}
    return pd.DataFrame([{"Gain": name} | tested(gains, name) for name in gains["This run"]])


def tsrd_seconds(runs: list[Record]) -> str:
    """One sentence on the paper's claim that TSRD accelerates training: seconds an epoch with it less without it, as a
    paired difference over seeds, in percent of those without."""
    own = groups(CONVERGENCE, runs)
    with_it, without = ({r.config["seed"]: seconds([r]) for r in own[k]} for k in ("STAA", "STAA without TSRD"))
    gain = stats.paired([100 * (with_it[seed] / without[seed] - 1) for seed in sorted(with_it.keys() & without.keys())])
    sure = "beyond chance" if gain.beyond_chance else "not beyond chance" if gain.n > 1 else "one seed cannot tell"
    return f"With TSRD the seconds of an epoch change by {gain} %: {sure}."
