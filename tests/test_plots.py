import matplotlib.pyplot as plt

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
