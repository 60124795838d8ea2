"""Counts by hand, by torch's own counter and by SpikingJelly's; the paper's numbers; Lemaire's formulas."""

import dataclasses
from functools import partial

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from staa import (
    LIF,
    NETWORKS,
    NEURONS,
    Config,
    build,
    data,
    energy,
    experiments,
    fused,
    lemaire,
    neurons,
    plots,
    records,
    tables,
    train,
)
from staa.fsta import FSTALIF
from staa.networks import SpikingNetwork, Steps


@pytest.fixture(scope="module")
def paper():
    """ResNet-20 of section 4.5 before any training, measured on two random images; T = 4, 10 classes."""
    torch.manual_seed(0)
    images = torch.randn(2, 3, 32, 32)
    network = firing(build("resnet20", T=4), images)
    return network, images, energy.measure(network, [images])


def firing(network, images):
    """An untrained network that fires: BN has the statistics of these images, the attention's last layers are not 0."""
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = None
    for name, parameter in network.named_parameters():
        if "gc.value" in name or "sa.excite" in name:
            nn.init.normal_(parameter, std=0.1)
    with torch.no_grad():
        network.train()(images)
    return network.eval()


def test_the_papers_network(paper):
    found = paper[2]
    assert found.parameters == 12_685_149
    outside = [op for op in found.operations if not op.in_neuron]
    parts = {op.name: op.multiply_adds for op in outside if op.sees == "real numbers"}
    assert parts == {  # by hand: the first convolution, after the pool, the shortcuts after theirs, the head
        "stem.0.0": 4 * 32 * 32 * 64 * 27, "stages.0.conv1.0": 4 * 16 * 16 * 64 * 64 * 9,
        "stages.2.shortcut.1": 4 * 8 * 8 * 64 * 128, "stages.4.shortcut.1": 4 * 4 * 4 * 128 * 256,
        "stages.6.shortcut.1": 4 * 2 * 2 * 256 * 512, "head": 4 * 512 * 10}
    others = found.total("macs", "context product", "mixing by M and N")
    assert found.total("multiply_adds", "convolution", "linear") == pytest.approx(0.870e9, abs=0.0005e9)
    assert found.total("macs") - others == pytest.approx(0.058e9, abs=0.0005e9)
    assert found.total("macs") == pytest.approx(0.062e9, abs=0.0005e9)
    inside = sum(op.macs for op in found.operations if op.in_neuron and op.what == "convolution")
    assert inside == pytest.approx(6.9e6, abs=0.05e6)
    assert found.undecided == [] and sum(op.sees == "spikes" for op in outside) == 17


def test_the_context_product_and_the_mixing_by_hand(paper):
    units = sum(paper[2].units.values())  # neurons of one time step
    sizes = [64 * 32 * 32] * 3 + [64 * 16 * 16] * 4 + [128 * 8 * 8] * 4 + [256 * 4 * 4] * 4 + [512 * 2 * 2] * 4
    assert units == sum(sizes)
    assert paper[2].total("multiply_adds", "context product") == 4 * units
    assert paper[2].total("multiply_adds", "mixing by M and N") == 2 * 4 * units


def test_the_papers_energy():
    printed = {row.quantity: float(row.value) for row in tables.paper("sections").itertuples()
               if row.item == "energy" and row.setting == "network"}
    assert energy.millijoules(printed["ACs"] * 1e9, printed["MACs"] * 1e9) == pytest.approx(printed["energy"], abs=1e-9)


@pytest.mark.parametrize("neuron", NEURONS)
@pytest.mark.parametrize("name", NETWORKS)
def test_torchs_own_counter_agrees_on_every_network(name, neuron):
    network, images = build(name, neuron, T=2, width=1 / 16), torch.randn(2, 3, 32, 32)
    found = energy.measure(network, [images])
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network.eval()(images[:1])
    ours = found.total("multiply_adds") - found.total("multiply_adds", *energy.ELEMENTWISE)
    assert ours == counter.get_total_flops() / 2


