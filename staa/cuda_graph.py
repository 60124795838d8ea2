"""The gradients of a batch as one CUDA graph. A training step of a spiking network is hundreds to thousands of kernels,
most of them shorter than the time that Python takes to launch one; a graph of them is launched at once.

A graph repeats what was captured: the same kernels on the same memory. So each batch is copied to where the captured
one lay, TSRD draws on the GPU (see `STAALIF.draw`), and what the host decides anew in each step stays outside: the
learning rate, and with it the optimizer.
"""

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from . import fused
from .config import Config
from .distributed import Peers
from .settings import reason

#: Batches that are computed as ever before one is captured: in them the compiler compiles, and cuDNN chooses.
BEFORE = 3


class Captured:
    """work(x, y) of batches on a GPU: captured once, and replayed for every later batch of the first one's shapes. A
    batch of other shapes, like an epoch's last one, is computed as ever; so is every batch where it cannot be captured.

    work: leaves gradients in `network` and returns tensors; of all else that it changes, only BN's statistics may
    matter later. What was captured is replayed whatever closure a call hands in, so all of them must do the same. The
    gradients must be cleared before each call: a replay writes them, and a batch that is computed as ever adds to them.
    """

    batch: list[Tensor]  # x and y of the graph
    results: tuple[Tensor, ...]
    gradients: list[tuple[nn.Parameter, Tensor]]

    def __init__(self, network: nn.Module):
        self.network, self.calls, self.possible = network, 0, True
        self.graph: Any = None  # a torch.cuda.CUDAGraph
        self.shapes: tuple | None = None  # of the first batch
        self.device = next(network.parameters()).device
        torch.cuda.reset_peak_memory_stats(self.device)
        self.release()

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
        free = torch.cuda.mem_get_info(self.device)[0] + torch.cuda.memory_reserved(self.device)
        self.possible = 2 * torch.cuda.max_memory_allocated(self.device) < free
        if not self.possible:
            return False
        self.batch, self.graph = [n.to(self.device, copy=True) for n in (x, y)], torch.cuda.CUDAGraph()
        self.network.zero_grad(set_to_none=True)  # the graph makes gradients of its own
        try:
            # Another thread may go on to pin memory. And the outer stream is back in any case: torch's own context
            # leaves the inner one the current one where a capture fails.
            with torch.cuda.stream(torch.cuda.current_stream(self.device)), torch.cuda.graph(
                    self.graph, stream=side_stream(self.device), capture_error_mode="thread_local"):
                self.results = work(*self.batch)
        except RuntimeError as error:  # where the capture is spoilt, its end raises, too, and says less
            why = reason(error.__context__ or error)
            warnings.warn(f"the training step cannot be captured as a CUDA graph ({why}): its kernels are launched one "
                          "by one, more slowly.")
            self.possible = False
            self.release()
            generator = torch.cuda.default_generators[self.device.index]
            generator.graphsafe_set_state(generator.clone_state())  # its own still waits for the capture
            return False
        self.gradients = [(p, p.grad) for p in self.network.parameters() if p.grad is not None]
        return True

    def release(self) -> None:
        """Hand the graph's memory back, whoever still holds this."""
        if self.graph is not None:
            self.network.zero_grad(set_to_none=True)
            self.graph.reset()
        self.graph, self.batch, self.results, self.gradients = None, [], (), []


@functools.cache
def side_stream(device: torch.device) -> Any:
    """The stream to capture on: torch's own lies on the first GPU that this process captured on. One a device, since
    cuBLAS keeps memory for each."""
    return torch.cuda.Stream(device)


def captured_for(network: nn.Module, config: Config, device: torch.device, peers: Peers) -> Captured | None:
    """What captures the steps of a run: on one GPU, where a batch goes through the network at once."""
    possible = device.type == "cuda" and peers.size == 1 and not config.microbatch and can_be_captured(network)
    return Captured(network) if possible else None


def can_be_captured(network: nn.Module) -> bool:
    """Whether every step of it launches the same kernels: so it is with the layers of this package and torch's. What
    somebody's own layer decides on the host would be decided once and for ever. (A hook, or a forward of an instance's
    own, is not seen.) Off with `staa.fused.enabled`."""
    return fused.enabled and all(type(m).__module__.partition(".")[0] in ("staa", "torch") for m in network.modules())
