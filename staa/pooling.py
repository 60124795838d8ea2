"""Average pooling. torch's own is slow for channels-last maps on a GPU: (512, 64, 32, 32) in bf16 takes an H200 0.8 ms
there and back; the bytes read and written, over its memory's bandwidth, are 0.05."""

from typing import Any

import torch
from torch import Tensor, nn

from . import fused
from .fused import cdiv, next_power_of_2, on

#: Numbers of the result that a program computes, and of how many channels.
ELEMENTS, CHANNELS = 1024, 64


class AvgPool2d(nn.AvgPool2d):
    """torch's layer: x (B, C, H, W) to the means of its windows, (B, C, h, w). On a GPU, where x is large, by kernels
    of our own (`kernels_pool.py`), unless `staa.fused.enabled` is off."""

    def forward(self, x: Tensor) -> Tensor:
        return _Pool.apply(x, self.kernel_size) if self.is_by_hand(x) else super().forward(x)

    def is_by_hand(self, x: Tensor) -> bool:
        """Whether there are kernels for it: windows lie side by side, and none over the edge."""
        K = self.kernel_size
        return (isinstance(K, int) and self.stride == K and not self.padding and self.divisor_override is None
                and fused.usable(x) and not torch.compiler.is_compiling()
                and x.dim() == 4 and x.shape[2] % K == x.shape[3] % K == 0
                and x.is_contiguous(memory_format=torch.channels_last) and fused.is_large(x, x.shape[1])
                and fused.kernels_for(x))


class _Pool(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, K: int):
        from .kernels_pool import pool  # Triton is not everywhere
        ctx.shape, ctx.K = x.shape, K
        out = empty(x, (*x.shape[:2], x.shape[2] // K, x.shape[3] // K))
        launch(pool, x, out, K, out.shape)
        return out

    @staticmethod
    def backward(ctx, dout: Tensor):
        return _Spread.apply(dout, ctx.K, ctx.shape), None


class _Spread(torch.autograd.Function):
    """The gradient of `_Pool`, which is linear: they are each other's."""

    @staticmethod
    def forward(ctx, dout: Tensor, K: int, shape: torch.Size):
        from .kernels_pool import pool_backward
        ctx.K = K
        dx = empty(dout, shape)
        launch(pool_backward, dout, dx, K, dout.shape)
        return dx

    @staticmethod
    def backward(ctx, ddx: Tensor):
        return _Pool.apply(ddx, ctx.K), None, None


def empty(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def launch(kernel: Any, x: Tensor, out: Tensor, K: int, means: torch.Size) -> None:
    """A kernel from x to out, one of which has the shape of the means."""
    B, C, h, w = means
    BC = min(next_power_of_2(C), CHANNELS)
    BP = ELEMENTS // BC
    with on(x.device):
        kernel[(cdiv(B * h * w, BP), cdiv(C, BC))](x.contiguous(memory_format=torch.channels_last), out, B * h * w, w=w,
                                                   C=C, K=K, BP=BP, BC=BC)
