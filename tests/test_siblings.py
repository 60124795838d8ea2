"""FSTA and STAtten against SciPy, closed forms, explicit loops and the properties that the papers name."""

import math

import matplotlib.pyplot as plt
import numpy as np
import pytest
import scipy.fft
import torch
from test_tables import record
from torch import nn

from staa import (
    LIF,
    NEURONS,
    Config,
    Record,
    build,
    data,
    energy,
    experiments,
    firing_rates,
    fused,
    neurons,
    siblings,
    train,
)
from staa.fsta import DCT, FSTALIF, TemporalAmplitude, dct
from staa.optimizer import new_optimizer
from staa.statten import JointAttention, STAttenLIF, attention_maps, half_threshold


def calibrated(network, x):
    """In evaluation, with the statistics of x in every BN: an untrained network would hardly spike."""
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = None
    with torch.no_grad():
        network.train()(x)
    return network.eval()


def spikes(*shape, rate=0.3):
    return (torch.rand(shape) < rate).float()


# --- FSTA ---

@pytest.mark.parametrize("k", [1, 2, 3, 7, 8])
def test_the_dct_is_orthonormal_and_scipys(k):
    torch.testing.assert_close(dct(k) @ dct(k).T, torch.eye(k))
    expected = scipy.fft.dct(np.eye(k), norm="ortho", axis=0)
    torch.testing.assert_close(dct(k), torch.tensor(expected, dtype=torch.float32))
    layer, x = DCT(k), torch.randn(2, 1, 9, 11)
    y, before = layer(x), (k - 1) // 2
    assert y.shape == (2, k * k, 9, 11)
    window = nn.functional.pad(x, (8,) * 4)[1, 0, 8 + 4 - before:8 + 4 - before + k, 8 + 5 - before:8 + 5 - before + k]
    torch.testing.assert_close(y[1, :, 4, 5].reshape(k, k).numpy(), scipy.fft.dctn(window.numpy(), norm="ortho"),
                               check_dtype=False, atol=1e-5, rtol=1e-5)


def energy_of(image):
    return (dct(image.shape[0]) @ image @ dct(image.shape[1]).T).square()


def test_a_constant_image_has_one_coefficient_and_a_grating_its_own():
    e = energy_of(torch.full((8, 8), 0.5))
    assert e[0, 0] == pytest.approx(16) and e.sum() - e[0, 0] < 1e-9
    rows = (math.pi * 3 * (2 * torch.arange(8) + 1) / 16).cos()  # varies along H: frequency 3 there, 0 along W
    vertical = energy_of(rows[:, None].expand(8, 8))
    assert (vertical > 1e-9).nonzero().tolist() == [[3, 0]]
    assert siblings.vertical_share(vertical) == 1 and siblings.vertical_share(vertical.T) == 0
    assert siblings.vertical_share(vertical + vertical.T) == pytest.approx(0.5)
    assert math.isnan(siblings.vertical_share(torch.ones(1, 1)))


def test_shallow_and_deep_are_the_first_and_the_last_third():
    up, down = torch.zeros(2, 1, 4, 4)
    up[:, 3, 0], down[:, 0, 3] = 1, 1
    layers = [up, up, down, down, up, up + down, torch.ones(1, 1, 1)]  # shares 1, 1, 0, 0, 1, 1/2; a pixel has none
    assert siblings.shallow_and_deep(dict(enumerate(layers))) == (1, 0.75)
    assert siblings.shallow_and_deep({"a": up, "b": down}) == (1, 0)


def test_similarity_is_the_cosine_without_the_mean():
    a, b = torch.zeros(2, 4, 4), torch.zeros(3, 4, 4)
    a[:, 0, 0], a[0, 1, 0], a[1, 1, 0] = 100, 1, 5
    assert siblings.similarity(a) == pytest.approx(1)
    b[0, 1, 0], b[1, 1, 0], b[2, 0, 1] = 1, 1, 1  # pairs: 1, 0, 0
    assert siblings.similarity(b) == pytest.approx(1 / 3)
    assert math.isnan(siblings.similarity(a[:1])) and math.isnan(siblings.similarity(torch.ones(2, 1, 1)))


