"""The networks against the paper's own numbers, and with any neuron."""

import math
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import staa
from staa import LIF, NETWORKS, STAALIF, build, firing_rates, neurons


def parameters(network):
    return sum(p.numel() for p in network.parameters())


def multiply_adds(network, *shape):
    with FlopCounterMode(display=False) as counter:
        network.eval()(torch.rand(shape))
    return counter.get_total_flops() / 2


def test_the_papers_parameters():
    # Section 4.5: 12.69 M.
    assert parameters(build("resnet20", neuron="staa", num_classes=10, T=4)) == 12_685_149
    assert parameters(build("resnet20", neuron="lif", num_classes=10, T=4)) == 11_247_946
    assert parameters(build("resnet20", neuron="staa", num_classes=100, T=4)) == 12_731_319


def test_the_papers_multiply_adds():
    # Section 4.5: 0.87 G for one 32 x 32 image and four steps.
    assert multiply_adds(build("resnet20", T=4), 1, 3, 32, 32) == pytest.approx(0.871e9, abs=0.0005e9)
    assert multiply_adds(build("resnet20", T=1), 1, 3, 32, 32) == pytest.approx(0.871e9 / 4, abs=0.0005e9)


def conv_bn(c_in, c_out, k):
    return c_in * c_out * k * k + 2 * c_out


@pytest.mark.parametrize("name, expected", [
    ("vgg13", sum(conv_bn(i, o, 3) for i, o in [(3, 64), (64, 64), (64, 128), (128, 128), (128, 256), (256, 256),
                                                (256, 512), (512, 512), (512, 512), (512, 512)])),
    ("resnet19", conv_bn(3, 128, 3) + 6 * conv_bn(128, 128, 3) + conv_bn(128, 256, 3) + 5 * conv_bn(256, 256, 3)
     + conv_bn(128, 256, 1) + conv_bn(256, 512, 3) + 3 * conv_bn(512, 512, 3) + conv_bn(256, 512, 1)),
])
def test_layouts_by_counting(name, expected):
    assert parameters(build(name, "lif", num_classes=10)) == expected + 512 * 10 + 10


@pytest.mark.parametrize("name", ["resnet18", "resnet34"])
def test_imagenet_networks_have_torchvisions_parameters(name):
    import torchvision

    assert parameters(build(name, "lif", num_classes=1000)) == parameters(torchvision.models.get_model(name))


@pytest.mark.parametrize("name", ["resnet18", "resnet34"])
def test_imagenet_networks_with_relu_compute_what_torchvisions_do(name):
    import torchvision

    theirs = torchvision.models.get_model(name).eval()
    ours = build(name, lambda channels, T: nn.ReLU(), num_classes=1000, T=1).eval()
    ours.load_state_dict(dict(zip(ours.state_dict(), theirs.state_dict().values(), strict=True)))
    x = torch.rand(1, 3, 64, 64)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name, size, expected", [
    ("vgg13", 32, [32, 32, 16, 16, 8, 8, 4, 4, 2, 2]), ("resnet19", 32, [32] * 7 + [16] * 6 + [8] * 4),
    ("resnet20", 32, [32] * 3 + [16] * 4 + [8] * 4 + [4] * 4 + [2] * 4),
    ("resnet18", 224, [112] + [56] * 4 + [28] * 4 + [14] * 4 + [7] * 4),
    ("resnet34", 224, [112] + [56] * 6 + [28] * 8 + [14] * 12 + [7] * 6)])
def test_the_maps_at_each_neuron_have_the_layouts_sizes(name, size, expected):
    network, seen = build(name, "lif", T=1, width=1 / 32), []
    for layer in neurons(network).values():
        layer.register_forward_hook(lambda layer, x, spikes: seen.append(spikes.shape[-2:]))
    network(torch.rand(2, 3, size, size))
    assert seen == [(side, side) for side in expected]


