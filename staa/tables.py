"""Records in, table out: the paper's numbers, the recorded ones and this run's side by side."""

import statistics
from collections import defaultdict

import pandas as pd

from . import lemaire, records
from .config import Config, ConfigError
from .energy import ELEMENTWISE, Measurement
from .experiments import ABLATED, FIGURE2, POSITION_ENCODING, TABLE1, Settings
from .records import Record

LOST = "not in our source"
ARCHITECTURES = {"vgg13": "VGG-13", "resnet19": "ResNet-19", "resnet20": "ResNet-20", "resnet18": "ResNet-18",
                 "resnet34": "ResNet-34"}
LABELS = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100"}


def paper(name: str) -> pd.DataFrame:
    """data/paper/NAME.csv as text, a row a number, digits as printed; a lost cell is "not in our source"."""
    frame = pd.read_csv(records.folder("paper") / f"{name}.csv", dtype=str, keep_default_na=False)
    return frame.assign(accuracy=frame.accuracy.replace("", LOST)) if "accuracy" in frame else frame


def paper_table1() -> pd.DataFrame:
    """Table 1 as the paper prints it: one row a method, architecture and T; both datasets as columns."""
    rows = paper("table1")
    rows["Method"] = rows.method + rows.cited.map(lambda number: f" [{number}]" if number else "")
    rows["Architecture"] = rows.architecture
    table = rows[["Method", "Architecture", "T"]].drop_duplicates()
    for dataset, label in LABELS.items():
        cells = rows[rows.dataset == dataset].rename(columns={"accuracy": f"Paper: {label}"})
        table = table.merge(cells[["Method", "Architecture", "T", f"Paper: {label}"]], how="left", validate="1:1")
    return table


def table1(settings: Settings, runs: list[Record]) -> pd.DataFrame:
    """Table 1 with, for the own rows, the project's records and the runs of this notebook, with STAA and with LIF."""
    table = paper_table1()
    shown = dict.fromkeys(record.config["dataset"] for record in runs)
    own = {(ARCHITECTURES[network], str(T)): dict(network=network, T=T) for network, T in TABLE1}
    rows = [own.get((row.Architecture, row["T"])) if row.Method == "STAA-SNN" else None for _, row in table.iterrows()]

    def column(text):
        return ["" if row is None else text(row) for row in rows]

    for dataset, label in LABELS.items():
        table[f"Recorded: {label}"] = column(lambda row: recorded(dataset=dataset, neuron="staa", **row))
    for dataset in shown:
        for neuron in ("staa", "lif"):
            table[f"This run: {dataset}, {neuron.upper()}"] = column(
                lambda row: mean_sd(select(runs, dataset=dataset, neuron=neuron, **row)))
    return table


def ablation(rows: list[tuple[str, dict]], paper: dict[str, str], dataset: str, runs: list[Record]) -> pd.DataFrame:
    """An ablation's rows, (label, neuron_settings): the paper's numbers by label, the project's records on the paper's
    dataset, network and T, and the runs of this notebook with their number of parameters."""
    configs = [run.config for run in runs]
    heads = dict.fromkeys(f"{c['dataset']}, {ARCHITECTURES[c['network']]}, T = {c['T']}" for c in configs)
    lines = []
    for label, settings in rows:
        own = select(runs, neuron_settings=settings)
        lines.append({"Row": label,
                      "Neuron settings": ", ".join(f"{name} = {value}" for name, value in settings.items()),
                      f"Paper: {LABELS[dataset]}": paper.get(label, LOST),
                      f"Recorded: {LABELS[dataset]}": recorded(**ABLATED, dataset=dataset, neuron_settings=settings)}
                     | {f"This run: {head}": mean_sd(own) for head in heads}
                     | {"Parameters": f"{own[0].outcome['parameters']:,}" if own else "not run"})
    return pd.DataFrame(lines)


def paper_section(item: str) -> dict[str, str]:
    """The accuracies that section 4 prints for an item of data/paper/sections.csv, by setting, digits as printed."""
    rows = paper("sections")
    return {r.setting: r.value for r in rows[(rows["item"] == item) & (rows.quantity == "accuracy")].itertuples()}


def figure2(runs: list[Record]) -> pd.DataFrame:
    """Figure 2, the place of PE; the paper's text gives no accuracy for (a)."""
    return ablation(FIGURE2, paper_section("pe_place"), "cifar10", runs)


def position_encoding(runs: list[Record]) -> pd.DataFrame:
    """Section 4.3, learnable against fixed PE."""
    return ablation(POSITION_ENCODING, paper_section("pe_kind"), "cifar10", runs)


