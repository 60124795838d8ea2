"""Which runs make up a table or a figure, at which preset; and running them all.

A notebook's parameters become `Settings`; `table1(settings)` and its like turn them into the grid of Configs. An
ablation is a list of rows, each with the settings of the STAA neuron that it tries, on one network and dataset.
"""

import ast
import os
import queue
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import dataclass, fields
from itertools import product
from multiprocessing import get_context

import torch

from . import data, records, samples
from .config import Config, ConfigError
from .distributed import started
from .records import Record
from .train import run

#: What a preset sets; every other setting has Config's default. What each is for stands in the README.
PRESETS = {
    "smoke": dict(dataset="digits", image_size=16, epochs=4, batch_size=32, lr=0.01),
    "short": dict(dataset="cifar10", augment="autoaugment", epochs=50, precision="bf16"),
    "paper": dict(dataset="cifar10", augment="autoaugment", epochs=500),
    "cut": dict(dataset="cifar10", train_images=10_000, width=1 / 4, augment="standard", epochs=10, batch_size=64,
                lr=0.02),
}

#: What "smoke" sets by network: narrow, and no smaller image than the network can halve.
SMOKE = {"vgg13": dict(width=1 / 8, image_size=32), "resnet19": dict(width=1 / 8), "resnet20": dict(width=1 / 4),
         "resnet18": dict(width=1 / 8, image_size=64), "resnet34": dict(width=1 / 8, image_size=64)}

#: Table 1's own rows.
TABLE1 = [("vgg13", 2), ("vgg13", 4), ("resnet19", 1), ("resnet19", 2), ("resnet19", 4),
          ("resnet20", 1), ("resnet20", 2), ("resnet20", 4)]

#: The networks of the paper's ablations (section 4.3) are ResNet-20 at T = 4; a study names its dataset and its rows,
#: (label, neuron_settings). The label is the one of the paper's numbers in data/paper.
ABLATED = dict(network="resnet20", T=4, neuron="staa")

#: What "smoke" sets for every ablation: half the images in small batches, so that many rows and seeds are affordable.
SMOKE_ABLATION = dict(train_images=720, batch_size=16, epochs=2)

#: Figure 2, where PE is added. Which letter is which place is our reading, and so is that the other blocks stay on:
#: without them (c) and (e) are one neuron. "a'" is our control, (c) without its PE.
FIGURE2 = [("a", dict(gc=False, pe=False, sa=False, beta=0.0)), ("a'", dict(pe=False)),
           ("b", dict(pe_place="membrane")), ("c", dict(pe_place="input")),
           ("d", dict(pe_place="both")), ("e", dict(pe_place="output"))]

#: Section 4.3, how PE is made.
POSITION_ENCODING = [("learned", dict(pe_kind="learned")), ("fixed", dict(pe_kind="fixed"))]

#: Table 2's own rows, as ImageNet is trained: the paper gives 300 epochs, the rest is our choice.
TABLE2 = ["resnet18", "resnet34"]
IMAGENET = dict(T=4, image_size=224, augment="imagenet", batch_size=256, weight_decay=1e-4)
SMOKE_IMAGENET = dict(T=4, augment="imagenet", epochs=3, batch_size=16)

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


#: What a notebook's parameters can be.
PARAMETERS = {"preset", "seeds"} | {field.name for field in fields(Config)}


@dataclass(frozen=True)
class Settings:
    """A notebook's parameters, checked: the preset, how many seeds, and what they change in every run."""

    preset: str
    seeds: int
    changes: Mapping

    def config(self, **item) -> Config:
        """The run that an item of a grid asks for. An item wins over the preset, the reader's parameters over both."""
        asked = item | dict(self.changes)
        narrow = SMOKE.get(asked.get("network"), {}) if self.preset == "smoke" else {}
        return Config.from_dict(PRESETS[self.preset] | narrow | asked)

    def datasets(self, *paper: str) -> list[str]:
        """The paper's datasets of an item; the preset's in smoke and cut; the reader's own where one is given."""
        if "dataset" in self.changes:
            return [self.changes["dataset"]]
        return [PRESETS[self.preset]["dataset"]] if self.preset in ("smoke", "cut") else list(paper)

    def wants(self, **item) -> bool:
        """Whether the reader's parameters leave this item in; `-p network resnet20` leaves the other networks out."""
        return all(self.changes.get(name, value) == value for name, value in item.items())


