"""ruff and mypy, with the settings of pyproject.toml, find nothing; and both find what they should."""

import shutil
import subprocess
import sys

from staa import records

ROOT = records.ROOT


def check(tool, *words, cwd=ROOT):
    return subprocess.run([sys.executable, "-m", tool, *words], cwd=cwd, capture_output=True, text=True)


def test_ruff_finds_nothing(tmp_path):
    found = check("ruff", "check", "--no-cache", "staa", "tests", "benchmarks", "tools")
    assert not found.returncode, found.stdout


def test_ruff_asks_for_return_types_and_sorted_imports(tmp_path):
    (tmp_path / "bad.py").write_text("import os\nimport ast\ndef public(x):\n    return os, ast, x\n")
    found = check("ruff", "check", "--no-cache", "--config", str(ROOT / "pyproject.toml"), str(tmp_path / "bad.py"))
    assert "ANN201" in found.stdout and "I001" in found.stdout


def test_mypy_finds_nothing_and_finds_a_planted_error(tmp_path):
    """One cache for both, so that the second costs little."""
    shutil.copytree(ROOT / "staa", tmp_path / "staa", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    found = check("mypy", cwd=tmp_path)
    assert not found.returncode, found.stdout
    with (tmp_path / "staa" / "stats.py").open("a") as file:
        file.write('\n\ndef planted(found):\n    width: int = "x"\n    return width\n')
    found = check("mypy", cwd=tmp_path)
    assert found.returncode and "stats.py" in found.stdout and "[assignment]" in found.stdout
