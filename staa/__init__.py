"""STAA-SNN: spiking neurons with a spatial-temporal attention aggregator (CVPR 2025), a reproducible companion."""

import importlib
import warnings
from types import ModuleType

from .attention import STAALIF, GlobalContext, PositionEncoding, StepAttention
from .config import Config
from .firing import firing_rates, neurons
from .fsta import FSTALIF
from .networks import NETWORKS, NEURONS, Steps, build
from .neuron import LIF
from .records import Record
from .settings import Error
from .statten import STAttenLIF
from .surrogate import Surrogate, rectangle
from .tracing import traced
from .train import run
from .variants import LeakySTAALIF
from .weights import from_pretrained, load, save_pretrained

# `python -m staa.train` warns that this file has imported staa.train already, which does no harm.
warnings.filterwarnings("ignore", message="'staa.train' found in sys.modules", category=RuntimeWarning)

__version__ = "0.1.0"
__all__ = ["LIF", "STAALIF", "LeakySTAALIF", "FSTALIF", "STAttenLIF", "PositionEncoding", "GlobalContext",
           "StepAttention", "Surrogate", "rectangle", "Steps", "build", "neurons", "firing_rates", "traced", "NETWORKS",
           "NEURONS", "Config", "Record", "Error", "run", "load", "save_pretrained", "from_pretrained"]


def __getattr__(name: str) -> ModuleType:
    """The package's other files, such as `staa.interchange`, at their first use: `import staa` stays light."""
    try:
        return importlib.import_module(f"{__name__}.{name}")
    except ModuleNotFoundError as error:
        if error.name != f"{__name__}.{name}":
            raise  # the file is there, and what it needs is not
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None
