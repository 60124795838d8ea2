"""Which runs make up a table or a figure, at which preset.

A notebook's parameters become `Settings`; `table1(settings)` and its like turn them into the grid of Configs, which
`run_all` runs. An ablation is a list of rows, each with the settings of the STAA neuron that it tries, on one network
and dataset.
"""

from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import Any

from . import data
from .config import Config
from .networks import NETWORKS, NEURONS
from .presets import PARAMETERS, PRESETS, SMOKE, Settings, assigned, settings
from .runner import run_all
from .settings import ConfigError, one_of, settings_of

__all__ = ["ITEMS", "PARAMETERS", "PRESETS", "SMOKE", "Settings", "assigned", "run_all", "settings"]

#: Table 1's own rows.
TABLE1 = [("vgg13", 2), ("vgg13", 4), *product(["resnet19", "resnet20"], [1, 2, 4])]

#: A row's neuron and, for comparison, the plain one; and the readings of eq. 14.
TWINS, READINGS = ["staa", "lif"], ["staa", "staa-leaky"]

#: The networks of the paper's ablations (section 4.3) are ResNet-20 at T = 4; a study names its dataset and its rows,
#: (label, neuron_settings). The label is the one of the paper's numbers in data/paper.
ABLATED: dict[str, Any] = dict(network="resnet20", T=4, neuron="staa")

#: What "smoke" sets for every ablation: half the images in small batches, so that many rows and seeds are affordable.
SMOKE_ABLATION = dict(train_images=720, batch_size=16, epochs=2)

#: Figure 2, where PE is added. Which letter is which place is our reading, and so is that the other blocks stay on:
#: without them (c) and (e) are one neuron. "a'" is our control, (c) without its PE.
FIGURE2: list[tuple[str, dict]] = [("a", dict(gc=False, pe=False, sa=False, beta=0.0)), ("a'", dict(pe=False)),
           ("b", dict(pe_place="membrane")), ("c", dict(pe_place="input")),
           ("d", dict(pe_place="both")), ("e", dict(pe_place="output"))]

#: Section 4.3, how PE is made.
POSITION_ENCODING = [(kind, dict(pe_kind=kind)) for kind in ("learned", "fixed")]

#: Table 2's own rows, as ImageNet is trained: the paper gives 300 epochs, the rest is our choice.
TABLE2 = ["resnet18", "resnet34"]
IMAGENET = dict(image_size=224, augment="imagenet", batch_size=256, weight_decay=1e-4)
SMOKE_IMAGENET = dict(augment="imagenet", epochs=3, batch_size=16)

#: Table 4, the blocks. With all of them off, the neuron is the plain LIF.
TABLE4 = [("baseline", dict(gc=False, pe=False, sa=False, beta=0.0)),
          ("GC", dict(gc=True, pe=False, sa=False, beta=0.0)),
          ("GC + PE", dict(gc=True, pe=True, sa=False, beta=0.0)),
          ("GC + PE + TSRD", dict(gc=True, pe=True, sa=False, beta=0.1)),
          ("GC + PE + SA", dict(gc=True, pe=True, sa=True, beta=0.0)),
          ("GC + PE + SA + TSRD", dict(gc=True, pe=True, sa=True, beta=0.1))]

#: Figure 3, the probability of TSRD; 0 is our addition.
FIGURE3 = [(f"{beta:g}", dict(beta=beta)) for beta in (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)]

#: Figure 5, the scaling coefficient of GC. Which values the paper drew is lost; these are ours.
FIGURE5 = [(str(r), dict(r=r)) for r in (1, 2, 4, 8, 16)]

#: What Table 4's rows add, one block each: (row, the row without it).
TABLE4_STEPS = {"GC": ("GC", "baseline"), "PE": ("GC + PE", "GC"), "TSRD without SA": ("GC + PE + TSRD", "GC + PE"),
                "SA": ("GC + PE + SA", "GC + PE"), "SA with TSRD": ("GC + PE + SA + TSRD", "GC + PE + TSRD"),
                "TSRD": ("GC + PE + SA + TSRD", "GC + PE + SA"), "all": ("GC + PE + SA + TSRD", "baseline")}

#: The introduction's claims on convergence. LIF is Table 4's baseline, so that these are three of its rows.
CONVERGENCE = [("LIF", TABLE4[0][1]), ("STAA", TABLE4[5][1]), ("STAA without TSRD", TABLE4[4][1])]

#: Parts of the aggregator, each with the leak of eq. 1 and without one, also in the steps that TSRD drops: (neuron, its
#: settings). The last pair is eq. 14 as `variants.LeakySTAALIF` reads it, and as `STAALIF` does.
LEAK: dict[str, tuple[tuple[str, dict], tuple[str, dict]]] = {
    "LIF": (("staa", TABLE4[0][1]), ("lif", dict(decay=1.0))),
    "GC + PE + TSRD": (("staa-leaky", dict(sa=False)), ("staa", dict(sa=False, decay=1.0))),
    "GC + PE + SA + TSRD": (("staa-leaky", {}), ("staa", {}))}

