"""Arguments of the EMA classes: each mistake is one clear error."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from nitrous_ema.averaging.config import EMAConfig, profiles
from nitrous_ema.posthoc.keep_rules import KeepAll, KeepBytes, KeepCount
from nitrous_ema.profile import sigma_rel_to_gamma


def test_default_lengths_are_five_and_ten_percent():
    assert EMAConfig().averaging().sigma_rels == (0.05, 0.10)


def test_lengths_and_exponents_are_two_names_for_the_same_profiles():
    gammas = tuple(sigma_rel_to_gamma([0.05, 0.28]))
    assert profiles((0.05, 0.28), None) == (gammas, (0.05, 0.28))
    assert profiles(None, gammas) == (gammas, (pytest.approx(0.05), pytest.approx(0.28)))


@pytest.mark.parametrize(
    "given",
    [[0.05, 0.1], (x for x in (0.05, 0.1)), np.array([0.05, 0.1]), torch.tensor([0.05, 0.1], dtype=torch.float64)],
)
def test_lengths_may_come_in_any_sequence(given):
    assert profiles(given, None)[1] == (0.05, 0.1)


@pytest.mark.parametrize("sigma_rel", [0.0, -0.05, 12**-0.5, 0.3, math.nan, math.inf])
def test_length_outside_its_domain_is_refused(sigma_rel):
    with pytest.raises(ValueError, match=r"sigma_rel has .*; expected numbers greater than 0 and less than 0.2886"):
        EMAConfig(sigma_rels=(0.05, sigma_rel)).averaging()


@pytest.mark.parametrize("gamma", [0.0, -1.0, math.nan, math.inf])
def test_exponent_outside_its_domain_is_refused(gamma):
    with pytest.raises(ValueError, match=r"gammas are .*; expected exponents greater than 0"):
        EMAConfig(gammas=(7.0, gamma)).averaging()


def test_both_lengths_and_exponents_are_refused():
    with pytest.raises(ValueError, match="Both sigma_rels and gammas"):
        EMAConfig(sigma_rels=(0.05,), gammas=(7.0,)).averaging()


@pytest.mark.parametrize("given", [{"sigma_rels": ()}, {"gammas": ()}])
def test_no_length_at_all_is_refused(given):
    with pytest.raises(ValueError, match="Neither sigma_rels nor gammas"):
        EMAConfig(**given).averaging()


def test_neither_is_refused_where_one_is_needed():
    with pytest.raises(ValueError, match="Neither sigma_rels nor gammas"):
        profiles(None, None)


@pytest.mark.parametrize("given", [{"sigma_rels": (0.05, 0.05)}, {"gammas": (7.0, 8.0, 7.0)}])
def test_equal_profiles_are_refused(given):
    with pytest.raises(ValueError, match="Two profiles are equal"):
        EMAConfig(**given).averaging()


@pytest.mark.parametrize("given", [0.05, ["a"], 7])
def test_lengths_that_are_no_numbers_are_refused(given):
    with pytest.raises(TypeError, match=r"sigma_rels is .*; expected a sequence of numbers"):
        EMAConfig(sigma_rels=given).averaging()


@pytest.mark.parametrize("every", [1000, 1e10, 1])
def test_snapshots_may_be_as_rare_as_a_float_says(every):
    assert EMAConfig(checkpoint_every_num_steps=every).averaging().checkpoint_every_steps == every


def test_manual_takes_no_snapshot_by_itself():
    assert EMAConfig(checkpoint_every_num_steps="manual").averaging().checkpoint_every_steps is None


@pytest.mark.parametrize("every", [0, -1, 2.5, math.nan, math.inf, "never", None])
def test_odd_intervals_between_snapshots_are_refused(every):
    with pytest.raises(ValueError, match=r"checkpoint_every_num_steps is .* or 'manual'"):
        EMAConfig(checkpoint_every_num_steps=every)


@pytest.mark.parametrize(("keep", "rule"), [("all", KeepAll()), (32, KeepCount(32)), ("1GB", KeepBytes("1GB"))])
def test_what_to_keep_may_be_said_in_short(keep, rule):
    assert EMAConfig(keep=keep).keeping() == rule


@pytest.mark.parametrize("keep", [0, "none", "32"])
def test_odd_numbers_to_keep_are_refused(keep):
    with pytest.raises(ValueError, match=r"keep is|count is 0"):
        EMAConfig(keep=keep)


def test_what_is_no_rule_is_refused():
    with pytest.raises(TypeError, match=r"keep is 1\.05; expected 'all'"):
        EMAConfig(keep=1.05)


@pytest.mark.parametrize("dtype", [torch.int32, torch.complex64, torch.float8_e4m3fn, "float16", None])
def test_unknown_type_of_snapshots_is_refused(dtype):
    with pytest.raises(ValueError, match=r"checkpoint_dtype is .*; expected one of torch.float64, torch.float32"):
        EMAConfig(checkpoint_dtype=dtype)
