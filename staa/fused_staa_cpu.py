"""The STAA neuron on a CPU, by hand, in C: `fused_cpu.c`. What it computes stands in `attention.py`; it is tested
against that. It takes one sample after another, so that what is between lies in the cache: where an operator goes over
the whole batch, a neuron waits for memory. The machine's C compiler takes a second for it, torch.compile a minute. The
gradient of a surrogate that is the reader's own is computed by torch, of some samples after others.
"""

import ctypes
import functools
import os
import shlex
import subprocess
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from . import fused
from .fused import first_derivative, membrane_type
from .surrogate import RECTANGLE, Surrogate, at_the_threshold

SOURCE = Path(__file__).with_name("fused_cpu.c")
#: Without the last three a product and a sum would be rounded as one, and choices would not be made for many numbers at
#: once. -O3 takes longer to compile, and makes nothing faster.
FLAGS = ("-O2 -ftree-vectorize -march=native -fopenmp -fPIC -ffp-contract=off -fno-math-errno "
         "-fno-trapping-math").split()
REALS: dict[torch.dtype, tuple[str, Any]] = {torch.float32: ("float", ctypes.c_float),
                                             torch.float64: ("double", ctypes.c_double)}
#: As in fused_cpu.c: the fields of its structures, with the shapes of parameters and the sizes in a row.
SIZES = ("last", "T", "B", "N", "C", "J", "H", "M", "first", "end")
PARAMETERS = {"pe_input.weight": "TC", "pe_membrane.weight": "TC", "pe_output.weight": "TC", "gc.key.weight": "1C",
              "gc.query.weight": "JC", "gc.query.bias": "J", "gc.norm.weight": "J", "gc.norm.bias": "J",
              "gc.value.weight": "CJ", "gc.value.bias": "C", "sa.squeeze.weight": "HC", "sa.squeeze.bias": "H",
              "sa.excite.weight": "CH", "sa.excite.bias": "C"}
RULE = ("v_th", "v_reset", "half", "height", "through", "leak", "rest", "alpha", "decay", "total", "offset")
COLUMNS = {"context": "C", "hat": "J", "n": "J", "added": "C", "mean": "C", "pool": "C", "hidden": "H", "p": "C",
           "slope": "C", "dexcite": "C", "dsqueeze": "H", "dvalue": "C", "dn": "J", "dq": "J", "dkey": "C",
           "doutput": "C", "dmembrane": "C", "dinput": "C", "dmean": "C", "scale": "1"}
#: The gradient of a linear layer is a product of two columns.
PRODUCTS = {"gc.query": ("dq", "context"), "gc.value": ("dvalue", "n"), "sa.squeeze": ("dsqueeze", "pool"),
            "sa.excite": ("dexcite", "hidden")}

#: A current may be so many times smaller than one that is worth compiling by torch: C is compiled in a second.
SMALLER = 512
#: So many numbers of potentials, and of slopes, are at hand at once.
SLICE = 2 ** 18


def in_c(x: Tensor, surrogate: Surrogate, parameters: dict[str, Tensor]) -> bool:
    """Whether the current x (T, B, C, H, W) is computed in C: where there are samples for half of the threads, which
    are then faster than all of them in place, the neuron fires at its threshold, and nobody counts torch's operators.
    Addresses are handed over, so what does not fit together, or is not there, is left to torch, which says so."""
    small = x.numel() * SMALLER < fused.WORTH_COMPILING or 2 * x.shape[1] < torch.get_num_threads()
    if small or is_in_torch_dispatch_mode():
        return False
    sizes = sizes_of(x.shape[0], x.shape[2], parameters)
    fits = all(type(p) in (Tensor, nn.Parameter) and p.device == x.device and p.dim() == len(shape)
               and all(n == sizes[size] for n, size in zip(p.shape, shape))
               for p, shape in ((p, PARAMETERS.get(name, "1")) for name, p in parameters.items()))
    blocks = {name[:3] for name in parameters}
    whole = all(name in parameters for name in PARAMETERS if name[:3] in blocks & {"gc.", "sa."})
    return (surrogate.fires is at_the_threshold and x.is_cpu and not fused.on_gpu(x) and fits and whole
            and available(torch.is_grad_enabled() and fused.is_large(x, x.shape[2])))


def sizes_of(T: int, C: int, parameters: dict[str, Tensor]) -> dict[str, int]:
    """The sizes that letters stand for in PARAMETERS and COLUMNS."""
    J, H = (len(parameters[name]) if name in parameters else 0 for name in ("gc.query.bias", "sa.squeeze.bias"))
    return {"T": T, "C": C, "J": J, "H": H, "1": 1}


@functools.cache
def available(matters: bool) -> bool:
    """Whether this machine compiles `fused_cpu.c`; one warning where it does not, if that matters: large currents are
    trained on."""
    with nullcontext() if matters else warnings.catch_warnings(action="ignore"):
        return fused.works("the C compiler", lambda: library(torch.float32))


@functools.cache
def library(dtype: torch.dtype) -> ctypes.CDLL:
    """The functions of `fused_cpu.c` for numbers of this type. Raises OSError or CalledProcessError."""
    with TemporaryDirectory() as folder:
        compiled, shared = f"{folder}/fused_cpu.o", f"{folder}/fused_cpu.so"
        run(*FLAGS, f"-DREAL={REALS[dtype][0]}", "-c", str(SOURCE), "-o", compiled)
        try:  # with torch's own threads
            run("-shared", compiled, "-o", shared)
            return ctypes.CDLL(shared)
        except OSError:
            run("-shared", "-fopenmp", compiled, "-o", shared)
            return ctypes.CDLL(shared)


