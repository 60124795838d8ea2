"""Event datasets in files of the published formats, frames and their cache, and what a bad recording says.

No installed library writes any of the three formats: the files are put together here, byte by byte, and read by tonic.
"""

import json
import os
import shutil
import struct

import numpy as np
import pytest
import torch

from staa import Config, data, events, frames, records
from staa.data import DataError, View, load, load_for, transform
from staa.settings import ConfigError
from staa.simulator import EVENT, Sensor


def recording(n=60, sensor=34, seed=0):
    rng = np.random.default_rng(seed)
    found = np.empty(n, EVENT)
    found["x"], found["y"], found["p"] = rng.integers(0, sensor, n), rng.integers(0, sensor, n), rng.integers(0, 2, n)
    found["t"] = np.sort(rng.integers(0, 300_000, n))
    return found


def nmnist(found) -> bytes:
    """5 bytes an event: x, y, then polarity and 23 bits of microseconds; y = 240 marks an overflow of 2**13 us."""
    t = found["t"].astype(np.int64)
    rows = np.stack([found["x"], found["y"], found["p"] << 7 | t >> 16, t >> 8 & 255, t & 255], axis=1)
    return rows.astype(np.uint8).tobytes()


def flatbuffer(kind: bytes, vtable: bytes, table: bytes, vector: bytes) -> bytes:
    """Of one table with one vector in it; the size comes first."""
    body = struct.pack("<I4s", 8 + len(vtable), kind) + vtable + table + vector
    body += b"\0" * (-len(body) % 4)
    return struct.pack("<I", len(body)) + body


def aedat4(found) -> bytes:
    """A header that names an uncompressed stream of events of a 128 x 128 sensor, and one packet."""
    size = "".join(f'<attr key="size{axis}" type="int">128</attr>' for axis in "XY")
    xml = ('<dv version="2.0"><node name="outInfo" path="/outInfo/"><node name="0" path="/outInfo/0/">'
           '<attr key="compression" type="string">NONE</attr><attr key="typeIdentifier" type="string">EVTS</attr>'
           f'<node name="info" path="/outInfo/0/info/">{size}</node></node></node></dv>').encode()
    header = flatbuffer(b"IOHE", struct.pack("<5H2x", 10, 8, 0, 0, 4), struct.pack("<iI", 12, 4),
                        struct.pack("<I", len(xml)) + xml + b"\0")
    rows = np.zeros(len(found), np.dtype({"names": ["t", "x", "y", "p"], "formats": ["<i8", "<i2", "<i2", "?"],
                                          "offsets": [0, 8, 10, 12], "itemsize": 16}))
    for name in rows.dtype.names:
        rows[name] = found[name]
    packet = flatbuffer(b"EVTS", struct.pack("<3H2x", 6, 8, 4), struct.pack("<iI", 8, 8),
                        b"\0" * 4 + struct.pack("<I", len(rows)) + rows.tobytes())
    return b"#!AER-DAT4.0\r\n" + header + struct.pack("<II", 0, len(packet)) + packet


@pytest.fixture
def root(tmp_path):
    """N-MNIST with three recordings of each class for training and one for testing."""
    for split, count in (("Train", 3), ("Test", 1)):
        for k in range(10):
            for i in range(count):
                path = tmp_path / "data" / "NMNIST" / split / str(k) / f"{i:05}.bin"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(nmnist(recording(seed=10 * k + i)))
    return tmp_path / "data"


def test_nmnist_is_read_from_any_number_of_recordings(root):
    train, test = load("nmnist", True), load("nmnist", False)
    assert (len(train), len(test), len(train.classes)) == (30, 10, 10)
    found, label = train[4]
    assert label == 1 and (found == recording(seed=11)).all() and found.dtype == EVENT
    assert data.fingerprint(train) != data.fingerprint(test)


def test_links_to_folders_are_followed(root, tmp_path):
    real = tmp_path / "elsewhere"
    (root / "NMNIST" / "Train" / "3").rename(real)
    (root / "NMNIST" / "Train" / "3").symlink_to(real)
    assert load("nmnist", True).targets == sorted([*range(10)] * 3)


