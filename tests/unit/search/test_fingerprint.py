from __future__ import annotations

import importlib
import subprocess
import sys
import textwrap
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from nitrous_ema.search.fingerprint import OWN_STATE, differences, fingerprint

ROOT = Path(__file__).resolve().parents[3]
BEFORE = """
import functools
import torch
from dataclasses import dataclass

COUNT, NAMES, CONFIG, DATA = 5, ["a", "b"], {"scale": 2.0, "deep": [1, (2, 3)]}, torch.zeros(3)
SET = {"s", "t", "u"}

@dataclass
class Options:
    steps: int = 18

options = Options()

def helper(x, weight=1.0):
    return COUNT * x * weight

class Metric:
    scale = 1.5
    def __init__(self, offset=0.25):
        self.offset, self.history = offset, []
    def __call__(self, model):
        return self.value(model) + self.offset
    def value(self, model):
        return helper(model) * self.scale
    @torch.no_grad()
    def decorated(self, model):
        return self.value(model)
    def unused(self):
        return 1

def plain(model):
    return helper(model) + options.steps

def nested(model):
    return [sum(COUNT for _ in NAMES) for _ in range(3)] if model in {"p", "q", "r"} else SET

def default(model, *, steps=18):
    return CONFIG["scale"] * steps

def closure(count):
    def inner(model):
        return count + DATA.sum()
    return inner

@torch.no_grad()
def without_gradients(model):
    return helper(model)

def attempts(model):
    try:
        a = 1
    finally:
        a = 2
    return a

def makes(model):
    return Metric()(model)

evaluations = {
    "plain": plain, "nested": nested, "default": default, "closure": closure(3), "callable": Metric(),
    "method": Metric().value, "decorated": Metric().decorated, "without_gradients": without_gradients,
    "partial": functools.partial(default, steps=20), "lambda": lambda model: helper(model) + 1, "makes": makes,
    "calls object": lambda model, metric=Metric(): metric(model), "attempts": attempts,
}
"""


def evaluations(text: str) -> dict[str, object]:
    scope: dict[str, object] = {"__name__": "__main__"}
    exec(compile(textwrap.dedent(text), "<cell>", "exec", dont_inherit=True), scope)
    return scope["evaluations"]


def changed(old: str, new: str) -> set[str]:
    """The evaluations whose fingerprints differ once a piece of the text is replaced."""
    assert old in BEFORE
    before, after = evaluations(BEFORE), evaluations(BEFORE.replace(old, new))
    return {name for name in before if differences(fingerprint(before[name]), fingerprint(after[name]))}


HELPER = {"plain", "callable", "method", "decorated", "without_gradients", "lambda", "calls object", "makes"}


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("return COUNT * x * weight", "return COUNT + x * weight", HELPER),
        ("x, weight=1.0", "x, weight=2.0", HELPER),
        ('"s", "t"', '"s", "v"', {"nested"}),
        ('"p", "q"', '"p", "v"', {"nested"}),
        ("COUNT, NAMES, CONFIG, DATA = 5", "COUNT, NAMES, CONFIG, DATA = 6", HELPER | {"nested"}),
        ('["a", "b"]', '["a", "c"]', {"nested"}),
        ("(2, 3)", "(2, 4)", {"default", "partial"}),
        ("steps: int = 18", "steps: int = 19", {"plain"}),
        ("*, steps=18", "*, steps=19", {"default", "partial"}),
        ("steps=20", "steps=21", {"partial"}),
        ("closure(3)", "closure(4)", {"closure"}),
        ("offset=0.25", "offset=0.5", {"callable", "calls object", "makes"}),
        ("scale = 1.5", "scale = 1.25", {"callable", "method", "decorated", "calls object", "makes"}),
        (
            "helper(model) * self.scale",
            "helper(model) / self.scale",
            HELPER - {"plain", "lambda", "without_gradients"},
        ),
        ("range(3)", "range(4)", {"nested"}),
        ("helper(model) + 1", "helper(model) + 2", {"lambda"}),
        ("torch.zeros(3)", "[0.0]", {"closure"}),
        ("    finally:\n        a = 2", "    except ValueError:\n        a = 2", {"attempts"}),
    ],
)
def test_change_of_what_a_result_depends_on_is_a_difference(old, new, expected):
    assert changed(old, new) == expected


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("import torch", "import torch  # a comment\n\n"),
        ("torch.zeros(3)", "torch.ones(3)"),  # counts by its type
        ("return COUNT * x * weight", "return  (COUNT * x * weight)"),
        ("        return 1\n", "        return 2\n"),  # a method that nothing calls; see below
    ],
)
def test_what_a_result_does_not_depend_on_is_no_difference(old, new):
    assert changed(old, new) <= {"makes"}  # of a class that is only named, all methods count


