"""The statistics against SciPy and against numbers computed by hand."""

import statistics

import pytest
from test_tables import record

from staa import stats


def grouped(*groups):
    return [record(accuracy, seed=seed, neuron_settings={"r": r})
            for r, group in enumerate(groups, 1) for seed, accuracy in enumerate(group)]


def test_differences_within_chance_are_called_so():
    assert stats.differences(grouped([50.0], [90.0])) == "One seed: the differences between the rows say nothing."
    assert "nothing to compare" in stats.differences(grouped([50.0, 51.0])) == stats.differences([])
    # Table of the studentized range, 5 %: q(3 rows, 6 degrees of freedom) = 4.339; s = 1 in every row, n = 3.
    groups = [[10.0, 11.0, 12.0], [11.0, 12.0, 13.0], [12.0, 13.0, 14.0]]
    text = stats.differences(grouped(*groups))
    assert "span 2.00 points" in text and "over 3 seeds" in text and f"up to {4.339 / 3 ** 0.5:.2f}" in text
    assert text.endswith("the largest difference is within chance.")
    apart = stats.differences(grouped(*groups[:2], [13.0, 14.0, 15.0]))
    assert "span 3.00" in apart and apart.endswith("beyond chance.")


@pytest.mark.parametrize("groups", [([10.0, 11.5, 12.0], [11.0, 12.0, 13.1], [15.0, 13.0, 14.0]),
                                    ([50.0, 51.0, 49.0, 52.0], [50.5, 53.0, 51.0, 50.0]),
                                    *(([10.0, 11.0, 12.0], [11.0, 12.0, 13.0], [10 + d, 11 + d, 12 + d])
                                      for d in (2.47, 2.54))])  # the limit is 4.339 / sqrt(3) = 2.505
def test_the_verdict_is_that_of_scipys_tukey_test(groups):
    from scipy.stats import tukey_hsd

    beyond = tukey_hsd(*groups).pvalue.min() < 0.05
    assert stats.differences(grouped(*groups)).endswith("beyond chance." if beyond else "within chance.")


def test_of_uneven_rows_the_one_with_the_fewest_seeds_decides():
    """Variances 2 and 4, two seeds: q(2, 2) = sqrt(2) t(0.975, 2) = 6.085, and 6.085 sqrt(3 / 2) = 7.45. The third
    seed, which only one row has, would make it 3.93."""
    groups = [[10.0, 12.0], [16.0, 18.0, 20.0]]
    for runs in grouped(*groups), grouped(*groups[::-1]):
        text = stats.differences(runs)
        assert "span 7.00 points, and over 2 seeds anything up to 7.45 is within" in text
        assert text.endswith("is within chance.")
    assert stats.differences(grouped([10.0], groups[1])).startswith("One seed")


def test_mean_and_deviation():
    accuracies = [90.0, 92.0, 97.0]
    assert stats.mean_sd(accuracies[:1]) == "90.00"
    assert stats.mean_sd(accuracies) == f"93.00 ± {statistics.stdev(accuracies):.2f} (n=3)"
    assert stats.mean_sd([]) == "not run"


@pytest.mark.parametrize("before, after", [([50.0, 51.0, 49.5], [50.9, 52.2, 50.1]), ([1.0, 2.0], [0.0, 4.0]),
                                           ([10.0, 20.0, 30.0, 40.0, 55.0], [12.0, 19.0, 33.0, 39.0, 61.0])])
def test_a_gain_is_scipys_paired_t_test(before, after):
    from scipy.stats import ttest_rel

    runs = [[record(a, seed=seed) for seed, a in enumerate(values)] for values in (before, after)]
    gain, truth = stats.gain(runs[1], runs[0][::-1]), ttest_rel(after, before)
    interval = truth.confidence_interval(0.95)
    assert (gain.n, gain.p) == (len(before), pytest.approx(truth.pvalue))
    assert (gain.low, gain.high) == pytest.approx((interval.low, interval.high))
    assert gain.beyond_chance == (truth.pvalue < 0.05)
    five, wider = stats.gain(runs[1], runs[0], tests=5), truth.confidence_interval(0.99)
    assert (five.low, five.high) == pytest.approx((wider.low, wider.high)) and five.p == gain.p


def test_a_gain_by_hand():
    """Differences 1, 2, 3: mean 2, standard error 1 / sqrt(3), t(0.975, 2) = 4.303."""
    gain = stats.paired([1.0, 2.0, 3.0])
    assert (gain.low, gain.high) == pytest.approx((2 - 4.303 / 3 ** 0.5, 2 + 4.303 / 3 ** 0.5), abs=1e-3)
    assert str(gain) == "+2.00 [-0.48, +4.48]" and not gain.beyond_chance
    assert stats.paired([2.0, 2.0]).beyond_chance and not stats.paired([0.0, 0.0]).beyond_chance


def test_only_seeds_that_both_have_are_compared():
    after, before = [record(60.0, seed=1), record(70.0, seed=2)], [record(50.0, seed=0), record(51.0, seed=2)]
    assert stats.gain(after, before) == stats.Gain(1, 19.0)
    assert str(stats.gain(after, before)) == "+19.00 (one seed)" and not stats.gain(after, before).beyond_chance
    assert stats.gain(after[:1], before) is None


def test_the_closing_sentence_is_computed():
    sure, open_, loss = (stats.paired(d) for d in ([1.0, 1.1, 1.2], [-1.0, 2.0, 0.5], [-1.0, -1.1, -1.2]))
    text = stats.verdict({"SA": sure, "PE": open_, "GC": None, "TSRD": loss})
    assert text == (f"Over 3 seeds, gains beyond chance: SA ({sure}); losses beyond chance: TSRD ({loss}); "
                    f"undecided: PE ({open_}).")
    assert stats.verdict({"SA": stats.paired([1.0])}) == "One seed: nothing can be said about chance."
    assert "nothing to compare" in stats.verdict({"SA": None})
    assert "losses beyond chance: none; undecided: PE" in stats.verdict({"PE": open_})


def test_the_closing_sentence_counts_the_seeds_of_the_smallest_comparison():
    one, two, three = (stats.paired(d) for d in ([1.0], [1.0, 1.1], [1.0, 1.1, 1.2]))
    assert stats.verdict({"SA": three, "PE": two}).startswith("Over 2 seeds, ")
    assert stats.verdict({"SA": three, "PE": one}) == "One seed: nothing can be said about chance."


def test_seeds_are_counted_by_training():
    assert stats.seeds(grouped([50.0])) == "1 seed" and stats.seeds(grouped([50.0, 51.0], [52.0, 53.0])) == "2 seeds"
    assert stats.seeds(grouped([50.0] * 3, [50.0] * 6)) == "3 to 6 seeds"
