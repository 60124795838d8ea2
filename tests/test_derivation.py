"""The derivation tells the whole of section 3: every formula once, in order, marked, computed and compared."""

import re

import nbformat
import pytest

from staa import records

CELLS = nbformat.read(records.ROOT / "notebooks" / "derivation.ipynb", as_version=4).cells
TEXT = "\n".join(cell.source for cell in CELLS if cell.cell_type == "markdown")
CODE = "\n".join(cell.source for cell in CELLS if cell.cell_type == "code")
#: Whose reading each formula is, as the docstrings of staa and the README have it.
BASIS = {"1": ["standard"], "2": ["text"], "3": ["standard"], "4": ["standard"], "5": ["text"], "6": ["text"],
         "7": ["standard"], "8": ["standard"], "9": ["standard", "text"], "10": ["standard"], "11": ["text", "ours"],
         "12": ["text", "ours", "standard"], "13": ["text"], "14": ["ours"], "TSRD": ["text", "ours"]}


def test_every_formula_stands_once_in_the_papers_order():
    assert re.findall(r"\\tag\{(\w+)\}", TEXT) == list(BASIS)


@pytest.mark.parametrize("name", BASIS)
def test_a_formula_says_whose_reading_it_is_and_that_it_was_lost(name):
    (mark,) = re.findall(r"\\tag\{%s\}\s*\$\$\n\n> (.*)" % name, TEXT)
    assert re.findall(r"\*\*\[(\w+)\]\*\*", mark) == BASIS[name]
    assert name == "TSRD" or "lost in our source" in mark


@pytest.mark.parametrize("name", BASIS)
def test_a_formula_is_compared_with_the_module(name):
    wanted = "TSRD, training" if name == "TSRD" else f"eq. {name}"
    assert f'same("{wanted}", ' in CODE


def test_the_boards_have_the_sliders_of_the_story():
    boards = [set(re.findall(r"(\w+)=\(", call)) for call in re.findall(r"sliders\.explore\((.*?\))\)\n*", CODE + "\n", re.S)]
    assert boards == [{"tau", "threshold", "input", "T"}, {"W", "a"}, {"tau", "threshold", "input", "T", "alpha", "gate"}]
