"""The items from the command line: train a grid, vouch for its records."""

import pytest

from staa import Config, experiments, items, records, run
from staa.settings import ConfigError

TINY = ["dataset=digits", "width=0.0625", "T=1", "train_images=64", "batch_size=32", "lr=0.01", "epochs=1"]


@pytest.fixture(autouse=True)
def own_records(tmp_path, monkeypatch):
    monkeypatch.setenv("STAA_RECORDS", str(tmp_path / "records"))


def test_the_cut_is_table_4_on_a_laptop():
    """What data/records is to hold where there is no GPU: issue 6's six rows, and nothing else differs between them."""
    configs = experiments.table4(items.parameters(["preset=cut", "seeds=3"]))
    assert len(configs) == len(set(configs)) == 18
    (same,) = {c.but(neuron_settings={}, seed=0) for c in configs}
    assert (same.dataset, same.train_images, same.width) == ("cifar10", 10_000, 0.25)
    assert (same.network, same.T) == ("resnet20", 4)
    blocks = [tuple(c.neuron_settings[name] for name in ("gc", "pe", "sa", "beta")) for c in configs[::3]]
    assert blocks == [(False, False, False, 0.0), (True, False, False, 0.0), (True, True, False, 0.0),
                      (True, True, False, 0.1), (True, True, True, 0.0), (True, True, True, 0.1)]
    assert [c.seed for c in configs] == [0, 1, 2] * 6


def test_a_grid_is_trained_and_its_finished_records_are_vouched_for(monkeypatch, capsys):
    monkeypatch.setitem(experiments.ITEMS, "table4", lambda s: [s.config(seed=k, image_size=16)
                                                               for k in range(s.seeds)])
    items.main(["train", "table4", *TINY, "seeds=1"])
    items.main(["vouch", "table4", *TINY, "seeds=2"])
    done, missing = (s.config(seed=k, image_size=16) for k, s in enumerate([items.parameters(TINY)] * 2))
    assert [r.config for r in records.vouched()] == [records.find(done).config]
    shown = capsys.readouterr().out
    assert "1 records of table4" in shown and f"no record yet: {missing.name}" in shown
    assert Config.from_dict(records.vouched()[0].config) == done


def test_no_record_is_put_beside_the_network_of_another_training(tmp_path, monkeypatch):
    """As another machine makes one of the same config."""
    monkeypatch.setenv("STAA_NETWORKS", str(tmp_path / "networks"))
    config = Config(**items.words_to_settings(TINY), image_size=16, neuron="lif")
    record = run(config, device="cpu", workers=0, log=None)
    items.ship(config.name)
    assert items.vouch([config]) == ([config], [])
    records.Record(record.config, record.outcome | {"test_accuracy": 1.0}, record.provenance).save(
        records.folder("runs") / config.name / "record.json")
    with pytest.raises(records.RecordError, match="holds the network of another training of .* `ship"):
        items.vouch([config])
    assert records.vouched() == [record]


@pytest.mark.parametrize("words, said", [
    ([], "write train or vouch"), (["train"], "write train or vouch"), (["train", "table9"], "one of table1"),
    (["train", "table4", "epoch=3"], "got 'epoch'"), (["train", "table4", "lr"], "name=value"),
    (["train", "table4", "lr=1e-3x"], "lr must be a number"), (["train", "table1", "T=8"], "table1 has no run with T=8"),
    (["vouch", "table1", "T=8"], "table1 has no run with T=8"), (["train", "table4", "lr=0.1", "lr=0.2"], "a second 'lr=0.2'"),
    (["train", "table4", "network=resnet50"], "network must be one of")])
def test_bad_words_stop_before_any_work(words, said):
    with pytest.raises(ConfigError, match=said):
        items.main(words)
