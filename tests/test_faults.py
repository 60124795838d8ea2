"""What may befall everything on the way but the training loop: data sets, frames, image and event files, networks, page.

The truth is what comes of the same work where nothing happens, in folders of its own.
"""

import hashlib
import io
import json
import os
import shutil
import signal
import tarfile
import time
import warnings
import zipfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import faults
import numpy as np
import pytest
import test_events
import torch
import torchvision.datasets
from faults import SMALL, apart, at_write, epochs_of, kill, kill_at_write, one_after_the_other
from PIL import Image

import staa
from staa import Config, data, events, items, page, records, samples, train, weights
from staa.data import DataError, load, load_for
from staa.records import Record, RecordError
from staa.train import TrainingError

#: Two epochs of two steps on frames of N-MNIST recordings that are unpacked from an archive.
EVENTS = Config(dataset="nmnist", image_size=17, network="resnet20", width=1 / 32, neuron="lif", T=2, epochs=2, batch_size=10,
                lr=0.02)


def one_sentence(error, *words):
    text = str(error.value if hasattr(error, "value") else error)
    assert "\n" not in text and text.endswith(".") and all(str(word) in text for word in words), text
    return True


def flips(content, count, seed=0):
    """The content with one bit flipped, at `count` places."""
    rng = np.random.default_rng(seed)
    for place, bit in zip(rng.integers(0, len(content), count), rng.integers(0, 8, count)):
        damaged = bytearray(content)
        damaged[place] ^= 1 << int(bit)
        yield bytes(damaged)


def cuts(content, count):
    """The content cut short at `count` lengths, none and all but one byte among them."""
    return [content[:n] for n in np.linspace(0, len(content) - 1, count, dtype=int)]


# --- archives ---

def md5(path):
    return hashlib.md5(path.read_bytes()).hexdigest()


def nmnist(root):
    """N-MNIST's two archives with two recordings of each class for training and one for testing."""
    place, believed = root / "data" / "NMNIST", []
    place.mkdir(parents=True)
    for split, count in (("Train", 2), ("Test", 1)):
        with zipfile.ZipFile(place / f"{split.lower()}.zip", "w") as archive:
            for k in range(10):
                for i in range(count):
                    archive.writestr(f"{split}/{k}/{i:05}.bin", test_events.nmnist(test_events.recording(seed=10 * k + i)))
        believed.append(("tonic.datasets", "NMNIST", f"{split.lower()}_md5", md5(place / f"{split.lower()}.zip")))
    return believed


def dvsgesture(root):
    """DVS Gesture's two archives with two persons for training and one for testing."""
    place, believed = root / "data" / "DVSGesture", []
    place.mkdir(parents=True)
    for split, users in (("Train", (1, 2)), ("Test", (24,))):
        with tarfile.open(place / f"ibmGesture{split}.tar.gz", "w:gz") as archive:
            for user in users:
                for k in range(11):
                    content = io.BytesIO()
                    np.save(content, np.full((3, 4), k))
                    member = tarfile.TarInfo(f"ibmGesture{split}/user{user:02}_led/{k}.npy")
                    member.size = len(content.getvalue())
                    archive.addfile(member, io.BytesIO(content.getvalue()))
        believed.append(("tonic.datasets", "DVSGesture", f"{split.lower()}_md5", md5(place / f"ibmGesture{split}.tar.gz")))
    return believed


def cifar10dvs(root):
    """CIFAR10-DVS's archive of ten archives, with nothing in its recordings."""
    place = root / "data" / "CIFAR10DVS"
    place.mkdir(parents=True)
    with zipfile.ZipFile(place / "CIFAR10DVS.zip", "w") as archive:
        for label in events.CIFAR:
            inner = io.BytesIO()
            with zipfile.ZipFile(inner, "w") as recordings:
                for i in range(1000):
                    recordings.writestr(f"{label}/cifar10_{label}_{i}.aedat4", b"")
            archive.writestr(f"{label}.zip", inner.getvalue())
    return [("tonic.datasets", "CIFAR10DVS", "file_md5", md5(place / "CIFAR10DVS.zip"))]


