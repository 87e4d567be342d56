from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from nitrous_ema import __version__, cli
from nitrous_ema.async_ import synthesize_worker
from tests.snapshot_folders import layout_of, record, run_id, snapshot_file, write_run

ROOT = Path(__file__).resolve().parents[1]
LAYOUT = layout_of([record("w", (50_000,)), record("n", (), "I64", "copied")])  # several chunks in each profile
COMMANDS = ("demo", "synthesize", "verify", "inspect")
RUN, LATER = run_id(0), run_id(1)


@pytest.fixture
def folder(tmp_path) -> Path:
    root = tmp_path / "snapshots"
    write_run(root, LAYOUT, [100, 200, 300], copied=lambda step: {"n": np.int64(step).tobytes()}, run=RUN)
    return root


def run_cli(*arguments, **options) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-m", "nitrous_ema", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, **options)


def damage(file: Path, *, at: float) -> None:
    """Flip a bit at a fraction of the file."""
    content = bytearray(file.read_bytes())
    content[int(at * (len(content) - 1))] ^= 1
    file.write_bytes(content)


# The command itself


def test_help_names_every_command():
    done = run_cli("--help")
    assert (done.returncode, done.stderr) == (0, "")
    for command in COMMANDS:
        assert re.search(rf"^ +{command}\s", done.stdout, re.MULTILINE)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command, capsys):
    assert cli.main([command, "--help"]) == 0
    assert command in capsys.readouterr().out


