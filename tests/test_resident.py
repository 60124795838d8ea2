"""Images augmented on their device, against torchvision's pipeline on the same images: equal, or equal in distribution."""

import numpy as np
import pytest
import torch
from scipy.stats import chisquare, ks_2samp
from torchvision.transforms import v2

from staa import Config, data, resident
from staa.distributed import Peers

CPU = torch.device("cpu")


class Noise:
    """A dataset of coloured noise in CIFAR's form."""

    def __init__(self, count: int, same: bool = False):
        rng = np.random.default_rng(0)
        self.data = rng.integers(0, 256, (1 if same else count, 32, 32, 3), dtype=np.uint8).repeat(count if same else 1, 0)
        self.targets = list(range(count))

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, i):
        return v2.functional.to_pil_image(self.data[i]), self.targets[i]


def view(dataset, augment="none", **settings):
    return data.View(dataset, range(len(dataset)), data.transform("cifar10", 32, augment), **settings)


def epoch(dataset, augment="none", batch_size=7, shuffle=False, seed=0, number=0):
    images = resident.Images(view(dataset), "cifar10", CPU)
    batches = resident.Batches(images, batch_size, augment, shuffle=shuffle, seed=seed, epoch=number)
    found = list(batches)
    assert len(found) == len(batches)
    return torch.cat([x for x, _ in found]), torch.cat([y for _, y in found])


def test_without_augmentation_it_is_the_pipeline():
    dataset = Noise(20)
    x, y = epoch(dataset)
    expected = torch.stack([view(dataset)[i][0] for i in range(20)])
    torch.testing.assert_close(x, expected)
    assert y.tolist() == dataset.targets and x.is_contiguous(memory_format=torch.channels_last)


def test_each_epoch_has_every_image_once_in_its_own_order():
    orders = [epoch(Noise(20), shuffle=True, seed=seed, number=n)[1] for seed, n in ((0, 0), (0, 1), (1, 0), (0, 0))]
    assert all(sorted(order.tolist()) == list(range(20)) for order in orders)
    assert torch.equal(orders[0], orders[3]) and not any(torch.equal(orders[0], other) for other in orders[1:3])


def test_labels_stay_with_their_images(monkeypatch):
    monkeypatch.setattr(resident, "CHUNK", 14)
    dataset = Noise(50)
    plain, _ = epoch(dataset)
    x, y = epoch(dataset, shuffle=True)
    assert torch.equal(x, plain[y])


def test_crops_and_flips_are_uniform():
    """Every one of 9 x 9 offsets and both directions, found again in the images themselves; none other."""
    count = 4000
    images = torch.from_numpy(Noise(count, same=True).data)
    found = resident.crop_and_flip(images, torch.Generator().manual_seed(0))
    padded = torch.nn.functional.pad(images[0], (0, 0, 4, 4, 4, 4))
    known = {}
    for dy in range(9):
        for dx in range(9):
            crop = padded[dy:dy + 32, dx:dx + 32]
            known[crop.numpy().tobytes()] = len(known)
            known[crop.flip(1).numpy().tobytes()] = len(known)
    counts = np.bincount([known[image.numpy().tobytes()] for image in found], minlength=162)
    assert chisquare(counts).pvalue > 1e-3


def test_cutout_is_the_pipelines():
    """How often each pixel is blackened, against the exact probability: centre uniform, square clipped at the border."""
    found = resident.cutout(torch.ones(6000, 1, 32, 32), 16, torch.Generator().manual_seed(0))
    per_axis = torch.tensor([sum(c - 8 <= i < c + 8 for c in range(32)) / 32 for i in range(32)])
    assert ((found[:, 0] == 0).float().mean(0) - per_axis[:, None] * per_axis).abs().max() < 0.03
    one = data.Cutout(16)(torch.ones(1, 32, 32))
    assert set(map(int, found.flatten(1).eq(0).sum(1).unique())) >= {int((one == 0).sum())}