def cifar10(root):
    """CIFAR-10's archive with 20 images for training and 10 for testing."""
    import test_data  # here, since it imports scikit-learn, which takes seconds in a process that does no more than unpack

    cls = torchvision.datasets.CIFAR10
    folder = root / "data" / cls.base_folder
    _, sums = test_data.cifar_files(root / "data", "cifar10")
    with tarfile.open(root / "data" / cls.filename, "w:gz") as archive:
        archive.add(folder, cls.base_folder)
    shutil.rmtree(folder)
    return [("torchvision.datasets", "CIFAR10", name, value) for name, value in (
        ("train_list", [[f, sums[f]] for f, _ in cls.train_list]), ("test_list", [[f, sums[f]] for f, _ in cls.test_list]),
        ("meta", cls.meta | {"md5": sums[cls.meta["filename"]]}), ("tgz_md5", md5(root / "data" / cls.filename)))]


ARCHIVES = {"nmnist": nmnist, "dvsgesture": dvsgesture, "cifar10dvs": cifar10dvs, "cifar10": cifar10}


def contents(name):
    """What a data set holds: of every recording its path, label and bytes; of images the pixels and labels."""
    found = []
    for part in (load(name, True), load(name, False)):
        if hasattr(part, "samples"):
            found.append([(str(path.relative_to(part.root)), label, path.read_bytes()) for path, label in part.samples])
        else:
            found.append((part.data.tobytes(), part.targets))
    return found


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory):
    """A data set where nothing happens: (its contents by name, unpacked by another program)."""
    def make(name):
        if name not in known:
            root = tmp_path_factory.mktemp(name)
            believed = ARCHIVES[name](root)
            for archive in [*root.rglob("*.zip"), *root.rglob("*.gz")]:
                shutil.unpack_archive(archive, archive.parent)
            for archive in root.rglob("*/CIFAR10DVS/[a-z]*.zip"):
                shutil.unpack_archive(archive, archive.parent)
            code, _, known[name] = apart(root, fault=partial(faults.believe, believed), work=partial(contents, name))
            assert code == 0 and isinstance(known[name], list), known[name]
        return known[name]

    known = {}
    return make


@pytest.mark.parametrize("name, part, nth", [
    ("nmnist", ".zip", 0), ("nmnist", "Train/", 1), ("nmnist", "Train/9/00001.bin", 1), ("nmnist", "Test/9", 1),
    ("dvsgesture", "ibmGestureTrain/user02_led/10", 1), ("dvsgesture", ".npy", 30),
    ("cifar10dvs", "truck_999.aedat4", 1), ("cifar10", "test_batch", 1), ("cifar10", "data_batch", 2)])
def test_a_data_set_whose_unpacking_was_killed_is_whole_the_next_time(tmp_path, unpacked, name, part, nth):
    believe = partial(faults.believe, ARCHIVES[name](tmp_path))
    if nth:
        code, _, _ = apart(tmp_path, fault=partial(one_after_the_other, believe, partial(at_write, part, nth, kill)),
                           work=partial(contents, name))
        assert code == -signal.SIGKILL
    code, _, found = apart(tmp_path, fault=believe, work=partial(contents, name))
    assert code == 0 and found == unpacked(name), found if isinstance(found, Exception) else ""
    left = [path for path in (tmp_path / "data").glob(".*") if not path.name.endswith(".lock")]
    assert left == [], "what a killed process left is removed"


def test_a_data_set_killed_between_its_folders_is_whole_the_next_time(tmp_path, unpacked):
    believe, work = partial(faults.believe, cifar10dvs(tmp_path)), partial(contents, "cifar10dvs")
    dies = partial(one_after_the_other, believe, partial(faults.at_rename, "CIFAR10DVS/horse", kill))
    assert apart(tmp_path, fault=dies, work=work)[0] == -signal.SIGKILL
    there = [path.name for path in (tmp_path / "data" / "CIFAR10DVS").iterdir() if path.is_dir()]
    assert 0 < len(there) < 10
    code, _, found = apart(tmp_path, fault=believe, work=work)
    assert code == 0 and found == unpacked("cifar10dvs"), found if isinstance(found, Exception) else ""


