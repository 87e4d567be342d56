"""What ``inspect`` reports on lengths: the planner's numbers, and sentences on the causes of large errors."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from nitrous_ema.cli import program as cli
from nitrous_ema.posthoc import select_steps
from nitrous_ema.posthoc.coverage import condition, covered_lengths
from nitrous_ema.profile import sigma_rel_to_gamma
from nitrous_ema.synthesis.plan import plan_from_store
from tests.support.old_folders import write_ema_pytorch
from tests.support.small_snapshots import everything_in
from tests.support.snapshot_folders import layout_of, record, run_id, write_run

RECORDS = [record("w", (30,)), record("n", (), "I64", "copied")]
STEPS = range(100, 2001, 100)


def folder_of(root, steps=STEPS, sigma_rels=(0.05, 0.10), dtype="F32", **more):
    layout = layout_of(RECORDS, sigma_rels, dtype)
    write_run(root, layout, steps, copied=lambda step: {"n": np.int64(step).tobytes()}, **more)
    return root


def inspected(capsys, folder, *more):
    status = cli.main(["inspect", str(folder), "--json", *map(str, more)])
    found = json.loads(capsys.readouterr().out)
    assert status == (0 if found["runs"] or found["legacy"] else 3)
    return found


def text_of(capsys, folder, *more):
    assert cli.main(["inspect", str(folder), *map(str, more)]) == 0
    return " ".join(capsys.readouterr().out.split())


# ---- supported lengths


def test_covered_lengths_are_those_of_the_snapshots(tmp_path, capsys):
    found = inspected(capsys, folder_of(tmp_path / "s"))["covered"]
    t, gammas = np.arange(1.0, 21), sigma_rel_to_gamma((0.05, 0.1))
    expected = covered_lengths(np.repeat(t, 2), np.tile(gammas, 20), 20.0)
    for each, stretches in zip(found["within"], expected, strict=True):
        (given,), (stretch,) = each["lengths"], stretches
        assert given == pytest.approx([stretch.shortest, stretch.longest, stretch.weight_l2])
    assert (found["step"], found["snapshots"], found["checkpoint_dtype"]) == (2000, 20, "F32")


def test_rounding_narrows_what_is_covered_if_snapshots_are_stored_coarsely(tmp_path, capsys):
    fine = text_of(capsys, folder_of(tmp_path / "fine"))
    assert "up to 1 % profile error sigma_rel 0.0376 to 0.177" in fine
    assert "rounding error" not in fine
    coarse = inspected(capsys, folder_of(tmp_path / "coarse", dtype="F16"))["covered"]["within"][1]
    (wide,), (narrow,) = coarse["lengths"], coarse["with_little_rounding"]
    assert wide[0] < narrow[0] < 0.05
    assert narrow[2] * 2.1e-4 == pytest.approx(1e-3, rel=0.03)
    assert "with a F16 rounding error of up to 0.001 of a weight" in text_of(capsys, tmp_path / "coarse")


def test_folder_with_too_few_snapshots_supports_the_tracked_lengths_only(tmp_path, capsys):
    assert "up to 1 % profile error sigma_rel 0.05 to 0.05; 0.0" not in (
        out := text_of(capsys, folder_of(tmp_path / "s", [100]))
    )
    assert "tracked sigma_rel 0.05, 0.1" in out
    assert inspected(capsys, tmp_path)["covered"] is None


def test_snapshots_of_other_tensors_do_not_count(tmp_path, capsys):
    """Training went on with a longer vocabulary."""
    longer = layout_of([record("w", (40,)), RECORDS[1]], (0.05, 0.10))
    copied = {"copied": lambda step: {"n": np.int64(step).tobytes()}}
    run = run_id()
    folder_of(tmp_path / "s", range(100, 1001, 100), run=run)
    write_run(tmp_path / "s", longer, range(1100, 2001, 100), run=run, **copied)
    write_run(tmp_path / "alone", longer, range(1100, 2001, 100), **copied)
    lengths = ("--sigma-rel", "0.07,0.15")
    mixed, alone = (inspected(capsys, tmp_path / name, *lengths) for name in ("s", "alone"))
    assert mixed["covered"] == alone["covered"]
    (one,), (other,) = mixed["asked"], alone["asked"]
    note, *warnings = sorted(one.pop("warnings"), key=lambda each: "10 snapshots" not in each)
    assert "'w' is (30,) instead of (40,)" in note
    assert warnings == other.pop("warnings")
    assert {**one, "run": ""} == {**other, "run": ""}


def test_excluded_and_unrelated_snapshots_do_not_count(tmp_path, capsys):
    folder = folder_of(tmp_path / "s", run=run_id(0))
    folder_of(tmp_path / "s", [50], run=run_id(-1))
    covered = inspected(capsys, folder, "--exclude", "100,300", "--exclude", "2000")["covered"]
    assert (covered["step"], covered["snapshots"]) == (1900, 17)


# ---- requested lengths


@pytest.mark.parametrize("given", [("--sigma-rel", "0.03,0.05,...,0.15"), ("--gamma", "7,9,...,15")])
@pytest.mark.parametrize("tolerance", [0, 1e-2])
def test_predictions_are_those_of_the_plan(tmp_path, capsys, given, tolerance):
    folder = folder_of(tmp_path / "s", dtype="F16")
    (found,) = inspected(capsys, folder, *given, "--tolerance", tolerance, "--step", 1500)["asked"]
    option = {"--sigma-rel": "sigma_rels", "--gamma": "gammas"}[given[0]]
    lengths = {"--sigma-rel": [0.03, 0.05, 0.07, 0.09, 0.11, 0.13, 0.15], "--gamma": [7, 9, 11, 13, 15]}[given[0]]
    plan = plan_from_store(folder, step=1500, tolerance=tolerance, **{option: lengths})
    assert (found["steps_read"], found["columns"]) == (list(plan.steps), len(plan.columns))
    assert (found["lower_bound"], found["candidates"]) == (plan.lower_bound, 15)
    assert found["bytes_to_read"] == plan.bytes_to_read
    for field in ("profile_error", "weight_l1", "weight_l2", "rounding"):
        assert [each[field] for each in found["lengths"]] == pytest.approx(list(getattr(plan.report, field)))
    given_back = [each["sigma_rel" if option == "sigma_rels" else "gamma"] for each in found["lengths"]]
    assert given_back == lengths
    read = [each.t for each in plan.columns], [each.gamma for each in plan.columns]
    assert found["condition"] == pytest.approx(condition(*read))
    alone = select_steps(np.arange(100, 1501, 100), plan.columns[0].gamma * 0 + sigma_rel_to_gamma((0.05, 0.1)), 1500,
                         [plan.gammas[0]], tolerance=tolerance)  # fmt: skip
    assert found["lengths"][0]["steps_alone"] == alone.places.size


def test_text_has_the_same_numbers(tmp_path, capsys):
    folder = folder_of(tmp_path / "s", dtype="F16")
    out = text_of(capsys, folder, "--sigma-rel", "0.05,0.08", "--verbose")
    assert "predicted errors at target step 2000, tolerance 0.001:" in out
    assert "of 20 snapshots (at least" in out
    assert "condition number" in out
    assert "rounding (F16)" in out
    assert "0.05 16.97 < 0.0001 % 2.1e-04 < 0.0001 % 1 1" in out
    brief = text_of(capsys, folder, "--sigma-rel", "0.05,0.08")
    assert "0.05 16.97 < 0.0001 % 2.1e-04 0.08" in brief
    assert "condition" not in brief
    assert "at least" not in brief


@pytest.mark.parametrize(("steps", "expected"), [("1000,2000", [1000, 2000]), ("all", list(STEPS))])
def test_averages_may_end_at_several_steps(tmp_path, capsys, steps, expected):
    found = inspected(capsys, folder_of(tmp_path / "s"), "--sigma-rel", "0.05", "--step", steps)["asked"]
    assert [each["step"] for each in found] == expected


def test_accurate_lengths_have_no_warnings(tmp_path, capsys):
    (found,) = inspected(capsys, folder_of(tmp_path / "s"), "--sigma-rel", "0.05,0.06,...,0.12")["asked"]
    assert (found["warnings"], found["causes"]) == ([], [])


@pytest.mark.parametrize(
    ("steps", "sigma_rel", "cause"),
    [
        (
            range(1000, 2001, 100),
            0.25,
            "comes from before the first snapshot (step 1000). Take snapshots earlier in training",
        ),
        (
            [*range(100, 900, 100), *range(1800, 2001, 100)],
            0.2,
            "comes from the gap between steps 800 and 1800. Include a",
        ),
        (STEPS, 0.015, "shorter than the shortest tracked length (0.05), and 20 snapshots are too far apart"),
        ([*range(20, 200, 20), *range(200, 2001, 200)], 0.25, "longer than the longest tracked length (0.1), and 19"),
        ([1000, 1500, 2000], 0.075, "3 snapshots are too few. Take snapshots more often, or track a profile closer"),
    ],
)
def test_causes_of_errors_are_reported_with_a_remedy(tmp_path, capsys, steps, sigma_rel, cause):
    (found,) = inspected(capsys, folder_of(tmp_path / "s", steps), "--sigma-rel", sigma_rel)["asked"]
    (sentence,) = found["causes"]
    assert f"sigma_rel {sigma_rel}: " in sentence
    assert cause in sentence


def test_coarse_storage_is_reported_with_its_remedy(tmp_path, capsys):
    (found,) = inspected(capsys, folder_of(tmp_path / "s", dtype="BF16"), "--sigma-rel", "0.035")["asked"]
    assert any(
        "stored as BF16 is amplified" in each and "Store snapshots as float32" in each for each in found["warnings"]
    )


def test_missing_step_is_not_found_and_bad_lengths_are_usage_errors(tmp_path, capsys):
    folder = str(folder_of(tmp_path / "s"))
    assert cli.main(["inspect", folder, "--sigma-rel", "0.05", "--step", "1050"]) == 3
    assert "nearest steps there: 1000 and 1100" in capsys.readouterr().err
    for wrong in (["--sigma-rel", "0.5"], ["--sigma-rel", "x"], ["--sigma-rel", "0.1", "--gamma", "7"]):
        assert cli.main(["inspect", folder, *wrong]) == 2
    assert cli.main(["inspect", folder, "--sigma-rel", "0.05", "--tolerance", "-1"]) == 2
    assert cli.main(["inspect", folder, "--sigma-rel", "1e-300"]) == 2
    assert "less than 1e+12" in capsys.readouterr().err
    assert cli.main(["inspect", folder, "--step", "1000"]) == 2
    assert "--step needs the lengths of the averages that end at these steps" in capsys.readouterr().err


def test_nothing_is_touched(tmp_path, capsys):
    folder = folder_of(tmp_path / "s")
    before = everything_in(folder)
    inspected(capsys, folder, "--sigma-rel", "0.05,0.08")
    assert everything_in(folder) == before


# ---- old folders


def test_old_folder_is_inspected_with_its_profiles(tmp_path, capsys):
    write_ema_pytorch(tmp_path / "old", [1000, 2000, 3000, 70000], dtype=torch.float16)
    found = inspected(capsys, tmp_path / "old", "--tracked-sigma-rel", "0.05,0.1", "--sigma-rel", "0.05,0.08")
    assert found["covered"]["step"] == 70000
    assert found["covered"]["checkpoint_dtype"] == "F16"
    (asked,) = found["asked"]
    assert (asked["step"], asked["candidates"], asked["stored_dtypes"]) == (70000, 4, ["F16"])
    assert asked["lengths"][0]["profile_error"] < 1e-12


def test_old_folder_without_its_profiles_is_refused_with_the_missing_options(tmp_path, capsys):
    write_ema_pytorch(tmp_path / "old", [1000, 2000])
    assert inspected(capsys, tmp_path / "old")["covered"] is None
    assert cli.main(["inspect", str(tmp_path / "old"), "--sigma-rel", "0.05"]) == 2
    assert (
        "`nitrous-ema synthesize` reads them if --tracked-sigma-rel or --tracked-gamma names their profiles"
        in " ".join(capsys.readouterr().err.split())
    )
