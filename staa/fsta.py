"""FSTA-SNN (AAAI 2025): the frequency-based spatial-temporal attention module, as a neuron for every network.

    g    = sigmoid(W mean over C of m),  m = alpha avgpool(X) + beta maxpool(X)       temporal amplitude
    X_t  = X g + X                                                                    (g one number a time step)
    a    = sigmoid(conv7x7(DCT(sum over C of the mean over T of X_t)))                spatial frequency
    X_s  = X_t a + X_t                                                                (a one number a place)
    X~   = (t X_t + s X_s) / 2

and X~ is the current of a plain LIF neuron. The forms and the starting values alpha = beta = 0.5, t = 0.6 and s = 0.5
are those of the authors' public code; the DCT is computed, not stored, and X is multiplied once, by all factors
together: X~ = X (1 + g) (t + s (1 + a)) / 2. With both gates at 1/2 X~ is 1.0125 X. On a feature map of 1 x 1 every
pooling is the number itself, and of the k x k window and the 7 x 7 kernel only the centre meets anything but padding:
the spatial gate is then one learned function of the sum over the channels.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import fused
from .neuron import LIF, Computed
from .settings import bounded, switches, unused, whole_numbers
from .surrogate import TANH


def dct(k: int) -> Tensor:
    """(k, k): the orthonormal DCT-II, a row a frequency; `dct(h) @ x @ dct(w).T` transforms maps (..., h, w)."""
    n = torch.arange(k, dtype=torch.float64)
    basis = (math.pi * n[:, None] * (2 * n + 1) / (2 * k)).cos() * math.sqrt(2 / k)
    basis[0] /= math.sqrt(2)
    return basis.to(torch.get_default_dtype())


class DCT(Computed):
    """The k*k coefficients of the k x k window around each place: (B, 1, H, W) to (B, k*k, H, W); coefficient u k + v
    has frequency u along H and v along W. An even k pads one more below and to the right, to keep the size [ours]."""

    basis: Tensor

    def __init__(self, k: int):
        super().__init__()
        self.k = k
        self.register_buffer("basis", torch.empty(k * k, k * k), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        with torch.device("cpu"):  # as `PositionEncoding` does
            self.basis.copy_(torch.kron(dct(self.k), dct(self.k)))

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, 2 * ((self.k - 1) // 2, self.k // 2))
        if fused.on_gpu(x):  # where `unfold` starts a kernel an image; TF32, as torch's default is
            return F.conv2d(x, self.basis.unflatten(1, (1, self.k, self.k)))
        windows = F.unfold(x, self.k)                                                   # (B, k*k, HW)
        y = torch.bmm(self.basis.expand(x.shape[0], -1, -1), windows)
        return y.unflatten(2, (x.shape[-2] - self.k + 1, -1))


class ToOneMap(nn.Conv2d):
    """A bias-free 7x7 convolution of `maps` to one, the size kept: as a matrix product and a sum of shifted maps, which
    for one output channel take a fraction of a convolution's time on a CPU."""

    def __init__(self, maps: int):
        super().__init__(maps, 1, 7, padding=3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if fused.on_gpu(x):  # where the gradient of `fold` starts a kernel for each image
            return super().forward(x)
        kernel = self.weight[0].flip(-2, -1).flatten(1).T.expand(x.shape[0], -1, -1)    # (B, 49, maps)
        return F.fold(torch.bmm(kernel, x.flatten(2)), x.shape[-2:], 7, padding=3)  # (B, 1, H, W)


class TemporalAmplitude(nn.Module):
    """The gate g (T, B, 1, 1, 1) of the time steps, from x (T, B, C, H, W). Equal maxima share their gradient."""

    def __init__(self, T: int):
        super().__init__()
        self.alpha, self.beta = nn.Parameter(torch.empty(())), nn.Parameter(torch.empty(()))
        self.mix = nn.Linear(T, T, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.alpha, 0.5)
        nn.init.constant_(self.beta, 0.5)

    def forward(self, x: Tensor) -> Tensor:
        m = self.alpha * x.mean((-2, -1)) + self.beta * x.amax((-2, -1))    # (T, B, C)
        g = self.mix(m.mean(2).T).sigmoid()                                 # (B, T); W and the mean over C commute
        return g.T[..., None, None, None]


class SpatialFrequency(nn.Module):
    """The gate (B, 1, H, W) of the places, from one map (B, 1, H, W): X_t's sum over C of its mean over T."""

    def __init__(self, k: int, reduction: int):
        super().__init__()
        self.dct = DCT(k)
        maps = k * k // reduction
        fewer = [nn.Conv2d(k * k, maps, 7, padding=3, bias=False), nn.ReLU()] if reduction > 1 else []
        self.convolutions = nn.Sequential(*fewer, ToOneMap(maps))

    def forward(self, x: Tensor) -> Tensor:
        return self.convolutions(self.dct(x)).sigmoid()


class FSTALIF(LIF):
    """LIF neuron behind the FSTA module: current (T, B, C, H, W) in, spikes out; T is fixed, H and W are any.

    temporal, spatial: each branch by itself. Off, the temporal one passes X on as X_t, and without the spatial one X_t
        is the output: with both off the neuron is the plain LIF of the authors' code [ours].
    k: side of the DCT window. reduction: divides the k*k maps in between two 7x7 convolutions; 1: there is one.
    decay, v_th: as in `LIF`. Their neuron fires where U > v_th / 2 and resets to 0.
    slope: of the surrogate, the derivative of tanh(slope (U / v_th - 1/2)), scaled to rise by 1 from U = 0 to U = v_th,
        and 0 elsewhere; in the authors' code 1 with the module and 3 for the plain neuron.
    Raises ValueError on a value that is not allowed, and on k or reduction without the spatial branch; TypeError
    on T, k or reduction that is no whole number, and on temporal or spatial that is no bool. A current is of the
    weights' type, unless under autocast.
    """

    surrogate = TANH

    def __init__(self, channels: int, T: int, *, temporal: bool = True, spatial: bool = True, k: int = 7,
                 reduction: int = 1, decay: float = 0.25, v_th: float = 1.0, slope: float = 1.0):
        super().__init__(decay=decay, v_th=v_th)
        bounded(slope=slope)
        whole_numbers(T=T, k=k, reduction=reduction)
        switches(temporal=temporal, spatial=spatial)
        if k < 1:
            raise ValueError(f"k, the side of the DCT window, must be at least 1, got {k}")
        if not 1 <= reduction <= k * k:
            raise ValueError(f"reduction must be between 1 and k * k = {k * k}, got {reduction}")
        if not slope > 0:
            raise ValueError(f"slope, of the surrogate gradient, must be above 0, got {slope}")
        if T < 1:
            raise ValueError(f"T must be at least 1, got {T}")
        if not spatial:
            unused(FSTALIF, "the spatial branch, which is off (spatial=False)", k=k, reduction=reduction)
        self.T, self.slope = T, slope
        self.temporal = TemporalAmplitude(T) if temporal else None
        self.spatial = SpatialFrequency(k, reduction) if spatial else None
        self.gates = temporal + 3 * spatial  # multiplications of each number of X by g, a, t and s
        if spatial:
            self.t, self.s = nn.Parameter(torch.empty(())), nn.Parameter(torch.empty(()))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.spatial is not None:
            nn.init.constant_(self.t, 0.6)
            nn.init.constant_(self.s, 0.5)

    @classmethod
    def from_tau(cls, tau: float, *sizes: int, **settings) -> LIF:
        """Always a ValueError: eq. 1's gain of 1 / tau is not this neuron's."""
        raise ValueError("from_tau does not apply to FSTALIF, whose current enters with gain 1: set its decay")

    def attend(self, x: Tensor) -> Tensor:
        """X~ for all time steps at once."""
        if not self.gates:
            return x
        gate = 1 + self.temporal(x) if self.temporal is not None else x.new_ones(self.T, 1, 1, 1, 1)
        if self.spatial is not None:
            seen = (gate * x.sum(2, keepdim=True)).mean(0)                          # (B, 1, H, W)
            gate = gate * (self.t + self.s * (1 + self.spatial(seen))) / 2          # (T, B, 1, H, W)
        return x * gate

    def numbers(self) -> tuple:
        """As in LIF. The surrogate rises by 1 over all that it reaches, v_th / 2 to both sides of the threshold."""
        peak = self.slope / (2 * math.tanh(self.slope / 2) * self.v_th)
        return self.decay, 1.0, self.v_th / 2, 0.0, self.v_th / 2, self.slope / self.v_th, peak

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() not in (3, 5) or x.shape[0] != self.T:
            raise ValueError(f"this FSTALIF takes (T={self.T}, B, C, H, W) or (T={self.T}, B, C), got {tuple(x.shape)}")
        if x.dim() == 3:
            return self.forward(x[..., None, None])[..., 0, 0]
        return super().forward(self.attend(x))

    def extra_repr(self) -> str:
        return f"T={self.T}, decay={self.decay}, v_th={self.v_th}, slope={self.slope}"
