"""`make docs` and `make site`: every link within the pages leads somewhere, every public name has its place."""

import html
import inspect
import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from urllib.parse import unquote, urlsplit

import pytest

import staa
from staa import page, records


class Links(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.links, self.ids, self.loaded = [], set(), []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        for name, value in attributes:
            if name in ("href", "src") and value:
                self.links.append(value)
                if tag != "a" and urlsplit(value).netloc:
                    self.loaded.append(value)
            if name in ("id", "name") and value:
                self.ids.add(value)

    def handle_data(self, text):
        if self.cdata_elem:  # within a script or a style
            self.loaded += re.findall(r"""(?:import|from|src|url)\W{1,9}https?://[^"')]+""", text)


def broken(folder):
    """(page, link) of every local link whose file or anchor is not there."""
    pages = {path.resolve(): Links(path.read_text()) for path in folder.rglob("*.html")}
    for path, found in pages.items():
        for link in found.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if not target.is_file() or parts.fragment and target in pages and unquote(
                    parts.fragment) not in pages[target].ids:
                yield path.name, link


def publish(folder, *words, **environment):
    subprocess.run([sys.executable, str(records.ROOT / "tools" / "publish.py"), *words], check=True,
                   env=os.environ | {"STAA_SITE": str(folder), "PYTHONPATH": str(records.ROOT)} | environment)


@pytest.fixture(scope="module")
def api(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    publish(folder, "docs")
    return folder / "api"


def test_the_api_page_has_no_broken_link(api):
    assert len(list(api.rglob("*.html"))) > 30 and not list(broken(api))


def test_every_public_name_and_setting_is_on_it(api):
    ids = Links((api / "staa.html").read_text()).ids
    assert set(staa.__all__) <= ids
    for path in (records.ROOT / "staa").glob("[a-z]*.py"):
        assert (api / "staa" / f"{path.stem}.html").is_file()
    attention = (api / "staa" / "attention.html").read_text()
    assert "STAALIF" in attention and inspect.getdoc(staa.GlobalContext)[:8] in attention


def test_a_broken_link_is_found(tmp_path):
    (tmp_path / "a.html").write_text('<a href="b.html">b</a><a href="#here">x</a><a href="https://x.org/">y</a>')
    assert list(broken(tmp_path)) == [("a.html", "b.html"), ("a.html", "#here")]
    (tmp_path / "b.html").write_text("")
    (tmp_path / "a.html").write_text('<a href="b.html">b</a><p id="here"><a href="#here">x</a>')
    assert not list(broken(tmp_path))


def test_the_front_page_links_all(tmp_path, monkeypatch):
    """Three notebooks, of which one has formulas, and the comparison page. Nothing is loaded from the web."""
    monkeypatch.syspath_prepend(str(records.ROOT / "tools"))
    import publish as tool

    monkeypatch.setattr(tool, "SITE", tmp_path / "site")
    figures = records.folder("figures")
    figures.mkdir()
    (figures / "index.html").write_text("<p>everything")
    found = [item for item in page.items() if item.name in ("derivation", "figure2", "table3")]
    assert len(found) == 3
    tool.notebooks(found)
    tool.front(found)
    (tmp_path / "site" / "api").mkdir()
    (tmp_path / "site" / "api" / "index.html").write_text("")
    front = Links((tmp_path / "site" / "index.html").read_text())
    assert {"notebooks/figure2.html", "notebooks/table3.html", "comparison.html", "api/index.html"} <= set(front.links)
    assert not [link for link in broken(tmp_path / "site") if link[0] == "index.html"]
    assert (tmp_path / "site" / "comparison.html").read_text() == "<p>everything"
    assert "image/png;base64" in (tmp_path / "site" / "notebooks" / "figure2.html").read_text()
    derivation = (tmp_path / "site" / "notebooks" / "derivation.html").read_text()
    cells = json.loads((page.NOTEBOOKS / "derivation.ipynb").read_text())["cells"]
    text = "".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    assert derivation.count("<math") == len(re.findall(r"\$\$.+?\$\$|\$[^$]+\$", text, re.DOTALL)) > 90
    for path in (tmp_path / "site" / "notebooks").glob("*.html"):
        assert not Links(path.read_text()).loaded
    (figures / "index.html").unlink()
    tool.front(found)
    assert "comparison.html" not in Links((tmp_path / "site" / "index.html").read_text()).links
    assert not (tmp_path / "site" / "comparison.html").exists(), "that of an earlier time"


def test_the_checkout_is_no_place_for_the_site(monkeypatch):
    """Its notebooks would be cleared away."""
    monkeypatch.syspath_prepend(str(records.ROOT / "tools"))
    import publish as tool

    monkeypatch.setattr(tool, "docs", lambda: pytest.fail("started"))
    for place in (records.ROOT, records.ROOT.parent):
        monkeypatch.setattr(tool, "SITE", place)
        with pytest.raises(SystemExit, match="^publish.py: STAA_SITE must be a folder for the site alone, got "):
            tool.main([])


def test_a_title_is_text(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(records.ROOT / "tools"))
    import publish as tool

    monkeypatch.setattr(tool, "SITE", tmp_path)
    tool.front([page.Item("x", "a < b & c", "d < e")])
    text = (tmp_path / "index.html").read_text()
    assert ">a &lt; b &amp; c</a>" in text and "make x: d &lt; e<" in text


def test_a_formula_of_its_own_line_is_a_block_and_has_its_number(monkeypatch):
    monkeypatch.syspath_prepend(str(records.ROOT / "tools"))
    from publish import Formulas

    block, inline = Formulas(escape=False).block_math(r"a = b \tag{7}"), Formulas(escape=False).inline_math("a = b")
    assert [re.sub(r"<.*?>|\s", "", html.unescape(formula)) for formula in (block, inline)] == ["a=b(7)", "a=b"]
    assert 'display="block"' in block and 'display="block"' not in inline
