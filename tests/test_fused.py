"""The fast path against the reference: the same spikes, the same gradients, for any shape, layout, type and setting."""

import copy
import math
import os
import re
import runpy
import sys
import threading
import warnings
from shutil import which
from types import SimpleNamespace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode

import staa
from staa import fused, fused_lif, fused_staa, fused_staa_cpu
from staa.attention import STAALIF
from staa.fsta import FSTALIF
from staa.neuron import LIF
from staa.statten import STAttenLIF
from staa.surrogate import RECTANGLE, SIGMOID, Surrogate
from staa.variants import LeakySTAALIF

#: Compiling takes seconds, so the properties are tried on the functions as they stand, and compiled on fewer shapes:
#: STAA from C, all else by torch.compile.
WAYS = {"as it stands": 2 ** 60, "compiled": 0}
few = settings(max_examples=30, deadline=None)

sizes = st.tuples(st.integers(1, 5), st.integers(1, 3), st.integers(1, 6), st.integers(1, 6), st.integers(1, 5))
lif_settings = st.fixed_dictionaries({}, optional={
    "decay": st.floats(0, 1), "gain": st.floats(0.1, 2), "v_th": st.floats(0.3, 2), "v_reset": st.floats(-1, 0.2),
    "a": st.floats(0.3, 3)})
staa_settings = st.fixed_dictionaries({}, optional={
    "gc": st.booleans(), "pe": st.booleans(), "sa": st.booleans(), "r": st.integers(1, 4), "alpha": st.floats(0.5, 3),
    "beta": st.sampled_from([0.0, 0.5, 1.0]), "pe_kind": st.sampled_from(["learned", "fixed"]),
    "pe_place": st.sampled_from(["input", "membrane", "both", "output"])})


def useful(blocks: dict) -> dict:
    """The settings without those of a block that is off, and without eq. 1's where SA stands in its place."""
    off = {"gc": ("r",), "pe": ("pe_kind", "pe_place"), "sa": ("alpha",)}
    without = [name for block, names in off.items() if not blocks.get(block, True) for name in names]
    without += ("decay", "gain") if blocks.get("sa", True) else ()
    return {name: value for name, value in blocks.items() if name not in without}


@pytest.fixture(autouse=True)
def restored():
    before = fused.enabled, fused.WORTH_COMPILING
    yield
    fused.enabled, fused.WORTH_COMPILING = before


def current(shape, dtype=torch.float64, channels_last=False, seed=0):
    x = 2 * torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))
    if channels_last:
        x = x.flatten(0, 1).contiguous(memory_format=torch.channels_last).unflatten(0, shape[:2])
    return x


def outcome(neuron, x, fast: bool):
    """Spikes, and the gradients of the current and of each parameter, for one random cotangent."""
    fused.enabled = fast
    x = x.clone().requires_grad_()
    neuron.zero_grad()
    torch.manual_seed(1)  # TSRD's draws
    s = neuron(x)
    cotangent = torch.randn(s.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).to(s.dtype)
    s.backward(cotangent)
    zero = torch.zeros(())
    return s.detach(), x.grad, {n: zero if p.grad is None else p.grad for n, p in neuron.named_parameters()}


def same(neuron, x, tolerance=1e-5):
    (s, dx, dp), (s2, dx2, dp2) = outcome(neuron, x, False), outcome(neuron, x, True)
    assert s2.dtype == x.dtype and s2.shape == x.shape
    assert torch.equal(s, s2), "spikes differ"
    for name, reference, fast in [("x", dx, dx2), *((n, dp[n], dp2[n]) for n in dp if n != "gc.key.bias")]:
        scale = max(reference.abs().max().item(), 1e-6)
        assert (reference - fast).abs().max().item() <= tolerance * scale, name


