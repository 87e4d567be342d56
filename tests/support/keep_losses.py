"""Tracked profiles, and the losses that define which step a retention rule drops."""

from __future__ import annotations

import numpy as np

from nitrous_ema.posthoc import synthesis_report
from nitrous_ema.profile import sigma_rel_to_gamma

PAIR, TRIPLE = (0.05, 0.1), (0.03, 0.1, 0.25)


def gammas_of(sigma_rels):
    return tuple(sigma_rel_to_gamma(sigma_rels).tolist())


def errors(t, sigma_rels, t_r, lengths, normalize="constrain"):
    kept = np.asarray(t, float)
    kept, gammas = kept[kept <= t_r], sigma_rel_to_gamma(sigma_rels)
    inputs = np.repeat(kept, gammas.size), np.tile(gammas, kept.size)
    wanted = np.full(len(lengths), float(t_r)), sigma_rel_to_gamma(lengths)
    return synthesis_report(*inputs, *wanted, normalize=normalize).profile_error


def least_score(t, sigma_rels, lengths, targets, exponent, fixed):
    """Return the drop that the rule is defined by: each drop is tried, with a solve over the remaining steps."""
    scores = {}
    for place in set(range(len(t))) - fixed:
        rest = np.delete(t, place)
        each = [errors(rest, sigma_rels, target, lengths, normalize=None) for target in targets]
        scores[place] = sum((error ** (2 * exponent)).sum() for error in each)
    return min(scores, key=scores.get), scores
