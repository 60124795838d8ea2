"""The tables and figures of Tables 2 and 4, Figures 3 and 5 and convergence, from made-up records."""

import math
import statistics

import matplotlib.pyplot as plt
import numpy as np
import pytest
from test_tables import record, rows

from staa import Config, Record, curves, experiments, plots, results, samples, stats, studies, tables
from staa.data import load
from staa.experiments import FIGURE3, FIGURE5, LEAK, TABLE4, TABLE4_STEPS, Settings, leak


@pytest.fixture(autouse=True)
def vouched(tmp_path, monkeypatch):
    monkeypatch.setenv("STAA_RECORDS", str(tmp_path / "records"))
    return tmp_path / "records"


def grid(table, folder=None, seeds=3, **settings):
    """A record for each row and seed: row i has 50 + i + seed / 10 per cent, and epochs with falling losses."""
    found = []
    for i, (_, row) in enumerate(table):
        for seed in range(seeds):
            made = record(50 + i + seed / 10 * (i + 1), seed=seed, neuron_settings=row, epochs=2, **settings)
            epochs = [{"train_loss": loss, "test_accuracy": made.accuracy} for loss in (2.0 - i / 10, 1.0 - i / 10)]
            full = Record(made.config, made.outcome | {"epochs": epochs, "classes": 10, "parameters": 1000 - i},
                          {"seconds_per_epoch": [1.0 + i, 3.0 + i], "seconds": 4.0, "device": "x"})
            if folder:
                full.save(folder / f"{i}-{seed}-{made.config['dataset']}.json")
            found.append(full)
    return found


def learned(i, seed, losses, seconds):
    """A run of row i of Table 4 with these training losses and these seconds, one an epoch."""
    made = record(50.0, seed=seed, neuron_settings=TABLE4[i][1])
    epochs = [{"train_loss": loss, "test_accuracy": 50.0} for loss in losses]
    return Record(made.config, made.outcome | {"epochs": epochs}, {"seconds_per_epoch": seconds, "device": "x"})


def test_table_4_has_the_papers_numbers_the_records_and_this_run(vouched):
    grid(TABLE4, vouched, dataset="cifar10", train_images=10_000, width=0.25)
    runs = grid(TABLE4[:-1])
    table = studies.table4(runs).set_index("Row")
    assert table["Paper: CIFAR-100"].tolist() == [row["accuracy"] for row in rows("table4")]
    assert table["Paper: gain"].tolist() == ["-", *(row["gain"] for row in rows("table4")[1:])]
    assert table.loc["GC", "Recorded: CIFAR-10, 2 epochs, width 0.25, 10,000 images"] == "51.20 ± 0.20 (n=3)"
    gain = stats.paired([1.0, 1.1, 1.2], tests=5)
    assert table.loc["GC", "This run: gain [95 %]"] == str(gain) and gain.beyond_chance
    assert table.loc["baseline", "This run: gain [95 %]"] == "-"
    assert table["Parameters"].tolist() == ["1,000", "999", "998", "997", "996", "not run"]
    assert table["Seconds an epoch"].tolist() == ["2.0", "3.0", "4.0", "5.0", "6.0", "not run"]
    assert table.iloc[-1].tolist()[-3:] == ["not run"] * 3


def test_every_step_is_the_papers_difference_and_ours(vouched):
    table = studies.table4_steps(grid(TABLE4)).set_index("Block")
    paper = dict(zip([label for label, _ in TABLE4], (float(row["accuracy"]) for row in rows("table4"))))
    assert [float(x) for x in table["Paper"]] == pytest.approx([paper[a] - paper[b] for a, b in TABLE4_STEPS.values()])
    assert (table.loc["SA with TSRD", "Paper"], table.loc["GC", "Paper"]) == ("+1.14", "+0.92"), "as section 4.3 prints"
    gain = stats.paired([2.0, 2.2, 2.4], tests=7)
    assert table.loc["SA", "This run: gain [95 %]"] == str(gain) and table.loc["SA", "This run: p"] == f"{gain.p:.3f}"
    assert "SA" in stats.verdict(studies.steps(grid(TABLE4)))