@pytest.mark.parametrize("package, name", [("tonic", "nmnist"), ("aedat", "cifar10dvs")])
def test_a_library_that_is_missing_is_no_damage(root, monkeypatch, package, name):
    find = records.find_spec
    monkeypatch.setattr(records, "find_spec", lambda n: None if n == package else find(n))
    with pytest.raises(DataError, match=f"^.* need {package}, which is not installed; the extra notebooks has it.$"):
        load(name, True)


@pytest.mark.parametrize("spoil, words", [
    (lambda e: e["x"].put(7, 34), "has events outside its sensor of 34 x 34 pixels"),
    (lambda e: e["x"].put(7, -1), "has events outside its sensor"),
    (lambda e: e["t"].put(20, 0), "has unsorted time stamps")])
def test_events_of_ones_own_are_judged_as_the_published_ones_are(spoil, words):
    class Own:
        targets, classes = [0], ["a"]

        def __len__(self):
            return 1

        def __getitem__(self, i):
            found = recording()
            spoil(found)
            return found, 0

    with pytest.raises(DataError, match=f"^recording 0 {words}"):
        frames.Frames(Own(), "own", T=4, by="count", sensor=34, size=34)[0]


@pytest.mark.parametrize("name, kind, value, words", [
    ("p", np.int8, -1, "polarities other than 0 and 1"), ("p", np.float32, np.nan, "polarities other than 0 and 1"),
    ("t", np.float64, np.nan, "unsorted time stamps, or such that are no number"),
    ("t", np.float64, np.inf, "unsorted time stamps, or such that are no number"),
    ("t", np.float64, -np.inf, "unsorted time stamps, or such that are no number")])
def test_events_are_darker_or_brighter_and_at_a_time(name, kind, value, words):
    """Whatever type they are stored in; at the end, where infinity is sorted."""
    found = recording()
    found = found.astype([(n, kind if n == name else found.dtype[n]) for n in found.dtype.names])
    assert events.checked(found, 34, "it").dtype == EVENT
    found[name][0 if value == -np.inf else -1] = value
    with pytest.raises(DataError, match=f"^it has {words}; replace or remove it.$"):
        events.checked(found, 34, "it")


def test_frames_of_the_digits_need_tonic_too(monkeypatch):
    monkeypatch.setattr(records, "find_spec", lambda n: None)
    with pytest.raises(DataError, match="^frames of events need tonic, which is not installed"):
        load_for(Config(dataset="digits-dvs", image_size=34, T=4), True)


