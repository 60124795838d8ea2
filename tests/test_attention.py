"""The aggregator, block by block, against sums written out and against the plain neuron."""

import math
from itertools import product

import numpy as np
import pytest
import torch
from torch import nn

from staa import LIF, STAALIF, GlobalContext, PositionEncoding, StepAttention
from staa.attention import Pointwise, sinusoid

T, B, C, H, W = 4, 2, 8, 5, 6


def current(scale=1.5):
    return torch.randn(T, B, C, H, W) * scale


def randomised(module):
    """As after training: no weight is zero any more."""
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn_like(p) * 0.5)
    return module


@torch.no_grad()
def test_gc_is_the_softmax_weighted_sum_written_out():
    gc, x = randomised(GlobalContext(C, r=4)), torch.randn(3, C, H, W)
    out = gc(x)
    for n in range(3):
        score = [[sum(gc.key.weight[0, c, 0, 0] * x[n, c, i, j] for c in range(C)) + gc.key.bias[0]
                  for j in range(W)] for i in range(H)]
        total = sum(math.exp(s) for row in score for s in row)
        context = torch.stack([sum(x[n, c, i, j] * math.exp(score[i][j]) / total for i in range(H) for j in range(W))
                               for c in range(C)])
        q = gc.query.weight[:, :, 0, 0] @ context + gc.query.bias
        q = (q - q.mean()) / (q.var(unbiased=False) + gc.norm.eps).sqrt() * gc.norm.weight + gc.norm.bias
        v = gc.value.weight[:, :, 0, 0] @ q.clamp(min=0) + gc.value.bias
        torch.testing.assert_close(out[n], x[n] + v[:, None, None])


def test_gc_starts_as_the_identity_and_learns():
    gc, x = GlobalContext(C), torch.randn(3, C, H, W)
    assert torch.equal(gc(x), x)
    (gc(x) * torch.randn(3, C, H, W)).sum().backward()
    assert gc.value.weight.grad.abs().sum() > 0


def test_gc_parameters_are_two_c_squared_over_r():
    # Section 4.3 speaks of a reduction whose two numbers are lost: 2C^2 to 2C^2/r, besides biases, key and LN [ours].
    for r in (1, 2, 4, 8, 16):
        gc = GlobalContext(64, r)
        assert gc.query.weight.numel() + gc.value.weight.numel() == 2 * 64 ** 2 // r
    assert GlobalContext(4, 16).query.out_channels == 2


@pytest.mark.parametrize("channels, r", [(4, 4), (8, 16), (1, 1)])
def test_gc_with_the_fewest_channels_depends_on_the_data_and_learns(channels, r):
    gc, x = GlobalContext(channels, r).double(), torch.randn(64, channels, H, W, dtype=torch.float64)
    nn.init.normal_(gc.value.weight)
    nn.init.zeros_(gc.query.bias)  # of two channels the norm keeps little more than which is larger
    gc(x).square().sum().backward()
    assert all(layer.weight.grad.abs().sum() > 0 for layer in (gc.key, gc.query, gc.value))
    assert (gc(x) - x)[:, :, 0, 0].std(0).max() > 0.1


@pytest.mark.parametrize("make, words", [
    (lambda: GlobalContext(8, 0), "r, the scaling coefficient of GC, must be at least 1, got 0"),
    (lambda: PositionEncoding(8, 1)(torch.zeros(4, 1, 8, 2, 2)), r"takes \(T=1, B, C=8, H, W\), got \(4, 1, 8, 2, 2\)"),
    (lambda: PositionEncoding(1, 4)(torch.zeros(4, 1, 8, 2, 2)), r"takes \(T=4, B, C=1, H, W\)")])
def test_a_block_of_another_size_is_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_the_offset_of_gc_ignores_where_things_are():
    # Attention over positions: permuting the pixels permutes the output.
    gc, x = randomised(GlobalContext(C)), torch.randn(2, C, H, W)
    order = torch.randperm(H * W)
    shuffled = x.flatten(2)[..., order].view_as(x)
    torch.testing.assert_close(gc(shuffled), gc(x).flatten(2)[..., order].view_as(x))


