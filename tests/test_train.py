"""The training loop against arithmetic by hand, and runs that are killed, doubled or damaged."""

import contextlib
import json
import os
import subprocess
import sys
from functools import partial

import faults
import numpy as np
import pytest
import torch
from faults import SMALL, apart, epochs_of, kill_at_step, kill_at_write
from safetensors.torch import load_file
from torch import nn

import staa
from staa import Config, records, train
from staa.optimizer import new_optimizer
from staa.records import Record, RecordError
from staa.settings import ConfigError
from staa.train import TrainingError, evaluate, learning_rate, run, train_epoch

CPU = torch.device("cpu")
DIGITS = Config(dataset="digits", image_size=16, width=1 / 32, T=1, train_images=64, batch_size=32, lr=0.01)
pytestmark = pytest.mark.usefixtures("root")
quiet = partial(run, device="cpu", workers=0, log=lambda line: None)


def test_a_run_can_be_silent(capsys):
    assert run(SMALL.but(epochs=1), device="cpu", workers=0, log=None).accuracy >= 0
    assert capsys.readouterr().out == ""


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Record and weights of SMALL where nothing happens."""
    root = tmp_path_factory.mktemp("undisturbed")
    faults.images(root)
    code, lines, record = apart(root)
    assert code == 0 and epochs_of(lines) == [1, 2, 3]
    return record, (root / "runs" / SMALL.name / "weights.safetensors")


def place(root, config=SMALL):
    return root / "runs" / config.name


def same_weights(a, b):
    a, b = (load_file(path) for path in (a, b))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def stop_after(epoch):
    """A log that interrupts the run, as Ctrl-C would, once this epoch's line has come."""
    def log(line):
        if f"epoch {epoch}/" in line:
            raise KeyboardInterrupt
    return log


def interrupted(epoch, config=SMALL):
    with pytest.raises(KeyboardInterrupt):
        run(config, device="cpu", workers=0, log=stop_after(epoch))


def test_what_a_killed_process_was_about_to_write_goes(root):
    """It bears a name of its own each time, and a checkpoint of a wide network is large."""
    place(root).mkdir(parents=True)
    for name in (".checkpoint.pt.k2x7", ".record.json.9abc", ".weights.safetensors.a", ".weights.pt.b", ".mine"):
        (place(root) / name).write_bytes(b"half")
    (place(root) / ".ipynb_checkpoints").mkdir()
    quiet(SMALL)
    assert sorted(os.listdir(place(root))) == [".ipynb_checkpoints", ".mine", "lock", "record.json", "weights.safetensors"]


def test_a_record_names_the_code_that_trained_it(monkeypatch):
    """The checkout may move on in the meantime."""
    head = ["loaded"]
    monkeypatch.setattr(records, "commit", lambda: head[0])
    record = run(SMALL.but(epochs=1), device="cpu", workers=0, log=lambda line: head.insert(0, "later"))
    assert record.provenance["commit"] == "loaded"


@pytest.mark.parametrize("device, dataset, images, processes, workers", [
    ("cuda", "digits", 5_000, 1, 8), ("cuda", "digits", 4_999, 1, 0), ("cuda", "digits", 5_000, 4, 3),
    ("cuda", "digits-dvs", 500, 1, 8), ("cuda", "digits-dvs", 499, 1, 0), ("cpu", "digits", 5_000, 1, 0)])
def test_processes_load_data_for_a_gpu_that_sees_many_images(monkeypatch, device, dataset, images, processes, workers):
    """On a machine of twelve cores that is said to have a GPU; the processes of torchrun share them."""
    class Many(list):
        targets, classes = [0] * images, ["a"]

    class Network(nn.Linear):
        def to(self, *args, **kwargs):
            return self

    class Seen(Exception):
        pass

    def loader(config, device, workers, peers):
        raise Seen(workers)

    monkeypatch.setattr(train.data, "load_for", lambda *args: Many(range(images)))
    monkeypatch.setattr(train.devices, "cores", lambda: 12)
    monkeypatch.setattr(train, "new_network", lambda *args: Network(1, 1))
    monkeypatch.setattr(train, "own_state", lambda *args: contextlib.nullcontext())
    monkeypatch.setattr(train, "Loader", loader)
    if processes > 1:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    with pytest.raises(Seen, match=f"^{workers}$"):
        train._train(Config(dataset=dataset), place(records.ROOT), torch.device(device), None, print, train.ALONE)