@pytest.mark.parametrize("name, block, pooled", [("resnet18", 2, False), ("resnet19", 3, False), ("resnet20", 2, True)])
def test_a_shortcut_to_smaller_maps_leaves_out_pixels_or_averages_them(name, block, pooled):
    """That of the second stage's first block."""
    shortcut = build(name, "lif", T=1, width=1 / 32).stages[block].shortcut.eval()
    weight = next(shortcut.parameters())
    x = torch.randn(2, 3, weight.shape[1], 8, 8)
    less = x.unflatten(-1, (4, 2)).unflatten(-3, (4, 2)).mean((-3, -1)) if pooled else x[..., ::2, ::2]
    expected = torch.einsum("oi, tbihw -> tbohw", weight[:, :, 0, 0], less) / (1 + 1e-5) ** 0.5  # an untrained BN
    assert weight.shape[2:] == (1, 1)
    torch.testing.assert_close(shortcut(x), expected)


def test_a_block_that_adds_nothing_passes_the_gradient_through_its_shortcut():
    block = staa.networks.BasicBlock(lambda channels: nn.Identity(), 3, 3, 1, False)
    nn.init.zeros_(block.conv2[1].weight)
    x = torch.randn(2, 4, 3, 5, 5, requires_grad=True)
    out, grad = block(x), torch.randn(2, 4, 3, 5, 5)
    out.backward(grad)
    assert torch.equal(out, x) and torch.equal(x.grad, grad)


@pytest.mark.parametrize("neuron", ["lif", "staa"])
@pytest.mark.parametrize("name", NETWORKS)
def test_spikes_are_zero_or_one_in_every_layer(name, neuron):
    network = build(name, neuron, T=2, width=1 / 16)
    layers, seen = neurons(network), []
    for layer in layers.values():
        layer.register_forward_hook(lambda layer, x, spikes: seen.append((spikes.shape[0], set(spikes.unique().tolist()))))
    logits = network(torch.randn(3, 3, 32, 32))
    assert logits.shape == (3, 10)
    expected = {"vgg13": 10, "resnet19": 17, "resnet20": 19, "resnet18": 17, "resnet34": 33}
    # A transformer: three in the embedding, one before the position, seven a block, one before the head.
    assert len(seen) == len(layers) == (expected.get(name) or 3 + 1 + 7 * int(name.split("-")[1]) + 1)
    assert all(steps == 2 and values <= {0.0, 1.0} for steps, values in seen)
    assert any(values == {0.0, 1.0} for _, values in seen)


def calibrated(network, x):
    """In evaluation, with the statistics of x in every BN: an untrained network would hardly spike."""
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = None
    network.train()(x)
    return network.eval()


@pytest.mark.parametrize("name", NETWORKS)
def test_an_image_is_the_same_frame_at_every_step(name):
    x = torch.randn(2, 2, 32, 32)
    network = calibrated(build(name, T=4, width=1 / 16, in_channels=2), x)
    torch.testing.assert_close(network(x), network(x.unsqueeze(1).repeat(1, 4, 1, 1, 1)))


def test_the_order_of_frames_matters_and_logits_are_their_mean():
    frames = torch.randn(2, 4, 3, 16, 16)
    network = calibrated(build("resnet20", "lif", T=4, width=1 / 8), frames)
    assert not torch.allclose(network(frames), network(frames.flip(1)))
    single = build("resnet20", "lif", T=1, width=1 / 8).eval()
    single.load_state_dict(network.state_dict())
    # With neurons that forget at once the steps are independent, and the output is the mean of single steps.
    for layer in [*neurons(network).values(), *neurons(single).values()]:
        layer.decay = 0.0
    expected = torch.stack([single(frames[:, t]) for t in range(4)]).mean(0)
    torch.testing.assert_close(network(frames), expected)


def test_any_class_or_factory_can_be_the_neuron():
    class Mine(nn.Module):
        def __init__(self, channels, T):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(channels, 1, 1))
            self.lif = LIF()

        def forward(self, x):
            return self.lif(x * self.scale)

    assert all(isinstance(layer, Mine) for layer in neurons(build("vgg13", Mine, width=1 / 16)).values())
    ann = build("resnet20", lambda channels, T: nn.ReLU(), width=1 / 16)
    assert ann(torch.rand(2, 3, 16, 16)).shape == (2, 10)
    mixed = build("resnet20", lambda channels, T: STAALIF(channels, T) if channels > 8 else LIF(), width=1 / 8)
    assert {type(layer) for layer in neurons(mixed).values()} == {LIF, STAALIF}


