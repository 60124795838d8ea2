"""Samples that come with scikit-learn: a small tree of image files, to go the way of ImageNet without ImageNet, and
photographs, to show a trained network."""

from pathlib import Path

from PIL import Image

from . import data, records


def digit_images(name: str = "digits64", size: int = 64, train: int = 40, val: int = 12) -> Path:
    """The embedded digits as colour PNGs of size x size in the data folder: NAME/train/3/0017.png, NAME/val/...

    train, val: images of each of the ten classes, the first ones of the digits' training and test set. The tree is
    there whole or not at all; where it is there, it is left alone. The dataset's name is then "imagefolder:NAME".
    """
    root = records.folder("data")
    if (root / name).is_dir():
        return root / name
    try:
        with records.building(root / name) as building:
            if (root / name).is_dir():  # another process was faster
                return root / name
            for split, count in (("train", train), ("val", val)):
                digits = data.Digits(split == "train")
                for label in digits.classes:
                    folder = building / split / label
                    folder.mkdir(parents=True)
                    for i in [i for i, target in enumerate(digits.targets) if str(target) == label][:count]:
                        digits[i][0].convert("RGB").resize((size, size)).save(folder / f"{i:04}.png")
            building.rename(root / name)
    except OSError as error:
        raise data.DataError(f"{root / name} could not be written ({error.strerror or error}).") from None
    return root / name


def photographs(size: int = 32, rows: int = 1) -> list[Image.Image]:
    """scikit-learn's two photographs, a temple and a dahlia, in square tiles of size x size pixels: from each, `rows`
    rows of as many tiles as its width holds."""
    from sklearn.datasets import load_sample_images

    tiles = []
    for pixels in load_sample_images().images:
        image, side = Image.fromarray(pixels), pixels.shape[0] // rows
        columns = pixels.shape[1] // side
        margin = (pixels.shape[1] - columns * side) // 2
        for row in range(rows):
            for column in range(columns):
                left, top = margin + column * side, row * side
                tiles.append(image.crop((left, top, left + side, top + side)).resize((size, size)))
    return tiles
