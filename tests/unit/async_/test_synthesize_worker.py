from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import psutil
import pytest
import safetensors
import safetensors.numpy
import torch

from nitrous_ema.async_ import synthesize_worker as worker
from nitrous_ema.errors import WorkerError
from nitrous_ema.posthoc.coverage import condition
from nitrous_ema.snapshots.store import SnapshotStore
from nitrous_ema.synthesis.in_memory import synthesize
from nitrous_ema.synthesis.plan import plan_from_store
from nitrous_ema.synthesis.worker.launch import launch
from nitrous_ema.synthesis.worker.output_record import Output
from tests.support.snapshot_folders import layout_of, record, run_id, snapshot_file, write_run

ROOT = Path(__file__).resolve().parents[3]
WORKER = [sys.executable, "-W", "error", "-m", "nitrous_ema.async_.synthesize_worker"]
FIELDS = ["sigma_rel", "gamma", "step", "t", "run", "path", "state", "part", "parts", "profile_error", "weight_l1"]
FIELDS += [
    "weight_l2",
    "rounding",
    "condition",
    "columns",
    "steps_read",
    "lower_bound",
    "tolerance",
    "excluded",
    "nonfinite",
    "bytes_read",
]
FIELDS += ["file_bytes", "memory_bytes", "seconds"]
TIMEOUT = 300


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("snapshots")
    write_run(root, layout_of([record("w", (500,)), record("n", (), "I64", "copied")]), range(100, 1100, 100),
              copied=lambda step: {"n": np.int64(step).tobytes()})  # fmt: skip
    return root


def run_worker(*arguments, **options) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [*WORKER, *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT, **options)


# Arguments


@pytest.mark.parametrize(
    ("text", "lengths"),
    [
        ("0.05", [0.05]),
        ("0.05,0.06,...,0.15", [0.05, 0.06, 0.07, 0.08, 0.09, 0.10, 0.11, 0.12, 0.13, 0.14, 0.15]),
        (" 0.2, 0.15 ,...,0.05", [0.2, 0.15, 0.1, 0.05]),
        ("0.01,0.02,...,0.04,0.1,...,0.22", [0.01, 0.02, 0.03, 0.04, 0.1, 0.16, 0.22]),
        ("0.010,0.015,...,0.020", [0.01, 0.015, 0.02]),
        ("0.1,0.2,...,0.2", None),
        ("0.1,0.1", [0.1]),
        ("1e-2,2e-2", [0.01, 0.02]),
    ],
)
def test_lengths_are_read_as_they_are_written(text, lengths):
    if lengths is None:
        with pytest.raises(ValueError, match="do not lead"):
            worker.parse_lengths(text)
    else:
        assert worker.parse_lengths(text) == lengths


@pytest.mark.parametrize(
    "text",
    [
        "",
        "x",
        "0.1,...,0.3",
        "...",
        "0.1,0.2,...",
        "0.1,0.2,...,...",
        "0.1,0.2,...,0.25",
        "0.2,0.1,...,0.3",
        "0.1,,0.2",
        "nan",
        "1,inf,...,5",
        "0,1e-9,...,1",
    ],
)
def test_invalid_lists_are_refused(text):
    with pytest.raises(ValueError, match=r"number|lead|miss"):
        worker.parse_lengths(text)


# The process


