"""What several seeds allow to say: means, spreads, paired gains with their intervals, and the Tukey test."""

import json
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass

from .config import Config
from .records import Record


def mean_sd(values: list[float]) -> str:
    """Mean; with several values the standard deviation (n - 1) and their number."""
    if not values:
        return "not run"
    if len(values) == 1:
        return f"{values[0]:.2f}"
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f} (n={len(values)})"


def seeds(runs: list[Record]) -> str:
    """How many seeds there are of each training, in words: "1 seed", "3 seeds", or "3 to 6 seeds"."""
    counts = Counter(json.dumps(run.config | {"seed": None}, sort_keys=True) for run in runs).values()
    least, most = min(counts), max(counts)
    return f"{least} to {most} seeds" if least < most else f"{most} seed{'s' * (most > 1)}"


@dataclass(frozen=True)
class Gain:
    """A mean difference over `n` seeds, its confidence interval and the p-value of the paired t-test; from one seed
    there is neither, and low, high and p are None."""

    n: int
    mean: float
    low: float | None = None
    high: float | None = None
    p: float | None = None

    @property
    def beyond_chance(self) -> bool:
        return self.low is not None and self.high is not None and not self.low <= 0 <= self.high

    def __str__(self) -> str:
        if self.low is None:
            return f"{self.mean:+.2f} (one seed)"
        return f"{self.mean:+.2f} [{self.low:+.2f}, {self.high:+.2f}]"


def paired(differences: list[float], tests: int = 1) -> Gain:
    """The paired t-test of differences, one a seed. `tests` such intervals hold together with probability 0.95
    (Bonferroni): each has 1 - 0.05 / tests; p is not corrected. Raises ValueError without any difference."""
    from scipy.stats import t

    n = len(differences)
    if n < 2:
        return Gain(n, statistics.mean(differences))
    mean, error = statistics.mean(differences), statistics.stdev(differences) / n ** 0.5
    half = float(t.ppf(1 - 0.05 / tests / 2, n - 1)) * error
    p = 2 * float(t.sf(abs(mean) / error, n - 1)) if error else float(mean == 0)
    return Gain(n, mean, mean - half, mean + half, p)


def gain(after: list[Record], before: list[Record], tests: int = 1) -> Gain | None:
    """What `after` gains over `before` in test accuracy, in points, seed by seed; None where no seed has both."""
    a, b = ({r.config["seed"]: r.accuracy for r in found} for found in (after, before))
    differences = [a[seed] - b[seed] for seed in sorted(a.keys() & b.keys())]
    return paired(differences, tests) if differences else None


def verdict(gains: dict[str, Gain | None]) -> str:
    """One sentence: which gains are beyond chance, which losses, and what is undecided."""
    known = {name: g for name, g in gains.items() if g}
    if not known:
        return "No two rows were run: there is nothing to compare."
    if min(g.n for g in known.values()) < 2:
        return "One seed: nothing can be said about chance."

    def those(belongs: Callable[[Gain], bool]) -> str:
        return ", ".join(f"{name} ({g})" for name, g in known.items() if belongs(g)) or "none"

    return (f"Over {min(g.n for g in known.values())} seeds, "
            f"gains beyond chance: {those(lambda g: g.beyond_chance and g.mean > 0)}; "
            f"losses beyond chance: {those(lambda g: g.beyond_chance and g.mean < 0)}; "
            f"undecided: {those(lambda g: not g.beyond_chance)}.")


def guessing(run: Record) -> float:
    """The test accuracy in percent up to which a run is no better than guessing: chance and two standard errors."""
    p = 1 / run.outcome["classes"]
    return 100 * (p + 2 * (p * (1 - p) / run.outcome["test_images"]) ** 0.5)


def at_chance(runs: list[Record]) -> str:
    """One sentence: how many of the runs have learned nothing that their accuracy shows."""
    limits = " or ".join(f"{limit:.1f}" for limit in sorted({guessing(run) for run in runs}))
    poor = sum(run.accuracy <= guessing(run) for run in runs)
    return f"No better than guessing, which reaches up to {limits} %: {poor or 'none'} of {len(runs)} runs."


def differences(runs: list[Record]) -> str:
    """One sentence on whether the rows of an ablation differ by more than chance, from the spread over seeds.

    The yardstick is Tukey's honest significant difference at 5 %: q(rows, rows (n - 1)) s / sqrt(n), where s is the
    standard deviation over n seeds within a row, pooled over the rows, and q the studentized range.
    """
    from scipy.stats import studentized_range

    groups = defaultdict(list)
    for run in runs:
        groups[Config.from_dict(run.config).but(seed=0).hash].append(run.accuracy)
    k, n = len(groups), min(map(len, groups.values()), default=0)
    if k < 2:
        return "Fewer than two rows were run: there is nothing to compare."
    if n < 2:
        return "One seed: the differences between the rows say nothing."
    means = [statistics.mean(group) for group in groups.values()]
    span = max(means) - min(means)
    pooled = statistics.mean(statistics.variance(group) for group in groups.values()) ** 0.5
    limit = float(studentized_range.ppf(0.95, k, k * (n - 1))) * (pooled / n ** 0.5)
    verdict = "within chance" if span <= limit else "beyond chance"
    return (f"The rows' means span {span:.2f} points, and over {n} seeds anything up to {limit:.2f} is within chance "
            f"(Tukey, 5 %): the largest difference is {verdict}.")
