"""The LIF neuron against trajectories and gradients worked out by hand."""

from math import inf, nan

import pytest
import torch
from torch.autograd import gradcheck

from staa import FSTALIF, LIF, STAALIF, STAttenLIF, rectangle


def spikes_of(neuron, current):
    return neuron(torch.tensor(current).view(-1, 1, 1, 1, 1)).flatten().tolist()


def test_the_networks_neuron_by_hand():
    # decay 0.25, gain 1: U = 0.8, 0.25*0.8 + 0.8 = 1.0 (fires, resets to 0), 0.8, 1.0 (fires), 0.5
    assert spikes_of(LIF(), [0.8, 0.8, 0.8, 0.8, 0.3]) == [0, 1, 0, 1, 0]


def test_eq_1_with_tau_by_hand():
    # tau 2, V_reset 0: U = X/2 + Hm/2 = 0.75, 1.125 (fires), 0.75, 1.125 (fires)
    assert spikes_of(LIF.from_tau(2.0), [1.5] * 4) == [0, 1, 0, 1]


def test_v_reset_by_hand():
    # tau 2, V_reset -1, start at -1, U = Hm + (X - (Hm + 1))/2: -1 + 3/2 = 0.5; 0.5 + 1.5/2 = 1.25 (fires, to -1);
    # -1 + 1/2 = -0.5; -0.5 + 4.5/2 = 1.75 (fires)
    neuron = LIF.from_tau(2.0, v_reset=-1.0)
    assert spikes_of(neuron, [3.0, 3.0, 1.0, 5.0]) == [0, 1, 0, 1]
    u = neuron.charge(torch.tensor(0.0), torch.tensor(1.0))
    assert u == 0 + (1 - (0 - -1)) / 2  # eq. 1 as it is usually written


@pytest.mark.parametrize("tau, x", [(2.0, 1.2), (5.0, 1.5), (10.0, 3.0), (3.0, 0.9)])
def test_interval_between_spikes_has_the_closed_form(tau, x):
    # From rest, U[n] = x (1 - (1 - 1/tau)^n) reaches 1 first at n = ceil(log(1 - 1/x) / log(1 - 1/tau)); never for x <= 1.
    from math import ceil, log

    spikes = spikes_of(LIF.from_tau(tau), [x] * 60)
    times = [t + 1 for t, s in enumerate(spikes) if s]
    if x <= 1:
        assert times == []
    else:
        n = ceil(log(1 - 1 / x) / log(1 - 1 / tau))
        assert times == list(range(n, 61, n))


def test_theta_of_zero_is_one():
    assert rectangle(torch.tensor([-1e-6, 0.0, 1e-6])).tolist() == [0, 1, 1]


@pytest.mark.parametrize("a", [1.0, 2.0, 0.5])
def test_surrogate_inside_at_and_outside_its_edge(a):
    v = torch.tensor([-a, -a / 2 - 1e-4, -a / 2, 0.0, a / 2, a / 2 + 1e-4, a], requires_grad=True)
    rectangle(v, a).sum().backward()
    assert v.grad.tolist() == [0, 0, 1 / a, 1 / a, 1 / a, 0, 0]


def test_autograd_is_eq_4_written_out_for_two_steps_and_one_weight():
    w, x1, x2, g1, g2, decay = 0.9, 0.8, 1.0, 2.0, 3.0, 0.25
    weight = torch.tensor(w, requires_grad=True)
    spikes = LIF()(weight * torch.tensor([x1, x2]).view(2, 1, 1, 1, 1)).flatten()
    (g1 * spikes[0] + g2 * spikes[1]).backward()

    u1 = w * x1                                   # 0.72, no spike, inside the rectangle
    s1, ds1 = float(u1 >= 1), float(abs(u1 - 1) <= 0.5)
    u2 = decay * u1 * (1 - s1) + w * x2           # 1.08, a spike, inside the rectangle
    ds2 = float(abs(u2 - 1) <= 0.5)
    dhm1_du1 = (1 - s1) - u1 * ds1                # eq. 3: the reset depends on U directly and through S
    dl_du2 = g2 * ds2
    dl_du1 = g1 * ds1 + dl_du2 * decay * dhm1_du1
    assert weight.grad.item() == pytest.approx(dl_du2 * x2 + dl_du1 * x1)
    assert dl_du1 != g1 * ds1, "the chain through time must matter in this example"


def test_the_membrane_is_differentiated_exactly_where_nothing_fires():
    # Far below threshold the neuron is linear, so autograd must agree with finite differences of U.
    neuron = LIF.from_tau(3.0, v_th=100.0)

    def potential(x):
        hm = torch.zeros_like(x[0])
        for x_t in x.unbind():
            u = neuron.charge(hm, x_t)
            _, hm = neuron.fire(u)
        return hm

    assert gradcheck(potential, torch.randn(5, 3, dtype=torch.float64, requires_grad=True))


