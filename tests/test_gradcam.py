"""Grad-CAM against its formula written out, and the pictures of events."""

import base64
import io
import re

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from staa import LIF, build, gradcam, neurons, plots
from staa.frames import to_frames
from staa.simulator import EVENT

T = 3


@pytest.fixture(params=["lif", "staa"])
def network(request):
    found = build("vgg13", request.param, 10, T, 2, 1 / 8)
    for layer in found.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            torch.nn.init.constant_(layer.bias, 0.7)  # so that it fires at every depth
    return found.eval()


def test_a_map_is_the_formula(network):
    x, target = 3 * torch.rand(2, T, 2, 32, 32), torch.tensor([1, 7])
    layers = gradcam.depths(network, 3)
    spikes = {}
    hooks = [layer.register_forward_hook(lambda m, i, out, label=label: spikes.update({label: out}))
             for label, layer in layers.items()]
    logits = network(x)
    chosen = logits[0, 1] + logits[1, 7]
    gradients = torch.autograd.grad(chosen, list(spikes.values()))
    for hook in hooks:
        hook.remove()
    found = gradcam.maps(network, x, target, layers)
    assert found.keys() == layers.keys() and any(cam.any() for cam in found.values())
    for (label, s), gradient in zip(spikes.items(), gradients):
        weights = gradient.mean((-2, -1))  # (T, B, C)
        cam = torch.einsum("tbc,tbchw->bhw", weights, s).relu()
        expected = torch.nn.functional.interpolate(cam[:, None], (32, 32), mode="bilinear")[:, 0]
        torch.testing.assert_close(found[label], expected.detach())


def test_it_leaves_the_network_as_it_was(network):
    x, before = torch.rand(1, T, 2, 32, 32), {k: v.clone() for k, v in network.state_dict().items()}
    gradcam.maps(network, x, torch.tensor([0]), gradcam.depths(network, 2))
    assert not network.training and all(torch.equal(v, before[k]) for k, v in network.state_dict().items())
    assert not any(layer._forward_hooks for layer in network.modules())
    assert all(p.grad is None for p in network.parameters())


def test_depths_are_spread_and_end_with_the_last():
    network = build("vgg13", "lif", 10, T, 2, 1 / 32)
    layers = list(neurons(network).values())
    assert list(gradcam.depths(network, 5).values()) == layers[1::2]
    assert list(gradcam.depths(network, 10)) == [f"layer {i} of 10" for i in range(1, 11)]
    for count in (0, 11):
        with pytest.raises(ValueError, match="count must be between 1 and the network's 10 spiking layers"):
            gradcam.depths(network, count)


def test_a_layer_without_places_is_refused_in_one_sentence():
    class Tail(torch.nn.Module):
        def __init__(self, channels, T):
            super().__init__()
            self.lif = LIF()

        def forward(self, x):
            return self.lif(x.mean((-2, -1)))[..., None, None].expand_as(x) + 0 * x
    network = build("vgg13", "lif", 10, T, 2, 1 / 8)
    network.stages.append(Tail(network.head.in_features, T))
    with pytest.raises(ValueError, match="whose spikes have places, .* the last has none$"):
        gradcam.maps(network, torch.rand(1, 2, 32, 32), torch.tensor([1]), {"the last": network.stages[-1].lif})


def test_the_share_is_mass_on_the_mask_over_mass():
    mask = torch.zeros(3, 4, 4, dtype=torch.bool)
    mask[:, :2] = True
    cam = torch.stack([torch.ones(4, 4), torch.arange(16.0).view(4, 4), torch.zeros(4, 4)])
    share = gradcam.share(cam, mask)
    assert share[:2].tolist() == pytest.approx([0.5, sum(range(8)) / sum(range(16))]) and share[2].isnan()
    with pytest.raises(ValueError, match="of one shape"):
        gradcam.share(cam, mask[:2])


def events():
    rng = np.random.default_rng(0)
    found = np.zeros(8000, EVENT)
    for name, top in (("x", 34), ("y", 34), ("t", 300_000), ("p", 2)):
        found[name] = rng.integers(0, top, len(found))
    found["t"].sort()
    return found