# --- the same config, the same outcome ---

def test_a_user_trains_from_the_command_line_and_this_process_makes_the_same_record(root, monkeypatch):
    words = [f"{name}={json.dumps(value)}" for name, value in vars(DIGITS).items()]
    done = subprocess.run([sys.executable, "-m", "staa.train", *words], capture_output=True, text=True,
                          env=os.environ | {"CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 0, done.stderr
    theirs = Record.load(place(root, DIGITS) / "record.json")
    assert done.stdout.splitlines()[-1] == f"{DIGITS.name}: {theirs.accuracy:.2f} % on the test set after 1 epochs"
    monkeypatch.setenv("STAA_RUNS", str(root / "others"))
    ours = quiet(DIGITS)
    assert (ours.config, ours.outcome) == (theirs.config, theirs.outcome)


def test_neither_the_callers_generator_nor_its_threads_reach_a_run_or_are_changed_by_it(undisturbed):
    failing, before, inside = SMALL.but(lr=1e30), torch.get_num_threads(), []
    state = torch.manual_seed(12345).get_state()
    torch.set_num_threads(2)
    try:
        record = run(SMALL, device="cpu", workers=0, log=lambda line: inside.append(torch.get_num_threads()))
        assert inside == [1, 1, 1] and torch.get_num_threads() == 2
        with pytest.raises(TrainingError):
            quiet(failing)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert record.outcome == undisturbed[0].outcome
    assert torch.equal(torch.get_rng_state(), state)


def test_another_seed_is_another_outcome(undisturbed):
    other = quiet(SMALL.but(seed=1))
    assert other.outcome["epochs"] != undisturbed[0].outcome["epochs"]


def test_workers_do_not_change_the_outcome(undisturbed):
    assert run(SMALL, device="cpu", workers=2, log=lambda line: None).outcome == undisturbed[0].outcome


def test_a_complete_run_is_read_and_not_trained(root, monkeypatch):
    first = quiet(SMALL.but(epochs=1))
    monkeypatch.setattr(train, "_train", lambda *_: pytest.fail("trained again"))
    assert quiet(SMALL.but(epochs=1)) == first
    assert sorted(os.listdir(place(root, SMALL.but(epochs=1)))) == ["lock", "record.json", "weights.safetensors"]


@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("channels_last", [True, False])
def test_every_arithmetic_gives_a_finite_record(precision, channels_last):
    record = quiet(SMALL.but(precision=precision, channels_last=channels_last, epochs=1))
    losses = [record.outcome["epochs"][0][name] for name in ("train_loss", "test_loss")]
    assert np.isfinite(losses).all() and record.config["precision"] == precision


# --- killed ---

@pytest.mark.parametrize("fault, left", [
    (partial(kill_at_step, 5), [2, 3]),  # three steps an epoch: the second step of epoch 2
    (partial(kill_at_write, "checkpoint.pt", 1, "half"), [1, 2, 3]),
    (partial(kill_at_write, "checkpoint.pt", 2, "half"), [2, 3]),
    (partial(kill_at_write, "checkpoint.pt", 2, "whole"), [2, 3]),
    (partial(kill_at_write, "checkpoint.pt", 2, "moved"), [3]),
    (partial(kill_at_write, "checkpoint.pt", 3, "moved"), []),
    (partial(kill_at_write, "weights.safetensors", 1, "half"), []),
    (faults.kill_before_record, []),
    (partial(kill_at_write, "record.json", 1, "half"), []),
    (partial(kill_at_write, "record.json", 1, "whole"), []),
    (partial(kill_at_write, "record.json", 1, "moved"), []),
], ids=lambda value: " ".join(map(str, getattr(value, "args", []))) or None)
def test_a_killed_run_goes_on_to_the_same_outcome(root, undisturbed, fault, left):
    code, _, nothing = apart(root, fault=fault)
    assert code == -9 and nothing is None
    if getattr(fault, "args", [""])[-1] in ("half", "whole"):
        assert list(place(root).glob(f".{fault.args[0]}.*")), "a temporary file was left for the next process to ignore"
    code, lines, record = apart(root)
    assert code == 0 and epochs_of(lines) == left
    assert (record.config, record.outcome) == (undisturbed[0].config, undisturbed[0].outcome)
    assert len(record.provenance["seconds_per_epoch"]) == len(record.provenance["processor_seconds_per_epoch"]) == 3
    assert same_weights(place(root) / "weights.safetensors", undisturbed[1])


def test_a_staa_run_that_was_interrupted_goes_on_to_the_same_outcome(root, monkeypatch):
    config = SMALL.but(neuron="staa", epochs=2)
    interrupted(1, config)
    lines = []
    continued = run(config, device="cpu", workers=0, log=lines.append)
    assert epochs_of(lines) == [2]
    monkeypatch.setenv("STAA_RUNS", str(root / "others"))
    assert continued.outcome == quiet(config).outcome


def test_a_run_killed_again_and_again_still_ends(root, undisturbed):
    ends = [apart(root, fault=partial(kill_at_step, 5)) for _ in range(2)]
    assert [(code, epochs_of(lines)) for code, lines, _ in ends] == [(-9, [1]), (-9, [2])]
    _, lines, record = apart(root)
    assert epochs_of(lines) == [3] and record.outcome == undisturbed[0].outcome


# --- two at once ---

def both(root):
    """Two processes ask for the same run; (the one that trains, the one that waits) once both are at it."""
    hold = partial(faults.hold_until, root / "go on")
    pair = [faults.start(root, fault=hold) for _ in range(2)]
    while not any(pipe.poll(0.05) for _, pipe in pair):
        assert all(process.is_alive() for process, _ in pair)
    waiting = next(one for one in pair if one[1].poll())
    _, lines, _ = faults.end(*waiting, until="waiting for its record")
    assert epochs_of(lines) == []
    return next(one for one in pair if one is not waiting), waiting


def test_of_two_processes_one_trains_and_the_other_waits(root, undisturbed):
    training, waiting = both(root)
    (root / "go on").touch()
    (_, trained, first), (_, waited, second) = faults.end(*training), faults.end(*waiting)
    assert epochs_of(trained) == [1, 2, 3] and waited == []
    assert first == second and first.outcome == undisturbed[0].outcome


def test_who_waits_takes_over_from_a_killed_process(root, undisturbed):
    training, waiting = both(root)
    training[0].kill()
    (root / "go on").touch()
    _, lines, record = faults.end(*waiting)
    assert epochs_of(lines) == [1, 2, 3] and record.outcome == undisturbed[0].outcome
    faults.end(*training)


# --- damaged ---

class Evil:
    """What a pickle can do to whoever loads it."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def refused(file):
    with pytest.raises(RecordError, match="delete it, and the run starts again") as caught:
        quiet(SMALL)
    assert str(file) in str(caught.value) and "\n" not in str(caught.value) and str(caught.value).endswith(".")


@pytest.mark.parametrize("size", [0, 0.5, -1])
def test_a_truncated_checkpoint_is_refused_and_the_advice_helps(root, undisturbed, size):
    interrupted(2)
    file = place(root) / "checkpoint.pt"
    content = file.read_bytes()
    file.write_bytes(content[:int(len(content) * size) if size >= 0 else size])
    refused(file)
    if size:
        return
    file.unlink()
    assert quiet(SMALL).outcome == undisturbed[0].outcome


def test_one_flipped_bit_of_a_weight_is_refused(root):
    interrupted(1)
    file = place(root) / "checkpoint.pt"
    content = bytearray(file.read_bytes())
    weight = max(torch.load(file, weights_only=True)["network"].values(), key=torch.numel)
    content[content.index(bytes(weight.untyped_storage())) + 9] ^= 1
    file.write_bytes(content)
    refused(file)


def test_a_checkpoint_that_knows_the_clock_alone_goes_on(tmp_path):
    """As they were before the processor's seconds were kept beside the clock's."""
    network = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(network.parameters(), 0.1)
    train.save(tmp_path / "checkpoint.pt", {"network": network.state_dict(), "optimizer": optimizer.state_dict(),
                                            "epochs": [{"a": 0.5}, {"a": 0.25}], "seconds": [1.5, 2.5]})
    _, seconds = train.resume(tmp_path / "checkpoint.pt", network, optimizer)
    told = records.provenance(torch.device("cpu"), [*seconds, [2.0, 3.5]], "", 1)
    assert told["seconds_per_epoch"] == [1.5, 2.5, 2.0] and "processor_seconds_per_epoch" not in told


def test_any_flipped_bit_is_refused_or_changes_nothing(tmp_path):
    network = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(network.parameters(), 0.1, 0.9)
    network(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    truth = {"network": network.state_dict(), "optimizer": optimizer.state_dict(), "epochs": [{"a": 0.5}],
             "seconds": [[1, 2]]}
    file = tmp_path / "checkpoint.pt"
    train.save(file, truth)
    content, rng, harmless = file.read_bytes(), np.random.default_rng(0), 0
    for position in rng.integers(0, len(content), 300):
        damaged = bytearray(content)
        damaged[position] ^= 1 << int(rng.integers(8))
        file.write_bytes(damaged)
        other = nn.Linear(3, 2)
        other_optimizer = torch.optim.SGD(other.parameters(), 0.1, 0.9)
        try:
            epochs, seconds = train.resume(file, other, other_optimizer)
        except RecordError:
            continue
        harmless += 1
        assert (epochs, seconds) == (truth["epochs"], truth["seconds"])
        assert torch.equal(other.weight, network.weight) and torch.equal(other.bias, network.bias)
        assert str(other_optimizer.state_dict()) == str(optimizer.state_dict())
    assert harmless < 200, "most of the file is checked"


@pytest.mark.parametrize("legacy", [False, True])
def test_a_checkpoint_runs_no_code(root, legacy):
    place(root).mkdir(parents=True)
    file, marker = place(root) / "checkpoint.pt", root / "marker"
    torch.save({"network": {}, "epochs": [Evil(marker)]}, file, _use_new_zipfile_serialization=not legacy)
    refused(file)
    assert not marker.exists()
    torch.load(file, weights_only=False)
    assert marker.exists(), "the file does what it was made for, where it is trusted"


# --- arithmetic ---

def test_the_learning_rate_is_torchs_cosine():
    config = Config(epochs=7, lr=0.3)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(()))], 0.3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=7)
    for epoch in range(8):
        assert learning_rate(config, epoch, 1.0) == pytest.approx(scheduler.get_last_lr()[0], abs=1e-15)
        optimizer.step()
        scheduler.step()


def test_the_warm_up_rises_and_then_is_over():
    """Over the 50 steps of five epochs as torch's LinearLR, times the cosine."""
    plain, warm = Config(epochs=20, lr=0.3), Config(epochs=20, lr=0.3, warmup_epochs=5)
    plain, warm = ([learning_rate(config, step / 10, 1 / 10) for step in range(201)] for config in (plain, warm))
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(()))], 1.0)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1 / 50, total_iters=49)
    for step in range(50):
        assert warm[step] == pytest.approx(scheduler.get_last_lr()[0] * plain[step])
        optimizer.step()
        scheduler.step()
    assert warm[49:] == plain[49:] and warm[48] < plain[48]


