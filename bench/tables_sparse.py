"""What sparse synthesis reads: tables and plot of docs/synthesis.md (python -m bench.tables_sparse).

Every number is computed from the solve; nothing is trained and nothing is random. Takes about half a minute;
``--plot FILE`` draws the plot as well (needs matplotlib).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from nitrous_ema.posthoc import Selection, least_amplifying_weights, select_steps, synthesis_report
from nitrous_ema.profile import sigma_rel_to_gamma
from nitrous_ema.synthesis.snapshot_selection import choose_columns

PAIR, WIDE, TRIPLE, GUIDED = (0.05, 0.10), (0.06, 0.16), (0.03, 0.10, 0.25), (0.02, 0.05, 0.16)
TOLERANCES = (1e-2, 1e-3, 1e-4)
STEPS = 2000
CASES = (
    (PAIR, (0.08,)),
    (PAIR, (0.15,)),
    (PAIR, tuple(np.linspace(0.05, 0.15, 11))),
    (PAIR, tuple(np.linspace(0.05, 0.25, 21))),
    (WIDE, tuple(np.linspace(0.05, 0.25, 21))),
    (TRIPLE, tuple(np.geomspace(0.03, 0.25, 11))),
    (GUIDED, tuple(np.geomspace(0.015, 0.25, 11))),
)
ALONE = (((0.10,), (0.08,)),)  # one profile, as many track: not in the plot
BOUGHT = ((PAIR, (0.02, 0.03)), (TRIPLE, (0.015, 0.02, 0.04)), (GUIDED, (0.015, 0.03, 0.1)))


def selection(steps: int, tracked: Sequence[float], wanted: Sequence[float], tolerance: float) -> Selection:
    """The choice among even steps, for averages that end at the last one."""
    gammas = sigma_rel_to_gamma(tracked)
    return select_steps(np.arange(1, steps + 1), gammas, steps, sigma_rel_to_gamma(wanted), tolerance=tolerance)


def table_of_columns(steps: int = STEPS) -> list[str]:
    """Columns read: steps chosen times profiles, and the bound on those of any set of whole steps."""
    rows = [
        f"| tracked; wanted | of | {' | '.join(f'{each:.0e}' for each in TOLERANCES)} | error of all {steps} steps |",
        "|---|---|---|---|---|---|",
    ]
    for tracked, wanted in CASES + ALONE:
        choices = [selection(steps, tracked, wanted, tolerance) for tolerance in TOLERANCES]
        columns = [f"{len(tracked) * each.places.size} ({len(tracked) * each.lower_bound})" for each in choices]
        of_all = f"{choices[0].profile_error_of_all.max():.1e}"
        rows.append(f"| {named(tracked, wanted)} | {steps * len(tracked)} | {' | '.join(columns)} | {of_all} |")
    return rows


def table_of_amplification(steps: int = STEPS) -> list[str]:
    """What the rest of the tolerance buys: amplification of rounding, and error, before and after."""
    rows = [
        "| tracked; wanted together | tolerance | steps | length | least error, its amplification | as synthesized |",
        "|---|---|---|---|---|---|",
    ]
    for tracked, wanted in BOUGHT:
        for tolerance in TOLERANCES[:2]:
            chosen = selection(steps, tracked, wanted, tolerance)
            t = np.arange(1, steps + 1)[chosen.places].astype(float)
            gammas, gammas_r = sigma_rel_to_gamma(tracked), sigma_rel_to_gamma(wanted)
            asked = (np.repeat(t, gammas.size), np.tile(gammas, t.size), np.full(gammas_r.size, t[-1]), gammas_r)
            within = np.hypot(chosen.profile_error_of_all, tolerance)
            report = synthesis_report(*asked, weights=least_amplifying_weights(*asked, within=within))
            for m, length in enumerate(wanted):
                plain = f"{chosen.profile_error[m]:.1e}, {chosen.weight_l2[m]:.3g}"
                bought = f"{report.profile_error[m]:.1e}, {report.weight_l2[m]:.3g}"
                head = f"{named(tracked, wanted)} | {tolerance:.0e} | {t.size}" if m == 0 else " | | "
                rows.append(f"| {head} | {length:g} | {plain} | {bought} |")
    return rows


def seconds_to_choose(steps: int = 4000) -> list[float]:
    """CPU time of a whole choice, weights included, at each tolerance."""
    tracked, wanted = CASES[3]
    gammas, seconds = tuple(sigma_rel_to_gamma(tracked)), []
    for tolerance in TOLERANCES:
        began = time.process_time()
        gammas_r = sigma_rel_to_gamma(wanted).tolist()
        choose_columns(range(1, steps + 1), [gammas] * steps, steps, gammas_r, tolerance=tolerance)
        seconds.append(time.process_time() - began)
    return seconds


def named(tracked: Sequence[float], wanted: Sequence[float]) -> str:
    """One cell."""
    listed = ", ".join(f"{length:g}" for length in wanted)
    lengths = listed if len(wanted) <= 3 else f"{len(wanted)} from {wanted[0]:g} to {wanted[-1]:g}"
    return f"{', '.join(f'{length:g}' for length in tracked)}; {lengths}"


def plot(path: Path, steps: int = STEPS, points: int = 13) -> None:
    """Error against steps read, as a picture whose bytes depend on nothing but the numbers."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context({"svg.hashsalt": "sparse", "svg.fonttype": "none"}):
        figure = Figure(figsize=(7, 4.2), layout="constrained")
        axes = figure.add_subplot()
        for (tracked, wanted), color in zip((CASES[2], CASES[5]), ("#1764ab", "#c2571a"), strict=True):
            tolerances = 10 ** np.linspace(-1, -4, points)
            choices = [selection(steps, tracked, wanted, float(each)) for each in tolerances]
            read, bounds = ([getattr(c, name) for c in choices] for name in ("places", "lower_bound"))
            errors = [c.profile_error.max() for c in choices]
            name = f"{tracked}, {wanted[0]:g} to {wanted[-1]:g}"
            axes.loglog([len(each) for each in read], errors, "o-", markersize=4, color=color, label=name)
            axes.loglog(bounds, tolerances, ":", color=color, label="tolerance that no fewer meet")
            axes.loglog(*evenly(steps, tracked, wanted), "--", color=color, alpha=0.5, label="evenly spaced steps")
        axes.set(xlabel=f"steps read, of {steps}", ylabel="worst relative profile error")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
        figure.savefig(path, dpi=100, metadata={"Date": None} if path.suffix == ".svg" else None)


def evenly(steps: int, tracked: Sequence[float], wanted: Sequence[float]) -> tuple[list[int], list[float]]:
    """Numbers of evenly spaced steps, and the worst error of each."""
    gammas, gammas_r = sigma_rel_to_gamma(tracked), sigma_rel_to_gamma(wanted)
    counts = [int(n) for n in np.unique(np.geomspace(2, steps / 5, 16).astype(int))]
    errors = []
    for count in counts:
        t = np.unique(np.linspace(steps / count, steps, count).round())
        asked = np.repeat(t, gammas.size), np.tile(gammas, t.size), np.full(gammas_r.size, t[-1]), gammas_r
        errors.append(float(synthesis_report(*asked).profile_error.max()))
    return counts, errors


def main() -> None:
    """Print the tables, draw the plot."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--plot", type=Path, metavar="FILE", help="draw the plot into this file (.svg, .png)")
    path = arguments.parse_args().plot
    print("\n".join([*table_of_columns(), "", *table_of_amplification()]))
    print(f"\nchoosing from 4000 steps for {len(CASES[3][1])} lengths: {max(seconds_to_choose()):.2g} s of CPU time")
    if path:
        plot(path)


if __name__ == "__main__":
    main()
