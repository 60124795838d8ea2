"""Looking at a network leaves it as it was: its modes, its statistics, its hooks."""

import pytest
import torch

from staa import STAALIF, build, energy, gradcam, siblings, statten
from staa.firing import evaluating
from staa.networks import Steps


@pytest.fixture
def network():
    """In training, but for one BN that somebody has frozen."""
    torch.manual_seed(0)
    made = build("statten-2-256", "statten", 10, 2, width=1 / 16).train()
    next(m for m in made.modules() if isinstance(m, torch.nn.BatchNorm2d)).eval()
    return made


def state(network):
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in network.modules()]
    return [m.training for m in network.modules()], hooks, {n: t.clone() for n, t in network.state_dict().items()}


WAYS = {
    "energy": lambda network, x: energy.measure(network, [x]),
    "attention maps": statten.attention_maps,
    "spectra": lambda network, x: siblings.spectra(network, [(x, None)]),
    "Grad-CAM": lambda network, x: gradcam.maps(network, x, torch.zeros(len(x), dtype=torch.long), gradcam.depths(network, 1)),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("channels", [3, 4])
def test_whoever_looks_changes_nothing(network, way, channels):
    modes, hooks, tensors = state(network)
    x = torch.rand(2, channels, 32, 32)
    if channels == 3:
        WAYS[way](network, x)
    else:
        with pytest.raises(ValueError, match="this network takes images"):
            WAYS[way](network, x)
    after = state(network)
    assert after[:2] == (modes, hooks) and len(set(modes)) == 2
    assert all(torch.equal(t, after[2][name]) for name, t in tensors.items())


def test_evaluating_ends_what_it_was_given(network):
    handle = network.register_forward_hook(lambda *_: None)
    with evaluating(network) as stack:
        stack.callback(handle.remove)
        assert not any(m.training for m in network.modules()) and network._forward_hooks
    assert not network._forward_hooks and network.training


def test_a_network_of_somebody_elses_is_measured_too():
    """64 weights of 3 x 3 at 16 places, for 3 channels and 5 time steps."""
    torch.manual_seed(0)
    own = torch.nn.Sequential(Steps(torch.nn.Conv2d(3, 64, 3, padding=1)), STAALIF(64, 5, gc=False, sa=False, pe=False, beta=0.0))

    class Own(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.own = own

        def forward(self, x):
            return self.own(x.expand(5, *x.shape)).mean((0, 3, 4))

    found = energy.measure(Own(), [torch.rand(2, 3, 4, 4)])
    assert found.T == 5 and found.total("multiply_adds") == 5 * 16 * 64 * 27
