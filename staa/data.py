"""Datasets by name, their augmentation, and batches that depend on nothing but the seed and the epoch."""

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from . import events, frames, records
from .events import subset as subset
from .frames import Cutout
from .records import DataError, Labelled, folder
from .settings import one_of, reason
from .simulator import Simulated


@dataclass(frozen=True)
class About:
    """What is fixed about a dataset: input channels, size in pixels (0: any), mean and deviation of its channels, and
    of events the side of the sensor in pixels (0: a dataset of images). A dataset of your own has `open(train, root)`,
    which returns what `load` does."""

    channels: int
    size: int
    mean: tuple
    std: tuple
    sensor: int = 0
    open: Callable[[bool, Path], Labelled] | None = None


DATASETS = {
    "digits": About(1, 0, (0.30518,), (0.37599,)),  # scikit-learn's 1,797 handwritten digits
    "digits-rows": About(1, 0, (0.30518,), (0.37599,)),  # the same digits, a few rows a time step, see `Rows`
    "cifar10": About(3, 32, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": About(3, 32, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "imagefolder": About(3, 0, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "digits-dvs": About(2, 0, (), (), sensor=34),  # events simulated from the digits; counts are not normalised
    "nmnist": About(2, 0, (), (), sensor=34),
    "cifar10dvs": About(2, 0, (), (), sensor=128),
    "dvsgesture": About(2, 0, (), (), sensor=128),
}
GREY = 128  # which AutoAugment puts where it moves pixels away
AUGMENTATIONS = ("none", "standard", "autoaugment", "imagenet")


def describe(name: str) -> About:
    base = name.partition(":")[0]
    one_of("dataset", base, DATASETS)
    return DATASETS[base]


class Rows:
    """Image (C, H, W) to frames (T, C, H, W): frame t shows the t-th H/T rows in their place, and black elsewhere."""

    def __init__(self, T: int):
        self.T = T

    def __call__(self, image: Tensor) -> Tensor:
        step = torch.arange(image.shape[-2]) // (image.shape[-2] // self.T)
        return image * (step[:, None] == torch.arange(self.T)[:, None, None, None])


def transform(name: str, size: int, augment: str = "none", T: int = 1) -> Callable:
    """Image to normalised tensor (C, size, size), for training with an augmentation's name, for testing with "none";
    to frames (T, C, size, size) where the dataset is a sequence.

    "standard": crop after padding by 4 of 32 pixels and flip. "autoaugment": and AutoAugment (CIFAR-10 policy, grey
    where it moves pixels away) and Cutout of 16 of 32 pixels, black, as in FSTA-SNN's public code. "imagenet":
    random resized crop and flip. Of events: frames to float32, augmented as `staa.frames.augmentation` says.
    """
    from torchvision.transforms import InterpolationMode, v2  # takes twice as long to import as torch

    about = describe(name)
    known = ("none", *frames.AUGMENTATIONS) if about.sensor else AUGMENTATIONS
    if not set(augment.split("+") if about.sensor else [augment]) <= set(known):
        raise DataError(f"augment of {name} must be one of {', '.join(known)}, got {augment!r}.")
    if about.sensor:
        return v2.Compose([v2.ToDtype(torch.float32), *frames.augmentation(augment, size)])
    if about.size == size:
        fit = []
    elif about.channels == 1:
        fit = [v2.Resize((size, size), InterpolationMode.BILINEAR)]
    else:  # 256 -> 224 of ImageNet, at any size
        fit = [v2.Resize(size * 8 // 7), v2.CenterCrop(size)]
    if augment == "none":
        steps = fit
    elif augment == "imagenet":
        steps = [v2.RandomResizedCrop(size), v2.RandomHorizontalFlip()]
    else:
        steps = fit + [v2.RandomCrop(size, padding=size // 8), v2.RandomHorizontalFlip()]
        if augment == "autoaugment":
            steps += [v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10, fill=GREY)]
    steps += [v2.ToImage(), v2.ToDtype(torch.float32, scale=True)] + [Cutout(size // 2)] * (augment == "autoaugment")
    steps += [Rows(T)] * (name == "digits-rows")
    return v2.Compose([*steps, v2.Normalize(about.mean, about.std)])


class Digits(Dataset):
    """scikit-learn's bundled digits as grey PIL images of 8 x 8; every fifth image of each class is for testing."""

    def __init__(self, train: bool):
        # Its file, without scikit-learn, which takes as long to import as torch.
        package = find_spec("sklearn")
        if not package or not package.origin:
            raise DataError("the digits come with scikit-learn, which is not installed; the extra notebooks has it.")
        path = Path(package.origin).parent / "datasets" / "data" / "digits.csv.gz"
        pixels, target = np.split(np.loadtxt(path, delimiter=",", dtype=int), [64], axis=1)
        rank = np.zeros(len(target), dtype=int)
        for k in range(10):
            rank[target[:, 0] == k] = np.arange((target == k).sum())
        self.indices = np.flatnonzero((rank % 5 != 4) == train)
        self.data = np.round(pixels[self.indices].reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
        self.targets = target[self.indices, 0].tolist()
        self.classes = [str(k) for k in range(10)]

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, i: int):
        from PIL import Image

        return Image.fromarray(self.data[i]), self.targets[i]


def load(name: str, train: bool) -> Labelled:
    """The training or the test set, as (PIL image, label) or (events, label); `.targets`, `.classes` as in torchvision.
    It lies in the folder STAA_DATA, or data/sets. Raises DataError where it is missing, damaged or lacking."""
    which = f"the {'training' if train else 'test'} set of {name}"
    try:
        return _checked(_open(name, train, folder("data")), which)
    except PermissionError as error:
        raise DataError(f"{which} cannot be read ({error.strerror}: {error.filename}).") from None


def _open(name: str, train: bool, root: Path) -> Labelled:
    base, _, sub = name.partition(":")
    if opened := describe(name).open:
        return opened(train, root)
    if base in ("digits", "digits-rows", "digits-dvs"):
        return Simulated(Digits(train)) if base == "digits-dvs" else Digits(train)
    if base in events.SOURCES:
        return events.Recordings(base, train, root)
    return _image_folder(root / (sub or base), train) if base == "imagefolder" else _cifar(base.upper(), root, train)


def _checked(found: Any, which: str) -> Labelled:
    """What a run needs, the fingerprint at its end included: better now than after the last epoch."""
    for needed in ("targets", "classes", *(["samples", "root"] if not hasattr(found, "data") else [])):
        if not hasattr(found, needed):
            raise DataError(f"{which} must have .targets, .classes and .data, or .samples and .root; lacks .{needed}.")
    labels = np.asarray(found.targets)
    if not 0 < len(found) == labels.size:
        raise DataError(f"{which} must have at least one image, a label each, but has {len(found)} and {labels.size}.")
    if labels.dtype.kind not in "iu" or labels.min() < 0 or labels.max() >= len(found.classes):
        raise DataError(f"the labels of {which} must be whole numbers below {len(found.classes)}, one for each of its "
                        f".classes, but are {', '.join(map(str, np.unique(labels)[[0, -1]]))} and what lies between.")
    try:  # an object's bytes are its address
        fits = (not np.asarray(found.data).dtype.hasobject if hasattr(found, "data")
                else Path(found.samples[0][0]).is_relative_to(found.root))
    except Exception:  # each of somebody's own fails in its own ways
        fits = False
    if not fits:
        raise DataError(f"{which} must have .data, an array of numbers, or .samples, (path, label) of files in .root.")
    return found


def load_for(config, train: bool) -> Labelled:
    """The set as a run sees it before augmentation: (PIL image, label), or of events (frames (T, 2, H, W), label) that
    are cached in runs/frames."""
    found, about = load(config.dataset, train), describe(config.dataset)
    if not about.sensor:
        return found
    return frames.Frames(found, fingerprint(found, contents=False), T=config.T, by=config.frames, sensor=about.sensor,
                         size=config.image_size)


def _cifar(name: str, root: Path, train: bool) -> Labelled:
    import torchvision.datasets

    cls = getattr(torchvision.datasets, name)
    try:
        try:
            return cls(root, train, download=False)
        except RuntimeError:  # not there, or its MD5 is wrong
            with records.alone(root / f".{cls.base_folder}.lock"):
                return cls(root, train, download=True)
    except Exception as error:  # the network's, the archive's, a file's or the disk's
        raise DataError(
            f"{cls.__name__} was looked for in {root / cls.base_folder}, is missing or damaged there and could not be "
            f"downloaded ({reason(error)}); place the official {cls.filename} (MD5 {cls.tgz_md5}) in {root}, "
            "unpacked, or set STAA_DATA to the folder that holds it.") from None


def _read_image(path: str):
    from PIL import Image

    try:
        with Image.open(path) as image:
            if image.mode.startswith(("I", "F")):
                raise ValueError(f"its numbers have more than 8 bits, {image.mode}, and would be cut")
            return image.convert("RGB")
    except Exception as error:  # each format fails in its own ways
        raise DataError(f"the image {path} cannot be read ({reason(error)}); replace or remove it.") from None


def _image_folder(root: Path, train: bool) -> Labelled:
    from torchvision.datasets import ImageFolder

    names = ["train"] if train else ["val", "test"]
    for split in names:
        if (root / split).is_dir():
            try:
                images = ImageFolder(root / split, loader=_read_image)
            except FileNotFoundError as error:
                raise DataError(f"the folder {root / split} must hold one folder of images a class ({error})."
                                ) from None
            others = sorted(e.name for other in ("train", "val", "test") if (root / other).is_dir()
                            for e in os.scandir(root / other) if e.is_dir() and e.name not in images.classes)
            if others:
                raise DataError(f"the class folders of {root} must be the same in training and test, but "
                                f"{others[0]!r} is not in {split}.")
            return images
    raise DataError(f"a dataset was looked for in {root / names[0]}{' or ' + names[1] if names[1:] else ''}, which is "
                    "not there; it must hold one folder of images a class, and STAA_DATA names the folder above it.")


def fingerprint(dataset: Any, contents: bool = True) -> str:
    """Twelve hex digits of SHA-256: of pixels and labels, or of a folder's file names and contents, so that a record
    tells of one changed bit; without `contents`, of names and sizes, which takes no time. Frames have that of their
    events, and simulated events that of their images and of how they are simulated."""
    dataset = getattr(dataset, "recordings", dataset)
    digest = hashlib.sha256(getattr(dataset, "recipe", "").encode())
    if hasattr(dataset, "data"):
        digest.update(np.ascontiguousarray(dataset.data).tobytes())
        digest.update(np.asarray(dataset.targets, dtype=np.int64).tobytes())
    else:
        for path, label in dataset.samples:
            try:
                name = os.fsencode(Path(path).relative_to(dataset.root))  # which need not be UTF-8
                digest.update(name + f" {os.path.getsize(path)} {label}\n".encode())
                if contents:
                    with open(path, "rb") as file:
                        digest.update(hashlib.file_digest(file, "sha256").digest())
            except OSError as error:
                raise DataError(f"{path} cannot be read ({error.strerror}); replace it.") from None
    return digest.hexdigest()[:12]


class View(Dataset):
    """Chosen indices of a dataset, transformed. Each sample's randomness depends on (seed, epoch, index) alone, so that
    neither the number of worker processes nor an interruption changes what the network sees.

    mixup: each sample is mixed with another one by a share uniform in [0, 1] (Zhang et al. 2018, alpha = 1), and its
    label is the shares of the classes, (K,)."""

    def __init__(self, dataset: Labelled, indices: Sequence[int] | np.ndarray, transform: Callable, seed: int = 0,
                 epoch: int = 0, mixup: bool = False):
        self.dataset, self.indices, self.transform, self.seed, self.epoch = dataset, indices, transform, seed, epoch
        self.mixup = mixup

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, i: int):
        image, label = self.dataset[int(self.indices[i])]
        with torch.random.fork_rng(devices=[]):
            torch.random.default_generator.manual_seed(mix(self.seed, self.epoch, i))
            if not self.mixup:
                return self.transform(image), label
            share, other = float(torch.rand(())), int(torch.randint(len(self), ()))
            second, other_label = self.dataset[int(self.indices[other])]
            label, other_label = torch.eye(len(self.dataset.classes))[[label, other_label]]
            return (share * self.transform(image) + (1 - share) * self.transform(second),
                    share * label + (1 - share) * other_label)


def evaluation_set(config) -> View:
    """The test set as a run sees it: every image, no augmentation."""
    tests = load_for(config, False)
    return View(tests, range(len(tests)), transform(config.dataset, config.image_size, T=config.T))


def mix(*numbers: int) -> int:
    """One well-mixed seed out of several small numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


def batches(view: View, batch_size: int, *, shuffle: bool, workers: int = 0) -> DataLoader:
    """Batches of a view: (B, C, H, W) float32 and (B,) labels; shuffled by (seed, epoch)."""
    order = torch.Generator().manual_seed(mix(view.seed, view.epoch))
    return DataLoader(view, batch_size, shuffle=shuffle, generator=order, num_workers=workers,
                      pin_memory=torch.cuda.is_available())
