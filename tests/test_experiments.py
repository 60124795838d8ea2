import gc
import queue
import subprocess
import sys
import time
import types
import weakref
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import active_children
from pathlib import Path

import faults
import pytest
import torch

from staa import NEURONS, Config, records, runner
from staa.experiments import (
    FIGURE2,
    FIGURE3,
    FIGURE5,
    ITEMS,
    POSITION_ENCODING,
    PRESETS,
    SMOKE,
    TABLE1,
    TABLE4,
    TABLE4_STEPS,
    Settings,
    assigned,
    convergence,
    figure2,
    figure3,
    figure5,
    position_encoding,
    run_all,
    settings,
    statten,
    table1,
    table2,
    table4,
)
from staa.settings import ConfigError
from staa.train import TrainingError

CELL = "# Parameters\npreset = 'smoke'\nseeds = 1\ndataset = None\nnetwork = None\nneuron = None\nT = None\nlr = None"


def notebook(injected="", **changes):
    """The namespace of a notebook after its parameters cell and the cell that papermill adds."""
    values = dict(preset="smoke", seeds=1, dataset=None, network=None, neuron=None, T=None, lr=None) | changes
    lines = injected or "\n".join(f"{name} = {value!r}" for name, value in changes.items())
    return values | {"In": ["", CELL, *([f"# Parameters\n{lines}\n"] if lines else []), "import staa"]}


def test_smoke_is_eight_rows_with_their_twins():
    configs = table1(settings(notebook()))
    assert len(configs) == 16 and {c.dataset for c in configs} == {"digits"}
    assert {(c.network, c.T) for c in configs if c.neuron == "staa"} == set(TABLE1)
    staa, lif = ([c.but(neuron="lif") for c in configs if c.neuron == n] for n in ("staa", "lif"))
    assert staa == lif, "a twin differs in nothing but the neuron"


@pytest.mark.parametrize("preset, epochs", [("short", 50), ("paper", 500)])
def test_real_presets_are_the_real_networks_on_both_datasets(preset, epochs):
    configs = table1(settings(notebook(preset=preset, seeds=3)))
    assert len(configs) == len(set(configs)) == 2 * 16 * 3
    assert {c.seed for c in configs} == {0, 1, 2} and {c.dataset for c in configs} == {"cifar10", "cifar100"}
    assert {(c.width, c.epochs, c.batch_size, c.lr, c.augment) for c in configs} == {(1.0, epochs, 128, 0.1, "autoaugment")}


@pytest.mark.parametrize("item, rows", [(figure2, FIGURE2), (position_encoding, POSITION_ENCODING),
                                        (figure3, FIGURE3), (figure5, FIGURE5)])
def test_an_ablation_is_its_rows_and_every_seed_and_changes_nothing_else(item, rows):
    configs = item(settings(notebook(preset="paper", seeds=2)))
    assert len(configs) == len(set(configs)) == 2 * len(rows)
    assert {c.but(neuron_settings={}, seed=0) for c in configs} == {Config(
        dataset="cifar10", network="resnet20", T=4, neuron="staa", augment="autoaugment", epochs=500)}
    own = Config().neuron_settings
    for (_, row), config in zip(rows, configs[::2]):
        assert {name: v for name, v in config.neuron_settings.items() if v != own[name]} == {
            name: v for name, v in row.items() if v != own[name]}


def test_the_papers_choice_is_one_run_for_every_item_that_has_it():
    for preset in PRESETS:
        asked = settings(notebook(preset=preset, dataset="digits"))
        items = [item(asked) for item in (position_encoding, figure2, figure3, figure5, table4, convergence)]
        if preset != "smoke":  # there the ablations are smaller than Table 1
            items.append(table1(asked))
        (shared,) = set.intersection(*map(set, items))
        assert (shared.network, shared.T, shared.neuron) == ("resnet20", 4, "staa")
        assert shared.neuron_settings == Config().neuron_settings


