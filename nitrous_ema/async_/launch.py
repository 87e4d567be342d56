"""The synthesis process, started and awaited from Python."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import IO, Any

from nitrous_ema import exits
from nitrous_ema.errors import WorkerError

_MODULE = "nitrous_ema.async_.synthesize_worker"
_KEPT_STDERR_CHARACTERS = 16_000
_KILL_AFTER_SECONDS = 10.0
WARNING = "synthesize: warning: "
"""How the worker begins a line on stderr that warns of the averages it is going to write."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """One average that the worker has written."""

    sigma_rel: float
    """Its length, as a fraction of the training time."""
    gamma: float
    """The same as an exponent."""
    step: int
    """Step at which it ends."""
    t: float
    """Training time at which it ends."""
    run: str
    """Run of that snapshot."""
    path: Path
    """The file."""
    profile_error: float
    """Distance of its profile from the one asked for, relative to the norm of the latter."""
    weight_l1: float
    """Sum of the absolute weights."""
    weight_l2: float
    """Root of the sum of the squared weights."""
    rounding: float
    """Expected rms rounding error of a weight, relative to its size, from how the snapshots are stored."""
    columns: int
    """Profiles of snapshots that were read."""
    steps_read: tuple[int, ...]
    """Steps of the snapshots that were read for all outputs together, ascending."""
    lower_bound: int
    """No fewer snapshots give all outputs within the tolerance; 1 where that is not known."""
    tolerance: float
    """Relative profile error that reading few snapshots was allowed to add."""
    excluded: tuple[int, ...]
    """Steps left out on request."""
    bytes_read: int
    """Bytes read for all outputs together."""
    seconds: float
    """Seconds from the worker's start of work until this file was durable."""

    @classmethod
    def parse(cls, line: str) -> Output:
        """Read one line of the worker's stdout."""
        found = json.loads(line)
        known = {field.name: found[field.name] for field in fields(cls)}
        steps = {name: tuple(known[name]) for name in ("excluded", "steps_read")}
        return cls(**{**known, **steps, "path": Path(known["path"])})


class Job:
    """A synthesis process. It goes on if nobody waits for it; it ends with this process only if cancelled."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self._lines: list[str] = []  # filled by one thread; read after that thread has ended
        self._stderr = ""  # the same
        # Both pipes are drained all the time: a worker with much to say must not stop for a reader.
        self._drains = [
            threading.Thread(target=self._drain_stdout, name="synthesize-stdout", daemon=True),
            threading.Thread(target=self._drain_stderr, name="synthesize-stderr", daemon=True),
        ]
        for drain in self._drains:
            drain.start()

    def done(self) -> bool:
        """Whether the process has ended, well or not."""
        return self._process.poll() is not None

    def result(self, timeout: float | None = None) -> list[Output]:
        """Wait for the process and return what it wrote, in the order of the lengths asked for.

        Args:
            timeout: Seconds to wait, for ever by default. The process goes on after a timeout.

        Raises:
            TimeoutError: It has not ended yet.
            ValueError: It found an argument to be wrong; the message is its own.
            WorkerError: It failed or was cancelled; has ``exit_code`` and the last of its ``stderr``.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        try:
            status = self._process.wait(timeout)
            for drain in self._drains:
                drain.join(None if deadline is None else max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"the synthesis has not ended after {timeout} seconds; it goes on.") from None
        if any(drain.is_alive() for drain in self._drains):
            raise TimeoutError(f"the synthesis has ended, but not its output after {timeout} seconds; wait again.")
        if status == exits.USAGE:
            raise ValueError(_last_message(self._stderr))
        if status != 0:
            raise WorkerError(
                f"the synthesis process ended with status {status}: {_last_message(self._stderr)}",
                exit_code=status,
                stderr=self._stderr,
            )
        return [Output.parse(line) for line in self._lines]

    @property
    def warnings(self) -> tuple[str, ...]:
        """What the worker warned of; complete when result() has returned."""
        return tuple(line.removeprefix(WARNING) for line in self._stderr.splitlines() if line.startswith(WARNING))

    def cancel(self, timeout: float = _KILL_AFTER_SECONDS) -> None:
        """End the process and wait until it has ended; outputs that are already written stay.

        Args:
            timeout: Seconds it gets for cleaning up before it is killed.
        """
        self._process.terminate()
        try:
            self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _drain_stdout(self) -> None:
        with _pipe(self._process.stdout) as pipe:
            for line in pipe:
                self._lines.append(line)

    def _drain_stderr(self) -> None:
        with _pipe(self._process.stderr) as pipe:
            for line in pipe:
                self._stderr = (self._stderr + line)[-_KEPT_STDERR_CHARACTERS:]


