"""The pins agree, the imports go downwards, and the README's commands exist."""

import ast
import json
import re
import statistics
import subprocess
import sys
import tomllib

import pytest
import yaml
from packaging.requirements import Requirement

from staa import records

ROOT = records.ROOT
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def pins():
    lines = [Requirement(line) for line in (ROOT / "requirements.txt").read_text().splitlines()]
    return [(r.name, next(iter(r.specifier)).version) for r in lines if all(s.operator == "==" for s in r.specifier)]


def test_every_dependency_is_pinned_within_its_bounds():
    extras = PROJECT["project"]["optional-dependencies"]
    for text in [*PROJECT["project"]["dependencies"], *(d for names in extras.values() for d in names)]:
        wanted = Requirement(text)
        versions = [version for name, version in pins() if name == wanted.name]
        assert versions and all(wanted.specifier.contains(v) for v in versions), text


def test_everything_in_requirements_is_pinned_and_names_no_address():
    text = (ROOT / "requirements.txt").read_text()
    assert len(pins()) == len(text.splitlines()) and "://" not in text and "--" not in text


def test_torch_and_torchvision_are_the_pair():
    constraints = PROJECT["tool"]["uv"]["constraint-dependencies"]
    assert sorted(constraints) == sorted(f"{n}=={v}" for n, v in pins() if n in ("torch", "torchvision"))


def test_conda_takes_the_same_pins():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    python, pip, packages = environment["dependencies"]
    assert packages == {"pip": ["-r requirements.txt", "-e ."]}, "one list of pins: requirements.txt"
    minor = PROJECT["project"]["requires-python"].removeprefix(">=")
    assert python == f"python={minor}" and pip == "pip"


def test_the_core_imports_need_no_more_than_torch_and_numpy():
    """torchvision, and sympy of torch.compile, which it imports, take twice as long as torch itself."""
    code = ("import sys, json, staa; staa.build('resnet20', width=1/16); "
            "print(json.dumps(sorted({m.partition('.')[0] for m in sys.modules} | {m for m in sys.modules if 'compile_fx' in m})))")
    loaded = json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert not {"torchvision", "sympy", "pandas", "matplotlib", "sklearn", "seaborn", "tonic", "captum", "IPython",
                "papermill", "safetensors", "huggingface_hub", "nir"} & set(loaded)
    assert "torch._inductor.compile_fx" not in loaded, "the compiler takes seconds to import, and little needs it"


def test_what_make_oldest_runs_imports_only_what_it_installs():
    """It has no pandas, matplotlib or Jupyter: a test of the core that imports a table's module is in the wrong file."""
    names = re.search(r"^CORE := (.*)$", (ROOT / "Makefile").read_text(), re.M)[1].split()
    code = ("import sys\n"
            "for name in ('pandas', 'matplotlib', 'seaborn', 'IPython', 'captum', 'spikingjelly', 'papermill', 'nbformat', 'nir'):\n"
            "    sys.modules[name] = None\n"
            f"for name in {names}:\n    __import__('test_' + name)\n")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT / "tests", check=False)
    assert done.returncode == 0, done.stderr


def test_imports_go_downwards():
    order = re.findall(r"\]\(staa/(\w+)\.py\)", (ROOT / "README.md").read_text().partition("| file | holds |")[2])
    files = {path.stem: path for path in (ROOT / "staa").glob("*.py") if path.stem != "__init__"}
    assert sorted(files) == sorted(order), "a new module takes its place in the README's list"
    for name, path in files.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                below = [node.module] if node.module else [alias.name for alias in node.names]
                assert all(order.index(module) < order.index(name) for module in below), f"{name} imports {below}"


@pytest.mark.parametrize("path", sorted((ROOT / "staa").glob("*.[chp]*")), ids=lambda path: path.name)
def test_a_file_is_read_in_one_sitting(path):
    lines = path.read_text().splitlines()
    assert len(lines) <= 300 and max(map(len, lines)) <= 120
    assert ast.get_docstring(ast.parse(path.read_text())) if path.suffix == ".py" else lines[0].startswith("//")


def test_what_is_not_python_is_installed_too():
    patterns = PROJECT["tool"]["setuptools"]["package-data"]["staa"]
    others = [path for path in (ROOT / "staa").iterdir() if path.is_file() and path.suffix != ".py"]
    assert {"fused_cpu.c", "fused_cpu.h"} <= {path.name for path in others}
    assert all(any(path.match(pattern) for pattern in patterns) for path in others), others


def test_make_alone_lists_the_targets():
    out = subprocess.run(["make", "-C", str(ROOT), "--no-print-directory"], capture_output=True, text=True, check=True).stdout
    targets = re.findall(r"^([a-z]+): .*##", (ROOT / "Makefile").read_text(), re.M)
    assert {"setup", "test"} <= set(targets) and all(f"make {target}" in out for target in targets) and "table1" in out


