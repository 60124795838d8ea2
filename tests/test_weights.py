"""Weights as files: rebuilt from the file alone, and every way in which a file can fail to match is one sentence."""

import copy
import json
import shutil
import struct
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import staa
from staa import Config, experiments, items, records, train, weights
from staa.records import Record, RecordError

CONFIG = Config(dataset="cifar10", network="resnet20", neuron="staa", neuron_settings={"beta": 0.3, "alpha": 1.5, "a": 0.9}, T=2,
                width=1 / 16)
TINY = Config(dataset="digits", network="vgg13", neuron="lif", width=1 / 32, T=1, train_images=64, batch_size=32, lr=0.01)


@pytest.fixture(autouse=True)
def own_records(tmp_path, monkeypatch):
    for kind in ("records", "networks"):
        monkeypatch.setenv(f"STAA_{kind.upper()}", str(tmp_path / kind))


@pytest.fixture(scope="module")
def trained_once():
    network = weights.new_network(CONFIG, 7)
    network(torch.rand(16, 3, 32, 32))  # BN has seen something
    return network.eval()


@pytest.fixture
def network(trained_once):
    return copy.deepcopy(trained_once)


@pytest.fixture(scope="module")
def saved_once(trained_once, tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "file.safetensors"
    weights.save(path, trained_once.state_dict(), CONFIG, 7)
    return path.read_bytes()


@pytest.fixture
def file(tmp_path, saved_once):
    (tmp_path / "file.safetensors").write_bytes(saved_once)
    return tmp_path / "file.safetensors"


def refused(act, *said):
    with pytest.raises(RecordError) as caught:
        act()
    message = str(caught.value)
    assert all(part in message for part in said), message
    assert "\n" not in message and message.endswith(".") and not message.endswith("..")


def logits(network):
    with torch.no_grad():
        return network(torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)))


def rewritten(file, change, checked=True):
    """The file with its tensors or its entry changed, by safetensors' own functions, its checksum made anew."""
    with safe_open(file, "pt") as opened:
        about = json.loads(opened.metadata()["staa"])
    tensors = load_file(file)
    change(tensors, about)
    if checked:
        del about["sha256"]
        about["sha256"] = weights.checksum(about, tensors)
    save_file(tensors, file, {"staa": json.dumps(about)})


def test_the_file_alone_gives_the_network_back(file, network):
    again = staa.load(str(file))
    assert torch.equal(logits(again), logits(network)) and logits(network).std() > 0
    assert again.config == CONFIG and not again.training
    assert {type(n) for n in staa.neurons(again).values()} == {staa.STAALIF}
    state = again.state_dict()
    assert state.keys() == network.state_dict().keys()
    assert all(torch.equal(t, state[name]) and t.dtype == state[name].dtype for name, t in network.state_dict().items())


def test_a_folder_is_read_by_the_weights_in_it(tmp_path, file, network):
    shutil.copy(file, tmp_path / "weights.safetensors")
    staa.save_pretrained(staa.load(file), tmp_path / "hub")
    for folder in (tmp_path, str(tmp_path / "hub")):
        again = staa.load(folder).state_dict()
        assert all(torch.equal(again[name], t) for name, t in network.state_dict().items())
    with pytest.raises(RecordError, match=f"^there is no weights file {tmp_path / 'nothing'}"):
        staa.load(tmp_path / "nothing")


def test_loading_leaves_the_callers_generator_alone(file):
    before = torch.get_rng_state()
    staa.load(file)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_file_is_plain_safetensors(file, network):
    """By the format's description: eight bytes of length, JSON, numbers; another library reads the tensors."""
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8:8 + length])
    about = json.loads(header.pop("__metadata__")["staa"])
    assert Config.from_dict(about["config"]) == CONFIG and about["classes"] == 7
    start, end = header["head.weight"]["data_offsets"]
    numbers = struct.unpack(f"<{network.head.weight.numel()}f", content[8 + length + start:8 + length + end])
    assert list(numbers) == network.head.weight.flatten().tolist()


