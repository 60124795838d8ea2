"""Operations, firing rates and energy of one inference, measured on data: section 4.5.

    E = 0.9 pJ ACs + 4.6 pJ MACs

A multiply-add whose input is spikes is an accumulation (AC) and happens only where there is a spike: multiply-adds
times the mean of the input. A multiply-add whose input is real numbers is a MAC and always happens. Which of the two a
layer sees is decided by what arrives at it on data, 0 and 1 only or not, and by nothing else [ours].

Counted: convolutions and linear layers, zero padding included, and, by themselves, the attention's context product
(eq. 8) and the mixing by M and N (eq. 14), which are no layers; likewise FSTA's DCT and gates, and STAtten's products
and masks, whose left operand is spikes and sets their rate [ours]. BN is folded into the convolution before it, as it
is at inference, unless `bn_folded=False` counts a MAC for every number it scales. Not counted: biases, residual
additions, pooling, the plain neuron's fixed leak, softmax, normalisation and sigmoids of the attention [ours]; the
paper's rounded counts cannot tell.

`staa.lemaire` adds what this leaves out: memory traffic and addressing.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from .attention import STAALIF, GlobalContext
from .firing import evaluating, firing_rates, neurons
from .fsta import DCT, FSTALIF
from .networks import SpikingNetwork, build
from .statten import Mask, Product

#: Section 4.5, of 45 nm [text]; they are those of 32-bit floating point (Horowitz 2014) [standard].
PJ_PER_AC, PJ_PER_MAC = 0.9, 4.6


class Rule(NamedTuple):
    """How a module type is counted. what: its kind. multiply_adds(layer, x, y): of one call. coefficients(layer, x):
    the numbers that it reads. fan_out(layer), sums(layer): as in `Operation`; sums where they are not the fan-out."""

    what: str
    multiply_adds: Callable
    coefficients: Callable
    fan_out: Callable = lambda layer: 1
    sums: Callable | None = None


#: What is counted. A module type of your own, whose matrix products are not in its layers, is added here.
COUNTED: dict[type, Rule] = {
    nn.Conv2d: Rule("convolution", lambda layer, x, y: y.numel() * prod(layer.weight.shape[1:]),
                    lambda layer, x: layer.weight.numel(),
                    lambda layer: len(layer.weight) // layer.groups * prod(layer.kernel_size),
                    lambda layer: len(layer.weight) // layer.groups * prod(
                        -(-k // s) for k, s in zip(layer.kernel_size, layer.stride))),
    nn.Linear: Rule("linear", lambda layer, x, y: y.numel() * layer.in_features, lambda layer, x: layer.weight.numel(),
                    lambda layer: layer.out_features),
    GlobalContext: Rule("context product", lambda layer, x, y: x.numel(), lambda layer, x: prod(x.shape[-2:])),
    STAALIF: Rule("mixing by M and N", lambda layer, x, y: 2 * x.numel() * (layer.sa is not None),
                  lambda layer, x: 2 * layer.channels),
    DCT: Rule("DCT", lambda layer, x, y: y.numel() * layer.k ** 2, lambda layer, x: layer.k ** 4,
              lambda layer: layer.k ** 4),
    # One by one, as they are written; `FSTALIF` multiplies X once, by all together.
    FSTALIF: Rule("gates of FSTA", lambda layer, x, y: x.numel() * layer.gates,
                  lambda layer, x: layer.T + x[0, 0, 0].numel()),
    Product: Rule("attention product", lambda layer, x, y: y.numel() * x.shape[-1],
                  lambda layer, x: x.shape[-3] * x.shape[-1] * layer.fan_out, lambda layer: layer.fan_out),
    Mask: Rule("attention mask", lambda layer, x, y: y.numel(),
               lambda layer, x: x.shape[2] if layer.per_channel else x[0, 0].numel()),
    nn.BatchNorm2d: Rule("BN", lambda layer, x, y: y.numel(), lambda layer, x: 2 * layer.num_features),
}
#: The kinds that are no matrix product, which torch's own counter does not see.
ELEMENTWISE = ("mixing by M and N", "gates of FSTA", "attention mask", "BN")


@dataclass
class Operation:
    """What one layer does for one image over all time steps: means over the images measured on.

    name: the module's name in the network; what: its kind, see COUNTED; in_neuron: whether it belongs to a neuron.
    coefficients: stored numbers that it multiplies by. fan_out: how many of them meet one input; sums: how many of
    those land on an output where the stride is above 1; biases: how many it has, a folded BN's included (all three are
    for `staa.lemaire`).
    multiply_adds, inputs, outputs: of one image over all T steps. spikes: inputs that are not 0. binary: whether
    nothing but 0 and 1 arrived.
    """

    name: str
    what: str
    in_neuron: bool
    fan_out: int
    sums: int
    biases: int
    coefficients: int = 0
    multiply_adds: float = 0
    inputs: float = 0
    outputs: float = 0
    spikes: float = 0
    binary: bool = True

    @property
    def sees(self) -> str:
        """"spikes", "real numbers", or "nothing" where all inputs were 0: then the data cannot tell which."""
        return "real numbers" if not self.binary else "spikes" if self.spikes else "nothing"

    @property
    def rate(self) -> float:
        """Mean of its input where that is spikes: the firing rate that it sees."""
        return self.spikes / self.inputs

    @property
    def macs(self) -> float:
        return 0.0 if self.binary else self.multiply_adds

    @property
    def acs(self) -> float:
        return self.multiply_adds * self.rate if self.binary else 0.0


@dataclass(frozen=True)
class Measurement:
    """What `measure` found, for one image. operations: from input to output. rates: firing rates by layer and time
    step, empty for a network without spikes. units: neurons by layer. images: how many it was measured on."""

    operations: list[Operation]
    rates: dict[str, list[float]]
    units: dict[str, int]
    parameters: int
    T: int
    images: int

    def total(self, number: str, *kinds: str) -> float:
        """Sum of "multiply_adds", "macs" or "acs" over all operations, or over those of these kinds."""
        return sum(getattr(op, number) for op in self.operations if not kinds or op.what in kinds)

    @property
    def millijoules(self) -> float:
        """ACs and MACs only: the paper's number."""
        return millijoules(self.total("acs"), self.total("macs"))

    @property
    def firing_rate(self) -> float:
        """Spikes per neuron and time step, over all neurons of the network."""
        spikes = sum(self.units[name] * sum(rates) / self.T for name, rates in self.rates.items())
        return spikes / max(sum(self.units[name] for name in self.rates), 1)

    @property
    def undecided(self) -> list[str]:
        """Layers at which nothing but 0 arrived: counted as spikes, of which there were none."""
        return [op.name for op in self.operations if op.sees == "nothing"]

    def at_rate(self, rate: float) -> "Measurement":
        """The same network if every neuron fired at this rate: what a figure over the firing rate needs."""
        operations = [replace(op, spikes=rate * op.inputs) if op.binary else op for op in self.operations]
        return replace(self, operations=operations, rates={name: [rate] * self.T for name in self.rates})


