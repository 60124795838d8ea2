"""The command line: words as settings, logs, help."""

import os
import re
import subprocess
import sys

import pytest

from staa import data, items, train
from staa.command import words_to_settings
from staa.networks import NETWORKS, NEURONS
from staa.settings import ConfigError, settings_of


def test_a_command_line_takes_values_as_json_or_python_writes_them():
    words = ["dataset=imagefolder:a b", "--lr=1e-3", "channels_last=False", "clip_norm=-1", "width=1/4", "momentum=.9",
             "train_images=1e4", "neuron_settings={'r': 8, 'gc': True}", "neuron_settings.beta=0.5",
             "network_settings.event=true", "frames=", "microbatch=nan"]
    read = words_to_settings(words)
    assert read == {
        "dataset": "imagefolder:a b", "lr": 0.001, "channels_last": False, "clip_norm": -1, "width": "1/4",
        "momentum": 0.9, "train_images": 10000, "neuron_settings": {"r": 8, "gc": True, "beta": 0.5},
        "network_settings": {"event": True}, "frames": "", "microbatch": "nan"}
    assert type(read["train_images"]) is int
    deep = "[" * 100_000
    assert words_to_settings([f"lr={deep}"]) == {"lr": deep}


@pytest.mark.parametrize("words, got", [
    (["neuron_settings.r=8", "neuron_settings.r=4"], "a second 'neuron_settings.r=4'"), (["--lr", "0.1"], "'--lr'"),
    (["lr=0.1", "lr.x=3"], "a second 'lr.x=3'"), (["neuron_settings.r=8", 'neuron_settings={"r": 4}'], "a second")])
def test_a_word_that_is_no_setting_or_is_there_twice(words, got):
    with pytest.raises(ConfigError, match=f"^a setting is written name=value, as lr=0.1, and once, got {re.escape(got)}"):
        words_to_settings(words)


def test_a_log_file_has_each_line_when_it_is_printed(tmp_path):
    """Also where the process is killed afterwards, as a cluster does at the end of its time."""
    program = ("import os, signal\nfrom staa.command import command\n"
               "command(lambda words: (print('epoch 1'), os.kill(os.getpid(), signal.SIGKILL)), str)")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with open(tmp_path / "log", "w") as log:
        assert subprocess.run([sys.executable, "-c", program], stdout=log, env=environment, check=False).returncode == -9
    assert (tmp_path / "log").read_text() == "epoch 1\n"


@pytest.mark.parametrize("words, code, said", [
    ("print('b\\u00fc')", 0, ""), ("raise OSError(errno.ENOSPC, 'No space left on device')", 1, "staa: there is no room left on"),
    ("sys.stdout.close(); sys.stdout = None", 0, "")])
def test_a_log_that_cannot_be_written_is_no_traceback(words, code, said, tmp_path):
    """A name that it cannot spell, a full disk, no output at all."""
    program = f"import errno, sys\nfrom staa.command import command\ndef main(words):\n    {words}\ncommand(main, str)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False,
                          env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert done.returncode == code and done.stderr.startswith(said) and done.stderr.count("\n") == bool(said)
    assert done.stdout == ("b\\xfc\n" if "print" in words else "")


def test_help_names_every_setting_and_what_it_can_be():
    said = train.usage()
    for name in [*NETWORKS, *NEURONS, *data.DATASETS, *data.AUGMENTATIONS, 'epochs: int = 1']:
        assert name in said
    for name, made in NEURONS.items():
        assert all(f"{key}={value!r}" in said.partition(f"settings of {name}: ")[2] for key, (_, value) in settings_of(made).items())
    assert "table4" in items.usage() and "train_images" in items.usage()
