"""The gradients of a batch as one CUDA graph. A training step of a spiking network is hundreds to thousands of kernels,
most of them shorter than the time that Python takes to launch one; a graph of them is launched at once.

A graph repeats what was captured: the same kernels on the same memory. So each batch is copied to where the captured
one lay, TSRD draws on the GPU (see `STAALIF.draw`), and what the host decides anew in each step stays outside: the
learning rate, and with it the optimizer.
"""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from . import fused
from .settings import reason

#: Batches that are computed as ever before one is captured: in them the compiler compiles, and cuDNN chooses.
BEFORE = 3


class Captured:
    """work(x, y) of batches on a GPU: captured once, and replayed for every later batch of the first one's shapes. A
    batch of other shapes, like an epoch's last one, is computed as ever.

    work: leaves gradients in `network`, adds to nothing else that lasts, and returns tensors. What was captured is
    replayed whatever closure later calls hand in, so all of them must do the same.
    """

    def __init__(self, network: nn.Module):
        self.network, self.calls, self.possible = network, 0, True
        self.graph: Any = None  # a torch.cuda.CUDAGraph
        self.shapes: tuple | None = None  # of the first batch

    def __call__(self, work: Callable[..., tuple[Tensor, ...]], x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        self.shapes = self.shapes or (x.shape, y.shape)
        if (x.shape, y.shape) != self.shapes:
            return work(x, y)
        self.calls += 1
        if self.graph is None and (self.calls <= BEFORE or not self.possible or not self.capture(work, x, y)):
            return work(x, y)
        for there, n in zip(self.batch, (x, y)):
            there.copy_(n, non_blocking=True)
        self.graph.replay()
        for p, gradient in self.gradients:
            p.grad = gradient
        return tuple(result.clone() for result in self.results)

    def capture(self, work, x: Tensor, y: Tensor) -> bool:
        """Whether it was captured; not where the memory of a step, which a graph keeps for itself, would not fit twice:
        what fills a GPU is not limited by launches."""
        device = next(self.network.parameters()).device
        self.possible = 2 * torch.cuda.max_memory_allocated(device) < torch.cuda.mem_get_info(device)[1]
        if self.possible:
            self.batch, graph = [n.to(device, copy=True) for n in (x, y)], torch.cuda.CUDAGraph()
            self.network.zero_grad(set_to_none=True)  # the graph writes its gradients, and adds to none
            try:
                with torch.cuda.graph(graph):
                    self.results = work(*self.batch)
                self.gradients = [(p, p.grad) for p in self.network.parameters() if p.grad is not None]
                self.graph = graph
            except RuntimeError as error:
                self.possible = False
                self.network.zero_grad(set_to_none=True)
                warnings.warn(f"the training step cannot be captured as a CUDA graph ({reason(error)}): its kernels "
                              "are launched one by one, more slowly.")
        return self.possible


def can_be_captured(network: nn.Module) -> bool:
    """Whether every step of it launches the same kernels: so it is with the layers of this package and torch's. What
    somebody's own layer decides on the host would be decided once and for ever. Off with `staa.fused.enabled`."""
    return fused.enabled and all(type(m).__module__.partition(".")[0] in ("staa", "torch") for m in network.modules())
