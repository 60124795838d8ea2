import hashlib
import json
import os
import subprocess
import sys

import pytest

from staa import NETWORKS, NEURONS, Config
from staa.config import LATER, ConfigError, settings_of


@pytest.mark.parametrize("settings, words", [
    (dict(dataset="mnist"), "dataset must be one of digits, digits-rows, cifar10, .*, dvsgesture or imagefolder:NAME"),
    (dict(dataset="digits:x"), "dataset must be one of"), (dict(dataset="imagefolder:"), "dataset must be one of"),
    (dict(network="alexnet"), "network must be one of vgg13"), (dict(neuron="LIF"), "neuron must be one of lif, staa, fsta, statten"),
    (dict(augment="mixup"), "augment must be one of none, standard"), (dict(precision="fp16"), "float32, bf16"),
    (dict(lr="1e-3"), "lr must be a number, got str '1e-3'; in YAML write 1.0e-3"), (dict(lr=0.0), "lr must be a finite"),
    (dict(lr=float("nan")), "lr must be a finite"), (dict(lr=float("inf")), "lr must be a finite"),
    (dict(T=0), "T must be at least 1"), (dict(T=2.0), "T must be a whole number"), (dict(T=True), "whole number"),
    (dict(epochs=0), "epochs must be at least 1"), (dict(batch_size=-1), "batch_size"), (dict(seed=-1), "seed"),
    (dict(width=0.0), "width"), (dict(momentum=1.0), "momentum"), (dict(label_smoothing=-0.1), "label_smoothing"),
    (dict(train_images=-5), "train_images"), (dict(weight_decay=float("nan")), "weight_decay"),
    (dict(warmup_epochs=3, epochs=2), "warmup_epochs must not exceed epochs"), (dict(clip_norm=-1.0), "clip_norm"),
    (dict(channels_last="yes"), "channels_last must be True or False"),
    (dict(image_size=8), "image_size of resnet20 must be at least 16, got 8"),
    (dict(network="vgg13", image_size=16), "image_size of vgg13 must be at least 32"),
    (dict(dataset="cifar10", image_size=64), "image_size of cifar10 must be 32"),
    (dict(neuron_settings={"r": 8, "q": 1}), "neuron_settings of staa must be among .*r.*, got 'q'"),
    (dict(neuron="lif", neuron_settings={"r": 8}), "neuron_settings of lif must be among .*decay.*, got 'r'"),
    (dict(network_settings={"chunk": 2}), "network_settings of resnet20 must be empty, got 'chunk'"),
    (dict(network="sdt-2-256", network_settings={"chunk": 2}), "network_settings of sdt-2-256 must be among pools, event"),
    (dict(network="statten-2-256", network_settings={"depth": 3}), "must be among heads, chunk, pools, event, got 'depth'"),
    (dict(network="statten-2-256", network_settings={"chunk": 2.0}), "network_settings chunk must be a whole number"),
    (dict(network="statten-2-256", T=3), "chunk must divide T, got chunk=2 and T=3"),
    (dict(network="statten-2-256", network_settings={"heads": 7}), "heads must divide dim times width, got heads=7"),
    (dict(network="statten-2-256", network_settings={"pools": "11"}), "pools must be four flags like '0011', got '11'"),
    (dict(network="statten-8-512", image_size=8), "image_size of statten-8-512 must be at least 16"),
    (dict(network="sdt-2-256", width=0.1), "must be a multiple of 8, got 256 x 0.1 = 26"),
    (dict(optimizer="adam"), "optimizer must be one of sgd, adamw, got 'adam'"),
    (dict(dataset="digits-rows", T=3), "image_size of digits-rows must be a multiple of T=3, got 32"),
    (dict(neuron="fsta", neuron_settings={"a": 1.0}), "neuron_settings of fsta must be among temporal, .*got 'a'"),
    (dict(neuron="fsta", neuron_settings={"k": 0}), "k, the side of the DCT window"),
    (dict(neuron="fsta", neuron_settings={"k": 3, "reduction": 10}), "reduction must be between 1 and k . k = 9, got 10"),
    (dict(neuron="statten", neuron_settings={"tau": 0.5}), "tau must be at least 1 time step, got 0.5"),
    (dict(neuron_settings={"r": "8"}), "neuron_settings r must be a whole number"),
    (dict(neuron_settings={"beta": 2.0}), "beta, the probability"), (dict(neuron_settings=[]), "must be a dictionary")])
