"""When and how a neuron takes the fast path. What neurons compute stands in `neuron.py` and `attention.py`;
`fused_lif.py` and `fused_staa.py` only compute it faster, and are tested against them.

A neuron is limited by memory traffic: for the backward pass of a large current the membrane potential is not kept, but
computed anew. There are three ways: functions written by hand, for the STAA neuron on a CPU in C, and for it and LIF
on a GPU, with the paper's surrogate, in Triton; elsewhere the equations compiled (Inductor, Triton); and, where
there is no compiler or nothing to gain by it, operators in place. (One difference: where a potential is NaN or
infinite, it and its gradients are NaN after the reset in the equations; here they may be 0, or NaN before it.)

`staa.fused.enabled = False`, or STAA_FUSED=0 in the environment, switches all off. Membrane potentials are float32 for
currents of lower precision, and of the current's type otherwise.
"""

import functools
import logging
import os
import threading
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from .settings import reason

enabled = os.environ.get("STAA_FUSED", "1").lower() not in ("0", "false", "off", "no")

#: Elements, of at most 64 channels, from which a current is worth the seconds that compiling takes: once per process,
#: and on a GPU once for each size of a feature map.
WORTH_COMPILING = 2 ** 21


def usable(x: Tensor, *numbers) -> bool:
    """Whether a neuron with these settings may take the fast path for the current x: not inside what another traces or
    transforms (torch.func), nor for a fake tensor or another subclass."""
    return (enabled and type(x) in (Tensor, nn.Parameter) and x.device.type in ("cpu", "cuda")
            and x.is_floating_point() and x.numel() > 0 and all(isinstance(n, (int, float)) for n in numbers)
            and not (torch.jit.is_tracing() or torch._C._are_functorch_transforms_active()
                     or not torch.compiler.is_compiling()
                     and torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY)))  # make_fx


def is_large(x: Tensor, channels: int = 64) -> bool:
    """Whether x is worth compiling for. With the channels grow the convolutions beside it, and so a whole training."""
    return x.numel() * max(channels, 64) >= WORTH_COMPILING * 64


def compiles(x: Tensor, differentiated: bool) -> bool:
    """Whether x is worth compiling for, and there is a compiler for its device. On a CPU only where a gradient will be
    asked for: on the way forward, operators in place are nearly as fast."""
    return is_large(x) and (differentiated or on_gpu(x)) and compiler(x.device.type)


@functools.cache
def compiler(device: str) -> bool:
    """Whether torch.compile works here; one warning where it does not."""
    # It would say on stderr that there is a CUDA toolkit and no GPU, which is irrelevant on a CPU.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    return works("torch.compile", lambda: torch.compile(lambda x: x + 1)(torch.zeros(2, device=device)))


@functools.cache
def triton_works(device: str) -> bool:
    """Whether a kernel written by hand works here; the same warning. torch.compile takes seconds more to find out."""
    def launch():
        from .kernels import over_batch  # Triton is not everywhere
        x = torch.zeros(1, 1, 16, device=device)
        over_batch[(1, 1)](x, torch.empty_like(x), 1, 16, BR=16, BJ=16)
    return works("Triton", launch)


def kernels_for(x: Tensor) -> bool:
    """Whether kernels written by hand can compute x: on a GPU, in float32 or less, where Triton works."""
    return on_gpu(x) and x.dtype != torch.float64 and triton_works(x.device.type)


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Bytes that a program on this GPU may have; in Triton's interpreter there is no limit."""
    if device.type != "cuda":
        return 2 ** 20
    properties: Any = torch.cuda.get_device_properties(device)
    return getattr(properties, "shared_memory_per_block_optin", 2 ** 16)


def works(what: str, attempt: Callable) -> bool:
    try:
        attempt()
        return True
    except Exception as error:
        why = f"the path of torch has a space, {torch.__path__[0]}" if " " in torch.__path__[0] else reason(error)
        warnings.warn(f"{what} does not work here ({why}): the neurons run without it, more slowly.")
        return False


_here = threading.local()


def set_limits() -> None:
    """Set torch's limits for compiling, of which each thread has its own: a GPU's backward pass runs in another one."""
    if not hasattr(_here, "set"):
        limits = torch._dynamo.config
        limits.recompile_limit = max(limits.recompile_limit, 64)  # each T, and on a GPU each size, is compiled for
        torch.fx.experimental._config.use_duck_shape = False  # sizes that happen to agree would be taken for one
        _here.set = True


def lazy_compile(function: Callable) -> Callable:
    """`function` of tensors and lists of them, compiled at its first call: `torch.compile` takes seconds to import."""
    @functools.cache
    def fast() -> Callable:
        return torch.compile(function, dynamic=True)

    def bare(x):
        if isinstance(x, Tensor):
            return bare_tensor(x)
        if isinstance(x, Sequence) and all(isinstance(n, Tensor) for n in x):
            return [bare_tensor(n) for n in x]
        return x

    @functools.wraps(function)
    def call(*args):
        set_limits()
        return fast()(*map(bare, args))
    return call


def bare_tensor(x: Tensor) -> Tensor:
    """x detached, since a view of another base would be compiled for anew. On a GPU the sizes of a current (T, B, ...)
    are compiled in, but for the batch's: a kernel that does not know them divides integers, and loads one number at a
    time."""
    x = x.detach()
    if on_gpu(x) and x.dim() > 2:
        for dimension in (0, *range(2, x.dim())):
            torch._dynamo.mark_static(x, dimension)
    return x


def on_gpu(x: Tensor) -> bool:
    """Whether x is compiled for as on a GPU; tests answer it themselves, to run a GPU's kernels without one."""
    return x.is_cuda


def on(device: torch.device) -> AbstractContextManager:
    """Triton launches on the current GPU."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


# Triton has these two as well; called from Python they take many times as long.

def cdiv(n: int, size: int) -> int:
    """How many pieces of a size n is, the last one perhaps smaller."""
    return -(-n // size)


def next_power_of_2(n: int) -> int:
    """The least one that is not below n, which is at least 1."""
    return 1 << (n - 1).bit_length()


def membrane_type(x: Tensor) -> torch.dtype:
    return torch.float32 if x.element_size() < 4 or not x.is_floating_point() else x.dtype


def first_derivative(backward: Callable) -> Callable:
    """A backward pass by hand, which can neither be differentiated again nor take a batch of gradients, and says so."""
    def checked(ctx, *grads):
        batched = any(torch._C._functorch.is_legacy_batchedtensor(g) for g in grads if g is not None)
        needs = "second derivatives" if torch.is_grad_enabled() else "batched gradients" if batched else None
        if needs:
            raise RuntimeError(f"{needs} need the reference: set staa.fused.enabled = False, or STAA_FUSED=0")
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


def empty_for_rows(x: Tensor, channels_last: bool) -> Tensor:
    """An empty tensor like x for a result; `flat` of it is a view to write into. It is no view itself, since autograd
    does not let a caller change in place a view that a Function returned."""
    return torch.empty_like(x, memory_format=torch.preserve_format if channels_last else torch.contiguous_format)
