"""What is drawn follows the neuron, and can be read."""

from itertools import combinations

import matplotlib.pyplot as plt
import pytest
import torch
from matplotlib.colors import to_rgb
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from matplotlib.path import Path

from staa import LIF, STAALIF, LeakySTAALIF, diagrams, plots
from staa.experiments import FIGURE2


@pytest.fixture(autouse=True)
def closed():
    plots.style()
    yield
    plt.close("all")


def texts(figure):
    return [text for text in figure.axes[0].texts if text.get_text()]


def words(figure):
    return " | ".join(text.get_text() for text in texts(figure))


def panels(**rows):
    neurons = {label: STAALIF(8, 3, **settings) for label, settings in rows.items()}
    return neurons, diagrams.figure2(neurons, dict.fromkeys(neurons, ""))


def figure2():
    return panels(**{label: settings for label, settings in FIGURE2 if label != "a'"})


def test_operations_of_a_small_neuron_by_hand():
    found = diagrams.operations(STAALIF(8, 3, r=2).eval(), torch.randn(3, 5, 8, 6, 7))
    assert found["gc.key.conv2d"].output == (15, 1, 6, 7)  # N = T B maps
    assert found["gc.matmul"].inputs == [(15, 8, 42), (15, 42, 1)] and found["gc.matmul"].output == (15, 8, 1)
    assert found["gc.norm.layer_norm"].output == (15, 4) and found["sa.squeeze.conv2d"].output == (5, 2, 1, 1)
    assert found["pe_input.add"].inputs == [(3, 5, 8, 6, 7), (3, 1, 8, 1, 1)]
    assert list(found).index("pe_input.add") < list(found).index("gc.softmax") < list(found).index("sa.mean")


def test_operations_are_those_of_any_module():
    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.ReLU())
    assert diagrams.operations(module, torch.zeros(4, 3)) == {"0.linear": ([(4, 3), (2, 3), (2,)], (4, 2)),
                                                             "1.relu": ([(4, 2)], (4, 2))}


