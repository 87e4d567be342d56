from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from nitrous_ema.synthesis.worker.output_names import OutputNames, absolute

LENGTHS = [(0.07, 11.5), (0.1, 6.94)]


@dataclass
class At:
    step: int
    t: float = 0.0
    run: str = "r1"


def names(out, format=None, steps=(500,)):
    paths = OutputNames(out, format).of_all([At(step, step * 64) for step in steps], LENGTHS)
    return [str(path) for of_step in paths for path in of_step]


@pytest.mark.parametrize(
    ("out", "format", "first"),
    [
        ("out", None, "out/step-500-sigma-0.07.safetensors"),
        ("out", "pt", "out/step-500-sigma-0.07.pt"),
        ("a{{b}}", None, "a{b}/step-500-sigma-0.07.safetensors"),
        ("out/{run}/step-{step}-sigma-{sigma_rel}.pt", None, "out/r1/step-500-sigma-0.07.pt"),
        ("{step:06d}-{gamma:.1f}-{t}.safetensors", "safetensors", "000500-11.5-32000.safetensors"),
        ("{{{sigma_rel:.3f}}}.pt", None, "{0.070}.pt"),
    ],
)
def test_out_is_a_folder_or_a_template(out, format, first):
    assert names(out, format)[0] == first


@pytest.mark.parametrize(
    ("out", "format", "message"),
    [
        ("", None, "is empty"),
        (absolute(""), None, "is empty"),
        ("out/{sigma}.pt", None, "unknown field {sigma}"),
        ("out/{}.pt", None, "unknown field"),
        ("out/{step.real}.pt", None, "unknown field"),
        ("out/{step", None, "braces"),
        ("out/step-{step}", None, "expected to end in .safetensors or .pt"),
        ("out/{step}.pt", "safetensors", "expected to end in .safetensors"),
        ("out/{run:d}.pt", None, "fits the field"),
        ("out/average.safetensors", None, "expected a folder, or a name with a field"),
    ],
)
def test_invalid_template_is_refused(out, format, message):
    with pytest.raises(ValueError, match="--out") as e:
        OutputNames(out, format)
    assert message in str(e.value)


@pytest.mark.parametrize(
    ("out", "steps"), [("{step}.pt", (1,)), ("{sigma_rel}.pt", (1, 2)), ("{step}-{sigma_rel:.0f}.pt", (1,))]
)
def test_template_that_gives_two_averages_one_name_is_refused(out, steps):
    with pytest.raises(ValueError, match="the same name"):
        names(out, steps=steps)


def test_relative_template_means_the_same_in_any_working_directory(tmp_path, monkeypatch):
    folder = tmp_path / "with {braces}"
    folder.mkdir()
    monkeypatch.chdir(folder)
    assert names(absolute("out"))[0] == str(folder / "out" / "step-500-sigma-0.07.safetensors")
    assert names(absolute(Path("{step}-{sigma_rel}.pt")))[0] == str(folder / "500-0.07.pt")
    assert absolute("/a/{step}.pt") == "/a/{step}.pt"
