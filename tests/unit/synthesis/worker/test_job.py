from __future__ import annotations

import os
import sys
import threading
from pathlib import Path

import pytest

from nitrous_ema.errors import WorkerError
from nitrous_ema.synthesis.worker.launch import launch
from tests.support.snapshot_folders import layout_of, record, write_run

TIMEOUT = 60


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("snapshots")
    write_run(root, layout_of([record("w", (500,))]), range(100, 1100, 100))
    return root


def interpreter(tmp_path: Path, script: str) -> Path:
    path = tmp_path / "python"
    path.write_text(f"#!{sys.executable}\n{script}\n")
    path.chmod(0o755)
    return path


def line_of(folder, tmp_path) -> str:
    """The record that the real worker prints."""
    (output,) = launch(folder, sigma_rels=[0.07], out=tmp_path / "once", dry_run=True).result(TIMEOUT)
    fields = {name: getattr(output, name) for name in output.__slots__}
    return repr({**fields, "path": str(output.path)})


def test_outputs_come_while_the_worker_runs(folder, tmp_path):
    os.mkfifo(tmp_path / "gate")
    script = f"import json\nprint(json.dumps({line_of(folder, tmp_path)}), flush=True)\nopen('{tmp_path}/gate').read()"
    job = launch(folder, sigma_rels=[0.07], out=tmp_path, python=interpreter(tmp_path, script))
    outputs = job.outputs(timeout=TIMEOUT)
    assert next(outputs).sigma_rel == 0.07
    assert not job.done()
    with pytest.raises(TimeoutError, match="no further output within"):
        list(job.outputs(timeout=0.01))
    assert repr(job) == f"<Job of process {job._process.pid}: running, 1 output so far>"
    (tmp_path / "gate").write_text("")
    assert list(outputs) == []
    assert len(list(job.outputs())) == 1
    assert repr(job) == f"<Job of process {job._process.pid}: done, 1 output so far>"


def test_outputs_end_with_the_error_of_the_worker(folder, tmp_path):
    line = line_of(folder, tmp_path)
    script = f"import json\nprint(json.dumps({line}), flush=True)\nraise LookupError('where')"
    job = launch(folder, sigma_rels=[0.07], out=tmp_path, python=interpreter(tmp_path, script))
    outputs = job.outputs(TIMEOUT)
    assert next(outputs).step == 1000
    with pytest.raises(WorkerError, match=r"(?s)Traceback.*LookupError: where"):
        next(outputs)
    assert repr(job).endswith(": ended with exit status 1, 1 output so far>")


@pytest.mark.parametrize("timeout", [None, TIMEOUT, float("inf")])
def test_any_time_can_be_waited(folder, tmp_path, timeout):
    job = launch(folder, sigma_rels=[0.07], out=tmp_path)
    assert [each.step for each in job.outputs(timeout)] == [each.step for each in job.result(timeout)] == [1000]
    job.cancel(TIMEOUT)
    assert len(job.result(timeout)) == 1


@pytest.mark.parametrize(
    ("end", "message"),
    [
        (lambda job: job.cancel(), "was cancelled"),
        (lambda job: job.cancel(float("inf")), "was cancelled"),
        (
            lambda job: job._process.kill(),
            r"was terminated by SIGKILL\. The system kills processes when memory runs out",
        ),
        (lambda job: job._process.send_signal(64), "was terminated by SIGRTMAX"),
        (lambda job: job._process.send_signal(63), "was terminated by signal 63"),
    ],
)
def test_terminated_job_reports_the_signal(folder, tmp_path, end, message):
    os.mkfifo(tmp_path / "gate")
    script = "import sys\nprint('synthesize: warning: something else', file=sys.stderr)\n"
    script += f"print('begun', flush=True)\nopen('{tmp_path}/gate').read()"
    job = launch(folder, sigma_rels=[0.07], out=tmp_path, python=interpreter(tmp_path, script))
    assert job._line(0, TIMEOUT) == "begun\n"
    end(job)
    with pytest.raises(WorkerError, match=message):
        job.result(TIMEOUT)


def test_progress_is_reported_in_bytes_up_to_all_of_them(folder, tmp_path):
    reported = []
    job = launch(
        folder, sigma_rels=[0.07], out=tmp_path, progress=lambda *numbers: reported.append(numbers), tolerance=0
    )
    job.result(TIMEOUT)
    assert reported[-1] == (10 * 2 * 500 * 4,) * 2
    assert all(type(number) is int for numbers in reported for number in numbers)
    assert "progress" not in job._stderr


def test_error_of_the_progress_callback_is_raised(folder, tmp_path):
    calls = []

    def progress(done, total):
        calls.append(done)
        raise KeyError("mine")

    job = launch(folder, sigma_rels=[0.07], out=tmp_path, steps=[500, 1000], progress=progress)
    with pytest.raises(KeyError, match="mine"):
        job.result(TIMEOUT)
    assert len(calls) == 1
    assert len(list(tmp_path.glob("*.safetensors"))) == 2


def test_abandoned_job_ends_without_a_warning(folder, tmp_path):
    process = launch(folder, sigma_rels=[0.07], out=tmp_path / "out")._process
    drains = [each for each in threading.enumerate() if each.name == "synthesize-stderr"]
    for drain in drains:
        drain.join(TIMEOUT)
    assert process.returncode == 0
