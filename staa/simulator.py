"""Events simulated the way CIFAR10-DVS was recorded (Li et al. 2017): an image moves along a closed path in front of a
dynamic vision sensor.

A pixel remembers the log intensity of its last event. Where the log intensity has moved away from that by the pixel's
threshold, it emits an event of that polarity and remembers the new value. Between two pictures of the film the log
intensity is taken as linear in time, which gives every event its time stamp.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch.nn import functional as F
from torch.utils.data import Dataset

from .records import Labelled

#: An event, in tonic's order: pixel x, y, time stamp in microseconds, polarity (True: brighter).
EVENT = np.dtype([("x", np.int16), ("y", np.int16), ("t", np.int64), ("p", bool)])


@dataclass(frozen=True)
class Sensor:
    """A square event camera. threshold: in log intensity (natural logarithm). mismatch: standard deviation of the
    pixels' thresholds around it, drawn once from `seed`. noise: background events a pixel and second, of either
    polarity; they leave the pixel's memory as it is (our simplification). Raises ValueError, one sentence.
    """

    size: int = 34
    threshold: float = 0.3
    mismatch: float = 0.0
    noise: float = 0.0
    seed: int = 0

    def __post_init__(self):
        if self.size < 1:
            raise ValueError(f"size of a sensor must be at least 1 pixel, got {self.size}")
        if not 0 < self.threshold < float("inf"):
            raise ValueError(f"threshold must be above 0 and finite, got {self.threshold}")
        for name in ("mismatch", "noise"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be a finite number of at least 0, got {getattr(self, name)}")

    def thresholds(self) -> np.ndarray:
        """(size, size), never below a fifth of the nominal threshold."""
        drawn = np.random.RandomState(self.seed).standard_normal((self.size, self.size))
        return np.maximum(self.threshold + self.mismatch * drawn, self.threshold / 5)

    def record(self, film: np.ndarray, times: np.ndarray, seed: int = 0) -> np.ndarray:
        """Events of a film (N, size, size) of intensities above 0 whose pictures were taken at `times` (N,), in rising
        microseconds; sorted by time. seed: of the background noise."""
        if film.shape != (len(times), self.size, self.size) or len(times) < 2 or not (np.diff(times) > 0).all():
            raise ValueError(f"a film must be (N, {self.size}, {self.size}) with N >= 2 rising times, got "
                             f"{film.shape} and {len(times)} times")
        if not film.min() > 0:
            raise ValueError(f"an intensity must be above 0, got {film.min()}")
        light, threshold = np.log(film.reshape(len(film), -1).astype(np.float64)), self.thresholds().ravel()
        memory = np.empty_like(light)  # at the start of each interval
        memory[0] = light[0]
        counts = np.empty((len(film) - 1, light.shape[1]))  # signed: thresholds crossed in the interval
        for i in range(len(counts)):
            counts[i] = np.trunc((light[i + 1] - memory[i]) / threshold)
            memory[i + 1] = memory[i] + counts[i] * threshold
        interval, pixel = np.nonzero(counts)
        crossed = np.abs(counts[interval, pixel]).astype(int)
        nth = np.arange(crossed.sum()) - np.repeat(crossed.cumsum() - crossed, crossed) + 1  # 1, 2, ... in each
        interval, pixel = np.repeat(interval, crossed), np.repeat(pixel, crossed)
        sign = np.sign(counts[interval, pixel])
        before, change = light[interval, pixel], light[interval + 1, pixel] - light[interval, pixel]
        passed = memory[interval, pixel] + sign * nth * threshold[pixel] - before
        # Rounding may put a threshold that was reached exactly into the next interval, even into one without change.
        part = np.divide(passed, change, out=np.zeros_like(change), where=change != 0).clip(0, 1)
        t = times[interval] + part * (times[interval + 1] - times[interval])
        return self._events(pixel, t, sign > 0, times, np.random.RandomState(seed))

    def _events(self, pixel, t, p, times, rng) -> np.ndarray:
        """A structured array, with the background noise added."""
        n = rng.poisson(self.noise * self.size ** 2 * (times[-1] - times[0]) * 1e-6) if self.noise else 0
        pixel = np.concatenate([pixel, rng.randint(0, self.size ** 2, n)])
        t = np.concatenate([t, rng.uniform(times[0], times[-1], n)])
        p = np.concatenate([p, rng.randint(0, 2, n) > 0])
        order = np.argsort(t, kind="stable")
        events = np.empty(len(t), EVENT)
        events["y"], events["x"] = np.divmod(pixel[order], self.size)
        events["t"], events["p"] = t[order], p[order]
        return events


def closed_path(n: int, radius: float) -> np.ndarray:
    """(n, 2): n positions (y, x) in pixels at constant speed once around a diamond, the last one the first again."""
    corners = radius * np.array([[-1, 0], [0, 1], [1, 0], [0, -1], [-1, 0]])
    phase = np.linspace(0, 4, n)
    return np.stack([np.interp(phase, range(5), corners[:, axis]) for axis in (0, 1)], axis=1)


def moving(image: np.ndarray, path: np.ndarray, size: int, background: float) -> np.ndarray:
    """Film (N, size, size) of an image (h, w) whose centre moves along path (N, 2), in pixels from the sensor's centre;
    bilinear, background where the image does not reach."""
    h, w = image.shape
    grid = torch.arange(size) - (size - 1) / 2
    centres = torch.tensor(np.array(path), dtype=torch.float32)
    y, x = ((2 * (grid - centres[:, axis, None]) / length) for axis, length in ((0, h), (1, w)))  # (N, size), -1 to 1
    grid = torch.stack(torch.broadcast_tensors(x[:, None, :], y[:, :, None]), dim=-1)
    source = torch.as_tensor(image - background, dtype=torch.float32).expand(len(centres), 1, h, w)
    return F.grid_sample(source, grid, align_corners=False)[:, 0].numpy() + background


class Pictures(Labelled, Protocol):
    """Grey images of 8 x 8 in `data`, and in `indices` their places in the whole set, which seed the sensor's noise."""

    data: np.ndarray
    indices: np.ndarray