def shaken(neuron):
    """The neuron with all its parameters away from their start, where half of them have no effect."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in neuron.parameters():
            p.add_(0.3 * torch.randn(p.shape, dtype=p.dtype, generator=generator))
    return neuron


class OwnSTAALIF(STAALIF):
    """Of whose surrogate C and Triton know nothing."""

    surrogate = Surrogate(RECTANGLE.gradient)


class OwnLeakySTAALIF(LeakySTAALIF):
    surrogate = Surrogate(lambda v, a: arctangent(v, a), through_reset=False)


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """STAA with a surrogate of its own is compiled, but for the compiling, which takes half a minute each: see test_gpu."""
    fused.WORTH_COMPILING = WAYS["compiled"]
    for name in ("on_gpu", "compiler"):
        monkeypatch.setattr(fused, name, lambda _: True)
    with torch.compiler.set_stance("force_eager"):
        yield


def take_c():
    """Whatever its size, STAA is computed in C."""
    if not fused_staa_cpu.available(True):
        pytest.skip("no C compiler")
    fused.WORTH_COMPILING = WAYS["compiled"]


@pytest.fixture
def in_c():
    take_c()


@pytest.fixture
def inductor():
    """Whatever its size, what is compiled is compiled."""
    if not fused.compiler("cpu"):
        pytest.skip("no C++ compiler")
    fused.WORTH_COMPILING = WAYS["compiled"]


@few
@given(sizes, lif_settings, st.booleans())
def test_lif(shape, numbers, channels_last):
    fused.WORTH_COMPILING = WAYS["as it stands"]
    same(LIF(**numbers), current(shape, channels_last=channels_last))


@pytest.mark.parametrize("channels_last", [True, False])
def test_lif_compiled(channels_last):
    """Several settings and sizes after one another: the compiled function is one for all."""
    fused.WORTH_COMPILING = WAYS["compiled"]
    for numbers in ({}, dict(decay=0.5, gain=0.5), dict(v_th=0.7, v_reset=-0.3, a=2.0)):
        for shape in ((3, 2, 5, 4, 3), (3, 1, 2, 6, 5)):
            same(LIF(**numbers), current(shape, channels_last=channels_last))


def same_in_c(neuron, x):
    """`same`, and it was C that computed it, there and back; for slopes of torch, the potentials of each piece before."""
    called, call, threads = [], fused_staa_cpu.call, torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused_staa_cpu, "call", lambda name, *rest: called.append(name) or call(name, *rest))
        try:
            torch.set_num_threads(1)  # or some samples would be too few
            same(neuron, x)
            pieces = len(list(fused_staa_cpu.pieces(x, neuron.surrogate)))
        finally:
            torch.set_num_threads(threads)
    own = neuron.surrogate is not RECTANGLE
    assert called == ["staa", *["staa"] * own, "staa_backward"] + ["staa", "staa_backward"] * (pieces - 1)


@few
@given(sizes, staa_settings, lif_settings, st.booleans(), st.sampled_from(
    [STAALIF, LeakySTAALIF, OwnSTAALIF, OwnLeakySTAALIF]))
def test_staa_in_c(shape, blocks, numbers, channels_last, neuron):
    take_c()
    leaks = issubclass(neuron, LeakySTAALIF)
    settings = useful(blocks | numbers) | ({"decay": numbers["decay"]} if leaks and "decay" in numbers else {})
    neuron = shaken(neuron(shape[2], shape[0], **settings).double())
    bare = next(neuron.children(), None) is None  # as LIF, unless TSRD drops a step
    (same if bare else same_in_c)(neuron, current(shape, channels_last=channels_last))


@pytest.mark.parametrize("channels_last", [True, False])
def test_in_c_the_pieces_meet_without_a_seam(channels_last, in_c):
    """Of a map with more places than are summed up at once."""
    header = fused_staa_cpu.SOURCE.with_suffix(".h").read_text()
    assert 41 * 53 > 2 * max(int(n) for n in re.findall(r"#define (?:ROWS|SOME) (\d+)", header))
    same_in_c(shaken(STAALIF(3, 2).double()), current((2, 2, 3, 41, 53), channels_last=channels_last))


@pytest.mark.parametrize("channels_last", [True, False])
def test_in_c_a_long_sum_stays_exact(channels_last, in_c):
    """Gradients in float32 of a map with 25,000 places against those in float64. No number comes near a threshold, where
    a spike, or the rectangle's edge, would be another."""
    x = 0.05 * current((2, 1, 4, 160, 160), channels_last=channels_last) + 0.7
    neuron = shaken(STAALIF(4, 2, beta=0.0))
    with torch.no_grad():
        for p in neuron.parameters():
            p.mul_(0.1)
    exact, plain, found = (outcome(copy.deepcopy(neuron).to(dtype), x.to(dtype), fast) for dtype, fast in
                           ((torch.float64, False), (torch.float32, False), (torch.float32, True)))
    assert torch.equal(exact[0], found[0].double())
    for name in ("x", *exact[2].keys() - {"gc.key.bias"}):
        true, torchs, ours = (gradients[1] if name == "x" else gradients[2][name] for gradients in (exact, plain, found))
        error = (true - torchs).abs().max()  # the key's gradient is a small difference of large sums
        assert (true - ours).abs().max() <= max(1e-5 * true.abs().max(), 2 * error), name


def test_in_c_the_number_of_threads_changes_nothing(in_c):
    threads, found, neuron = torch.get_num_threads(), [], shaken(STAALIF(6, 3, beta=0.0))
    x = current((3, 5, 6, 40, 40), torch.float32, channels_last=True)
    try:
        for n in (1, 3):
            torch.set_num_threads(n)
            found.append(outcome(neuron, x, True)[:2])  # torch sums up the rest
    finally:
        torch.set_num_threads(threads)
    torch.testing.assert_close(*found, rtol=0, atol=0)


def test_in_c_only_what_fits_together_is_computed(monkeypatch, in_c):
    """Of a tensor of another size C would read what lies beyond it: torch says so. And each thread takes a sample."""
    called, x = [], current((2, 2, 4, 3, 3), torch.float32)
    monkeypatch.setattr(fused_staa, "staa_in_c", lambda y, *_: called.append(y.shape) or y)
    for name in dict(STAALIF(4, 2).named_parameters()):
        neuron = STAALIF(4, 2)
        block, _, parameter = name.rpartition(".")
        wrong = getattr(neuron.get_submodule(block), parameter)
        setattr(neuron.get_submodule(block), parameter, torch.nn.Parameter(torch.cat([wrong] * 3)))
        with pytest.raises(RuntimeError):
            neuron(x)
    for name in ("gc.value.bias", "gc.norm.bias", "sa.squeeze.bias", "sa.excite.bias"):  # of NULL it would read, too
        neuron = STAALIF(4, 2)
        block, _, parameter = name.rpartition(".")
        setattr(neuron.get_submodule(block), parameter, None)
        with pytest.raises(KeyError):
            neuron(x)
    assert called == []
    STAALIF(4, 2)(x)
    assert called == [(2, 2, 4, 9)]
    for threads, calls in ((4, 2), (5, 2)):  # of which two samples occupy half, and less
        monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
        STAALIF(4, 2)(x)
        assert len(called) == calls


def test_in_c_too_little_memory_is_said(monkeypatch):
    fused.WORTH_COMPILING = WAYS["compiled"]
    monkeypatch.setattr(fused_staa_cpu, "library", lambda dtype: SimpleNamespace(staa=lambda *_: 1))
    monkeypatch.setattr(fused_staa_cpu, "available", lambda matters: True)
    with pytest.raises(MemoryError, match="^too little memory for a sample of 2 time steps, 4 channels and 9 places$"):
        STAALIF(4, 2)(current((2, 2, 4, 3, 3), torch.float32))


