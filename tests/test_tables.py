import csv
import html
import re
import statistics

import pytest

from staa import Config, Record, records, results, tables
from staa.experiments import FIGURE2, PRESETS, TABLE1, Settings


def record(accuracy, folder=None, **settings):
    """A record with made-up accuracies of its last epoch, as if this config had been run."""
    config = Config(**settings)
    import json

    made = Record(json.loads(config.json), {"epochs": [{"test_accuracy": 99.0}, {"test_accuracy": accuracy}],
                                            "train_images": config.train_images or 50_000, "test_images": 900,
                                            "classes": 10, "parameters": 1234}, {})
    if folder:
        made.save(folder / f"{config.name}.json")
    return made


@pytest.fixture
def vouched(tmp_path, monkeypatch):
    monkeypatch.setenv("STAA_RECORDS", str(tmp_path / "records"))
    return tmp_path / "records"


def rows(name):
    with open(records.ROOT / "data" / "paper" / f"{name}.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_every_row_of_the_papers_tables_is_there():
    assert {name: len(rows(name)) for name in ("table1", "table2", "table3", "table4")} == {
        "table1": 58, "table2": 16, "table3": 21, "table4": 6}
    for name in ("table1", "table2", "table3", "table4"):
        for row in rows(name):
            assert re.fullmatch(r"\d\d\.\d{1,2}|", row["accuracy"]) and row["where"]
            assert row["accuracy"] or row["note"] == "not in our source"


def test_table_4_adds_up():
    numbers = rows("table4")
    for row in numbers[1:]:
        assert float(row["accuracy"]) - float(numbers[0]["accuracy"]) == pytest.approx(float(row["gain"]))


def test_the_papers_energy_adds_up():
    n = {(row["setting"], row["quantity"]): float(row["value"]) for row in rows("sections") if row["item"] == "energy"
         and re.fullmatch(r"[\d.]+", row["value"])}
    assert (n["per AC", "energy"] * n["network", "ACs"] + n["per MAC", "energy"] * n["network", "MACs"]
            == pytest.approx(n["network", "energy"]))  # pJ x G = mJ


def test_printed_numbers_are_kept_to_the_digit_and_lost_ones_are_shown_as_lost():
    table = tables.paper_table1()
    assert list(table.columns) == ["Method", "Architecture", "T", "Paper: CIFAR-10", "Paper: CIFAR-100"]
    assert table.iloc[6].tolist() == ["PFA [14]", "ResNet-19", "2", "95.6", "76.7"]
    own = table[table.Method == "STAA-SNN"]
    assert [(a, int(t)) for a, t in zip(own.Architecture, own["T"])] == [(tables.ARCHITECTURES[n], t) for n, t in TABLE1]
    lost = (own == "not in our source").any(axis=1)
    assert lost.sum() == 7 and own[~lost].values.tolist() == [["STAA-SNN", "ResNet-19", "4", "97.14", "82.05"]]


def test_mean_and_deviation():
    accuracies = [90.0, 92.0, 97.0]
    found = [record(a, seed=s) for s, a in enumerate(accuracies)]
    assert tables.mean_sd(found[:1]) == "90.00", "the last epoch's accuracy, not the best"
    assert tables.mean_sd(found) == f"{sum(accuracies) / 3:.2f} ± {statistics.stdev(accuracies):.2f} (n=3)"
    assert tables.mean_sd([]) == "not run"


def test_the_table_shows_paper_records_and_this_run(vouched):
    for seed, accuracy in enumerate([93.0, 94.0]):
        record(accuracy, vouched, dataset="cifar10", network="resnet20", T=4, epochs=50, seed=seed)
    runs = [record(81.5, network="resnet20", T=4), record(71.25, network="resnet20", T=4, neuron="lif")]
    table = tables.table1(runs)
    row = table[(table.Method == "STAA-SNN") & (table.Architecture == "ResNet-20") & (table["T"] == "4")].iloc[0]
    assert row["Recorded: CIFAR-10, STAA"] == "93.50 ± 0.71 (n=2); 50 epochs, width 1, 50,000 images"
    assert row["Recorded: CIFAR-10, LIF"] == row["Recorded: CIFAR-100, STAA"] == "no record"
    assert (row["This run: digits, STAA"], row["This run: digits, LIF"]) == ("81.50", "71.25")
    others = table[table.Method != "STAA-SNN"]
    assert len(table) == 29 and (others.iloc[:, 5:] == "").all(axis=None)
    assert (table[table.Method == "STAA-SNN"]["This run: digits, STAA"] == "not run").sum() == 7


def test_the_record_shown_is_chosen_by_its_training_and_never_by_its_accuracy(vouched):
    same = dict(dataset="cifar10", network="resnet20", T=4)
    record(99.0, vouched, epochs=5, **same)
    record(91.0, vouched, epochs=50, **same)
    record(98.0, vouched, epochs=500, width=0.25, **same)
    record(97.0, vouched, epochs=900, neuron_settings={"beta": 0.5}, **same)
    assert tables.recorded("staa", **same) == "91.00 (n=1); 50 epochs, width 1, 50,000 images"


def test_records_and_runs_are_found_by_the_settings_of_their_neuron(vouched):
    same = dict(dataset="cifar10", network="resnet20", T=4, epochs=50)
    record(91.0, vouched, **same)
    record(92.0, vouched, neuron_settings={"pe_place": "both"}, **same)
    record(93.0, vouched, neuron_settings={"pe_place": "both", "beta": 0.5}, **same)
    what = " (n=1); 50 epochs, width 1, 50,000 images"
    assert tables.recorded("staa", **same) == "91.00" + what and tables.recorded("lif", **same) == "no record"
    record(94.0, vouched, neuron_settings=dict(gc=False, pe=False, sa=False, beta=0.0), **same)  # the plain neuron
    assert tables.recorded("lif", **same) == "94.00" + what
    record(95.0, vouched, neuron="lif", **same | {"epochs": 60})
    assert tables.recorded("lif", **same) == "94.00" + what
    assert tables.recorded("lif", **same | {"epochs": 60}).startswith("95.00")
    found = records.vouched()
    for settings, accuracy in ({"pe_place": "input"}, 91.0), ({"pe_place": "both"}, 92.0), (
            {"beta": 0.5, "pe_place": "both"}, 93.0):
        assert [r.accuracy for r in tables.select(found, neuron="staa", neuron_settings=settings)] == [accuracy]
    assert tables.select(found, neuron_settings={"r": 8}) == []


def test_an_ablation_shows_paper_records_and_this_run(vouched):
    record(93.5, vouched, dataset="cifar10", network="resnet20", T=4, epochs=50, neuron_settings={"pe_place": "both"})
    record(99.9, vouched, dataset="cifar100", network="resnet20", T=4, epochs=50, neuron_settings={"pe_place": "both"})
    runs = [record(50.0 + i + seed, seed=seed, neuron_settings=row)
            for i, (_, row) in enumerate(FIGURE2[:-1]) for seed in (0, 2)]
    table = tables.figure2(runs).set_index("Row")
    assert table["Paper: CIFAR-10"].to_dict() == {"a": "not in our source", "a'": "not in our source", "b": "94.08",
                                                  "c": "94.29", "d": "94.27", "e": "93.96"}
    for dataset, accuracy in (("CIFAR-10", "93.50 (n=1)"), ("CIFAR-100", "99.90 (n=1)")):  # each training has its own column
        shown = table[f"Recorded: {dataset}, 50 epochs, width 1, 50,000 images"].to_dict()
        assert shown.pop("d") == accuracy and set(shown.values()) == {"not run"}
    assert table["This run: digits, ResNet-20, T = 4"].tolist() == [
        *(f"{51 + i}.00 ± 1.41 (n=2)" for i in range(5)), "not run"]
    assert table["Parameters"].tolist() == ["1,234"] * 5 + ["not run"]
    assert table.loc["d", "Neuron settings"] == "pe_place = both"
    kinds = tables.position_encoding(runs)
    assert kinds["Recorded: CIFAR-10"].tolist() == ["no record"] * 2
    assert kinds[["Row", "Paper: CIFAR-10"]].values.tolist() == [["learned", "94.99"], ["fixed", "94.42"]]
    assert kinds["This run: digits, ResNet-20, T = 4"].tolist() == ["54.00 ± 1.41 (n=2)", "not run"]


def test_the_trainings_of_an_ablation_come_widest_first_then_by_images_and_epochs(vouched):
    for settings in (dict(width=0.25, epochs=500), dict(epochs=5), dict(epochs=50),
                     dict(epochs=50, train_images=10_000)):
        record(90.0, vouched, dataset="cifar10", network="resnet20", T=4, **settings)
    assert list(tables.vouched_setups(FIGURE2)) == [
        "CIFAR-10, 50 epochs, width 1, 50,000 images", "CIFAR-10, 5 epochs, width 1, 50,000 images",
        "CIFAR-10, 50 epochs, width 1, 10,000 images", "CIFAR-10, 500 epochs, width 0.25, 50,000 images"]


def test_another_optimizer_is_named(vouched):
    """Records of the same epochs, width and images are not taken for each other."""
    for settings in ({}, dict(optimizer="adamw")):
        record(90.0, vouched, dataset="cifar10", network="resnet20", T=4, epochs=50, **settings)
    assert set(tables.vouched_setups(FIGURE2)) == {"CIFAR-10, 50 epochs, width 1, 50,000 images",
                                                   "CIFAR-10, 50 epochs, width 1, 50,000 images, AdamW"}


def test_an_ablation_of_another_network_names_it(vouched):
    table = tables.figure2([record(50.0, network="statten-2-256", neuron="staa", neuron_settings={"pe_place": "both"})])
    shown = table.set_index("Row")["This run: digits, statten-2-256, T = 4"].to_dict()
    assert shown.pop("d") == "50.00" and set(shown.values()) == {"not run"}


def test_a_run_on_digits_says_that_it_is_not_cifar():
    smoke = tables.header(Settings("smoke", 1, {}), [record(80.0, **PRESETS["smoke"])])
    assert "preset smoke, dataset digits" in smoke and "not the paper's data" in smoke
    part = tables.header(Settings("smoke", 1, {}), [record(80.0, train_images=720)])
    assert "720 training images" in part and "training images" not in smoke
    short = tables.header(Settings("short", 2, {}), [record(80.0, **PRESETS["short"], seed=seed) for seed in (0, 1)])
    assert "no reproduction" in short and "2 seeds" in short
    paper = tables.header(Settings("paper", 1, {}), [record(80.0, **PRESETS["paper"])])
    assert "reproduction" not in paper
    assert "no reproduction" in tables.header(Settings("paper", 1, {"epochs": 3}), [record(80.0, **PRESETS["paper"])])


def test_a_run_on_simulated_events_says_so():
    text = tables.header(Settings("smoke", 1, {}), [record(80.0, dataset="digits-dvs", T=16, image_size=17)])
    assert "dataset digits-dvs" in text and text.endswith(
        " These are events simulated from 8 x 8 digits: the numbers show that it runs, no more.")


def test_the_header_counts_the_runs_that_learned_nothing():
    """Of 900 answers to ten classes a tenth is right by chance, with a standard deviation of 1 %."""
    runs = [record(accuracy, seed=seed) for seed, accuracy in enumerate((9.0, 12.0, 12.1, 50.0))]
    assert "No better than guessing, which reaches up to 12.0 %: 2 of 4 runs." in tables.header(Settings("smoke", 4, {}), runs)
    assert "up to 12.0 %: none of 1 runs." in tables.header(Settings("smoke", 1, {}), runs[3:])


def test_a_figure_says_what_its_numbers_stand_on():
    found = [record(50.0, dataset="cifar10", network=network, T=4, neuron="staa", width=0.5, epochs=2, seed=seed)
             for network in ("resnet19", "resnet20") for seed in (0, 1, 2)]
    assert tables.trained_on(found) == "CIFAR-10; ResNet-19, T = 4 and ResNet-20, T = 4; staa; 2 epochs, width 0.5, 50,000 images; 3 seeds"
    small = record(50.0, dataset="digits", network="vgg13", neuron="lif", train_images=720)
    assert tables.trained_on([small]) == "digits; VGG-13, T = 4; lif; 1 epochs, width 1, 720 images; 1 seed"


def test_a_printed_number_stands_beside_its_own_time_steps_only():
    """The abstract's two numbers are ResNet-19's at T = 4."""
    def printed(**settings):
        return results.printed(record(0.0, network="resnet19", **settings).config)

    assert printed(dataset="cifar10", T=4) == "97.14 (Table 1)" and printed(dataset="cifar100", T=4) == "82.05 (Table 1)"
    assert printed(dataset="cifar100", T=2) == "not in our source (Table 1)"
    assert printed(dataset="cifar100", T=8) == printed(dataset="cifar100", T=4, neuron="lif") == printed(T=4) == "none"


def test_what_section_4_3_says_of_cifar10_stands_beside_the_ablations_of_resnet20():
    def printed(dataset="cifar10", **settings):
        return results.printed(record(0.0, network="resnet20", T=4, dataset=dataset, neuron_settings=settings).config)

    assert printed() == "94.29 and 94.99 (section 4.3)" and printed(pe_kind="fixed") == "94.42 (section 4.3)"
    assert printed(pe_place="output") == "93.96 (section 4.3)"
    assert printed(pe=False, sa=False, beta=0.0) == "73.22 on CIFAR-100 (Table 4)" == printed("cifar100", pe=False,
                                                                                              sa=False, beta=0.0)
    assert printed("cifar100") == "75.10 on CIFAR-100 (Table 4)"


def test_both_readings_of_eq_14_stand_beside_the_papers_number():
    texts = [results.printed(record(50.0, dataset="cifar10", network="resnet20", T=4, neuron=neuron).config)
             for neuron in ("staa", "staa-leaky", "fsta")]
    assert texts == ["94.29 and 94.99 (section 4.3)"] * 2 + ["none"]
    made = record(50.0, dataset="cifar10", neuron="staa-leaky", neuron_settings={"decay": 0.5})
    assert results.own_settings(made.config) == "STAA-LEAKY, decay = 0.5"
    best = [results.printed(record(50.0, dataset="cifar10", network="resnet19", T=4, neuron=neuron).config)
            for neuron in ("staa", "staa-leaky", "fsta")]
    assert best == ["97.14 (Table 1)"] * 2 + ["none"]


def test_of_a_network_that_the_paper_does_not_have_no_number_is_printed():
    for neuron in ("staa", "statten"):
        config = record(0.0, dataset="cifar10", network="statten-2-256", neuron=neuron, T=4).config
        assert results.printed(config) == "none"


def test_a_table_is_the_same_in_markdown_csv_html_and_latex():
    table = tables.table1([record(81.5, network="resnet20", T=4)])
    tables.save(table, "table1", "A note, 100 % honest.")
    folder = records.folder("figures")
    cells = [list(table.columns), *table.astype(str).values.tolist()]

    lines = [line for line in (folder / "table1.md").read_text().splitlines() if line.startswith("|") and "|:--" not in line]
    assert [[cell.strip() for cell in line.strip("|").split("|")] for line in lines] == cells
    with open(folder / "table1.csv", newline="") as file:
        assert list(csv.reader(file)) == cells
    shown = re.findall(r"<t[hd](?: [^>]*)?>(.*?)</t[hd]>", (folder / "table1.html").read_text(), re.DOTALL)
    assert [html.unescape(cell).strip() for cell in shown] == [cell for line in cells for cell in line]
    text = (folder / "table1.tex").read_text()
    body = [line.removesuffix(r" \\").split(" & ") for line in text.splitlines() if line.endswith(r"\\")]
    assert [[cell.strip().replace(r"\_", "_") for cell in line] for line in body] == cells
    assert r"100 \% honest" in text and text.count(r"\begin") == text.count(r"\end") == 2
    assert "A note" in (folder / "table1.md").read_text()
