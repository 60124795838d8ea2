"""The published page, out of what is stored; nothing is executed.

    python tools/publish.py docs    # site/api: the package from its docstrings
    python tools/publish.py         # that, the notebooks as they are stored, figures/index.html, and site/index.html

The site opens from disk and needs nothing from the web: formulas are MathML, which browsers draw by themselves.
"""

import html
import os
import re
import shutil
import sys
from pathlib import Path

import latex2mathml.converter
from jinja2 import pass_context
from nbconvert import HTMLExporter
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath

from staa import page, records

SITE = Path(os.environ.get("STAA_SITE") or records.ROOT / "site")
FRONT = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>STAA-SNN: a reproducible companion</title>
<style>
body {{ font: 16px/1.55 system-ui, sans-serif; color: #1a1a1a; max-width: 56rem; margin: 2rem auto; padding: 0 1rem; }}
h1 {{ line-height: 1.2; }}
img {{ max-width: 100%; height: auto; }}
li {{ margin: .4rem 0; }}
a {{ color: #0b57a4; }}
.cost {{ color: #555; }}
</style></head>
<body><h1>STAA-SNN: a reproducible companion</h1>
<p>STAA-SNN (CVPR 2025) puts an attention aggregator inside every spiking neuron. The notebooks regenerate the tables
and figures of the paper, and of two sibling systems, beside the papers' own numbers. They are shown here as they are
stored, executed on embedded data (handwritten digits), unless they say otherwise.</p>
<p><strong>What has been run on real data so far is small:</strong> the README of the project has a table of it.</p>
<p><img src="figure1.png" alt="The STAA neuron: aggregator, global context block, step attention block and TSRD"></p>
<h2>Notebooks</h2>
<ul>
{notebooks}
</ul>
<h2>More</h2>
<ul>
{more}
</ul>
</body></html>
"""

#: nbconvert's page without its scripts, and on a phone no wider than the screen: a wide table scrolls alone.
TEMPLATE = """{% extends "lab/index.html.j2" %}
{% block html_head_js %}{% endblock %}
{% block html_head_js_mathjax %}{% endblock %}
{% block html_head_js_mermaidjs %}{% endblock %}
{% block extra_css %}<style>
.jp-RenderedHTMLCommon { overflow-x: auto; }
.jp-RenderedImage img { max-width: 100%; height: auto; }
.jp-OutputArea-output pre { word-break: normal; overflow-wrap: anywhere; }
@media (max-width: 700px) { .jp-RenderedImage { overflow-x: auto; } .jp-RenderedImage img { max-width: none; } }
math { font-family: math, "Cambria Math", "STIX Two Math", "STIX Math", STIX, "Latin Modern Math",
       "DejaVu Math TeX Gyre"; }
</style>{% endblock %}
"""


class Formulas(IPythonRenderer):
    def inline_math(self, body: str) -> str:
        return latex2mathml.converter.convert(body)

    def block_math(self, body: str) -> str:
        numbered = re.sub(r"\\tag\{(.*?)\}", r"\\qquad(\1)", body)
        return latex2mathml.converter.convert(numbered, display="block")


class Page(HTMLExporter):
    @pass_context
    def markdown2html(self, context, source: str) -> str:
        attachments = context.get("cell", {}).get("attachments", {})
        return MarkdownWithMath(renderer=Formulas(escape=False, attachments=attachments)).render(source)


def docs() -> None:
    """site/api: one page a module, in the order of their names."""
    import pdoc

    modules = ["staa", *sorted(f"staa.{path.stem}" for path in (records.ROOT / "staa").glob("[a-z]*.py"))]
    fresh(SITE / "api")
    pdoc.render.configure(docformat="markdown", show_source=False, footer_text="STAA-SNN companion", search=False)
    pdoc.pdoc(*modules, output_directory=SITE / "api")


def fresh(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def notebooks(found: list[page.Item]) -> None:
    """site/notebooks: each with the outputs that are stored."""
    folder = fresh(SITE / "notebooks")
    for item in found:
        text, _ = Page(raw_template=TEMPLATE).from_filename(str(page.NOTEBOOKS / f"{item.name}.ipynb"))
        text = re.sub("<title>.*?</title>", lambda _: f"<title>{html.escape(item.title)}</title>", text, count=1)
        back = '<p><a href="../index.html">All notebooks</a></p>'
        text = re.sub("<body.*?>", lambda body: body[0] + back, text, count=1)
        (folder / f"{item.name}.html").write_text(text, "utf-8")


def front(found: list[page.Item]) -> None:
    """site/index.html, with links to all."""
    links = [f'<li><a href="notebooks/{item.name}.html">{html.escape(item.title)}</a> '
             f'<div class="cost">make {item.name}: {html.escape(item.cost)}</div></li>' for item in found]
    more = ['<li><a href="api/index.html">The package: every module, from its docstrings</a></li>']
    comparison = records.folder("figures") / "index.html"
    if comparison.is_file():
        shutil.copy(comparison, SITE / "comparison.html")
        more.append('<li><a href="comparison.html">Every table and figure of the last <code>make all</code> on one '
                    "page</a></li>")
    else:
        (SITE / "comparison.html").unlink(missing_ok=True)
    shutil.copy(records.ROOT / "figures" / "figure1.png", SITE)
    text = FRONT.format(notebooks="\n".join(links), more="\n".join(more))
    records.write(SITE / "index.html", text.encode())


def main(words: list[str]) -> None:
    if words not in ([], ["docs"]):
        sys.exit(f"publish.py: write docs, or nothing, got {' '.join(words)!r}")
    if SITE.resolve() in (records.ROOT, *records.ROOT.parents):
        sys.exit(f"publish.py: STAA_SITE must be a folder for the site alone, got {SITE}")
    docs()
    if words != ["docs"]:
        found = page.items()
        notebooks(found)
        front(found)
    print(SITE / ("api/index.html" if words == ["docs"] else "index.html"))


if __name__ == "__main__":
    main(sys.argv[1:])
