"""Whether processes run, from records in stamps and from signatures."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from nitrous_ema._base import processes
from nitrous_ema._base.processes import identity, process_state, signature, state_of_signature

FOREVER = 1e10


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, "alive"),
        ({"host": "another"}, "elsewhere"),
        ({"started": 5.0}, "gone"),
        ({"pid": 2**22 + 1}, "gone"),
        ({"pid": "x"}, "unknown"),
    ],
)
def test_process_is_alive_if_host_id_and_start_agree(change, expected):
    me = psutil.Process()
    assert (
        process_state({"host": socket.gethostname(), "pid": me.pid, "started": me.create_time(), **change}) == expected
    )


def test_identity_names_this_process_machine_boot_and_namespace():
    found = identity(os.getpid())
    assert process_state(found) == "alive"
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip().replace("-", "")
    assert found == {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "started": psutil.Process().create_time(),
        "boot": boot_id[:16],
        "pid_namespace": os.stat("/proc/self/ns/pid").st_ino,
    }


@pytest.mark.parametrize(
    ("changes", "silent_seconds", "expected"),
    [
        ({}, FOREVER, "alive"),
        ({"pid_namespace": 1, "pid": 2**22 + 1}, FOREVER, "elsewhere"),  # a container on the host's network
        ({"boot": "0" * 16}, 0, "elsewhere"),
        ({"boot": "0" * 16}, FOREVER, "gone"),
        ({"boot": "0" * 16, "host": "far"}, FOREVER, "elsewhere"),
    ],
)
def test_process_of_another_container_or_boot_is_gone_only_if_that_is_certain(changes, silent_seconds, expected):
    assert process_state(identity(os.getpid()) | changes, silent_seconds=silent_seconds) == expected


def test_identity_without_proc_has_no_boot(monkeypatch):
    monkeypatch.setattr(processes, "_boot_id", lambda: Path("/proc/missing").read_text())
    assert set(identity(os.getpid())) == {"host", "pid", "started"}


@pytest.mark.parametrize("process", [{}, {"host": socket.gethostname()}])
def test_process_without_a_full_record_is_unknown(process):
    assert process_state(process) == "unknown"


def changed(**parts):
    names = ("host", "boot_id", "namespace", "pid", "started")
    mine = dict(zip(names, signature().split("."), strict=True))
    return ".".join((mine | parts).values())


@pytest.mark.parametrize(
    ("changes", "untouched_seconds", "expected"),
    [
        ({}, FOREVER, "alive"),
        ({"started": "5"}, 0, "gone"),
        ({"pid": str(2**22 + 1)}, 0, "gone"),
        ({"pid": str(10**30)}, 0, "unknown"),
        ({"namespace": "1", "pid": str(2**22 + 1)}, FOREVER, "elsewhere"),
        ({"boot_id": "0" * 16}, FOREVER, "gone"),
        ({"boot_id": "0" * 16}, 0, "elsewhere"),
        ({"boot_id": "0" * 16, "host": "0" * 16}, FOREVER, "elsewhere"),
    ],
)
def test_process_is_gone_only_if_that_is_certain(changes, untouched_seconds, expected):
    assert state_of_signature(changed(**changes), untouched_seconds=untouched_seconds) == expected


@pytest.mark.parametrize("text", ["1234", "", lambda: changed() + ".5"], ids=["pid alone", "nothing", "one part more"])
def test_process_of_a_malformed_signature_is_unknown(text):
    text = text() if callable(text) else text
    assert state_of_signature(text, untouched_seconds=FOREVER) == "unknown"


def test_signature_is_unique_and_shows_when_its_process_has_ended():
    code = "from nitrous_ema._base.processes import signature; import sys; sys.stdout.write(signature())"
    theirs = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300
    ).stdout
    assert theirs != signature() == signature()
    assert state_of_signature(theirs, untouched_seconds=0) == "gone"


def test_signature_after_a_fork_is_the_childs():
    code = """
import os, sys
from nitrous_ema._base.processes import signature
mine = signature()
child = os.fork()
if child == 0:
    os._exit(0 if signature() != mine else 1)
sys.exit(os.waitpid(child, 0)[1] != 0)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


@pytest.mark.parametrize("hidden", ["/proc/sys/kernel/random/boot_id", "/proc/self/stat"])
def test_without_proc_no_process_is_reported_gone(monkeypatch, hidden):
    read = Path.read_text

    def refuse(path, *arguments, **more):
        if str(path) == hidden:
            raise PermissionError(path)
        return read(path, *arguments, **more)

    known = changed(started="5")
    monkeypatch.setattr(Path, "read_text", refuse)
    assert signature() == str(os.getpid())
    assert state_of_signature(known, untouched_seconds=FOREVER) == "unknown"


def test_process_that_ended_and_was_not_waited_for_is_gone():
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        found = psutil.Process(process.pid)
        described = {"host": socket.gethostname(), "pid": process.pid, "started": found.create_time()}
        assert process_state(described) == "alive"
        process.stdin.close()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert found.status() == psutil.STATUS_ZOMBIE
        assert process_state(described) == "gone"