#: Table 3's own rows, at T = 16; and what is flipped too, as in MPBN's public code [lineage].
TABLE3, FLIP = {"cifar10dvs": ["resnet20", "vgg13"], "dvsgesture": ["vgg13"]}, {"cifar10dvs": {"augment": "flip+roll"}}
#: FSTA's comparison: label -> neuron and its settings. "FSTA's LIF" is the neuron of its code without the module, which
#: fires at half the potential of "LIF": what the module changes is seen beside that one.
FSTA = {"LIF": ("lif", {}), "FSTA's LIF": ("fsta", dict(temporal=False, spatial=False, slope=3.0)),
        "FSTA": ("fsta", {}), "STAA": ("staa", {})}

#: The siblings' smoke: digits in their own 8 x 8. A comparison needs a spread, so they take two seeds or more.
SMALL, LEAST_SEEDS = dict(image_size=8, width=1 / 8), 2

#: How STAtten is trained; a tenth of the epochs is warm-up. Weight decay is our choice.
TRANSFORMER = dict(neuron="statten", optimizer="adamw", lr=3e-4, weight_decay=0.01, label_smoothing=0.1)
#: The same on digits of 8 x 8 [ours].
SMALL_TRANSFORMER = TRANSFORMER | SMALL | dict(lr=5e-3, batch_size=32, augment="none")

def table1(settings: Settings) -> list[Config]:
    """Table 1: each own row with STAA and, for comparison, with the plain LIF neuron; every seed."""
    cells = product(settings.datasets("cifar10", "cifar100"), TABLE1, TWINS)
    return settings.runs("table1", [dict(dataset=dataset, network=network, T=T, neuron=neuron)
                                    for dataset, (network, T), neuron in cells], {})


def table2(settings: Settings) -> list[Config]:
    """Table 2: ImageNet, the folder "imagenet" of images; in smoke the folder that `samples.digit_images` writes."""
    smoke = settings.preset == "smoke"
    item = SMOKE_IMAGENET if smoke else IMAGENET | (dict(epochs=300) if settings.preset == "paper" else {})
    folder = "imagefolder:digits64" if smoke else "imagefolder:imagenet"
    return settings.runs("table2", [dict(network=network, T=4, neuron=neuron)
                                    for network, neuron in product(TABLE2, TWINS)], {"dataset": folder} | item)


def ablation(item: str, rows: list[tuple[str, dict]], dataset: str) -> Callable[[Settings], list[Config]]:
    """An ablation's runs: each row, every seed; the reader may choose another dataset, network or T for all of them, or
    a neuron that has what the rows vary."""
    def grid(settings: Settings) -> list[Config]:
        neuron = settings.changes.get("neuron", ABLATED["neuron"])
        for name in sorted({name for _, row in rows for name in row} - settings_of(NEURONS[neuron]).keys()):
            raise ConfigError(f"neuron of {item} must have the setting {name}, which it varies, got {neuron!r}")
        own = [dict(dataset=name, neuron_settings=row) for name in settings.datasets(dataset) for _, row in rows]
        return settings.runs(item, own, ABLATED | (SMOKE_ABLATION if settings.preset == "smoke" else {}))

    grid.__name__ = item
    return grid


#: Figure 2: the place of PE, CIFAR-10.
figure2 = ablation("figure2", FIGURE2, "cifar10")
#: Section 4.3: learnable against fixed PE, CIFAR-10.
position_encoding = ablation("position_encoding", POSITION_ENCODING, "cifar10")
#: Table 4: six combinations of GC, PE, SA and TSRD, CIFAR-100.
table4 = ablation("table4", TABLE4, "cifar100")
#: Figure 3: the probability of TSRD, CIFAR-10.
figure3 = ablation("figure3", FIGURE3, "cifar10")
#: Figure 5: the scaling coefficient r of GC, CIFAR-10.
figure5 = ablation("figure5", FIGURE5, "cifar10")
#: The introduction's claims: loss and accuracy by epoch. The paper names no dataset; ours is Table 4's.
convergence = ablation("convergence", CONVERGENCE, "cifar100")


def leak(settings: Settings) -> list[Config]:
    """Eq. 14 in two readings: parts of the aggregator with a leak and without, on Table 4's network and data; every
    seed."""
    rows = [dict(dataset=dataset, neuron=neuron, neuron_settings=own)
            for dataset in settings.datasets("cifar100") for pair in LEAK.values() for neuron, own in pair]
    return settings.runs("leak", rows, ABLATED | (SMOKE_ABLATION if settings.preset == "smoke" else {}))


def energy(settings: Settings) -> list[Config]:
    """Section 4.5: ResNet-20 at T = 4 on CIFAR-100, with STAA and, for comparison, with the plain LIF neuron; every
    seed. The parameters choose another network, dataset or T."""
    rows = [dict(dataset=dataset, neuron=neuron) for dataset, neuron in product(settings.datasets("cifar100"), TWINS)]
    return settings.runs("energy", rows, {"network": "resnet20", "T": 4})


