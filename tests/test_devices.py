"""Which of several GPUs a run takes, on a machine that is said to have some."""

import contextlib
import tempfile
import types
from contextlib import ExitStack

import pytest
import torch

from staa import devices
from staa.settings import TrainingError


@pytest.fixture
def two_gpus(monkeypatch, tmp_path):
    """Two GPUs; the list of those that were made the current one."""
    made = []
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: types.SimpleNamespace(uuid=f"GPU-{index}"))

    @contextlib.contextmanager
    def current(device):
        made.append(str(device))
        yield
        made.append("before")
    monkeypatch.setattr(torch.cuda, "device", current)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: made.append("emptied"))
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    return made


def choose(device, held):
    return devices.take(devices.named(device), held)


def test_each_run_takes_a_gpu_that_no_other_has(two_gpus):
    with ExitStack() as first, ExitStack() as second, ExitStack() as third:
        assert [str(choose(None, held)) for held in (first, second, third)] == ["cuda:0", "cuda:1", "cuda:0"]
        second.close()
        assert two_gpus == ["cuda:0", "cuda:1", "cuda:0", "emptied", "before"]
        with ExitStack() as fourth:
            assert str(choose("cuda", fourth)) == "cuda:1"


def test_another_users_file_is_not_opened(two_gpus, monkeypatch):
    """It could not be, whether or not that user is still there."""
    with ExitStack() as mine, ExitStack() as theirs:
        monkeypatch.setattr("os.getuid", lambda: 1001)
        assert str(choose(None, theirs)) == "cuda:0"
        monkeypatch.setattr("os.getuid", lambda: 1002)
        assert str(choose(None, mine)) == "cuda:0"


def test_a_gpu_that_is_named_is_taken(two_gpus):
    with ExitStack() as first, ExitStack() as second:
        assert [str(choose("cuda:1", held)) for held in (first, second)] == ["cuda:1", "cuda:1"]
        assert two_gpus == ["cuda:1", "cuda:1"]


def test_under_torchrun_it_is_the_process_own(two_gpus, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    with ExitStack() as held:
        assert str(choose(None, held)) == "cuda:1"
    monkeypatch.setenv("LOCAL_RANK", "2")
    with ExitStack() as held, pytest.raises(TrainingError, match="^device cuda:2 is not there: torch sees 2 GPUs.$"):
        choose(None, held)


def test_where_no_lock_can_be_written_it_is_the_first(two_gpus, monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "file" / "none"))
    (tmp_path / "file").touch()
    with ExitStack() as held:
        assert str(choose(None, held)) == "cuda:0"


def test_cores_are_those_that_this_process_may_use(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {3, 5})
    assert devices.cores() == 2
    monkeypatch.delattr("os.sched_getaffinity")  # as on macOS
    monkeypatch.setattr("os.cpu_count", lambda: 6)
    assert devices.cores() == 6


def test_without_a_gpu_it_is_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with ExitStack() as held:
        assert choose(None, held) == torch.device("cpu")
        with pytest.raises(TrainingError, match="^device cuda is not there: torch sees 0 GPUs.$"):
            choose("cuda", held)
