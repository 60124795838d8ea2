"""Splits, subsets, augmentation and files of the official formats."""

import hashlib
import os
import pickle

import numpy as np
import pytest
import torch
import torchvision.datasets
from PIL import Image
from sklearn.datasets import load_digits
from torchvision.transforms import v2

from staa import data
from staa.data import Cutout, DataError, View, batches, load, subset, transform
from staa.settings import ConfigError


def test_the_digits_split_is_disjoint_complete_and_fair():
    train, test = load("digits", True), load("digits", False)
    both = np.concatenate([train.indices, test.indices])
    assert sorted(both.tolist()) == list(range(1797))
    assert len(test) == 355
    source = load_digits()
    for split in (train, test):
        assert split.targets == source.target[split.indices].tolist()
        np.testing.assert_allclose(split.data, source.images[split.indices] * 255 / 16, atol=0.5)
    assert (abs(np.bincount(test.targets) - np.bincount(source.target) / 5) < 1).all()


def test_without_scikit_learn_there_are_no_digits_and_one_sentence(monkeypatch):
    monkeypatch.setattr(data, "find_spec", lambda name: None)
    with pytest.raises(data.DataError, match="^the digits come with scikit-learn, which is not installed"):
        load("digits", True)


def test_mean_and_deviation_are_those_of_the_training_digits():
    pixels = load("digits", True).data / 255
    about = data.describe("digits")
    assert about.mean == pytest.approx((pixels.mean(),), abs=1e-5) and about.std == pytest.approx((pixels.std(),), abs=1e-5)


def test_a_subset_is_fixed_distinct_and_keeps_the_shares():
    targets = np.repeat(np.arange(10), np.arange(100, 200, 10))
    chosen = subset(targets, 290)
    assert len(set(chosen.tolist())) == 290 and (chosen == subset(targets, 290)).all()
    assert (abs(np.bincount(targets[chosen]) - np.arange(100, 200, 10) * 0.2) <= 1).all()
    assert set(subset(targets, 145)) <= set(chosen), "a smaller subset is part of a larger one"
    assert subset(targets, len(targets)).tolist() == list(range(len(targets)))
    # The published subset never changes: this is a digest of the indices, computed once.
    fixed = subset(np.arange(50_000) % 10, 10_000)
    assert hashlib.sha256(fixed.astype("<i8").tobytes()).hexdigest()[:16] == "186bb76a4a886dd8"


def test_a_subset_larger_than_the_set_is_refused():
    for count in (6, -1):
        with pytest.raises(DataError, match="train_images must be at least 0 and at most 5"):
            subset([0, 1, 0, 1, 0], count)


