"""Whether a process that left its name somewhere still runs: in a snapshot's stamp, or in the name of a file.

Two processes of one host may have had the same id, one after the other: the start time tells them apart. A signature
is stricter than that, because files are removed by it. It says what Linux tells a process of itself for certain: the
start of the kernel (no two machines have the same), the namespace in which the process id counts (a container's), and
the process's start in ticks of that kernel, which no setting of a clock moves.
"""

from __future__ import annotations

import hashlib
import os
import re
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, NamedTuple

_SAME_START_SECONDS = 2.0  # the system's boot time, from which start times are computed, is rounded

SIGNATURE = re.compile(r"([0-9a-f]{16})\.([0-9a-f]{16})\.([0-9]+)\.([0-9]+)\.([0-9]+)")
_STARTING_SECONDS = 60.0  # clocks of machines and file servers differ

ProcessState = Literal["alive", "gone", "elsewhere", "unknown"]


def process_state(process: Mapping[str, str | int | float]) -> ProcessState:
    """What became of a process.

    Args:
        process: Its ``host``, ``pid`` and ``started`` (seconds since 1970), as a stamp's ``trainer`` has them.

    Returns:
        "alive" or "gone" if it is one of this host, "elsewhere" if it is not, "unknown" if it was not written down.
    """
    if "host" not in process:
        return "unknown"
    if process["host"] != socket.gethostname():
        return "elsewhere"
    import psutil  # here, since most listings ask about no process of this host

    try:
        found = psutil.Process(int(process["pid"]))
        started = float(found.create_time())
        if found.status() == psutil.STATUS_ZOMBIE:
            return "gone"  # it has ended, and only its parent has not asked how
        return "alive" if abs(started - float(process["started"])) < _SAME_START_SECONDS else "gone"
    except psutil.NoSuchProcess:
        return "gone"
    except (psutil.Error, KeyError, ValueError):
        return "unknown"


class _Process(NamedTuple):
    host: str
    kernel: str
    namespace: int
    pid: int
    started: int


def signature() -> str:
    """Who this process is, in a few characters that fit a file name; only its id where the system tells no more.

    Asked for anew each time (some 0.1 ms): after a fork it is another's.
    """
    try:
        host = hashlib.sha256(socket.gethostname().encode()).hexdigest()[:16]
        kernel = Path("/proc/sys/kernel/random/boot_id").read_text().replace("-", "")[:16]
        namespace = re.sub("[^0-9]", "", os.readlink("/proc/self/ns/pid"))
        pid, started = _pid_and_start("self")
    except (OSError, ValueError, IndexError):
        return str(os.getpid())
    return f"{host}.{kernel}.{namespace}.{pid}.{started}"


def state_of_signature(text: str, *, untouched_seconds: float) -> ProcessState:
    """What became of the process that left this signature on a file.

    Args:
        text: Its ``signature()``.
        untouched_seconds: For how long nothing has happened to the file.

    Returns:
        "gone" only if that is certain: there is no such process, or this machine has started since and the file is
        older than that. Of another machine or another container nothing is known: "elsewhere".
    """
    theirs, mine = _parsed(text), _parsed(signature())
    if theirs is None or mine is None:
        return "unknown"
    if theirs.kernel != mine.kernel:
        # Another machine may have this one's name; but what it still writes to is not that old.
        is_older = untouched_seconds > time.clock_gettime(time.CLOCK_BOOTTIME) + _STARTING_SECONDS
        return "gone" if theirs.host == mine.host and is_older else "elsewhere"
    if theirs.namespace != mine.namespace:
        return "elsewhere"
    return _fate_here(theirs)


def _fate_here(process: _Process) -> ProcessState:
    try:
        return "alive" if _pid_and_start(process.pid)[1] == process.started else "gone"
    except FileNotFoundError:
        pass  # there is none, or it is another user's and /proc does not show it
    except (OSError, ValueError, IndexError):
        return "unknown"
    try:
        os.kill(process.pid, 0)
    except ProcessLookupError:
        return "gone"
    except (OSError, OverflowError):
        return "unknown"
    return "unknown"


def _parsed(text: str) -> _Process | None:
    found = SIGNATURE.fullmatch(text)
    return _Process(found[1], found[2], int(found[3]), int(found[4]), int(found[5])) if found else None


def _pid_and_start(process: int | str) -> tuple[int, int]:
    """Process id and start (in ticks since the kernel's): fields 1 and 22 of proc(5)'s ``stat``; 2 is any text."""
    pid, _, rest = Path(f"/proc/{process}/stat").read_text(errors="replace").partition(" ")
    return int(pid), int(rest.rpartition(")")[2].split()[19])