BLOCKS = [(OwnSTAALIF, {}), (OwnSTAALIF, dict(sa=False, v_reset=-0.3)), (OwnSTAALIF, dict(sa=False, beta=0.5)),
          (OwnSTAALIF, dict(gc=False, pe_place="both", beta=0.5)), (OwnSTAALIF, dict(pe_place="output")),
          (OwnSTAALIF, dict(gc=False, pe_place="output", beta=0.5)),
          (OwnSTAALIF, dict(gc=False, pe=False, sa=False, beta=0.5)),
          (OwnLeakySTAALIF, dict(decay=0.5, v_reset=-0.3, pe_place="both", beta=0.5))]


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("neuron, blocks", BLOCKS)
def test_staa_as_torch_compiles_it(neuron, blocks, channels_last, as_on_a_gpu, monkeypatch):
    called, compiled = [], fused_staa._Compiled.apply
    monkeypatch.setattr(fused_staa._Compiled, "apply", lambda *all: called.append("") or compiled(*all))
    for shape in ((3, 2, 5, 4, 3), (2, 1, 1, 6, 5)):
        same(shaken(neuron(shape[2], shape[0], **blocks).double()), current(shape, channels_last=channels_last))
    assert len(called) == 2


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("neuron, blocks", BLOCKS)
def test_a_surrogate_of_its_own_with_staa_in_c(neuron, blocks, channels_last, monkeypatch, in_c):
    """Its slopes of some samples after others."""
    monkeypatch.setattr(fused_staa_cpu, "SLICE", 2 * 5 * 4 * 3 * 3)
    assert list(fused_staa_cpu.pieces(torch.empty(3, 5, 5, 4, 3), neuron.surrogate))[-1][0] > 0, "more than one piece"
    for shape in ((3, 5, 5, 4, 3), (2, 1, 1, 6, 5)):
        same_in_c(shaken(neuron(shape[2], shape[0], **blocks).double()), current(shape, channels_last=channels_last))


@pytest.mark.parametrize("slope", [lambda v: 1.0, lambda v: torch.ones(()), lambda v: v.new_ones(1).double(),
                                   lambda v: torch.ones_like(v.mT).mT])
def test_with_staa_in_c_slopes_may_be_one_number_or_lie_otherwise(slope, in_c):
    class Straight(STAALIF):
        surrogate = Surrogate(lambda v, a: slope(v) / a)

    same_in_c(shaken(Straight(4, 2).double()), current((2, 2, 4, 5, 3)))


def siblings(T, numbers) -> list:
    """The neurons of FSTA, without and with its module, and of STAtten, with those of the numbers that they have."""
    shared = {"v_th": numbers["v_th"] + 0.3} if "v_th" in numbers else {}
    fsta = shared | {name: numbers[name] for name in numbers.keys() & {"decay"}}
    slope = {"slope": numbers["a"]} if "a" in numbers else {}
    return [FSTALIF(4, T, temporal=False, spatial=False, **fsta, **slope),
            shaken(FSTALIF(4, T, k=3, **fsta, **slope).double()),
            STAttenLIF(**shared, **slope, **{"tau": 1 + numbers["gain"]} if "gain" in numbers else {})]


@few
@given(sizes, lif_settings, st.booleans())
def test_the_siblings_neurons(shape, numbers, channels_last):
    fused.WORTH_COMPILING = WAYS["as it stands"]
    for neuron in siblings(shape[0], numbers):
        same(neuron, current(shape, channels_last=channels_last))


def test_the_siblings_neurons_compiled():
    fused.WORTH_COMPILING = WAYS["compiled"]
    for numbers in ({}, dict(decay=0.5, gain=0.5, v_th=0.7, a=3.0)):
        for shape in ((3, 2, 5, 4, 3), (3, 1, 2, 6, 5)):
            for neuron in siblings(3, numbers):
                same(neuron, current(shape, channels_last=True))


def arctangent(v, a):
    """1 / (a (1 + (pi v / a)^2)), the derivative of arctan(pi v / a) / pi: 1/a in the middle, like the rectangle."""
    return 1 / (a * (1 + (torch.pi / a * v) ** 2))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("through_reset", [True, False])
def test_somebodys_own_surrogate_is_as_fast(way, through_reset, monkeypatch):
    """In a subclass of LIF and of STAALIF: the same as the reference, which `fused` computes, and by hand for one step."""
    fused.WORTH_COMPILING = WAYS[way]
    own = Surrogate(arctangent, through_reset=through_reset)

    class Arctangent(LIF):
        surrogate = own

    class WithAttention(STAALIF):
        surrogate = own

    x = current((3, 2, 5, 4, 3), channels_last=True)
    for neuron in (Arctangent(), Arctangent(a=2.0, v_reset=-0.2, decay=0.6), shaken(WithAttention(5, 3, a=2.0).double())):
        assert neuron.is_plain()
        same(neuron, x)
    _, dx, _ = outcome(Arctangent(a=2.0), torch.tensor([[0.0, 1.0, 2.0]], dtype=torch.float64), True)
    _, ones, _ = outcome(LIF(a=100.0), torch.tensor([[0.0, 1.0, 2.0]], dtype=torch.float64), True)  # the cotangent / 100
    torch.testing.assert_close(dx / ones, 100 / (2 * (1 + torch.tensor([[torch.pi / 2, 0, torch.pi / 2]]).double() ** 2)))

    called = []
    monkeypatch.setattr(fused_lif, "lif", lambda x, *_: called.append("lif") or x)
    Arctangent()(x)
    assert called == ["lif"]


@pytest.mark.parametrize("through_reset", [True, False])
def test_somebodys_own_rule_of_firing(through_reset):
    """Later than at the threshold."""
    fused.WORTH_COMPILING = WAYS["as it stands"]

    class Late(LIF):
        surrogate = Surrogate(arctangent, fires=lambda v: v > 0.25, through_reset=through_reset)

    class LateWithAttention(STAALIF):
        surrogate = Late.surrogate

    x = torch.tensor([[1.2, 1.3]], dtype=torch.float64)
    assert Late()(x).tolist() == [[0, 1]]
    x = current((3, 2, 5, 4, 3), channels_last=True)
    for neuron in (Late(), Late(v_reset=-0.2, decay=0.6), shaken(LateWithAttention(5, 3).double())):
        assert neuron.is_plain()
        same(neuron, x)