def test_version_is_told(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"nitrous-ema {__version__}\n"


@pytest.mark.parametrize(
    "wrong", [["frobnicate"], [], ["--frob"], ["verify"], ["verify", ".", "--frob"], ["demo", "--steps", "x"]]
)
def test_wrong_usage_exits_with_2_and_says_what_is_wrong(wrong, capsys):
    assert cli.main(wrong) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "error:" in err


@pytest.mark.parametrize("arguments", [["--help"], ["verify", "."], ["inspect", "."], ["synthesize", "--help"]])
def test_commands_that_do_not_need_torch_do_not_import_it(arguments):
    program = (
        f"import sys; from nitrous_ema import cli; status = cli.main({arguments!r});"
        "sys.exit(status or 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_missing_extra_of_the_demo_is_one_line(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    assert cli.main(["demo", "--quick", "--out", str(tmp_path)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "pip install 'nitrous-ema[demo]'" in line


def test_demo_that_cannot_write_says_so_in_one_line(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert cli.main(["demo", "--quick", "--out", str(tmp_path / "file")]) == 1
    out, err = capsys.readouterr()
    (line,) = err.splitlines()
    assert str(tmp_path / "file") in line
    assert "Training" in out


def test_interrupt_exits_with_130(monkeypatch, capsys):
    def interrupt(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_demo", interrupt)
    assert cli.main(["demo"]) == 130
    assert "interrupted" in capsys.readouterr().err


def test_reader_that_leaves_early_gets_no_traceback(folder):
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "nitrous_ema", "inspect", str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    try:
        done = subprocess.run(command, env=environment, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=60)
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")


# synthesize


def test_synthesize_hands_its_arguments_to_the_worker_unchanged(monkeypatch):
    given = []
    monkeypatch.setattr(cli, "os", Untouched())
    monkeypatch.setattr(synthesize_worker, "main", lambda arguments: given.append(list(arguments)) or 4)
    arguments = ["some folder", "--sigma-rel", "0.05,0.06,...,0.15", "--out=x", "--version", "-h", "--json", "--"]
    assert cli.main(["synthesize", *arguments]) == 4
    assert given == [arguments]


class Untouched:
    """Stands for ``os``, so that the thread limits of a worker do not stay behind in the process of the tests."""

    environ: dict[str, str] = {}  # noqa: RUF012


def test_synthesize_writes_what_the_worker_writes(folder, tmp_path):
    lengths = ["--sigma-rel", "0.06,0.07"]
    ours = run_cli("synthesize", folder, *lengths, "--out", tmp_path / "ours")
    command = [
        sys.executable,
        "-m",
        "nitrous_ema.async_.synthesize_worker",
        folder,
        *lengths,
        "--out",
        tmp_path / "its",
    ]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=60)
    assert ours.returncode == 0, ours.stderr
    for line in map(json.loads, ours.stdout.splitlines()):
        path = Path(line["path"])
        assert path.read_bytes() == (tmp_path / "its" / path.name).read_bytes()
    assert len(list((tmp_path / "ours").iterdir())) == 2


def test_synthesize_of_no_folder_exits_with_3(tmp_path):
    done = run_cli("synthesize", tmp_path / "nothing", "--sigma-rel", "0.1", "--out", tmp_path)
    assert done.returncode == 3
    assert "Traceback" not in done.stderr


# verify


def test_whole_folder_verifies(folder, capsys):
    assert cli.main(["verify", str(folder)]) == 0
    assert capsys.readouterr() == ("every snapshot is whole\n", "")


def test_each_damaged_file_has_a_line_with_what_to_do(folder, capsys):
    for place in (0.3, 0.6, 0.9):
        damage(snapshot_file(folder, 100), at=place)
    damage(snapshot_file(folder, 200), at=0.001)  # in its header
    assert cli.main(["verify", str(folder)]) == 4
    out, err = capsys.readouterr()
    first, second = out.splitlines()
    assert str(snapshot_file(folder, 100)) in first
    assert "--exclude 100" in first
    assert "2 more of its chunks" in first
    assert str(snapshot_file(folder, 200)) in second
    assert "--exclude 200" in second
    assert err == ""


@pytest.mark.parametrize("command", ["verify", "inspect"])
def test_folder_that_is_not_there_exits_with_3(command, tmp_path, capsys):
    assert cli.main([command, str(tmp_path / "nothing")]) == 3
    out, err = capsys.readouterr()
    assert out == ""
    assert str(tmp_path / "nothing") in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("command", ["verify", "inspect"])
def test_folder_without_snapshots_is_no_error(command, tmp_path, capsys):
    assert cli.main([command, str(tmp_path)]) == 0
    assert "holds no snapshot" in capsys.readouterr().out


def test_verify_tells_unfinished_snapshots_without_calling_them_damaged(folder, capsys):
    unfinished = folder / f"step-{400:012d}-{RUN}"
    unfinished.mkdir()
    assert cli.main(["verify", str(folder)]) == 0
    assert f"{unfinished} is not a snapshot" in capsys.readouterr().err


# inspect


def inspected(folder: Path, capsys) -> dict:
    assert cli.main(["inspect", str(folder), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_inspect_lists_runs_with_profiles_steps_times_and_sizes(folder, capsys):
    (folder / f"closed-{RUN}").touch()
    found = inspected(folder, capsys)
    (run,) = found["runs"]
    assert run["run"] == RUN
    assert run["closed"] is True
    assert run["lineage"] == [[RUN, None]]
    assert run["sigma_rels"] == [0.05, 0.1]
    assert run["gammas"] == pytest.approx([16.97, 6.94], abs=0.01)
    assert (run["checkpoint_dtype"], run["tensors"], run["average_elements"]) == ("F32", 2, 50_000)
    sizes = [snapshot_file(folder, step).stat().st_size for step in (100, 200, 300)]
    assert [(each["step"], each["t"], each["bytes"]) for each in run["snapshots"]] == list(
        zip((100, 200, 300), (100, 200, 300), sizes, strict=True)
    )
    assert run["bytes"] == sum(sizes)
    assert (found["incomplete"], found["damaged"]) == ([], [])


def test_inspect_tells_people_the_same(folder, capsys):
    (folder / f"closed-{RUN}").touch()
    assert cli.main(["inspect", str(folder)]) == 0
    out = capsys.readouterr().out
    for part in (f"run {RUN} (closed)", "sigma_rel 0.05 (gamma 16.97)", "50,000", "F32", "3, 1.2 MB"):
        assert part in out
    assert [line.split()[1] for line in out.splitlines() if line.startswith("    step")] == ["100", "200", "300"]


def test_inspect_tells_what_a_run_continues(folder, capsys):
    lineage = [(RUN, 200), (LATER, None)]
    write_run(folder, LAYOUT, [250, 300], copied=lambda step: {"n": bytes(8)}, run=LATER, lineage=lineage)
    found = inspected(folder, capsys)
    assert [[each["step"] for each in run["snapshots"]] for run in found["runs"]] == [[100, 200, 300], [250, 300]]
    assert cli.main(["inspect", str(folder)]) == 0
    assert f"continues  {RUN} up to step 200" in capsys.readouterr().out


def test_inspect_tells_incomplete_and_damaged_snapshots_apart(folder, capsys):
    unfinished = folder / f"step-{400:012d}-{RUN}"
    unfinished.mkdir()
    broken = snapshot_file(folder, 200)
    damage(broken, at=0.001)
    found = inspected(folder, capsys)
    assert [each["step"] for each in found["runs"][0]["snapshots"]] == [100, 300]
    assert found["incomplete"] == [{"path": str(unfinished), "reason": "it holds no finished file"}]
    (told,) = found["damaged"]
    assert told["path"] == str(broken)
    assert "damaged" in told["message"]
    assert cli.main(["inspect", str(folder)]) == 0
    out = capsys.readouterr().out
    assert f"{unfinished}: it holds no finished file" in out
    assert str(broken) in out


def test_inspect_survives_a_run_with_nothing_whole(folder, capsys):
    for step in (100, 200, 300):
        damage(snapshot_file(folder, step), at=0.001)
    found = inspected(folder, capsys)
    assert [run["snapshots"] for run in found["runs"]] == [[]]
    assert len(found["damaged"]) >= 1
    assert cli.main(["inspect", str(folder)]) == 0
