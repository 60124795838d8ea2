"""NIR graphs of LIF networks, written to a file and run by other libraries: every spike is the same."""

import sys

import numpy as np
import pytest
import torch
from torch import nn

import staa
from staa import interchange
from staa.interchange import InterchangeError, to_nir, write

nir = pytest.importorskip("nir")
T, DT = 4, 1e-4


def trained_like(network):
    """BN with scales of its own and the statistics of data, so that there is something to fold and every layer fires;
    float64, so that spikes do not hang on the order of a sum."""
    for bn in [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]:
        nn.init.uniform_(bn.weight, 1, 2)
        nn.init.uniform_(bn.bias, -0.2, 0.6)
        bn.momentum = 1.0
    with torch.no_grad():
        network.double()(torch.rand(8, 3, 32, 32, dtype=torch.float64))
    return network.eval()


def our_spikes(network, x):
    spikes = {}
    for name, layer in staa.neurons(network).items():
        layer.register_forward_hook(lambda layer, inputs, out, name=name: spikes.update({name: out.detach()}))
    with torch.no_grad():
        return network(x), spikes


def their_spikes(graph, x, names):
    """Step by step in SpikingJelly: (logits averaged over T, spikes (T, B, C, H, W) by name)."""
    from spikingjelly.activation_based.nir_exchange import import_from_nir

    theirs = import_from_nir(graph, dt=DT, dtype=torch.float64).eval()
    spikes, state, logits = {name: [] for name in names}, None, []
    for name in names:
        module = theirs.get_submodule(name.replace(".", "_"))
        module.register_forward_hook(lambda module, inputs, out, name=name: spikes[name].append(out[0].detach()))
    with torch.no_grad():
        for _ in range(T):
            y, state = theirs(x, state)
            logits.append(y)
    return torch.stack(logits).mean(0), {name: torch.stack(s) for name, s in spikes.items()}


@pytest.mark.parametrize("name, settings", [
    ("resnet20", {}),  # shortcuts that pool, shortcuts that are nothing: nodes that receive a sum
    ("resnet19", {"decay": 0.5, "v_th": 0.7}),
    ("vgg13", {"decay": 0.75, "gain": 0.25, "v_th": 0.4, "v_reset": -0.3}),
    ("resnet19", {"decay": 1.0, "v_th": 1.5}),  # integrate and fire, no leak
], ids=["resnet20", "resnet19", "vgg13 as eq. 1", "resnet19 IF"])
def test_spikingjelly_reads_the_file_and_spikes_the_same(tmp_path, name, settings):
    network = trained_like(staa.build(name, "lif", T=T, width=1 / 16, **settings))
    write(tmp_path / "network.nir", network, 32, dt=DT)
    graph = nir.read(tmp_path / "network.nir")
    x = torch.rand(3, 3, 32, 32, dtype=torch.float64)
    logits, ours = our_spikes(network, x)
    their_logits, theirs = their_spikes(graph, x, list(ours))
    rates = [float(s.mean()) for s in ours.values()]
    assert min(rates) > 0.01 and max(rates) < 0.9, "the comparison says something in every layer"
    for layer, spikes in ours.items():
        assert torch.equal(spikes, theirs[layer]), layer
    torch.testing.assert_close(their_logits, logits)


def test_spikingjelly_reads_a_convolution_with_holes():
    network = staa.build("resnet20", "lif", T=T, width=1 / 16)
    network.stem[2][0] = nn.Conv2d(4, 4, 3, padding=2, dilation=2, bias=False)
    graph = to_nir(trained_like(network), 32)
    assert tuple(graph.nodes["stem.2.0"].dilation) == (2, 2)
    x = torch.rand(3, 3, 32, 32, dtype=torch.float64)
    _, ours = our_spikes(network, x)
    _, theirs = their_spikes(graph, x, list(ours))
    assert all(torch.equal(spikes, theirs[layer]) and spikes.any() for layer, spikes in ours.items())


