"""Choose which snapshots to read, and with which weights: the part of a plan that works on numbers alone.

``plan_synthesis`` in ``plan`` passes the candidates: the snapshots of the lineage up to the target step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nitrous_ema.posthoc import Selection, least_amplifying_weights, select_mixed_steps, solve_weights

DEFAULT_TOLERANCE = 1e-3
"""Relative profile error that reading fewer snapshots may add by default."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ColumnSelection:
    """The columns to read, ascending in time, and their weights."""

    places: tuple[tuple[int, int], ...]
    """Index of each column's snapshot among the candidates, and index of its profile in that snapshot."""
    t: NDArray[np.float64]
    """Training time of each column."""
    gamma: NDArray[np.float64]
    """Exponent of each column."""
    weights: NDArray[np.float64]
    """Shape [columns, outputs]; each column has a weight that is not 0."""
    least_error_l2: NDArray[np.float64]
    """``|w|_2`` of the weights of least error, per output."""
    steps: Selection
    """The selection of snapshots, with its lower bound."""


def choose_columns(
    t: Sequence[float], gammas: Sequence[Sequence[float]], t_r: float, gammas_r: Sequence[float], *, tolerance: float
) -> ColumnSelection:
    """Choose the fewest snapshots that give all outputs within a tolerance, then solve for their weights.

    The squared error of each output exceeds that with all snapshots by at most ``tolerance**2``. Tolerance that the
    choice of snapshots leaves over is spent on weights of smaller norm, but only for outputs whose norm is above 1.

    Args:
        t: Training times of the candidate snapshots, ascending, up to ``t_r``.
        gammas: Exponents of each candidate's profiles.
        t_r: Training time at which the averages end.
        gammas_r: Exponents of the averages.
        tolerance: Relative profile error that may be added, >= 0. 0 takes all snapshots and the least error.

    Raises:
        ValueError: As ``select_steps``.
    """
    selection = select_mixed_steps(t, gammas, t_r, gammas_r, tolerance=tolerance)
    places = [(int(step), profile) for step in selection.places for profile in range(len(gammas[step]))]
    t_i = np.array([t[step] for step, _ in places], dtype=np.float64)
    gamma_i = np.array([gammas[step][profile] for step, profile in places], dtype=np.float64)
    outputs = np.full(len(gammas_r), t_r, dtype=np.float64), np.array(gammas_r, dtype=np.float64)
    if tolerance > 0:
        within = np.hypot(selection.profile_error_of_all, tolerance)
        weights = least_amplifying_weights(t_i, gamma_i, *outputs, within=within)
    else:
        weights = solve_weights(t_i, gamma_i, *outputs)
    # A column costs as much to read as a model. Where a requested length is tracked, all weights but one are exactly 0.
    needed = np.flatnonzero(np.any(weights != 0.0, axis=1))
    return ColumnSelection(
        places=tuple(places[column] for column in needed),
        t=t_i[needed],
        gamma=gamma_i[needed],
        weights=weights[needed],
        least_error_l2=selection.weight_l2,
        steps=selection,
    )
