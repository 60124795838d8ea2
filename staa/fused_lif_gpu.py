"""The plain LIF neuron on a GPU, by hand, in Triton. What it computes stands in `neuron.py`, eqs. 1-3 and 5; it is
tested against that.

On a GPU the compiled neuron is limited by memory, too, but it has to be compiled for each size of a map, and Python
takes longer to find what was compiled than the GPU takes to run it. Here one kernel a way serves all sizes: a thread
goes through all time steps of some neurons, which lie in memory side by side.
"""

from torch import Tensor

from .fused import cdiv, on
from .kernels_lif import lif, lif_backward

#: Bytes of a time step that a thread reads at once, and the potentials that it holds in registers at most.
BYTES, POTENTIALS, WARPS = 16, 64, 4


def launch(kernel, tensors: tuple[Tensor, ...], *numbers: float) -> None:
    """A kernel over tensors (T, N). Products and sums are rounded one by one, as in the equations: spikes are equal."""
    x = tensors[0]
    T, N = x.shape
    each = BYTES // x.element_size()
    size = 32 * WARPS * each
    with on(x.device):
        kernel[(cdiv(N, size),)](*tensors, *map(float, numbers), N, T=T, BN=size, HELD=POTENTIALS // each,
                                        num_warps=WARPS, enable_fp_fusion=False)


def forward(x: Tensor, s: Tensor, decay: float, gain: float, v_th: float, v_reset: float, a: float) -> None:
    """Spikes for the current x (T, N) into s. The numbers are those of `LIF.numbers`."""
    launch(lif, (x, s), decay, gain, v_th, v_reset)


def backward(x: Tensor, ds: Tensor, dx: Tensor, decay: float, gain: float, v_th: float, v_reset: float,
             a: float) -> None:
    """The gradient of x into dx, from that of its spikes."""
    launch(lif_backward, (x, ds, dx), decay, gain, v_th, v_reset, a)