def test_snntorch_reads_the_same_neuron():
    """Another reader of the same node: reset to zero and forward Euler."""
    from snntorch.import_nir import _nir_to_snntorch_module

    lif = staa.LIF(decay=0.5, v_th=0.9)
    theirs = _nir_to_snntorch_module(interchange.Export(nir, DT).neuron(lif, (6,)))
    x, mem, spikes = torch.rand(T * 5, 2, 6, dtype=torch.float64), torch.zeros(2, 6), []
    for x_t in x:
        s, mem = theirs(x_t, mem)
        spikes.append(s)
    ours = lif(x)
    assert 0.1 < ours.mean() < 0.9 and torch.equal(torch.stack(spikes).to(ours.dtype), ours)


def test_the_node_is_eq_1_in_eulers_steps_by_hand():
    """decay 0.75 and gain 0.5 at dt = 0.1 ms: tau 0.4 ms, R 2."""
    node = interchange.Export(nir, 1e-4).neuron(staa.LIF(decay=0.75, gain=0.5, v_th=1.2, v_reset=-0.1), (2, 3, 3))
    assert type(node) is nir.LIF and node.tau.shape == (2, 3, 3)
    values = [float(v.flat[0]) for v in (node.tau, node.r, node.v_leak, node.v_threshold, node.v_reset)]
    assert values == pytest.approx([4e-4, 2.0, -0.1, 1.2, -0.1])


def test_the_graph_is_the_networks(tmp_path):
    graph = to_nir(staa.build("resnet20", "lif", num_classes=7, T=2, width=1 / 16), 32)
    inputs = {target: sorted(s for s, t in graph.edges if t == target) for _, target in graph.edges}
    assert inputs["stages.0.neuron2"] == ["stages.0.conv2.0", "stem.6.0"]  # the identity
    assert inputs["stages.2.neuron2"] == ["stages.2.conv2.0", "stages.2.shortcut.1"]
    assert graph.nodes["stages.2.shortcut.1"].weight.dtype == np.float32
    assert tuple(graph.nodes["output"].output_type["output"]) == (7,)


def test_the_export_leaves_the_network_as_it_was():
    network = staa.build("vgg13", "lif", T=2, width=1 / 16)
    before = {name: t.clone() for name, t in network.state_dict().items()}
    with staa.firing_rates(network) as rates:
        to_nir(network, 32)
    assert network.training and all(torch.equal(t, before[name]) for name, t in network.state_dict().items())
    assert not any(rates.count.values()) and not any(m._forward_hooks for m in network.modules())


def test_the_callers_hooks_are_not_called_and_stay():
    network, called = staa.build("vgg13", "lif", T=2, width=1 / 16), []
    modules = [network, network.stages[0], network.stages[1]]
    for module in modules:
        module.register_forward_pre_hook(lambda module, inputs: called.append("before"))
        module.register_forward_hook(lambda module, inputs, out: called.append("after"))
    to_nir(network, 32)
    assert called == []
    network(torch.rand(1, 3, 32, 32))
    assert sorted(called) == ["after"] * 3 + ["before"] * 3


@pytest.mark.parametrize("height, width", [(8, 9), (9, 8), (9, 9)])
def test_a_pool_that_goes_over_either_edge_is_refused(height, width):
    export = interchange.Export(nir, DT)
    export.shapes = {"before": (4, height, width)}
    with pytest.raises(InterchangeError, match=f"^pool pools 2 x 2 of {height} x {width} positions"):
        export.average("pool", nn.AvgPool2d(2, ceil_mode=True), "before")
    assert not export.nodes and export.average("pool", nn.AvgPool2d(2), "before") == "pool", "the edge is left out"


def changed(name, layer):
    network = staa.build("resnet20", "lif", T=2, width=1 / 16)
    place, _, last = name.rpartition(".")
    setattr(network.get_submodule(place), last, layer)
    return network


