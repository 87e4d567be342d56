"""The definition as the oracle, end to end: weights that are one-hot in time make an average its own profile.

The weights at update i are the i-th unit vector, so element i of any average is the share of update i in it: exactly
the integral of the profile over the time that the update stands for.
"""

from __future__ import annotations

import tempfile

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from nitrous_ema import PostHocEMA
from nitrous_ema.profile import sigma_rel_to_gamma
from nitrous_ema.synthesis import synthesize

PROFILES = [(0.1,), (0.05, 0.1), (0.03, 0.1, 0.25), (0.06, 0.16)]
UPDATES = 80


class OneHot(nn.Module):
    """A model whose weights at update i are the i-th unit vector."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(UPDATES, dtype=torch.float64))

    def train_to(self, update: int) -> None:
        with torch.no_grad():
            self.weight.zero_()[update] = 1.0


def exact_shares(gamma, t):
    """The profile of Eq. 121 that ends at the last of these times, integrated over the time of each update."""
    return np.diff((t / t[-1]) ** (gamma + 1), prepend=0.0)


def distance(found, wanted, t, gamma):
    """L2 distance of two profiles that are constant over each update's time, relative to the norm of ``wanted``."""
    span = np.diff(t, prepend=0.0) / t[-1]
    return np.sqrt(((found - wanted) ** 2 / span).sum() * (2 * gamma + 1)) / (gamma + 1)


def trained(folder, sigma_rels, t_deltas, checkpoints):
    """An EMA of a training with these clock advances and with snapshots after these updates."""
    model = OneHot()
    options = {"checkpoint_every_num_steps": "manual", "checkpoint_dtype": torch.float64, "update_every": 1}
    ema = PostHocEMA(model, sigma_rels=sigma_rels, checkpoint_folder=folder, **options)
    for update, t_delta in enumerate(t_deltas):
        model.train_to(update)
        ema.update(int(t_delta))
        if update in checkpoints:
            ema.checkpoint()
    return ema


@pytest.mark.filterwarnings(
    "ignore::nitrous_ema.errors.NitrousWarning"
)  # few snapshots, lengths far from the tracked ones
@given(
    sigma_rels=st.sampled_from(PROFILES),
    clock=st.sampled_from(["steps", "images", "tokens"]),
    spacing=st.sampled_from([0.1, 0.4, 1.0]),
    lengths=st.lists(st.floats(0.02, 0.28), min_size=1, max_size=3),
    tolerance=st.sampled_from([0, 1e-3, 1e-2, 0.1]),
    seed=st.integers(0, 2**32),
)
@settings(deadline=None, max_examples=25)
def test_synthesized_average_is_the_requested_profile(sigma_rels, clock, spacing, lengths, tolerance, seed):
    rng = np.random.default_rng(seed)
    t_deltas = {"steps": (1, 2), "images": (32, 4096), "tokens": (10**9, 10**10)}[clock]
    t_deltas = rng.integers(*t_deltas, UPDATES)
    checkpoints = {*np.flatnonzero(rng.random(UPDATES) < spacing).tolist(), int(rng.integers(UPDATES // 2, UPDATES))}
    with tempfile.TemporaryDirectory() as folder:
        ema = trained(folder, sigma_rels, t_deltas, checkpoints)
        made = synthesize(folder, sigma_rels=lengths, tolerance=tolerance, dtype=np.float64)
        public = ema.synthesize_ema_model(sigma_rel=lengths[0], tolerance=tolerance).ema_model.weight.numpy()
    updates = max(checkpoints) + 1
    t, plan = np.cumsum(t_deltas)[:updates].astype(np.float64), made.plan
    gammas = sigma_rel_to_gamma(lengths)
    assert (plan.report.profile_error <= np.hypot(plan.profile_error_of_all, tolerance) * (1 + 1e-6) + 1e-12).all()
    for shares, gamma, predicted, of_all in zip(
        (*made.flats, public), (*gammas, gammas[0]), (*plan.report.profile_error, np.inf),
        (*plan.profile_error_of_all, plan.profile_error_of_all[0]), strict=True
    ):  # fmt: skip
        off = distance(shares[:updates], exact_shares(gamma, t), t, gamma)
        rounding = 1e-13 * (1 + plan.least_error_l2.max())
        assert off <= min(predicted * (1 + 1e-6), np.hypot(of_all, tolerance) * (1 + 1e-6)) + rounding
        assert shares.sum() == pytest.approx(1.0, abs=100 * rounding)
        assert not shares[updates:].any()
