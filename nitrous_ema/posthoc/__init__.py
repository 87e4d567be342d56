"""All that can be computed before a snapshot is read: public names, each from the module that defines it.

``solve_weights`` gives the average of any length as a weighted sum of snapshots, ``synthesis_report`` says how good
that is, ``select_steps`` (``select_mixed_steps`` where snapshots differ in their profiles) finds the fewest snapshots
that are good enough, ``least_amplifying_weights`` those weights that are good enough and amplify rounding least, and
``retain`` the snapshots worth keeping.
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
