"""Config: everything that decides the outcome of one training run, validated, with a hash that names the run."""

import hashlib
import json
from collections.abc import Callable, Hashable
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cache
from typing import get_type_hints

from . import frames
from .data import AUGMENTATIONS, DATASETS, describe
from .networks import NETWORKS, NEURONS, build, full_settings, skeleton
from .settings import LARGEST, ConfigError, likeliest, one_of, reason, settings_of, typed

#: Settings that came after the first records: left out of the hash at this value, so that older runs keep their name.
LATER = {"microbatch": 0, "frames": "", "optimizer": "sgd", "network_settings": {}}
OPTIMIZERS = ("sgd", "adamw")
PRECISIONS = ("float32", "bf16")

#: Beyond these torch fails with a message of its own, or the machine with none.
MOST = dict.fromkeys(("lr", "weight_decay", "clip_norm"), LARGEST) | dict.fromkeys(
    ("T", "epochs", "batch_size", "microbatch", "train_images"), 2 ** 31 - 1) | {
        "image_size": 2 ** 16, "seed": 2 ** 63 - 1, "threads": 1024}


@dataclass(frozen=True)
class Config:
    """One training run. The same Config gives the same record, to the bit, on the same CPU.

    Raises ConfigError on an unknown name, a wrong type (the text "1e-3" for a number) or an impossible value.
    """

    # data
    dataset: str = "digits"            # a name of staa.data.DATASETS; "imagefolder:NAME" is the folder NAME
    image_size: int = 32               # pixels; CIFAR is 32
    train_images: int = 0              # 0: all; else a fixed subset, the same share of every class
    augment: str = "none"              # a name of staa.data.AUGMENTATIONS; of events some of staa.frames', "flip+roll"
    frames: str = ""                   # of events only: T bins of equal "count" (what "" becomes) or equal "time"
    # network
    network: str = "resnet20"          # a name of staa.networks.NETWORKS
    network_settings: dict = field(default_factory=dict)  # the network's own, like {"chunk": 4} of a statten
    width: float = 1.0                 # multiplies the channels of every layer
    neuron: str = "staa"               # a name of staa.networks.NEURONS
    neuron_settings: dict = field(default_factory=dict)  # the neuron's own, like {"r": 8}; the rest are its defaults
    T: int = 4                         # time steps
    # training: cosine schedule down to 0
    optimizer: str = "sgd"             # "sgd" or "adamw"
    epochs: int = 1
    batch_size: int = 128              # on all processes together
    microbatch: int = 0                # images that BN sees at once, gradients being accumulated; 0: the whole batch
    lr: float = 0.1
    momentum: float = 0.9              # of SGD; with AdamW its beta_1
    weight_decay: float = 5e-4
    warmup_epochs: int = 0             # the learning rate rises linearly over these epochs
    label_smoothing: float = 0.0
    clip_norm: float = 0.0             # 0: gradients are not clipped
    seed: int = 0
    # arithmetic
    precision: str = "float32"         # "bf16": mixed precision. On a GPU float32 convolves in TF32
    channels_last: bool = True
    threads: int = 1                   # of the CPU; it is here because sums depend on it in their last bits

    def __post_init__(self):
        for name, kind in get_type_hints(Config).items():
            object.__setattr__(self, name, typed(name, getattr(self, name), kind))
        base, _, folder = self.dataset.partition(":")
        if base not in DATASETS or bool(folder) != (":" in self.dataset) or folder and base != "imagefolder":
            raise ConfigError(f"dataset must be one of {', '.join(DATASETS)} or imagefolder:NAME, got {self.dataset!r}"
                              f"{likeliest(self.dataset, DATASETS)}")
        self._check_data(describe(self.dataset))
        one_of("optimizer", self.optimizer, OPTIMIZERS)
        one_of("precision", self.precision, PRECISIONS)
        for name, least in {"T": 1, "epochs": 1, "batch_size": 1, "image_size": 1, "threads": 1, "train_images": 0,
                            "microbatch": 0, "seed": 0, "warmup_epochs": 0, "clip_norm": 0, "weight_decay": 0}.items():
            if not getattr(self, name) >= least:
                raise ConfigError(f"{name} must be at least {least}, got {getattr(self, name)}")
        for name, most in MOST.items():
            if getattr(self, name) > most:
                raise ConfigError(f"{name} must be at most {most}, got {getattr(self, name)}")
        if not self.lr > 0:
            raise ConfigError(f"lr must be a finite number above 0, got {self.lr}")
        for name in ("momentum", "label_smoothing"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 0 and below 1, got {getattr(self, name)}")
        if self.warmup_epochs > self.epochs:
            raise ConfigError(f"warmup_epochs must not exceed epochs ({self.epochs}), got {self.warmup_epochs}")
        if self.dataset == "digits-rows" and self.image_size % self.T:
            raise ConfigError(f"image_size of digits-rows must be a multiple of T={self.T}, got {self.image_size}")
        self._check_network()

    def _check_data(self, about):
        """What the dataset decides: the size, how events become frames, and which augmentation there is."""
        if about.size and self.image_size != about.size:
            raise ConfigError(f"image_size of {self.dataset} must be {about.size}, got {self.image_size}")
        if not about.sensor:
            if self.frames:
                raise ConfigError(f"frames is a setting of events, and {self.dataset} holds images: leave it out, got "
                                  f"{self.frames!r}")
            return one_of("augment", self.augment, AUGMENTATIONS)
        if self.image_size > about.sensor:
            raise ConfigError(f"image_size of {self.dataset} must be at most {about.sensor}, got {self.image_size}")
        object.__setattr__(self, "frames", self.frames or frames.FRAMES[0])
        one_of("frames", self.frames, frames.FRAMES)
        names = self.augment.split("+")
        if self.augment != "none" and (len(set(names)) < len(names) or not set(names) <= set(frames.AUGMENTATIONS)):
            raise ConfigError(f"augment of {self.dataset} must be none, or some of {', '.join(frames.AUGMENTATIONS)} "
                              f"joined by +, got {self.augment!r}")
        if self.dataset == "dvsgesture" and "flip" in names:
            raise ConfigError("augment of dvsgesture must not hold flip: it makes a left hand of a right one, which is "
                              "another class")

    def _check_network(self):
        """Fill in the defaults of neuron and network, so that the record is whole, and let the network judge them."""
        for what, names in (("neuron", NEURONS), ("network", NETWORKS)):
            settings = full_settings(what, getattr(self, what), names, getattr(self, f"{what}_settings"))
            object.__setattr__(self, f"{what}_settings", settings)
        try:
            made = NETWORKS[self.network], NEURONS[self.neuron]
            known = min_size if all(isinstance(factory, Hashable) for factory in made) else min_size.__wrapped__
            least = known(*made, json.dumps(dict(network=self.network, neuron=self.neuron, T=self.T, width=self.width,
                                                 network_settings=self.network_settings, **self.neuron_settings)))
        except ValueError as error:
            raise ConfigError(reason(error)) from None
        except Exception as error:  # torch's, of a layer too large, or that of somebody's own network
            raise ConfigError(f"network {self.network} could not be built with width={self.width:g} and "
                              f"T={self.T}: {reason(error)}") from error
        if self.image_size < least:
            raise ConfigError(f"image_size of {self.network} must be at least {least}, got {self.image_size}")

    @property
    def json(self) -> str:
        """Canonical JSON: sorted keys, every setting written out."""
        return json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))

    @property
    def hash(self) -> str:
        settings = {name: value for name, value in asdict(self).items() if LATER.get(name, ...) != value}
        return hashlib.sha256(json.dumps(settings, sort_keys=True, separators=(",", ":")).encode()).hexdigest()[:12]

    @property
    def name(self) -> str:
        """Readable name of the run; the hash makes it unique."""
        dataset = self.dataset.replace(":", "_").replace("/", "_")
        return f"{dataset}-{self.network}-{self.neuron}-T{self.T}-s{self.seed}-{self.hash}"

    def __str__(self) -> str:
        return f"{self.dataset} {self.network} {self.neuron} T={self.T} seed={self.seed}"

    def __hash__(self) -> int:
        return hash(self.json)

    def but(self, **changes) -> "Config":
        """The same run with other settings; another neuron or network starts from its own defaults, another dataset
        from its own frames."""
        check_names(changes)
        if changes.get("dataset", self.dataset) != self.dataset:
            changes.setdefault("frames", "")
        for what in ("neuron", "network"):
            if changes.get(what, getattr(self, what)) != getattr(self, what):
                changes.setdefault(f"{what}_settings", {})
        return replace(self, **changes)

    @classmethod
    def from_dict(cls, settings: dict) -> "Config":
        check_names(settings)
        return cls(**settings)


@cache
def min_size(network: Callable, neuron: Callable, settings: str) -> int:
    """The least image size of the network that `build` makes of these settings, as JSON. Building it takes a while, and
    a grid has many alike. network, neuron: what the names in the settings stand for, which a reader may change."""
    return skeleton(lambda: build(**json.loads(settings))).min_size


def check_names(settings) -> None:
    allowed = [f.name for f in fields(Config)]
    for name in settings:
        if name not in allowed:
            belongs = [f"{what}_settings of {owner}" for what, names in (("neuron", NEURONS), ("network", NETWORKS))
                       for owner, made in names.items() if name in settings_of(made)]
            hint = f"; it belongs to the {belongs[0]}" if belongs else likeliest(name, allowed)
            raise ConfigError(f"a setting must be one of {', '.join(allowed)}, got {name!r}{hint}")
