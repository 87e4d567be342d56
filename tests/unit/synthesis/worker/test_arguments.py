from __future__ import annotations

import pytest

from nitrous_ema._base.options import parse_steps
from nitrous_ema.synthesis.worker.arguments import parse_arguments

REQUIRED = ["snapshots", "--sigma-rel", "0.1", "--out", "out"]


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("100", [100]),
        ("100,200,...,500", [100, 200, 300, 400, 500]),
        ("500, 300,...,100", [500, 300, 100]),
        ("7,7,8", [7, 8]),
        ("1e3", [1000]),
        (" all ", "all"),
    ],
)
def test_steps_are_read_as_lengths_are(text, steps):
    assert parse_steps(text) == steps


@pytest.mark.parametrize("text", ["bfloat16", "bf16", "torch.bfloat16"])
def test_types_have_their_usual_names(text):
    assert parse_arguments([*REQUIRED, "--dtype", text], "worker").dtype == "bfloat16"


def test_excluded_steps_are_lists_as_everywhere():
    assert parse_arguments([*REQUIRED, "--exclude", "100,200", "--exclude", "7"], "worker").exclude == (100, 200, 7)


@pytest.mark.parametrize("text", ["", "x", "1.5", "-1", "100,all", "1,2,...", "0,1,...,1000000"])
def test_lists_that_are_not_steps_are_refused(text):
    with pytest.raises(ValueError, match=r"number|step"):
        parse_steps(text)


@pytest.mark.parametrize(
    ("arguments", "steps"),
    [
        ([], None),
        (["--step", "200", "--step", "100,200"], (200, 100)),
        (["--step", "200", "--step", "all"], "all"),
    ],
)
def test_several_step_options_add_up(arguments, steps):
    assert parse_arguments([*REQUIRED, *arguments], "worker").steps == steps


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tracked-sigma-rel", "0.05", "--run", "r"], "has no runs"),
        (["--tracked-gamma", "5", "--follow"], "does not record when it is complete"),
        (["--follow", "--dry-run"], "cannot plan future snapshots"),
        (["--idle", "5"], "--idle requires --follow"),
        (["--follow", "--idle", "0"], "above 0"),
        (["--threads", "0"], "argument --threads: '0': expected a whole number, at least 1"),
        (["--threads", "1.5"], "argument --threads: '1.5': expected a whole number, at least 1"),
        (["--follow", "--look-every", "-1"], "above 0"),
        (["--part", "5/4"], "is not a part"),
        (["--step", "1.5"], "is not a step"),
    ],
)
def test_options_that_contradict_each_other_are_wrong_usage(arguments, message, capsys):
    with pytest.raises(SystemExit) as e:
        parse_arguments([*REQUIRED, *arguments], "worker")
    assert e.value.code == 2
    assert message in capsys.readouterr().err
