"""Records on disk: whole or not at all, whatever the disk, the permissions and other processes do."""

import errno
import hashlib
import json
import os
import subprocess
import time
from datetime import datetime, timedelta, timezone
from functools import partial
from pathlib import Path

import faults
import numpy as np
import pytest
import torch
from faults import PROCESSES, SMALL, apart, epochs_of

from staa import Config, records
from staa.records import Record, RecordError, find, vouched, write
from staa.train import run

pytestmark = pytest.mark.usefixtures("root")
quiet = partial(run, device="cpu", workers=0, log=lambda line: None)


def a_record(*accuracies, seed=0):
    epochs = [{"test_accuracy": accuracy, "test_loss": 1 / 3} for accuracy in accuracies]
    return Record({"seed": seed, "lr": 0.1}, {"epochs": epochs}, {"seconds": 1.5, "device": "x86_64 CPU"})


def one_sentence(error, *words):
    text = str(error.value if hasattr(error, "value") else error)
    assert "\n" not in text and text.endswith(".") and all(str(word) in text for word in words), text
    return True


# --- a record ---

def test_a_record_comes_back_as_it_was_and_its_accuracy_is_the_last_epochs(tmp_path):
    record = a_record(12.5, 93.7, 91.26)
    record.save(tmp_path / "new" / "record.json")
    again = Record.load(tmp_path / "new" / "record.json")
    assert again == record and again.accuracy == 91.26
    assert os.listdir(tmp_path / "new") == ["record.json"]


def test_a_file_may_be_read_by_others(tmp_path):
    """As what `open` writes, and not as a temporary file."""
    write(tmp_path / "file", b"new")
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o644


def test_a_record_is_json_for_every_reader(tmp_path):
    """Which has no NaN."""
    with pytest.raises(ValueError, match="not JSON compliant"):
        a_record(float("nan")).save(tmp_path / "record.json")
    assert not (tmp_path / "record.json").exists()


def test_a_record_tells_when_it_was_finished_in_utc(monkeypatch):
    monkeypatch.setenv("TZ", "WEST+5")
    time.tzset()
    try:
        told = records.provenance(torch.device("cpu"), [[1.0, 2.0]], "", 1)["finished"]
    finally:
        monkeypatch.undo()
        time.tzset()
    assert abs(datetime.now(timezone.utc) - datetime.fromisoformat(told)) < timedelta(minutes=5)


