"""A figure under sliders: it follows them in a live notebook, and is a plain picture everywhere else."""

import base64
import io
from collections.abc import Callable

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image


def explore(figure: Figure, update: Callable[..., str], **settings: tuple) -> Callable[..., tuple[bytes, str]]:
    """Show `figure` under one slider a setting; a moved slider calls `update` with all settings and redraws.

    figure: a `matplotlib.figure.Figure` that holds its axes, their limits, its images and its lines already.
    update: called as update(name=value, ...); changes the data of images and lines, and nothing else, and returns one
        line of text to stand below the picture. The axes stay as they are: a redraw is a matter of milliseconds.
    settings: name=(least, most, step, start); four whole numbers make a slider of whole numbers. Raises ValueError
        where start lies outside least to most.

    The picture of the start is always part of the output; the sliders come on top where a person can move them
    (`front_end`). So papermill, nbval and a page on the web have the picture, and a stored notebook has no random id.
    Returns the function that the sliders call: redraw(name=value, ...) changes settings and gives the picture
    as PNG and the caption.
    """
    for name, (least, most, _, start) in settings.items():
        if not least <= start <= most:
            raise ValueError(f"{name} must start between {least} and {most}, got {start}")
    values = {name: start for name, (_, _, _, start) in settings.items()}
    drawing = Drawing(figure)

    def redraw(**changes) -> tuple[bytes, str]:
        values.update(changes)
        caption = update(**values)
        return drawing.png(), caption

    picture, caption = redraw()
    output = {"image/png": base64.b64encode(picture).decode(), "text/plain": caption}
    if front_end():
        output |= widget(settings, redraw)
    show(output)
    return redraw


class Drawing:
    """A figure whose images, and lines over them, are drawn over everything else in it, which is drawn once."""

    def __init__(self, figure: Figure):
        self.moving = [artist for axes in figure.axes for artist in (*axes.images, *axes.lines)]
        for artist in self.moving:
            artist.set_animated(True)  # left out of the next drawing, which is the background
        self.canvas = FigureCanvasAgg(figure)
        self.canvas.draw()
        self.background = self.canvas.copy_from_bbox(figure.bbox)

    def png(self) -> bytes:
        self.canvas.restore_region(self.background)
        for artist in self.moving:
            self.canvas.figure.draw_artist(artist)
        content = io.BytesIO()
        Image.fromarray(np.asarray(self.canvas.buffer_rgba())).convert("RGB").save(content, "png", compress_level=1)
        return content.getvalue()


def front_end() -> bool:
    """Whether a person sits at a front end that draws widgets.

    The message that runs a cell says whether the kernel may ask the person a question. JupyterLab, Notebook and their
    like allow it; papermill, nbconvert and nbval, behind whom nobody sits, do not.
    """
    try:
        from IPython import get_ipython

        return bool(get_ipython().get_parent()["content"]["allow_stdin"])
    except (ImportError, AttributeError, KeyError):  # no IPython, no kernel, or no cell was run yet
        return False


def widget(settings: dict, redraw: Callable[..., tuple[bytes, str]]) -> dict:
    """The output, by MIME type, of sliders over an image and its caption."""
    import ipywidgets

    image, text = ipywidgets.Image(), ipywidgets.Label()
    sliders: dict[str, ipywidgets.Widget] = {}

    def moved(_=None):  # all of them: what they show is what is drawn, whatever was drawn in between
        image.value, text.value = redraw(**{name: slider.value for name, slider in sliders.items()})

    for name, (least, most, step, start) in settings.items():
        whole = all(type(number) is int for number in (least, most, step, start))
        kind = ipywidgets.IntSlider if whole else ipywidgets.FloatSlider
        sliders[name] = kind(start, min=least, max=most, step=step, description=name)
        sliders[name].observe(moved, "value")
    moved()
    rows = ipywidgets.GridBox(list(sliders.values()), layout={"grid_template_columns": "repeat(2, 320px)"})
    return ipywidgets.VBox([rows, image, text])._repr_mimebundle_()


def show(output: dict) -> None:
    from IPython.display import display

    display(output, raw=True)
