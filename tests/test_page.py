"""The page with everything, and the list."""

import base64
import json
import os
import re
import time
from html.parser import HTMLParser

import pandas as pd
import pytest

from staa import page, records, tables
from staa.settings import ConfigError

TABLE = pd.DataFrame({"Row": ["a & b", "<c>"], "Paper: x_1": ["94.08 %", "not in our source"], "r": ["1 ± 2", "{#}"]})


class Reader(HTMLParser):
    """The cells of the tables of a page, and every address that it names."""

    def __init__(self, text):
        super().__init__()
        self.cells, self.addresses, self.open, self.inside = [], [], [], False
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        if tag not in ("meta", "img"):
            self.open.append(tag)
        self.addresses += [value for name, value in attributes if name in ("src", "href")]
        if tag == "tr":
            self.cells.append([])
        if tag in ("th", "td"):
            self.cells[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        if self.open and self.open[-1] in ("th", "td"):
            self.cells[-1][-1] += text


def test_a_table_is_the_same_in_markdown_html_and_latex():
    tables.save(TABLE, "odd", "100 % & <sure>.")
    folder, truth = records.folder("figures"), [list(TABLE.columns), *TABLE.values.tolist()]
    assert Reader((folder / "odd.html").read_text()).cells == truth
    lines = [line for line in (folder / "odd.md").read_text().splitlines() if line.startswith("|") and "|:--" not in line]
    assert [[cell.strip() for cell in line.strip("|").split("|")] for line in lines] == truth
    tex = (folder / "odd.tex").read_text()
    rows = [re.split(r"(?<!\\)&", line.removesuffix(r"\\")) for line in tex.splitlines() if line.endswith(r"\\")]
    plain = [[re.sub(r"\\([&%_#{}])", r"\1", cell.replace(r"\textless ", "<").replace(r"\textgreater ", ">")
                     .replace(r"\textless", "<").replace(r"\textgreater", ">")).strip() for cell in row] for row in rows]
    assert plain == truth
    assert r"\caption{100 \% \& <sure>.}" in tex
    # What LaTeX would stumble over: a bare special character, a brace or an environment that is not closed.
    assert not re.search(r"(?<!\\)[%#]", tex) and not re.search(r"(?<!\\)_(?!.*\])", tex.replace(r"\label{tab:odd}", ""))
    bare = re.sub(r"\\[{}]", "", tex)
    assert bare.count("{") == bare.count("}")
    assert re.findall(r"\\begin{(\w+)}", tex) == re.findall(r"\\end{(\w+)}", tex)[::-1]


def test_the_page_holds_everything_and_needs_nothing_else():
    tables.save(TABLE, "table4", "A note.")
    tables.save(TABLE, "table4_steps", "Another note.")
    picture = b"\x89PNG not really"
    for name in ("energy_firing", "figure3"):
        records.write(records.folder("figures") / f"{name}.png", picture)
    found = page.items()
    text = page.page(found)
    seen = Reader(text)
    assert seen.open == [] and len(seen.cells) == 6
    assert all(a.startswith(("#", "data:image/png;base64,")) for a in seen.addresses), "nothing outside the file"
    pictures = [a for a in seen.addresses if a.startswith("data:")]
    assert [base64.b64decode(a.partition(",")[2]) for a in pictures] == [picture] * 2
    parts = {s.partition('"')[0]: s for s in text.split('<section id="')[1:]}
    assert set(parts) == {item.name for item in found} == {path.stem for path in page.NOTEBOOKS.glob("*.ipynb")}
    assert "A note." in parts["table4"] and "Another note." in parts["table4"] and "data:" in parts["energy"]
    assert "Not made yet." in parts["table1"]


def test_a_title_and_a_running_time_are_text(small):
    path = page.NOTEBOOKS / "bad.ipynb"
    text = path.read_text().replace("a title", "a < b & c").replace("time: none.", r"time: `two`\nhours. Or more.")
    path.write_text(text)
    (bad, _) = found = page.items()
    assert (bad.title, bad.cost) == ("bad: a < b & c", "two hours")
    assert "<h2>bad: a &lt; b &amp; c</h2>" in page.page(found)


def test_a_figure_is_that_items_whose_name_is_the_longest_to_begin_its_own():
    for name in ("energy", "energy_a", "energy_by_depth", "energy_by_depth_b", "energyc"):
        records.write(records.folder("figures") / f"{name}.png", b"PNG")
    found = [page.Item(name, name, "none") for name in ("energy", "energy_by_depth")]
    first, second = (re.findall('alt="(.*?)"', part) for part in page.page(found).split("<section")[1:])
    assert (first, second) == (["energy", "energy_a"], ["energy_by_depth", "energy_by_depth_b"])


def test_an_output_is_old_where_anything_that_it_is_made_of_is_newer(small, tmp_path, monkeypatch):
    files = [page.NOTEBOOKS / "good.ipynb"]
    for kind, name in (("package", "lif.py"), ("paper", "table1.csv"), ("records", "run.json")):
        monkeypatch.setenv(f"STAA_{kind.upper()}", str(tmp_path / kind))
        records.write(tmp_path / kind / name, b"")
        files.append(tmp_path / kind / name)
    monkeypatch.setattr(page, "__file__", str(tmp_path / "package" / "page.py"))
    (item,) = [item for item in page.items() if item.name == "good"]
    assert not item.fresh()
    records.write(item.output, b'{"cells": []}')
    for path, seconds in [(item.output, 2000), *((path, 1000) for path in files)]:
        os.utime(path, (seconds, seconds))
    assert item.fresh()
    for path in files:
        os.utime(path, (3000, 3000))
        assert not item.fresh(), path
        os.utime(path, (1000, 1000))


def test_outside_a_checkout_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(page, "NOTEBOOKS", tmp_path)
    with pytest.raises(ConfigError, match="^the notebooks come with a checkout of the project, and .* has none.$"):
        page.listing()
    monkeypatch.setenv("STAA_PAPER", str(tmp_path))
    with pytest.raises(records.RecordError, match="^the paper's numbers come with a checkout .*table1.csv is not there"):
        tables.paper_table1()


def test_a_readers_own_sheet_is_no_item(small):
    for name, text in {"Untitled": '{"cells": []}', "empty": "", "mine": '{"cells": [{"cell_type": "code", "source": ["x"]}]}',
                       "bare": '{"cells": [{"cell_type": "markdown"}]}', "odd": '{"cells": [1]}'}.items():
        (page.NOTEBOOKS / f"{name}.ipynb").write_text(text)
    assert {item.name for item in page.items()} == {"bad", "good"} and "good" in page.listing()


def test_the_list_says_what_is_there():
    lines = {line.split()[0]: line for line in page.listing().splitlines()}
    assert "0 of 18 runs" in lines["table4"] and "0 of 11 runs" in lines["figure3"] and "no runs" in lines["figure1"]
    assert "about two minutes" in lines["table4"] and all("not said" not in line for line in lines.values())


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A folder of notebooks with one that works and one that fails."""
    import nbformat

    monkeypatch.setattr(page, "NOTEBOOKS", tmp_path / "notebooks")
    page.NOTEBOOKS.mkdir()
    for name, code in (("good", "print('done')"), ("bad", "raise ValueError('as it must')")):
        book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(f"# {name}: a title\n\nRunning time: none."),
                                               nbformat.v4.new_code_cell(code)])
        book.metadata.kernelspec = {"name": "python3", "language": "python", "display_name": "Python 3"}
        nbformat.write(book, page.NOTEBOOKS / f"{name}.ipynb")


def test_a_run_that_fails_costs_no_notebook(small, capsys, monkeypatch):
    def fails(configs):
        raise RuntimeError("the loss of x is no longer finite.")

    monkeypatch.setattr(page, "run_all", fails)
    (page.NOTEBOOKS / "bad.ipynb").unlink()
    assert page.main([]) == 1
    said = capsys.readouterr().out
    assert "good: executed" in said and "a run failed: the loss of x is no longer finite." in said


def test_a_notebook_that_fails_costs_no_other_and_nothing_is_done_twice(small, capsys):
    assert page.main() == 1
    said = capsys.readouterr().out
    assert "good: executed" in said and "bad failed: ValueError: as it must" in said and "1 failed" in said
    good, bad = sorted(page.items(), key=lambda item: item.name == "bad")
    assert good.fresh() and not bad.fresh() and not bad.output.exists()
    assert (records.folder("figures") / "index.html").is_file()
    (page.NOTEBOOKS / "bad.ipynb").unlink()
    assert page.main() == 0 and "executed" not in capsys.readouterr().out
    os.utime(page.NOTEBOOKS / "good.ipynb", times=(time.time() + 5,) * 2)
    assert not good.fresh()


@pytest.mark.parametrize("change", [
    lambda cell: cell["outputs"].append({"output_type": "error", "ename": "E", "evalue": "", "traceback": []}),
    lambda cell: cell["metadata"].update(tags=["injected-parameters"]),
    lambda cell: cell.update(execution_count=None)])
def test_a_notebook_that_make_left_with_an_error_or_other_parameters_is_not_done(small, change):
    (page.NOTEBOOKS / "bad.ipynb").unlink()
    assert page.main() == 0
    good, = page.items()
    assert good.fresh()
    book = json.loads(good.output.read_text())
    change(book["cells"][1])
    good.output.write_text(json.dumps(book))
    assert not good.fresh()
    for other in ("{", "{}", "[]", "null", '{"cells": [{"cell_type": "code"}]}'):
        good.output.write_text(other)
        assert not good.fresh()


@pytest.mark.parametrize("words", [["--help"], ["lst"], ["list", "train"]])
def test_a_wrong_word_starts_nothing(words, small, capsys):
    with pytest.raises(ConfigError, match="^write list or train, or nothing, got"):
        page.main(words)
    assert page.main(["list"]) == 0 and "good" in capsys.readouterr().out and not list(records.folder("runs").glob("*"))