def test_without_weights_the_temporal_gate_is_a_half_and_else_the_formula_channel_by_channel():
    gate, x = TemporalAmplitude(4), torch.randn(4, 3, 5, 6, 7)
    with torch.no_grad():
        m = 0.5 * x.mean((3, 4)) + 0.5 * x.amax((3, 4))
        expected = torch.einsum("st,tbc->sbc", gate.mix.weight, m).mean(2).sigmoid()
        torch.testing.assert_close(gate(x)[..., 0, 0, 0], expected)
        gate.mix.weight.zero_()
        assert torch.equal(gate(x), torch.full((4, 3, 1, 1, 1), 0.5))


@torch.no_grad()
def test_the_spatial_gate_sees_the_mean_over_time_of_what_the_temporal_gate_passes():
    """Step by step, with torch's own convolutions over the coefficients of the DCT."""
    neuron, x = FSTALIF(5, T=3, k=3, reduction=4), torch.randn(3, 2, 5, 6, 7)
    nn.init.normal_(neuron.temporal.mix.weight)
    first, _, last = neuron.spatial.convolutions
    passed = x * neuron.temporal(x) + x
    fewer = nn.functional.conv2d(neuron.spatial.dct(passed.mean(0).sum(1, keepdim=True)), first.weight, padding=3)
    a = nn.functional.conv2d(fewer.clamp(min=0), last.weight, padding=3).sigmoid()
    assert a.std() > 0.01
    torch.testing.assert_close(neuron.attend(x), (0.6 * passed + 0.5 * (passed * a + passed)) / 2)


def test_with_all_gates_at_a_half_the_current_grows_by_an_eightieth():
    neuron, x = FSTALIF(5, T=4), torch.randn(4, 3, 5, 6, 6)
    with torch.no_grad():
        neuron.temporal.mix.weight.zero_()
        neuron.spatial.convolutions[0].weight.zero_()
        torch.testing.assert_close(neuron.attend(x), (1.5 * 0.6 + 2.25 * 0.5) / 2 * x)


@pytest.mark.parametrize("temporal", [False, True])
@pytest.mark.parametrize("spatial", [False, True])
def test_each_branch_is_a_switch(temporal, spatial):
    neuron, x = FSTALIF(5, T=2, temporal=temporal, spatial=spatial), torch.randn(2, 3, 5, 6, 6)
    names = {name.partition(".")[0] for name, _ in neuron.named_parameters()}
    assert names == {*["temporal"] * temporal, *["spatial", "t", "s"] * spatial}
    factor = neuron.attend(x) / x
    assert (factor.std((2, 3, 4)).max() > 1e-4) == spatial, "only the spatial gate depends on the place"
    torch.testing.assert_close(factor.std(2), torch.zeros(2, 3, 6, 6), atol=1e-4, rtol=0)  # never on the channel
    if not temporal and not spatial:
        plain = LIF(v_th=0.5)  # their threshold is half of V_th
        assert torch.equal(neuron(x), plain(x))


def test_the_surrogate_is_the_scaled_tanhs_derivative():
    for slope, v_th in ((1.0, 1.0), (3.0, 1.0), (3.0, 0.6)):
        u = torch.linspace(-0.5, 1.5, 81, dtype=torch.float64)[1::2]  # away from the corners 0 and v_th
        u = (v_th * u).requires_grad_()
        soft = (torch.tanh(slope * ((u / v_th).clamp(0, 1) - 0.5)) + math.tanh(slope / 2)) / (2 * math.tanh(slope / 2))
        (expected,) = torch.autograd.grad(soft.sum(), u)
        s, _ = FSTALIF(1, T=1, temporal=False, spatial=False, slope=slope, v_th=v_th).fire(u)
        (grad,) = torch.autograd.grad(s.sum(), u)
        torch.testing.assert_close(grad, expected)
        assert torch.equal(s.bool(), u > v_th / 2)


@pytest.mark.parametrize("size", [(1, 1), (1, 3), (2, 2), (5, 4)])
@pytest.mark.parametrize("settings", [{}, {"k": 8}, {"k": 3, "reduction": 4}, {"k": 1}])
def test_every_feature_size_works(size, settings):
    neuron = FSTALIF(4, T=2, **settings)
    out = neuron(3 * torch.randn(2, 3, 4, *size, requires_grad=True))
    out.sum().backward()
    assert out.shape == (2, 3, 4, *size) and set(out.unique().tolist()) <= {0.0, 1.0}
    assert all(p.grad is not None for p in neuron.parameters())