@pytest.mark.parametrize("name, part", [("nmnist", "Train/9/00001.bin"), ("cifar10", "test_batch")])
def test_who_finds_a_data_set_being_unpacked_waits_for_it(tmp_path, unpacked, name, part):
    believe, work = partial(faults.believe, ARCHIVES[name](tmp_path)), partial(contents, name)
    here, waits, go_on = (tmp_path / word for word in ("here", "waits", "go on"))
    first = faults.start(tmp_path, work=work, fault=partial(
        one_after_the_other, believe, partial(at_write, part, 1, partial(faults.hold, here, go_on))))
    while not here.exists():
        assert first[0].is_alive()
    second = faults.start(tmp_path, work=work, fault=partial(
        one_after_the_other, believe, partial(at_write, ".lock", 1, waits.touch)))
    while not waits.exists() and not second[1].poll(0.02):
        pass
    go_on.touch()
    for one in (first, second):
        code, _, found = faults.end(*one)
        assert code == 0 and found == unpacked(name), found if isinstance(found, Exception) else ""


@pytest.mark.parametrize("name", ["nmnist", "dvsgesture", "cifar10"])
def test_a_full_disk_ends_the_unpacking_in_one_sentence_and_later_it_is_whole(tmp_path, unpacked, name):
    believe = partial(faults.believe, ARCHIVES[name](tmp_path))
    full = partial(one_after_the_other, believe, partial(faults.no_file_above, 100))
    code, _, error = apart(tmp_path, fault=full, work=partial(contents, name))
    assert code == 0 and isinstance(error, DataError) and one_sentence(error, "File too large")
    assert apart(tmp_path, fault=believe, work=partial(contents, name))[2] == unpacked(name)


@pytest.mark.parametrize("name", ARCHIVES)
@pytest.mark.parametrize("damage", ["flipped", "cut"])
def test_a_damaged_archive_is_refused_in_one_sentence(tmp_path, monkeypatch, no_network, name, damage):
    for module, cls, attribute, value in ARCHIVES[name](tmp_path):
        monkeypatch.setattr(f"{module}.{cls}.{attribute}", value)
    for path in [*tmp_path.rglob("*.zip"), *tmp_path.rglob("*.gz")]:
        content = path.read_bytes()
        path.write_bytes(next(flips(content, 1)) if damage == "flipped" else content[:-1])
    with pytest.raises(DataError, match="missing or damaged") as caught:
        load(name, True)
    assert one_sentence(caught, "place the official")
    assert not list(tmp_path.rglob("Train*")) and not list(tmp_path.rglob("*_batch*"))


@pytest.mark.parametrize("damage", ["flipped", "cut"])
@pytest.mark.parametrize("file", ["data_batch_1", "data_batch_5", "test_batch", "batches.meta"])
def test_a_damaged_file_of_cifar_is_refused_or_unpacked_again(tmp_path, monkeypatch, no_network, file, damage):
    for _, cls, attribute, value in cifar10(tmp_path):
        monkeypatch.setattr(torchvision.datasets.CIFAR10, attribute, value)
    expected, path = contents("cifar10"), tmp_path / "data" / torchvision.datasets.CIFAR10.base_folder / file
    content = path.read_bytes()
    path.write_bytes(next(flips(content, 1)) if damage == "flipped" else content[:-1])
    damaged = path.read_bytes()
    if file != "batches.meta":  # torchvision does not unpack for the sake of the classes' names
        assert contents("cifar10") == expected and path.read_bytes() == content
        path.write_bytes(damaged)
    (tmp_path / "data" / torchvision.datasets.CIFAR10.filename).unlink()
    with pytest.raises(DataError) as caught:
        contents("cifar10")
    assert one_sentence(caught, "missing or damaged")


# --- the whole way ---

@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """(root, record, seconds) of EVENTS from its archives on, where nothing happens."""
    root = tmp_path_factory.mktemp("undisturbed")
    believed, start = nmnist(root), time.time()
    code, lines, record = apart(root, EVENTS, partial(faults.believe, believed))
    assert code == 0 and epochs_of(lines) == [1, 2], record
    return root, record, time.time() - start


def whole(root, record, undisturbed):
    """The record, the weights and the frames are those of the run that nothing befell."""
    truth, expected, _ = undisturbed
    assert (record.config, record.outcome) == (expected.config, expected.outcome), record
    assert kept(root / "runs") == kept(truth / "runs")
    return True