def test_functions_differ_from_one_another():
    found = [tuple(fingerprint(each).items()) for each in evaluations(BEFORE).values()]
    assert len(set(found)) == len(found)


def test_fingerprint_is_the_same_in_another_process_and_names_its_parts(tmp_path):
    (tmp_path / "scripted.py").write_text(
        BEFORE + "from nitrous_ema.search.fingerprint import fingerprint\n"
        "print({name: fingerprint(each) for name, each in evaluations.items()})\n"
    )
    environments = [{"PYTHONPATH": str(ROOT), "PYTHONHASHSEED": seed, "PATH": ""} for seed in ("1", "2")]
    command = [sys.executable, tmp_path / "scripted.py"]
    runs = [
        subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=100, env=each)
        for each in environments
    ]
    texts = {run.stdout for run in runs}
    assert len(texts) == 1
    assert "evaluate: helper: COUNT" in texts.pop()


def test_functions_of_the_users_modules_count(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    found = []
    for number in (1, 2):
        (tmp_path / f"my_metric_{number}.py").write_text(f"def loss(model):\n    return {number}\n")
        module = importlib.import_module(f"my_metric_{number}")
        scope = {"metrics": module}
        exec("def evaluate(model):\n    return metrics.loss(model)", scope)
        found.append(fingerprint(scope["evaluate"]))
    assert "evaluate: metrics.loss" in differences(*found)


@dataclass
class Slotted:
    __slots__ = ("count",)
    count: int


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (1, 2), (1, 1.0), (1, True), ("a", b"a"), (None, 0), ([1], (1,)), ({1}, {2}), ({"a": 1}, {"a": 2}),
        (np.float32(1), np.float32(2)), (torch.float32, torch.float16), (torch.device("cpu"), torch.device("meta")),
        (Path("a"), Path("b")), (Namespace(a=1), Namespace(a=2)), (Slotted(1), Slotted(2)),
        (torch.zeros(1), np.zeros(1)), ([len], [max]), (len, max),
    ],
)  # fmt: skip
def test_values_of_closures_count(one, other):
    def closing_over(value):
        return lambda model: value

    assert differences(fingerprint(closing_over(one)), fingerprint(closing_over(other))) == ["evaluate: value"]


def test_recursion_and_cycles_end():
    nested: list[object] = []
    nested.append(nested)

    class Cyclic:
        def __init__(self):
            self.own = self

        def __call__(self, model):
            return self.own(model) if nested else again(model)

    def again(model):
        return again(model) + Cyclic()(model)

    assert fingerprint(Cyclic()).keys() >= {"evaluate", "evaluate: own", "evaluate: again"}


def test_state_of_the_evaluations_is_not_compared():
    count, calls = 0, []

    def evaluate(model):
        nonlocal count
        count += 1
        calls.append(model)

    before = fingerprint(evaluate)
    evaluate(1)
    after = fingerprint(evaluate)
    assert differences(before, after) == ["evaluate: calls", "evaluate: count"]
    recorded = {name: OWN_STATE if before.get(name) != digest else digest for name, digest in after.items()}
    evaluate(2)
    assert differences(recorded, fingerprint(evaluate)) == []
    assert differences({}, before) == sorted(before)


def test_property_is_not_run_and_its_code_counts():
    def make(value):
        class Metric:
            @property
            def data(self):
                raise AssertionError("a property may load a data set")

            def __call__(self, model):
                return self.data + value

        return Metric()

    assert "evaluate: data" in fingerprint(make(1))
    assert differences(fingerprint(make(1)), fingerprint(make(2))) == ["evaluate: value"]