@pytest.mark.parametrize("size", [16, 24, 32])
def test_the_square_that_is_cut_out_is_half_the_image(monkeypatch, size):
    for step in ("crop_and_flip", "auto_augment"):
        monkeypatch.setattr(resident, step, lambda x, draw: x)
    dataset = Noise(60)
    dataset.data = np.full((60, size, size, 3), 255, np.uint8)
    white, _ = epoch(dataset)
    holes = (epoch(dataset, "autoaugment")[0] != white).all(1)
    assert holes.any(2).sum(1).max() == holes.any(1).sum(1).max() == size // 2


def test_auto_augment_applies_torchvisions_operations(monkeypatch):
    """With the same draws it is torchvision's own AutoAugment of each image, to the last bit."""
    images = torch.from_numpy(Noise(60).data).permute(0, 3, 1, 2)
    found = resident.auto_augment(images, torch.Generator().manual_seed(0))
    draw = torch.Generator().manual_seed(0)
    chosen = torch.randint(25, (60,), generator=draw)
    chance, sign = torch.rand(2, 60, 2, generator=draw)
    policy = v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10, fill=128)
    for i in range(60):
        draws = []
        for step, (name, probability, _) in enumerate(policy._policies[chosen[i]]):
            draws.append(chance[i, step])
            if chance[i, step] <= probability and policy._AUGMENTATION_SPACE[name][1]:
                draws.append(sign[i, step])
        stream = iter(draws)
        monkeypatch.setattr(torch, "randint", lambda *_, i=i, **__: chosen[i])
        monkeypatch.setattr(torch, "rand", lambda *_, stream=stream, **__: next(stream))
        assert torch.equal(policy(images[i]), found[i])
        monkeypatch.undo()


@pytest.mark.parametrize("augment", ["standard", "autoaugment"])
def test_in_distribution_it_is_the_pipeline(augment):
    """Brightness, contrast and left-right balance of one image, a thousand times here and there: Kolmogorov-Smirnov."""
    dataset = Noise(1000, same=True)
    dataset.data[:, :, :16] //= 3  # a dark left half, so that flips and shifts are seen
    here, _ = epoch(dataset, augment, batch_size=100)
    pipeline = view(dataset, augment)
    there = torch.stack([pipeline[i][0] for i in range(len(dataset))])
    for measure in (lambda x: x.mean((1, 2, 3)), lambda x: x.std((1, 2, 3)),
                    lambda x: x[..., :16].mean((1, 2, 3)) - x[..., 16:].mean((1, 2, 3))):
        assert ks_2samp(measure(here).numpy(), measure(there).numpy()).pvalue > 1e-3


def test_a_run_takes_its_batches_from_the_device(monkeypatch):
    """The loader of a run where the images fit: both sets are moved once, and an epoch is an epoch."""
    monkeypatch.setattr(resident, "fits", lambda *_: True)
    dataset = Noise(10)
    load = resident.Loader(Config(dataset="cifar10", batch_size=4), CPU, 0, Peers())
    first, second = (list(load(view(dataset, "standard", epoch=n), "standard", shuffle=True)) for n in (0, 1))
    assert [len(y) for _, y in first] == [4, 4, 2] and len(load.resident) == 1
    assert not torch.equal(torch.cat([y for _, y in first]), torch.cat([y for _, y in second]))
    plain = torch.cat([x for x, _ in load(view(dataset), "none", shuffle=False)])
    torch.testing.assert_close(plain, torch.stack([view(dataset)[i][0] for i in range(10)]))


