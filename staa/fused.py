"""The plain neuron in few passes over memory. What it computes stands in `neuron.py`; this file only computes it
faster, and is tested against it. `fused_staa.py` does the same for the STAA neuron.

A neuron is limited by memory traffic: nothing is kept for the backward pass but the current, and the membrane potential
is computed anew. There are two ways: the equations compiled (Inductor, Triton), one pass for all time steps; and, where
there is no compiler or a current is too small to compile for, operators in place on slices that stay in the cache.

`staa.fused.enabled = False`, or STAA_FUSED=0 in the environment, switches both off. Membrane potentials are float32 for
currents of lower precision, and of the current's type otherwise.
"""

import functools
import logging
import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .settings import reason

enabled = os.environ.get("STAA_FUSED", "1").lower() not in ("0", "false", "off", "no")

#: Elements from which a current is worth the seconds that compiling takes, once per process.
WORTH_COMPILING = 2 ** 21
#: Elements of one slice on a CPU.
SLICE = 2 ** 19


def usable(x: Tensor, *numbers) -> bool:
    """Whether a neuron with these settings may take the fast path for the current x: not inside what another compiles,
    traces or transforms (torch.func), nor for a fake tensor or another subclass."""
    return (enabled and type(x) in (Tensor, nn.Parameter) and x.device.type in ("cpu", "cuda")
            and x.is_floating_point() and x.numel() > 0 and all(isinstance(n, (int, float)) for n in numbers)
            and not (torch.compiler.is_compiling() or torch.jit.is_tracing()
                     or torch._C._are_functorch_transforms_active()))


def compiles(x: Tensor) -> bool:
    """Whether x is large enough to compile for, and there is a compiler for its device."""
    return x.numel() >= WORTH_COMPILING and compiler(x.device.type)


@functools.cache
def compiler(device: str) -> bool:
    """Whether torch.compile works here; one warning where it does not."""
    # It would say on stderr that there is a CUDA toolkit and no GPU, which is irrelevant on a CPU.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(2, device=device))
        limits = torch._dynamo.config
        limits.recompile_limit = max(limits.recompile_limit, 64)  # each T is compiled for once more
        return True
    except Exception as error:
        warnings.warn(f"torch.compile does not work here ({reason(error)}): the neurons run without it, more slowly.")
        return False


def lazy_compile(function: Callable, **options) -> Callable:
    """`function` of tensors and lists of them, compiled at its first call: `torch.compile` takes seconds to import.
    options: Inductor's."""
    @functools.cache
    def fast() -> Callable:
        return torch.compile(function, dynamic=True, options=options)

    def bare(x):  # a view would be compiled for anew with each other base
        return x.detach() if isinstance(x, Tensor) else [n.detach() for n in x] if isinstance(x, Sequence) else x

    return functools.wraps(function)(lambda *args: fast()(*map(bare, args)))


def membrane_type(x: Tensor) -> torch.dtype:
    return torch.float32 if x.element_size() < 4 or not x.is_floating_point() else x.dtype


def first_derivative(backward: Callable) -> Callable:
    """A backward pass by hand, which cannot be differentiated again, and says so."""
    def checked(ctx, *grads):
        if torch.is_grad_enabled():
            raise RuntimeError("second derivatives need the reference: set staa.fused.enabled = False, or STAA_FUSED=0")
        return backward(ctx, *grads)
    return checked