def test_stdout_is_one_json_object_per_output_and_nothing_else(folder, tmp_path):
    out = tmp_path / "deep" / "out"
    done = run_worker(
        folder, "--sigma-rel", "0.06,0.07,...,0.09", "--out", out, "--exclude", 300, "--progress", "--verbose"
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [list(line) for line in lines] == [FIELDS] * 4
    assert [line["sigma_rel"] for line in lines] == [0.06, 0.07, 0.08, 0.09]
    expected = synthesize(folder, sigma_rels=[0.06, 0.07, 0.08, 0.09], exclude=[300])
    plan = plan_from_store(folder, sigma_rels=[0.06, 0.07, 0.08, 0.09], exclude=[300])
    expected_condition = condition([column.t for column in plan.columns], [column.gamma for column in plan.columns])
    assert [line["condition"] for line in lines] == [expected_condition] * 4
    assert f"condition number {expected_condition:.3g}\n" in done.stderr
    for index, line in enumerate(lines):
        assert line["path"] == str(out / f"step-1000-sigma-{line['sigma_rel']!r}.safetensors")
        tensors = safetensors.numpy.load_file(line["path"])
        np.testing.assert_allclose(tensors["w"], expected.flats[index], rtol=1e-6, atol=1e-7)
        assert tensors["n"] == 1000
        assert line["profile_error"] == expected.plan.report.profile_error[index]
        assert line["rounding"] == expected.plan.report.rounding[index]
        assert (line["steps_read"], line["lower_bound"]) == ([600, 700, 800, 900, 1000], 5)  # the first add nothing
        assert (line["step"], line["t"], line["tolerance"], line["excluded"]) == (1000, 1000, 1e-3, [300])
        assert (line["columns"], line["bytes_read"]) == (10, 10 * 500 * 4 + 8)
    assert sorted(each.name for each in out.iterdir()) == sorted(Path(line["path"]).name for line in lines)
    assert "read 19.5 KiB of 19.5 KiB (100%)" in done.stderr
    assert "using 5 of 9 snapshots (5 is the proven minimum for tolerance 0.001); profile error with all" in done.stderr


def run_inside(script: str, *arguments, **options) -> subprocess.Popen[str]:
    """The worker as ``python -m`` runs it, in a process that does something else before or after."""
    # A shell starts background jobs, and a test run may be one, with SIGINT ignored.
    prelude = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    prelude += f"import os, runpy, sys; sys.argv = ['worker', *{[str(each) for each in arguments]!r}]\n"
    return subprocess.Popen(
        [sys.executable, "-c", prelude + textwrap.dedent(script)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options,
    )  # fmt: skip


RUN = "runpy.run_module('nitrous_ema.async_.synthesize_worker', run_name='__main__', alter_sys=True)"


def test_process_needs_neither_torch_nor_the_trainer_and_lowers_its_priority(tmp_path):
    me = psutil.Process()
    trainer = {"host": socket.gethostname(), "pid": me.pid, "started": me.create_time()}
    write_run(tmp_path, layout_of([record("w", (50,))]), [10, 20], trainer=trainer)
    script = f"""
    try:
        {RUN}
    except SystemExit as stop:
        print(stop.code, os.nice(0), os.environ["OPENBLAS_NUM_THREADS"], file=sys.stderr)
    unneeded = ("nitrous_ema.averaging.ema", "nitrous_ema.async_.lanes", "nitrous_ema.async_.synthesize_worker")
    print([m for m in sys.modules if m.split(".")[0] == "torch" or m in unneeded], file=sys.stderr)
    """
    process = run_inside(script, tmp_path, "--sigma-rel", "0.07", "--out", tmp_path / "out")
    _, stderr = process.communicate(timeout=TIMEOUT)
    assert stderr.splitlines()[-2:] == [f"0 {max(10, os.nice(0))} 1", "[]"]


def test_process_imports_nothing_that_it_does_not_need(folder, tmp_path):
    """Imports that would slow down each launch(): torch, modules that start processes or look for a trainer."""
    unneeded = ("torch", "subprocess", "psutil", "asyncio", "multiprocessing", "safetensors", "matplotlib", "email")
    unneeded += ("nitrous_ema.synthesis.worker.job", "nitrous_ema.synthesis.worker.launch")
    script = f"""
    try:
        {RUN}
    finally:
        print([each for each in sys.modules if each in {unneeded}], file=sys.stderr)
    """
    process = run_inside(script, folder, "--sigma-rel", "0.07", "--out", tmp_path / "out")
    _, stderr = process.communicate(timeout=TIMEOUT)
    assert stderr.splitlines()[-1] == "[]"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_interrupted_process_leaves_nothing_half_written(folder, tmp_path, number):
    out = tmp_path / "out"
    script = f"""
    import nitrous_ema.synthesis.outputs.writer as outputs
    def gate(*_):
        print("half-written:", len(os.listdir({str(out)!r})), file=sys.stderr, flush=True)
        sys.stdin.read()
    outputs.stream_copied = gate
    {RUN}
    """
    process = run_inside(script, folder, "--sigma-rel", "0.07,0.08", "--out", out)
    while not (line := process.stderr.readline()).startswith("half-written"):
        assert line, "the worker ended before it reached the gate"
    assert line == "half-written: 2\n"
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=TIMEOUT)
    assert (process.returncode, stdout) == (130, "")
    assert "interrupted" in stderr
    assert "Traceback" not in stderr
    assert list(out.iterdir()) == []


# How it ends


def main(capsys, *arguments):
    status = worker.main([str(each) for each in arguments])
    captured = capsys.readouterr()
    assert captured.out == "" or status == 0
    assert "Traceback" not in captured.err
    return status, captured.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required"),
        (["--sigma-rel", "0.1"], "--out"),
        (["--sigma-rel", "0.5", "--out", "OUT"], "--sigma-rel has 0.5"),
        (["--sigma-rel", "0.1,x", "--out", "OUT"], "'x' is not a number"),
        (["--sigma-rel", "0.1", "--gamma", "3", "--out", "OUT"], "not allowed with"),
        (["--sigma-rel", "0.1", "--out", "OUT", "--dtype", "int8"], "invalid choice"),
        (["--sigma-rel", "0.1", "--out", "OUT", "--memory", "1KiB"], "need at least"),
        (["--sigma-rel", "0.1", "--out", "OUT", "--memory", "lots"], "is not an amount of bytes"),
        (["--sigma-rel", "0.1", "--out", "OUT", "--step", "500", "--exclude", "500"], "is excluded"),
        (["--sigma", "0.1", "--out", "OUT"], "required"),
    ],
)
def test_wrong_usage_ends_with_2(folder, tmp_path, capsys, arguments, message):
    out = tmp_path / "out"
    status, err = main(capsys, folder, *(out if each == "OUT" else each for each in arguments))
    assert status == 2
    assert message in err
    assert not out.exists()


