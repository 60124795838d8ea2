"""Records in, table out: the paper's numbers, the recorded ones and this run's side by side."""

import html
import json
import re
from collections import defaultdict
from collections.abc import Sequence
from functools import cache
from typing import Any

import pandas as pd
import torch

from . import lemaire, networks, records, stats
from .config import LATER, Config
from .energy import ELEMENTWISE, Measurement
from .experiments import ABLATED, FIGURE2, POSITION_ENCODING, TABLE1, TABLE3, TABLE4, Settings
from .firing import evaluating, firing_rates
from .networks import NEURONS
from .records import Record
from .settings import ConfigError
from .weights import new_network

LOST = "not in our source"
ARCHITECTURES = {"vgg13": "VGG-13", "resnet19": "ResNet-19", "resnet20": "ResNet-20", "resnet18": "ResNet-18",
                 "resnet34": "ResNet-34"}
LABELS = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100"}
EVENT_LABELS = {"cifar10dvs": "CIFAR10-DVS", "dvsgesture": "DVS128 Gesture"}
NAMES = LABELS | EVENT_LABELS | {"imagefolder:imagenet": "ImageNet"}


def firing_rate(record: Record) -> float:
    """Mean spikes per neuron and time step over all neurons, as `Measurement.firing_rate` has it, on the test set: the
    record tells the rate of each layer, and a layer counts by its neurons."""
    sizes = layer_sizes(Config.from_dict(record.config).but(seed=0), record.outcome["classes"])
    return sum(record.outcome["firing_rates"][layer] * n for layer, n in sizes.items()) / sum(sizes.values())


@cache
def layer_sizes(config: Config, classes: int) -> dict[str, int]:
    """Neurons times time steps of each spiking layer, by a pass without numbers where the network can do that."""
    network = networks.skeleton(lambda: new_network(config, classes))
    image = torch.zeros(1, network.in_channels, config.image_size, config.image_size)
    with torch.no_grad(), evaluating(network), firing_rates(network) as seen:
        network(image.to(next(network.parameters()).device))
    return seen.count


def paper(name: str) -> pd.DataFrame:
    """data/paper/NAME.csv as text, a row a number, digits as printed; a lost cell is "not in our source"."""
    path = records.folder("paper") / f"{name}.csv"
    if not path.is_file():
        raise records.RecordError(f"the paper's numbers come with a checkout of the project, and {path} is not there.")
    frame = pd.read_csv(path, dtype=str, keep_default_na=False)
    return frame.assign(accuracy=frame.accuracy.replace("", LOST)) if "accuracy" in frame else frame


def paper_table1() -> pd.DataFrame:
    """Table 1 of the paper: one row a method, architecture and T; both datasets as columns."""
    rows = paper("table1")
    rows["Method"] = rows.method + rows.cited.map(lambda number: f" [{number}]" if number else "")
    rows["Architecture"] = rows.architecture
    table = rows[["Method", "Architecture", "T"]].drop_duplicates()
    for dataset, label in LABELS.items():
        cells = rows[rows.dataset == dataset].rename(columns={"accuracy": f"Paper: {label}"})
        table = table.merge(cells[["Method", "Architecture", "T", f"Paper: {label}"]], how="left", validate="1:1")
    return table


def table1(runs: list[Record]) -> pd.DataFrame:
    """Table 1 with, for its own rows, the project's records and the runs of this notebook, with STAA and with LIF."""
    table = paper_table1()
    shown = dict.fromkeys(record.config["dataset"] for record in runs)
    own = {(ARCHITECTURES[network], str(T)): dict(network=network, T=T) for network, T in TABLE1}
    rows = [own.get((row.Architecture, row["T"])) if row.Method == "STAA-SNN" else None for _, row in table.iterrows()]

    def column(text):
        return ["" if row is None else text(row) for row in rows]

    for dataset, label in LABELS.items():
        for neuron in ("staa", "lif"):
            table[f"Recorded: {label}, {neuron.upper()}"] = column(
                lambda row: recorded(neuron, dataset=dataset, **row))
    for dataset in shown:
        for neuron in ("staa", "lif"):
            table[f"This run: {dataset}, {neuron.upper()}"] = column(
                lambda row: mean_sd(select(runs, dataset=dataset, neuron=neuron, **row)))
    return table