@pytest.mark.parametrize("shape", [(1, 1), (4, 3), (2, 3, 5), (3, 2, 4, 5, 6)])
def test_shape_dtype_and_values(shape):
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        spikes = LIF()(torch.randn(shape).to(dtype))
        assert spikes.shape == shape and spikes.dtype == dtype
        assert set(spikes.unique().tolist()) <= {0.0, 1.0}


def test_nothing_is_kept_between_calls():
    neuron, x = LIF(), torch.rand(4, 2, 3, 5, 5)
    assert torch.equal(neuron(x), neuron(x))


def test_steps_see_only_the_past():
    x = torch.rand(6, 2, 3, 4, 4) * 2
    later = x.clone()
    later[4:] += 1
    assert torch.equal(LIF()(x)[:4], LIF()(later)[:4])


def test_channels_last_layout_is_kept():
    x = torch.rand(8, 3, 5, 5).contiguous(memory_format=torch.channels_last).unflatten(0, (4, 2))
    assert LIF()(x).flatten(0, 1).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("settings, words", [
    (dict(decay=1.5), "decay must be between 0 and 1"), (dict(a=0.0), "a, the width"), (dict(a=-1.0), "above 0"),
    (dict(v_th=0.0, v_reset=0.5), "v_th must be above v_reset"), (dict(decay=float("nan")), "decay"),
    *((dict([pair]), f"{pair[0]} must be a finite number of at most 1e30 in size, got") for pair in [
        ("v_th", inf), ("v_th", 1e39), ("v_reset", -inf), ("v_reset", -1e31), ("a", inf), ("a", 2e30), ("gain", nan)])], ids=str)
def test_bad_settings(settings, words):
    with pytest.raises(ValueError, match=words):
        LIF(**settings)


def test_a_current_without_a_batch_is_refused():
    with pytest.raises(ValueError, match=r"^LIF takes a current \(T, B, ...\), got one of shape \(4,\)$"):
        LIF()(torch.zeros(4))


@pytest.mark.parametrize("neuron", [LIF(), STAttenLIF()])
def test_a_current_without_a_time_step_is_refused(neuron):
    with pytest.raises(ValueError, match=r"^\w+LIF takes at least one time step, got shape \(0, 2, 3\)$|^LIF takes at least"):
        neuron(torch.zeros(0, 2, 3))


@pytest.mark.parametrize("make, words", [
    (lambda: LIF(decay="0.5"), "decay must be a number, got '0.5'"), (lambda: LIF(v_th=None), "v_th must be a number, got None"),
    (lambda: LIF(gain=True), "gain must be a number, got True"), (lambda: LIF.from_tau("2"), "tau must be a number, got '2'"),
    (lambda: STAALIF(8, 4, beta="0.1"), "beta must be a number, got '0.1'"),
    (lambda: STAALIF(8, 4, alpha=[2.0]), r"alpha must be a number, got \[2.0\]"),
    (lambda: FSTALIF(8, 4, slope="1"), "slope must be a number, got '1'"),
    (lambda: STAttenLIF(tau="2"), "tau must be a number, got '2'")])
def test_a_setting_that_is_no_number(make, words):
    with pytest.raises(TypeError, match=f"^{words}$"):
        make()


def test_bad_tau():
    with pytest.raises(ValueError, match="tau must be at least 1"):
        LIF.from_tau(0.5)
    with pytest.raises(ValueError, match="tau must be a finite number"):
        LIF.from_tau(inf)


def test_the_largest_numbers_end():
    for settings in (dict(v_th=1e30), dict(v_reset=-1e30), dict(a=1e30)):
        x = torch.ones(2, 3, requires_grad=True)
        LIF(**settings)(x).sum().backward()
        assert x.grad.isfinite().all()


def test_tau_of_the_neurons_that_have_one():
    x = torch.randn(4, 2, 8, 3, 3) * 2
    neuron = STAALIF.from_tau(3.0, 8, T=4, gc=False, pe=False, sa=False, beta=0.0)
    assert type(neuron) is STAALIF and torch.equal(neuron(x), LIF.from_tau(3.0)(x))
    neuron = STAttenLIF.from_tau(3.0, slope=2.0)
    assert type(neuron) is STAttenLIF and neuron.slope == 2.0 and torch.equal(neuron(x), STAttenLIF(tau=3.0)(x))


@pytest.mark.parametrize("neuron, words", [
    (STAALIF, "decay is a setting of eq. 1, in whose place SA computes"), (FSTALIF, "from_tau does not apply to FSTALIF")])
def test_tau_of_the_neurons_that_have_none(neuron, words):
    with pytest.raises(ValueError, match=words):
        neuron.from_tau(2.0, 8, 4)