def test_channels_last_and_tied_weights_are_saved(tmp_path, network):
    network.to(memory_format=torch.channels_last)
    network.stages[1].conv1 = network.stages[1].conv2
    expected = logits(network)
    weights.save(tmp_path / "file", network.state_dict(), CONFIG, 7)
    torch.testing.assert_close(logits(staa.load(tmp_path / "file")), expected)


def without(name):
    return lambda tensors, about: tensors.pop(name)


def with_tensor(name, make):
    return lambda tensors, about: tensors.update({name: make(tensors)})


def with_setting(**settings):
    return lambda tensors, about: about["config"].update(settings)


@pytest.mark.parametrize("change, said", [
    (without("head.bias"), "the tensor head.bias is missing"),
    (with_tensor("head.extra", lambda t: torch.zeros(2)), "the tensor head.extra is not one of resnet20's with neuron staa"),
    (with_tensor("head.bias", lambda t: torch.zeros(8)), "head.bias is (8,) of torch.float32, and must be (7,)"),
    (with_tensor("head.bias", lambda t: t["head.bias"].double()), "head.bias is (7,) of torch.float64, and must be"),
    (with_setting(neuron="lif", neuron_settings={}), "is not one of resnet20's with neuron lif"),
    (with_setting(T=4), "and must be (4, "),
    (with_setting(network="vgg13", image_size=32), "is missing"),
    (with_setting(neuron="mine"), "its network cannot be built, neuron must be one of lif"),
    (with_setting(later=1), "its network cannot be built, a setting must be one of"),
    (lambda tensors, about: about.update(classes=9), "must be (9,"),
], ids=["missing", "unknown", "misshapen", "another type", "another neuron", "another T", "another network",
        "a neuron of someone else", "a setting of a later version", "another number of classes"])
def test_what_does_not_match_is_refused(file, change, said):
    rewritten(file, change)
    refused(lambda: staa.load(file), f"the weights file {file} does not match its config: ", said)


@pytest.mark.parametrize("change", [
    with_tensor("head.bias", lambda t: t["head.bias"] + 1e-6), with_setting(lr=0.2),
    with_setting(neuron_settings={"beta": 0.3, "alpha": 1.6, "a": 0.9}), with_setting(T=0.5, width=[]),
    lambda tensors, about: about.update(config=[]), lambda tensors, about: about.pop("config"),
    lambda tensors, about: about.update(classes="seven"), lambda tensors, about: about.update(classes=0),
    lambda tensors, about: about.update(sha256="0" * 64)])
def test_a_file_changed_behind_its_checksum_is_refused(file, change):
    rewritten(file, change, checked=False)
    refused(lambda: staa.load(file), f"the weights file {file} ")


def test_every_bit_counts(file):
    """One bit flipped at 60 places spread over the header and the numbers."""
    whole = file.read_bytes()
    for place in range(0, len(whole), len(whole) // 60):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 0x10]) + whole[place + 1:])
        refused(lambda: staa.load(file), str(file))
    file.write_bytes(whole)
    assert staa.load(file).config == CONFIG


@pytest.mark.parametrize("length", [0, 7, 8, 500, -1])
def test_a_truncated_file_is_damaged(file, length):
    file.write_bytes(file.read_bytes()[:length])
    refused(lambda: staa.load(file), f"the weights file {file} is damaged (", "get or make it again")


def test_what_is_no_weights_file_is_refused(tmp_path, network):
    refused(lambda: staa.load(tmp_path / "nothing"), f"there is no weights file {tmp_path / 'nothing'}")
    refused(lambda: staa.load(tmp_path), "there is no weights file")
    save_file({"a": torch.zeros(2)}, tmp_path / "others")
    refused(lambda: staa.load(tmp_path / "others"), "holds no config of this package")


def test_nothing_is_unpickled(tmp_path, network):
    class Trap:
        def __reduce__(self):
            return open, (str(tmp_path / "sprung"), "w")

    torch.save({"state": Trap()}, tmp_path / "file")
    refused(lambda: staa.load(tmp_path / "file"), "is damaged")
    assert not (tmp_path / "sprung").exists()


def test_what_does_not_fit_its_config_is_not_written(tmp_path, network):
    refused(lambda: weights.save(tmp_path / "file", network.state_dict(), CONFIG.but(T=4), 7),
            f"{tmp_path / 'file'} was not written: the tensor", "must be (4,")
    assert not (tmp_path / "file").exists()


# in the manner of the hub

def test_pretrained_there_and_back(tmp_path, network, no_network):
    staa.save_pretrained(network, tmp_path / "folder")
    assert sorted(p.name for p in (tmp_path / "folder").iterdir()) == ["config.json", "model.safetensors"]
    told = json.loads((tmp_path / "folder" / "config.json").read_text())
    assert told["classes"] == 7 and Config.from_dict(told["config"]) == CONFIG
    again = staa.from_pretrained(tmp_path / "folder")
    assert torch.equal(logits(again), logits(network)) and again.config == CONFIG
    staa.save_pretrained(again, tmp_path / "again")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "folder" / name).read_bytes()


