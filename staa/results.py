"""Every training on real data that the project vouches for, as the README shows them."""

import statistics
from collections import defaultdict

import pandas as pd

from . import records
from .config import Config
from .experiments import ABLATED, FIGURE2, POSITION_ENCODING, TABLE4
from .records import Record
from .tables import (
    ARCHITECTURES,
    LABELS,
    NAMES,
    firing_rate,
    full_settings,
    mean_and_n,
    paper,
    paper_section,
    paper_table1,
    training,
)


def results() -> pd.DataFrame:
    """Every training that the project vouches for, seeds together: what the README shows."""
    groups = defaultdict(list)
    for record in records.vouched():
        groups[Config.from_dict(record.config).but(seed=0).json].append(record)
    rows = []
    for group in sorted(groups.values(), key=rank):
        c, first = group[0].config, group[0]
        rows.append({"Dataset": NAMES.get(c["dataset"], c["dataset"]),
                     "Network": ARCHITECTURES.get(c["network"], c["network"]), "T": c["T"],
                     "Neuron": own_settings(c),
                     "Training": f"{training(first)}, batch {c['batch_size']}, lr {c['lr']:g}, "
                                 f"augmentation {c['augment']}",
                     "Test accuracy, %": mean_and_n(group), "Paper": printed(c),
                     "Firing rate": f"{statistics.mean(map(firing_rate, group)):.3f}",
                     "Parameters": f"{first.outcome['parameters']:,}",
                     "Minutes of work a run": f"{statistics.mean(sum(r.seconds) for r in group) / 60:.0f}",
                     "Device": first.provenance["device"]})
    return pd.DataFrame(rows)


def rank(group: list[Record]) -> tuple:
    c = group[0].config  # the smaller network first
    return c["dataset"], c["network"], c["T"], group[0].outcome["parameters"], own_settings(c), str(c)


def printed(config: dict) -> str:
    """The paper's accuracy, trained its own way, for this network, T and neuron: section 4.3's for its dataset, else a
    row of Table 4, or of Table 1."""
    readings = [{}, {"neuron": "staa-leaky"}]  # of the same lost formula
    if any(all(config[name] == value for name, value in (ABLATED | other).items()) for other in readings):
        sections = [(FIGURE2, "pe_place"), (POSITION_ENCODING, "pe_kind")] if config["dataset"] == "cifar10" else []
        texts = [paper_section(item)[label] for rows, item in sections for label, row in rows
                 if config["neuron_settings"] == full_settings("staa", row) and label in paper_section(item)]
        if texts:
            return f"{' and '.join(texts)} (section 4.3)"
        for (_, row), line in zip(TABLE4, paper("table4").itertuples()):
            if config["neuron_settings"] == full_settings("staa", row):
                return f"{line.accuracy} on {LABELS[line.dataset]} (Table 4)"
    if config["dataset"] in LABELS and own_settings(config) in ("STAA", "STAA-LEAKY"):
        rows = paper_table1()
        rows = rows[(rows.Method == "STAA-SNN") & (rows.Architecture == ARCHITECTURES.get(config["network"]))
                    & (rows["T"] == str(config["T"]))]
        return f"{rows.iloc[0]['Paper: ' + LABELS[config['dataset']]]} (Table 1)" if len(rows) else "none"
    return "none"


def own_settings(config: dict) -> str:
    """What differs from the neuron's defaults, as "STAA, gc = False"; with every block off it is the plain LIF."""
    if config["neuron_settings"] == full_settings("staa", dict(TABLE4)["baseline"]):
        return "STAA, all blocks off: LIF"
    default = full_settings(config["neuron"], {})
    assert default is not None, "the neuron of a record exists"
    others = [f"{k} = {config['neuron_settings'][k]}" for k in default if config["neuron_settings"][k] != default[k]]
    return ", ".join([config["neuron"].upper(), *others])
