"""Trained networks as safetensors files that hold their config. Nothing is unpickled, and what does not match its
config is refused.

    network = staa.load("runs/NAME")   # network.config says how it was trained
    staa.save_pretrained(network, "folder")                # in the manner of the Hugging Face hub
    network = staa.from_pretrained("folder")
"""

import hashlib
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import checkpoint, data, records
from .checkpoint import undamaged
from .config import Config
from .networks import SpikingNetwork, build, skeleton
from .norm import BatchNorm2d
from .pooling import AvgPool2d
from .records import Record, RecordError
from .settings import ConfigError, reason

#: The weights in a run's folder; those in a folder in the hub's manner, and their config as a file to read.
WEIGHTS, MODEL, CONFIG = "weights.safetensors", "model.safetensors", "config.json"
#: The entry of a file's metadata: {"config": every setting, "classes": K, "sha256": of these two and the tensors}.
ENTRY = "staa"


def new_network(config: Config, classes: int) -> SpikingNetwork:
    """The untrained network of a run; its `config` is the run's."""
    network = build(config.network, config.neuron, classes, config.T, data.describe(config.dataset).channels,
                    config.width, config.network_settings, **config.neuron_settings)
    network.config = config
    return network


def available() -> bool:
    """Whether safetensors is installed: a machine that only trains can do without."""
    return importlib.util.find_spec("safetensors") is not None


def library() -> Any:
    if not available():
        raise RecordError("weights are kept in safetensors files, and safetensors is not installed: pip install "
                          "safetensors.")
    import safetensors.torch
    return safetensors


def save(path: Path, tensors: dict[str, Tensor], config: Config, classes: int) -> None:
    """A network's state and its config as one safetensors file, whole or not at all. Raises RecordError where they do
    not fit each other, or the file cannot be written."""
    tensors = {name: t.detach().cpu().clone(memory_format=torch.contiguous_format) for name, t in tensors.items()}
    if mismatch := misfit(tensors, config, classes):
        raise RecordError(f"{path} was not written: {mismatch}.")
    about = {"config": json.loads(config.json), "classes": classes}
    about["sha256"] = checksum(about, tensors)
    # One entry: of several the library would change the order from file to file.
    records.write(path, library().torch.save(tensors, {ENTRY: json.dumps(about, sort_keys=True)}))


def load(path: Path | str) -> SpikingNetwork:
    """The network of a file that a finished run or `save_pretrained` wrote, or of the folder with it, rebuilt from the
    file alone: on the CPU, in evaluation, its `config` the one it was trained with.

    Raises RecordError, one sentence, where the file is missing, is damaged, holds no config, or where a tensor is
    missing, unknown, or of another shape or type than the config's network has.
    """
    path = Path(path)
    inside = [path / name for name in (WEIGHTS, MODEL) if (path / name).is_file()]
    return rebuilt(inside[0] if inside else path, "get or make it again")


def rebuilt(path: Path, advice: str) -> SpikingNetwork:
    """`load`, with what to do about a damaged file."""
    if not path.is_file():
        raise RecordError(f"there is no weights file {path}.")
    safetensors = library()
    with undamaged("weights file", path, advice):
        with safetensors.safe_open(path, "pt") as file:
            about = (file.metadata() or {}).get(ENTRY)
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    if about is None:
        raise RecordError(f"the weights file {path} holds no config of this package, so that its network is not known.")
    with undamaged("weights file", path, advice):
        about = json.loads(about)
        expected, classes, mismatch = about.pop("sha256"), about["classes"], ""
        try:
            config = Config.from_dict(about["config"])
        except ConfigError as error:
            mismatch = f"its network cannot be built, {error}"
        mismatch = mismatch or misfit(tensors, config, classes)
        if not mismatch and expected != checksum(about, tensors):
            raise ValueError("its checksum is wrong")
    if mismatch:
        raise RecordError(f"the weights file {path} does not match its config: {mismatch}.")
    with torch.random.fork_rng(devices=[]):  # the caller's generator does not see the first weights being drawn
        network = new_network(config, classes)
    network.load_state_dict(tensors)
    return network.eval()


