"""The captured training step, where there is no GPU: a stand-in graph computes, when it is replayed, what it captured,
from the same tensors into the same tensors."""

import contextlib
import types

import pytest
import torch
from torch.nn import functional as F

import staa
from staa import Config, cuda_graph, fused, train
from staa.cuda_graph import BEFORE, Captured
from staa.distributed import Peers

CPU = torch.device("cpu")


class Graph:
    """torch.cuda.CUDAGraph and torch.cuda.graph in one; capturing computes nothing, as on a GPU."""

    captured: list["Graph"] = []
    tried = 0
    spoils = False  # as where the host asks for a number: an error in the capture, and another one at its end

    def reset(self):
        pass

    def __enter__(self):
        Graph.tried += 1
        GENERATOR.waits = True
        assert all(p.grad is None for p in self.owner.network.parameters()), "the graph would add to these for ever"
        self.kept = [b.clone() for b in self.owner.network.buffers()]

    def __exit__(self, *_):
        if Graph.spoils:
            raise RuntimeError("operation failed due to a previous error during capture")
        GENERATOR.waits = False
        with torch.no_grad():
            for b, kept in zip(self.owner.network.buffers(), self.kept):
                b.copy_(kept)
        Graph.captured.append(self)

    def replay(self):
        """Into the memory of the results and gradients that were captured."""
        owner = self.owner
        owner.network.zero_grad(set_to_none=True)
        for there, result in zip(owner.results, self.work(*owner.batch)):
            there.copy_(result)
        for p, gradient in owner.gradients:
            gradient.copy_(p.grad)
        owner.network.zero_grad(set_to_none=True)


class Generator:
    """A GPU's, of which nothing can be drawn while it waits for a capture to end."""

    waits = False

    def clone_state(self):
        return Generator()

    def graphsafe_set_state(self, other):
        self.waits = other.waits


GENERATOR = Generator()


@pytest.fixture(autouse=True)
def stand_in(monkeypatch):
    cuda = types.SimpleNamespace(
        CUDAGraph=Graph, graph=lambda graph, stream, capture_error_mode: graph, Stream=lambda device: "side",
        stream=lambda stream: contextlib.nullcontext(), current_stream=lambda device: "current",
        reset_peak_memory_stats=lambda device: None, max_memory_allocated=lambda device: 10,
        mem_get_info=lambda device: (15, 100), memory_reserved=lambda device: 10, default_generators={None: GENERATOR})
    monkeypatch.setattr(cuda_graph, "torch", types.SimpleNamespace(cuda=cuda))
    plain = Captured.capture

    def capture(self, work, x, y):
        def known(*batch):  # by the graph, to which nobody says what it captures
            self.graph.work = work
            result = work(*batch)
            if Graph.spoils:
                raise RuntimeError("a number was asked for")
            return result
        cuda.CUDAGraph = lambda: Graph.__new__(type("Graph", (Graph,), {"owner": self}))
        return plain(self, known, x, y)
    monkeypatch.setattr(Captured, "capture", capture)
    Graph.captured, Graph.spoils, Graph.tried, GENERATOR.waits = [], False, 0, False
    return cuda


def small():
    torch.manual_seed(0)
    return staa.build("resnet20", "staa", T=2, width=1 / 32, beta=0.0)


def step_of(network, computed=None):
    def work(x, y):
        if computed is not None:
            computed.append(x)
        loss = F.cross_entropy(network(x), y)
        loss.backward()
        return loss.detach(),
    return work


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
    captured, work = Captured(network), step_of(network)
    found = [captured(work, *batch)[0] for batch in batches([4] * 7)]
    assert Graph.captured and torch.stack(found).tolist() == [work(*batch)[0].item() for batch in batches([4] * 7)]


def test_where_the_memory_would_not_fit_twice_nothing_is_captured(stand_in):
    stand_in.max_memory_allocated = lambda device: 13  # of the 100, another program has 75
    network, other = small(), small()
    captured = Captured(network)
    assert epochs(network, [4, 4, 4], captured) == epochs(other, [4, 4, 4], None)
    assert not Graph.captured and captured.graph is None


def test_what_cannot_be_captured_is_computed_as_ever_and_says_so_once(recwarn):
    Graph.spoils = True
    network, other = small(), small()
    captured = Captured(network)
    assert epochs(network, [4, 4, 4], captured) == epochs(other, [4, 4, 4], None)
    said, = [str(w.message) for w in recwarn if "captured" in str(w.message)]
    assert said == ("the training step cannot be captured as a CUDA graph (a number was asked for): its kernels are "
                    "launched one by one, more slowly.")
    assert captured.graph is None and not captured.batch, "no memory of the graph is kept"
    assert Graph.tried == 1 and not GENERATOR.waits


def test_the_first_batches_are_computed_as_ever_then_none():
    network, computed = small(), []
    captured, work = Captured(network), step_of(network, computed)
    given = batches([4] * (BEFORE + 3))
    for x, y in given:
        network.zero_grad()
        captured(work, x, y)
    assert all(a is b for a, (b, _) in zip(computed, given[:BEFORE], strict=False))
    assert BEFORE > 0 and len(computed) == BEFORE + 1 + 3, "by itself, captured, and replayed by the stand-in"
    assert all(x is captured.batch[0] for x in computed[BEFORE:])
    assert captured.batch[0] is not given[BEFORE][0] and not torch.equal(given[BEFORE][0], captured.batch[0])


def test_a_replay_writes_gradients_and_adds_to_none():
    network = small()
    captured, work = Captured(network), step_of(network)
    given = batches([4] * (BEFORE + 2))
    for x, y in given:  # nobody clears the gradients
        captured(work, x, y)
    found = [p.grad.clone() for p in network.parameters()]
    network.zero_grad()
    work(*given[-1])
    assert all(torch.equal(a, p.grad) for a, p in zip(found, network.parameters()))


def test_released_it_holds_nothing():
    network = small()
    captured = Captured(network)
    epochs(network, [4] * 6, captured, 1)
    assert captured.graph is not None
    captured.release()
    assert captured.graph is None and not captured.batch and not captured.results and not captured.gradients
    assert all(p.grad is None for p in network.parameters())


@pytest.mark.parametrize("device, processes, microbatch, is_captured", [
    ("cuda:1", 1, 0, True), ("cpu", 1, 0, False), ("cuda", 2, 0, False), ("cuda", 1, 4, False)])
def test_a_run_is_captured_on_one_gpu_that_sees_whole_batches(device, processes, microbatch, is_captured):
    config = Config(batch_size=8, microbatch=microbatch)
    found = cuda_graph.captured_for(small(), config, torch.device(device), Peers(0, processes))
    assert isinstance(found, Captured) == is_captured


def test_somebodys_own_layer_is_not_captured(monkeypatch):
    class Own(torch.nn.Module):
        pass
    assert cuda_graph.can_be_captured(small())
    assert cuda_graph.can_be_captured(torch.nn.Sequential(torch.nn.Linear(2, 2), staa.LIF()))
    assert not cuda_graph.can_be_captured(torch.nn.Sequential(small(), Own()))
    monkeypatch.setattr(fused, "enabled", False)
    assert not cuda_graph.can_be_captured(small())