def kept(folder):
    """The files below a folder that a reader looks at, but for the record."""
    # Of the frames without their folder, which is named by the time stamps of the recordings, too.
    return sorted((path.name, path.read_bytes()) for path in folder.rglob("*")
                  if path.is_file() and path.name not in ("lock", "record.json") and not path.name.startswith("."))


def test_a_run_killed_at_random_moments_ends_in_the_same_record(tmp_path, undisturbed):
    """From the archive to the record: each process is killed some time after its start, wherever it is by then."""
    believe = partial(faults.believe, nmnist(tmp_path))
    for seconds in np.random.default_rng(0).uniform(0.1, 0.9, 8) * undisturbed[2]:
        process, pipe = faults.start(tmp_path, EVENTS, believe)
        process.join(seconds)
        process.kill()
        faults.end(process, pipe)
    code, _, record = apart(tmp_path, EVENTS, believe)
    assert code == 0 and whole(tmp_path, record, undisturbed)


@pytest.mark.parametrize("moment", ["half", "whole", "moved"])
@pytest.mark.parametrize("frame", ["0", "13"])
def test_a_run_killed_while_it_caches_frames_ends_in_the_same_record(tmp_path, undisturbed, frame, moment):
    believe = partial(faults.believe, nmnist(tmp_path))
    fault = partial(one_after_the_other, believe, partial(kill_at_write, frame, 1, moment))
    assert apart(tmp_path, EVENTS, fault)[0] == -signal.SIGKILL
    assert len(list((tmp_path / "runs" / "frames").glob(f"*/.{frame}.*"))) == (moment != "moved")
    code, _, record = apart(tmp_path, EVENTS, believe)
    assert code == 0 and whole(tmp_path, record, undisturbed)


def test_a_run_whose_frames_fill_the_disk_stops_in_one_sentence_and_goes_on_later(tmp_path, undisturbed):
    believe = partial(faults.believe, nmnist(tmp_path))
    apart(tmp_path, fault=believe, work=partial(contents, "nmnist"))
    code, lines, error = apart(tmp_path, EVENTS, partial(faults.no_file_above, 100))
    assert code == 0 and lines == [] and isinstance(error, RecordError) and one_sentence(error, "File too large", "frames")
    code, _, record = apart(tmp_path, EVENTS)
    assert code == 0 and whole(tmp_path, record, undisturbed)


def two_runs(seed):
    return train.run(EVENTS.but(seed=seed), device="cpu", workers=0, log=lambda line: None)


def test_two_runs_that_fill_one_cache_end_in_the_same_records(tmp_path, undisturbed):
    """The one waits inside the writing of a frame until the other has written all of them."""
    believe = partial(faults.believe, nmnist(tmp_path))
    apart(tmp_path, fault=believe, work=partial(contents, "nmnist"))
    here, go_on = tmp_path / "here", tmp_path / "go on"
    slow = faults.start(tmp_path, EVENTS, partial(at_write, "frames/", 3, partial(faults.hold, here, go_on)))
    while not here.exists():
        assert slow[0].is_alive()
    _, _, other = apart(tmp_path, work=partial(two_runs, 1))
    go_on.touch()
    code, _, record = faults.end(*slow)
    assert code == 0 and isinstance(other, Record) and other.outcome != record.outcome
    shutil.rmtree(tmp_path / "runs" / EVENTS.but(seed=1).name)
    assert whole(tmp_path, record, undisturbed)


def test_a_damaged_cache_file_is_made_again_whatever_the_damage(undisturbed, tmp_path, monkeypatch):
    shutil.copytree(undisturbed[0] / "data", tmp_path / "data", symlinks=True)
    frames = load_for(EVENTS, True)
    truth = frames[0][0]
    file = frames.folder / "0"
    content, refused = file.read_bytes(), 0
    for damaged in [*flips(content, 80), *cuts(content, 12)]:
        file.write_bytes(damaged)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            assert torch.equal(frames[0][0], truth)
        assert file.read_bytes() == (content if said else damaged)
        refused += bool(said)
    assert refused > 85, "nearly all of the file is checked"


# --- folders that cannot be written or read ---

