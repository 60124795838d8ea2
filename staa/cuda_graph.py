"""A training step as one CUDA graph. A step of an STAA network is more than a thousand kernels, most of them shorter
than the time that Python takes to launch one; a graph is launched at once.

A graph repeats what was captured: the same kernels on the same memory. So every batch is copied to where the first one
was, TSRD draws on the GPU (see `STAALIF.draw`), and what changes from step to step on the host, the learning rate,
stays outside.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from . import fused

#: Batches that are computed as ever before one is captured: the compiler and cuDNN settle in them.
BEFORE = 3


class Captured:
    """`work(x, y)` on a GPU, captured once for batches of the size of the first one and replayed from then on. Batches
    of another size are computed as ever.

    work: leaves gradients in `network`, adds to nothing, and returns tensors. It is captured as it is in the call that
    captures; later calls may hand in another closure that does the same.
    """

    def __init__(self, network: nn.Module):
        self.network, self.calls = network, 0
        self.graph: Any = None

    def __call__(self, work: Callable[[Tensor, Tensor], tuple[Tensor, ...]], x: Tensor, y: Tensor) -> list[Tensor]:
        if not self.calls:
            self.x, self.y = (torch.empty_like(n, device=self.device) for n in (x, y))
        if x.shape != self.x.shape or y.shape != self.y.shape:
            return list(work(x, y))
        self.calls += 1
        if self.calls <= BEFORE or not self.fits():
            return list(work(x, y))
        self.x.copy_(x, non_blocking=True)
        self.y.copy_(y, non_blocking=True)
        if self.graph is None:
            self.capture(work)
        self.graph.replay()
        for p, gradient in self.gradients:
            p.grad = gradient
        return [result.clone() for result in self.results]

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    def fits(self) -> bool:
        """Whether the GPU has room for a step's memory once more: a graph keeps its own. A step that fills half a GPU
        is not limited by launches."""
        return self.graph is not None or (
            2 * torch.cuda.max_memory_allocated(self.device) < torch.cuda.mem_get_info(self.device)[1])

    def capture(self, work) -> None:
        self.network.zero_grad(set_to_none=True)  # the graph writes its gradients, and adds to none
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.results = work(self.x, self.y)
        self.gradients = [(p, p.grad) for p in self.network.parameters() if p.grad is not None]


def can_be_captured(network: nn.Module) -> bool:
    """Whether a step repeats the same kernels: so it is with the layers of this package and torch's. What somebody's
    own layers decide on the host would be decided once and for ever. Switched off with `staa.fused.enabled`."""
    return fused.enabled and all(type(m).__module__.partition(".")[0] in ("staa", "torch") for m in network.modules())