def test_dvsgesture_is_read_as_tonic_stores_it(tmp_path):
    for split, user in (("Train", 1), ("Test", 24)):
        folder = tmp_path / "data" / "DVSGesture" / f"ibmGesture{split}" / f"user{user:02}_led"
        folder.mkdir(parents=True)
        for k in range(11):
            found = recording(sensor=128, seed=k)
            np.save(folder / f"{k}.npy", np.stack([found["x"], found["y"], found["p"], found["t"] // 1000], axis=1))
    train = load("dvsgesture", True)
    assert len(train) == 11 and train.targets == list(range(11))
    found, label = train[10]
    expected = recording(sensor=128, seed=10)
    expected["t"] = expected["t"] // 1000 * 1000
    assert label == 10 and (found == expected).all()
    (folder / "3.npy").unlink()
    with pytest.raises(DataError, match="class 3 is missing in .*ibmGestureTest"):
        load("dvsgesture", False)


@pytest.fixture
def cifar10dvs(tmp_path):
    """All 10,000 names, of which a few hold a recording."""
    root = tmp_path / "data" / "CIFAR10DVS"
    for label in events.CIFAR:
        (root / label).mkdir(parents=True)
        for i in range(1000):
            (root / label / f"cifar10_{label}_{i}.aedat4").touch()
    for i in (0, 9):
        (root / "horse" / f"cifar10_horse_{i}.aedat4").write_bytes(aedat4(recording(sensor=128, seed=i)))
    return root


def test_cifar10dvs_has_one_test_set_for_everyone(cifar10dvs):
    train, test = load("cifar10dvs", True), load("cifar10dvs", False)
    assert (len(train), len(test)) == (9000, 1000)
    assert (np.bincount(train.targets) == 900).all() and (np.bincount(test.targets) == 100).all()
    names = [{path.name for path, _ in split.samples} for split in (train, test)]
    assert not names[0] & names[1] and len(names[0] | names[1]) == 10_000
    listed = [line.split(",") for line in (records.ROOT / "data" / "splits" / "cifar10dvs.csv").read_text().splitlines()[1:]]
    assert names[1] == {f"cifar10_{label}_{number}.aedat4" for label, number in listed} and len(listed) == 1000
    seen = {path.name: i for i, (path, _) in enumerate(train.samples)}
    found, label = train[seen["cifar10_horse_0.aedat4"]]
    assert train.classes[label] == "horse" and (found == recording(sensor=128)).all()
    with pytest.raises(DataError, match="cifar10_horse_3.aedat4 is truncated or damaged"):
        train[seen["cifar10_horse_3.aedat4"]]
    whole = cifar10dvs / "horse" / "cifar10_horse_0.aedat4"
    whole.write_bytes(whole.read_bytes()[:-40])
    with pytest.raises(DataError, match="cifar10_horse_0.aedat4 is truncated or damaged"):
        train[seen["cifar10_horse_0.aedat4"]]
    extra = cifar10dvs / "ship" / "cifar10_ship_1000.aedat4"
    extra.touch()
    with pytest.raises(DataError, match="the class ship .* must have 1,000 recordings, has 1,001"):
        load("cifar10dvs", True)
    extra.unlink()
    (cifar10dvs / "ship" / "cifar10_ship_77.aedat4").unlink()
    with pytest.raises(DataError, match="the class ship .* must have 1,000 recordings, has 999"):
        load("cifar10dvs", True)


@pytest.mark.parametrize("name, archive", [("cifar10dvs", "CIFAR10DVS.zip"), ("dvsgesture", "ibmGestureTest.tar.gz"),
                                           ("nmnist", "test.zip")])
def test_a_missing_dataset_says_what_where_and_how_and_so_does_the_readme(no_network, name, archive):
    import tonic.datasets

    cls = getattr(tonic.datasets, events.SOURCES[name].tonic)
    md5 = cls.file_md5 if name == "cifar10dvs" else cls.test_md5
    with pytest.raises(DataError, match=f"looked for in .*{cls.__name__}.*place the official {archive} .MD5 {md5}.*"
                                        f"in .*{cls.__name__}, or set STAA_DATA") as caught:
        load(name, False)
    assert "\n" not in str(caught.value)
    readme = (records.ROOT / "README.md").read_text()
    assert archive in readme and md5 in readme


def damaged(kind):
    found = recording()
    if kind == "empty":
        return b""
    if kind == "truncated":
        return nmnist(found)[:-2]
    if kind == "outside":
        found["x"][7] = 34
    if kind == "unsorted":
        found["t"][[20, 40]] = found["t"][[40, 20]]
    return nmnist(found)


@pytest.mark.parametrize("kind, words", [
    ("empty", "holds no event"), ("truncated", "is truncated or damaged .an event takes 5 bytes"),
    ("outside", "has events outside its sensor of 34 x 34 pixels"), ("unsorted", "has unsorted time stamps")])
def test_a_bad_recording_gets_one_sentence_and_harms_no_other(root, kind, words):
    (root / "NMNIST" / "Train" / "0" / "00001.bin").write_bytes(damaged(kind))
    found = load_for(Config(dataset="nmnist", image_size=34), True)
    with pytest.raises(DataError, match=f"the recording .*00001.bin {words}") as caught:
        found[1]
    assert "\n" not in str(caught.value) and not (found.folder / "1").exists()
    assert found[0][0].sum() == found[2][0].sum() == 60


def test_a_missing_class_folder_is_named(root):
    shutil.rmtree(root / "NMNIST" / "Train" / "7")
    with pytest.raises(DataError, match="the class 7 is missing in .*Train"):
        load("nmnist", True)


@pytest.mark.parametrize("by", frames.FRAMES)
def test_frames_are_counts_by_hand(by):
    found = recording(n=61)
    made = frames.to_frames(found, 4, by, 34, 34)
    expected = np.zeros((4, 2, 34, 34), int)
    start, width = found["t"][0], (found["t"][-1] - found["t"][0]) // 4
    for i, (x, y, t, p) in enumerate(found.tolist()):
        bin = i // 15 if by == "count" else (t - start) // width
        if bin < 4:
            expected[bin, int(p), y, x] += 1
    assert (made == expected).all() and made.dtype == np.int16
    half = frames.to_frames(found, 4, by, 34, 17)
    assert (half == made.reshape(4, 2, 17, 2, 17, 2).sum((3, 5))).all()


def test_frames_agree_with_spikingjelly():
    from spikingjelly.datasets.utils import integrate_events_by_fixed_frames_number

    found = recording(n=64)
    theirs = integrate_events_by_fixed_frames_number({name: found[name] for name in "txyp"}, "number", 8, 34, 34)
    assert (frames.to_frames(found, 8, "count", 34, 34) == theirs).all()


@pytest.mark.parametrize("T", [0, -1, 61])
def test_t_is_between_one_and_the_number_of_events(T):
    for by in frames.FRAMES:
        with pytest.raises(DataError, match=f"T must be between 1 and 60 for a recording of 60 events .*, got {T}"):
            frames.to_frames(recording(), T, by, 34, 34)


def test_bins_of_equal_count_may_be_shorter_than_a_microsecond():
    found = recording(n=12)
    found["t"] = 5 + np.arange(12) // 4  # three time stamps
    made = frames.to_frames(found, 6, "count", 34, 34)
    assert made.sum((1, 2, 3)).tolist() == [2] * 6
    assert all(made[i // 2, int(p), y, x] for i, (x, y, _, p) in enumerate(found.tolist()))
    with pytest.raises(DataError, match="T must be between 1 and 2 for .* 12 events and 2 microseconds, got 6"):
        frames.to_frames(found, 6, "time", 34, 34)


def test_frames_come_from_the_cache_and_a_change_never_finds_them(root):
    config = Config(dataset="nmnist", image_size=34)
    first = load_for(config, True)
    made = [first[i][0] for i in range(3)]
    assert made[0].shape == (4, 2, 34, 34) and sorted(os.listdir(first.folder)) == ["0", "1", "2"]
    shutil.move(root / "NMNIST", root / "elsewhere")
    assert all(torch.equal(first[i][0], x) for i, x in enumerate(made)), "read back, not made again"
    shutil.move(root / "elsewhere", root / "NMNIST")
    assert load_for(config, True).folder == first.folder
    others = [load_for(c, True).folder for c in (config.but(T=2), config.but(frames="time"), config.but(image_size=17))]
    others.append(load_for(config, False).folder)
    path = root / "NMNIST" / "Train" / "0" / "00000.bin"
    path.write_bytes(nmnist(recording(seed=99)))  # of the same size, so that the fingerprint stays
    os.utime(path, ns=(0, 0))
    others.append(load_for(config, True).folder)
    assert len({first.folder, *others}) == 6


@pytest.mark.parametrize("content", [b"", b"staa frames 0\n1234", frames.Frames.VERSION + b"half"])
def test_a_damaged_or_foreign_cache_file_is_made_again(root, content):
    found = load_for(Config(dataset="nmnist", image_size=34), True)
    made = found[0][0]
    whole = (found.folder / "0").read_bytes()
    (found.folder / "0").write_bytes(content)
    with pytest.warns(UserWarning, match="the cached frames .*0 are damaged or of another version"):
        assert torch.equal(found[0][0], made)
    assert (found.folder / "0").read_bytes() == whole


def test_a_disk_that_fills_leaves_no_half_file(root, monkeypatch):
    found = load_for(Config(dataset="nmnist", image_size=34), True)
    first = found[0][0]

    def full(handle):
        raise OSError(28, "No space left on device")

    words = "1 could not be written .No space left"
    with monkeypatch.context() as patched, pytest.raises(records.RecordError, match=words):
        patched.setattr(os, "fsync", full)
        found[1]
    assert os.listdir(found.folder) == ["0"] and torch.equal(found[0][0], first)
    assert found[1][0].sum() == 60


def test_the_augmentations_by_what_they_keep():
    x = torch.from_numpy(frames.to_frames(recording(n=600), 4, "count", 34, 34)).float()
    for name in ("flip", "roll"):
        seen = [step(x) for step in frames.augmentation(name, 34) for _ in range(30)]
        assert all(torch.equal(y.sum((2, 3)), x.sum((2, 3))) for y in seen), "each stays in its time step and polarity"
        assert any(not torch.equal(y, x) for y in seen)
    (roll,), (flip,) = frames.augmentation("roll", 34), frames.augmentation("flip", 34)
    allowed = [x.roll((i, j), (-2, -1)) for i in range(-3, 4) for j in range(-3, 4)]
    assert all(any(torch.equal(y, a) for a in allowed) for y in (roll(x) for _ in range(20)))
    assert all(torch.equal(y, x) or torch.equal(y, x.flip(-1)) for y in (flip(x) for _ in range(20)))
    cut = torch.stack([frames.augmentation("cutout", 48)[0](torch.ones(2, 2, 48, 48)) for _ in range(20)])
    assert (cut == cut[:, :1, :1]).all() and ((cut == 0).sum((-2, -1)) <= 64).all(), "one square for all time steps"
    turned = [frames.augmentation("rotate", 34)[0](x) for _ in range(5)]
    assert all(set(y.unique().tolist()) <= set(x.unique().tolist()) for y in turned), "counts stay counts"
    assert [type(s).__name__ for s in frames.augmentation("flip+roll+rotate+cutout+mixup", 34)] == [
        "RandomHorizontalFlip", "Roll", "RandomRotation", "Cutout"] and not frames.augmentation("none", 34)


def test_a_roll_goes_as_far_either_way():
    x = torch.zeros(1, 1, 7, 9)
    x[..., 3, 4] = 1
    found = {tuple((frames.Roll(1)(x)[0, 0].nonzero()[0] - torch.tensor([3, 4])).tolist()) for _ in range(200)}
    assert found == {(i, j) for i in (-1, 0, 1) for j in (-1, 0, 1)}


def test_rotation_is_by_up_to_fifteen_degrees_either_way():
    x = torch.zeros(1, 2, 61, 61)
    x[..., 29:32, 53:56] = 1  # a spot 24 pixels to the right of the centre
    turned = [frames.augmentation("rotate", 61)[0](x)[0, 0].nonzero().double().mean(0) - 30 for _ in range(150)]
    angles = np.array([np.degrees(np.arctan2(-float(y), float(x))) for y, x in turned])
    assert abs(angles).max() < 16 and angles.min() < -12 and angles.max() > 12 and abs(angles.mean()) < 4


def test_cutout_is_a_square_of_a_sixth_of_the_side_and_smaller_only_at_the_border():
    for size, side in ((48, 8), (24, 4)):
        cut = torch.stack([frames.augmentation("cutout", size)[0](torch.ones(1, 1, size, size))[0, 0] == 0 for _ in range(200)])
        whole = cut.sum((1, 2)) == side ** 2
        assert cut.any(2).sum(1).max() == cut.any(1).sum(1).max() == side
        assert float(whole.float().mean()) == pytest.approx((1 - 7 / 48) ** 2, abs=0.15), "centres uniform over the image"


def test_mix_up_takes_any_partner_and_any_share_the_same_for_image_and_label():
    class Own(torch.utils.data.Dataset):
        """Image k is 2 at place k, so that an image tells what it was mixed of."""
        targets, classes = list(range(6)), list("abcdef")

        def __getitem__(self, i):
            return 2 * torch.eye(6)[i], i

    chosen = [5, 3, 0, 1]
    seen = [View(Own(), chosen, lambda x: x, epoch=epoch, mixup=True)[1] for epoch in range(600)]
    images, labels = map(torch.stack, zip(*seen))
    torch.testing.assert_close(images, 2 * labels)
    own, others = labels[:, 3], labels[:, [5, 0, 1]]
    torch.testing.assert_close(labels.sum(1), torch.ones(600))
    assert not labels[:, [2, 4]].any() and ((others > 0).sum(1) <= 1).all(), "one partner, of those that are trained on"
    partners = (others > 0).float().mean(0)
    assert (abs(partners - 1 / 4) < 0.1).all(), "each of the four as often, the image itself one of them"
    shares = own[others.any(1)]
    quantiles = shares.quantile(torch.tensor([0.1, 0.25, 0.5, 0.75, 0.9]))
    torch.testing.assert_close(quantiles, torch.tensor([0.1, 0.25, 0.5, 0.75, 0.9]), atol=0.1, rtol=0)


def test_mix_up_is_a_weighted_sum_of_two_recordings_and_their_labels(root):
    config = Config(dataset="nmnist", image_size=34, augment="mixup")
    found, plain = load_for(config, True), transform("nmnist", 34)
    view = View(found, range(30), transform("nmnist", 34, "mixup"), seed=3, mixup=True)
    all_of_them = torch.stack([plain(found[i][0]) for i in range(30)])
    for i in range(5):
        x, label = view[i]
        assert torch.equal(x, view[i][0]) and float(label.sum()) == pytest.approx(1)
        share = float(label[found.targets[i]])
        rest = x - share * all_of_them[i]
        if share < 0.99:
            distance = (all_of_them * (1 - share) - rest).abs().amax((1, 2, 3, 4)).min()
            assert distance < 1e-4 or float(label.max()) == 1, "what is left is one other recording"


@pytest.mark.parametrize("settings, words", [
    (dict(frames="count"), "frames is a setting of events, and digits holds images: leave it out, got 'count'"),
    (dict(dataset="nmnist", frames="events"), "frames must be one of count, time, got 'events'"),
    (dict(dataset="nmnist", image_size=35), "image_size of nmnist must be at most 34, got 35"),
    (dict(dataset="nmnist", augment="standard"), "augment of nmnist must be none, or some of flip, .*got 'standard'"),
    (dict(dataset="nmnist", augment="flip+flip"), "joined by .*, got 'flip.flip'"),
    (dict(dataset="dvsgesture", augment="roll+flip"), "augment of dvsgesture must not hold flip"),
    (dict(dataset="nmnist:x"), "dataset must be one of"), (dict(augment="flip+roll"), "augment must be one of none")])
def test_a_setting_that_events_do_not_have_is_refused(settings, words):
    with pytest.raises(ConfigError, match=words):
        Config(**settings)


def test_frames_are_in_the_hash_of_events_only():
    counted = Config(dataset="nmnist")
    assert counted.frames == "count" and counted == Config(dataset="nmnist", frames="count")
    assert counted.hash != counted.but(frames="time").hash
    assert counted.but(dataset="digits").frames == ""
    assert Config.from_dict(json.loads(counted.json)) == counted
    assert Config().hash == "b94e7255724c", "runs of images have kept the names they had before there were events"


@pytest.mark.parametrize("name, value", [("radius", 3.0), ("pictures", 95), ("milliseconds", 299), ("dark", 0.1),
                                         ("sensor", Sensor(34, threshold=0.3, mismatch=0.03, noise=1.0, seed=1))])
def test_the_digits_fingerprint_holds_how_they_are_simulated(monkeypatch, name, value):
    before = data.fingerprint(load("digits-dvs", True))
    assert before != data.fingerprint(load("digits", True))
    monkeypatch.setattr(f"staa.simulator.Simulated.{name}", value)
    assert data.fingerprint(load("digits-dvs", True)) != before


@pytest.mark.parametrize("network, size", [("resnet20", 34), ("resnet20", 17), ("vgg13", 34)])
def test_networks_take_frames_of_odd_sizes(network, size):
    from staa import build

    x = torch.rand(2, 3, 2, size, size)
    assert build(network, "staa", 10, 3, 2, 1 / 32)(x).shape == (2, 10)


def test_a_run_trains_on_recordings_with_mix_up_and_is_the_same_twice(root, monkeypatch, tmp_path):
    from staa import run

    config = Config(dataset="nmnist", image_size=34, network="vgg13", width=1 / 32, neuron="lif", T=2, batch_size=10,
                    augment="roll+mixup")
    first = run(config, log=lambda line: None, workers=0, device="cpu")
    monkeypatch.setenv("STAA_RUNS", str(tmp_path / "again"))
    again = run(config, log=lambda line: None, workers=2, device="cpu")
    assert first.outcome == again.outcome and first.outcome["train_images"] == 30