def test_the_records_steps_stand_beside_this_runs(vouched):
    """The records' two seeds give SA 2.0 and 2.2, mean 2.1 with standard error 0.1; t of one degree of freedom is
    Cauchy's distribution."""
    grid(TABLE4, vouched, seeds=2, dataset="cifar10", train_images=10_000, width=0.25)
    runs = grid([(label, row) for label, row in TABLE4 if label != "GC"], seeds=1)
    table = studies.table4_steps(runs).set_index("Block")
    head = "Recorded: CIFAR-10, 2 epochs, width 0.25, 10,000 images"
    half = 0.1 * math.tan(math.pi * (0.5 - 0.05 / 7 / 2))
    assert table.loc["SA", f"{head}: gain [95 %]"] == f"+2.10 [{2.1 - half:+.2f}, {2.1 + half:+.2f}]"
    assert table.loc["SA", f"{head}: p"] == f"{1 - 2 * math.atan(2.1 / 0.1) / math.pi:.3f}"
    assert table.loc["GC", f"{head}: gain [95 %]"].startswith("+1.05 [")
    this = table[["This run: gain [95 %]", "This run: p"]]
    assert this.loc["SA"].tolist() == ["+2.00 (one seed)", "-"] and this.loc["GC"].tolist() == ["not run", "-"]


def test_what_the_readme_shows_says_which_row_was_trained_and_the_papers_number(vouched):
    for made in grid(TABLE4, dataset="cifar10", train_images=10_000, width=0.25):
        layers = tables.layer_sizes(Config.from_dict(made.config).but(seed=0), classes=10)
        full = Record(made.config, made.outcome | {"firing_rates": dict.fromkeys(layers, 0.1)}, made.provenance)
        full.save(vouched / f"{len(list(vouched.glob('*')))}.json")
    table = results.results()
    assert len(table) == 6 and set(table["Dataset"]) == {"CIFAR-10"}
    shown = dict(zip(table["Neuron"], table["Paper"]))
    assert shown["STAA"] == "94.29 and 94.99 (section 4.3)"  # of CIFAR-10, as the records are
    assert shown["STAA, all blocks off: LIF"] == "72.30 on CIFAR-100 (Table 4)"
    assert len(layers) == 19 and set(table["Firing rate"]) == {"0.100"}
    assert set(table["Training"]) == {"2 epochs, width 0.25, 10,000 images, batch 128, lr 0.1, augmentation none"}


def test_table_2_fills_its_own_rows():
    runs = [record(12.5, dataset="imagefolder:digits64", image_size=64, network="resnet34", T=4)]
    table = studies.table2(runs)
    assert len(table) == 16 and table["Paper: ImageNet"].tolist() == [
        row["accuracy"] or "not in our source" for row in rows("table2")]
    own = table[table.Method == "STAA-SNN"]
    assert own["This run: digits64, STAA"].tolist() == ["not run", "12.50", ""]
    assert own["Recorded: ImageNet, STAA"].tolist() == ["no record", "no record", ""]


def test_table_2_keeps_staa_and_lif_apart(vouched):
    same = dict(image_size=64, network="resnet18", T=4, epochs=5)
    runs = []
    for neuron, before, now in ("staa", 61.0, 12.5), ("lif", 55.0, 7.25):
        record(before, vouched, dataset="imagefolder:imagenet", neuron=neuron, **same)
        runs.append(record(now, dataset="imagefolder:digits64", neuron=neuron, **same))
    table = studies.table2(runs)
    row = table[(table.Method == "STAA-SNN") & (table.Architecture == "ResNet18")].iloc[0]
    what = " (n=1); 5 epochs, width 1, 50,000 images"
    assert [row[f"Recorded: ImageNet, {neuron}"] for neuron in ("STAA", "LIF")] == ["61.00" + what, "55.00" + what]
    assert [row[f"This run: digits64, {neuron}"] for neuron in ("STAA", "LIF")] == ["12.50", "7.25"]


def test_figure_5_shows_what_r_costs():
    runs = grid(FIGURE5, width=1 / 16, image_size=16, T=4, seeds=1)
    table = studies.figure5(runs)
    assert table["r"].tolist() == ["1", "2", "4", "8", "16"] and table["Parameters"].tolist()[0] == "1,000"
    counts = [studies.multiply_adds(run) for run in runs]
    assert counts == sorted(counts, reverse=True) and counts[0] > counts[-1]
    full = record(1.0, dataset="cifar10", network="resnet20", T=4)
    full.outcome["classes"] = 10
    # ResNet-20 at T = 4 has 0.871 G; the mixing by M and N is no layer, and is left out.
    assert studies.multiply_adds(full) == pytest.approx(0.871e9, abs=0.0005e9)