def test_every_step_has_its_own_learning_rate():
    config, seen = Config(epochs=5, lr=0.2), []
    network = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(network.parameters(), 1.0)
    optimizer.register_step_pre_hook(lambda optimizer, *_: seen.append(optimizer.param_groups[0]["lr"]))
    train_epoch(network, optimizer, [(torch.ones(2, 3), torch.tensor([0, 1]))] * 4, config, 2, CPU)
    assert seen == pytest.approx([0.1 * (1 + np.cos(np.pi * (2 + i / 4) / 5)) for i in range(4)])


def log_softmax(z):
    z = z - z.max(1, keepdims=True)
    return z - np.log(np.exp(z).sum(1, keepdims=True))


@pytest.mark.parametrize("settings", [
    dict(momentum=0.0, weight_decay=0.0), dict(momentum=0.9, weight_decay=0.1), dict(momentum=0.9, label_smoothing=0.2),
    dict(momentum=0.0, weight_decay=0.0, clip_norm=0.05), dict(momentum=0.5, weight_decay=0.1, clip_norm=1e6),
    dict(momentum=0.9, weight_decay=0.1, label_smoothing=0.2, clip_norm=0.05)])
def test_two_steps_are_sgd_by_hand(settings):
    config = Config(epochs=4, lr=0.3, **settings)
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(6, 5)), np.array([0, 1, 2, 2, 1, 0])
    network = nn.Linear(5, 3)
    W, b = (p.detach().numpy().astype(float) for p in (network.weight, network.bias))
    optimizer = new_optimizer(config, network.parameters())
    loader = [(torch.tensor(x, dtype=torch.float32), torch.tensor(y))]
    target = np.eye(3)[y] * (1 - config.label_smoothing) + config.label_smoothing / 3
    velocity = [np.zeros_like(W), np.zeros_like(b)]
    for epoch in range(2):
        before = [p.detach().clone() for p in network.parameters()]
        loss, accuracy = train_epoch(network, optimizer, loader, config, epoch, CPU)
        z = log_softmax(x @ W.T + b)
        assert loss == pytest.approx(-(target * z).sum(1).mean(), abs=1e-6)
        assert accuracy == pytest.approx(100 * (z.argmax(1) == y).mean())
        delta = (np.exp(z) - target) / len(y)
        gradient = [delta.T @ x, delta.sum(0)]
        if config.clip_norm:
            norm = np.sqrt(sum((g ** 2).sum() for g in gradient))
            gradient = [g * min(1, config.clip_norm / (norm + 1e-6)) for g in gradient]
        rate = 0.3 * (1 + np.cos(np.pi * epoch / 4)) / 2
        velocity = [config.momentum * v + g + config.weight_decay * p for v, g, p in zip(velocity, gradient, (W, b))]
        W, b = (p - rate * v for p, v in zip((W, b), velocity))
        np.testing.assert_allclose(network.weight.detach().numpy(), W, atol=1e-6)
        np.testing.assert_allclose(network.bias.detach().numpy(), b, atol=1e-6)
        if settings == dict(momentum=0.0, weight_decay=0.0, clip_norm=0.05):
            moved = sum(((p - q) ** 2).sum().item() for p, q in zip(network.parameters(), before)) ** 0.5
            assert moved / rate == pytest.approx(0.05, rel=1e-3), "the norm as applied"


