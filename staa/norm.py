"""Batch normalisation. torch's own is slow for large channels-last maps on a GPU: (2048, 64, 32, 32) in bf16 takes an
H200 1.34 ms there and back, ours 0.55; the bytes read and written, over its memory's bandwidth, are 0.5."""

from typing import Any

import torch
from torch import Tensor, nn

from . import fused
from .fused import cdiv, first_derivative, next_power_of_2, on

#: Elements from which a map is normalised by our own kernels: of less, Python takes longer to launch them.
LARGE = 2 ** 25
#: Elements that a program looks at at once, and of how many channels; most programs of a sum; its warps.
ELEMENTS, CHANNELS, PROGRAMS, WARPS = 4096, 64, 528, 4
#: Rows whose mean is the shift; programs whose sums are added at once, and of how many channels.
SHIFT, TOGETHER = dict(BS=64), dict(BP=64, BC=16)


class BatchNorm2d(nn.BatchNorm2d):
    """torch's layer. On a GPU, in training and where x (B, C, H, W) is large, by kernels of our own
    (`kernels_norm.py`), unless `staa.fused.enabled` is off; the statistics are in float32 as there."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.is_by_hand(x) or self.num_batches_tracked is None:
            return super().forward(x)
        self.num_batches_tracked.add_(1)
        return _Norm.apply(x, self.weight, self.bias, self.running_mean, self.running_var, self.eps, self.momentum)

    def is_by_hand(self, x: Tensor) -> bool:
        """Whether there are kernels for it."""
        if not self.training or torch.compiler.is_compiling() or not fused.usable(x, self.eps, self.momentum):
            return False  # before anything is asked about the sizes of x, which an export would take for a condition
        numbers: list[Any] = [self.weight, self.bias, self.running_mean, self.running_var]  # or None
        return (x.dim() == 4 and x.shape[1] == self.num_features
                and x.numel() >= max(LARGE, 2 * x.shape[1])  # one value a channel has no variance, which torch says
                and x.is_contiguous(memory_format=torch.channels_last)
                and all(type(p) in (Tensor, nn.Parameter) and p.dtype == torch.float32 and p.device == x.device
                        and p.is_contiguous() for p in numbers)
                and fused.kernels_for(x))


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, running_mean: Tensor, running_var: Tensor, eps: float,
                momentum: float):
        from .kernels_norm import moments, normalise, statistics  # Triton is not everywhere
        M, C = x.numel() // x.shape[1], x.shape[1]
        y, (mean, scale) = torch.empty_like(x), weight.new_empty(2, C)
        with on(x.device):
            part = summed(moments, (x,), (), M, C, **SHIFT)
            statistics[(cdiv(C, TOGETHER["BC"]),)](x, part, mean, scale, running_mean, running_var, eps, momentum, M,
                                                   len(part), C=C, **SHIFT, **TOGETHER)
            by_rows(normalise, M, C, x, y, mean, scale, weight, bias)
        ctx.save_for_backward(x, mean, scale, weight)
        return y

    @staticmethod
    @first_derivative
    def backward(ctx, dy: Tensor):
        from .kernels_norm import gradient_moments, normalise_backward, parameter_gradients
        x, mean, scale, weight = ctx.saved_tensors
        M, C = x.numel() // x.shape[1], x.shape[1]
        dy, dx = dy.contiguous(memory_format=torch.channels_last), torch.empty_like(x)
        dweight, dbias = torch.empty_like(weight), torch.empty_like(weight)
        with on(x.device):
            part = summed(gradient_moments, (x, dy), (mean,), M, C)
            parameter_gradients[(cdiv(C, TOGETHER["BC"]),)](part, scale, dweight, dbias, len(part), C=C, **TOGETHER)
            by_rows(normalise_backward, M, C, x, dy, dx, mean, scale, weight, dweight, dbias)
        return dx, dweight, dbias, *[None] * 4


def sizes(C: int) -> dict[str, int]:
    BC = min(next_power_of_2(C), CHANNELS)
    return dict(C=C, BM=ELEMENTS // BC, BC=BC, num_warps=WARPS)


def summed(kernel: Any, maps: tuple[Tensor, ...], numbers: tuple[Tensor, ...], M: int, C: int,
           **settings: int) -> Tensor:
    """Two sums over rows of maps (M, C), of some rows each: (P, 2, C)."""
    size = sizes(C)
    rows = cdiv(cdiv(M, PROGRAMS), size["BM"]) * size["BM"]
    part = torch.empty(cdiv(M, rows), 2, C, dtype=torch.float32, device=maps[0].device)
    kernel[(len(part), cdiv(C, size["BC"]))](*maps, part, *numbers, M, rows, **size, **settings)
    return part


def by_rows(kernel: Any, M: int, C: int, *tensors: Tensor) -> None:
    size = sizes(C)
    kernel[(cdiv(M, size["BM"]), cdiv(C, size["BC"]))](*tensors, M, **size)
