"""On a GPU: the fast path against the equations, the captured step against the plain one, and a run."""

import copy

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import staa
from staa import Config, cuda_graph, data, fused, norm, resident, train
from staa.cuda_graph import Captured
from staa.fsta import FSTALIF
from staa.norm import BatchNorm2d
from staa.pooling import AvgPool2d
from staa.statten import STAttenLIF
from staa.surrogate import RECTANGLE
from staa.variants import LeakySTAALIF

if torch.cuda.is_available():
    from staa import fused_lif_gpu, fused_staa_gpu
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
GPU = torch.device("cuda")


class CompiledLIF(staa.LIF):
    """Whose kernels are not those written by hand, since its surrogate is its own."""

    surrogate = staa.Surrogate(RECTANGLE.gradient)


class CompiledSTAALIF(staa.STAALIF):
    surrogate = CompiledLIF.surrogate


def current(*shape, dtype=torch.float32, channels_last=True):
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x = 2 * torch.randn(shape[0] * shape[1], *shape[2:], device=GPU)
    return x.to(dtype, memory_format=layout).unflatten(0, shape[:2])


def both(neuron, x, gradient):
    torch.manual_seed(0)  # of TSRD
    x = x.detach().requires_grad_()
    s = neuron(x)
    return [s.detach(), *torch.autograd.grad(s, [x, *neuron.parameters()], gradient)]


@pytest.mark.parametrize("make", [
    staa.LIF, lambda c, T: staa.LIF(decay=0.4, gain=0.6, v_reset=-0.2), lambda c, T: staa.STAALIF(c, T, beta=0.3),
    lambda c, T: LeakySTAALIF(c, T), lambda c, T: CompiledLIF(), lambda c, T: CompiledSTAALIF(c, T), FSTALIF,
    lambda c, T: STAttenLIF()])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("size", [32, 4])  # the smaller ones are too small to compile for
def test_fast_path_is_the_equations(size, make, dtype, channels_last, monkeypatch):
    """In double precision all of it. In lower ones a last bit may decide a spike in ten thousand, and each of them
    leaves its mark, of relative size 1, in the gradient."""
    torch.manual_seed(1)
    neuron = make(64, 4).to(GPU, dtype if dtype == torch.float64 or make is FSTALIF else torch.float32)
    with torch.no_grad():
        for p in neuron.parameters():
            p += 0.1 * torch.randn_like(p)
    x = current(4, 16, 64, size, size, dtype=dtype, channels_last=channels_last)
    assert fused.is_large(x, 64) == (size == 32)
    gradient = torch.randn_like(x)
    s, *gradients = both(neuron, x, gradient)
    monkeypatch.setattr(fused, "enabled", False)
    true, *expected = both(neuron, x, gradient)
    assert 0.01 < true.float().mean() < 0.9 and (s != true).float().mean() < 1e-4
    if dtype == torch.float64:
        assert torch.equal(s, true)
        for a, b in zip(gradients, expected):
            assert (a - b).norm() <= 1e-9 * (b.norm() + 1)
    assert (gradients[0] - expected[0]).float().norm() < 0.05 * expected[0].float().norm()


