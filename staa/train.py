"""The training loop. `run(config)` is the one way to train: it returns the stored record where the run is complete,
continues it where it was interrupted, else trains. It depends on nothing but the config and the data.

    python -m staa.train network=resnet20 neuron=lif epochs=2 neuron_settings.decay=0.5

Under torchrun the processes train one run together, see `staa.distributed`.
"""

import inspect
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import data, devices, memory, records
from .checkpoint import read, resume, save
from .command import command, words_to_settings
from .config import Config
from .cuda_graph import Captured, captured_for
from .data import evaluation_set as evaluation_set
from .distributed import ALONE, Peers, Statistics, join
from .firing import firing_rates
from .networks import NETWORKS, NEURONS, full_settings
from .optimizer import learning_rate, new_optimizer
from .records import Record
from .resident import Loader
from .settings import TrainingError
from .weights import found, keep, new_network
from .weights import trained as trained


def run(config: Config, *, device: str | torch.device | None = None, workers: int | None = None,
        network: bool = False, log: Callable[[str], None] | None = print) -> Record:
    """The record of this run, from disk or from training; logs one line an epoch, or where log is None nothing.

    device: "cpu", "cuda" or "cuda:1"; by default a GPU where there is one, see `staa.devices`. workers: processes that
    load data; by default one per core, at most eight, where a GPU sees 5,000 images or 500 recordings of events or
    more, and else none: starting one costs seconds. Neither changes the outcome on a CPU. network: whether the trained
    network is needed as well, so that a record in data/records that comes without it does not do.
    The run lives in runs/NAME: checkpoint.pt after every epoch, at the end record.json and weights.safetensors
    (weights.pt where safetensors is not installed). Where another process trains the same run, this one waits and
    reads. Raises DataError, RecordError or TrainingError, one sentence.
    """
    if not isinstance(config, Config):
        raise TrainingError(f"run takes a Config, as Config.from_dict makes of a dictionary, got {config!r}.")
    if workers is not None and (type(workers) is not int or workers < 0):
        raise TrainingError(f"workers must be a whole number of at least 0, or None, got {workers!r}.")
    log = log or (lambda line: None)
    where = devices.named(device)
    peers = join(where)
    if record := peers.first(lambda: found(config, network)):
        return record
    place = records.folder("runs") / config.name
    with ExitStack() as held:
        peers.first(lambda: hold(held, place, lambda: log(f"{config}: another process trains this run, waiting for its "
                                                          "record")))
        if done := peers.first(lambda: found(config, network)):
            return done
        where = devices.take(where, held)
        held.enter_context(one_sentence(config))
        return _train(config, place, where, workers, log, peers)


def hold(held: ExitStack, place: Path, on_wait: Callable[[], None]) -> None:
    """Hold a run's folder, made if need be, until `held` ends, and remove the unfinished files of a killed process."""
    try:
        held.enter_context(records.alone(place / "lock", on_wait))
        for name in ("checkpoint.pt", "record.json", "weights.safetensors", "weights.pt"):
            for unfinished in place.glob(f".{name}.*"):
                unfinished.unlink(missing_ok=True)
    except OSError as error:
        raise records.RecordError(f"the runs folder {place.parent} cannot be used ({error.strerror or error}); "
                                  "set STAA_RUNS to one that can be written.") from None


