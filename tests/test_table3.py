"""Table 3 and Figure 4: their grids, and the table."""

import json

import test_tables

from staa import Config, Record, tables
from staa.experiments import Settings, figure4, table3


def test_smoke_is_both_networks_and_their_twins_on_simulated_events():
    configs = table3(Settings("smoke", 1, {}))
    assert {(c.network, c.image_size, c.neuron) for c in configs} == {
        (network, size, neuron) for network, size in (("resnet20", 17), ("vgg13", 34)) for neuron in ("staa", "lif")}
    assert {(c.dataset, c.T, c.frames) for c in configs} == {("digits-dvs", 16, "count")}
    assert {c.but(neuron="lif") for c in configs if c.neuron == "staa"} == {c for c in configs if c.neuron == "lif"}


def test_real_presets_are_the_papers_own_rows():
    configs = table3(Settings("paper", 2, {}))
    assert len(configs) == len(set(configs)) == 3 * 2 * 2
    assert {(c.dataset, c.network, c.augment) for c in configs} == {
        ("cifar10dvs", "resnet20", "flip+roll"), ("cifar10dvs", "vgg13", "flip+roll"), ("dvsgesture", "vgg13", "roll")}
    assert {(c.T, c.width, c.epochs, c.image_size) for c in configs} == {(16, 1.0, 500, 48)}


def test_figure_4_shares_the_runs_of_table_3():
    for preset in ("smoke", "short"):
        settings = Settings(preset, 1, {})
        assert set(figure4(settings)) < set(table3(settings)) and len(figure4(settings)) == 2
    assert {c.network for c in figure4(Settings("smoke", 1, {"network": "resnet20"}))} == {"resnet20"}


def test_the_readers_parameters_win():
    configs = table3(Settings("short", 1, {"dataset": "nmnist", "image_size": 34, "T": 16, "neuron": "lif"}))
    assert {(c.dataset, c.network, c.image_size, c.neuron) for c in configs} == {
        ("nmnist", "resnet20", 34, "lif"), ("nmnist", "vgg13", 34, "lif")}


def record(accuracy, **settings):
    config = Config(T=16, **settings)
    return Record(json.loads(config.json), {"epochs": [{"test_accuracy": accuracy}]}, {})


def test_the_table_is_the_papers_21_rows_and_the_own_three_with_what_was_run(tmp_path, monkeypatch):
    monkeypatch.setenv("STAA_RECORDS", str(tmp_path))
    printed = tables.paper_table3()
    assert len(printed) == 21 and list(printed[printed.Method == "STAA-SNN"].Paper) == ["81.90", "82.10", "98.61"]
    table = tables.table3([record(50.0, dataset="dvsgesture", network="vgg13", neuron="lif"),
                           record(60.0, dataset="digits-dvs", network="vgg13", neuron="staa")])
    rows = table.set_index(["Dataset", "Architecture"])
    assert list(rows.Paper) == ["81.90", "82.10", "98.61", "not in the paper"]
    assert rows.loc[("DVS128 Gesture", "VGG-13"), "This run: LIF"] == "50.00"
    assert rows.loc[("DVS128 Gesture", "VGG-13"), "This run: STAA"] == "not run"
    assert rows.loc[("digits-dvs", "VGG-13"), "This run: STAA"] == "60.00"
    other = tables.table3([record(70.0, dataset="nmnist", network="sdt-2-256", neuron="statten")])
    assert list(other.Architecture)[-1] == "sdt-2-256" and list(other.Dataset)[-1] == "nmnist"


def test_only_records_of_16_time_steps_stand_beside_the_papers(tmp_path, monkeypatch):
    monkeypatch.setenv("STAA_RECORDS", str(tmp_path))
    for network, T, accuracy, epochs in ("vgg13", 16, 90.0, 5), ("vgg13", 8, 70.0, 50), ("resnet20", 8, 60.0, 50):
        test_tables.record(accuracy, tmp_path, dataset="cifar10dvs", network=network, T=T, epochs=epochs, image_size=48)
    rows = tables.table3([]).set_index(["Dataset", "Architecture"])["Recorded: STAA"]
    assert rows["CIFAR10-DVS", "VGG-13"] == "90.00 (n=1); 5 epochs, width 1, 50,000 images"
    assert rows["CIFAR10-DVS", "ResNet-20"] == rows["DVS128 Gesture", "VGG-13"] == "no record"