def test_evaluation_weights_a_smaller_last_batch_by_its_images():
    logits = np.random.default_rng(1).normal(size=(7, 3)).astype(np.float32)
    labels = np.array([0, 1, 2, 0, 1, 2, 0])
    x, y = torch.tensor(logits), torch.tensor(labels)
    loss, accuracy, rates = evaluate(nn.Identity(), [(x[:5], y[:5]), (x[5:], y[5:])], Config(), CPU)
    z = log_softmax(logits.astype(float))
    assert loss == pytest.approx(-z[np.arange(7), labels].mean(), abs=1e-6)
    assert accuracy == pytest.approx(100 * (z.argmax(1) == labels).mean()) and rates == {}


def test_a_training_loss_weights_a_smaller_last_batch_by_its_images():
    x, y = torch.randn(7, 4), torch.tensor([0, 1, 1, 0, 1, 0, 1])
    network = nn.Linear(4, 2)
    truth = nn.functional.cross_entropy(network(x), y).item()
    optimizer = torch.optim.SGD(network.parameters(), 1.0)
    loader = [(x[:5], y[:5]), (x[5:], y[5:])]
    loss, _ = train_epoch(network, optimizer, loader, Config(lr=1e-9), 0, CPU)
    assert loss == pytest.approx(truth, abs=1e-6)


