"""Figures under sliders: headless, over the kernel's own protocol, and in JupyterLab in a real browser."""

import io
import math
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import nbformat
import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from staa import fused_staa_cpu, records, sliders

VIEW = "application/vnd.jupyter.widget-view+json"


def explore(**settings):
    """A line from (0, 0) to (1, height), under the given sliders."""
    figure = Figure(figsize=(2, 1.5))
    (line,) = figure.subplots().plot([], [], color="red")
    figure.axes[0].set(xlim=(0, 1), ylim=(0, 10))

    def update(height, **rest):
        line.set_data([0, 1], [0, height])
        return f"height {height}"

    return sliders.explore(figure, update, **settings)


def reds(png: bytes) -> int:
    """How many pixels the line covers."""
    r, g, b = np.asarray(Image.open(io.BytesIO(png)).convert("RGB"), int).transpose(2, 0, 1)
    return int(((r > 200) & (g < 100) & (b < 100)).sum())


@pytest.fixture
def shown(monkeypatch):
    outputs = []
    monkeypatch.setattr(sliders, "show", outputs.append)
    return outputs


def test_without_a_front_end_the_output_is_the_picture_and_no_widget_is_made(shown, monkeypatch):
    monkeypatch.setitem(sys.modules, "ipywidgets", None)  # so that an import would fail
    explore(height=(0, 10, 1, 5))
    assert shown[0].keys() == {"image/png", "text/plain"} and shown[0]["text/plain"] == "height 5"


def test_a_redraw_is_the_picture_that_a_start_there_would_be(shown):
    redraw = explore(height=(0, 10, 1, 1))
    assert redraw(height=9) == explore(height=(0, 10, 1, 9))()
    picture, caption = redraw(height=0)
    assert caption == "height 0" and picture == explore(height=(0, 10, 1, 0))()[0], "a line of an earlier drawing is left"
    assert reds(redraw(height=9)[0]) > reds(picture) > 0


def test_a_start_outside_its_slider_is_refused_before_anything_is_drawn(shown):
    with pytest.raises(ValueError, match="height must start between 0 and 10, got 11"):
        explore(height=(0, 10, 1, 11))
    assert not shown


def test_a_moved_slider_redraws_and_the_others_keep_their_values(shown, monkeypatch):
    import ipywidgets
    from ipywidgets.widgets.widget import _instances

    monkeypatch.setattr(sliders, "front_end", lambda: True)
    explore(height=(0, 10, 1, 5), other=(0.0, 1.0, 0.1, 0.5), mixed=(0, 2, 0.5, 1))
    assert shown[0].keys() >= {"image/png", "text/plain", VIEW}, "a page on the web falls back on the picture"
    box, image, label = _instances[shown[0][VIEW]["model_id"]].children
    height, other, mixed = box.children
    assert type(height) is ipywidgets.IntSlider and type(other) is type(mixed) is ipywidgets.FloatSlider
    assert (height.description, height.min, height.max, height.value) == ("height", 0, 10, 5)
    before = image.value
    height.value = 9
    assert label.value == "height 9" and reds(image.value) > reds(before)
    after = image.value
    other.value = 0.7
    assert label.value == "height 9" and image.value == after


def test_what_the_sliders_show_is_what_is_drawn_whatever_was_drawn_in_between(shown, monkeypatch):
    from ipywidgets.widgets.widget import _instances

    monkeypatch.setattr(sliders, "front_end", lambda: True)
    redraw = explore(height=(0, 10, 1, 5), other=(0.0, 1.0, 0.1, 0.5))
    box, _, label = _instances[shown[0][VIEW]["model_id"]].children
    redraw(height=9)
    box.children[1].value = 0.7
    assert label.value == "height 5"


@pytest.mark.parametrize("content, expected", [({"allow_stdin": True}, True), ({"allow_stdin": False}, False), ({}, False)])
def test_a_front_end_is_one_that_a_question_can_be_put_to(monkeypatch, content, expected):
    class Shell:
        def get_parent(self):
            return {"content": content}

    monkeypatch.setattr("IPython.get_ipython", Shell)
    assert sliders.front_end() is expected


def test_a_kernel_shows_widgets_to_a_person_and_pictures_to_a_program():
    """The very messages: JupyterLab sends allow_stdin, papermill, nbconvert and nbval (through nbclient) do not."""
    from jupyter_client.manager import start_new_kernel

    code = ("from matplotlib.figure import Figure\nfrom staa import sliders\n"
            "figure = Figure(figsize=(1, 1)); figure.subplots()\n"
            "redraw = sliders.explore(figure, lambda n: str(n), n=(0, 9, 1, 5))")
    manager, client = start_new_kernel(env={**os.environ, "PYTHONPATH": str(records.ROOT)})
    try:
        def kinds(allow_stdin):
            messages = []
            client.execute_interactive(code, allow_stdin=allow_stdin, output_hook=messages.append, timeout=120)
            assert not [m["content"]["evalue"] for m in messages if m["msg_type"] == "error"]
            (data,) = [m["content"]["data"] for m in messages if m["msg_type"] == "display_data"]
            return set(data), any(m["msg_type"] == "comm_open" for m in messages)

        assert kinds(False) == ({"image/png", "text/plain"}, False)
        assert kinds(True) == ({"image/png", "text/plain", VIEW}, True)
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