def paper_table3() -> pd.DataFrame:
    """Table 3 as the paper prints it: one row a dataset, method, architecture and T."""
    rows = paper("table3")
    return pd.DataFrame({"Dataset": rows.dataset.map(EVENT_LABELS), "Architecture": rows.architecture, "T": rows["T"],
                         "Method": rows.method + rows.cited.map(lambda number: f" [{number}]" if number else ""),
                         "Paper": rows.accuracy})[["Dataset", "Method", "Architecture", "T", "Paper"]]


def table3(runs: list[Record]) -> pd.DataFrame:
    """Table 3's own rows: the paper's numbers, the project's records, and the runs of this notebook with STAA and LIF.
    Where these are of another dataset, as in smoke, they stand in rows of their own, without a number beside them."""
    table = paper_table3()
    printed = {(row.Dataset, row.Architecture): row.Paper for row in table[table.Method == "STAA-SNN"].itertuples()}
    shown = dict.fromkeys((r.config["dataset"], r.config["network"]) for r in runs)
    rows = dict.fromkeys([(dataset, network) for dataset, names in TABLE3.items() for network in names] + list(shown))
    lines = []
    for dataset, network in rows:
        label, architecture = EVENT_LABELS.get(dataset, dataset), ARCHITECTURES.get(network, network)
        mine = {neuron: select(runs, dataset=dataset, network=network, neuron=neuron) for neuron in ("staa", "lif")}
        steps = ", ".join(sorted({str(r.config["T"]) for found in mine.values() for r in found})) or "16"
        lines.append({"Dataset": label, "Architecture": architecture, "T": steps,
                      "Paper": printed.get((label, architecture), "not in the paper")}
                     | {f"Recorded: {neuron.upper()}": recorded(neuron, dataset=dataset, network=network, T=16)
                        for neuron in mine}
                     | {f"This run: {neuron.upper()}": mean_sd(found) for neuron, found in mine.items()})
    return pd.DataFrame(lines)


def ablation(rows: list[tuple[str, dict]], paper: dict[str, str], dataset: str, runs: list[Record]) -> pd.DataFrame:
    """An ablation's rows, (label, neuron_settings): the paper's numbers by label, the project's records of its network
    and T, a column for each way they were trained, and the runs of this notebook with their number of parameters."""
    configs = [run.config for run in runs]
    vouched = vouched_setups(rows, runs) or {LABELS[dataset]: []}
    heads = dict.fromkeys(f"{c['dataset']}, {ARCHITECTURES.get(c['network'], c['network'])}, T = {c['T']}"
                          + f", {c['neuron']}" * (c["neuron"] != ABLATED["neuron"]) for c in configs)
    lines = []
    for label, settings in rows:
        own = select(runs, neuron_settings=settings)
        lines.append({"Row": label,
                      "Neuron settings": ", ".join(f"{name} = {value}" for name, value in settings.items()),
                      f"Paper: {LABELS[dataset]}": paper.get(label, LOST)}
                     | {f"Recorded: {name}": mean_and_n(select(rs, neuron_settings=settings)) if rs else "no record"
                        for name, rs in vouched.items()}
                     | {f"This run: {head}": mean_sd(own) for head in heads}
                     | {"Parameters": f"{own[0].outcome['parameters']:,}" if own else "not run"})
    return pd.DataFrame(lines)


def vouched_setups(rows: list[tuple[str, dict]], runs: Sequence[Record] = ()) -> dict[str, list[Record]]:
    """The project's records of an ablation's rows, with the neuron of these runs or else STAA, by their `setups`."""
    vouched = select(records.vouched(), **ABLATED | ({"neuron": runs[0].config["neuron"]} if runs else {}))
    return setups([record for _, settings in rows for record in select(vouched, neuron_settings=settings)])