def misfit(tensors: dict[str, Tensor], config: Config, classes: int) -> str:
    """The first mismatch between these tensors and the config's network; empty where there is none."""
    wanted = skeleton(lambda: new_network(config, classes)).state_dict()
    for name in wanted | tensors:
        if name not in tensors:
            return f"the tensor {name} is missing"
        if name not in wanted:
            return f"the tensor {name} is not one of {config.network}'s with neuron {config.neuron}"
        (has, kind), (needs, wanted_kind) = ((tuple(t.shape), t.dtype) for t in (tensors[name], wanted[name]))
        if (has, kind) != (needs, wanted_kind):
            return f"the tensor {name} is {has} of {kind}, and must be {needs} of {wanted_kind}"
    return ""


def checksum(about: dict, tensors: dict[str, Tensor]) -> str:
    """Over the config and every tensor's name, type, shape and bytes: safetensors itself has no checksum."""
    total = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for name, t in sorted(tensors.items()):
        total.update(f"{name} {t.dtype} {tuple(t.shape)}\n".encode())
        total.update(t.flatten().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def keep(place: Path, state: dict, config: Config, classes: int, log: Callable[[str], None]) -> None:
    """The final weights into the run's folder; without safetensors, which a bare machine lacks, nothing is lost."""
    weights, fallback = place / WEIGHTS, place / "weights.pt"
    if available():
        save(weights, state, config, classes)
        fallback.unlink(missing_ok=True)  # of a run before this one, and so below
    else:
        checkpoint.save(fallback, state)
        weights.unlink(missing_ok=True)
        log(f"{config}: safetensors is not installed, so the weights are in weights.pt, which staa.train.trained reads")


def shipped(**settings) -> list[Record]:
    """The project's records of runs with these settings whose networks it ships too, in data/networks: `trained` reads
    them. Raises RecordError where there is none."""
    found = [record for record in records.vouched() if settings.items() <= record.config.items()
             and shipped_file(Config.from_dict(record.config)).is_file()]
    if not found:
        places = " and ".join(str(records.folder(kind)) for kind in ("records", "networks"))
        raise RecordError(f"a record and a network with {settings} were looked for in {places}, and are not there; "
                          "where STAA_RECORDS or STAA_NETWORKS is set, leave it out for the project's own.")
    return found


def shipped_file(config: Config) -> Path:
    return records.folder("networks") / f"{config.name}.safetensors"


ADVICE = ("set STAA_RUNS to an empty folder and STAA_RECORDS to one without this record, and the run trains the "
          "network anew")


def found(config: Config, network: bool = False) -> Record | None:
    """The record of a run, or None where it is to be trained: also where its network is needed, and the record is one
    of those in data/records that come without. A RecordError where the user's own lacks it."""
    record = records.find(config)
    if not record or not network:
        return record
    if not is_own(config) and not shipped_file(config).is_file():
        return None
    file_of(record)
    return record


def is_own(config: Config) -> bool:
    """Whether the user has trained this run: its record is then no longer the project's, nor is its network."""
    return (records.folder("runs") / config.name / "record.json").is_file()


def trained(record: Record) -> SpikingNetwork:
    """The network of a finished run, on the CPU, in evaluation, with its final weights: from runs/NAME, or from
    data/networks where the project ships them with its record.

    Raises RecordError where the weights are not there (most records in data/records come without) or damaged.
    """
    config, path = Config.from_dict(record.config), file_of(record)
    if path.suffix == ".pt":
        with undamaged("weights file", path, ADVICE):
            network = new_network(config, record.outcome["classes"])
            network.load_state_dict(checkpoint.read(path))
        return network.eval()
    network = rebuilt(path, ADVICE)
    if network.config != config:
        raise RecordError(f"the weights file {path} is of another run, {network.config.name}; {ADVICE}.")
    return network


def file_of(record: Record) -> Path:
    """Where `trained` reads the weights; a RecordError where they are not there."""
    config = Config.from_dict(record.config)
    place, shipped = records.folder("runs") / config.name, shipped_file(config)
    for path in (place / "weights.pt", *([] if is_own(config) else [shipped]), place / WEIGHTS):
        if path.is_file():
            return path
    raise RecordError(f"the weights of {config} were looked for in {place} and {shipped.parent} and are not there "
                      f"(most records in data/records come without them); {ADVICE}.")


def save_pretrained(network: SpikingNetwork, folder: Path | str) -> None:
    """The network as a folder with config.json and model.safetensors, which `huggingface_hub.upload_folder` takes.

    network: one that knows its config: from `load`, `from_pretrained`, `staa.train.trained`, or trained by you and
    made by `staa.weights.new_network(config, classes)`. Raises RecordError where it does not, or no longer fits it.
    """
    network = getattr(network, "_orig_mod", network)  # inside what torch.compile gives
    config = getattr(network, "config", None)
    if not isinstance(config, Config):
        raise RecordError("this network does not know its config: make it with staa.weights.new_network(config, "
                          "classes).")
    if not isinstance(network.head, nn.Linear):
        raise RecordError(f"the head is a {type(network.head).__name__}, and its config makes it a Linear.")
    classes = network.head.out_features
    made = dict(skeleton(lambda: new_network(config, classes)).named_modules())
    there = dict(network.named_modules())
    for name in made | there:
        kind, right = (type(modules[name]) if name in modules else None for modules in (there, made))
        if not alike(kind, right):
            found = f"is a {kind.__module__}.{kind.__name__}" if kind else "is missing"
            raise RecordError(f"{name} {found}, and its config "
                              f"{f'makes it a {right.__module__}.{right.__name__}' if right else 'has none'}: make the "
                              "network of a config that says so.")
        for own, value in vars(there[name]).items():
            if callable(value) and hasattr(type(there[name]), own) and own[0] != "_":
                raise RecordError(f"{name} has a {own} of its own, which no file can hold.")
        for setting, value in plain(made[name]).items():
            if plain(there[name]).get(setting) != value:
                raise RecordError(f"{name} has {setting} = {plain(there[name]).get(setting)}, and its config makes it "
                                  f"{value}: make the network of a config that says so.")
    save(Path(folder) / MODEL, network.state_dict(), config, classes)
    records.write(Path(folder) / CONFIG, (json.dumps(described(config, classes), indent=1) + "\n").encode())


def alike(kind: type | None, right: type | None) -> bool:
    """Whether a module of this type does what the right one does: BN over several processes too, and torch's own BN and
    pooling, which networks had before ours."""
    same = {nn.SyncBatchNorm, nn.BatchNorm2d, BatchNorm2d}, {nn.AvgPool2d, AvgPool2d}
    return kind is right or any({kind, right} <= kinds for kinds in same)


def plain(module: nn.Module) -> dict[str, Any]:
    """The settings that a module was made with, as far as they are numbers or words."""
    return {name: value for name, value in vars(module).items()
            if isinstance(value, (int, float, str)) and name != "training"}


def described(config: Config, classes: int) -> dict:
    return {"model_type": "staa", "classes": classes, "config": json.loads(config.json)}


def from_pretrained(name: Path | str, revision: str | None = None) -> SpikingNetwork:
    """The network of a folder that `save_pretrained` wrote, or of a repository of the Hugging Face hub, "user/name",
    where huggingface_hub is installed. revision: a branch, tag or commit of the repository.

    Raises RecordError as `load` does, where config.json tells of another network than model.safetensors, and where the
    repository cannot be had.
    """
    folder = Path(name) if Path(name).is_dir() else downloaded(str(name), revision)
    network = load(folder / MODEL)
    with undamaged("config file", folder / CONFIG, "get or make it again"):
        told = json.loads((folder / CONFIG).read_bytes())
    if told != described(network.config, network.head.out_features):
        raise RecordError(f"{folder / CONFIG} tells of another network than {MODEL} beside it; get both again.")
    return network


def downloaded(repository: str, revision: str | None) -> Path:
    """The folder to which huggingface_hub downloads the two files, or where it has them already."""
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise RecordError(f"{repository} is no folder, and huggingface_hub, which would look for it on the hub, is not "
                          "installed.") from None
    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=[MODEL, CONFIG]))
    except Exception as error:  # the hub's own errors, and those of the libraries under it
        raise RecordError(f"{repository} is no folder, and the hub gave no such repository ({reason(error)})."
                          ) from None