def cifar_files(root, name, train=20, test=10):
    """Files of the official format with random pixels; returns the pixels of the training set."""
    rng = np.random.default_rng(0)
    cls = getattr(torchvision.datasets, name.upper())
    folder = root / cls.base_folder
    folder.mkdir(parents=True)
    key, classes = ("labels", 10) if name == "cifar10" else ("fine_labels", 100)
    pixels, sums = [], {}
    for entries, count in ((cls.train_list, train), (cls.test_list, test)):
        for filename, _ in entries:
            part = rng.integers(0, 256, (count // len(entries), 3072), dtype=np.uint8)
            pixels.append(part)
            content = pickle.dumps({"data": part, key: [i % classes for i in range(len(part))]})
            (folder / filename).write_bytes(content)
            sums[filename] = hashlib.md5(content).hexdigest()
    names = [f"class {k}" for k in range(classes)]
    content = pickle.dumps({cls.meta["key"]: names})
    (folder / cls.meta["filename"]).write_bytes(content)
    sums[cls.meta["filename"]] = hashlib.md5(content).hexdigest()
    return np.concatenate(pixels[:-1]), sums


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    """Makes small official-format files and has torchvision accept their MD5."""
    def make(name):
        cls = getattr(torchvision.datasets, name.upper())
        pixels, sums = cifar_files(tmp_path / "data", name)
        monkeypatch.setattr(cls, "train_list", [[f, sums[f]] for f, _ in cls.train_list])
        monkeypatch.setattr(cls, "test_list", [[f, sums[f]] for f, _ in cls.test_list])
        monkeypatch.setattr(cls, "meta", cls.meta | {"md5": sums[cls.meta["filename"]]})
        return pixels, tmp_path / "data" / cls.base_folder

    return make


@pytest.mark.parametrize("name, classes", [("cifar10", 10), ("cifar100", 100)])
def test_cifar_is_read_from_official_files(cifar, name, classes):
    pixels, _ = cifar(name)
    train, test = load(name, True), load(name, False)
    assert (len(train), len(test), len(train.classes)) == (20, 10, classes)
    image, _ = train[3]
    assert (np.asarray(image) == pixels[3].reshape(3, 32, 32).transpose(1, 2, 0)).all()
    assert data.fingerprint(train) != data.fingerprint(test)


def test_missing_cifar_says_what_where_and_how(no_network, tmp_path):
    with pytest.raises(DataError, match="CIFAR10 was looked for in .*cifar-10-batches-py.*cifar-10-python.tar.gz "
                                        r"\(MD5 c58f30108f718f92721af3b95e74349a\).*STAA_DATA") as caught:
        load("cifar10", True)
    assert "\n" not in str(caught.value)


def test_a_damaged_cifar_file_is_refused(cifar, no_network):
    _, folder = cifar("cifar10")
    file = folder / "data_batch_2"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(DataError, match="missing or damaged"):
        load("cifar10", True)


@pytest.fixture
def tree(tmp_path):
    """train/ and val/ with two classes of coloured images, none of them square."""
    root = tmp_path / "data" / "pets"
    for split, count in (("train", 4), ("val", 2)):
        for k, label in enumerate(["cat", "dog"]):
            (root / split / label).mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (50 + i, 40), (100 * k, 50, 10 * i)).save(root / split / label / f"{i}.png")
    return root


@pytest.mark.parametrize("test_folder", ["val", "test"])
def test_an_image_folder_is_read(tree, test_folder):
    (tree / "val").rename(tree / test_folder)
    train, test = load("imagefolder:pets", True), load("imagefolder:pets", False)
    assert (len(train), len(test), train.classes) == (8, 4, ["cat", "dog"])
    x, _ = View(test, range(4), transform("imagefolder:pets", 28))[0]
    assert x.shape == (3, 28, 28)
    expected = (torch.tensor([0, 50, 0]) / 255 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    torch.testing.assert_close(x, expected[:, None, None].expand(3, 28, 28))


def test_bad_image_folders(tree):
    with pytest.raises(DataError, match="looked for in .*fish.*STAA_DATA"):
        load("imagefolder:fish", True)
    (tree / "train" / "cow").mkdir()
    with pytest.raises(DataError, match="one folder of images a class"):  # an empty class folder
        load("imagefolder:pets", True)
    Image.new("RGB", (8, 8)).save(tree / "train" / "cow" / "0.png")
    with pytest.raises(DataError, match="'cow' is not in val"):
        load("imagefolder:pets", False)


@pytest.mark.parametrize("damage", [b"", b"not an image", None])
def test_a_damaged_image_is_named(tree, damage):
    file = tree / "train" / "dog" / "2.png"
    content = file.read_bytes()
    file.write_bytes(content[:len(content) // 2] if damage is None else damage)
    with pytest.raises(DataError, match="dog/2.png cannot be read"):
        list(View(load("imagefolder:pets", True), range(8), transform("imagefolder:pets", 28)))


@pytest.mark.parametrize("kind, ending, mode", [(np.uint16, "png", "I"), (np.float32, "tiff", "F")])
def test_an_image_of_more_than_eight_bits_is_refused_rather_than_cut(tree, kind, ending, mode):
    Image.fromarray(np.full((8, 8), 40_000, kind)).save(tree / "train" / "cat" / f"1.{ending}")
    with pytest.raises(DataError, match=rf"cat/1.{ending} cannot be read \(its numbers have more than 8 bits, {mode}"):
        list(View(load("imagefolder:pets", True), range(8), transform("imagefolder:pets", 28)))


def test_where_there_is_a_validation_set_it_is_the_one_for_testing(tree):
    """The labels of ImageNet's test set are not published."""
    (tree / "test" / "cat").mkdir(parents=True)
    (tree / "test" / "dog").mkdir()
    assert load("imagefolder:pets", False).root == tree / "val"


def test_a_file_name_need_not_be_utf8(tree):
    before = data.fingerprint(load("imagefolder:pets", True))
    folder = os.fsencode(tree / "train" / "cat")
    os.rename(folder + b"/1.png", folder + b"/caf\xe9.png")
    found = load("imagefolder:pets", True)
    assert len(found) == 8 and data.fingerprint(found) != before


def images(n=6, size=32, channels=3):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (n, size, size, channels), dtype=np.uint8)
    return [(Image.fromarray(p.squeeze()), i) for i, p in enumerate(pixels)]


def test_testing_only_scales_and_normalises():
    about = data.describe("cifar10")
    for image, _ in images():
        expected = (torch.tensor(np.asarray(image)).permute(2, 0, 1) / 255 - torch.tensor(about.mean)[:, None, None]
                    ) / torch.tensor(about.std)[:, None, None]
        torch.testing.assert_close(transform("cifar10", 32)(image), expected)


@pytest.mark.parametrize("name, mean, std", [
    ("cifar10", (0.49139968, 0.48215841, 0.44653091), (0.24703223, 0.24348513, 0.26158784)),
    ("cifar100", (0.50707516, 0.48654887, 0.44091784), (0.26733429, 0.25643846, 0.27615047))])
def test_mean_and_deviation_of_cifar_are_the_published_ones_over_all_training_pixels(name, mean, std):
    """Not the mean of the images' own deviations, 0.2023, 0.1994, 0.2010, which is handed down as well."""
    about = data.describe(name)
    assert about.mean == pytest.approx(mean, abs=5e-5) and about.std == pytest.approx(std, abs=5e-5)


@pytest.mark.parametrize("h, w, top, left", [(32, 40, 2, 6), (40, 32, 6, 2)])
def test_testing_on_image_folders_resizes_the_shorter_side_by_eight_sevenths_and_crops_the_centre(h, w, top, left):
    """As 256 to 224. An image whose shorter side is 28 * 8 / 7 = 32 already is cropped only, pixel by pixel."""
    pixels = np.random.default_rng(0).integers(0, 256, (h, w, 3), dtype=np.uint8)
    about = data.describe("imagefolder")
    x = transform("imagefolder", 28)(Image.fromarray(pixels)) * torch.tensor(about.std)[:, None, None] + torch.tensor(about.mean)[:, None, None]
    expected = torch.tensor(pixels[top:top + 28, left:left + 28]).permute(2, 0, 1) / 255
    torch.testing.assert_close(x, expected)


def test_imagenet_augmentation_mirrors_every_other_crop_and_none_upside_down():
    ramp = np.arange(64, dtype=np.uint8)  # brighter to the right and, in another channel, to the bottom
    image = Image.fromarray(np.stack(np.broadcast_arrays(ramp * 3, ramp[:, None] * 3, 0), axis=-1).astype(np.uint8))
    crops = torch.stack([transform("imagefolder", 24, "imagenet")(image) for _ in range(200)])
    right, down = crops[:, 0].diff(dim=2), crops[:, 1].diff(dim=1)
    mirrored = (right <= 0).all(2).all(1)
    assert ((right >= 0).all(2).all(1) | mirrored).all() and (down >= 0).all()
    assert 65 <= mirrored.sum() <= 135, "200 fair coins: within five deviations"


def test_standard_augmentation_is_a_crop_or_its_mirror():
    image, _ = images(1)[0]
    plain = transform("cifar10", 32)
    padded = Image.new("RGB", (40, 40))
    padded.paste(image, (4, 4))
    crops = [plain(padded.crop((x, y, x + 32, y + 32))) for x in range(9) for y in range(9)]
    allowed = {t.numpy().tobytes() for crop in crops for t in (crop, crop.flip(-1).contiguous())}
    seen = {transform("cifar10", 32, "standard")(image).numpy().tobytes() for _ in range(60)}
    assert seen <= allowed and len(seen) > 30


def test_cutout_zeroes_one_clipped_square_with_a_uniform_centre():
    small = torch.stack([Cutout(5)(torch.ones(1, 32, 32))[0] == 0 for _ in range(100)])
    assert small.sum((1, 2)).max() == 25 and Cutout(1)(torch.ones(1, 8, 8)).sum() == 63
    holes = torch.stack([Cutout(16)(torch.ones(1, 32, 32))[0] == 0 for _ in range(3000)])
    rows, columns = holes.any(2).sum(1), holes.any(1).sum(1)
    assert (holes.sum((1, 2)) == rows * columns).all(), "a rectangle"
    assert rows.min() >= 8 and rows.max() == 16
    # P(pixel 16 of a row is hit) = 16/32, P(pixel 0) = 8/32, by counting centres.
    assert abs(holes.any(1)[:, 16].float().mean() - 0.5) < 0.05 and abs(holes.any(1)[:, 0].float().mean() - 0.25) < 0.05


def test_cutout_leaves_its_argument_as_it_was():
    image = torch.ones(3, 8, 8)
    assert Cutout(4)(image).sum() < image.sum() == 3 * 64


def test_digits_are_enlarged_by_linear_interpolation():
    """Pillow's; to the size that they have, they are not."""
    image, _ = load("digits", True)[0]
    about = data.describe("digits")
    for size in (8, 16):
        expected = np.asarray(image.resize((size, size), Image.Resampling.BILINEAR), np.float32) / 255
        x = transform("digits", size)(image) * about.std[0] + about.mean[0]
        torch.testing.assert_close(x[0], torch.from_numpy(expected))


@pytest.mark.parametrize("name, size, side", [("digits", 16, 8), ("imagefolder", 24, 12), ("cifar10", 32, 16)])
def test_autoaugments_square_is_half_the_image(name, size, side):
    (cut,) = [step for step in transform(name, size, "autoaugment").transforms if isinstance(step, Cutout)]
    holes = torch.stack([cut(torch.ones(1, size, size))[0] == 0 for _ in range(60)])
    assert holes.any(2).sum(1).max() == holes.any(1).sum(1).max() == side


@pytest.mark.parametrize("augment", data.AUGMENTATIONS)
@pytest.mark.parametrize("name, size", [("digits", 16), ("cifar10", 32), ("imagefolder", 24)])
def test_every_augmentation_gives_a_finite_image_of_the_right_size(name, size, augment):
    channels = data.describe(name).channels
    image, _ = images(1, 8 if name == "digits" else 32, channels)[0]
    x = transform(name, size, augment)(image)
    assert x.shape == (channels, size, size) and x.dtype == torch.float32 and x.isfinite().all()


def test_what_autoaugment_leaves_out_is_grey_and_what_cutout_takes_is_black():
    """As in the authors' code: the square is cut before the normalisation."""
    augment = transform("cifar10", 32, "autoaugment")
    (policy,) = [step for step in augment.transforms if isinstance(step, v2.AutoAugment)]
    assert policy.fill == 128
    black = -torch.tensor(data.describe("cifar10").mean) / torch.tensor(data.describe("cifar10").std)
    for x, _ in View(images(20), range(20), augment):
        assert (x - black[:, None, None]).abs().lt(1e-6).all(0).sum() >= 64


def test_autoaugment_sees_the_black_that_the_crop_brings_in(monkeypatch):
    """As in the authors' code it comes after crop and flip. Here it inverts a white image: its border is white then."""
    monkeypatch.setattr(v2, "AutoAugment", lambda *args, **kwargs: v2.RandomInvert(1.0))
    white = Image.new("RGB", (32, 32), "white")
    shown = torch.stack([transform("cifar10", 32, "autoaugment")(white) for _ in range(20)])
    assert len(shown.unique()) > 3, "black and white in three channels each"


def test_batches_depend_on_seed_and_epoch_alone():
    source, augment = images(50), transform("cifar10", 32, "autoaugment")

    def epoch(seed=0, number=0, workers=0):
        torch.rand(int(torch.randint(100, ())))  # whatever else happened to the generator before
        view = View(source, range(50), augment, seed, number)
        return [(x.numpy().tobytes(), y.tolist()) for x, y in batches(view, 16, shuffle=True, workers=workers)]

    first = epoch()
    assert first == epoch() == epoch(workers=2)
    assert first != epoch(number=1) and first != epoch(seed=1)
    assert sorted(sum((y for _, y in first), [])) == list(range(50))


def test_the_numbers_of_a_seed_are_those_that_the_stored_records_were_made_with():
    """63 bits of NumPy's SeedSequence, computed once: by another mix no record could be made again."""
    assert [data.mix(0), data.mix(0, 1), data.mix(3, 2, 1)] == [
        7896617691693857887, 2918264622725855778, 4404663168949438663]


def test_augmentation_leaves_the_global_generator_alone():
    view = View(images(1), range(1), transform("cifar10", 32, "autoaugment"))
    before = torch.get_rng_state()
    view[0]
    assert torch.equal(before, torch.get_rng_state())


def test_a_fingerprint_sees_one_changed_pixel_or_label():
    def of(change):
        digits = load("digits", True)
        change(digits)
        return data.fingerprint(digits)

    def pixel(d):
        d.data[7, 3, 3] ^= 1

    def label(d):
        d.targets[5] += 1

    assert len({of(lambda d: None), of(pixel), of(label)}) == 3 and of(pixel) == of(pixel)


def test_a_folders_fingerprint_sees_a_changed_file(tree):
    before = data.fingerprint(load("imagefolder:pets", True))
    Image.new("RGB", (64, 64), (1, 2, 3)).save(tree / "train" / "cat" / "0.png")
    assert data.fingerprint(load("imagefolder:pets", True)) != before


def test_a_folders_fingerprint_sees_an_image_in_another_class(tree):
    found = load("imagefolder:pets", True)
    before = data.fingerprint(found)
    found.samples = [(path, 1 - label) for path, label in found.samples]
    assert data.fingerprint(found) != before


def as_files(own, samples):
    del own.data
    own.samples, own.root = samples, "/here"


@pytest.mark.parametrize("change, words", [
    (lambda d: delattr(d, "data"), "must have .*lacks .samples"), (lambda d: delattr(d, "classes"), "lacks .classes"),
    (lambda d: delattr(d, "targets"), "lacks .targets"), (lambda d: setattr(d, "targets", []), "at least one image"),
    (lambda d: setattr(d, "classes", ["a"]), "whole numbers below 1, .* but are 0, 9"),
    (lambda d: setattr(d, "classes", list("123456789")), "whole numbers below 9, .* but are 0, 9"),
    (lambda d: setattr(d, "targets", [str(k) for k in d.targets]), "whole numbers below 10"),
    (lambda d: setattr(d, "targets", [k - 1 for k in d.targets]), "but are -1, 8"),
    (lambda d: setattr(d, "data", [object()] * len(d.targets)), "an array of numbers"),
    (lambda d: setattr(d, "data", [[1], [2, 3]]), "an array of numbers"),
    (lambda d: as_files(d, [("/elsewhere/a.png", 0)]), "of files in .root"),
    (lambda d: as_files(d, ["/here/a.png"]), "of files in .root")])
def test_a_dataset_of_ones_own_is_judged_before_it_is_trained_on(monkeypatch, change, words):
    class Own(torch.utils.data.Dataset):
        def __init__(self, digits):
            self.data, self.targets, self.classes = digits.data, digits.targets, digits.classes

        def __len__(self):
            return len(self.data) if not hasattr(self, "targets") else len(self.targets)

    def opened(train, root):
        own = Own(data.Digits(train))
        change(own)
        return own

    monkeypatch.setitem(data.DATASETS, "own", data.About(1, 0, (0.3,), (0.4,), open=opened))
    with pytest.raises(DataError, match=f"the test set of own .*{words}"):
        load("own", False)


def test_an_unknown_dataset_is_refused():
    for ask in (lambda: load("cifar", True), lambda: transform("cifar", 32)):
        with pytest.raises(ConfigError, match="^dataset must be one of digits, .*, got 'cifar'$"):
            ask()


@pytest.mark.parametrize("name, augment", [("digits", "standrad"), ("digits", "flip"), ("digits-dvs", "flip+rol")])
def test_an_unknown_augmentation_is_refused(name, augment):
    with pytest.raises(DataError, match=f"augment of {name} must be one of none, .*got"):
        transform(name, 8, augment)