def launch(
    snapshots: str | os.PathLike[str],
    *,
    out: str | os.PathLike[str],
    sigma_rels: Sequence[float] | None = None,
    gammas: Sequence[float] | None = None,
    step: int | None = None,
    run: str | None = None,
    exclude: Sequence[int] = (),
    tolerance: float | None = None,
    dtype: str | None = None,
    format: str = "safetensors",
    memory: int | str | None = None,
    nice: str = "auto",
    python: str | os.PathLike[str] = sys.executable,
) -> Job:
    """Start a process that synthesizes averages from a snapshot folder into files.

    It reads the folder only: no GPU, no trainer, no code of the user's. It uses the same installation of this package
    as this process.

    Args:
        snapshots: The snapshot folder.
        out: Folder of the outputs, ``step-<step>-sigma-<sigma_rel>.<format>``; made if it is not there.
        sigma_rels: Lengths as fractions of the training time, in (0, 12 ** -0.5), or
        gammas: lengths as exponents. Exactly one of the two.
        step: Step at which the averages end, one with a committed snapshot; the newest by default.
        run: Run whose snapshots are read, with its ancestors; the newest by default.
        exclude: Steps to leave out, damaged ones for example.
        tolerance: Relative profile error that may be added to read fewer snapshots, 1e-3 by default; 0 reads all.
        dtype: Type of floating tensors: "float32", "bfloat16", "float16", "float64"; by default as in the model.
        format: "safetensors", or "pt" for a dict of tensors that ``torch.load(weights_only=True)`` reads.
        memory: Memory to stay within, in bytes or as "1GiB" (the default).
        nice: Low priority: "auto" (while the trainer lives on this machine), "always" or "never".
        python: The interpreter.

    Returns:
        The job; its result() waits.

    Raises:
        ValueError: Both or neither of ``sigma_rels`` and ``gammas``. Other wrong arguments are told by result().
    """
    if (sigma_rels is None) == (gammas is None):
        raise ValueError("sigma_rels and gammas: exactly one of them says which averages are wanted.")
    sequences: dict[str, Any] = {"sigma_rels": sigma_rels, "gammas": gammas, "exclude": exclude}
    for name, given in sequences.items():
        if given is not None and (isinstance(given, str) or not isinstance(given, Iterable)):
            raise TypeError(f"{name} is {given!r}; expected a sequence of numbers.")
    option, lengths = ("--sigma-rel", sigma_rels) if sigma_rels is not None else ("--gamma", gammas)
    arguments = [
        f"{option}={','.join(repr(float(length)) for length in lengths or ())}",
        f"--out={Path(out).absolute()}",
        f"--format={format}",
        f"--nice={nice}",
    ]
    optional = {"step": step, "run": run, "dtype": dtype, "memory": memory, "tolerance": tolerance}
    arguments += [f"--{name}={value}" for name, value in optional.items() if value is not None]
    arguments += [f"--exclude={excluded}" for excluded in exclude]
    return Job(_start([os.fspath(python), "-m", _MODULE, *arguments, "--", str(Path(snapshots).absolute())]))


def _start(command: Sequence[str]) -> subprocess.Popen[str]:
    # The child imports the package that this process runs, wherever that lies and whatever the working directory
    # holds: `python -m` looks there first.
    home = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(part for part in (home, os.environ.get("PYTHONPATH")) if part)
    return subprocess.Popen(
        command,
        cwd=home,
        env={**os.environ, "PYTHONPATH": path},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        errors="replace",
    )


def _pipe(pipe: IO[str] | None) -> IO[str]:
    if pipe is None:
        raise RuntimeError("the worker was started without a pipe; this is a bug of nitrous_ema, please report it.")
    return pipe


def _last_message(stderr: str) -> str:
    """What the worker said last; the whole traceback where it ended in one."""
    _, traceback, rest = stderr.rpartition("Traceback (most recent call last):")
    if traceback:
        return traceback + rest.rstrip()
    lines = stderr.strip().splitlines()
    return lines[-1] if lines else "it said nothing"