def test_smoke_ablations_are_one_training_and_share_what_they_can():
    asked = settings(notebook())
    found = [item(asked) for item in (position_encoding, figure2, figure3, figure5, table4, convergence)]
    assert len({c.but(neuron_settings={}) for configs in found for c in configs}) == 1
    assert set(convergence(asked)) <= set(table4(asked))
    assert len(set().union(*found)) == 6 + 9 + 4 + 4 + 1 and sum(map(len, found)) == 2 + 6 + 11 + 5 + 6 + 3


def test_table_2_is_imagenet_with_two_networks():
    configs = table2(settings(notebook(preset="paper")))
    assert [(c.network, c.neuron) for c in configs] == [(n, k) for n in ("resnet18", "resnet34") for k in ("staa", "lif")]
    assert {(c.dataset, c.T, c.image_size, c.augment, c.epochs, c.width) for c in configs} == {
        ("imagefolder:imagenet", 4, 224, "imagenet", 300, 1.0)}
    smoke = table2(settings(notebook(network="resnet18", neuron="staa")))
    assert [(c.dataset, c.image_size) for c in smoke] == [("imagefolder:digits64", 64)]


def test_every_step_of_table_4_adds_one_block():
    rows = dict(TABLE4)
    for name, (after, before) in TABLE4_STEPS.items():
        changed = [k for k in rows[after] if rows[after][k] != rows[before][k]]
        assert len(changed) == (4 if name == "all" else 1)


def test_figure_2_differs_in_the_place_of_pe_only():
    settings_of = dict(FIGURE2)
    places = ("membrane", "input", "both", "output")
    assert [settings_of[letter] for letter in "bcde"] == [{"pe_place": place} for place in places]
    a, lif = Config(neuron_settings=settings_of["a"]), Config(neuron="lif")
    x = torch.randn(4, 2, 8, 4, 4)
    assert torch.equal(NEURONS["staa"](8, T=4, **a.neuron_settings)(x), NEURONS["lif"](8, T=4, **lif.neuron_settings)(x))


def test_an_ablation_takes_the_readers_network_in_its_own_smoke_size():
    configs = figure2(settings(notebook(network="vgg13", T=2)))
    assert {(c.network, c.T, c.width, c.image_size) for c in configs} == {("vgg13", 2, 1 / 8, 32)}
    with pytest.raises(ConfigError, match="neuron of figure2 must have the setting beta"):
        figure2(settings(notebook(neuron="lif")))


def test_parameters_narrow_the_grid_and_change_the_rest():
    configs = table1(settings(notebook(preset="short", dataset="cifar10", network="resnet20", T=2, lr=0.02)))
    assert [(c.network, c.T, c.neuron, c.lr) for c in configs] == [("resnet20", 2, n, 0.02) for n in ("staa", "lif")]


@pytest.mark.parametrize("changes, words", [
    (dict(preset="quick"), "preset must be one of smoke, short, paper"), (dict(seeds=0), "seeds"),
    (dict(seeds="2"), "seeds"), (dict(lr="1e-3"), "lr must be a number, got str '1e-3'"),
    (dict(network="resnet50"), "network must be one of"), (dict(presett="short"), "one of .*preset.*got 'presett'")])
def test_bad_parameters_stop_before_any_work(changes, words):
    with pytest.raises(ConfigError, match=words):
        settings(notebook(**changes))


def test_what_a_cell_assigns():
    assert assigned(CELL) == {"preset", "seeds", "dataset", "network", "neuron", "T", "lr"}


def test_running_the_parameters_cell_again_is_no_misspelling():
    namespace = notebook()
    namespace["In"] += [CELL, "runs = 3", CELL]
    assert settings(namespace).preset == "smoke"


def test_every_preset_is_a_valid_run_of_every_network():
    for preset in PRESETS:
        for network in SMOKE:
            settings(notebook(preset=preset)).config(network=network, T=1)


TINY = dict(width=1 / 16, image_size=16, T=1, train_images=64, batch_size=32, lr=0.01)


