"""Weights and the state of a run as files: written whole, checked when read; only tensors and values are unpickled."""

import io
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from . import records
from .distributed import ALONE, PeerError, Peers
from .settings import reason


def save(path: Path, state: dict) -> None:
    """Tensors and plain values to a file, whole or not at all."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    records.write(path, buffer.getvalue())


def read(path: Path) -> dict:
    """What `save` wrote; nothing is unpickled but tensors and plain values."""
    with zipfile.ZipFile(path) as archive:  # torch does not check the checksums itself
        if archive.testzip():
            raise ValueError("its checksum is wrong")
    return torch.load(path, map_location="cpu", weights_only=True)


def resume(path: Path, network, optimizer, peers: Peers = ALONE) -> tuple[list, list]:
    """Load a checkpoint, which process 0 reads, into network and optimizer; the epochs and the seconds so far. Raises
    RecordError where the file is damaged."""
    with undamaged("checkpoint", path, "delete it, and the run starts again from its first epoch"):
        state = peers.first(lambda: read(path) if path.is_file() else None)
        if state is None:
            return [], []
        network.load_state_dict(state["network"])
        optimizer.load_state_dict(state["optimizer"])
        # An older checkpoint has the clock's seconds alone; the processor's are not known.
        return state["epochs"], [s if isinstance(s, list) else [s, None] for s in state["seconds"]]


@contextmanager
def undamaged(what: str, path: Path, advice: str) -> Iterator[None]:
    """Turn a failure to read a file into one sentence; the advice is for a file that is missing or damaged."""
    try:
        yield
    except (PeerError, MemoryError, torch.OutOfMemoryError):  # which say nothing about the file
        raise
    except FileNotFoundError:
        raise records.RecordError(f"the {what} {path} is not there; {advice}.") from None
    except OSError as error:
        raise records.RecordError(f"the {what} {path} could not be read ({error.strerror or error}); it is as it was."
                                  ) from None
    except Exception as error:
        raise records.RecordError(f"the {what} {path} is damaged ({reason(error)}); {advice}.") from None
