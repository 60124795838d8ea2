"""The published event datasets: CIFAR10-DVS, DVS128 Gesture and N-MNIST.

tonic downloads and decodes; here is what it leaves open: any number of recordings, the fixed split of CIFAR10-DVS, and
one sentence about a bad recording.
"""

import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
from torch.utils.data import Dataset

from . import records
from .records import DataError
from .settings import reason
from .simulator import EVENT

CIFAR = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
DIGITS = [str(k) for k in range(10)]
GESTURES = ["hand clapping", "right hand wave", "left hand wave", "right arm clockwise", "right arm counter-clockwise",
            "left arm clockwise", "left arm counter-clockwise", "arm roll", "air drums", "air guitar", "other gestures"]


def _read_nmnist(path: Path) -> np.ndarray:
    from tonic.io import read_mnist_file

    if path.stat().st_size % 5:
        raise ValueError("an event takes 5 bytes, and the last one is cut")
    return read_mnist_file(path, dtype=np.dtype([("x", int), ("y", int), ("t", int), ("p", int)]))


@contextmanager
def silent() -> Iterator[None]:
    """Nothing reaches the process's stderr: a decoder in Rust prints there what it then raises."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _read_cifar10dvs(path: Path) -> np.ndarray:
    from tonic.io import read_aedat4

    with open(path, "rb") as file:
        header = file.read(18)  # the format's name, and how long the header is
        header = file.read(int.from_bytes(header[14:], "little"))
    ElementTree.fromstring(header[header.index(b"<dv"):header.rindex(b">") + 1])  # of bad text the decoder would abort
    try:
        with silent():
            events = read_aedat4(str(path))
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # the decoder's, which is no Exception
            raise
        raise ValueError(error) from None
    events.dtype.names = ["t", "x", "y", "p"]
    return events


def _read_dvsgesture(path: Path) -> np.ndarray:
    table = np.load(path)  # x, y, polarity, milliseconds
    columns = [table[:, 0], table[:, 1], table[:, 2], table[:, 3] * 1000]
    return np.rec.fromarrays(columns, names="x, y, p, t")  # type: ignore[call-overload]  # NumPy's stubs want formats


@dataclass(frozen=True)
class Source:
    """A published dataset: tonic's class; side of the sensor in pixels; class names to show; folders of training and
    test recordings; the files' ending; what names a file's class, and those names in the classes' order; the reader."""

    tonic: str
    sensor: int
    classes: list
    folders: tuple
    ending: str
    label: Callable[[Path], str]
    labels: list
    read: Callable[[Path], np.ndarray]


def _folder(path: Path) -> str:
    return path.parent.name


def _stem(path: Path) -> str:
    return path.stem


SOURCES = {
    "cifar10dvs": Source("CIFAR10DVS", 128, CIFAR, ("CIFAR10DVS", "CIFAR10DVS"), ".aedat4", _folder, CIFAR,
                         _read_cifar10dvs),
    "dvsgesture": Source("DVSGesture", 128, GESTURES, ("DVSGesture/ibmGestureTrain", "DVSGesture/ibmGestureTest"),
                         ".npy", _stem, [str(k) for k in range(11)], _read_dvsgesture),
    "nmnist": Source("NMNIST", 34, DIGITS, ("NMNIST/Train", "NMNIST/Test"), ".bin", _folder, DIGITS, _read_nmnist),
}