def test_all_runs_are_done_in_order_and_logged():
    lines = []
    configs = [Config(seed=seed, **TINY) for seed in (1, 0, 2)]
    done = run_all(configs, log=lines.append)
    assert [r.config["seed"] for r in done] == [1, 0, 2]
    assert sum("epoch 1/1" in line for line in lines) == 3 and "3/3 runs" in lines[-1]
    lines.clear()
    again = run_all(configs, log=lines.append)
    assert again == done and str(again) == str(done), "a trained record and a read one are alike in every respect"
    assert not any("epoch" in line for line in lines)


def test_one_failure_does_not_cost_the_others():
    lines = []
    configs = [Config(**TINY), Config(lr=1e30, **{k: v for k, v in TINY.items() if k != "lr"}, epochs=3)]
    with pytest.raises(RuntimeError, match="no longer finite"):
        run_all(configs, log=lines.append)
    assert records.find(configs[0]) and not records.find(configs[1])
    assert any("failed: the" in line and "no longer finite" in line for line in lines)


def test_the_bar():
    assert runner.bar(0, 4) == "[....................] 0/4 runs"
    assert runner.bar(3, 4, "x") == "[###############.....] 3/4 runs  x"


def test_a_slip_that_was_mended_in_the_same_kernel_is_forgotten():
    namespace = notebook(lr=0.5)
    namespace["In"].insert(1, "# Parameters\nlr = 0.1x\n")
    assert settings(namespace).changes == {"lr": 0.5}
    namespace["In"].append("# Parameters\nlr: float = 0.5\nepohcs, T = 3, 2\n")
    with pytest.raises(ConfigError, match="got 'epohcs'$"):
        settings(namespace)


def test_a_kernel_without_history_will_do():
    namespace = notebook(lr=0.5)
    namespace["In"] = [""]  # as nbval runs it
    assert settings(namespace).changes == {"lr": 0.5}


def test_a_module_of_the_same_name_is_no_parameter():
    """A notebook that has imported staa.frames, in a kernel that keeps no input cells, as nbval's."""
    from staa import frames

    assert settings({"preset": "smoke", "seeds": 1, "frames": frames}).changes == {}


def test_a_failed_run_lets_go_of_its_network(monkeypatch):
    """Else a GPU has no memory for the next run; where it failed is still told."""
    networks = []

    def fails(config, network, log):
        network = torch.nn.Linear(2, 2)
        networks.append(weakref.ref(network))
        try:
            raise ValueError("no room")
        except ValueError:
            raise RuntimeError("out of memory") from None

    monkeypatch.setattr(runner, "run", fails)
    error = runner.attempt(Config(), print)
    gc.collect()
    assert str(error) == "out of memory" and error.__traceback__ and networks[0]() is None


@pytest.mark.parametrize("item, changes, words", [
    ("table1", dict(T=8), "^table1 has no run with T=8; here it can be 1 or 2 or 4$"),
    ("table1", dict(network="vgg13", T=1), "^table1 has no run with T=1; here it can be 2 or 4$"),
    ("table1", dict(network="resnet18"), "^table1 has no run with network=resnet18; here it can be resnet19 or resnet20 or vgg13$"),
    ("table1", dict(neuron="fsta"), "^table1 has no run with neuron=fsta; here it can be lif or staa$"),
    ("table2", dict(network="resnet20"), "^table2 has no run with network=resnet20"),
    ("table2", dict(T=2), "^table2 has no run with T=2; here it can be 4$"),
    ("table3", dict(T=8), "^table3 has no run with T=8; here it can be 16$"),
    ("figure4", dict(T=8), "^figure4 has no run with T=8"),
    ("figure4", dict(dataset="dvsgesture"), "^figure4 has no run with dataset=dvsgesture"),
    *((item, own, f"^dataset of {item} must be one of digits-dvs, nmnist, cifar10dvs, dvsgesture, got '{name}'$")
      for item in ("table3", "figure4")
      for own, name in ((dict(dataset="digits"), "digits"), (dict(preset="cut"), "cifar10"))),
    ("energy", dict(neuron="fsta"), "^energy has no run with neuron=fsta"),
    ("table4", dict(neuron_settings={"r": 8}), "^neuron_settings must be left out, for table4 varies it itself"),
    ("figure3", dict(neuron_settings={"beta": 0.3}), "^neuron_settings must be left out, for figure3 "),
    ("fsta", dict(neuron_settings={"v_th": 1.0}), "^neuron_settings must be left out, for fsta "),
    ("statten", dict(network_settings={"chunk": 1}), "^network_settings must be left out, for statten varies it itself"),
    ("energy", dict(seeds=3, seed=5), "^seed must be left out, for energy varies it itself, got 5$"),
    ("fsta", dict(seed=5), "^seed must be left out, for fsta"),
    ("table4", dict(neuron="lif"), "^neuron of table4 must have the setting beta, which it varies, got 'lif'$"),
    ("statten", dict(network="resnet20"), "^network of statten must be one of statten-2-256, .*, got 'resnet20'$"),
    ("statten", dict(augment="standard"), "^augment of statten, .* must be one of none, got 'standard'$"),
    ("siblings", dict(network="vgg13"), "^network must be left out, for siblings "),
    ("siblings", dict(neuron="staa"), "^neuron must be left out, for siblings ")])
