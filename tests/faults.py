"""Small runs in processes of their own, and what may befall them. Each process gets its folders below `root`."""

# Where it is tested, by place and fault. All of these are files of tests/; "whole" is write() of test_records, by which
# every other file gets to disk.
#
#                        killed         full disk      no permission  two at once    cut or flipped
# unpacking a data set   faults         faults         faults         faults         faults (archive), data (CIFAR)
# event, image file      -              -              -              -              faults, events, data
# frame cache            faults         faults, events faults         faults         faults, events
# tree of sample images  faults         faults         faults         faults         image file
# training               train, faults  records        records        train          -
# a process of several   distributed    -              -              distributed    -
# a loader's process     faults         -              -              -              faults
# checkpoint             train          records        records        train          train
# weights                train          records        records        train          weights
# record                 train          records        records        records        records, faults
# vouch, ship, hub       faults         faults         whole          whole          faults, weights
# page, figures          faults         faults         whole          faults         -
#
# A loss or a weight that is no number: train, and in the whole run, with microbatches, faults.

import importlib
import itertools
import os
import resource
import runpy
import signal
import socket
import sys
import time
from multiprocessing import get_context, set_start_method
from pathlib import Path

import numpy as np
from PIL import Image
from torch.optim.optimizer import register_optimizer_step_post_hook

from staa.config import Config
from staa.records import Record
from staa.train import run

# New processes that are as clean as a new interpreter, but torch is imported once for all of them.
PROCESSES = get_context("forkserver")
PROCESSES.set_forkserver_preload(["staa.train", "torchvision", "tonic.datasets", "pytest"])
PATIENCE = 60  # seconds until a hanging process fails its test

#: Three epochs of three steps, the last one smaller, with everything on that an interruption could lose.
SMALL = Config(dataset="imagefolder:noise", image_size=16, augment="standard", network="resnet20", width=1 / 32,
               neuron="lif", T=2, epochs=3, batch_size=16, lr=0.02, warmup_epochs=1, label_smoothing=0.1, clip_norm=1.0)


def images(root: Path):
    """The folder of images that SMALL trains on: 40 for training, 12 for testing, 4 classes."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 10), ("val", 3)):
        for label in "abcd":
            folder = root / "data" / "noise" / split / label
            folder.mkdir(parents=True, exist_ok=True)
            for i in range(count):
                Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(folder / f"{i}.png")


def start(root: Path, config: Config = SMALL, fault=None, work=None):
    """Call run(), or `work`, in a process of its own, after `fault` has prepared what will befall it there."""
    here, there = PROCESSES.Pipe(duplex=False)
    process = PROCESSES.Process(target=_main, args=(root, config, fault, work, there))
    process.start()
    there.close()
    return process, here


def end(process, pipe, until: str = "") -> tuple[int | None, list[str], Record | Exception | None]:
    """(exit code, log lines, what run() returned or raised), at the process's end or at the line that holds `until`."""
    lines, result = [], None
    while pipe.poll(PATIENCE):
        try:
            message = pipe.recv()
        except EOFError:
            process.join()
            return process.exitcode, lines, result
        if not isinstance(message, str):
            result = message
        else:
            lines.append(message)
            if until and until in message:
                return None, lines, None
    process.kill()
    raise AssertionError(f"the process hangs after {lines}")


def apart(root: Path, config: Config = SMALL, fault=None, work=None):
    return end(*start(root, config, fault, work))


def _main(root, config, fault, work, pipe):
    _folders(root)
    if fault:
        fault()
    try:
        pipe.send(work() if work else run(config, device="cpu", workers=0, log=pipe.send))
    except Exception as error:
        pipe.send(error)


def _folders(root):
    for kind in ("runs", "data", "records", "networks", "figures"):
        os.environ[f"STAA_{kind.upper()}"] = str(root / kind)


def command_line(root: Path, *words: str) -> tuple[int, str]:
    """(exit status, stderr) of `python -m staa.train WORDS`."""
    process = PROCESSES.Process(target=_command_line, args=(root, words))
    process.start()
    process.join(PATIENCE)
    return process.exitcode, (root / "stderr").read_text()


def _command_line(root, words):
    _folders(root)
    set_start_method("fork", force=True)  # for DataLoader's workers, as in a process that no other has started
    os.dup2(os.open(root / "stderr", os.O_CREAT | os.O_WRONLY), 2)
    del sys.modules["staa.train"]  # runpy warns where it is imported already
    sys.argv[1:] = words
    runpy.run_module("staa.train", run_name="__main__", alter_sys=True)


def epochs_of(lines: list[str]) -> list[int]:
    """Which epochs a process has trained, by its log."""
    return [int(line.split(": epoch ")[1].split("/")[0]) for line in lines if ": epoch " in line]


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def kill_at_step(n: int):
    """Die after the n-th step of the optimizer, counted from the start of the process."""
    steps = itertools.count(1)
    register_optimizer_step_post_hook(lambda *_: next(steps) == n and kill())


def kill_at_write(name: str, nth: int, moment: str):
    """Die while the file `name` is written for the nth time: it is "half" there, "whole" but not in place, "moved"."""
    replace, times = os.replace, itertools.count(1)

    def fatal(source, target):
        if Path(target).name != name or next(times) != nth:
            return replace(source, target)
        if moment == "half":
            os.truncate(source, os.path.getsize(source) // 2)
        elif moment == "moved":
            replace(source, target)
        kill()

    os.replace = fatal


def kill_before_record():
    Record.save = lambda *_: kill()


def hold_until(path: Path):
    """Go on after the first step only when `path` exists."""
    register_optimizer_step_post_hook(lambda *_: hold(path.with_name("here"), path))


def no_file_above(size: int):
    """What a full disk or a quota does: a write that fails half-way."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def killed_with_odd_seeds(config, log, network):
    """In the place of `runner.attempt`."""
    if config.seed % 2:
        kill()
    return config.seed


def as_nobody():
    """Give up root, whom no permission binds."""
    if os.geteuid() == 0:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)


def one_after_the_other(*faults):
    for fault in faults:
        fault()


def at_write(part: str, nth: int, act):
    """Call `act` where a file whose path holds `part` is opened for writing for the nth time, and holds nothing yet."""
    times = itertools.count(1)

    def hook(event, args):
        if (event == "open" and part in str(args[0]) and args[2] & (os.O_WRONLY | os.O_RDWR) and next(times) == nth):
            act()

    sys.addaudithook(hook)


def at_rename(part: str, act):
    """Call `act` where something is about to be moved to a path that ends in `part`."""
    sys.addaudithook(lambda event, args: act() if event == "os.rename" and str(args[1]).endswith(part) else None)


def hold(here: Path, until: Path):
    """Say that one is here, and go on when `until` exists."""
    here.touch()
    for _ in range(50 * PATIENCE):
        if until.exists():
            return
        time.sleep(0.02)
    raise TimeoutError(f"{until} did not come")


def burst_at_step(n: int, tensor: int):
    """What too large a step does: a tensor of the network is no number any more after the n-th step of the optimizer."""
    steps = itertools.count(1)

    def burst(optimizer, *_):
        if next(steps) == n:
            optimizer.param_groups[0]["params"][tensor].data.fill_(float("nan"))

    register_optimizer_step_post_hook(burst)


def believe(values: list[tuple[str, str, str, object]]):
    """(module, class, attribute, value): the official checksums of small files that stand for the official ones. And
    nothing is downloaded."""
    for module, name, attribute, value in values:
        setattr(getattr(importlib.import_module(module), name), attribute, value)

    def refused(*_, **__):
        raise OSError("no network")

    socket.getaddrinfo = refused