def test_a_function_alone_is_no_surrogate():
    class Forgotten(LIF):
        surrogate = arctangent

    with pytest.raises(TypeError, match=r"surrogate must be a staa.Surrogate\(gradient\), got method"):
        Forgotten()


@pytest.mark.parametrize("way", WAYS)
def test_only_above_its_threshold_fstas_neuron_fires(way):
    """U = 1/2, which is its threshold; and there its surrogate's peak, 1 / (2 tanh(1/2))."""
    fused.WORTH_COMPILING = WAYS[way]
    neuron, x = FSTALIF(1, 1, temporal=False, spatial=False), torch.tensor([[0.5, 0.5 + 2 ** -24]]).view(1, 1, 1, 1, 2)
    s, dx, _ = outcome(neuron, x, True)
    assert s.flatten().tolist() == [0, 1]
    _, one, _ = outcome(LIF(a=100.0), x, True)
    torch.testing.assert_close(dx / (100 * one), torch.full_like(x, 1 / (2 * math.tanh(0.5))))


@pytest.mark.parametrize("way", WAYS)
def test_a_wider_rectangle_is_lower(way):
    """With a = 4 it is 1/4 from U = -1 to 3; without memory, decay = 0, U is the current."""
    fused.WORTH_COMPILING = WAYS[way]
    x = torch.tensor([[-1.5, -0.5], [0.5, 1.5], [2.5, 3.5]], dtype=torch.float64, requires_grad=True)
    LIF(decay=0.0, a=4.0)(x).sum().backward()
    assert x.grad.tolist() == [[0, 0.25], [0.25, 0.25], [0.25, 0]]


@few
@given(sizes, staa_settings, lif_settings, st.booleans())
@example((5, 3, 5, 4, 5), {"pe_place": "membrane", "beta": 0.0}, {}, True)
def test_staa(shape, blocks, numbers, channels_last):
    fused.WORTH_COMPILING = WAYS["as it stands"]
    same(shaken(STAALIF(shape[2], shape[0], **useful(blocks | numbers)).double()), current(shape, channels_last=channels_last))


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("blocks", [{}, dict(sa=False, v_reset=-0.3), dict(gc=False, pe_place="both", beta=0.5),
                                    dict(pe_place="output"), dict(gc=False, pe=False, sa=False, beta=0.5)])
def test_staa_compiled(channels_last, blocks):
    fused.WORTH_COMPILING = WAYS["compiled"]
    for shape in ((3, 2, 5, 4, 3), (2, 1, 1, 6, 5)):
        same(shaken(STAALIF(shape[2], shape[0], **blocks).double()), current(shape, channels_last=channels_last))


@few
@given(sizes, staa_settings, lif_settings, st.booleans())
@example((5, 3, 5, 4, 5), {"pe_place": "membrane", "beta": 0.0}, {}, True)
def test_staa_that_leaks(shape, blocks, numbers, channels_last):
    fused.WORTH_COMPILING = WAYS["as it stands"]
    leak = {"decay": numbers["decay"]} if "decay" in numbers else {}
    settings = useful(blocks | numbers) | leak
    same(shaken(LeakySTAALIF(shape[2], shape[0], **settings).double()), current(shape, channels_last=channels_last))


@pytest.mark.parametrize("channels_last", [True, False])
def test_staa_that_leaks_compiled(channels_last):
    fused.WORTH_COMPILING = WAYS["compiled"]
    for blocks in ({}, dict(decay=0.5, v_reset=-0.3, pe_place="both", beta=0.5), dict(sa=False, v_reset=-0.3, beta=0.5)):
        same(shaken(LeakySTAALIF(5, 3, **blocks).double()), current((3, 2, 5, 4, 3), channels_last=channels_last))


def test_staa_compiled_for_one_place():
    fused.WORTH_COMPILING = WAYS["compiled"]
    same(shaken(STAALIF(1, 2).double()), current((2, 1, 1, 1, 1)))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision(dtype, way):
    """The membrane potential is float32 in both, so that the spikes of bf16 currents are equal too; bf16 gradients agree
    to their own rounding."""
    fused.WORTH_COMPILING = WAYS[way]
    x = current((4, 8, 8, 6, 6), dtype, channels_last=True)
    plain = FSTALIF(8, 4, temporal=False, spatial=False)
    for neuron in LIF(), LIF(decay=0.4, gain=0.6, v_reset=-0.2), plain, STAttenLIF():
        same(neuron, x, tolerance=1e-5 if dtype == torch.float32 else 2 ** -7)
    if dtype == torch.bfloat16:
        neuron = shaken(STAALIF(8, 4))
        reference, fast = outcome(neuron, x, False), outcome(neuron, x, True)
        assert torch.equal(reference[0], fast[0])
        assert torch.nn.functional.cosine_similarity(reference[1].flatten().float(), fast[1].flatten().float(), 0) > 0.99
    else:
        same(shaken(STAALIF(8, 4, r=1)), x, tolerance=1e-4)  # sums over space and LayerNorm in another order


@pytest.mark.parametrize("neuron", ["lif", "staa"])
def test_shapes_alone(neuron):
    """A network on the meta device gives its output's shape; there is no autocast there to switch off."""
    with torch.device("meta"):
        network = staa.build("resnet20", neuron, num_classes=7, T=2, width=1 / 16)
    assert network(torch.empty(3, 3, 16, 16, device="meta")).shape == (3, 7)


def test_shapes_alone_of_a_training_step():
    """With fake tensors, where a TSRD draw has no value."""
    with FakeTensorMode():
        network = staa.build("resnet20", "staa", num_classes=7, T=2, width=1 / 16, beta=0.5)
        logits = network(torch.empty(3, 3, 16, 16))
        logits.sum().backward()
    assert logits.shape == (3, 7) and all(p.grad.shape == p.shape for p in network.parameters())