def test_what_an_item_has_no_use_for_is_refused_in_one_sentence(item, changes, words):
    changes = dict(changes)
    asked = Settings(changes.pop("preset", "smoke"), changes.pop("seeds", 1), changes)
    with pytest.raises(ConfigError, match=words):
        ITEMS[item](asked)


def test_a_transformer_pools_once_on_digits_of_eight_pixels_and_twice_on_cifar():
    for asked, pools in ((Settings("smoke", 1, {}), "0001"), (Settings("paper", 1, {}), "0011"),
                         (Settings("smoke", 1, {"image_size": 16}), "0011")):
        assert {c.network_settings["pools"] for c in statten(asked)} == {pools}
    sizes = {c.network_settings["pools"] for c in statten(Settings("paper", 1, {"network": "statten-8-512"}))}
    assert sizes == {"1111"}


def test_a_presets_own_size_written_out_gives_the_same_runs():
    asked = [settings(dict(preset="smoke", seeds=1) | more) for more in ({}, dict(image_size=8))]
    for item in ("statten", "fsta", "siblings"):
        left_out, written = ([c.hash for c in ITEMS[item](s)] for s in asked)
        assert left_out == written


def test_a_parameter_is_judged_on_the_items_own_datasets_and_networks():
    asked = settings(dict(preset="smoke", seeds=1, frames="time", seed=5))
    assert {(c.dataset, c.frames, c.seed) for c in ITEMS["table3"](asked)} == {("digits-dvs", "time", 5)}
    assert {c.image_size for c in ITEMS["fsta"](settings(dict(preset="smoke", seeds=1, image_size=8)))} == {8}
    one_row = settings(dict(preset="smoke", seeds=1, neuron="lif", neuron_settings={"decay": 0.5}))
    assert {c.neuron_settings["decay"] for c in ITEMS["fsta"](one_row)} == {0.5}


@pytest.mark.parametrize("gpus, threads, runs, jobs", [(3, 1, 5, 3), (3, 1, 2, 2), (0, 3, 5, 2)])
def test_as_many_runs_at_once_as_there_are_gpus_or_else_cores_for_their_threads(monkeypatch, gpus, threads, runs, jobs):
    class Started(Exception):
        pass

    def pool(jobs, *_):
        raise Started(jobs)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(8)))
    monkeypatch.setattr(runner, "ProcessPoolExecutor", pool)
    with pytest.raises(Started, match=f"^{jobs}$"):
        list(runner._outcomes([Config(seed=seed, threads=threads) for seed in range(runs)], print, False))


