"""Every table and figure: `make list` and `make all`.

    python -m staa.page list    # each item, its cost, whether its runs are there
    python -m staa.page         # train what is missing, execute the notebooks, write figures/index.html
    python -m staa.page train   # only the first of these

What is done already is not done again: a run with a record is read, and a notebook is executed when it, the package or
the paper's numbers are newer than its output.
"""

import base64
import html
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from . import devices, records
from .command import command
from .experiments import ITEMS, Settings, run_all
from .settings import ConfigError

NOTEBOOKS = records.ROOT / "notebooks"
#: The order of the paper; what is not named here follows, by name.
ORDER = ["derivation", "figure1", "table1", "table2", "table3", "table4", "figure2", "position_encoding", "figure3",
         "figure4", "figure5", "convergence", "leak", "inside", "energy", "fsta", "statten", "siblings"]
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>STAA-SNN: every table and figure</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; font-size: 13px; }
th, td { padding: .25rem .6rem; text-align: left; vertical-align: top; }
thead th { border-bottom: 1px solid #444; }
tbody tr:nth-child(even) { background: #f4f4f4; }
img { max-width: 100%; }
.wide { overflow-x: auto; }
.cost { color: #555; }
</style></head>
<body><h1>STAA-SNN: every table and figure</h1>
<p>The paper's numbers, the recorded ones of this project and those of this run, side by side.</p>
"""


@dataclass(frozen=True)
class Item:
    """A notebook: its name, title and running time as its first cell says."""

    name: str
    title: str
    cost: str

    @property
    def output(self) -> Path:
        return records.folder("runs") / f"{self.name}.ipynb"

    def runs(self) -> list:
        """The configs of `smoke`, with the seeds that its parameters cell asks for; none for an item without runs."""
        seeds = [int(line.split("=")[1].split("#")[0]) for line in source(self.name, "parameters").splitlines()
                 if line.startswith("seeds")]
        return ITEMS[self.name](Settings("smoke", seeds[0], {})) if self.name in ITEMS else []

    def fresh(self) -> bool:
        """Whether its output was executed to the end, as it stands, and is newer than all it is made of."""
        made_of = [NOTEBOOKS / f"{self.name}.ipynb", *Path(__file__).parent.glob("*.py"),
                   *records.folder("paper").glob("*.csv"), *records.folder("records").glob("*.json")]
        return (self.output.exists() and self.output.stat().st_mtime > max(p.stat().st_mtime for p in made_of)
                and executed_as_it_stands(self.output))


def executed_as_it_stands(notebook: Path) -> bool:
    """Whether every cell was executed, none with an error, and papermill injected no parameters, as `make table1` does
    where it is given some."""
    try:
        cells = [c for c in json.loads(notebook.read_text("utf-8"))["cells"] if c.get("cell_type") == "code"]
        return all(c["execution_count"] and "injected-parameters" not in c["metadata"].get("tags", [])
                   and all(output["output_type"] != "error" for output in c["outputs"]) for c in cells)
    except (ValueError, LookupError, TypeError, AttributeError):  # it is no notebook
        return False


def source(name: str, tag: str = "") -> str:
    """The first cell of a notebook, or the one with this tag; nothing where there is none."""
    try:
        cells = json.loads((NOTEBOOKS / f"{name}.ipynb").read_text("utf-8"))["cells"]
        return "".join(next((c["source"] for c in cells if not tag or tag in c["metadata"].get("tags", [])), ""))
    except (ValueError, LookupError, TypeError, AttributeError):
        return ""


def items() -> list[Item]:
    names = [path.stem for path in NOTEBOOKS.glob("*.ipynb")]
    if not names:
        raise ConfigError(f"the notebooks come with a checkout of the project, and {NOTEBOOKS} has none.")
    found = []
    for name in [n for n in ORDER if n in names] + sorted(set(names) - set(ORDER)):
        first = source(name)
        if not first.startswith("# "):  # a reader's own sheet
            continue
        time = first.partition("Running time:")[2].partition(".")[0].strip() if "Running time:" in first else "not said"
        found.append(Item(name, first.splitlines()[0].removeprefix("# "), " ".join(time.replace("`", "").split())))
    return found


def listing() -> str:
    """Each item in a line: its title, its cost, how many of its runs have a record."""
    lines = []
    for item in items():
        configs = item.runs()
        there = sum(records.find(config) is not None for config in configs)
        state = f"{there} of {len(configs)} runs" if configs else "no runs"
        lines.append(f"{item.name:18} {state:16} {item.title}; {item.cost}")
    return "\n".join(lines)


def execute(item: Item) -> str:
    """Execute a notebook into runs/, whole or not at all; its error, or nothing."""
    with tempfile.TemporaryDirectory() as folder:
        executed = Path(folder) / item.output.name
        command = [sys.executable, "-m", "papermill", "--cwd", str(NOTEBOOKS), "--no-progress-bar",
                   str(NOTEBOOKS / f"{item.name}.ipynb"), str(executed)]
        # As many are executed at once as there are cores. JUPYTER_PATH could name another Python's kernel.
        alone = os.environ | {"OMP_NUM_THREADS": "1", "JUPYTER_PATH": ""}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=alone)
        if done.returncode:
            return f"{item.name} failed: {(done.stderr.strip() or str(done.returncode)).splitlines()[-1]}"
        try:
            records.write(item.output, executed.read_bytes())
        except records.RecordError as error:
            return f"{item.name} failed: {error}"
    print(f"{item.name}: executed")
    return ""


def page(found: list[Item]) -> str:
    """One page with each item's figures and table, everything inside the file."""
    figures = records.folder("figures")
    parts, names = [], [item.name for item in found]

    def owner(path: Path) -> str:  # energy_firing.png is energy's: the longest name that begins it
        return max((n for n in names if path.stem == n or path.stem.startswith(f"{n}_")), key=len, default="")

    for item in found:
        body = [f'<img alt="{path.stem}" src="data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}">'
                for path in sorted(figures.glob("*.png")) if owner(path) == item.name]
        body += [f'<div class="wide">{path.read_text("utf-8")}</div>'
                 for path in sorted(figures.glob("*.html")) if owner(path) == item.name]
        parts.append(f'<section id="{item.name}"><h2>{html.escape(item.title)}</h2>\n<p class="cost">make {item.name}: '
                     f'{html.escape(item.cost)}</p>\n' + "\n".join(body or ["<p>Not made yet.</p>"]) + "</section>")
    links = " · ".join(f'<a href="#{item.name}">{html.escape(item.title.partition(":")[0])}</a>' for item in found)
    return f"{PAGE}<p>{links}</p>\n" + "\n".join(parts) + "\n</body></html>\n"


def train(found: list[Item]) -> None:
    """The runs of these items, each once, as many side by side as there are cores."""
    run_all(list(dict.fromkeys(config for item in found for config in item.runs())))


def main(words: Sequence[str] = ()) -> int:
    """Without words everything; the exit status is 1 where a notebook failed, and the others are there all the same."""
    if words and words not in (["list"], ["train"]):
        raise ConfigError(f"write list or train, or nothing, got {' '.join(words)!r}")
    found = items()
    if words == ["list"]:
        print(listing())
        return 0
    if words == ["train"]:
        train(found)
        return 0
    stale = [item for item in found if not item.fresh()]
    failures = []
    try:
        train(stale)
    except RuntimeError as error:  # the other runs have ended well, and the notebook of this one will say it too
        failures.append(f"a run failed: {error}")
    with ThreadPoolExecutor(devices.cores()) as pool:  # each waits for a process of its own
        failures += [error for error in pool.map(execute, stale) if error]
    target = records.folder("figures") / "index.html"
    records.write(target, page(found).encode())
    print(*failures, f"{target}: {len(found)} items, {len(failures)} failed", sep="\n")
    return 1 if failures else 0


if __name__ == "__main__":
    command(main, lambda: str(__doc__))
