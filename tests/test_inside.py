"""Looking inside a network: what the table counts, what the figure draws, and what the board shows."""

import io
import math
import re

import numpy as np
import pytest
import torch
from PIL import Image

import staa
from staa import inside, plots, sliders


@pytest.fixture(scope="module")
def network():
    """A small STAA network whose blocks do something."""
    torch.manual_seed(0)
    network = staa.build("resnet20", width=1 / 8, T=2)
    for name, parameter in network.named_parameters():
        if ".value." in name or ".excite." in name or "pe_input" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    with torch.no_grad():
        network.train()(torch.rand(16, 3, 16, 16))  # BN has seen something, so that deep layers fire
    return network.eval()


@pytest.fixture(scope="module")
def images():
    torch.manual_seed(1)
    return torch.rand(3, 3, 16, 16)


def test_k_is_spread_over_all_places_or_over_one():
    assert inside.focus(torch.full((2, 3, 4, 4), 1 / 16)) == pytest.approx(1)
    assert inside.focus(torch.eye(16)[:6].view(2, 3, 4, 4)) == pytest.approx(1 / 16)
    two = torch.zeros(1, 1, 4, 4)
    two[0, 0, 0, :2] = 0.5
    assert inside.focus(two) == pytest.approx(2 / 16)


def test_a_layer_counts_by_its_neurons():
    seen = {"large": {"S": torch.zeros(2, 5, 3, 4, 4)}, "small": {"S": torch.zeros(2, 5, 6, 2, 2)}}  # 48 neurons, 24
    assert inside.weighted([1.0, 4.0], seen) == pytest.approx(2.0)


def test_nine_tenths_of_the_neurons_by_hand():
    """A layer of 16 places whose M are 1, and one of a single place whose M go from 0 to 2."""
    large = {"M": torch.ones(1, 1, 10), "S": torch.zeros(1, 1, 10, 4, 4)}          # 160 neurons
    small = {"M": torch.linspace(0, 2, 41).view(1, 1, 41), "S": torch.zeros(1, 1, 41, 1, 1)}
    assert inside.nine_tenths([small]) == pytest.approx((0.1, 1.9))                # the third and the third last of 41
    low, high = inside.nine_tenths([large, small])                                 # 5 % of 201 are 10.05: the eleventh
    assert (low, high) == pytest.approx((0.5, 1.5))


def test_the_table_holds_what_firing_rates_and_gates_say(network, images):
    found = inside.measure(network, images)
    lif = staa.build("resnet20", "lif", width=1 / 8, T=2).eval()
    table = inside.table({"STAA": found, "LIF": inside.measure(lif, images)}).set_index("Network")
    with staa.firing_rates(network) as rates, torch.no_grad():
        network(images)
    sizes = [of["S"][0, 0].numel() for of in found[0].values()]
    assert table.loc["STAA", "Firing rate, %"] == f"{100 * np.average(list(rates().values()), weights=sizes):.1f}"
    gates = np.concatenate([np.broadcast_to(of["M"].numpy()[..., None, None], of["S"].shape).ravel() for of in found[0].values()])
    low, high = np.quantile(gates, [0.05, 0.95], method="inverted_cdf")  # every neuron's M, one by one
    assert table.loc["STAA", "M"] == f"{low:.2f} to {high:.2f}" and 0 < low < high < 2
    assert 0 < float(table.loc["STAA", "SA, over images"]) < float(table.loc["STAA", "GC"]) < 100
    assert set(table.loc["LIF"]) - {table.loc["LIF", "Firing rate, %"]} == {"off"}


def test_the_figure_draws_every_part_of_every_network(network, images):
    plots.style()
    seen, parts = inside.measure(network, images)
    lif = inside.measure(staa.build("resnet20", "lif", width=1 / 8, T=2).eval(), images)
    figure = inside.figure({"STAA": (seen, parts), "LIF": lif})
    above, _, below, _ = figure.axes
    lines = {line.get_label(): line.get_ydata() for line in above.lines}
    assert list(lines) == list(inside.PARTS)
    figure.canvas.draw()
    for part, drawn in lines.items():
        expected = np.array([100 * of[part] for of in parts.values()])
        np.testing.assert_array_equal(drawn, np.where(expected, expected, np.nan))  # 0 has no place on a log axis
    np.testing.assert_allclose(below.lines[0].get_ydata(), [np.median(of["M"]) for of in seen.values()], rtol=1e-6)
    for band, (low, high) in zip(below.collections, ((0, 1), (0.05, 0.95))):
        y = band.get_paths()[0].vertices[:, 1]
        ends = {q: [float(np.quantile(of["M"], q)) for of in seen.values()] for q in (low, high)}
        assert y.min() == pytest.approx(min(ends[low]), rel=1e-6) and y.max() == pytest.approx(max(ends[high]), rel=1e-6)
    assert [text.get_text() for text in figure.legends[0].texts] == list(inside.PARTS)


