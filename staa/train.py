"""The training loop. `run(config)` is the one way to train: it returns the stored record where the run is complete,
continues it where it was interrupted, else trains. It depends on nothing but the config and the data.

    python -m staa.train network=resnet20 neuron=lif epochs=2 neuron_settings='{"decay": 0.5}'
"""

import io
import json
import math
import os
import platform
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import torch
import torchvision
from filelock import FileLock, Timeout
from torch import Tensor, nn
from torch.nn import functional as F

from . import data, records
from .config import Config, ConfigError
from .networks import build, firing_rates
from .optimizer import learning_rate, new_optimizer
from .records import Record


class TrainingError(RuntimeError):
    """A run that cannot go on; the message is one sentence."""


def run(config: Config, *, device: str | None = None, data_root: Path | None = None, workers: int | None = None,
        log: Callable[[str], None] = print) -> Record:
    """The record of this run, from disk or from training; logs one line an epoch.

    device: "cpu", "cuda", ...; by default a GPU where there is one. workers: processes that load data; by default none
    for embedded data and one a core, at most eight, for the rest. Neither changes the outcome on a CPU.
    The run lives in runs/NAME: checkpoint.pt after every epoch, at the end record.json and weights.pt. Where another
    process trains the same run, this one waits and reads. Raises DataError, RecordError or TrainingError, one sentence.
    """
    if record := records.find(config):
        return record
    place = records.folder("runs") / config.name
    with locked(place, lambda: log(f"{config}: another process trains this run, waiting for its record")):
        return records.find(config) or _train(config, place, device, data_root, workers, log)


@contextmanager
def locked(place: Path, on_wait: Callable[[], None]):
    """Hold a run's folder, made if need be; a killed process holds nothing."""
    lock = FileLock(place / "lock")
    try:
        place.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            on_wait()
            lock.acquire()
    except OSError as error:
        raise records.RecordError(f"the runs folder {place.parent} cannot be used ({error.strerror or error}); "
                                  "set STAA_RUNS to one that can be written.") from None
    try:
        yield
    finally:
        lock.release()


@contextmanager
def own_state(config: Config, device: torch.device):
    """The run's own number of threads and random generator; the caller's are as before at the end."""
    before = torch.get_num_threads()
    torch.set_num_threads(config.threads)
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        torch.set_num_threads(before)


def _train(config: Config, place: Path, device, data_root, workers, log) -> Record:
    code = commit()  # of the code that is loaded now: the checkout may move on while this runs
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    train_set, tests = data.load(config.dataset, True, data_root), evaluation_set(config, data_root)
    test_set = tests.dataset
    indices = data.subset(train_set.targets, config.train_images) if config.train_images else range(len(train_set))
    if workers is None:
        workers = 0 if config.dataset in data.EMBEDDED else min(os.cpu_count() or 1, 8)
    with own_state(config, device):
        torch.manual_seed(data.mix(config.seed))
        network = new_network(config, len(train_set.classes))
        network.to(device, memory_format=torch.channels_last if config.channels_last else torch.preserve_format)
        optimizer = new_optimizer(config, network.parameters())
        epochs, seconds = resume(place / "checkpoint.pt", network, optimizer)
        augment = data.transform(config.dataset, config.image_size, config.augment, config.T)
        for epoch in range(len(epochs), config.epochs):
            start = time.perf_counter()
            torch.manual_seed(data.mix(config.seed, epoch + 1))  # an epoch's randomness needs no saved state
            view = data.View(train_set, indices, augment, config.seed, epoch)
            loader = data.batches(view, config.batch_size, shuffle=True, workers=workers)
            loss, accuracy = train_epoch(network, optimizer, loader, config, epoch, device)
            loader = data.batches(tests, config.batch_size, shuffle=False, workers=workers)
            test_loss, test_accuracy, rates = evaluate(network, loader, config, device)
            if not math.isfinite(test_loss):
                raise TrainingError(f"the test loss of {config} is no longer finite in epoch {epoch + 1}; "
                                    f"{advice(config, epoch)}.")
            epochs.append({"train_loss": loss, "train_accuracy": accuracy, "test_loss": test_loss,
                           "test_accuracy": test_accuracy})
            seconds.append(round(time.perf_counter() - start, 3))
            save(place / "checkpoint.pt", {"network": network.state_dict(), "optimizer": optimizer.state_dict(),
                                           "epochs": epochs, "seconds": seconds, "firing_rates": rates})
            log(f"{config}: epoch {epoch + 1}/{config.epochs}  loss {loss:.3f}  train {accuracy:5.2f} %  "
                f"test {test_accuracy:5.2f} %  {seconds[-1]:.1f} s")
    state = torch.load(place / "checkpoint.pt", map_location="cpu", weights_only=True)
    outcome = {"epochs": epochs, "test_accuracy": epochs[-1]["test_accuracy"], "firing_rates": state["firing_rates"],
               "parameters": sum(p.numel() for p in network.parameters()),
               "classes": len(train_set.classes), "train_images": len(indices), "test_images": len(test_set),
               "fingerprint": {"train": data.fingerprint(train_set), "test": data.fingerprint(test_set)}}
    record = Record(json.loads(config.json), outcome, provenance(device, seconds, code))
    save(place / "weights.pt", state["network"])
    record.save(place / "record.json")
    (place / "checkpoint.pt").unlink(missing_ok=True)
    return Record.load(place / "record.json")  # what any later reader gets, the order of its entries included


