"""The plain LIF neuron on a GPU, by hand, in Triton. What it computes stands in `neuron.py`, eqs. 1-3 and 5; it is
tested against that.

On a GPU the compiled neuron is limited by memory, too, but it has to be compiled for each size of a map, and Python
takes longer to find what was compiled than the GPU takes to run it. Here one kernel a way serves all sizes: a thread
goes through all time steps of some neurons, which lie in memory side by side.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .fused import cdiv, on
from .kernels_lif import lif, lif_backward

#: Bytes of a time step that a thread reads at once, and the potentials of the backward pass that it holds at once.
BYTES, POTENTIALS, WARPS = 16, 64, 4


def forward(x: Tensor, s: Tensor, *numbers: float) -> None:
    """Spikes for the current x (T, N) into s. numbers: those of `LIF.numbers`."""
    *equations, _ = numbers  # a is the gradient's
    launch(lif, (x, s), equations)


def backward(x: Tensor, ds: Tensor, dx: Tensor, *numbers: float) -> None:
    """The gradient of x into dx, from that of its spikes."""
    launch(lif_backward, (x, ds, dx), numbers, HELD=POTENTIALS * x.element_size() // BYTES)


def launch(kernel: Any, tensors: Sequence[Tensor], numbers: Sequence[float], **held: int) -> None:
    """A kernel over tensors (T, N). Products and sums are rounded one by one, as in the equations: spikes are equal."""
    T, N = tensors[0].shape
    size = 32 * WARPS * BYTES // tensors[0].element_size()
    with on(tensors[0].device):
        kernel[(cdiv(N, size),)](*tensors, *map(float, numbers), N, T=T, BN=size, **held, num_warps=WARPS,
                                 enable_fp_fusion=False)