def test_missing_snapshot_ends_with_3(folder, tmp_path, capsys):
    options = ("--sigma-rel", "0.1", "--out", tmp_path / "out")
    status, err = main(capsys, folder, *options, "--step", "150")
    assert (status, "100 and 200" in err) == (3, True)
    assert main(capsys, folder, *options, "--run", run_id(9))[0] == 3
    assert main(capsys, tmp_path / "nowhere", *options)[0] == 3
    assert main(capsys, tmp_path, *options)[0] == 3


def test_damaged_snapshot_ends_with_4_and_can_be_excluded(tmp_path, capsys):
    write_run(tmp_path, layout_of([record("w", (50,))]), [100, 200, 300])
    path = snapshot_file(tmp_path, 200)
    content = bytearray(path.read_bytes())
    content[SnapshotStore(tmp_path).get(200).data_begin] ^= 1
    path.write_bytes(content)
    options = (tmp_path, "--sigma-rel", "0.08", "--out", tmp_path / "out")
    status, err = main(capsys, *options)
    assert (status, "--exclude 200" in err, "chunk 0" in err) == (4, True, True)
    assert main(capsys, *options, "--exclude", "200")[0] == 0


@pytest.fixture
def handles_ctrl_c():
    """As in a process that a shell started in the foreground, however this process was started."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_interrupts_right_after_the_first_do_not_disturb_the_cleaning_up(handles_ctrl_c):
    now, before = [0.0], [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with worker._interruptible(clock=lambda: now[0]):
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.raise_signal(number)
        now[0] += 60
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_worker_in_the_background_goes_on_ignoring_ctrl_c():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with worker._interruptible():
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_unwritable_output_folder_ends_with_1(folder, tmp_path, capsys):
    (tmp_path / "out").write_text("")
    status, err = main(capsys, folder, "--sigma-rel", "0.1", "--out", tmp_path / "out")
    assert status == 1
    assert f"{tmp_path / 'out'} cannot be the output folder" in err


@pytest.mark.parametrize(
    ("name", "found", "do"),
    [
        ("{sigma_rel}", "Is a directory", "choose another name"),
        ("n" * 300 + "{sigma_rel}", "File name too long", "Choose a shorter name"),
    ],
)
def test_output_that_cannot_get_its_name_is_reported_with_a_remedy_before_the_work(
    folder, tmp_path, capsys, name, found, do
):
    (tmp_path / "0.08.safetensors").mkdir()
    status, err = main(capsys, folder, "--sigma-rel", "0.08", "--out", tmp_path / f"{name}.safetensors", "--progress")
    assert status == 1
    assert f"0.08.safetensors cannot be written: {found}. " in err
    assert do in err.splitlines()[-1]
    assert "read " not in err.splitlines()[-2]  # no progress
    assert [path.name for path in tmp_path.iterdir()] == ["0.08.safetensors"]


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere it is not certain that a process has ended")
@pytest.mark.parametrize("more", [(), ("--part", "2/2")])
def test_files_of_a_killed_worker_are_removed_by_the_next(folder, tmp_path, capsys, more):
    code = "import sys; from pathlib import Path; from nitrous_ema._base.temporary_files import *; "
    code += "path = Path(sys.argv[1]); path.with_name(temporary_name(path.name)).touch()"
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "old.pt")], check=True, timeout=TIMEOUT, cwd=ROOT)
    assert len(list(tmp_path.iterdir())) == 1
    assert main(capsys, folder, "--sigma-rel", "0.08", "--step", "1000", "--out", tmp_path, *more)[0] == 0
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize(("unread", "written"), [(("stdout",), [0.07]), (("stdout", "stderr"), [])], ids=str)
def test_closed_stdout_ends_the_work_and_leaves_nothing_half_written(folder, tmp_path, unread, written):
    """As where the process that launched it has ended."""
    out, (read, write) = tmp_path / "out", os.pipe()
    os.close(read)
    command = [*WORKER, str(folder), "--sigma-rel", "0.07,0.08,0.09", "--out", str(out), "--progress-json"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | dict.fromkeys(unread, write)
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, **pipes, text=True)
    os.close(write)
    _, stderr = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 1
    assert stderr is None or stderr.endswith("stdout was closed before all outputs were written.\n")
    assert [path.name for path in out.glob("*")] == [f"step-1000-sigma-{length}.safetensors" for length in written]


def test_help_ends_with_0(capsys):
    assert worker.main(["--help"]) == 0
    assert "--sigma-rel" in capsys.readouterr().out


def test_ignored_runs_and_warnings_are_logged(tmp_path, capsys):
    layout = layout_of([record("w", (50,))])
    old = write_run(tmp_path, layout, [100, 200], run=run_id(1))
    new = write_run(tmp_path, layout, [50], run=run_id(2))
    status, err = main(capsys, tmp_path, "--sigma-rel", "0.2", "--out", tmp_path / "out")
    assert status == 0
    assert f"step 50 of run {new}" in err
    assert f"ignoring unrelated runs (select one with --run): {old}" in err
    assert "warning: " in err
    status, err = main(capsys, tmp_path, "--sigma-rel", "0.2", "--out", tmp_path / "out", "--run", old)
    assert f"step 200 of run {old}" in err


# From Python


def test_launched_job_returns_its_outputs(folder, tmp_path, monkeypatch):
    """Also from a folder that has something else of our name, with relative paths."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nitrous_ema").mkdir()
    (tmp_path / "nitrous_ema" / "__init__.py").write_text("raise ImportError('the wrong one')")
    job = launch(folder, sigma_rels=[0.07, 0.06], out="out", step=900, exclude=[100, 200], dtype=torch.bfloat16)
    outputs = job.result(timeout=TIMEOUT)
    assert job.done()
    assert [(each.sigma_rel, each.step, each.excluded) for each in outputs] == [
        (0.07, 900, (100, 200)),
        (0.06, 900, (100, 200)),
    ]
    assert all(isinstance(each, Output) and each.path.parent == tmp_path / "out" for each in outputs)
    with safetensors.safe_open(outputs[0].path, "np") as file:
        assert file.get_slice("w").get_dtype() == "BF16"