class Recordings(Dataset):
    """A published dataset as (events, label), in the order of the classes' names and the files' numbers.

    cifar10dvs: 9:1, the test recordings are `subset`'s and are listed in data/splits/cifar10dvs.csv. dvsgesture: the
    official split by person, as tonic cuts it. nmnist: the official split, of which any number of recordings may be
    present, as long as each digit is among them.
    Where nothing is there, tonic downloads it, or unpacks the archive that lies there. Raises DataError.
    """

    def __init__(self, name: str, train: bool, root: Path):
        records.require("tonic", "event datasets")
        if name == "cifar10dvs":
            records.require("aedat", "recordings of CIFAR10-DVS")
        self.source, self.root = SOURCES[name], root
        self.classes, labels = self.source.classes, self.source.labels
        folder = root / self.source.folders[not train]
        wanted = set(labels) if name == "cifar10dvs" else set()  # its ten folders are moved into place one by one

        def there() -> bool:
            present = {self.source.label(path) for path in self._files(folder)}
            return bool(present) and present >= wanted

        if not there():
            _download(self.source, train, root, there)
        files = self._files(folder)
        found = [self.source.label(path) for path in files]
        count = Counter(found)
        for label in labels:
            if not count[label]:
                raise DataError(f"the class {label} is missing in {folder}, which holds no recording of it; unpack the "
                                "dataset again.")
            if name == "cifar10dvs" and count[label] != 1000:
                raise DataError(f"the class {label} in {folder} must have 1,000 recordings, has {count[label]:,}; "
                                "unpack the dataset again.")
        self.samples = [(path, k) for k, label in enumerate(labels) for path, own in zip(files, found) if own == label]
        self.targets = [label for _, label in self.samples]
        if name == "cifar10dvs":
            test = set(subset(self.targets, 1000))
            self.samples = [sample for i, sample in enumerate(self.samples) if (i in test) != train]
            self.targets = [label for _, label in self.samples]

    def _files(self, folder: Path) -> list[Path]:
        found = {path for place in ("*", "**") for path in folder.glob(f"{place}/*{self.source.ending}")}
        return sorted(found, key=self._order)  # "**" does not follow a link to a folder, and "*" does

    @staticmethod
    def _order(path: Path):
        numbers = re.findall(r"\d+", path.stem)
        return int(numbers[-1]) if numbers else -1, str(path)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, i: int):
        path, label = self.samples[i]
        try:
            return checked(self.source.read(path), self.source.sensor, f"the recording {path}"), label
        except DataError:
            raise
        except Exception as error:  # each reader fails in its own ways
            raise DataError(f"the recording {path} is truncated or damaged ({reason(error)}); replace or "
                            "remove it.") from None


def subset(targets: list[int], count: int) -> np.ndarray:
    """Indices of a fixed subset of `count` images, the same for everyone, with the shares of the classes kept."""
    labels = np.asarray(targets)
    if not 0 <= count <= len(labels):
        raise DataError(f"train_images must be at least 0 and at most {len(labels)} for this dataset, got {count}.")
    order = np.random.RandomState(0).permutation(len(labels))  # RandomState's stream is frozen by NumPy's policy
    by_class = [order[labels[order] == k] for k in np.unique(labels)]
    # Rank within the class over the class's size: the first `count` of this order keep the shares.
    share = np.concatenate([(np.arange(len(m)) + 0.5) / len(m) for m in by_class])
    return np.sort(np.concatenate(by_class)[np.argsort(share, kind="stable")[:count]])


def _download(source: Source, train: bool, root: Path, there: Callable[[], bool]):
    """Let tonic download or unpack into a folder of its own, and move what it unpacked into place: a recording is there
    whole or not at all. Where another process does this already, wait for it, and do nothing if it has succeeded."""
    import tonic.datasets

    cls = getattr(tonic.datasets, source.tonic)
    part = "train" if train else "test"
    archive, md5, url = (getattr(cls, name, None) or getattr(cls, f"{part}_{name.removeprefix('file_')}")
                         for name in ("filename", "file_md5", "url"))
    place = (root / source.tonic).resolve()  # a link may lead to another disk
    try:
        with records.building(place) as building:
            if there():
                return
            place.mkdir(exist_ok=True)
            own = building / source.tonic
            own.mkdir()
            (own / archive).symlink_to(place / archive)  # where it lies, or is downloaded to
            cls(str(building), **({} if source.tonic == "CIFAR10DVS" else {"train": train}))
            folder = source.folders[not train]
            for name in source.labels if folder == source.tonic else [Path(folder).name]:
                if not (place / name).exists():
                    (own / name).rename(place / name)
    except Exception as error:  # the network's, the archive's or the disk's
        raise DataError(f"{source.tonic} was looked for in {place}, is missing or damaged there and could not be "
                        f"downloaded from {url} ({reason(error)}); place the official {archive} (MD5 {md5}) in "
                        f"{place}, or set STAA_DATA to the folder above it.") from None


def checked(events: np.ndarray, sensor: int, what: str) -> np.ndarray:
    """The events as EVENT. Raises DataError where there is none, one lies outside the sensor or is neither darker (0)
    nor brighter (1), or they are unsorted."""
    if not len(events):
        raise DataError(f"{what} holds no event; replace or remove it.")
    for axis in "xy":
        if not (events[axis].min() >= 0 and events[axis].max() < sensor):  # NaN fails, too
            raise DataError(f"{what} has events outside its sensor of {sensor} x {sensor} pixels; replace or remove it"
                            ".")
    if not np.isin(events["p"], (0, 1)).all():
        raise DataError(f"{what} has polarities other than 0 and 1; replace or remove it.")
    if not (events["t"][1:] >= events["t"][:-1]).all() or not np.isfinite(events["t"][[0, -1]]).all():
        raise DataError(f"{what} has unsorted time stamps, or such that are no number; replace or remove it.")
    found = np.empty(len(events), EVENT)
    for name in EVENT.names or ():
        found[name] = events[name]
    return found
