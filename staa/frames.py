"""Frames of events: binning by tonic, a cache on disk that is never stale or half-written, and augmentation."""

import hashlib
import os
import warnings
import zlib
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from . import records
from .events import checked
from .records import DataError, Labelled

#: How events become T frames: bins that hold the same number of events, or last the same time.
FRAMES = ("count", "time")
AUGMENTATIONS = ("flip", "roll", "rotate", "cutout", "mixup")


def to_frames(events: np.ndarray, T: int, by: str, sensor: int, size: int) -> np.ndarray:
    """(T, 2, size, size), int16: how many events of each polarity (0: darker, 1: brighter) fell on a pixel in each bin.

    Binned by tonic: `by` "count" leaves out the last N mod T events, "time" those of the last microseconds. A smaller
    size adds up neighbouring pixels. Raises DataError where T is below 1, or above what the recording holds.
    """
    from tonic.transforms import Downsample, ToFrame

    span = len(events) if by == "count" else int(events["t"][-1] - events["t"][0])
    if not 1 <= T <= min(span, len(events)):
        raise DataError(f"T must be between 1 and {min(span, len(events))} for a recording of {len(events)} events and "
                        f"{events['t'][-1] - events['t'][0]} microseconds, got {T}.")
    if size != sensor:
        events = Downsample(sensor_size=(sensor, sensor, 2), target_size=(size, size))(events)
    bins = {"n_event_bins" if by == "count" else "n_time_bins": T}
    return ToFrame(sensor_size=(size, size, 2), **bins)(events)


class Frames(Dataset):
    """Recordings as (frames, label), frames a tensor (T, 2, size, size) of int16, kept in runs/frames/KEY/.

    The key holds the recordings' fingerprint, the time stamps of their files, every parameter and VERSION. A file is
    written whole or not at all, and one that is damaged is made again. Raises DataError, RecordError on a full disk.
    """

    VERSION = b"staa frames 1\n"

    def __init__(self, recordings: Labelled, fingerprint: str, *, T: int, by: str, sensor: int, size: int):
        records.require("tonic", "frames of events")
        self.recordings, self.targets, self.classes = recordings, recordings.targets, recordings.classes
        self.sensor = sensor
        self.shape, self.make = (T, 2, size, size), partial(to_frames, T=T, by=by, sensor=sensor, size=size)
        changed = [os.stat(path).st_mtime_ns for path, _ in getattr(recordings, "samples", [])]
        key = hashlib.sha256(repr((self.VERSION, fingerprint, changed, T, by, sensor, size)).encode()).hexdigest()[:16]
        self.folder = records.folder("runs") / "frames" / key

    def __len__(self) -> int:
        return len(self.recordings)

    def __getitem__(self, i: int):
        path = self.folder / str(i)
        try:
            frames = self._unpack(path.read_bytes())
        except FileNotFoundError:
            frames = None
        except OSError as error:
            raise records.RecordError(f"the cached frames {path} cannot be read ({error.strerror}); remove them, or "
                                      "set STAA_RUNS to another folder.") from None
        except (ValueError, zlib.error) as error:
            warnings.warn(f"the cached frames {path} are damaged or of another version ({error}) and are made again.")
            frames = None
        if frames is None:
            frames = self.make(checked(self.recordings[i][0], self.sensor, f"recording {i}"))
            records.write(path, self.VERSION + zlib.compress(frames.tobytes(), 1))
        return torch.from_numpy(frames), self.targets[i]

    def _unpack(self, content: bytes) -> np.ndarray:
        if not content.startswith(self.VERSION):
            raise ValueError("it does not begin as this version's files do")
        frames = zlib.decompress(content[len(self.VERSION):])  # checks its own sum
        return np.frombuffer(bytearray(frames), np.int16).reshape(self.shape)


class Roll:
    """Shift by up to `most` pixels along both axes; what leaves at one side enters at the other."""

    def __init__(self, most: int):
        self.most = most

    def __call__(self, x: Tensor) -> Tensor:
        return x.roll(torch.randint(-self.most, self.most + 1, (2,)).tolist(), dims=(-2, -1))


def augmentation(names: str, size: int) -> list:
    """Transforms of frames (T, 2, H, W) by names joined with "+", the same for all T: "flip+roll+rotate+cutout".

    "roll": by up to 5 of 48 pixels, and "flip", left-right: those of MPBN's public code. "rotate":
    by up to 15 degrees. "cutout": a square of 8 of 48 pixels. "mixup" takes two recordings: `staa.data.View` does it.
    """
    from torchvision.transforms import v2

    steps = {"flip": v2.RandomHorizontalFlip(), "roll": Roll(max(size * 5 // 48, 1)), "rotate": v2.RandomRotation(15),
             "cutout": Cutout(max(size // 6, 1)), "mixup": None, "none": None}
    return [steps[name] for name in names.split("+") if steps[name]]


class Cutout:
    """Zero one square of `length` pixels whose centre is uniform over the image, clipped at the border (DeVries 2017).

    torchvision's RandomErasing keeps the square inside the image, which is another distribution.
    """

    def __init__(self, length: int):
        self.length = length

    def __call__(self, image: Tensor) -> Tensor:
        h, w = image.shape[-2:]
        y, x = int(torch.randint(h, ())), int(torch.randint(w, ()))
        top, left = y - self.length // 2, x - self.length // 2
        image = image.clone()
        image[..., max(top, 0):max(top + self.length, 0), max(left, 0):max(left + self.length, 0)] = 0
        return image
