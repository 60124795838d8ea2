"""The fast path on a GPU, where there is none: its Triton kernels, run by Triton's interpreter, against the equations."""

import copy
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from torch import nn

import staa
from staa import fused, fused_lif, fused_staa, norm
from staa.attention import STAALIF
from staa.fsta import FSTALIF
from staa.neuron import LIF
from staa.norm import BatchNorm2d
from staa.pooling import AvgPool2d
from staa.statten import STAttenLIF
from staa.surrogate import RECTANGLE, Surrogate
from staa.variants import LeakySTAALIF

pytest.importorskip("triton", reason="Triton is not there, as on a Mac")
import gpu  # noqa: E402
from h200 import BY_HAND  # noqa: E402

from staa import fused_lif_gpu  # noqa: E402

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, which does not run in an interpreter")


@pytest.fixture(autouse=True)
def on_gpu(monkeypatch):
    """Neurons are compiled for the GPU of gpu.py, whatever their size; gpu.launched are those of the test."""
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **settings: compile(function, backend=gpu.backend, **settings))
    monkeypatch.setattr(fused, "WORTH_COMPILING", 0)
    monkeypatch.setattr(norm, "LARGE", 0)
    for works in ("compiler", "triton_works"):
        monkeypatch.setattr(fused, works, lambda device: True)
    monkeypatch.setattr(fused, "on_gpu", lambda x: True)
    for module, names in ((fused_lif, ("_lif", "_lif_backward")), (fused_staa, ("_forward", "_backward"))):
        for name in names:
            monkeypatch.setattr(module, name, fused.lazy_compile(getattr(module, name).__wrapped__))
    torch._dynamo.reset()
    gpu.launched.clear()
    yield
    torch._dynamo.reset()


def current(*shape, dtype=torch.float32, channels_last=True):
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return 2 * torch.randn(shape[0] * shape[1], *shape[2:]).to(dtype, memory_format=layout).unflatten(0, shape[:2])


def both(neuron, x, gradient) -> list[torch.Tensor]:
    """Spikes, and the gradients of the current and the parameters."""
    torch.manual_seed(0)  # of TSRD
    x = x.detach().requires_grad_()
    s = neuron(x)
    return [s.detach(), *torch.autograd.grad(s, [x, *neuron.parameters()], gradient)]


def same(neuron, x, monkeypatch):
    """Spikes equal, gradients within 1e-5, of a bfloat16 current within its rounding."""
    gradient = torch.randn_like(x)
    s, *gradients = both(neuron, x, gradient)
    assert gpu.launched
    with monkeypatch.context() as patch:
        patch.setattr(fused, "enabled", False)
        true, *expected = both(neuron, x, gradient)
    assert torch.equal(s, true) and 0.01 < s.float().mean() < 0.9
    for a, b in zip(gradients, expected):
        bound = 1e-5 if a.dtype == torch.float32 else 1e-2
        assert (a - b).abs().max() <= bound * max(b.abs().max(), 0.1)  # some are 0 but for rounding


class CompiledLIF(LIF):
    """Which is not written by hand, since its surrogate is its own."""

    surrogate = Surrogate(RECTANGLE.gradient)


