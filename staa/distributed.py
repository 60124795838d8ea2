"""One run on many processes, one a GPU, started by torchrun: data parallelism with the outcome of one process.

    torchrun --nproc-per-node 8 -m staa.train dataset=imagefolder:imagenet network=resnet18 ...

A batch is the config's whatever the number of processes: each takes its share of the images, and gradient, loss,
accuracy and BN's statistics are those of the whole batch. torch's DistributedDataParallel is not used: it weights
processes equally though their shares differ, refuses an empty share, and calls it an error where TSRD leaves a
parameter without a gradient. One sum over all gradients does.
"""

import atexit
import functools
import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import BatchSampler, DataLoader, default_collate

from .settings import Error, reason

Network = TypeVar("Network", bound=nn.Module)


class PeerError(Error, RuntimeError):
    """Another process of this run has ended; the message is one sentence."""


@dataclass(frozen=True)
class Peers:
    """The processes that train one run together; this one is number `rank` of `size`. Number 0 alone writes.
    gpus: torch's group of them for tensors on GPUs, where the run is there."""

    rank: int = 0
    size: int = 1
    gpus: Any = None

    def sum(self, x: Tensor) -> Tensor:
        """x, in place, summed over the processes. Raises PeerError where one of them has ended."""
        if self.size > 1:
            try:
                dist.all_reduce(x, group=self.gpus if x.is_cuda else None)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                raise PeerError(f"another process of this run has ended or cannot be reached ({reason(error)}); start "
                                "all of them again, and the run goes on after its last whole epoch.") from None
        return x

    def first(self, work: Callable[[], Any]) -> Any:
        """What `work()` returns or raises in process 0, in every process."""
        if self.size == 1:
            return work()
        outcome: list = [None, None]
        if self.rank == 0:
            try:
                outcome[0] = work()
            except Exception as error:
                outcome[1] = error
        try:
            dist.broadcast_object_list(outcome)
        except RuntimeError as error:
            raise PeerError(f"process 0 of this run has ended or cannot be reached ({reason(error)}); start all of "
                            "them again.") from None
        if outcome[1]:
            raise outcome[1]
        return outcome[0]

    def sum_gradients(self, network: nn.Module) -> None:
        """Sum every parameter's gradient; one that is None everywhere stays so, as SGD skips it then."""
        if self.size == 1:
            return
        parameters = list(network.parameters())
        has = self.sum(torch.tensor([float(p.grad is not None) for p in parameters]))  # a CPU's: no GPU is waited for
        parameters = [p for p, any_has in zip(parameters, has.tolist()) if any_has]
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        whole = self.sum(torch.cat([g.flatten() for g in gradients]))
        for p, g, part in zip(parameters, gradients, whole.split([p.numel() for p in parameters])):
            p.grad = g.copy_(part.view(g.shape))

    def share(self, loader: DataLoader, microbatch: int = 0) -> DataLoader:
        """The same batches, of each the part that is this process's: every size-th image, or every size-th microbatch.

        A part without images comes as None.
        """
        if self.size == 1:
            return loader
        parts = _Share(cast(BatchSampler, loader.batch_sampler), self, max(microbatch, 1))
        return DataLoader(loader.dataset, batch_sampler=parts,
                          generator=loader.generator, num_workers=loader.num_workers, pin_memory=loader.pin_memory,
                          collate_fn=_collate)

    def synchronise(self, network: Network, device: torch.device) -> Network:
        """Let BN see the images of all processes: torch's own SyncBatchNorm, which needs a GPU and makes the host wait
        for it in every layer, or ours."""
        if self.size == 1:
            return network
        if device.type == "cuda":
            return nn.SyncBatchNorm.convert_sync_batchnorm(network, self.gpus)
        for module in list(network.modules()):
            for name, child in module.named_children():
                if isinstance(child, _BatchNorm):
                    module.add_module(name, _SyncBatchNorm(child, self))
        return network


ALONE = Peers()