def test_settings_reach_every_neuron():
    network = build("vgg13", "staa", width=1 / 16, sa=False, beta=0.3)
    assert all(layer.sa is None and layer.beta == 0.3 for layer in neurons(network).values())


def test_it_trains_in_any_layout_and_gradients_reach_all_weights():
    network = build("resnet20", T=2, width=1 / 8, beta=0.0).to(memory_format=torch.channels_last)
    network(torch.randn(4, 3, 16, 16)).square().sum().backward()
    silent = [n for n, p in network.named_parameters() if p.grad is None]
    assert not silent


def test_firing_rates_are_mean_spikes():
    network = calibrated(build("vgg13", "lif", T=2, width=1 / 16), torch.randn(3, 3, 32, 32))
    kept = {}
    for name, layer in neurons(network).items():
        layer.register_forward_hook(lambda layer, x, spikes, name=name: kept.setdefault(name, []).append(spikes))
    with firing_rates(network) as rates:
        network(torch.randn(3, 3, 32, 32))
        network(torch.randn(1, 3, 32, 32))
    assert rates() == pytest.approx({name: torch.cat(s, 1).mean().item() for name, s in kept.items()})
    assert all(0 < rate < 1 for rate in rates().values())


def test_firing_rates_begin_anew_each_time():
    layer = nn.Identity()
    layer.is_neuron = True
    rates = firing_rates(layer)
    for spikes, rate in ((torch.zeros(2, 3), 0.0), (torch.ones(2, 1), 1.0)):
        with rates:
            layer(spikes)
        assert rates() == {"": rate}


@pytest.mark.parametrize("kind, places", [(torch.bfloat16, 501), (torch.float32, 2 ** 23 + 1)])
def test_firing_rates_count_every_spike_in_any_type(kind, places):
    """bf16 has the whole numbers up to 2^8, float32 up to 2^24."""
    layer = nn.Identity()
    layer.is_neuron = True
    with firing_rates(layer) as rates:
        layer(torch.ones(1, dtype=kind, requires_grad=True).expand(2, 3, 1, places))
    assert not rates.spikes[""].requires_grad, "they would keep every activation"
    assert rates.spikes[""].tolist() == [3 * places] * 2 and rates() == {"": 1.0}


def test_neurons_in_anybodys_network_are_found_and_none_inside_another():
    class Mine(nn.Module):
        def __init__(self, channels, T):
            super().__init__()
            self.lif = LIF()

        def forward(self, x):
            return self.lif(x)

    layer = build("vgg13", Mine, width=1 / 16).stages[1]
    network = nn.Sequential(nn.Identity(), STAALIF(3, 2), nn.Sequential(layer, LIF()))
    assert neurons(network) == {"1": network[1], "2.0": layer, "2.1": network[2][1]} and neurons(layer) == {"": layer}
    with firing_rates(network) as rates:
        network(torch.full((2, 1, 3, 4, 4), 5.0))
    assert rates() == {"1": 1.0, "2.0": 1.0, "2.1": 1.0}


def test_firing_rates_of_no_neuron_are_refused():
    with pytest.raises(ValueError, match="firing rates are those of LIF neurons, and this Sequential has none"):
        firing_rates(nn.Sequential(nn.ReLU()))()


def test_firing_rates_of_what_did_not_run_are_refused():
    """As where the network was compiled before: what torch.compile made of it calls no hook."""
    network, x = build("vgg13", width=1 / 16).eval(), torch.rand(2, 3, 32, 32)
    compiled = torch.compile(network, backend="eager")
    compiled(x)
    with firing_rates(network) as rates:
        compiled(x)
    with pytest.raises(ValueError, match="no neuron of this VGG was seen to run: call the network inside"):
        rates()
    with firing_rates(network) as rates:
        network(x)
    assert max(rates().values()) > 0


