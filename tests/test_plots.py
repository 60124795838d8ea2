import matplotlib.pyplot as plt
import pytest

from staa import plots, records


def test_a_figure_is_written_as_pdf_and_png_and_the_same_twice():
    def content():
        plots.style()
        figure, axes = plt.subplots(figsize=(plots.COLUMN, 2))
        axes.plot([0, 1], color=plots.COLORS["staa"])
        plots.save(figure, "line")
        plt.close(figure)
        return [(records.folder("figures") / f"line.{ending}").read_bytes() for ending in ("pdf", "png")]

    first = content()
    assert first[0].startswith(b"%PDF") and first[1].startswith(b"\x89PNG") and first == content()


def test_a_note_stands_whole_under_the_figure_and_covers_nothing():
    plots.style()
    figure, axes = plt.subplots(figsize=(plots.COLUMN, 2))
    axes.set(xlabel="x")
    note = "digits; ResNet-19 and statten-2-256; 3 epochs, width 0.125, 1,437 images; 2 seeds"
    plots.save(figure, "noted", note)
    (text,), height = figure.texts, figure.get_figheight()
    assert text.get_text().split() == note.split()
    figure.canvas.draw()
    box, label = (a.get_window_extent() for a in (text, axes.xaxis.label))
    assert 0 <= box.y0 < box.y1 < label.y0 and 0 <= box.x0 < box.x1 < figure.bbox.x1
    assert height == pytest.approx(2 + 0.25), "the axes keep their room"
    plt.close(figure)


def test_colours_differ_in_greyscale():
    from matplotlib.colors import to_rgb

    shades = sorted(sum(w * c for w, c in zip((0.299, 0.587, 0.114), to_rgb(plots.COLORS[name])))
                    for name in ("lif", "staa", "fsta", "statten"))
    assert all(b - a > 0.03 for a, b in zip(shades, shades[1:]))


def test_a_matplotlibrc_of_the_readers_changes_no_figure():
    import matplotlib as mpl

    plots.style()
    ours = dict(mpl.rcParams)
    with mpl.rc_context({"text.usetex": True, "lines.marker": "x", "savefig.bbox": "tight"}):
        plots.style()
        assert dict(mpl.rcParams) == ours
