import hashlib
import json
import math
import os
import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from typing import Literal, Optional

import numpy as np
import pytest
import torch
from torch import nn

from staa import LIF, NETWORKS, NEURONS, Config, build, neurons
from staa.config import LATER, min_size
from staa.networks import VGG
from staa.settings import ConfigError, settings_of


@pytest.mark.parametrize("settings, words", [
    (dict(dataset="mnist"), "dataset must be one of digits, digits-rows, cifar10, .*, dvsgesture or imagefolder:NAME"),
    (dict(dataset="digits:x"), "dataset must be one of"), (dict(dataset="imagefolder:"), "dataset must be one of"),
    (dict(network="alexnet"), "network must be one of vgg13"), (dict(neuron="LIF"), "neuron must be one of lif, staa, fsta, statten"),
    (dict(augment="mixup"), "augment must be one of none, standard"), (dict(precision="fp16"), "float32, bf16"),
    (dict(network="ResNet-20"), "got 'ResNet-20'; did you mean resnet20.$"), (dict(network="inception"), "got 'inception'$"),
    (dict(dataset="CIFAR-10"), "or imagefolder:NAME, got 'CIFAR-10'; did you mean cifar10.$"),
    (dict(neuron_settings="{r:8}"), "^neuron_settings must be a dictionary, got str '{r:8}'; write .*neuron_settings.r=8$"),
    (dict(width="a quarter"), "^width must be a number, got str 'a quarter'$"), (dict(width="wide"), "got str 'wide'$"),
    (dict(width="1/4"), "^width must be a number, got str '1/4'; write 0.25 for 1/4$"),
    (dict(lr="1e-3"), "lr must be a number, got str '1e-3'; in YAML write 1.0e-3"), (dict(lr=0.0), "lr must be a finite"),
    (dict(lr=float("nan")), "lr must be a finite"), (dict(lr=float("inf")), "lr must be a finite"),
    (dict(lr=10 ** 400), "lr must be a finite number, got inf"), (dict(clip_norm=math.inf), "clip_norm must be a finite number"),
    (dict(weight_decay=math.inf), "weight_decay must be a finite"), (dict(width=math.inf), "width must be a finite"),
    (dict(neuron="lif", neuron_settings={"a": math.inf}), "neuron_settings a must be a finite number, got inf"),
    (dict(neuron="lif", neuron_settings={"gain": math.nan}), "neuron_settings gain must be a finite number, got nan"),
    (dict(neuron="lif", neuron_settings={"v_th": 1e39}), "v_th must be a finite number of at most 1e30 in size, got 1e.39"),
    (dict(width=1e9, neuron="lif"), "network resnet20 could not be built with width=1e.09 and T=4: .*overflow"),
    (dict(width=1e308), "network resnet20 could not be built"), (dict(network=["resnet20"]), "network must be text"),
    (dict(lr=1e40), "lr must be at most 1e.30"), (dict(batch_size=2 ** 63), "batch_size must be at most 2147483647"),
    (dict(threads=100_000), "threads must be at most 1024"), (dict(image_size=10 ** 9), "image_size must be at most 65536"),
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


@pytest.mark.parametrize("name, words", [
    ("r", "it belongs to the neuron_settings of staa"), ("LR", "did you mean lr."), ("learning_rate", None),
    ("chunk", "it belongs to the network_settings of statten-2-256"), ("batch-size", "did you mean batch_size.")])
def test_a_name_that_is_no_setting_is_told_what_was_perhaps_meant(name, words):
    with pytest.raises(ConfigError, match=f"^a setting must be one of dataset, .*, got '{name}'{f'; {words}' if words else ''}$"):
        Config.from_dict({name: 8})


@pytest.mark.parametrize("name, least", [
    *((name, 1) for name in ("T", "epochs", "batch_size", "image_size", "threads")),
    *((name, 0) for name in ("train_images", "microbatch", "seed", "warmup_epochs", "clip_norm", "weight_decay"))])
def test_a_setting_below_its_bound_is_told_the_bound(name, least):
    real = name in ("clip_norm", "weight_decay")
    for below in (-0.5, -3.0) if real else (least - 1, -3):
        with pytest.raises(ConfigError, match=f"^{name} must be at least {least}, got {below}$"):
            Config(**{name: below})
    if name != "image_size":  # the network needs more than a pixel
        assert getattr(Config(network="resnet20", **{name: least}), name) == least


def test_a_name_is_a_files_name_whatever_folder_the_dataset_is():
    config = Config(dataset="imagefolder:my/pets:small", network="vgg13", neuron="lif", T=2, seed=3)
    assert config.name == f"imagefolder_my_pets_small-vgg13-lif-T2-s3-{config.hash}"


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


def test_numpys_numbers_are_numbers():
    """As a grid of np.logspace gives them."""
    plain = Config(lr=0.5, T=2, neuron_settings={"r": 8, "beta": 0.25})
    given = Config(lr=np.float64(0.5), T=np.int64(2), neuron_settings={"r": np.int32(8), "beta": np.float32(0.25)})
    assert given.name == plain.name and given.json == plain.json
    assert build("vgg13", num_classes=np.int64(7), width=np.float32(0.125)).head.out_features == 7
    for wrong in (dict(T=np.float64(2)), dict(T=np.True_), dict(lr=np.float64("nan"))):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            Config(**wrong)


def test_it_cannot_be_changed():
    with pytest.raises(AttributeError):
        Config().T = 8


class Written(nn.Module):
    """Its annotations are text, as under `from __future__ import annotations`."""

    def __init__(self, channels: "int", T: "int", *, scale: "float" = 1):
        super().__init__()
        self.lif, self.scale = LIF(), scale

    def forward(self, x):
        return self.lif(self.scale * x)


class Factory:
    def __call__(self, channels, T, *, scale: float = 1.0):
        return Written(channels, T, scale=scale)


def function(channels, *, T, scale: float = 1.0):
    return Written(channels, T, scale=scale)


@pytest.mark.parametrize("neuron", [Written, function, Factory(), partial(function), Factory().__call__],
                         ids=["class", "function", "instance", "partial", "method"])
def test_any_class_or_factory_is_a_neuron_with_a_name(monkeypatch, neuron):
    monkeypatch.setitem(NEURONS, "mine", neuron)
    config = Config(neuron="mine", neuron_settings={"scale": 2})
    assert config.neuron_settings == {"scale": 2.0} and Config(neuron="mine").neuron_settings == {"scale": 1.0}
    assert build("resnet20", "mine", width=1 / 16, scale=3).stem[1].scale == 3.0
    with pytest.raises(ConfigError, match="neuron_settings of mine must be among scale, got 'skale'"):
        Config(neuron="mine", neuron_settings={"skale": 2.0})
    monkeypatch.setitem(NEURONS, "mine", lambda channels, T: LIF())
    assert Config(neuron="mine").neuron_settings == {}


def failing(channels, T):
    raise RuntimeError("no such thing\nas this")


def test_a_setting_need_be_neither_keyword_only_nor_annotated(monkeypatch):
    class Mine(LIF):
        def __init__(self, channels, T=None, tau=2.0, detach: bool = False, *, surrogate=1, other: object = None, hook=print):
            super().__init__(decay=1 - 1 / tau)

    monkeypatch.setitem(NEURONS, "mine", partial(Mine, other=None, hook=None))
    with pytest.raises(ConfigError, match="a setting must be annotated as int, float, bool, str, got other: object"):
        Config(neuron="mine")

    class Fewer(Mine):
        def __init__(self, channels, T=None, tau=2.0, detach: bool = False, hook=print):
            super().__init__(channels, T, tau, detach)

    monkeypatch.setitem(NEURONS, "mine", Fewer)
    config = Config(neuron="mine", neuron_settings={"tau": 4})
    assert config.neuron_settings == {"tau": 4.0, "detach": False}
    assert {layer.decay for layer in neurons(build("resnet20", "mine", tau=4.0, width=1 / 16)).values()} == {0.75}
    with pytest.raises(ConfigError, match="neuron_settings of mine must be among tau, detach, got 'hook'"):
        Config(neuron="mine", neuron_settings={"hook": 1})


def test_what_a_name_stands_for_may_change(monkeypatch):
    """Where the settings are those of a network that was looked at already."""
    monkeypatch.setitem(NETWORKS, "mine", NETWORKS["resnet19"])
    looked_at = min_size.cache_info().misses
    assert [Config(network="mine", image_size=8, seed=seed).image_size for seed in range(2)] == [8, 8]
    assert min_size.cache_info().misses == looked_at + 1
    monkeypatch.setitem(NETWORKS, "mine", NETWORKS["resnet18"])
    with pytest.raises(ConfigError, match="image_size of mine must be at least 32, got 8"):
        Config(network="mine", image_size=8)


def test_a_factory_that_cannot_be_hashed(monkeypatch):
    @dataclass
    class Factory:
        decay: float

        def __call__(self, channels, T):
            return LIF(decay=self.decay)

    monkeypatch.setitem(NEURONS, "mine", Factory(0.5))
    assert Config(neuron="mine").neuron_settings == {}


def test_a_network_that_computes_while_it_is_built_is_a_network(monkeypatch):
    class Mine(VGG):
        def __init__(self, *args, **settings):
            super().__init__(*args, channels=[64], **settings)
            self.depths = [x.item() for x in torch.linspace(0, 0.1, 3)]

    monkeypatch.setitem(NETWORKS, "mine", Mine)
    before = torch.get_rng_state()
    assert Config(network="mine", width=1 / 16).network == "mine" and torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("neuron, words", [
    (type("Mine", (LIF,), {"__init__": lambda self, channels, T, *, x=None: None}), "annotated as .*, got x=None"),
    (lambda channels: LIF(), "neuron mine could not be built as neuron.channels, T=T.: .*'T'"),
    (lambda channels, T, *, x: LIF(), "could not be built as neuron.channels, T=T.: .*'x'"),
    (failing, "neuron mine could not be built as neuron.channels, T=T.: no such thing$"),
    (lambda channels, T: int("x"), "neuron mine could not be built as neuron.channels, T=T.: invalid literal"),
    (partial(LIF, decay=2.0), "^decay must be between 0 and 1"),
    (lambda channels, T: None, "neuron mine must build a torch module, got NoneType"),
    (LIF(), "neuron mine must be a class or a factory, got a LIF"), (5, "neuron mine must be a class or a factory, got a int")])
def test_a_neuron_that_cannot_be_built_gets_one_sentence(monkeypatch, neuron, words):
    monkeypatch.setitem(NEURONS, "mine", neuron)
    for kind, make in (ConfigError, lambda: Config(neuron="mine")), (ValueError, lambda: build("resnet20", "mine", width=1 / 16)):
        with pytest.raises(kind, match=words) as caught:
            make()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", [Optional[float], float | None, Literal["a", "b"], dict, "list[int]"], ids=str)
def test_a_setting_has_one_of_four_types(kind):
    def neuron(channels, T, *, x=None):
        return LIF()

    neuron.__annotations__["x"] = kind
    with pytest.raises(ConfigError, match="a setting must be annotated as int, float, bool, str, got x: "):
        settings_of(neuron)


def test_a_network_of_somebodys_own_that_fails_gets_one_sentence(monkeypatch):
    monkeypatch.setitem(NETWORKS, "mine", lambda neuron, num_classes, in_channels, T, width: 1 / 0)
    with pytest.raises(ConfigError, match="network mine could not be built with width=1 and T=4: division by zero"):
        Config(network="mine")