def train_epoch(network, optimizer, loader, config: Config, epoch: int, device) -> tuple[float, float]:
    """One pass over the data; mean loss and accuracy in percent over the images as they were seen."""
    network.train()
    losses, correct, images = [], torch.zeros((), dtype=torch.int64, device=device), 0
    for step, (x, y) in enumerate(loader):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, epoch + step / len(loader))
        x, y = to(x, device, config), y.to(device, non_blocking=True)
        with autocast(device, config):
            logits = network(x)
        loss = F.cross_entropy(logits.float(), y, label_smoothing=config.label_smoothing)
        optimizer.zero_grad()
        loss.backward()
        if config.clip_norm:
            nn.utils.clip_grad_norm_(network.parameters(), config.clip_norm)
        optimizer.step()
        losses.append(loss.detach() * len(y))
        correct += (logits.argmax(1) == y).sum()
        images += len(y)
    losses = torch.stack(losses).double()  # the one place where the host waits for a GPU
    if not losses.isfinite().all():
        step = int((~losses.isfinite()).nonzero()[0])
        raise TrainingError(f"the loss of {config} is no longer finite in epoch {epoch + 1}, step {step + 1}; "
                            f"{advice(config, epoch)}.")
    return float(losses.sum()) / images, 100 * int(correct) / images


def advice(config: Config, epoch: int) -> str:
    """What a run that diverged after so many whole epochs leaves, and what to try."""
    kept = f"the checkpoint of epoch {epoch} is kept" if epoch else "there is no checkpoint yet"
    return f"{kept}; try a smaller lr (now {config.lr:g}) or a clip_norm"


@torch.no_grad()
def evaluate(network, loader, config: Config, device) -> tuple[float, float, dict[str, float]]:
    """Mean loss, accuracy in percent and firing rates by layer over a test set."""
    network.eval()
    loss = torch.zeros((), dtype=torch.float64, device=device)
    correct, images = torch.zeros((), dtype=torch.int64, device=device), 0
    with firing_rates(network) as rates:
        for x, y in loader:
            x, y = to(x, device, config), y.to(device, non_blocking=True)
            with autocast(device, config):
                logits = network(x)
            loss += F.cross_entropy(logits.float(), y, reduction="sum")
            correct += (logits.argmax(1) == y).sum()
            images += len(y)
    return float(loss) / images, 100 * int(correct) / images, rates()


def to(x: Tensor, device, config: Config) -> Tensor:
    layout = torch.channels_last if config.channels_last and x.dim() == 4 else torch.preserve_format
    return x.to(device, non_blocking=True, memory_format=layout)