def setups(found: list[Record]) -> dict[str, list[Record]]:
    """Records by what all but their neurons and seeds share: dataset and training in words, widest first."""
    groups = defaultdict(list)
    for record in found:
        c = LATER | record.config
        rest = json.dumps(c | dict.fromkeys(("seed", "neuron", "neuron_settings")), sort_keys=True)
        groups[c["width"], record.outcome["train_images"], c["epochs"], rest].append(record)
    named: dict[str, list[Record]] = {}
    for key in sorted(groups, reverse=True):
        first = groups[key][0]
        name = f"{NAMES.get(first.config['dataset'], first.config['dataset'])}, {training(first)}"
        named[name if name not in named else f"{name}, lr {first.config['lr']:g}, no. {len(named) + 1}"] = groups[key]
    return named


def paper_section(item: str, quantity: str = "accuracy") -> dict[str, str]:
    """What section 4 prints for an item of data/paper/sections.csv, by setting, digits as printed."""
    rows = paper("sections")
    return {r.setting: r.value for r in rows[(rows["item"] == item) & (rows.quantity == quantity)].itertuples()}


def figure2(runs: list[Record]) -> pd.DataFrame:
    """Figure 2, the place of PE; the paper's text gives no accuracy for (a)."""
    return ablation(FIGURE2, paper_section("pe_place"), "cifar10", runs)


def position_encoding(runs: list[Record]) -> pd.DataFrame:
    """Section 4.3, learnable against fixed PE."""
    return ablation(POSITION_ENCODING, paper_section("pe_kind"), "cifar10", runs)


def select(found: list[Record], **settings) -> list[Record]:
    """The records whose config has these settings; neuron_settings may leave out what has the neuron's default."""
    if "neuron_settings" in settings:
        given = settings.pop("neuron_settings")
        found = [r for r in found if r.config["neuron_settings"] == full_settings(r.config["neuron"], given)]
    return [r for r in found if all(r.config[name] == value for name, value in settings.items())]


def mean_sd(found: list[Record]) -> str:
    """Mean test accuracy in percent; with several seeds the standard deviation and their number."""
    return stats.mean_sd([record.accuracy for record in found])


def mean_and_n(found: list[Record]) -> str:
    """The same with the number of seeds also where it is one: beside records of several."""
    return mean_sd(found) + " (n=1)" * (len(found) == 1)


def recorded(neuron: str, **settings) -> str:
    """The project's record of these settings with "staa" or "lif", whose settings are default: accuracy, n, and what
    was trained. LIF is also STAA without a block, as it stands in Table 4.

    Where the project holds several trainings, the widest network on most images for most epochs is shown: the choice
    never looks at an accuracy.
    """
    groups, vouched = defaultdict(list), select(records.vouched(), **settings)
    found = select(vouched, neuron=neuron, neuron_settings={})
    if neuron == "lif":
        found += select(vouched, neuron="staa", neuron_settings=TABLE4[0][1])
    for record in found:
        setting = Config.from_dict(record.config).but(seed=0)
        groups[setting.width, record.outcome["train_images"], setting.epochs, setting.hash].append(record)
    if not groups:
        return "no record"
    best = groups[max(groups)]
    return f"{mean_and_n(best)}; {training(best[0])}"


def full_settings(neuron: str, settings: dict) -> dict | None:
    """These settings with the neuron's defaults filled in; None where the neuron has no such setting."""
    try:
        return networks.full_settings("neuron", neuron, NEURONS, settings)
    except ConfigError:
        return None


def training(record: Record) -> str:
    """What was trained, in a few words; where it is not SGD in float32 without warm-up, that too."""
    c, images = LATER | record.config, record.outcome["train_images"]
    names = {"AdamW": c["optimizer"] == "adamw", "bf16": c["precision"] == "bf16", "warm-up": c["warmup_epochs"]}
    return ", ".join([f"{c['epochs']} epochs, width {c['width']:g}, {images:,} images", *filter(names.get, names)])


def trained_on(runs: list[Record]) -> str:
    """What the numbers of a figure stand on, in a line under it: data, networks, neurons and training of these runs."""
    each_run = [(run.config, training(run)) for run in runs]
    columns = zip(*((NAMES.get(c["dataset"], c["dataset"]), f"{ARCHITECTURES.get(c['network'], c['network'])}, "
                     f"T = {c['T']}", c["neuron"], trained) for c, trained in each_run))
    return "; ".join([*(" and ".join(dict.fromkeys(each)) for each in columns), stats.seeds(runs)])


