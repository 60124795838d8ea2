"""Networks of plain LIF neurons as NIR graphs (Neuromorphic Intermediate Representation, the extra `nir`), which
simulators and neuromorphic chips read.

    staa.interchange.write("network.nir", network, image_size=32)

NIR's LIF is an equation in continuous time, tau dv/dt = (v_leak - v) + R I, and resets to v_reset. A reader that takes
forward Euler steps of dt, as SpikingJelly and snnTorch do, computes

    v[t] = v[t-1] + dt / tau (v_leak - v[t-1] + R I[t])

which is eq. 1 with decay = 1 - dt / tau and gain = R dt / tau. So tau = dt / (1 - decay), R = gain / (1 - decay) and
v_leak = v_reset; where decay = 1 it is NIR's IF with R = gain / dt. The spikes are equal for that dt alone, and not in
a reader that solves the equation exactly. NIR fires where v > v_threshold, this package where v >= v_th: they differ
where v meets the threshold to the last bit. NIR does not say where v starts; here it is v_reset.

A graph takes one time step's image (C, H, W) and gives that step's logits; repeating the image and averaging the logits
over T are left to who runs it. BN is folded into the convolution before it, as it is in evaluation.
"""

import copy
import io
import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from . import records
from .firing import neurons
from .networks import VGG, BasicBlock, ResNet, SpikingNetwork, Steps
from .neuron import LIF
from .settings import Error

#: Seconds a time step: what SpikingJelly and snnTorch take where nothing else is said.
DT = 1e-4


class InterchangeError(Error, ValueError):
    """A network that NIR cannot express; the message is one sentence that says why."""


def write(path: Path | str, network: SpikingNetwork, image_size: int, dt: float = DT) -> None:
    """`to_nir` as a file that `nir.read` reads, whole or not at all."""
    graph = to_nir(network, image_size, dt)  # says in one sentence where nir is not installed
    import nir
    content = io.BytesIO()
    nir.write(content, graph)
    records.write(Path(path), content.getvalue())


def to_nir(network: SpikingNetwork, image_size: int, dt: float = DT) -> Any:
    """A VGG or ResNet of plain LIF neurons as a `nir.NIRGraph`; its nodes are named as the modules.

    image_size: pixels, since NIR's neurons are counted. dt: seconds a time step. Weights keep their type, but for
    bfloat16, which NumPy lacks and becomes float32.
    Raises InterchangeError, one sentence, on any other neuron or layer, size or dt, or where nir is not installed.
    """
    check(network)
    if type(image_size) is not int or image_size < network.min_size:
        raise InterchangeError(f"image_size must be a whole number of at least {network.min_size}, got {image_size!r}")
    if not isinstance(dt, (int, float)) or not 0 < dt < math.inf:
        raise InterchangeError(f"dt, the seconds of a time step, must be a finite number above 0, got {dt!r}")
    try:
        import nir
    except ImportError:
        raise InterchangeError("the export needs nir, which is not installed: pip install nir.") from None
    return Export(nir, dt).graph(network, image_size)


def check(network: SpikingNetwork) -> None:
    """Refuse what is no VGG or ResNet of plain LIF neurons."""
    if not isinstance(network, (VGG, ResNet)):
        raise InterchangeError(f"VGG and ResNet are exported to NIR, and this is a {type(network).__name__}")
    if type(network.head) is not nn.Linear or network.head.bias is None:
        raise InterchangeError(f"head must be a Linear with a bias, and is a {type(network.head).__name__}")
    for name, layer in neurons(network).items():
        kind = type(layer).__name__
        if type(layer) is not LIF and next(layer.children(), None) is not None:
            raise InterchangeError(
                f"{name} is a {kind}, which NIR cannot express: NIR's neurons have fixed coefficients, and here "
                "attention computes from the data what enters the membrane; networks of neuron='lif' can be exported")
        if type(layer) is not LIF:
            raise InterchangeError(f"{name} is a {kind}, and only the plain LIF neuron is exported to NIR")


