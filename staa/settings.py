"""What a setting may be, of a run, a network or a neuron: one sentence where it may not."""

import difflib
import inspect
import math
import re
import sys
from collections.abc import Callable, Iterable
from numbers import Integral, Real
from typing import Any

#: Parameters that every neuron or every network has: none of them is a setting of its own.
COMMON = ("channels", "T", "neuron", "num_classes", "in_channels", "width")
#: Left out where names are compared.
PUNCTUATION = str.maketrans("", "", "-_ ")
#: Beyond it float32 has no room to compute.
LARGEST = 1e30


class Error(Exception):
    """What this package refuses or fails with: the message is one sentence."""


class ConfigError(Error, ValueError):
    """A setting that is not allowed; the message is one sentence that says what is."""


class TrainingError(Error, RuntimeError):
    """A run that cannot begin or go on; the message is one sentence."""


def one_of(name: str, value, allowed: Iterable[str]) -> None:
    if value not in tuple(allowed):  # a list has no hash
        raise ConfigError(f"{name} must be one of {', '.join(allowed)}, got {value!r}{likeliest(value, allowed)}")


def likeliest(value, allowed: Iterable[str]) -> str:
    """A question after the one of the allowed names that was perhaps meant; nothing where none is like it."""
    plain = {name.lower().translate(PUNCTUATION): name for name in allowed}
    close = difflib.get_close_matches(str(value).lower().translate(PUNCTUATION), plain, 1, cutoff=0.85)
    return f"; did you mean {plain[close[0]]}?" if close else ""


def typed(name: str, value, kind: type) -> Any:
    """value as `kind`: a whole number may stand for a float, which is finite; NumPy's numbers and fractions are
    numbers; nothing else is converted."""
    if kind in (int, float) and isinstance(value, Integral) and not isinstance(value, bool):
        value = int(value)
        if kind is float:
            value = float(value) if abs(value) <= sys.float_info.max else math.inf
    elif kind is float and isinstance(value, Real) and not isinstance(value, bool):
        value = float(value)
    if type(value) is not kind:
        hint = ""
        if type(value) is str and kind is float and (sign := re.search("[0-9]([/eE])", value)):
            hint = "; write 0.25 for 1/4" if sign[1] == "/" else "; in YAML write 1.0e-3 for 1e-3"
        if type(value) is str and kind is dict:
            hint = '; write {"r": 8}, in a shell within quotes, or ' + f"{name}.r=8"
        words = {int: "a whole number", float: "a number", bool: "True or False", str: "text", dict: "a dictionary"}
        raise ConfigError(f"{name} must be {words[kind]}, got {type(value).__name__} {value!r}{hint}")
    if type(value) is float and not math.isfinite(value):
        raise ConfigError(f"{name} must be a finite number, got {value}")
    return value


def settings_of(constructor: Callable) -> dict[str, tuple[type, Any]]:
    """The settings of a neuron or a network, which is a class or a factory: name -> (type, default).

    They are the parameters with a default but those that every neuron or network has, and those of a class's base where
    **kwargs hand them on. A partial may change a default; what it fixes has none. A parameter of another type than a
    setting's is no setting, and raises ConfigError where it is keyword-only.
    """
    found: dict[str, tuple[type, Any]] = {}
    made, fixed = getattr(constructor, "func", constructor), getattr(constructor, "keywords", {})
    kinds = {kind.__name__: kind for kind in (int, float, bool, str)}
    calls = [made] if not isinstance(made, type) else [
        vars(cls)["__init__"] for cls in made.__mro__
        if "__init__" in vars(cls) and cls.__module__.partition(".")[0] != "torch"]
    for call in calls:
        parameters = inspect.signature(call).parameters.values()
        for p in parameters:
            if p.default is p.empty or p.kind is p.POSITIONAL_ONLY or p.name in {*COMMON, *found}:
                continue
            written: Any = type(p.default) if p.annotation is p.empty else p.annotation
            kind = kinds.get(getattr(written, "__name__", written))  # a type, or its name as text
            if kind:
                found[p.name] = kind, fixed.get(p.name, p.default)
            elif p.kind is p.KEYWORD_ONLY:
                raise ConfigError(f"a setting must be annotated as {', '.join(kinds)}, got {p}")
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return found


def real_numbers(**given: float) -> None:
    """Refuse what is no number, as text or a switch."""
    for name, value in given.items():
        if isinstance(value, bool) or not hasattr(value, "__float__"):
            raise TypeError(f"{name} must be a number, got {value!r}")


def bounded(**given: float) -> None:
    """Refuse what is not finite, or too large to compute with."""
    real_numbers(**given)
    for name, value in given.items():
        if not abs(value) <= LARGEST:
            raise ValueError(f"{name} must be a finite number of at most 1e30 in size, got {value}")


def whole_numbers(**numbers: int) -> None:
    """Refuse a size or a count that is no whole number."""
    for name, value in numbers.items():
        if not isinstance(value, Integral) or isinstance(value, bool):
            raise TypeError(f"{name} must be a whole number, got {value!r}")


def switches(**given: bool) -> None:
    """Refuse what is neither True nor False: the text "no" would switch a block on."""
    for name, value in given.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be True or False, got {value!r}")


def unused(neuron: type, where: str, **given) -> None:
    """Refuse settings that do nothing, unless at the neuron's defaults: one and the same run would have two names."""
    defaults = settings_of(neuron)
    for name, value in given.items():
        if value != defaults[name][1]:
            raise ValueError(f"{name} is a setting of {where}; leave it out, got {value!r}")


def reason(error: BaseException) -> str:
    """Why something failed, in one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