def digits_tree():
    data.Digits = FewDigits
    return sorted((str(p.relative_to(root)), p.read_bytes()) for root in [samples.digit_images("few", 16)]
                  for p in root.rglob("*.png"))


class FewDigits:
    """Four digits of two classes, without scikit-learn."""

    def __init__(self, train):
        self.classes, self.targets = ["0", "1"], [0, 1, 0, 1]

    def __getitem__(self, i):
        return Image.fromarray(np.full((8, 8), 60 * i, np.uint8)), self.targets[i]


def first_frames():
    return int(load_for(EVENTS, True)[0][0].sum())


@pytest.mark.parametrize("path, mode, work, error", [
    ("data", 0o555, partial(contents, "nmnist"), DataError), ("data/NMNIST", 0o555, partial(contents, "nmnist"), DataError),
    ("data", 0o555, partial(contents, "cifar10"), DataError), ("data", 0o555, digits_tree, DataError),
    ("data/NMNIST/Train", 0o000, partial(contents, "nmnist"), DataError),
    ("runs/frames", 0o555, first_frames, RecordError), ("runs/frames/*", 0o555, first_frames, RecordError),
    ("runs/frames/*/0", 0o000, first_frames, RecordError), ("runs/frames/*", 0o000, first_frames, RecordError)])
def test_what_permissions_forbid_is_one_sentence(commons, path, mode, work, error):
    believe = partial(faults.believe, nmnist(commons))
    (commons / "data").chmod(0o777)
    if path.startswith("runs"):
        apart(commons, fault=believe, work=first_frames)
        if mode == 0o555:
            for file in commons.glob("runs/frames/*/0"):
                file.unlink()
        if path == "runs/frames":
            next(commons.glob("runs/frames/*")).rmdir()
    for found in commons.glob(path):
        found.chmod(mode)
    code, _, said = apart(commons, fault=partial(one_after_the_other, believe, faults.as_nobody), work=work)
    assert code == 0 and type(said) is error and one_sentence(said, commons), repr(said)


def test_a_tree_of_images_is_there_whole_or_not_at_all(tmp_path):
    truth = apart(tmp_path / "truth", work=digits_tree)[2]
    for nth in (1, 3, 8):
        assert apart(tmp_path, fault=partial(at_write, ".png", nth, kill), work=digits_tree)[0] == -signal.SIGKILL
        assert not (tmp_path / "data" / "few").exists()
    _, _, error = apart(tmp_path, fault=partial(faults.no_file_above, 0), work=digits_tree)
    assert isinstance(error, DataError) and one_sentence(error, "few could not be written")
    here, waits, go_on = (tmp_path / word for word in ("here", "waits", "go on"))
    first = faults.start(tmp_path, work=digits_tree, fault=partial(at_write, ".png", 5, partial(faults.hold, here, go_on)))
    while not here.exists():
        assert first[0].is_alive()
    second = faults.start(tmp_path, work=digits_tree, fault=partial(at_write, ".lock", 1, waits.touch))
    while not waits.exists():
        assert second[0].is_alive()
    go_on.touch()
    assert faults.end(*first)[2] == faults.end(*second)[2] == truth
    assert sorted(os.listdir(tmp_path / "data")) == [".few.lock", "few"]


# --- image and event files ---

def read_damaged(name, path, contents):
    """For each content of the file: the sentence that refuses it, or nothing."""
    said, source = [], events.SOURCES[name]
    reader = events.Recordings.__new__(events.Recordings)
    reader.source, reader.samples = source, [(path, 0)]
    os.dup2(os.open(path.with_name("stderr"), os.O_CREAT | os.O_WRONLY), 2)
    for content in contents:
        path.write_bytes(content)
        try:
            found, _ = reader[0]
            assert found.dtype == events.EVENT and len(found)
            said.append("")
        except DataError as error:
            said.append(str(error))
    return said