# --- what cannot go on ---

@pytest.mark.parametrize("epoch, words", [(0, "there is no checkpoint yet"), (3, "the checkpoint of epoch 3 is kept")])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_the_first_loss_that_is_not_finite_is_named(epoch, words, bad):
    loader = [(torch.full((2, 3), bad if k == 2 else 1.0), torch.tensor([0, 1])) for k in range(5)]
    network = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(network.parameters(), 0.1)
    with pytest.raises(TrainingError, match=f"no longer finite in epoch {epoch + 1}, step 3; {words}; .*lr") as caught:
        train_epoch(network, optimizer, loader, Config(epochs=5), epoch, CPU)
    assert "\n" not in str(caught.value)


def test_a_test_loss_that_is_not_finite_in_the_last_epoch_ends_in_one_sentence():
    # One step an epoch: the loss of the second is finite still, and its step bursts the weights.
    with pytest.raises(TrainingError, match="no longer finite in epoch 2") as caught:
        quiet(SMALL.but(train_images=16, lr=1e30, clip_norm=0.0, warmup_epochs=0, epochs=2))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("words", [
    ["epochs=x"], ["nonsense"], ["colour=red"], ["lr=1e-3x"], ["dataset=mnist"], ["train_images=9999"],
    ["dataset=imagefolder:none"], ['neuron_settings={"decay": 7}'], ["image_size=8"], ["lr=1e30", "epochs=2"],
], ids=" ".join)
def test_a_bad_word_on_the_command_line_is_one_line(root, words):
    given = {word.partition("=")[0] for word in words}
    rest = {"dataset": SMALL.dataset, "image_size": 16, "width": 1 / 32, "T": 1, "neuron": "lif", "batch_size": 16}
    code, error = faults.command_line(root, *words, *(f"{k}={v}" for k, v in rest.items() if k not in given))
    assert code == 1 and error.startswith("staa: ") and error.count("\n") == 1, error
    assert not list(root.glob("runs/*/record.json"))


