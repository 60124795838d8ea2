"""The worked examples of CONTRIBUTING.md, as they stand on the page."""

import re

import nbformat
import pytest
import test_notebooks
import torch

import staa
from staa import data, experiments, records

PAGE = (records.ROOT / "CONTRIBUTING.md").read_text()
EXAMPLES = dict(re.findall(r"```python (\w+)\n(.*?)```", PAGE, re.S))


REGISTRIES = (staa.NEURONS, staa.NETWORKS, data.DATASETS, experiments.ITEMS)


@pytest.fixture(autouse=True)
def nothing_stays(monkeypatch, tmp_path):
    """The names that an example adds are gone after it; no record of the project is read."""
    monkeypatch.setenv("STAA_RECORDS", str(tmp_path / "records"))
    before = [dict(names) for names in REGISTRIES]
    yield
    for names, old in zip(REGISTRIES, before):
        names.clear()
        names.update(old)


def example(name, **given):
    exec(compile(EXAMPLES[name], "CONTRIBUTING.md", "exec"), given)
    return given


def test_the_page_is_one_page_and_every_example_is_tested():
    assert set(EXAMPLES) == {"neuron", "surrogate", "network", "dataset", "item", "notebook"} and len(PAGE.splitlines()) < 150
    assert PAGE.count("```python") == len(EXAMPLES)


def test_the_neuron_learns_its_decay_in_one_epoch_on_digits(capsys):
    made = example("neuron")
    record = made["record"]
    assert record.config["dataset"] == "digits" and len(record.outcome["epochs"]) == 1
    assert record.config["neuron_settings"]["decay"] == 0.5 and record.accuracy > 30  # guessing: 10
    network = staa.train.trained(record)
    decays = [layer.logit.sigmoid().item() for layer in staa.neurons(network).values()]
    assert len(decays) == 10 and any(abs(decay - 0.5) > 1e-3 for decay in decays)

    neuron, x = made["LearnedLIF"](3, 4, decay=0.7), torch.randn(4, 2, 3, 5, 5)  # before training: a LIF with that decay
    assert torch.equal(neuron(x), staa.LIF(decay=neuron.logit.sigmoid().item())(x))


def test_the_surrogate_is_the_arctangents_and_takes_the_fast_path():
    made = example("surrogate")
    torch.testing.assert_close(made["x"].grad.flatten(), torch.tensor([1, 1 / (1 + (torch.pi / 2) ** 2)]))
    assert made["Arctangent"](decay=0.0)(made["x"]).grad_fn.name() == "_LIFBackward"


def test_the_network_is_built_by_name_and_gradients_reach_its_first_layer():
    network = example("network")["network"]
    network(torch.rand(2, 3, 6, 6)).square().sum().backward()
    assert len(staa.neurons(network)) == 3 and network.layers[0][0].weight.grad.abs().sum() > 0
    staa.Config(network="shallow", network_settings={"depth": 1})
    with pytest.raises(staa.config.ConfigError, match="depth"):
        staa.Config(network="shallow", network_settings={"length": 1})


def test_the_dataset_is_trained_on_and_named_in_the_record():
    record = example("dataset")["record"]
    digits = data.Digits(False)
    assert record.outcome["classes"] == 2 and record.outcome["test_images"] == len(digits)
    assert record.outcome["fingerprint"]["test"] != data.fingerprint(digits) and record.accuracy > 50


def test_the_notebook_has_the_houses_shape_and_holds(capsys, monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0})  # the two runs here, not in processes that first import torch
    example("item")
    cells = [nbformat.v4.new_markdown_cell("# Reset\n\nRunning time: a minute.\n\n## What differs from the paper\n\n"
                                           "## What must hold")]
    reference = nbformat.read(records.ROOT / "notebooks" / "table1.ipynb", as_version=4).cells
    cells.append(nbformat.v4.new_code_cell(test_notebooks.parameters(reference), metadata={"tags": ["parameters"]}))
    for tag, source in re.findall(r"# %%([^\n]*)\n(.*?)(?=# %%|\Z)", EXAMPLES["notebook"], re.S):
        cells.append(nbformat.v4.new_code_cell(source, metadata={"tags": tag.split()}))
    test_notebooks.test_its_shape_is_the_houses(("reset", cells))
    test_notebooks.test_its_parameters_are_those_of_its_neighbours(("reset", cells))
    namespace = {}
    for cell in cells[1:]:
        exec(cell.source, namespace)
        if "parameters" in cell.metadata.get("tags", []):
            namespace |= {"epochs": 1, "width": 1 / 16, "train_images": 200}  # as papermill's -p would
    assert "holds" in capsys.readouterr().out and len(namespace["runs"]) == 2
