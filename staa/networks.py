"""The paper's networks: VGG-13, ResNet-19, ResNet-20 (CIFAR and event data) and ResNet-18, ResNet-34 (ImageNet).

Every network takes images (B, C, H, W), repeated over T, or frames (B, T, C, H, W), and returns logits (B, K): the
linear head's at every time step, averaged over time. Inside, time is the first axis. Convolutions and BN see time and
batch together; a neuron stands wherever a ReLU would, and is handed in as `neuron(channels, T=T)`, the way torchvision
hands in `norm_layer`. The layouts are those of FSTA-SNN's public code, of the same authors; VGG-13 is the standard one,
and where their ImageNet stem averages, ours takes the maximum, which of spikes is a spike [ours].
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .attention import STAALIF
from .fsta import FSTALIF
from .neuron import LIF
from .norm import BatchNorm2d
from .pooling import AvgPool2d
from .settings import ConfigError, one_of, reason, settings_of, typed

#: Neurons by name. A new one is added here: any module built as `neuron(channels, T=T, **settings)`.
NEURONS: dict[str, Callable[..., nn.Module]] = {"lif": LIF, "staa": STAALIF, "fsta": FSTALIF}


class Steps(nn.Sequential):
    """Layers without memory, applied to all time steps at once: (T, B, C, H, W) in and out."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(0, 1)).unflatten(0, x.shape[:2])


