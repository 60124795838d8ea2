"""The LIF neuron in few passes over memory, with any surrogate. What it computes stands in `neuron.py`; this file only
computes it faster, and is tested against it."""

import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack, to_dlpack

from . import fused
from .fused import (
    compiles,
    constants,
    empty_for_rows,
    first_derivative,
    flat,
    is_channels_last,
    lazy_compile,
    membrane_type,
)
from .surrogate import RECTANGLE, Surrogate, above_the_threshold, at_the_threshold

#: Elements of one slice on a CPU, and time steps that the kernels on a GPU have at most: each is compiled.
SLICE, LONGEST = 2 ** 19, 32


class _LIF(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, numbers: tuple, surrogate: Surrogate):
        ctx.save_for_backward(x)
        ctx.numbers, ctx.surrogate, ctx.last = numbers, surrogate, is_channels_last(x)
        ctx.by_hand = len(x) <= LONGEST and written_by_hand(x, surrogate)  # of any size: two kernels for all
        ctx.compiles = not ctx.by_hand and compiles(x, ctx.needs_input_grad[0])
        s = empty_for_rows(x, ctx.last)
        rows, s_rows = flat(x, ctx.last), flat(s, ctx.last)
        if ctx.by_hand:
            from . import fused_lif_gpu  # Triton, which is not everywhere
            fused_lif_gpu.forward(rows, s_rows, *numbers)
        elif ctx.compiles:
            _lif(sixteens(rows), rows_of(sixteens(s_rows)), *as_compiled(numbers, x), surrogate)
        else:
            _lif_sliced(rows, s_rows, surrogate, *numbers)
        return s

    @staticmethod
    @first_derivative
    def backward(ctx, grad: Tensor):
        x, = ctx.saved_tensors
        dx = empty_for_rows(x, ctx.last)
        rows, ds, dx_rows = flat(x, ctx.last), flat(grad, ctx.last), flat(dx, ctx.last)
        if ctx.by_hand:
            from . import fused_lif_gpu
            fused_lif_gpu.backward(rows, ds, dx_rows, *ctx.numbers)
        elif ctx.compiles:
            rows, ds, dx_rows = map(sixteens, (rows, ds, dx_rows))
            _lif_backward(rows, ds, rows_of(dx_rows), *as_compiled(ctx.numbers, x), ctx.surrogate)
        else:
            _lif_sliced_backward(rows, ds, dx_rows, ctx.surrogate, *ctx.numbers)
        return dx, None, None


def lif(x: Tensor, numbers: tuple, surrogate: Surrogate) -> Tensor:
    """Spikes of the plain neuron for the current x (T, B, ...). numbers: those of `LIF.numbers`."""
    return _LIF.apply(x, numbers, surrogate)


def written_by_hand(x: Tensor, surrogate: Surrogate) -> bool:
    """Whether there are kernels for it: with the paper's surrogate."""
    return surrogate is RECTANGLE and fused.kernels_for(x)


def as_compiled(numbers: tuple, x: Tensor) -> tuple[Tensor, bool]:
    """The numbers as a tensor, and whether the gain, the reset and the surrogate's settings are the usual 1, 0 and 1:
    as plain numbers these drop out when compiled."""
    _, gain, _, v_reset, *settings = numbers
    return constants(numbers, membrane_type(x), x.device), gain == 1 and v_reset == 0 and all(n == 1 for n in settings)


def unpacked(numbers: Tensor, usual: bool) -> list:
    decay, gain, v_th, v_reset, *settings = numbers.unbind()
    return [decay, 1.0, v_th, 0.0, *[1.0] * len(settings)] if usual else [decay, gain, v_th, v_reset, *settings]


def potentials(x: Tensor, surrogate: Surrogate, decay, gain, v_th, v_reset) -> list[Tensor]:
    """U[t] of all T rows of x, of the membrane's type: eqs. 1 to 3."""
    us, hm = [], v_reset
    for x_t in x.unbind():
        us.append(v_reset + decay * (hm - v_reset) + gain * x_t)
        hm = torch.where(surrogate.fires(us[-1] - v_th), v_reset, us[-1])
    return us


def sixteens(x: Tensor) -> Tensor:
    """x (T, N), on a GPU as (T, N / 16, 16) where 16 divides N: Triton then knows that it does, and loads 16 bytes at
    once."""
    return x.unflatten(1, (-1, 16)) if fused.on_gpu(x) and x.shape[1] % 16 == 0 else x