def energy(found: dict[str, Measurement]) -> pd.DataFrame:
    """Section 4.5 for one image: the paper's numbers as printed, and one column a measured network, by its label."""
    printed = {row.quantity: f"{row.value} {row.unit}" for row in paper("sections").itertuples()
               if row.item == "energy" and row.setting == "network"}

    def outside(m, number, *kinds):
        return count(m.total(number) - m.total(number, *kinds, *ELEMENTWISE))

    rows = {"T": ("T", lambda m: str(m.T)),
            "Parameters": ("parameters", lambda m: f"{m.parameters:,}"),
            "Multiply-adds": ("FLOPs", lambda m: outside(m, "multiply_adds")),
            "MACs of layers": ("MACs", lambda m: outside(m, "macs", "context product")),
            "MACs with context product and mixing": (None, lambda m: count(m.total("macs"))),
            "ACs": ("ACs", lambda m: count(m.total("acs"))),
            "Firing rate, %": (None, lambda m: f"{100 * m.firing_rate:.1f}" if m.rates else "no spikes"),
            "mJ, operations alone": ("energy", lambda m: f"{m.millijoules:.4g}"),
            "mJ, with memory traffic (Lemaire et al.)": (None, lambda m: f"{sum(lemaire.energy(m).values()):.4g}")}
    return pd.DataFrame([{"One image": name, "Paper, ResNet-20": printed.get(key, "not given")}
                         | {label: text(m) for label, m in found.items()} for name, (key, text) in rows.items()])


def count(number: float) -> str:
    """An operation count as 0.871 G or 13.6 M."""
    return f"{number / 1e9:.3f} G" if number >= 5e7 else f"{number / 1e6:.2f} M" if number else "0"


def header(settings: Settings, runs: list[Record]) -> str:
    """What this run's numbers stand on, in words; and that they are no reproduction where they are none."""
    if not runs:
        return "Nothing was run."
    datasets = dict.fromkeys(record.config["dataset"] for record in runs)
    widths = sorted({record.config["width"] for record in runs})
    seeds = len({record.config["seed"] for record in runs})
    part = f"{runs[0].config['train_images']:,} training images, " if runs[0].config["train_images"] else ""
    text = (f"This run: preset {settings.preset}, dataset {', '.join(datasets)}, {part}"
            f"{runs[0].config['epochs']} epochs, width {', '.join(f'{width:g}' for width in widths)}, "
            f"{seeds} seed{'s' * (seeds > 1)}; test accuracy of the last epoch in percent"
            f"{', ± the standard deviation over seeds' * (seeds > 1)}.")
    text += f" {stats.at_chance(runs)}"
    if {"digits", "digits-rows", "imagefolder:digits64"} & datasets.keys():
        text += " These are 8 x 8 handwritten digits, not the paper's data: the numbers show that it runs, no more."
    elif "digits-dvs" in datasets:
        text += " These are events simulated from 8 x 8 digits: the numbers show that it runs, no more."
    elif settings.preset != "paper" or settings.changes:
        text += " This is not the paper's setting: the numbers are no reproduction of it."
    return text


def save(table: pd.DataFrame, name: str, note: str) -> None:
    """figures/NAME.md, .csv, .tex and .html (a fragment for `staa.page`), each whole or not at all."""
    caption = re.sub(r"([&%$#_{}])", r"\\\1", note)
    texts = {"md": f"{table.to_markdown(index=False, disable_numparse=True)}\n\n{note}\n",
             "csv": table.to_csv(index=False),
             "html": f"{table.to_html(index=False, border=0)}\n<p>{html.escape(note)}</p>\n",
             "tex": table.to_latex(index=False, escape=True, caption=caption, label=f"tab:{name}")}
    for ending, text in texts.items():
        records.write(records.folder("figures") / f"{name}.{ending}", text.encode())


def shown(table: pd.DataFrame) -> Any:
    """The table as a notebook output without random ids."""
    from IPython.display import Markdown

    return Markdown(table.to_markdown(index=False, disable_numparse=True))