def conv3x3(c_in: int, c_out: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(c_in, c_out, 3, stride, padding=1, bias=False)


def conv1x1(c_in: int, c_out: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(c_in, c_out, 1, stride, bias=False)


class SpikingNetwork(nn.Module):
    """The frame of every network: repeat over T, features, global average pool, head, average over time."""

    head: nn.Linear
    config: Any = None  # the staa.Config of a network that was trained or loaded

    def __init__(self, neuron: Callable[..., nn.Module], in_channels: int, T: int, min_size: int):
        super().__init__()
        self._make_neuron = neuron
        self.in_channels, self.T, self.min_size = in_channels, T, min_size

    def neuron(self, channels: int) -> nn.Module:
        make = getattr(self._make_neuron, "func", self._make_neuron)
        try:
            layer = self._make_neuron(channels, T=self.T)
        except Exception as error:
            if isinstance(error, ValueError) and str(make.__module__).startswith(f"{__package__}."):
                raise  # this package's neurons say it in one sentence
            raise ConfigError(f"neuron {name_of(make)} could not be built as neuron(channels, T=T): "
                              f"{reason(error)}") from error
        if not isinstance(layer, nn.Module):
            raise ConfigError(f"neuron {name_of(make)} must build a torch module, got {type(layer).__name__}")
        setattr(layer, "is_neuron", True)  # what `neurons` looks for
        return layer

    def forward(self, x: Tensor) -> Tensor:
        x = self.head(self.features(self.over_time(x)).mean((-2, -1)))  # (T, B, K)
        return x.mean(0)

    def features(self, x: Tensor) -> Tensor:
        """(T, B, C_in, H, W) to the maps that the head sees pooled, (T, B, C, h, w); each network's own."""
        raise NotImplementedError

    def over_time(self, x: Tensor) -> Tensor:
        """Images or frames as (T, B, C, H, W)."""
        shape = tuple(x.shape)
        frames = x.dim() == 5
        if x.dim() not in (4, 5) or shape[-3] != self.in_channels or frames and shape[1] != self.T:
            raise ValueError(f"this network takes images (B, C={self.in_channels}, H, W) or frames "
                             f"(B, T={self.T}, C={self.in_channels}, H, W), got {shape}")
        if not x.is_floating_point():
            raise ValueError(f"this network takes floating-point images, got {x.dtype}; of bytes, x.float() / 255")
        if min(shape[-2:]) < self.min_size:
            raise ValueError(f"this network needs images of at least {self.min_size} x {self.min_size}, "
                             f"got {shape[-2]} x {shape[-1]}")
        return x.transpose(0, 1) if frames else x.expand(self.T, *shape)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with BN; a neuron after the first and after the addition of the shortcut."""

    def __init__(self, neuron: Callable[[int], nn.Module], c_in: int, c_out: int, stride: int, pool_shortcut: bool):
        super().__init__()
        self.conv1 = Steps(conv3x3(c_in, c_out, stride), BatchNorm2d(c_out))
        self.neuron1 = neuron(c_out)
        self.conv2 = Steps(conv3x3(c_out, c_out), BatchNorm2d(c_out))
        self.neuron2 = neuron(c_out)
        if stride == 1 and c_in == c_out:
            self.shortcut: nn.Module = nn.Identity()
        elif pool_shortcut:
            self.shortcut = Steps(AvgPool2d(stride, ceil_mode=True), conv1x1(c_in, c_out), BatchNorm2d(c_out))
        else:
            self.shortcut = Steps(conv1x1(c_in, c_out, stride), BatchNorm2d(c_out))

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv2(self.neuron1(self.conv1(x)))
        return self.neuron2(out + self.shortcut(x))


class ResNet(SpikingNetwork):
    """stem ("three", "one" or "imagenet"), then stages of BasicBlocks: blocks, channels and strides, one a stage."""

    def __init__(self, neuron, num_classes: int, in_channels: int, T: int, width: float, *, stem: str,
                 blocks: list[int], channels: list[int], strides: list[int], pool_shortcut: bool):
        channels = scaled(channels, width)
        c = channels[0]
        super().__init__(neuron, in_channels, T, min_size={"one": 4, "three": 16, "imagenet": 32}[stem])
        if stem == "imagenet":
            layers = [Steps(nn.Conv2d(in_channels, c, 7, 2, padding=3, bias=False), BatchNorm2d(c)),
                      self.neuron(c), Steps(nn.MaxPool2d(3, 2, padding=1))]  # a maximum of spikes is a spike
        else:
            layers = [Steps(conv3x3(in_channels, c), BatchNorm2d(c)), self.neuron(c)]
        if stem == "three":
            for _ in range(2):
                layers += [Steps(conv3x3(c, c), BatchNorm2d(c)), self.neuron(c)]
            layers += [Steps(AvgPool2d(2))]
        self.stem = nn.Sequential(*layers)
        self.stages = nn.Sequential()
        for n, c_out, stride in zip(blocks, channels, strides):
            for i in range(n):
                self.stages.append(BasicBlock(self.neuron, c, c_out, stride if i == 0 else 1, pool_shortcut))
                c = c_out
        self.head = nn.Linear(c, num_classes)

    def features(self, x: Tensor) -> Tensor:
        return self.stages(self.stem(x))


class VGG(SpikingNetwork):
    """Stages of two 3x3 convolutions and an average pool: VGG-13 with channels 64, 128, 256, 512, 512."""

    def __init__(self, neuron, num_classes: int, in_channels: int, T: int, width: float, *, channels: list[int]):
        super().__init__(neuron, in_channels, T, min_size=2 ** len(channels))
        self.stages = nn.Sequential()
        c = in_channels
        for c_out in scaled(channels, width):
            for _ in range(2):
                self.stages.append(Steps(conv3x3(c, c_out), BatchNorm2d(c_out)))
                self.stages.append(self.neuron(c_out))
                c = c_out
            self.stages.append(Steps(AvgPool2d(2)))
        self.head = nn.Linear(c, num_classes)

    def features(self, x: Tensor) -> Tensor:
        return self.stages(x)


def scaled(channels: list[int], width: float) -> list[int]:
    return [max(round(c * width), 1) for c in channels]


#: Networks by name, built as `network(neuron, num_classes, in_channels, T, width, **settings)`; `staa.statten` adds the
#: transformers. A network's settings are its keyword-only parameters with a default.
NETWORKS: dict[str, Callable[..., SpikingNetwork]] = {
    "vgg13": partial(VGG, channels=[64, 128, 256, 512, 512]),
    "resnet19": partial(ResNet, stem="one", blocks=[3, 3, 2], channels=[128, 256, 512], strides=[1, 2, 2],
                        pool_shortcut=False),
    "resnet20": partial(ResNet, stem="three", blocks=[2, 2, 2, 2], channels=[64, 128, 256, 512], strides=[1, 2, 2, 2],
                        pool_shortcut=True),
    "resnet18": partial(ResNet, stem="imagenet", blocks=[2, 2, 2, 2], channels=[64, 128, 256, 512],
                        strides=[1, 2, 2, 2], pool_shortcut=False),
    "resnet34": partial(ResNet, stem="imagenet", blocks=[3, 4, 6, 3], channels=[64, 128, 256, 512],
                        strides=[1, 2, 2, 2], pool_shortcut=False),
}


def build(network: str, neuron: str | Callable[..., nn.Module] = "staa", num_classes: int = 10, T: int = 4,
          in_channels: int = 3, width: float = 1.0, network_settings: dict | None = None,
          **neuron_settings) -> SpikingNetwork:
    """A network by name, with any neuron: `staa.build("resnet20", neuron="staa", num_classes=10, T=4)`.

    network: one of NETWORKS. neuron: one of NEURONS, or any callable `neuron(channels, T=T)` that returns a module
    from currents (T, B, C, H, W) to spikes of the same shape. width multiplies the channels of every layer.
    network_settings: the network's own, where it has any: `{"chunk": 4}` of a STAtten.
    neuron_settings go to every neuron: `r=8`, `beta=0.0`, `pe_place="output"`, ...
    Raises ValueError with one sentence where a name, a type or a value is not allowed. Settings of a neuron that is
    handed in and has no name are not checked here.
    """
    for name, value in {"num_classes": num_classes, "T": T, "in_channels": in_channels}.items():
        if typed(name, value, int) < 1:
            raise ConfigError(f"{name} must be at least 1, got {value}")
    width = typed("width", width, float)
    if not width > 0:
        raise ConfigError(f"width must be above 0, got {width}")
    network_settings = full_settings("network", network, NETWORKS,
                                     {} if network_settings is None else network_settings)
    named = neuron if isinstance(neuron, str) else name_of(neuron)
    if isinstance(neuron, str) or named in NEURONS and NEURONS[named] is neuron:
        allowed = full_settings("neuron", named, NEURONS, neuron_settings)
        make = partial(NEURONS[named], **{name: allowed[name] for name in neuron_settings})
    elif callable(neuron) and not isinstance(neuron, nn.Module):
        make = partial(neuron, **neuron_settings)
    else:
        raise ConfigError(f"neuron must be one of {', '.join(NEURONS)} or your own class or factory, got a "
                          f"{type(neuron).__name__}")
    made = NETWORKS[network](make, num_classes, in_channels, T, width, **network_settings)
    vars(made).pop("_make_neuron", None)  # a local function would keep the network from being pickled
    return made


def skeleton(make: Callable[[], SpikingNetwork]) -> SpikingNetwork:
    """A network that is built for its shapes alone: on torch's meta device, which takes no memory, or as it is where
    building it needs numbers. The caller's random generator stays as it was."""
    try:
        with torch.device("meta"):
            return make()
    except Exception as error:
        if "meta" not in str(error):
            raise
    with torch.random.fork_rng(devices=[]):
        return make()


def full_settings(what: str, name: str, names: dict, given: dict) -> dict:
    """The settings of a "neuron" or "network" by name: those given, each of its type, and the defaults of the rest."""
    one_of(what, name, names)
    typed(f"{what}_settings", given, dict)
    if not callable(names[name]) or isinstance(names[name], nn.Module):
        raise ConfigError(f"{what} {name} must be a class or a factory, got a {type(names[name]).__name__}")
    allowed = settings_of(names[name])
    for key in given:
        if key not in allowed:
            must = f"be among {', '.join(allowed)}" if allowed else "be empty"
            raise ConfigError(f"{what}_settings of {name} must {must}, got {key!r}")
    return {key: typed(f"{what}_settings {key}", given.get(key, default), kind)
            for key, (kind, default) in allowed.items()}


def name_of(neuron) -> str:
    """A neuron's name in NEURONS, or else its own."""
    own = getattr(neuron, "__name__", type(neuron).__name__)
    return next((name for name, known in NEURONS.items() if known is neuron), own)
