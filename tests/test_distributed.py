"""Two processes train one run: gloo on the CPU, against one process."""

import copy
import json
import os
import signal
import socket
import subprocess
import sys
import time
import types
from functools import partial
from pathlib import Path

import faults
import pytest
import torch
from faults import SMALL, epochs_of, kill_at_step
from safetensors.torch import load_file
from torch import nn

from staa.config import Config
from staa.distributed import ALONE, PeerError, Peers, Statistics, join
from staa.records import Record
from staa.train import TrainingError, gradient, run

pytestmark = pytest.mark.usefixtures("root")
STAA = SMALL.but(neuron="staa", neuron_settings={"beta": 0.5}, epochs=2)
CPU = torch.device("cpu")


def torchruns(rank: int, port: int, fault=None):
    """The environment that torchrun gives to one of two processes."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": str(port)}
    if fault:
        fault()


def pair(root, config=SMALL, befalls=(None, None)):
    """What two processes that train one run end in: [(exit code, log lines, record or exception)]."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    both = [faults.start(root, config, partial(torchruns, rank, port, fault)) for rank, fault in enumerate(befalls)]
    return [faults.end(*one) for one in both]


def alone(config, monkeypatch, root):
    """The record of one process, in folders of its own."""
    monkeypatch.setenv("STAA_RUNS", str(root / "alone"))
    return run(config, device="cpu", workers=0, log=lambda line: None)


def same(a: Record, b: Record):
    """Equal outcomes, but for what the order of a sum changes."""
    for x, y in zip(a.outcome["epochs"], b.outcome["epochs"], strict=True):
        assert x == pytest.approx(y, rel=1e-4)
    assert a.outcome["firing_rates"] == pytest.approx(b.outcome["firing_rates"], rel=1e-3)
    rest = [{k: v for k, v in r.outcome.items() if k not in ("epochs", "firing_rates")} for r in (a, b)]
    assert rest[0] == rest[1]


@pytest.mark.parametrize("config", [SMALL, STAA, STAA.but(microbatch=5), SMALL.but(microbatch=16, epochs=2)],
                         ids=["LIF", "STAA", "microbatches", "one without images"])
def test_two_processes_make_the_record_of_one(root, monkeypatch, config):
    (code, lines, first), (other_code, silent, second) = pair(root, config)
    assert (code, other_code) == (0, 0) and first == second and isinstance(first, Record), (first, second)
    assert epochs_of(lines) == list(range(1, config.epochs + 1)) and silent == []
    assert first.provenance["processes"] == 2
    folder = root / "runs" / config.name
    assert sorted(os.listdir(folder)) == ["lock", "record.json", "weights.safetensors"]
    one = alone(config, monkeypatch, root)
    assert one.provenance["processes"] == 1
    same(first, one)
    weights = [load_file(f / config.name / "weights.safetensors") for f in (root / "runs", root / "alone")]
    for name, value in weights[0].items():
        torch.testing.assert_close(value, weights[1][name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_run_and_the_next_start_goes_on(root, monkeypatch, victim):
    fault = partial(kill_at_step, 5)  # three steps an epoch: the second step of epoch 2
    ends = pair(root, SMALL, [fault if rank == victim else None for rank in (0, 1)])
    assert ends[victim][0] == -signal.SIGKILL
    other = ends[1 - victim][2]
    assert isinstance(other, PeerError) and "goes on after its last whole epoch" in str(other)
    (_, lines, record), _ = pair(root, SMALL)
    assert epochs_of(lines) == [2, 3]
    same(record, alone(SMALL, monkeypatch, root))


def test_what_goes_wrong_in_the_first_process_is_said_in_both(root):
    folder = root / "runs" / SMALL.name
    folder.mkdir(parents=True)
    (folder / "record.json").write_text("{}")
    (_, _, first), (_, _, second) = pair(root)
    assert "damaged" in str(first) and str(first) == str(second) and "\n" not in str(first)


def test_a_batch_smaller_than_the_processes_is_refused_before_any_work(root):
    (_, lines, first), (_, _, second) = pair(root, SMALL.but(train_images=33))
    assert isinstance(first, TrainingError) and "fewer images than there are processes (2)" in str(second) and not lines


def test_torchrun_ends_with_a_killed_process_and_then_goes_on(root):
    config = SMALL.but(epochs=2)
    words = [f"{name}={json.dumps(value)}" for name, value in vars(config).items()]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m",
               "staa.train", *words]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    first = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment)
    assert "epoch 1/2" in first.stdout.readline()
    workers = Path(f"/proc/{first.pid}/task/{first.pid}/children").read_text().split()
    assert len(workers) == 2
    os.kill(int(workers[-1]), signal.SIGKILL)
    assert first.wait(60) != 0
    deadline = time.time() + 10
    while any(Path(f"/proc/{worker}").exists() for worker in workers) and time.time() < deadline:
        time.sleep(0.05)
    assert not any(Path(f"/proc/{worker}").exists() for worker in workers)
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    assert epochs_of(done.stdout.splitlines()) == [2] and done.stdout.count(config.name) == 1


@pytest.mark.parametrize("error, raised, said", [
    (RuntimeError("NCCL error: Duplicate GPU detected\nrank 0"), PeerError, "(NCCL error: Duplicate GPU detected)"),
    (torch.OutOfMemoryError("CUDA out of memory."), torch.OutOfMemoryError, "CUDA out of memory.")])