@pytest.mark.parametrize("arguments, words", [
    (dict(network="resnet50"), "network must be one of vgg13, resnet19"), (dict(neuron="lief"), "neuron must be one of"),
    (dict(T=0), "T must be at least 1"), (dict(num_classes=0), "num_classes"), (dict(in_channels=0), "in_channels"),
    (dict(width=0), "width must be above 0"), (dict(r=0), "r, the scaling"),
    (dict(network=["resnet20"]), "network must be one of"), (dict(network=None), "network must be one of"),
    (dict(T=4.0), "T must be a whole number, got float 4.0"), (dict(T=True), "T must be a whole number"),
    (dict(num_classes="10"), "num_classes must be a whole number"), (dict(width="0.5"), "width must be a number, got str"),
    (dict(width=math.inf), "width must be a finite number"), (dict(width=math.nan), "width must be a finite number"),
    (dict(bta=0.1), "neuron_settings of staa must be among gc, .*, got 'bta'"), (dict(r=2.5), "r must be a whole number"),
    (dict(gc="False"), "gc must be True or False, got str 'False'"), (dict(alpha=math.inf), "alpha must be a finite"),
    (dict(neuron=STAALIF, bta=0.1), "neuron_settings of staa must be among gc, .*, got 'bta'"),
    (dict(neuron=LIF()), "neuron must be one of lif, .* or your own class or factory, got a LIF"),
    (dict(neuron=None), "neuron must be one of lif, .* or your own class or factory, got a NoneType"),
    (dict(neuron=lambda channels, T: LIF(), x=1), "could not be built as neuron.channels, T=T.: .*'x'"),
    (dict(network_settings={"chunk": 4}), "network_settings of resnet20 must be empty, got 'chunk'"),
    (dict(network_settings={"stem": "one"}), "network_settings of resnet20 must be empty, got 'stem'"),
    (dict(network_settings=[4]), "network_settings must be a dictionary"),
    (dict(network="statten-2-256", network_settings={"depth": 1}), "must be among heads, chunk, pools, event, got 'depth'"),
    (dict(network="statten-2-256", network_settings={"chunk": 2.0}), "network_settings chunk must be a whole number")])
def test_bad_arguments(arguments, words):
    with pytest.raises(ValueError, match=words) as caught:
        build(**{"network": "resnet20"} | arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name, shape, words", [
    ("vgg13", (1, 3, 16, 16), "at least 32 x 32, got 16 x 16"), ("resnet20", (1, 1, 32, 32), "C=3"),
    ("resnet20", (1, 2, 3, 32, 32), "this network takes .*T=4"),
    ("resnet20", (1, 5, 3, 32, 32), "this network takes .*T=4"),
    ("resnet19", (1, 3, 4, 3), "at least 4 x 4, got 4 x 3"),
    ("resnet20", (3, 32, 32), "takes images"),
    ("resnet18", (1, 3, 16, 16), "at least 32"), ("statten-2-256", (1, 3, 3, 8), "at least 4 x 4, got 3 x 8"),
    ("sdt-8-512", (1, 3, 15, 16), "at least 16 x 16, got 15 x 16")])
def test_bad_input(name, shape, words):
    with pytest.raises(ValueError, match=words):
        build(name, width=1 / 16)(torch.zeros(shape))


@pytest.mark.parametrize("name, size", [("vgg13", 32), ("resnet19", 4), ("resnet20", 16), ("resnet18", 32)])
def test_the_smallest_image_works(name, size):
    assert build(name, T=1, width=1 / 16).eval()(torch.rand(1, 3, size, size)).shape == (1, 10)


def test_the_public_names_are_there():
    assert all(hasattr(staa, name) for name in staa.__all__)


def test_the_other_files_are_there_at_their_first_use():
    code = ("import sys, staa; assert 'staa.interchange' not in sys.modules; staa.interchange.write; staa.memory.keep_freed; "
            "assert not hasattr(staa, 'nothing') and not hasattr(staa, '__wrapped__')")
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="module 'staa' has no attribute 'nothing'"):
        staa.nothing