class Export:
    """Nodes and edges collected on the way through a network."""

    def __init__(self, nir: Any, dt: float):
        self.nir, self.dt = nir, dt
        self.nodes: dict[str, Any] = {}
        self.edges: list[tuple[str, str]] = []

    def graph(self, network: SpikingNetwork, image_size: int) -> Any:
        weight = network.head.weight
        shape = (network.in_channels, image_size, image_size)
        self.shapes = output_shapes(network, torch.empty(1, *shape, dtype=weight.dtype, device="meta"))
        self.nodes["input"] = self.nir.Input({"input": np.array(shape)})
        last = "input"
        for name, child in network.named_children():
            if child is not network.head:
                last = self.add(name, child, last)
        size = self.shapes[last]
        last = self.node("mean", self.pool((size[1], size[2])), [last])
        last = self.node("flatten", self.nir.Flatten({"input": np.array([size[0], 1, 1])}, 0, -1), [last])
        last = self.node("head", self.nir.Affine(numpy(weight), numpy(network.head.bias)), [last])
        self.node("output", self.nir.Output({"output": np.array([len(weight)])}), [last])
        return self.nir.NIRGraph(self.nodes, self.edges)

    def node(self, name: str, node, sources: list[str]) -> str:
        """Add a node that receives the sum of its sources; its name."""
        self.nodes[name] = node
        self.edges += [(source, name) for source in sources]
        return name

    def add(self, name: str, module: nn.Module, source: str, *more: str) -> str:
        """Add a module with all that is in it, after `source`; the name of its last node."""
        if type(module) is LIF:
            return self.node(name, self.neuron(module, self.shapes[name]), [source, *more])
        if isinstance(module, BasicBlock):
            out = self.add(f"{name}.conv1", module.conv1, source)
            out = self.add(f"{name}.neuron1", module.neuron1, out)
            out = self.add(f"{name}.conv2", module.conv2, out)
            shortcut = self.add(f"{name}.shortcut", module.shortcut, source)
            return self.add(f"{name}.neuron2", module.neuron2, out, shortcut)
        if isinstance(module, Steps):
            return self.layers(name, list(module.named_children()), source)
        if isinstance(module, nn.Sequential):
            for child, layer in module.named_children():
                source = self.add(f"{name}.{child}", layer, source)
            return source
        if isinstance(module, nn.Identity):
            return source
        raise InterchangeError(f"{name} is a {type(module).__name__}, for which NIR has no node")

    def layers(self, name: str, layers: list[tuple[str, nn.Module]], source: str) -> str:
        """The layers of a Steps: pools, and convolutions with the BN after them."""
        for k, (child, layer) in enumerate(layers):
            place = f"{name}.{child}"
            if isinstance(layer, nn.Conv2d):
                bn = layers[k + 1][1] if k + 1 < len(layers) else None
                if layer.bias is not None or layer.groups > 1 or not is_fixed(bn):
                    raise InterchangeError(f"{place} must be a convolution without a bias, in one group, and after it "
                                           f"BN with weights and running statistics, and this is {layer} and then {bn}")
                source = self.node(place, self.conv(layer, bn, self.shapes[source]), [source])
            elif isinstance(layer, nn.AvgPool2d):
                source = self.average(place, layer, source)
            elif not (is_fixed(layer) and k and isinstance(layers[k - 1][1], nn.Conv2d)):
                raise InterchangeError(f"{place} is a {type(layer).__name__}, for which NIR has no node")
        return source

    def average(self, place: str, pool: nn.AvgPool2d, source: str) -> str:
        size: Any = pool.kernel_size  # one number in this package's networks
        if size == 1:
            return source
        height, width = self.shapes[source][1:]
        if pool.ceil_mode and (height % size or width % size):
            raise InterchangeError(f"{place} pools {size} x {size} of {height} x {width} positions, and NIR cannot say "
                                   "what happens at the edge: choose an image_size that divides evenly")
        return self.node(place, self.pool((size, size)), [source])

    def pool(self, size: tuple[int, int]) -> Any:
        return self.nir.AvgPool2d(kernel_size=np.array(size), stride=np.array(size), padding=np.array([0, 0]))

    def conv(self, conv: nn.Conv2d, bn: Any, shape: tuple[int, ...]) -> Any:
        """A convolution and its BN in evaluation: scale = weight / sqrt(variance + eps)."""
        scale = bn.weight / (bn.running_var + bn.eps).sqrt()
        return self.nir.Conv2d(input_shape=tuple(shape[1:]), weight=numpy(conv.weight * scale[:, None, None, None]),
                               stride=conv.stride, padding=conv.padding, dilation=conv.dilation, groups=conv.groups,
                               bias=numpy(bn.bias - bn.running_mean * scale))

    def neuron(self, lif: LIF, shape: tuple[int, ...]) -> Any:
        def everywhere(value: float) -> np.ndarray:
            return np.full(shape, value)

        v_threshold, v_reset = everywhere(lif.v_th), everywhere(lif.v_reset)
        if lif.decay == 1:
            return self.nir.IF(r=everywhere(lif.gain / self.dt), v_threshold=v_threshold, v_reset=v_reset)
        leak = 1 - lif.decay
        return self.nir.LIF(tau=everywhere(self.dt / leak), r=everywhere(lif.gain / leak), v_leak=v_reset,
                            v_threshold=v_threshold, v_reset=v_reset)


def is_fixed(layer: Any) -> bool:
    """Whether this is BN that in evaluation multiplies and adds numbers that it holds."""
    return isinstance(layer, nn.BatchNorm2d) and layer.weight is not None and layer.running_var is not None


def output_shapes(network: SpikingNetwork, x: Tensor) -> dict[str, tuple[int, ...]]:
    """(C, H, W) that each module gives for a meta image x (1, C, H, W), by its name; nothing is computed."""
    shapes = {"input": tuple(x.shape[1:])}
    network = copy.deepcopy(network).to("meta").eval()

    def note(name, module, inputs, out):
        shapes[name] = tuple(out.shape[-3:])

    for name, module in network.named_modules():
        module._forward_hooks.clear()  # the caller's came with the copy, and are not meant for it
        module._forward_pre_hooks.clear()
        module.register_forward_hook(partial(note, name))
    with torch.no_grad():
        network(x)
    return shapes


def numpy(tensor: Tensor) -> np.ndarray:
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).detach().cpu().numpy()