def test_products_that_nothing_counts_are_refused():
    class Mine(nn.Module):
        def __init__(self, channels, T):
            super().__init__()
            self.weight, self.lif = nn.Parameter(torch.eye(channels)), LIF()

        def forward(self, x):
            return self.lif(torch.einsum("tbchw,dc->tbdhw", x, self.weight))

    with pytest.raises(ValueError, match="COUNTED knows .* add the module type .* to COUNTED: perhaps Mine.$"):
        energy.measure(build("vgg13", Mine, width=1 / 16, T=1), [torch.rand(1, 3, 32, 32)])
    with pytest.raises(ValueError, match="at least one image"):
        energy.measure(build("vgg13", "lif", width=1 / 16, T=1), [])


class Small(SpikingNetwork):
    """Two convolutions, one with a stride, and the head; with any neuron."""

    def __init__(self, neuron, T, kernel=3):
        super().__init__(neuron, in_channels=2, T=T, min_size=1)
        self.one = nn.Sequential(Steps(nn.Conv2d(2, 5, kernel, padding=kernel // 2)), self.neuron(5))
        self.two = nn.Sequential(Steps(nn.Conv2d(5, 6, kernel, 2, padding=kernel // 2, bias=False)), self.neuron(6))
        self.head = nn.Linear(6, 3)
        with torch.no_grad():
            self.one[0][0].bias += 1  # so that it fires
            self.two[0][0].weight.mul_(5)

    def features(self, x):
        return self.two(self.one(x))


def lif(channels, T):
    return LIF()


def test_what_a_layer_sees_is_what_arrives():
    network = Small(lif, T=3)
    for batches, first in [([torch.rand(4, 2, 8, 8)], "real numbers"), ([torch.rand(4, 2, 8, 8).round()], "spikes"),
                           ([torch.zeros(4, 2, 8, 8)], "nothing"),
                           ([torch.zeros(4, 2, 8, 8), torch.rand(1, 2, 8, 8)], "real numbers"),
                           ([torch.rand(1, 2, 8, 8), torch.zeros(4, 2, 8, 8)], "real numbers"),
                           ([torch.full((4, 2, 8, 8), 0.5)], "real numbers"),
                           ([-torch.ones(1, 2, 8, 8)], "real numbers")]:
        found = energy.measure(network, batches)
        seen = {op.name: op.sees for op in found.operations}
        assert seen["one.0.0"] == first
        assert ("one.0.0" in found.undecided) == (first == "nothing")


def test_acs_are_multiply_adds_times_the_rate_and_images_and_frames_are_averaged():
    network = Small(lif, T=3)
    frames = (torch.rand(4, 3, 2, 8, 8) < 0.3).float()
    found = energy.measure(network, [(frames[:3], torch.zeros(3)), frames[3:]])
    one, two, head = found.operations
    assert one.multiply_adds == 3 * 8 * 8 * 5 * 2 * 9 and two.multiply_adds == 3 * 4 * 4 * 6 * 5 * 9
    assert one.acs == pytest.approx(one.multiply_adds * frames.mean().item()) and one.macs == 0
    spikes = network.one(frames.transpose(0, 1))
    assert two.acs == pytest.approx(two.multiply_adds * spikes.mean().item())
    assert found.rates["one.1"] == pytest.approx(spikes.mean((1, 2, 3, 4)).tolist())
    assert found.millijoules == pytest.approx((0.9 * (one.acs + two.acs) + 4.6 * head.multiply_adds) * 1e-9)
    units = {"one.1": 5 * 8 * 8, "two.1": 6 * 4 * 4}
    assert found.units == units and found.images == 4
    spikes_of_an_image = sum(units[name] * sum(rates) for name, rates in found.rates.items())
    assert found.firing_rate == pytest.approx(spikes_of_an_image / (3 * sum(units.values())))
    assert network.training and not any(layer._forward_hooks for layer in network.modules())


@pytest.mark.parametrize("switches, gates", [({"spatial": False}, 1), ({"temporal": False}, 3), ({}, 4)])
def test_fstas_gates_by_hand(switches, gates):
    """X g is one multiplication a number; X_t a, t X_t and s X_s are three."""
    found = energy.measure(Small(partial(FSTALIF, **switches), T=3), [torch.rand(1, 2, 8, 8)])
    assert found.total("multiply_adds", "gates of FSTA") == gates * 3 * (5 * 8 * 8 + 6 * 4 * 4)


def test_the_coefficients_of_what_is_no_layer_by_hand():
    found = energy.measure(Small(FSTALIF, T=3), [torch.rand(1, 2, 8, 8)])
    assert [op.coefficients for op in found.operations if op.what == "DCT"] == [49 * 49] * 2  # as many windows of 7 x 7
    network = build("statten-2-256", "statten", T=4, width=1 / 8, network_settings={"chunk": 2})
    found = energy.measure(network, [torch.rand(1, 3, 16, 16)])
    read = {op.name.rpartition(".")[2]: op.coefficients for op in found.operations if op.what == "attention product"}
    assert read == {"context": 32 * 2 * 4 * 4, "read": 8 * 4 * 4}  # V of a chunk; a matrix K^T V for each of 8 heads


def test_the_coefficients_of_fstas_gates_the_context_the_mask_and_bn_by_hand():
    def read(network, images, what, **choice):
        return [op.coefficients for op in energy.measure(network, [images], **choice).operations if op.what == what]

    images = torch.rand(2, 2, 8, 8)  # 5 channels of 8 x 8, then 6 of 4 x 4
    assert read(Small(FSTALIF, T=3), images, "gates of FSTA") == [3 + 8 * 8, 3 + 4 * 4]  # g and a
    assert read(Small(NEURONS["staa"], T=3), images, "context product") == [8 * 8, 4 * 4]  # softmax over the places
    network = Small(lif, T=3)
    network.two[0].append(nn.BatchNorm2d(6))
    assert read(network, images, "BN", bn_folded=False) == [2 * 6]  # a scale and a shift of each channel
    network = build("sdt-2-256", "statten", T=2, width=1 / 8)
    found = energy.measure(network, [torch.rand(2, 3, 16, 16)])
    masks = [op.coefficients for op in found.operations if op.what == "attention mask"]
    assert masks == [32 * 4 * 4, 32] * 2  # V of a step, and what fires by channel, in each of two blocks


def test_an_input_of_a_dct_meets_every_coefficient_of_every_window():
    found = energy.measure(Small(partial(FSTALIF, k=3), T=3), [torch.rand(1, 2, 8, 8)])
    (first, second) = [op for op in found.operations if op.what == "DCT"]
    for op in (first, second):
        assert op.fan_out == op.sums == 9 * 9 == op.multiply_adds / op.inputs, "nine windows, nine frequencies in each"


def test_an_input_of_a_convolution_in_groups_meets_its_own_group_only():
    network = Small(lif, T=1)
    network.one[0][0] = nn.Conv2d(2, 4, 3, 2, padding=1, groups=2)
    network.two[0][0] = nn.Conv2d(4, 6, 3, padding=1, bias=False, groups=2)
    one, two, _ = energy.measure(network, [torch.ones(1, 2, 8, 8)]).operations
    assert (one.fan_out, one.sums) == (2 * 9, 2 * 4)  # 2 of 4 channels; at most 2 x 2 of the windows with a stride of 2
    assert (two.fan_out, two.sums) == (3 * 9, 3 * 9)
    assert one.multiply_adds == 4 * 4 * 4 * 9 and two.multiply_adds == 4 * 4 * 6 * 2 * 9


class Mixing(nn.Module):
    """Each place's 2 channels to 3, by a product that is in no layer."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(3, 2))

    def forward(self, x):
        return torch.einsum("tbchw,dc->tbdhw", x, self.weight)


def test_a_module_of_ones_own_is_counted_and_costs_what_it_reads(monkeypatch):
    rule = energy.Rule("mine", lambda layer, x, y: 2 * y.numel(), lambda layer, x: layer.weight.numel(),
                       lambda layer: len(layer.weight))
    monkeypatch.setitem(energy.COUNTED, Mixing, rule)
    network = Small(lif, T=1)
    network.one.insert(0, Mixing())
    network.one[1][0] = nn.Conv2d(3, 5, 3)
    found = energy.measure(network, [torch.ones(1, 2, 8, 8)])
    (mine,) = [op for op in found.operations if op.what == "mine"]
    assert (mine.name, mine.sees, mine.spikes) == ("one.0", "spikes", 2 * 64)
    assert mine.acs == mine.multiply_adds == 3 * 2 * 64
    met = 2 * 64 * 3  # each spike meets three weights, is added to three potentials, and there is no bias
    pj = {"operations": met * 0.1, "addressing": met * 0.1, "inputs and outputs": 2 * 64 * 4000 / 8192 * 10,
          "weights": met * 6 * 4 / 8192 * 10, "potentials": 2 * met * 3 * 64 * 4 / 8192 * 10}  # 8 kB cost 10 pJ
    assert lemaire.spiking(mine, found) == pytest.approx(pj)
    alone = dataclasses.replace(found, operations=[mine], rates={})
    assert {part: mj * 1e9 for part, mj in lemaire.energy(alone).items()} == pytest.approx(pj)


def test_bn_folded_or_not():
    images = torch.rand(1, 3, 32, 32)
    network = firing(build("vgg13", "lif", T=2, width=1 / 16), images)
    folded, unfolded = (energy.measure(network, [images], bn_folded=choice) for choice in (True, False))
    numbers = 2 * sum(folded.units.values())  # a BN stands in front of every neuron, and nowhere else
    assert unfolded.total("macs") - folded.total("macs") == numbers == unfolded.total("macs", "BN")
    assert all(op.biases for op in folded.operations) and sum(bool(op.biases) for op in unfolded.operations) == 1


def test_the_ann_twin():
    images = torch.rand(1, 3, 32, 32)
    found = energy.measure(energy.ann("resnet20", width=1 / 8), [images])
    spiking = energy.measure(build("resnet20", "lif", T=4, width=1 / 8), [images])
    assert found.total("macs") == found.total("multiply_adds") == spiking.total("multiply_adds") / 4
    assert found.rates == {} and found.T == 1 and found.firing_rate == 0 and found.parameters == spiking.parameters


def test_any_rate_can_be_assumed(paper):
    found = paper[2].at_rate(0.125)
    assert found.firing_rate == 0.125 and found.total("macs") == paper[2].total("macs")
    seen = sum(op.multiply_adds for op in found.operations if op.sees == "spikes")
    assert found.total("acs") == pytest.approx(0.125 * seen) and seen == pytest.approx(0.812e9, abs=0.0005e9)


# SpikingJelly's counters and its profiler, on networks that both can express


@pytest.fixture
def jelly():
    return pytest.importorskip("spikingjelly.activation_based", reason="SpikingJelly 2 is not installed (extra bench)")


def test_spikingjelly_counts_the_same_macs(jelly, paper):
    network, images, found = paper
    macs, acs = energy.spikingjelly(network, images)
    assert macs == found.total("macs") - found.total("macs", "mixing by M and N")  # no matrix product
    assert 0.75 * found.total("acs") < acs < found.total("acs"), "theirs leaves out what zero padding would add"


def test_spikingjelly_counts_the_same_acs_where_there_is_no_padding(jelly):
    network, images = Small(lif, T=3, kernel=1), (torch.rand(4, 2, 8, 8) < 0.3).float()
    network.two[0][0].stride = (1, 1)
    found = energy.measure(network, [images])
    assert energy.spikingjelly(network, images) == pytest.approx((found.total("macs"), found.total("acs")))


def test_the_padding_is_all_the_difference_of_acs(jelly):
    network = Small(lif, T=3)
    found = energy.measure(network, [torch.ones(1, 2, 8, 8)])
    with torch.no_grad():
        network.one[0][0].bias.fill_(-1000.0)  # silent: the image's spikes are all there are
    _, acs = energy.spikingjelly(network, torch.ones(1, 2, 8, 8))
    padded = found.operations[0].acs
    assert padded == 3 * 5 * 2 * (3 * 8) ** 2 and acs == 3 * 5 * 2 * (3 * 8 - 2) ** 2


class JellySmall(nn.Module):
    """`Small` with SpikingJelly's neurons, one time step after the other."""

    def __init__(self, jelly, ours):
        super().__init__()
        self.T = ours.T
        self.conv1, self.conv2, self.head = ours.one[0][0], ours.two[0][0], ours.head
        self.lif1, self.lif2 = (jelly.neuron.LIFNode(tau=4 / 3, decay_input=False) for _ in range(2))

    def forward(self, x):
        steps = [self.head(self.lif2(self.conv2(self.lif1(self.conv1(x)))).mean((-2, -1))) for _ in range(self.T)]
        return torch.stack(steps).mean(0)


@pytest.mark.parametrize("binary", [False, True])
def test_lemaires_model_is_spikingjellys(jelly, binary):
    from spikingjelly.activation_based.op_counter import LemaireEnergyConfig, estimate_lemaire_energy

    ours, image = Small(lif, T=3), torch.rand(1, 2, 40, 40)
    image = image.round() if binary else image
    theirs = JellySmall(jelly, ours).eval()
    torch.testing.assert_close(theirs(image), ours(image))
    jelly.functional.reset_net(theirs)
    report = estimate_lemaire_energy(theirs, image, config=LemaireEnergyConfig())
    found = lemaire.energy(energy.measure(ours, [image]))
    names = {"operations": "ops_pj", "addressing": "addressing_pj", "inputs and outputs": "inout_pj",
             "weights": "params_pj", "potentials": "potential_pj"}
    assert {part: mj * 1e9 for part, mj in found.items()} == pytest.approx(
        {part: report.breakdown_pj[theirs] for part, theirs in names.items()})
    assert all(found.values())


def test_lemaires_formal_network_is_spikingjellys(jelly):
    from spikingjelly.activation_based.op_counter import estimate_lemaire_energy

    ours, image = Small(lambda channels, T: nn.ReLU(), T=1), torch.rand(1, 2, 40, 40)
    theirs = nn.Sequential(ours.one[0][0], ours.two[0][0])
    report = estimate_lemaire_energy(theirs, image)
    found = energy.measure(ours, [image])
    found.operations.pop()  # the head: the profiler has no pooling in front of it
    assert sum(lemaire.energy(found).values()) * 1e9 == pytest.approx(report.total_pj)


def test_an_access_costs_by_the_size_of_its_memory():
    kb = 1024 / lemaire.WORD
    costs = {0: 0, 4 * kb: 5, 8 * kb: 10, 20 * kb: 15, 32 * kb: 20, 528 * kb: 60, 1024 * kb: 100, 5000 * kb: 100}
    assert {words: lemaire.pj_per_access(words) for words in costs} == pytest.approx(costs)


def test_lemaires_attention_costs_what_it_reads_and_writes():
    """By hand for the mixing: it reads X~ and its coefficients, multiplies, and takes the place of the leak."""
    network = Small(NEURONS["staa"], T=1)
    found = energy.measure(network, [torch.rand(1, 2, 8, 8)])
    (mixing,) = [op for op in found.operations if op.name == "one.1"]
    pj = lemaire.formal(mixing, found)
    n = 5 * 8 * 8
    assert pj == pytest.approx({"operations": 2 * n * 3.2, "addressing": 2 * n * 0.1,
                                "inputs and outputs": n * lemaire.pj_per_access(n),
                                "weights": 2 * n * lemaire.pj_per_access(2 * 5)})
    alone = lemaire.energy(energy.Measurement([], found.rates, found.units, 0, 1, 1))
    with_mixing = lemaire.energy(energy.Measurement([mixing], {"one.1": found.rates["one.1"]}, found.units, 0, 1, 1))
    spikes = {name: found.units[name] * rates[0] for name, rates in found.rates.items()}
    assert alone["operations"] * 1e9 == pytest.approx(sum(found.units.values()) * 3.2 + sum(spikes.values()) * 0.1)
    assert with_mixing["operations"] * 1e9 == pytest.approx(2 * n * 3.2 + spikes["one.1"] * 0.1)
    assert set(neurons(network)) == set(found.units)


def test_lemaires_attention_writes_what_its_convolutions_make():
    """By hand for GC's key, 5 channels of 8 x 8 to one; 8 kB cost 10 pJ an access."""
    found = energy.measure(Small(NEURONS["staa"], T=1), [torch.rand(1, 2, 8, 8)])
    (key,) = [op for op in found.operations if op.name == "one.1.gc.key"]
    reads, writes = 5 * 8 * 8, 8 * 8
    pj = (reads * reads + writes * writes) * 4 / 1024 * 10 / 8
    assert lemaire.formal(key, found)["inputs and outputs"] == pytest.approx(pj)


# the way from a finished run to the table and the figures


@pytest.fixture
def config():
    return Config(network="resnet20", neuron="staa", T=2, width=1 / 8, image_size=16, train_images=60, batch_size=20)


def test_trained_is_the_network_that_was_trained(config):
    record = train.run(config, log=lambda line: None)
    network = train.trained(record)
    batches = data.batches(train.evaluation_set(config), 120, shuffle=False)
    found = energy.measure(network, batches)
    assert found.images == record.outcome["test_images"] and found.parameters == record.outcome["parameters"]
    rates = {name: sum(rates) / 2 for name, rates in found.rates.items()}
    assert rates == pytest.approx(record.outcome["firing_rates"], rel=0.02)  # another batch size, other last bits
    with torch.no_grad():
        correct = sum(int((network(x).argmax(1) == y).sum()) for x, y in batches)
    assert 100 * correct / found.images == pytest.approx(record.accuracy, abs=0.6)

    path = records.folder("runs") / config.name / "weights.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:len(whole) // 2] + b"x" + whole[len(whole) // 2 + 1:])
    with pytest.raises(records.RecordError, match="the weights file .* is damaged .* run trains the network anew"):
        train.trained(record)
    path.unlink()
    with pytest.raises(records.RecordError, match="the weights of .* are not there .* STAA_RUNS to an empty folder and STAA_RECORDS"):
        train.trained(record)
    other = dataclasses.replace(config, seed=config.seed + 1)
    with pytest.raises(records.RecordError, match="the weights of .* are not there"):
        experiments.run_all([other, config], networks=True)
    assert records.find(other) is None, "nothing was trained before"


def test_the_grid_is_one_network_with_both_neurons():
    grid = experiments.energy
    for preset, dataset in (("smoke", "digits"), ("short", "cifar100"), ("paper", "cifar100")):
        configs = grid(experiments.Settings(preset, 2, {}))
        assert {(c.network, c.T, c.dataset) for c in configs} == {("resnet20", 4, dataset)}
        assert [(c.neuron, c.seed) for c in configs] == [("staa", 0), ("staa", 1), ("lif", 0), ("lif", 1)]
    (config,) = grid(experiments.Settings("smoke", 1, {"network": "vgg13", "T": 2, "neuron": "lif"}))
    assert (config.network, config.T, config.width, config.image_size) == ("vgg13", 2, 1 / 8, 32)


def test_the_table(paper):
    twin = energy.measure(energy.ann("resnet20"), [paper[1]])
    table = tables.energy({"STAA": paper[2].at_rate(0.125), "ANN": twin}).set_index("One image").T
    assert table.loc["Paper, ResNet-20"].tolist() == [
        "4 steps", "12.69 M", "0.87 G", "0.06 G", "not given", "0.10 G", "not given", "0.366 mJ", "not given"]
    assert table.loc["STAA"].tolist()[:7] == ["4", "12,685,149", "0.871 G", "0.058 G", "0.062 G", "0.101 G", "12.5"]
    assert table.loc["ANN"].tolist()[:8] == [
        "1", "11,247,946", "0.216 G", "0.216 G", "0.216 G", "0", "no spikes", "0.9921"]
    assert float(table.loc["STAA"].iloc[7]) == pytest.approx(0.9 * 0.1015 + 4.6 * 0.06187, abs=2e-4)


def test_at_the_break_even_rate_the_advantage_is_one(paper):
    found, twin = paper[2], energy.measure(energy.ann("resnet20"), [paper[1]])
    even = lemaire.break_even(found, twin)
    alone, memory = lemaire.advantage(found.at_rate(even), twin)
    assert 0.1 < even < 0.2 and memory == pytest.approx(1) and alone > 2
    assert lemaire.advantage(found.at_rate(even / 2), twin)[1] > 1 > lemaire.advantage(found.at_rate(even * 2), twin)[1]


def test_what_real_numbers_add_to_potentials_would_take_the_advantage_away(paper):
    """Where they were charged as spikes are, which read and write a potential for each weight that they meet: `energy`
    tells both numbers, at the rate of the paper's 0.1 G ACs."""
    found, twin = paper[2], energy.measure(energy.ann("resnet20"), [paper[1]])
    found = found.at_rate(0.1e9 / (found.total("multiply_adds") - found.total("macs")))
    ours, goal = (sum(lemaire.energy(measured).values()) for measured in (found, twin))
    added = sum(2 * op.inputs * op.fan_out * lemaire.pj_per_access(op.outputs / found.T) for op in found.operations
                if op.sees == "real numbers" and not op.in_neuron and op.what not in energy.ELEMENTWISE)
    assert round(goal / ours, 2) == 1.12 and round(goal / (ours + 1e-9 * added), 2) == 0.97  # mJ, pJ
    story = (records.ROOT / "notebooks" / "energy.ipynb").read_text()
    assert "the 1.12 below would be 0.97" in story


def test_the_figures_show_what_was_measured(paper):
    found = {"lif": paper[2].at_rate(0.1), "staa": paper[2]}
    *maps, lines, _ = plots.firing(found).axes  # the last one is the colour bar
    for axes, m in zip(maps, found.values()):
        assert axes.collections[0].get_array().data == pytest.approx(100 * torch.tensor(list(m.rates.values())).numpy())
    most = max(rate for m in found.values() for rates in m.rates.values() for rate in rates)
    assert [axes.collections[0].get_clim() for axes in maps] == [pytest.approx((0, 100 * most))] * 2, "one scale"
    for line, m in zip(lines.lines, found.values(), strict=True):
        assert line.get_ydata() == pytest.approx([100 * sum(rates) / m.T for rates in m.rates.values()])
    twin = energy.measure(energy.ann("resnet20"), [paper[1]])
    (axes,) = plots.advantage(found, twin, 0.123).axes
    assert [12.3, 12.3] in [pytest.approx(list(line.get_xdata())) for line in axes.lines], "the rate that is marked"
    memory = [line for line in axes.lines if "STAA, with memory" in line.get_label()][0]
    crossing = np.interp(-1, -memory.get_ydata(), memory.get_xdata())
    assert crossing == pytest.approx(100 * lemaire.break_even(paper[2], twin), abs=0.3)
    plt.close("all")


def test_the_rate_of_a_record_is_that_of_all_its_neurons_together(root, monkeypatch):
    """As `energy.measure` counts it on the network itself, by the equations: a layer counts by its neurons."""
    monkeypatch.setattr(fused, "enabled", False)  # in the run as well, or rounding may cost or add a spike
    config = Config(dataset="digits", image_size=16, width=1 / 16, T=2, train_images=256, batch_size=32, lr=0.02, epochs=2)
    record = train.run(config, device="cpu", workers=0, log=lambda line: None)
    measured = energy.measure(train.trained(record), data.batches(train.evaluation_set(config), 64, shuffle=False))
    assert tables.firing_rate(record) == pytest.approx(measured.firing_rate, rel=1e-6)
    rates = record.outcome["firing_rates"].values()
    assert abs(sum(rates) / len(rates) - measured.firing_rate) > 1e-3