@pytest.mark.parametrize("network, size, said", [
    (lambda: staa.build("resnet20", "staa", T=2, width=1 / 16), 32, "stem.1 is a STAALIF, which NIR cannot express: NIR's "
     "neurons have fixed coefficients, and here attention computes from the data"),
    (lambda: staa.build("resnet20", "fsta", T=2, width=1 / 16), 32, "FSTALIF, which NIR cannot express"),
    (lambda: staa.build("resnet19", "statten", T=2, width=1 / 16), 32, "STAttenLIF, and only the plain LIF"),
    (lambda: staa.build("resnet18", "lif", T=2, width=1 / 16), 32, "stem.2.0 is a MaxPool2d, for which NIR has no node"),
    (lambda: staa.build("statten-2-256", "lif", T=4, width=1 / 8), 32, "VGG and ResNet are exported to NIR, and this is a STAtten"),
    (lambda: staa.build("resnet20", "lif", T=2, width=1 / 16), 18, "pools 2 x 2 of 9 x 9 positions"),
    (lambda: changed("stem.0.1", nn.Identity()), 32, r"stem.0.0 must be a convolution without a bias, in one group, and after "
     r"it BN with weights and running statistics, and this is Conv2d\(.*\) and then Identity\(\)"),
    (lambda: changed("stem.0.1", nn.BatchNorm2d(4, track_running_stats=False)), 32, "track_running_stats=False"),
    (lambda: changed("stem.0.1", nn.BatchNorm2d(4, affine=False)), 32, "affine=False"),
    (lambda: changed("stem.0.0", nn.Conv2d(3, 4, 3, padding=1)), 32, "must be a convolution without a bias"),
    (lambda: changed("stem.2.0", nn.Conv2d(4, 4, 3, padding=1, groups=2, bias=False)), 32, "in one group.*groups=2"),
    (lambda: changed("head", nn.Linear(32, 10, bias=False)), 32, "head must be a Linear with a bias"),
    (lambda: changed("head", nn.Sequential(nn.Linear(32, 10))), 32, "head must be a Linear with a bias"),
], ids=["staa", "fsta", "statten's neuron", "max pool", "transformer", "uneven pool", "no BN", "BN without statistics",
        "BN without weights", "a bias", "groups", "a head without a bias", "another head"])
def test_what_nir_cannot_express_is_refused_with_the_reason(tmp_path, network, size, said):
    with pytest.raises(InterchangeError, match=said) as caught:
        write(tmp_path / "network.nir", network(), size)
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


@pytest.mark.parametrize("size, dt, said", [
    *((size, DT, "image_size must be a whole number of at least 16, got") for size in (15, 0, -32, 32.0, "32", True)),
    *((32, dt, "dt, the seconds of a time step, must be a finite number above 0, got") for dt in (
        0, -1e-4, float("inf"), float("nan"), "1e-4"))])
def test_a_bad_number_is_refused_before_any_work(tmp_path, monkeypatch, size, dt, said):
    monkeypatch.setattr(interchange, "Export", None)
    with pytest.raises(InterchangeError, match=said):
        write(tmp_path / "network.nir", staa.build("resnet20", "lif", T=2, width=1 / 16), size, dt)
    assert not list(tmp_path.iterdir())


def test_without_nir_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "nir", None)
    with pytest.raises(InterchangeError, match="needs nir, which is not installed"):
        to_nir(staa.build("vgg13", "lif", T=1, width=1 / 16), 32)


def test_a_network_in_bf16_is_exported_in_float32():
    network = trained_like(staa.build("resnet20", "lif", width=1 / 16, T=2)).bfloat16()
    graph = interchange.to_nir(network, 32)
    weights = [node.weight for node in graph.nodes.values() if hasattr(node, "weight")]
    assert weights and all(weight.dtype == "float32" for weight in weights)
    assert graph.nodes["head"].bias.tolist() == network.head.bias.tolist()