def test_convergence_counts_epochs_to_the_common_loss():
    runs = grid([row for row in (TABLE4[0], TABLE4[4], TABLE4[5])])
    table = studies.convergence(runs).set_index("Neuron")
    assert list(table.index) == ["LIF", "STAA", "STAA without TSRD"]
    assert table["Epochs to a loss of 1.000"].tolist() == ["2", "2", "2"]
    assert table.loc["STAA", "Seconds an epoch"] == "4.0" and table.loc["STAA", "Seconds to that loss"] == "8.0"
    assert studies.curve(runs[:3], "test_accuracy")[0] == (pytest.approx(50.1), pytest.approx(0.1))
    assert "With TSRD the seconds of an epoch change by +33.33 [+33.33, +33.33] %" in studies.tsrd_seconds(runs)


def test_who_learns_faster_reaches_the_common_loss_before_the_last_epoch():
    """LIF ends at 1.0 in the fourth epoch; STAA is below it after two of 2 s, and STAA without TSRD exactly there, in
    the mean of its seeds, after three of 5 s."""
    runs = [learned(0, 0, [2.0, 1.5, 1.2, 1.0], [1.0] * 4), learned(5, 0, [1.8, 0.75, 0.5, 0.25], [2.0, 9.0, 2.0, 2.0]),
            learned(4, 0, [1.9, 0.9, 0.75, 0.5], [4.0] * 4), learned(4, 1, [1.9, 1.5, 1.25, 0.75], [6.0] * 4)]
    table = studies.convergence(runs)
    assert table["Neuron"].tolist() == ["LIF", "STAA", "STAA without TSRD"]
    assert table["Epochs to a loss of 1.000"].tolist() == ["4", "2", "3"]
    assert table["Seconds to that loss"].tolist() == ["4.0", "4.0", "15.0"]
    assert table["Last training loss"].tolist() == ["1.000", "0.250", "0.625"]


@pytest.mark.parametrize("with_it, words", [
    ([11.0, 11.2, 11.4], "+12.00 [+7.03, +16.97] %: beyond chance."),  # 12 and 4.303 times 2 / sqrt(3)
    ([8.6, 8.8, 9.0], "-12.00 [-16.97, -7.03] %: beyond chance."),
    ([9.8, 10.0, 10.5], "+1.00 [-7.96, +9.96] %: not beyond chance."),  # 1 and 4.303 times sqrt(13 / 3)
    ([11.0], "+10.00 (one seed) %: one seed cannot tell.")])
def test_what_tsrd_takes_is_beyond_chance_where_the_interval_leaves_out_zero(with_it, words):
    runs = [learned(i, seed, [1.0], [seconds])
            for seed, pair in enumerate(with_it) for i, seconds in ((5, pair), (4, 10.0))]
    assert studies.tsrd_seconds(runs) == f"With TSRD the seconds of an epoch change by {words}"


@pytest.mark.parametrize("draw, table", [(curves.figure3, FIGURE3), (curves.figure5, FIGURE5)])
def test_a_figure_draws_every_row_and_every_training(vouched, draw, table):
    plots.style()
    grid(table, vouched, dataset="cifar10", train_images=10_000, width=0.25)
    runs = grid(table, width=1 / 16, image_size=16)
    figure = draw(studies.series(table, runs))
    lines = [c.lines[0] for c in figure.axes[0].containers]
    assert len(lines) == 2 and len({c.get_label() for c in figure.axes[0].containers}) == 2
    for line in lines:
        assert list(line.get_xdata()) == [float(label) for label, _ in table]
        assert list(line.get_ydata()) == pytest.approx([50 + i + 0.1 * (i + 1) for i in range(len(table))])
    if draw is curves.figure5:
        parameters = figure.axes[1].lines[0].get_ydata()
        assert parameters == pytest.approx([100 * (1000 - i) / 998 - 100 for i in range(5)])
    figure.canvas.draw()
    legend, page = figure.legends[0].get_window_extent(), figure.bbox
    assert page.x0 <= legend.x0 and legend.x1 <= page.x1 and legend.y1 <= page.y1, "the legend leaves the page"
    plt.close(figure)


def leaks(folder=None, **settings):
    """Three seeds of each part: with the leak 60 + 10 i, without it 2 less, and a little by seed."""
    return [record(60.0 + 10 * i - 2 * k + seed * (1 + k) / 10, folder, neuron=neuron, neuron_settings=own, seed=seed, T=4,
                   network="resnet20", **settings)
            for i, pair in enumerate(LEAK.values()) for k, (neuron, own) in enumerate(pair) for seed in range(3)]


