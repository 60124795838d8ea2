"""The published page, out of what is stored; nothing is executed.

    python tools/publish.py docs    # site/api: the package from its docstrings
    python tools/publish.py         # that, the notebooks as they are stored, figures/index.html, and site/index.html

The site opens from disk. Only formulas need the web: notebooks load MathJax, as nbconvert writes them.
"""

import html
import os
import shutil
import subprocess
import sys
from pathlib import Path

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
<p>STAA-SNN (CVPR 2025) puts an attention aggregator inside every spiking neuron. Each notebook regenerates a table or a
figure of the paper beside the paper's own numbers. They are shown here as they are stored, executed on embedded data
(handwritten digits), unless they say otherwise.</p>
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


def docs() -> None:
    """site/api: one page a module, in the order of the imports' names; the ones that need a live figure included."""
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
    paths = [str(page.NOTEBOOKS / f"{item.name}.ipynb") for item in found]
    subprocess.run([sys.executable, "-m", "nbconvert", "--to", "html", "--log-level", "ERROR", "--output-dir",
                    str(fresh(SITE / "notebooks")), *paths], check=True)
    # nbconvert's page is as wide as its widest table: on a phone that one scrolls alone.
    narrow = ("<style>.jp-RenderedHTMLCommon { overflow-x: auto; } "
              ".jp-RenderedImage img { max-width: 100%; height: auto; }</style></head>")
    for path in (SITE / "notebooks").glob("*.html"):
        path.write_text(path.read_text().replace("</head>", narrow, 1))


def front(found: list[page.Item]) -> None:
    """site/index.html, with links to all."""
    costs = {item.name: html.escape(item.cost.replace("`", "")) for item in found}
    links = [f'<li><a href="notebooks/{item.name}.html">{html.escape(item.title)}</a> '
             f'<div class="cost">make {item.name}: {costs[item.name]}</div></li>' for item in found]
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
    docs()
    if words != ["docs"]:
        found = page.items()
        notebooks(found)
        front(found)
    print(SITE / ("api/index.html" if words == ["docs"] else "index.html"))


if __name__ == "__main__":
    main(sys.argv[1:])
