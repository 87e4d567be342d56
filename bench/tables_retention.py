"""What retention gives: tables and plot of docs/retention.md (python -m bench.tables_retention).

Every number is a relative profile error computed from the solve; nothing is trained and nothing is random. Takes about
two minutes; ``--plots FOLDER`` draws the plot as well (needs matplotlib).
"""

from __future__ import annotations

import argparse
import bisect
from collections.abc import Callable
from pathlib import Path

import numpy as np

from nitrous_ema.posthoc import retain
from nitrous_ema.posthoc.interval_cost import IntervalCost
from nitrous_ema.posthoc.keep_rules import KeepCount
from nitrous_ema.profile import sigma_rel_to_gamma

PAIR, TRIPLE, GUIDED = (0.05, 0.10), (0.03, 0.10, 0.25), (0.02, 0.05, 0.16)
CASES = ((PAIR, (0.05, 0.25)), (TRIPLE, (0.03, 0.25)), (PAIR, (0.015, 0.25)), (GUIDED, (0.015, 0.25)))
COUNTS = (16, 32, 64)
ARRIVALS, JUDGED_EVERY = 1200, 7
OFFLINE_STEPS = 400

Keep = Callable[[list[int]], list[int]]  # what is kept after an arrival, from what was kept and the arrival


class Judge:
    """The worst error over a range of lengths."""

    def __init__(self, tracked: tuple[float, ...], wanted: tuple[float, float]) -> None:
        self.tracked, self.wanted = tracked, wanted
        self.lengths = np.geomspace(*wanted, 17)
        self.cost = IntervalCost.of(sigma_rel_to_gamma(tracked), sigma_rel_to_gamma(self.lengths))

    def worst(self, kept: list[int]) -> float:
        """With these steps, for the newest of them."""
        log_t = np.log(kept)
        return float(np.sqrt(self.cost.errors2(log_t, np.full(self.lengths.size, log_t[-1])).max()))

    def worst_ever(self, keep: Keep, *, since: int) -> float:
        """At any time from ``since`` arrivals on."""
        kept: list[int] = []
        worst = 0.0
        for now in range(1, ARRIVALS + 1):
            kept = keep([*kept, now])
            if now >= since and now % JUDGED_EVERY == 0:
                worst = max(worst, self.worst(kept))
        return worst

    def least_loss(self, count: int, exponent: float) -> Keep:
        """The rule of the library."""
        gammas = tuple(sigma_rel_to_gamma(self.tracked).tolist())
        rule = KeepCount(count, sigma_rels=self.wanted, exponent=exponent)

        def keep(kept: list[int]) -> list[int]:
            dropped = rule.drop(kept, gammas=gammas, snapshot_bytes=1)
            return [t for place, t in enumerate(kept) if place not in dropped]

        return keep


def every_kth(count: int) -> Keep:
    """Multiples of a stride that doubles when they are too many, and the newest."""

    def keep(kept: list[int]) -> list[int]:
        stride = 1
        while kept[-1] // stride > count - 1:
            stride *= 2
        return [t for t in kept[:-1] if t % stride == 0] + kept[-1:]

    return keep


def geometric(count: int, ratio: float) -> Keep:
    """The last ``count - 1`` of steps whose times grow by a ratio, and the newest."""

    def keep(kept: list[int]) -> list[int]:
        *grown, newest = kept
        if len(grown) > 1 and grown[-1] < ratio * grown[-2]:
            grown.pop()
        return [*grown[-(count - 1) :], newest]

    return keep


def table_of_rules(judges: list[Judge]) -> None:
    """Worst error at any time, rule by rule."""
    print(
        "| tracked, wanted | kept | last ones | doubling stride | geometric (best ratio) | least loss, s = 2 | s = 1 |"
    )
    print("|---|---|---|---|---|---|---|")
    for judge in judges:
        for count in COUNTS:
            ratios = [round(float(np.exp(x / count)), 3) for x in (1, 1.5, 2, 2.5, 3, 3.5, 4, 5)]
            geo = min((judge.worst_ever(geometric(count, ratio), since=2 * count), ratio) for ratio in ratios)
            others = [
                judge.worst_ever(keep, since=2 * count)
                for keep in (lambda kept, count=count: kept[-count:], every_kth(count))
            ]
            least = [judge.worst_ever(judge.least_loss(count, s), since=2 * count) for s in (2.0, 1.0)]
            row = [f"{others[0]:.2g}", f"{others[1]:.2g}", f"{geo[0]:.2g} ({geo[1]:g})", *(f"{x:.2g}" for x in least)]
            print(f"| {named(judge)} | {count} | {' | '.join(row)} |", flush=True)