def test_a_layer_that_starts_at_zero_draws_all_the_same():
    """The weights that a seed gives to the layers after it are those of any convolution before them."""
    ours, theirs = torch.manual_seed(3) and Pointwise(4, 6, from_zero=True), torch.rand(5)
    other, expected = torch.manual_seed(3) and torch.nn.Conv2d(4, 6, 1), torch.rand(5)
    assert torch.equal(theirs, expected) and not ours.weight.any() and not ours.bias.any() and other.weight.any()


def test_sa_by_hand():
    sa, hm, x = randomised(StepAttention(C, alpha=2.0)), torch.randn(B, C, H, W), torch.randn(B, C, H, W)
    pooled = (hm + x).flatten(2).mean(2)
    hidden = (pooled @ sa.squeeze.weight[:, :, 0, 0].T + sa.squeeze.bias).clamp(min=0)
    gate = 1 / (1 + torch.exp(-(hidden @ sa.excite.weight[:, :, 0, 0].T + sa.excite.bias)))
    torch.testing.assert_close(sa(hm, x), (2.0 * gate)[..., None, None])


def test_learned_pe_starts_at_zero_and_differs_by_step_only():
    pe, x = PositionEncoding(C, T), current()
    assert torch.equal(pe(x), x)
    added = randomised(pe)(x) - x
    torch.testing.assert_close(added, pe.weight[:, None, :, None, None].expand_as(x))