DAMAGE = {
    "truncated": lambda text: text[:len(text) // 2],
    "without its end": lambda text: text[:-3],
    "another digit": lambda text: text.replace('"test_accuracy": 91.26', '"test_accuracy": 91.27', 1),
    "another seed": lambda text: text.replace('"seed": 0', '"seed": 1'),
    "without checksum": lambda text: json.dumps({k: v for k, v in json.loads(text).items() if k != "sha256"}),
    "empty": lambda text: "",
    "binary": lambda text: "\udcff\udc80\udcfe" * 9,
    **{shape: lambda text, shape=shape: shape for shape in ("[]", "{}", "null", "1.5", '"sha256"', '[{"sha256": 1}]')},
    "another format": lambda text: signed(json.loads(text) | {"format": 2}),
    "other keys": lambda text: signed({"format": 1, "config": {}, "outcome": {}}),
}


def signed(body):
    """A body with a true checksum, by the format's definition."""
    body.pop("sha256", None)
    return json.dumps(body | {"sha256": hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()})


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_record_is_refused_and_not_trained_over(root, damage):
    file = root / "runs" / SMALL.name / "record.json"
    a_record(12.5, 91.26).save(file)
    good = file.read_text()
    file.write_text(signed(json.loads(good)))
    assert Record.load(file) == a_record(12.5, 91.26), "the checksum is that of the format's definition"
    bad = DAMAGE[damage](good).encode(errors="surrogateescape")
    assert bad != good.encode()
    file.write_bytes(bad)
    for use in (partial(Record.load, file), partial(quiet, SMALL)):
        with pytest.raises(RecordError, match="is damaged") as caught:
            use()
        assert one_sentence(caught, file, "delete it")
    assert file.read_bytes() == bad and os.listdir(file.parent) == ["record.json"]


def test_the_users_own_record_wins_over_the_projects(root):
    assert find(SMALL) is None
    a_record(50.0).save(root / "records" / f"{SMALL.name}.json")
    assert find(SMALL).accuracy == 50.0 == quiet(SMALL).accuracy
    a_record(60.0).save(root / "runs" / SMALL.name / "record.json")
    assert find(SMALL).accuracy == 60.0
    assert find(SMALL.but(seed=1)) is None


def test_all_records_of_the_project_are_listed_by_name(root):
    assert vouched() == []
    for seed in (2, 0, 1):
        a_record(seed, seed=seed).save(root / "records" / f"cifar-{seed}.json")
    (root / "records" / "README.md").write_text("not a record")
    assert [record.config["seed"] for record in vouched()] == [0, 1, 2]
    (root / "records" / "cifar-1.json").write_text("{")
    with pytest.raises(RecordError, match="cifar-1.json is damaged"):
        vouched()


# --- where and how ---

def test_a_tilde_in_a_folders_setting_is_the_home(monkeypatch):
    monkeypatch.setenv("STAA_DATA", "~/sets")
    assert records.folder("data") == Path.home() / "sets"


def test_the_folders_are_the_checkouts_and_outside_one_lie_in_the_current_folder(tmp_path, monkeypatch):
    names = {"runs": "runs", "figures": "figures", "data": "data/sets", "records": "data/records", "networks": "data/networks"}
    for kind in names:
        monkeypatch.delenv(f"STAA_{kind.upper()}", raising=False)
    for place in ("installed", "here"):
        (tmp_path / place).mkdir()
    monkeypatch.setattr(records, "ROOT", tmp_path / "installed")
    monkeypatch.chdir(tmp_path / "here")
    assert {kind: records.folder(kind) for kind in names} == {kind: tmp_path / "here" / path for kind, path in names.items()}
    (tmp_path / "installed" / "pyproject.toml").write_text("")
    assert {kind: records.folder(kind) for kind in names} == {kind: tmp_path / "installed" / path for kind, path in names.items()}


def test_a_commit_has_a_plus_where_a_tracked_file_differs_from_it(tmp_path, monkeypatch):
    def git(*words):
        return subprocess.run(["git", "-C", tmp_path, "-c", "user.name=a", "-c", "user.email=a@b", *words], check=True,
                              capture_output=True, text=True).stdout.strip()

    monkeypatch.setattr(records, "ROOT", tmp_path)
    assert records.commit() == ""
    git("init")
    assert records.commit() == "", "there is none yet"
    (tmp_path / "code.py").write_text("1\n")
    git("add", "code.py")
    git("commit", "-m", "first", "--no-gpg-sign")
    head = git("rev-parse", "HEAD")
    inside = tmp_path / "site-packages"
    inside.mkdir()
    with monkeypatch.context() as other:
        other.setattr(records, "ROOT", inside)
        assert records.commit() == "", "a commit of the repository that the package was installed in is not ours"
    (tmp_path / "beside").write_text("untracked")
    assert len(head) == 40 and records.commit() == head
    (tmp_path / "code.py").write_text("2\n")
    assert records.commit() == head + "+"
    git("commit", "-am", "second", "--no-gpg-sign")
    assert records.commit() == git("rev-parse", "HEAD") != head


def test_a_record_tells_the_clocks_seconds_and_the_processors(root, monkeypatch):
    """Where the processor's time runs a thousand times as fast as the clock's."""
    monkeypatch.setattr(time, "process_time", lambda: 1000 * time.perf_counter())
    told = quiet(SMALL).provenance
    clock, work = told["seconds_per_epoch"], told["processor_seconds_per_epoch"]
    assert len(clock) == len(work) == SMALL.epochs and sum(clock) == pytest.approx(told["seconds"], abs=0.002)
    assert all(w > 100 * c > 0 for w, c in zip(work, clock))


# --- a full or failing disk ---

def failing(code, after=0):
    """A system call that fails after so many good ones; `real` is set by whoever patches."""
    def call(*args, real, **kwargs):
        nonlocal after
        after -= 1
        if after < 0:
            raise OSError(code, os.strerror(code))
        return real(*args, **kwargs)
    return call


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EROFS])
@pytest.mark.parametrize("name", ["fsync", "replace", "chmod"])
def test_a_failed_write_leaves_what_was_there(tmp_path, monkeypatch, name, code):
    write(tmp_path / "file", b"old")
    monkeypatch.setattr(os, name, partial(failing(code), real=getattr(os, name)))
    with pytest.raises(RecordError) as caught:
        write(tmp_path / "file", b"new")
    assert one_sentence(caught, tmp_path / "file", os.strerror(code))
    monkeypatch.undo()
    assert (tmp_path / "file").read_bytes() == b"old" and sorted(os.listdir(tmp_path)) == ["data", "file"]


