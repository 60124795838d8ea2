"""The fast path on a GPU, where there is none: its Triton kernels, run by Triton's interpreter, against the equations."""

import pytest
import torch

from staa import fused, fused_lif, fused_staa
from staa.attention import STAALIF
from staa.fsta import FSTALIF
from staa.neuron import LIF
from staa.statten import STAttenLIF
from staa.surrogate import RECTANGLE, Surrogate
from staa.variants import LeakySTAALIF

pytest.importorskip("triton", reason="Triton is not there, as on a Mac")
import gpu  # noqa: E402

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, which does not run in an interpreter")


@pytest.fixture(autouse=True)
def on_gpu(monkeypatch):
    """Neurons are compiled for the GPU of gpu.py, whatever their size; gpu.launched are those of the test."""
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **settings: compile(function, backend=gpu.backend, **settings))
    monkeypatch.setattr(fused, "WORTH_COMPILING", 0)
    monkeypatch.setattr(fused, "compiler", lambda device: True)
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


@pytest.mark.parametrize("neuron", [LIF(), LIF(decay=0.4, gain=0.6, v_reset=-0.2), STAttenLIF(),
                                    FSTALIF(8, 4, temporal=False, spatial=False)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_kernel_each_way_that_loads_sixteen_bytes_at_once(neuron, dtype, monkeypatch):
    """Which Triton does, by its own rule, where it knows addresses and the number of elements to be multiples of 16."""
    same(neuron, current(4, 2, 8, 4, 4, dtype=dtype), monkeypatch)
    assert len(gpu.launched) == 2
    for kernel in gpu.launched:
        assert kernel.sixteens() == {name for name in kernel.arguments if "ptr" in name or name == "xnumel"}


def test_of_an_odd_number_of_elements(monkeypatch):
    same(LIF(), current(3, 1, 5, 3, 3), monkeypatch)
    assert len(gpu.launched) == 2


class Compiled(STAALIF):
    """Which is not written by hand, since its surrogate is its own."""

    surrogate = Surrogate(RECTANGLE.gradient)


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
    from staa import fused_staa_gpu

    seen = []
    for name in ("context", "query", "linear", "steps", "steps_backward", "query_backward", "context_backward",
                 "over_images", "over_batch"):
        kernel = getattr(fused_staa_gpu, name)

        def launcher(grid, kernel=kernel, name=name):
            seen.append(name)
            return kernel[grid]
        monkeypatch.setattr(fused_staa_gpu, name, type(name, (), {"__getitem__": lambda _, grid, f=launcher: f(grid)})())
    yield seen
    assert not gpu.launched


def cut(monkeypatch):
    """Four programs and more share a map, each of which goes through two tiles."""
    from staa import fused_staa_gpu

    for name, elements in {"WHOLE": 16, "PART": 64, "TILE": 32}.items():
        monkeypatch.setattr(fused_staa_gpu, name, elements)


SETTINGS = {
    "plain": {}, "TSRD, PE twice": dict(beta=0.5, pe_place="both"), "PE at the output": dict(pe_place="output", alpha=1.0),
    "v_reset": dict(v_reset=-0.2, v_th=0.8, a=0.7, pe_place="membrane", beta=0.5), "no PE": dict(pe=False),
    "no GC": dict(gc=False), "no SA": dict(sa=False, decay=0.4, gain=0.6, v_reset=-0.2), "SA": dict(gc=False, pe=False),
    "PE": dict(gc=False, sa=False, pe_place="both"), "r": dict(r=2), "fixed PE": dict(pe_kind="fixed")}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("share", [False, True])
def test_staa_by_hand(share, settings, launches, monkeypatch):
    if share:
        cut(monkeypatch)
    by_hand(moved(STAALIF(12, 3, **settings)), current(3, 2, 12, 3, 5), launches, monkeypatch)


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("make", [lambda: LeakySTAALIF(16, 3, beta=0.5, pe_place="both", v_reset=-0.2),
                                  lambda: LeakySTAALIF(16, 3, sa=False, pe_place="both")])
def test_leaky_staa_by_hand(make, share, launches, monkeypatch):
    if share:
        cut(monkeypatch)
    by_hand(moved(make()), current(3, 2, 16, 4, 4), launches, monkeypatch)


@pytest.mark.parametrize("shape, dtype, channels_last", [
    ((3, 2, 16, 4, 4), torch.bfloat16, True), ((3, 2, 16, 4, 4), torch.float16, True), ((2, 9, 16, 4, 4), None, False),
    ((1, 1, 1, 1, 1), None, True), ((2, 2, 80, 2, 2), None, True), ((2, 65, 16, 1, 2), None, True)])
def test_staa_by_hand_of_other_currents(shape, dtype, channels_last, launches, monkeypatch):
    x = current(*shape, dtype=dtype or torch.float32, channels_last=channels_last)
    by_hand(moved(STAALIF(shape[2], shape[0])), 1.5 + 0 * x if x.numel() == 1 else x, launches, monkeypatch)


def by_hand(neuron, x, launches, monkeypatch):
    """As `same`, without the compiler. The gradient of the key's bias is 0: softmax takes no notice of it."""
    gradient = torch.randn_like(x)
    s, *gradients = both(neuron, x, gradient)
    assert {"steps", "steps_backward"} <= set(launches)
    with monkeypatch.context() as patch:
        patch.setattr(fused, "enabled", False)
        true, *expected = both(neuron, x, gradient)
    assert torch.equal(s, true) and 0.01 < s.float().mean() <= 1
    for (name, _), a, b in zip([("x", x), *neuron.named_parameters()], gradients, expected):
        bound = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}[a.dtype]
        assert a.shape == b.shape and a.dtype == b.dtype
        if name == "gc.key.bias":
            assert not a.any() and b.abs().max() < 1e-4
        else:
            assert (a - b).abs().max() <= bound * max(b.abs().max(), 0.1), name