def millijoules(acs: float, macs: float) -> float:
    """Energy from counts, section 4.5: 0.10 G ACs and 0.06 G MACs are 0.366 mJ."""
    return (PJ_PER_AC * acs + PJ_PER_MAC * macs) * 1e-9


def measure(network: SpikingNetwork, batches: Iterable, *, bn_folded: bool = True) -> Measurement:
    """Run a network in evaluation over batches of images (B, C, H, W) or frames (B, T, C, H, W), or of (images, labels)
    as a DataLoader gives them, and count.

    Raises ValueError where there is no image, or where torch sees matrix products that COUNTED does not know.
    """
    counted = {name: layer for name, layer in network.named_modules()
               if rule(layer) and not (bn_folded and isinstance(layer, nn.BatchNorm2d))}
    folded = folded_into(network) if bn_folded else set()
    operations = {name: new_operation(name, layer, network, layer in folded) for name, layer in counted.items()}
    device, images = next(network.parameters()).device, 0
    with torch.no_grad(), evaluating(network) as hooks, firing_rates(network) as rates:
        for name, layer in counted.items():
            handle = layer.register_forward_hook(lambda layer, x, y, op=operations[name]: add(op, layer, x[0], y))
            hooks.callback(handle.remove)
        for batch in batches:
            x = (batch[0] if isinstance(batch, (tuple, list)) else batch).to(device)
            if images:
                network(x)
            else:
                with FlopCounterMode(display=False) as seen:
                    network(x)
                check_nothing_is_missed(network, seen.get_total_flops() / 2, operations.values())
            images += len(x)
    if not images:
        raise ValueError("energy is measured on at least one image, got none")
    found = [average(op, images) for op in operations.values() if op.multiply_adds]
    spiking = any(op.sees == "spikes" for op in found)
    T = max(map(len, rates.spikes.values()), default=1)
    return Measurement(found, rates(by_step=True) if spiking else {},
                       {name: count // (images * T) for name, count in rates.count.items()},
                       sum(p.numel() for p in network.parameters()), T, images)


def rule(layer: nn.Module) -> Rule | None:
    """The entry of COUNTED for a module's type or the nearest of its bases."""
    return next((COUNTED[kind] for kind in type(layer).__mro__ if kind in COUNTED), None)


def new_operation(name: str, layer: Any, network: nn.Module, folded: bool) -> Operation:
    own: Any = rule(layer)
    bias = layer.weight if folded else None if isinstance(layer, nn.BatchNorm2d) else getattr(layer, "bias", None)
    return Operation(name, own.what, any(f"{name}.".startswith(f"{neuron}.") for neuron in neurons(network)),
                     own.fan_out(layer), (own.sums or own.fan_out)(layer), len(bias) if isinstance(bias, Tensor) else 0)


def folded_into(network: nn.Module) -> set[nn.Module]:
    """The layers that a BN follows directly: they take its scale into their weights and its shift as their bias."""
    return {layer for chain in network.modules() if isinstance(chain, nn.Sequential)
            for layer, after in zip(chain, list(chain)[1:]) if isinstance(after, nn.BatchNorm2d)}


def add(op: Operation, layer: nn.Module, x: Tensor, y: Tensor) -> None:
    """Add one call of a layer to its operation."""
    own: Any = rule(layer)
    op.multiply_adds += own.multiply_adds(layer, x, y)
    op.coefficients = own.coefficients(layer, x)
    op.inputs += x.numel()
    op.outputs += y.numel()
    op.spikes += int(x.count_nonzero())
    op.binary = op.binary and bool(((x == 0) | (x == 1)).all())


def average(op: Operation, images: int) -> Operation:
    return replace(op, multiply_adds=op.multiply_adds / images, inputs=op.inputs / images, outputs=op.outputs / images,
                   spikes=op.spikes / images)


def check_nothing_is_missed(network: nn.Module, seen: float, operations: Iterable[Operation]) -> None:
    """torch's counter sees every matrix product, whoever calls it; it does not see products element by element."""
    ours = sum(op.multiply_adds for op in operations if op.what not in ELEMENTWISE)
    if ours != seen:
        others = dict.fromkeys(type(layer).__name__ for layer in network.modules() if rule(layer) is None and any(
            p.dim() > 1 for p in layer.parameters(recurse=False)))
        raise ValueError(f"torch sees {seen:,.0f} multiply-adds in this network and staa.energy.COUNTED knows "
                         f"{ours:,.0f} of them; add the module type that makes the others to COUNTED"
                         f"{': perhaps ' + ', '.join(others) if others else ''}.")


def ann(network: str, num_classes: int = 10, in_channels: int = 3, width: float = 1.0) -> SpikingNetwork:
    """The same network as an ANN: a ReLU wherever a spiking neuron stands, one pass, every multiply-add a MAC."""
    return build(network, lambda channels, T: nn.ReLU(), num_classes, 1, in_channels, width)


def spikingjelly(network: nn.Module, images: Tensor) -> tuple[float, float]:
    """MACs and ACs of one image by SpikingJelly's own counters, which watch torch's operators instead of layers.

    Raises ModuleNotFoundError where SpikingJelly 2 is not installed (the extra `bench`).
    """
    from spikingjelly.activation_based.op_counter import DispatchCounterMode, MACCounter, SynOpCounter

    counters = MACCounter(extra_ignore_modules=[nn.BatchNorm2d]), SynOpCounter()
    with torch.no_grad(), evaluating(network), DispatchCounterMode(list(counters)):
        network(images)
    return tuple(counter.get_total() / len(images) for counter in counters)