def differences(runs: list[Record]) -> str:
    """One sentence on whether the rows of an ablation differ by more than chance, from the spread over seeds.

    The yardstick is Tukey's honest significant difference at 5 %: q(rows, rows (n - 1)) s / sqrt(n), where s is the
    standard deviation over n seeds within a row, pooled over the rows, and q the studentized range.
    """
    from scipy.stats import studentized_range

    groups = defaultdict(list)
    for run in runs:
        groups[Config.from_dict(run.config).but(seed=0).hash].append(run.accuracy)
    k, n = len(groups), min(map(len, groups.values()), default=0)
    if k < 2:
        return "Fewer than two rows were run: there is nothing to compare."
    if n < 2:
        return "One seed: the differences between the rows say nothing."
    means = [statistics.mean(group) for group in groups.values()]
    span = max(means) - min(means)
    pooled = statistics.mean(statistics.variance(group) for group in groups.values()) ** 0.5
    limit = float(studentized_range.ppf(0.95, k, k * (n - 1))) * (pooled / n ** 0.5)
    verdict = "within chance" if span <= limit else "beyond chance"
    return (f"The rows' means span {span:.2f} points, and over {n} seeds anything up to {limit:.2f} is within chance "
            f"(Tukey, 5 %): the largest difference is {verdict}.")


def select(found: list[Record], **settings) -> list[Record]:
    """The records whose config has these settings; neuron_settings may leave out what has the neuron's default."""
    if "neuron_settings" in settings:
        given = settings.pop("neuron_settings")
        found = [r for r in found if r.config["neuron_settings"] == whole(r.config["neuron"], r.config["T"], given)]
    return [r for r in found if all(r.config[name] == value for name, value in settings.items())]


def mean_sd(found: list[Record]) -> str:
    """Mean test accuracy in percent; with several seeds the standard deviation and their number."""
    if not found:
        return "not run"
    accuracy = [r.accuracy for r in found]
    if len(accuracy) == 1:
        return f"{accuracy[0]:.2f}"
    return f"{statistics.mean(accuracy):.2f} ± {statistics.stdev(accuracy):.2f} (n={len(accuracy)})"


def recorded(*, neuron_settings: dict | None = None, **settings) -> str:
    """The project's record of these settings, the neuron's being default but for those given: accuracy, n, and what was
    trained.

    Where the project holds several trainings, the widest network on most images for most epochs is shown: the choice
    never looks at an accuracy.
    """
    groups = defaultdict(list)
    for record in select(records.vouched(), **settings, neuron_settings=neuron_settings or {}):
        setting = Config.from_dict(record.config).but(seed=0)
        groups[setting.width, record.outcome["train_images"], setting.epochs, setting.hash].append(record)
    if not groups:
        return "no record"
    best = groups[max(groups)]
    return f"{mean_sd(best)}; {training(best[0])}"


def whole(neuron: str, T: int, settings: dict) -> dict | None:
    """These settings with the neuron's defaults filled in; None where the neuron has no such setting."""
    try:
        return Config(neuron=neuron, T=T, neuron_settings=settings).neuron_settings
    except ConfigError:
        return None


def training(record: Record) -> str:
    """What was trained, in a few words."""
    c = record.config
    return f"{c['epochs']} epochs, width {c['width']:g}, {record.outcome['train_images']:,} images"


def results() -> pd.DataFrame:
    """Every training that the project vouches for, seeds together: what the README shows."""
    groups = defaultdict(list)
    for record in records.vouched():
        groups[Config.from_dict(record.config).but(seed=0).json].append(record)
    rows = []
    for group in groups.values():
        c, first = group[0].config, group[0]
        rates = [statistics.mean(r.outcome["firing_rates"].values()) for r in group]
        rows.append({"Dataset": LABELS.get(c["dataset"], c["dataset"]),
                     "Network": ARCHITECTURES.get(c["network"], c["network"]), "T": c["T"],
                     "Neuron": c["neuron"].upper(), "Training": f"{training(first)}, lr {c['lr']:g}",
                     "Test accuracy, %": mean_sd(group), "Firing rate": f"{statistics.mean(rates):.3f}",
                     "Parameters": f"{first.outcome['parameters']:,}",
                     "Minutes a run": f"{statistics.mean(r.provenance['seconds'] for r in group) / 60:.0f}",
                     "Device": first.provenance["device"]})
    return pd.DataFrame(rows)


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
    text = (f"This run: preset {settings.preset}, dataset {', '.join(datasets)}, {runs[0].config['epochs']} epochs, "
            f"width {', '.join(f'{width:g}' for width in widths)}, "
            f"{settings.seeds} seed{'s' * (settings.seeds > 1)}; test accuracy of the last epoch in percent.")
    if any(name.startswith("digits") for name in datasets):
        text += " These are 8 x 8 handwritten digits, not CIFAR: the numbers show that everything works, nothing more."
    elif settings.preset != "paper" or settings.changes:
        text += " This is not the paper's setting: the numbers are no reproduction of it."
    return text


def save(table: pd.DataFrame, name: str, note: str):
    """figures/NAME.md, .csv and .tex, each whole or not at all."""
    texts = {"md": f"{table.to_markdown(index=False, disable_numparse=True)}\n\n{note}\n",
             "csv": table.to_csv(index=False),
             "tex": table.to_latex(index=False, escape=True, caption=note.replace("%", r"\%"), label=f"tab:{name}")}
    for ending, text in texts.items():
        records.write(records.folder("figures") / f"{name}.{ending}", text.encode())


def shown(table: pd.DataFrame):
    """The table as a notebook output without random ids."""
    from IPython.display import Markdown

    return Markdown(table.to_markdown(index=False, disable_numparse=True))