def test_autocast_does_not_reach_the_membrane():
    neuron, x = shaken(STAALIF(8, 4)).eval(), current((4, 2, 8, 6, 6), torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        inside = neuron(x)
    assert torch.equal(inside, neuron(x))


@pytest.mark.parametrize("way", WAYS)
def test_autocast_around_the_backward_pass_does_not_reach_what_is_computed_anew(way):
    fused.WORTH_COMPILING = WAYS[way]
    neuron, gradients = shaken(STAALIF(8, 4, beta=0.0)), []
    for where in (False, True):
        x = current((4, 2, 8, 6, 6), torch.float32).requires_grad_()
        s = neuron(x)
        with torch.autocast("cpu", torch.bfloat16, enabled=where):
            s.backward(current(s.shape, torch.float32, seed=1))
        gradients.append(x.grad)
    outside, inside = gradients
    rounding = 1e-6 if way == "compiled" else 1e-2  # torch's own backward pass computes in bf16 there
    torch.testing.assert_close(inside, outside, rtol=0, atol=rounding * outside.abs().max().item())


@pytest.mark.parametrize("settings", [dict(), dict(decay=0.3), dict(decay=0.3, gain=0.7), dict(v_reset=-0.3),
                                      dict(decay=0.0), dict(decay=1.0, gain=0.5, v_reset=0.1)])
def test_in_place_potentials_are_rounded_as_the_equations_are(settings):
    neuron, x = LIF(**settings), current((4, 2000), torch.float32)
    expected, hm = [], torch.full_like(x[0], neuron.v_reset)
    for x_t in x:
        expected.append(neuron.charge(hm, x_t))
        hm = neuron.fire(expected[-1])[1]
    rows, room = list(torch.empty_like(x)), torch.empty_like(x[0])
    found = fused_lif.potentials_in_place(list(x), rows, room, neuron.surrogate, *neuron.numbers()[:4])
    for u, u_expected in zip(found, expected, strict=True):
        assert torch.equal(u, u_expected)


def test_rows_that_begin_aligned_need_no_current_gpu(monkeypatch):
    """torch refuses to hand out a tensor of another GPU than the current one; we have no use for that."""
    def refused(self, **_):
        raise BufferError("Can't export tensors on a different CUDA device index")
    monkeypatch.setattr(torch.Tensor, "__dlpack__", refused)
    x = torch.arange(96.0).view(3, 2, 16)
    rows = fused_lif.rows_of(x)
    assert [row.storage_offset() for row in rows] == [0, 0, 0] and torch.equal(torch.stack(rows), x)
    rows[1][0, 0] = -1.0
    assert x[1, 0, 0] == -1


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("shape", [(4, 3, 7), (4, 3, 8, 5, 6), (1, 1, 1, 1, 1)])
def test_other_shapes_and_strides(shape, way):
    fused.WORTH_COMPILING = WAYS[way]
    same(LIF(), current(shape))
    same(LIF(), current(shape).transpose(0, 1).contiguous().transpose(0, 1))  # batch outermost, as frames arrive
    same(LIF(), current(shape[1:]).expand(shape))


@pytest.mark.parametrize("neuron", [LIF(), STAALIF(4, 3).double()])
def test_the_layout_stays(neuron):
    for channels_last in (True, False):
        x = current((3, 2, 4, 5, 6), channels_last=channels_last)
        assert neuron(x).stride() == x.stride()


@pytest.mark.parametrize("way", WAYS)
def test_slices_meet_without_a_seam(way, monkeypatch):
    monkeypatch.setattr(fused_lif, "SLICE", 7)
    fused.WORTH_COMPILING = WAYS[way]
    same(LIF(v_reset=-0.1), current((3, 5, 4, 3, 3)))


def test_the_edge_of_the_rectangle_belongs_to_it():
    """U = 1/2, 3/2 on the edge and just outside it, with V_th = a = 1."""
    x = torch.tensor([[0.5, 1.5, 0.5 - 2 ** -24, 1.5 + 2 ** -23]])
    for way in WAYS.values():
        fused.WORTH_COMPILING = way
        _, dx, _ = outcome(LIF(), x, True)
        assert (dx != 0).tolist() == [[True, True, False, False]]


@few
@given(st.floats(-3, 3), st.floats(1e-3, 4), st.sampled_from([torch.float32, torch.float64]))
def test_the_edges_are_where_rounding_puts_them(v_th, a, dtype):
    for edge in fused_lif.rectangle_edges(v_th, a, dtype):
        edge = torch.tensor(edge, dtype=dtype)
        for u in (edge, torch.nextafter(edge, torch.tensor(v_th, dtype=dtype))):
            low, high = fused_lif.rectangle_edges(v_th, a, dtype)
            assert bool((u - v_th).abs() <= a / 2) == (low < u.item() < high) == (u != edge).item()


def saved_bytes(neuron, x) -> int:
    """Bytes kept for the backward pass, beyond the current itself."""
    kept = {}
    x = x.clone().requires_grad_()

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        neuron(x)
    kept.pop(x.untyped_storage().data_ptr(), None)
    return sum(kept.values())


@pytest.mark.parametrize("compiler", [True, False])
@pytest.mark.parametrize("channels_last", [True, False])
def test_of_a_large_current_nothing_else_is_kept(channels_last, compiler, monkeypatch):
    if compiler and not (fused.compiler("cpu") and fused_staa_cpu.available(True)):
        pytest.skip("no compiler")
    fused.WORTH_COMPILING = 0
    monkeypatch.setattr(fused, "compiler", lambda device: compiler)
    monkeypatch.setattr(fused_staa_cpu, "available", lambda matters: compiler)
    x = current((4, 2, 16, 8, 8), torch.float32, channels_last)
    assert saved_bytes(LIF(), x) == saved_bytes(STAttenLIF(), x) == 0
    assert saved_bytes(FSTALIF(16, 4, temporal=False, spatial=False), x) == 0
    for neuron in (STAALIF(16, 4), OwnSTAALIF(16, 4)):
        assert saved_bytes(neuron, x) <= sum(p.nbytes for p in neuron.parameters())


@pytest.mark.parametrize("channels_last", [True, False])
def test_of_what_is_compiled_as_a_whole_nothing_else_is_kept(channels_last, as_on_a_gpu):
    neuron = OwnSTAALIF(16, 4)
    kept = saved_bytes(neuron, current((4, 2, 16, 8, 8), torch.float32, channels_last))
    assert kept <= sum(p.nbytes for p in neuron.parameters())


@pytest.mark.parametrize("channels_last", [True, False])
def test_of_a_small_current_the_potential_is_kept(channels_last, monkeypatch):
    """As large as the current; and of the aggregator what is smaller by far. But not in C."""
    x = current((4, 2, 16, 16, 16), torch.float32, channels_last)
    if fused_staa_cpu.available(False):
        assert saved_bytes(STAALIF(16, 4), x) < 0.25 * x.nbytes
    monkeypatch.setattr(fused_staa_cpu, "available", lambda matters: False)
    assert x.nbytes <= saved_bytes(STAALIF(16, 4), x) <= 1.25 * x.nbytes


@pytest.mark.parametrize("channels_last", [True, False])
def test_without_a_compiler_a_large_current_is_computed_anew(channels_last, monkeypatch):
    fused.WORTH_COMPILING = 0
    monkeypatch.setattr(fused, "compiler", lambda device: False)
    monkeypatch.setattr(fused_staa_cpu, "available", lambda matters: False)
    for blocks in ({}, dict(sa=False), dict(gc=False, pe_place="both", beta=0.5)):
        same(shaken(STAALIF(5, 3, **blocks).double()), current((3, 2, 5, 4, 3), channels_last=channels_last))


def test_compiled_in_one_graph(inductor):
    """No graph break, and one kernel for all time steps of the plain neuron."""
    from torch._inductor import metrics

    x, out = torch.randn(4, 64), torch.empty(4, 64).unbind()
    numbers = fused.constants((0.25, 1.0, 1.0, 0.0, 1.0), torch.float32, x.device)
    plain = {f"{way}, {usual}": (function, (*tensors, numbers, usual, surrogate))
             for usual, surrogate in ((True, RECTANGLE), (False, RECTANGLE), (False, SIGMOID))
             for way, function, tensors in (("forward", fused_lif._lif, (x, out)),
                                            ("backward", fused_lif._lif_backward, (x, x, out)))}
    for name, (function, arguments) in plain.items():
        torch._dynamo.reset()
        metrics.reset()
        explained = torch._dynamo.explain(function.__wrapped__)(*arguments)
        assert explained.graph_break_count == 0, name
        function(*arguments)
        assert metrics.generated_kernel_count == 1, name


def test_compiled_once_for_all_shapes(inductor):
    """Forward and backward. A process that compiled for each shape would stop compiling at the eighth. Of the second
    shape, several sizes agree."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for T, B, C, H, W in ((4, 2, 8, 6, 5), (4, 4, 16, 4, 4), (4, 5, 24, 9, 13), (4, 2, 12, 10, 3)):
        x = current((T, B, C, H, W), torch.float32, channels_last=True)
        LIF()(x.clone().requires_grad_()).sum().backward()
        LIF()(x.clone().requires_grad_()).backward(x)  # in another layout than that of a sum
    assert 0 < torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2


def test_an_equation_changed_in_its_class_takes_the_reference(monkeypatch):
    """As an ablation is often made."""
    neuron, x = STAALIF(4, 2, beta=0.0), torch.full((2, 1, 4, 3, 3), 0.6)
    assert neuron.is_plain() and not neuron(x)[0].any()
    for block, name in ((staa.StepAttention, "forward"), (staa.GlobalContext, "forward"), (STAALIF, "attend"),
                        (LIF, "charge"), (LIF, "fire")):
        with monkeypatch.context() as patch:
            patch.setattr(block, name, lambda *_: None)
            assert not neuron.is_plain(), name
    monkeypatch.setattr(LIF, "charge", lambda self, hm, x: hm + 2 * x)
    assert LIF()(x).all()


def test_a_surrogate_that_fires_otherwise_takes_the_reference():
    class SoftReset(Surrogate):
        def fire(self, u, v_th, v_reset, *settings):
            s = self(u - v_th, *settings)
            return s, u - v_th * s

    class Soft(LIF):
        surrogate = SoftReset(RECTANGLE.gradient)
    x = torch.tensor([[1.75], [0.85]])  # U[1] = 0.25 * 0.75 + 0.85 = 1.0375
    assert Soft()(x).tolist() == [[1], [1]] and LIF()(x).tolist() == [[1], [0]]


def test_a_changed_equation_takes_the_reference():
    """A subclass with its own charge, a learned decay, and a block that somebody listens to are computed as written."""
    class Adding(LIF):
        def charge(self, hm, x):
            return hm + x

    x = torch.full((2, 1), 0.6)
    assert Adding()(x).tolist() == [[0.0], [1.0]]

    learned = LIF()
    learned.decay = torch.nn.Parameter(torch.tensor(0.25))
    learned(torch.full((2, 1), 0.9)).sum().backward()
    assert learned.decay.grad is not None

    learned = STAALIF(4, 2)
    learned.sa.alpha = torch.nn.Parameter(torch.tensor(2.0))
    learned(torch.randn(2, 1, 4, 3, 3)).sum().backward()
    assert learned.sa.alpha.grad is not None

    changed = LIF()
    changed.charge = lambda hm, x: hm + x
    assert changed(torch.full((2, 1), 0.6)).tolist() == [[0.0], [1.0]]
    changed = STAALIF(4, 2)
    assert changed.is_plain()
    changed.gc.norm.eps = 1e-3
    assert not changed.is_plain()

    neuron, calls = STAALIF(4, 2), []
    neuron.sa.register_forward_hook(lambda *_: calls.append("forward"))
    neuron(torch.randn(2, 1, 4, 3, 3))
    neuron = STAALIF(4, 2)
    neuron.gc.query.register_full_backward_hook(lambda *_: calls.append("backward"))
    neuron(torch.randn(2, 1, 4, 3, 3)).sum().backward()
    neuron = STAALIF(4, 2)
    neuron.gc.query.register_full_backward_pre_hook(lambda *_: calls.append("before"))
    neuron(torch.randn(2, 1, 4, 3, 3)).sum().backward()
    assert set(calls) == {"forward", "backward", "before"}

    class Mixed(STAALIF):
        def mix(self, hm, x):
            return 2 * x

    class Attending(STAALIF):
        def attend(self, x):
            return 2 * x

    quiet, loud = torch.full((2, 1, 4, 3, 3), 0.4), torch.full((2, 1, 4, 3, 3), 0.6)
    for made in (Mixed(4, 2).eval(), Attending(4, 2).eval()):
        assert not made(quiet)[0].any() and made(loud).all(), "twice the current"

    class Twice(torch.nn.Conv2d):
        def forward(self, x):
            return 2 * super().forward(x)

    neuron = STAALIF(4, 2).eval()
    x = torch.randn(2, 1, 4, 3, 3)
    shaken(neuron)
    other = STAALIF(4, 2).eval()
    other.sa.excite = Twice(1, 4, 1)
    other.load_state_dict(neuron.state_dict())
    assert not other.is_plain() and neuron.is_plain()
    with torch.no_grad():
        neuron.sa.excite.weight *= 2
        neuron.sa.excite.bias *= 2
    assert torch.equal(neuron(x), other(x))


@pytest.mark.parametrize("neuron", [LIF(), STAALIF(4, 3), STAALIF(4, 3, sa=False, pe_place="output")])
def test_inside_the_readers_own_compiled_network_there_is_no_break(neuron):
    """And there is no X~ either: GC's and SA's convolutions, which make it, are not called."""
    graphs, fused.WORTH_COMPILING = [], WAYS["compiled"]
    neuron, x = shaken(neuron).double().eval(), current((3, 2, 4, 5, 6), channels_last=True)
    compiled = torch.compile(neuron, backend=lambda graph, _: graphs.append(graph.code) or graph, fullgraph=True)
    (s, dx, dp), (s2, dx2, dp2) = outcome(neuron, x, False), outcome(compiled, x, True)
    assert torch.equal(s, s2) and s.any()
    torch.testing.assert_close([dx, *dp.values()], [dx2, *dp2.values()])
    assert len(graphs) == 1 and "conv2d" not in graphs[0]


def test_there_tsrd_draws_without_a_break():
    neuron, x = shaken(STAALIF(4, 3, beta=0.5)).train(), current((3, 2, 4, 5, 6), torch.float32)
    compiled = torch.compile(neuron, backend="eager", fullgraph=True)
    seen = set()
    for seed in range(8):
        torch.manual_seed(seed)
        spikes = neuron(x)
        torch.manual_seed(seed)
        assert torch.equal(compiled(x), spikes)
        seen.add(spikes.sum().item())
    assert len(seen) > 2, "the draws differ"


@pytest.mark.parametrize("word, on", [("0", False), ("false", False), ("Off", False), ("NO", False), ("1", True), ("yes", True)])
def test_the_environments_switch(monkeypatch, word, on):
    monkeypatch.setenv("STAA_FUSED", word)
    assert runpy.run_module("staa.fused")["enabled"] is on


def test_the_switch(monkeypatch):
    called = []
    monkeypatch.setattr(fused_lif, "lif", lambda *a: called.append("lif"))
    monkeypatch.setattr(fused_staa, "staa", lambda *a: called.append("staa"))
    fused.enabled = False
    LIF()(torch.zeros(2, 1))
    STAALIF(4, 2)(torch.zeros(2, 1, 4, 3, 3))
    assert called == []
    fused.enabled = True
    LIF()(torch.zeros(2, 1))
    STAALIF(4, 2)(torch.zeros(2, 1, 4, 3, 3))
    assert called == ["lif", "staa"]


def test_with_more_channels_less_is_worth_compiling(as_on_a_gpu, monkeypatch):
    called = []
    monkeypatch.setattr(fused_staa._Compiled, "apply", lambda x, *_: called.append(x.shape) or x)
    fused.WORTH_COMPILING = 2 * 4 * 128 * 2 * 2 * 2
    OwnSTAALIF(128, 4)(current((4, 2, 128, 2, 2)))
    OwnSTAALIF(64, 4)(current((4, 2, 64, 2, 4)))
    OwnSTAALIF(8, 4)(current((4, 2, 8, 8, 16)))
    assert called == [(4, 2, 128, 4), (4, 2, 8, 128)] and fused.is_large(torch.empty(fused.WORTH_COMPILING))


@pytest.mark.parametrize("neuron", [LIF(), OwnSTAALIF(4, 3)])
def test_on_a_cpu_only_what_is_differentiated_is_compiled(neuron, monkeypatch):
    asked, x = [], current((3, 2, 4, 5, 6), torch.float32)
    monkeypatch.setattr(fused, "compiler", lambda device: bool(asked.append(device)))
    fused.WORTH_COMPILING = WAYS["compiled"]
    with torch.no_grad():
        neuron(x)
    neuron.requires_grad_(False)(x)
    assert asked == []
    neuron(x.clone().requires_grad_())
    neuron.requires_grad_()(x)
    assert len(asked) == (type(neuron) is LIF), "STAA takes a minute to compile"
    monkeypatch.setattr(fused, "on_gpu", lambda x: True)
    monkeypatch.setattr(fused, "triton_works", lambda device: False)
    before = len(asked)
    with torch.no_grad():
        neuron(x)
    assert len(asked) > before


def test_in_c_is_computed_what_is_large_with_a_gradient_or_without(monkeypatch, in_c):
    """At its first call nothing waits for torch.compile, and it is large much sooner."""
    called, neuron, x = [], STAALIF(4, 3), current((3, 2, 4, 5, 6), torch.float32)
    call = fused_staa_cpu.call
    monkeypatch.setattr(fused_staa_cpu, "call", lambda name, *rest: called.append(name) or call(name, *rest))
    monkeypatch.setattr(torch, "compile", None)
    for size, names in ((x.numel(), ["staa"]), (x.numel() + 1, [])):
        fused.WORTH_COMPILING = 512 * size
        with torch.no_grad():
            neuron(x)
        assert called == names
        s = neuron(x.clone().requires_grad_())
        assert called == 2 * names
        s.sum().backward()
        assert len(called) > 2 * len(names) or not names
        called.clear()


def test_what_torch_will_not_compile_is_computed_all_the_same():
    """As under a dispatch mode, and beyond torch's limit of recompilations."""
    fused.WORTH_COMPILING = WAYS["compiled"]
    with torch.compiler.set_stance("force_eager"):
        same(LIF(), current((3, 2, 4, 5, 6), channels_last=True))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("neuron", [LIF(), FSTALIF(4, 3, temporal=False, spatial=False), STAALIF(4, 3).double()])
@pytest.mark.parametrize("channels_last", [True, False])
def test_spikes_may_be_changed_in_place(neuron, way, channels_last):
    """As a ReLU's output may, by a shortcut or dropout; and so may the neuron's input, where its gradient is not asked."""
    fused.WORTH_COMPILING = WAYS[way]
    dtype = next((p.dtype for p in neuron.parameters()), torch.float32)
    x = current((3, 2, 4, 5, 6), dtype, channels_last).requires_grad_()
    changed = neuron(x)
    changed += x
    changed.sum().backward()
    dx, x.grad = x.grad, None
    (neuron(x) + x).sum().backward()
    assert torch.equal(dx, x.grad)
    y = 1 * x
    spikes = neuron(y)
    y.zero_()
    y.sum().backward()
    assert torch.equal(spikes, neuron(x))


def test_torchs_settings_hold_in_every_thread(inductor):
    """A thread of its own, as a GPU's backward pass has, stops compiling no sooner."""
    LIF()(current((2, 3)).requires_grad_())
    seen = []

    def work():
        LIF()(current((2, 3)).requires_grad_())
        seen.append((torch._dynamo.config.recompile_limit, torch.fx.experimental._config.use_duck_shape))
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(64, False)]


