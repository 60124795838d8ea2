"""STAtten (CVPR 2025): a spike-driven transformer whose attention joins space and time, and the Spike-driven
Transformer (SDT) that it extends.

Residuals add real numbers (membrane shortcuts), and a neuron stands in front of every convolution and linear layer but
the first convolution of a static image: each of them receives spikes; on events, joint attention's projection receives
0, 1 and 2. Tokens stay maps (T, B, C, H, W) throughout, so that any neuron of the frame can be handed in; the published
one is `neuron="statten"`.

Joint attention cuts the T steps into T/c chunks; the c H W tokens of a chunk attend to each other, linearly:

    out = Q (K^T V) scale,    scale = 1/H for static images, 1/(H H c) for events

K^T V is d x d a head, whatever c is: joint attention takes as many multiply-adds as spatial attention, which is c = 1.
The forms are those of the authors' public code, but that 1x1 convolutions have no bias, since BN follows [ours].
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .firing import evaluating
from .networks import NETWORKS, NEURONS, SpikingNetwork, Steps, conv1x1, conv3x3
from .neuron import LIF
from .norm import BatchNorm2d
from .settings import bounded
from .surrogate import SIGMOID


class STAttenLIF(LIF):
    """STAtten's neuron: U = Hm + (X - Hm) / tau, spikes where U >= v_th, reset to 0 through which no gradient flows.

    slope: of the surrogate, the derivative of sigmoid(slope (U - v_th)).
    """

    surrogate = SIGMOID

    def __init__(self, channels: int | None = None, T: int | None = None, *, tau: float = 2.0, v_th: float = 1.0,
                 slope: float = 4.0):
        bounded(tau=tau, slope=slope)
        if not tau >= 1:
            raise ValueError(f"tau must be at least 1 time step, got {tau}")
        if not slope > 0:
            raise ValueError(f"slope, of the surrogate gradient, must be above 0, got {slope}")
        super().__init__(decay=1 - 1 / tau, gain=1 / tau, v_th=v_th)
        self.slope = slope

    @classmethod
    def from_tau(cls, tau: float, *sizes: int, **settings) -> LIF:
        """As in LIF: here tau is a setting."""
        return cls(*sizes, tau=tau, **settings)

    def numbers(self) -> tuple:
        return self.decay, self.gain, self.v_th, 0.0, self.slope

    def extra_repr(self) -> str:
        return f"tau={1 / self.gain:g}, v_th={self.v_th}, slope={self.slope}"


class Product(nn.Module):
    """spikes @ other, as a layer: what measures a network finds its operands here. fan_out: columns of `other`."""

    def __init__(self, fan_out: int):
        super().__init__()
        self.fan_out = fan_out

    def forward(self, spikes: Tensor, other: Tensor) -> Tensor:
        return spikes @ other


class Mask(nn.Module):
    """spikes * other, element by element, as a layer. per_channel: other is one number a channel, (T, B, C, 1, 1)."""

    def __init__(self, per_channel: bool = False):
        super().__init__()
        self.per_channel = per_channel

    def forward(self, spikes: Tensor, other: Tensor) -> Tensor:
        return spikes * other


class JointAttention(nn.Module):
    """q, k, v (T, B, C, H, W), spikes, to Q (K^T V) over the chunk's tokens, unscaled, of the same shape."""

    def __init__(self, dim: int, heads: int, chunk: int):
        super().__init__()
        self.heads, self.chunk = heads, chunk
        self.context, self.read = Product(dim // heads), Product(dim // heads)

    def tokens(self, x: Tensor) -> Tensor:
        """(T, B, C, H, W) as (T/c, B, heads, c H W, d)."""
        x = x.flatten(3).unflatten(2, (self.heads, -1)).unflatten(0, (-1, self.chunk))  # (T/c, c, B, heads, d, HW)
        return x.permute(0, 2, 3, 1, 5, 4).flatten(3, 4)

    def maps(self, x: Tensor, shape: torch.Size) -> Tensor:
        """The inverse of `tokens`."""
        return x.unflatten(3, (self.chunk, -1)).permute(0, 3, 1, 2, 5, 4).reshape(shape)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        shape = q.shape
        q, k, v = (self.tokens(x) for x in (q, k, v))
        return self.maps(self.read(q, self.context(k.transpose(-2, -1), v)), shape)


def half_threshold(neuron: nn.Module) -> nn.Module:
    """The neuron, firing half way from its reset to its threshold; one without `v_th` fires as it does."""
    threshold, reset = getattr(neuron, "v_th", None), getattr(neuron, "v_reset", 0.0)
    if isinstance(threshold, Tensor):  # a learned one
        threshold.data.copy_(reset + (threshold.data - reset) / 2)
    elif threshold is not None:
        setattr(neuron, "v_th", reset + (threshold - reset) / 2)
    return neuron


class Attention(nn.Module):
    """x (T, B, C, H, W), real numbers, to the attention's part of the residual; q, k and v by 1x1 convolutions.

    joint: JointAttention, or None for SDT's own: Q masked by the channels whose sum over tokens of K V fires.
    event: q, k, v are max-pooled 3x3, and joint attention's spikes s gate the pooled input spikes p: s p + p. SDT's K V
    and Q (K V), which their code pools once more over a head's tokens and channels, are not pooled here [ours].
    """

    def __init__(self, neuron: Callable[[int], nn.Module], dim: int, joint: JointAttention | None, event: bool):
        super().__init__()
        self.event, self.joint = event, joint
        self.neuron1 = neuron(dim)
        self.q, self.k, self.v = (nn.Sequential(Steps(conv1x1(dim, dim), BatchNorm2d(dim)), neuron(dim))
                                  for _ in range(3))
        if joint is None:
            self.context, self.read = Mask(), Mask(per_channel=True)
        self.neuron2 = half_threshold(neuron(dim))
        self.project = Steps(conv1x1(dim, dim), BatchNorm2d(dim))

    def forward(self, x: Tensor) -> Tensor:
        x = self.neuron1(x)
        q, k, v = self.q(x), self.k(x), self.v(x)
        if self.event:
            q, k, v, x = (pooled(y) for y in (q, k, v, x))
        if self.joint is None:
            return self.project(self.read(q, self.neuron2(self.context(k, v).sum((-2, -1), keepdim=True))))
        h = x.shape[-2]
        out = self.joint(q, k, v) / (h * h * self.joint.chunk if self.event else h)
        s = self.neuron2(out)
        return self.project(s * x + x if self.event else s)


def pooled(x: Tensor) -> Tensor:
    """Maximum over 3x3 of (T, B, C, H, W), the size kept; of spikes a spike."""
    return F.max_pool2d(x.flatten(0, 1), 3, 1, padding=1).unflatten(0, x.shape[:2])


class Block(nn.Module):
    """x + attention, then + MLP with four times the channels."""

    def __init__(self, neuron: Callable[[int], nn.Module], dim: int, attention: nn.Module):
        super().__init__()
        self.attention = attention
        self.mlp = nn.Sequential(neuron(dim), Steps(conv1x1(dim, 4 * dim), BatchNorm2d(4 * dim)),
                                 neuron(4 * dim), Steps(conv1x1(4 * dim, dim), BatchNorm2d(dim)))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        return x + self.mlp(x)


class SpikeDriven(SpikingNetwork):
    """Spike-driven Transformer: patch embedding, `depth` blocks of `dim` channels, mean over tokens, neuron, head.

    pools: after which of the four convolutions of the patch embedding a 3x3 max pool halves the map: "0011" makes 8x8
    tokens of 32x32 pixels, "1111" 8x8 of 128x128. event: the forms for event data, see `Attention`.
    """

    def __init__(self, neuron, num_classes: int, in_channels: int, T: int, width: float, *, depth: int, dim: int,
                 pools: str = "0011", event: bool = False):
        if len(pools) != 4 or set(pools) - {"0", "1"}:
            raise ValueError(f"pools must be four flags like '0011', got {pools!r}")
        super().__init__(neuron, in_channels, T, min_size=2 ** pools.count("1"))
        self.dim, self.event = round(dim * width), event
        if self.dim < 8 or self.dim % 8:
            raise ValueError(f"dim times width must be a multiple of 8, got {dim} x {width:g} = {self.dim}")
        embed: list[nn.Module] = []
        c = in_channels
        for stage, c_out in enumerate((self.dim // 8, self.dim // 4, self.dim // 2, self.dim)):
            embed += [Steps(conv3x3(c, c_out), BatchNorm2d(c_out))]
            embed += [self.neuron(c_out)] if stage < 3 else []  # the last one's comes in front of the position
            embed += [Steps(nn.MaxPool2d(3, 2, padding=1))] if pools[stage] == "1" else []
            c = c_out
        self.embed = nn.Sequential(*embed)
        self.position = nn.Sequential(self.neuron(c), Steps(conv3x3(c, c), BatchNorm2d(c)))
        self.blocks = nn.Sequential(*(Block(self.neuron, c, self.attention()) for _ in range(depth)))
        self.last = self.neuron(c)
        self.head = nn.Linear(c, num_classes)

    def attention(self) -> Attention:
        return Attention(self.neuron, self.dim, None, self.event)

    def features(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = self.blocks(x + self.position(x))
        return self.last(x.mean((-2, -1), keepdim=True))


class STAtten(SpikeDriven):
    """STAtten: SpikeDriven with joint attention. heads divide the channels, chunk (the paper's c) divides T; chunk = 1
    is spatial attention."""

    def __init__(self, neuron, num_classes: int, in_channels: int, T: int, width: float, *, heads: int = 8,
                 chunk: int = 2, **settings):
        if chunk < 1 or T % chunk:
            raise ValueError(f"chunk must divide T, got chunk={chunk} and T={T}")
        self.heads, self.chunk = heads, chunk
        super().__init__(neuron, num_classes, in_channels, T, width, **settings)

    def attention(self) -> Attention:
        if self.heads < 1 or self.dim % self.heads:
            raise ValueError(f"heads must divide dim times width, got heads={self.heads} and {self.dim} channels")
        return Attention(self.neuron, self.dim, JointAttention(self.dim, self.heads, self.chunk), self.event)


@torch.no_grad()
def attention_maps(network: STAtten, x: Tensor) -> list[Tensor]:
    """Q K^T of each block, which the linear form never makes: (B, T/c, c H W, c H W), the mean over heads; entry (i, j)
    is in how many channels of a head the query of token i and the key of token j spike together."""
    seen = []
    with evaluating(network) as hooks:
        for joint in [layer for layer in network.modules() if isinstance(layer, JointAttention)]:
            for product in (joint.context, joint.read):  # whose left operands are K^T and Q
                hooks.callback(product.register_forward_pre_hook(lambda _, operands: seen.append(operands[0])).remove)
        network(x)
    return [(q @ kt).mean(2).transpose(0, 1) for kt, q in zip(seen[::2], seen[1::2])]


NEURONS["statten"] = STAttenLIF
NETWORKS |= {f"{name}-{depth}-{dim}": partial(network, depth=depth, dim=dim, pools="0011" if depth == 2 else "1111")
             for name, network in (("statten", STAtten), ("sdt", SpikeDriven))
             for depth, dim in ((2, 256), (2, 512), (8, 512), (8, 768))}
