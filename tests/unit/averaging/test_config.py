"""Arguments of the EMA classes: each mistake is one clear error, and each argument has one definition."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import math
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from nitrous_ema import AsyncPostHocEMA, KarrasEMA, PostHocEMA
from nitrous_ema.averaging.config import AsyncEMAConfig, EMAConfig, resolve_profiles
from nitrous_ema.posthoc.keep_rules import KeepAll, KeepBytes, KeepCount
from nitrous_ema.profile import sigma_rel_to_gamma

ARGUMENTS_PAGE = Path(__file__).parents[3] / "docs" / "arguments.md"
CONFIGS = {PostHocEMA: EMAConfig, AsyncPostHocEMA: AsyncEMAConfig}


def test_default_lengths_are_five_and_ten_percent():
    assert EMAConfig().profiles.sigma_rels == (0.05, 0.10)


def test_lengths_and_exponents_are_two_names_for_the_same_profiles():
    gammas = tuple(sigma_rel_to_gamma([0.05, 0.28]))
    assert resolve_profiles((0.05, 0.28), None) == (gammas, (0.05, 0.28))
    assert resolve_profiles(None, gammas) == (gammas, (pytest.approx(0.05), pytest.approx(0.28)))


@pytest.mark.parametrize(
    "lengths",
    [[0.05, 0.1], (x for x in (0.05, 0.1)), np.array([0.05, 0.1]), torch.tensor([0.05, 0.1], dtype=torch.float64)],
)
def test_lengths_may_come_in_any_sequence(lengths):
    assert resolve_profiles(lengths, None)[1] == (0.05, 0.1)


@pytest.mark.parametrize("sigma_rel", [0.0, -0.05, 12**-0.5, 0.3, math.nan, math.inf])
def test_length_outside_its_domain_is_refused(sigma_rel):
    with pytest.raises(ValueError, match=r"sigma_rels has .*; expected numbers greater than 0 and less than 0.2886"):
        EMAConfig(sigma_rels=(0.05, sigma_rel))


@pytest.mark.parametrize("gamma", [0.0, -1.0, math.nan, math.inf])
def test_exponent_outside_its_domain_is_refused(gamma):
    with pytest.raises(ValueError, match=r"gammas is .*; expected exponents greater than 0"):
        EMAConfig(gammas=(7.0, gamma))


def test_both_lengths_and_exponents_are_refused():
    with pytest.raises(ValueError, match="Both sigma_rels and gammas"):
        EMAConfig(sigma_rels=(0.05,), gammas=(7.0,))


@pytest.mark.parametrize("arguments", [{"sigma_rels": ()}, {"gammas": ()}])
def test_no_length_at_all_is_refused(arguments):
    with pytest.raises(ValueError, match="Neither sigma_rels nor gammas"):
        EMAConfig(**arguments)


def test_neither_is_refused_where_one_is_needed():
    with pytest.raises(ValueError, match="Neither sigma_rels nor gammas"):
        resolve_profiles(None, None)


@pytest.mark.parametrize("arguments", [{"sigma_rels": (0.05, 0.05)}, {"gammas": (7.0, 8.0, 7.0)}])
def test_equal_profiles_are_refused(arguments):
    with pytest.raises(
        ValueError, match=r"(sigma_rels is \(0.05, 0.05\)|gammas is \(7.0, 8.0, 7.0\)): two profiles are equal"
    ):
        EMAConfig(**arguments)


@pytest.mark.parametrize("lengths", [0.05, ["a"], 7])
def test_lengths_that_are_not_numbers_are_refused(lengths):
    with pytest.raises(TypeError, match=r"sigma_rels is .*; expected a sequence of numbers"):
        EMAConfig(sigma_rels=lengths)


@pytest.mark.parametrize("every", [1000, 1e10, 1])
def test_interval_between_snapshots_may_be_a_float(every):
    assert EMAConfig(checkpoint_every_num_steps=every).checkpoint_every_steps == every


def test_manual_takes_no_snapshot_by_itself():
    assert EMAConfig(checkpoint_every_num_steps="manual").checkpoint_every_steps is None


@pytest.mark.parametrize("every", [0, -1, 2.5, math.nan, math.inf, "never", None])
def test_odd_intervals_between_snapshots_are_refused(every):
    with pytest.raises(ValueError, match=r"checkpoint_every_num_steps is .* or 'manual'"):
        EMAConfig(checkpoint_every_num_steps=every)


@pytest.mark.parametrize(("keep", "rule"), [("all", KeepAll()), (32, KeepCount(32)), ("1GB", KeepBytes("1GB"))])
def test_keep_accepts_abbreviations_of_rules(keep, rule):
    assert EMAConfig(keep=keep).retention_rule == rule


@pytest.mark.parametrize("keep", [0, "none", "32"])
def test_odd_numbers_to_keep_are_refused(keep):
    with pytest.raises(ValueError, match="keep is"):
        EMAConfig(keep=keep)


def test_keep_of_an_unsupported_type_is_refused():
    with pytest.raises(TypeError, match=r"keep is 1\.05; expected 'all'"):
        EMAConfig(keep=1.05)


@pytest.mark.parametrize("dtype", [torch.int32, torch.complex64, torch.float8_e4m3fn, "float16", None])
def test_unknown_type_of_snapshots_is_refused(dtype):
    with pytest.raises(ValueError, match=r"checkpoint_dtype is .*; expected one of torch.float64, torch.float32"):
        EMAConfig(checkpoint_dtype=dtype)


@pytest.mark.parametrize("update_every", [0, -1, 1.5, "10", True])
def test_update_every_is_a_positive_integer(update_every):
    with pytest.raises(ValueError, match="update_every is"):
        EMAConfig(update_every=update_every)


def test_update_every_of_numpy_becomes_a_plain_integer():
    assert type(EMAConfig(update_every=np.int64(3)).update_every) is int


@pytest.mark.parametrize("correction", ["geometric", None, 1.0])
def test_unknown_correction_is_refused(correction):
    with pytest.raises(ValueError, match="step_size_correction is"):
        EMAConfig(step_size_correction=correction)


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("max_pending", 0),
        ("max_pending", 1.5),
        ("num_writers", 0),
        ("wait_timeout", 0),
        ("wait_timeout", float("nan")),
        ("on_full", "drop"),
        ("on_error", "ignore"),
        ("read", "live"),
        ("offload", "disk"),
        ("scratch", -1),
        ("scratch", 1.5),
    ],
)
def test_background_argument_outside_its_range_is_named(argument, value):
    with pytest.raises(ValueError, match=f"{argument} is {value!r}"):
        AsyncEMAConfig(**{argument: value})


def test_copy_of_a_config_has_the_lengths_of_an_iterator_that_was_read():
    config = EMAConfig(sigma_rels=(length for length in (0.05, 0.2)), ignore_names=(name for name in ("a",)))
    copy = dataclasses.replace(config, frozen=True)
    assert copy.profiles == config.profiles
    assert copy.ignore_names == ("a",)


# ---- one definition of each argument


def parameters_of(cls: type) -> dict[str, object]:
    """Name and default of each parameter of a class, except ``self`` and the two that are not options."""
    parameters = inspect.signature(cls).parameters.values()
    return {each.name: each.default for each in parameters if each.name not in ("self", "model", "ema_model")}


def fields_of(config: type) -> dict[str, object]:
    """Name and default of each field of a config that a user may set."""
    return {field.name: field.default for field in dataclasses.fields(config) if field.init}


def documented_fields(config: type) -> dict[str, str]:
    """The docstring below each field of a config and its base classes."""
    found: dict[str, str] = {}
    for cls in reversed(config.__mro__[:-1]):
        body = ast.parse(inspect.getsource(cls)).body[0].body
        for statement, following in itertools.pairwise(body):
            if isinstance(statement, ast.AnnAssign) and isinstance(following, ast.Expr):
                found[statement.target.id] = following.value.value
    return found


def documented_arguments(cls: type) -> set[str]:
    """Names in the Args section of a class docstring."""
    section = inspect.getdoc(cls).split("Args:\n", 1)[1].split("\nRaises:", 1)[0]
    return {name for names in re.findall(r"^    (\w[\w, .]*):", section, re.M) for name in names.split(", ")}


def rows_of_the_page(cls: type) -> Iterator[tuple[str, str, str]]:
    """Argument, default and meaning in each row of the table in docs/arguments.md that concerns a class."""
    lines = [line for line in ARGUMENTS_PAGE.read_text().splitlines() if line.startswith("|")]
    head, _, *rows = ([cell.strip() for cell in line[1:-1].split("|")] for line in lines)
    place = head.index(f"default of `{cls.__name__}`")
    for row in rows:
        if row[place] != "–":
            yield row[0].strip("`"), row[place].strip("`"), row[-1]


@pytest.mark.parametrize("cls", CONFIGS)
def test_arguments_have_one_definition(cls):
    """Signature, config, docstrings and the page of arguments list the same names with the same defaults."""
    parameters, fields = parameters_of(cls), fields_of(CONFIGS[cls])
    assert parameters == fields
    documented = documented_fields(CONFIGS[cls])
    assert {name for name in fields if not documented.get(name)} == set()
    rows = list(rows_of_the_page(cls))
    assert [name for name, _, _ in rows] == list(inspect.signature(cls).parameters)
    assert {name: default for name, default, _ in rows if name not in ("model", "ema_model")} == {
        name: repr(default).replace("'", '"') for name, default in parameters.items()
    }
    assert all(meaning for _, _, meaning in rows)


@pytest.mark.parametrize("cls", CONFIGS)
def test_every_argument_reaches_the_configuration(cls, monkeypatch):
    class Reached(Exception):
        pass

    def config(**arguments):
        raise Reached(arguments)

    home, name = sys.modules[cls.__module__], CONFIGS[cls].__name__
    monkeypatch.setattr(home, name, config)
    passed = {name: object() for name in fields_of(CONFIGS[cls])}
    with pytest.raises(Reached) as caught:
        cls(nn.Linear(1, 1), **passed)
    assert caught.value.args[0] == passed


def test_docstring_of_a_class_lists_its_arguments():
    names = {cls: set(inspect.signature(cls).parameters) for cls in (KarrasEMA, PostHocEMA, AsyncPostHocEMA)}
    assert documented_arguments(KarrasEMA) == names[KarrasEMA]
    assert documented_arguments(PostHocEMA) == names[PostHocEMA]
    of_its_own = names[AsyncPostHocEMA] - names[PostHocEMA]
    assert documented_arguments(AsyncPostHocEMA) == {"model", "sigma_rels", "gammas", "..."} | of_its_own


def test_single_average_has_the_defaults_of_several():
    parameters = parameters_of(KarrasEMA)
    assert (parameters.pop("sigma_rel"), parameters.pop("gamma")) == (None, None)
    assert parameters.items() <= parameters_of(PostHocEMA).items()
