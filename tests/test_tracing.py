"""What the neurons of a network compute, told apart: against the equations by hand, and without a trace left behind."""

import pytest
import torch
from torch import nn

import staa
from staa import tracing

T, B, C, H = 3, 5, 8, 4


def trained_like(neuron: nn.Module) -> nn.Module:
    """The neuron with blocks that do something: a fresh one's start at zero."""
    torch.manual_seed(1)
    for parameter in neuron.parameters():
        nn.init.normal_(parameter, std=0.5)
    return neuron.eval()


def current() -> torch.Tensor:
    torch.manual_seed(0)
    return 2 * torch.randn(T, B, C, H, H)


def trace(neuron, x):
    with torch.no_grad(), staa.traced(neuron) as seen:
        spikes = neuron(x)
    assert torch.equal(seen[""]["S"], spikes) and torch.equal(seen[""]["X"], x)
    return seen[""]


def before(hm, v_reset=0.0):
    """Hm[t-1] for every step."""
    return torch.cat([torch.full_like(hm[:1], v_reset), hm[:-1]])


def test_lif_is_eqs_1_to_3():
    neuron = staa.LIF(decay=0.5, gain=0.75, v_reset=-0.25)
    of = trace(neuron, current())
    assert of.keys() == {"X", "U", "S", "Hm"}
    torch.testing.assert_close(of["U"], -0.25 + 0.5 * (before(of["Hm"], -0.25) + 0.25) + 0.75 * of["X"])
    assert torch.equal(of["S"], (of["U"] >= 1).float())
    torch.testing.assert_close(of["Hm"], of["U"] * (1 - of["S"]) - 0.25 * of["S"])


