"""Whether another process still runs, from the record that it left: in a snapshot's stamp or in a file's name.

Two processes of one host can have the same id, one after the other, so a record contains the start time as well. On
Linux it also contains the boot id (no two machines share one) and the namespace in which the process id is unique (a
container's). A signature is stricter, because it decides whether files are removed: it has the start of the process in
ticks since boot, which setting a clock does not change.
"""

from __future__ import annotations

import hashlib
import os
import re
import socket
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Literal, NamedTuple

ProcessState = Literal["alive", "gone", "elsewhere", "unknown"]
"""Runs on this host; has ended; belongs to another host or container; cannot be determined."""

SIGNATURE = re.compile(r"([0-9a-f]{16})\.([0-9a-f]{16})\.([0-9]+)\.([0-9]+)\.([0-9]+)")
"""Host, boot id, namespace, process id and start of a ``signature()``."""

# psutil computes start times from the boot time, which the system rounds.
_SAME_START_SECONDS = 2.0
# Clocks of machines and file servers differ: a file must be older than the boot by more than this.
_CLOCK_SKEW_SECONDS = 60.0


def identity(pid: int) -> dict[str, str | int | float]:
    """Return the record of a process of this machine: what ``process_state`` and a person need to find it again.

    Args:
        pid: Its process id, in the namespace of this process.

    Returns:
        ``host``, ``pid`` and ``started`` (seconds since 1970); where Linux has them, also ``boot`` (the machine's boot
        id, 16 hexadecimal digits) and ``pid_namespace`` (the inode of the namespace in which ``pid`` is unique).
    """
    import psutil  # imported late: most programs of the package never need it

    found = {"host": socket.gethostname(), "pid": pid, "started": psutil.Process(pid).create_time()}
    try:
        return found | {"boot": _boot_id(), "pid_namespace": _pid_namespace()}
    except (OSError, ValueError):
        return found


def process_state(process: Mapping[str, str | int | float], *, silent_seconds: float = 0.0) -> ProcessState:
    """Return whether a recorded process still runs.

    Args:
        process: The record that ``identity`` made, as in a stamp's ``trainer``. Older records lack ``boot`` and
            ``pid_namespace``.
        silent_seconds: Seconds since the process last wrote something.

    Returns:
        "alive" or "gone" for a process that this process can see. "elsewhere" for a process of another host or another
        container; containers may share the name of their host. "unknown" if the record is incomplete or the system does
        not show the process.
    """
    if "host" not in process:
        return "unknown"
    if process["host"] != socket.gethostname():
        return "elsewhere"
    with suppress(OSError, ValueError):
        if process.get("boot", own := _boot_id()) != own:
            return _state_across_boots(silent_seconds)
        if process.get("pid_namespace", own_namespace := _pid_namespace()) != own_namespace:
            return "elsewhere"
    import psutil  # imported late: most listings contain no process of this host

    try:
        found = psutil.Process(int(process["pid"]))
        started = float(found.create_time())
        if found.status() == psutil.STATUS_ZOMBIE:
            return "gone"  # it has ended, and its parent has not read its exit status
        return "alive" if abs(started - float(process["started"])) < _SAME_START_SECONDS else "gone"
    except psutil.NoSuchProcess:
        return "gone"
    except (psutil.Error, KeyError, ValueError):
        return "unknown"


class _Signature(NamedTuple):
    host: str
    boot_id: str
    namespace: int
    pid: int
    started: int


def signature() -> str:
    """Return a text that identifies this process and fits into a file name; only its id where /proc lacks the rest.

    The signature is computed on every call (about 0.1 ms), because it changes with a fork.
    """
    try:
        host = hashlib.sha256(socket.gethostname().encode()).hexdigest()[:16]
        boot_id, namespace = _boot_id(), _pid_namespace()
        pid, started = _pid_and_start("self")
    except (OSError, ValueError, IndexError):
        return str(os.getpid())
    return f"{host}.{boot_id}.{namespace}.{pid}.{started}"


def state_of_signature(text: str, *, untouched_seconds: float) -> ProcessState:
    """Return whether the process whose signature is on a file still runs.

    Args:
        text: The signature that the process computed with ``signature()``.
        untouched_seconds: Seconds since the last change of the file.

    Returns:
        "gone" only if the end of the process is certain: this machine has no such process, or this machine has booted
        since and the file is older than the boot. "elsewhere" for another machine or another container, whose
        processes this process cannot see.
    """
    theirs, own = _parse_signature(text), _parse_signature(signature())
    if theirs is None or own is None:
        return "unknown"
    if theirs.boot_id != own.boot_id:
        return _state_across_boots(untouched_seconds) if theirs.host == own.host else "elsewhere"
    if theirs.namespace != own.namespace:
        return "elsewhere"
    return _local_state(theirs)


def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().replace("-", "")[:16]


def _pid_namespace() -> int:
    return int(re.sub("[^0-9]", "", os.readlink("/proc/self/ns/pid")))


def _state_across_boots(silent_seconds: float) -> ProcessState:
    """Return the state of a process of another boot of a machine with this machine's name."""
    # Another machine may have the same host name, but a process that still writes has written since this boot.
    return "gone" if silent_seconds > time.clock_gettime(time.CLOCK_BOOTTIME) + _CLOCK_SKEW_SECONDS else "elsewhere"


def _local_state(process: _Signature) -> ProcessState:
    """Return the state of a process of this boot and namespace."""
    try:
        return "alive" if _pid_and_start(process.pid)[1] == process.started else "gone"
    except FileNotFoundError:
        pass  # the process has ended, or it is another user's and a restricted /proc hides it
    except (OSError, ValueError, IndexError):
        return "unknown"
    # kill() distinguishes these two cases: it raises PermissionError for another user's process.
    try:
        os.kill(process.pid, 0)
    except ProcessLookupError:
        return "gone"
    except (OSError, OverflowError):
        return "unknown"
    return "unknown"


def _parse_signature(text: str) -> _Signature | None:
    match = SIGNATURE.fullmatch(text)
    return _Signature(match[1], match[2], int(match[3]), int(match[4]), int(match[5])) if match else None


def _pid_and_start(process: int | str) -> tuple[int, int]:
    """Return process id and start in ticks since boot: fields 1 and 22 of ``/proc/<pid>/stat`` (proc(5)).

    Field 2 is the program's name in parentheses, which may contain spaces and parentheses itself.
    """
    pid, _, rest = Path(f"/proc/{process}/stat").read_text(errors="replace").partition(" ")
    return int(pid), int(rest.rpartition(")")[2].split()[19])