def test_launched_process_reads_as_few_snapshots_as_the_tolerance_allows(folder, tmp_path):
    jobs = {
        each: launch(folder, sigma_rels=[0.07], out=tmp_path / str(each), tolerance=each) for each in (0, 1e-3, 0.1)
    }
    read = {}
    for tolerance, job in jobs.items():
        (output,) = job.result(timeout=TIMEOUT)
        assert (output.tolerance, output.columns) == (tolerance, 2 * len(output.steps_read))
        assert output.lower_bound <= len(output.steps_read)
        read[tolerance] = output.steps_read
    assert read[0] == tuple(range(100, 1100, 100))
    assert len(read[0]) > len(read[1e-3]) > len(read[0.1])


def test_negative_tolerance_is_wrong_usage(folder, tmp_path):
    done = run_worker(folder, "--sigma-rel", "0.07", "--out", tmp_path, "--tolerance=-1")
    assert done.returncode == 2
    assert "tolerance is -1" in done.stderr


def test_failure_of_a_launched_job_is_an_exception(folder, tmp_path):
    missing = launch(folder, gammas=[5.0], out=tmp_path, step=150)
    wrong = launch(folder, sigma_rels=[0.9], out=tmp_path)
    with pytest.raises(WorkerError, match="no snapshot of step 150") as e:
        missing.result(timeout=TIMEOUT)
    assert e.value.exit_code == 3
    assert "nearest" in e.value.stderr
    with pytest.raises(ValueError, match=r"--sigma-rel has 0\.9"):
        wrong.result(timeout=TIMEOUT)
    with pytest.raises(ValueError, match="exactly one of sigma_rels and gammas; got neither"):
        launch(folder, out=tmp_path)