# In a real browser.


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def derivation():
    return nbformat.read(records.ROOT / "notebooks" / "derivation.ipynb", as_version=4)


def inside():
    """The board of inside.ipynb with what it needs, and no run."""
    notebook = nbformat.read(records.ROOT / "notebooks" / "inside.ipynb", as_version=4)
    (board,) = [cell for cell in notebook.cells if "inside.board(" in cell.source]
    notebook.cells = [nbformat.v4.new_code_cell(
        "import torch\nfrom staa import data, inside, plots, samples, train, weights\nplots.style()\n"
        'shipped = {run.config["neuron"]: run for run in weights.shipped(neuron="staa-leaky", epochs=24)}'),
        board, nbformat.v4.new_code_cell('print("all cells were run")')]
    return notebook


@pytest.fixture
def lab(tmp_path, request):
    """The address of a JupyterLab of our own, over a folder with the asked notebook without outputs."""
    work = tmp_path / "work"
    work.mkdir()
    notebook = request.param()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    nbformat.write(notebook, work / f"{request.param.__name__}.ipynb")
    settings = tmp_path / "settings" / "@jupyterlab" / "notebook-extension" / "tracker.jupyterlab-settings"
    settings.parent.mkdir(parents=True)
    settings.write_text('{"windowingMode": "none"}')  # every cell is in the page, seen or not
    pages = tmp_path / "config" / "labconfig" / "page_config.json"
    pages.parent.mkdir(parents=True)
    pages.write_text('{"disabledExtensions": {"@jupyterlab/apputils-extension:announcements": true}}')  # no news
    env = {**os.environ, "PYTHONPATH": str(records.ROOT), "JUPYTERLAB_SETTINGS_DIR": str(tmp_path / "settings"),
           **{f"JUPYTER_{name}_DIR": str(tmp_path / name.lower()) for name in ("CONFIG", "RUNTIME", "DATA")}}
    port, token = free_port(), secrets.token_hex(8)
    with open(tmp_path / "lab.log", "w") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ServerApp.ip=127.0.0.1",
             f"--ServerApp.port={port}", "--ServerApp.port_retries=0", f"--IdentityProvider.token={token}",
             f"--ServerApp.root_dir={work}", "--LabApp.extension_manager=readonly"], env=env, stdout=log, stderr=log)
        try:
            direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
            for _ in range(240):
                try:
                    direct.open(f"http://127.0.0.1:{port}/api?token={token}", timeout=5)
                    break
                except OSError:
                    assert server.poll() is None, (tmp_path / "lab.log").read_text()
                    time.sleep(0.25)
            yield f"http://127.0.0.1:{port}/lab/tree/{request.param.__name__}.ipynb?token={token}"
        finally:
            server.terminate()
            server.wait(timeout=30)


@pytest.fixture
def page():
    """A page of Debian's Chromium; skips, and says so, where there is none."""
    playwright = pytest.importorskip("playwright.sync_api", reason="no Playwright: no slider was moved in a browser")
    chromium = shutil.which("chromium")
    if not chromium:
        pytest.skip("no Chromium: no slider was moved in a browser")
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=chromium, args=[
            "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
            "--disable-component-update", "--disable-sync"])
        try:
            yield browser.new_page(viewport={"width": 1080, "height": 720})
        finally:
            browser.close()


def drag(page, slider, share: float):
    """Drag a slider's handle to a share of its track, as a hand does."""
    slider.locator(".noUi-handle").hover()  # waits until the page above it has settled
    track = slider.locator(".noUi-base").bounding_box()
    y = track["y"] + track["height"] / 2
    page.mouse.down()
    page.mouse.move(track["x"] + share * track["width"], y, steps=8)
    page.mouse.up()


def boards(page, lab, last: str):
    """Run the notebook, to the output `last`; its boards."""
    page.goto(lab)
    page.get_by_text("Python 3 (ipykernel) | Idle").wait_for(timeout=60_000)  # run earlier, it asks which kernel
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_text("Run All Cells", exact=True).click()
    page.locator(".jp-OutputArea-output", has_text=re.compile(last)).wait_for(timeout=120_000)
    errors = page.locator(".jp-OutputArea-output[data-mime-type*='stderr']")
    if not fused_staa_cpu.available(False):  # which the notebook that trains says once
        errors = errors.filter(has_not_text="the C compiler does not work here")
    assert not errors.count()
    return page.locator(".jp-OutputArea-output > .widget-vbox, .jp-OutputArea-output .lm-Panel > .widget-vbox")


