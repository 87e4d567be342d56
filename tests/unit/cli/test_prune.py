from __future__ import annotations

import io
import json
import re
import socket
from itertools import combinations
from pathlib import Path

import numpy as np
import psutil
import pytest

from nitrous_ema.cli import program as cli
from nitrous_ema.cli import prune
from nitrous_ema.posthoc import synthesis_report
from nitrous_ema.profile import sigma_rel_to_gamma
from nitrous_ema.snapshots.store import SnapshotStore
from nitrous_ema.synthesis.plan import plan_from_store
from tests.support.snapshot_folders import damage, layout_of, need, record, run_id, snapshot_file, write_run

LAYOUT = layout_of([record("w", (50,))])
STEPS = (10, 20, 30, 40, 60, 80, 110, 150, 200)
RUN, LATER, NEWEST, OTHER = run_id(0), run_id(1), run_id(2), run_id(-1)


@pytest.fixture
def folder(tmp_path) -> Path:
    write_run(tmp_path / "snapshots", LAYOUT, STEPS, run=RUN)
    return tmp_path / "snapshots"


def pruned(folder: Path, capsys, *arguments) -> dict:
    """Run the command and return what ``--json`` prints."""
    assert cli.main(["prune", str(folder), *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def steps(folder: Path, run: str | None = None) -> list[int]:
    return [each.step for each in SnapshotStore(folder).snapshots(run)]


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b"" for path in folder.rglob("*")}


def worst_error(kept, target: int = 200) -> float:
    """The largest error in a synthesis report, over the range that the tracked profiles cover."""
    kept = [step for step in kept if step <= target]
    report = synthesis_report(
        np.repeat(np.array(kept, float), 2),
        np.tile(LAYOUT.gammas, len(kept)),
        np.full(60, float(target)),
        sigma_rel_to_gamma(np.geomspace(0.05, 0.25, 60)),
    )
    return report.profile_error.max()


# The question on a terminal


@pytest.fixture
def on_terminal(monkeypatch):
    """Make stdin a terminal at which somebody types a line."""

    def typed(line: str) -> None:
        stdin = io.StringIO(line)
        stdin.isatty = lambda: True
        monkeypatch.setattr("sys.stdin", stdin)

    return typed


@pytest.mark.parametrize("answer", ["\n", "n\n", "no\n", "", "yess\n"])
def test_nothing_is_deleted_on_a_terminal_without_a_yes(folder, capsys, on_terminal, answer):
    before = content(folder)
    on_terminal(answer)
    assert cli.main(["prune", str(folder), "--keep", "4", "--pin", "20"]) == 1
    out, err = capsys.readouterr()
    assert content(folder) == before
    assert "dropped: " in out
    assert re.search(r"Delete 5 snapshots \([\d.]+ KiB\) from .*\? \[y/N\] ", err)
    assert "not confirmed; nothing was changed." in err


@pytest.mark.parametrize(("answer", "options"), [("y\n", []), ("YES\n", []), ("n\n", ["--yes"])])
def test_snapshots_are_deleted_after_a_yes(folder, capsys, on_terminal, answer, options):
    on_terminal(answer)
    assert cli.main(["prune", str(folder), "--keep", "4", *options]) == 0
    assert len(steps(folder)) == 4
    assert ("[y/N]" in capsys.readouterr().err) == (not options)


@pytest.mark.parametrize("options", [["--keep", "4", "--dry-run"], ["--pin", "20"], ["--keep", "9"]])
def test_no_question_is_asked_where_nothing_is_deleted(folder, capsys, on_terminal, options):
    on_terminal("n\n")
    assert cli.main(["prune", str(folder), *options]) == 0
    assert "[y/N]" not in capsys.readouterr().err


def test_lengths_are_a_list_of_which_the_ends_count(folder, capsys):
    found = pruned(folder, capsys, "--keep", 4, "--sigma-rel", "0.08,0.1,...,0.2", "--dry-run")
    assert found["thinning"]["sigma_rels"] == [0.08, 0.2]
    exponents = ",".join(str(float(sigma_rel_to_gamma(length))) for length in (0.2, 0.08))
    again = pruned(folder, capsys, "--keep", 4, "--gamma", exponents, "--dry-run")
    assert again["thinning"]["sigma_rels"] == pytest.approx([0.08, 0.2])
    assert again["thinning"]["kept"] == found["thinning"]["kept"]


def test_bound_on_the_choice_is_printed_on_request(folder, capsys):
    for options, is_printed in (([], False), (["--verbose"], True)):
        assert cli.main(["prune", str(folder), "--keep", "4", "--dry-run", *options]) == 0
        assert ("No choice of 4 snapshots" in capsys.readouterr().out) == is_printed


# Kept snapshots


def test_best_snapshots_are_kept_and_the_others_are_gone(folder, capsys):
    found = pruned(folder, capsys, "--keep", 4)
    assert steps(folder) == found["thinning"]["kept"]
    assert len(steps(folder)) == 4
    assert len(list(folder.iterdir())) == 4
    best = min(worst_error(each) for each in combinations(STEPS, 4) if 200 in each)
    assert worst_error(steps(folder)) <= 1.02 * best


def test_budget_bounds_the_kept_bytes(folder, capsys):
    size = snapshot_file(folder, 200).stat().st_size
    found = pruned(folder, capsys, "--budget", f"{5 * size / 1024:.6f}KiB")
    left = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
    assert left == found["thinning"]["bytes_after"] <= 5 * size
    assert len(steps(folder)) == 5
    assert found["bytes_hidden"] == found["bytes_removed"] == 4 * size


def test_error_decides_how_many_are_kept(folder, capsys):
    pruned(folder, capsys, "--error", 0.3, "--sigma-rel", "0.05,0.2")
    assert 1 < len(steps(folder)) < len(STEPS)
    plan = plan_from_store(folder, sigma_rels=[0.05, 0.08, 0.12, 0.2])
    assert plan.report.profile_error.max() <= 0.3


def test_pinned_steps_are_kept_with_the_snapshots_that_they_need_as_targets(folder, capsys):
    found = pruned(folder, capsys, "--keep", 5, "--pin", "80")
    assert SnapshotStore(folder).pins() == {(80, RUN)}
    assert {80, 200} <= set(steps(folder))
    best = min(
        max(worst_error(each, 80), worst_error(each)) for each in combinations(STEPS, 5) if {80, 200} <= set(each)
    )
    assert max(worst_error(steps(folder), 80), worst_error(steps(folder))) <= 1.02 * best
    assert found["pinned"] == [80]


def test_pin_alone_removes_nothing_and_unpin_takes_it_back(folder, capsys):
    assert pruned(folder, capsys, "--pin", "20,30", "--pin", "110")["pinned"] == [20, 30, 110]
    found = pruned(folder, capsys, "--unpin", "20,30")
    assert (found["pinned"], found["thinning"]) == ([110], None)
    assert SnapshotStore(folder).pins() == {(110, RUN)}
    assert steps(folder) == list(STEPS)
    assert pruned(folder, capsys, "--keep", 2)["thinning"]["kept"] == [110, 200]


def test_steps_to_unpin_that_have_no_pin_are_named(folder, capsys):
    before = content(folder)
    assert cli.main(["prune", str(folder), "--unpin", "20,40"]) == 0
    out, err = capsys.readouterr()
    assert "--unpin 20,40: not pinned, so there is no pin to remove." in err
    assert out.endswith("done: no pin was changed, and no snapshot was dropped.\n")
    assert content(folder) == before
    SnapshotStore(folder).pin(20, RUN)
    assert cli.main(["prune", str(folder), "--unpin", "20,40"]) == 0
    out, err = capsys.readouterr()
    assert "--unpin 40: not pinned" in err
    assert out.endswith("done: pins were changed, and no snapshot was dropped.\n")
    assert pruned(folder, capsys, "--unpin", "20")["unpinned_now"] == []


def test_step_that_is_pinned_already_changes_no_pin(folder, capsys):
    for outcome in ("pins were changed", "no pin was changed"):
        assert cli.main(["prune", str(folder), "--pin", "20"]) == 0
        assert outcome in capsys.readouterr().out


def test_pin_of_another_lineage_stays(folder, capsys):
    write_run(folder, LAYOUT, [20, 25], run=LATER)
    SnapshotStore(folder).pin(20, LATER)
    pruned(folder, capsys, "--run", RUN, "--pin", "20")
    pruned(folder, capsys, "--run", RUN, "--unpin", "20")
    assert SnapshotStore(folder).pins() == {(20, LATER)}


# Snapshots that are left alone


def test_prune_touches_its_own_lineage_only(folder, capsys):
    write_run(folder, LAYOUT, [120, 130, 140, 160], run=LATER, lineage=[(RUN, 110), (LATER, None)])
    write_run(folder, LAYOUT, [5, 6], run=OTHER)
    (folder / f"step-{170:012d}-{LATER}").mkdir()
    damage(snapshot_file(folder, 5), at=0.001)
    before = content(folder)
    found = pruned(folder, capsys, "--keep", 3)
    assert len(steps(folder)) == 3
    assert steps(folder)[-1] == 160
    gone = {name.split("/")[0] for name in before.keys() - content(folder).keys()}
    members = {f"step-{step:012d}-{RUN}" for step in STEPS if step <= 110}
    members |= {f"step-{step:012d}-{LATER}" for step in (120, 130, 140, 160)}
    assert gone < members
    left_alone = {(each["what"], each["count"], each["run"]) for each in found["left_alone"]}
    assert left_alone == {
        ("of another future", 2, RUN),
        ("of an unrelated run", 1, OTHER),
        ("incomplete", 1, None),
        ("damaged", 1, None),
    }


def test_run_chooses_the_lineage(folder, capsys):
    write_run(folder, LAYOUT, [15, 25, 35], run=LATER)
    found = pruned(folder, capsys, "--keep", 2, "--run", RUN)
    assert found["run"] == RUN
    assert len(steps(folder, RUN)) == 2
    assert steps(folder) == [15, 25, 35]


def test_everything_left_alone_has_a_line_with_its_remedy(folder, capsys):
    write_run(folder, LAYOUT, [15], run=LATER)
    (folder / f"step-{170:012d}-{RUN}").mkdir()
    assert cli.main(["prune", str(folder), "--keep", "2", "--run", RUN, "--dry-run"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert f"1 snapshot of an unrelated run ({LATER}); --run {LATER} prunes them" in out
    assert "nitrous-ema inspect" in out


@pytest.mark.parametrize("closed", [False, True])
def test_run_that_is_still_written_is_noted_and_pruned(tmp_path, capsys, closed):
    me = psutil.Process()
    trainer = {"host": socket.gethostname(), "pid": me.pid, "started": me.create_time()}
    write_run(tmp_path, LAYOUT, STEPS, run=RUN, trainer=trainer)
    if closed:
        SnapshotStore(tmp_path).close_run(RUN)
    assert cli.main(["prune", str(tmp_path), "--keep", "3"]) == 0
    out = capsys.readouterr().out
    assert "note: errors apply to averages at the newest step" in out
    assert ("is still being written" in out) is not closed
    assert len(steps(tmp_path)) == 3


# In order


def test_dry_run_changes_nothing(folder, capsys):
    before = content(folder)
    found = pruned(folder, capsys, "--keep", 3, "--pin", "80", "--dry-run")
    assert content(folder) == before
    assert found["pinned"] == [80]
    assert 80 in found["thinning"]["kept"]
    assert cli.main(["prune", str(folder), "--keep", "3", "--dry-run"]) == 0
    assert "nothing was changed" in capsys.readouterr().out
    assert content(folder) == before


def test_hidden_files_stay_readable_during_the_grace(folder, capsys, monkeypatch):
    """By then pins are written, and dropped snapshots are not listed but still on the disk."""
    before = {path.read_bytes() for path in folder.rglob("*.safetensors")}
    waited = []

    def wait(seconds):
        waited.append(seconds)
        assert SnapshotStore(folder).pins() == {(40, RUN)}
        assert len(steps(folder)) == 4
        assert {path.read_bytes() for path in folder.rglob("*.safetensors")} == before

    monkeypatch.setattr(prune.time, "sleep", wait)
    pruned(folder, capsys, "--keep", 4, "--pin", 40, "--grace", 90)
    assert waited == [90]
    assert len(list(folder.rglob("*.safetensors"))) == 4


def test_pins_come_first_then_hiding_then_removal(folder, capsys, monkeypatch):
    calls = []

    def record(name):
        call = getattr(SnapshotStore, name)
        monkeypatch.setattr(SnapshotStore, name, lambda *arguments: calls.append(name) or call(*arguments))

    for name in ("unpin", "pin", "hide", "remove_hidden"):
        record(name)
    pruned(folder, capsys, "--pin", "20,30")
    pruned(folder, capsys, "--keep", 4, "--pin", "40", "--unpin", "20,30")
    assert calls == ["pin", "pin", "unpin", "unpin", "pin", "hide", "remove_hidden"]


def test_newest_snapshot_that_is_damaged_can_be_excluded(folder, capsys):
    damage(snapshot_file(folder, 200), at=0.001)
    assert pruned(folder, capsys, "--keep", 3, "--exclude", 200)["thinning"]["kept"][-1] == 150
    assert snapshot_file(folder, 200).exists()


def test_next_prune_deletes_what_an_interrupted_one_has_hidden(folder, capsys, monkeypatch):
    def interrupt(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr(prune.time, "sleep", interrupt)
    assert cli.main(["prune", str(folder), "--keep", "4", "--grace", "5"]) == 130
    capsys.readouterr()
    assert len(SnapshotStore(folder).hidden()) == 5
    found = pruned(folder, capsys, "--keep", 4)
    assert (found["bytes_hidden"], found["bytes_removed"] > 0) == (0, True)
    assert SnapshotStore(folder).hidden() == []


# Refused commands


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        ([], 2, "nothing to do; pass one of --keep N, --budget BYTES and --error E"),
        (["--keep", "0"], 2, "at least 1"),
        (["--keep", "x"], 2, "at least 1"),
        (["--keep", "2", "--budget", "1GB"], 2, "not allowed with"),
        (
            ["--keep", "2", "--pin", "20,40"],
            2,
            "--keep 2 is too small: the newest snapshot and the 2 pinned snapshots must be kept",
        ),
        (["--budget", "100"], 2, "--budget 100 bytes (space for 0 snapshots) is too small: the newest snapshot must"),
        (["--budget", "much"], 2, "amount"),
        (["--error", "0"], 2, "above 0"),
        (["--error", "nan"], 2, "above 0"),
        (["--keep", "3", "--sigma-rel", "0.2-0.1"], 2, "'0.2-0.1' is not a number"),
        (["--keep", "3", "--sigma-rel", "0.2,0.4"], 2, "--sigma-rel"),
        (["--keep", "3", "--gamma", "-1"], 2, "gamma"),
        (["--keep", "3", "--gamma", "7", "--sigma-rel", "0.2"], 2, "not allowed with"),
        (["--keep", "3", "--pin", "x"], 2, "list of steps"),
        (["--keep", "3", "--pin", "70"], 3, "nearest steps: 60 and 80"),
        (["--keep", "3", "--unpin", "500"], 3, "200"),
        (["--keep", "3", "--grace", "-1"], 2, "seconds"),
        (["--keep", "3", "--run", NEWEST], 3, RUN.partition("-")[0]),  # what stands behind that is random
        (["--keep", "3", "--exclude", ",".join(map(str, STEPS))], 3, "no snapshot"),
    ],
)
def test_refused_prune_changes_nothing(folder, capsys, arguments, status, message):
    before = content(folder)
    assert cli.main(["prune", str(folder), *arguments]) == status
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert content(folder) == before


def test_damaged_member_is_refused_until_it_is_excluded(folder, capsys):
    for step in (30, 40):
        damage(snapshot_file(folder, step), at=0.001)
    before = content(folder)
    assert cli.main(["prune", str(folder), "--keep", "3"]) == 4
    err = capsys.readouterr().err
    assert "--exclude 30" in err
    assert "1 more" in err
    assert cli.main(["prune", str(folder), "--keep", "3", "--exclude", "30"]) == 4
    assert content(folder) == before
    found = pruned(folder, capsys, "--keep", 3, "--exclude", "30,40")
    assert found["excluded"] == [30, 40]
    assert snapshot_file(folder, 30).exists()
    assert snapshot_file(folder, 40).exists()
    assert not {30, 40} & set(found["thinning"]["steps"])


def test_folder_with_a_snapshot_of_a_newer_version_is_refused(folder, capsys):
    """What a newer version keeps in the folder may depend on the snapshots that this version would drop."""
    need(snapshot_file(folder, 30), columns="1.2")
    before = content(folder)
    assert cli.main(["prune", str(folder), "--keep", "3"]) == 4
    err = " ".join(capsys.readouterr().err.split())
    assert "needs `columns`, from nitrous_ema 1.2 on" in err
    assert "Nothing was changed." in err
    assert content(folder) == before


def test_folder_of_another_library_is_refused(tmp_path, capsys):
    (tmp_path / "0.100.pt").write_bytes(b"x")
    assert cli.main(["prune", str(tmp_path), "--keep", "3"]) == 2
    err = capsys.readouterr().err
    assert "ema-pytorch" in err
    assert "nothing was changed" in err


def test_text_has_what_json_has(folder, capsys):
    found = pruned(folder, capsys, "--keep", 4, "--dry-run")
    assert cli.main(["prune", str(folder), "--keep", "4", "--dry-run"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    for length in found["thinning"]["targets"][-1]["lengths"]:
        assert length["wanted"] == (0.049999 < length["sigma_rel"] < 0.250001)
    assert f"run {RUN}" in out
    assert "4 of 9 snapshots kept" in out
    for warning in found["thinning"]["warnings"]:
        assert warning in out