def test_the_leak_stands_beside_its_absence(vouched):
    leaks(vouched, dataset="cifar10", width=0.25)
    record(1.0, vouched, neuron="lif", network="resnet20", dataset="cifar10", width=0.25)  # the row is STAA's without blocks
    runs = leaks()[:-3]  # STAA without a leak was not run
    table = studies.leak(runs).set_index("Neuron")
    head = "Recorded: CIFAR-10, 1 epochs, width 0.25, 50,000 images"
    assert table[f"{head}: leak"].tolist() == [f"{60 + 10 * i}.10 ± 0.10 (n=3)" for i in range(3)]
    assert table[f"{head}: no leak"].tolist() == [f"{58 + 10 * i}.20 ± 0.20 (n=3)" for i in range(3)]
    assert table["This run: no leak"].tolist() == ["58.20 ± 0.20 (n=3)", "68.20 ± 0.20 (n=3)", "not run"]

    gains = studies.leak_differences(runs).set_index("Gain")
    leaking, sa, whole, other = (str(stats.paired(points, tests=7)) for points in (
        [2.0, 1.9, 1.8], [10.0] * 3, [20.0] * 3, [18.0, 18.1, 18.2]))
    assert gains[f"{head}: gain [95 %]"].to_dict() == {
        "leak in LIF": leaking, "leak in GC + PE + TSRD": leaking, "leak in GC + PE + SA + TSRD": leaking,
        "SA with a leak": sa, "SA without a leak": sa, "staa-leaky over LIF": whole, "staa over LIF": other}
    assert gains["This run: gain [95 %]"].tolist() == [leaking, leaking, "not run", sa, "not run", whole, "not run"]

    figure = curves.leak({"recorded": leaks(), "this run": runs})
    drawn = [[list(bar.lines[0].get_ydata()) for bar in axes.containers] for axes in figure.axes]
    assert drawn[0] == [pytest.approx([60.1, 70.1, 80.1]), pytest.approx([58.2, 68.2, 78.2])]
    assert drawn[1] == [pytest.approx([60.1, 70.1, 80.1]), pytest.approx([58.2, 68.2])], "a gap where nothing was run"
    plt.close(figure)


def test_the_runs_of_the_leak_are_its_rows_and_two_of_them_table_4s():
    configs = leak(Settings("cut", 2, {}))
    assert len(configs) == 12 and {(c.dataset, c.network, c.T, c.width) for c in configs} == {("cifar10", "resnet20", 4, 0.25)}
    assert [c.neuron for c in configs[::2]] == ["staa", "lif", "staa-leaky", "staa", "staa-leaky", "staa"]
    assert len(set(configs) & set(experiments.table4(Settings("cut", 2, {})))) == 4
    assert {c.dataset for c in leak(Settings("paper", 1, {}))} == {"cifar100"}


def test_an_ablation_of_another_reading_stands_beside_its_own_records(vouched):
    grid(TABLE4, vouched, dataset="cifar10", T=4, network="resnet20")
    grid(TABLE4[-1:], vouched, dataset="cifar100", T=4, network="resnet20", neuron="staa-leaky")
    runs = grid(TABLE4, neuron="staa-leaky")
    table = studies.table4(runs).set_index("Row")
    (recorded,) = [name for name in table if name.startswith("Recorded")]
    assert recorded == "Recorded: CIFAR-100, 2 epochs, width 1, 50,000 images"
    assert table[recorded].tolist() == ["not run"] * 5 + ["50.10 ± 0.10 (n=3)"]
    assert "This run: digits, ResNet-20, T = 4, staa-leaky" in table
    assert [name for name in studies.table4_steps(runs) if name.startswith("Recorded")] == [
        f"{recorded}: gain [95 %]", f"{recorded}: p"]
    assert list(studies.series(TABLE4, runs))[1:] == ["recorded: CIFAR-100, 2 epochs, width 1, 50,000 images, 3 seeds"]


def test_convergence_draws_three_lines_of_means():
    runs = grid([TABLE4[0], TABLE4[4], TABLE4[5]])
    figure = curves.convergence(runs)
    assert [line.get_label() for line in figure.axes[0].lines] == ["LIF", "STAA", "STAA without TSRD"]
    assert list(figure.axes[0].lines[0].get_ydata()) == [2.0, 1.0]
    assert figure.axes[1].lines[0].get_ydata()[1] == pytest.approx(statistics.mean([50.0, 50.1, 50.2]))
    plt.close(figure)


