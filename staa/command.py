"""The command line of `python -m staa.train`, `staa.items` and `staa.page`: words in, settings out, and what this
package refuses in one sentence."""

import ast
import errno
import io
import json
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from .settings import ConfigError, Error


def command(main: Callable[[list[str]], int | None], usage: Callable[[], str]) -> None:
    """`main` with the words of the command line, or `usage()` where one of them asks for help. What this package
    refuses or fails with ends in one sentence, and so does Ctrl-C."""
    words = sys.argv[1:]
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A log file, too, shows each epoch when it ends; and a name that it cannot spell ends nothing.
        sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")
    try:
        code = print(usage()) if {"-h", "--help"} & set(words) else main(words)
        if sys.stdout:  # not where it was closed
            sys.stdout.flush()
        sys.exit(code)
    except Error as error:
        sys.exit(f"staa: {error}")
    except BrokenPipeError:  # what read the output has ended, as head does
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or the interpreter complains when it flushes
        sys.exit(141)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit("staa: there is no room left on the disk of the log, or of the runs; a run goes on after its last "
                 "whole epoch when it is started again.")
    except KeyboardInterrupt:
        print("staa: interrupted; a run goes on after its last whole epoch when it is started again.", file=sys.stderr)
        sys.exit(130)


def words_to_settings(words: list[str]) -> dict:
    """Settings written as name=value, see `written`; one that a dictionary holds also as neuron_settings.r=8."""
    settings: dict[str, Any] = {}
    for word in words:
        path, equals, value = word.removeprefix("--").partition("=")
        name, _, own = path.partition(".")
        place, key = (settings.setdefault(name, {}), own) if own else (settings, name)
        if not equals or not isinstance(place, dict) or key in place:
            got = f"a second {word!r}" if equals else repr(word)
            raise ConfigError(f"a setting is written name=value, as lr=0.1, and once, got {got}")
        place[key] = written(value)
    return settings


def written(text: str) -> Any:
    """A value as it is written in JSON or in Python, or else plain text; 1e4 is a whole number."""
    for read in (json.loads, ast.literal_eval):
        with suppress(ValueError, SyntaxError, RecursionError, MemoryError):
            value = read(text)
            return int(value) if isinstance(value, float) and value.is_integer() else value
    return text