def test_several_at_once_are_told_whether_their_networks_are_needed(monkeypatch):
    """In threads here, in place of processes."""
    class Pool(ThreadPoolExecutor):
        def __init__(self, jobs, context, begin, arguments):
            super().__init__(jobs)
            assert begin is runner.begin and not arguments[0].get()

    def queue_of_lines():
        lines = queue.SimpleQueue()
        lines.put("")
        return lines

    monkeypatch.setattr(runner, "get_context", lambda _: types.SimpleNamespace(SimpleQueue=queue_of_lines))
    monkeypatch.setattr(runner, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(runner.devices, "cores", lambda: 2)
    monkeypatch.setattr(runner, "run", lambda config, network, log: (config.seed, network))
    for needed in (True, False):
        found = list(runner._outcomes([Config(seed=seed) for seed in range(3)], print, needed))
        assert sorted(outcome for _, outcome in found) == [(0, needed), (1, needed), (2, needed)]
        assert all(config.seed == seed for config, (seed, _) in found)


def test_a_killed_process_costs_its_own_run_alone(monkeypatch):
    """As the system kills one where memory is short."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(runner.devices, "cores", lambda: 2)
    monkeypatch.setattr(runner, "attempt", faults.killed_with_odd_seeds)
    found = {config.seed: outcome for config, outcome in runner._outcomes([Config(seed=s) for s in (0, 1, 2)], print, False)}
    assert found.keys() == {0, 1, 2} and (found[0], found[2]) == (0, 2) and not active_children()
    assert isinstance(found[1], TrainingError) and "seed=1 was killed, perhaps because memory was short" in str(found[1])


@pytest.mark.parametrize("bad, at_once, left", [((0, 1, 4), [4, 1] * 3, {5, 6, 7}), ((2,), [4, 1, 4], set()),
                                                (range(8), [4, 1] * 3, set(range(3, 8)))])
def test_which_of_several_runs_was_killed_is_found_out(bad, at_once, left, monkeypatch):
    """Of eight, four at once; where a process is killed, the executor ends the others with it. After three the rest is left."""
    seen = []

    def together(configs, jobs, log, networks):
        seen.append(jobs)
        for at, config in enumerate(configs):
            begun = configs[at // jobs * jobs:][:jobs]
            if any(other.seed in bad for other in begun):
                return configs[at:]
            yield config, config.seed
        return []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(runner.devices, "cores", lambda: 4)
    monkeypatch.setattr(runner, "_together", together)
    found = {config.seed: outcome for config, outcome in runner._outcomes([Config(seed=s) for s in range(8)], print, False)}
    assert found.keys() == set(range(8)) and seen == at_once
    for seed, outcome in found.items():
        words = "was left, since 3 processes" if seed in left else "was killed" if seed in bad else None
        assert outcome == seed if words is None else words in str(outcome), seed


def test_where_nobody_takes_their_lines_any_more_runs_end(tmp_path, monkeypatch):
    """As where the output goes to `head`: they would fill the pipe and wait, or train on for nobody."""
    monkeypatch.setenv("STAA_RUNS", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(runner.devices, "cores", lambda: 2)
    configs = [Config(seed=seed, **TINY | dict(epochs=500)) for seed in range(3)]

    def log(line):
        if "epoch 1/" in line:
            raise BrokenPipeError
    with pytest.raises(BrokenPipeError):
        run_all(configs, log=log)
    assert not active_children() and not any(records.find(config) for config in configs)


def test_where_the_process_that_started_them_is_killed_none_trains_on(tmp_path):
    """The terminal is closed, or a notebook's kernel killed: they would hold their runs for ever."""
    script = tmp_path / "start.py"
    script.write_text("""
import os, time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from staa import runner

if __name__ == "__main__":
    context = get_context("spawn")
    lines = context.SimpleQueue()
    with ProcessPoolExecutor(1, context, runner.begin, (lines,)) as pool:
        print(pool.submit(os.getpid).result(), flush=True)
        pool.submit(time.sleep, 600)
        time.sleep(600)
""")
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True) as started:
        number = started.stdout.readline().strip()
        assert number.isdigit() and Path(f"/proc/{number}").is_dir()
        started.kill()
    for _ in range(200):
        try:
            if "State:\tZ" in Path(f"/proc/{number}/status").read_text():
                return
        except OSError:  # it is no longer there
            return
        time.sleep(0.1)
    pytest.fail("it is still there after 20 seconds")


