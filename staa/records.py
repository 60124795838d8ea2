"""Record: the outcome of one run, as a small JSON file; and how files get to disk whole or not at all.

    {"format": 1, "config": ..., "outcome": what the config decides, "provenance": where and how it ran, "sha256": ...}

`data/records/` holds the records that the project vouches for, `runs/` the user's own.
"""

import hashlib
import json
import os
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from filelock import FileLock, Timeout

from .settings import Error

ROOT = Path(__file__).resolve().parent.parent


class RecordError(Error, RuntimeError):
    """A record or a folder that cannot be used; the message is one sentence."""


class Labelled(Protocol):
    """What every dataset is here: (image or events, label) by index, and labels and class names as in torchvision."""

    targets: list[int]
    classes: list[str]

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> tuple[Any, int]: ...


class DataError(Error, RuntimeError):
    """A dataset that is missing or damaged; the message is one sentence: what, where, how to get it."""


def folder(kind: str) -> Path:
    """A folder by kind: "runs" (or STAA_RUNS), "figures" (STAA_FIGURES), "data" (data/sets, or STAA_DATA), "records",
    "networks", "paper". In a checkout they are the project's, elsewhere they lie in the current folder; from there a
    relative path counts, too: a notebook's current folder is another one than its maker's."""
    home = ROOT if (ROOT / "pyproject.toml").is_file() else Path.cwd()
    default = {"runs": "runs", "figures": "figures", "data": "data/sets", "records": "data/records",
               "networks": "data/networks", "paper": "data/paper"}[kind]
    path = Path(os.environ.get(f"STAA_{kind.upper()}") or default)
    try:
        return home / path.expanduser()
    except RuntimeError:
        raise RecordError(f"STAA_{kind.upper()} names a user who is not there, got {path}.") from None


def require(package: str, what: str) -> None:
    """Raises DataError where a package that `what` need is not installed."""
    if not find_spec(package):
        raise DataError(f"{what} need {package}, which is not installed; the extra notebooks has it.")


@dataclass(frozen=True)
class Record:
    """config: every setting. outcome: what the config decides, equal to the bit on the same CPU. provenance: seconds,
    software, device, commit."""

    config: dict
    outcome: dict
    provenance: dict

    @property
    def accuracy(self) -> float:
        """Test accuracy of the last epoch, in percent; never the best on the test set."""
        return self.outcome["epochs"][-1]["test_accuracy"]

    @property
    def seconds(self) -> list[float]:
        """Seconds of each epoch, testing included: of the processor's work on a CPU, since other programs beside the
        run do not count there; else by the clock."""
        told = self.provenance
        clock = told["seconds_per_epoch"]
        return told.get("processor_seconds_per_epoch", clock) if "CPU" in told["device"] else clock

    def save(self, path: Path) -> None:
        body = {"format": 1, "config": self.config, "outcome": self.outcome, "provenance": self.provenance}
        text = json.dumps(body | {"sha256": checksum(body)}, indent=1, sort_keys=True, allow_nan=False)
        write(path, (text + "\n").encode())

    @classmethod
    def load(cls, path: Path) -> "Record":
        """Raises RecordError where the file cannot be read, is damaged or of another format."""
        try:
            body = json.loads(Path(path).read_bytes())
            if body.pop("sha256") != checksum(body) or body.pop("format") != 1:
                raise ValueError("its checksum is wrong")
            return cls(**body)
        except OSError as error:
            raise RecordError(f"the record {path} cannot be read ({error.strerror}).") from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise RecordError(f"the record {path} is damaged ({error}); delete it to make the run again.") from None


def checksum(body: dict) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def find(config) -> Record | None:
    """The record of a config: the user's own in runs/, else the project's."""
    for path in (folder("runs") / config.name / "record.json", folder("records") / f"{config.name}.json"):
        try:
            if path.is_file():
                return Record.load(path)
        except OSError as error:
            raise RecordError(f"the record {path} cannot be read ({error.strerror}).") from None
    return None


def vouched() -> list[Record]:
    """Every record in data/records."""
    return [Record.load(path) for path in sorted(folder("records").glob("*.json"))]


def provenance(device, seconds: list[list], code: str, processes: int) -> dict:
    """Where and how a run was made: what may differ between two runs of the same config. seconds: for each epoch a
    pair, by the clock and of the processor's work for this process, which other programs do not change; the latter are
    left out where one of them is not known (None)."""
    import torch
    import torchvision

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU"
    clock, work = map(list, zip(*seconds))
    known = {} if None in work else {"processor_seconds_per_epoch": work}
    return {"seconds": round(sum(clock), 3), "seconds_per_epoch": clock, **known,
            "device": name, "processes": processes, "commit": code,
            "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "software": {"python": platform.python_version(), "torch": torch.__version__,
                         "torchvision": torchvision.__version__}}


def commit() -> str:
    """The project's git commit, with "+" where files differ from it; empty outside its own checkout."""
    def git(*words):
        own = ["-c", f"safe.directory={ROOT}"]  # also where it is another user's, if git is 2.38 or newer
        done = subprocess.run(["git", *own, "-C", str(ROOT), *words], capture_output=True)
        return os.fsdecode(done.stdout).strip()
    try:
        if Path(git("rev-parse", "--show-toplevel") or "/") != ROOT:  # installed somewhere in another's repository
            return ""
        head = git("rev-parse", "--verify", "--quiet", "HEAD")
        return head + ("+" if head and git("status", "--porcelain", "--untracked-files=no") else "")
    except OSError:
        return ""


def write(path: Path, content: bytes) -> None:
    """Write to a temporary name beside `path` and move it into place: a reader sees the old file or the whole new one.

    Raises RecordError, one sentence, where the folder cannot be written or the disk is full.
    """
    path = Path(path)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError as error:
        if temporary:
            Path(temporary).unlink(missing_ok=True)
        raise RecordError(f"{path} could not be written ({error.strerror}); what was there is untouched.") from None


@contextmanager
def alone(path: Path, on_wait: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Hold the lock file `path`: one process at a time; a killed one holds nothing. on_wait is called where another
    process holds it. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        on_wait()
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextmanager
def building(path: Path) -> Iterator[Path]:
    """An empty folder beside `path`, to make in it what is then moved into place, by one process at a time. Nothing of
    it stays, and what a killed process left is removed. Raises OSError."""
    place = path.with_name(f".{path.name}")
    with alone(path.with_name(f".{path.name}.lock")):
        shutil.rmtree(place, ignore_errors=True)
        try:
            place.mkdir()
            yield place
        finally:
            shutil.rmtree(place, ignore_errors=True)
