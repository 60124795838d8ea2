"""The STAA neuron whose potential leaks, against the plain neuron and against sums written out."""

from itertools import product

import pytest
import torch

from staa import LIF, STAALIF, Config, LeakySTAALIF, build

T, B, C, H, W = 4, 2, 8, 5, 6


def current():
    return torch.randn(T, B, C, H, W) * 1.5


def randomised(module):
    """As after training: no weight is zero any more."""
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn_like(p) * 0.5)
    return module


@pytest.mark.parametrize("numbers", [{}, dict(decay=0.5), dict(decay=0.5, v_reset=-0.25, v_th=0.75)])
def test_it_starts_as_the_plain_neuron_where_the_other_has_no_leak(numbers):
    x = current()
    for beta in (0.0, 0.5):  # what is dropped is equal, too
        assert torch.equal(LeakySTAALIF(C, T, beta=beta, **numbers)(x), LIF(**numbers)(x))
    without = {name: value for name, value in numbers.items() if name != "decay"}
    assert torch.equal(STAALIF(C, T, beta=0.0, **without)(x), LIF(**without, decay=1.0)(x))


@pytest.mark.parametrize("gc, pe, sa", list(product([False, True], repeat=3)))
def test_tsrd_falls_back_to_the_plain_neuron(gc, pe, sa):
    x, neuron = current(), randomised(LeakySTAALIF(C, T, gc=gc, pe=pe, sa=sa, beta=1.0))
    assert torch.equal(neuron.train()(x), LIF()(x))


@pytest.mark.parametrize("place", ["input", "membrane", "both", "output"])
def test_the_whole_neuron_by_hand(place):
    neuron, x = randomised(LeakySTAALIF(C, T, beta=0.0, alpha=1.5, decay=0.5, v_reset=-0.25, pe_place=place)), current()
    zero = torch.zeros(T, C)
    pe_x, pe_h, pe_u = ((zero if pe is None else pe.weight)[..., None, None]
                        for pe in (neuron.pe_input, neuron.pe_membrane, neuron.pe_output))
    hm, expected = torch.full((B, C, H, W), -0.25), []
    for t in range(T):
        xa = neuron.gc(x[t] + pe_x[t])
        leaked = -0.25 + 0.5 * (hm + pe_h[t] + 0.25)
        m = neuron.sa(leaked, xa)
        u = m * leaked + (1.5 - m) * xa + pe_u[t]
        s = (u >= 1).float()
        hm = u * (1 - s) - 0.25 * s
        expected.append(s)
    assert torch.equal(neuron(x), torch.stack(expected))


def test_without_sa_and_tsrd_the_leak_is_that_of_eq_1():
    x, neuron = current(), randomised(STAALIF(C, T, sa=False, beta=0.0, decay=0.5, gain=0.75))
    leaky = LeakySTAALIF(C, T, sa=False, beta=0.0, decay=0.5, gain=0.75)
    leaky.load_state_dict(neuron.state_dict())
    assert torch.equal(leaky(x), neuron(x))


def test_a_decay_of_1_is_the_other_reading():
    x, neuron = current(), randomised(STAALIF(C, T, beta=0.0))
    leaky = LeakySTAALIF(C, T, beta=0.0, decay=1.0)
    leaky.load_state_dict(neuron.state_dict())
    assert torch.equal(leaky(x), neuron(x))


def test_decay_is_a_setting_with_sa_and_gain_is_not():
    neuron = LeakySTAALIF(C, T, decay=0.5)
    assert neuron.decay == 0.5 and "decay=0.5" in repr(neuron) and "decay" not in repr(STAALIF(C, T))
    with pytest.raises(ValueError, match="gain is a setting of eq. 1, in whose place SA computes"):
        LeakySTAALIF(C, T, gain=0.5)


def test_a_run_names_it():
    config = Config(neuron="staa-leaky", neuron_settings={"decay": 0.5})
    assert config.name.startswith("digits-resnet20-staa-leaky-T4-s0-")
    assert type(build("resnet20", "staa-leaky", width=1 / 16).stem[1]) is LeakySTAALIF