def interpreter(tmp_path: Path, script: str) -> Path:
    path = tmp_path / "python"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def test_worker_with_long_messages_is_not_held_up(tmp_path):
    python = interpreter(tmp_path, "head -c 3000000 /dev/zero | tr '\\0' x >&2; echo >&2; echo the end >&2; exit 1")
    with pytest.raises(WorkerError, match="the end") as e:
        launch(tmp_path, sigma_rels=[0.1], out=tmp_path, python=python).result(timeout=TIMEOUT)
    assert len(e.value.stderr) < 20_000


def test_cancelled_job_has_ended(tmp_path):
    job = launch(tmp_path, sigma_rels=[0.1], out=tmp_path, python=interpreter(tmp_path, "exec sleep 600"))
    assert not job.done()
    with pytest.raises(TimeoutError, match="has not ended"):
        job.result(timeout=0.01)
    job.cancel()
    assert job.done()
    with pytest.raises(WorkerError) as e:
        job.result(timeout=TIMEOUT)
    assert e.value.exit_code == -signal.SIGTERM


def test_job_that_ignores_the_signal_is_killed(tmp_path):
    os.mkfifo(tmp_path / "ready")
    python = interpreter(tmp_path, f"trap '' TERM; echo > {tmp_path}/ready; exec sleep 600")
    job = launch(tmp_path, sigma_rels=[0.1], out=tmp_path, python=python)
    (tmp_path / "ready").read_text()
    job.cancel(timeout=0.05)
    with pytest.raises(WorkerError) as e:
        job.result(timeout=TIMEOUT)
    assert e.value.exit_code == -signal.SIGKILL


def test_ctrl_c_during_the_imports_is_no_traceback(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import os, signal, sys\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # it may be ignored here
        "class Interrupting:\n"
        "    def find_spec(name, path=None, target=None):\n"
        "        if name == 'nitrous_ema.synthesis.worker.output_names':\n"
        "            os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Interrupting)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(tmp_path), str(ROOT)))}
    command = [sys.executable, "-m", "nitrous_ema.async_.synthesize_worker", "--help"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")