@pytest.mark.parametrize("kind, kept", [(staa.STAALIF, 1.0), (staa.LeakySTAALIF, 0.25)])
@pytest.mark.parametrize("alpha, v_reset", [(2.0, 0.0), (3.0, -0.5)])
def test_staa_is_eqs_7_to_14(kind, kept, alpha, v_reset):
    """Each symbol out of the ones before it, written anew with the weights alone."""
    neuron = trained_like(kind(C, T, alpha=alpha, v_reset=v_reset))
    of, gc = trace(neuron, current()), neuron.gc
    assert of.keys() == {"X", "PE", "k", "v", "X~", "M", "N", "U", "S", "Hm"}
    assert torch.equal(of["PE"], neuron.pe_input.weight)
    x = of["X"] + of["PE"][:, None, :, None, None]
    scores = torch.einsum("c,tbchw->tbhw", gc.key.weight.flatten(), x) + gc.key.bias
    torch.testing.assert_close(of["k"], scores.flatten(2).softmax(-1).view(T, B, H, H))
    q = torch.einsum("tbhw,tbchw->tbc", of["k"], x) @ gc.query.weight.flatten(1).T + gc.query.bias
    q = (q - q.mean(-1, keepdim=True)) / (q.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    q = (q * gc.norm.weight + gc.norm.bias).clamp(min=0)
    torch.testing.assert_close(of["v"], q @ gc.value.weight.flatten(1).T + gc.value.bias)
    torch.testing.assert_close(of["X~"], x + of["v"][..., None, None])
    past = v_reset + kept * (before(of["Hm"], v_reset) - v_reset)
    pooled, sa = (past + of["X~"]).mean((-2, -1)), neuron.sa
    hidden = (pooled @ sa.squeeze.weight.flatten(1).T + sa.squeeze.bias).clamp(min=0)
    torch.testing.assert_close(of["M"], alpha / (1 + (-(hidden @ sa.excite.weight.flatten(1).T + sa.excite.bias)).exp()))
    torch.testing.assert_close(of["N"], alpha - of["M"])
    torch.testing.assert_close(of["U"], of["M"][..., None, None] * past + of["N"][..., None, None] * of["X~"])
    assert torch.equal(of["S"], (of["U"] >= 1).float())
    torch.testing.assert_close(of["Hm"], of["U"] * (1 - of["S"]) + v_reset * of["S"])
    assert len({float(v) for v in of["M"].flatten()}) > T * C, "the gate stands still, and the test says nothing"


@pytest.mark.parametrize("off, absent", [({"gc": False}, {"k", "v"}), ({"pe": False}, {"PE"}), ({"sa": False}, {"M", "N"}),
                                         ({"pe_place": "membrane"}, {"PE"})])
def test_what_a_neuron_does_not_have_is_absent(off, absent):
    whole = {"X", "PE", "k", "v", "X~", "M", "N", "U", "S", "Hm"}
    assert trace(staa.STAALIF(C, T, **off).eval(), current()).keys() == whole - absent


def test_the_other_neurons_have_what_is_theirs():
    fsta = trained_like(staa.FSTALIF(C, T))
    of = trace(fsta, current())
    torch.testing.assert_close(of["X~"], fsta.attend(current()))
    torch.testing.assert_close(of["U"], 0.25 * before(of["Hm"]) + of["X~"])
    assert trace(staa.STAttenLIF(C, T), current()).keys() == {"X", "U", "S", "Hm"}

    class Threshold(nn.Module):
        is_neuron = True

        def forward(self, x):
            return (x > 1).to(x)

    assert trace(Threshold(), current()).keys() == {"X", "S"}


def test_after_a_linear_layer_there_is_one_place():
    of = trace(trained_like(staa.STAALIF(C, T)), current()[..., 0, 0])
    assert of["U"].shape == of["X~"].shape == of["M"].shape == (T, B, C) and of["k"].shape == (T, B, 1, 1)


@pytest.mark.parametrize("beta", [1.0, 0.5])
def test_where_tsrd_drops_the_aggregator_u_is_plain_addition(beta):
    neuron = trained_like(staa.STAALIF(C, T, beta=beta)).train()
    x = current()
    torch.manual_seed(2)
    dropped = torch.rand(T) < beta
    assert beta == 1 or 0 < dropped.sum() < T
    torch.manual_seed(2)
    with torch.no_grad(), staa.traced(neuron) as seen:
        neuron(x)
    of, past = seen[""], before(seen[""]["Hm"])
    mixed = of["M"][..., None, None] * past + of["N"][..., None, None] * of["X~"]
    torch.testing.assert_close(of["U"], torch.where(dropped.view(T, 1, 1, 1, 1), past + of["X"], mixed))


def test_what_was_traced_stays_as_it_was_seen():
    neuron = trained_like(staa.STAALIF(C, T))
    of = trace(neuron, current())
    pe = of["PE"].clone()
    with torch.no_grad():
        neuron.pe_input.weight.add_(1)
    assert torch.equal(of["PE"], pe)


def test_other_layouts_types_and_ways_of_calling():
    neuron = trained_like(staa.STAALIF(C, T))
    of = trace(neuron, current())
    last = trace(neuron, current().flatten(0, 1).contiguous(memory_format=torch.channels_last).unflatten(0, (T, B)))
    torch.testing.assert_close(last, of)
    half = trace(neuron, current().bfloat16())
    assert half["S"].dtype == torch.bfloat16 and half["U"].dtype == torch.float32, "the potential stays float32"
    with torch.no_grad(), staa.traced(neuron) as seen:
        neuron(x=current())
    torch.testing.assert_close(seen[""], of)


def test_a_block_and_a_neuron_of_ones_own_are_left_alone():
    class Twice(nn.Module):
        def forward(self, x):
            return 2 * x

    class OnAndOff(staa.LIF):
        def forward(self, x):
            return super().forward(x) - super().forward(-x)

    neuron = trained_like(staa.STAALIF(C, T))
    neuron.gc = Twice()
    of = trace(neuron, current())
    assert not {"k", "v"} & of.keys()
    torch.testing.assert_close(of["X~"], 2 * (of["X"] + of["PE"][:, None, :, None, None]))
    assert trace(OnAndOff(), current()).keys() == {"X", "S"}


@pytest.mark.parametrize("fast", [True, False])
def test_a_network_is_traced_by_layer_and_left_as_it_was(fast, monkeypatch):
    """The same logits before, inside and after; no hook, no method of its own, and gradients flow all the while."""
    monkeypatch.setattr(staa.fused, "enabled", fast)
    network = trained_like(staa.build("resnet20", width=1 / 8, T=2))
    images = torch.rand(2, 3, 16, 16)
    logits = network(images)
    with staa.traced(network) as seen:
        inside = network(images)
        inside.sum().backward()
    torch.testing.assert_close(inside, logits)
    assert fast or torch.equal(inside, logits), "the equations, as `traced` takes them: equal to the bit"
    assert torch.equal(network(images), logits) and all(p.grad is not None for p in network.parameters())
    assert list(seen) == list(staa.neurons(network)) and not any(t.requires_grad for of in seen.values() for t in of.values())
    with staa.firing_rates(network) as rates:
        network(images)
    assert rates() == pytest.approx({name: float(of["S"].mean()) for name, of in seen.items()}, abs=1e-6)
    for module in network.modules():
        assert not (module._forward_hooks or module._forward_pre_hooks or {"fire", "attend"} & module.__dict__.keys())


def test_a_method_of_the_neurons_own_is_called_and_given_back():
    neuron, calls = staa.LIF(), []
    neuron.fire = own = lambda u: (calls.append(1), staa.LIF.fire(neuron, u))[1]
    trace(neuron, current())
    assert len(calls) == T and neuron.fire is own


def test_the_last_pass_counts_and_an_error_inside_leaves_nothing():
    neuron = staa.LIF()
    with pytest.raises(ZeroDivisionError), staa.traced(neuron) as seen:
        neuron(current())
        neuron(-current())
        assert torch.equal(seen[""]["X"], -current()) and len(seen[""]["U"]) == T
        1 / 0
    assert "fire" not in neuron.__dict__ and not neuron._forward_hooks


def effects(network, x):
    network.eval()
    with torch.no_grad(), staa.traced(network) as seen:
        network(x)
    return tracing.effects(network, seen)


def test_nothing_hangs_on_blocks_that_do_nothing_yet():
    network = staa.build("resnet20", width=1 / 8, T=2)
    found = effects(network, torch.rand(2, 3, 16, 16))
    assert list(found) == list(staa.neurons(network))
    for parts in found.values():
        assert parts == dict.fromkeys(["PE", "PE, over steps", "GC", "GC, over images", "where GC looks", "SA",
                                       "SA, over images", "SA, over steps"], 0)
    lif = effects(staa.build("resnet20", "lif", width=1 / 8, T=2), torch.rand(2, 3, 16, 16))
    assert set(map(len, lif.values())) == {0}


def test_where_no_neuron_ran_there_is_one_sentence_and_one_that_did_not_run_is_left_out():
    both = nn.ModuleDict({"a": staa.LIF(), "b": staa.LIF()})
    with pytest.raises(ValueError, match="^no neuron of this ModuleDict was traced: call the network inside `traced`$"):
        tracing.effects(both, {})
    with staa.traced(both) as seen:
        both["a"](current())
    assert tracing.effects(both, seen) == {"a": {}}


def test_a_network_in_training_is_asked_as_in_evaluation():
    neuron = trained_like(staa.STAALIF(C, T, beta=1.0))
    expected = effects(neuron, current())
    with torch.no_grad(), staa.traced(neuron) as seen:
        neuron(current())
    assert tracing.effects(neuron.train(), seen) == expected and neuron.training and min(expected[""].values()) > 0


@pytest.mark.parametrize("place", ["input", "membrane", "both", "output"])
def test_pe_is_left_out_wherever_it_is_added(place):
    """As many spikes turn as where its weights are zero."""
    neuron = trained_like(staa.STAALIF(C, T, pe_place=place))
    of = trace(neuron, current())
    found = effects(neuron, current())[""]["PE"]
    with torch.no_grad():
        for name, parameter in neuron.named_parameters():
            parameter.zero_() if name.startswith("pe_") else None
    assert found == float((trace(neuron, current())["S"] != of["S"]).double().mean()) > 0


def test_what_hangs_on_a_part_by_hand():
    """One channel, two steps, two images: GC's v lifts 0.75 over the threshold, PE does so at the second step, and SA
    has learned to weigh the past by its bias alone, which no mean changes."""
    neuron = staa.STAALIF(1, 2).eval()

    class Whole(nn.Module):  # a network of one neuron: X is 0.75 for the first image and 0.25 for the second
        def __init__(self):
            super().__init__()
            self.neuron = neuron

        def forward(self, x):
            return self.neuron(x.expand(2, 2, 1, 2, 2))

    x = torch.tensor([0.75, 0.25]).view(2, 1, 1, 1)
    with torch.no_grad():
        neuron.gc.value.bias.fill_(0.5)
    # With v: X~ is 1.25 and 0.75. The first image fires at both steps, the second at the second (0.75 + 0.75).
    # Without v: 0.75 fires at the second step (1.5), 0.25 never. Spikes that go: image 1 at t = 1, image 2 at t = 2.
    found = effects(Whole(), x)["neuron"]
    assert found.pop("GC") == 2 / 4 and not any(found.values())
    with torch.no_grad():
        neuron.gc.value.bias.zero_()
        neuron.pe_input.weight.copy_(torch.tensor([[0.0], [0.6]]))
    # With PE: 0.75, then 0.75 + 1.35 fires; 0.25, then 0.25 + 0.85 = 1.1 fires. Without: 1.5 fires, 0.5 does not.
    assert effects(Whole(), x)["neuron"]["PE"] == 1 / 4
    # With PE's mean, 0.3, at both steps: 1.05 fires, then 1.05 again; 0.55, then 1.1 fires. One spike comes.
    assert effects(Whole(), x)["neuron"]["PE, over steps"] == 1 / 4
    with torch.no_grad():
        neuron.pe_input.weight.zero_()
        neuron.sa.squeeze.weight.fill_(1.0)
        neuron.sa.squeeze.bias.fill_(-0.5)
        neuron.sa.excite.weight.fill_(8.0)
    # The gate's input is 8 relu(Hm + X - 0.5): 2 and 0 at the first step, so that N = 2 - M is 0.238 and 1.
    # U is 0.179 and 0.25; at the second step relu(0.929 - 0.5) gives M = 1.937, U = 0.394, and 0.5 - 0.5 gives
    # M = 1, U = 0.5: no spike. With their mean over images N is 0.619 at the first step: U = 0.464 and 0.155; at the
    # second (1.937 + 1) / 2 = 1.469, N = 0.531: U = 1.080 fires, and 0.360 does not.
    found = effects(Whole(), x)["neuron"]
    assert found["SA, over images"] == 1 / 4
    # Over steps as well M is (1.762 + 1 + 1.937 + 1) / 4 = 1.425, N 0.575: U = 0.431, then 1.046: fires too.
    assert found["SA, over steps"] == 1 / 4
    # With M = N = 1 it is 0.75 and 1.5, which fires, and 0.25 and 0.5.
    assert found["SA"] == 1 / 4


def test_v_held_at_its_mean_over_images():
    """Out of the traced v, by hand: X + PE + the mean of v goes through SA and the neuron's own equations."""
    neuron = trained_like(staa.STAALIF(C, T, r=1))
    with torch.no_grad():
        neuron.gc.value.weight.mul_(2)
    of = trace(neuron, current())
    x = of["X"] + (of["PE"][:, None] + of["v"].mean(1, keepdim=True))[..., None, None]
    hm, spikes = torch.zeros(B, C, H, H), []
    with torch.no_grad():
        for t in range(T):
            m = neuron.sa(hm, x[t])
            s, hm = neuron.fire(m * hm + (2 - m) * x[t])
            spikes.append(s)
    expected = float((torch.stack(spikes) != of["S"]).double().mean())
    assert effects(neuron, current())[""]["GC, over images"] == pytest.approx(expected, abs=1e-3) and expected > 0.02


def test_a_key_that_scores_every_place_alike_looks_nowhere():
    """Where GC looks counts for nothing with a constant key, and for something with one that sees the current."""
    neuron = trained_like(staa.STAALIF(C, T))
    images = nn.Sequential(nn.Identity(), neuron)
    assert effects(images, current())["1"]["where GC looks"] > 0
    with torch.no_grad():
        neuron.gc.key.weight.zero_()
    assert effects(images, current())["1"]["where GC looks"] == 0