def test_a_folder_whose_parts_disagree_is_refused(tmp_path, network):
    staa.save_pretrained(network, tmp_path)
    told = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(told | {"classes": 10}))
    refused(lambda: staa.from_pretrained(tmp_path), "tells of another network than model.safetensors")
    (tmp_path / "config.json").write_text("{")
    refused(lambda: staa.from_pretrained(tmp_path), "config.json is damaged")
    (tmp_path / "config.json").unlink()
    refused(lambda: staa.from_pretrained(tmp_path), "config.json is not there; get or make it again")
    (tmp_path / "model.safetensors").unlink()
    refused(lambda: staa.from_pretrained(tmp_path), "there is no weights file")


def test_a_network_without_a_config_is_refused(tmp_path):
    refused(lambda: staa.save_pretrained(torch.nn.Linear(2, 2), tmp_path / "folder"), "does not know its config")
    refused(lambda: staa.save_pretrained(staa.build("vgg13", "lif", width=1 / 16), tmp_path / "folder"),
            "does not know its config: make it with staa.weights.new_network")
    assert not (tmp_path / "folder").exists()


def test_a_setting_changed_by_hand_is_not_lost_in_silence(tmp_path, network):
    """The file holds the config, from which the network is built again."""
    name, neuron = list(staa.neurons(network).items())[1]
    neuron.v_th = 0.5
    refused(lambda: staa.save_pretrained(network, tmp_path), f"{name} has v_th = 0.5, and its config makes it 1.0")
    neuron.v_th, network.T = 1.0, 3
    refused(lambda: staa.save_pretrained(network, tmp_path), "has T = 3, and its config makes it 2")


def test_other_modules_than_the_configs_are_not_lost_in_silence(tmp_path, network):
    name, neuron = list(staa.neurons(network).items())[1]
    neuron.__class__ = staa.LeakySTAALIF
    refused(lambda: staa.save_pretrained(network, tmp_path), f"{name} is a staa.variants.LeakySTAALIF, and its config makes it a staa.attention.STAALIF")
    neuron.__class__ = staa.STAALIF
    pe, neuron.pe_input = neuron.pe_input, None
    refused(lambda: staa.save_pretrained(network, tmp_path), f"{name}.pe_input is missing, and its config makes it a staa.attention.PositionEnc")
    neuron.pe_input, neuron.more = pe, torch.nn.Identity()
    refused(lambda: staa.save_pretrained(network, tmp_path), f"{name}.more is a torch.nn.modules.linear.Identity, and its config has none")
    del neuron.more
    neuron.surrogate = staa.Surrogate(lambda v, a: v)
    refused(lambda: staa.save_pretrained(network, tmp_path), f"{name} has a surrogate of its own, which no file can hold")
    del neuron.surrogate
    neuron.__class__ = type("STAALIF", (staa.STAALIF,), {"charge": lambda self, hm, x: hm})
    refused(lambda: staa.save_pretrained(network, tmp_path), f"{name} is a test_weights.STAALIF, and its config makes it a staa.attention.STAALIF")
    neuron.__class__ = staa.STAALIF
    staa.save_pretrained(torch.nn.SyncBatchNorm.convert_sync_batchnorm(network), tmp_path)  # as after training on several GPUs