@pytest.mark.parametrize("after", [0, 1, 2, 3, 4])
def test_a_run_on_a_full_disk_stops_and_goes_on_later(root, monkeypatch, whole, after):
    """Room for `after` files: three checkpoints, the weights and the record make five."""
    lines = []
    monkeypatch.setattr(os, "fsync", partial(failing(errno.ENOSPC, after), real=os.fsync))
    with pytest.raises(RecordError) as caught:
        run(SMALL, device="cpu", workers=0, log=lines.append)
    assert one_sentence(caught, root / "runs" / SMALL.name, "No space left on device")
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    assert epochs_of(lines) == list(range(1, min(after, 3) + 1))
    kept = {"lock"} | ({"checkpoint.pt"} if after else set()) | ({"weights.safetensors"} if after > 3 else set())
    assert set(os.listdir(root / "runs" / SMALL.name)) == kept
    lines.clear()
    record = run(SMALL, device="cpu", workers=0, log=lines.append)
    assert epochs_of(lines) == list(range(after + 1, 4)) and record.outcome == whole.outcome


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The record of SMALL where nothing happens."""
    root = tmp_path_factory.mktemp("whole")
    faults.images(root)
    return apart(root)[2]


@pytest.mark.parametrize("size", [0, 5000])
def test_a_file_cut_short_by_the_system_leaves_what_was_there(root, whole, size):
    with pytest.raises(KeyboardInterrupt):
        run(SMALL, device="cpu", workers=0, log=stop)
    place = root / "runs" / SMALL.name
    before = {path.name: path.read_bytes() for path in place.iterdir()}
    assert len(before["checkpoint.pt"]) > 5000
    code, lines, error = apart(root, fault=partial(faults.no_file_above, size))
    assert code == 0 and lines == [] and isinstance(error, RecordError)
    assert one_sentence(error, place / "checkpoint.pt", "File too large")
    assert {path.name: path.read_bytes() for path in place.iterdir()} == before
    code, lines, record = apart(root)
    assert epochs_of(lines) == [2, 3] and record.outcome == whole.outcome


def stop(line):
    raise KeyboardInterrupt


# --- folders that cannot be used ---

@pytest.mark.parametrize("folder", ["file/runs", "/proc/staa/runs", "/proc/self/fdinfo/runs", "/sys/staa", "link"])
def test_a_folder_that_cannot_be_made_stops_before_training(root, monkeypatch, folder):
    (root / "file").write_text("")
    (root / "link").symlink_to(root / "link")
    folder = root / folder
    monkeypatch.setenv("STAA_RUNS", str(folder))
    with pytest.raises(RecordError, match="set STAA_RUNS") as caught:
        run(SMALL, device="cpu", workers=0, log=lambda line: pytest.fail("trained"))
    assert one_sentence(caught, folder)


@pytest.mark.parametrize("path, mode", [
    ("runs", 0o555), ("runs", 0o000), (f"runs/{SMALL.name}", 0o555), (f"runs/{SMALL.name}", 0o000),
    (f"runs/{SMALL.name}/record.json", 0o000), (f"runs/{SMALL.name}/lock", 0o444)])
def test_what_permissions_forbid_stops_before_training(commons, path, mode):
    path = commons / path
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("") if path.name in ("record.json", "lock") else path.mkdir()
    path.chmod(mode)
    code, lines, error = apart(commons, fault=faults.as_nobody)
    assert code == 0 and lines == [] and isinstance(error, RecordError), repr(error)
    assert one_sentence(error, commons / "runs")


# --- many at once ---

def version(k, i):
    body = np.random.default_rng((k, i)).bytes(1000 * (1 + (37 * k + 13 * i) % 100))
    return hashlib.sha256(body).digest() + body


def write_versions(path, k, times):
    for i in range(times):
        write(path, version(k, i))


def test_a_reader_sees_one_whole_version_while_many_write(tmp_path):
    path = tmp_path / "file"
    write(path, version(0, 0))
    writers = [PROCESSES.Process(target=write_versions, args=(path, k, 20)) for k in range(8)]
    for writer in writers:
        writer.start()
    seen = set()
    while any(writer.is_alive() for writer in writers):
        content = path.read_bytes()
        assert hashlib.sha256(content[32:]).digest() == content[:32]
        seen.add(content[:32])
    assert [writer.exitcode for writer in writers] == [0] * 8 and len(seen) > 1
    assert path.read_bytes() in {version(k, 19) for k in range(8)}, "the last to write wrote its last"
    assert sorted(os.listdir(tmp_path)) == ["data", "file"]


def test_a_relative_folder_is_the_same_from_everywhere(monkeypatch, tmp_path):
    """A notebook's current folder is its own."""
    monkeypatch.setenv("STAA_RUNS", "elsewhere/runs")
    here = records.folder("runs")
    monkeypatch.chdir(tmp_path)
    assert records.folder("runs") == here == records.ROOT / "elsewhere" / "runs"


def test_a_record_that_cannot_be_read_is_one_sentence(tmp_path):
    for path, why in ((tmp_path / "record.json", "No such file or directory"), (tmp_path, "Is a directory")):
        with pytest.raises(RecordError, match=f"^the record {path} cannot be read .{why}.[.]$"):
            Record.load(path)


def test_every_vouched_record_is_the_one_that_its_run_finds():
    for path in records.folder("records").glob("*.json"):
        config = Config.from_dict(Record.load(path).config)
        assert config.name == path.stem and records.find(config) == Record.load(path)
