import os
import shutil
import tempfile
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # for gpu.py, before Triton is imported
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def own_folders(tmp_path, monkeypatch):
    """No test reads or writes the reader's own runs, figures or data sets."""
    for kind in ("runs", "figures", "data"):
        monkeypatch.setenv(f"STAA_{kind.upper()}", str(tmp_path / kind))
    torch.manual_seed(0)


@pytest.fixture
def no_network(monkeypatch):
    """Every look-up of a host fails at once, as on a machine without a network."""
    def refused(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr("socket.getaddrinfo", refused)
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A folder with the images that faults.SMALL trains on, and no records of the project."""
    import faults

    monkeypatch.setenv("STAA_RECORDS", str(tmp_path / "records"))
    faults.images(tmp_path)
    return tmp_path


@pytest.fixture
def commons():
    """A folder that any user may enter, as pytest's own is not."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    for path in [folder, *folder.rglob("*")]:
        path.chmod(0o755)
    shutil.rmtree(folder)