def test_on_one_pixel_only_the_centres_of_window_and_kernel_count():
    neuron, x = FSTALIF(4, T=2), torch.randn(2, 3, 4, 1, 1)
    with torch.no_grad():
        centre = neuron.spatial.convolutions[0].weight[0, :, 3, 3] @ neuron.spatial.dct.basis[:, 24]
        x = x.mean(0).sum(1, keepdim=True)
        torch.testing.assert_close(neuron.spatial(x), (centre * x).sigmoid())


@pytest.mark.parametrize("make, words", [
    (lambda: FSTALIF(4, 2, slope=math.inf), "slope must be a finite number"),
    (lambda: FSTALIF(4, 2, v_th=math.inf), "v_th must be a finite number"),
    (lambda: FSTALIF(4, 2, spatial=False, k=3), r"k is a setting of the spatial branch, which is off \(spatial=False\)"),
    (lambda: FSTALIF(4, 2, spatial=False, reduction=7), "reduction is a setting of the spatial branch, which is off"),
    (lambda: STAttenLIF(tau=math.inf), "tau must be a finite number"),
    (lambda: STAttenLIF(slope=math.nan), "slope must be a finite number")])
def test_settings_that_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_sizes_that_are_no_whole_numbers():
    with pytest.raises(TypeError, match="^k must be a whole number, got 3.5$"):
        FSTALIF(4, 2, k=3.5)


# --- STAtten ---

def test_the_neuron_by_hand_and_its_reset_is_detached():
    neuron, x = STAttenLIF(), torch.tensor([1.5, 2.0, 0.4, -1.0])[:, None].requires_grad_()
    # U = 0.75, 1.375 (fires), 0.2, -0.4
    assert neuron(x).flatten().tolist() == [0, 1, 0, 0]
    u = torch.tensor([0.75, 1.375], requires_grad=True)
    s, hm = neuron.fire(u)
    (grad,) = torch.autograd.grad(s.sum(), u, retain_graph=True)
    y = (4 * (u - 1)).sigmoid()
    torch.testing.assert_close(grad, 4 * y * (1 - y))
    assert torch.autograd.grad(hm.sum(), u)[0].tolist() == [1, 0], "an attached reset would give more"


@pytest.mark.parametrize("name", NEURONS)
def test_half_the_threshold_is_twice_the_current(name):
    x = torch.randn(4, 2, 8, 3, 3)
    if name in ("lif", "statten"):
        assert torch.equal(half_threshold(NEURONS[name](8, T=4))(x), NEURONS[name](8, T=4)(2 * x))
    else:
        neuron = NEURONS[name](8, T=4)
        assert half_threshold(neuron).v_th == 0.5
    assert half_threshold(nn.ReLU())(x).equal(x.relu())
    assert half_threshold(LIF(v_th=1.0, v_reset=-2.0)).v_th == -0.5, "half way from the reset"
    learned = LIF()
    learned.v_th = nn.Parameter(torch.tensor([1.0, 2.0]))
    assert half_threshold(learned).v_th.tolist() == [0.5, 1.0] and isinstance(learned.v_th, nn.Parameter)


@pytest.mark.parametrize("chunk", [1, 2, 4])
def test_linear_attention_is_the_quadratic_form_head_by_head_and_chunk_by_chunk(chunk):
    T, B, C, H, W, heads = 4, 2, 6, 3, 2, 3
    q, k, v = (spikes(T, B, C, H, W) for _ in range(3))
    out = JointAttention(C, heads, chunk)(q, k, v)
    for b in range(B):
        for h in range(heads):
            for t in range(0, T, chunk):
                rows = [x[t:t + chunk, b, 2 * h:2 * h + 2].permute(0, 2, 3, 1).reshape(-1, 2) for x in (q, k, v)]
                expected = (rows[0] @ rows[1].T) @ rows[2]
                part = out[t:t + chunk, b, 2 * h:2 * h + 2].permute(0, 2, 3, 1).reshape(-1, 2)
                assert torch.equal(part, expected)


def test_joint_attention_of_one_step_is_spatial_attention_and_of_two_is_not():
    q, k, v = (spikes(4, 2, 8, 3, 3) for _ in range(3))
    spatial = torch.stack([JointAttention(8, 2, 1)(*(x[t:t + 1] for x in (q, k, v)))[0] for t in range(4)])
    assert torch.equal(JointAttention(8, 2, 1)(q, k, v), spatial)
    assert not torch.equal(JointAttention(8, 2, 2)(q, k, v), spatial)