def test_polarities_are_two_colours_on_white_that_differ_in_greyscale():
    frame = np.zeros((2, 3, 3))
    frame[0, 0, 0], frame[1, 1, 1] = 5, 5
    image = plots.polarity(frame, 5)
    grey = image @ [0.299, 0.587, 0.114]
    assert grey[2, 2] == pytest.approx(1) and grey[0, 0] < 0.45 < 0.55 < grey[1, 1] < 0.75


def test_events_are_shown_as_frames_as_a_cloud_and_as_a_small_animation():
    from PIL import Image

    plots.style()
    frames = to_frames(events(), 16, "count", 34, 34)
    figure = plots.event_frames(frames)
    assert len(figure.axes) == 16
    cloud = plots.event_cloud(events(), 34)
    assert sum(len(c.get_offsets()) for c in cloud.axes[0].collections) == 4000
    for most, shown in ((3999, 2667), (2000, 2000), (1, 1)):
        again = plots.event_cloud(events(), 34, most)
        assert sum(len(c.get_offsets()) for c in again.axes[0].collections) == shown
    html = plots.event_animation(frames).data
    assert len(html) < 500_000
    gif = Image.open(io.BytesIO(base64.b64decode(re.search(r"base64,([^\"]+)", html)[1])))
    assert gif.n_frames == 16 and gif.size == (204, 204)
    cams = {name: {"layer 1 of 2": np.random.rand(34, 34), "layer 2 of 2": np.zeros((34, 34))}
            for name in ("lif", "staa")}
    figure = plots.grad_cam(frames, cams, np.eye(34) > 0)
    assert len([axes for sub in figure.subfigs for axes in sub.axes]) == 16 + 4
    for shown in (figure, cloud):
        shown.savefig(io.BytesIO(), format="png")
    plt.close("all")


def test_the_cloud_has_both_polarities_and_y_from_above():
    found = events()[:7999]
    found["p"][:100] = 1
    (axes,) = plots.event_cloud(found, 34, len(found)).axes
    assert axes.get_zlim() == (34, 0)
    shown = {points.get_label(): len(points.get_offsets()) for points in axes.collections}
    assert shown == {"darker": (found["p"] == 0).sum(), "brighter": (found["p"] == 1).sum()}
    plt.close("all")


def test_full_colour_is_for_one_of_ten_pixels_with_events():
    frames = np.zeros((4, 2, 5, 5), np.int16)
    assert plots.bright(frames) == 1
    frames[:, 0, :2] = np.arange(1, 41).reshape(4, 2, 5)
    assert (frames[frames > 0] > plots.bright(frames)).mean() == 0.1


def test_frames_are_numbered_from_one_and_the_animation_loops():
    from PIL import Image

    frames = np.random.default_rng(0).poisson(1, (5, 2, 8, 8))
    assert [axes.get_title() for axes in plots.event_frames(frames).axes] == [*(f"t = {t}" for t in range(1, 6)), ""]
    html = plots.event_animation(frames).data
    gif = Image.open(io.BytesIO(base64.b64decode(re.search(r"base64,([^\"]+)", html)[1])))
    assert (gif.info["loop"], gif.info["duration"], gif.size) == (0, 100, (200, 200))
    plt.close("all")


def test_each_map_has_its_own_scale_the_columns_a_title_and_the_rows_a_label():
    rng = np.random.default_rng(0)
    cams = {label: {"first": 0.01 * rng.random((9, 9)), "last": 7 * rng.random((9, 9))} for label in ("A", "B")}
    outline = np.zeros((9, 9), bool)
    outline[5:8, 1:4] = True
    axes = plots.cam_rows(cams, outline).axes
    assert [a.get_title() for a in axes] == ["first", "last", "", ""]
    assert [a.get_ylabel() for a in axes] == ["A", "", "B", ""]
    for a, cam in zip(axes, [cam for row in cams.values() for cam in row.values()], strict=True):
        assert a.images[0].get_clim() == (0, cam.max())
        (line,) = a.collections
        vertices = line.get_paths()[0].vertices
        assert (vertices.min(0).tolist(), vertices.max(0).tolist()) == ([0.5, 4.5], [3.5, 7.5]), "around the object"
    plt.close("all")