def run(*arguments: str) -> None:
    subprocess.run([*shlex.split(os.environ.get("CC", "cc")), *arguments], check=True, capture_output=True)


def staa_in_c(x: Tensor, space: int, kept: Tensor | None, numbers: tuple, leaky: bool, surrogate: Surrogate,
              parameters: dict[str, Tensor]) -> Tensor:
    """Spikes for the current x as it lies; the rest is as in `fused_staa.equations`."""
    alpha, decay, gain, v_th, v_reset, *settings = numbers
    leak, decay = (decay, 1.0) if leaky else (1.0, decay)
    total, offset = (alpha, 0.0) if "sa.squeeze.weight" in parameters else (decay + gain, v_reset * (1 - decay))
    half, height = (settings[0] / 2, 1 / settings[0]) if surrogate is RECTANGLE else (0.0, 0.0)
    through, rest = float(surrogate.through_reset), v_reset * (1 - leak)
    rule = v_th, v_reset, half, height, through, leak, rest, alpha, decay, total, offset
    return _InC.apply(x, space, kept, rule, (surrogate, *settings), tuple(parameters), *parameters.values())


class _InC(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, space, kept, rule, spike, names, *values):
        ctx.save_for_backward(x, *values)
        ctx.how, ctx.spike, ctx.names = (space, kept, rule), spike, names
        real = x.to(membrane_type(x))
        s = torch.empty_like(real)
        call("staa", real, (0, x.shape[1]), ctx.how, dict(zip(names, values)), (s, None))
        return s.to(x.dtype)

    @staticmethod
    @first_derivative
    def backward(ctx, ds):
        x, *values = ctx.saved_tensors
        real, parameters = x.to(membrane_type(x)), dict(zip(ctx.names, values))
        sizes = sizes_of(len(x), x.shape[-3 - ctx.how[0]], parameters)
        widths = [sizes[size] for size in COLUMNS.values()]
        dx, rows = torch.empty_like(real), real.new_empty(*x.shape[:2], sum(widths))
        with torch.autocast("cpu", enabled=False):  # as it was on the way forward, see `STAALIF`
            ds = ds.to(real.dtype).contiguous()
            for samples in pieces(x, ctx.spike[0]):
                slopes = slopes_of(real, samples, ctx.how, ctx.spike, parameters)
                call("staa_backward", real, samples, ctx.how, parameters, (ds, slopes, dx, rows))
            r = dict(zip(COLUMNS, rows.split(widths, -1)))
            return dx.to(x.dtype), *[None] * 5, *[gradient(name, r) for name in ctx.names]


def pieces(x: Tensor, surrogate: Surrogate) -> Iterator[tuple[int, int]]:
    """The first sample and the end of each: where the slopes come from torch, so many that they lie in the cache."""
    B, threads = x.shape[1], torch.get_num_threads()
    size = B if surrogate is RECTANGLE else threads * max(SLICE * B // (x.numel() * threads), 1)
    return ((first, min(first + size, B)) for first in range(0, B, size))


def slopes_of(x: Tensor, samples: tuple[int, int], how: tuple, spike: tuple,
              parameters: dict[str, Tensor]) -> Tensor | None:
    """dS/dU, of these samples, for a surrogate that is the reader's own; C knows eq. 5's."""
    surrogate, *settings = spike
    if surrogate is RECTANGLE:
        return None
    v_th, u = how[-1][0], x.new_empty(len(x), samples[1] - samples[0], *x.shape[2:])
    call("staa", x, samples, how, parameters, (None, u))
    return torch.as_tensor(surrogate.gradient(u.sub_(v_th), *settings), dtype=x.dtype).expand_as(u).contiguous()


def gradient(name: str, r: dict[str, Tensor]) -> Tensor:
    """That of a parameter; r: the columns of the rows, (T, B, ...)."""
    block, _, kind = name.rpartition(".")
    if block in PRODUCTS:
        dy, x = (r[column].flatten(0, 1) for column in PRODUCTS[block])
        return dy.mT @ x if kind == "weight" else dy.sum(0)
    if block == "gc.key":  # whose bias the softmax does not see
        return r["dkey"].sum((0, 1)).unsqueeze(0) if kind == "weight" else r["dkey"].new_zeros(1)
    if block == "gc.norm":
        return (r["dn"] * r["hat"] if kind == "weight" else r["dn"]).sum((0, 1))
    return r[block.replace("pe_", "d")].sum(1)


def call(name: str, x: Tensor, samples: tuple[int, int], how: tuple, parameters: dict[str, Tensor],
         others: tuple[Tensor | None, ...]) -> None:
    """A function of `fused_cpu.c`, for samples from one to before another. how: the axis of space, `kept`, and RULE's
    numbers. x and the others: contiguous, and of one type. Raises MemoryError."""
    def address(y: Tensor | None) -> ctypes.c_void_p:
        return ctypes.c_void_p(None if y is None else y.data_ptr())

    space, kept, rule = how
    T, B, N, C = len(x), x.shape[1], x.shape[space], x.shape[-3 - space]
    letters = sizes_of(T, C, parameters)
    row = sum(letters[size] for size in COLUMNS.values())
    sizes = space == -2, T, B, N, C, letters["J"], letters["H"], row, *samples
    given = [*(parameters.get(name) for name in PARAMETERS), kept]
    failed = getattr(library(x.dtype), name)((ctypes.c_longlong * len(SIZES))(*sizes),
                                             (ctypes.c_void_p * len(given))(*map(address, given)),
                                             (REALS[x.dtype][1] * len(RULE))(*rule), *map(address, (x, *others)))
    if failed:
        raise MemoryError(f"too little memory for a sample of {T} time steps, {C} channels and {N} places")
