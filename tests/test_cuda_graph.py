"""The captured training step, where there is no GPU: a stand-in graph computes, when it is replayed, what it captured,
from the same tensors into the same tensors."""

import types

import pytest
import torch
from torch.nn import functional as F

import staa
from staa import Config, cuda_graph, fused, train
from staa.cuda_graph import BEFORE, Captured

CPU = torch.device("cpu")


class Graph:
    """torch.cuda.CUDAGraph and torch.cuda.graph in one; capturing computes nothing, as on a GPU."""

    captured: list["Graph"] = []
    broken = False

    def __enter__(self):
        if Graph.broken:
            raise RuntimeError("operation not permitted when stream is capturing")

    def __exit__(self, *_):
        Graph.captured.append(self)

    def replay(self):
        """Into the memory of results and gradients that the Captured remembers."""
        owner = self.owner
        before = [p.grad for p in owner.network.parameters()]
        owner.network.zero_grad(set_to_none=True)
        for there, result in zip(owner.results, self.work(*owner.batch)):
            there.copy_(result)
        for p, gradient in owner.gradients:
            gradient.copy_(p.grad)
        for p, gradient in zip(owner.network.parameters(), before):
            p.grad = gradient


@pytest.fixture(autouse=True)
def stand_in(monkeypatch):
    cuda = types.SimpleNamespace(CUDAGraph=Graph, graph=lambda graph: graph, max_memory_allocated=lambda device: 10,
                                 mem_get_info=lambda device: (5, 100))
    monkeypatch.setattr(cuda_graph, "torch", types.SimpleNamespace(cuda=cuda))
    plain = Captured.capture

    def capture(self, work, x, y):
        buffers = [b.clone() for b in self.network.buffers()]
        possible = plain(self, work, x, y)
        with torch.no_grad():
            for b, kept in zip(self.network.buffers(), buffers):
                b.copy_(kept)
        if self.graph is not None:
            self.graph.owner, self.graph.work = self, work
        return possible
    monkeypatch.setattr(Captured, "capture", capture)
    Graph.captured, Graph.broken = [], False
    return cuda


def small():
    torch.manual_seed(0)
    return staa.build("resnet20", "staa", T=2, width=1 / 32, beta=0.0)


def batches(sizes):
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(n, 3, 16, 16, generator=generator), torch.randint(10, (n,), generator=generator))
            for n in sizes]


def epochs(network, sizes, captured, count=3):
    config = Config(network="resnet20", T=2, width=1 / 32, epochs=count, batch_size=4, lr=0.1)
    optimizer = train.new_optimizer(config, network.parameters())
    return [train.train_epoch(network, optimizer, batches(sizes), config, epoch, CPU, captured=captured)
            for epoch in range(count)]


@pytest.mark.parametrize("sizes", [[4, 4, 4], [4, 4, 4, 4, 4, 2], [4, 4, 4, 2]])
def test_training_with_it_is_training_without(sizes):
    """To the bit: losses, accuracies and what was trained, BN's statistics too."""
    network, other = small(), small()
    captured = Captured(network)
    assert epochs(network, sizes, captured) == epochs(other, sizes, None)
    for (name, a), b in zip(network.state_dict().items(), other.state_dict().values()):
        assert torch.equal(a, b), name
    assert len(Graph.captured) == 1 and captured.calls == 3 * sizes.count(4) > BEFORE
    assert [tuple(n.shape) for n in captured.batch] == [(4, 3, 16, 16), (4,)]


def test_a_result_stays_when_the_next_batch_is_replayed():
    network = small()
    captured = Captured(network)

    def work(x, y):
        loss = F.cross_entropy(network(x), y)
        loss.backward()
        return loss.detach(),
    found = [captured(work, *batch)[0] for batch in batches([4] * 7)]
    assert Graph.captured and torch.stack(found).tolist() == [work(*batch)[0].item() for batch in batches([4] * 7)]


def test_where_the_memory_would_not_fit_twice_nothing_is_captured(stand_in):
    stand_in.max_memory_allocated = lambda device: 50
    network, other = small(), small()
    captured = Captured(network)
    assert epochs(network, [4, 4, 4], captured) == epochs(other, [4, 4, 4], None)
    assert not Graph.captured and captured.graph is None


def test_what_cannot_be_captured_is_computed_as_ever_and_says_so_once(recwarn):
    Graph.broken = True
    network, other = small(), small()
    assert epochs(network, [4, 4, 4], Captured(network)) == epochs(other, [4, 4, 4], None)
    said, = [str(w.message) for w in recwarn if "captured" in str(w.message)]
    assert said == ("the training step cannot be captured as a CUDA graph (operation not permitted when stream is "
                    "capturing): its kernels are launched one by one, more slowly.")


def test_somebodys_own_layer_is_not_captured(monkeypatch):
    class Own(torch.nn.Module):
        pass
    assert cuda_graph.can_be_captured(small())
    assert cuda_graph.can_be_captured(torch.nn.Sequential(torch.nn.Linear(2, 2), staa.LIF()))
    assert not cuda_graph.can_be_captured(torch.nn.Sequential(small(), Own()))
    monkeypatch.setattr(fused, "enabled", False)
    assert not cuda_graph.can_be_captured(small())