@contextmanager
def one_sentence(config: Config) -> Iterator[None]:
    """Turn torch's errors into one sentence: BN without a variance, and what a process that loads data ended in."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise TrainingError(f"the GPU has no room for {config}; choose a smaller batch_size or a microbatch.") from None
    except (RuntimeError, ValueError) as error:
        lines = str(error).strip().splitlines() or [""]
        if "more than 1 value per channel" in lines[0]:
            raise TrainingError(f"in the last batch of {config} BN sees one value a channel, which has no variance; "
                                "choose another batch_size, microbatch or train_images.") from None
        if "DefaultCPUAllocator" in lines[0]:
            raise TrainingError(f"the memory has no room for {config}; choose a smaller batch_size or a microbatch."
                                ) from None
        if lines[0].startswith("DataLoader worker"):
            raise TrainingError(f"a process that loads data for {config} was killed, perhaps because memory was short; "
                                "start the run again, and it goes on after its last whole epoch.") from None
        if lines[0].startswith("Caught ") and isinstance(error, (data.DataError, records.RecordError)):
            raise type(error)(lines[-1].partition(": ")[2]) from None
        raise


@contextmanager
def own_state(config: Config, device: torch.device) -> Iterator[None]:
    """The run's own number of threads and random generator; the caller's are as before at the end."""
    before = torch.get_num_threads()
    torch.set_num_threads(config.threads)
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        torch.set_num_threads(before)


def _train(config: Config, place: Path, device, workers, log, peers: Peers) -> Record:
    code = records.commit()  # of the code that is loaded now: the checkout may move on while this runs
    if peers.size > 1:
        peers.first(lambda: data.load_for(config, True) is not None)  # what is downloaded is so once
    train_set, tests = data.load_for(config, True), evaluation_set(config)
    test_set = tests.dataset
    indices = data.subset(train_set.targets, config.train_images) if config.train_images else range(len(train_set))
    if peers.size > 1 and not config.microbatch and ((len(indices) - 1) % config.batch_size) + 1 < peers.size:
        raise TrainingError(f"the last batch of {config} has fewer images than there are processes ({peers.size}); "
                            "choose another batch_size or train_images.")
    if workers is None:
        few = device.type == "cpu" or len(indices) < (500 if data.describe(config.dataset).sensor else 5_000)
        workers = 0 if few else min(devices.cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)), 8)
    if device.type == "cpu":
        memory.keep_freed()
    with own_state(config, device), ExitStack() as at_the_end:
        torch.manual_seed(data.mix(config.seed))
        network = new_network(config, len(train_set.classes))
        layout = torch.channels_last if config.channels_last else torch.preserve_format
        network.to(device, memory_format=layout)  # type: ignore[call-overload]  # torch forgot this form
        if not config.microbatch:
            network = peers.synchronise(network, device)
        optimizer = new_optimizer(config, network.parameters())
        epochs, seconds = resume(place / "checkpoint.pt", network, optimizer, peers)
        augment = data.transform(config.dataset, config.image_size, config.augment, config.T)
        load = Loader(config, device, workers, peers)
        captured = captured_for(network, config, device, peers)
        if captured:
            at_the_end.callback(captured.release)  # a traceback may hold it longer
        for epoch in range(len(epochs), config.epochs):
            start, work = time.perf_counter(), time.process_time()
            torch.manual_seed(data.mix(config.seed, epoch + 1))  # an epoch's randomness needs no saved state
            view = data.View(train_set, indices, augment, config.seed, epoch, mixup="mixup" in config.augment)
            loader = load(view, config.augment, shuffle=True)
            loss, accuracy = train_epoch(network, optimizer, loader, config, epoch, device, peers, captured)
            loader = load(tests, "none", shuffle=False)
            test_loss, test_accuracy, rates = evaluate(network, loader, config, device, peers)
            lost = [f"the tensor {name}" for name, t in network.state_dict().items() if not t.isfinite().all()]
            if lost or not math.isfinite(test_loss):  # a spike hides that its potential is no number
                raise TrainingError(f"{[*lost, 'the test loss'][0]} of {config} is no longer finite in epoch "
                                    f"{epoch + 1}; {advice(config, epoch)}.")
            epochs.append({"train_loss": loss, "train_accuracy": accuracy, "test_loss": test_loss,
                           "test_accuracy": test_accuracy})
            seconds.append([round(time.perf_counter() - start, 3), round(time.process_time() - work, 3)])
            state = {"network": network.state_dict(), "optimizer": optimizer.state_dict(), "epochs": epochs,
                     "seconds": seconds, "firing_rates": rates}
            peers.first(lambda: save(place / "checkpoint.pt", state))
            if peers.rank == 0:
                log(f"{config}: epoch {epoch + 1}/{config.epochs}  loss {loss:.3f}  train {accuracy:5.2f} %  "
                    f"test {test_accuracy:5.2f} %  {seconds[-1][0]:.1f} s")

    def finish() -> Record:
        state = read(place / "checkpoint.pt")
        outcome = {"epochs": epochs, "test_accuracy": epochs[-1]["test_accuracy"],
                   "firing_rates": state["firing_rates"], "parameters": sum(p.numel() for p in network.parameters()),
                   "classes": len(train_set.classes), "train_images": len(indices), "test_images": len(test_set),
                   "fingerprint": {"train": data.fingerprint(train_set), "test": data.fingerprint(test_set)}}
        record = Record(json.loads(config.json), outcome, records.provenance(device, seconds, code, peers.size))
        keep(place, state["network"], config, len(train_set.classes), log)
        record.save(place / "record.json")
        (place / "checkpoint.pt").unlink(missing_ok=True)
        return Record.load(place / "record.json")  # what any later reader gets, the order of its entries included

    return peers.first(finish)


def train_epoch(network, optimizer, loader, config: Config, epoch: int, device, peers=ALONE,
                captured: Captured | None = None) -> tuple[float, float]:
    """One pass over the data; mean loss and accuracy in percent over the images as they were seen. captured: computes
    the gradients as one CUDA graph, see `staa.cuda_graph`."""
    network.train()
    losses, counts = [], torch.zeros(2, dtype=torch.int64, device=device)  # correct, images
    for step, (x, y) in enumerate(loader):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, epoch + step / len(loader), 1 / len(loader))
        optimizer.zero_grad()
        whole = len(y) if peers.size == 1 else min(config.batch_size, len(loader.dataset) - step * config.batch_size)

        def work(x, y, moment=(epoch, step), whole=whole):
            seen = torch.zeros_like(counts)
            return gradient(network, x, y, config, moment, whole, device, peers, seen), seen

        loss, seen = captured(work, x, y) if captured else work(x, y)
        losses.append(loss)
        counts += seen
        peers.sum_gradients(network)
        if config.clip_norm:
            nn.utils.clip_grad_norm_(network.parameters(), config.clip_norm)
        optimizer.step()
    losses = peers.sum(torch.stack(losses).double())  # the one place where the host of one GPU waits for it
    correct, images = peers.sum(counts).tolist()
    if not losses.isfinite().all():
        step = int((~losses.isfinite()).nonzero()[0])
        raise TrainingError(f"the loss of {config} is no longer finite in epoch {epoch + 1}, step {step + 1}; "
                            f"{advice(config, epoch)}.")
    return float(losses.sum()) / images, 100 * correct / images


def gradient(network, x, y, config: Config, moment: tuple[int, int], whole: int, device, peers, counts) -> Tensor:
    """Leave in the network the gradient that these images add to the mean loss over the `whole` batch; the sum of
    their losses. moment: epoch and step. counts: correct and seen images, added to in place."""
    total = torch.zeros((), device=device)
    size = config.microbatch or whole
    parts = [] if x is None else list(zip(x.split(size), y.split(size)))
    statistics = Statistics(network) if config.microbatch else None
    for k, (x, y) in enumerate(parts):
        if statistics:  # TSRD's draws are the microbatch's, whichever process draws them
            torch.manual_seed(data.mix(config.seed, *(m + 1 for m in moment), peers.rank + k * peers.size))
        logits, y = forward(network, x, device, config), y.to(device, non_blocking=True)
        loss = F.cross_entropy(logits, y, label_smoothing=config.label_smoothing)
        (loss * (len(y) / whole)).backward()
        if statistics:
            statistics.add()
        total += loss.detach() * len(y)
        labels = y if y.dim() == 1 else y.argmax(1)  # of a mix-up the larger share's class
        counts[0] += (logits.argmax(1) == labels).sum()
        counts[1] += len(y)
    if statistics:
        statistics.settle(peers)
    return total


def advice(config: Config, epoch: int) -> str:
    """What a run that diverged after so many whole epochs leaves, and what to try."""
    kept = f"the checkpoint of epoch {epoch} is kept" if epoch else "there is no checkpoint yet"
    return f"{kept}; try a smaller lr (now {config.lr:g}) or a clip_norm"


@torch.no_grad()
def evaluate(network, loader, config: Config, device, peers=ALONE) -> tuple[float, float, dict[str, float]]:
    """Mean loss, accuracy in percent and firing rates by layer over a test set."""
    network.eval()
    sums = torch.zeros(3, dtype=torch.float64, device=device)  # loss, correct, images
    with firing_rates(network) as rates:
        for x, y in loader:
            if x is None:
                continue
            logits, y = forward(network, x, device, config), y.to(device, non_blocking=True)
            sums[0] += F.cross_entropy(logits, y, reduction="sum")
            sums[1] += (logits.argmax(1) == y).sum()
            sums[2] += len(y)
    loss, correct, images = peers.sum(sums).tolist()
    spikes = [[float(rates.spikes[name].sum()), rates.count[name]] for name in rates.layers]
    spikes = peers.sum(torch.tensor(spikes, dtype=torch.float64, device=device).reshape(-1, 2)).tolist()
    return loss / images, 100 * correct / images, {n: s / max(count, 1) for n, (s, count) in zip(rates.layers, spikes)}


def forward(network, x: Tensor, device, config: Config) -> Tensor:
    """Logits, computed at the run's precision and in its layout, in float32."""
    layout = torch.channels_last if config.channels_last and x.dim() == 4 else torch.preserve_format
    with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
        return network(x.to(device, non_blocking=True, memory_format=layout)).float()


def usage() -> str:
    """Every setting with its default, and what it can be where that is a name."""
    lines = ["python -m staa.train lr=0.1 neuron=staa neuron_settings.r=8 ...\n",
             inspect.getsource(Config).partition("    def ")[0]]
    for what, names in {"dataset": data.DATASETS, "augment": data.AUGMENTATIONS}.items():
        lines.append(f"{what}: {', '.join(names)}")
    for what, made in (("network", NETWORKS), ("neuron", NEURONS)):
        lines.append(f"{what}: {', '.join(made)}")
        for name in made:
            own = ", ".join(f"{key}={value!r}" for key, value in full_settings(what, name, made, {}).items())
            lines += [f"    {what}_settings of {name}: {own}"] if own else []
    return "\n".join(lines)


def main(words: list[str]) -> None:
    config = Config.from_dict(words_to_settings(words))
    there = " (trained before)" if found(config) else ""
    record = run(config)
    if int(os.environ.get("RANK", 0)) == 0:
        print(f"{config.name}: {record.accuracy:.2f} % on the test set after {config.epochs} epochs{there}")


if __name__ == "__main__":
    command(main, usage)