def test_permuting_the_tokens_permutes_the_output():
    q, k, v = (spikes(4, 2, 8, 3, 3) for _ in range(3))
    joint, order = JointAttention(8, 2, 4), torch.randperm(4 * 9)

    def permuted(x):  # over the tokens of all four steps
        return x.permute(1, 2, 0, 3, 4).flatten(2)[..., order].unflatten(2, (4, 3, 3)).permute(2, 0, 1, 3, 4)

    assert torch.equal(joint(*map(permuted, (q, k, v))), permuted(joint(q, k, v)))
    for name in ("statten-2-256", "sdt-2-256"):  # the whole module knows time but not place
        attention, x = build(name, "statten", width=1 / 16).blocks[0].attention.eval(), 4 * torch.randn(4, 2, 16, 3, 3)
        swap = lambda x: x.flatten(3)[..., [8, 0, 1, 2, 3, 4, 5, 6, 7]].unflatten(3, (3, 3))  # noqa: E731
        torch.testing.assert_close(attention(swap(x)), swap(attention(x)))


@pytest.mark.parametrize("event", [False, True])
def test_the_scale_is_one_over_h_or_for_events_over_h_h_c(event):
    network = build("statten-2-256", "statten", width=1 / 16, network_settings={"event": event}).eval()
    attention, seen = network.blocks[0].attention, {}
    attention.joint.register_forward_hook(lambda _, x, y: seen.update(out=y))
    attention.neuron2.register_forward_pre_hook(lambda _, x: seen.update(current=x[0]))
    attention.neuron2.register_forward_hook(lambda _, x, y: seen.update(fired=y))
    attention.neuron1.register_forward_hook(lambda _, x, y: seen.update(spikes=y))
    attention.project.register_forward_pre_hook(lambda _, x: seen.update(projected=x[0]))
    attention(20 * torch.randn(4, 2, 16, 5, 3))
    torch.testing.assert_close(seen["current"], seen["out"] / (5 * 5 * 2 if event else 5))
    if event:
        p = torch.stack([nn.functional.max_pool2d(s, 3, 1, 1) for s in seen["spikes"]])
        assert torch.equal(seen["projected"], seen["fired"] * p + p) and p.any()
    else:
        assert torch.equal(seen["projected"], seen["fired"])


def test_sdt_masks_queries_by_channel():
    attention, seen = build("sdt-2-256", "statten", width=1 / 16).blocks[0].attention.eval(), {}
    for name in ("q", "k", "v"):
        seen[name] = spikes(4, 2, 16, 3, 3)
        getattr(attention, name).register_forward_hook(lambda _, x, y, name=name: seen[name])
    attention.project.register_forward_pre_hook(lambda _, x: seen.update(out=x[0]))
    attention(torch.randn(4, 2, 16, 3, 3))
    gate = STAttenLIF(v_th=0.5)((seen["k"] * seen["v"]).sum((3, 4)))
    assert torch.equal(seen["out"], seen["q"] * gate[..., None, None]) and 0 < gate.mean() < 1


@pytest.mark.parametrize("event", [False, True])
@pytest.mark.parametrize("name", ["statten-2-256", "sdt-2-256"])
def test_every_weight_layer_receives_spikes(name, event):
    network = build(name, "statten", width=1 / 16, network_settings={"event": event, "pools": "1011"})
    frames = spikes(3, 4, 3, 16, 16) if event else torch.rand(3, 3, 16, 16)
    found = energy.measure(calibrated(network, frames), [frames])
    real = [op.name for op in found.operations if op.sees == "real numbers"]
    assert real == ([] if event else ["embed.0.0"])
    inner = {op.what for op in found.operations if op.name.endswith((".context", ".read"))}
    assert inner == {"attention mask" if name.startswith("sdt") else "attention product"}
    assert len(found.operations) == 5 + 2 * (4 + 2 + 2) + 1
    assert len(found.undecided) <= 2, "an untrained block's attention may fall silent"


def test_joint_attention_takes_as_many_multiply_adds_as_spatial_attention():
    x, found = torch.rand(1, 3, 32, 32), {}
    for chunk in (1, 2, 4):
        network = build("statten-2-256", "statten", width=1 / 8, network_settings={"chunk": chunk})
        found[chunk] = energy.measure(network, [x])
    T, N, C, heads = 4, 64, 32, 8
    assert {m.total("multiply_adds", "attention product") for m in found.values()} == {2 * 2 * T * N * C * C / heads}
    assert len({m.total("multiply_adds") for m in found.values()}) == 1
    assert len({m.parameters for m in found.values()}) == 1