def rows_of(x: Tensor) -> Sequence[Tensor]:
    """The rows of x. Those of `sixteens` as tensors of their own, not views: of a view the compiler does not know at
    which address it begins, and so not that it can load 16 bytes at once."""
    if x.dim() == 2:
        return x.unbind()
    return [from_dlpack(to_dlpack(row)) for row in x.unbind()]  # from_dlpack(row) works on the current GPU only


# Results are copied into rows that exist: of a `torch.stack` a GPU's kernel would compute U anew for each row.

@lazy_compile
def _lif(x: Tensor, s: list[Tensor], numbers: Tensor, usual: bool, surrogate: Surrogate) -> None:
    decay, gain, v_th, v_reset, *_ = unpacked(numbers, usual)
    for u, s_t in zip(potentials(x.to(numbers.dtype), surrogate, decay, gain, v_th, v_reset), s):
        s_t.copy_(surrogate.fires(u - v_th))


@lazy_compile
def _lif_backward(x: Tensor, ds: Tensor, dx: list[Tensor], numbers: Tensor, usual: bool, surrogate: Surrogate) -> None:
    decay, gain, v_th, v_reset, *settings = unpacked(numbers, usual)
    us = potentials(x.to(numbers.dtype), surrogate, decay, gain, v_th, v_reset)
    dhm = None
    for u, ds_t, dx_t in zip(reversed(us), reversed(ds.to(numbers.dtype).unbind()), reversed(dx)):
        du = fire_backward(u, ds_t, dhm, surrogate, v_th, v_reset, *settings)
        dx_t.copy_(gain * du)
        dhm = decay * du


def fire_backward(u, ds, dhm, surrogate: Surrogate, v_th, v_reset, *settings) -> Tensor:
    """dU from dS and dHm (None after the last step): eqs. 2, 3 and 5."""
    v = u - v_th
    through = ds if dhm is None or not surrogate.through_reset else ds + dhm * (v_reset - u)
    through = through * surrogate.gradient(v, *settings)
    return through if dhm is None else through + torch.where(surrogate.fires(v), 0, dhm)


# The same without a compiler, each operator in place or into a tensor that is there already.

def select(y: Tensor, v: Tensor, low: float, high: float, out: Tensor) -> None:
    """y where low < v < high and 0 elsewhere, in one pass."""
    torch.ops.aten.hardtanh_backward.grad_input(y, v, low, high, grad_input=out)  # named in full: twice as fast to call


def fire(u: Tensor, s: Tensor, surrogate: Surrogate, v_th: float) -> None:
    """s = 1 where u fires, else 0: eq. 2."""
    if surrogate.fires is at_the_threshold:
        torch.ge(u, v_th, out=s)
    elif surrogate.fires is above_the_threshold:
        torch.gt(u, v_th, out=s)
    else:
        s.copy_(surrogate.fires(u - v_th))


def reset(hm: Tensor, u: Tensor, surrogate: Surrogate, v_th: float, v_reset: float) -> None:
    """hm = v_reset where u fires, else u: eq. 3."""
    if v_reset:
        hm.copy_(u).masked_fill_(surrogate.fires(u - v_th), v_reset)
    else:
        keep_quiet(u, u, surrogate, v_th, out=hm)


def keep_quiet(y: Tensor, u: Tensor, surrogate: Surrogate, v_th: float, out: Tensor) -> None:
    """y where u does not fire and 0 elsewhere; out may be y. A mask of type bool would take several times as long."""
    if surrogate.fires is at_the_threshold:
        select(y, u, -torch.inf, v_th, out=out)
    else:
        s = torch.empty_like(u)
        fire(u, s, surrogate, v_th)
        torch.addcmul(y, y, s, value=-1, out=out)


def fire_backward_in_place(u: Tensor, ds: Tensor, d: Tensor | None, decay: float, room: tuple[Tensor, Tensor],
                           out: Tensor, surrogate: Surrogate, v_th: float, v_reset: float, *settings: float) -> None:
    """`fire_backward` of dHm = decay d, or of no dHm where d is None, into `out`. room: two tensors to compute in, of
    which only the second may be d."""
    through, kept = room if d is not None else (out, out)
    if d is not None and surrogate.through_reset:
        ds = torch.addcmul(ds, u - v_reset if v_reset else u, d, value=-decay, out=through)
    if surrogate is RECTANGLE:
        a, = settings
        select(ds.to(u.dtype), u, *rectangle_edges(v_th, a, u.dtype), out=through)
        if a != 1:
            through *= 1 / a
    else:
        torch.mul(ds, surrogate.gradient(u - v_th, *settings), out=through)
    if d is not None:
        keep_quiet(d, u, surrogate, v_th, out=kept)
        torch.add(through, kept, alpha=decay, out=out)


