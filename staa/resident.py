"""CIFAR in a GPU's own memory, augmented there: no worker process has to keep up with the GPU.

Each sample is cropped, flipped, auto-augmented and cut out by its own draws, as in `staa.data.transform`, and in
distribution the two are equal. The draws are not: they are those of a generator seeded by (seed, epoch), for the whole
epoch at once, on the CPU, and sent ahead, so that the GPU is not waited for. (Some of torchvision's operations for
AutoAugment make a small tensor on the device and wait for that, some forty times in CHUNK images.)
"""

from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor

from .config import Config
from .data import GREY, View, batches, describe, mix
from .distributed import Peers

#: About so many images are augmented at once, as bytes: AutoAugment works on groups of equal draws, and the more
#: images, the fewer groups for each. All of CIFAR at once takes 2,900 operations of torch; by 4,096 images, 18,700.
CHUNK = 2 ** 16
AUGMENTATIONS = ("none", "standard", "autoaugment")
#: At least so many images are evaluated at once: a smaller batch_size is chosen for the sake of training. RESIDENT: so
#: many images times T of those in a GPU's memory, which waits for Python's launches where a batch is small; not where a
#: microbatch is chosen, for the sake of the memory.
EVALUATED, RESIDENT = 64, 2000


def fits(view: View, config: Config, augment: str, device: torch.device) -> bool:
    """Whether these images live on the device: a GPU, and an array of uint8 in the size that the network sees. What
    somebody's own dataset gives out need not be its array."""
    images, about, size = getattr(view.dataset, "data", None), describe(config.dataset), config.image_size
    return (device.type == "cuda" and augment in AUGMENTATIONS and not view.mixup and about.open is None
            and isinstance(images, np.ndarray) and images.dtype == np.uint8
            and images.shape[1:] == (size, size, about.channels))


