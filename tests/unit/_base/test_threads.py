"""What happens where the system does not start more threads or processes."""

from __future__ import annotations

import subprocess
import threading

import pytest
import torch

from nitrous_ema import AsyncPostHocEMA, NitrousError
from nitrous_ema._base.threads import thread_errors
from nitrous_ema.async_ import synthesize_worker
from tests.support.snapshot_folders import layout_of, record, write_run


@pytest.fixture
def threads_left(monkeypatch):
    """Return a function that sets how many more threads the system starts."""
    start = threading.Thread.start

    def limit(count: int) -> None:
        left = [count]

        def start_or_refuse(thread: threading.Thread) -> None:
            if not left[0]:
                raise RuntimeError("can't start new thread")  # what Python makes of EAGAIN
            left[0] -= 1
            start(thread)

        monkeypatch.setattr(threading.Thread, "start", start_or_refuse)

    return limit


def own_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith(("nitrous-ema", "synthesi"))]


@pytest.fixture
def folder(tmp_path):
    write_run(tmp_path / "snapshots", layout_of([record("w", (50,))]), range(10, 201, 10))
    return tmp_path / "snapshots"


def test_other_errors_pass():
    with pytest.raises(RuntimeError, match="another"), thread_errors():
        raise RuntimeError("another")


@pytest.mark.parametrize("count", [0, 1, 2])
def test_constructor_refuses_and_leaves_no_thread(count, tmp_path, threads_left):
    threads_left(count)
    with pytest.raises(NitrousError, match=r"A thread could not be started.*ulimit -u"):
        AsyncPostHocEMA(torch.nn.Linear(300, 300), checkpoint_folder=tmp_path / "s", num_writers=2)
    for thread in own_threads():
        thread.join(60)
    assert own_threads() == []


@pytest.mark.parametrize("count", [0, 1])
def test_worker_says_one_line(count, folder, tmp_path, threads_left, capsys):
    threads_left(count)
    assert synthesize_worker.main([str(folder), "--sigma-rel", "0.07", "--out", str(tmp_path / "out")]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines()[-1].startswith("synthesize: error: A thread could not be started")
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("count", [0, 1])
def test_launch_raises_and_ends_the_process_that_it_started(count, folder, tmp_path, threads_left, monkeypatch):
    started = []
    popen = subprocess.Popen
    monkeypatch.setattr(
        subprocess, "Popen", lambda *args, **kwargs: started.append(popen(*args, **kwargs)) or started[0]
    )
    threads_left(count)
    with pytest.raises(NitrousError, match="A thread could not be started"):
        synthesize_worker.launch(folder, sigma_rels=[0.07], out=tmp_path / "out")
    assert started[0].poll() is not None
    for pipe in (started[0].stdout, started[0].stderr):
        pipe.close()


def test_launch_raises_where_no_process_can_be_started(folder, tmp_path, monkeypatch):
    def refuse(*args: object, **kwargs: object) -> None:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    with pytest.raises(NitrousError, match=r"could not be started: Resource temporarily unavailable.*ulimit -u"):
        synthesize_worker.launch(folder, sigma_rels=[0.07], out=tmp_path / "out")