def settings(namespace: Mapping) -> Settings:
    """Read the parameters of the notebook that calls: `settings(globals())`.

    A parameter that is None keeps the preset's value. Raises ConfigError on a name that the notebook's parameters cell
    does not have (papermill itself only warns) and on whatever the preset or Config does not allow.
    """
    # The notebook's own cell comes first; papermill's, which begins the same way, after it.
    cells = [source for source in namespace.get("In", []) if source.startswith("# Parameters")]
    known, *injected = [assigned(source) for source in cells] or [PARAMETERS & namespace.keys()]  # nbval keeps no In
    for name in set().union(*injected) - known:
        raise ConfigError(f"a parameter of this notebook must be one of {', '.join(sorted(known))}, got {name!r}")
    given = {name: namespace[name] for name in known if namespace[name] is not None}
    preset, seeds = given.pop("preset", None), given.pop("seeds", None)
    if preset not in PRESETS:
        raise ConfigError(f"preset must be one of {', '.join(PRESETS)}, got {preset!r}")
    if type(seeds) is not int or seeds < 1:
        raise ConfigError(f"seeds, the number of seeds, must be a whole number of at least 1, got {seeds!r}")
    found = Settings(preset, seeds, given)
    found.config()  # complains now, before any work
    return found


def assigned(source: str) -> set[str]:
    """The names that a cell assigns at its top level."""
    return {target.id for node in ast.parse(source).body if isinstance(node, ast.Assign) for target in node.targets}


def table1(settings: Settings) -> list[Config]:
    """Table 1: each own row with STAA and, for comparison, with the plain LIF neuron; every seed."""
    return [settings.config(dataset=dataset, network=network, T=T, neuron=neuron, seed=seed)
            for dataset, (network, T), neuron, seed in product(settings.datasets("cifar10", "cifar100"), TABLE1,
                                                               ["staa", "lif"], range(settings.seeds))
            if settings.wants(network=network, T=T, neuron=neuron)]


def table2(settings: Settings) -> list[Config]:
    """Table 2: ImageNet, the folder "imagenet" of images; in smoke the folder that `samples.digit_images` writes."""
    smoke = settings.preset == "smoke"
    item = SMOKE_IMAGENET if smoke else IMAGENET | (dict(epochs=300) if settings.preset == "paper" else {})
    folder = settings.changes.get("dataset", "imagefolder:digits64" if smoke else "imagefolder:imagenet")
    return [settings.config(**item, dataset=folder, network=network, neuron=neuron, seed=seed)
            for network, neuron, seed in product(TABLE2, ["staa", "lif"], range(settings.seeds))
            if settings.wants(network=network, neuron=neuron)]


def ablation(settings: Settings, rows: list[tuple[str, dict]], dataset: str) -> list[Config]:
    """An ablation's runs: each row, every seed; the reader may choose another dataset, network or T for all of them."""
    small = SMOKE_ABLATION if settings.preset == "smoke" else {}
    return [settings.config(**ABLATED, **small, dataset=name, neuron_settings=row, seed=seed)
            for name, (_, row), seed in product(settings.datasets(dataset), rows, range(settings.seeds))]


def figure2(settings: Settings) -> list[Config]:
    """Figure 2: the place of PE, CIFAR-10."""
    return ablation(settings, FIGURE2, "cifar10")


def position_encoding(settings: Settings) -> list[Config]:
    """Section 4.3: learnable against fixed PE, CIFAR-10."""
    return ablation(settings, POSITION_ENCODING, "cifar10")


def table4(settings: Settings) -> list[Config]:
    """Table 4: six combinations of GC, PE, SA and TSRD, CIFAR-100."""
    return ablation(settings, TABLE4, "cifar100")