def test_bars_and_bands_are_one_standard_deviation_over_seeds_up_and_down():
    """Row i has 50 + i + (0, 1, 2) (i + 1) / 10 per cent: the deviation is (i + 1) / 10."""
    figure, axes = plt.subplots()
    curves.over_setting(axes, {"this run": studies.groups(FIGURE5, grid(FIGURE5))})
    bars = axes.containers[0].lines[2][0].get_segments()
    expected = [[[r, 50 + i], [r, 50 + i + 0.2 * (i + 1)]] for i, r in enumerate((1, 2, 4, 8, 16))]
    assert np.array(bars) == pytest.approx(np.array(expected))
    plt.close(figure)
    figure = curves.convergence(grid([TABLE4[0], TABLE4[4], TABLE4[5]]))
    for i, band in enumerate((0, 2, 1)):  # STAA is Table 4's last row
        at = figure.axes[1].collections[i].get_paths()[0].vertices
        for epoch in (1, 2):
            y = at[at[:, 0] == epoch, 1]
            assert (y.min(), y.max()) == pytest.approx((50 + band, 50 + band + 0.2 * (band + 1)))
    plt.close(figure)


def test_more_trainings_than_kinds_of_lines_are_all_drawn():
    figure, axes = plt.subplots()
    curves.over_setting(axes, {f"training {i}": {"1": [record(10.0 * i)]} for i in range(1, 7)})
    assert [c.get_label() for c in axes.containers] == [f"training {i}" for i in range(1, 7)]
    assert [list(c.lines[0].get_ydata()) for c in axes.containers] == [[10.0 * i] for i in range(1, 7)]
    plt.close(figure)


def test_the_tree_of_images_is_the_digits():
    import numpy as np
    from PIL import Image

    root = samples.digit_images("few", size=64, train=3, val=2)
    assert sorted(p.name for p in root.iterdir()) == ["train", "val"]
    train, val, digits = load("imagefolder:few", True), load("imagefolder:few", False), load("digits", True)
    assert (len(train), len(val)) == (30, 20) and train.classes == digits.classes
    for images, source, count in ((train, digits, 3), (val, load("digits", False), 2)):
        first = {(i, k) for k in range(10) for i in [i for i, label in enumerate(source.targets) if label == k][:count]}
        assert {(int(path[-8:-4]), label) for path, label in images.samples} == first
        path, _ = images.samples[-1]
        truth = source[int(path[-8:-4])][0].convert("RGB").resize((64, 64))
        assert np.array_equal(np.asarray(Image.open(path)), np.asarray(truth))
    before = {p: p.stat().st_mtime_ns for p in root.rglob("*")}
    assert samples.digit_images("few") == root and before == {p: p.stat().st_mtime_ns for p in root.rglob("*")}
    assert {p.name for p in root.parent.iterdir()} == {"few", ".few.lock"}, "nothing half-made is left"


def test_seconds_are_the_processors_on_a_cpu_and_the_clocks_elsewhere():
    def timed(device, **work):
        return Record({}, {}, {"seconds_per_epoch": [9.0, 1.0, 2.0], "device": device} | work)

    work = {"processor_seconds_per_epoch": [4.0, 6.0, 5.0]}
    assert studies.seconds([timed("x86_64 CPU", **work)]) == 5.0
    twice = [timed("x86_64 CPU"), timed("x86_64 CPU", **work)]
    assert studies.seconds(twice) == 3.5, "the mean of the two: as a mean of paired differences is"
    assert studies.seconds([timed("x86_64 CPU")]) == studies.seconds([timed("NVIDIA H100", **work)]) == 2.0


def test_photographs_are_cut_into_tiles():
    """640 x 427: one square of the whole height, from the middle; or four rows of six, 106 pixels each."""
    from sklearn.datasets import load_sample_images

    pictures = load_sample_images().images
    whole, tiles = samples.photographs(427), samples.photographs(106, rows=4)
    assert len(whole) == 2 and len(tiles) == 48
    for tile, picture in zip(whole, pictures):
        assert (np.asarray(tile) == picture[:, 106:533]).all()
    assert (np.asarray(tiles[24 + 7]) == pictures[1][106:212, 2 + 106:2 + 212]).all(), "second row, second column"
    assert {tile.size for tile in samples.photographs(32, rows=2)} == {(32, 32)}