@pytest.fixture
def board(network, images, monkeypatch):
    shown = []
    monkeypatch.setattr(sliders, "show", shown.append)
    plots.style()
    pictures = [Image.fromarray((255 * x).permute(1, 2, 0).byte().numpy()) for x in images]
    return inside.board(network, images, pictures), shown


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"), int)


def test_the_board_says_what_the_chosen_neuron_computed(network, images, board):
    redraw, shown = board
    _, caption = redraw(image=3, layer=4, t=2, channel=2, row=0.3, column=0.99)
    name = list(staa.neurons(network))[3]
    of = inside.look(network, images)[name]
    h, w = math.floor(0.3 * of["X"].shape[3]), of["X"].shape[4] - 1
    at = {symbol: float(of[symbol][1, 2, 1, h, w]) for symbol in ("X~", "U")}
    gate = {symbol: float(of[symbol][1, 2, 1]) for symbol in ("v", "M", "N")}
    assert caption == (f"{name}, channel 2 of {of['X'].shape[2]}, t = 2: PE {of['PE'][1, 1]:.2f}, v {gate['v']:.2f}, "
                       f"M {gate['M']:.2f}, N {gate['N']:.2f}, X~ {at['X~']:.2f}, U {at['U']:.2f}; "
                       f"fires at {100 * of['S'][1, 2, 1].mean():.0f} %")
    assert shown[0].keys() == {"image/png", "text/plain"}