@pytest.mark.parametrize("neuron", [LIF(), STAALIF(3, 2, beta=0.0)])
def test_batched_gradients_are_refused_in_one_sentence(neuron):
    x = current((2, 2, 3, 4, 4), torch.float32)
    with pytest.raises(RuntimeError, match="^batched gradients need the reference: set staa.fused.enabled = False"):
        torch.autograd.functional.jacobian(lambda v: neuron(v).sum((1, 2)), x, vectorize=True)
    fused.enabled = False
    assert torch.autograd.functional.jacobian(lambda v: neuron(v).sum((1, 2)), x, vectorize=True).any()


@pytest.mark.parametrize("fast", [True, False])
def test_where_all_steps_are_dropped_the_blocks_gradients_are_zero(fast):
    """And not None, of which an optimizer makes something else."""
    fused.enabled = fast
    neuron = shaken(STAALIF(4, 1, beta=1.0))
    neuron(current((1, 2, 4, 3, 3), torch.float32)).sum().backward()
    assert all(not p.grad.any() for p in neuron.parameters())


def test_without_a_compiler(monkeypatch):
    """Where compiling fails there is one warning, and the same spikes."""
    def broken(*_, **__):
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(torch, "compile", broken)
    fused.compiler.cache_clear()
    fused.WORTH_COMPILING = 0
    x = current((2, 3, 4))
    with pytest.warns(UserWarning, match="no C.. compiler.*without it"):
        same(LIF(), x)
    same(LIF(), x)
    fused.compiler.cache_clear()


