"""Neurons and networks under what PyTorch offers a module: other types, torch.func, tracing, export."""

import pytest
import torch

import staa
from staa import fused
from staa.attention import STAALIF
from staa.networks import NEURONS

SETTINGS = [dict(), dict(gc=False), dict(pe=False), dict(sa=False), dict(pe_place="both"), dict(gc=False, sa=False)]


def shaken(module):
    """All parameters away from their start, where half of them have no effect."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=generator))
    return module


@pytest.fixture(params=[True, False], ids=["fast", "reference"])
def fast(request, monkeypatch):
    monkeypatch.setattr(fused, "enabled", request.param)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("settings", SETTINGS)
def test_weights_of_low_precision_are_float32_weights_that_were_rounded(dtype, settings, fast):
    neuron = shaken(STAALIF(8, 3, beta=0.0, **settings)).to(dtype)
    rounded = STAALIF(8, 3, beta=0.0, **settings)
    rounded.load_state_dict(neuron.state_dict())
    x = (2 * torch.randn(3, 2, 8, 4, 4)).to(dtype)
    spikes, expected = neuron(x), rounded(x)
    assert spikes.dtype == dtype and torch.equal(spikes, expected) and spikes.any()
    cotangent = torch.randn(x.shape).to(dtype)
    spikes.backward(cotangent)
    expected.backward(cotangent)
    for (name, p), q in zip(neuron.named_parameters(), rounded.parameters()):
        if q.grad is not None and name != "gc.key.bias":  # which cancels in the softmax
            assert p.grad.dtype == dtype
            few_roundings = 4 * torch.finfo(dtype).eps * q.grad.abs().max().item()  # the reference adds T gradients
            torch.testing.assert_close(p.grad.float(), q.grad, rtol=0, atol=few_roundings, msg=name)


@pytest.mark.parametrize("neuron", sorted(NEURONS))
def test_a_whole_network_of_low_precision_trains(neuron):
    network = shaken(staa.build("vgg13", neuron=neuron, num_classes=10, T=2, width=1 / 16)).bfloat16().train()
    logits = network(torch.rand(4, 3, 32, 32).bfloat16())
    logits.square().sum().backward()
    gradients = [p.grad for p in network.parameters() if p.grad is not None]
    assert logits.dtype == torch.bfloat16 and all(g.dtype == torch.bfloat16 and g.isfinite().all() for g in gradients)
    assert sum(bool(g.any()) for g in gradients) > len(gradients) / 2


@pytest.mark.parametrize("name", sorted(NEURONS))
def test_gradients_per_sample_are_those_of_one_sample_at_a_time(name):
    neuron = shaken(NEURONS[name](8, T=3)).eval()
    readout = torch.nn.Parameter(torch.ones(()))  # the plain neurons have no parameters of their own
    x, cotangent = 2 * torch.randn(5, 3, 8, 4, 4), torch.randn(3, 1, 8, 4, 4)

    def loss(parameters, x_b):
        own = {n: p for n, p in parameters.items() if n != "scale"}
        return (torch.func.functional_call(neuron, own, (parameters["scale"] * x_b[:, None],)) * cotangent).sum()

    parameters = {"scale": readout} | dict(neuron.named_parameters())
    detached = {n: p.detach() for n, p in parameters.items()}
    per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(detached, x)
    for b, x_b in enumerate(x):
        gradients = torch.autograd.grad(loss(parameters, x_b), list(parameters.values()), allow_unused=True)
        assert gradients[0] != 0
        for n, expected in zip(parameters, gradients):
            if expected is not None:
                torch.testing.assert_close(per_sample[n][b], expected, rtol=1e-4, atol=1e-4, msg=n)


def test_parameters_that_are_handed_in_count(fast):
    """As meta-learning and DataParallel do it: plain tensors in the parameters' place."""
    neuron, other = STAALIF(8, 3).eval(), shaken(STAALIF(8, 3)).eval()
    x = 2 * torch.randn(3, 2, 8, 4, 4)
    handed_in = {n: p.detach() for n, p in other.named_parameters()}
    spikes = torch.func.functional_call(neuron, handed_in, (x,))
    assert torch.equal(spikes, other(x)) and not torch.equal(spikes, neuron(x))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("neuron", sorted(NEURONS))
def test_traced_and_exported_networks_give_the_same_logits(neuron):
    network = shaken(staa.build("resnet20", neuron=neuron, num_classes=10, T=2, width=1 / 16)).eval()
    x, other = torch.rand(2, 3, 3, 16, 16)
    logits = network(other)
    assert logits.std() > 0
    torch.testing.assert_close(torch.jit.trace(network, x)(other), logits)
    exported = torch.export.export(network, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=2)},)).module()
    torch.testing.assert_close(exported(other), logits)
    torch.testing.assert_close(exported(torch.cat([other, other])), torch.cat([logits, logits]))