def test_why_processes_cannot_sum_is_said(monkeypatch, error, raised, said):
    def fails(x, group=None):
        raise error
    monkeypatch.setattr(torch.distributed, "all_reduce", fails)
    with pytest.raises(raised) as caught:
        Peers(0, 2).sum(torch.ones(1))
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_a_gpus_tensors_and_bn_go_by_the_gpus_group(monkeypatch):
    peers, seen, network = Peers(0, 2, gpus="of GPUs"), [], nn.Sequential(nn.BatchNorm2d(2))
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda x, group=None: seen.append(group))
    monkeypatch.setattr(nn.SyncBatchNorm, "convert_sync_batchnorm", lambda network, group=None: (network, group))
    peers.sum(types.SimpleNamespace(is_cuda=True))
    peers.sum(torch.ones(1))
    assert seen == ["of GPUs", None]
    assert peers.synchronise(network, torch.device("cuda")) == (network, "of GPUs")


@pytest.mark.parametrize("size, rank", [("2", None), ("two", "0"), ("2", "x")])
def test_variables_that_are_not_torchruns_are_refused_before_any_work(size, rank, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", size)
    monkeypatch.setenv("RANK", rank) if rank else monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(PeerError, match=f"^WORLD_SIZE is '{size}' and RANK '{rank or ''}' in the environment, .*unset both.$"):
        run(SMALL, device="cpu", workers=0, log=None)
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert join(CPU) is ALONE


def test_an_item_on_embedded_images_needs_no_preparation(root):
    """Both processes may be the first to want them."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m",
               "staa.items", "train", "table2", "network=resnet18", "neuron=lif", "epochs=1", "width=0.03125",
               "train_images=32"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300,
                          env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr


def test_a_microbatch_of_the_whole_batch_changes_nothing(root):
    whole, parts = (run(c, device="cpu", workers=0, log=lambda line: None) for c in (SMALL, SMALL.but(microbatch=16)))
    assert whole.outcome == parts.outcome and whole.config != parts.config


@pytest.mark.parametrize("has_bn", [True, False])
@pytest.mark.parametrize("microbatch", [1, 3, 7, 9])
def test_microbatches_add_up_to_the_gradient_of_the_batch(microbatch, has_bn):
    network, x, y = nn.Linear(5, 3), torch.randn(7, 5), torch.arange(7) % 3
    loss = nn.functional.cross_entropy(network(x), y)
    truth = torch.autograd.grad(loss, list(network.parameters()))
    config, counts = Config(microbatch=microbatch), torch.zeros(2, dtype=torch.int64)
    network.buffer = nn.BatchNorm2d(1) if has_bn else None  # not called: what is there to accumulate stays
    total = gradient(network, x, y, config, (0, 0), 7, CPU, ALONE, counts)
    assert total / 7 == pytest.approx(loss.item(), rel=1e-5)
    assert counts.tolist() == [(network(x).argmax(1) == y).sum(), 7]
    for p, g in zip(network.parameters(), truth):
        torch.testing.assert_close(p.grad, g)


def test_running_statistics_are_the_mean_of_what_each_microbatch_leaves():
    norm, parts = nn.BatchNorm2d(2), [torch.randn(n, 2, 3, 3) + n for n in (4, 4, 1)]
    statistics = Statistics(norm)
    for part in parts:
        norm(part)
        statistics.add()
    statistics.settle(ALONE)
    mean = sum(0.1 * part.mean((0, 2, 3)) for part in parts) / 3
    var = sum(0.9 + 0.1 * part.var((0, 2, 3)) for part in parts) / 3
    torch.testing.assert_close(norm.running_mean, mean)
    torch.testing.assert_close(norm.running_var, var)
    assert norm.num_batches_tracked == 1, "the parts of one batch"


def test_a_batch_of_as_many_images_as_processes_and_a_microbatch_for_one_of_them_are_enough(root):
    for config in (SMALL.but(train_images=34, epochs=1), SMALL.but(train_images=33, microbatch=16, epochs=1)):
        (_, _, first), (_, _, second) = pair(root, config)
        assert isinstance(first, Record) and first == second, first


def test_a_gradient_that_some_process_has_is_summed_and_one_that_none_has_stays_none(monkeypatch):
    """SGD leaves alone what has none, and decays the weights of what has a zero."""
    theirs = [torch.tensor([0.0, 1.0, 0.0]), torch.tensor([0.0, 7.0])]  # they have the second parameter's
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda x, group=None: x.add_(theirs.pop(0)))
    network = nn.ParameterList([nn.Parameter(torch.zeros(1)) for _ in range(3)])
    network[0].grad = torch.tensor([3.0])
    Peers(0, 2).sum_gradients(network)
    assert [p.grad for p in network] == [3.0, 7.0, None]


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_bn_over_two_processes_that_see_the_same_images_is_bn_over_these_twice(monkeypatch, kind):
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda x, group=None: x.mul_(2))
    norm = nn.BatchNorm2d(3, eps=0.5, momentum=0.3)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x, gradient, found = torch.randn(4, 3, 5, 5), torch.randn(4, 3, 5, 5), []
    (here,) = Peers(0, 2).synchronise(nn.Sequential(copy.deepcopy(norm)), CPU)
    for layer, times in ((here, 1), (norm, 2)):
        images = torch.cat([x] * times).to(kind).requires_grad_()
        out = layer(images)
        out.backward(torch.cat([gradient] * times).to(kind))
        found.append((out[:4], images.grad[:4], 2 / times * layer.weight.grad, *layer.buffers()))
        assert out.dtype == kind
    torch.testing.assert_close(found[0], found[1], **({} if kind == torch.float32 else dict(rtol=0.02, atol=0.02)))