@functools.cache
def rectangle_edges(v_th: float, a: float, dtype: torch.dtype) -> tuple[float, float]:
    """The numbers just outside eq. 5's rectangle: abs(u - v_th) <= a / 2, rounded as ever, where low < u < high."""
    kind: Any = {torch.float32: np.float32, torch.float64: np.float64}[dtype]

    def edge(sign: int) -> float:
        inside, outside = kind(v_th), kind(v_th + sign * (2 * a + abs(v_th)))
        while (middle := inside / 2 + outside / 2) not in (inside, outside):
            if abs(middle - kind(v_th)) <= kind(a / 2):
                inside = middle
            else:
                outside = middle
        return float(outside)

    return edge(-1), edge(1)


def slices(x: Tensor, buffers: int) -> Iterator[tuple[slice, tuple[Tensor, ...]]]:
    """Slices of the rows of x (T, N), on a GPU one; with each the same buffers again, in the membrane's type."""
    size = min(SLICE, x.shape[1]) if x.device.type == "cpu" else x.shape[1]
    memory = x.new_empty(buffers, size, dtype=membrane_type(x))
    for start in range(0, x.shape[1], size):
        part = slice(start, min(start + size, x.shape[1]))
        yield part, memory[:, :part.stop - part.start].unbind()


def potentials_in_place(x: Sequence[Tensor], us: Sequence[Tensor], hm: Tensor, surrogate: Surrogate, decay, gain, v_th,
                        v_reset) -> Iterator[Tensor]:
    """U[t], step by step, rounded as `LIF.charge` rounds: written to us[t], or X[0] itself where that equals U[0].
    hm: a tensor to compute in."""
    if gain == 1 and not v_reset and x[0].dtype == hm.dtype:  # as in the networks: U[0] is X[0], Hm needs no shift
        exact = math.frexp(decay)[0] == 0.5  # a power of two: the product is not rounded, and one pass does for two
        u = x[0]
        yield u
        for x_t, out in zip(x[1:], us[1:]):
            reset(hm, u, surrogate, v_th, v_reset)
            u = torch.add(x_t, hm, alpha=decay, out=out) if exact else torch.mul(hm, decay, out=out).add_(x_t)
            yield u
        return
    hm.fill_(v_reset)
    for t, (x_t, u) in enumerate(zip(x, us)):
        if t:
            reset(hm, us[t - 1], surrogate, v_th, v_reset)
        if v_reset:
            hm -= v_reset
        torch.mul(hm, decay, out=u)
        if v_reset:
            u += v_reset
        u += x_t if gain == 1 else x_t.to(u.dtype) * gain
        yield u


def _lif_sliced(x, s, surrogate, decay, gain, v_th, v_reset, *_):
    for part, (hm, u) in slices(x, 2):
        potentials = potentials_in_place(x[:, part].unbind(), [u] * len(x), hm, surrogate, decay, gain, v_th, v_reset)
        for u, s_t in zip(potentials, s[:, part].unbind()):
            fire(u, s_t, surrogate, v_th)


def _lif_sliced_backward(x, ds, dx, surrogate, decay, gain, v_th, v_reset, *settings):
    in_dx = gain == 1 and dx.dtype == membrane_type(x)
    for part, (hm, through, du, *us) in slices(x, 3 + len(x)):
        us = list(potentials_in_place(x[:, part].unbind(), us, hm, surrogate, decay, gain, v_th, v_reset))
        d = None  # dU[t+1]
        for u, ds_t, dx_t in zip(reversed(us), reversed(ds[:, part].unbind()), reversed(dx[:, part].unbind())):
            out = dx_t if in_dx else du
            fire_backward_in_place(u, ds_t, d, decay, (through, hm), out, surrogate, v_th, v_reset, *settings)
            if not in_dx:
                torch.mul(du, gain, out=dx_t)
            d = out
