"""What the STAA neuron does to maps on a CPU, by hand, in C: `fused_cpu.c`. The machine's C compiler takes a second for
it, where torch.compile takes up to a minute for the neuron; where there is none, operators of torch compute the same.
"""

import ctypes
import functools
import os
import shlex
import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from . import fused
from .surrogate import RECTANGLE, Surrogate

SOURCE = Path(__file__).with_name("fused_cpu.c")
#: Without the last three a product and a sum would be rounded as one, and choices would not be made for many numbers
#: at once.
FLAGS = "-O3 -march=native -fopenmp -fPIC -ffp-contract=off -fno-math-errno -fno-trapping-math".split()
#: As there.
ROWS, SOME = 128, 1024
REALS: dict[torch.dtype, tuple[str, Any]] = {torch.float32: ("float", ctypes.c_float),
                                             torch.float64: ("double", ctypes.c_double)}


def in_c(x: Tensor, surrogate: Surrogate, channels: int = 64) -> bool:
    """Whether x is computed in C: with the paper's surrogate, where it is large."""
    return surrogate is RECTANGLE and not fused.on_gpu(x) and fused.is_large(x, channels) and available()


@functools.cache
def available() -> bool:
    """Whether this machine compiles `fused_cpu.c`; one warning where it does not."""
    return fused.works("the C compiler", lambda: functions(torch.float32))


@functools.cache
def functions(dtype: torch.dtype) -> tuple[ctypes.CDLL, Any]:
    """The functions of `fused_cpu.c` for numbers of this type, and its `rule`. Raises OSError or CalledProcessError."""
    name, real = REALS[dtype]

    class Rule(ctypes.Structure):
        _fields_ = [(field, real) for field in ("v_th", "v_reset", "leak", "rest", "half", "height")]

    with TemporaryDirectory() as folder:
        compiled, library = f"{folder}/fused_cpu.o", f"{folder}/fused_cpu.so"
        run(*FLAGS, f"-DREAL={name}", "-c", str(SOURCE), "-o", compiled)
        try:  # with torch's own threads
            run("-shared", compiled, "-o", library)
            return ctypes.CDLL(library), Rule
        except OSError:
            run("-shared", "-fopenmp", compiled, "-o", library)
            return ctypes.CDLL(library), Rule


def run(*arguments: str) -> None:
    subprocess.run([*shlex.split(os.environ.get("CC", "cc")), *arguments], check=True, capture_output=True)


def call(name: str, flags: tuple[bool, ...], tensors: tuple[Tensor, ...], sizes: tuple[int, ...],
         rule: tuple[float, ...]) -> None:
    """A function of `fused_cpu.c`. tensors: contiguous, and of one type. rule: its numbers."""
    library, Rule = functions(tensors[0].dtype)
    addresses = (ctypes.c_void_p(x.data_ptr()) for x in tensors)
    library[name](*flags, *addresses, *map(ctypes.c_longlong, sizes), Rule(*rule))