def figure3(settings: Settings) -> list[Config]:
    """Figure 3: the probability of TSRD, CIFAR-10."""
    return ablation(settings, FIGURE3, "cifar10")


def figure5(settings: Settings) -> list[Config]:
    """Figure 5: the scaling coefficient r of GC, CIFAR-10."""
    return ablation(settings, FIGURE5, "cifar10")


def convergence(settings: Settings) -> list[Config]:
    """The introduction's claims: loss and accuracy by epoch. The paper names no dataset; ours is Table 4's."""
    return ablation(settings, CONVERGENCE, "cifar100")


def energy(settings: Settings) -> list[Config]:
    """Section 4.5: ResNet-20 at T = 4 on CIFAR-100, with STAA and, for comparison, with the plain LIF neuron; every
    seed. The parameters choose another network, dataset or T."""
    item = {"network": "resnet20", "T": 4} | {k: v for k, v in settings.changes.items() if k in ("network", "T")}
    return [settings.config(**item, dataset=dataset, neuron=neuron, seed=seed)
            for dataset, neuron, seed in product(settings.datasets("cifar100"), ["staa", "lif"], range(settings.seeds))
            if settings.wants(neuron=neuron)]


#: The items with runs, by the name of their notebook.
ITEMS = {item.__name__: item for item in (table1, table2, table4, figure2, figure3, figure5, position_encoding,
                                          convergence, energy)}


def run_all(configs: list[Config], *, log: Callable[[str], None] = print) -> list[Record]:
    """The records of these runs, in order. On CPU as many at once as cores allow, on a GPU one after the other.

    Logs one line an epoch and one bar after each run. A run that fails does not stop the others; the first failure is
    raised once all have ended, and what has ended stays in runs/.
    """
    found = {config: record for config in configs if (record := records.find(config))}
    missing = [config for config in configs if config not in found]
    if started():  # one run after the other on all of torchrun's processes, which end together where one fails
        return [run(config, log=log) for config in configs]
    for dataset in dict.fromkeys(config.dataset for config in missing):
        if dataset == "imagefolder:digits64":
            samples.digit_images()
        data.load(dataset, train=True)  # one clear sentence now rather than one from every run
    log(bar(len(found), len(configs), "complete before" if found else ""))
    failures = []
    for config, outcome in _outcomes(missing, log):
        if isinstance(outcome, Exception):
            failures.append(outcome)
            log(f"{config}: failed: {outcome}")
        else:
            found[config] = outcome
            log(bar(len(found), len(configs), str(config)))
    if failures:
        raise failures[0]
    return [found[config] for config in configs]


def _outcomes(configs, log):
    """(config, Record or Exception) as each run ends."""
    threads = max((config.threads for config in configs), default=1)
    jobs = min(1 if torch.cuda.is_available() else (os.cpu_count() or 1) // threads, len(configs))
    if jobs <= 1:
        for config in configs:
            yield config, attempt(config, log)
        return
    context = get_context("spawn")
    with context.Manager() as manager:
        lines = manager.Queue()
        with ProcessPoolExecutor(jobs, mp_context=context) as pool:
            # Longest first, so that no core is left with a long run at the end.
            order = sorted(configs, key=lambda c: c.T * (c.network == "resnet19") + c.T, reverse=True)
            pending = {pool.submit(attempt, config, lines.put): config for config in order}
            while pending:
                done, _ = wait(pending, timeout=0.2, return_when=FIRST_COMPLETED)
                while True:
                    try:
                        log(lines.get_nowait())
                    except queue.Empty:
                        break
                for future in done:
                    yield pending.pop(future), future.exception() or future.result()


def attempt(config: Config, log) -> Record | Exception:
    try:
        return run(config, log=log)
    except (RuntimeError, OSError) as error:
        return error


def bar(done: int, total: int, what: str = "") -> str:
    filled = 20 * done // max(total, 1)
    return f"[{'#' * filled}{'.' * (20 - filled)}] {done}/{total} runs  {what}".rstrip()