def table_of_finished_runs(judges: list[Judge]) -> None:
    """The best sets, with their bounds."""
    print(f"\n| tracked, wanted | kept of {OFFLINE_STEPS} | worst error | no set has less than |")
    print("|---|---|---|---|")
    for judge in judges:
        for count in COUNTS:
            gammas = sigma_rel_to_gamma(judge.tracked)
            choice = retain(np.arange(1, OFFLINE_STEPS + 1), gammas, keep=count, sigma_rels=judge.wanted)
            after = choice.error_after[-1, choice.in_range].max()
            print(f"| {named(judge)} | {count} | {after:.2g} | {choice.lower_bound:.2g} |")


def table_of_old_targets(judges: list[Judge]) -> None:
    """What thinning for the newest step leaves for older ones."""
    print(f"\n| tracked, wanted, 64 kept of {ARRIVALS} | newest | 1/2 | 1/4 | 1/10 of the time |")
    print("|---|---|---|---|---|")
    for judge in judges:
        keep, kept = judge.least_loss(64, 2.0), []
        for now in range(1, ARRIVALS + 1):
            kept = keep([*kept, now])
        cells = []
        for part in (1, 2, 4, 10):
            cells.append(f"{judge.worst(kept[: bisect.bisect_right(kept, ARRIVALS // part)]):.2g}")
        print(f"| {named(judge)} | {' | '.join(cells)} |")


def named(judge: Judge) -> str:
    """One cell."""
    return f"{', '.join(f'{s:g}' for s in judge.tracked)}; {judge.wanted[0]:g} to {judge.wanted[1]:g}"


def plot_retention(judge: Judge, path: Path) -> None:
    """Error against number kept."""
    import matplotlib.pyplot as plt

    counts = (8, 12, 16, 24, 32, 48, 64, 96)
    gammas = sigma_rel_to_gamma(judge.tracked)
    curves: dict[str, list[float]] = {}
    for count in counts:
        steps = np.arange(1, OFFLINE_STEPS + 1)
        best = retain(steps, gammas, keep=count, sigma_rels=judge.wanted)
        ratios = np.exp(np.array([1, 1.5, 2, 2.5, 3, 3.5, 4, 5]) / count)
        values = {
            "the last ones": judge.worst_ever(lambda kept, count=count: kept[-count:], since=2 * count),
            "geometric, best ratio": min(judge.worst_ever(geometric(count, r), since=2 * count) for r in ratios),
            "doubling stride": judge.worst_ever(every_kth(count), since=2 * count),
            "least loss (KeepCount)": judge.worst_ever(judge.least_loss(count, 2.0), since=2 * count),
            f"best set of a run of {OFFLINE_STEPS} (retain)": best.error_after[-1, best.in_range].max(),
        }
        for name, value in values.items():
            curves.setdefault(name, []).append(float(value))
    figure, axes = plt.subplots(figsize=(7, 4.5))
    for name, values in curves.items():
        axes.loglog(counts, values, "o-", label=name)
    axes.set(
        xlabel="snapshots kept",
        ylabel="worst relative profile error",
        title=f"At any time, lengths {judge.wanted[0]:g} to {judge.wanted[1]:g}, tracked {judge.tracked}",
    )
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    """Print the tables, draw the plot."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--plots", type=Path, metavar="FOLDER", help="draw the plot into this folder")
    folder = arguments.parse_args().plots
    judges = [Judge(*case) for case in CASES]
    table_of_rules(judges)
    table_of_finished_runs(judges)
    table_of_old_targets(judges)
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
        plot_retention(judges[1], folder / "retention.png")


if __name__ == "__main__":
    main()
