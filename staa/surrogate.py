"""Spikes, and the gradients that stand in for theirs.

A spike's own gradient is zero everywhere but at the threshold. Training puts the derivative of a smooth function in its
place, its surrogate: a function of v = U - V_th and of settings, numbers that the neuron hands on. Every `LIF` has one,
and a subclass may bring its own, as the siblings do; the fast path (`fused_lif.py`) computes it all the same.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


def at_the_threshold(v: Tensor) -> Tensor:
    """Theta(0) = 1, eq. 2."""
    return v >= 0


def above_the_threshold(v: Tensor) -> Tensor:
    return v > 0


class Surrogate(NamedTuple):
    """gradient(v, *settings): dS/dU, element by element for v of any shape, in operations that torch.compile knows.
    fires(v): where there is a spike. through_reset: whether a spike's gradient reaches Hm, which it resets (eq. 3).
    """

    gradient: Callable[..., Tensor]
    fires: Callable[[Tensor], Tensor] = at_the_threshold
    through_reset: bool = True

    def __call__(self, v: Tensor, *settings) -> Tensor:
        """Spikes, 0 or 1, of the type and shape of v."""
        if torch.jit.is_tracing():  # a function of Python could not be saved: the same in operators
            slope = self.gradient(v.detach(), *settings) * v
            return self.fires(v).to(v.dtype) + (slope - slope.detach())
        return _Spike.apply(v, self, settings)

    def fire(self, u: Tensor, v_th, v_reset, *settings) -> tuple[Tensor, Tensor]:
        """S and Hm from U, eqs. 2 and 3."""
        s = self(u - v_th, *settings)
        gate = s if self.through_reset else s.detach()
        return s, u * (1 - gate) + v_reset * gate


class _Spike(torch.autograd.Function):
    generate_vmap_rule = True  # for torch.func, as is `setup_context`

    @staticmethod
    def forward(v: Tensor, surrogate: Surrogate, settings: tuple):
        return surrogate.fires(v).to(v.dtype)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        v, ctx.surrogate, ctx.settings = inputs
        ctx.save_for_backward(v)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (v,) = ctx.saved_tensors
        return grad * ctx.surrogate.gradient(v, *ctx.settings), None, None


def _rectangle(v: Tensor, a) -> Tensor:
    return (v.abs() <= a / 2).to(v.dtype) * (1 / a)  # a division is slow


def _tanh(v: Tensor, reach, rate, peak) -> Tensor:
    return (v.abs() <= reach).to(v.dtype) * (1 - (rate * v).tanh().square()) * peak  # torch.where is slow


def _sigmoid(v: Tensor, slope) -> Tensor:
    y = (slope * v).sigmoid()
    return slope * y * (1 - y)


#: Eq. 5: 1/a where |v| <= a/2, its edge included, and 0 elsewhere.
RECTANGLE = Surrogate(_rectangle)
#: FSTA-SNN's: peak (1 - tanh(rate v)^2) where |v| <= reach, and 0 elsewhere; it fires above the threshold only.
TANH = Surrogate(_tanh, fires=above_the_threshold)
#: STAtten's: the derivative of sigmoid(slope v), and none through the reset.
SIGMOID = Surrogate(_sigmoid, through_reset=False)


def rectangle(v: Tensor, a: float = 1.0) -> Tensor:
    """Spike where v = U - V_th >= 0 (eq. 2), with the rectangular surrogate gradient of eq. 5.

    The gradient dS/dU is 1/a where |v| <= a/2, its edge included, and 0 elsewhere. The paper sets a = 1.
    """
    return RECTANGLE(v, a)