def test_every_slider_of_the_board_moves_the_picture_and_back(board):
    def maps(png):
        """The maps alone: the lines below them move in any case."""
        picture = pixels(png)
        return picture[:len(picture) * 2 // 5]

    redraw, _ = board
    start = redraw()[0]
    for moved, back in ((dict(image=2), dict(image=1)), (dict(layer=9), dict(layer=1)), (dict(t=2), dict(t=1)),
                        (dict(channel=3), dict(channel=1)), (dict(row=0.1), dict(row=0.5)), (dict(column=0.9), dict(column=0.5))):
        assert (maps(redraw(**moved)[0]) != maps(start)).any(), moved
        assert redraw(**back)[0] == start, "something of an earlier drawing is left"


def test_a_channel_that_a_layer_lacks_is_its_last_one(network, board):
    redraw, _ = board
    widths = [neuron.channels for neuron in staa.neurons(network).values()]
    assert redraw(layer=1, channel=max(widths))[1].startswith(f"stem.1, channel {widths[0]} of {widths[0]}, ")


def test_the_board_draws_what_was_traced(network, images):
    """Every map and every line, at a place off the middle."""
    name, of = list(inside.look(network, images).items())[9]
    board = inside.Board(inside.look(network, images), dict.fromkeys(staa.neurons(network), 0.75), images.permute(0, 2, 3, 1))
    board.update(image=2, layer=10, t=2, channel=5, row=0.8, column=0.2)
    for symbol in ("X", "X~", "U", "S"):
        np.testing.assert_array_equal(board.maps[symbol].get_array(), of[symbol][1, 1, 4])
    np.testing.assert_allclose(board.maps["k"].get_array(), of["k"][1, 1] * of["k"][0, 0].numel())
    np.testing.assert_array_equal(board.maps["image"].get_array(), images[1].permute(1, 2, 0))
    h, w = int(0.8 * of["X"].shape[3]), int(0.2 * of["X"].shape[4])
    u, hm = (of[symbol][:, 1, 4, h, w].tolist() for symbol in ("U", "Hm"))
    assert board.lines["U"].get_xydata().tolist() == [[1, u[0]], [1, hm[0]], [2, u[1]], [2, hm[1]]]
    for symbol, values in (("X~", of["X~"][:, 1, 4, h, w]), ("M", of["M"][:, 1, 4]), ("N", of["N"][:, 1, 4])):
        assert board.lines[symbol].get_xydata().tolist() == [[1, float(values[0])], [2, float(values[1])]]
    assert set(board.lines["threshold"].get_ydata()) == {0.75}


def test_a_board_of_lif_neurons_leaves_attention_empty(images, monkeypatch):
    monkeypatch.setattr(sliders, "show", lambda output: None)
    lif = staa.build("resnet20", "lif", width=1 / 8, T=2).eval()
    caption = inside.board(lif, images, [np.zeros((2, 2, 3))] * 3)(t=2)[1]
    assert caption.startswith("stem.1, channel 1 of 8, t = 2: X~ ") and "M" not in caption
    board = inside.Board(inside.look(lif, images), dict.fromkeys(staa.neurons(lif), 1.0), [np.zeros((2, 2, 3))] * 3)
    board.update(image=1, layer=1, t=1, channel=1, row=0, column=0)
    assert np.ma.masked_invalid(board.maps["k"].get_array()).mask.all()
    assert np.isnan(board.lines["M"].get_ydata()).all() and not np.isnan(board.lines["X~"].get_ydata()).any()


def test_a_slider_starts_where_it_is_told(network, images, board):
    redraw, shown = board
    inside.board(network, images, [Image.new("RGB", (4, 4))] * 3, image=2, t=2, channel=3, row=0.2)
    assert shown[1]["text/plain"] == redraw(image=2, t=2, channel=3, row=0.2)[1] != shown[0]["text/plain"]


def test_a_start_that_is_no_slider_is_refused(network, images):
    with pytest.raises(ValueError, match="^start takes image, layer, t, channel, row, column, got step$"):
        inside.board(network, images, [], step=2)


def test_a_board_takes_lif_neurons_only_and_says_so(images):
    class Threshold(torch.nn.Module):
        is_neuron = True

        def __init__(self, channels, T):
            super().__init__()

        def forward(self, x):
            return (x > 1).to(x)

    network = staa.build("resnet20", Threshold, width=1 / 8, T=2)
    with pytest.raises(ValueError, match="^the board shows the potential of LIF neurons, and stem.1 is none$"):
        inside.board(network, images, [])


def test_each_layer_of_the_board_has_its_own_threshold(monkeypatch):
    """STAtten's value and output neurons fire at half a potential."""
    network = staa.build("statten-2-256", neuron="statten", T=2)
    caught = []
    monkeypatch.setattr(sliders, "explore", lambda figure, update, **settings: caught.append(update))
    inside.board(network, torch.rand(1, 3, 32, 32), [np.zeros((2, 2, 3))])
    board, seen = caught[0].__self__, set()
    for i, (name, neuron) in enumerate(staa.neurons(network).items()):
        board.update(image=1, layer=i + 1, t=1, channel=1, row=0.5, column=0.5)
        assert set(board.lines["threshold"].get_ydata()) == {neuron.v_th}, name
        seen.add(neuron.v_th)
    assert seen == {1.0, 0.5}


def test_a_network_in_bf16_is_shown_too(images, monkeypatch):
    monkeypatch.setattr(sliders, "show", lambda output: None)
    network = staa.build("resnet20", width=1 / 8, T=2).bfloat16()
    assert inside.board(network, images.bfloat16(), [np.zeros((2, 2, 3))] * 3)()[1].startswith("stem.1, channel 1 of 8")
    assert inside.table({"bf16": inside.measure(network, images.bfloat16())})["M"].item() == "1.00 to 1.00"


def test_a_figure_where_nothing_hangs_on_anything_is_drawn():
    plots.style()
    fresh = staa.build("resnet20", width=1 / 8, T=2)
    inside.figure({"fresh": inside.measure(fresh, torch.rand(2, 3, 16, 16))}).canvas.draw()


def test_the_notebooks_sentences_are_those_of_the_shipped_networks():
    from staa import data, records, samples, train, weights

    text = " ".join((records.ROOT / "notebooks" / "inside.ipynb").read_text().replace('\\n",', "").replace('"', "").split())
    x = torch.stack([data.transform("cifar10", 32)(tile) for tile in samples.photographs(32, rows=4)])
    near, without, image, rates = [], [], [], []
    for neuron in ("staa", "staa-leaky"):
        (run,) = weights.shipped(neuron=neuron)
        seen, parts = inside.measure(train.trained(run), x)
        share = {part: inside.weighted([of[part] for of in parts.values()], seen) for part in inside.PARTS}
        close = [float(((of["M"] - 1).abs() < 0.05).double().mean()) for of in seen.values()]
        near.append(100 * inside.weighted(close, seen))
        without.append(1000 * share["SA"])
        rates.append(1000 * inside.weighted([float(of["S"].mean()) for of in seen.values()], seen))
        image.append(1000 * share["SA, over images"])
        assert 0.4 < share["GC, over images"] / share["GC"] < 0.6, "about half as many"
        assert share["where GC looks"] < 0.5 * share["GC, over images"] and share["PE, over steps"] > 0.75 * share["PE"]
        first, *_, last = parts.values()
        assert all(first[part] > last[part] for part in inside.PARTS), "most in the first layers"
    said = re.search(r"Of the neurons of `staa` (\d+) %, of `staa-leaky` (\d+) %, have an \$M\$ within 0.05 .* changes at (\d+) and at "
                     r"(\d+) of a thousand neurons and steps; at (\d+) of a thousand", text)
    assert list(said.groups()) == [f"{value:.0f}" for value in (*near, *without, image[0])]
    assert f"{image[0]:.0f}" == f"{image[1]:.0f}"
    fire = re.search(r"Of a thousand neurons and steps (\d+) to (\d+) fire", text)
    assert list(fire.groups()) == [f"{rate:.0f}" for rate in sorted(rates)]
