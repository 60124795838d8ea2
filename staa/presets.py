"""A notebook's parameters: the preset, how many seeds, and what they change in every run.

`settings(globals())` in a notebook checks them and returns `Settings`, from which an item of `experiments` makes its
grid of Configs.
"""

import ast
from collections.abc import Mapping
from dataclasses import dataclass, fields
from types import ModuleType
from typing import Any, get_type_hints

from . import data
from .config import Config
from .networks import NETWORKS, NEURONS
from .settings import ConfigError, one_of, typed

#: What a preset sets; every other setting has Config's default. What each is for stands in the README.
PRESETS: dict[str, dict[str, Any]] = {
    "smoke": dict(dataset="digits", image_size=16, epochs=3, batch_size=32, lr=0.01),
    "short": dict(dataset="cifar10", augment="autoaugment", epochs=50, precision="bf16"),
    "paper": dict(dataset="cifar10", augment="autoaugment", epochs=500),
    "cut": dict(dataset="cifar10", train_images=10_000, width=1 / 4, augment="standard", epochs=3, batch_size=64,
                lr=0.02),
}

#: What "smoke" sets by network: narrow, and no smaller image than the network can halve.
SMOKE = {"vgg13": dict(width=1 / 8, image_size=32), "resnet19": dict(width=1 / 8, image_size=8),
         "resnet20": dict(width=1 / 4), **dict.fromkeys(["resnet18", "resnet34"], dict(width=1 / 8, image_size=64))}

#: What a preset sets beyond that for events, and "smoke" by network. 48 pixels and the roll are those of MPBN's public
#: code [lineage].
SMOKE_EVENTS = {"vgg13": dict(image_size=34)}
EVENTS = {"smoke": dict(image_size=17, width=1 / 8, train_images=300, epochs=4, batch_size=8, lr=0.02, augment="none"),
          "short": dict(image_size=48, augment="roll"), "paper": dict(image_size=48, augment="roll")}

#: What a notebook's parameters can be; which of them choose among an item's rows, and which would make rows alike.
PARAMETERS = {"preset", "seeds"} | {field.name for field in fields(Config)}
CHOOSING, VARIED = ["dataset", "network", "neuron", "T"], ["seed", "neuron_settings", "network_settings"]


@dataclass(frozen=True)
class Settings:
    """A notebook's parameters, checked: the preset, how many seeds, and what they change in every run."""

    preset: str
    seeds: int
    changes: Mapping

    def config(self, **item) -> Config:
        """The run that an item of a grid asks for. An item wins over the preset, the reader's parameters over both."""
        asked = item | dict(self.changes)
        preset, network, name = PRESETS[self.preset], asked.get("network", ""), asked.get("dataset", "")
        smoke = self.preset == "smoke"
        if smoke:
            preset = preset | SMOKE.get(network, {})
        if name in data.DATASETS and data.describe(name).sensor:
            preset = preset | EVENTS.get(self.preset, {}) | (SMOKE_EVENTS.get(network, {}) if smoke else {})
        return Config.from_dict(preset | asked)

    def datasets(self, *paper: str, smoke: str = PRESETS["smoke"]["dataset"]) -> list[str]:
        """The paper's datasets of an item; the preset's in smoke and cut; the reader's own where one is given."""
        if "dataset" in self.changes:
            return [self.changes["dataset"]]
        return {"smoke": [smoke], "cut": [PRESETS["cut"]["dataset"]]}.get(self.preset, list(paper))

    def runs(self, item: str, rows: list[dict], rest: dict[str, Any], seeds: int = 1) -> list[Config]:
        """The runs of an item: its rows with the `rest`, every seed, at least so many `seeds`; the reader's parameters
        leave rows out. Raises ConfigError where no row is left, or a parameter would make one run of several."""
        for name in [name for name in CHOOSING if name in self.changes and name in rows[0]]:
            own, value = sorted({str(row[name]) for row in rows}), self.changes[name]
            rows = [row for row in rows if row[name] == value]
            if not rows:
                raise ConfigError(f"{item} has no run with {name}={value}; here it can be {' or '.join(own)}")
        rows = [row | {"seed": seed} for row in rows for seed in range(max(self.seeds, seeds))]
        for name in VARIED:
            if name in self.changes and any(row.get(name) != rows[0].get(name) for row in rows):
                raise ConfigError(f"{name} must be left out, for {item} varies it itself, got {self.changes[name]!r}")
        return [self.config(**rest | row) for row in rows]


def settings(namespace: Mapping) -> Settings:
    """Read the parameters of the notebook that calls: `settings(globals())`.

    A parameter that is None keeps the preset's value. Raises ConfigError on a name that the notebook's parameters cell
    does not have (papermill itself only warns), and on a wrong type or name; what else is wrong, the item's grid does.
    """
    # The notebook's own cell comes first; papermill's, which begins the same way, after it.
    cells = [source for source in namespace.get("In", []) if source.startswith("# Parameters") and is_python(source)]
    here = {name for name in PARAMETERS & namespace.keys() if not isinstance(namespace[name], ModuleType)}
    known, *injected = [assigned(source) for source in cells] or [here]  # nbval keeps no In
    for name in sorted(set().union(*injected) - known):
        one_of("a parameter of this notebook", name, sorted(known))
    given = {name: namespace[name] for name in known if namespace[name] is not None}
    preset, seeds = given.pop("preset", None), given.pop("seeds", None)
    one_of("preset", preset, PRESETS)
    if type(seeds) is not int or seeds < 1:
        raise ConfigError(f"seeds, the number of seeds, must be a whole number of at least 1, got {seeds!r}")
    for name, value in given.items():
        typed(name, value, get_type_hints(Config)[name])
        if name in ("network", "neuron"):
            one_of(name, value, NETWORKS if name == "network" else NEURONS)
    return Settings(preset, seeds, given)


def is_python(source: str) -> bool:
    """Not a cell with a slip, which was mended and run again: Jupyter keeps both."""
    try:
        return bool(ast.parse(source))
    except SyntaxError:
        return False


def assigned(source: str) -> set[str]:
    """The names that a cell assigns at its top level."""
    return {name.id for node in ast.parse(source).body if isinstance(node, (ast.Assign, ast.AnnAssign))
            for name in ast.walk(node) if isinstance(name, ast.Name) and isinstance(name.ctx, ast.Store)}