def test_the_readmes_code_runs():
    first, training, *_ = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert "STAALIF" in first and "staa.run" in training
    names: dict = {}
    exec(compile(first, "README.md", "exec"), names)
    exec(compile(training.replace("epochs=3", "epochs=1, train_images=40"), "README.md", "exec"), names)


def test_the_readmes_paths_and_targets_exist():
    text = (ROOT / "README.md").read_text()
    for path in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (ROOT / path).exists(), path
    known = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M)
    known += [path.stem for path in (ROOT / "notebooks").glob("*.ipynb")]
    targets = re.findall(r"^make ([a-z0-9]+)|`make ([a-z0-9_]+)", text, re.M)
    assert {a or b for a, b in targets} <= set(known)
    notebooks = {path.stem for path in (ROOT / "notebooks").glob("*.ipynb")}
    mapped = re.findall(r"\| \[(\w+)\.ipynb\]\(notebooks/(\w+)\.ipynb\) \| `make (\w+)` \|", text)
    assert all(len(set(row)) == 1 for row in mapped) and sorted(row[0] for row in mapped) == sorted(notebooks)
    for path in re.findall(r'"(data/[^"]+)"', text):
        assert (ROOT / path).exists(), path


def test_the_readmes_results_are_the_records():
    from staa import results

    shown = re.search(r"<!-- results.*?-->\n(.*?)\n<!-- end of results -->", (ROOT / "README.md").read_text(), re.S)
    table = results.results()
    expected = table.to_markdown(index=False, disable_numparse=True) if len(table) else "*No run is recorded yet.*"
    assert shown and shown[1].strip() == expected


def test_the_readmes_sentences_on_results_are_those_of_the_records():
    from staa import experiments, records, stats, studies, tables

    text = " ".join((ROOT / "README.md").read_text().split())

    def narrow(setups, measure):  # of a quarter of the width
        return {found[0].config["epochs"]: measure(found) for found in setups.values() if found[0].config["width"] == 0.25}

    steps = narrow(tables.vouched_setups(experiments.TABLE4), studies.steps)
    assert all(gain["all"].mean < 0 for gain in steps.values()), "in none of these runs does STAA beat LIF"
    for epochs, gain in steps.items():
        assert f"{-gain['all'].mean:.2f}" in text.partition("- In none of the runs")[2], epochs
    sa = steps[3]["SA with TSRD"]
    assert f"with TSRD, {-sa.mean:.2f} points after 3 epochs ({-sa.high:.2f} to {-sa.low:.2f})" in text
    undecided = {epochs for epochs, gain in steps.items() if not gain["all"].beyond_chance}
    assert undecided == {3, 24} and f"{-steps[12]['all'].high:.2f} to {-steps[12]['all'].low:.2f}, corrected" in text
    notebook = " ".join((ROOT / "notebooks" / "leak.ipynb").read_text().replace("\\n\",", "").replace('"', "").split())
    leaks = narrow(studies.vouched_leaks(), studies.leak_gains)
    leak, over_lif = leaks[12]["leak in GC + PE + SA + TSRD"], leaks[12]["staa-leaky over LIF"]
    both, neither = leaks[3]["SA with a leak"], leaks[3]["SA without a leak"]
    assert f"{leak.mean:.2f} points higher after 12 epochs (seeds 0 to 2; {leak.low:.2f} to {leak.high:.2f}, corrected" in text and leak.n == 3
    assert leak.beyond_chance and not any(gain.beyond_chance for gain in (over_lif, both, neither))
    assert f"{over_lif.mean:.2f} above LIF, in five of six seeds ({over_lif.low:.2f} to {over_lif.high:+.2f}: undecided" in text
    twelve = narrow(studies.vouched_leaks(), studies.leak_rows)[12]
    (lif, _), *_, (leaky, _) = [[{run.config["seed"]: run.accuracy for run in rs} for rs in pair] for pair in twelve.values()]
    assert sum(leaky[seed] > lif[seed] for seed in lif) == 5
    assert {epochs: gains["staa-leaky over LIF"].mean > 0 for epochs, gains in leaks.items()} == {3: True, 12: True, 24: False}
    late, late_lif, later = leaks[24]["leak in GC + PE + SA + TSRD"], leaks[24]["staa-leaky over LIF"], leaks[12]["SA with a leak"]
    assert late.n == late_lif.n == later.n == 3 and not any(gain.beyond_chance for gain in (late, late_lif, later))
    assert (f"it is {late.mean:.2f} above `staa` ({late.low:.2f} to {late.high:+.2f}) and {-late_lif.mean:.2f} below LIF "
            f"({late_lif.low:.2f} to {late_lif.high:+.2f}), both undecided") in text
    assert f"{later.mean:+.2f} where both leak after 12 epochs ({later.low:.2f} to {later.high:+.2f})" in text
    assert over_lif.n == 6 and f"SA itself: {both.mean:.2f} points where both rows leak ({both.low:.2f} to {both.high:+.2f}), and {neither.mean:.2f}" in text
    for words in (f"{leak.mean:.2f} points higher after 12 epochs, an interval from {leak.low:.2f} to {leak.high:.2f}",
                  f"{over_lif.mean:.2f} points above LIF after 12 epochs, in five of six seeds ({over_lif.low:.2f} to {over_lif.high:+.2f}",
                  f"SA loses {-both.mean:.2f} ({both.low:.2f} to {both.high:+.2f})",
                  f"it loses {-neither.mean:.2f} ({neither.low:.2f} to {neither.high:+.2f})",
                  "{:.2f} points in LIF, {:.2f} beside GC, PE and TSRD, and {:.2f} with SA".format(
                      *(leaks[3][f"leak in {part}"].mean for part in experiments.LEAK)),
                  "p is {:.2f}, {:.2f} and {:.2f}".format(*(leaks[3][f"leak in {part}"].p for part in experiments.LEAK)),
                  f"`staa-leaky` is {late.mean:.2f} points above `staa` ({late.low:.2f} to {late.high:+.2f}) and {-late_lif.mean:.2f} below LIF "
                  f"({late_lif.low:.2f} to {late_lif.high:+.2f})",
                  f"SA adds {later.mean:+.2f} points to GC, PE and TSRD where both rows leak ({later.low:.2f} to {later.high:+.2f})",
                  "`staa` is {:.2f}, {:.2f} and {:.2f} points below".format(*(-leaks[n]["staa over LIF"].mean for n in (3, 12, 24)))):
        assert words in notebook, words
    fsta = experiments.fsta(experiments.Settings("cut", 3, {}))
    found = {label: [records.find(c) for c in fsta if (c.neuron, c.neuron_settings) == (name, tables.full_settings(name, own))]
             for label, (name, own) in experiments.FSTA.items()}
    gain = stats.gain(found["FSTA"], found["FSTA's LIF"])
    rates = {f"{sum(map(tables.firing_rate, found[label])) / 3:.3f}" for label in ("FSTA", "FSTA's LIF")}
    assert len(rates) == 1 and f"It fires as often ({rates.pop()})" in text
    assert f"by {gain.mean:.2f} points (95 % interval of this comparison alone {gain.low:.2f} to {gain.high:+.2f}" in text


