"""Nothing in a training step or in the loader of a GPU makes the host wait. Tried on torch's "meta" device, whose tensors
have shapes and no numbers: to ask for one is an error there, where on a GPU it would be a wait."""

from contextlib import nullcontext

import numpy as np
import pytest
import torch

from staa import Config, fused, train
from staa.data import View
from staa.distributed import ALONE, Peers, _SyncBatchNorm
from staa.optimizer import new_optimizer
from staa.resident import AUGMENTATIONS, Batches, Images
from staa.weights import new_network

META = torch.device("meta")


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch):
    """The fast path takes the tensors of this device, too, and there is no compiler for it."""
    usable = fused.usable
    monkeypatch.setattr(fused, "usable", lambda x, *numbers: usable(torch.ones((), dtype=x.dtype), *numbers))
    monkeypatch.setattr(fused, "compiler", lambda device: False)
    monkeypatch.setattr(torch, "autocast", lambda *args, **settings: nullcontext())  # this device has none


def step(config, peers=ALONE, norm=None):
    network = new_network(config, 10)
    if norm:
        network.stem[0][1] = norm(network.stem[0][1])
    network = network.to(META)
    optimizer = new_optimizer(config, network.parameters())
    x, y = torch.empty(8, 3, 32, 32, device=META), torch.empty(8, dtype=torch.int64, device=META)
    counts = torch.zeros(2, dtype=torch.int64, device=META)
    loss = train.gradient(network, x, y, config, (0, 0), 8, META, peers, counts)
    peers.sum_gradients(network)
    torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
    optimizer.step()
    assert loss.device == counts.device == META and all(p.grad is not None for p in network.parameters())


@pytest.mark.parametrize("network, neuron", [("resnet20", "lif"), ("resnet20", "staa"), ("resnet20", "fsta"),
                                             ("statten-2-256", "statten")])
def test_a_training_step_asks_for_no_number(network, neuron):
    step(Config(dataset="cifar10", network=network, neuron=neuron, width=1 / 8))


def test_nor_does_one_in_microbatches():
    step(Config(dataset="cifar10", network="resnet20", neuron="staa", width=1 / 8, microbatch=4))


def test_nor_does_bn_over_several_processes(monkeypatch):
    monkeypatch.setattr(Peers, "sum", lambda self, x: x)
    step(Config(dataset="cifar10", network="resnet20", neuron="lif", width=1 / 8), norm=lambda n: _SyncBatchNorm(n, Peers(0, 2)))


class Coloured:
    data, targets, classes = np.zeros((20, 32, 32, 3), dtype=np.uint8), [0, 1] * 10, ["0", "1"]


@pytest.mark.parametrize("augment", AUGMENTATIONS)
def test_the_loader_of_a_gpu_asks_for_no_number(augment):
    images = Images(View(Coloured(), range(20), None), "cifar10", META)
    shapes = [tuple(x.shape) for x, y in Batches(images, 8, augment, shuffle=True, seed=0, epoch=0) if x.device == META]
    assert shapes == [(8, 3, 32, 32), (8, 3, 32, 32), (4, 3, 32, 32)]


def test_what_asks_for_a_number_is_found(monkeypatch):
    """The check can fail."""
    monkeypatch.setattr(fused, "usable", lambda x, *numbers: bool((x > 0).any()))
    with pytest.raises(RuntimeError, match="meta"):
        step(Config(dataset="cifar10", network="resnet20", neuron="lif", width=1 / 8))