@functools.cache
def constants(numbers: tuple, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Settings as a tensor: Python numbers would be compiled in or, in torch 2.13, be wrong from a second set on."""
    return torch.tensor(numbers, dtype=dtype, device=device)


def is_channels_last(x: Tensor) -> bool:
    """Whether x (T, B, C, H, W) lies in memory as T, B, H, W, C."""
    return x.dim() == 5 and not x.is_contiguous() and x.permute(0, 1, 3, 4, 2).is_contiguous()


def flat(x: Tensor, channels_last: bool) -> Tensor:
    """(T, N), in the order of memory; a view where x is laid out as said."""
    return (x.permute(0, 1, 3, 4, 2) if channels_last else x).contiguous().flatten(1)


def shaped(rows: Tensor, shape: torch.Size, channels_last: bool) -> Tensor:
    """The inverse of `flat`."""
    if not channels_last:
        return rows.view(shape)
    T, B, C, H, W = shape
    return rows.view(T, B, H, W, C).permute(0, 1, 4, 2, 3)


def empty_beside(*tensors: Tensor) -> Tensor:
    """Room for a result, like the first tensor, at an address as far as can be from theirs modulo 4 KB: where two agree
    there, a processor takes a load for one that needs the store before it, and waits (4K aliasing)."""
    like, page = tensors[0], 4096
    if like.device.type != "cpu" or like.numel() < WORTH_COMPILING:
        return torch.empty_like(like)
    room = like.new_empty(like.numel() + 2 * page // like.element_size())
    taken = sorted(t.data_ptr() % page for t in tensors)
    gap, before = max((b - a, a) for a, b in zip(taken, [*taken[1:], taken[0] + page]))
    start = (before + gap // 2 - room.data_ptr()) % page // 64 * 64 or page  # 0 would be compiled for once more
    start //= like.element_size()
    return room[start:start + like.numel()].view(like.shape)


class _LIF(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, numbers: tuple):
        last = is_channels_last(x)
        rows = flat(x, last)
        s = empty_beside(rows)
        ctx.save_for_backward(rows)
        ctx.numbers, ctx.shape, ctx.last, ctx.compiles = numbers, x.shape, last, compiles(x)
        if ctx.compiles:
            _lif(rows.unbind(), s.unbind(), constants(numbers, membrane_type(x), x.device), by_the_authors(*numbers))
        else:
            _lif_sliced(rows, s, *numbers)
        return shaped(s, x.shape, last)

    @staticmethod
    @first_derivative
    def backward(ctx, grad: Tensor):
        rows, = ctx.saved_tensors
        grad = flat(grad, ctx.last)
        dx = empty_beside(rows, grad)
        if ctx.compiles:
            _lif_backward(rows.unbind(), grad.unbind(), dx.unbind(),
                          constants(ctx.numbers, membrane_type(rows), rows.device), by_the_authors(*ctx.numbers))
        else:
            _lif_sliced_backward(rows, grad, dx, *ctx.numbers)
        return shaped(dx, ctx.shape, ctx.last), None


def lif(x: Tensor, decay: float, gain: float, v_th: float, v_reset: float, a: float) -> Tensor:
    """Spikes of the plain neuron for the current x (T, B, ...)."""
    return _LIF.apply(x, (decay, gain, v_th, v_reset, a))


def by_the_authors(decay, gain, v_th, v_reset, a) -> bool:
    return (gain, v_reset, a) == (1, 0, 1)


def unpacked(constants: Tensor, authors: bool) -> tuple:
    """The settings one by one; the authors' gain, reset and width as plain numbers, which drop out when compiled."""
    decay, gain, v_th, v_reset, a = constants.unbind()
    return (decay, 1.0, v_th, 0.0, 1.0) if authors else (decay, gain, v_th, v_reset, a)


@lazy_compile
def _lif(x: list[Tensor], s: list[Tensor], constants: Tensor, authors: bool):  # lists of T rows (N,)
    decay, gain, v_th, v_reset, a = unpacked(constants, authors)
    hm = v_reset
    for x_t, s_t in zip(x, s):
        u = v_reset + decay * (hm - v_reset) + gain * x_t.to(constants.dtype)
        fired = u - v_th >= 0
        hm = torch.where(fired, v_reset, u)
        s_t.copy_(fired)


@lazy_compile
def _lif_backward(x: list[Tensor], ds: list[Tensor], dx: list[Tensor], constants: Tensor, authors: bool):
    decay, gain, v_th, v_reset, a = unpacked(constants, authors)
    hm, us = v_reset, []
    for x_t in x:
        us.append(v_reset + decay * (hm - v_reset) + gain * x_t.to(constants.dtype))
        hm = torch.where(us[-1] - v_th >= 0, v_reset, us[-1])
    dhm = None
    for u, ds_t, dx_t in zip(reversed(us), reversed(ds), reversed(dx)):
        du = fire_backward(u, ds_t.to(constants.dtype), dhm, v_th, v_reset, a)
        dx_t.copy_(gain * du)
        dhm = decay * du


def fire_backward(u, ds, dhm, v_th, v_reset, a) -> Tensor:
    """dU from dS and dHm (None after the last step): eqs. 2, 3 and 5."""
    v = u - v_th
    through = ds if dhm is None else ds + dhm * (v_reset - u)
    through = torch.where(v.abs() <= a / 2, through * (1 / a), 0)  # a division is slow
    return through if dhm is None else through + torch.where(v >= 0, 0, dhm)


# The same without a compiler, each operator in place or into a tensor that is there already.

def select(y: Tensor, v: Tensor, low: float, high: float, out: Tensor) -> None:
    """y where low < v < high and 0 elsewhere, in one pass."""
    torch.ops.aten.hardtanh_backward.grad_input(y, v, low, high, grad_input=out)  # named in full: twice as fast to call


def reset(hm: Tensor, u: Tensor, v_th: float, v_reset: float) -> None:
    """hm = u where u < v_th, else v_reset: eq. 3."""
    select(u, u, -torch.inf, v_th, out=hm)
    if v_reset:
        hm += v_reset * (u >= v_th)


def fire_backward_in_place(u: Tensor, ds: Tensor, d: Tensor | None, decay: float, v_th: float, v_reset: float, a: float,
                           room: tuple[Tensor, Tensor], out: Tensor) -> None:
    """`fire_backward` of dHm = decay d, or of no dHm, into `out`; the two tensors of room may be d and out."""
    through, kept = room if d is not None else (out, out)
    if d is not None:
        ds = torch.addcmul(ds, u - v_reset if v_reset else u, d, value=-decay, out=through)
    select(ds.to(u.dtype), u, *rectangle_edges(v_th, a, u.dtype), out=through)
    if a != 1:
        through *= 1 / a
    if d is not None:
        select(d, u, -torch.inf, v_th, out=kept)
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


def _potentials(x: Sequence[Tensor], us: Sequence[Tensor], hm: Tensor, decay, gain, v_th, v_reset) -> Iterator[Tensor]:
    """U[t], step by step, with the rounding of `LIF.charge`; in us[t], or X itself where that is U. hm is room."""
    plain = gain == 1 and not v_reset and x[0].dtype == hm.dtype
    exact = math.frexp(decay)[0] == 0.5  # a power of two: the product is not rounded, and one pass does for two
    before = None
    for x_t, u in zip(x, us):
        if before is not None:
            reset(hm, before, v_th, v_reset)
        elif not plain:
            hm.fill_(v_reset)
        if before is None and plain:
            u = x_t
        elif exact and plain:
            torch.add(x_t, hm, alpha=decay, out=u)
        else:
            if v_reset:
                hm -= v_reset
            torch.mul(hm, decay, out=u)
            if v_reset:
                u += v_reset
            u += x_t if gain == 1 else x_t.to(u.dtype) * gain
        yield u
        before = u


def _lif_sliced(x, s, decay, gain, v_th, v_reset, a):
    for part, (hm, u) in slices(x, 2):
        potentials = _potentials(x[:, part].unbind(), [u] * len(x), hm, decay, gain, v_th, v_reset)
        for u, s_t in zip(potentials, s[:, part].unbind()):
            torch.ge(u, v_th, out=s_t)


def _lif_sliced_backward(x, ds, dx, decay, gain, v_th, v_reset, a):
    in_dx = gain == 1 and dx.dtype == membrane_type(x)
    for part, (hm, through, du, *us) in slices(x, 3 + len(x)):
        us = list(_potentials(x[:, part].unbind(), us, hm, decay, gain, v_th, v_reset))
        d = None  # dU[t+1]
        for u, ds_t, dx_t in zip(reversed(us), reversed(ds[:, part].unbind()), reversed(dx[:, part].unbind())):
            out = dx_t if in_dx else du
            fire_backward_in_place(u, ds_t, d, decay, v_th, v_reset, a, (through, hm), out)
            if not in_dx:
                torch.mul(du, gain, out=dx_t)
            d = out