def test_of_an_operation_that_happens_again_the_first_is_shown():
    class Twice(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = torch.nn.ReLU()

        def forward(self, x):
            return self.inner(x) + self.inner(x.sum(0))

    assert diagrams.operations(Twice(), torch.zeros(2, 3))["inner.relu"] == ([(2, 3)], (2, 3))


@pytest.mark.parametrize("T, B, C, H, W, r", [(4, 2, 64, 32, 32, 4), (3, 5, 24, 6, 7, 8), (2, 3, 128, 4, 9, 2)])
def test_the_labels_of_figure_1_follow_the_forward_pass(T, B, C, H, W, r):
    neuron = STAALIF(C, T, r=r, alpha=1.5, beta=0.25)
    shown = words(diagrams.figure1(neuron, torch.randn(T, B, C, H, W)))
    expected = {f"{T}×{B}×{C}×{H}×{W}": 2,         # X and X~
                f"{T}×1×{C}×1×1": 1,               # PE
                f"{B}×{C}×{H}×{W}": None,          # one time step
                f"{T * B}×{C}×{H}×{W}": 2,         # into GC and out of it
                f"{T * B}×1×{H}×{W}": 1, f"{T * B}×1×{H * W}": 1, f"{T * B}×{C}×{H * W}": 1,
                f"{T * B}×{C // r}×1×1": None, f"{B}×{C // 4}×1×1": None, f"{T * B}×{C}×1×1": None}
    labels = shown.replace("\n", " ").split()
    for label, count in expected.items():
        assert labels.count(label) == count if count else label in labels, label
    sizes = {axis for label in labels if "×" in label.strip("×") for axis in label.split("×")}
    assert sizes <= {str(n) for n in (1, T, B, C, H, W, H * W, T * B, C // r, C // 4)}, "a size from nowhere"
    assert "alpha = 1.5" in shown and "beta = 0.25" in shown and "1 - beta = 0.75" in shown


def test_in_figure_1_the_aggregator_is_dropped_with_probability_beta():
    figure = diagrams.figure1(STAALIF(8, 3, beta=0.25), torch.randn(3, 2, 8, 4, 4))
    across = {text.get_text(): text.get_position()[0] for text in texts(figure)}
    switch = across[next(word for word in across if word.startswith("U[t]   "))]
    assert across["aggregator (a)\npe_input, gc, sa"] < across["1 - beta = 0.75"] < switch < across["beta = 0.25"]


def test_drawing_leaves_the_neuron_as_it_was():
    neuron = STAALIF(8, 3).train()
    diagrams.figure1(neuron, torch.randn(3, 2, 8, 4, 4))
    assert neuron.training and neuron.beta == 0.1
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in neuron.modules())
    with pytest.raises(ValueError, match="takes"):
        diagrams.operations(neuron, torch.randn(4, 2, 8, 4, 4))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in neuron.modules()), "not even where it fails"


@pytest.mark.parametrize("neuron", [LIF(), STAALIF(8, 3, gc=False), STAALIF(8, 3, pe_place="output"),
                                    LeakySTAALIF(8, 3)])
def test_figure_1_of_another_neuron_is_refused(neuron):
    with pytest.raises(ValueError, match="Figure 1 needs a STAALIF with gc, sa and PE at its input"):
        diagrams.figure1(neuron, torch.randn(3, 2, 8, 4, 4))


def test_figure_2_draws_pe_where_the_neuron_has_it():
    _, figure = figure2()
    width = plots.PAGE / 5
    spots = {text.get_text(): [] for text in texts(figure)}
    for text in texts(figure):
        panel, x = divmod(text.get_position()[0], width)
        spots[text.get_text()].append(("abcde"[int(panel)], x, text.get_position()[1]))
    (_, membrane, top), (_, current, _) = spots["Hm[t-1]"][0], spots["X[t]"][0]
    fire = spots["fire"][0][2]
    aggregator = spots["aggregator\ngc, sa"][0][2]
    drawn = {(letter, "output" if y < aggregator else "membrane" if x < membrane else "input")
             for letter, x, y in spots["PE"] if fire < y < top and (y < aggregator or not membrane < x < current)}
    assert drawn == {("b", "membrane"), ("c", "input"), ("d", "membrane"), ("d", "input"), ("e", "output")}
    assert len(spots["PE"]) == 5 and [letter for letter, *_ in spots["PE 3×1×8×1×1"]] == ["b", "c", "e"]
    assert [letter for letter, *_ in spots["no PE"]] == ["a"] and spots["0.25 Hm[t-1]\n+ 1 X[t]"][0][0] == "a"


def test_the_letters_do_not_matter_the_neuron_does():
    _, figure = panels(b=dict(pe_place="output", gc=False), c=dict(pe=False))
    shown = [text.get_text() for text in texts(figure)]
    assert shown.count("PE") == 1 and "aggregator\nsa" in shown and shown.count("no PE") == 1


def pictures():
    plots.style()
    for C, T, H in ((64, 4, 32), (512, 8, 4)):
        yield diagrams.figure1(STAALIF(C, T), torch.randn(T, 2, C, H, H))
    yield figure2()[1]


def test_nothing_overlaps_and_nothing_is_cut():
    """Measured on the rendered text: boxes of texts are disjoint, inside the page and inside their own frames."""
    for figure in pictures():
        renderer = figure.canvas.get_renderer()
        placed = [(text.get_text(), text.get_window_extent(renderer)) for text in texts(figure)]
        for (a, first), (b, second) in combinations(placed, 2):
            assert not first.overlaps(second), f"{a!r} and {b!r} overlap"
        patches = [patch for patch in figure.axes[0].patches if isinstance(patch, FancyBboxPatch)]
        frames = [patch.get_window_extent(renderer) for patch in patches]
        for name, extent in placed:
            assert figure.bbox.x0 <= extent.x0 and extent.x1 <= figure.bbox.x1, f"{name!r} leaves the page"
            assert figure.bbox.y0 <= extent.y0 and extent.y1 <= figure.bbox.y1, f"{name!r} leaves the page"
            for frame in frames:
                inside = (frame.x0 <= extent.x0 and extent.x1 <= frame.x1
                          and frame.y0 <= extent.y0 and extent.y1 <= frame.y1)
                assert inside or not frame.overlaps(extent), f"{name!r} leaves its box"
        plt.close(figure)


@pytest.mark.filterwarnings("error")
def test_a_diagram_is_saved_as_drawn(tmp_path):
    figure = figure2()[1]
    plots.save(figure, "figure2")
    (axes,) = figure.axes
    assert axes.get_position().bounds == (0, 0, 1, 1) and figure.get_size_inches().tolist() == [plots.PAGE, 2.65]
    path = tmp_path / "figures" / "figure2"
    assert b"/Subtype /Image" not in path.with_suffix(".pdf").read_bytes(), "vector graphics only"
    assert plt.imread(path.with_suffix(".png")).shape[:2] == (795, 2062)  # 300 dpi


def test_no_arrow_runs_through_a_word():
    for figure in pictures():
        renderer = figure.canvas.get_renderer()
        for arrow in (patch for patch in figure.axes[0].patches if isinstance(patch, FancyArrowPatch)):
            path = arrow.get_path()
            drawn = path.codes != Path.CLOSEPOLY  # its vertex is no point
            line = Path(path.vertices[drawn], path.codes[drawn]).transformed(figure.axes[0].transData)
            for text in texts(figure):
                assert not line.intersects_bbox(text.get_window_extent(renderer), filled=False), text.get_text()
        plt.close(figure)


def test_the_boxes_read_in_greyscale():
    def luminance(colour):  # WCAG 2
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)]
        return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear))

    shades = {name: luminance(colour) for name, colour in plots.BLOCKS.items()}
    assert all((shade + 0.05) / 0.05 > 7 for shade in shades.values()), "black text on them has contrast AAA"
    values = sorted(shades.values())
    assert all(b - a > 0.05 for a, b in zip(values, values[1:]))