def autocast(device, config: Config):
    return torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16")


def save(path: Path, state: dict):
    """Tensors and plain values to a file, whole or not at all."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    records.write(path, buffer.getvalue())


def resume(path: Path, network, optimizer) -> tuple[list, list]:
    """Load a checkpoint into network and optimizer; the epochs and the seconds so far. Nothing is unpickled but tensors
    and plain values. Raises RecordError where the file is damaged."""
    if not path.is_file():
        return [], []
    with undamaged("checkpoint", path, "delete it, and the run starts again from its first epoch"):
        state = read(path)
        network.load_state_dict(state["network"])
        optimizer.load_state_dict(state["optimizer"])
        return state["epochs"], state["seconds"]


def trained(record: Record) -> torch.nn.Module:
    """The network of a finished run, on the CPU, in evaluation, with the final weights of runs/NAME/weights.pt.

    Raises RecordError where the weights are not there (a record in data/records comes without) or damaged.
    """
    config = Config.from_dict(record.config)
    path = records.folder("runs") / config.name / "weights.pt"
    advice = "set STAA_RUNS and STAA_RECORDS to empty folders, and the run trains the network anew"
    if not path.is_file():
        raise records.RecordError(f"the weights of {config} were looked for in {path} and are not there "
                                  f"(a record in data/records comes without them); {advice}.")
    network = new_network(config, record.outcome["classes"])
    with undamaged("weights file", path, advice):
        network.load_state_dict(read(path))
    return network.eval()


def new_network(config: Config, classes: int) -> torch.nn.Module:
    return build(config.network, config.neuron, classes, config.T, data.describe(config.dataset).channels, config.width,
                 config.network_settings, **config.neuron_settings)


def evaluation_set(config: Config, data_root: Path | None = None) -> data.View:
    """The test set as a run sees it: every image, no augmentation."""
    tests = data.load(config.dataset, False, data_root)
    return data.View(tests, range(len(tests)), data.transform(config.dataset, config.image_size, T=config.T))


def read(path: Path) -> dict:
    """What `save` wrote; nothing is unpickled but tensors and plain values."""
    with zipfile.ZipFile(path) as archive:  # torch does not check the checksums itself
        if archive.testzip():
            raise ValueError("its checksum is wrong")
    return torch.load(path, map_location="cpu", weights_only=True)


@contextmanager
def undamaged(what: str, path: Path, advice: str):
    """Turn any failure to read a file into one sentence."""
    try:
        yield
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise records.RecordError(f"the {what} {path} is damaged ({reason}); {advice}.") from None


def provenance(device, seconds: list[float], code: str) -> dict:
    """Where and how a run was made: what may differ between two runs of the same config."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU"
    return {"seconds": round(sum(seconds), 3), "seconds_per_epoch": seconds, "device": name, "commit": code,
            "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "software": {"python": platform.python_version(), "torch": torch.__version__,
                         "torchvision": torchvision.__version__}}


def commit() -> str:
    """The project's git commit, with "+" where files differ from it; empty outside a checkout."""
    def git(*words):
        return subprocess.run(["git", "-C", str(records.ROOT), *words], capture_output=True, text=True).stdout.strip()
    try:
        head = git("rev-parse", "HEAD")
        return head + ("+" if head and git("status", "--porcelain", "--untracked-files=no") else "")
    except OSError:
        return ""


def main(words: list[str]):
    """Settings as name=value, the value in JSON or plain text."""
    settings = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals:
            raise ConfigError(f"a setting is written name=value, got {word!r}")
        try:
            settings[name] = json.loads(value)
        except ValueError:
            settings[name] = value
    config = Config.from_dict(settings)
    record = run(config)
    print(f"{config.name}: {record.accuracy:.2f} % on the test set after {config.epochs} epochs")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ConfigError, TrainingError, data.DataError, records.RecordError) as error:
        sys.exit(f"staa: {error}")