@pytest.mark.skipif(sys.platform != "linux" or os.environ.keys() & {"CC", "CXX"} or not (which("cc") and which("g++")),
                    reason="no compiler, or another than Linux's own")
def test_where_there_are_compilers_they_work():
    """Or the tests of what they compile would be left out."""
    assert fused_staa_cpu.available(True) and fused.compiler("cpu")


def test_without_a_c_compiler(monkeypatch):
    """Nothing waits for torch.compile then, either; and nobody is warned who would gain little."""
    monkeypatch.setattr(torch, "compile", None)
    caches = fused_staa_cpu.available, fused_staa_cpu.library
    for cc, why in (("no-such-compiler", "No such file or directory: 'no-such-compiler'"), ("false", "non-zero exit")):
        monkeypatch.setenv("CC", cc)
        for cache in caches:
            cache.cache_clear()
        x = current((2, 2, 3, 4, 5))
        fused.WORTH_COMPILING = 64 * x.numel()
        with warnings.catch_warnings(action="error"):
            same(shaken(STAALIF(3, 2).double()), x)
        fused.WORTH_COMPILING = 0
        with warnings.catch_warnings(action="error"), torch.no_grad():
            STAALIF(3, 2)(x.float())
        with pytest.warns(UserWarning, match=f"the C compiler does not work here .*{why}.*without it"):
            same(shaken(STAALIF(3, 2).double()), x)
        same(shaken(STAALIF(3, 2).double()), x)
    for cache in caches:
        cache.cache_clear()


def test_twice_backward_through_one_graph():
    """backward(retain_graph=True) may be called again, though the gradient is added to in place."""
    neuron, x = shaken(STAALIF(4, 2, beta=0.0).double()), current((2, 1, 4, 3, 3)).requires_grad_()
    s = neuron(x)
    first, = torch.autograd.grad(s.sum(), x, retain_graph=True)
    second, = torch.autograd.grad(s.sum(), x)
    assert torch.equal(first, second)


def test_a_network_learns_alike():
    """Five SGD steps of a whole network, with and without: the same loss to float tolerance, in double precision."""
    losses = []
    for fast in (False, True):
        fused.enabled = fast
        torch.manual_seed(0)
        network = staa.build("resnet20", "staa", T=2, width=1 / 16).double()
        optimizer = torch.optim.SGD(network.parameters(), 0.02)
        x, y = torch.randn(4, 3, 16, 16, dtype=torch.float64), torch.arange(4)
        for _ in range(5):
            loss = torch.nn.functional.cross_entropy(network(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)