def test_fixed_pe_is_the_sinusoid_of_vaswani():
    table = sinusoid(T, C)
    for t, i in product(range(T), range(C // 2)):
        angle = t / 10000 ** (2 * i / C)
        assert table[t, 2 * i] == pytest.approx(math.sin(angle), abs=1e-6)
        assert table[t, 2 * i + 1] == pytest.approx(math.cos(angle), abs=1e-6)
    assert sinusoid(3, 5).shape == (3, 5)
    assert not list(PositionEncoding(C, T, "fixed").parameters())


def test_all_blocks_off_is_the_plain_neuron():
    x = current()
    for training in (True, False):
        neuron = STAALIF(C, T, gc=False, pe=False, sa=False, beta=0.0).train(training)
        assert not list(neuron.parameters())
        assert torch.equal(neuron(x), LIF()(x))


def added(x, neuron=LIF(decay=1.0, gain=1.0)):
    """U[t] = Hm[t-1] + X[t], then fire and reset."""
    return neuron(x)


def test_alpha_2_and_a_gate_at_one_half_is_plain_addition():
    x = current()
    assert torch.equal(STAALIF(C, T, gc=False, pe=False, alpha=2.0, beta=0.0)(x), added(x))
    assert torch.equal(STAALIF(C, T, beta=0.0)(x), added(x)), "and so the whole aggregator starts as addition"
    assert not torch.equal(randomised(STAALIF(C, T, beta=0.0))(x), added(x))


def test_the_whole_neuron_by_hand():
    """Eqs. 11-14, then 2 and 3, one step after the other from the blocks themselves."""
    neuron, x = randomised(STAALIF(C, T, beta=0.0, alpha=1.5)), current()
    hm, expected = torch.zeros(B, C, H, W), []
    for t in range(T):
        xa = neuron.gc(x[t] + neuron.pe_input.weight[t][:, None, None])
        m = neuron.sa(hm, xa)
        u = m * hm + (1.5 - m) * xa
        s = (u >= 1).float()
        hm = u * (1 - s)
        expected.append(s)
    assert torch.equal(neuron(x), torch.stack(expected))


@pytest.mark.parametrize("place", ["input", "membrane", "both", "output"])
def test_places_of_pe_by_hand(place):
    """Without GC and SA the update is 0.25 Hm + X, and PE's place can be written into it."""
    neuron, x = randomised(STAALIF(C, T, gc=False, sa=False, beta=0.0, pe_place=place)), current()
    zero = torch.zeros(T, C)
    pe_x, pe_h, pe_u = ((zero if pe is None else pe.weight)[..., None, None]
                        for pe in (neuron.pe_input, neuron.pe_membrane, neuron.pe_output))
    assert len(list(neuron.parameters())) == (2 if place == "both" else 1)
    hm, expected = torch.zeros(B, C, H, W), []
    for t in range(T):
        u = 0.25 * (hm + pe_h[t]) + (x[t] + pe_x[t]) + pe_u[t]
        s = (u >= 1).float()
        hm = u * (1 - s)
        expected.append(s)
    assert torch.equal(neuron(x), torch.stack(expected))


@pytest.mark.parametrize("gc, pe, sa", list(product([False, True], repeat=3)))
def test_tsrd_at_one_is_addition_in_training_and_nothing_in_evaluation(gc, pe, sa):
    x = current()
    neuron = randomised(STAALIF(C, T, gc=gc, pe=pe, sa=sa, beta=1.0))
    without = STAALIF(C, T, gc=gc, pe=pe, sa=sa, beta=0.0)
    without.load_state_dict(neuron.state_dict())
    assert torch.equal(neuron.train()(x), added(x))
    assert torch.equal(neuron.eval()(x), without(x))


def test_tsrd_drops_each_step_with_probability_beta():
    # One step is dropped where the output is addition's: X = 0.6 is below threshold by addition, and above with PE = 1.
    steps, beta = 2000, 0.1
    neuron = STAALIF(1, steps, gc=False, sa=False, beta=beta, decay=0.0)
    torch.nn.init.ones_(neuron.pe_input.weight)
    spikes = neuron(torch.full((steps, 1, 1, 1, 1), 0.6)).flatten()
    dropped = 1 - spikes.mean().item()
    assert abs(dropped - beta) < 5 * math.sqrt(beta * (1 - beta) / steps)


def test_tsrd_draws_once_for_the_whole_batch():
    neuron = STAALIF(1, 50, gc=False, sa=False, beta=0.5, decay=0.0)
    torch.nn.init.ones_(neuron.pe_input.weight)
    spikes = neuron(torch.full((50, 7, 1, 3, 3), 0.6)).flatten(1)
    assert (spikes == spikes[:, :1]).all() and 0 < spikes.mean() < 1


def test_a_gpu_draws_tsrd_itself(monkeypatch):
    """A choice of the host would be captured in a CUDA graph once and repeated for ever."""
    asked, rand = [], torch.rand

    def on_the_cpu(*shape, device):
        asked.append(str(device))
        return rand(*shape)
    monkeypatch.setattr(torch, "rand", on_the_cpu)
    mask = STAALIF(C, T, beta=1e-9).draw(torch.device("cuda", 1))
    assert asked == ["cuda:1"] and mask.shape == (T,) and not mask.any(), "a mask, though it drops nothing"


def test_on_a_cpu_there_is_no_mask_where_nothing_is_dropped():
    """And what is drawn is the CPU's next T numbers: records hang on that."""
    rarely, often, cpu = STAALIF(C, T, beta=1e-9), STAALIF(C, T, beta=0.5), torch.device("cpu")
    torch.manual_seed(0)
    numbers = torch.rand(2, T)
    torch.manual_seed(0)
    assert rarely.draw(cpu) is None and torch.equal(often.draw(cpu), numbers[1] < 0.5) and (numbers[1] < 0.5).any()


def test_every_switch_counts_its_own_parameters():
    r, h = 2, 2  # C/r and C/4 at C = 8, r = 4
    gc = (C + 1) + (C * r + r) + 2 * r + (r * C + C)
    sa = (C * h + h) + (h * C + C)
    for has_gc, has_pe, has_sa in product([False, True], repeat=3):
        n = sum(p.numel() for p in STAALIF(C, T, gc=has_gc, pe=has_pe, sa=has_sa).parameters())
        assert n == has_gc * gc + has_pe * T * C + has_sa * sa


def test_gradients_reach_every_parameter():
    neuron = randomised(STAALIF(C, T, beta=0.0, pe_place="both"))
    (neuron(current()) * torch.randn(T, B, C, H, W)).sum().backward()
    for name, p in neuron.named_parameters():
        assert p.grad is not None and (p.grad.abs().sum() > 0 or name == "gc.key.bias"), name  # softmax: no gradient


def test_it_plugs_into_channels_last_and_half_precision():
    neuron = STAALIF(C, T).to(memory_format=torch.channels_last)
    x = current().flatten(0, 1).contiguous(memory_format=torch.channels_last).unflatten(0, (T, B))
    assert torch.equal(neuron.eval()(x), neuron(x.contiguous()))
    assert neuron(x).flatten(0, 1).is_contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        assert set(neuron(x.bfloat16()).unique().tolist()) <= {0.0, 1.0}


@pytest.mark.parametrize("settings, words", [
    (dict(r=0), "r, the scaling"), (dict(alpha=0.0), "alpha"), (dict(beta=1.5), "beta"), (dict(beta=-0.1), "beta"),
    (dict(pe_kind="random"), "learned, fixed"), (dict(pe_place="f"), "input, membrane, both, output"),
    (dict(v_th=-1.0), "v_th"), (dict(alpha=math.inf), "alpha must be a finite number"), (dict(gain=math.nan), "gain must be"),
    (dict(gc=False, r=8), r"r is a setting of the GC block, which is off \(gc=False\); leave it out, got 8"),
    (dict(sa=False, alpha=1.0), r"alpha is a setting of the SA block, which is off \(sa=False\)"),
    (dict(pe=False, pe_kind="fixed"), r"pe_kind is a setting of PE, which is off \(pe=False\)"),
    (dict(pe=False, pe_kind="random"), "pe_kind is a setting of PE, which is off"),
    (dict(pe=False, pe_place="both"), "pe_place is a setting of PE, which is off"),
    (dict(decay=0.5), r"decay is a setting of eq. 1, in whose place SA computes \(sa=True\); leave it out, got 0.5"),
    (dict(gain=0.5), "gain is a setting of eq. 1, in whose place SA computes")], ids=str)
def test_bad_settings(settings, words):
    with pytest.raises(ValueError, match=words):
        STAALIF(C, T, **settings)


def test_a_default_may_be_written_out_where_it_does_nothing():
    STAALIF(C, T, gc=False, pe=False, sa=False, r=4, alpha=2.0, pe_kind="learned", pe_place="input", decay=0.5, gain=0.5)
    STAALIF(C, T, decay=0.25, gain=1.0, v_th=0.5, v_reset=-0.5, a=2.0)


@pytest.mark.parametrize("channels, steps", [(0, 4), (8, 0)])
def test_bad_sizes(channels, steps):
    with pytest.raises(ValueError, match="at least 1"):
        STAALIF(channels, steps)


@pytest.mark.parametrize("make, words", [
    (lambda: STAALIF("8", 4), "channels must be a whole number, got '8'"),
    (lambda: STAALIF(8, 4.0), "T must be a whole number, got 4.0"),
    (lambda: STAALIF(8, 4, r=True), "r must be a whole number, got True"),
    (lambda: STAALIF(8, 4, r=2.5), "r must be a whole number, got 2.5")])
def test_sizes_that_are_no_whole_numbers(make, words):
    with pytest.raises(TypeError, match=f"^{words}$"):
        make()
    STAALIF(np.int64(8), np.int64(4), r=np.int64(2))


@pytest.mark.parametrize("shape", [(T + 1, B, C, H, W), (T, B, C + 1, H, W), (B, C, H, W)])
def test_a_current_of_another_shape_is_refused(shape):
    with pytest.raises(ValueError, match=r"takes \(T=4, B, C=8, H, W\)"):
        STAALIF(C, T)(torch.zeros(shape))