@pytest.mark.parametrize("name", ["statten-2-256", "sdt-2-256"])
def test_of_events_queries_keys_and_values_spread_to_their_neighbours(name):
    attention, seen = build(name, "statten", width=1 / 16, network_settings={"event": True}).blocks[0].attention.eval(), []
    pixel, square = torch.zeros(2, 4, 2, 16, 5, 6)
    pixel[..., 2, 4], square[..., 1:4, 3:6] = 1, 1
    for layer in (attention.q, attention.k, attention.v):
        layer.register_forward_hook(lambda *_: pixel)
    for layer in [attention.joint] if attention.joint else [attention.context, attention.read]:
        layer.register_forward_pre_hook(lambda _, operands: seen.extend(operands))
    attention(torch.randn(4, 2, 16, 5, 6))
    assert len(seen) >= 3 and all(torch.equal(x, square) for x in seen[:3])


@pytest.mark.parametrize("name", ["statten-2-256", "sdt-2-256"])
def test_where_every_branch_gives_zero_the_embedding_reaches_the_end(name):
    network, seen, x = build(name, "statten", T=2, width=1 / 16), {}, torch.rand(3, 3, 16, 16)
    calibrated(network, x)
    for branch in (network.position[-1], *(b for block in network.blocks for b in (block.attention.project, block.mlp[-1]))):
        nn.init.zeros_(branch[-1].weight)
    network.embed.register_forward_hook(lambda _, x, y: seen.update(embedded=y))
    network.last.register_forward_pre_hook(lambda _, x: seen.update(end=x[0]))
    network(x)
    assert torch.equal(seen["end"], seen["embedded"].mean((-2, -1), keepdim=True)) and seen["end"].std() > 0