@pytest.mark.parametrize("shape", [(4, 128, 64, 16, 16), (16, 33, 64, 16, 16), (9, 33, 96, 7, 9), (1, 16, 64, 32, 32)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("settings", [{}, dict(decay=0.4, gain=0.6, v_reset=-0.2, v_th=0.8, a=0.7)])
def test_lif_by_hand_is_the_equations(shape, dtype, settings, monkeypatch):
    """Its products and sums are rounded as theirs are, so that no spike differs."""
    neuron, x = staa.LIF(**settings), current(*shape, dtype=dtype)
    gradient = torch.randn_like(x)
    called = []
    monkeypatch.setattr(fused_lif_gpu, "launch", spy(fused_lif_gpu.launch, called))
    monkeypatch.setattr(fused, "WORTH_COMPILING", 0)
    s, dx = both(neuron, x, gradient)
    monkeypatch.setattr(fused, "enabled", False)
    true, expected = both(neuron, x, gradient)
    assert len(called) == 2 and torch.equal(s, true) and 0.1 < true.float().mean() < 0.5
    bound = 1e-2 if dtype == torch.bfloat16 else 1e-5
    assert (dx - expected).float().norm() <= bound * expected.float().norm()


def test_lif_by_hand_of_more_elements_than_32_bits_count():
    """The last row begins beyond them. Steps without memory: the current's own threshold, and eq. 5's rectangle."""
    x = torch.zeros(4, 800_000_000, device=GPU, dtype=torch.bfloat16)
    x[-1, -5:] = torch.tensor([2.0, 0.5, 1.0, -1.0, 3.0])
    s = staa.LIF(decay=0.0)(x.requires_grad_())
    assert s[-1, -5:].tolist() == [1, 0, 1, 0, 1] and s.sum(dtype=torch.float32) == 3
    dx, = torch.autograd.grad(s, x, torch.ones_like(s))
    assert dx[-1, -5:].tolist() == [0, 1, 1, 0, 0] and dx.sum(dtype=torch.float32) == 2


@pytest.mark.parametrize("shape, K", [((512, 64, 32, 32), 2), ((128, 256, 4, 4), 2), ((33, 96, 6, 9), 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_average_pooling_by_hand_is_torchs(shape, K, dtype, monkeypatch):
    monkeypatch.setattr(fused, "WORTH_COMPILING", 0)
    x = torch.randn(shape, device=GPU).to(dtype, memory_format=torch.channels_last).requires_grad_()
    pool = AvgPool2d(K)
    assert pool.is_by_hand(x)
    y, expected = pool(x), F.avg_pool2d(x, K)
    gradient = torch.randn_like(y)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(*(torch.autograd.grad(out, x, gradient)[0] for out in (y, expected)))


@pytest.mark.parametrize("shape", [(4, 128, 64, 16, 16), (4, 128, 128, 8, 8), (4, 128, 256, 4, 4), (4, 128, 512, 2, 2),
                                   (5, 33, 96, 7, 9), (4, 16, 64, 32, 32), (10, 9, 40, 31, 33),
                                   (3, 300, 300, 3, 5), (2, 3, 64, 128, 128)])
@pytest.mark.parametrize("dtype, channels_last", [(torch.float32, True), (torch.bfloat16, True), (torch.float32, False)])
def test_staa_by_hand_is_the_equations(shape, dtype, channels_last, monkeypatch):
    """Of the sizes of the networks, and others. In float32 a last bit may decide a spike, as above."""
    torch.manual_seed(1)
    neuron = staa.STAALIF(shape[2], shape[0], beta=0.3).to(GPU)
    with torch.no_grad():
        for p in neuron.parameters():
            p += 0.02 * torch.randn_like(p)
    x = current(*shape, dtype=dtype, channels_last=channels_last)
    gradient = torch.randn_like(x)
    called = []
    monkeypatch.setattr(fused_staa_gpu, "forward", spy(fused_staa_gpu.forward, called))
    monkeypatch.setattr(fused, "WORTH_COMPILING", 0)
    s, *gradients = both(neuron, x, gradient)
    monkeypatch.setattr(fused, "enabled", False)
    true, *expected = both(neuron, x, gradient)
    other = (s != true).float().mean()
    assert called and 0.1 < true.float().mean() < 0.5 and other < 1e-4
    bound = 0.05 if other else 1e-2 if dtype == torch.bfloat16 else 1e-4
    for (name, _), a, b in zip([("x", x), *neuron.named_parameters()], gradients, expected):
        if name != "gc.key.bias":  # 0, by rounding alone it is not
            assert (a - b).float().norm() <= bound * b.float().norm() + 1e-5, name


@pytest.mark.parametrize("shape", [(4, 300, 64, 32, 32), (4, 512, 512, 2, 2)])
def test_staa_by_hand_is_the_same_every_time(shape):
    """Whether several programs share a map, or one takes several samples: nothing is left to chance."""
    torch.manual_seed(1)
    neuron, x = staa.STAALIF(shape[2], shape[0], beta=0.0).to(GPU), current(*shape, dtype=torch.bfloat16)
    gradient = torch.randn_like(x)
    first = both(neuron, x, gradient)
    for _ in range(20):
        assert all(map(torch.equal, both(neuron, x, gradient), first))


@pytest.mark.parametrize("shape", [(512, 64, 32, 32), (33, 96, 7, 9), (2048, 3, 16, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bn_by_hand_is_torchs(shape, dtype, monkeypatch):
    monkeypatch.setattr(norm, "LARGE", 0)
    x = (3 + torch.randn(shape, device=GPU)).to(dtype, memory_format=torch.channels_last).requires_grad_()
    layer, other = BatchNorm2d(shape[1]).to(GPU), torch.nn.BatchNorm2d(shape[1]).to(GPU)
    assert layer.is_by_hand(x)
    y, expected = layer(x), other(x)
    gradient = torch.randn_like(y)
    bound = dict(rtol=2e-2, atol=2e-2) if dtype == torch.bfloat16 else dict(rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(y, expected, **bound)
    for a, b, what in zip(*(torch.autograd.grad(out, [x, *of.parameters()], gradient) for out, of in
                            ((y, layer), (expected, other))), "xwb"):
        assert (a - b).float().norm() <= (1e-2 if dtype == torch.bfloat16 else 1e-4) * b.float().norm(), what
    for a, b in zip(layer.buffers(), other.buffers()):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def spy(function, called):
    return lambda *args, **settings: called.append(len(args)) or function(*args, **settings)


def step_of(network, bf16=False):
    def work(x, y):
        with torch.autocast("cuda", torch.bfloat16, enabled=bf16):
            loss = F.cross_entropy(network(x).float(), y)
        loss.backward()
        return loss.detach(),
    return work


def batch(n=32):
    return (torch.randn(n, 3, 32, 32, device=GPU).contiguous(memory_format=torch.channels_last),
            torch.randint(10, (n,), device=GPU))


@pytest.mark.parametrize("neuron, settings", [("lif", {}), ("staa", {"beta": 0.0}), ("fsta", {})])
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("large", [norm.LARGE, 0])
def test_a_captured_step_is_the_plain_one(large, bf16, neuron, settings, monkeypatch):
    """Whose weights move: a graph that held old ones, or bf16 copies of them, would be found out. With torch's batch
    normalisation, and with that of large maps, by hand, in the captured one."""
    monkeypatch.setattr(norm, "LARGE", large)
    torch.manual_seed(0)
    network = staa.build("resnet20", neuron, T=4, width=1 / 4, **settings).to(GPU, memory_format=torch.channels_last)
    other = copy.deepcopy(network)
    work, plain, captured = step_of(network, bf16), step_of(other, bf16), Captured(network)
    for i in range(8):
        x, y = batch(32 if i != 5 else 20)  # one of another size between
        network.zero_grad(), other.zero_grad()
        loss, = captured(work, x, y)
        with monkeypatch.context() as patch:
            patch.setattr(norm, "LARGE", 2 ** 60)
            expected, = plain(x, y)
        torch.testing.assert_close(loss, expected, rtol=1e-2, atol=1e-2)
        for p, q in zip(network.parameters(), other.parameters()):
            assert (p.grad - q.grad).norm() <= 0.05 * q.grad.norm() + 1e-4
        with torch.no_grad():
            for p, q in zip(network.parameters(), other.parameters()):
                p.copy_(q.sub_(0.05 * q.grad))  # in place, as an optimizer does
    assert captured.graph is not None
    for a, b in zip(network.buffers(), other.buffers()):  # BN's statistics
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-2)


def test_every_replay_draws_anew_what_TSRD_drops():
    torch.manual_seed(0)
    network = staa.build("resnet20", "staa", T=4, width=1 / 4, beta=0.5).to(GPU)
    for module in network.modules():
        if isinstance(module, staa.STAALIF):
            torch.nn.init.normal_(module.gc.value.bias)
    captured, (x, y) = Captured(network), batch()
    losses = {float(captured(step_of(network), x, y)[0]) for _ in range(12)}
    assert captured.graph is not None and len(losses) > 6
    torch.manual_seed(5)
    one = float(captured(step_of(network), x, y)[0])
    torch.manual_seed(5)
    assert float(captured(step_of(network), x, y)[0]) == pytest.approx(one, rel=1e-3)


class Noise:
    data = np.random.default_rng(0).integers(0, 256, (500, 32, 32, 3), dtype=np.uint8)
    targets = [i % 10 for i in range(500)]
    classes = [str(i) for i in range(10)]

    def __len__(self):
        return 500


@pytest.mark.parametrize("captures", [True, False])
def test_the_host_never_waits_inside_an_epoch(captures):
    config = Config(dataset="cifar10", width=1 / 4, batch_size=64, precision="bf16", augment="standard")
    network = staa.build("resnet20", "staa", T=4, width=1 / 4).to(GPU, memory_format=torch.channels_last)
    optimizer = train.new_optimizer(config, network.parameters())
    images = resident.Images(data.View(Noise(), range(500), None), "cifar10", GPU)
    captured = Captured(network) if captures else None

    class Watched:
        dataset = Noise()

        def __init__(self, mode):
            self.mode = mode
            self.batches = resident.Batches(images, 64, "standard", shuffle=True, seed=0, epoch=0)

        def __len__(self):
            return len(self.batches)

        def __iter__(self):
            torch.cuda.set_sync_debug_mode(self.mode)
            try:
                yield from self.batches
            finally:
                torch.cuda.set_sync_debug_mode("default")

    for mode in ("default", "error"):  # the first epoch compiles
        loss, accuracy = train.train_epoch(network, optimizer, Watched(mode), config, 0, GPU, captured=captured)
    assert 0 < loss < 10 and captures == bool(captured and captured.graph)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_is_captured_and_learns(workers, tmp_path, monkeypatch):
    """Also where another thread pins memory meanwhile."""
    monkeypatch.setenv("STAA_RUNS", str(tmp_path))
    monkeypatch.setenv("STAA_RECORDS", str(tmp_path / "none"))
    captured = []

    class Watched(Captured):
        def capture(self, *batch):
            captured.append(super().capture(*batch))
            return captured[-1]
    monkeypatch.setattr(cuda_graph, "Captured", Watched)
    config = Config(dataset="digits", image_size=16, width=1 / 4, neuron="lif", epochs=6, batch_size=32, lr=0.02)
    record = train.run(config, workers=workers)
    assert captured == [True] and record.accuracy > 50  # on a CPU 68 to 88 with the seeds 0 to 4
    assert torch.cuda.get_device_name() in str(record.provenance)


def test_after_a_capture_that_fails_all_goes_on_as_before():
    class Asks(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(4, 4)

        def forward(self, x):
            x = self.layer(x)
            return x if x.sum().item() > 0 else -x
    network = Asks().to(GPU)
    captured, x = Captured(network), torch.randn(8, 4, device=GPU)

    def work(x, y):
        loss = network(x).square().mean()
        loss.backward()
        return loss.detach(),
    with pytest.warns(UserWarning, match="cannot be captured"):
        losses = {float(captured(work, x, x)[0]) for _ in range(6)}
    assert len(losses) == 1 and captured.graph is None
    torch.manual_seed(0)
    assert torch.rand(2, device=GPU).sum() > 0
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