def test_a_bad_setting_gets_one_sentence(settings, words):
    with pytest.raises(ConfigError, match=words) as caught:
        Config(**settings)
    assert "\n" not in str(caught.value)


def test_an_unknown_setting_is_named():
    for make in (lambda: Config.from_dict({"learning_rate": 0.1}), lambda: Config().but(learning_rate=0.1)):
        with pytest.raises(ConfigError, match="a setting must be one of dataset, .*got 'learning_rate'"):
            make()


def test_the_same_run_has_the_same_hash_however_it_is_written():
    assert Config(lr=1).hash == Config(lr=1.0).hash
    assert Config(neuron_settings={"r": 4}).hash == Config().hash, "a default written out is no other run"
    assert Config.from_dict(json.loads(Config(T=2).json)) == Config(T=2)
    assert len({Config(), Config(), Config(T=2)}) == 2


def test_every_setting_changes_the_hash():
    others = dict(dataset="cifar10", image_size=16, train_images=10, augment="standard", network="vgg13", width=0.5,
                  neuron="lif", neuron_settings={"beta": 0.2}, T=2, optimizer="adamw", epochs=2, batch_size=1,
                  microbatch=1, lr=0.2, momentum=0.5,
                  weight_decay=0.0, warmup_epochs=1, label_smoothing=0.1, clip_norm=1.0, seed=1, precision="bf16",
                  channels_last=False, threads=2)
    hashes = {Config().but(**{name: value}).hash for name, value in others.items()}
    transformer = Config(network="statten-2-256")
    assert transformer.but(network_settings={"chunk": 4}).hash != transformer.hash
    events = Config(dataset="digits-dvs", image_size=34)
    assert events.but(frames="time").hash != events.hash
    assert {*others, "network_settings", "frames"} == set(json.loads(Config().json))
    assert len(hashes | {Config().hash}) == len(others) + 1


def test_a_setting_that_came_later_leaves_older_runs_their_name():
    old = json.loads(Config(T=2).json)
    for name, value in LATER.items():
        assert old.pop(name) == value
    text = json.dumps(old, sort_keys=True, separators=(",", ":"))
    assert Config(T=2).hash == hashlib.sha256(text.encode()).hexdigest()[:12]
    assert Config.from_dict(old) == Config(T=2)


def test_the_hash_is_the_same_in_every_process():
    code = "from staa import Config; print(Config(neuron_settings={'beta': 0.0, 'r': 8}).name)"
    out = {subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONHASHSEED": seed}, text=True,
                          capture_output=True, check=True).stdout for seed in "12"}
    assert out == {Config(neuron_settings={"r": 8, "beta": 0.0}).name + "\n"}


def test_a_neurons_settings_are_read_off_its_constructor():
    assert settings_of(NEURONS["lif"]).keys() == {"decay", "gain", "v_th", "v_reset", "a"}
    assert settings_of(NEURONS["staa"]).keys() == {"decay", "gain", "v_th", "v_reset", "a", "gc", "pe", "sa", "r", "alpha",
                                                   "beta", "pe_kind", "pe_place"}
    assert settings_of(NEURONS["fsta"]).keys() == {"temporal", "spatial", "k", "reduction", "decay", "v_th", "slope"}
    assert settings_of(NEURONS["statten"]).keys() == {"tau", "v_th", "slope"}


def test_a_networks_settings_are_read_off_its_constructor():
    assert {name: set(settings_of(NETWORKS[name])) for name in NETWORKS} == {
        name: {"heads", "chunk", "pools", "event"} if name.startswith("statten") else
        {"pools", "event"} if name.startswith("sdt") else set() for name in NETWORKS}
    assert Config(network="statten-8-512").network_settings == {"heads": 8, "chunk": 2, "pools": "1111", "event": False}
    assert Config(network="statten-2-256").but(network="resnet20").network_settings == {}


def test_it_cannot_be_changed():
    with pytest.raises(AttributeError):
        Config().T = 8
