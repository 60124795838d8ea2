"""Watching a network: which of its layers spike, how often, and how to look without changing it."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Literal, overload

import torch
from torch import nn

from .neuron import LIF


def neurons(network: nn.Module) -> dict[str, nn.Module]:
    """The spiking layers of a network, by module name, from input to output: each LIF, and what was handed in as the
    neuron; what stands inside one of them is part of it."""
    found: dict[str, nn.Module] = {}
    inside: set[nn.Module] = set()
    for name, layer in network.named_modules():
        if layer not in inside and (isinstance(layer, LIF) or getattr(layer, "is_neuron", False)):
            found[name] = layer
            inside.update(layer.modules())
    return found


@contextmanager
def evaluating(network: nn.Module) -> Iterator[ExitStack]:
    """A context with the network in evaluation mode; afterwards each module has its own mode again. Hooks that were
    given to the stack, as `stack.callback(handle.remove)`, are removed at its end."""
    modes = {module: module.training for module in network.modules()}
    try:
        network.eval()
        with ExitStack() as stack:
            yield stack
    finally:
        for module, mode in modes.items():
            module.training = mode


class firing_rates:
    """Context that measures mean spikes per neuron and time step, by layer, over every forward pass inside it.

        with firing_rates(network) as rates:
            network(images)
        rates()              # {"stem.1": 0.12, ...}
        rates(by_step=True)  # {"stem.1": [0.08, 0.13, 0.14, 0.13], ...}: one number a time step

    rates() raises ValueError where the network has no neuron, or none of them ran.
    """

    def __init__(self, network: nn.Module):
        self.layers = neurons(network)
        self.of = type(network).__name__

    def __enter__(self) -> "firing_rates":
        self.spikes = dict.fromkeys(self.layers, torch.zeros(1, dtype=torch.float64))  # by time step
        self.count = dict.fromkeys(self.layers, 0)
        self.hooks = [layer.register_forward_hook(partial(self._add, name)) for name, layer in self.layers.items()]
        return self

    @overload
    def __call__(self, by_step: Literal[False] = False) -> dict[str, float]: ...

    @overload
    def __call__(self, by_step: Literal[True]) -> dict[str, list[float]]: ...

    def __call__(self, by_step: bool = False) -> dict[str, float] | dict[str, list[float]]:
        if not self.layers:  # said only here: what merely runs inside, as in training, needs none
            raise ValueError(f"firing rates are those of LIF neurons, and this {self.of} has none")
        if not any(self.count.values()):
            raise ValueError(f"no neuron of this {self.of} was seen to run: call the network inside the context, and "
                             "where it was compiled, the network that was handed to torch.compile")
        if by_step:
            return {name: (s * len(s) / max(self.count[name], 1)).tolist() for name, s in self.spikes.items()}
        return {name: float(s.sum()) / max(self.count[name], 1) for name, s in self.spikes.items()}

    def _add(self, name, layer, inputs, spikes):
        # A sample's spikes are counted in float32 without error, and in a fraction of float64's time.
        maps = spikes.detach()[..., None]  # (T, B, ..., 1)
        each = maps.sum(tuple(range(2, maps.dim())), dtype=torch.promote_types(maps.dtype, torch.float32))
        total = each.sum(1, dtype=torch.float64)
        self.spikes[name] = self.spikes[name].to(spikes.device) + total
        self.count[name] += spikes.numel()

    def __exit__(self, *exc):
        for hook in self.hooks:
            hook.remove()