class Simulated(Dataset):
    """digits-dvs: images (8 x 8, 0 to 255) as recordings of a 34 x 34 sensor, (events, label).

    The image is enlarged to 24 x 24, shown with a contrast of 1 to 5 and moved once around a diamond of radius 4 pixels
    in 300 ms. These numbers are ours, chosen so that sensor, duration and number of events are near N-MNIST's.
    """

    sensor = Sensor(size=34, threshold=0.3, mismatch=0.03, noise=1.0)
    dark, milliseconds, radius, pictures = 0.2, 300, 4.0, 96

    def __init__(self, images: Pictures):
        self.data, self.indices = images.data, images.indices
        self.targets, self.classes = images.targets, images.classes
        #: All that decides the events beside the images; "1" is the version of this file's arithmetic.
        self.recipe = f"1 {self.sensor} {self.dark} {self.milliseconds} {self.radius} {self.pictures}"

    def __len__(self) -> int:
        return len(self.targets)

    def film(self, i: int) -> np.ndarray:
        """(96, 34, 34), intensities from 0.2 to 1."""
        small = torch.from_numpy(self.data[i] / 255)[None, None].float()
        image = F.interpolate(small, scale_factor=3, mode="bilinear")[0, 0].numpy()
        path = closed_path(self.pictures, self.radius)
        return moving(self.dark + (1 - self.dark) * image, path, self.sensor.size, self.dark)

    def __getitem__(self, i: int):
        times = np.linspace(0, 1000 * self.milliseconds, self.pictures)
        return self.sensor.record(self.film(i), times, seed=int(self.indices[i])), self.targets[i]

    def mask(self, i: int) -> np.ndarray:
        """(34, 34): the pixels over which the digit's ink, brighter than half, passes at some time."""
        return self.film(i).max(0) > (1 + self.dark) / 2