def test_published_sizes_by_counting():
    def count(dim, depth, classes):
        stem = 9 * (3 * dim // 8 + dim // 8 * dim // 4 + dim // 4 * dim // 2 + dim // 2 * dim + dim * dim)
        norms = 2 * (dim // 8 + dim // 4 + dim // 2 + dim + dim)
        block = 4 * (dim * dim + 2 * dim) + 2 * 4 * dim * dim + 2 * 4 * dim + 2 * dim
        return stem + norms + depth * block + dim * classes + classes

    for name, dim, depth in (("statten-2-256", 256, 2), ("sdt-2-512", 512, 2), ("statten-8-768", 768, 8)):
        with torch.device("meta"):
            assert sum(p.numel() for p in build(name, "statten").parameters()) == count(dim, depth, 10)


def test_attention_maps_are_what_the_output_is_made_of():
    network = build("statten-2-256", "statten", width=1 / 8, network_settings={"pools": "0011", "chunk": 2})
    x = torch.rand(2, 3, 16, 16)
    calibrated(network, x)
    joint, seen = network.blocks[1].attention.joint, []
    joint.register_forward_pre_hook(lambda _, qkv: seen.extend(qkv))
    maps = attention_maps(network, x)
    assert [tuple(m.shape) for m in maps] == [(2, 2, 32, 32)] * 2 and maps[1].sum() > 0
    q, k = (s.unflatten(0, (2, 2)).permute(2, 0, 1, 4, 5, 3).flatten(2, 4) for s in seen[:2])  # (B, T/c, c N, C)
    torch.testing.assert_close(maps[1], q @ k.transpose(-2, -1) / 8)  # all channels at once, over 8 heads
    assert not joint.context._forward_pre_hooks


def test_firing_rates_see_every_neuron_of_a_transformer():
    network, x = build("statten-2-256", "statten", T=2, width=1 / 16), torch.rand(2, 3, 16, 16)
    calibrated(network, x)
    with firing_rates(network) as rates, torch.no_grad():
        network(x)
    assert set(rates()) == set(neurons(network)) and all(0 <= rate <= 1 for rate in rates().values())


def test_fstas_operations_by_hand_and_by_torch():
    network, x = build("resnet19", "fsta", T=2, width=1 / 16, k=3, reduction=2), torch.rand(1, 3, 8, 8)
    found = energy.measure(calibrated(network, torch.rand(4, 3, 8, 8)), [x])
    sizes = [(8, 8 * 8)] * 7 + [(16, 4 * 4)] * 6 + [(32, 2 * 2)] * 4
    assert found.total("multiply_adds", "DCT") == sum(81 * hw for _, hw in sizes)
    assert found.total("multiply_adds", "gates of FSTA") == sum(4 * 2 * c * hw for c, hw in sizes)
    inside = [op for op in found.operations if op.in_neuron and op.what == "convolution"]
    assert sum(op.multiply_adds for op in inside) == sum((9 * 4 + 4) * 49 * hw for _, hw in sizes)
    assert all(op.sees == "real numbers" for op in inside)


# --- the sequential task, the optimizer, the grids ---

def test_rows_show_each_row_once_and_in_its_place():
    image = torch.rand(1, 8, 8)
    frames = data.Rows(4)(image)
    assert frames.shape == (4, 1, 8, 8) and torch.equal(frames.sum(0), image)
    for t in range(4):
        assert torch.equal(frames[t, :, 2 * t:2 * t + 2], image[:, 2 * t:2 * t + 2])
    digits, rows = (data.transform(name, 8, T=4)(data.Digits(True)[0][0]) for name in ("digits", "digits-rows"))
    black = -0.30518 / 0.37599
    torch.testing.assert_close((rows - black).sum(0), digits - black)


def test_one_step_of_the_rows_does_not_suffice():
    from sklearn.linear_model import LogisticRegression

    digits = data.Digits(True), data.Digits(False)
    x, y = ([np.asarray(d.data, float).reshape(-1, 8, 8) / 255, d.targets] for d in digits)
    scores = [LogisticRegression(max_iter=200).fit(x[0][:, t], x[1]).score(y[0][:, t], y[1]) for t in range(8)]
    whole = LogisticRegression(max_iter=200).fit(x[0].reshape(-1, 64), x[1]).score(y[0].reshape(-1, 64), y[1])
    assert max(scores) < 0.65 and whole > 0.9


def test_adamw_takes_momentum_as_its_first_beta():
    layer = nn.Linear(2, 1)
    optimizer = new_optimizer(Config(optimizer="adamw", momentum=0.8, lr=0.1, weight_decay=0.01), layer.parameters())
    (group,) = optimizer.param_groups
    assert isinstance(optimizer, torch.optim.AdamW)
    assert (group["betas"], group["lr"], group["weight_decay"]) == ((0.8, 0.999), 0.1, 0.01)


@pytest.mark.parametrize("preset", ["smoke", "paper"])
def test_the_grids_differ_in_the_compared_thing_only_and_share_their_runs(preset):
    asked = experiments.Settings(preset, 1, {})
    fsta, statten, rows = (grid(asked) for grid in (experiments.fsta, experiments.statten, experiments.rows))
    assert len(set(fsta)) == 8 and len(set(statten)) == len(set(rows)) == 6, "two seeds at least"
    compared = {"neuron", "network", "neuron_settings", "network_settings", "seed"}
    for grid in (fsta, statten, rows):
        assert len({str({k: v for k, v in vars(c).items() if k not in compared}) for c in grid}) == 1
    for grid, chunk in ((statten, 2), (rows, 8)):
        assert {c.network_settings.get("chunk") for c in grid} == {chunk, 1, None}
        assert len({(c.neuron, c.network_settings["pools"]) for c in grid}) == 1
    found = experiments.siblings(asked)
    assert set(found) < {*fsta, *statten} and len(found) == 6
    assert len({(c.dataset, c.epochs, c.T, c.image_size, c.train_images) for c in found}) == 1


def test_every_run_of_a_grid_has_its_systems_name():
    asked = experiments.Settings("smoke", 2, {})
    for grid, names in ((experiments.fsta, ["LIF", "FSTA's LIF", "FSTA", "STAA"]),
                        (experiments.statten, ["joint, c = 2", "spatial, c = 1", "SDT"]),
                        (experiments.rows, ["joint, c = 8", "spatial, c = 1", "SDT"])):
        found = siblings.groups([Record(vars(config), {}, {}) for config in grid(asked)])
        assert {name: [run.config["seed"] for run in runs] for name, runs in found.items()} == dict.fromkeys(names, [0, 1])


def test_a_million_macs_are_4_6_microjoules():
    macs = energy.Operation("head", "linear", False, 1, 1, 0, multiply_adds=1e6, inputs=1, binary=False)
    run = Record(vars(Config()), {"epochs": [{"test_accuracy": 50.0}]}, {"seconds_per_epoch": [3.0, 4.0], "device": "x"})
    (row,) = siblings.table({"STAA": [(run, energy.Measurement([macs], {}, {}, 1234, 4, 1))]}).to_dict("records")
    assert (row["Energy, µJ"], row["Parameters"], row["Training, s"]) == ("4.60", "1,234", "7")


def test_a_row_has_all_multiply_adds_the_firing_rate_in_percent_and_the_energy_over_seeds():
    """Of 1 M multiply-adds of real numbers and 2 M of spikes at rates 1/2 and 1: 4.6 and 0.9 or 1.8 microjoules. Three
    neurons of four fire at 0.3 (0.4), one at 0.1 (0.2)."""
    pairs = []
    for seed, (spikes, a, b) in enumerate([(2, [0.2, 0.4], [0.1, 0.1]), (4, [0.4, 0.4], [0.2, 0.2])]):
        real = energy.Operation("stem", "convolution", False, 1, 1, 0, multiply_adds=1e6, inputs=1, binary=False)
        binary = energy.Operation("head", "linear", False, 1, 1, 0, multiply_adds=2e6, inputs=4, spikes=spikes)
        made = record(60.0 + 2 * seed, seed=seed, network="vgg13")
        run = Record(made.config, made.outcome, {"seconds_per_epoch": [3.0, 4.0 + 2 * seed], "device": "x"})
        pairs.append((run, energy.Measurement([real, binary], {"a": a, "b": b}, {"a": 3, "b": 1}, 1234, 2, 1)))
    (row,) = siblings.table({"LIF": pairs}).to_dict("records")
    assert row == {"System": "LIF", "Network": "VGG-13", "Test accuracy, %": "61.00 ± 1.41 (n=2)",
                   "Parameters": "1,234", "Multiply-adds": "3.00 M", "Firing rate, %": "30.0 ± 7.1",
                   "Energy, µJ": "5.95 ± 0.64", "Training, s": "8 ± 1"}


@pytest.mark.parametrize("neuron, own, label", [
    ("lif", {}, "LIF"), ("staa", {}, "STAA"), ("fsta", {}, "FSTA"),
    ("fsta", dict(temporal=False, spatial=False, slope=3.0), "FSTA's LIF")])
def test_a_row_is_named_after_its_neuron(neuron, own, label):
    assert siblings.label(record(50.0, network="resnet20", neuron=neuron, neuron_settings=own)) == label
    assert dict(experiments.FSTA)[label] == (neuron, own)


def test_six_seeds_that_agree_settle_a_claim_and_five_do_not():
    """Heads or tails only: 2 of 32 and 2 of 64 outcomes."""
    runs = [record(accuracy, seed=seed) for seed in range(6) for accuracy in (50.0, 60.0)]
    assert siblings.decided(runs[:10]) == ("That all 5 seeds agree on a sign happens by chance with probability 0.062: "
                                           "where they do, it does not settle a claim.")
    assert siblings.decided(runs) == ("That all 6 seeds agree on a sign happens by chance with probability 0.031: "
                                      "where they do, it settles a claim.")


def test_two_rows_are_compared_seed_by_seed_after_the_last_epoch():
    first, second = ([record(accuracy, seed=seed) for seed, accuracy in found]
                     for found in ([(0, 10.0), (1, 20.0), (2, 30.0)], [(2, 31.0), (1, 19.0), (0, 10.0)]))
    assert siblings.by_seed(first) == {0: 10.0, 1: 20.0, 2: 30.0}, "of the first epoch it is 99"
    assert siblings.against("Accuracy", siblings.by_seed(first), siblings.by_seed(second), ".1f") == (
        "Accuracy: 20.0 ± 10.0 against 20.0 ± 10.5; higher in 1 of 3 seeds")
    assert siblings.against("Rate", {0: 2.0, 1: 3.0}, {0: 1.0, 1: 1.0}).endswith("higher in 2 of 2 seeds")


def test_the_figure_draws_shares_cosines_and_firing_rates_in_percent_by_layer():
    """A map of 4 x 4 with 8 and 4 spikes in its two steps fires at 6 / 16."""
    up, both, pixel = torch.zeros(2, 4, 4), torch.zeros(2, 4, 4), torch.tensor([[[1.0]], [[0.5]]])
    up[0, 3, 0], up[1, 3, 0] = 8, 4
    both[0, 1, 0], both[1, 0, 1] = 2, 2
    figure = siblings.figure_fsta({"LIF": {"a": up, "b": both, "c": pixel}, "STAA": {"a": both, "b": up, "c": pixel}})
    drawn = [{line.get_label(): line.get_ydata() for line in axes.lines} for axes in figure.axes]
    for found, (a, b, c) in zip(drawn, ((100, 50, math.nan), (1, 0, math.nan), (37.5, 12.5, 75))):
        assert list(found["LIF"]) == pytest.approx([a, b, c], nan_ok=True)
        assert list(found["STAA"]) == pytest.approx([b, a, c], nan_ok=True)
    plt.close(figure)


def test_a_zero_inside_a_chunk_is_drawn_and_only_what_lies_outside_is_white():
    """Two steps of two tokens: joined, one chunk of 4 x 4; by themselves, two of 2 x 2 on the diagonal."""
    joint = [torch.zeros(1, 4, 4), torch.zeros(1, 4, 4)]
    joint[1][0, 0, 3] = 6
    spatial = [torch.tensor([[[1.0, 0.0], [3.0, 0.0]], [[0.0, 0.0], [5.0, 7.0]]])]
    figure = siblings.figure_attention(torch.rand(2, 8, 8), {"joint": joint, "spatial": spatial}, 2)
    left, right = (axes.images[0].get_array() for axes in figure.subfigs[1].axes[:2])
    assert not np.ma.getmaskarray(left).any() and left[0, 3] == pytest.approx(3), "the mean over two blocks"
    assert np.ma.getmaskarray(right).tolist() == [[False, False, True, True]] * 2 + [[True, True, False, False]] * 2
    assert right.compressed() == pytest.approx(np.array([1, 0, 3, 0, 0, 0, 5, 7]), abs=1e-6)
    plt.close(figure)


def test_a_readers_size_is_the_size_of_all_transformers():
    configs = experiments.rows(experiments.Settings("smoke", 1, {"network": "statten-2-512", "T": 2, "epochs": 1}))
    assert {c.network for c in configs} == {"statten-2-512", "sdt-2-512"} and {c.T for c in configs} == {2}
    assert {c.network_settings.get("chunk") for c in configs} == {2, 1, None}


def test_spectra_have_the_energy_of_the_spikes():
    network, x = build("resnet19", "lif", T=2, width=1 / 16), torch.rand(4, 3, 8, 8)
    calibrated(network, x)
    with firing_rates(network) as rates, torch.no_grad():
        network(x)
    found = siblings.spectra(network, [(x[:3], None), (x[3:], None)])
    mean = {name: float(e.sum((1, 2)).mean()) / e[0].numel() for name, e in found.items()}
    assert mean == pytest.approx(rates(), rel=1e-4) and list(found) == list(neurons(network))


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_an_interrupted_transformer_continues_with_adamw_on_rows(precision, tmp_path, monkeypatch):
    config = Config(dataset="digits-rows", image_size=8, T=2, network="statten-2-256", neuron="statten", width=1 / 16,
                    network_settings={"pools": "0011"}, optimizer="adamw", lr=3e-3, epochs=2, train_images=64,
                    batch_size=32, precision=precision)

    def interrupt(line):
        if "epoch 1/" in line:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train.run(config, device="cpu", log=interrupt)
    continued = train.run(config, device="cpu", log=lambda line: None)
    monkeypatch.setenv("STAA_RUNS", str(tmp_path / "others"))
    undisturbed = train.run(config, device="cpu", log=lambda line: None)
    assert continued.outcome == undisturbed.outcome and len(continued.outcome["epochs"]) == 2
    assert continued.config["network_settings"] == {"heads": 8, "chunk": 2, "pools": "0011", "event": False}


@pytest.mark.parametrize("k", [3, 7, 8])
def test_fsta_on_a_gpu_takes_convolutions_that_give_the_same(monkeypatch, k):
    """`unfold`, and the gradient of `fold`, start a kernel for each image there."""
    torch.manual_seed(0)
    layer, x = FSTALIF(3, 2, k=k).double(), torch.randn(2, 4, 3, 9, 11, dtype=torch.float64)

    def outcome():
        layer.zero_grad()
        y = layer.attend(x.clone().requires_grad_())
        y.square().sum().backward()
        return y.detach(), {name: p.grad.clone() for name, p in layer.named_parameters()}

    here = outcome()
    monkeypatch.setattr(fused, "on_gpu", lambda x: True)
    monkeypatch.setattr(torch.nn.functional, "unfold", None)
    monkeypatch.setattr(torch.nn.functional, "fold", None)
    there = outcome()
    torch.testing.assert_close(there, here)