@pytest.mark.parametrize("config, settings, words", [
    ({"dataset": "digits"}, {}, "^run takes a Config"), (SMALL, {"device": "gpu"}, "^device must be cpu, or cuda .*'gpu'"),
    (SMALL, {"device": 7.5}, "^device must be cpu"), (SMALL, {"device": "cuda:99"}, "^device cuda:99 is not there"),
    (SMALL, {"workers": -1}, "^workers must be a whole number"), (SMALL, {"workers": "2"}, "^workers must be .*'2'")])
def test_what_run_cannot_take_is_one_sentence(config, settings, words):
    with pytest.raises(TrainingError, match=words):
        run(config, **settings)


def test_a_setting_is_given_once():
    with pytest.raises(ConfigError, match="and once, got a second 'lr=0.2'"):
        train.words_to_settings(["lr=0.1", "lr=0.2"])


def test_ctrl_c_on_the_command_line_is_one_sentence(capsys):
    def main(words):
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as end:
        train.command(main, str)
    assert end.value.code == 130
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "goes on after its last whole epoch" in said


def test_a_checkpoint_that_cannot_be_read_now_is_not_called_damaged(tmp_path, monkeypatch):
    """Nobody is told to delete it."""
    from staa import checkpoint
    from staa.distributed import PeerError

    path, network = tmp_path / "checkpoint.pt", nn.Linear(2, 2)
    optimizer = torch.optim.SGD(network.parameters(), 0.1)
    checkpoint.save(path, {"network": network.state_dict(), "optimizer": optimizer.state_dict(), "epochs": [], "seconds": []})

    def fails(error):
        def load(state):
            raise error
        monkeypatch.setattr(optimizer, "load_state_dict", load)
        checkpoint.resume(path, network, optimizer)

    for error in (torch.OutOfMemoryError("CUDA out of memory"), MemoryError(), PeerError("process 0 of this run has ended")):
        with pytest.raises(type(error)) as caught:
            fails(error)
        assert caught.value is error
    with pytest.raises(staa.Error, match="could not be read .Input/output error.; it is as it was"):
        fails(OSError(5, "Input/output error"))
    with pytest.raises(staa.Error, match="is damaged .no such group.; delete it"):
        fails(ValueError("no such group"))


def test_a_command_shows_a_bug_as_a_bug(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["staa"])
    def bug(words):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    with pytest.raises(RuntimeError, match="mat1"):
        train.command(bug, str)
    def refused(words):
        raise ConfigError("T must be at least 1, got 0")
    with pytest.raises(SystemExit, match="staa: T must be at least 1, got 0"):
        train.command(refused, str)
    monkeypatch.setattr("sys.argv", ["staa", "--help"])
    with pytest.raises(SystemExit) as end:
        train.command(refused, train.usage)
    assert not end.value.code
    assert 'neuron: str = "staa"' in capsys.readouterr().out


def test_a_device_without_numbers_is_refused():
    with pytest.raises(train.TrainingError, match="device must be cpu, or cuda where there is a GPU, got 'meta'"):
        train.run(Config(), device="meta")


@pytest.mark.parametrize("times", [1, 100_000])
def test_what_stops_reading_the_output_ends_the_command_in_silence(times):
    """As `head` does: in the middle of it, or before the first line is out."""
    program = (f"from staa import train\nprint('begun', flush=True)\ninput()\n"
               f"train.command(lambda words: print('a line\\n' * {times}), str)")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, text=True, env=environment) as started:
        assert started.stdout.readline() == "begun\n"
        started.stdout.close()
        started.stdin.write("\n")
        started.stdin.close()
        assert started.wait(60) == 141 and not started.stderr.read()