@pytest.mark.parametrize("neuron", [CompiledLIF(), CompiledLIF(decay=0.4, gain=0.6, v_reset=-0.2), STAttenLIF(),
                                    FSTALIF(8, 4, temporal=False, spatial=False)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_kernel_each_way_that_loads_sixteen_bytes_at_once(neuron, dtype, monkeypatch):
    """Which Triton does, by its own rule, where it knows addresses and the number of elements to be multiples of 16."""
    same(neuron, current(4, 2, 8, 4, 4, dtype=dtype), monkeypatch)
    assert len(gpu.launched) == 2
    for kernel in gpu.launched:
        assert kernel.sixteens() == {name for name in kernel.arguments if "ptr" in name or name == "xnumel"}


def test_of_an_odd_number_of_elements(monkeypatch):
    same(CompiledLIF(), current(3, 1, 5, 3, 3), monkeypatch)
    assert len(gpu.launched) == 2


class Compiled(STAALIF):
    surrogate = CompiledLIF.surrogate


def moved(neuron):
    """Its parameters off their starting values, where some parts do nothing."""
    with torch.no_grad():
        for p in neuron.parameters():
            p += 0.3 * torch.randn_like(p)
    return neuron


@pytest.mark.parametrize("channels_last, dtype", [(True, torch.float32), (True, torch.bfloat16), (False, torch.float32)])
def test_staa(channels_last, dtype, monkeypatch):
    """Of what goes over a whole time step, the number of elements is known to be a multiple of 16, as above."""
    neuron = moved(Compiled(16, 3, beta=0.3, pe_place="both"))
    same(neuron, current(3, 2, 16, 4, 4, dtype=dtype, channels_last=channels_last), monkeypatch)
    large = [kernel for kernel in gpu.launched if kernel.elements >= 2 * 16 * 4 * 4]
    assert len(large) > 10 and all("xnumel" in kernel.sixteens() for kernel in large)
    assert len(gpu.launched) <= 55


@pytest.fixture
def launches(monkeypatch):
    """The hand-written kernels that are launched; none of the compiler's are."""
    seen = []
    for module, name in ((module, name) for module, names in BY_HAND.items() for name in names):
        def launcher(grid, kernel=getattr(module, name), name=name):
            seen.append(name)
            return kernel[grid]
        monkeypatch.setattr(module, name, type(name, (), {"__getitem__": lambda _, grid, f=launcher: f(grid)})())
    yield seen
    assert not gpu.launched


@pytest.mark.parametrize("settings", [{}, dict(decay=0.4, gain=0.6, v_reset=-0.2, v_th=0.8, a=0.7), dict(decay=1, a=2)])
@pytest.mark.parametrize("shape, dtype, channels_last", [
    ((1, 2, 3, 4, 4), torch.float32, True), ((4, 2, 8, 4, 4), torch.bfloat16, True), ((4, 2, 8, 4, 4), torch.float16, False),
    ((16, 3, 5, 3, 7), torch.float32, True), ((9, 40, 5, 3, 7), torch.bfloat16, False), ((32, 1, 1, 1, 1), None, False)])
def test_lif_by_hand(shape, dtype, channels_last, settings, launches, monkeypatch):
    """With as many steps' potentials held at once as ever, 16 or in two bytes 8, and with four."""
    x = current(*shape, dtype=dtype or torch.float32, channels_last=channels_last)
    for held in (64, 16 if x.element_size() == 4 else 32):
        monkeypatch.setattr(fused_lif_gpu, "POTENTIALS", held)
        launches.clear()
        by_hand(LIF(**settings), x, launches, monkeypatch, ["lif", "lif_backward"])


def test_for_many_steps_lif_is_compiled(monkeypatch):
    """The kernels by hand know each step, and compiling them takes the longer the more there are."""
    monkeypatch.setattr(fused_lif, "LONGEST", 3)
    same(LIF(), current(4, 2, 8, 4, 4), monkeypatch)
    assert len(gpu.launched) == 2


def test_lif_by_hand_at_the_threshold(launches, monkeypatch):
    """Potentials that lie on the threshold, eq. 2, and on the edges of the rectangle, eq. 5."""
    by_hand(LIF(decay=0.5), torch.randint(-3, 4, (6, 2, 16, 4, 4)) / 2, launches, monkeypatch, ["lif", "lif_backward"])


def test_lif_by_hand_of_two_steps(launches):
    """U[0] = 0.8, U[1] = 0.4 + 0.8 = 1.2: a spike. dS/dU = 1 at both; dHm[0] = 0.5 dU[1], and
    dU[0] = dHm[0] (V_reset - U[0]) + dHm[0], eqs. 2, 3 and 5."""
    x = torch.tensor([[0.8], [0.8]]).requires_grad_()
    s = LIF(decay=0.5)(x)
    assert s.flatten().tolist() == [0, 1]
    s[1].sum().backward()
    assert x.grad.flatten().tolist() == pytest.approx([0.1, 1]) and launches == ["lif", "lif_backward"]


def test_lif_by_hand_keeps_the_current_alone(launches):
    x, kept = current(4, 2, 8, 4, 4).requires_grad_(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor), lambda _: None):
        LIF()(x)
    assert launches == ["lif"] and len(kept) == 1 and kept[0] is x


@pytest.mark.parametrize("shape, K", [((3, 5, 4, 6), 2), ((2, 70, 9, 3), 3), ((1, 1, 2, 2), 2), ((5, 64, 8, 8), 4),
                                      ((3, 16, 4, 4), 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_average_pooling_by_hand(shape, K, dtype, launches):
    """Against torch's own of the same numbers in double precision, and, of spikes, its very numbers."""
    x = torch.randn(shape).to(dtype, memory_format=torch.channels_last).requires_grad_()
    y = AvgPool2d(K)(x)
    gradient = torch.randn(y.shape).to(dtype)  # in another layout
    dx, = torch.autograd.grad(y, x, gradient)
    z = x.detach().double().requires_grad_()
    true = nn.AvgPool2d(K)(z)
    expected, = torch.autograd.grad(true, z, gradient.double())
    assert launches == ["pool", "pool_backward"] and y.dtype == dx.dtype == dtype
    assert y.is_contiguous(memory_format=torch.channels_last) and dx.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, true.to(dtype))
    torch.testing.assert_close(dx, expected.to(dtype))
    if dtype == torch.float32 or K != 3:  # of a third the interpreter cuts off what bf16 would round
        spikes = (x > 0).to(dtype)
        assert torch.equal(AvgPool2d(K)(spikes), nn.AvgPool2d(K)(spikes))


def test_average_pooling_by_hand_is_differentiated_as_often_as_wanted(launches):
    x = torch.randn(2, 5, 4, 6, dtype=torch.float32).contiguous(memory_format=torch.channels_last).requires_grad_()
    y = AvgPool2d(2)(x).square().sum()  # its second derivative along v: the mean's transpose of 2 mean(v)
    dx, = torch.autograd.grad(y, x, create_graph=True)
    v = torch.randn_like(x)
    ddx, = torch.autograd.grad((dx * v).sum(), x)
    expected = nn.functional.interpolate(2 * nn.functional.avg_pool2d(v, 2) / 4, scale_factor=2)
    torch.testing.assert_close(ddx, expected)
    assert launches.count("pool") == 2 and launches.count("pool_backward") == 2


@pytest.mark.parametrize("pool, x", [
    (AvgPool2d(2), torch.randn(2, 8, 5, 4)), (AvgPool2d(2), torch.randn(2, 8, 4, 5)),
    (AvgPool2d(2, stride=1), torch.randn(2, 8, 4, 4)), (AvgPool2d(2, padding=1), torch.randn(2, 8, 4, 4)),
    (AvgPool2d((2, 2)), torch.randn(2, 8, 4, 4)), (AvgPool2d(2, divisor_override=3), torch.randn(2, 8, 4, 4)),
    (AvgPool2d(2), torch.randn(2, 8, 4, 4).double()), (AvgPool2d(2), torch.randn(8, 4, 4)),
    (AvgPool2d(2, ceil_mode=True), torch.randn(2, 8, 5, 5))])
def test_other_pooling_is_torchs(pool, x, launches):
    x = x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x
    assert torch.equal(pool(x), nn.AvgPool2d.forward(pool, x)) and not launches
    AvgPool2d(2)(torch.randn(2, 8, 4, 4))  # of rows, not channels-last
    assert not launches


NORM = ["moments", "statistics", "normalise"], ["gradient_moments", "parameter_gradients", "normalise_backward"]


@pytest.mark.parametrize("shape, programs", [((3, 5, 4, 6), 2), ((7, 70, 9, 3), 1024), ((2, 1, 1, 1), 3), ((40, 64, 8, 8), 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("centre", [0, 1000])
def test_bn_by_hand(centre, shape, programs, dtype, launches, monkeypatch):
    """Against torch's own in double precision, of the same numbers, which may lie far from 0; twice, for the running
    statistics."""
    monkeypatch.setattr(norm, "PROGRAMS", programs)
    C = shape[1]
    layer, true = BatchNorm2d(C, eps=0.1, momentum=0.3), nn.BatchNorm2d(C, eps=0.1, momentum=0.3).double()
    with torch.no_grad():
        for p, q in zip(layer.parameters(), true.parameters()):
            p += 0.3 * torch.randn_like(p)
            q.copy_(p)
    for _ in range(2):
        x = (2 * torch.randn(shape) + centre).to(dtype, memory_format=torch.channels_last).requires_grad_()
        y, z = layer(x), x.detach().double().requires_grad_()
        gradient = torch.randn(shape).to(dtype)  # in another layout
        found = torch.autograd.grad(y, [x, *layer.parameters()], gradient)
        expected = torch.autograd.grad(true(z), [z, *true.parameters()], gradient.double())
        assert y.dtype == dtype and y.is_contiguous(memory_format=torch.channels_last)
    assert launches == 2 * (NORM[0] + NORM[1])
    bound = dict(rtol=1e-2, atol=2e-2) if dtype == torch.bfloat16 else dict(rtol=1e-4, atol=1e-3 if centre else 1e-5)
    torch.testing.assert_close(y, nn.functional.batch_norm(z, None, None, true.weight, true.bias, True, eps=0.1).to(dtype),
                               **bound)
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b.to(a.dtype), **bound)
    for a, b in zip(layer.buffers(), true.buffers()):
        torch.testing.assert_close(a, b.to(a.dtype), rtol=1e-5, atol=1e-5)


def test_a_network_takes_the_kernels_by_hand(launches, monkeypatch):
    """Nothing is left to the compiler; its loss and gradients are those of the equations."""
    net = staa.build("resnet20", "lif", T=2, width=1 / 16).to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 16, 16).contiguous(memory_format=torch.channels_last)

    def gradients():
        net.zero_grad()
        loss = net(x).square().mean()
        loss.backward()
        return [loss.detach(), *(p.grad.clone() for p in net.parameters())]
    found = gradients()
    assert {name: launches.count(name) for name in launches} == dict(
        lif=19, lif_backward=19, pool=4, pool_backward=4, **dict.fromkeys(NORM[0] + NORM[1], 22))
    monkeypatch.setattr(fused, "enabled", False)
    for a, b in zip(found, gradients(), strict=True):
        assert (a - b).norm() <= 1e-4 * b.norm() + 1e-5


def cut(monkeypatch):
    """Four programs and more share a map, each of which goes through two tiles and more; so do those of GC. SA's hidden
    units and the images of a sum come in several blocks, and from three time steps on the steps before are a loop."""
    from staa import fused_staa_gpu

    for name, elements in {"WHOLE": 16, "PART": 64, "TILE": 32, "IMAGE_TILE": 64, "WEIGHTS": 32, "IMAGES": 32,
                           "UNROLLED": 2}.items():
        monkeypatch.setattr(fused_staa_gpu, name, elements)
    monkeypatch.setattr(fused_staa_gpu, "launch_sizes", fused_staa_gpu.launch_sizes.__wrapped__)  # nothing remembered


def take_several(monkeypatch):
    """A program takes several samples, of whatever size."""
    from staa import fused_staa_gpu

    for name, number in {"MANY": 1, "SEVERAL": 2, "PROGRAMS": 1}.items():
        monkeypatch.setattr(fused_staa_gpu, name, number)
    monkeypatch.setattr(fused_staa_gpu, "launch_sizes", fused_staa_gpu.launch_sizes.__wrapped__)


#: How maps are given to programs, and the kernels of the time steps.
STEPS = ["steps", "steps_backward"]
WAYS = {"one": (lambda monkeypatch: None, STEPS), "share": (cut, STEPS),
        "several": (take_several, ["wide_steps", "wide_steps_backward"])}

SETTINGS = {
    "plain": {}, "TSRD, PE twice": dict(beta=0.5, pe_place="both"), "PE at the output": dict(pe_place="output", alpha=1.0),
    "v_reset": dict(v_reset=-0.2, v_th=0.8, a=0.7, pe_place="membrane", beta=0.5), "no PE": dict(pe=False),
    "no GC": dict(gc=False), "no SA": dict(sa=False, decay=0.4, gain=0.6, v_reset=-0.2), "SA": dict(gc=False, pe=False),
    "PE": dict(gc=False, sa=False, pe_place="both"), "r": dict(r=2), "fixed PE": dict(pe_kind="fixed")}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("way", WAYS)
def test_staa_by_hand(way, settings, launches, monkeypatch):
    take, kernels = WAYS[way]
    take(monkeypatch)
    by_hand(moved(STAALIF(12, 3, **settings)), current(3, 2, 12, 3, 5), launches, monkeypatch,
            kernels if settings.get("sa", True) else STEPS)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("make", [lambda: LeakySTAALIF(16, 3, beta=0.5, pe_place="both", v_reset=-0.2),
                                  lambda: LeakySTAALIF(16, 3, sa=False, pe_place="both")])
def test_leaky_staa_by_hand(make, way, launches, monkeypatch):
    take, kernels = WAYS[way]
    take(monkeypatch)
    neuron = moved(make())
    by_hand(neuron, current(3, 2, 16, 4, 4), launches, monkeypatch, STEPS if neuron.sa is None else kernels)


@pytest.mark.parametrize("shape, dtype, channels_last, way", [
    ((3, 2, 16, 4, 4), torch.bfloat16, True, "one"), ((3, 2, 16, 4, 4), torch.bfloat16, True, "share"),
    ((3, 2, 16, 4, 4), torch.float16, True, "one"), ((2, 9, 16, 4, 4), None, False, "share"), ((2, 2, 80, 2, 2), None, True, "one"),
    ((2, 2, 80, 2, 2), None, True, "share"), ((2, 65, 16, 1, 2), None, True, "one"), ((3, 5, 16, 4, 4), torch.bfloat16, True, "several"),
    ((2, 9, 80, 2, 2), None, False, "several"), ((2, 65, 16, 1, 2), None, True, "several"), ((1, 2, 16, 1, 1), None, True, "several")])
def test_staa_by_hand_of_other_currents(shape, dtype, channels_last, way, launches, monkeypatch):
    take, kernels = WAYS[way]
    take(monkeypatch)
    x = current(*shape, dtype=dtype or torch.float32, channels_last=channels_last)
    by_hand(moved(STAALIF(shape[2], shape[0])), x, launches, monkeypatch, kernels)


def test_staa_by_hand_of_one_number(launches):
    """With one position and one channel k is 1 and LN's output its bias, 0: X~ = X, and M = N = 1."""
    x = torch.tensor([0.7, 0.7]).view(2, 1, 1, 1, 1).requires_grad_()
    s = STAALIF(1, 2, beta=0.0)(x)
    assert s.flatten().tolist() == [0, 1] and launches == ["context", "query", "steps"]
    s.sum().backward()  # dS/dU = 1 at both. dHm[1] = 1, so dU[1] = 1 + dHm[1] (V_reset - U[1]) + dHm[1], eqs. 2 and 3
    assert x.grad.flatten().tolist() == pytest.approx([1.3, 1])


@pytest.mark.parametrize("way", WAYS)
def test_staa_by_hand_at_the_threshold(way, launches, monkeypatch):
    """Potentials that lie on the threshold, eq. 2, and on the edges of the rectangle, eq. 5."""
    take, kernels = WAYS[way]
    take(monkeypatch)
    x = torch.randint(-3, 4, (3, 2, 16, 4, 4)) / 2
    by_hand(STAALIF(16, 3, beta=0.0), x, launches, monkeypatch, kernels)


def test_when_a_program_takes_several_samples():
    """Where SA's weights are many and so are samples, and several maps fit into a program."""
    from staa.fused_staa_gpu import Neuron

    def several(B, C, size, **settings):
        neuron = STAALIF(C, 4, **settings)
        parameters = {name: p.detach().view(p.shape[:2]) for name, p in neuron.named_parameters()}
        return bool(Neuron(torch.empty(4, B, size ** 2, C), -2, None, (2.0, *neuron.numbers()), False, parameters).wide)
    assert several(512, 512, 2) and several(256, 256, 4) and several(300, 1000, 1)
    assert not several(255, 512, 2) and not several(512, 128, 4) and not several(512, 256, 5)
    assert not several(512, 512, 2, sa=False)


def test_a_softmax_that_would_overflow(launches, monkeypatch):
    """Scores of a few hundred, in several tiles: k is next to 1 at one position."""
    cut(monkeypatch)
    neuron = STAALIF(16, 2, beta=0.0)
    with torch.no_grad():
        neuron.gc.key.weight *= 300
        neuron.gc.value.weight.normal_(std=0.1)
    x, gradient = current(2, 2, 16, 4, 4), torch.randn(2, 2, 16, 4, 4)
    s, dx, *_ = both(neuron, x, gradient)
    monkeypatch.setattr(fused, "enabled", False)
    true, expected, *_ = both(neuron, x, gradient)
    assert launches and torch.equal(s, true) and (dx - expected).norm() < 1e-4 * expected.norm()


def test_weights_that_lie_otherwise_in_memory(launches, monkeypatch):
    neuron = moved(STAALIF(16, 3))
    for p in neuron.parameters():  # columns of a wider table, or turned round
        p.data = p.data.mT.contiguous().mT if p.dim() == 2 else torch.stack([p.data, p.data], -1)[..., 0]
        assert p.numel() == 1 or not p.is_contiguous()
    by_hand(neuron, current(3, 2, 16, 4, 4), launches, monkeypatch)


def test_a_dropped_step_does_not_see_what_overflows_in_the_aggregator(launches, monkeypatch):
    neuron, x = STAALIF(16, 3, beta=1.0), current(3, 2, 16, 4, 4)
    x[0, 0, 0, 0, 0] = 3e38
    s, *_ = both(neuron, x, torch.ones_like(x))
    monkeypatch.setattr(fused, "enabled", False)
    assert launches and torch.equal(s, neuron(x)) and s.mean() > 0.2


@pytest.mark.parametrize("neuron, x", [(STAALIF(16, 3).double(), current(3, 2, 16, 4, 4, dtype=torch.float64)),
                                       (STAALIF(1025, 1), current(1, 2, 1025, 1, 1)),
                                       (STAALIF(513, 1, r=1), current(1, 2, 513, 1, 1)),
                                       (Compiled(16, 3), current(3, 2, 16, 4, 4)),
                                       (STAALIF(16, 3), current(6, 2, 16, 4, 4)),
                                       (STAALIF(16, 3).to("meta"), current(3, 2, 16, 4, 4))])
def test_what_is_not_by_hand(neuron, x):
    surrogate = neuron.surrogate
    assert not fused_staa.is_by_hand(x, surrogate, {name: p for name, p in neuron.named_parameters()})
    assert fused_staa.is_by_hand(current(3, 2, 16, 4, 4), RECTANGLE, dict(STAALIF(16, 3).named_parameters()))


@pytest.mark.parametrize("bytes, channels, r, by_hand", [(65536, 16, 4, False), (101376, 16, 4, True), (101376, 512, 4, True),
                                                         (101376, 1024, 4, False), (101376, 512, 1, False), (232448, 1024, 4, True)])
def test_a_gpu_of_less_shared_memory_compiles(bytes, channels, r, by_hand, monkeypatch):
    monkeypatch.setattr(fused_staa, "shared_memory", lambda device: bytes)
    neuron = STAALIF(channels, 2, r=r)
    x = current(2, 1, channels, 1, 1)
    assert fused_staa.is_by_hand(x, RECTANGLE, dict(neuron.named_parameters())) == by_hand


def test_by_hand_keeps_the_current_and_some_numbers_of_each_image(launches):
    """5 C + C / r + 1 numbers of each, and besides the parameters SA's second weight once more, turned round."""
    neuron, kept = STAALIF(16, 3), {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor
    x = current(3, 2, 16, 8, 8)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        neuron(x.requires_grad_())
    weights = sum(p.nbytes for p in neuron.parameters()) + neuron.sa.excite.weight.nbytes
    assert launches and sum(kept.values()) - x.nbytes == weights + 4 * 6 * (5 * 16 + 4 + 1)


def test_by_hand_it_is_differentiated_once(launches):
    x = current(3, 2, 16, 4, 4).requires_grad_()
    s = STAALIF(16, 3)(x)
    s.sum().backward(retain_graph=True)  # of a gradient that is one number, expanded
    first = x.grad.clone()
    x.grad = None
    s.backward(torch.ones_like(s))
    assert torch.equal(x.grad, first)
    with pytest.raises(RuntimeError, match="second derivatives need the reference"):
        torch.autograd.grad(STAALIF(16, 3)(x).sum(), x, create_graph=True)[0].sum().backward()


@pytest.mark.parametrize("share, steps", [(False, 1), (True, 3)])
def test_how_many_kernels_staa_is_by_hand(share, steps, launches, monkeypatch):
    """Where maps are shared, each of the T = 3 steps is launched by itself, and what follows of the first one as well."""
    if share:
        cut(monkeypatch)
    neuron, x = STAALIF(12, 3, beta=0.0), current(3, 2, 12, 3, 5)
    both(neuron, x, torch.randn_like(x))
    assert launches == ["context", "query", *["steps"] * steps, *["steps_backward"] * (steps + share),
                        "query_backward", "context_backward", "weights", "over_batch"]


@pytest.mark.parametrize("value", [1e4, torch.inf, torch.nan])
def test_bn_by_hand_of_a_first_number_far_from_the_others(value, launches):
    x = torch.randn(64, 3, 8, 8)
    x[0, 1, 0, 0] = value
    layer, true = BatchNorm2d(3), nn.BatchNorm2d(3).double()
    y, expected = layer(x.contiguous(memory_format=torch.channels_last)), true(x.double())
    assert launches == NORM[0]
    torch.testing.assert_close(y, expected.float(), rtol=1e-4, atol=1e-5, equal_nan=True)
    torch.testing.assert_close(layer.running_var, true.running_var.float(), rtol=1e-4, atol=0, equal_nan=True)
    assert bool(layer.running_var.isfinite().all()) == (value == 1e4)


@pytest.mark.parametrize("layer, x", [
    (BatchNorm2d(8).eval(), torch.randn(2, 8, 4, 4)), (BatchNorm2d(8, affine=False), torch.randn(2, 8, 4, 4)),
    (BatchNorm2d(8, track_running_stats=False), torch.randn(2, 8, 4, 4)), (BatchNorm2d(8).double(), torch.randn(2, 8, 4, 4).double()),
    (BatchNorm2d(8, momentum=None), torch.randn(2, 8, 4, 4)), (BatchNorm2d(8).bfloat16(), torch.randn(2, 8, 4, 4).bfloat16())])
def test_other_bn_is_torchs(layer, x, launches):
    other = copy.deepcopy(layer)
    x = x.contiguous(memory_format=torch.channels_last)
    assert torch.equal(layer(x), nn.BatchNorm2d.forward(other, x)) and not launches
    BatchNorm2d(8)(torch.randn(2, 8, 4, 4))  # of rows, not channels-last
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        BatchNorm2d(8)(torch.randn(1, 8, 1, 1))
    assert not launches


def by_hand(neuron, x, launches, monkeypatch, kernels=("steps", "steps_backward")):
    """As `same`, without the compiler. The gradient of the key's bias is 0: softmax takes no notice of it."""
    gradient = torch.randn_like(x)
    s, *gradients = both(neuron, x, gradient)
    assert set(kernels) <= set(launches)
    with monkeypatch.context() as patch:
        patch.setattr(fused, "enabled", False)
        true, *expected = both(neuron, x, gradient)
    assert torch.equal(s, true) and 0.01 < s.float().mean() < 0.9
    for (name, _), a, b in zip([("x", x), *neuron.named_parameters()], gradients, expected):
        bound = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}[a.dtype]
        assert a.shape == b.shape and a.dtype == b.dtype
        if name == "gc.key.bias":
            assert not a.any() and b.abs().max() < 1e-4
        else:
            assert (a - b).abs().max() <= bound * max(b.abs().max(), 0.1), name


def test_the_kernels_compile_for_a_gpu():
    """In a process of its own, without the interpreter: which lets more pass."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, ROOT / "tests" / "h200.py"], env=environment | {"PYTHONPATH": str(ROOT)},
                          capture_output=True, text=True)
    assert not done.returncode, done.stderr[-2000:]
    assert set(done.stdout.split()) == {name for names in BY_HAND.values() for name in names}
