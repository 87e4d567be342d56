"""The mathematics of post-hoc EMA: weights of snapshots, their errors, and which snapshots to read or to keep.

Read ``least_squares.py`` first: every other module here builds on its fit per interval between snapshots.

- ``solve_weights`` returns the weights with which snapshots sum to an average of any length.
- ``synthesis_report`` returns the profile error and the rounding error of this sum.
- ``select_steps`` finds the fewest snapshots within a tolerance; ``select_mixed_steps`` does so for snapshots with
  different profiles.
- ``least_amplifying_weights`` returns the weights within a tolerance that amplify rounding least.
- ``retain`` chooses the snapshots to keep after training.
"""

from __future__ import annotations

from nitrous_ema.posthoc.least_squares import solve_weights
from nitrous_ema.posthoc.mixed_profiles import select_mixed_steps
from nitrous_ema.posthoc.pruning import Retention, retain
from nitrous_ema.posthoc.regularization import least_amplifying_weights
from nitrous_ema.posthoc.report import SynthesisReport, synthesis_report
from nitrous_ema.posthoc.selection import Selection, select_steps

__all__ = [
    "Retention",
    "Selection",
    "SynthesisReport",
    "least_amplifying_weights",
    "retain",
    "select_mixed_steps",
    "select_steps",
    "solve_weights",
    "synthesis_report",
]
