"""Whole runs against a loop in plain PyTorch, which takes of staa the network, the images and how draws are numbered."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader

import staa
from staa import Config, data, train

BASE = Config(dataset="digits", image_size=16, network="resnet20", neuron="lif", width=1 / 32, T=2, train_images=90, batch_size=32,
              epochs=4, lr=0.05)
CASES = {
    "everything": dict(augment="standard", seed=3, label_smoothing=0.2, warmup_epochs=2, weight_decay=0.05, momentum=0.7, clip_norm=2.0),
    "STAA": dict(neuron="staa", neuron_settings={"beta": 0.5}, seed=1),
    "AdamW": dict(optimizer="adamw", lr=0.003, weight_decay=0.3, momentum=0.5, seed=2),
    "bf16, contiguous": dict(precision="bf16", channels_last=False),
}


class Augmented:
    """(image, label) of the chosen images, each with its own draws."""

    def __init__(self, images, chosen, change, config, epoch):
        self.images, self.chosen, self.change, self.config, self.epoch = images, chosen, change, config, epoch

    def __len__(self):
        return len(self.chosen)

    def __getitem__(self, i):
        image, label = self.images[int(self.chosen[i])]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(data.mix(self.config.seed, self.epoch, i))
            return self.change(image), label


def by_hand(config):
    """The run's epochs, its firing rates and its final weights."""
    images, tests = data.load("digits", train=True), data.load("digits", train=False)
    change, plain = (data.transform("digits", config.image_size, augment) for augment in (config.augment, "none"))
    chosen = data.subset(images.targets, config.train_images)
    layout = torch.channels_last if config.channels_last else torch.contiguous_format
    torch.manual_seed(data.mix(config.seed))
    network = staa.build(config.network, config.neuron, 10, config.T, 1, config.width, **config.neuron_settings).to(memory_format=layout)
    if config.optimizer == "sgd":
        optimizer = torch.optim.SGD(network.parameters(), momentum=config.momentum, weight_decay=config.weight_decay)
    else:
        optimizer = torch.optim.AdamW(network.parameters(), betas=(config.momentum, 0.999), weight_decay=config.weight_decay)
    x_test = torch.stack([plain(image) for image, _ in tests]).contiguous(memory_format=layout)
    y_test, epochs = torch.tensor(tests.targets), []

    def logits(x):
        with torch.autocast("cpu", torch.bfloat16, enabled=config.precision == "bf16"):
            return network(x.contiguous(memory_format=layout)).float()

    for epoch in range(config.epochs):
        torch.manual_seed(data.mix(config.seed, epoch + 1))
        order = torch.Generator().manual_seed(data.mix(config.seed, epoch))
        batches = list(DataLoader(Augmented(images, chosen, change, config, epoch), config.batch_size, shuffle=True, generator=order))
        loss, correct = 0.0, 0
        network.train()
        for step, (x, y) in enumerate(batches):
            progress = epoch + step / len(batches)
            warm = min(1.0, (progress + 1 / len(batches)) / config.warmup_epochs) if config.warmup_epochs else 1.0
            optimizer.param_groups[0]["lr"] = warm * config.lr * (1 + math.cos(math.pi * progress / config.epochs)) / 2
            z = logits(x)
            mean = F.cross_entropy(z, y, label_smoothing=config.label_smoothing)
            optimizer.zero_grad()
            mean.backward()
            if config.clip_norm:
                torch.nn.utils.clip_grad_norm_(network.parameters(), config.clip_norm)
            optimizer.step()
            loss, correct = loss + float(mean.detach()) * len(y), correct + int((z.argmax(1) == y).sum())
        network.eval()
        with torch.no_grad(), staa.firing_rates(network) as rates:
            z = torch.cat([logits(part) for part in x_test.split(64)])
        epochs.append({"train_loss": loss / len(chosen), "train_accuracy": 100 * correct / len(chosen),
                       "test_loss": float(F.cross_entropy(z, y_test)), "test_accuracy": 100 * float((z.argmax(1) == y_test).double().mean())})
    return epochs, rates(), network.state_dict()


@pytest.mark.parametrize("case", CASES)
def test_a_run_is_what_the_plain_loop_gives(case):
    config = BASE.but(**CASES[case])
    record = staa.run(config, device="cpu", log=lambda line: None)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    epochs, rates, weights = by_hand(config)
    torch.set_num_threads(threads)
    for found, expected in zip(record.outcome["epochs"], epochs, strict=True):
        assert found == pytest.approx(expected, rel=1e-5)
    assert record.outcome["firing_rates"] == pytest.approx(rates, rel=1e-6)
    trained = train.trained(record).state_dict()
    assert all(torch.allclose(trained[name], w, rtol=1e-5, atol=1e-6) for name, w in weights.items())


def test_the_record_has_the_last_epochs_accuracy_and_counts_what_was_there(monkeypatch):
    accuracies = iter([50.0, 70.0, 30.0, 40.0])
    monkeypatch.setattr(train, "evaluate", lambda *args: (1.0, next(accuracies), {}))
    outcome = staa.run(BASE, device="cpu", log=lambda line: None).outcome
    assert outcome["test_accuracy"] == 40.0
    sets = [data.load("digits", train=train) for train in (True, False)]
    assert outcome["fingerprint"] == {"train": data.fingerprint(sets[0]), "test": data.fingerprint(sets[1])}
    assert (outcome["train_images"], outcome["test_images"], outcome["classes"]) == (90, len(sets[1]), 10)


def test_a_mixed_image_counts_as_its_larger_shares_class():
    network, x = torch.nn.Linear(2, 3), torch.randn(4, 2)
    y = torch.tensor([[0.3, 0.7, 0.0], [0.0, 0.4, 0.6], [1.0, 0.0, 0.0], [0.2, 0.0, 0.8]])
    counts = torch.zeros(2, dtype=torch.int64)
    loss = train.gradient(network, x, y, Config(), (0, 0), 4, torch.device("cpu"), train.ALONE, counts)
    z = network(x).detach()
    assert float(loss) == pytest.approx(-float((y * z.log_softmax(1)).sum()), rel=1e-5)
    assert counts.tolist() == [int((z.argmax(1).numpy() == np.array([1, 2, 0, 2])).sum()), 4]


def test_a_run_with_mixup_sees_mixed_labels_in_training(monkeypatch):
    class Seen(Exception):
        pass

    def train_epoch(network, optimizer, loader, *args):
        raise Seen(next(iter(loader))[1].shape)

    monkeypatch.setattr(train, "train_epoch", train_epoch)
    mixed = Config(dataset="digits-dvs", image_size=17, augment="mixup", neuron="lif", width=1 / 32, T=2, train_images=6, batch_size=3)
    for config, shape in ((mixed, (3, 10)), (mixed.but(augment="none"), (3,))):
        with pytest.raises(Seen) as seen:
            staa.run(config, device="cpu", log=lambda line: None)
        assert seen.value.args[0] == shape