def gesture(found):
    content = io.BytesIO()
    np.save(content, np.stack([found["x"], found["y"], found["p"], found["t"] // 1000], axis=1))
    return content.getvalue()


@pytest.mark.parametrize("name, write, floor", [
    ("nmnist", test_events.nmnist, 0.3), ("dvsgesture", gesture, 0.4), ("cifar10dvs", test_events.aedat4, 0.3)])
def test_a_damaged_recording_is_refused_or_its_fingerprint_tells(tmp_path, name, write, floor):
    """In a process of its own: a decoder may end the process that it is in."""
    content = write(test_events.recording(sensor=events.SOURCES[name].sensor))
    path = tmp_path / f"1{events.SOURCES[name].ending}"
    damaged = [*flips(content, 250), *cuts(content, 30)]
    if name == "cifar10dvs":  # and every byte of the header that is text, as no text: the decoder would abort
        start, stop = content.index(b"<dv"), content.index(b"</dv>")
        damaged += [content[:i] + bytes([content[i] ^ 0x80]) + content[i + 1:] for i in range(start, stop, 4)]
    code, _, said = apart(tmp_path, work=partial(read_damaged, name, path, damaged))
    assert code == 0 and isinstance(said, list), said
    assert not (tmp_path / "stderr").read_text(), "the sentence is all that is said"
    refused = [text for text in said if text]
    assert all(one_sentence(text, path) for text in refused) and floor < len(refused) / len(damaged)
    told = set()
    for one in [content, *damaged]:
        path.write_bytes(one)
        told.add(data.fingerprint(SimpleNamespace(samples=[(path, 0)], root=tmp_path)))
    assert len(told) == len({content, *damaged}), "one bit is another fingerprint"


@pytest.mark.parametrize("ending, floor", [("png", 0.95), ("jpeg", 0.05), ("bmp", 0.05), ("webp", 0.1)])
def test_a_damaged_image_is_refused_or_its_fingerprint_tells(tmp_path, monkeypatch, ending, floor):
    folder = tmp_path / "data" / "pets"
    for path in (folder / "train" / "a" / f"0.{ending}", folder / "val" / "a" / f"0.{ending}"):
        path.parent.mkdir(parents=True)
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(path)
    images = load("imagefolder:pets", False)
    content, truth, before, refused = path.read_bytes(), np.asarray(images[0][0]), data.fingerprint(images), 0
    damaged = [*flips(content, 120), *cuts(content, 12)]
    for one in damaged:
        path.write_bytes(one)
        assert data.fingerprint(images) != before
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                np.asarray(images[0][0])
        except DataError as error:
            refused += one_sentence(error, path, "cannot be read")
    assert refused > floor * len(damaged)
    path.write_bytes(content)
    assert data.fingerprint(images) == before and (np.asarray(images[0][0]) == truth).all()


# --- processes that load data ---

def with_workers():
    return train.run(SMALL.but(epochs=1), device="cpu", workers=2, log=lambda line: None)


def test_a_damaged_image_in_a_process_that_loads_data_is_one_sentence(root):
    path = root / "data" / "noise" / "train" / "c" / "4.png"
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(DataError, match="c/4.png cannot be read") as caught:
        with_workers()
    assert one_sentence(caught, path)


def test_a_killed_process_that_loads_data_ends_the_run_in_one_sentence(root, monkeypatch):
    """As the system kills one where memory is short; the next start makes the record of no such process."""
    truth = train.run(SMALL.but(epochs=1), device="cpu", workers=0, log=lambda line: None)
    shutil.rmtree(root / "runs")
    read = torchvision.datasets.ImageFolder.__getitem__

    def fatal(images, i):
        if i == 21 and torch.utils.data.get_worker_info():
            kill()
        return read(images, i)

    with monkeypatch.context() as patched, pytest.raises(TrainingError, match="that loads data .* was killed") as caught:
        patched.setattr(torchvision.datasets.ImageFolder, "__getitem__", fatal)
        patched.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.2)  # seconds until a killed one is missed
        with_workers()
    assert one_sentence(caught, "start the run again")
    assert train.run(SMALL.but(epochs=1), device="cpu", workers=0, log=lambda line: None).outcome == truth.outcome


def test_a_gpu_without_room_ends_the_run_in_one_sentence(root, monkeypatch):
    def no_room(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has ...")

    with monkeypatch.context() as patched, pytest.raises(TrainingError, match="no room .* smaller batch_size") as caught:
        patched.setattr(train, "gradient", no_room)
        train.run(SMALL.but(epochs=1), device="cpu", workers=0, log=lambda line: None)
    assert one_sentence(caught, "microbatch")


def test_a_cpu_without_room_ends_the_run_in_one_sentence(root, monkeypatch):
    """With torch's own words."""
    def no_room(*_):
        torch.empty(2 ** 58)

    with monkeypatch.context() as patched, pytest.raises(TrainingError, match="memory has no room .* batch_size") as caught:
        patched.setattr(train, "gradient", no_room)
        train.run(SMALL.but(epochs=1), device="cpu", workers=0, log=lambda line: None)
    assert one_sentence(caught, "microbatch")


# --- a loss that is no number ---

@pytest.mark.parametrize("microbatch", [0, 5])
@pytest.mark.parametrize("step, tensor, words, left", [
    (1, -1, "the loss of .* in epoch 1, step 2; there is no checkpoint yet", [1, 2, 3]),
    (4, -1, "the loss of .* in epoch 2, step 2; the checkpoint of epoch 1 is kept", [2, 3]),
    (6, -1, "the tensor head.bias of .* in epoch 2; the checkpoint of epoch 1 is kept", [2, 3]),
    (8, 0, "the tensor .*weight of .* in epoch 3; the checkpoint of epoch 2 is kept", [3])])
def test_a_loss_that_is_no_number_names_its_moment_and_the_checkpoint_that_is_there(root, microbatch, step, tensor, words,
                                                                                   left):
    """The first layer's weights leave the loss a number: behind them no neuron fires."""
    config = SMALL.but(microbatch=microbatch, clip_norm=0.0)
    code, lines, error = apart(root, config, partial(faults.burst_at_step, step, tensor))
    assert code == 0 and isinstance(error, TrainingError) and one_sentence(error, "try a smaller lr")
    with pytest.raises(TrainingError, match=words):
        raise error
    file = root / "runs" / config.name / "checkpoint.pt"
    assert file.is_file() == (len(left) < 3) and not file.with_name("record.json").exists()
    if file.is_file():
        state = torch.load(file, weights_only=True)
        assert len(state["epochs"]) == 3 - len(left) and all(t.isfinite().all() for t in state["network"].values())
    if step == 4 and not microbatch:
        assert epochs_of(apart(root, config)[1]) == left


# --- what is written about finished runs ---

def vouch():
    items.vouch([EVENTS])


def ship():
    items.ship(EVENTS.name)


def pretrained():
    staa.save_pretrained(train.trained(records.find(EVENTS)), records.folder("figures") / "hub")


def the_page():
    """`make all` of one notebook that stands for all, executed by a program that copies it."""
    page.NOTEBOOKS, page.subprocess = records.folder("data"), SimpleNamespace(run=copies)
    return page.main()


def copies(command, **_):
    try:
        shutil.copy(command[-2], command[-1])
    except OSError as error:
        return SimpleNamespace(returncode=1, stderr=str(error))
    return SimpleNamespace(returncode=0, stderr="")


WORKS = {"vouch": vouch, "ship": ship, "pretrained": pretrained, "page": the_page}
FOLDERS = ("records", "networks", "figures", "runs")


def with_a_run_and_a_notebook(root, undisturbed):
    shutil.copytree(undisturbed[0] / "runs", root / "runs")
    (root / "data").mkdir()
    (root / "data" / "x.ipynb").write_text(json.dumps({"cells": [{"source": ["# A title\n"], "metadata": {}}], "x": "x" * 5000}))


@pytest.fixture
def finished(undisturbed, tmp_path, monkeypatch):
    """A place with a finished run, and this process's folders there, too."""
    with_a_run_and_a_notebook(tmp_path, undisturbed)
    for kind in FOLDERS:
        monkeypatch.setenv(f"STAA_{kind.upper()}", str(tmp_path / kind))
    return tmp_path


def written(root):
    """Every file that a reader looks at."""
    return {str(path.relative_to(root)): path.read_bytes() for kind in FOLDERS for path in (root / kind).rglob("*")
            if path.is_file() and path.name != "lock" and not path.name.startswith(".")}


@pytest.fixture(scope="module")
def truth(undisturbed, tmp_path_factory):
    """What each work writes where nothing happens."""
    found = {}
    for name, work in WORKS.items():
        root = tmp_path_factory.mktemp(name)
        with_a_run_and_a_notebook(root, undisturbed)
        code, _, said = apart(root, work=work)
        assert code == 0 and not isinstance(said, Exception), said
        found[name] = written(root)
    return found


NETWORK, RECORD = f"{EVENTS.name}.safetensors", f"{EVENTS.name}.json"


@pytest.mark.parametrize("name, file", [("vouch", RECORD), ("ship", NETWORK), ("ship", RECORD), ("pretrained", weights.MODEL),
                                        ("pretrained", weights.CONFIG), ("page", "x.ipynb"), ("page", "index.html")])
def test_a_writer_that_is_killed_leaves_whole_files_and_the_next_one_all_of_them(finished, truth, name, file):
    before = written(finished)
    for moment in ("half", "moved"):
        code, _, _ = apart(finished, fault=partial(kill_at_write, file, 1, moment), work=WORKS[name])
        assert code == -signal.SIGKILL
        assert before.items() <= written(finished).items() <= truth[name].items()
    code, _, _ = apart(finished, work=WORKS[name])
    assert code == 0 and written(finished) == truth[name]


@pytest.mark.parametrize("name", WORKS)
def test_a_writer_on_a_full_disk_ends_in_one_sentence_and_touches_nothing(finished, truth, name):
    before = written(finished)
    code, _, error = apart(finished, fault=partial(faults.no_file_above, 300), work=WORKS[name])
    assert code == 0 and isinstance(error, RecordError) and one_sentence(error, "could not be written (File too large)")
    assert written(finished) == before
    apart(finished, work=WORKS[name])
    assert written(finished) == truth[name]


def test_two_at_once_execute_a_notebook_without_harm(finished, truth, monkeypatch):
    """When one has executed it and not yet put it in its place, another one begins, and is killed half-way."""
    for name in ("subprocess", "NOTEBOOKS"):
        monkeypatch.setattr(page, name, getattr(page, name))  # so that they come back

    def half(command, **_):
        Path(command[-1]).write_text("half")
        raise KeyboardInterrupt

    def other_begins(command, **_):
        done, page.subprocess = copies(command), SimpleNamespace(run=half)
        with pytest.raises(KeyboardInterrupt):
            page.execute(page.items()[0])
        return done

    page.NOTEBOOKS, page.subprocess = records.folder("data"), SimpleNamespace(run=other_begins)
    assert page.main() == 0 and written(finished) == truth["page"]


def test_a_shipped_network_never_stands_beside_the_record_of_another(finished, monkeypatch):
    shown, run_record = finished / "records" / RECORD, records.find(EVENTS)
    other = replace(run_record, outcome=run_record.outcome | {"train_images": 7})
    other.save(shown)
    with monkeypatch.context() as m:
        m.setattr(Record, "save", lambda *_: pytest.fail("killed"))  # between the network and the record
        with pytest.raises(pytest.fail.Exception, match="killed"):
            ship()
    assert (finished / "networks" / NETWORK).is_file() and not shown.exists()
    ship()
    assert Record.load(shown) == run_record


def test_a_damaged_record_or_network_or_config_is_refused_or_the_same(finished):
    record = records.find(EVENTS)
    network = train.trained(record)
    ship()
    pretrained()
    hub = records.folder("figures") / "hub"
    runs = finished / "runs" / EVENTS.name
    shutil.move(runs, finished / "elsewhere")  # what is shipped is looked for where there is no run
    shown = finished / "records" / RECORD

    def same(found):
        return found.config == EVENTS and all(torch.equal(t, found.state_dict()[n]) for n, t in network.state_dict().items())

    for file, use, count, good in (
            (shown, lambda: Record.load(shown), 400, lambda found: found == record),
            (finished / "networks" / NETWORK, lambda: train.trained(record), 25, same),
            (hub / weights.CONFIG, lambda: staa.from_pretrained(hub), 40, same),
            (hub / weights.MODEL, lambda: staa.from_pretrained(hub), 10, same)):
        content, refused = file.read_bytes(), 0
        damaged = [*flips(content, count), *cuts(content, 8)]
        for one in damaged:
            file.write_bytes(one)
            try:
                assert good(use())
            except RecordError as error:
                refused += one_sentence(error)
        assert refused > 0.8 * len(damaged), file
        file.write_bytes(content)
        assert good(use())