def test_the_first_failure_is_raised_and_all_are_logged(monkeypatch):
    def fails(config, network, log):
        raise RuntimeError(f"seed {config.seed} cannot")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0})
    monkeypatch.setattr(runner, "run", fails)
    lines = []
    with pytest.raises(RuntimeError, match="^seed 0 cannot$"):
        run_all([Config(seed=seed, **TINY) for seed in range(3)], log=lines.append)
    said = [line.partition("failed: ")[2] for line in lines if "failed" in line]
    assert said == ["seed 0 cannot", "seed 1 cannot", "seed 2 cannot"]


def test_what_is_no_data_set_is_said_once_and_starts_no_run(monkeypatch):
    lines = []
    monkeypatch.setattr(runner, "run", lambda *args, **kwargs: pytest.fail("started"))
    with pytest.raises(records.DataError, match="looked for in .*nowhere"):
        run_all([Config(dataset="imagefolder:nowhere", seed=seed, **TINY) for seed in range(3)], log=lines.append)
    assert not lines


def test_a_run_that_is_asked_for_twice_is_made_once():
    lines = []
    configs = [Config(seed=seed, **TINY) for seed in (1, 0, 1)]
    assert [r.config["seed"] for r in run_all(configs, log=lines.append)] == [1, 0, 1]
    assert sum("epoch 1/1" in line for line in lines) == 2 and "2/2 runs" in lines[-1]


def test_any_failure_is_one_runs_own(monkeypatch):
    """BN fails with a ValueError on a last batch of one image whose maps have shrunk to one pixel."""
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0})
    bad = Config(neuron="lif", **TINY | dict(train_images=65, batch_size=64))
    good = bad.but(train_images=64)
    with pytest.raises(TrainingError, match="in the last batch of .* BN sees one value a channel.*batch_size"):
        run_all([bad, good], log=lambda line: None)
    assert records.find(good)
    monkeypatch.setattr(runner, "run", lambda config, network, log: {}["x"])
    assert isinstance(runner.attempt(good, print), KeyError)


def test_presets_train_as_the_notebooks_and_the_readme_say():
    def differs(item, preset, **more):
        config, plain = ITEMS[item](Settings(preset, 1, more))[0], Config()
        return {name: value for name, value in vars(config).items()
                if value != getattr(plain, name) and name not in ("dataset", "network", "network_settings", "neuron", "neuron_settings")}

    assert (Config().lr, Config().batch_size, Config().momentum, Config().weight_decay) == (0.1, 128, 0.9, 5e-4)
    assert differs("table1", "paper") == dict(epochs=500, augment="autoaugment", T=2)
    assert differs("table1", "short") == dict(epochs=50, augment="autoaugment", precision="bf16", T=2)
    assert differs("table2", "paper") == dict(epochs=300, augment="imagenet", image_size=224, batch_size=256, weight_decay=1e-4)
    assert differs("table3", "paper") == dict(epochs=500, augment="flip+roll", image_size=48, T=16, frames="count")
    assert differs("table4", "cut") == dict(epochs=3, train_images=10_000, width=0.25, augment="standard", batch_size=64, lr=0.02)
    smoke = dict(image_size=8, width=0.125, epochs=3, batch_size=32)
    assert differs("fsta", "smoke") == differs("siblings", "smoke") == smoke | dict(lr=0.02)
    transformer = dict(optimizer="adamw", lr=5e-3, weight_decay=0.01, label_smoothing=0.1)
    assert differs("statten", "smoke") == smoke | transformer | dict(T=8)
    own = statten(Settings("smoke", 1, {}))
    assert {(c.image_size, c.width, c.batch_size, c.lr, c.T) for c in own} == {(8, 0.125, 32, 5e-3, 4)}
    assert ITEMS["statten"](Settings("paper", 1, {}))[-1].optimizer == "adamw"
    (static,) = {(c.lr, c.weight_decay, c.label_smoothing, c.epochs, c.warmup_epochs) for c in statten(Settings("paper", 1, {}))}
    assert static == (3e-4, 0.01, 0.1, 500, 50)
