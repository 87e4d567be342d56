"""Which profiles to track for which lengths: two tables of docs/retention.md (python -m bench.tables_profiles).

The first, for each pair or triple of tracked lengths and each range of wanted ones: the largest relative profile error
over 40 lengths, and the largest amplification of rounding (root of the sum of the squared weights), with the snapshots
at four cadences: 24 and 47 per tenfold of training, and 20 and 100 evenly spaced.

The second, for the same and other profiles: which lengths come out within 1 % and within 5 %, and within 1 % where the
rounding of float16 stays below a thousandth of a weight.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from nitrous_ema.posthoc import synthesis_report
from nitrous_ema.posthoc.coverage import covered_lengths
from nitrous_ema.posthoc.report import rounding_of
from nitrous_ema.profile import sigma_rel_to_gamma

CADENCES = {
    "24 per tenfold": 10 ** (-np.arange(72)[::-1] / 24),
    "47 per tenfold": 10 ** (-np.arange(141)[::-1] / 47),
    "20 even": np.arange(1, 21) / 20,
    "100 even": np.arange(1, 101) / 100,
}
CASES = (
    ((0.05, 0.10), (0.05, 0.15)),
    ((0.05, 0.12), (0.05, 0.15)),
    ((0.05, 0.10), (0.05, 0.25)),
    ((0.06, 0.16), (0.05, 0.25)),
    ((0.05, 0.20), (0.05, 0.25)),
    ((0.05, 0.25), (0.05, 0.25)),
    ((0.05, 0.08, 0.20), (0.05, 0.25)),
    ((0.03, 0.10, 0.25), (0.03, 0.25)),
    ((0.03, 0.06, 0.16), (0.03, 0.25)),
    ((0.02, 0.05, 0.16), (0.015, 0.25)),
    ((0.015, 0.035, 0.14), (0.015, 0.25)),
    ((0.025, 0.07), (0.02, 0.10)),
    ((0.05, 0.10), (0.015, 0.05)),
)
TRACKED = (
    (0.05, 0.10),
    (0.03, 0.10),
    (0.02, 0.07),
    (0.05, 0.12),
    (0.05, 0.15),
    (0.05, 0.20),
    (0.05, 0.25),
    (0.06, 0.16),
    (0.02, 0.05, 0.10),
    (0.03, 0.06, 0.16),
    (0.05, 0.08, 0.20),
    (0.03, 0.10, 0.25),
    (0.015, 0.035, 0.14),
    (0.02, 0.05, 0.10, 0.20),
)
COVERED_AT = ("47 per tenfold", "20 even", "100 even")
QUIET = 1e-3 / rounding_of("F16")  # an amplification


def cell(tracked: tuple[float, ...], wanted: tuple[float, float], t: np.ndarray) -> str:
    """Largest error and largest amplification."""
    gammas, lengths = sigma_rel_to_gamma(tracked), sigma_rel_to_gamma(np.geomspace(*wanted, 40))
    inputs = np.repeat(t, gammas.size), np.tile(gammas, t.size)
    report = synthesis_report(*inputs, np.full(lengths.size, t[-1]), lengths)
    return f"{report.profile_error.max():.1e} / {report.weight_l2.max():.1f}"


def table_of_errors() -> list[str]:
    """For ranges of wanted lengths."""
    rows = [f"| tracked | wanted | {' | '.join(CADENCES)} |", "|---|---|" + "---|" * len(CADENCES)]
    for tracked, wanted in CASES:
        cells = " | ".join(cell(tracked, wanted, t) for t in CADENCES.values())
        rows.append(f"| {named(tracked)} | {wanted[0]:g} to {wanted[1]:g} | {cells} |")
    return rows


def table_of_coverage() -> list[str]:
    """Lengths that are covered."""
    rows = ["| tracked | snapshots | within 1 % | within 5 % | within 1 % as float16 |", "|---|---|---|---|---|"]
    for tracked in TRACKED:
        for place, cadence in enumerate(COVERED_AT):
            cells = " | ".join(covered(tracked, CADENCES[cadence]))
            rows.append(f"| {'' if place else named(tracked)} | {cadence} | {cells} |")
    return rows


def covered(tracked: Sequence[float], t: np.ndarray) -> list[str]:
    """What comes out well, by each of the limits."""
    gammas = np.atleast_1d(sigma_rel_to_gamma(list(tracked)))
    inputs = np.repeat(t, gammas.size), np.tile(gammas, t.size)
    limits = ((0.01, math.inf), (0.05, math.inf), (0.01, QUIET))
    return [
        "; ".join(_stretch(each.shortest, each.longest) for each in stretches)
        for stretches in covered_lengths(*inputs, float(t[-1]), limits=limits)
    ]


def _stretch(shortest: float, longest: float) -> str:
    """Two digits, rounded into the stretch; one number where that leaves nothing."""
    first, last = (_two_digits(end, way) for end, way in ((shortest, math.ceil), (longest, math.floor)))
    return f"{first:g} to {last:g}" if first < last else f"{math.sqrt(shortest * longest):.2g}"


def _two_digits(number: float, way: Callable[[float], int]) -> float:
    unit = 10.0 ** (math.floor(math.log10(number)) - 1)
    return round(way(number / unit * (1 + 1e-9 * (1 if way is math.floor else -1))) * unit, 6)


def named(tracked: Sequence[float]) -> str:
    """Profiles as the tables have them."""
    return ", ".join(f"{each:g}" for each in tracked)


def main() -> None:
    """Print the tables."""
    print("\n".join([*table_of_errors(), "", *table_of_coverage()]))


if __name__ == "__main__":
    main()
