"""Running many runs: what has a record is read, the rest is trained, as many at once as the machine allows."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from multiprocessing import active_children, get_context, parent_process
from traceback import clear_frames

import torch

from . import data, devices, samples, weights
from .config import Config
from .distributed import started
from .records import Record
from .settings import TrainingError
from .train import run

#: After so many runs whose processes were killed when trained alone, the rest is left.
KILLED = 3


def run_all(configs: list[Config], *, networks: bool = False, log: Callable[[str], None] = print) -> list[Record]:
    """The records of these runs, in order. On CPU as many at once as cores allow, on GPUs one on each.

    networks: whether their trained networks are needed as well: what only has a record in data/records without one is
    then trained too.
    A script that calls this needs `if __name__ == "__main__":`, since each process reads it anew.

    Duplicates are trained once. Logs one line an epoch and one bar after each run. A run that fails does
    not stop the others, nor does one whose process is killed, which is tried again first; the first failure is raised
    once all have ended, and what has ended stays in runs/.
    """
    once = list(dict.fromkeys(configs))
    found = {config: record for config in once if (record := weights.found(config, networks))}
    missing = [config for config in once if config not in found]
    if "imagefolder:digits64" in {config.dataset for config in missing}:
        samples.digit_images()
    if started():  # one run after the other on all of torchrun's processes, which end together where one fails
        return [run(config, network=networks, log=log) for config in configs]
    for dataset in dict.fromkeys(config.dataset for config in missing):
        data.load(dataset, train=True)  # one clear sentence now rather than one from every run
    log(bar(len(found), len(once), "complete before" if found else ""))
    failures = []
    with closing(_outcomes(missing, log, networks)) as outcomes:
        for config, outcome in outcomes:
            if isinstance(outcome, Exception):
                failures.append(outcome)
                log(f"{config}: failed: {outcome}")
            else:
                found[config] = outcome
                log(bar(len(found), len(once), str(config)))
    if failures:
        raise failures[0]
    return [found[config] for config in configs]


def _outcomes(configs, log, networks):
    """(config, Record or Exception) as each run ends."""
    threads = max((config.threads for config in configs), default=1)
    jobs = min(torch.cuda.device_count() or devices.cores() // threads, len(configs))
    if jobs <= 1:
        for config in configs:
            yield config, attempt(config, log, networks)
        return
    # Longest first, so that no core is left with a long run at the end.
    left = sorted(configs, key=lambda c: c.epochs * c.T * (1 + (c.network == "resnet19")), reverse=True)
    alone, killed = 0, 0  # how many are trained one by one, to see which of them ends its process
    while left and killed < KILLED:
        trained = left[:alone] or left
        lost = yield from _together(trained, 1 if alone else jobs, log, networks)
        left = lost + left[len(trained):]
        if alone and lost:
            killed += 1
            yield left.pop(0), TrainingError(f"a process that trained {lost[0]} was killed, perhaps because memory was "
                                             "short; start it again, and it goes on after its last whole epoch.")
        alone = 0 if alone else min(jobs, len(lost))
    for config in left:
        yield config, TrainingError(f"{config} was left, since {KILLED} processes that train were killed; start again "
                                    "with fewer at once, or smaller ones.")


def _together(configs, jobs, log, networks):
    """The same for as many at once. Returns those that were not trained to the end, since one process was killed: the
    executor ends the others with it."""
    context, lost = get_context("spawn"), set()
    lines, others = context.SimpleQueue(), active_children()
    with ProcessPoolExecutor(jobs, context, begin, (lines,)) as pool, ending_all_but(others):
        pending = {pool.submit(attempt, config, None, networks): config for config in configs}
        while pending:
            done, _ = wait(pending, timeout=0.2, return_when=FIRST_COMPLETED)
            while not lines.empty():
                log(lines.get())
            for future in done:
                config, error = pending.pop(future), future.exception()
                if isinstance(error, BrokenProcessPool):
                    lost.add(config)
                else:
                    yield config, error or future.result()
    return [config for config in configs if config in lost]


@contextmanager
def ending_all_but(others: list) -> Iterator[None]:
    """Where something fails here, end the processes that train: nobody would read their lines, and they would wait."""
    try:
        yield
    except BaseException:
        for process in set(active_children()) - set(others):
            process.terminate()
        raise


#: The log of a process that trains: the way to the one that started it.
_log: Callable[[str], None] = print


def begin(lines) -> None:
    """First in a process that trains. Ctrl-C reaches every process: those that train end at once and in silence, and
    the one that started them says so. Where that one is killed, or its terminal closed, none trains on unseen."""
    global _log
    _log = lines.put
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent() -> None:
    if parent := parent_process():
        parent.join()
        os._exit(1)


def attempt(config: Config, log: Callable[[str], None] | None, network: bool = False) -> Record | Exception:
    """The record, or what the run failed with. log: None in a process of its own, see `begin`."""
    try:
        return run(config, network=network, log=log or _log)
    except Exception as error:  # whatever it is, it does not stop the others
        cause: BaseException | None = error
        while cause:  # its frames hold the network and its activations: a GPU has no room for the next run beside them
            clear_frames(cause.__traceback__)
            cause = cause.__context__
        return error


def bar(done: int, total: int, what: str = "") -> str:
    filled = 20 * done // max(total, 1)
    return f"[{'#' * filled}{'.' * (20 - filled)}] {done}/{total} runs  {what}".rstrip()