def test_a_run_keeps_its_sets_apart_and_of_each_the_chosen_images(monkeypatch):
    monkeypatch.setattr(resident, "fits", lambda *_: True)
    load = resident.Loader(Config(dataset="cifar10", batch_size=4), CPU, 0, Peers())
    training, tests = Noise(10), Noise(70)
    tests.data = 255 - tests.data
    for dataset, chosen in ((training, [7, 2, 5]), (tests, range(70))):
        own = data.View(dataset, chosen, data.transform("cifar10", 32))
        found = list(load(own, "none", shuffle=False))
        expected = torch.stack([own[i][0] for i in range(len(chosen))])
        torch.testing.assert_close(torch.cat([x for x, _ in found]), expected)
        assert torch.cat([y for _, y in found]).tolist() == list(chosen)
    assert [len(y) for _, y in found] == [64, 6], "evaluated in larger batches than it is trained in"


def test_a_gpu_evaluates_larger_batches_than_it_trains_in(monkeypatch):
    sizes = []
    monkeypatch.setattr(resident, "Images", lambda *_: None)
    monkeypatch.setattr(resident, "Batches", lambda images, size, *_, **__: sizes.append(size))
    for settings in ({"batch_size": 20}, {"batch_size": 1000}, {"batch_size": 20, "T": 10},
                     {"batch_size": 20, "microbatch": 4}):
        load = resident.Loader(Config(dataset="cifar10", **settings), torch.device("cuda"), 0, Peers())
        for shuffle in (True, False):
            load(view(Noise(4)), "none", shuffle=shuffle)
    assert sizes == [20, 500, 1000, 1000, 20, 200, 20, 64]


def test_a_runs_order_is_its_seeds(monkeypatch):
    monkeypatch.setattr(resident, "fits", lambda *_: True)
    load = resident.Loader(Config(dataset="cifar10", batch_size=20), CPU, 0, Peers())
    dataset = Noise(20)
    orders = [next(iter(load(view(dataset, seed=seed), "none", shuffle=True)))[1].tolist() for seed in (0, 1, 0)]
    assert orders[0] == orders[2] != orders[1]


def test_a_batch_may_be_larger_than_what_is_augmented_at_once(monkeypatch):
    monkeypatch.setattr(resident, "CHUNK", 4)
    assert epoch(Noise(10), batch_size=7)[1].tolist() == list(range(10))


def test_autoaugment_sees_the_black_that_the_crop_brings_in(monkeypatch):
    """Here it inverts white images, whose borders are white then."""
    monkeypatch.setattr(resident, "auto_augment", lambda x, draw: 255 - x)
    dataset = Noise(20)
    dataset.data[:] = 255
    assert len(epoch(dataset, "autoaugment")[0].unique()) > 3, "black and white in three channels each"


def test_what_does_not_fit_goes_the_other_way(monkeypatch):
    gpu, dataset, cifar = torch.device("cuda"), Noise(4), Config(dataset="cifar10")
    assert resident.fits(view(dataset), cifar, "standard", gpu)
    assert not resident.fits(view(dataset), cifar, "standard", CPU)
    assert not resident.fits(view(dataset), cifar, "imagenet", gpu)
    assert not resident.fits(view(dataset, mixup=True), cifar, "standard", gpu)
    assert not resident.fits(data.View(data.load("digits", True), range(3), None), Config(), "none", gpu)
    large = Noise(4)
    large.data = large.data.repeat(2, 1).repeat(2, 2)
    assert not resident.fits(view(large), cifar, "none", gpu), "it would train at 64 pixels what the config has at 32"
    real = Noise(4)
    real.data = real.data / 255
    assert not resident.fits(view(real), cifar, "none", gpu), "numbers from 0 to 1 are not those of pixels"
    about = data.About(3, 0, (0.5,) * 3, (0.5,) * 3, open=lambda train, root: dataset)
    monkeypatch.setitem(data.DATASETS, "mine", about)
    assert not resident.fits(view(dataset), Config(dataset="mine"), "none", gpu), "its items need not be its array"
    with pytest.raises(ValueError, match="augment of images on a device must be one of none, standard, autoaugment"):
        epoch(dataset, "imagenet")