def test_a_compiled_network_is_saved_as_what_it_was_made_of(tmp_path, network):
    staa.save_pretrained(torch.compile(network), tmp_path)
    again = staa.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(again[name], t) for name, t in network.state_dict().items())


def test_another_head_is_refused(tmp_path, network):
    network.head = torch.nn.Sequential(network.head)
    refused(lambda: staa.save_pretrained(network, tmp_path), "the head is a Sequential, and its config makes it a Linear")


def test_a_repository_comes_from_the_hubs_own_cache_without_a_network(tmp_path, network, no_network, monkeypatch):
    """The cache as huggingface_hub documents it: refs/main names a commit, snapshots/COMMIT holds the files."""
    from huggingface_hub import constants

    cache, commit = tmp_path / "hub", "0" * 40
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    repository = cache / "models--someone--staa"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    staa.save_pretrained(network, repository / "snapshots" / commit)
    assert torch.equal(logits(staa.from_pretrained("someone/staa")), logits(network))
    refused(lambda: staa.from_pretrained("someone/else"), "someone/else is no folder, and the hub gave no such repository")
    refused(lambda: staa.from_pretrained("some/deep/path"), "is no folder")


def test_a_revision_of_a_repository_is_that_one_and_not_the_newest(tmp_path, network, no_network, monkeypatch):
    """refs/NAME names a branch's or a tag's commit; a commit is found by its own name."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    repository = tmp_path / "hub" / "models--someone--staa"
    (repository / "refs").mkdir(parents=True)
    for ref, commit, bias in (("main", "0" * 40, 0.0), ("v1", "1" * 40, 1.0)):
        (repository / "refs" / ref).write_text(commit)
        torch.nn.init.constant_(network.head.bias, bias)
        staa.save_pretrained(network, repository / "snapshots" / commit)
    for revision, bias in ((None, 0.0), ("v1", 1.0), ("1" * 40, 1.0), ("main", 0.0)):
        assert staa.from_pretrained("someone/staa", revision=revision).head.bias.tolist() == [bias] * 7
    refused(lambda: staa.from_pretrained("someone/staa", revision="v2"), "the hub gave no such repository")


def test_of_a_repository_two_files_are_downloaded_and_no_more(tmp_path, network, monkeypatch):
    """It may hold years of checkpoints."""
    import huggingface_hub

    def download(repository, *, revision, allow_patterns):
        assert (repository, revision) == ("someone/staa", "v1")
        staa.save_pretrained(network, tmp_path)
        assert sorted(allow_patterns) == sorted(p.name for p in tmp_path.iterdir() if p.name != "records")
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert torch.equal(logits(staa.from_pretrained("someone/staa", revision="v1")), logits(network))


def test_without_huggingface_hub_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    refused(lambda: staa.from_pretrained("someone/staa"), "huggingface_hub, which would look for it", "not installed")


# the weights of a run

def quiet(config, log=lambda line: None):
    return train.run(config, device="cpu", workers=0, log=log)


def without_safetensors(monkeypatch):
    monkeypatch.setattr(weights, "available", lambda: False)


def test_a_machine_without_safetensors_trains_and_loses_nothing(tmp_path, monkeypatch):
    """The same run with and without the library: the same record, the same network."""
    expected = train.trained(quiet(TINY)).state_dict()
    place, lines = tmp_path / "runs" / TINY.name, []
    assert staa.load(place / "weights.safetensors").config == TINY
    (place / "record.json").unlink()
    with monkeypatch.context() as bare:
        without_safetensors(bare)
        record = quiet(TINY, lines.append)
        assert sorted(p.name for p in place.iterdir()) == ["lock", "record.json", "weights.pt"]
        assert any("safetensors is not installed" in line for line in lines)
        network = train.trained(record)
        refused(lambda: staa.load(place / "weights.pt"), "safetensors is not installed", "pip install safetensors")
    assert network.config == TINY and not network.training
    assert all(torch.equal(t, expected[name]) for name, t in network.state_dict().items())


def test_a_finished_run_is_shipped_by_one_command(tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as bare:  # trained on a bare machine, shipped from this one
        without_safetensors(bare)
        record = quiet(TINY)
    items.main(["ship", TINY.name])
    shipped = tmp_path / "networks" / f"{TINY.name}.safetensors"
    assert str(shipped) in capsys.readouterr().out
    assert records.vouched() == [record]
    expected = train.trained(record).state_dict()
    assert all(torch.equal(t, expected[name]) for name, t in staa.load(shipped).state_dict().items())

    monkeypatch.setenv("STAA_RUNS", str(tmp_path / "a newcomer's"))
    found = records.find(TINY)
    assert found == record and train.trained(found).config == TINY, "the record's network comes with the project"
    Record.save(found, tmp_path / "a newcomer's" / TINY.name / "record.json")
    refused(lambda: train.trained(found), "are not there")  # the shipped network is not this run's


def test_the_weights_of_another_run_are_refused(tmp_path):
    record, other = quiet(TINY), quiet(TINY.but(seed=1))
    name = "weights.safetensors"
    (tmp_path / "runs" / TINY.but(seed=1).name / name).replace(tmp_path / "runs" / TINY.name / name)
    refused(lambda: train.trained(record), f"is of another run, {Config.from_dict(other.config).name}")


def test_a_record_without_its_network_is_trained_anew_where_the_network_is_needed(tmp_path, monkeypatch):
    monkeypatch.setenv("STAA_RUNS", str(tmp_path / "runs"))
    run = records.folder("runs") / TINY.name
    first = quiet(TINY)
    first.save(records.folder("records") / f"{TINY.name}.json")
    shutil.rmtree(run)

    assert quiet(TINY) == first and not run.exists()
    assert experiments.run_all([TINY], log=lambda _: None) == [first] and not run.exists()
    (again,) = experiments.run_all([TINY], networks=True, log=lambda _: None)
    assert again.outcome == first.outcome and (run / "record.json").is_file()
    state = train.trained(again).state_dict()

    refused(lambda: ((run / "weights.safetensors").unlink(), train.run(TINY, network=True)), "are not there")  # one's own
    shutil.rmtree(run)
    weights.save(weights.shipped_file(TINY), state, TINY, 10)
    assert train.run(TINY, network=True) == first and not run.exists()


def test_what_cannot_be_shipped_is_refused(monkeypatch):
    refused(lambda: items.main(["ship", "nothing"]), "there is no finished run")
    quiet(TINY)
    monkeypatch.setattr(items, "SHIPPED", 1000)
    refused(lambda: items.main(["ship", TINY.name]), "MB", "are shipped")
    assert not records.folder("networks").exists() and not records.folder("records").exists()


@pytest.mark.parametrize("neuron, accuracy", [("staa", 25), ("staa-leaky", 45)])  # ten classes: better than guessing
def test_the_project_ships_a_network_trained_on_real_data(monkeypatch, neuron, accuracy):
    """Its record is the project's own, and the file is small, whole and fires."""
    for kind in ("RECORDS", "NETWORKS"):
        monkeypatch.delenv(f"STAA_{kind}")
    assert sorted(record.config["neuron"] for record in weights.shipped()) == ["staa", "staa-leaky"]
    (record,) = weights.shipped(neuron=neuron)
    assert weights.shipped(neuron=neuron, neuron_settings=record.config["neuron_settings"]) == [record]
    refused(lambda: weights.shipped(neuron="lif"), "{'neuron': 'lif'} were looked for in", "data/records and", "data/networks, and are not there")
    network = train.trained(record)
    assert record.config["dataset"] == "cifar10" and record.config["neuron"] == neuron
    assert record.accuracy > accuracy
    assert sum(p.numel() for p in network.parameters()) == record.outcome["parameters"]
    assert weights.shipped_file(network.config).stat().st_size < 10e6
    with torch.no_grad(), staa.firing_rates(network) as rates:
        network(torch.rand(2, 3, 32, 32))
    assert all(0 < rate < 1 for rate in rates().values())