class Loader:
    """A run's batches of a view: from the device's memory where it fits, else by worker processes; of several processes
    each takes its share."""

    def __init__(self, config: Config, device: torch.device, workers: int, peers: Peers):
        self.config, self.device, self.workers, self.peers = config, device, workers, peers
        self.resident: dict[int, Images] = {}

    def __call__(self, view: View, augment: str, *, shuffle: bool) -> Iterable[tuple[Tensor, Tensor]]:
        size = self.config.batch_size if shuffle else max(self.config.batch_size, EVALUATED)
        if self.peers.size == 1 and fits(view, self.config, augment, self.device):
            if self.device.type == "cuda" and not shuffle and not self.config.microbatch:
                size = max(size, RESIDENT // self.config.T)
            key = id(view.dataset)
            if key not in self.resident:
                self.resident[key] = Images(view, self.config.dataset, self.device)
            return Batches(self.resident[key], size, augment, shuffle=shuffle, seed=view.seed, epoch=view.epoch)
        loader = batches(view, size, shuffle=shuffle, workers=self.workers)
        return self.peers.share(loader, self.config.microbatch if shuffle else 0)


class Images:
    """The images of a view on a device, (N, H, W, C) uint8, and their labels."""

    def __init__(self, view: View, name: str, device: torch.device):
        indices = np.asarray(view.indices)
        self.images = torch.from_numpy(getattr(view.dataset, "data")[indices]).to(device)
        self.labels = torch.tensor(view.dataset.targets)[indices].to(device)
        about = describe(name)
        mean, std = (255 * torch.tensor(numbers, device=device)[:, None, None] for numbers in (about.mean, about.std))
        self.normalise = lambda x: (x - mean) / std


class Batches:
    """One epoch's batches, (B, C, H, W) float32 in channels-last and (B,) labels, on the device of `images`."""

    def __init__(self, images: Images, batch_size: int, augment: str = "none", *, shuffle: bool, seed: int, epoch: int):
        if augment not in AUGMENTATIONS:
            raise ValueError("augment of images on a device must be one of "
                             f"{', '.join(AUGMENTATIONS)}, got {augment!r}")
        self.images, self.batch_size, self.augment = images, batch_size, augment
        self.shuffle, self.generator = shuffle, torch.Generator().manual_seed(mix(seed, epoch))

    def __len__(self) -> int:
        return -(-len(self.images.labels) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        n, device, draw = len(self.images.labels), self.images.labels.device, self.generator
        order = torch.randperm(n, generator=draw) if self.shuffle else torch.arange(n)
        for part in order.split(max(CHUNK // self.batch_size, 1) * self.batch_size):
            part = sent(part, device)
            x = self.images.images[part]                                            # (n, H, W, C)
            if self.augment != "none":
                x = crop_and_flip(x, draw)
            x = x.permute(0, 3, 1, 2)
            if self.augment == "autoaugment":
                x = auto_augment(x, draw)
                x = cutout(x, x.shape[-1] // 2, draw)
            for x, y in zip(x.split(self.batch_size), self.images.labels[part].split(self.batch_size)):
                yield self.images.normalise(x.float()).contiguous(memory_format=torch.channels_last), y


def sent(x: Tensor, device: torch.device) -> Tensor:
    """x on the device; a GPU fetches it when it gets there, which it can from pinned memory only."""
    return (x.pin_memory() if device.type == "cuda" else x).to(device, non_blocking=True)


def crop_and_flip(x: Tensor, draw: torch.Generator) -> Tensor:
    """x (n, H, W, C), each moved by up to an eighth of its size both ways, black coming in, and flipped or not."""
    n, height, width, _ = x.shape
    pad = width // 8
    x = torch.nn.functional.pad(x, (0, 0, pad, pad, pad, pad))
    dy, dx = torch.randint(2 * pad + 1, (2, n, 1, 1), generator=draw)
    flipped = torch.rand(n, 1, 1, generator=draw) < 0.5
    column = torch.arange(width)
    rows = dy + torch.arange(height)[:, None]
    columns = dx + torch.where(flipped, width - 1 - column, column)
    rows, columns = sent(rows, x.device), sent(columns, x.device)
    return x[torch.arange(n, device=x.device)[:, None, None], rows, columns]


def auto_augment(x: Tensor, draw: torch.Generator) -> Tensor:
    """torchvision's AutoAugment, CIFAR-10 policy, on each image of x (n, C, H, W) uint8 by itself.

    Images whose draws agree are worked on together.
    """
    from torchvision.transforms import InterpolationMode, v2

    policy = v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10, fill=GREY)
    chosen = torch.randint(len(policy._policies), (len(x),), generator=draw)
    chance, sign = torch.rand(2, len(x), 2, generator=draw)
    chance, sign = chance.numpy(), (sign <= 0.5).numpy()
    x = x.clone()
    for step in range(2):
        groups: dict[tuple, list[int]] = {}
        for i, p in enumerate(chosen.tolist()):
            name, probability, level = policy._policies[p][step]
            if chance[i, step] <= probability:
                _, signed = policy._AUGMENTATION_SPACE[name]
                groups.setdefault((name, level, bool(signed and sign[i, step])), []).append(i)
        for (name, level, negative), members in groups.items():
            magnitudes, _ = policy._AUGMENTATION_SPACE[name]
            magnitude = magnitudes(10, *x.shape[-2:])
            magnitude = 0.0 if magnitude is None else float(magnitude[level]) * (-1 if negative else 1)
            index = sent(torch.tensor(members), x.device)
            x[index] = policy._apply_image_or_video_transform(
                x[index], name, magnitude, interpolation=InterpolationMode.NEAREST, fill=policy._fill)
    return x


def cutout(x: Tensor, length: int, draw: torch.Generator) -> Tensor:
    """Zero a square of `length` pixels in each image of x (n, C, H, W), its centre uniform, clipped at the border."""
    n, _, height, width = x.shape
    inside = []
    for size, shape in ((height, (n, 1, height, 1)), (width, (n, 1, 1, width))):
        start = torch.randint(size, (n, 1), generator=draw) - length // 2
        position = torch.arange(size)
        inside.append(sent(((position >= start) & (position < start + length)).view(shape), x.device))
    return x.masked_fill(inside[0] & inside[1], 0)