class _Share:
    """A batch sampler's batches, cut to the part of one process."""

    def __init__(self, batches: BatchSampler, peers: Peers, chunk: int):
        self.batches, self.peers, self.chunk = batches, peers, chunk
        self.batch_size = batches.batch_size  # of the whole batch

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self):
        for batch in self.batches:
            yield [i for k, i in enumerate(batch) if k // self.chunk % self.peers.size == self.peers.rank]


def _collate(items: list):
    return default_collate(items) if items else (None, None)


class _Sum(torch.autograd.Function):
    """Peers.sum with its gradient: the loss is summed over the processes too."""

    @staticmethod
    def forward(ctx, x, peers):
        ctx.peers = peers
        return peers.sum(x.clone())

    @staticmethod
    def backward(ctx, gradient):
        return ctx.peers.sum(gradient.clone()), None


class _SyncBatchNorm(_BatchNorm):
    """BN whose mean and variance in training are those of all processes' images, on any device."""

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    momentum: float

    def __init__(self, like: _BatchNorm, peers: Peers):
        super().__init__(like.num_features, like.eps, like.momentum)
        self.load_state_dict(like.state_dict())
        self.peers = peers

    def _check_input_dim(self, x: Tensor):
        pass

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        over, shape, given = (0, *range(2, x.dim())), (1, -1, *[1] * (x.dim() - 2)), x.dtype
        x = x.float()
        sums = _Sum.apply(torch.cat([x.sum(over), x.new_full((1,), x.numel() / x.shape[1])]), self.peers)
        n = sums[-1].detach()
        mean = sums[:-1] / n
        centred = x - mean.view(shape)
        var = _Sum.apply(centred.square().sum(over), self.peers) / n
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * (n / (n - 1)), self.momentum)
            self.num_batches_tracked += 1
        return (centred * ((var + self.eps).rsqrt() * self.weight).view(shape) + self.bias.view(shape)).to(given)


class Statistics:
    """BN's running statistics where a batch goes through the network in microbatches: the mean of what each of them
    alone would leave, so that neither their order nor the number of processes matters."""

    def __init__(self, network: nn.Module):
        norms = [m for m in network.modules() if isinstance(m, _BatchNorm)]
        self.buffers = [b for m in norms for b in (m.running_mean, m.running_var) if b is not None]
        self.tracked = [(n, n + 1) for m in norms if (n := m.num_batches_tracked) is not None]
        self.before, self.count = self.flat(), 0
        self.total = torch.zeros_like(self.before)

    def flat(self) -> Tensor:
        return torch.cat([b.flatten() for b in self.buffers]) if self.buffers else torch.zeros(0)  # no BN

    def put(self, flat: Tensor) -> None:
        for b, part in zip(self.buffers, flat.split([b.numel() for b in self.buffers])):
            b.copy_(part.view(b.shape))

    def add(self) -> None:
        """After a microbatch: keep what it left, and go back to where it began."""
        self.total, self.count = self.total + self.flat(), self.count + 1
        self.put(self.before)

    def settle(self, peers: Peers) -> None:
        """After the last microbatch: the mean over all of them, on all processes."""
        self.put(peers.sum(self.total) / peers.sum(self.total.new_full((), self.count)))
        for number, then in self.tracked:
            number.copy_(then)


def started() -> bool:
    """Whether torchrun has started this process with others. Raises PeerError where its variables are not its own."""
    size, rank = os.environ.get("WORLD_SIZE") or "1", os.environ.get("RANK") or ""
    if size != "1" and not (size.isdigit() and (rank.isdigit() or dist.is_initialized())):
        raise PeerError(f"WORLD_SIZE is {size!r} and RANK {rank!r} in the environment, where torchrun writes numbers; "
                        "start with it, or unset both.")
    return int(size) > 1


def join(device: torch.device) -> Peers:
    """The processes that torchrun started this one with, or ALONE where none did."""
    if not started():
        return ALONE
    if not dist.is_initialized():
        # A peer that waits for the lock of a run, or loads data, is slow and not lost: gloo notices a dead one at once.
        dist.init_process_group("gloo", timeout=timedelta(days=7))
        atexit.register(dist.destroy_process_group)
    return Peers(dist.get_rank(), dist.get_world_size(), group_of_gpus() if device.type == "cuda" else None)


@functools.cache
def group_of_gpus() -> Any:
    """NCCL's group, which notices a dead process by its timeout only: this must be longer than what lies between two
    sums, loading a batch or compiling."""
    return dist.new_group(backend="nccl", timeout=timedelta(minutes=30))