@pytest.mark.parametrize("lab", [derivation], indirect=True)
def test_in_jupyterlab_a_moved_slider_changes_the_curve(page, lab, tmp_path):
    from playwright.sync_api import expect

    boxes = boards(page, lab, "holds: .* comparisons")
    assert boxes.count() == 3

    lif, learning, staa = boxes.nth(0), boxes.nth(1), boxes.nth(2)
    names = [lif.locator(".widget-hslider").nth(i).locator(".widget-label").inner_text() for i in range(4)]
    assert names == ["tau", "threshold", "input", "T"]
    tau = lif.locator(".widget-hslider").nth(0)
    tau.scroll_into_view_if_needed()
    caption = lif.locator(":scope > .widget-label")
    before, said = lif.locator("img").screenshot(), caption.inner_text()
    assert said == "20 spikes in 80 steps; closed form: one every 4 steps"
    drag(page, tau, 0.8)
    expect(caption).not_to_have_text(said, timeout=30_000)
    page.wait_for_timeout(500)  # the last of the drag's redraws
    assert lif.locator("img").screenshot() != before, "the curve stands still"
    value = float(tau.locator(".widget-readout").inner_text())
    interval = math.ceil(math.log(1 - 1 / 1.5) / math.log(1 - 1 / value))
    assert value > 6 and caption.inner_text() == f"{80 // interval} spikes in 80 steps; closed form: one every {interval} steps"

    width, caption = learning.locator(".widget-hslider").nth(1), learning.locator(":scope > .widget-label")
    width.scroll_into_view_if_needed()
    assert caption.inner_text() == "spikes [0, 1, 0], loss 1.0, dL/dW +0.568"  # the hand calculation above the board
    drag(page, width, 0.0)
    expect(caption).to_have_text("spikes [0, 1, 0], loss 1.0, dL/dW +0.000", timeout=30_000)  # no potential is so near

    gate, caption = staa.locator(".widget-hslider").nth(5), staa.locator(":scope > .widget-label")
    gate.scroll_into_view_if_needed()
    before, said = staa.locator("img").screenshot(), caption.inner_text()
    drag(page, gate, 0.25)
    expect(caption).not_to_have_text(said, timeout=30_000)
    page.wait_for_timeout(500)
    assert staa.locator("img").screenshot() != before
    staa.locator("img").hover()  # so that the whole board is in view
    page.screenshot(path=tmp_path / "derivation.png")
    assert 0 < Path(tmp_path / "derivation.png").stat().st_size < 300_000


@pytest.mark.parametrize("lab", [inside], indirect=True)
def test_in_jupyterlab_a_network_is_stepped_through(page, lab, tmp_path):
    """Another layer, image and step: the caption names the layer and says what it computed, and the maps change."""
    from playwright.sync_api import expect

    (board,) = boards(page, lab, "all cells were run").all()
    names = board.locator(".widget-hslider .widget-label").all_inner_texts()
    assert names == ["image", "layer", "t", "channel", "row", "column"]
    caption, picture = board.locator(":scope > .widget-label"), board.locator("img")
    board.scroll_into_view_if_needed()
    page.screenshot(path=tmp_path / "inside.png")
    assert re.fullmatch(r"stem\.1, channel 15 of 16, t = 2: PE .*, v .*, M .*, N .*, X~ .*, U .*; fires at \d+ %",
                        caption.inner_text())

    def maps():
        """The row of maps alone: the line below it moves with t in any case."""
        image = Image.open(io.BytesIO(picture.screenshot())).convert("RGB")
        return image.crop((image.width // 6, 0, image.width, image.height * 2 // 5)).tobytes()

    before = maps()
    drag(page, board.locator(".widget-hslider").nth(1), 1.0)
    expect(caption).to_have_text(re.compile(r"^stages\.7\.neuron2, channel 15 of 128, t = 2: "), timeout=30_000)
    page.wait_for_timeout(500)  # the caption comes with the image, which the page draws a moment later
    deep = maps()
    drag(page, board.locator(".widget-hslider").nth(2), 0.0)
    expect(caption).to_have_text(re.compile(r"^stages\.7\.neuron2, channel 15 of 128, t = 1: "), timeout=30_000)
    page.wait_for_timeout(500)
    assert len({before, deep, maps()}) == 3
    assert 0 < Path(tmp_path / "inside.png").stat().st_size < 300_000