def test_the_readmes_sentences_on_full_width_networks_are_those_of_the_records():
    """Each of one seed; all that differs between the two trainings is the neuron."""
    from staa import records

    wide = {"width": 1, "dataset": "cifar10", "epochs": 24, "seed": 0, "network": "resnet20"}
    runs = [run for run in records.vouched() if wide.items() <= run.config.items()]
    staa, lif = sorted(runs, key=lambda run: run.config["neuron"], reverse=True)
    differ = {key for key in staa.config if staa.config[key] != lif.config[key]}
    assert differ == {"neuron", "neuron_settings"} and staa.config["epochs"] == 24 and not staa.config["train_images"]
    text = " ".join((ROOT / "README.md").read_text().split())
    assert f"comes to {staa.accuracy:.2f} % after 24 epochs on a GPU and the plain LIF neuron to {lif.accuracy:.2f} %" in text
    assert f"is {staa.accuracy - lif.accuracy:.2f} points above LIF: {staa.accuracy:.2f} to {lif.accuracy:.2f} %" in text
    more = staa.outcome["parameters"] / lif.outcome["parameters"] - 1
    assert f"STAA has {100 * more:.0f} % more parameters" in text
    assert "STAA in {:.0f} s, LIF in {:.0f} s".format(*(run.provenance["seconds"] for run in (staa, lif))) in text
    assert "takes {:.1f} s with LIF and {:.1f} s with STAA".format(
        *(statistics.median(run.provenance["seconds_per_epoch"][-10:]) for run in (lif, staa))) in text
    assert f"{staa.accuracy} to {lif.accuracy} %" in (ROOT / "notebooks" / "leak.ipynb").read_text()


def test_the_readmes_times_of_a_gpu_are_those_measured():
    step = json.loads((ROOT / "benchmarks" / "step-cuda.json").read_text())["steps"]["128"]
    graph, single = step["one graph"], step["kernel by kernel"]
    text = " ".join((ROOT / "README.md").read_text().split())
    assert (f"takes {graph['STAA']['median']:.0f} ms a step then, {single['STAA']['median']:.0f} ms where Python launches the "
            f"kernels one by one, and {single['STAA, reference']['median']:.0f} ms by the equations as they stand") in text