def inside(settings: Settings) -> list[Config]:
    """What the aggregator does in trained networks: both readings of eq. 14, trained as `energy` trains its networks;
    every seed."""
    cells = product(settings.datasets("cifar100"), READINGS)
    rows = [dict(dataset=dataset, neuron=neuron) for dataset, neuron in cells]
    return settings.runs("inside", rows, {"network": "resnet20", "T": 4})


def table3(settings: Settings, item: str = "table3") -> list[Config]:
    """Table 3: each own row with STAA and with the plain LIF neuron, T = 16, every seed. In smoke, and on a dataset
    that the paper does not have, both networks."""
    datasets = settings.datasets("cifar10dvs", "dvsgesture", smoke="digits-dvs")
    for name in datasets:
        one_of(f"dataset of {item}", name, [known for known, about in data.DATASETS.items() if about.sensor])
    rows = [dict(dataset=name, network=network, T=16, neuron=neuron) | FLIP.get(name, {})
            for name in datasets for network in TABLE3.get(name, ["resnet20", "vgg13"]) for neuron in TWINS]
    return settings.runs(item, rows, {})


def figure4(settings: Settings) -> list[Config]:
    """Figure 4: STAA and LIF on CIFAR10-DVS, every seed. The paper names no network; we take Table 3's VGG-13."""
    if settings.changes.get("dataset") == "dvsgesture":
        raise ConfigError("figure4 has no run with dataset=dvsgesture: it draws objects, as cifar10dvs has them")
    network = settings.changes.get("network", "vgg13")
    return [c for c in table3(settings, "figure4") if c.network == network and c.dataset != "dvsgesture"]


def fsta(settings: Settings) -> list[Config]:
    """FSTA: ResNet-20 at T = 4 on CIFAR-10 with each neuron of FSTA, every seed; in smoke ResNet-19 on 8 x 8 digits."""
    network = dict(SMALL, network="resnet19", lr=0.02) if settings.preset == "smoke" else dict(network="resnet20")
    rows = [dict(dataset=dataset, neuron=neuron, neuron_settings=own)
            for dataset in settings.datasets("cifar10") for neuron, own in FSTA.values()]
    return settings.runs("fsta", rows, {"T": 4} | (network if "network" not in settings.changes else {}), LEAST_SEEDS)


def transformers(settings: Settings, chunk: int, **item) -> list[Config]:
    """STAtten with joint attention over `chunk` steps and over one (spatial), and SDT, under equal conditions; every
    seed. A reader's network gives its size to all three."""
    asked = item | dict(settings.changes)
    network = asked.pop("network", "statten-2-256")
    one_of("network of statten", network, [n for n in NETWORKS if n.startswith(("statten", "sdt"))])
    epochs = asked.get("epochs", PRESETS[settings.preset]["epochs"])
    pools = {"pools": "0001"} if asked.get("image_size") == 8 else {}
    kinds = [("statten", {"chunk": chunk}), ("statten", {"chunk": 1}), ("sdt", {})]
    rows = [dict(network=kind + network[network.index("-"):], network_settings=pools | own) for kind, own in kinds]
    others = {name: value for name, value in settings.changes.items() if name != "network"}
    return replace(settings, changes=others).runs("statten", rows, {"warmup_epochs": epochs // 10} | asked, LEAST_SEEDS)


def statten(settings: Settings) -> list[Config]:
    """STAtten on static images, CIFAR-10 at T = 4 with c = 2; in smoke 8 x 8 digits."""
    item = SMALL_TRANSFORMER if settings.preset == "smoke" else TRANSFORMER
    return transformers(settings, 2, T=4, dataset=settings.datasets("cifar10")[0], **item)


def rows(settings: Settings) -> list[Config]:
    """STAtten's sequential task, at every preset: 8 x 8 digits, one row a step, joint attention over all steps."""
    one_of("augment of statten, whose digits row by row are never augmented,", settings.changes.get("augment", "none"),
           ["none"])
    settings = replace(settings, changes={"T": 8} | dict(settings.changes) | {"dataset": "digits-rows"})
    return transformers(settings, settings.changes["T"], **SMALL_TRANSFORMER)


def siblings(settings: Settings) -> list[Config]:
    """STAA, FSTA and STAtten on the same data, epochs and seeds: runs of `fsta` and of `statten`."""
    for name in {"network", "neuron"} & settings.changes.keys():
        raise ConfigError(f"{name} must be left out, for siblings takes those of fsta and statten")
    return ([c for c in fsta(settings) if c.neuron == "staa" or c.neuron == "fsta" and c.neuron_settings["spatial"]]
            + [c for c in statten(settings) if c.network_settings.get("chunk") == 2])


#: The items with runs, by the name of their notebook.
ITEMS = {item.__name__: item for item in (table1, table2, table3, table4, figure2, figure3, figure4, figure5,
                                          position_encoding, convergence, leak, inside, energy,
                                          fsta, siblings)}
ITEMS["statten"] = lambda settings: rows(settings) + statten(settings)
