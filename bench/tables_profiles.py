"""Which profiles to track for which lengths: the table of docs/retention.md (python -m bench.tables_profiles).

For each pair or triple of tracked lengths and each range of wanted ones: the largest relative profile error over 40
lengths, and the largest amplification of rounding (root of the sum of the squared weights), with the snapshots at four
cadences: 24 and 47 per tenfold of training, and 20 and 100 evenly spaced.
"""

from __future__ import annotations

import numpy as np

from nitrous_ema.posthoc import synthesis_report
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


def cell(tracked: tuple[float, ...], wanted: tuple[float, float], t: np.ndarray) -> str:
    """Largest error and largest amplification."""
    gammas, lengths = sigma_rel_to_gamma(tracked), sigma_rel_to_gamma(np.geomspace(*wanted, 40))
    inputs = np.repeat(t, gammas.size), np.tile(gammas, t.size)
    report = synthesis_report(*inputs, np.full(lengths.size, t[-1]), lengths)
    return f"{report.profile_error.max():.1e} / {report.weight_l2.max():.1f}"


def main() -> None:
    """Print the table."""
    print("| tracked | wanted |", " | ".join(CADENCES), "|")
    print("|---|---|" + "---|" * len(CADENCES))
    for tracked, wanted in CASES:
        cells = " | ".join(cell(tracked, wanted, t) for t in CADENCES.values())
        print(f"| {', '.join(f'{s:g}' for s in tracked)} | {wanted[0]:g} to {wanted[1]:g} | {cells} |")


if __name__ == "__main__":
    main()
